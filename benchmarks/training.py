"""Training against what a user would take instead, side by side in one run: writes `benchmarks/results/training.json`.

python -m benchmarks.training --data_dir CliniFact
python -m benchmarks.training --data_dir CliniFact --only frozen_layers   # one part; the others' results stay

Every side trains the same backbone in float32 with the same LoRA (r=16 on all linear layers of all layers) on the
same rows in the same order, so many a step. Each has a process of its own; they take turns, one optimizer step at a
time, with rows fetched and batched in it. `SETTINGS` says what each uses; `trl_best` is the fastest of its candidates
in this run. TRL's default precision is bfloat16, which this CPU emulates, so it gets float32 as all do. The sequence
classifier reads the prompts alone: an explanation would tell it the label.

Ratios are ours over the peer's: of real tokens (padding not counted) per second, higher is better; of peak memory,
lower is better. `model_flops_utilisation` is model FLOPs per second over the matmul peak that the same run measures
between the steps. Model FLOPs are those of the PaLM paper's appendix B (Chowdhery et al. 2022: `6N + 12LHQT` a token,
with no rematerialisation), less what LoRA never does, namely weight gradients of frozen weights, and with the LM head
only where a token is predicted. For a row of T tokens, K of them predicted:

    T * (4 * N_frozen + 6 * N_lora) + 12 * L * H * Q * T**2 + 4 * vocabulary * hidden_size * K

where N are weights of the layers' matrices, L layers, H heads, Q their size. As in the paper the attention term counts
pairs of tokens that the causal mask hides; `model_flops_utilisation_causal` counts half of it.

`padding`, `lm_head` and `frozen_layers` are speed-ups of ours, each with what it was before; their ratio is that of
speed, with the speed-up over without. `profile` writes one step's time by operation to
`benchmarks/results/training_profile.txt`, and its trace (for ui.perfetto.dev) to `training_trace.json.gz` there.
"""

import argparse
import contextlib
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import Linear
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.measuring import describe_run, take_turns
from benchmarks.trainers import (
    FIRST_TRAINED_LAYER,
    LORA_RANK,
    build_classifier,
    build_clsgen,
    build_trl,
    build_whole_lm_head,
    clsgen_model,
    explained_rows,
    prompt_of,
)
from benchmarks.turns import SteppedTrainer
from clsgen.atomic_io import write_json
from clsgen.backbones import DEFAULT_BACKBONE
from clsgen.losses_clsgen import IGNORE_INDEX

RESULTS = Path(__file__).resolve().parent / "results" / "training.json"
PARTS = ("peers", "padding", "lm_head", "frozen_layers", "profile")
ROW_BY_ROW = {"per_device_train_batch_size": 1, "activation_checkpointing": False}  # and a step accumulates rows
SETTINGS: dict[str, dict[str, Any]] = {
    "clsgen": ROW_BY_ROW,
    "trl_default": {},  # activation checkpointing, and 8 rows a batch
    "sequence_classification": ROW_BY_ROW,
}
TRL_CANDIDATES: dict[str, dict[str, Any]] = {
    "trl_row_by_row": ROW_BY_ROW,
    "trl_pairs": {"per_device_train_batch_size": 2, "activation_checkpointing": False},
    "trl_padding_free": {
        "per_device_train_batch_size": 2,
        "padding_free": True,
        "max_length": None,
        "activation_checkpointing": False,
    },
}
logger = logging.getLogger("benchmarks.training")


def model_flops(model: PreTrainedModel, rows: list[dict], causal: bool = False) -> float:
    """Model FLOPs of one training pass over encoded rows with LoRA; see the module's docstring.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): Without its adapter.
        rows (`list[dict]`): With `input_ids` and `labels`.
        causal (`bool`, *optional*, defaults to `False`): Whether only pairs of tokens that attend are counted.
    """
    config = model.config.text_config
    matrices = [m for m in model.get_decoder().layers.modules() if isinstance(m, Linear)]
    frozen = sum(matrix.weight.numel() for matrix in matrices)
    adapters = sum(LORA_RANK * sum(matrix.weight.shape) for matrix in matrices)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_size / (2 if causal else 1)
    flops = 0.0
    for row in rows:
        tokens = len(row["input_ids"])
        predicted = sum(label != IGNORE_INDEX for label in row["labels"])
        flops += tokens * (4 * frozen + 6 * adapters) + attention * tokens**2
        flops += 4 * config.vocab_size * config.hidden_size * predicted
    return flops


class MatmulPeak:
    """Float32 matrix products of 2048 by 2048, a second of them or so at each call; the best is kept."""

    SIZE = 2048

    def __init__(self):
        self.one, self.other = torch.randn(2, self.SIZE, self.SIZE)
        self.flops_per_second: list[float] = []

    def __call__(self) -> None:
        best, end = 0.0, time.perf_counter() + 1
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(self.one, self.other)
            best = max(best, 2 * self.SIZE**3 / (time.perf_counter() - start))
        self.flops_per_second.append(best)


