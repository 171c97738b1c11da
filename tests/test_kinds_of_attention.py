"""Backbones whose attention is of another kind: the same answers alone and in batches."""

import pytest
from conftest import build
from transformers import AutoModelForCausalLM, GPTNeoConfig, Lfm2Config, MptConfig, set_seed


@pytest.mark.parametrize("family", ["mpt", "gpt_neo"])
def test_backbones_that_count_places_in_the_cache_answer_alike_in_batches(family, texts, tmp_path, tokenizer):
    config = {
        "mpt": MptConfig(d_model=32, n_heads=4, n_layers=4, expansion_ratio=2, max_seq_len=2048, vocab_size=300),
        "gpt_neo": GPTNeoConfig(
            vocab_size=300, hidden_size=32, num_layers=4, num_heads=4, window_size=16, max_position_embeddings=2048,
            attention_types=[[["global", "local"], 2]],
        ),
    }[family]  # fmt: skip
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = build(str(tmp_path))
    alone = [model.classify(text).logit for text in texts]
    assert [prediction.logit for prediction in model.classify(texts)] == pytest.approx(alone, abs=1e-5)


def test_rows_of_a_backbone_with_linear_attention_stay_in_their_batch(texts, tmp_path, tokenizer):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = Lfm2Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2,
        eos_token_id=257, bos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = build(str(tmp_path))
    together = model.classify_and_explain(texts, max_new_tokens=4)
    assert [p.explanation for p in together] == [
        model.classify_and_explain(text, max_new_tokens=4).explanation for text in texts
    ]
