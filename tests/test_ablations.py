"""Ablations: one part of a recipe changes, the rest stays, and the run leaves what the table reads."""

import json
import shlex
from dataclasses import replace

import pytest
import yaml
from datasets import DatasetDict
from trl import TrlParser

from benchmarks import ablations
from benchmarks.ablations import ABLATIONS, main, plan, with_explanations
from clsgen.sft_config_clsgen import ClsGenSFTConfig
from clsgen.tasks import ROOT, class_counts, load_task
from clsgen.train_arguments import ModelArguments, TaskArguments, parse_reads


def test_fewer_explanations_keep_rows_and_labels(tmp_path):
    task = load_task("trial_claims")
    few, more = (load_task(with_explanations(task, count, tmp_path / str(count))) for count in (50, 100))
    counts = class_counts(few.splits["train"])
    assert counts == {**class_counts(task.splits["train"]), "explained": 50}
    assert (few.prompt, few.labels, few.name) == (task.prompt, task.labels, task.name)
    assert (
        few.splits["test"].to_list() == task.splits["test"].select_columns(few.splits["test"].column_names).to_list()
    )
    kept = [{row["id"] for row in t.splits["train"] if row["explanation"]} for t in (few, more)]
    assert kept[0] < kept[1]
    with pytest.raises(ValueError, match="300 training explanations, fewer than 301"):
        with_explanations(task, 301, tmp_path / "no")


def test_plans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = plan("no-lm-loss", "trial_claims", 3, ["--max_steps", "1"])
    assert arguments[:4] == ["--config", "recipes/trial_claims.yaml", "--task", "trial_claims"]
    assert arguments[-4:] == ["--lm_weight", "0", "--max_steps", "1"]
    assert "results/trial_claims/ablations/no-lm-loss/seed-3" in arguments
    assert {"full", "no-bce", "no-verdict-line", "mean-pooling", "packing", "explanations-100"} <= set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_training_takes_every_plan(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, recipe, *others = plan(name, "trial_claims", 0, [])
    parser = TrlParser((TaskArguments, ClsGenSFTConfig, ModelArguments))
    arguments, training, model_arguments = parser.parse_args_and_config([config, str(ROOT / recipe), *others])
    assert parse_reads(arguments.cls_reads)
    assert training.output_dir.endswith(f"{name}-seed-0")
    assert model_arguments.use_peft


def test_run(tmp_path, monkeypatch, backbones):
    """A whole run on a tiny backbone and a few rows, from a folder with the recipe in it."""
    whole = load_task("trial_claims")
    few = replace(whole, splits=DatasetDict({name: rows.select(range(24)) for name, rows in whole.splits.items()}))
    folder = with_explanations(few, 24, tmp_path / "few")
    recipe = yaml.safe_load((ROOT / "recipes" / "trial_claims.yaml").read_text(encoding="utf-8"))
    recipe |= {"cls_reads": ["2:mean"], "num_train_epochs": 0, "max_length": 1400}
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "few.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    further = ["--model_name_or_path", backbones["llama"], "--num_examples", "0"]
    argv = ["--name", "explanations-0", "--task", str(folder), "--results_dir", str(tmp_path / "mine"), *further]
    main(argv)
    report = json.loads((tmp_path / "mine/metrics.json").read_text(encoding="utf-8"))
    assert report["command"] == shlex.join(["python", "-m", "benchmarks.ablations", *argv])
    assert report["train_rows"]["explained"] == 0
    assert report["test"]["rows"] == 24
