"""Tasks: nothing goes missing unsaid, and every bad input is named."""

import csv
import functools
import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from conftest import PROMPT

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
        (tmp_path / file).write_bytes(content.encode("utf-8"))
        (tmp_path / "task.yaml").write_text(yaml.safe_dump({**SPEC, **spec}))
        return tmp_path

    return write


def test_embedded_task():
    task = load_task("trial_claims")
    counts = {name: class_counts(split) for name, split in task.splits.items()}
    for name, rows in (("train", 300), ("validation", 60), ("test", 80)):
        expected = {"rows": rows, "positive": rows // 2, "negative": rows // 2, "unlabelled": 0, "explained": rows}
        assert counts[name] == expected
    assert task.fields == ["claim", "findings"]
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


def test_a_text_is_the_template_with_the_fields_in_their_places(folder):
    task = load_task(folder([{**row, "text": "{label}"} for row in ROWS], template="Read: {text}."))
    assert task.text_of(task.splits["train"][0]) == "Read: {label}."


def test_csv_and_parquet(folder, tmp_path):
    path = folder("id,text,label\n1,Fine,1\n2,Poor,0\n3,Odd,\n", file="t.csv", data_files={"train": "t.csv"})
    split = load_task(path).splits["train"]
    assert split["label"] == [1.0, 0.0, None]
    split.to_parquet(tmp_path / "t.parquet")
    assert load_task(folder(data_files={"train": "t.parquet"})).splits["train"]["label"] == [1.0, 0.0, None]
    path = folder(json.dumps(ROWS), file="t.json", data_files={"train": "t.json"})
    assert load_task(path).splits["train"]["label"] == [1.0, 0.0]


def test_csv_of_a_spreadsheet_keeps_its_first_column(folder):
    long = "x" * 200_000  # more than the csv module's default limit of a cell
    path = folder(
        f"\ufeffid,text,label\r\nnote-1,Fine,1\r\nnote-2,{long},0\r\n", "t.csv", data_files={"train": "t.csv"}
    )
    split = load_task(path).splits["train"]
    assert split["id"] == ["note-1", "note-2"]
    assert split["text"][1] == long


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text,label\n1,Fine,1\n2,Poor\n", r"line 3: 2 cell\(s\) for the 3 columns"),
        ("id,text,label\n1,Fine,1,1\n", r"line 2: 4 cell\(s\) for the 3 columns"),
        ('id,label,text\n1,1,Fine\n2,0,"Poor\n3,1,Odd\n', "is not CSV: unexpected end of data. Check the quotes"),
        ("id,text,label,text\n1,Fine,1,x\n", "a column name stands twice"),
        ("id,text,label\n1,Fine,1\n2,Poor,nan\n", r"line 3 \(id '2'\): The label is 'nan'"),
        ("id,text,label\n", "holds no rows"),
    ],
)
def test_bad_csv_is_named(folder, content, message):
    with pytest.raises(ValueError, match=message):
        load_task(folder(content, file="t.csv", data_files={"train": "t.csv"}))


