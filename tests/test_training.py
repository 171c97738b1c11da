"""The trainer: gradients don't depend on how a step is cut, both heads move, nothing vanishes, runs resume exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clsgen.batching_clsgen import alike
from clsgen.losses_clsgen import IGNORE_INDEX
from clsgen.resuming import last_complete_checkpoint
from clsgen.sft_config_clsgen import ClsGenSFTConfig
from clsgen.trainer_clsgen import ClsGenSFTTrainer
from clsgen.training_rows import DataCollatorForClsGen, encode_rows, label_counts, pack_rows

ROOT = Path(__file__).resolve().parent.parent


def arguments(folder, **kwargs):
    settings = {
        "max_length": 460, "max_explanation_length": 60, "max_steps": 2, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "activation_checkpointing": False,
        "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return ClsGenSFTConfig(str(folder), **{**settings, **kwargs})


def weights(model, part):
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name and p.requires_grad}


def moved(before, after):
    return {name: (after[name] - before[name]).abs().max().item() for name in before}


def test_rows_carry_labels_on_their_tokens(model, task_rows):
    rows = encode_rows(task_rows, model.encoder, 60, guided=True)
    assert len(rows) == len(task_rows)
    for row, source in zip(rows, task_rows, strict=True):
        prompt = model.encoder.encode({"findings": source["findings"], "claim": source["claim"]}).input_ids
        assert row["input_ids"][: len(prompt)] == prompt
        decisions = {i: label for i, label in enumerate(row["cls_labels"]) if label != IGNORE_INDEX}
        assert decisions == ({} if source["label"] is None else {len(prompt) - 1: source["label"]})
        completion = [i for i in row["labels"] if i != IGNORE_INDEX]
        assert completion == row["input_ids"][len(prompt) :]
        text = model.tokenizer.decode(completion)
        if source["explanation"] is None:
            assert text == ""
        elif source["label"] is None:
            assert text.startswith("It fell")
        else:
            assert text.startswith(f"Verdict: {['not supported', 'supported'][int(source['label'])]}.\nIt fell")
    free = encode_rows(task_rows, model.encoder, 60, guided=False)
    assert all("Verdict" not in model.tokenizer.decode(row["input_ids"]) for row in free)


def test_a_row_that_trains_nothing_is_an_error(model, task_rows):
    empty = task_rows.map(lambda row: {"label": None, "explanation": None} if row["id"] == "3" else row)
    with pytest.raises(ValueError, match="Row '3' of train has neither"):
        encode_rows(empty, model.encoder, 60, guided=True)


def test_collator_as_its_docstring_shows():
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3], "cls_labels": [-100.0, 1.0, -100.0]},
        {"input_ids": [4, 5], "labels": [-100, -100], "cls_labels": [-100.0, 0.0]},
    ]
    collator = DataCollatorForClsGen(pad_token_id=0)
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3], [-100, -100, -100]]
    assert batch["cls_labels"].tolist() == [[-100.0, 1.0, -100.0], [-100.0, 0.0, -100.0]]
    flat = DataCollatorForClsGen(pad_token_id=0, padding_free=True)(rows)
    assert "attention_mask" not in flat
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert flat["cls_labels"].tolist() == [[-100.0, 1.0, -100.0, -100.0, 0.0]]


def test_packing_loses_no_label(model, task_rows):
    rows = encode_rows(task_rows, model.encoder, 60, guided=True)
    packed = pack_rows(rows, 800, seed=0)
    assert len(packed) < len(rows)
    assert label_counts(packed) == label_counts(rows)
    with pytest.raises(ValueError, match="does not fit into packed sequences"):
        pack_rows(rows, 50)


def step_gradients(backbone, task_rows, folder, **kwargs):
    """Gradients of one optimizer step over all rows, by parameter, and the logged losses."""
    model = build(backbone)
    gradients = {}
    trainer = ClsGenSFTTrainer(
        model, arguments(folder, max_steps=1, max_grad_norm=0, **kwargs), train_dataset=task_rows
    )

    def keep(optimizer, *_):
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return gradients, trainer.state.log_history[0]


def assert_same_gradients(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        scale = one[name].abs().max().clamp(min=1e-8)
        assert (one[name] - other[name]).abs().max() <= tolerance * scale, name


def test_gradients_do_not_depend_on_how_the_step_is_cut(backbones, task_rows, tmp_path):
    rows = task_rows.select(range(8))
    whole, log = step_gradients(backbones["llama"], rows, tmp_path, per_device_train_batch_size=8, verdict_weight=0.7)
    for kwargs in (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 8, "padding_side": "left"},
        {"per_device_train_batch_size": 8, "padding_free": True},
        {"per_device_train_batch_size": 8, "packing": True, "max_length": 2000, "max_explanation_length": 1600},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "activation_checkpointing": True},
    ):
        if kwargs.get("packing"):
            kwargs["max_explanation_length"] = 60
        cut, cut_log = step_gradients(backbones["llama"], rows, tmp_path, verdict_weight=0.7, **kwargs)
        assert_same_gradients(whole, cut)
        for name in ("loss", "lm_loss", "cls_loss", "verdict_loss"):
            assert cut_log[name] == pytest.approx(log[name], rel=1e-5), (kwargs, name)


def test_the_heads_gradients_do_not_shorten_the_lms_step(model, task_rows, tmp_path):
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path, max_grad_norm=0.5), task_rows)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 1e3 if "cls_head" in name else 1.0
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    head = [name for name in before if "cls_head" in name]
    norms = {
        of_head: torch.cat([grad.flatten() for name, grad in before.items() if (name in head) == of_head]).norm()
        for of_head in (True, False)
    }
    total = trainer._clip_grad_norm(model)
    assert total.item() == pytest.approx(torch.stack(list(norms.values())).norm().item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.5 / norms[name in head])
        assert torch.allclose(parameter.grad, expected, rtol=1e-4), name


@pytest.mark.parametrize("pos_weight", ["none", "3"])
def test_the_third_loss_teaches_the_lm_the_heads_probability(model, task_rows, tmp_path, pos_weight):
    unknown = task_rows.map(lambda row: {"label": None, "explanation": None} if row["id"] == "3" else row)
    settings = {"verdict_weight": 2.0, "per_device_eval_batch_size": 3, "pos_weight": pos_weight}
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path, **settings), unknown, eval_dataset=unknown)
    with torch.no_grad():
        model.cls_head.weight.normal_()
    metrics = trainer.evaluate()
    expected = []
    for row in unknown:
        if row["label"] is None and row["explanation"]:
            continue  # it has no verdict line
        prompt = model.encoder.encode({name: row[name] for name in ("findings", "claim")}).input_ids
        lines = [model.encoder.encode_verdict(label) for label in (0, 1)]
        shared = next(i for i, (one, other) in enumerate(zip(*lines, strict=False)) if one != other)
        with torch.no_grad():
            outputs = model(torch.tensor([prompt + lines[0][:shared]]))
        logit = outputs.cls_logits[0, len(prompt) - 1] - torch.tensor(model.config.pos_weight).log()
        target = torch.zeros(outputs.logits.shape[-1])
        target[[line[shared] for line in lines]] = torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)])
        expected.append(F.cross_entropy(outputs.logits[0, -1][None], target[None]).item())
    assert len(expected) == len(unknown) - sum(row["label"] is None and bool(row["explanation"]) for row in unknown)
    assert metrics["eval_verdict_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    whole = metrics["eval_lm_loss"] + metrics["eval_cls_loss"] + 2 * metrics["eval_verdict_loss"]
    assert metrics["eval_loss"] == pytest.approx(whole, rel=1e-6)


def test_the_third_loss_leaves_the_head_alone_and_labels_leave_the_verdict_alone(model, task_rows, tmp_path):
    rows = encode_rows(task_rows, model.encoder, 60, guided=True, teach_verdicts=True)
    place = alike([model.encoder.encode_verdict(label) for label in (0, 1)])
    for row, source in zip(rows, task_rows, strict=True):
        decisions = [i for i, taught in enumerate(row["verdicts"]) if taught]
        labelled = [i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX]
        assert len(decisions) == (source["label"] is not None or not source["explanation"])
        assert not any(decision + 1 + place in labelled for decision in decisions)
        assert bool(labelled) == bool(source["explanation"])
    before = weights(model, "cls_head")
    trainer = ClsGenSFTTrainer(
        model, arguments(tmp_path, verdict_weight=1.0, cls_weight=0.0, weight_decay=0.0), task_rows
    )
    trainer.train()
    assert max(moved(before, weights(model, "cls_head")).values()) == 0
    with pytest.raises(ValueError, match="leaves no room for a verdict"):
        encode_rows(task_rows, model.encoder, place, guided=True, teach_verdicts=True)
    plain = encode_rows(task_rows, model.encoder, 60, guided=True)
    with pytest.raises(ValueError, match=r"need the column\(s\) \['verdicts'\]"):
        ClsGenSFTTrainer(model, arguments(tmp_path, verdict_weight=1.0), plain)


DISTRIBUTED = """
import os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import torch
from datasets import load_from_disk
from test_training import step_gradients
batch_size = int(sys.argv[5])
gradients, log = step_gradients(sys.argv[2], load_from_disk(sys.argv[3]), sys.argv[4],
                                per_device_train_batch_size=batch_size, seed=0)
