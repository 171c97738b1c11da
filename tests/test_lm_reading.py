"""`lm_reading_weight`: the LM's own reading of the verdict as a part of the number, the same however it is asked."""

import math

import pytest
import torch

from clsgen.configuration_clsgen import ClsGenConfig
from clsgen.prediction_clsgen import DecisionRule

WEIGHT = 0.3


@pytest.fixture
def pooled(any_model):
    any_model.config.lm_reading_weight = WEIGHT
    any_model.config.pos_weight = 2.0
    any_model.config.calibration = {"temperature": 1.7, "bias": -0.4}
    return any_model


def readings_of(model, text):
    """The head's raw logit and the LM's log-odds of the two verdict lines, by plain forward passes."""
    prompt, scores = model.encoder.encode(text).input_ids, []
    for label in (0, 1):
        line = model.encoder.encode_verdict(label)
        with torch.no_grad():
            output = model(torch.tensor([prompt + line]))
        following = output.logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        scores.append(following[range(len(line)), line].sum().item())
    return output.cls_logits[0, len(prompt) - 1].item(), scores[1] - scores[0]


def test_the_number_is_a_weighted_mean_of_two_log_odds(pooled, texts):
    for text, prediction in zip(texts, pooled.classify(texts), strict=True):
        of_head, of_lm = readings_of(pooled, text)
        logit = (1 - WEIGHT) * (of_head - math.log(2)) + WEIGHT * of_lm
        assert prediction.logit == pytest.approx(logit, abs=1e-4)
        assert prediction.probability == pytest.approx(1 / (1 + math.exp(0.4 - logit / 1.7)), abs=1e-4)
        assert prediction.lm_probability == pytest.approx(1 / (1 + math.exp(-of_lm)), abs=1e-4)


def test_every_way_to_ask_gives_the_same_number(pooled, texts):
    expected = pooled.classify(texts)
    answers = {
        "one by one": [pooled.classify(text) for text in texts],
        "small batches": list(pooled.classify_iter(texts, batch_size=2)),
        "guided": pooled.classify_and_explain(texts, mode="guided", max_new_tokens=4),
        "free": pooled.classify_and_explain(texts, mode="free", max_new_tokens=4),
        "another verdict": [pooled.explain(text, 0, max_new_tokens=4) for text in texts],
        "stream": [next(pooled.stream(text, max_new_tokens=4)) for text in texts],
        "free stream": [next(pooled.stream(text, mode="free", max_new_tokens=4)) for text in texts],
        "decision": [pooled._decide(pooled.encoder.encode(text).input_ids, explain=False) for text in texts],
    }
    for way, predictions in answers.items():
        for prediction, wanted in zip(predictions, expected, strict=True):
            assert prediction.logit == pytest.approx(wanted.logit, abs=1e-4), way
            assert prediction.lm_probability == pytest.approx(wanted.lm_probability, abs=1e-4), way


@pytest.mark.parametrize("mode", ["guided", "free"])
def test_words_are_those_behind_an_unread_prompt(pooled, texts, mode):
    """Reading leaves nothing behind in the cache; free words begin with what it decides, cut as the number is."""
    reading = readings_of(pooled, texts[1])[1]
    own = 1 / (1 + math.exp(0.4 - reading / 1.7))
    for pooled.config.threshold in (own - 1e-3, own + 1e-3):
        prediction = pooled.classify_and_explain(texts, mode=mode, max_new_tokens=8)[1]
        label = prediction.label_id if mode == "guided" else int(own >= pooled.config.threshold)
        assert prediction.explained_label == pooled.config.label_names[label]
        assert prediction.explanation == words_behind(pooled, texts[1], label)


def words_behind(pooled, text, label):
    ids = pooled.encoder.encode(text).input_ids + pooled.encoder.encode_verdict(label)
    generated = pooled.generate(torch.tensor([ids]), max_new_tokens=8)[0, len(ids) :]
    expected = pooled.tokenizer.decode(generated, skip_special_tokens=True)
    return pooled.encoder.prompt.split_verdict_line(expected)[1]


def test_attributions_are_of_the_number(pooled):
    text = {"findings": "Death fell. Nausea was rare. Nobody else died.", "claim": "Drug A lowers death."}
    prediction = pooled.classify(text, attributions=True)
    without = pooled.classify({**text, "findings": "Death fell.  Nobody else died."})
    assert prediction.attributions[1].score == pytest.approx(prediction.logit - without.logit, abs=1e-4)


def test_the_whole_weight_on_either_side():
    head, readings = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 4.0])
    for weight, expected in ((0.0, [2.0, -1.0]), (1.0, [-3.0, 4.0]), (0.5, [-0.5, 1.5])):
        rule = DecisionRule(("no", "yes"), 1.0, 1.0, 0.0, 0.5, lm_reading_weight=weight)
        assert rule.logits(head, readings).tolist() == expected
        assert [prediction.logit for prediction in rule.predict(head, [False] * 2, readings=readings)] == expected


def test_a_reading_is_cut_where_the_number_is():
    """With the whole weight on the readings, they decide what the number does, whatever the calibration and prior."""
    readings = torch.linspace(-6, 6, 25)
    for prior in (None, 0.1):
        rule = DecisionRule(("no", "yes"), 1.0, 2.5, 0.7, 0.4, base_rate=0.5, lm_reading_weight=1.0)
        predictions = rule.predict(torch.zeros(25), [False] * 25, prior, readings)
        assert rule.labels_by_reading(readings, prior) == [prediction.label_id for prediction in predictions]
        assert 0 < sum(prediction.label_id for prediction in predictions) < 25
    head_alone = DecisionRule(("no", "yes"), 1.0, 2.5, 0.7, 0.4)  # whose calibration says nothing of the readings
    assert head_alone.labels_by_reading(torch.logit(torch.tensor([0.3, 0.39, 0.41, 0.6]))) == [0, 0, 1, 1]


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_outside_0_to_1_is_refused(weight):
    with pytest.raises(ValueError, match="`lm_reading_weight` must lie between 0 and 1"):
        ClsGenConfig(lm_reading_weight=weight)
