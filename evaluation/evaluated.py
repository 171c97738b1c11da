"""What the parts of an evaluation read and give, and how they show numbers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from clsgen.evaluation.intervals import SAMPLES
from clsgen.evaluation.predictions import LabelledTexts
from clsgen.evaluation.report import Part
from clsgen.evaluation.thresholds import Target

CALIBRATED_ON = "calibrated on it"
TRAINED_ON = "trained on it"


@dataclass
class Evaluated:
    """What sections read.

    Args:
        rows ([`LabelledTexts`]): The reported rows.
        modes (`dict[str, pandas.DataFrame]`): Their answers by mode of explanation; columns as of
            `predictions.SCHEMA`. The numbers are those of the first mode.
        threshold, lm_reading_weight (`float`), labels (`tuple[str, str]`): The model's.
        free_is_held (`bool`): Whether its free words begin with a verdict line that was chosen for them.
        asked (`str`), verdicts (`tuple[str, ...]`): The task's question and verdicts; the verdicts alone.
        relation (`str`): What the reported rows are to the model: not seen, calibrated on, of another task.
        validation (`pandas.DataFrame`, *optional*): Answers for the validation rows, which thresholds are fitted on.
        validation_relation (`str`): What those are to the model.
        others (`dict[str, pandas.DataFrame]`): Answers for other data, by their name and what they are to the model.
        compared (`dict[str, pandas.DataFrame]`): Other systems' predictions, indexed by id.
        targets (`list[Target]`): For the threshold sheet.
        alignment (`dict`): By mode and judge, what [`alignment.alignment_report`] gives.
        unjudged (`dict[str, str]`): Judges that could not be made, and why.
        collapse (`dict`, *optional*): What [`collapse.perplexity_report`] gives.
        speed (`dict`, *optional*): What [`speed.speed_report`] gives.
        examples (`int`): Most examples of a kind.
        samples, seed (`int`): Of the bootstrap.
    """

    rows: LabelledTexts
    modes: dict[str, pd.DataFrame]
    threshold: float
    labels: tuple[str, str]
    lm_reading_weight: float = 0.0
    free_is_held: bool = False
    asked: str = ""
    verdicts: tuple[str, ...] = ()
    relation: str = "not seen"
    validation: pd.DataFrame | None = None
    validation_relation: str = CALIBRATED_ON
    others: dict[str, pd.DataFrame] = field(default_factory=dict)
    compared: dict[str, pd.DataFrame] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    alignment: dict[str, dict[str, Any]] = field(default_factory=dict)
    unjudged: dict[str, str] = field(default_factory=dict)
    collapse: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    examples: int = 3
    samples: int = SAMPLES
    seed: int = 0

    @property
    def numbers(self) -> pd.DataFrame:
        """One row a text, with what doesn't depend on the mode."""
        return next(iter(self.modes.values()))

    @property
    def explained(self) -> dict[str, pd.DataFrame]:
        """The modes that write."""
        return {mode: frame for mode, frame in self.modes.items() if mode != "none"}


@dataclass(frozen=True)
class Section:
    """Numbers for `metrics.json` under the section's name, and a part of the report."""

    numbers: Any
    part: Part


def number(value: float | None, digits: int = 3) -> str:
    """A number as the report shows it."""
    return "undefined" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def spread(estimate: dict[str, Any]) -> str:
    """An estimate's interval, or why there is none."""
    if estimate["low"] is None:
        return estimate.get("reason", "")
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"


def shown(estimate: dict[str, Any]) -> str:
    """An estimate with its interval, in one cell."""
    if estimate["value"] is None:
        return f"undefined: {estimate['reason']}"
    return f"{estimate['value']:.3f} ({spread(estimate)})" if spread(estimate) else number(estimate["value"])
