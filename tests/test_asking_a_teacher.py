"""A teacher over real HTTP on loopback: how it is asked, and what becomes of a teacher or a run that fails."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastapi.responses import JSONResponse
from teacher_server import answer, completion, failure, number_of, rejected, sound

from clsgen.build_explanations import ANSWERS, build, main
from clsgen.build_explanations import BuildArguments as Build
from clsgen.explanations.filters import FilterArguments
from clsgen.explanations.teacher import TeacherArguments, TeacherError
from clsgen.loopback import is_loopback
from clsgen.tasks import class_counts, load_task

ROOT = Path(__file__).resolve().parents[1]


def test_the_label_is_no_part_of_a_blind_request(build_with_teacher, teacher):
    build_with_teacher(protocol="blind")
    for body in teacher.bodies:
        assert body["messages"][1]["content"].count("not good") == 1  # as one of two possible answers
        assert "expert" not in body["messages"][1]["content"]
        assert body["response_format"]["json_schema"]["schema"]["additionalProperties"] is False


def test_what_was_answered_is_not_asked_again(build_with_teacher, teacher):
    first = build_with_teacher()
    count = len(teacher.bodies)
    second = build_with_teacher(filters={"min_words": 100, "max_words": 200}, min_kept_per_class=0)
    assert len(teacher.bodies) == count
    assert rejected(second)["bad"] == {"length": 6}
    assert first["ledger"]["train"]["bad"]["kept"] == 6
    build_with_teacher(teacher={"temperature": 0.5})
    assert len(teacher.bodies) == 2 * count  # another parameter is another question


def test_rows_with_the_same_text_ask_once(build_with_teacher, teacher, source_task):
    source = source_task()
    lines = (source / "train.jsonl").read_text().splitlines()
    same = {**json.loads(lines[1]), "id": "again"}
    (source / "train.jsonl").write_text("\n".join([*lines, json.dumps(same)]))
    build_with_teacher(source)
    assert teacher.asked()[1] == 1


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (failure(401), r"refuses the key \(status 401\)"),
        (failure(429, code="rate_limit_exceeded"), r"429 .*code rate_limit_exceeded.* after 1 further tries"),
        (failure(404), "no model 'teacher'"),
        (failure(500), "fails .*on 3 rows in a row"),
        (failure(400, "no such parameter"), "no such parameter"),
        (lambda body: failure(400, f"bad input: {body['messages'][1]['content'][100:200]}"), "repeats what was sent"),
        (failure(400, "your key secret-key-123 is odd"), "repeats what was sent"),
    ],
)
def test_a_teacher_that_cannot_be_asked_is_one_clear_error(
    build_with_teacher, teacher, monkeypatch, response, message
):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-123")
    teacher.behave = response if callable(response) and not isinstance(response, JSONResponse) else lambda _: response
    with pytest.raises(TeacherError, match=message) as raised:
        build_with_teacher()
    assert "secret-key-123" not in str(raised.value)
    assert "of a" not in str(raised.value)
    assert teacher.headers[0]["authorization"] == "Bearer secret-key-123"


def test_an_endpoint_that_is_down(build_with_teacher, teacher):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(TeacherError, match=r"cannot be reached \(0 further tries\)\. Is it up\?"):
        build_with_teacher(teacher={"base_url": f"http://127.0.0.1:{port}/v1", "max_retries": 0})


def test_an_error_shows_no_password_of_the_address(build_with_teacher, teacher):
    teacher.behave = lambda body: failure(404)
    with pytest.raises(TeacherError, match=r"http://\.\.\.@127\.0\.0\.1:\d+/v1 knows no chat endpoint"):
        build_with_teacher(teacher={"base_url": teacher.url.replace("//", "//me:secret@")})


def test_a_storm_of_refusals_passes(build_with_teacher, teacher):
    storm = iter([failure(429), failure(503)] * 3)
    teacher.behave = lambda body: next(storm, None) or sound(body)
    assert build_with_teacher(teacher={"max_retries": 8, "concurrency": 2})["ledger"]["train"]["bad"]["kept"] == 6


def test_a_row_that_fails_for_now_is_asked_alone_next_time(build_with_teacher, teacher, tmp_path):
    teacher.behave = lambda body: failure(500) if number_of(body) == 5 else sound(body)
    with pytest.raises(ValueError, match=r"failed on 1 row\(s\) \(status 500"):
        build_with_teacher()
    assert not (tmp_path / "built" / "task.yaml").exists()
    report = build_with_teacher(allow_unanswered=True)
    assert rejected(report)["good"]["unanswered"] == 1
    teacher.behave, teacher.bodies = sound, []
    assert rejected(build_with_teacher())["good"] == {"unsupported_by_text": 1}
    assert teacher.asked() == {5: 1}


def test_a_row_that_never_ends_is_one_row(build_with_teacher, teacher):
    async def slow(body):
        await asyncio.sleep(3)
        return sound(body)

    teacher.behave = lambda body: slow(body) if number_of(body) in (1, 5, 7) else sound(body)
    asked = {"timeout": 0.5, "max_retries": 0, "concurrency": 1}
    report = build_with_teacher(teacher=asked, allow_unanswered=True)
    assert rejected(report)["good"]["unanswered"] == 3
    teacher.behave = slow
    with pytest.raises(TeacherError, match=r"no answer in 0\.5 seconds\) on 3 rows in a row"):
        build_with_teacher(teacher={**asked, "temperature": 0.5})


def test_a_text_that_a_server_does_not_take_is_asked_about_in_the_next_run(build_with_teacher, teacher):
    behaviour = {
        2: lambda: failure(400, "blocked", code="content_filter"),
        4: lambda: failure(400, "This model's maximum context length is 10 tokens"),
        6: lambda: completion("", "content_filter"),
    }
    teacher.behave = lambda body: behaviour.get(number_of(body), lambda: sound(body))()
    assert rejected(build_with_teacher())["bad"] == {"content_filter": 2, "too_long": 1}
    teacher.behave, teacher.bodies = sound, []
    assert rejected(build_with_teacher())["bad"] == {"content_filter": 1}
    assert teacher.asked() == {2: 1, 4: 1}


def test_a_cut_answer_is_asked_for_again_with_more_room(build_with_teacher, teacher):
    teacher.behave = lambda body: completion("{", "length") if body["max_tokens"] < 1024 else sound(body)
    report = build_with_teacher(teacher={"max_tokens": 512})
    assert report["ledger"]["train"]["bad"]["kept"] == 6
    assert {body["max_tokens"] for body in teacher.bodies} == {512, 1024}


def test_answers_that_cannot_be_used_are_rejected_by_name(build_with_teacher, teacher):
    behaviour = {
        1: lambda: completion("{", "length"),
        2: lambda: completion("", "content_filter"),
        4: lambda: failure(400, "blocked", code="content_filter"),
        5: lambda: completion("There you are: it is good."),
        6: lambda: completion("", refusal="I will not."),
        7: lambda: answer("good", probability=0.1),
        8: lambda: failure(400, "This model's maximum context length is 10 tokens"),
        9: lambda: answer("maybe", probability=0.5),
        10: lambda: answer("good", probability=7),
        11: lambda: completion('{"explanation": ' + "[" * 100_000),
    }
    teacher.behave = lambda body: behaviour.get(number_of(body), lambda: sound(body))()
    report = build_with_teacher(min_kept_per_class=0)
    assert rejected(report) == {
        "bad": {"content_filter": 2, "refusal": 1, "too_long": 1, "malformed": 1},
        "good": {"malformed": 4, "truncated": 1, "unsupported_by_text": 1},
    }
    assert report["ledger"]["train"]["good"]["rows"] == 6
    asked = teacher.asked()
    assert (asked[2], asked[5]) == (1, 2)  # what would repeat a request word for word is not asked
    told = next(b["messages"] for b in teacher.bodies if number_of(b) == 7 and len(b["messages"]) > 2)
    assert "contradict each other" in told[-1]["content"]


@pytest.mark.parametrize(
    "wrap",
    [
        '<think>The label is 1. {{"verdict": 1}}</think>{}',
        "The text, hmm.</think>\n{}",
        "```json\n{}\n```",
        "Here it is: {{oops}} {} I hope it helps.",
    ],
)
def test_reasoning_and_chatter_are_no_part_of_an_explanation(build_with_teacher, teacher, tmp_path, wrap):
    teacher.behave = lambda body: completion(wrap.format(sound(body)), reasoning_content="I am thinking.")
    assert build_with_teacher()["ledger"]["train"]["bad"]["kept"] == 6
    for row in load_task(tmp_path / "built").splits["train"]:
        assert row["explanation"] is None or row["explanation"].startswith("The report number")


def test_a_thought_that_never_ends_is_no_answer(build_with_teacher, teacher):
    teacher.behave = lambda body: f"<think>{sound(body)}"
    assert rejected(build_with_teacher(min_kept_per_class=0))["bad"] == {"malformed": 6}


@pytest.mark.parametrize("concurrency", [1, 8])
def test_options_that_an_endpoint_does_not_take_are_left_out(build_with_teacher, teacher, concurrency):
    def picky(body):
        if "response_format" in body:
            return failure(400, "response_format is not supported")
        if "max_tokens" in body:
            return failure(400, "Use max_completion_tokens instead of max_tokens", param="max_tokens")
        return failure(400, "unsupported", param="temperature") if "temperature" in body else sound(body)

    teacher.behave = picky
    assert build_with_teacher(teacher={"concurrency": concurrency})["ledger"]["train"]["bad"]["kept"] == 6
    assert "max_completion_tokens" in teacher.bodies[-1]


def test_a_teacher_that_always_says_the_same_is_stopped(build_with_teacher, teacher, source_task):
    teacher.behave = lambda body: answer("good")
    with pytest.raises(TeacherError, match="verdict is 1 on all of the first 32 rows, of both labels"):
        build_with_teacher(source_task(rows=60), protocol="blind")
    assert len(teacher.bodies) < 60
    report = build_with_teacher(
        source_task(rows=60), protocol="blind", allow_constant_teacher=True, min_kept_per_class=0
    )
    assert rejected(report)["bad"] == {"verdict_agreement": 30}


def test_limit_asks_about_the_first_rows_and_keeps_all(build_with_teacher, teacher, tmp_path):
    report = build_with_teacher(limit=5)
    assert sorted(teacher.asked()) == [0, 1, 2, 3, 4]
    assert report["ledger"]["train"]["good"]["not_asked"] == 4
    assert len(load_task(tmp_path / "built").splits["train"]) == 12


def test_dry_run_asks_nothing(build_with_teacher, teacher, capsys, source_task, tmp_path):
    found = build_with_teacher(dry_run=True, teacher={"input_price": 1.0})
    assert teacher.bodies == []
    assert not (tmp_path / "built").exists()
    assert (found["least_requests"], found["most_requests"]) == (16, 32)
    assert 0 < found["least_cost_usd"] < found["most_cost_usd"]
    command = ["--task", str(source_task()), "--output_dir", str(tmp_path / "x"), "--model", "m", "--dry_run", "true"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 16


def test_killed_and_called_again(teacher, source_task, tmp_path):
    source = source_task(rows=40)

    def slow(body):
        time.sleep(0.05)
        return sound(body)

    teacher.behave = slow
    command = [
        sys.executable, "build_explanations.py", "--task", str(source), "--output_dir", str(tmp_path / "built"),
        "--model", "teacher", "--base_url", teacher.url, "--concurrency", "2", "--near_duplicate_similarity", "0.95",
    ]  # fmt: skip
    answers = tmp_path / "built" / ANSWERS
    client = subprocess.Popen(command, cwd=ROOT)
    while not answers.exists() or answers.read_bytes().count(b"\n") < 10:
        assert client.poll() is None
        time.sleep(0.01)
    client.send_signal(signal.SIGKILL)
    client.wait()
    with answers.open("ab") as file:
        file.write(b'{"key": "cut')  # a line that was being written
    written = {json.loads(line)["row"] for line in answers.read_text().splitlines()[1:-1]}
    teacher.bodies = []
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert not {f"r{n}" for n in teacher.asked()} & (written - {"r3"})
    built = load_task(tmp_path / "built")
    assert built.splits["train"]["id"] == [f"r{n}" for n in range(40)]
    assert class_counts(built.splits["train"])["explained"] == 39


def test_two_runs_at_a_time_are_refused(build_with_teacher, tmp_path):
    from clsgen.explanations.answers import AnswerStore

    store = AnswerStore(tmp_path / "built" / ANSWERS)
    with pytest.raises(BlockingIOError, match="in use by another run"):
        build_with_teacher()
    store.close()
    build_with_teacher()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000/v1", True), ("http://127.0.0.2/v1", True), ("http://[::1]:8000/v1", True),
        ("http://127.0.0.1.example.com/v1", False), ("http://localhost.example.com", False),
        ("http://10.0.0.1/v1", False), ("http://localhost@example.com/v1", False), ("http://0.0.0.0/v1", False),
    ],
)  # fmt: skip
def test_is_loopback(url, expected):
    assert is_loopback(url) is expected


def test_a_model_in_this_process(source_task, backbones, tmp_path):
    asked = Build(task=str(source_task(rows=4)), output_dir=str(tmp_path / "built"), min_kept_per_class=0)
    teacher = TeacherArguments(model=backbones["llama"], teacher="local", max_tokens=8, max_reasks=1, concurrency=3)
    report = build(asked, teacher, FilterArguments())
    counts = report["ledger"]["train"]
    assert sum(sum(each["rejected"].values()) for each in counts.values()) == 4  # it is random, and says nothing
    assert set(counts["bad"]["rejected"]) <= {"truncated", "malformed"}
    assert len(load_task(tmp_path / "built").splits["train"]) == 4