from accelerate import PartialState
if PartialState().is_main_process:
    torch.save({"gradients": gradients, "log": log}, sys.argv[4] + "/gradients.pt")
PartialState().destroy_process_group()
os._exit(0)  # the results are there; at a usual exit, torch's threads may abort a process that is done
"""


def launch(script, *script_arguments, config="ddp.yaml"):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / config), "--num_processes", "2"]
    command += ["--main_process_port", "0", str(script), *map(str, script_arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_two_processes_give_the_same_gradients_and_a_rank_without_labels_does_not_hang(backbones, task_rows, tmp_path):
    # One decision and three explanations in four rows: a rank of two has no decision.
    rows = task_rows.select([1, 3, 4, 7]).map(
        lambda row, i: {"label": row["label"] if i == 0 else None, "explanation": "It fell." if i else None},
        with_indices=True,
    )
    rows.save_to_disk(tmp_path / "rows")
    whole, log = step_gradients(backbones["llama"], rows, tmp_path, per_device_train_batch_size=4)
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    launch(tmp_path / "script.py", ROOT, backbones["llama"], tmp_path / "rows", tmp_path, 2)
    result = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert_same_gradients(whole, {name.removeprefix("module."): g for name, g in result["gradients"].items()})
    for name in ("loss", "lm_loss", "cls_loss"):
        assert result["log"][name] == pytest.approx(log[name], rel=1e-5)


@pytest.mark.parametrize("use_lora", [True, False])
def test_both_heads_move(model, task_rows, tmp_path, use_lora):
    lora = LoraConfig(r=2, target_modules="all-linear") if use_lora else None
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path), train_dataset=task_rows, peft_config=lora)
    parts = ["cls_head", "lora_B" if use_lora else "lm.lm_head", "lora_B" if use_lora else "lm.model.layers"]
    if not use_lora:
        parts[1] = "embed_tokens"  # tied with the LM head
    before = {part: weights(trainer.model, part) for part in parts}
    trainer.train()
    for part in parts:
        changes = moved(before[part], weights(trainer.model, part))
        assert changes, part
        assert all(change > 0 for change in changes.values()), (part, changes)
    assert all(p.dtype == torch.float32 for n, p in trainer.model.named_parameters() if "cls_head" in n)


def test_lora_checkpoint_reloads_and_merges_to_the_same_probability(model, backbones, task_rows, texts, tmp_path):
    from peft import PeftModel

    trainer = ClsGenSFTTrainer(
        model, arguments(tmp_path), train_dataset=task_rows, peft_config=LoraConfig(r=2, target_modules="all-linear")
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    expected = [p.probability for p in model.classify(texts)]
    reloaded = PeftModel.from_pretrained(build(backbones["llama"]), tmp_path / "adapter")
    assert [p.probability for p in reloaded.get_base_model().classify(texts)] == pytest.approx(expected, abs=1e-6)
    merged = reloaded.merge_and_unload()
    assert [p.probability for p in merged.classify(texts)] == pytest.approx(expected, abs=1e-5)


def test_evaluation_metrics_are_those_of_the_heads_probabilities(model, task_rows, tmp_path):
    trainer = ClsGenSFTTrainer(
        model, arguments(tmp_path, pos_weight="3", per_device_eval_batch_size=3), task_rows, eval_dataset=task_rows
    )
    metrics = trainer.evaluate()
    labelled = task_rows.filter(lambda row: row["label"] is not None)
    predictions = model.classify([{name: row[name] for name in ("findings", "claim")} for row in labelled])
    labels, probabilities = labelled["label"], [p.probability for p in predictions]
    assert metrics["eval_auroc"] == pytest.approx(roc_auc_score(labels, probabilities))
    assert metrics["eval_average_precision"] == pytest.approx(average_precision_score(labels, probabilities))
    assert metrics["eval_brier"] == pytest.approx(brier_score_loss(labels, probabilities), abs=1e-6)
    assert metrics["eval_f1"] == pytest.approx(f1_score(labels, [p >= 0.5 for p in probabilities]))
    logits = torch.tensor([p.logit for p in predictions]) + torch.tensor(3.0).log()
    expected = F.binary_cross_entropy_with_logits(logits, torch.tensor(labels), pos_weight=torch.tensor(3.0))
    assert metrics["eval_cls_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_lm_loss"] + metrics["eval_cls_loss"], rel=1e-6)


def test_own_metrics_replace_the_usual_ones(model, task_rows, tmp_path):
    def own_metrics(prediction):
        return {"decisions": len(trainer.logits_and_labels(prediction)[1])}

    trainer = ClsGenSFTTrainer(
        model, arguments(tmp_path), task_rows, eval_dataset=task_rows, compute_metrics=own_metrics
    )
    metrics = trainer.evaluate()
    assert metrics["eval_decisions"] == 15
    assert "eval_cls_loss" in metrics
    assert "eval_auroc" not in metrics


def test_a_soft_label_counts_for_the_nearer_class(model, task_rows, tmp_path):
    soft = task_rows.map(lambda row: {"label": row["label"] and 0.9})
    expected, found = (encode_rows(rows, model.encoder, 60, guided=True) for rows in (task_rows, soft))
    assert list(found["input_ids"]) == list(expected["input_ids"])
    assert label_counts(found) == label_counts(expected)
    assert max(max(row) for row in found["cls_labels"]) == pytest.approx(0.9)
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path), train_dataset=found)
    metrics = [trainer.evaluate(rows) for rows in (expected, found)]
    assert metrics[0]["eval_cls_loss"] != metrics[1]["eval_cls_loss"]
    for name in ("auroc", "average_precision", "f1", "accuracy", "brier", "ece"):
        assert metrics[1][f"eval_{name}"] == metrics[0][f"eval_{name}"]


def test_an_adapter_of_the_users_own_trains_the_head_or_is_refused(model, task_rows, tmp_path):
    frozen = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r'No weight of the head would train.*modules_to_save=\["cls_head"\]'):
        ClsGenSFTTrainer(frozen, arguments(tmp_path), task_rows)
    ClsGenSFTTrainer(frozen, arguments(tmp_path, cls_weight=0.0), task_rows)
    whole = get_peft_model(frozen.unload(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["cls_head"]))
    trainer = ClsGenSFTTrainer(whole, arguments(tmp_path), task_rows)
    before = weights(trainer.model, "cls_head")
    trainer.train()
    assert min(moved(before, weights(trainer.model, "cls_head")).values()) > 0


class NoFloat64(TorchDispatchMode):
    """Has no float64, as Apple's GPUs have none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
            raise TypeError(f"{function}: no float64 on this device")
        return found


