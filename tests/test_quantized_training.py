"""QLoRA with bitsandbytes, as far as a CPU goes: `make test-quantized`."""

import pytest
import torch
from conftest import PROMPT, SIDES
from peft import LoraConfig
from safetensors.torch import load_file
from test_training import arguments
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.sharding import gather_model
from clsgen.trainer_clsgen import ClsGenSFTTrainer


@pytest.mark.quantized
def test_qlora_keeps_the_head_in_float32_and_merges_without_rounding(tokenizer, task_rows, tmp_path):
    backbone = tmp_path / "backbone"
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**{**SIDES, **size}, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = ClsGenForCausalLMAndClassification.from_backbone(
        str(backbone),
        task=PROMPT,
        config_kwargs={"max_prompt_length": 400},
        quantization_config=quantization,
        device_map={"": "cpu"},
        dtype=torch.float32,
    )
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    trainer = ClsGenSFTTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=task_rows, peft_config=lora)
    trainer.train()
    layer = model.lm.model.layers[1].mlp.down_proj
    base = layer.base_layer
    assert type(base).__name__ == "Linear4bit"
    assert model.cls_head.weight.dtype == torch.float32
    assert model.cls_head.weight.abs().max() > 0

    identity = torch.eye(base.in_features, requires_grad=True)  # the quantised layer's own forward gives its weights
    expected = base(identity).T + 2 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    merged = gather_model(trainer.accelerator, trainer.model).merge_and_unload()
    assert not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(saved["lm.model.layers.1.mlp.down_proj.weight"], expected.detach(), rtol=0, atol=1e-5)
    assert torch.equal(saved["cls_head.weight"], model.cls_head.weight)
    assert (layer.lora_B["default"].weight != 0).any()
