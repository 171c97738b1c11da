"""The speed benchmarks: the table of ratios, what the training benchmark counts, and trainers that take turns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build
from datasets import Dataset
from peft import get_peft_model
from test_training import arguments
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.long_documents import PREDICTED, row_of
from benchmarks.report import table
from benchmarks.trainers import lora, prompt_of
from benchmarks.training import model_flops, tokens_per_second
from benchmarks.turns import SteppedTrainer
from clsgen.atomic_io import write_json
from clsgen.losses_clsgen import supervised_positions
from clsgen.run_record import peak_memory_mib
from clsgen.trainer_clsgen import ClsGenSFTTrainer
from clsgen.training_rows import DataCollatorForClsGen, encode_rows

ROOT = Path(__file__).resolve().parent.parent
RUN = {"machine": {"processor": "A chip", "threads": 2}, "versions": {"torch": "2"}, "command": "python -m x"}


def test_the_table_holds_every_ratio_and_names_what_has_none(tmp_path):
    write_json(tmp_path / "training.json", {**RUN, "ratios": {"speed": 1.5}, "padding": {"ratio": 1.25, "left": 3}})
    write_json(tmp_path / "inference.json", {**RUN, "ratios": {"latency": {"ratio": 0.5, "seconds": [1]}}})
    write_json(tmp_path / "serving.json", {**RUN, "answers_per_second": 3})
    command = [sys.executable, "-m", "benchmarks.report", "--results", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "benchmark" not in line]
    assert rows == [
        "| inference | latency | 0.500 |",
        "| training | speed | 1.500 |",
        "| training | padding | 1.250 |",
    ]
    assert "- training: A chip, 2 threads; torch 2; `python -m x`" in printed
    assert "serving.json" in printed


def test_a_table_of_nothing_or_of_a_broken_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="make bench"):
        table(tmp_path)
    (tmp_path / "training.json").write_text('{"ratios"')
    with pytest.raises(ValueError, match=r"training.json is not JSON.*benchmarks.training"):
        table(tmp_path)


def test_the_committed_results_make_a_table():
    printed = table(ROOT / "benchmarks" / "results")
    for name in json.loads((ROOT / "benchmarks/results/inference.json").read_text())["ratios"]:
        assert f"| inference | {name} |" in printed


def test_model_flops_are_those_that_torch_counts(model, task_rows):
    rows = encode_rows(task_rows.select([1]), model.encoder, 60, guided=True).to_list()
    expected = model_flops(model, rows)
    model.config.text_config._attn_implementation = "eager"  # whose matrix products the counter sees, masked pairs too
    tuned = get_peft_model(model, lora()).train()
    batch = DataCollatorForClsGen(0)(rows)
    with FlopCounterMode(display=False) as counter:
        tuned(**batch, logits_to_keep=supervised_positions(batch["labels"])).loss.backward()
    # Uncounted: the head. Counted, but never done: gradients of the first layer's input.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


def test_tokens_of_a_step_are_real_ones_and_the_first_step_is_left_out():
    rows = [{"input_ids": [0] * n} for n in (9, 9, 10, 30, 5, 15)]
    assert tokens_per_second(rows, 2, [2.0, 4.0]) == [20.0, 5.0]


def test_a_classifier_reads_no_explanation(model, task_rows):
    row = encode_rows(task_rows.select([1]), model.encoder, 60, guided=True)[0]
    prompt = prompt_of(row)
    assert prompt["labels"] == 1
    assert prompt["input_ids"] + [i for i in row["labels"] if i != -100] == row["input_ids"]


def test_long_rows_have_one_decision_before_their_explanation():
    row = row_of(700, [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["cls_labels"]) == 700
    assert sum(label != -100 for label in row["labels"]) == PREDICTED
    assert row["cls_labels"].index(1.0) == 700 - PREDICTED - 1


def build_trainer(folder, backbone, rows):
    settings = arguments(folder, max_steps=3, train_sampling_strategy="sequential")
    return ClsGenSFTTrainer(build(backbone), settings, Dataset.from_list(rows))


def build_nothing(folder):
    raise ValueError("there are no rows")


def test_a_trainer_steps_when_asked_and_says_what_went_wrong(backbones, task_rows, tmp_path):
    rows = task_rows.to_list()
    whole = build_trainer(tmp_path, backbones["llama"], rows)
    whole.train()
    stepped = SteppedTrainer(build_trainer, backbones["llama"], rows)
    stepped.step()
    stepped.step()
    result = stepped.finish()
    expected = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert result["losses"] == pytest.approx(expected[:2], rel=1e-5)
    assert result["peak_mib"] > 100
    with pytest.raises(RuntimeError, match="there are no rows"):
        SteppedTrainer(build_nothing)


def test_peak_memory_is_that_of_the_process_alone():
    held = bytearray(400 * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    script = "from clsgen.run_record import peak_memory_mib; print(peak_memory_mib())"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1 < float(child.stdout) < 400 <= peak_memory_mib()
