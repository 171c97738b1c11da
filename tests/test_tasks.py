"""Tasks: nothing goes missing unsaid, and every bad input is named."""

import csv
import json
import logging
from pathlib import Path

import pytest
import yaml

from clsgen.data.clinifact import prepare as clinifact
from clsgen.tasks import class_counts, load_task

ROOT = Path(__file__).resolve().parent.parent
SPEC = {
    "name": "mine",
    "template": "{text}",
    "document": "text",
    "question": "Is it good?",
    "labels": ["bad", "good"],
    "verdicts": ["bad", "good"],
    "data_files": {"train": "train.jsonl"},
}
ROWS = [{"id": "a", "text": "Fine.", "label": 1, "explanation": "It is."}, {"id": "b", "text": "Poor.", "label": 0}]


@pytest.fixture
def folder(tmp_path):
    def write(rows=ROWS, file="train.jsonl", **spec):
        content = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / file).write_text(content)
        (tmp_path / "task.yaml").write_text(yaml.safe_dump({**SPEC, **spec}))
        return tmp_path

    return write


def test_embedded_task():
    task = load_task("trial_claims")
    counts = {name: class_counts(split) for name, split in task.splits.items()}
    for name, rows in (("train", 300), ("validation", 60), ("test", 80)):
        expected = {"rows": rows, "positive": rows // 2, "negative": rows // 2, "unlabelled": 0, "explained": rows}
        assert counts[name] == expected
    assert task.fields == ["findings", "claim"]
    assert task.license == "cc0-1.0"


def test_normalised_columns_and_counts(folder, caplog):
    rows = [*ROWS, {"id": "c", "text": "?", "label": None}, {"text": "x", "label": "1", "explanation": "  "}]
    with caplog.at_level(logging.INFO):
        split = load_task(folder(rows)).splits["train"]
    assert split.column_names == ["id", "text", "label", "explanation"]
    assert split["label"] == [1.0, 0.0, None, 1.0]
    assert split["explanation"] == ["It is.", None, None, None]
    assert split["id"] == ["a", "b", "c", "train-4"]
    assert "4 rows, 2 positive, 1 negative, 1 unlabelled, 1 explained" in caplog.text


def test_csv_and_parquet(folder, tmp_path):
    path = folder("id,text,label\n1,Fine,1\n2,Poor,0\n3,Odd,\n", file="t.csv", data_files={"train": "t.csv"})
    split = load_task(path).splits["train"]
    assert split["label"] == [1.0, 0.0, None]
    split.to_parquet(tmp_path / "t.parquet")
    assert load_task(folder(data_files={"train": "t.parquet"})).splits["train"]["label"] == [1.0, 0.0, None]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"id": "a", "text": "x", "label": 1}\n{"id": "b", "text"', "line 2 is not JSON"),
        ('{"id": "a", "text": "x", "label": NaN}\n', "line 1 is not JSON: NaN is no JSON value"),
        ("[1]\n", "line 1 is list"),
        ("", "holds no rows"),
        ([{"id": "a", "label": 1}], r"missing column\(s\) \['text'\]; found"),
        ([{"id": "a", "text": "x"}], r"missing column\(s\) \['label'\]"),
        ([*ROWS, {"id": "c", "text": "x", "label": 2}], r"row 3 \(id 'c'\): the label is '2'"),
        ([*ROWS, {"id": "c", "text": "x", "label": "nan"}], "the label is 'nan'"),
        ([*ROWS, {"id": "c", "text": "x", "label": 0.5}], "the label is '0.5'"),
        ([*ROWS, {"id": "c", "text": "  ", "label": 1}], "the field 'text' is empty"),
        ([*ROWS, {"id": "c", "text": None, "label": 1}], "the field 'text' is missing"),
        ([*ROWS, {"id": "a", "text": "x", "label": 1}], "this id stands in train, row 1 too"),
        (ROWS[:1], "needs labelled rows of both classes"),
    ],
)
def test_bad_data_is_named(folder, rows, message):
    with pytest.raises(ValueError, match=message):
        load_task(folder(rows))


