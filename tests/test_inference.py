"""`classify` and `classify_and_explain`: the same numbers whatever the batch, and words that follow them."""

import json

import pytest
import torch


def test_probability_is_the_training_forwards(any_model, texts):
    predictions = any_model.classify(texts)
    for text, prediction in zip(texts, predictions, strict=True):
        ids = torch.tensor([any_model.encoder.encode(text).input_ids])
        logit = any_model(ids, labels=ids).cls_logits[0, -1]
        assert prediction.logit == pytest.approx(logit.item(), abs=1e-4)
        assert prediction.probability == pytest.approx(torch.sigmoid(logit).item(), abs=1e-4)


@pytest.mark.parametrize("mode", ["guided", "free"])
def test_explaining_does_not_change_the_number(any_model, texts, mode):
    classified = any_model.classify(texts)
    explained = any_model.classify_and_explain(texts, mode=mode, max_new_tokens=5)
    assert [p.probability for p in explained] == pytest.approx([p.probability for p in classified], abs=1e-4)
    assert [p.label for p in explained] == [p.label for p in classified]
    assert all(isinstance(p.explanation, str) for p in explained)


@pytest.mark.parametrize("mode", ["guided", "free"])
def test_batches_and_order_do_not_matter(any_model, texts, mode):
    together = any_model.classify_and_explain(texts, mode=mode, max_new_tokens=8)
    apart = [any_model.classify_and_explain(text, mode=mode, max_new_tokens=8) for text in texts]
    backwards = any_model.classify_and_explain(texts[::-1], mode=mode, max_new_tokens=8, batch_size=2)[::-1]
    for one, two, three in zip(together, apart, backwards, strict=True):
        assert one.explanation == two.explanation == three.explanation
        assert one.probability == pytest.approx(two.probability, abs=1e-4)
        assert one.probability == pytest.approx(three.probability, abs=1e-4)


def test_guided_explanations_are_plain_generation_behind_the_verdict_line(any_model, texts):
    prediction = any_model.classify_and_explain(texts[0], max_new_tokens=8)
    ids = any_model.encoder.encode(texts[0]).input_ids + any_model.encoder.encode_verdict(prediction.label_id)
    generated = any_model.generate(torch.tensor([ids]), max_new_tokens=8)[0, len(ids) :]
    expected = any_model.tokenizer.decode(generated, skip_special_tokens=True)
    assert prediction.explanation == any_model.encoder.prompt.strip_verdict_line(expected)


def test_free_explanations_are_plain_generation(any_model, texts):
    prediction = any_model.classify_and_explain(texts[1], mode="free", max_new_tokens=8)
    ids = any_model.encoder.encode(texts[1]).input_ids
    generated = any_model.generate(torch.tensor([ids]), max_new_tokens=8)[0, len(ids) :]
    expected = any_model.tokenizer.decode(generated, skip_special_tokens=True)
    assert prediction.explanation == any_model.encoder.prompt.strip_verdict_line(expected)
    assert prediction.lm_probability is None


def test_lm_probability_is_that_of_the_verdict_lines(model, texts):
    prediction = model.classify_and_explain(texts[0], max_new_tokens=2)
    scores = []
    prompt = model.encoder.encode(texts[0]).input_ids
    for label in (0, 1):
        verdict = model.encoder.encode_verdict(label)
        log_probabilities = model(torch.tensor([prompt + verdict])).logits[0].log_softmax(-1)
        scores.append(sum(log_probabilities[len(prompt) - 1 + i, token].item() for i, token in enumerate(verdict)))
    expected = torch.softmax(torch.tensor(scores), dim=0)[1].item()
    assert prediction.lm_probability == pytest.approx(expected, abs=1e-4)


def test_calibration_threshold_and_labels(model, texts):
    raw = model.classify(texts[0])
    model.config.calibration = {"temperature": 2.0, "bias": 0.5}
    model.config.pos_weight = 2.0
    model.config.threshold = 0.999
    prediction = model.classify(texts[0])
    logit = raw.logit - torch.tensor(2.0).log().item()
    assert prediction.logit == pytest.approx(logit)
    assert prediction.probability == pytest.approx(torch.sigmoid(torch.tensor(logit / 2 + 0.5)).item())
    assert (prediction.label_id, prediction.label) == (0, "not_supported")
    model.config.threshold = 0.0
    assert model.classify(texts[0]).label == "supported"
    assert json.loads(json.dumps(prediction.to_dict()))["threshold"] == 0.999
    assert "not_supported (probability" in str(prediction)


def test_str_in_one_out_list_in_list_out(model):
    assert model.classify("Findings: A.\n\nClaim: B.") == model.classify({"findings": "A.", "claim": "B."})
    assert model.classify([]) == []
    assert model.classify_and_explain([]) == []
    assert len(model.classify(["One text"])) == 1
    assert model.classify({"findings": "word " * 2000, "claim": "B."}).truncated


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=r"Text 1: The field 'text' is empty"):
        model.classify(["fine", " "])
    with pytest.raises(TypeError, match=r"Text 0: A text is a `str`"):
        model.classify([None])
    with pytest.raises(ValueError, match="'guided' or 'free'"):
        model.classify_and_explain("text", mode="verbose")
