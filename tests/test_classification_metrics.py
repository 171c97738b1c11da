"""Every metric against a case worked out by hand or by brute force, and the degenerate inputs."""

import itertools
import json
import math
import warnings

import numpy as np
import pytest

from clsgen.atomic_io import write_json
from clsgen.classification_metrics import classification_metrics, expected_calibration_error, reliability_bins

LABELS = [0, 1, 0, 1, 1]
PROBABILITIES = [0.1, 0.4, 0.4, 0.8, 0.9]


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def brute_force_auroc(labels, probabilities):
    """Share of (positive, negative) pairs in the right order; a tie counts a half."""
    positives = [p for label, p in zip(labels, probabilities, strict=True) if label == 1]
    negatives = [p for label, p in zip(labels, probabilities, strict=True) if label == 0]
    pairs = list(itertools.product(positives, negatives))
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)


def test_hand_computed_case():
    metrics = classification_metrics(LABELS, PROBABILITIES, threshold=0.4)
    # At 0.4: 3 true positives, 1 false positive, 1 true negative.
    assert metrics["accuracy"] == pytest.approx(4 / 5)
    assert metrics["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["f1"] == pytest.approx(6 / 7)
    assert metrics["auroc"] == pytest.approx(5.5 / 6)
    # Precision 1 up to recall 2/3, then 3/4 for the last third.
    assert metrics["average_precision"] == pytest.approx(2 / 3 + 1 / 3 * 3 / 4)
    assert metrics["brier"] == pytest.approx((0.01 + 0.36 + 0.16 + 0.04 + 0.01) / 5)
    assert metrics["log_loss"] == pytest.approx(-sum(map(math.log, (0.9, 0.4, 0.6, 0.8, 0.9))) / 5)
    assert metrics["ece"] == pytest.approx(abs(3 / 5 - 2.6 / 5))
    assert (metrics["rows"], metrics["positive"], metrics["threshold"]) == (5, 3, 0.4)


def test_auroc_equals_share_of_ordered_pairs():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 60)
    probabilities = random.integers(0, 11, 60) / 10
    assert classification_metrics(labels, probabilities)["auroc"] == pytest.approx(
        brute_force_auroc(labels, probabilities)
    )


def test_perfect_ranker():
    metrics = classification_metrics([0, 0, 1, 1], [0.0, 0.0, 1.0, 1.0])
    ones = ("auroc", "average_precision", "f1", "accuracy", "balanced_accuracy")
    assert {name: metrics[name] for name in ones} == dict.fromkeys(ones, 1.0)
    assert metrics["brier"] == metrics["ece"] == 0.0
    assert metrics["log_loss"] == pytest.approx(0.0, abs=1e-6)


def test_confident_mistake_has_finite_log_loss():
    assert classification_metrics([0, 1], [1.0, 0.0])["log_loss"] == pytest.approx(-math.log(1e-7))


def test_threshold_is_inclusive():
    assert classification_metrics([0, 1], [0.2, 0.5], threshold=0.5)["accuracy"] == 1.0


