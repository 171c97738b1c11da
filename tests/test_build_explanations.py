"""Explanations from a teacher over real HTTP on loopback: whatever the teacher says, no row goes missing unsaid."""

import json
import logging
import shutil

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from teacher_server import answer, number_of, rejected, sound

from clsgen.build_explanations import BuildArguments as Build
from clsgen.build_explanations import build, main, told_command
from clsgen.explanations import task_folder
from clsgen.explanations.filters import FilterArguments
from clsgen.explanations.teacher import TeacherArguments, TeacherError
from clsgen.publishing.hub import PublicationError
from clsgen.sft_config_clsgen import ClsGenSFTConfig
from clsgen.table_files import write_rows
from clsgen.tasks import class_counts, load_task
from clsgen.train_arguments import TaskArguments
from clsgen.train_sft_cls import publication


def test_the_built_task_trains_and_its_card_tells_the_truth(build_with_teacher, teacher, tmp_path):
    report = build_with_teacher(results_dir=str(tmp_path / "results"))
    built = load_task(tmp_path / "built")
    assert class_counts(built.splits["train"]) == {
        "rows": 12, "positive": 6, "negative": 6, "unlabelled": 0, "explained": 11
    }  # fmt: skip
    assert built.splits["train"]["id"] == [f"r{n}" for n in range(12)]
    assert rejected(report) == {"bad": {}, "good": {"unsupported_by_text": 1}}
    assert report["teacher_quality"]["train"]["agreement"] == pytest.approx(11 / 12)
    assert teacher.asked() == {**dict.fromkeys(range(16), 1), 3: 2}
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


def test_a_disagreeing_row_is_explained_with_its_label_and_marked(build_with_teacher, teacher, tmp_path):
    def agreeable(body):
        if "An expert has settled" not in body["messages"][1]["content"]:
            return sound(body)
        assert '"good"' in body["messages"][1]["content"]
        words = "The report does tell of a day that was fine for everybody who took part in it."
        return json.dumps({"explanation": words, "supported_by_text": True})

    teacher.behave = agreeable
    report = build_with_teacher(file_format="jsonl")
    row = json.loads((tmp_path / "built" / "train.jsonl").read_text().splitlines()[3])
    assert row["protocol"] == "label_conditioned"
    assert row["filter"] is None
    assert row["teacher_verdict"] == "bad"
    assert row["explanation"].startswith("The report does tell")
    assert report["ledger"]["train"]["good"]["kept_label_conditioned"] == 1


def test_a_class_below_the_floor_fails_the_build_and_leaves_a_report(build_with_teacher, teacher, tmp_path):
    teacher.behave = lambda body: answer("good", words=str(number_of(body)))
    with pytest.raises(ValueError, match=r"Only 0 explanation\(s\) of 'bad' are kept .*'verdict_agreement': 6"):
        build_with_teacher(protocol="blind")
    failed = tmp_path / "built" / "failed_report.json"
    assert json.loads(failed.read_text())["ledger"]["train"]["bad"]["kept"] == 0
    assert not (tmp_path / "built" / "train.parquet").exists()
    teacher.behave = sound
    build_with_teacher(teacher={"temperature": 0.5})
    assert not failed.exists()


def test_a_build_that_fails_leaves_an_earlier_one_as_it_was(build_with_teacher, tmp_path):
    build_with_teacher()
    before = {path: path.read_bytes() for path in (tmp_path / "built").iterdir()}
    with pytest.raises(ValueError, match=r"Rejected: \{'length': 6\}.*failed_report\.json"):
        build_with_teacher(filters={"min_words": 100})
    after = {path: path.read_bytes() for path in (tmp_path / "built").iterdir()}
    assert {path.name for path in set(after) - set(before)} == {"failed_report.json"}
    assert after | before == after


def test_the_report_says_what_all_its_answers_took(build_with_teacher, teacher):
    prices = {"input_price": 1000.0, "output_price": 1000.0}
    first, again = build_with_teacher(teacher=prices), build_with_teacher(teacher=prices)
    assert first["usage"] == {"prompt": 1700, "completion": 170, "replies": 17, "cost_usd": 1.87}
    assert again["usage"] == first["usage"]
    assert len(teacher.bodies) == 17


