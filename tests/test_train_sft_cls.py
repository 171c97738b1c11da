"""The command line, from a task folder to a checkpoint that answers; and what it refuses."""

import json
import logging
import math
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel

from clsgen.checkpoint_folder import write_checkpoint
from clsgen.classification_metrics import classification_metrics
from clsgen.sft_config_clsgen import ClsGenSFTConfig
from clsgen.tasks import load_task
from clsgen.train_arguments import RECIPES, ModelArguments, TaskArguments, parse_reads, split_off_recipe
from clsgen.train_sft_cls import build_model, main, train


@pytest.fixture
def task_folder(tmp_path):
    """A task with a word that tells the label."""
    folder = tmp_path / "task"
    folder.mkdir()
    spec = {
        "name": "tiny",
        "template": "Findings: {findings}\n\nClaim: {claim}",
        "document": "findings",
        "question": "Do they?",
        "labels": ["no_support", "support"],
        "verdicts": ["not supported", "supported"],
        "data_files": {name: f"{name}.jsonl" for name in ("train", "validation", "test")},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(spec))
    for name, size in (("train", 24), ("validation", 12), ("test", 10)):
        rows = [
            {"id": f"{name}{i}", "findings": f"{'zzzz' if i % 2 else 'aaaa'} {i}", "claim": f"Drug {i}.",
             "label": i % 2, "explanation": None if i % 5 == 0 else "Seen."}
            for i in range(size)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(task_folder, backbone, output_dir, *more):
    return [
        "--task", str(task_folder), "--model_name_or_path", backbone, "--output_dir", str(output_dir),
        "--max_length", "300", "--max_explanation_length", "40", "--max_steps", "4", "--eval_strategy", "steps",
        "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2", "--lora_first_layer", "0",
        "--lora_r", "2", "--num_examples", "2", "--cls_reads", "auto", *more,
    ]  # fmt: skip


def test_main_job_from_a_folder_to_a_checkpoint(task_folder, backbones, tmp_path, capsys):
    output = tmp_path / "out"
    results = tmp_path / "results"
    further = ["--threshold_method", "youden", "--explanation_guidance_scale", "1.5"]
    main(command(task_folder, backbones["llama"], output, "--results_dir", str(results), *further))
    report = json.loads((output / "metrics.json").read_text())
    assert {"auroc", "average_precision", "f1", "brier", "ece", "accuracy"} <= set(report["test"])
    assert {"seed", "command", "versions", "wall_seconds", "validation", "test_uncalibrated"} <= set(report)
    assert report["train_rows"] == {"rows": 24, "positive": 12, "negative": 12, "unlabelled": 0, "explained": 19}
    assert json.loads((results / "metrics.json").read_text()) == report

    shown = capsys.readouterr().out
    assert "test_uncalibrated" in shown
    assert "trust_remote_code=True" in shown

    model = AutoModel.from_pretrained(output / "model", trust_remote_code=True)
    test = load_task(task_folder).splits["test"]
    predictions = model.classify([{"findings": row["findings"], "claim": row["claim"]} for row in test])
    saved = json.loads((output / "test_predictions.json").read_text())
    assert [p.probability for p in predictions] == pytest.approx([row["probability"] for row in saved], abs=1e-4)
    assert [p.label_id for p in predictions] == [row["predicted"] for row in saved]
    again = classification_metrics(test["label"], [p.probability for p in predictions], model.config.threshold)
    assert again["auroc"] == pytest.approx(report["test"]["auroc"])
    assert again["ece"] == pytest.approx(report["test"]["ece"], abs=1e-3)
    assert model.config.base_rate == 0.5
    assert model.config.conformal == report["conformal"]
    assert report["conformal"]["error_rate"] == 0.1
    names = [model.config.label_names[int(row["label"])] for row in test]
    kept = [name for name, prediction in zip(names, predictions, strict=True) if name in prediction.prediction_set]
    assert [kept.count(name) / 5 for name in model.config.label_names] == pytest.approx(
        report["test_conformal"]["coverage"]
    )
    abstained = [prediction.abstained for prediction in predictions]
    assert sum(abstained) / len(abstained) == pytest.approx(report["test_conformal"]["abstained"])
    assert model.config.explanation_no_repeat_ngram_size == 6
    assert model.config.explanation_guidance_scale == 1.5
    assert model.generation_config.max_new_tokens == 60
    card = ModelCard.load(output / "model" / "README.md")
    assert "error rate of 0.1" in str(card)
    of_negative = report["test_conformal"]["coverage"][0]
    assert f"they hold the true label of {of_negative:.3f} of the rows of `no_support`" in str(card)
    assert f"| test | {report['test']['auroc']:.3f} |" in str(card)
    assert model.config.label_names == ["no_support", "support"]


def test_explanations_have_room_to_end_but_no_more_than_the_backbone_reads(task_folder, backbones, tmp_path):
    rooms = {}
    for max_length in (300, 2040, 2048):  # of a backbone that reads 2048 tokens, 24 of them for the verdict line
        training = ClsGenSFTConfig(
            output_dir=str(tmp_path), max_length=max_length, max_explanation_length=40, report_to="none"
        )
        source = ModelArguments(model_name_or_path=str(backbones["gpt2"]))
        model = build_model(load_task(task_folder), TaskArguments(), source, training)
        rooms[max_length] = model.generation_config.max_new_tokens
    assert rooms == {300: 60, 2040: 24, 2048: 16}
    model.generation_config.eos_token_id = None  # to the last of the positions, which this backbone learns
    prediction = model.explain({"findings": "word " * 1000, "claim": "Drug 1."}, "no_support")
    assert prediction.truncated
    assert prediction.explanation_cut


def test_without_a_validation_split_calibration_is_skipped_and_the_card_says_so(task_folder, backbones, tmp_path):
    spec = yaml.safe_load((task_folder / "task.yaml").read_text())
    del spec["data_files"]["validation"]
    (task_folder / "task.yaml").write_text(yaml.safe_dump(spec))
    main(command(task_folder, backbones["llama"], tmp_path / "out", "--use_peft", "false", "--num_examples", "0"))
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "validation" not in report
    assert report["calibration"] == {"temperature": 1.0, "bias": 0.0}
    assert "no validation split" in (tmp_path / "out" / "model" / "README.md").read_text()


def test_a_checkpoint_holds_no_text_of_a_credentialed_task(task_folder, backbones, tmp_path):
    with (task_folder / "task.yaml").open("a") as file:
        file.write("credentialed: true\n")
    arguments = command(
        task_folder, backbones["llama"], tmp_path / "out", "--num_train_epochs", "0", "--max_steps", "-1"
    )
    place = arguments.index("--num_examples")
    main(arguments[:place] + arguments[place + 2 :])
    texts = [json.loads(line)["findings"] for line in (task_folder / "test.jsonl").read_text().splitlines()]
    written = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md", ".jsonl")]
    assert (tmp_path / "out" / "model" / "README.md") in written
    assert not [path for path in written if any(text in path.read_text() for text in texts)]


def change_labels(task_folder, split, label):
    path = task_folder / f"{split}.jsonl"
    rows = [{**json.loads(line), "label": label} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_test_split_without_labels_is_not_scored(task_folder, backbones, tmp_path, caplog):
    change_labels(task_folder, "test", None)
    with caplog.at_level(logging.INFO):
        main(command(task_folder, backbones["llama"], tmp_path / "out", "--num_examples", "0"))
    assert "test: 0 of 10 rows have a label and are scored" in caplog.text
    assert "test" not in json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert json.loads((tmp_path / "out" / "test_predictions.json").read_text()) == []
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_a_row_that_cannot_fit_is_found_in_any_split_before_training(task_folder, backbones, tmp_path, caplog):
    for split, place in (("train", 3), ("test", 1)):
        path = task_folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[place]["claim"] = "Drug. " * 60
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(
            ValueError, match=rf"Row '{split}{place}' of {split}: The prompt is longer than 260 .* skip"
        ):
            main(command(task_folder, backbones["llama"], tmp_path / "out"))
        if split == "train":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["id"] != f"{split}{place}"))
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    with caplog.at_level(logging.WARNING):
        main(command(task_folder, backbones["llama"], tmp_path / "out", "--on_bad_row", "skip"))
    assert "tiny/test: skipped 1 row(s). Row 'test1' of test: The prompt is longer" in caplog.text
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (report["train_rows"]["rows"], report["test"]["rows"]) == (23, 9)


