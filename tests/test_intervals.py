"""Metrics of samples against scikit-learn, intervals against scipy and by simulation, and what is undefined."""

import numpy as np
import pytest
import scipy.stats
from scipy.special import expit
from sklearn import metrics as sk

from clsgen.classification_metrics import classification_metrics, expected_calibration_error
from clsgen.evaluation import resampling
from clsgen.evaluation.intervals import agreement_with_intervals, metrics_with_intervals, share
from clsgen.evaluation.resampling import bootstrap_counts, metric_statistics, perfectly_calibrated_errors

THRESHOLD = 0.4


def rows(count, seed=0, ties=False, slope=1.0, shift=0.0):
    random = np.random.default_rng(seed)
    logits = random.normal(size=count) * 1.5
    labels = (random.random(count) < expit(slope * logits + shift)).astype(int)
    probabilities = expit(logits)
    return labels, probabilities.round(1) if ties else probabilities


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_a_sample_are_those_of_scikit_learn_with_weights(ties):
    labels, probabilities = rows(60, ties=ties)
    counts = next(bootstrap_counts(60, 20, seed=3))
    found = metric_statistics(labels, probabilities, THRESHOLD)(counts)
    for i, weights in enumerate(counts):
        drawn = np.repeat(np.arange(60), weights.astype(int))
        called, half = probabilities >= THRESHOLD, probabilities >= 0.5
        expected = {
            "auroc": sk.roc_auc_score(labels, probabilities, sample_weight=weights),
            "average_precision": sk.average_precision_score(labels, probabilities, sample_weight=weights),
            "f1": sk.f1_score(labels, called, sample_weight=weights),
            "f1_at_half": sk.f1_score(labels, half, sample_weight=weights),
            "accuracy": sk.accuracy_score(labels, called, sample_weight=weights),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, called, sample_weight=weights),
            "mcc": sk.matthews_corrcoef(labels, called, sample_weight=weights),
            "brier": sk.brier_score_loss(labels, probabilities, sample_weight=weights, pos_label=1),
            "log_loss": sk.log_loss(labels[drawn], probabilities[drawn].clip(1e-7, 1 - 1e-7), labels=[0, 1]),
            "ece": expected_calibration_error(labels[drawn], probabilities[drawn]),
        }
        assert {name: values[i] for name, values in found.items()} == pytest.approx(expected)


def test_points_are_those_of_training():
    labels, probabilities = rows(90, ties=True)
    expected = classification_metrics(labels, probabilities, THRESHOLD)
    found = metrics_with_intervals(labels, probabilities, THRESHOLD, samples=100)
    for name in set(found) & set(expected):
        assert found[name]["value"] == pytest.approx(expected[name]), name
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name


def test_intervals_are_those_of_scipy():
    labels, probabilities = rows(70)
    found = metrics_with_intervals(labels, probabilities, THRESHOLD, samples=20_000)

    def brier(labels, probabilities, axis=-1):
        return ((labels - probabilities) ** 2).mean(axis=axis)

    def log_loss(labels, probabilities, axis=-1):
        return -np.log(np.where(labels == 1, probabilities, 1 - probabilities)).mean(axis=axis)

    for name, statistic in (("brier", brier), ("log_loss", log_loss)):
        expected = scipy.stats.bootstrap(
            (labels, probabilities), statistic, paired=True, method="BCa", n_resamples=20_000, rng=1
        ).confidence_interval
        width = expected.high - expected.low
        assert found[name]["low"] == pytest.approx(expected.low, abs=0.03 * width)
        assert found[name]["high"] == pytest.approx(expected.high, abs=0.03 * width)


def test_intervals_hold_the_truth_as_often_as_they_say():
    labels, probabilities = rows(400_000, seed=10**6)
    truth = {
        name: entry[0] for name, entry in metric_statistics(labels, probabilities, 0.5)(np.ones((1, 400_000))).items()
    }
    simulations = 200
    names = ("auroc", "average_precision", "f1", "balanced_accuracy", "mcc", "brier", "log_loss")
    hits = dict.fromkeys(names, 0)
    for seed in range(simulations):
        found = metrics_with_intervals(*rows(80, seed), threshold=0.5, samples=400)
        for name in hits:
            hits[name] += found[name]["low"] <= truth[name] <= found[name]["high"]
    # Four standard errors of a coverage of 0.95 over 200 simulations are 0.06.
    assert all(0.89 <= hit / simulations < 1 for hit in hits.values()), hits


@pytest.mark.parametrize(
    ("slope", "shift", "width"),
    [(1.0, 0.0, 0.16), (0.8, 0.0, 0.16), (0.5, 0.0, 0.17), (1.0, 0.5, 0.16), (1.0, 1.0, 0.14)],
)
def test_the_interval_of_the_calibration_error_holds_the_truth_of_a_miscalibrated_model(slope, shift, width):
    logits = np.random.default_rng(1).normal(size=400_000) * 1.5
    truth = np.abs(expit(slope * logits + shift) - expit(logits)).mean()
    found = [
        metrics_with_intervals(*rows(200, seed, slope=slope, shift=shift), 0.5, samples=300)["ece"]
        for seed in range(100)
    ]
    held = np.mean([each["low"] <= truth <= each["high"] for each in found])
    assert held >= 0.89
    assert np.mean([each["high"] - each["low"] for each in found]) < width
    told_apart = np.mean([each["low"] > 0 for each in found])  # from a perfectly calibrated model
    assert told_apart < 0.1 if truth < 0.01 else told_apart > 0.9 if truth > 0.15 else True