def test_both_losses_do_without_float64(model, task_rows, tmp_path):
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path, verdict_weight=1.0), task_rows, eval_dataset=task_rows)
    with NoFloat64():
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0


def test_balanced_pos_weight_and_head_learning_rate(model, task_rows, tmp_path):
    rows = task_rows.select([0, 2, 4, 1])
    trainer = ClsGenSFTTrainer(
        model, arguments(tmp_path, pos_weight="balanced", cls_learning_rate=0.5), train_dataset=rows
    )
    assert model.config.pos_weight == 3.0
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in model.cls_head.parameters()} == {0.5}
    assert {rates[id(p)] for p in model.lm.parameters()} == {1e-3}


def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(backbones, task_rows, tmp_path):
    def run(folder, resume=None, **kwargs):
        model = build(backbones["llama"])
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
        trainer = ClsGenSFTTrainer(
            model,
            arguments(folder, **{**settings, **kwargs}),
            train_dataset=task_rows,
            peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1),
        )
        trainer.train(resume_from_checkpoint=resume)
        return {e["step"]: (e["loss"], e["lm_loss"], e["cls_loss"]) for e in trainer.state.log_history if "loss" in e}

    whole = run(tmp_path / "whole")
    # Steps 4 and 5 lie in the second epoch.
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-5")
    assert resumed[6] == pytest.approx(whole[6], rel=1e-6)
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-3")
    for step in (4, 5, 6):
        assert resumed[step] == pytest.approx(whole[step], rel=1e-6)


