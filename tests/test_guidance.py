"""`explanation_guidance_scale`: guided words move away from what the other verdict line would make likely."""

import pytest
import torch


def test_guidance_extrapolates_from_the_other_verdict_to_this_one(any_model, texts):
    any_model.generation_config.eos_token_id = None
    plain = any_model.classify_and_explain(texts, max_new_tokens=8)
    any_model.config.explanation_guidance_scale = scale = 300.0  # the verdict moves a random model's words little
    encoder = any_model.encoder

    def expected(text, label):
        prompt, written = encoder.encode(text).input_ids, []
        lines = [prompt + encoder.encode_verdict(each) for each in (label, 1 - label)]
        for _ in range(8):
            with torch.inference_mode():
                this, other = (
                    any_model(torch.tensor([line + written])).logits[0, -1].log_softmax(dim=-1) for line in lines
                )
            written.append((other + scale * (this - other)).argmax().item())
        return encoder.prompt.split_verdict_line(any_model.tokenizer.decode(written, skip_special_tokens=True))[1]

    guided = any_model.classify_and_explain(texts, max_new_tokens=8)
    assert [p.explanation for p in guided] == [
        expected(text, p.label_id) for text, p in zip(texts, guided, strict=True)
    ]
    assert [p.explanation for p in guided] != [p.explanation for p in plain]
    assert [p.lm_probability for p in guided] == pytest.approx([p.lm_probability for p in plain], abs=1e-5)
    for label in (0, 1):
        assert any_model.explain(texts[1], label, max_new_tokens=8).explanation == expected(texts[1], label)
    for any_model.config.threshold in (0.01, 0.99, 0.5):
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


def test_guidance_leaves_beams_alone(model, texts):
    beams = model.classify_and_explain(texts, num_beams=2, max_new_tokens=6)
    model.config.explanation_guidance_scale = 2.0
    assert model.classify_and_explain(texts, num_beams=2, max_new_tokens=6) == beams
