"""`calibrate_clsgen.py`: a finished checkpoint's number, fitted anew."""

import json
import shutil

import pytest
import yaml
from sklearn.metrics import roc_auc_score
from test_train_sft_cls import command, task_folder

from clsgen.calibrate_clsgen import main
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.tasks import load_task
from clsgen.train_sft_cls import main as train


@pytest.fixture(scope="module")
def trained(backbones, tmp_path_factory, request):
    """A checkpoint, and the task that it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    task = task_folder.__wrapped__(folder)
    settings = ["--verdict_weight", "1", "--lm_reading_weight", "0"]
    train([*command(task, backbones["llama"], folder / "out"), *settings])
    return folder / "out" / "model", task


def classified(folder, task):
    model = ClsGenForCausalLMAndClassification.from_pretrained(folder)
    rows = load_task(task).splits["test"]
    return model, model.classify([{"findings": row["findings"], "claim": row["claim"]} for row in rows]), rows["label"]


def test_the_lms_reading_becomes_a_part_of_the_number(trained, tmp_path, capsys):
    (former, task), output, results = trained, tmp_path / "pooled", tmp_path / "results"
    before = json.loads((former / "metrics.json").read_text())
    asked = ["--lm_reading_weight", "0.5", "--threshold_method", "youden", "--conformal_error_rate", "0.3"]
    main(["--model", str(former), "--task", str(task), "--output", str(output), "--results_dir", str(results), *asked])
    report = json.loads((output / "metrics.json").read_text())
    model, predictions, labels = classified(output, task)
    assert model.config.lm_reading_weight == report["lm_reading_weight"] == 0.5
    assert report["calibration"] == model.config.calibration != before["calibration"]
    assert report["threshold"] == model.config.threshold
    assert model.config.conformal["error_rate"] == 0.3
    written = json.loads((results / "test_predictions.json").read_text())
    assert [row["probability"] for row in written] == pytest.approx([p.probability for p in predictions], abs=1e-6)
    assert [row["predicted"] for row in written] == [p.label_id for p in predictions]
    assert report["test"]["auroc"] == pytest.approx(roc_auc_score(labels, [p.probability for p in predictions]))
    assert {name: report[name] for name in ("command", "wall_seconds", "train_rows")} == {
        name: before[name] for name in ("command", "wall_seconds", "train_rows")
    }
    assert "calibrate_clsgen.py --model" in report["recalibration"]["command"]
    card = (output / "README.md").read_text()
    assert "calibrate_clsgen.py" in card
    assert "0.5 times the language model's own log-odds" in card
    assert (output / "recipe.yaml").read_text() == (former / "recipe.yaml").read_text()
    assert "youden" not in json.dumps(before)
    assert "validation" in capsys.readouterr().out
    # The head and the LM are what they were: back to the head alone, the number is the former one again.
    back = ["--lm_reading_weight", "0", "--threshold_method", "f1"]
    main(["--model", str(output), "--task", str(task), "--output", str(output), *back])
    again = json.loads((output / "metrics.json").read_text())
    assert again["calibration"] == pytest.approx(before["calibration"], rel=1e-3, abs=1e-4)
    assert again["test"] == pytest.approx(before["test"], rel=1e-3, abs=1e-4)


def test_training_with_the_reading_writes_the_same_checkpoint(trained, backbones, tmp_path):
    former, task = trained
    pooled = ["--verdict_weight", "1", "--lm_reading_weight", "0.5"]
    train([*command(task, backbones["llama"], tmp_path / "out"), *pooled])
    main(
        [
            "--model",
            str(former),
            "--task",
            str(task),
            "--output",
            str(tmp_path / "later"),
            "--lm_reading_weight",
            "0.5",
        ]
    )
    at_once, later = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out/model", "later"))
    for name in ("calibration", "validation", "test", "test_uncalibrated"):
        assert at_once[name] == pytest.approx(later[name], rel=1e-3, abs=1e-4), name
    assert at_once["test_conformal"] == later["test_conformal"]
    assert at_once["threshold"] == pytest.approx(later["threshold"], abs=1e-4)


def test_rows_of_another_place_in_a_copy_of_the_task(trained, tmp_path):
    former, task = trained
    here = tmp_path / "here"
    shutil.copytree(task, here)
    rows = (here / "train.jsonl").read_text().replace("train", "here").splitlines(keepends=True)
    (here / "validation.jsonl").write_text("".join(rows[:9]))
    spec = yaml.safe_load((here / "task.yaml").read_text())
    del spec["data_files"]["test"]
    spec["credentialed"] = True
    (here / "task.yaml").write_text(yaml.safe_dump(spec))
    main(["--model", str(former), "--task", str(here), "--output", str(tmp_path / "new")])
    report = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert report["credentialed"]
    assert report["validation"]["rows"] == 9
    assert report["base_rate"] == pytest.approx(4 / 9)
    assert not {"test", "test_uncalibrated", "test_conformal", "test_rows_sha256"} & set(report)
    # Once made from such rows, a checkpoint stays so.
    main(["--model", str(tmp_path / "new"), "--task", str(task), "--output", str(tmp_path / "back")])
    again = json.loads((tmp_path / "back" / "metrics.json").read_text())
    assert again["credentialed"]
    assert again["test_rows_sha256"] == json.loads((former / "metrics.json").read_text())["test_rows_sha256"]


def test_what_was_chosen_before_stays(trained, tmp_path, caplog):
    (former, task), here = trained, tmp_path / "here"
    fixed = ["--threshold_method", "fixed", "--fixed_threshold", "0.4", "--conformal_error_rate", "0.3"]
    main(["--model", str(former), "--task", str(task), "--output", str(tmp_path / "fixed"), *fixed])
    shutil.copytree(task, here)
    rows = (here / "validation.jsonl").read_text().replace("Drug 3.", "Drug. " * 60)
    (here / "validation.jsonl").write_text(rows)
    again = ["--model", str(tmp_path / "fixed"), "--task", str(here), "--output", str(tmp_path / "new")]
    with pytest.raises(SystemExit, match="Row 'validation3' of validation: The prompt is longer"):
        main(again)
    main([*again, "--on_bad_row", "skip"])
    report = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert report["validation"]["rows"] == 11
    assert (report["threshold_method"], report["threshold"], report["conformal"]["error_rate"]) == ("fixed", 0.4, 0.3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda spec: spec.update(name="other"), "answers the task 'tiny'"),
        (lambda spec: spec["labels"].reverse(), "labels 0 and 1 are"),
        (lambda spec: spec.update(question="Is it refuted?"), "trained with another question than 'tiny' has now"),
        (lambda spec: spec["data_files"].pop("validation"), "no validation split"),
        (lambda spec: spec["data_files"].update(validation="one_class.jsonl"), "rows of both classes"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_and_nothing_is_written(trained, tmp_path, spoil, message):
    former, task = trained
    other = tmp_path / "other"
    shutil.copytree(task, other)
    rows = [json.loads(line) for line in (other / "validation.jsonl").read_text().splitlines()]
    (other / "one_class.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["label"]))
    spec = yaml.safe_load((other / "task.yaml").read_text())
    spoil(spec)
    (other / "task.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(SystemExit, match=message):
        main(["--model", str(former), "--task", str(other), "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_what_is_no_checkpoint_is_named(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="does not appear to have a file named metrics"):
        main(["--model", str(tmp_path / "empty"), "--output", str(tmp_path / "new")])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is not writable"):
        main(["--model", str(trained[0]), "--output", str(tmp_path / "file" / "new")])
    with pytest.raises(SystemExit, match="must lie between 0 and 1"):
        main(["--model", str(trained[0]), "--output", str(tmp_path / "new"), "--lm_reading_weight", "1.5"])