def test_gradients_of_fp16_are_unscaled_once(model, task_rows, tmp_path):
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=task_rows)
    trainer.train()
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    try:
        trainer.model.zero_grad()
        scaler.scale(sum((parameter**2).sum() for parameter in trainer.model.parameters()) / 2).backward()
        groups = {"cls_head": [], "": []}
        for name, parameter in trainer.model.named_parameters():
            groups["cls_head" if "cls_head" in name else ""].append(parameter)
        norm = trainer._clip_grad_norm(trainer.model)
    finally:
        trainer.accelerator.state._mixed_precision = "no"
    parameters = [parameter.detach().flatten() for parameter in trainer.model.parameters()]
    assert float(norm) == pytest.approx(float(torch.cat(parameters).norm()), rel=1e-4)  # the gradient of x^2 / 2 is x
    for group in groups.values():
        clipped = torch.cat([parameter.grad.flatten() for parameter in group]).norm()
        assert float(clipped) <= trainer.args.max_grad_norm + 1e-4


@pytest.mark.parametrize("label", [float("nan"), 2.0, -100.0, -1.0])
def test_a_label_that_is_none_stops_before_training(label, model, task_rows, tmp_path):
    rows = [{**row, "label": label} if i == 3 else row for i, row in enumerate(task_rows)]
    rows = Dataset.from_list(rows, features=task_rows.features)
    with pytest.raises(ValueError, match=r"Row '?3'? of train: `label` must be a number from 0 to 1, or null"):
        ClsGenSFTTrainer(model, arguments(tmp_path), train_dataset=rows)