def test_calibration_error_by_chance_is_that_of_drawn_labels():
    _, probabilities = rows(50, ties=True)
    random = np.random.default_rng(5)
    expected = [
        expected_calibration_error((random.random(50) < probabilities).astype(int), probabilities) for _ in range(2000)
    ]
    found = perfectly_calibrated_errors(probabilities, 2000, seed=0)
    assert found.mean() == pytest.approx(np.mean(expected), rel=0.05)
    assert np.quantile(found, 0.95) == pytest.approx(np.quantile(expected, 0.95), rel=0.08)


def test_chunks_change_nothing(monkeypatch):
    labels, probabilities = rows(40)
    whole = metrics_with_intervals(labels, probabilities, THRESHOLD, samples=150)
    monkeypatch.setattr(resampling, "MAX_COUNTS", 40 * 7)
    chunked = metrics_with_intervals(labels, probabilities, THRESHOLD, samples=150)
    for name, estimate in whole.items():
        assert chunked[name] == pytest.approx(estimate), name


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_named(label):
    found = metrics_with_intervals([label] * 30, np.linspace(0.1, 0.9, 30), THRESHOLD, samples=100)
    for name in ("auroc", "average_precision", "balanced_accuracy"):
        assert found[name]["value"] is None
        assert f"all 30 rows have label {label}" in found[name]["reason"]
    assert found["mcc"]["value"] is None
    assert found["brier"]["low"] < found["brier"]["value"] < found["brier"]["high"]


def test_one_row_has_values_but_no_interval():
    found = metrics_with_intervals([1], [0.8], THRESHOLD, samples=100)
    assert found["brier"]["value"] == pytest.approx(0.04)
    assert found["brier"]["low"] is None
    assert "same in every bootstrap sample" in found["brier"]["reason"]
    assert found["ece"]["low"] is None
    assert found["auroc"]["value"] is None


def test_nothing_called_and_nothing_to_call_is_no_f1_of_zero():
    found = metrics_with_intervals([0] * 20, [0.1] * 20, THRESHOLD, samples=100)
    assert found["f1"]["value"] is None
    assert "0 / 0" in found["f1"]["reason"]


def test_ties_everywhere():
    found = metrics_with_intervals([0, 1] * 20, [0.5] * 40, THRESHOLD, samples=100)
    assert found["auroc"]["value"] == 0.5
    assert "same in every bootstrap sample" in found["auroc"]["reason"]


def test_a_perfect_ranker_has_no_interval_of_no_width():
    found = metrics_with_intervals([0] * 10 + [1] * 10, np.linspace(0, 1, 20), THRESHOLD, samples=200)
    assert found["auroc"]["value"] == 1.0
    assert found["auroc"]["low"] is None


def test_a_rare_class_that_samples_miss_leaves_no_interval():
    found = metrics_with_intervals([1] + [0] * 29, np.linspace(0.9, 0.1, 30), THRESHOLD, samples=500)
    assert found["auroc"]["value"] == 1.0
    assert "undefined in" in found["auroc"]["reason"]


@pytest.mark.parametrize(("labels", "probabilities"), [([], []), ([0, 1], [0.5, np.nan]), ([0, 2], [0.1, 0.2])])
def test_what_is_no_data_is_refused(labels, probabilities):
    with pytest.raises(ValueError, match=r"no rows|lie in|0 or 1"):
        metrics_with_intervals(labels, probabilities, 0.5)


def test_share_has_wilsons_interval():
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), by hand for 8 of 10.
    assert share(8, 10, "rows") == pytest.approx({"value": 0.8, "low": 0.4902, "high": 0.9433}, abs=1e-4)
    assert share(0, 12, "rows")["low"] == 0.0
    assert share(0, 12, "rows")["high"] > 0.2
    assert share(0, 0, "flagged rows") == {"value": None, "low": None, "high": None, "reason": "no flagged rows"}


def test_agreement_is_scikit_learns():
    labels, probabilities = rows(60, ties=True)
    predicted = (probabilities >= 0.5).astype(int)
    found = agreement_with_intervals(probabilities, predicted, labels, samples=200)
    assert found["auroc_alignment"]["value"] == pytest.approx(sk.roc_auc_score(labels, probabilities))
    assert found["kappa"]["value"] == pytest.approx(sk.cohen_kappa_score(labels, predicted))
    assert found["kappa"]["low"] < found["kappa"]["value"] < found["kappa"]["high"]
    assert found["contradiction_rate"]["value"] == pytest.approx((labels != predicted).mean())


def test_agreement_that_is_undefined_is_named():
    found = agreement_with_intervals([0.2, 0.8], [0, 1], [1, 1], samples=100)
    assert found["auroc_alignment"]["reason"] == "the judge found one label only"
    assert found["kappa"]["value"] is None
    assert agreement_with_intervals([], [], [])["kappa"]["reason"] == "no explanation was judged"
