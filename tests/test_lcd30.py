"""LCD-30 from files in MIMIC-IV-Note's and the benchmark's format, made up."""

import csv
import gzip
import hashlib
import json
import logging
from pathlib import Path

import pytest
import yaml

from clsgen.data.lcd30 import prepare as lcd30
from clsgen.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["note_id", "subject_id", "hadm_id", "note_type", "note_seq", "charttime", "storetime", "text"]
TEXTS = [
    'Name:  ___\nHe said "fine"\tand left.\r\nPatient&#039;s stay',
    "Seen, and\n\n____ discharged\n",
    "Short note",
    "A fourth, with a comma",
    "Nobody asks for this one",
]
CLEANED = [
    "Name: <cr> He said fine and left. <cr> <cr> Patient's stay",
    "Seen, and <cr> <cr> discharged <cr>",
    "Short note",
    "A fourth, with a comma",
    "Nobody asks for this one",
]
EXPECTED = {"train": 2, "validation": 1, "test": 1}


def key_of(note_id, cleaned):
    """The benchmark's key, computed digit by digit from hexadecimal."""
    digests = [hashlib.sha256(part.encode()).hexdigest() for part in
               (note_id, cleaned, "Landmark Center 401 park drive")]  # fmt: skip
    digits = "".join(f"{int(a, 16) ^ int(b, 16) ^ int(c, 16):x}" for a, b, c in zip(*digests, strict=True))
    return f"0x{digits.lstrip('0')}"[:32]


@pytest.fixture
def source(tmp_path):
    with (tmp_path / "discharge.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i, text in enumerate(TEXTS):
            writer.writerow([f"{i}-DS-1", i, i, "DS", 1, "", "", text])
    splits = ["train", "train", "dev", "test"]
    labels = {
        key_of(f"{i}-DS-1", CLEANED[i]): {"data_type": split, "out_hospital_mortality_30": i % 2}
        for i, split in enumerate(splits)
    }
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    return tmp_path


def test_notes_are_cleaned_as_the_benchmark_does():
    assert [lcd30.clean(text) for text in TEXTS] == CLEANED


def test_rows_of_the_benchmark_and_nothing_on_the_screen(source, tmp_path, caplog, capsys):
    with caplog.at_level(logging.DEBUG):
        counts = lcd30.prepare(source, tmp_path / "out", EXPECTED)
    assert {split: dict(found) for split, found in counts.items()} == {
        "train": {0: 1, 1: 1}, "validation": {0: 1}, "test": {1: 1}
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert rows == [
        {"id": key_of(f"{i}-DS-1", CLEANED[i]), "note": CLEANED[i], "label": i} for i in (0, 1)
    ]  # fmt: skip
    shown = caplog.text + "".join(capsys.readouterr())
    assert not any(word in shown for text in TEXTS for word in text.split() if len(word) > 5)
    assert (tmp_path / "out" / "train.jsonl").stat().st_mode & 0o077 == 0
    assert "none of the versions whose checksum is known" in caplog.text


def test_the_task_is_credentialed(source, tmp_path):
    spec = yaml.safe_load((ROOT / "data" / "lcd30" / "task.yaml").read_text())
    lcd30.prepare(source, tmp_path / "task" / "prepared", EXPECTED)
    (tmp_path / "task" / "task.yaml").write_text(yaml.safe_dump(spec))
    task = load_task(tmp_path / "task")
    assert task.credentialed
    assert task.splits["test"]["label"] == [1.0]


def test_a_packed_file_is_read(source, tmp_path):
    content = (source / "discharge.csv").read_bytes()
    (source / "discharge.csv").unlink()
    (source / "discharge.csv.gz").write_bytes(gzip.compress(content))
    assert lcd30.prepare(source, tmp_path / "out", EXPECTED)["train"].total() == 2
    (source / "discharge.csv.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(ValueError, match=r"cannot be read as CSV \(EOFError\)"):
        lcd30.prepare(source, tmp_path / "out", EXPECTED)


def test_files_that_do_not_fit_are_named_and_leave_nothing(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"not \{'train': 34759, 'validation': 7505, 'test': 7568\} as published"):
        lcd30.prepare(source, out)
    labels = json.loads((source / "labels.json").read_text())
    (source / "labels.json").write_text(json.dumps({**labels, "0xabc": {"data_type": "dev",
                                                                       "out_hospital_mortality_30": 0}}))  # fmt: skip
    with pytest.raises(ValueError, match="1 of the 5 labels have no note"):
        lcd30.prepare(source, out, EXPECTED)
    (source / "labels.json.sha1sum").write_text("0" * 40 + "  labels.json\n")
    with pytest.raises(ValueError, match="download both again"):
        lcd30.prepare(source, out, EXPECTED)
    (source / "labels.json.sha1sum").unlink()
    (source / "labels.json").write_text('{"0xabc": {"data_type": "dev"}}')
    with pytest.raises(ValueError, match=r"not the benchmark's labels\.json"):
        lcd30.prepare(source, out, EXPECTED)
    (source / "labels.json").write_text(json.dumps(labels))
    (source / "discharge.csv").write_text("id,text\n1,secretive words\n")
    with pytest.raises(ValueError, match=r"missing column\(s\) \['note_id'\]"):
        lcd30.prepare(source, out, EXPECTED)
    with pytest.raises(FileNotFoundError, match=r"no discharge\.csv or discharge\.csv\.gz"):
        lcd30.prepare(tmp_path / "nowhere", out, EXPECTED)
    assert list(out.iterdir()) == []
