"""What all baselines share: a task's rows in, a result file out that is made as CLSGen's own is.

Each is fitted on the training split; what a system searches over (its `chosen` says what was found) is decided by
cross-validation there or by the validation split, on which temperature, bias and threshold are then fitted as
`train_sft_cls.py` does. The test split is scored once, at the end.
"""

import json
import logging
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from benchmarks.measuring import describe_run
from clsgen.atomic_io import write_json
from clsgen.backbones import DEFAULT_BACKBONE
from clsgen.calibration import calibrated_probabilities, choose_threshold, fit_temperature_and_bias
from clsgen.classification_metrics import classification_metrics
from clsgen.evaluation.alignment import alignment_report
from clsgen.evaluation.collapse import perplexity_report
from clsgen.evaluation.judges import default_judges
from clsgen.evaluation.language import language_report
from clsgen.scoring import prediction_records
from clsgen.tasks import Task

logger = logging.getLogger(__name__)
RESULTS = Path(__file__).resolve().parent.parent.parent / "results"
Row = dict[str, Any]


class RefusedRunError(ValueError):
    """A run that would come to nothing, or cost another one's results, found before anything is fitted."""


class Baseline(ABC):
    """One way to answer a task's question.

    Args:
        task (`Task`): The task; its test split is not to be looked at.
        seed (`int`): Of everything random.
        backbone (`str`): Folder of the causal LM, for the systems that have one.
        options (`dict`): Settings that the command line changes, see [`Baseline.options`].
    """

    options: ClassVar[dict[str, Any]] = {}
    guided = False  # whether it learned explanations behind verdict lines
    earlier_seconds = 0.0  # that training took which `fit` found done

    def __init__(self, task: Task, seed: int, backbone: str, **options):
        unknown = set(options) - set(self.options)
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {sorted(unknown)}; it has {sorted(self.options)}.")
        self.task = task
        self.seed = seed
        self.backbone = backbone
        self.settings = {**self.options, **options}

    @abstractmethod
    def fit(self) -> dict[str, Any]:
        """Learns from the training split, tunes on the validation split; returns what was chosen."""

    @abstractmethod
    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        """Log-odds of label 1, float64, one a row."""

    def validation_logits(self) -> np.ndarray:
        """[`Baseline.logits`] of the validation split; a system that asked for them while it was fitted keeps them."""
        return self.logits(labelled(self.task, "validation"))

    def explain(self, rows: Sequence[Row], predicted: Sequence[int]) -> dict[str, list[str]]:
        """Explanations by mode (`free` or `guided`, the latter for the labels `predicted`); none for most systems."""
        return {}

    def language_model(self) -> Any:
        """What became of the backbone as a causal LM, for the measure of its collapse; `None` where there is none."""
        return None


def labelled(task: Task, split: str) -> list[Row]:
    """The rows of a split that have a label.

    Raises:
        RefusedRunError: for a split that is missing, or has none.
    """
    rows = [row for row in task.splits.get(split, []) if row["label"] is not None]
    if not rows:
        raise RefusedRunError(f"A baseline needs labelled rows in the {split} split of {task.name!r}; there are none.")
    return rows


def labels_of(rows: Sequence[Row]) -> np.ndarray:
    """The labels as integers."""
    return np.array([int(row["label"]) for row in rows])


