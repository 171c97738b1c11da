"""Inference against what a user would take instead, side by side in one process.

Writes `benchmarks/results/inference.json`.

python -m benchmarks.inference --data_dir CliniFact
python -m benchmarks.inference --only memory      # one comparison; the others' results stay

`generate` is the same model's, apart from CLSGen's own methods: linear layers by torch's kernels, and a cache that it
fills itself. The number is the head's alone, but in `reading`, where the LM's reading is a part of it. Ratios of speed
(`classify_*vs_*`, `batch_explain_vs_generate`, `int8_vs_float32_latency`, `onednn_vs_torch_linear`) are ours over the
peer's, higher is better; ratios of time and memory (`explain_vs_*`, `guidance_vs_none`, `classify_peak_memory_*`) are
ours over the peer's, lower is better.
"""

import argparse
import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from benchmarks.measuring import describe_run, medians, take_turns
from clsgen.atomic_io import write_json
from clsgen.backbones import DEFAULT_BACKBONE, resolve_backbone
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.run_record import peak_memory_mib
from clsgen.tasks import load_task
from clsgen.train_arguments import parse_reads

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RESULTS = Path(__file__).resolve().parent / "results" / "inference.json"
BATCH_SIZES = (1, 4, 8, 16)
NEW_TOKENS = 64
COMPARISONS = (
    "explain", "guidance", "linear", "int8", "batch", "classify", "reading", "memory", "two_pass", "clinifact",
)  # fmt: skip
logger = logging.getLogger("benchmarks.inference")


def texts_of(task_name: str, data_dir: str | None, splits: tuple[str, ...], count: int) -> list[dict[str, str]]:
    """The first `count` texts of the named splits."""
    task = load_task(task_name, data_dir)
    rows = [row for split in splits for row in task.splits[split]]
    return [{name: row[name] for name in task.fields} for row in rows[:count]]


def load(folder: str) -> ClsGenForCausalLMAndClassification:
    """A checkpoint in float32."""
    return ClsGenForCausalLMAndClassification.from_pretrained(folder, dtype=torch.float32).eval()


def with_a_new_head(task_name: str, data_dir: str | None, backbone: str) -> ClsGenForCausalLMAndClassification:
    """A task's model before training: prompts and reads of its recipe, whose speed doesn't depend on the weights."""
    recipe = yaml.safe_load((RECIPES / f"{task_name}.yaml").read_text(encoding="utf-8"))
    task = load_task(task_name, data_dir)
    config = {
        "cls_reads": parse_reads(recipe["cls_reads"]),
        "max_prompt_length": recipe["max_length"] - recipe["max_explanation_length"],
    }
    return ClsGenForCausalLMAndClassification.from_backbone(
        resolve_backbone(backbone), task.prompt, task.labels, config, dtype=torch.float32
    )


def stock_classifier(backbone: str) -> Any:
    """transformers' own pipeline over the same backbone with a classification head."""
    folder = resolve_backbone(backbone)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    classifier.config.pad_token_id = tokenizer.pad_token_id
    return pipeline("text-classification", model=classifier, tokenizer=tokenizer, device=-1)


def prompts_of(model: ClsGenForCausalLMAndClassification, texts: list[dict[str, str]]) -> list[str]:
    """The prompts as text, for a peer that reads nothing else."""
    return [model.tokenizer.decode(model.encoder.encode(text).input_ids) for text in texts]


def compare_classify(model: Any, texts: list[dict[str, str]], backbone: str, repeats: int) -> dict[str, Any]:
    """Texts per second of `classify` over those of the stock pipeline at its best batch size."""
    peer, prompts = stock_classifier(backbone), prompts_of(model, texts)
    with torch.inference_mode():
        few = prompts[: max(BATCH_SIZES)]
        tried = medians(
            take_turns({str(size): lambda size=size: peer(few, batch_size=size) for size in BATCH_SIZES}, 1)
        )
        best = int(min(tried, key=tried.get))
        model.classify(texts[: len(few)])
        sides = {"clsgen": lambda: model.classify(texts), "pipeline": lambda: peer(prompts, batch_size=best)}
        seconds = take_turns(sides, repeats, warm=True)
    middle = medians(seconds)
    return {
        "ratio": middle["pipeline"] / middle["clsgen"],
        "texts": len(texts),
        "median_texts_per_second": {name: len(texts) / value for name, value in middle.items()},
        "pipeline_batch_size": best,
        "cls_reads": model.config.cls_reads,
        "lm_reading_weight": model.config.lm_reading_weight,
        "seconds": seconds,
    }