def step_by_step(builders: dict[str, tuple], windows: int, **others) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Seconds of each step of each side, the first one left out, and what each side's `finish` gives."""
    with contextlib.ExitStack() as stack:
        trainers = {name: SteppedTrainer(*builder) for name, builder in builders.items()}
        for trainer in trainers.values():
            stack.callback(trainer.process.terminate)
        seconds = take_turns({**{name: each.step for name, each in trainers.items()}, **others}, windows)
        return seconds, {name: each.finish() for name, each in trainers.items()}


def tokens_per_second(rows: list[dict], rows_per_step: int, seconds: list[float]) -> list[float]:
    """Real tokens per second of each step but the first."""
    steps = [rows[i : i + rows_per_step] for i in range(rows_per_step, len(rows), rows_per_step)]
    counts = [sum(len(row["input_ids"]) for row in step) for step in steps]
    return [round(count / each, 2) for count, each in zip(counts, seconds, strict=True)]


def compare_peers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Our trainer, TRL's and the sequence classifier's, on rows of CliniFact."""
    model_arguments = ("clinifact", arguments.data_dir, arguments.backbone)
    model = clsgen_model(*model_arguments)
    windows, per_step = arguments.windows, arguments.rows_per_step
    rows = explained_rows(model, *model_arguments[:2], per_step * (windows + 1)).to_list()

    def builder(build, settings: dict[str, Any], steps: int) -> tuple:
        return build, rows, model_arguments, settings, steps, per_step

    tried, _ = step_by_step({n: builder(build_trl, s, 2) for n, s in TRL_CANDIDATES.items()}, 1)
    fastest = min(tried, key=lambda name: tried[name][0])
    settings = {**SETTINGS, "trl_best": TRL_CANDIDATES[fastest]}
    build = {"clsgen": build_clsgen, "sequence_classification": build_classifier}
    peak = MatmulPeak()
    sides = {n: builder(build.get(n, build_trl), s, windows + 1) for n, s in settings.items()}
    seconds, results = step_by_step(sides, windows, matmul=peak)
    prompts = [prompt_of(row) for row in rows]
    speeds = {
        name: tokens_per_second(prompts if name == "sequence_classification" else rows, per_step, seconds[name])
        for name in settings
    }
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    memory = {name: round(results[name]["peak_mib"], 1) for name in settings}
    flops_per_second = {causal: flops_of_steps(model, rows, per_step, seconds["clsgen"], causal) for causal in (0, 1)}
    best_matmul = statistics.median(peak.flops_per_second[1:])
    ratios = {f"tokens_per_second_vs_{n}": middle["clsgen"] / middle[n] for n in settings if n != "clsgen"}
    ratios["peak_memory_vs_trl_default"] = memory["clsgen"] / memory["trl_default"]
    ratios["model_flops_utilisation"] = flops_per_second[0] / best_matmul
    ratios["model_flops_utilisation_causal"] = flops_per_second[1] / best_matmul
    return {
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "median_tokens_per_second": middle,
        "peak_memory_mib": memory,
        "median_model_gflops_per_second": round(flops_per_second[0] / 1e9, 1),
        "median_matmul_gflops_per_second": round(best_matmul / 1e9, 1),
        "settings": settings,
        "trl_candidates_seconds_a_step": tried,
        "rows_a_step": per_step,
        "real_tokens": sum(len(row["input_ids"]) for row in rows),
        "tokens_per_second": speeds,
        "seconds": seconds,
        "losses": {name: results[name]["losses"] for name in settings},
    }


def flops_of_steps(
    model: PreTrainedModel, rows: list[dict], rows_per_step: int, seconds: list[float], causal: bool
) -> float:
    """Median of the model FLOPs per second of each step but the first."""
    steps = [rows[i : i + rows_per_step] for i in range(rows_per_step, len(rows), rows_per_step)]
    return statistics.median(
        model_flops(model, step, causal) / each for step, each in zip(steps, seconds, strict=True)
    )


def compare_before_and_after(arguments: argparse.Namespace, before: tuple, after: tuple) -> dict[str, Any]:
    """Speed, memory and losses of two sides, each a function that builds a trainer, and settings, on the same rows.

    A step has four rows of alike lengths.
    """
    model_arguments = ("clinifact", arguments.data_dir, arguments.backbone)
    model = clsgen_model(*model_arguments)
    windows, per_step = arguments.windows, 4
    rows = explained_rows(model, *model_arguments[:2], per_step * (windows + 1)).sort("length").to_list()
    sides = {
        name: (build, rows, model_arguments, settings, windows + 1, per_step)
        for name, (build, settings) in (("before", before), ("after", after))
    }
    seconds, results = step_by_step(sides, windows)
    speeds = {name: tokens_per_second(rows, per_step, values) for name, values in seconds.items()}
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    losses = {name: result["losses"] for name, result in results.items()}
    return {
        "ratio": round(middle["after"] / middle["before"], 3),
        "largest_difference_of_a_loss": largest_difference(losses["before"], losses["after"]),
        "median_tokens_per_second": middle,
        "peak_memory_mib": {name: round(result["peak_mib"], 1) for name, result in results.items()},
        "seconds": seconds,
    }


def compare_padding(arguments: argparse.Namespace) -> dict[str, Any]:
    """Batches of four rows, padded before the rows (under a mask) and behind them (without one)."""
    settings = {"per_device_train_batch_size": 4, "activation_checkpointing": False}
    before, after = ((build_clsgen, {**settings, "padding_side": side}) for side in ("left", "right"))
    return compare_before_and_after(arguments, before, after)


def compare_lm_head(arguments: argparse.Namespace) -> dict[str, Any]:
    """Row by row, with the LM head at every position, and at those with a label alone."""
    return compare_before_and_after(arguments, (build_whole_lm_head, ROW_BY_ROW), (build_clsgen, ROW_BY_ROW))


def largest_difference(one: list[float], other: list[float]) -> float:
    """Of two runs' losses, step by step."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def compare_frozen_layers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two epochs of the recipe of trial_claims, with and without the states of the frozen layers kept.

    The first epoch fills the files, so it bears their cost; the second one reads them. Seconds of an epoch are the
    median step's times the number of steps.
    """
    model_arguments = ("trial_claims", None, arguments.backbone)
    model = clsgen_model(*model_arguments)
    steps, per_step = max(arguments.windows, 2), arguments.rows_per_step
    rows = explained_rows(model, *model_arguments[:2], per_step * steps).to_list()
    settings = {
        "per_device_train_batch_size": 4,
        "activation_checkpointing": False,
        "first_layer": FIRST_TRAINED_LAYER,
    }
    sides = {
        name: (build_clsgen, rows, model_arguments, {**settings, "cache_frozen_layers": kept}, 2 * steps, per_step)
        for name, kept in (("computed", False), ("kept", True))
    }
    seconds, results = step_by_step(sides, 2 * steps - 1)
    epochs = {}
    for name, values in seconds.items():
        first, second = values[: steps - 1], values[steps - 1 :]
        epochs[name] = [round(steps * statistics.median(each), 2) for each in (first, second)]
    losses = {name: result["losses"] for name, result in results.items()}
    return {
        "ratio": round(sum(epochs["computed"]) / sum(epochs["kept"]), 3),
        "ratio_of_a_later_epoch": round(epochs["computed"][1] / epochs["kept"][1], 3),
        "largest_difference_of_a_loss": largest_difference(losses["computed"], losses["kept"]),
        "epoch_seconds": epochs,
        "peak_memory_mib": {name: round(result["peak_mib"], 1) for name, result in results.items()},
        "first_trained_layer": FIRST_TRAINED_LAYER,
        "rows": len(rows),
        "losses": losses,
        "seconds": seconds,
    }


def profile_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row through both passes, under torch's profiler; what it finds goes to files beside the results."""
    model_arguments = ("clinifact", arguments.data_dir, arguments.backbone)
    rows = explained_rows(clsgen_model(*model_arguments), *model_arguments[:2], 2).to_list()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_clsgen(folder, rows, model_arguments, SETTINGS["clsgen"], 2, 1)
        warm_up, batch = trainer.get_train_dataloader()
        trainer.training_step(trainer.model, warm_up)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            trainer.training_step(trainer.model, batch)
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)
    arguments.output.with_name("training_profile.txt").write_text(table)
    profiler.export_chrome_trace(str(arguments.output.with_name("training_trace.json.gz")))
    return {"profile": "training_profile.txt"}


def main() -> None:
    """Runs the comparisons; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="A CliniFact checkout.")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--windows", type=int, default=3, help="Timed optimizer steps of each side.")
    parser.add_argument("--rows_per_step", type=int, default=8, help="Rows of an optimizer step.")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    report.update(describe_run())
    comparisons = {
        "peers": compare_peers,
        "padding": lambda arguments: {"padding": compare_padding(arguments)},
        "lm_head": lambda arguments: {"lm_head": compare_lm_head(arguments)},
        "frozen_layers": lambda arguments: {"frozen_layers": compare_frozen_layers(arguments)},
        "profile": profile_step,
    }
    for part in arguments.only:
        report.update(comparisons[part](arguments))
        write_json(arguments.output, report)  # each part at once: the whole takes a while
    print(json.dumps(report.get("ratios", {}), indent=2))


if __name__ == "__main__":
    main()
