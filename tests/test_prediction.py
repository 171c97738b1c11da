"""From a logit to an answer: base rates, prediction sets, and how they are told."""

import json
import math
from dataclasses import replace

import pytest
import torch

from clsgen.prediction_clsgen import Attribution, DecisionRule, NoNumberError, Prediction


def rule(**changes):
    values = {"labels": ("no", "yes"), "pos_weight": 1.0, "temperature": 1.0, "bias": 0.0, "threshold": 0.5}
    return DecisionRule(**{**values, **changes})


def test_re_basing_is_bayes_rule():
    p, base_rate, prior = 0.7, 0.4, 0.02
    one = rule(base_rate=base_rate).predict(torch.tensor([math.log(p / (1 - p))]), [False], prior)[0]
    likelihoods = p / base_rate, (1 - p) / (1 - base_rate)
    expected = prior * likelihoods[0] / (prior * likelihoods[0] + (1 - prior) * likelihoods[1])
    assert one.probability == pytest.approx(expected, rel=1e-6)
    assert (one.prior, one.label) == (prior, "no")
    assert "at a base rate of 0.02" in str(one)
    same = rule(base_rate=base_rate).predict(torch.tensor([math.log(p / (1 - p))]), [False], base_rate)[0]
    assert same.probability == pytest.approx(p)


@pytest.mark.parametrize("prior", [0, 1, -0.1, math.nan, "0.1", True])
def test_an_impossible_prior_is_refused(prior):
    with pytest.raises((TypeError, ValueError), match="`prior`"):
        rule(base_rate=0.5).prior_shift(prior)


def test_a_model_without_a_base_rate_cannot_be_moved():
    with pytest.raises(ValueError, match="base rate"):
        rule().prior_shift(0.3)


def test_prediction_sets_and_abstention():
    logits = torch.logit(torch.tensor([0.05, 0.5, 0.95]))
    sets = [p.prediction_set for p in rule(conformal_quantiles=(0.6, 0.3)).predict(logits, [False] * 3)]
    assert sets == [("no",), ("no",), ("yes",)]
    certain, ruled_out, _ = rule(conformal_quantiles=(0.6, 0.3)).predict(logits, [False] * 3)
    assert not certain.abstained
    assert (ruled_out.label, ruled_out.abstained) == ("yes", True)
    assert "yes (P(yes) = 0.500, threshold 0.500), uncertain: no by its prediction set" in str(ruled_out)
    unsure = rule(conformal_quantiles=(0.6, 0.6)).predict(logits, [False] * 3)[1]
    assert unsure.prediction_set == ("no", "yes")
    assert unsure.abstained
    assert "uncertain: no or yes" in str(unsure)
    strange = rule(conformal_quantiles=(0.2, 0.2)).predict(logits, [False] * 3)[1]
    assert strange.prediction_set == ()
    assert strange.abstained
    moved = rule(conformal_quantiles=(0.6, 0.3), base_rate=0.5).predict(logits, [False] * 3, prior=0.001)
    assert [p.prediction_set for p in moved] == sets
    assert rule().predict(logits, [False] * 3)[0].abstained is None


def test_a_logit_that_is_not_a_number_is_refused_and_an_infinite_one_is_certain():
    logits = torch.tensor([0.5, math.nan, -1.0, math.nan])
    with pytest.raises(NoNumberError, match=r"2 text\(s\), \[1, 3\]: .* not a number.*bfloat16"):
        rule().predict(logits, [False] * 4)
    certain = rule(base_rate=0.5).predict(torch.tensor([math.inf, -math.inf]), [False] * 2, prior=0.1)
    assert [(p.label_id, p.probability) for p in certain] == [(1, 1.0), (0, 0.0)]


def test_a_reading_that_is_not_a_number_is_refused():
    with pytest.raises(NoNumberError, match=r"1 text\(s\), \[1\]"):
        rule().predict(torch.zeros(2), [False] * 2, readings=torch.tensor([0.0, math.nan]))


def test_the_lms_reading_moves_with_the_base_rate():
    logits, readings = torch.logit(torch.tensor([0.6, 0.9])), torch.logit(torch.tensor([0.6, 0.8]))
    same, other = rule(base_rate=0.5).predict(logits, [False] * 2, prior=0.02, readings=readings)
    assert same.disagreement == pytest.approx(0.0, abs=1e-6)
    odds = 0.8 / 0.2 * 0.02 / 0.98
    assert other.lm_probability == pytest.approx(odds / (1 + odds))


def test_a_prediction_is_json():
    prediction = Prediction(
        "yes", 1, "yes", 0.8, 1.4, 0.5, explanation="Because.", lm_probability=0.3, prediction_set=("yes",),
        attributions=(Attribution("text", 0, 4, 0.2),),
    )  # fmt: skip
    values = json.loads(json.dumps(prediction.to_dict()))
    assert values["disagreement"] == pytest.approx(0.5)
    assert values["abstained"] is False
    assert values["attributions"] == [{"field": "text", "start": 0, "end": 4, "score": 0.2}]


def test_a_prediction_says_whose_probability_it_is_and_whether_its_words_are_whole():
    negative = rule().predict(torch.logit(torch.tensor([0.034])), [False])[0]
    assert str(negative) == "no (P(yes) = 0.034, threshold 0.500)"
    assert negative.to_dict()["positive_label"] == "yes"
    explained = replace(negative, explanation="It", explained_label="no", explanation_cut=True)
    assert str(explained) == "no (P(yes) = 0.034, threshold 0.500), explanation cut: It"
    assert "cut" not in str(replace(explained, explanation_cut=False))
