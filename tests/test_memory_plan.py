"""The formulas of docs/scaling.md against a model without weights and what torch counts; the document's tables."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.memory_plan import (
    DOCUMENT,
    LLAMA_8B,
    RECIPE,
    fill,
    flops,
    layer_activations,
    lora_parameters,
    parameters,
    plan,
)


def test_parameters_are_those_of_the_model():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA_8B)
    counted = parameters(LLAMA_8B)
    assert counted["all"] == sum(p.numel() for p in model.parameters()) == 8_030_261_248
    assert counted["layer"] == sum(p.numel() for p in model.model.layers[0].parameters())
    with torch.device("meta"):
        model = get_peft_model(model, LoraConfig(r=RECIPE["lora_r"], target_modules="all-linear"))
    assert lora_parameters(LLAMA_8B, RECIPE["lora_r"]) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("lora", [True, False])
def test_activations_are_what_autograd_keeps(lora):
    tokens, dtype = 2048, torch.bfloat16 if lora else torch.float32
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=448, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if lora:
        get_peft_model(model, LoraConfig(r=1, target_modules="all-linear"))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    hidden = torch.zeros(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    positions = torch.arange(tokens)[None]
    kept = {}

    def keep(tensor):
        if tensor.dim() > 1 and tokens in tensor.shape and tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embedded = model.model.rotary_emb(hidden, positions)
        output = model.model.layers[0](hidden, position_embeddings=embedded, position_ids=positions)
    assert output.shape == hidden.shape
    assert sum(kept.values()) / tokens == pytest.approx(layer_activations(config, lora), rel=0.1)


def test_flops_are_those_of_the_matrix_multiplications():
    tokens = 64
    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    # Eager attention does not leave out the half that a causal mask hides.
    assert counter.get_total_flops() == flops(config, tokens, attention=2)


def test_the_document_shows_what_the_formulas_give():
    document = DOCUMENT.read_text(encoding="utf-8")
    assert fill(document, plan()) == document
    assert document.count("<!-- end -->") == len(plan())
    assert max(plan()["memory"]["sum"]) < 80
