"""Thresholds against brute force, and paired tests against naive computations and cases worked out by hand."""

import itertools

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve

from clsgen.calibration import threshold_candidates
from clsgen.evaluation.comparison import compare, delong, mcnemar
from clsgen.evaluation.intervals import metrics_with_intervals
from clsgen.evaluation.plots import GRID_POINTS, net_benefit, precision_at, sensitivity_at
from clsgen.evaluation.resampling import RankedRows
from clsgen.evaluation.thresholds import Target, fit_threshold, operating_point, threshold_sheet

LABELS = np.array([0, 0, 1, 0, 1, 1, 0, 1])
PROBABILITIES = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9])


def random_rows(seed, count=40):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    return labels, ((random.random(count) + 0.6 * labels) / 1.6).round(2)


@pytest.mark.parametrize(
    ("kind", "value", "threshold"),
    [
        ("sensitivity", 1.0, 0.25),  # must reach down to 0.3
        ("sensitivity", 0.75, 0.45),  # three of four: 0.5, 0.6, 0.9
        ("specificity", 0.75, 0.45),  # one of four negatives may be flagged: 0.7
        ("specificity", 1.0, 0.8),
        ("ppv", 1.0, 0.8),
        ("ppv", 0.75, 0.45),  # of 0.5, 0.6, 0.7 and 0.9 three are positive
        ("cost_ratio", 10.0, 0.25),
        ("cost_ratio", 1.0, 0.45),
        ("cost_ratio", 0.1, 0.8),
    ],
)
def test_thresholds_by_hand(kind, value, threshold):
    found = fit_threshold(LABELS, PROBABILITIES, Target(kind, value), samples=100)
    assert found["value"] == pytest.approx(threshold)
    if kind == "ppv":  # in many samples of eight rows no threshold reaches it
        assert "undefined in" in found["reason"]
    else:
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_by_brute_force(seed):
    labels, probabilities = random_rows(seed)

    def counts(threshold):
        flagged = probabilities >= threshold
        return (flagged & (labels == 1)).sum(), (flagged & (labels == 0)).sum()

    positive, negative = labels.sum(), (1 - labels).sum()
    candidates = [(t, *counts(t)) for t in threshold_candidates(probabilities)]
    best = {
        ("sensitivity", 0.8): max(
            (c for c in candidates if c[1] / positive >= 0.8), key=lambda c: (-c[2], c[1], c[0])
        ),
        ("specificity", 0.8): max((c for c in candidates if 1 - c[2] / negative >= 0.8), key=lambda c: (c[1], c[0])),
        ("ppv", 0.7): max(
            (c for c in candidates if c[1] + c[2] and c[1] / (c[1] + c[2]) >= 0.7), key=lambda c: (c[1], c[0])
        ),
        ("cost_ratio", 3.0): min(candidates, key=lambda c: (3 * (positive - c[1]) + c[2], -c[0])),
    }
    for (kind, value), expected in best.items():
        found = fit_threshold(labels, probabilities, Target(kind, value), 100)["value"]
        assert found == pytest.approx(expected[0])
        right, wrong = counts(found)
        assert not [c for c in candidates if c[1] >= right and c[2] <= wrong and (c[1], c[2]) != (right, wrong)]


def test_what_no_threshold_reaches_is_named():
    found = fit_threshold([1, 0, 0], [0.2, 0.5, 0.9], Target("ppv", 0.9), samples=100)
    assert found["value"] is None
    assert "no threshold reaches it" in found["reason"]
    assert fit_threshold([0, 0], [0.2, 0.5], Target("sensitivity", 0.9), samples=100)["value"] is None


def test_the_sheet_is_fitted_on_validation_rows_alone():
    targets = [Target("sensitivity", 0.9), Target("cost_ratio", 4.0)]
    validation = random_rows(0)
    sheets = [threshold_sheet(validation, random_rows(seed), 0.5, targets, samples=100) for seed in (1, 2)]
    for first, second in zip(*sheets, strict=True):
        assert first["threshold"] == second["threshold"]
        assert first["on_reported"] != second["on_reported"]
    without = threshold_sheet(None, random_rows(1), 0.5, targets, samples=100)
    assert [entry["threshold"]["value"] for entry in without] == [0.5, 0.5, None, None]
    assert "no validation rows" in without[2]["threshold"]["reason"]
    assert without[2]["on_reported"] is None
    assert sheets[0][3]["if_calibrated"] == 1 / 5


