"""Several processes learn what one learns, with whole weights (DDP) and sharded ones (FSDP2); and what is refused."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS, PROMPT
from safetensors.torch import load_file
from test_train_sft_cls import command
from test_training import arguments, launch
from transformers import AutoModel, AutoModelForCausalLM, set_seed
from trl import ModelConfig

from clsgen.sft_config_clsgen import ClsGenSFTConfig
from clsgen.sharding import check_launch
from clsgen.tasks import load_task
from clsgen.train_sft_cls import main

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"ddp": ROOT / "train_sft_cls.py", "fsdp2": ROOT / "tests" / "fsdp2_on_cpu.py"}


@pytest.fixture(scope="module")
def backbones(tokenizer, tmp_path_factory):
    """A tiny llama with weights as small as a real one's: from louder ones, rounding shows in the gradients."""
    set_seed(0)
    folder = str(tmp_path_factory.mktemp("llama"))
    config = copy.deepcopy(CONFIGS["llama"])
    config.initializer_range = 0.02
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"llama": folder}


@pytest.fixture
def task_folder(tmp_path):
    """A task whose rows come by fours: labels alone, explanations alone, by turns. Odd sizes split unevenly."""
    folder = tmp_path / "task"
    folder.mkdir()
    spec = {**PROMPT, "name": "tiny", "labels": ["no_support", "support"]}
    spec["data_files"] = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    (folder / "task.yaml").write_text(yaml.safe_dump(spec))
    for name, size in (("train", 32), ("validation", 13), ("test", 11)):
        rows = [
            {
                "id": f"{name}{i}",
                "findings": f"{'zzzz' if i % 2 else 'aaaa'} {i} {i * 7 % 10} " * (1 + i % 3),
                "claim": f"Drug {i}.",
                "label": None if name == "train" and i // 4 % 2 else i // 2 % 2 if i % 3 == 0 else i % 2,
                "explanation": "It fell, as was said." if i // 4 % 2 else None,
            }
            for i in range(size)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(task_folder, backbone, output, *more):
    settings = {
        "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", "use_cpu": "true", "seed": 0,
        "logging_steps": 1, "num_examples": 0, "report_to": "none", "learning_rate": 1e-3, "warmup_steps": 0,
        "per_device_eval_batch_size": 4, "save_total_limit": 2, "lora_dropout": 0.0,
        "activation_checkpointing": "false", "verdict_texts": 0, "lm_reading_weight": 0,
    }  # fmt: skip
    chosen = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    reads = ["--cls_reads", "2:mean", "3:decision"]
    return [part for part in [*command(task_folder, backbone, output)[:-2], *reads, *chosen, *more] if part]


def train_alone(*args):
    main(flags(*args, "--per_device_train_batch_size", "8"))


def train_by_two(engine, *args):
    more = flags(*args, "--per_device_train_batch_size", "4")
    launch(SCRIPTS[engine], *more, config=f"{engine}.yaml")


def losses(output):
    history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses_of_step = ("loss", "lm_loss", "cls_loss", "verdict_loss")
    names = (*losses_of_step, *(f"eval_{name}" for name in losses_of_step), "grad_norm")
    return {(entry["step"], name): entry[name] for entry in history for name in names if name in entry}


def predictions(output):
    return json.loads((output / "test_predictions.json").read_text())


def probabilities(output):
    return [row["probability"] for row in predictions(output)]


def weights(output):
    return load_file(output / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "lora"), [("ddp", "true"), ("fsdp2", "true"), ("fsdp2", "false")])
def test_two_processes_learn_what_one_learns(engine, lora, task_folder, backbones, tmp_path):
    # In each step, the first micro-batch gives one process labels alone and the other explanations alone.
    alone, two = tmp_path / "alone", tmp_path / "two"
    # Of a gradient near 0, Adam makes a step as long as any, and rounding would show: hence its epsilon.
    common = ("--use_peft", lora, "--cls_learning_rate", "1e-4", "--save_adapter", lora, "--verdict_weight", "0.5",
              "--adam_epsilon", "1e-5")  # fmt: skip
    best = ("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss")
    train_alone(task_folder, backbones["llama"], alone, *common, *best)
    train_by_two(engine, task_folder, backbones["llama"], two, *common, *best)
    assert len(losses(alone)) == 4 * 5 + 2 * 4
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4, abs=1e-6)
    expected = weights(alone)
    assert weights(two).keys() == expected.keys()
    for name, tensor in weights(two).items():
        scale = expected[name].abs().max()  # the probe's regression makes the most of rounding: its weights are large
        assert (tensor - expected[name]).abs().max() <= 1e-4 * scale, name
    assert probabilities(two) == pytest.approx(probabilities(alone), abs=1e-4)

    checkpoint = two / "checkpoint-4"
    shards = sorted(path.name for path in checkpoint.glob("pytorch_model_fsdp_0/*.distcp"))
    assert shards == ([] if engine == "ddp" else ["__0_0.distcp", "__1_0.distcp"])
    model = AutoModel.from_pretrained(two / "model", trust_remote_code=True)
    rows = load_task(task_folder).splits["test"]
    texts = [{"findings": row["findings"], "claim": row["claim"]} for row in rows]
    assert [p.probability for p in model.classify(texts)] == pytest.approx(probabilities(two), abs=1e-4)
    assert json.loads((two / "metrics.json").read_text())["test"]["auroc"] >= 0
    assert (two / "adapter" / "adapter_model.safetensors").exists() == (lora == "true")


@pytest.mark.slow
def test_a_run_goes_on_from_shards(task_folder, backbones, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_by_two("fsdp2", task_folder, backbones["llama"], whole)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train_by_two("fsdp2", task_folder, backbones["llama"], resumed, "--resume_from_checkpoint", "true")
    assert losses(resumed) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


@pytest.mark.slow
def test_bfloat16_leaves_head_and_losses_in_float32(task_folder, backbones, tmp_path):
    alone, two = tmp_path / "alone", tmp_path / "two"
    more = ("--bf16", "true", "--dtype", "bfloat16", "--activation_checkpointing", "true")
    train_alone(task_folder, backbones["llama"], alone, *more)
    train_by_two("fsdp2", task_folder, backbones["llama"], two, *more)
    assert losses(two)[1, "lm_loss"] == pytest.approx(losses(alone)[1, "lm_loss"], rel=1e-3)
    assert losses(two)[1, "cls_loss"] == pytest.approx(losses(alone)[1, "cls_loss"], rel=5e-3)
    logits = torch.tensor([row["logit"] for row in predictions(two)])
    assert not torch.equal(logits, logits.bfloat16().float())
    head = weights(two)["cls_head.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())
    assert weights(two)["lm.model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_launches_that_would_go_wrong_are_refused(tmp_path, monkeypatch):
    training = arguments(tmp_path)
    check_launch(True, training, ModelConfig())
    with monkeypatch.context() as patch:  # also in Python, without a command line
        patch.setattr(type(training), "n_gpu", 2)
        with pytest.raises(ValueError, match=r"one process would share 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
            ClsGenSFTConfig(str(tmp_path))
    with pytest.raises(ValueError, match="needs a GPU"):
        check_launch(True, training, ModelConfig(load_in_4bit=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="a whole copy"):
        check_launch(True, training, ModelConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="A probe alone"):
        check_launch(True, arguments(tmp_path, num_train_epochs=0, max_steps=-1), ModelConfig())
    with pytest.raises(ValueError, match="reading needs whole weights in each process"):
        check_launch(True, training, ModelConfig(), lm_reading_weight=0.5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="there is no GPU"):
        check_launch(True, training, ModelConfig())
