"""Writes a trained model as a folder that is complete by itself, there whole or not at all."""

import shutil
import uuid
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError

from clsgen.atomic_io import write_json
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification

ROOT = Path(__file__).resolve().parent
ENTRY_POINTS = ("pipeline_clsgen.py", "handler.py")  # found by name, so `save_pretrained` doesn't know of them
CARD_METRICS = ("auroc", "average_precision", "f1", "accuracy", "brier", "ece")


def write_checkpoint(model: ClsGenForCausalLMAndClassification, folder: str | Path, report: dict[str, Any]) -> Path:
    """Saves weights (safetensors), code, config, tokenizer, metrics and a model card; replaces an older folder.

    Everything goes into a temporary folder beside `folder` first, and is renamed when complete, so that an older
    checkpoint survives a full disk.

    Args:
        model (`ClsGenForCausalLMAndClassification`): With adapters merged.
        folder (`str` or `Path`): The target.
        report (`dict`): The run's report; becomes `metrics.json` and the card's numbers.

    Raises:
        OSError: where it cannot be written; `folder` is then as it was.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        model.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        for name in ENTRY_POINTS:
            shutil.copy(ROOT / name, temporary / name)
        write_json(temporary / "metrics.json", report)
        model_card(model, report).save(temporary / "README.md")
        _replace(folder, temporary)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The checkpoint {folder} could not be written: {error}. What stood there before is untouched."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    model.config.name_or_path = str(folder)
    return folder


def _replace(folder: Path, newer: Path) -> None:
    """Renames `newer` to `folder`; what stood there goes only when that has worked."""
    older = folder.with_name(f".{folder.name}.older.{uuid.uuid4().hex}")
    if folder.exists():
        folder.rename(older)
    try:
        newer.rename(folder)
    except OSError:
        if older.exists():
            older.rename(folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def model_card(model: ClsGenForCausalLMAndClassification, report: dict[str, Any]) -> ModelCard:
    """The card of a trained model; every number in it is one of `report`'s."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["clsgen", "dual-head", "explanation", "calibration", "custom_code"],
        base_model=report["base_model"],
    )
    config = model.config
    rows = [f"| {split} | {_numbers(report[split])} |" for split in ("validation", "test") if report.get(split)]
    table = "\n".join([f"| split | {' | '.join(CARD_METRICS)} |", f"|{'---|' * (len(CARD_METRICS) + 1)}", *rows])
    calibration = (
        f"temperature {config.calibration['temperature']:.3f}, bias {config.calibration['bias']:.3f}, both fitted on "
        f"the validation split; decision threshold {config.threshold:.3f} ({report['threshold_method']})"
        if report.get("validation")
        else "**none: the task has no validation split**, so probabilities are the head's own and the threshold is "
        f"{config.threshold:.3f}"
    )
    conformal = (
        f" Prediction sets rule labels out at an error rate of {config.conformal['error_rate']:g} in either class."
        if config.conformal
        else ""
    )
    content = f"""---
{data.to_yaml()}
---

# CLSGen on {report["task"]}

A causal language model with two heads: a probability for the question below, read before a word is written, and an
explanation in words. Base model: `{report["base_model"]}`.

> {config.prompt["question"]}

Labels: 0 = `{config.label_names[0]}`, 1 = `{config.label_names[1]}`.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(".", trust_remote_code=True)  # this folder, or its Hub id with a pinned revision
print(model.classify_and_explain({{{", ".join(f'"{field}": "..."' for field in model.encoder.prompt.fields)}}}))
```

## Results

{table if rows else "No validation or test split."}

Validation is the split that calibration and threshold were fitted on. Calibration: {calibration}.{conformal}
Training rows: {report["train_rows"]}; seed {report["seed"]}. The numbers come from `metrics.json` in this folder, made
by `{report["command"]}`.

## Limits

The explanation argues for the head's decision; it is no proof of how the number came about. Calibration holds for data
like the validation split. Not for use without a person who decides.
"""
    return ModelCard(content)


def _numbers(metrics: dict[str, float]) -> str:
    return " | ".join(
        "undefined" if metrics[name] != metrics[name] else f"{metrics[name]:.3f}" for name in CARD_METRICS
    )