def test_cost_per_row():
    target = Target("cost_ratio", 10.0)
    entry = threshold_sheet((LABELS, PROBABILITIES), (LABELS, PROBABILITIES), 0.5, [target], samples=100)[2]
    assert entry["cost_per_row"] == pytest.approx(2 / 8)  # two false alarms at 0.25, nothing missed


def test_operating_point_by_hand():
    point = operating_point(LABELS, PROBABILITIES, 0.45)
    assert point["counts"] == {"tp": 3, "fp": 1, "fn": 1, "tn": 3}
    assert [point[name]["value"] for name in ("sensitivity", "specificity", "ppv", "npv", "flagged")] == [
        0.75, 0.75, 0.75, 0.75, 0.5,
    ]  # fmt: skip
    assert operating_point(LABELS, PROBABILITIES, 0.95)["ppv"]["reason"] == "no flagged rows"
    assert operating_point([0, 0], [0.1, 0.2], 0.5)["sensitivity"]["reason"] == "no positive rows"


@pytest.mark.parametrize(("kind", "value"), [("sensitivity", 0), ("ppv", 1.5), ("cost_ratio", -1), ("recall", 0.5)])
def test_targets_that_make_no_sense_are_refused(kind, value):
    with pytest.raises(ValueError, match=kind.replace("_", " ")):
        Target(kind, value)


def naive_delong(labels, ours, theirs):
    """DeLong's structural components, pair by pair."""
    components = []
    for scores in (ours, theirs):
        positive, negative = scores[labels == 1], scores[labels == 0]
        wins = np.array([[(p > n) + 0.5 * (p == n) for n in negative] for p in positive])
        components.append((wins.mean(axis=1), wins.mean(axis=0), wins.mean()))
    difference = components[0][2] - components[1][2]
    variance = 0.0
    for side in (0, 1):
        gaps = components[0][side] - components[1][side]
        variance += gaps.var(ddof=1) / len(gaps)
    return difference, 2 * norm.sf(abs(difference) / variance**0.5)


@pytest.mark.parametrize("seed", range(3))
def test_delong_pair_by_pair(seed):
    labels, ours = random_rows(seed)
    theirs = np.random.default_rng(seed + 9).random(len(labels)).round(1)
    difference, p_value = naive_delong(labels, ours, theirs)
    found = delong(labels, ours, theirs)
    assert found["difference"] == pytest.approx(difference)
    assert found["difference"] == pytest.approx(roc_auc_score(labels, ours) - roc_auc_score(labels, theirs))
    assert found["p_value"] == pytest.approx(p_value)
    assert found["low"] < difference < found["high"]


def test_delong_of_means_over_runs():
    labels, ours = random_rows(3)
    random = np.random.default_rng(4)
    runs, theirs = np.stack([ours, random.random(len(labels)).round(1)]), random.random(len(labels))
    found = delong(labels, runs, theirs)
    areas = [roc_auc_score(labels, run) for run in runs]
    assert found["difference"] == pytest.approx(np.mean(areas) - roc_auc_score(labels, theirs))
    drawn = []
    for _ in range(2000):  # an independent way to its interval: the rows of each label, drawn again
        rows = np.concatenate(
            [random.choice(np.flatnonzero(labels == label), (labels == label).sum()) for label in (0, 1)]
        )
        areas = [roc_auc_score(labels[rows], run[rows]) for run in (*runs, theirs)]
        drawn.append(np.mean(areas[:2]) - areas[2])
    assert (found["high"] - found["low"]) / 3.92 == pytest.approx(np.std(drawn), rel=0.1)


