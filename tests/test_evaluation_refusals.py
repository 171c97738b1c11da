"""What an evaluation refuses, and how early; and what it never writes down."""

# ruff: noqa: F811 -- pytest finds the fixtures of another file by their names here

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_evaluate_clsgen import REPORT, checkpoint, evaluate, make_rows, make_task, task  # noqa: F401

from clsgen.checkpoint_folder import write_checkpoint
from clsgen.evaluate_clsgen import EvaluationArguments, evaluate_checkpoint, main
from clsgen.evaluation.predictions import read_predictions


def test_a_guidance_that_cannot_be(task, tmp_path):
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`explanation_guidance_scale` must be a finite number above 0"):
            evaluate("anything", task, tmp_path / "out", explanation_guidance_scale=wrong)
    older = Path(__file__).parent / "fixtures" / "format_1"
    with pytest.raises(ValueError, match="from before `explanation_guidance_scale`"):
        evaluate(str(older), task, tmp_path / "out", explanation_guidance_scale=2.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,p\n1,0.5\n", "missing column"),
        ("id,probability\n1,0.5\n1,0.6\n", "more than once"),
        (
            "id,probability\n1,high\n",
            r"p.csv: `probability` is not a probability, in \[0, 1\], in 1 row\(s\), e.g. 'high'",
        ),
        ("id,probability\n1,0.5\n2,1.5\n", r"`probability` is not .* e.g. '1.5' \('2'\)"),
        ("id,probability,predicted\n1,0.5,2\n", "`predicted` is not 0 or 1"),
        ("id,probability,gold\n1,0.5,\n2,0.5,yes\n", r"`gold` is not 0 or 1 in 1 row\(s\), e.g. 'yes'"),
    ],
)
def test_predictions_that_can_not_be_compared(tmp_path, content, message):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "p.csv")


def test_a_mistyped_judge_costs_no_generation(checkpoint, task, tmp_path):
    with pytest.raises(ValueError, match="There is no judge 'tfdif'"):
        evaluate(checkpoint, task, tmp_path / "out", modes=["guided"], judges=["tfdif"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`judges` is empty"):
        evaluate(checkpoint, task, tmp_path / "out", modes=["guided"], judges=[])
    with pytest.raises(ValueError, match="names openai:m at two addresses"):
        evaluate(
            checkpoint, task, tmp_path / "out", modes=["guided"], judges=["openai:m@http://a", "openai:m@http://b"]
        )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"compare": ["theirs.csv"]}, "none of its ids"),
        ({"backbone": "a/b/c"}, "'a/b/c'"),
        ({"also_on": ["bare"]}, "No row of other/test has a label"),
    ],
)
def test_what_can_not_be_compared_costs_no_generation(checkpoint, task, tmp_path, monkeypatch, option, message):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"id": ["elsewhere"], "probability": [0.5]}).to_csv("theirs.csv", index=False)
    make_task(tmp_path / "bare", {"train": make_rows("train"), "test": make_rows("test", label=None)}, name="other")
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, task, tmp_path / "out", modes=["free"], **option)
    assert not list((tmp_path / "out").glob("answers/*free*"))


def test_passwords_of_addresses_reach_no_file(checkpoint, task, tmp_path):
    address = "openai:m@http://alice:s3cret@127.0.0.1:9/v1"
    argv = ["--judges", address]
    arguments = EvaluationArguments(
        model=checkpoint, task=task, modes=["none"], judges=[address], output_dir=str(tmp_path)
    )
    evaluate_checkpoint(arguments, argv)
    for file in (tmp_path / "metrics.json", tmp_path / "report.html", tmp_path / "report.md"):
        assert "s3cret" not in file.read_text()
    assert "openai:m@http://...@127.0.0.1:9/v1" in (tmp_path / "metrics.json").read_text()


def test_labels_the_other_way_round(checkpoint, task, tmp_path):
    splits = {split: make_rows(split) for split in ("train", "test")}
    turned = make_task(tmp_path / "turned", splits, labels=["supported", "not_supported"])
    with pytest.raises(ValueError, match="the other way round"):
        evaluate(checkpoint, turned, tmp_path / "out")
    with pytest.raises(ValueError, match="the other way round"):
        evaluate(checkpoint, task, tmp_path / "out", also_on=[turned])
    renamed = make_task(tmp_path / "renamed", splits, labels=["no", "yes"])
    found = evaluate(checkpoint, renamed, tmp_path / "out")
    assert found["labels"] == {"model": ["not_supported", "supported"], "task": ["no", "yes"]}
    assert "labels are" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modes", "loud"], "`guided`, `free`"),
        (["--modes", "none", "free"], "`none` alone"),
        (["--limit", "0"], "at least 1"),
        (["--sensitivities", "1.2"], "sensitivity"),
        (["--compare", "nowhere.parquet"], "nowhere.parquet"),
        (["--split", "validation", "--judges", "oracle"], "oracle"),
    ],
)
def test_what_can_not_work_is_one_clear_line(checkpoint, task, tmp_path, caplog, options, message):
    options = ["--modes", "free", *options] if "--judges" in options else ["--modes", "none", *options]
    command = ["--model", checkpoint, "--task", task, "--output_dir", str(tmp_path / "out"), *options]
    assert main(command) == 1
    assert message in caplog.text
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_an_output_that_can_not_be_written_is_named(checkpoint, task, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert main(["--model", checkpoint, "--task", task, "--output_dir", str(tmp_path / "file")]) == 1
    assert "file" in caplog.text


def test_a_model_without_finite_probabilities_is_refused(model, task, tmp_path):
    with torch.no_grad():
        model.cls_head.bias.fill_(math.nan)
    folder = str(write_checkpoint(model, tmp_path / "broken", REPORT))
    with pytest.raises(ValueError, match=r"/test, row\(s\) \['test-0', .*reading is not a number"):
        evaluate(folder, task, tmp_path / "out")
