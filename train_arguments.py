"""What a training is asked for: arguments of the command line, and the recipe that the others come from."""

import argparse
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from trl import ModelConfig

from clsgen.run_record import without_secrets
from clsgen.scoring import CalibrationArguments
from clsgen.tasks import find_task

ROOT = Path(__file__).resolve().parent
RECIPES = ROOT / "recipes"
AUTO = "auto"
SECRET_KEYS = {"env", "hub_token"}  # of a recipe


@dataclass
class TaskArguments(CalibrationArguments):
    """What to learn from what, and what to do after training."""

    task: str = field(default="trial_claims", metadata={"help": "A task's folder, or its name below data/."})
    data_dir: str | None = field(default=None, metadata={"help": "Source that the task's prepare.py reads."})
    on_bad_row: str = field(
        default="error", metadata={"help": "A row that cannot be used stops the run, or is skipped and counted.",
                                   "choices": ["error", "skip"]}
    )  # fmt: skip
    warm_start: bool = field(default=True, metadata={"help": "Start the head from a linear probe."})
    cls_reads: list[str] | None = field(
        default=None,
        metadata={"help": "What the head reads, e.g. `14:mean 18:decision`; by default or with `auto`, the form "
                          "that cross-validates best on the training rows (without the warm start, `-1:decision`)."},
    )  # fmt: skip
    cls_bias: bool = field(
        default=True, metadata={"help": "Whether head and calibration have a constant term. Without it, and with "
                                        "`--cls_reads -1:decision`, export.py gives a stock classifier."}
    )  # fmt: skip
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better `metric_for_best_model` before training stops."}
    )
    explanation_no_repeat_ngram_size: int = field(
        default=6, metadata={"help": "Stored in the checkpoint: no run of so many tokens twice in an explanation."}
    )
    explanation_guidance_scale: float = field(
        default=1.0, metadata={"help": "Stored in the checkpoint: above 1, guided words are held to the verdict more "
                                       "firmly, and decoding takes twice as long."}
    )  # fmt: skip
    save_adapter: bool = field(
        default=False, metadata={"help": "Save the LoRA adapter too, beside the checkpoint that it is merged into."}
    )
    num_examples: int | None = field(
        default=None, metadata={"help": "Predictions with explanations to show at the end, and to keep for the card, "
                                        "with their texts. Default: 3, and 0 where the task is credentialed."}
    )  # fmt: skip
    model_license: str | None = field(
        default=None, metadata={"help": "With `--push_to_hub`: the Hub's id of it; by default the base model's."}
    )
    results_dir: str | None = field(default=None, metadata={"help": "A further folder for metrics and predictions."})
    i_may_publish_credentialed_data: bool = field(
        default=False, metadata={"help": "For --push_to_hub of a task that is marked `credentialed: true`: you have "
                                         "the right to publish weights made from its data."}
    )  # fmt: skip


@dataclass
class ModelArguments(ModelConfig):
    """TRL's [`ModelConfig`], with LoRA on all linear layers by default."""

    model_name_or_path: str | None = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "The backbone."}
    )
    use_peft: bool = field(default=True, metadata={"help": "LoRA; `--use_peft false` trains all weights."})
    lora_first_layer: str = field(
        default="0",
        metadata={"help": "Layers below this one stay frozen; `auto`: those that the head reads, two thirds at most."},
    )

    def __post_init__(self):
        super().__post_init__()
        if str(self.lora_first_layer).isdigit():
            self.lora_first_layer = int(self.lora_first_layer)  # as a recipe has it: a flag's is the same run
        elif self.lora_first_layer != AUTO:
            raise ValueError(f"`lora_first_layer` is a layer from 0, or `auto`, got {self.lora_first_layer!r}.")


def parse_reads(reads: list[str] | str | None) -> list[tuple[int, str]] | None:
    """`["14:mean", "18:decision"]` to `[(14, "mean"), (18, "decision")]`, and `["auto"]` or `"auto"` to `None`.

    Raises:
        ValueError: for another form.
    """
    parsed = []
    reads = reads.split() if isinstance(reads, str) else reads  # as a recipe may have it
    for read in [] if reads in (None, [AUTO]) else reads:
        layer, _, pooling = str(read).partition(":")
        if not layer.lstrip("-").isdigit() or pooling not in ("decision", "mean"):
            raise ValueError(f"`--cls_reads` takes `LAYER:decision` or `LAYER:mean`, got {read!r}.")
        parsed.append((int(layer), pooling))
    return parsed or None


def split_off_recipe(argv: list[str]) -> tuple[str, list[str]]:
    """Path of a command line's recipe, and its other arguments.

    It is the one that `--config` names; or else, for a task of ours, the one of that name; or else that for any task.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    named, others = parser.parse_known_args(argv)
    parser.add_argument("--task", default="trial_claims")
    own = RECIPES / "any_task.yaml"
    with suppress(FileNotFoundError):  # a task that isn't there is an error later on
        folder = find_task(parser.parse_known_args(others)[0].task)[0].resolve()
        if folder.parent == ROOT / "data" and (RECIPES / f"{folder.name}.yaml").is_file():
            own = RECIPES / f"{folder.name}.yaml"
    return named.config or str(own), others


def read_recipe(path: str) -> str:
    """The recipe's text, for the checkpoint; tokens and passwords are no part of it, nor is TRL's `env`."""
    text = Path(path).read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    if {*values} & SECRET_KEYS:
        text = yaml.safe_dump({name: values[name] for name in values if name not in SECRET_KEYS}, sort_keys=False)
    return without_secrets(text)
