"""Calibration against scipy's optimiser, simulated truth and a brute-force grid of thresholds."""

import logging
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit

from clsgen.calibration import (
    calibrated_probabilities,
    choose_threshold,
    conformal_coverage,
    conformal_quantiles,
    fit_temperature_and_bias,
)


def simulate(rows, temperature, bias, seed=0, scale=3.0):
    """Logits and labels that follow `sigmoid(logit / temperature + bias)` exactly."""
    random = np.random.default_rng(seed)
    logits = scale * random.standard_normal(rows)
    labels = (random.random(rows) < expit(logits / temperature + bias)).astype(int)
    return logits, labels


def smoothed_nll(parameters, logits, labels):
    """Platt's objective, written again from the paper: `parameters` are the slope and the bias."""
    positive = labels.sum()
    targets = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (len(labels) - positive + 2))
    scores = parameters[0] * logits + parameters[1]
    return (np.logaddexp(0, scores) - targets * scores).mean()


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (2.5, -0.7), (0.4, 1.2), (8.0, 0.3)])
def test_recovers_the_truth(temperature, bias):
    found = fit_temperature_and_bias(*simulate(40_000, temperature, bias))
    assert found[0] == pytest.approx(temperature, rel=0.06)
    assert found[1] == pytest.approx(bias, abs=0.06)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (1000.0, 500.0), (1e-3, 7.0)])
def test_agrees_with_scipy(seed, scale, shift):
    logits, labels = simulate(80, temperature=2.0, bias=0.5, seed=seed)
    fitted = fit_temperature_and_bias(scale * logits + shift, labels)
    best = minimize(smoothed_nll, [1.0, 0.0], args=(logits, labels), method="BFGS", options={"gtol": 1e-9})
    slope = scale / fitted[0]
    offset = shift / fitted[0] + fitted[1]
    np.testing.assert_allclose([slope, offset], best.x, rtol=1e-4, atol=1e-4)


def test_calibration_lowers_the_loss_and_keeps_the_ranking():
    logits, labels = simulate(2_000, temperature=5.0, bias=-1.0)
    temperature, bias = fit_temperature_and_bias(logits, labels)
    assert smoothed_nll([1 / temperature, bias], logits, labels) < smoothed_nll([1, 0], logits, labels)
    probabilities = calibrated_probabilities(logits, temperature, bias)
    assert (np.argsort(probabilities) == np.argsort(logits)).all()
    # At the optimum the mean probability is the mean target.
    assert probabilities.mean() == pytest.approx(labels.mean(), abs=1e-3)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_separable_rows_stay_finite(rows):
    logits = np.r_[np.full(rows, -2.0), np.full(rows, 2.0)]
    temperature, bias = fit_temperature_and_bias(logits, [0] * rows + [1] * rows)
    probability = calibrated_probabilities([2.0], temperature, bias)[0]
    # Both groups meet Platt's targets exactly.
    assert probability == pytest.approx((rows + 1) / (rows + 2), abs=1e-6)
    assert bias == pytest.approx(0.0, abs=1e-6)


def test_backward_ranking_is_not_turned_round(caplog):
    with caplog.at_level(logging.WARNING):
        temperature, bias = fit_temperature_and_bias([2.0, 1.0, -1.0, -2.0] * 10, [0, 0, 1, 1] * 10)
    assert "don't rank" in caplog.text
    assert math.isfinite(temperature)
    probabilities = calibrated_probabilities([-2.0, 2.0], temperature, bias)
    assert probabilities[0] < probabilities[1]
    assert probabilities == pytest.approx([0.5, 0.5], abs=0.02)


def test_backward_ranking_still_gets_the_base_rate():
    labels = np.array([0] * 30 + [1] * 10)
    logits = np.r_[np.linspace(0, 1, 30), np.linspace(-3, -2, 10)]
    probabilities = calibrated_probabilities(logits, *fit_temperature_and_bias(logits, labels))
    targets = np.where(labels == 1, 11 / 12, 1 / 32)
    assert probabilities.mean() == pytest.approx(targets.mean(), abs=1e-4)


def test_constant_logits_get_the_base_rate():
    temperature, bias = fit_temperature_and_bias([3.0] * 1000, [0] * 900 + [1] * 100)
    assert temperature == 1.0
    assert calibrated_probabilities([3.0], temperature, bias)[0] == pytest.approx(0.1, abs=2e-3)


def test_fit_is_deterministic():
    logits, labels = simulate(500, temperature=2.0, bias=0.1)
    assert fit_temperature_and_bias(logits, labels) == fit_temperature_and_bias(list(logits), list(labels))


def test_fit_works_where_gradients_are_off():
    logits, labels = simulate(100, temperature=2.0, bias=0.1)
    with torch.no_grad():
        inside = fit_temperature_and_bias(torch.tensor(logits), torch.tensor(labels))
    assert inside == fit_temperature_and_bias(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([1.0, 2.0], [1, 1], "both labels"),
        ([1.0, 2.0], [0, 0], "both labels"),
        ([], [], "no rows"),
        ([1.0], [0, 1], "shapes"),
        ([1.0, float("nan")], [0, 1], "finite"),
        ([1.0, float("inf")], [0, 1], "finite"),
        ([1.0, 2.0], [0, 3], "0 or 1"),
    ],
)
def test_bad_input_to_the_fit_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature_and_bias(logits, labels)


def test_extreme_logits_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrated_probabilities([-1e6, 1e6], 1.0, 0.0).tolist() == [0.0, 1.0]


