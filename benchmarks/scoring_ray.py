"""How the cost of `score_ray.py` grows with rows and workers, beside `predict_clsgen.py`.

Writes `benchmarks/results/scoring_ray.json`.

python -m benchmarks.scoring_ray --model outputs/trial_claims/model
python -m benchmarks.scoring_ray --only checkpoint      # one part; the other's results stay

Whole commands are timed, start of Ray and loading of models included, numbers alone (`--explain false`), one thread a
worker. The texts are the short ones of `trial_claims`, over and over. The curve up to 100,000 rows is that of a small
random model (2 layers of width 64) with the checkpoint's tokenizer and prompt; the checkpoint itself answers fewer.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, set_seed

from benchmarks.inference import load, texts_of
from benchmarks.measuring import describe_run
from clsgen.atomic_io import write_json
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.table_files import schema_of, write_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "scoring_ray.json"
PARTS = {"small_random_model": 256, "checkpoint": 16}  # rows of each
logger = logging.getLogger("benchmarks.scoring_ray")


def write_small_model(like: str, folder: Path) -> str:
    """A checkpoint with the prompt and tokenizer of another one, and a small random backbone."""
    tokenizer, config = AutoTokenizer.from_pretrained(like), load(like).config
    set_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    model = ClsGenForCausalLMAndClassification.from_backbone(
        str(folder / "backbone"), task=config.prompt, labels=config.label_names, dtype=torch.float32,
        config_kwargs={"cls_reads": [(-1, "decision")]},
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def time_command(script: str, model: str, source: Path, target: Path, *options: str) -> dict[str, Any]:
    """Runs a script on a file; returns seconds and rows per second of the whole command, and the load before it."""
    command = [sys.executable, str(ROOT / script), "--model", model, "--input", str(source), "--output", str(target)]
    load_average, start = os.getloadavg()[0], time.perf_counter()
    subprocess.run([*command, "--explain", "false", *options], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seconds = time.perf_counter() - start
    rows = pq.read_metadata(source).num_rows
    return {
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds, 1),
        "load_average_before": round(load_average, 2),
    }


def measure(model: str, count: int, rows_per_part: int, texts: list[dict[str, str]]) -> dict[str, Any]:
    """Timings of so many rows: of one process without Ray, and of 1 and 2 workers."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.parquet"
        write_rows(source, islice(cycle(texts), count), schema_of("texts", texts))
        for name in ("predict_clsgen", "1 worker", "2 workers"):
            if name == "predict_clsgen":
                found[name] = time_command("predict_clsgen.py", model, source, Path(folder) / "out.parquet")
            else:
                options = ["--concurrency", name.split()[0], "--rows_per_part", str(rows_per_part)]
                found[name] = time_command("score_ray.py", model, source, Path(folder) / name, *options)
            logger.info("%d rows, %s: %s", count, name, found[name])
    return found


def main() -> None:
    """Writes `benchmarks/results/scoring_ray.json`, after each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/trial_claims/model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000], help="of the small model")
    parser.add_argument("--checkpoint_rows", type=int, default=128)
    parser.add_argument("--only", choices=list(PARTS))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = describe_run()
    run["versions"]["ray"] = version("ray")
    run["machine"] |= {"cores": os.cpu_count(), "threads": "1 a worker"}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    texts = texts_of("trial_claims", None, ("train", "validation", "test"), 1000)
    with tempfile.TemporaryDirectory() as folder:
        for part in [arguments.only] if arguments.only else PARTS:
            small = part == "small_random_model"
            model = write_small_model(arguments.model, Path(folder)) if small else str(Path(arguments.model).resolve())
            known[part] = {**run, "rows_per_part": PARTS[part], "timings": []}
            for count in arguments.rows if small else [arguments.checkpoint_rows]:
                known[part]["timings"].append({"rows": count, **measure(model, count, PARTS[part], texts)})
                write_json(RESULTS, known)


if __name__ == "__main__":
    main()