def test_delong_rejects_as_often_as_it_says():
    random = np.random.default_rng(0)
    rejected = 0
    for _ in range(400):
        labels = np.r_[np.zeros(40, int), np.ones(40, int)]
        signal = labels + random.normal(size=80)
        ours, theirs = (1 / (1 + np.exp(-(signal + random.normal(size=80)))) for _ in range(2))
        rejected += delong(labels, ours, theirs)["p_value"] < 0.05
    assert 0.02 <= rejected / 400 <= 0.09


def test_mcnemar_by_hand():
    # Ten rows that only we get right, two that only they do, three that both do.
    labels = np.ones(15, int)
    ours, theirs = np.array([1] * 10 + [0] * 2 + [1] * 3), np.array([0] * 10 + [1] * 2 + [1] * 3)
    found = mcnemar(labels, ours, theirs)
    assert (found["only_ours_right"], found["only_theirs_right"]) == (10, 2)
    assert found["p_value"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)


def test_a_model_against_itself_is_untested_not_significant():
    labels, probabilities = random_rows(0)
    decisions = (probabilities >= 0.5).astype(int)
    found = compare(labels, probabilities, probabilities, decisions, decisions, samples=100)
    assert found["delong"]["p_value"] is None
    assert found["delong"]["reason"] == "the two models rank the rows alike"
    assert found["mcnemar"]["reason"] == "both models are right on the same rows"
    assert all(entry["value"] == entry["low"] == entry["high"] == 0 for entry in found["differences"].values())


def test_a_perfect_ranking_against_a_constant_is_untested_but_not_alike():
    found = delong([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], [0.5] * 4)
    assert (found["difference"], found["p_value"]) == (0.5, None)
    assert "alike" not in found["reason"]


def test_one_class_is_untested():
    found = compare([1, 1, 1], [0.2, 0.3, 0.4], [0.3, 0.2, 0.5], [0, 0, 0], [0, 0, 1], samples=100)
    assert found["delong"]["reason"] == "fewer than two rows of a label"
    assert found["differences"]["auroc"]["value"] is None
    assert found["differences"]["brier"]["value"] is not None


def test_paired_bootstrap_is_narrower_than_two_intervals():
    labels, ours = random_rows(1, count=100)
    theirs = (ours + np.random.default_rng(2).normal(size=100) * 0.01).clip(0, 1)
    decisions = (ours >= 0.5).astype(int)
    difference = compare(labels, ours, theirs, decisions, decisions, samples=300)["differences"]["auroc"]
    widths = [
        found["high"] - found["low"]
        for found in (metrics_with_intervals(labels, each, 0.5, samples=300)["auroc"] for each in (ours, theirs))
    ]
    assert difference["high"] - difference["low"] < 0.5 * min(widths)


def test_net_benefit_by_hand():
    # At 0.2 a false positive costs a quarter of a true one: (30 - 20 / 4) / 100.
    assert net_benefit(np.array(30), np.array(20), 100, 0.2) == pytest.approx(0.25)
    for threshold, rate in itertools.product((0.1, 0.5), (0.2, 0.6)):
        expected = rate - (1 - rate) * threshold / (1 - threshold)
        assert net_benefit(100 * rate, 100 * (1 - rate), 100, threshold) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_curves_are_scikit_learns(seed):
    random = np.random.default_rng(seed)
    labels = np.r_[0, 1, random.integers(0, 2, 30)]
    probabilities = random.integers(0, 11, 32) / 10  # with ties
    ranked = RankedRows(labels, probabilities)
    true, false = (found[0] for found in ranked.at_or_above(np.ones((1, 32)), ranked.values))
    rates = roc_curve(labels, probabilities, drop_intermediate=False)[:2]
    assert sensitivity_at(false, true) == pytest.approx(np.interp(GRID_POINTS, *rates))
    precisions, recalls, _ = precision_recall_curve(labels, probabilities)
    points = list(zip(recalls[:-1], precisions[:-1], strict=True))  # by rising threshold
    expected = [[p for r, p in points if r > 0 and r >= wanted - 1e-9][-1] for wanted in GRID_POINTS]
    assert precision_at(false, true) == pytest.approx(expected)
