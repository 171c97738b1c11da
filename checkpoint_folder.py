"""Writes a trained model as a folder that is complete by itself, there whole or not at all."""

import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from clsgen.atomic_io import write_json
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.publishing.calibration_plot import calibration_plot
from clsgen.publishing.cards import model_card

ROOT = Path(__file__).resolve().parent
ENTRY_POINTS = ("pipeline_clsgen.py", "handler.py")  # found by name, so `save_pretrained` doesn't know of them
SERVED_WITH = ("transformers", "accelerate")  # what the image of Inference Endpoints may have too old


def write_checkpoint(
    model: ClsGenForCausalLMAndClassification,
    folder: str | Path,
    report: dict[str, Any],
    predictions: list[dict[str, Any]] | None = None,
    recipe: str | None = None,
) -> Path:
    """Saves weights (safetensors), code, config, tokenizer, metrics and a model card; replaces an older folder.

    Everything goes into a temporary folder beside `folder` first, and is renamed when complete, so that an older
    checkpoint survives a full disk.

    Args:
        model (`ClsGenForCausalLMAndClassification`): With adapters merged.
        folder (`str` or `Path`): The target.
        report (`dict`): The run's report; becomes `metrics.json` and the card's numbers.
        predictions (`list[dict]`, *optional*): `label` and `probability` of each test row, for the calibration plot.
        recipe (`str`, *optional*): The text of the recipe; becomes `recipe.yaml`.

    Raises:
        OSError: where it cannot be written; `folder` is then as it was.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    if Path(model.config.text_config.name_or_path).is_dir():
        model.config.text_config.name_or_path = ""  # where the backbone lies on this machine is nobody else's business
    try:
        model.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        for name in ENTRY_POINTS:
            shutil.copy(ROOT / name, temporary / name)
        (temporary / "requirements.txt").write_text(endpoint_requirements(), encoding="utf-8")
        write_json(temporary / "metrics.json", report)
        if recipe is not None:
            (temporary / "recipe.yaml").write_text(recipe, encoding="utf-8")
        if predictions:
            labels, probabilities = zip(*((row["label"], row["probability"]) for row in predictions), strict=True)
            plot = calibration_plot(labels, probabilities, model.config.threshold)
            (temporary / "calibration.png").write_bytes(plot)
        model_card(temporary).save(temporary / "README.md")
        _replace(folder, temporary)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The checkpoint {folder} could not be written: {error}. What stood there before is untouched."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    model.config.name_or_path = str(folder)
    return folder


def endpoint_requirements() -> str:
    """What Inference Endpoints install for `handler.py`: from our minor version on, below the next major one."""
    ours = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = re.findall(r"^([\w-]+)==(\d+)\.(\d+)", ours, flags=re.MULTILINE)
    return "".join(f"{name}>={x}.{y},<{int(x) + 1}\n" for name, x, y in pins if name in SERVED_WITH)


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