def score_at(labels, probabilities, threshold, method):
    predictions = probabilities >= threshold
    true_positives = int((predictions & (labels == 1)).sum())
    false_positives = int((predictions & (labels == 0)).sum())
    positive, negative = int((labels == 1).sum()), int((labels == 0).sum())
    if method == "f1":
        return 2 * true_positives / (true_positives + false_positives + positive)
    return true_positives / positive - false_positives / negative


@pytest.mark.parametrize("method", ["f1", "youden"])
@pytest.mark.parametrize("seed", range(8))
def test_threshold_is_as_good_as_the_best_of_a_grid(method, seed):
    random = np.random.default_rng(seed)
    probabilities = random.integers(0, 21, 40) / 20
    labels = (random.random(40) < probabilities).astype(int)
    threshold = choose_threshold(labels, probabilities, method)
    grid = [score_at(labels, probabilities, candidate, method) for candidate in np.linspace(0, 1.01, 1000)]
    assert score_at(labels, probabilities, threshold, method) == pytest.approx(max(grid))
    assert 0 <= threshold <= 1


def test_threshold_hand_computed():
    labels, probabilities = [0, 0, 1, 0, 1, 1], [0.1, 0.2, 0.3, 0.6, 0.7, 0.9]
    # From 0.25: 3 hits, 1 false alarm, F1 6/7; from 0.65: 2 hits, F1 4/5.
    assert choose_threshold(labels, probabilities, "f1") == pytest.approx(0.25)
    # J is 1 - 1/3 at 0.25 and 2/3 - 0 at 0.65: a tie, and 0.65 is nearer to 0.5.
    assert choose_threshold(labels, probabilities, "youden") == pytest.approx(0.65)


@pytest.mark.parametrize("method", ["f1", "youden"])
def test_threshold_of_a_perfect_ranker_separates(method):
    assert choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9], method) == pytest.approx(0.4)


def test_threshold_below_all_where_everything_is_best_called_positive():
    threshold = choose_threshold([1, 0, 1, 1], [0.3, 0.4, 0.5, 0.6], "f1")
    assert threshold == pytest.approx(0.15)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 1.0])
def test_threshold_of_constant_probabilities(value):
    threshold = choose_threshold([0, 1, 1], [value] * 3, "f1")
    assert threshold <= value


def test_threshold_between_neighbouring_floats():
    lower = 0.3
    upper = np.nextafter(lower, 1)
    threshold = choose_threshold([0, 1], [lower, upper], "youden")
    assert 0 <= threshold <= 1


def test_fixed_threshold():
    assert choose_threshold([1, 1], [0.2, 0.3], method="fixed", fixed=0.7) == 0.7
    with pytest.raises(ValueError, match=r"1\.2"):
        choose_threshold([0, 1], [0.2, 0.3], method="fixed", fixed=1.2)


@pytest.mark.parametrize(
    ("labels", "probabilities", "method", "message"),
    [
        ([0, 1], [0.2, 0.3], "best", "known: f1, youden, fixed"),
        ([1, 1], [0.2, 0.3], "f1", "both labels"),
        ([0, 1], [0.2, float("nan")], "f1", "nan"),
        ([0, 1], [0.2], "youden", "shapes"),
    ],
)
def test_bad_input_to_the_threshold_is_refused(labels, probabilities, method, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold(labels, probabilities, method)


def test_conformal_quantile_of_a_hand_computed_case():
    labels = [0] * 9 + [1] * 4
    probabilities = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.2, 0.4, 0.6, 0.8]
    # label 0: rank ceil(10 * 0.8) = 8 of 9; label 1: rank ceil(5 * 0.8) = 4 of 4, the largest of 1 - p
    assert conformal_quantiles(labels, probabilities, 0.2) == pytest.approx((0.8, 0.8))
    assert conformal_quantiles(labels, probabilities, 0.1) == pytest.approx((0.9, 1.0))
    with pytest.raises(ValueError, match="error rate"):
        conformal_quantiles(labels, probabilities, 1.0)


def test_a_label_given_against_its_prediction_set_is_abstained_on():
    # the sets: label 0 alone, label 0 alone, both, label 1 alone
    labels, probabilities, quantiles = [0, 0, 1, 1], [0.1, 0.3, 0.45, 0.9], (0.5, 0.6)
    found = conformal_coverage(labels, probabilities, quantiles, threshold=0.2)
    assert found == {"coverage": [1.0, 1.0], "abstained": 0.5}


def test_conformal_sets_cover_each_class_at_any_base_rate_and_under_any_calibration():
    generator = np.random.default_rng(0)
    coverage = []
    for _ in range(300):
        labels = generator.random(200) < 0.2
        logits = generator.normal(np.where(labels, 0.5, -0.5))
        quantiles = conformal_quantiles(labels, 1 / (1 + np.exp(-logits)), 0.1)
        sharper = conformal_quantiles(labels, 1 / (1 + np.exp(-3 * logits - 1)), 0.1)
        new_labels = generator.random(400) < 0.6
        new_logits = generator.normal(np.where(new_labels, 0.5, -0.5))
        found = conformal_coverage(new_labels, 1 / (1 + np.exp(-new_logits)), quantiles, 0.5)
        again = conformal_coverage(new_labels, 1 / (1 + np.exp(-3 * new_logits - 1)), sharper, 1 / (1 + np.exp(-1)))
        assert found == again
        coverage.append(found["coverage"])
    assert np.mean(coverage, axis=0) == pytest.approx([0.9, 0.9], abs=0.02)
    assert (np.mean(coverage, axis=0) > 0.895).all()
