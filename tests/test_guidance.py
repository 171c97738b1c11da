"""`explanation_guidance_scale`: guided words move away from what the other verdict line would make likely."""

import math

import pytest
import torch
from conftest import let_labels_mix

from clsgen.explaining_clsgen import VerdictGuidance


def words_by_plain_passes(model, text, label, scale, tokens, stop=None, told=None):
    """Ids behind a verdict line, uncached, and how much likelier each one made them behind this line (log)."""
    prompt, written, ratios, held_back = model.encoder.encode(text).input_ids, [], [0.0], False
    lines = [prompt + model.encoder.encode_verdict(each) for each in (label, 1 - label)]
    told = math.log(VerdictGuidance.TOLD) if told is None else told
    no_words = [*model.encoder.control_ids, *([] if stop is None else [stop])]
    while len(written) < tokens and stop not in written:
        with torch.inference_mode():
            this, other = (model(torch.tensor([line + written])).logits[0, -1].log_softmax(dim=-1) for line in lines)
        scores = other + scale * (this - other)
        if ratios[-1] < told and not held_back:
            held_back = scores.argmax().item() == stop
            scores[no_words] = -math.inf
        written.append(scores.argmax().item())
        ratios.append(ratios[-1] + (this - other)[written[-1]].item())
    return written, ratios


def test_guidance_extrapolates_from_the_other_verdict_to_this_one(any_model, texts):
    any_model.generation_config.eos_token_id = None
    let_labels_mix(any_model, texts)
    mixing = any_model.config.threshold
    plain = any_model.classify_and_explain(texts, max_new_tokens=8)
    any_model.config.explanation_guidance_scale = scale = 300.0  # the verdict moves a random model's words little

    def expected(text, label):
        written, _ = words_by_plain_passes(any_model, text, label, scale, tokens=8)
        written = any_model.tokenizer.decode(written, skip_special_tokens=True)
        return any_model.encoder.prompt.split_verdict_line(written)[1]

    guided = any_model.classify_and_explain(texts, max_new_tokens=8)
    assert [p.explanation for p in guided] == [
        expected(text, p.label_id) for text, p in zip(texts, guided, strict=True)
    ]
    assert [p.explanation for p in guided] != [p.explanation for p in plain]
    assert [p.lm_probability for p in guided] == pytest.approx([p.lm_probability for p in plain], abs=1e-5)
    for label in (0, 1):
        assert any_model.explain(texts[1], label, max_new_tokens=8).explanation == expected(texts[1], label)
    for any_model.config.threshold in (0.01, 0.99, mixing):
        free = any_model.classify_and_explain(texts, mode="free", max_new_tokens=8)
        for text, prediction in zip(texts, free, strict=True):
            own = int(prediction.lm_probability >= any_model.config.threshold)
            assert prediction.explanation == expected(text, own)
            assert prediction.explained_label == any_model.config.label_names[own]
    for mode, predictions in (("guided", guided), ("free", free)):
        first, *_, last = any_model.stream(texts[0], mode=mode, max_new_tokens=8)
        assert last.explanation == predictions[0].explanation
        assert first.explained_label == last.explained_label == predictions[0].explained_label


def test_guidance_goes_on_when_rows_have_ended(model, texts):
    model.config.explanation_guidance_scale = 3.0
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 40, "no_repeat_ngram_size": 2}
    endless = [model.classify_and_explain(text, **options).explanation for text in texts]
    stop = model.tokenizer(max(set("".join(endless)), key=lambda c: len({row.find(c) for row in endless})))
    model.generation_config.eos_token_id = stop["input_ids"][:1]
    together = model.classify_and_explain(texts * 2, **options)
    apart = [model.classify_and_explain(text, **options) for text in texts * 2]
    assert [p.explanation for p in together] == [p.explanation for p in apart]
    assert len({len(p.explanation) for p in apart}) > 1


def test_an_explanation_does_not_end_before_it_has_told_its_verdict(model, texts, monkeypatch):
    model.config.explanation_guidance_scale = scale = 300.0
    text, label, tokens = texts[0], 1, 40
    endless, ratios = words_by_plain_passes(model, text, label, scale, tokens, told=math.inf)
    place = next(i for i in range(5, 20) if endless[i] not in endless[:i] and ratios[i] > max(ratios[:i]))
    stop = model.generation_config.eos_token_id = endless[place]
    lengths = []
    for told in (ratios[place] - 1e-4, ratios[place] + 1e-4, math.inf):  # told already, nearly, never
        monkeypatch.setattr(VerdictGuidance, "TOLD", math.exp(told))
        expected, _ = words_by_plain_passes(model, text, label, scale, tokens, stop, told)
        lengths.append(len(expected))
        prediction = model.explain(text, label, max_new_tokens=tokens)
        assert prediction.explanation == model.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert lengths[0] == place + 1
    assert min(lengths[1:]) > place + 1


def test_an_end_that_is_held_back_is_not_replaced_by_another_control_token(model, texts):
    model.config.explanation_guidance_scale = 2.0
    model.get_output_embeddings().weight.data.zero_()  # each word is as likely as the next, behind either line
    favourites = [model.generation_config.eos_token_id, *model.encoder.control_ids]
    favourites = torch.tensor([i for ids in favourites for i in (ids if isinstance(ids, list) else [ids])])
    assert len(favourites.unique()) > 2
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(model.config.text_config.vocab_size))
    model.get_output_embeddings().bias.data[favourites] = 9.0
    (prediction,) = model.classify_and_explain(texts[:1], max_new_tokens=5)
    assert prediction.explanation_cut
    assert len(model.tokenizer(prediction.explanation)["input_ids"]) == 5


def test_guidance_leaves_beams_alone(model, texts):
    beams = model.classify_and_explain(texts, num_beams=2, max_new_tokens=6)
    model.config.explanation_guidance_scale = 2.0
    assert model.classify_and_explain(texts, num_beams=2, max_new_tokens=6) == beams