def exactly(tokens: int) -> dict[str, int]:
    """Options that make every side write the same number of tokens."""
    return {"min_new_tokens": tokens, "max_new_tokens": tokens}


def compare_explain(model: Any, text: dict[str, str], repeats: int) -> dict[str, Any]:
    """Time of `classify_and_explain` of one text over plain `generate` of as many new tokens from the same prompt.

    The verdict line counts as new tokens, for plain `generate` writes one too; `free` has none on either side.
    """
    ids = torch.tensor([model.encoder.encode(text).input_ids])
    mask = torch.ones_like(ids)
    verdict = len(model.encoder.encode_verdict(model.classify(text).label_id))
    seconds = take_turns(
        {
            "guided": lambda: model.classify_and_explain(text, mode="guided", **exactly(NEW_TOKENS - verdict)),
            "free": lambda: model.classify_and_explain(text, mode="free", **exactly(NEW_TOKENS)),
            "generate": lambda: model.generate(ids, attention_mask=mask, **exactly(NEW_TOKENS)),
        },
        repeats,
    )
    middle = medians(seconds)
    return {
        "ratio": middle["guided"] / middle["generate"],
        "ratio_free": middle["free"] / middle["generate"],
        "prompt_tokens": ids.shape[1],
        "new_tokens": NEW_TOKENS,
        "median_seconds": middle,
        "seconds": seconds,
    }


def compare_guidance(model: Any, texts: list[dict[str, str]], repeats: int) -> dict[str, Any]:
    """Time of explanations with `explanation_guidance_scale` over that without: of one text, and of a batch."""

    def explain(scale: float, given: list[dict[str, str]]) -> None:
        model.config.explanation_guidance_scale = scale
        model.classify_and_explain(given, **exactly(NEW_TOKENS))

    stored = model.config.explanation_guidance_scale
    seconds = {
        str(len(given)): take_turns(
            {"guidance": lambda given=given: explain(2.0, given), "none": lambda given=given: explain(1.0, given)},
            repeats,
        )
        for given in (texts[:1], texts)
    }
    model.config.explanation_guidance_scale = stored
    middle = {count: medians(timed) for count, timed in seconds.items()}
    one, batch = (each["guidance"] / each["none"] for each in middle.values())
    return {
        "ratio": one,
        "ratio_batch": batch,
        "texts": len(texts),
        "new_tokens": NEW_TOKENS,
        "median_seconds": middle,
        "seconds": seconds,
    }


def compare_two_passes(model: Any, text: dict[str, str], backbone: str, repeats: int) -> dict[str, Any]:
    """Time of `classify_and_explain` of one text over the stock classifier and then `generate`."""
    peer, prompts = stock_classifier(backbone), prompts_of(model, [text])
    ids = torch.tensor([model.encoder.encode(text).input_ids])
    mask = torch.ones_like(ids)
    verdict = len(model.encoder.encode_verdict(model.classify(text).label_id))

    def two_passes() -> None:
        with torch.inference_mode():
            peer(prompts)
        model.generate(ids, attention_mask=mask, **exactly(NEW_TOKENS))

    def one_pass() -> None:
        model.classify_and_explain(text, mode="guided", **exactly(NEW_TOKENS - verdict))

    seconds = take_turns({"clsgen": one_pass, "two_passes": two_passes}, repeats)
    middle = medians(seconds)
    return {
        "ratio": middle["clsgen"] / middle["two_passes"],
        "prompt_tokens": ids.shape[1],
        "new_tokens": NEW_TOKENS,
        "median_seconds": middle,
        "seconds": seconds,
    }