def test_skipped_rows_are_counted_in_the_log(folder, caplog):
    rows = [*ROWS, {"id": "c", "text": "", "label": 1}, {"id": "d", "text": "x", "label": 7}]
    with caplog.at_level(logging.WARNING):
        task = load_task(folder(rows), on_bad_row="skip")
    assert len(task.splits["train"]) == 2
    assert "skipped 1 row(s): the field 'text' is empty (label '1')" in caplog.text
    assert "skipped 1 row(s): the label is '7'" in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"templat": "{x}"}, r"unknown key\(s\) \['templat'\]"),
        ({"document": "claim"}, "none of the template's fields"),
        ({"labels": ["one"]}, "`labels` must name label 0 and label 1"),
        ({"dataset": "user/name"}, "either `data_files` or `dataset`"),
        ({"data_files": {"test": "train.jsonl"}}, "`data_files` needs `train`"),
    ],
)
def test_bad_specifications_are_named(folder, spec, message):
    with pytest.raises(ValueError, match=message):
        load_task(folder(**spec))


def test_missing_tasks_and_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no task 'nothing'.*clinifact.*trial_claims"):
        load_task("nothing")
    with pytest.raises(FileNotFoundError, match="validation split of 'mine', is not there"):
        load_task(folder(data_files={"train": "train.jsonl", "validation": "no.jsonl"}))
    with pytest.raises(ValueError, match="names no `prepare` script"):
        load_task(folder(), data_dir=str(tmp_path))


def clinifact_source(folder, name="{}.csv"):
    """A small folder in CliniFact's form."""
    explanations = [json.loads(line) for line in (ROOT / "data/clinifact/explanations.jsonl").open(encoding="utf-8")]
    for split in ("train", "validation", "test"):
        taught = [row for row in explanations if row["split"] == split][:4] or [
            {"index": i, "nctId": f"NCT{i}", "PMID": str(i), "teacher_verdict": "TRUE"} for i in range(4)
        ]
        rows = [
            {"index": row["index"], "nctId": row["nctId"], "PMID": row["PMID"], "claim": f"Claim, {i}",
             "article_title": "Title", "article_abstract": "Line one\u2028line two.",
             "label": {0: 0, 1: 1, 2: 2}[i % 3]}
            for i, row in enumerate(taught)
        ]  # fmt: skip
        target = folder / "deep" / name.format(split)
        target.parent.mkdir(exist_ok=True, parents=True)
        with target.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=clinifact.COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.mark.parametrize("name", ["{}.csv", "{}_set.csv"])
def test_clinifact_is_built_and_loaded(tmp_path, name):
    source = clinifact_source(tmp_path / "source", name)
    counts = clinifact.prepare(source, tmp_path / "out")
    for split in ("train", "validation", "test"):
        assert counts[split]["left out (NONE)"] == 1
        assert counts[split]["positive"] + counts[split]["negative"] == 3
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{split}.jsonl").open(encoding="utf-8")]
        assert len(rows) == 3
        for row in rows:
            if row.get("explanation"):
                assert (row["teacher_verdict"] == "TRUE") == (row["label"] == 1)
    evidence = clinifact.prepare(source, tmp_path / "evidence", task="clinifact_evidence")
    assert evidence["train"]["positive"] == 3
    assert evidence["train"]["negative"] == 1


def test_clinifact_refuses_another_version(tmp_path):
    source = clinifact_source(tmp_path)
    path = tmp_path / "deep" / "train.csv"
    path.write_text(path.read_text().replace("NCT", "XCT"))
    with pytest.raises(ValueError, match="another version of CliniFact"):
        clinifact.prepare(source, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        clinifact.prepare(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no train\.csv or train_set\.csv"):
        clinifact.prepare(tmp_path / "out", tmp_path / "out")


def test_every_task_folder_is_a_hub_data_set():
    from huggingface_hub import DatasetCard

    for folder in (ROOT / "data").iterdir():
        if not (folder / "task.yaml").is_file():
            continue
        card = DatasetCard.load(folder / "README.md")
        assert card.data.license
        assert card.data.language == "en"
        files = {entry["split"]: entry["path"] for entry in card.data.configs[0]["data_files"]}
        assert files == yaml.safe_load((folder / "task.yaml").read_text())["data_files"]