def test_a_task_is_not_built_over_its_own_source(build_with_teacher, tmp_path):
    build_with_teacher()
    before = (tmp_path / "built" / "train.parquet").read_bytes()
    with pytest.raises(ValueError, match="is the source itself"):
        build_with_teacher(tmp_path / "built" / ".." / "built")
    assert (tmp_path / "built" / "train.parquet").read_bytes() == before


def test_a_number_of_the_verdicts_is_no_invention(build_with_teacher, teacher, source_task):
    source = source_task(verdicts=["not good", "good within 42 days"])
    teacher.behave = lambda body: answer("good", words=str(number_of(body))).replace("good", "good within 42 days")
    report = build_with_teacher(source, protocol="blind", min_kept_per_class=0)
    assert rejected(report) == {"bad": {"verdict_agreement": 6}, "good": {}}


@pytest.mark.parametrize(
    ("filtered_rows", "rows", "explained"), [("head", 12, 11), ("drop", 11, 11), ("explain", 12, 12)]
)
def test_what_becomes_of_filtered_rows(build_with_teacher, tmp_path, filtered_rows, rows, explained):
    build_with_teacher(filtered_rows=filtered_rows)
    counts = class_counts(load_task(tmp_path / "built").splits["train"])
    assert (counts["rows"], counts["explained"]) == (rows, explained)
    assert len(load_task(tmp_path / "built").splits["validation"]) == 4


def test_explanations_of_the_source_are_kept_where_asked(build_with_teacher, teacher, source_task, tmp_path):
    source = source_task()
    lines = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    lines[0]["explanation"] = "Mine."
    lines.append({"id": "u", "text": "50 is odd.", "label": None, "explanation": "A word without a label."})
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = build_with_teacher(source, keep_source_explanations=True)
    assert 0 not in teacher.asked()
    built = load_task(tmp_path / "built").splits["train"]
    assert built["explanation"][0] == "Mine."
    assert built[-1]["label"] is None
    assert built[-1]["explanation"] == "A word without a label."
    assert report["ledger"]["train"]["bad"]["from_source"] == 1


@pytest.mark.parametrize(("options", "asked"), [({"limit": 4}, 4), ({"splits": ["validation"]}, 4), ({}, 16)])
def test_rows_that_nobody_asked_about_keep_their_explanation(
    build_with_teacher, teacher, source_task, tmp_path, caplog, options, asked
):
    source = source_task()
    for split in ("train", "validation"):
        lines = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()]
        text = "".join(json.dumps({**line, "explanation": "Mine."}) + "\n" for line in lines)
        (source / f"{split}.jsonl").write_text(text)
    with caplog.at_level(logging.WARNING):
        build_with_teacher(source, min_kept_per_class=0, **options)
    assert f"{asked} rows have an explanation already" in caplog.text
    built = load_task(tmp_path / "built").splits
    said = [row["explanation"] for rows in built.values() for row in rows]
    assert said.count("Mine.") == 16 - asked