def compare_batch(model: Any, texts: list[dict[str, str]], repeats: int) -> dict[str, Any]:
    """Explanations per second of a batch over those of `generate` on the same padded batch; rows end where they do."""
    batch = model.tokenizer.pad(
        {"input_ids": [model.encoder.encode(text).input_ids for text in texts]},
        padding_side="left", return_tensors="pt",
    )  # fmt: skip
    most = model.generation_config.max_new_tokens
    lengths: dict[str, float] = {}

    def generate() -> None:
        new = model.generate(**batch, max_new_tokens=most)[:, batch["input_ids"].shape[1] :]
        lengths["generate"] = (new != model.pad_token_id).sum(dim=1).float().mean().item()

    def explain() -> None:
        found = model.classify_and_explain(texts, batch_size=len(texts))
        words = [model.tokenizer(prediction.explanation)["input_ids"] for prediction in found]
        lengths["clsgen"] = sum(map(len, words)) / len(words)

    seconds = take_turns({"clsgen": explain, "generate": generate}, repeats)
    middle = medians(seconds)
    return {
        "ratio": middle["generate"] / middle["clsgen"],
        "texts": len(texts),
        "most_new_tokens": most,
        "mean_new_tokens": lengths,
        "median_explanations_per_second": {name: len(texts) / value for name, value in middle.items()},
        "seconds": seconds,
    }