def test_other_encodings_are_named(folder, tmp_path):
    path = folder(data_files={"train": "t.csv"})
    (tmp_path / "t.csv").write_bytes("id,text,label\n1,Café,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.csv is not UTF-8"):
        load_task(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"id": "a", "text": "x", "label": 1}\n{"id": "b", "text"', "line 2 is not JSON"),
        ('{"id": "a", "text": "x", "label": NaN}\n', "line 1 is not JSON: NaN is no JSON value"),
        ("[1]\n", "line 1 is list"),
        ("", "holds no rows"),
        ([{"id": "a", "label": 1}], r"missing column\(s\) \['text'\]; found"),
        ([{"id": "a", "text": "x"}], r"missing column\(s\) \['label'\]"),
        (
            [*ROWS, {"id": "c", "text": "x", "label": 2}],
            r"train\.jsonl, line 3 \(id 'c'\): The label is 2; it must be",
        ),
        ([*ROWS, {"id": "c", "text": "x", "label": "nan"}], "The label is 'nan'"),
        ([*ROWS, {"id": "c", "text": "x", "label": "true"}], "The label is 'true'"),
        ([*ROWS, {"id": "c", "text": "x", "label": ""}], "The label is ''"),
        ([*ROWS, {"id": "c", "text": "x", "label": 0.5}], "The label is 0.5"),
        ([*ROWS, {"id": "c", "text": "x", "label": [1]}], r"The label is \[1\]"),
        ([*ROWS, {"id": "c", "text": "  ", "label": 1}], "The field 'text' is empty"),
        ([*ROWS, {"id": "c", "text": None, "label": 1}], "The field 'text' must be a `str`, got NoneType"),
        ([*ROWS, {"id": "c", "text": 5, "label": 1}], "The field 'text' must be a `str`, got int"),
        ([*ROWS, {"id": "c", "text": ["x"], "label": 1}], "The field 'text' must be a `str`, got list"),
        ([*ROWS, {"id": "c", "text": "\ud800", "label": 1}], "lone surrogate"),
        ([*ROWS, {"id": "c", "text": "x", "label": 1, "explanation": 5}], "The explanation must be text or null"),
        ([*ROWS, {"id": "c", "text": "x", "label": 1, "explanation": "\ud800"}], "The explanation holds a lone surr"),
        ([*ROWS, {"id": "a", "text": "x", "label": 1}], r"this id stands in .*train\.jsonl, line 1 \(id 'a'\) too"),
        ("\n" + "".join(json.dumps(row) + "\n" for row in [*ROWS, {"text": "x", "label": 3}]), "line 4 "),
        (ROWS[:1], "needs labelled rows of both classes"),
    ],
)
def test_bad_data_is_named(folder, rows, message):
    with pytest.raises(ValueError, match=message):
        load_task(folder(rows))


def test_an_id_in_two_splits_is_named(folder, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1 \(id 'a'\): this id stands in .*train\.jsonl, line 1"):
        load_task(folder(data_files={"train": "train.jsonl", "test": "test.jsonl"}))


def test_the_test_split_needs_no_explanation_column(folder, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"id": "c", "text": "Odd.", "label": 0}))
    train = [{**row, "why": "So it is."} for row in ROWS]
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    splits = load_task(folder(train, data_files=files, explanation_column="why")).splits
    assert splits["train"]["explanation"] == ["So it is.", "So it is."]
    assert splits["test"]["explanation"] == [None]


def test_names_of_labels_in_the_data_are_heeded(folder, tmp_path, caplog):
    from datasets import ClassLabel, Dataset, Features, Value

    def load(names, **spec):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = {"text": ["a", "b"], "label": [0, 1]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
        return load_task(folder(data_files={"train": "t.parquet"}, **spec)).splits["train"]["label"]

    assert load(["Bad", "good"]) == [0.0, 1.0]
    assert load(["bad", "good"], labels=["x", "y"]) == [0.0, 1.0]  # as the verdicts have them
    assert caplog.text == ""
    with pytest.raises(ValueError, match=r"t\.parquet: the data set calls label 0 'good' .* the other way round"):
        load(["good", "bad"])
    assert load(["no", "yes"]) == [0.0, 1.0]
    assert "calls its labels ['no', 'yes'], task.yaml ['bad', 'good']" in caplog.text


def test_label_of_a_parquet_file_may_be_null_but_not_nan(folder, tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a", "b", "c"], "label": [1.0, 0.0, float("nan")]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"row 3 \(id 'train-3'\): The label is nan"):
        load_task(folder(data_files={"train": "t.parquet"}))


def test_on_bad_row_is_checked(folder):
    with pytest.raises(ValueError, match="`on_bad_row` is 'error' or 'skip', got 'skpi'"):
        load_task(folder(), on_bad_row="skpi")


def test_skipped_rows_are_counted_in_the_log(folder, caplog):
    rows = [*ROWS, {"id": "c", "text": "", "label": 1}, {"id": "d", "text": "x", "label": 7}]
    with caplog.at_level(logging.WARNING):
        task = load_task(folder(rows), on_bad_row="skip")
    assert len(task.splits["train"]) == 2
    assert "skipped 1 row(s): The field 'text' is empty: there is nothing to decide on. (label 1)" in caplog.text
    assert "skipped 1 row(s): The label is 7" in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"templat": "{x}"}, r"unknown key\(s\) \['templat'\]"),
        ({"document": "claim"}, "none of the template's fields"),
        ({"labels": ["one"]}, "`labels` must name label 0 and label 1"),
        ({"labels": [False, True]}, "quote yes and no"),
        ({"labels": ["same", "same"]}, "differently"),
        ({"verdicts": ["no", 1]}, "`verdicts` must name label 0 and label 1"),
        ({"question": None}, "`question` must be a string, got None"),
        ({"credentialed": "false"}, "`credentialed` must be true or false"),
        ({"template": "{text} {label}"}, r"`template` must not show \['label'\]"),
        ({"template": "{text} {gold}", "label_column": "gold"}, r"`template` must not show \['gold'\]"),
        ({"id_column": "note"}, r"missing column\(s\) \['note'\]"),
        ({"explanation_column": "explanaton"}, "task.yaml: `explanation_column` is 'explanaton', but no split has"),
        ({"data_files": ["train.jsonl"]}, "`data_files` needs `train`"),
        ({"data_files": {"train": "train.txt"}}, "end in one of"),
        ({"data_files": {"train": "train.jsonl", "test": "train.jsonl"}}, "are the same file"),
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


