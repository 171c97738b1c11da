"""Explanations from a teacher over real HTTP on loopback: whatever the teacher does, no row goes missing unsaid."""

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import uvicorn
import yaml
from datasets import load_dataset
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from huggingface_hub import DatasetCard

from clsgen.build_explanations import ANSWERS, build, main
from clsgen.build_explanations import BuildArguments as Build
from clsgen.explanations.filters import FilterArguments
from clsgen.explanations.teacher import TeacherArguments, TeacherError
from clsgen.loopback import is_loopback
from clsgen.publishing.hub import PublicationError
from clsgen.tasks import class_counts, load_task
from clsgen.train_sft_cls import TaskArguments, publication
from clsgen.trainer_clsgen import ClsGenSFTConfig

ROOT = Path(__file__).resolve().parent.parent
SPEC = {
    "name": "mine",
    "system_prompt": "You read reports.",
    "template": "Report {text}",
    "document": "text",
    "question": "Is it good?",
    "labels": ["bad", "good"],
    "verdicts": ["not good", "good"],
    "data_files": {"train": "train.jsonl", "validation": "validation.jsonl"},
    "license": "cc0-1.0",
}
ROWS = 12


def answer(verdict="good", probability=None, words="", **others):
    """A teacher's whole answer, as JSON."""
    explanation = f"The report number {words} speaks of an outcome that many people would call {verdict} on the whole."
    probability = probability if probability is not None else {"good": 0.9, "not good": 0.1}[verdict]
    return json.dumps({"explanation": explanation, "verdict": verdict, "probability": probability, **others})


def number_of(body):
    """The number of the report that a request is about."""
    return int(body["messages"][1]["content"].partition("Report ")[2].split()[0])


def sound(body):
    """A teacher that is right about every report but number 3, and finds no ground for what it is told about that."""
    number = number_of(body)
    if "An expert has settled" in body["messages"][1]["content"]:
        told = {
            "explanation": f"Nothing in the report number {number} speaks for the answer that was given to me here."
        }
        return json.dumps({**told, "supported_by_text": False})
    return answer("good" if (number % 2 == 1) != (number == 3) else "not good", words=str(number))


class Server:
    """An OpenAI-compatible server that behaves as told, and remembers what it was asked."""

    def __init__(self):
        self.behave, self.bodies, self.headers = sound, [], []
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def complete(request: Request):
            body = await request.json()
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            found = self.behave(body)
            return found if isinstance(found, JSONResponse) else completion(found)

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def asked(self):
        """How often each report was asked about."""
        return Counter(map(number_of, self.bodies))


def completion(content, finish_reason="stop", **message):
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return JSONResponse({"id": "1", "object": "chat.completion", "created": 0, "model": "teacher", "choices": [choice],
                         "usage": usage})  # fmt: skip


def failure(status, message="no", code=None, param=None):
    error = {"message": message, "code": code, "param": param, "type": "error"}
    return JSONResponse({"error": error}, status, headers={"retry-after-ms": "1"})


@pytest.fixture
def server():
    server = Server()
    server.thread.start()
    deadline = time.monotonic() + 30
    while not server.server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield server
    server.server.should_exit = True
    server.thread.join()