def test_a_missing_column_is_named(model, task_rows, tmp_path):
    with pytest.raises(ValueError, match=r"Rows of train need the column\(s\) \['label'\]"):
        ClsGenSFTTrainer(model, arguments(tmp_path), train_dataset=task_rows.remove_columns("label"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"explanation_mode": "Free"}, "`explanation_mode` must be guided or free, got 'Free'"),
        ({"padding_side": "middle"}, "`padding_side` must be left or right"),
        ({"pos_weight": None}, "`pos_weight` must be 'none', 'balanced' or a number"),
    ],
)
def test_values_of_a_recipe_are_checked_as_those_of_flags(setting, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **setting)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(model, task_rows, tmp_path, monkeypatch):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path, **settings), train_dataset=task_rows)
    trainer.train()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-1")
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "checkpoint-2").write_text("a file stands where the folder would be")
    trainer.state.global_step = 2
    with pytest.raises(OSError, match="could not be written"):
        trainer._save_checkpoint(trainer.model, trial=None)
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-1")


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("save_model", SafetensorError("No space left")),
        ("_save_optimizer_and_scheduler", RuntimeError("write failed")),
    ],
)
def test_a_half_written_checkpoint_is_removed(model, task_rows, tmp_path, monkeypatch, step, error):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path, **settings), train_dataset=task_rows)

    def full_disk(output_dir, **_):
        (Path(output_dir) / "half").write_text("written")
        raise error

    monkeypatch.setattr(trainer, step, full_disk)
    with pytest.raises(OSError, match=f"checkpoint-1 could not be written .{error}"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1").exists()


def test_refusals(model, task_rows, tmp_path):
    with pytest.raises(TypeError, match="from_backbone"):
        ClsGenSFTTrainer(model.lm, arguments(tmp_path), train_dataset=task_rows)
    with pytest.raises(ValueError, match="Prompt-learning"):
        ClsGenSFTTrainer(model, arguments(tmp_path), task_rows, peft_config=PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="needs training rows of both classes"):
        ClsGenSFTTrainer(model, arguments(tmp_path, pos_weight="balanced"), task_rows.select([0, 2]))
    model.config.cls_bias = False
    model.set_reads(model.config.cls_reads)
    for pos_weight in ("3", "balanced"):
        with pytest.raises(ValueError, match=r"`pos_weight='.*'` needs a head with a bias"):
            ClsGenSFTTrainer(model, arguments(tmp_path, pos_weight=pos_weight), task_rows.select([0, 1, 2]))
    ClsGenSFTTrainer(model, arguments(tmp_path, pos_weight="balanced"), task_rows.select([0, 1]))
    for kwargs, message in (
        ({"pos_weight": "-1"}, "pos_weight"),
        ({"pos_weight": "much"}, "pos_weight"),
        ({"lm_weight": 0.0, "cls_weight": 0.0}, "nothing to train"),
        ({"verdict_weight": 1.0, "explanation_mode": "free"}, "have no verdict line"),
        ({"verdict_texts": 2}, "needs a `verdict_weight` above 0"),
        ({"verdict_weight": 1.0, "verdict_texts": -1}, "must be at least 0"),
        ({"max_length": 50}, "must be larger than"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"chat_template_path": "chat.jinja"}, "`chat_template_path` would change the prompts"),
        ({"trust_remote_code": True}, "`trust_remote_code` has no meaning here"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **kwargs)


def test_what_a_cpu_changes(tmp_path):
    assert arguments(tmp_path).train_sampling_strategy == "group_by_length"
    assert arguments(tmp_path).dataloader_pin_memory is False
    assert arguments(tmp_path, train_sampling_strategy="random").train_sampling_strategy == "random"
    json.dumps(arguments(tmp_path).to_dict())