PREPARE = """
import json
from pathlib import Path

def prepare(source, output_dir):
    Path(output_dir).mkdir()
    text = Path(source, "source.txt").read_text()
    (Path(output_dir) / "train.jsonl").write_text("".join(
        json.dumps({"text": line, "label": i % 2}) + "\\n" for i, line in enumerate(text.split())
    ))
"""


def test_prepare_builds_missing_files_from_the_source(folder, tmp_path):
    path = folder(prepare="prepare.py", data_files={"train": "prepared/train.jsonl"})
    (tmp_path / "prepare.py").write_text(PREPARE)
    with pytest.raises(FileNotFoundError, match=r"Run `python train_sft_cls.py --task .* --data_dir SOURCE`"):
        load_task(path)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "source.txt").write_text("one two three")
    assert load_task(path, data_dir=str(tmp_path / "source")).splits["train"]["text"] == ["one", "two", "three"]
    assert len(load_task(path).splits["train"]) == 3


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


SHARED_SOURCES = [path for path in [ROOT.parent / "shared" / "clinifact"] if (path / "train.csv").is_file()]


@pytest.mark.parametrize("source", SHARED_SOURCES, ids=str)
def test_counts_of_the_whole_clinifact(source, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        counts = clinifact.prepare(source, tmp_path / "out")
    assert "134 of the 252 trials of validation are in train too" in caplog.text
    assert "belong to no" not in caplog.text  # every explanation found its row
    expected = {"train": (366, 262, 290, 231), "validation": (83, 67, 63, 63), "test": (113, 54, 0, 0)}
    for split, numbers in expected.items():
        keys = ("positive", "negative", "positive explained", "negative explained")
        assert tuple(counts[split][key] for key in keys) == numbers
    shutil.copy(ROOT / "data/clinifact/task.yaml", tmp_path / "task.yaml")
    (tmp_path / "out").rename(tmp_path / "prepared")
    for split, dataset in load_task(tmp_path).splits.items():
        positive, negative, *explained = expected[split]
        assert class_counts(dataset) == {
            "rows": positive + negative,
            "positive": positive,
            "negative": negative,
            "unlabelled": 0,
            "explained": sum(explained),
        }
    evidence = clinifact.prepare(source, tmp_path / "evidence", task="clinifact_evidence")
    assert [(evidence[split]["positive"], evidence[split]["negative"]) for split in expected] == [
        (628, 632), (150, 166), (167, 227),
    ]  # fmt: skip


def change(path, **values):
    """Puts other values into the first row of a CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0].update(values)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_clinifact_counts_empty_cells_and_loses_none(tmp_path):
    source = clinifact_source(tmp_path / "source")
    change(source / "deep" / "train.csv", article_title=" ", article_abstract="")
    counts = clinifact.prepare(source, tmp_path / "prepared")
    assert counts["train"]["negative with an empty article_title"] == 1
    assert counts["train"]["negative with an empty article_abstract"] == 1
    rows = [json.loads(line) for line in (tmp_path / "prepared/train.jsonl").read_text("utf-8").split("\n") if line]
    assert (rows[0]["title"], rows[0]["abstract"]) == ("(no title)", "")
    shutil.copy(ROOT / "data/clinifact/task.yaml", tmp_path / "task.yaml")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1 \(id 'NCT.*'\): The field 'abstract' is empty"):
        load_task(tmp_path)
    assert class_counts(load_task(tmp_path, on_bad_row="skip").splits["train"])["rows"] == 2


def test_clinifact_writes_nothing_unless_all_splits_are_good(tmp_path):
    source = clinifact_source(tmp_path / "source")
    change(source / "deep" / "validation.csv", PMID="1")
    with pytest.raises(ValueError, match="another version of CliniFact"):
        clinifact.prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [({"label": "3"}, "row 1: the label is '3', not 0, 1 or 2"), ({"label": ""}, "row 1: the label is ''")],
)
def test_clinifact_refuses_bad_labels(tmp_path, values, message):
    source = clinifact_source(tmp_path / "source")
    change(source / "deep" / "test.csv", **values)
    with pytest.raises(ValueError, match=message):
        clinifact.prepare(source, tmp_path / "out")


def test_clinifact_names_missing_columns_and_repeated_rows(tmp_path):
    source = clinifact_source(tmp_path / "source")
    path = source / "deep" / "train.csv"
    whole = path.read_bytes().decode("utf-8")
    path.write_bytes(whole.replace("claim,", "klaim,", 1).encode("utf-8"))
    with pytest.raises(ValueError, match=r"missing column\(s\) \['claim'\]; found"):
        clinifact.prepare(source, tmp_path / "out")
    path.write_bytes((whole + whole.split("\r\n")[1] + "\r\n").encode("utf-8"))
    with pytest.raises(ValueError, match="stands there more than once"):
        clinifact.prepare(source, tmp_path / "out")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *args):
        """Nothing."""

    def list_directory(self, path):
        """Refused, as most file servers do."""
        self.send_error(404)


@pytest.fixture
def served(tmp_path):
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_clinifact_from_a_url(tmp_path, served):
    source = clinifact_source(tmp_path / "source", "{}_set.csv")
    expected = clinifact.prepare(source, tmp_path / "expected")
    shutil.make_archive(str(tmp_path / "all"), "zip", source)
    for url in (f"{served}/all.zip", f"{served}/source/deep/"):
        assert clinifact.prepare(url, tmp_path / "out") == expected
    with pytest.raises(ValueError, match="neither a zip file nor a folder"):
        clinifact.prepare(f"{served}/nothing", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"cannot be reached.*Download it and give the folder"):
        clinifact.prepare("http://127.0.0.1:9/all.zip", tmp_path / "out")


@pytest.mark.parametrize("task", ["clinifact", "clinifact_evidence"])
def test_clinifact_command(tmp_path, task):
    shutil.copytree(ROOT / "data" / "clinifact", tmp_path / "data" / "clinifact", ignore=lambda *_: ["prepared"])
    source = clinifact_source(tmp_path / "source")
    command = [sys.executable, "-m", "data.clinifact.prepare", "--source", str(source), "--task", task]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (tmp_path / "data" / task / "prepared" / "train.jsonl").is_file()


def test_evidence_task_is_built_by_its_own_prepare(tmp_path):
    for name in ("task.yaml", "prepare.py"):
        shutil.copy(ROOT / "data/clinifact_evidence" / name, tmp_path / name)
    task = load_task(tmp_path, data_dir=str(clinifact_source(tmp_path / "source")))
    assert class_counts(task.splits["train"]) == {
        "rows": 4,
        "positive": 3,
        "negative": 1,
        "unlabelled": 0,
        "explained": 0,
    }


def test_clinifact_refuses_another_version(tmp_path):
    source = clinifact_source(tmp_path)
    path = tmp_path / "deep" / "train.csv"
    path.write_text(path.read_text().replace("NCT", "XCT"))
    with pytest.raises(ValueError, match="another version of CliniFact"):
        clinifact.prepare(source, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        clinifact.prepare(tmp_path / "nothing", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no train\.csv or train_set\.csv"):
        clinifact.prepare(empty, tmp_path / "out")


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


def test_texts_that_stand_in_training_too_are_counted(tmp_path, caplog):
    rows = [{"id": f"a{i}", "findings": f"It fell {i}.", "claim": "It works.", "label": i % 2} for i in range(6)]
    spec = {"name": "tiny", **PROMPT, "labels": ["no", "yes"], "data_files": {"train": "a.jsonl", "test": "b.jsonl"}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tests = [{**row, "id": f"b{i}", "claim": "It works." if i < 2 else "It harms."} for i, row in enumerate(rows)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tests))
    with caplog.at_level(logging.WARNING):
        load_task(tmp_path)
    assert "tiny/test: 2 of its 6 texts stand in the training split too" in caplog.text
