"""How CLSGen stands against each baseline on the same test rows, for `benchmarks.table`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clsgen.evaluation.comparison import delong
from clsgen.evaluation.predictions import read_predictions

# Columns of the table in which a baseline may be better: 1 where more is, -1 where less is.
COMPARED = {
    "auroc_mean": 1, "average_precision_mean": 1, "f1_mean": 1, "balanced_accuracy_mean": 1, "brier_mean": -1,
    "ece_mean": -1, "auroc_alignment_mean": 1, "kappa_mean": 1,
}  # fmt: skip
SAME = 1e-9  # what rounding does to means
OF_WORDS = ("auroc_alignment_mean", "kappa_mean")
PREDICTIONS = "test_predictions.json"
Row = dict[str, Any]


def no_worse(ours: list[Row], rivals: list[Row]) -> Iterator[str]:
    """What baselines do as well as CLSGen or better, a sentence a number.

    Args:
        ours: CLSGen's rows of the table on one task, one a mode of explanation.
        rivals: The baselines' on the same task.
    """
    for column, sign in COMPARED.items():
        for row in ours if column in OF_WORDS else ours[:1]:
            of_mode = [rival for rival in rivals if column not in OF_WORDS or rival["mode"] == row["mode"]]
            better = {
                rival["system"]: rival[column]
                for rival in of_mode
                if None not in (rival[column], row[column]) and sign * (rival[column] - row[column]) > -SAME
            }
            if better:
                name = f"{column} ({row['mode']})" if column in OF_WORDS else column
                told = ", ".join(f"{system} {value:.3f}" for system, value in better.items())
                yield f"{row['task']}, {row['system']}: {name} is {row[column]:.3f}; {told}."


def auroc_differences(ours: list[Row], rivals: list[Row]) -> Iterator[tuple[str, ...]]:
    """CLSGen's AUROC less each baseline's, by [`delong`]: task, baseline, difference, 95% interval, p.

    Systems that have left no predictions, and those that can't be tested, are left out.

    Args:
        ours, rivals: See [`no_worse`]; a row's `places` are the folders of its runs.

    Raises:
        ValueError: for runs on other rows than CLSGen's.
    """
    kept = [row for row in (ours[0], *rivals) if all((place / PREDICTIONS).is_file() for place in row["places"])]
    if ours[0] not in kept:
        return
    labels, scores = predictions_of(ours[0]["places"])
    for rival in {row["system"]: row for row in kept[1:]}.values():
        their_labels, theirs = predictions_of(rival["places"], list(labels.index))
        if not their_labels.equals(labels):
            raise ValueError(f"{rival['places'][0]} has other labels than {ours[0]['places'][0]} for the same rows.")
        found = delong(labels.to_numpy(), scores, theirs)
        if found["p_value"] is not None:
            interval = f"{found['low']:+.3f} to {found['high']:+.3f}"
            yield rival["task"], rival["system"], f"{found['difference']:+.3f}", interval, f"{found['p_value']:.2g}"


def predictions_of(places: list[Path], ids: list[str] | None = None) -> tuple[pd.Series, np.ndarray]:
    """Labels of a system's test rows, by id, and its probabilities, shape `(runs, rows)`."""
    frames = [read_predictions(place / PREDICTIONS) for place in places]
    ids = ids or list(frames[0].index)
    for place, frame in zip(places, frames, strict=True):
        if set(frame.index) != set(ids):
            raise ValueError(f"{place / 'test_predictions.json'} is of other rows than the other systems' are.")
    return frames[0]["gold"].astype(int)[ids], np.stack([frame["probability"][ids] for frame in frames])
