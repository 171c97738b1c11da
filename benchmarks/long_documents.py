"""Time and peak memory against the length of a text, 512 to 8,192 tokens.

Writes `benchmarks/results/long_documents.json`.

python -m benchmarks.long_documents

Training: one step of one row, with activation checkpointing on both sides (TRL's default, and ours), LoRA on all
layers and 128 tokens to predict; behind a short step to warm up. Inference: the number alone (`classify`), number and
cache to explain from (`prefill`), and the plain backbone (`stock`). Texts are claims of trial_claims, one behind the
other. Every figure has a process of its own; peak memory is all of it, Python and libraries included. Ratios are ours
over the peer's at the greatest length, lower is better.

Prompts go through the layers at once. Chunks were tried: peak memory is that of weights and KV cache either way, and
later chunks need a mask, which makes attention slower.
"""

import argparse
import logging
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.measuring import describe_run
from benchmarks.trainers import build_clsgen, build_trl, clsgen_model, explained_rows
from benchmarks.turns import SteppedTrainer
from clsgen.atomic_io import write_json
from clsgen.backbones import DEFAULT_BACKBONE, resolve_backbone
from clsgen.explaining_clsgen import Prefill
from clsgen.losses_clsgen import IGNORE_INDEX
from clsgen.run_record import peak_memory_mib

RESULTS = Path(__file__).resolve().parent / "results" / "long_documents.json"
LENGTHS = (512, 1024, 2048, 4096, 8192)
PREDICTED = 128
WARM_UP = 256
INFERENCE = ("classify", "prefill", "stock")
TRAINING: dict[str, tuple[Any, dict[str, Any]]] = {
    "clsgen": (build_clsgen, {"per_device_train_batch_size": 1}),
    "trl": (build_trl, {"per_device_train_batch_size": 1, "max_length": None}),
}


def row_of(length: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """An encoded row of `length` tokens out of `rows`, over and over, whose last `PREDICTED` are an explanation."""
    ids = [token for row in rows for token in row["input_ids"]]
    ids = (ids * -(-length // len(ids)))[:length]
    prompt = length - PREDICTED
    return {
        "input_ids": ids,
        "labels": [IGNORE_INDEX] * prompt + ids[prompt:],
        "cls_labels": [1.0 if i == prompt - 1 else float(IGNORE_INDEX) for i in range(length)],
    }


def train_one(side: str, rows: list[dict[str, Any]], backbone: str) -> dict[str, float]:
    """Seconds of a step of the second row, and the process's peak memory."""
    build, settings = TRAINING[side]
    trainer = SteppedTrainer(build, rows, ("trial_claims", None, backbone), settings, 2, 1)
    try:
        trainer.step()
        start = time.perf_counter()
        trainer.step()
        seconds = time.perf_counter() - start
        return {"seconds": round(seconds, 3), "peak_mib": round(trainer.finish()["peak_mib"], 1)}
    finally:
        trainer.process.terminate()


@torch.inference_mode()
def infer_one(side: str, ids: list[int], backbone: str) -> dict[str, float]:
    """Seconds of a prompt, and the process's peak memory."""
    if side == "stock":
        lm = AutoModelForCausalLM.from_pretrained(resolve_backbone(backbone), dtype=torch.float32)

        def run(prompt: list[int]) -> Any:
            return lm(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)

    else:
        model = clsgen_model("trial_claims", None, backbone)

        def run(prompt: list[int]) -> Any:
            if side == "classify":
                return model.run_to_head(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long))
            return Prefill(model, [prompt])

    run(ids[:WARM_UP])
    start = time.perf_counter()
    run(ids)
    return {"seconds": round(time.perf_counter() - start, 3), "peak_mib": round(peak_memory_mib(), 1)}


def table(results: dict[str, dict[int, dict[str, float]]], lengths: list[int]) -> str:
    """A line for each side, with seconds and GiB by length."""
    lines = [f"{'':24}" + "".join(f"{length:>20}" for length in lengths)]
    for name, found in results.items():
        cells = (f"{found[n]['seconds']:.1f} s, {found[n]['peak_mib'] / 1024:.2f} GiB" for n in lengths)
        lines.append(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Measures all lengths; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    lengths, backbone = sorted(arguments.lengths), arguments.backbone
    rows = explained_rows(clsgen_model("trial_claims", None, backbone), "trial_claims", None, 40).to_list()
    results: dict[str, dict[int, dict[str, float]]] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh_processes:
        for length in lengths:
            row = row_of(length, rows)
            for side in INFERENCE:
                found = fresh_processes.submit(infer_one, side, row["input_ids"], backbone).result()
                results.setdefault(side, {})[length] = found
            for side in TRAINING:
                found = train_one(side, [row_of(WARM_UP, rows), row], backbone)
                results.setdefault(f"training_{side}", {})[length] = found
            print(table(results, [n for n in lengths if n <= length]), flush=True)
    longest = {name: found[lengths[-1]] for name, found in results.items()}
    pairs = {"training_vs_trl": ("training_clsgen", "training_trl"), "prefill_vs_stock": ("prefill", "stock")}
    ratios = {
        f"{name}_{what}": round(longest[ours][key] / longest[theirs][key], 3)
        for name, (ours, theirs) in pairs.items()
        for what, key in (("seconds", "seconds"), ("peak_memory", "peak_mib"))
    }
    write_json(arguments.output, {**describe_run(), "ratios": ratios, "longest": lengths[-1], "by_length": results})


if __name__ == "__main__":
    main()