@pytest.fixture
def folder(tmp_path):
    def write(rows=ROWS, **spec):
        path = tmp_path / "source"
        path.mkdir(exist_ok=True)
        for split, numbers in (("train", range(rows)), ("validation", range(rows, rows + 4))):
            lines = [
                {"id": f"r{n}", "text": f"{n} tells of a {'good' if n % 2 else 'poor'} day.", "label": n % 2}
                for n in numbers
            ]
            (path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (path / "task.yaml").write_text(yaml.safe_dump({**SPEC, **spec}))
        return path

    return write


@pytest.fixture
def run(server, folder, tmp_path):
    """Builds from the task with the server as teacher."""

    def call(source=None, teacher=None, filters=None, **arguments):
        asked = Build(task=str(source or folder()), output_dir=str(tmp_path / "built"), **arguments)
        options = {"model": "teacher", "base_url": server.url, "max_retries": 1, **(teacher or {})}
        # The reports are alike, and so are the answers about them.
        return build(asked, TeacherArguments(**options), FilterArguments(**{"near_duplicate_similarity": 0.95,
                                                                            **(filters or {})}))  # fmt: skip

    return call


def rejected(report, split="train"):
    return {label: counts["rejected"] for label, counts in report["ledger"][split].items()}


def test_the_built_task_trains_and_its_card_tells_the_truth(run, server, tmp_path):
    report = run(results_dir=str(tmp_path / "results"))
    built = load_task(tmp_path / "built")
    assert class_counts(built.splits["train"]) == {
        "rows": 12, "positive": 6, "negative": 6, "unlabelled": 0, "explained": 11
    }  # fmt: skip
    assert built.splits["train"]["id"] == [f"r{n}" for n in range(12)]
    assert rejected(report) == {"bad": {}, "good": {"unsupported_by_text": 1}}
    assert report["teacher_quality"]["train"]["agreement"] == pytest.approx(11 / 12)
    assert server.asked() == {**dict.fromkeys(range(16), 1), 3: 2}
    data = load_dataset(str(tmp_path / "built"))["train"]
    assert data.features["label"].names == ["bad", "good"]
    assert data[3]["filter"] == "unsupported_by_text"
    assert data[3]["teacher_verdict"] == "bad"
    assert data[3]["explanation"] is None
    assert data[1]["protocol"] == "blind"
    assert data[1]["filter"] is None
    card = DatasetCard.load(tmp_path / "built" / "README.md")
    assert (card.data.license, card.data.size_categories) == ("cc0-1.0", "n<1K")
    assert card.data.dataset_info["splits"][0]["num_examples"] == 12
    assert "| train | good | 6 | 6 | 6 | 5 | 5 | 0 | unsupported_by_text 1 |" in card.text
    assert json.loads((tmp_path / "results" / "report.json").read_text())["ledger"] == report["ledger"]
    refused = [json.loads(line) for line in (tmp_path / "built" / "rejected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in refused] == ["r3"]


def test_a_disagreeing_row_is_explained_with_its_label_and_marked(run, server, tmp_path):
    def agreeable(body):
        if "An expert has settled" not in body["messages"][1]["content"]:
            return sound(body)
        assert '"good"' in body["messages"][1]["content"]
        words = "The report does tell of a day that was fine for everybody who took part in it."
        return json.dumps({"explanation": words, "supported_by_text": True})

    server.behave = agreeable
    report = run(file_format="jsonl")
    row = json.loads((tmp_path / "built" / "train.jsonl").read_text().splitlines()[3])
    assert row["protocol"] == "label_conditioned"
    assert row["filter"] is None
    assert row["teacher_verdict"] == "bad"
    assert row["explanation"].startswith("The report does tell")
    assert report["ledger"]["train"]["good"]["kept_label_conditioned"] == 1


def test_the_label_is_no_part_of_a_blind_request(run, server):
    run(protocol="blind")
    for body in server.bodies:
        assert body["messages"][1]["content"].count("not good") == 1  # as one of two possible answers
        assert "expert" not in body["messages"][1]["content"]
        assert body["response_format"]["json_schema"]["schema"]["additionalProperties"] is False


def test_what_was_answered_is_not_asked_again(run, server):
    first = run()
    count = len(server.bodies)
    second = run(filters={"min_words": 100, "max_words": 200}, min_kept_per_class=0)
    assert len(server.bodies) == count
    assert rejected(second)["bad"] == {"length": 6}
    assert first["ledger"]["train"]["bad"]["kept"] == 6
    run(teacher={"temperature": 0.5})
    assert len(server.bodies) == 2 * count  # another parameter is another question


def test_rows_with_the_same_text_ask_once(run, server, folder):
    source = folder()
    lines = (source / "train.jsonl").read_text().splitlines()
    same = {**json.loads(lines[1]), "id": "again"}
    (source / "train.jsonl").write_text("\n".join([*lines, json.dumps(same)]))
    run(source)
    assert server.asked()[1] == 1


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
def test_a_teacher_that_cannot_be_asked_is_one_clear_error(run, server, monkeypatch, response, message):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-123")
    server.behave = response if callable(response) and not isinstance(response, JSONResponse) else lambda _: response
    with pytest.raises(TeacherError, match=message) as raised:
        run()
    assert "secret-key-123" not in str(raised.value)
    assert "of a" not in str(raised.value)
    assert server.headers[0]["authorization"] == "Bearer secret-key-123"


def test_an_endpoint_that_is_down(run, server):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(TeacherError, match=r"cannot be reached \(0 further tries\)\. Is it up\?"):
        run(teacher={"base_url": f"http://127.0.0.1:{port}/v1", "max_retries": 0})


def test_a_storm_of_refusals_passes(run, server):
    storm = iter([failure(429), failure(503)] * 3)
    server.behave = lambda body: next(storm, None) or sound(body)
    assert run(teacher={"max_retries": 8, "concurrency": 2})["ledger"]["train"]["bad"]["kept"] == 6


def test_a_row_that_fails_for_now_is_asked_alone_next_time(run, server, tmp_path):
    server.behave = lambda body: failure(500) if number_of(body) == 5 else sound(body)
    with pytest.raises(ValueError, match=r"failed on 1 row\(s\) \(status 500"):
        run()
    assert not (tmp_path / "built" / "task.yaml").exists()
    report = run(allow_unanswered=True)
    assert rejected(report)["good"]["unanswered"] == 1
    server.behave, server.bodies = sound, []
    assert rejected(run())["good"] == {"unsupported_by_text": 1}
    assert server.asked() == {5: 1}


def test_a_cut_answer_is_asked_for_again_with_more_room(run, server):
    server.behave = lambda body: completion("{", "length") if body["max_tokens"] < 1024 else sound(body)
    report = run(teacher={"max_tokens": 512})
    assert report["ledger"]["train"]["bad"]["kept"] == 6
    assert {body["max_tokens"] for body in server.bodies} == {512, 1024}


def test_answers_that_cannot_be_used_are_rejected_by_name(run, server):
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
    }
    server.behave = lambda body: behaviour.get(number_of(body), lambda: sound(body))()
    report = run()
    assert rejected(report) == {
        "bad": {"content_filter": 2, "refusal": 1, "too_long": 1, "malformed": 1},
        "good": {"malformed": 3, "truncated": 1, "unsupported_by_text": 1},
    }
    assert report["ledger"]["train"]["good"]["rows"] == 6
    asked = server.asked()
    assert (asked[2], asked[5]) == (1, 2)  # what would repeat a request word for word is not asked
    told = next(b["messages"] for b in server.bodies if number_of(b) == 7 and len(b["messages"]) > 2)
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
def test_reasoning_and_chatter_are_no_part_of_an_explanation(run, server, tmp_path, wrap):
    server.behave = lambda body: completion(wrap.format(sound(body)), reasoning_content="I am thinking.")
    assert run()["ledger"]["train"]["bad"]["kept"] == 6
    for row in load_task(tmp_path / "built").splits["train"]:
        assert row["explanation"] is None or row["explanation"].startswith("The report number")


def test_a_thought_that_never_ends_is_no_answer(run, server):
    server.behave = lambda body: f"<think>{sound(body)}"
    assert rejected(run(min_kept_per_class=0))["bad"] == {"malformed": 6}


def test_options_that_an_endpoint_does_not_take_are_left_out(run, server):
    def picky(body):
        if "response_format" in body:
            return failure(400, "response_format is not supported")
        if "max_tokens" in body:
            return failure(400, "Use max_completion_tokens instead of max_tokens", param="max_tokens")
        return failure(400, "unsupported", param="temperature") if "temperature" in body else sound(body)

    server.behave = picky
    assert run(teacher={"concurrency": 1})["ledger"]["train"]["bad"]["kept"] == 6
    assert "max_completion_tokens" in server.bodies[-1]


def test_a_teacher_that_always_says_the_same_is_stopped(run, server, folder):
    server.behave = lambda body: answer("good")
    with pytest.raises(TeacherError, match="verdict is 1 on all of the first 32 rows, of both labels"):
        run(folder(rows=60), protocol="blind")
    assert len(server.bodies) < 60
    report = run(folder(rows=60), protocol="blind", allow_constant_teacher=True, min_kept_per_class=0)
    assert rejected(report)["bad"] == {"verdict_agreement": 30}


def test_a_class_below_the_floor_fails_the_build_and_leaves_the_report(run, server, tmp_path):
    server.behave = lambda body: answer("good", words=str(number_of(body)))
    with pytest.raises(ValueError, match=r"Only 0 explanation\(s\) of 'bad' are kept .*'verdict_agreement': 6"):
        run(protocol="blind")
    assert json.loads((tmp_path / "built" / "report.json").read_text())["ledger"]["train"]["bad"]["kept"] == 0
    assert not (tmp_path / "built" / "train.parquet").exists()


@pytest.mark.parametrize(
    ("filtered_rows", "rows", "explained"), [("head", 12, 11), ("drop", 11, 11), ("explain", 12, 12)]
)
def test_what_becomes_of_filtered_rows(run, tmp_path, filtered_rows, rows, explained):
    run(filtered_rows=filtered_rows)
    counts = class_counts(load_task(tmp_path / "built").splits["train"])
    assert (counts["rows"], counts["explained"]) == (rows, explained)
    assert len(load_task(tmp_path / "built").splits["validation"]) == 4


def test_limit_asks_about_the_first_rows_and_keeps_all(run, server, tmp_path):
    report = run(limit=5)
    assert sorted(server.asked()) == [0, 1, 2, 3, 4]
    assert report["ledger"]["train"]["good"]["not_asked"] == 4
    assert len(load_task(tmp_path / "built").splits["train"]) == 12


def test_dry_run_asks_nothing(run, server, capsys, folder, tmp_path):
    found = run(dry_run=True, teacher={"input_price": 1.0})
    assert server.bodies == []
    assert not (tmp_path / "built").exists()
    assert (found["least_requests"], found["most_requests"]) == (16, 32)
    assert 0 < found["least_cost_usd"] < found["most_cost_usd"]
    command = ["--task", str(folder()), "--output_dir", str(tmp_path / "x"), "--model", "m", "--dry_run", "true"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 16


def test_explanations_of_the_source_are_kept_where_asked(run, server, folder, tmp_path):
    source = folder()
    lines = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    lines[0]["explanation"] = "Mine."
    lines.append({"id": "u", "text": "50 is odd.", "label": None, "explanation": "A word without a label."})
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = run(source, keep_source_explanations=True)
    assert 0 not in server.asked()
    built = load_task(tmp_path / "built").splits["train"]
    assert built["explanation"][0] == "Mine."
    assert built[-1]["label"] is None
    assert built[-1]["explanation"] == "A word without a label."
    assert report["ledger"]["train"]["bad"]["from_source"] == 1


def test_killed_and_called_again(server, folder, tmp_path):
    source = folder(rows=40)

    def slow(body):
        time.sleep(0.05)
        return sound(body)

    server.behave = slow
    command = [
        sys.executable, "build_explanations.py", "--task", str(source), "--output_dir", str(tmp_path / "built"),
        "--model", "teacher", "--base_url", server.url, "--concurrency", "2", "--near_duplicate_similarity", "0.95",
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
    server.bodies = []
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert not {f"r{n}" for n in server.asked()} & (written - {"r3"})
    built = load_task(tmp_path / "built")
    assert built.splits["train"]["id"] == [f"r{n}" for n in range(40)]
    assert class_counts(built.splits["train"])["explained"] == 39


def test_two_runs_at_a_time_are_refused(run, tmp_path):
    from clsgen.explanations.answers import AnswerStore

    store = AnswerStore(tmp_path / "built" / ANSWERS)
    with pytest.raises(ValueError, match="in use by another run"):
        run()
    store.close()
    run()


def test_credentialed_data_stay_on_this_machine(run, server, folder, tmp_path):
    source = folder(credentialed=True)
    away = {"base_url": "https://api.example.com/v1"}
    with pytest.raises(TeacherError, match=r"credentialed: they must not leave this machine"):
        run(source, teacher=away)
    run(source)
    assert load_task(tmp_path / "built").credentialed
    assert "neither these texts nor anything derived" in (tmp_path / "built" / "README.md").read_text()


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


def test_credentialed_weights_are_not_pushed(folder, tmp_path):
    task_folder = folder(credentialed=True)
    task = load_task(task_folder)
    training = ClsGenSFTConfig(
        str(tmp_path / "out"), push_to_hub=True, hub_model_id="me/model", use_cpu=True, bf16=False
    )
    report = {"task": task.name, "base_model": "org/backbone"}
    with pytest.raises(PublicationError, match="credentialed"):
        publication(task, TaskArguments(task=str(task_folder)), training, report)


def test_a_model_in_this_process(folder, backbones, tmp_path):
    asked = Build(task=str(folder(rows=4)), output_dir=str(tmp_path / "built"), min_kept_per_class=0)
    teacher = TeacherArguments(model=backbones["llama"], teacher="local", max_tokens=8, max_reasks=1, concurrency=3)
    report = build(asked, teacher, FilterArguments())
    counts = report["ledger"]["train"]
    assert sum(sum(each["rejected"].values()) for each in counts.values()) == 4  # it is random, and says nothing
    assert set(counts["bad"]["rejected"]) <= {"truncated", "malformed"}
    assert len(load_task(tmp_path / "built").splits["train"]) == 4


def test_answers_from_a_file(folder, tmp_path):
    lines = [
        {"n": n, "teacher_verdict": "TRUE" if n % 2 else "bad", "teacher_probability": 0.8 if n % 2 else 0.2,
         "explanation": f"Report {n} is about a day which most readers would describe in just this way."}
        for n in range(16)
    ]  # fmt: skip
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    asked = Build(task=str(folder()), output_dir=str(tmp_path / "built"), answers=str(path), answers_id="r{n}")
    report = build(asked, TeacherArguments(), FilterArguments(near_duplicate_similarity=0.95))
    assert report["teacher_quality"]["train"]["auroc"] == 1.0
    for change, message in (({"teacher_verdict": "perhaps"}, "The verdict is 'perhaps'"),
                            ({"teacher_probability": 2}, "not between 0 and 1"), ({"n": 1}, "already")):  # fmt: skip
        path.write_text("\n".join(map(json.dumps, [*lines[:2], {**lines[2], **change}])))
        with pytest.raises(ValueError, match=rf"row 3: .*{message}"):
            build(asked, TeacherArguments(), FilterArguments())


def test_hand_checked_rows_give_each_filters_errors(run, server, tmp_path):
    run(audit_sample=3)
    sample = [json.loads(line) for line in (tmp_path / "built" / "audit_sample.jsonl").read_text().splitlines()]
    assert [row["filter"] for row in sample].count("unsupported_by_text") == 1
    path = tmp_path / "audit.jsonl"
    path.write_text("\n".join(json.dumps({**row, "should_be": "kept"}) for row in sample))
    chosen = {"filters": ["verdict_agreement", "length"], "min_words": 30}
    report = run(audit=str(path), min_kept_per_class=0, filters=chosen)
    found = report["audit"]["filters"]["length"]  # refuses all of them
    assert found["wrongly"] == found["checked"] == 4
    assert found["false_positive_rate"] == 1.0
    assert report["audit"]["filters"]["verdict_agreement"]["false_positive_rate"] == 0.0


def test_the_command_line_tells_errors_in_one_line(folder, tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        assert main(["--task", str(folder()), "--output_dir", str(tmp_path / "o"), "--filters", "odd"]) == 1
        assert main(["--task", str(folder()), "--output_dir", str(folder()), "--model", "m"]) == 1
        assert main(["--task", str(folder()), "--output_dir", str(tmp_path / "o")]) == 1
    assert next(record.message for record in caplog.records).startswith("Unknown filter(s) ['odd']")
    assert "a task that this command has not built" in caplog.text