def compare_memory(model_folder: str) -> dict[str, Any]:
    """Peak memory of a process once it has classified 10,000 short texts over that once it has 500 of them."""
    command = [sys.executable, "-m", "benchmarks.inference", "--model", model_folder, "--print_peak_memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = json.loads(done.stdout.strip().splitlines()[-1])
    return {"ratio": peaks["10000"] / peaks["500"], "peak_mib": peaks}


def print_peak_memory(model_folder: str) -> None:
    """Classifies 500 short texts, then 10,000, and prints the peak memory in MiB after each."""
    model, peaks = load(model_folder), {}
    for count in (500, 10_000):
        model.classify([f"Claim {i}: drug {i % 97} lowers mortality." for i in range(count)])
        peaks[str(count)] = round(peak_memory_mib(), 1)
    print(json.dumps(peaks))


def compare_linear_layers(model: Any, texts: list[dict[str, str]], repeats: int) -> dict[str, Any]:
    """Speed with linear layers by oneDNN over that by torch's own kernels: one explanation, and a batch of texts."""
    plain = copy.deepcopy(model)
    plain.tokenizer = model.tokenizer
    for layer in plain.lm.modules():
        layer.__dict__.pop("forward", None)
    sides = {
        "explain": lambda each: each.classify_and_explain(texts[0], **exactly(NEW_TOKENS)),
        "classify": lambda each: each.classify(texts),
    }
    seconds, middle = {}, {}
    for task, run in sides.items():
        timed = take_turns({"onednn": lambda run=run: run(model), "torch": lambda run=run: run(plain)}, repeats)
        seconds[task], middle[task] = timed, medians(timed)
    ratios = {task: each["torch"] / each["onednn"] for task, each in middle.items()}
    return {
        "ratio": ratios["explain"],
        "ratio_classify": ratios["classify"],
        "texts": len(texts),
        "median_seconds": middle,
        "seconds": seconds,
    }


def int8_copies(model: Any) -> dict[str, Any]:
    """The model with its LM's linear layers in int8, by schemes of torch and of torchao (see `requirements.txt`)."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    copies = {name: copy.deepcopy(model) for name in ("torch_dynamic", "torchao_dynamic", "torchao_weight_only")}
    per_channel = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    copies["torch_dynamic"].lm = torch.ao.quantization.quantize_dynamic(model.lm, per_channel, dtype=torch.qint8)
    quantize_(copies["torchao_dynamic"].lm, Int8DynamicActivationInt8WeightConfig())
    quantize_(copies["torchao_weight_only"].lm, Int8WeightOnlyConfig())
    for each in copies.values():
        each.tokenizer = model.tokenizer
    return copies


def compare_int8(model: Any, texts: list[dict[str, str]], validation: list[dict[str, str]], repeats: int) -> dict:
    """Speed of `classify` of one text in int8 over float32, and how far probabilities move on the validation split.

    The ratio is that of the scheme which moves them least: speed is nothing where the number is wrong.
    """
    copies = {**int8_copies(model), "float32": model}
    seconds = take_turns({name: lambda each=each: each.classify(texts[0]) for name, each in copies.items()}, repeats)
    middle = medians(seconds)
    exact = model.classify(validation)
    schemes = {}
    for name in copies.keys() - {"float32"}:
        found = copies[name].classify(validation)
        moved = [abs(a.probability - b.probability) for a, b in zip(found, exact, strict=True)]
        schemes[name] = {
            "ratio": round(middle["float32"] / middle[name], 3),
            "largest_probability_difference": max(moved),
            "mean_probability_difference": sum(moved) / len(moved),
        }
    least = min(schemes, key=lambda name: schemes[name]["largest_probability_difference"])
    return {
        "ratio": schemes[least]["ratio"],
        "scheme": least,
        "schemes": schemes,
        "median_seconds": middle,
        "seconds": seconds,
    }


def main() -> None:
    """Runs the comparisons; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/trial_claims/model", help="A checkpoint of trial_claims.")
    parser.add_argument("--data_dir", help="A CliniFact checkout, for `two_pass` and `clinifact`.")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", help=", ".join(COMPARISONS))
    parser.add_argument("--print_peak_memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if arguments.print_peak_memory:
        print_peak_memory(arguments.model)
        return
    wanted = set(arguments.only or COMPARISONS)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    repeats, backbone = arguments.repeats, arguments.backbone
    model = load(arguments.model)
    texts = texts_of("trial_claims", None, ("train",), 256)
    if "reading" in wanted:
        model.config.lm_reading_weight = 0.5  # any above 0 takes as long
        found["classify_with_lm_reading_vs_pipeline"] = compare_classify(model, texts[:64], backbone, repeats)
    model.config.lm_reading_weight = 0.0
    if "classify" in wanted:
        found["classify_vs_pipeline_trial_claims"] = compare_classify(model, texts, backbone, repeats)
    if "explain" in wanted:
        found["explain_vs_generate"] = compare_explain(model, texts[0], repeats)
    if "guidance" in wanted:
        found["guidance_vs_none"] = compare_guidance(model, texts[:16], repeats)
    if "linear" in wanted:
        found["onednn_vs_torch_linear"] = compare_linear_layers(model, texts[:64], repeats)
    if "batch" in wanted:
        found["batch_explain_vs_generate"] = compare_batch(model, texts[:64], repeats)
    if "int8" in wanted:
        validation = texts_of("trial_claims", None, ("validation",), 60)
        found["int8_vs_float32_latency"] = compare_int8(model, texts, validation, repeats)
    if "memory" in wanted:
        found["classify_peak_memory_10000_vs_500"] = compare_memory(arguments.model)
    if wanted & {"two_pass", "clinifact"}:
        model = with_a_new_head("clinifact", arguments.data_dir, backbone)
        texts = texts_of("clinifact", arguments.data_dir, ("train",), 128)
    if "two_pass" in wanted:
        found["explain_vs_two_pass"] = compare_two_passes(model, texts[0], backbone, repeats)
    if "clinifact" in wanted:
        found["classify_vs_pipeline_clinifact"] = compare_classify(model, texts, backbone, repeats)
    report.update(describe_run())
    for name, each in found.items():
        entry = {**each, "ratio": round(each["ratio"], 3), "command": report["command"]}
        report.setdefault("ratios", {})[name] = entry
    write_json(RESULTS, report)
    for name, each in report["ratios"].items():
        print(f"{name}: {each['ratio']:.3f}")


if __name__ == "__main__":
    main()
