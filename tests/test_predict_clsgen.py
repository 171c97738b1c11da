"""A file in, the same file with answers out: in every format, after every kill, with every bad row named."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import build

from clsgen.checkpoint_folder import write_checkpoint
from clsgen.journal import Journal
from clsgen.predict_clsgen import main
from clsgen.table_files import read_rows

REPORT = {"base_model": "tiny", "task": "tiny", "command": "c", "seed": 0, "train_rows": 1, "threshold_method": "f1"}
ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(model, tmp_path):
    model.generation_config.max_new_tokens = 4
    return str(write_checkpoint(model, tmp_path / "model", REPORT))


@pytest.fixture
def rows(texts):
    return [{"id": f"00{i}", **texts[i % 4], "label": str(i % 2)} for i in range(10)]


def save(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_every_row_comes_back_with_its_answer(folder, model, rows, tmp_path, ending):
    source, target = save(tmp_path / f"in{ending}", rows), tmp_path / f"out{ending}"
    assert main(["--model", folder, "--input", source, "--output", str(target)]) == 0
    answered = list(read_rows(target))
    expected = model.classify_and_explain([{k: row[k] for k in ("findings", "claim")} for row in rows])
    for row, given, prediction in zip(answered, rows, expected, strict=True):
        assert {name: row[name] for name in given} == given
        assert row["clsgen_label"] == prediction.label
        assert float(row["clsgen_probability"]) == pytest.approx(prediction.probability, abs=1e-4)
        assert row["clsgen_explanation"] == prediction.explanation
        assert row["clsgen_explained_label"] == prediction.explained_label
        assert row["clsgen_error"] in (None, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"in{ending}", "model", f"out{ending}"])


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_columns_that_only_some_json_lines_have_are_kept(folder, rows, tmp_path, ending):
    source, target = save(tmp_path / "in.jsonl", [rows[0], {**rows[1], "ward": "B"}]), tmp_path / f"out{ending}"
    assert main(["--model", folder, "--input", source, "--output", str(target), "--explain", "false"]) == 0
    assert [row.get("ward") or None for row in read_rows(target)] == [None, "B"]


def test_what_comes_late_fits_into_parquet(folder, rows, tmp_path):
    many = [{**rows[0], "id": str(i)} for i in range(1030)]
    many[1025] |= {"claim": "", "ward": "B", "dose": 2.5}
    many[0] |= {"dose": 1}
    source, target = save(tmp_path / "in.jsonl", many), tmp_path / "out.parquet"
    command = ["--model", folder, "--input", source, "--output", str(target), "--explain", "false"]
    assert main([*command, "--on_error", "skip"]) == 0
    answered = list(read_rows(target))
    assert len(answered) == 1030
    assert [(i, row["ward"], row["dose"]) for i, row in enumerate(answered) if row["clsgen_error"]] == [
        (1025, "B", 2.5)
    ]
    assert answered[0]["dose"] == 1.0


def test_a_column_that_parquet_can_not_hold_is_refused_before_any_row(folder, rows, tmp_path, caplog):
    source = save(tmp_path / "in.jsonl", [{**rows[0], "ward": 1}, {**rows[1], "ward": "B"}])
    assert main(["--model", folder, "--input", source, "--output", str(tmp_path / "out.parquet")]) == 1
    assert "the column 'ward' holds int and str, which no Parquet column can" in caplog.text
    assert [path.name for path in tmp_path.glob("*out*")] == []
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_bad_row_stops_the_run_or_is_written_with_its_error(folder, rows, tmp_path, caplog):
    caplog.set_level("INFO")
    rows[3]["claim"] = ""
    source, target = save(tmp_path / "in.csv", rows), tmp_path / "out.csv"
    command = ["--model", folder, "--input", source, "--output", str(target), "--explain", "false"]
    assert main(command) == 1
    assert "row 4: The field 'claim' is empty" in caplog.text
    assert not target.exists()
    assert main([*command, "--on_error", "skip"]) == 0
    answered = list(read_rows(target))
    assert len(answered) == 10
    assert [i for i, row in enumerate(answered) if row["clsgen_error"]] == [3]
    assert answered[3]["clsgen_label"] == ""
    assert "1 rows with an error" in caplog.text


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_half_a_character_stops_nothing(folder, rows, tmp_path, caplog, ending):
    rows = [{**row, "note": "half \ud800"} if i == 1 else row for i, row in enumerate(rows)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / f"out.{ending}"
    assert main(["--model", folder, "--input", str(tmp_path / "in.jsonl"), "--output", str(output)]) == 0
    assert "in.jsonl, line 2 holds half a character" in caplog.text
    found = list(read_rows(output))
    assert len(found) == len(rows)
    assert found[1]["note"] == "half \ufffd"


def test_a_blank_line_of_one_column_is_no_silent_gap(folder, tmp_path, caplog):
    (tmp_path / "in.csv").write_text("text\nfirst\n\nlast\n\n")
    assert (
        main(
            [
                "--model",
                folder,
                "--input",
                str(tmp_path / "in.csv"),
                "--output",
                str(tmp_path / "out.csv"),
                "--text_column",
                "text",
            ]
        )
        == 1
    )
    assert "in.csv, line 3 is blank" in caplog.text


@pytest.mark.parametrize("explain", ["true", "false"])
def test_a_row_without_a_number_stops_the_run_or_is_written_with_its_error(backbones, rows, tmp_path, caplog, explain):
    model = build(backbones["qwen3"])  # its LM head has weights of its own
    model.generation_config.max_new_tokens = 4
    model.get_input_embeddings().weight.data[model.tokenizer.convert_tokens_to_ids("~")] = float("nan")
    folder = str(write_checkpoint(model, tmp_path / "model", REPORT))
    rows[1]["claim"] = ""
    rows[3]["claim"] = rows[6]["claim"] = "A ~ B."
    source, target = save(tmp_path / "in.csv", rows), tmp_path / "out.csv"
    command = ["--model", folder, "--input", source, "--output", str(target), "--explain", explain]
    assert main([*command, "--batch_size", "2", "--on_error", "skip"]) == 0
    answered = list(read_rows(target))
    assert [i for i, row in enumerate(answered) if row["clsgen_error"]] == [1, 3, 6]
    assert all("not a number" in answered[i]["clsgen_error"] for i in (3, 6))
    assert all(row["clsgen_label"] for i, row in enumerate(answered) if i not in (1, 3, 6))
    rows[1]["claim"] = "B."
    save(tmp_path / "in.csv", rows)
    assert main([*command, "--overwrite", "true"]) == 1
    assert re.search("row [47]: The head's logit or the LM's reading is not a number", caplog.text)


def test_what_cannot_work_is_refused_before_any_row(folder, rows, tmp_path, caplog):
    source, target = save(tmp_path / "in.csv", rows), tmp_path / "out.csv"
    command = ["--model", folder, "--input", source, "--output", str(target), "--explain", "false"]
    target.write_text("precious")
    assert main(command) == 1
    assert target.read_text() == "precious"
    assert main([*command, "--overwrite", "true"]) == 0
    assert main([*command[:4], "--output", str(tmp_path / "o.csv"), "--text_column", "note"]) == 1
    assert "no column(s) ['note']" in caplog.text
    assert main(["--model", folder, "--input", str(target), "--output", str(tmp_path / "o.csv")]) == 1
    assert "choose another --prefix" in caplog.text
    assert main([*command[:4], "--output", str(tmp_path / "o.xls")]) == 1
    assert "ending must be one of" in caplog.text
    assert main(["--model", folder, "--input", "nowhere.csv", "--output", "o.csv"]) == 1
    assert main(["--model", folder, "--input", source]) == 1
    (tmp_path / "bad.jsonl").write_text('{"findings": "a", "claim": "b"}\n{"findings": \n')
    assert main(["--model", folder, "--input", str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "o.csv")]) == 1
    assert "line 2 is not JSON" in caplog.text


def test_a_killed_run_goes_on_without_losing_or_repeating_a_row(folder, texts, tmp_path):
    rows = [{"id": str(i), **texts[i % 4]} for i in range(640)]
    source, target = save(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = [
        sys.executable,
        str(ROOT / "predict_clsgen.py"),
        "--model",
        folder,
        "--input",
        source,
        "--output",
        str(target),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    journal = tmp_path / ".out.jsonl.journal.jsonl"
    written = 0
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background is told to ignore it
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            lines = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
            if lines > written:
                break
            time.sleep(0.02)
        process.send_signal(number)
        _, messages = process.communicate(timeout=60)
        assert not target.exists()
        written = journal.read_bytes().count(b"\n") - 1
        assert 0 < written < len(rows)
    assert process.returncode == 130
    assert "The same command goes on" in messages
    with journal.open("a") as file:
        file.write('{"clsgen_label": "torn')
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Going on after {written} rows" in done.stderr
    answered = list(read_rows(target))
    assert [row["id"] for row in answered] == [row["id"] for row in rows]
    assert all(row["clsgen_probability"] is not None for row in answered)
    assert not journal.exists()


def test_a_journal_of_another_run_is_refused(folder, rows, tmp_path, caplog):
    source, target = save(tmp_path / "in.csv", rows), tmp_path / "out.csv"
    rows[9]["claim"] = " "
    source = save(tmp_path / "in.csv", rows)
    command = ["--model", folder, "--input", source, "--output", str(target), "--explain", "false"]
    journal = tmp_path / ".out.csv.journal.jsonl"
    assert main(command) == 1
    assert journal.exists()
    assert main([*command, "--prior", "0.2"]) == 1
    assert "another run" in caplog.text


def left_behind(folder, rows, tmp_path):
    """A command that a bad last row has stopped, and the journal of its unfinished run."""
    source = save(tmp_path / "in.csv", [*rows[:9], {**rows[9], "claim": " "}])
    command = ["--model", folder, "--input", source, "--output", str(tmp_path / "out.csv"), "--explain", "false"]
    assert main(command) == 1
    return command, tmp_path / ".out.csv.journal.jsonl"


@pytest.mark.parametrize("changed", ["model.safetensors", "generation_config.json"])
def test_a_checkpoint_that_changed_is_another_run(folder, rows, tmp_path, caplog, changed):
    command, _ = left_behind(folder, rows, tmp_path)
    os.utime(Path(folder) / changed, ns=(1, 1))
    assert main(command) == 1
    assert "another run" in caplog.text


def test_a_hub_id_stands_for_the_commit_that_was_loaded(folder, rows, tmp_path):
    """Weights and tokenizer of a pinned commit are its own; answers of two commits are not mixed."""
    cached = tmp_path / "home" / "hub" / "models--me--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    command, environment = ["predict_clsgen.py", "--model", "me/tiny", "--explain", "false"], {**os.environ}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    source = save(tmp_path / "in.csv", [{**rows[0], "claim": " "}])
    command = [sys.executable, *command, "--input", source, "--output", str(tmp_path / "out.csv")]

    def said(main, *more):
        (cached / "refs" / "main").write_text(main * 40)
        done = subprocess.run(
            [*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        return done.stderr

    assert "row 1: The field 'claim' is empty" in said("a")
    assert "holds the answers of another run" in said("b")
    (cached / "snapshots" / ("b" * 40) / "tokenizer.json").write_text("{}")
    assert "row 1: The field 'claim' is empty" in said("b", "--revision", "a" * 40, "--overwrite", "true")


def test_two_runs_to_one_output_are_refused(folder, rows, tmp_path, caplog):
    command, path = left_behind(folder, rows, tmp_path)
    run = json.loads(path.read_text().splitlines()[0])
    with Journal(path, run):
        assert main(command) == 1
        assert main([*command, "--overwrite", "true"]) == 1
    assert caplog.text.count(f"{path} is in use by another run") == 2
    assert main([*command, "--on_error", "skip"]) == 0


def test_more_answers_than_rows_are_nobodys(folder, rows, tmp_path, caplog):
    command, path = left_behind(folder, rows, tmp_path)
    with path.open("a") as file:
        file.write("{}\n" * 11)
    assert main(command) == 1
    assert f"{path} holds 11 answers about 10 rows" in caplog.text


def test_an_input_that_is_replaced_meanwhile_is_an_error(folder, texts, tmp_path):
    rows = [{"id": str(i), **texts[i % 4]} for i in range(320)]
    source, target = save(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = [sys.executable, "predict_clsgen.py", "--model", folder, "--input", source, "--output", str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / ".out.jsonl.journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.replace(save(tmp_path / "other.jsonl", rows[::-1]), source)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "in.jsonl was changed while it was read" in messages
    assert not target.exists()


def test_a_table_without_rows_keeps_its_header(folder, tmp_path):
    (tmp_path / "in.csv").write_text("id,findings,claim\n")
    assert main(["--model", folder, "--input", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.csv")]) == 0
    header = (tmp_path / "out.csv").read_text().splitlines()
    assert header[0].startswith("id,findings,claim,clsgen_label,clsgen_probability")
    assert len(header) == 1


def test_a_number_that_is_none_becomes_null(folder, rows, tmp_path):
    source = save(tmp_path / "in.parquet", [{**rows[0], "dose": float("nan"), "doses": [1.0, float("inf")]}])
    target = tmp_path / "out.jsonl"
    assert main(["--model", folder, "--input", source, "--output", str(target), "--explain", "false"]) == 0
    (answered,) = (json.loads(line, parse_constant=pytest.fail) for line in target.read_text().splitlines())
    assert (answered["dose"], answered["doses"]) == (None, [1.0, None])


def test_talking(folder, model, capsys, monkeypatch):
    lines = iter(["Death fell.", "It works.", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["--model", folder]) == 0
    shown = capsys.readouterr().out
    prediction = model.classify_and_explain({"findings": "Death fell.", "claim": "It works."})
    assert f"(P(supported) = {prediction.probability:.3f}, " in shown
    assert prediction.explanation in shown