def test_f1_without_a_positive_row_or_prediction_is_undefined():
    assert math.isnan(classification_metrics([0, 0, 0], [0.1, 0.2, 0.3])["f1"])
    assert classification_metrics([0, 0, 0], [0.1, 0.2, 0.7])["f1"] == 0.0


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_leaves_comparisons_undefined(label):
    metrics = classification_metrics([label] * 3, [0.2, 0.6, 0.7])
    undefined = {name for name, value in metrics.items() if math.isnan(value)}
    assert undefined == {"auroc", "average_precision", "balanced_accuracy"}
    assert metrics["accuracy"] == pytest.approx(2 / 3 if label else 1 / 3)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([], [], "no rows"),
        ([0, 1], [0.5], "shapes"),
        ([[0, 1]], [[0.5, 0.5]], "shapes"),
        ([0, 2], [0.5, 0.5], r"0 or 1; found \[2\]"),
        ([0, float("nan")], [0.5, 0.5], "0 or 1"),
        ([0, -100], [0.5, 0.5], "0 or 1"),
        ([0, 0.5], [0.5, 0.5], "0 or 1"),
        ([0, 1], [0.5, float("nan")], "nan"),
        ([0, 1], [0.5, 1.5], "1.5"),
        ([0, 1], [-0.1, 0.5], "-0.1"),
    ],
)
def test_bad_input_is_refused(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(labels, probabilities)
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(labels, probabilities)


def test_nan_threshold_is_refused():
    with pytest.raises(ValueError, match="threshold"):
        classification_metrics([0, 1], [0.2, 0.8], threshold=float("nan"))


@pytest.mark.parametrize("kind", [list, np.array, tuple])
def test_kinds_of_input(kind):
    expected = classification_metrics(LABELS, PROBABILITIES)
    assert classification_metrics(kind(LABELS), kind(PROBABILITIES)) == expected
    assert classification_metrics(kind([bool(label) for label in LABELS]), kind(PROBABILITIES)) == expected


def test_ece_of_bins_without_ties_equals_array_split():
    random = np.random.default_rng(1)
    probabilities = random.random(300)
    labels = (random.random(300) < probabilities**2).astype(int)
    order = np.argsort(probabilities)
    expected = sum(
        len(rows) / 300 * abs(labels[rows].mean() - probabilities[rows].mean()) for rows in np.array_split(order, 15)
    )
    assert expected_calibration_error(labels, probabilities) == pytest.approx(expected)


def test_ece_hand_computed_in_two_bins():
    labels = [0] * 8 + [1] * 2 + [0] * 3 + [1] * 7
    probabilities = np.r_[np.linspace(0.1, 0.2, 10), np.linspace(0.85, 0.95, 10)]
    # Means 0.15 and 0.9, shares 0.2 and 0.7; half the rows in each.
    assert expected_calibration_error(labels, probabilities) == pytest.approx((0.05 + 0.2) / 2)
    assert expected_calibration_error(labels, probabilities, bins=1) == pytest.approx(abs(9 / 20 - 0.525))


def test_ece_does_not_depend_on_the_order_of_tied_rows():
    random = np.random.default_rng(2)
    probabilities = random.integers(0, 5, 200) / 4
    labels = random.integers(0, 2, 200)
    values = set()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(200)
        values.add(round(expected_calibration_error(labels[order], probabilities[order]), 12))
    # Each of the five values is a bin of its own.
    expected = sum(abs((labels[probabilities == value] - value).sum()) / 200 for value in np.unique(probabilities))
    assert values == {round(expected, 12)}


def test_ece_puts_tied_rows_in_the_bin_of_their_mid_rank():
    labels = [1, 0, 0, 0] + [0] * 8 + [1] * 8
    probabilities = [0.1] * 4 + [0.3] * 8 + [0.8] * 8
    # Two bins of 20 rows; the rows of 0.3 have mid-rank 8 and so go to the lower one, whole.
    assert expected_calibration_error(labels, probabilities) == pytest.approx((abs(0.6 - 2.4) + 1.6) / 20)


def test_points_of_a_reliability_diagram():
    labels, probabilities = np.tile([0, 1], 30), np.linspace(0, 1, 60)
    points = reliability_bins(labels, probabilities)
    assert [size for *_, size in points] == [10] * 6
    assert points[0] == pytest.approx((probabilities[:10].mean(), 5, 10))
    assert reliability_bins([1, 0], [0.5, 0.5]) == [(0.5, 1, 2)]
    # Rows that the probability can't tell apart are one point, in whatever order they come.
    assert reliability_bins([0] * 50 + [1] * 50, [0.5] * 100) == [(0.5, 50, 100)]


def test_ece_of_constant_probability_is_one_gap():
    assert expected_calibration_error([0] * 60 + [1] * 40, [0.7] * 100) == pytest.approx(0.3)
    assert expected_calibration_error([0] * 60 + [1] * 40, [0.4] * 100) == pytest.approx(0.0)


@pytest.mark.parametrize("rows", [1, 2, 9, 10, 19, 20, 149, 150, 151, 1000])
def test_ece_stays_in_range(rows):
    random = np.random.default_rng(rows)
    error = expected_calibration_error(random.integers(0, 2, rows), random.random(rows))
    assert 0 <= error <= 1


def test_ece_of_calibrated_probabilities_is_small():
    random = np.random.default_rng(3)
    probabilities = random.random(20_000)
    labels = (random.random(20_000) < probabilities).astype(int)
    assert expected_calibration_error(labels, probabilities) < 0.02
    assert expected_calibration_error(1 - labels, probabilities) > 0.4


def test_ece_refuses_no_bins():
    with pytest.raises(ValueError, match="bins"):
        expected_calibration_error([0, 1], [0.2, 0.8], bins=0)


def test_metrics_are_written_as_json(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    write_json(path, {"test": classification_metrics([1, 1], np.float32([0.25, 0.75])), "values": np.arange(2)})
    read = json.loads(path.read_text())
    assert read["test"]["auroc"] is None
    assert read["test"]["rows"] == 2
    assert read["values"] == [0, 1]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
