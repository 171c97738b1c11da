"""Backbones whose attention is of another kind: the same answers alone and in batches."""

import pytest
from conftest import SPECIAL, TALKATIVE, VOCABULARY, build, let_labels_mix
from transformers import AutoModelForCausalLM, GPTNeoConfig, Lfm2Config, MptConfig, set_seed

SIZES = {"vocab_size": VOCABULARY, **SPECIAL, **TALKATIVE}
CONFIGS = {
    # Two that count places in the cache, and one whose rows stay in their batch: its linear attention has a state.
    "mpt": MptConfig(d_model=32, n_heads=4, n_layers=4, expansion_ratio=2, max_seq_len=2048, **SIZES),
    "gpt_neo": GPTNeoConfig(
        hidden_size=32, num_layers=4, num_heads=4, window_size=16, max_position_embeddings=2048,
        attention_types=[[["global", "local"], 2]], **SIZES,
    ),
    "lfm2": Lfm2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["conv", "full_attention"] * 2, **SIZES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("family", CONFIGS)
def test_batches_answer_as_texts_do_alone(family, scale, texts, tmp_path, tokenizer):
    set_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = build(str(tmp_path), explanation_guidance_scale=scale)
    let_labels_mix(model, texts)
    together = model.classify_and_explain(texts, max_new_tokens=8)
    alone = [model.classify_and_explain(text, max_new_tokens=8) for text in texts]
    assert all(prediction.explanation for prediction in alone)
    assert [p.explanation for p in together] == [p.explanation for p in alone]
    assert [p.logit for p in together] == pytest.approx([p.logit for p in alone], abs=1e-4)
    assert [p.logit for p in model.classify(texts)] == pytest.approx([p.logit for p in alone], abs=1e-4)