def run(baseline: Baseline, system: str, folder: Path | None = None, backbone: str | None = None) -> dict[str, Any]:
    """Fits, calibrates and scores a baseline; writes `metrics.json` and `test_predictions.json`.

    Args:
        baseline ([`Baseline`]): Not yet fitted.
        system (`str`): Its name.
        folder (`Path`, *optional*, defaults to `results/<task>/<system>/seed-<seed>`): For a credentialed task it is
            below `outputs/` by default, which git ignores.
        backbone (`str`, *optional*): What the caller calls the backbone, where there is one.

    Raises:
        RefusedRunError: for a split without labelled rows, validation rows of one class, or a folder that holds the
            results of another run; nothing has been fitted then.
    """
    task, start = baseline.task, time.perf_counter()
    validation, test = labelled(task, "validation"), labelled(task, "test")
    if len(set(labels_of(validation))) < 2:
        raise RefusedRunError(f"The validation split of {task.name!r} holds one class only: nothing to calibrate on.")
    results = RESULTS.parent / "outputs" / "results" if task.credentialed else RESULTS
    folder = folder or results / task.name / system / f"seed-{baseline.seed}"
    report: dict[str, Any] = {"task": task.name, "system": system, "seed": baseline.seed, **describe_run()}
    report |= {"backbone": backbone, "settings": baseline.settings}
    _check_free(folder, report, baseline.options)
    report["chosen"] = baseline.fit()
    logits = baseline.validation_logits()
    report["train_seconds"] = round(baseline.earlier_seconds + time.perf_counter() - start, 2)
    temperature, bias = fit_temperature_and_bias(logits, labels_of(validation))
    probabilities = calibrated_probabilities(logits, temperature, bias)
    threshold = choose_threshold(labels_of(validation), probabilities)
    report["calibration"] = {"temperature": temperature, "bias": bias}
    report["validation"] = classification_metrics(labels_of(validation), probabilities, threshold)
    scoring = time.perf_counter()
    logits = baseline.logits(test)
    report["texts_per_second"] = round(len(test) / (time.perf_counter() - scoring), 2)
    probabilities = calibrated_probabilities(logits, temperature, bias)
    report["test"] = classification_metrics(labels_of(test), probabilities, threshold)
    report |= describe_words(baseline, test, probabilities, threshold)
    report["wall_seconds"] = round(baseline.earlier_seconds + time.perf_counter() - start, 2)
    ids = [row["id"] for row in test]
    predictions = prediction_records(ids, labels_of(test), logits, probabilities, threshold)
    write_json(folder / "test_predictions.json", predictions)
    write_json(folder / "metrics.json", report)
    return report


def _check_free(folder: Path, report: dict[str, Any], options: dict[str, Any]) -> None:
    """Refuses to replace the results of another run; what a former file doesn't say was as it is by default."""
    if not (folder / "metrics.json").is_file():
        return
    former = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    former["settings"] = {**options, **former.get("settings", {})}
    former.setdefault("backbone", report["backbone"] and DEFAULT_BACKBONE)
    for name in ("task", "system", "seed", "backbone", "settings"):
        if former.get(name) != json.loads(json.dumps(report[name])):
            raise RefusedRunError(
                f"{folder} holds the results of a run with another value of `{name}`: {former.get(name)}, and here "
                f"{report[name]}. Move them away, or give --results_dir."
            )


def describe_words(
    baseline: Baseline, rows: Sequence[Row], probabilities: np.ndarray, threshold: float
) -> dict[str, Any]:
    """Alignment and language of a baseline's explanations by mode, and its collapse, where it has a language model."""
    task, found = baseline.task, defaultdict(dict)
    predicted = (probabilities >= threshold).astype(int)
    start = time.perf_counter()
    explained = baseline.explain(rows, predicted.tolist())
    if explained:
        found["explain_seconds"] = round(time.perf_counter() - start, 2)
    judges, unjudged = default_judges(task) if explained else ([], {})
    if unjudged:
        found["alignment"]["undefined"] = unjudged
    for mode, explanations in explained.items():
        columns = {"probability": probabilities, "predicted": predicted, "explanation": explanations}
        table = pd.DataFrame({**columns, "gold": labels_of(rows)})
        reports = {judge.name: alignment_report(table, judge) for judge in judges}
        for report in reports.values():
            del report["judged_probability"], report["judged_label"]
        texts, references = [task.text_of(row) for row in rows], [row["explanation"] for row in rows]
        found["alignment"][mode] = reports
        found["language"][mode] = language_report(explanations, texts, references, question=task.asked)
    model = baseline.language_model()
    if model is not None:
        found["collapse"] = perplexity_report(model, baseline.backbone, task, baseline.guided)
    return dict(found)