def test_a_rebuild_that_is_killed_leaves_no_mixture(build_with_teacher, source_task, tmp_path, monkeypatch):
    source = source_task()
    build_with_teacher(source)
    written = []

    def killed(path, *arguments):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_rows(path, *arguments)

    monkeypatch.setattr(task_folder, "write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        build_with_teacher(source, filtered_rows="drop")
    with pytest.raises(FileNotFoundError, match="task"):
        load_task(tmp_path / "built")


@pytest.mark.parametrize("option", ["--base_url {}", "--base-url {}", "--base_url={}"])
def test_the_recorded_command_has_no_address(option):
    argv = ["--task", "t", *option.format("http://user:secret@example.com/v1").split(), "--model", "hf_abcdefghij"]
    told = told_command(argv)
    assert "example.com" not in told
    assert "secret" not in told
    assert "abcdefghij" not in told
    assert told.startswith("python build_explanations.py --task t")


def test_credentialed_data_stay_on_this_machine(build_with_teacher, teacher, source_task, tmp_path):
    source = source_task(credentialed=True)
    away = {"base_url": "https://api.example.com/v1"}
    with pytest.raises(TeacherError, match=r"credentialed: they must not leave this machine"):
        build_with_teacher(source, teacher=away)
    build_with_teacher(source)
    assert load_task(tmp_path / "built").credentialed
    assert "neither these texts nor anything derived" in (tmp_path / "built" / "README.md").read_text()


def test_credentialed_weights_are_not_pushed(source_task, tmp_path):
    task_folder = source_task(credentialed=True)
    task = load_task(task_folder)
    training = ClsGenSFTConfig(
        str(tmp_path / "out"), push_to_hub=True, hub_model_id="me/model", use_cpu=True, bf16=False
    )
    report = {"task": task.name, "base_model": "org/backbone"}
    with pytest.raises(PublicationError, match="credentialed"):
        publication(task, TaskArguments(task=str(task_folder)), training, report)


def test_answers_from_a_file(source_task, tmp_path):
    lines = [
        {"n": n, "teacher_verdict": "TRUE" if n % 2 else "bad", "teacher_probability": 0.8 if n % 2 else 0.2,
         "explanation": f"Report {n} is about a day which most readers would describe in just this way."}
        for n in range(16)
    ]  # fmt: skip
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    asked = Build(task=str(source_task()), output_dir=str(tmp_path / "built"), answers=str(path), answers_id="r{n}")
    report = build(asked, TeacherArguments(), FilterArguments(near_duplicate_similarity=0.95))
    assert report["teacher_quality"]["train"]["auroc"] == 1.0
    path.write_text("\n".join(map(json.dumps, [{**lines[0], "teacher_probability": 0.8}, *lines[1:]])))
    assert rejected(build(asked, TeacherArguments(), FilterArguments(near_duplicate_similarity=0.95)))["bad"] == {
        "malformed": 1
    }
    for change, message in (({"teacher_verdict": "perhaps"}, "The verdict is 'perhaps'"),
                            ({"teacher_probability": 2}, "not between 0 and 1"), ({"n": 1}, "already")):  # fmt: skip
        path.write_text("\n".join(map(json.dumps, [*lines[:2], {**lines[2], **change}])))
        with pytest.raises(ValueError, match=rf"row 3: .*{message}"):
            build(asked, TeacherArguments(), FilterArguments())


def test_hand_checked_rows_give_each_filters_errors(build_with_teacher, teacher, tmp_path):
    build_with_teacher(audit_sample=3)
    sample = [json.loads(line) for line in (tmp_path / "built" / "audit_sample.jsonl").read_text().splitlines()]
    assert [row["filter"] for row in sample].count("unsupported_by_text") == 1
    path = tmp_path / "audit.jsonl"
    path.write_text("\n".join(json.dumps({**row, "should_be": "kept"}) for row in sample))
    chosen = {"filters": ["verdict_agreement", "length"], "min_words": 30}
    report = build_with_teacher(audit=str(path), min_kept_per_class=0, filters=chosen)
    found = report["audit"]["filters"]["length"]  # refuses all of them
    assert found["wrongly"] == found["checked"] == 4
    assert found["false_positive_rate"] == 1.0
    assert report["audit"]["filters"]["verdict_agreement"]["false_positive_rate"] == 0.0


def test_the_command_line_tells_errors_in_one_line(source_task, tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        assert main(["--task", str(source_task()), "--output_dir", str(tmp_path / "o"), "--filters", "odd"]) == 1
        other = str(shutil.copytree(source_task(), tmp_path / "other"))
        assert main(["--task", str(source_task()), "--output_dir", other, "--model", "m"]) == 1
        assert main(["--task", str(source_task()), "--output_dir", str(tmp_path / "o")]) == 1
    assert next(record.message for record in caplog.records).startswith("Unknown filter(s) ['odd']")
    assert "a task that this command has not built" in caplog.text