@pytest.mark.parametrize("label", [1, None])
def test_a_validation_split_without_both_classes_is_refused_before_training(task_folder, tmp_path, label):
    change_labels(task_folder, "validation", label)
    with pytest.raises(ValueError, match=r"validation split of 'tiny' needs .* both classes.* and 0 negative"):
        main(command(task_folder, "no-backbone-is-loaded", tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold_method", "fixed", "--fixed_threshold", "50"], "`--fixed_threshold` .* between 0 and 1, got 50"),
        (["--conformal_error_rate", "10"], "`--conformal_error_rate` .* both excluded, got 10"),
    ],
)
def test_bad_calibration_settings_are_refused_before_training(task_folder, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main(command(task_folder, "no-backbone-is-loaded", tmp_path / "out", *flags))


def test_a_recipes_choices_are_checked_as_flags_are(task_folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("threshold_method: best\n")
    with pytest.raises(ValueError, match=r"`--threshold_method` must be one of .* got 'best'"):
        main(["--config", str(recipe), *command(task_folder, "no-backbone-is-loaded", tmp_path / "out")])


def test_a_probe_alone_undoes_its_pos_weight(task_folder, backbones, tmp_path):
    reports = []
    for pos_weight in ("none", "7"):
        output = tmp_path / pos_weight
        more = ["--num_train_epochs", "0", "--max_steps", "-1", "--num_examples", "0", "--pos_weight", pos_weight]
        main(command(task_folder, backbones["llama"], output, *more))
        reports.append(json.loads((output / "metrics.json").read_text()))
    assert reports[1]["pos_weight"] == 7
    assert reports[1]["test_uncalibrated"] == pytest.approx(reports[0]["test_uncalibrated"], abs=1e-4)
    with pytest.raises(ValueError, match="nothing would be learned"):
        main(command(task_folder, backbones["llama"], tmp_path / "x", *more, "--warm_start", "false"))


def test_flags_override_the_recipe_and_unknown_keys_are_errors(task_folder, backbones, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("cls_loss_wieght: 0.3\n")
    with pytest.raises(ValueError, match="cls_loss_wieght"):
        main(["--config", str(recipe), *command(task_folder, backbones["llama"], tmp_path / "out")])
    recipe.write_text("seed: 3\ncls_reads: ['1:mean']\nreport_to: none\nactivation_checkpointing: false\n")
    arguments = command(task_folder, backbones["llama"], tmp_path / "out", "--seed", "4", "--num_examples", "0")
    place = arguments.index("--cls_reads")
    arguments = arguments[:place] + arguments[place + 2 :]
    main([f"--config={recipe}", *arguments])
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (report["seed"], report["cls_reads"]) == (4, [[1, "mean"]])


def test_a_recipe_is_kept_as_it_was_without_its_secrets(task_folder, backbones, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("env: {MIRROR_KEY: secret-1}\nhub_token: secret-2\nseed: 3\nreport_to: none\n")
    monkeypatch.setenv("MIRROR_KEY", "")

    def train_while_the_recipe_goes(*args):
        recipe.unlink()
        return train(*args)

    monkeypatch.setattr("clsgen.train_sft_cls.train", train_while_the_recipe_goes)
    probe_alone = ["--num_train_epochs", "0", "--max_steps", "-1", "--num_examples", "0"]
    main(["--config", str(recipe), *command(task_folder, backbones["llama"], tmp_path / "out", *probe_alone)])
    assert (tmp_path / "out" / "model" / "recipe.yaml").read_text() == "seed: 3\nreport_to: none\n"


@pytest.mark.parametrize("more", [(), ("--use_peft", "false"), ("--num_train_epochs", "0", "--max_steps", "-1")])
def test_a_number_is_calibrated_as_the_checkpoint_computes_it(task_folder, backbones, tmp_path, more):
    settings = ["--bf16", "true", "--use_cpu", "true", "--lm_reading_weight", "0", "--num_examples", "0", *more]
    main(command(task_folder, backbones["llama"], tmp_path / "out", *settings))
    model = AutoModel.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True)
    rows = load_task(task_folder).splits["test"]
    predictions = model.classify([{"findings": row["findings"], "claim": row["claim"]} for row in rows])
    saved = json.loads((tmp_path / "out" / "test_predictions.json").read_text())
    assert [p.logit for p in predictions] == pytest.approx([row["logit"] for row in saved], rel=1e-4, abs=1e-4)


def test_a_task_without_a_recipe_of_its_own_takes_that_for_any(tmp_path):
    copy = tmp_path / "clinifact"
    shutil.copytree(RECIPES.parent / "data" / "clinifact", copy)
    for argv, recipe in (
        ([], "trial_claims"),
        (["--task", "clinifact"], "clinifact"),
        (["--task=clinifact_evidence", "--seed", "1"], "clinifact_evidence"),
        (["--task", str(RECIPES.parent / "data" / "clinifact")], "clinifact"),
        (["--task", str(copy)], "any_task"),
        (["--learning_rate", "1", "--task", "nowhere"], "any_task"),
    ):
        assert split_off_recipe(argv) == (str(RECIPES / f"{recipe}.yaml"), argv)
    for config in (["--config", "mine.yaml"], ["--config=mine.yaml"]):
        assert split_off_recipe(["--task", "clinifact", *config]) == ("mine.yaml", ["--task", "clinifact"])


def test_lora_starts_above_what_the_head_reads_or_at_two_thirds_of_the_depth(task_folder, backbones, tmp_path):
    flags = ("--lora_first_layer", "auto", "--save_adapter", "true", "--num_examples", "0")
    for asked, lowest in ((("auto",), None), (("1:mean",), 1), (("1:mean", "4:decision"), 2)):
        out = tmp_path / "-".join(asked).replace(":", "")
        main(command(task_folder, backbones["llama"], out, *flags, "--cls_reads", *asked))
        reads = json.loads((out / "metrics.json").read_text())["cls_reads"]
        trained = json.loads((out / "adapter" / "adapter_config.json").read_text())["layers_to_transform"]
        deepest = max(layer % 5 for layer, _ in reads)
        assert trained == list(range(min(deepest, 2) if lowest is None else lowest, 4))
    assert (out / "model" / "recipe.yaml").read_text() == (RECIPES / "any_task.yaml").read_text()


def test_bad_arguments_are_named(task_folder, backbones, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="is not writable"):
        main(command(task_folder, backbones["llama"], blocked / "out"))
    with pytest.raises(ValueError, match="this backbone has 4 layers"):
        main(command(task_folder, backbones["llama"], tmp_path / "out", "--lora_first_layer", "4"))
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_auroc", "--lm_reading_weight", "0.7"]
    with pytest.raises(ValueError, match=r"auroc is the head's alone during training.*take `eval_loss`"):
        main(command(task_folder, backbones["llama"], tmp_path / "out", *best))
    with pytest.raises(ValueError, match="or `auto`, got 'upper'"):
        main(command(task_folder, backbones["llama"], tmp_path / "out", "--lora_first_layer", "upper"))
    with pytest.raises(ValueError, match="cls_reads"):
        parse_reads(["middle"])
    assert parse_reads(["14:mean", "-1:decision"]) == [(14, "mean"), (-1, "decision")]
    assert parse_reads("14:mean -1:decision") == [(14, "mean"), (-1, "decision")]
    assert parse_reads("auto") is parse_reads(["auto"]) is None


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(model, tmp_path, monkeypatch):
    report = {
        "base_model": "tiny",
        "task": "tiny",
        "command": "c",
        "seed": 0,
        "train_rows": 1,
        "threshold_method": "f1",
    }
    folder = write_checkpoint(model, tmp_path / "model", report)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model.cls_head.weight.data += 1

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(model, tmp_path / "model", report)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert math.isfinite(model.classify("text").probability)
