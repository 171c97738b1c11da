"""Kept states of frozen layers: the same training without computing them again, and nothing stale or half-written."""

import pytest
import torch
from conftest import CONFIGS, build
from peft import LoraConfig
from test_training import arguments, moved, weights

from clsgen.early_exit_clsgen import layer_stack
from clsgen.frozen_layers import FrozenLayers, first_trained_layer
from clsgen.trainer_clsgen import ClsGenSFTTrainer
from clsgen.training_rows import encode_rows
from clsgen.warm_start import warm_start

FIRST = 2  # the head of `build` reads layer 2, which is kept, and layer 3, which trains


def lora():
    return LoraConfig(
        r=2, target_modules=["q_proj", "down_proj", "c_attn"], layers_to_transform=[2, 3], init_lora_weights="gaussian"
    )


def losses(folder, backbone, rows, **kwargs):
    """The loss after each step of two epochs, and the model."""
    torch.manual_seed(0)
    model = build(backbone)
    settings = {"num_train_epochs": 2, "max_steps": -1, "seed": 3, **kwargs}
    trainer = ClsGenSFTTrainer(model, arguments(folder, **settings), train_dataset=rows, peft_config=lora())
    before = weights(trainer.model, "lora")
    trainer.train()
    assert max(moved(before, weights(trainer.model, "lora")).values()) > 0
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


@pytest.mark.parametrize("family", CONFIGS)
def test_training_is_the_same(backbones, task_rows, tmp_path, family):
    expected, _ = losses(tmp_path / "without", backbones[family], task_rows)
    found, model = losses(tmp_path / "with", backbones[family], task_rows, cache_frozen_layers=True)
    assert found == pytest.approx(expected, rel=1e-4)
    assert all("forward" not in vars(layer) for layer in layer_stack(model.get_decoder()))


@pytest.mark.parametrize(
    "shape", [{"padding_side": "left"}, {"padding_free": True}, {"packing": True}, {"activation_checkpointing": True}]
)
def test_training_is_the_same_in_every_shape_of_batch(backbones, task_rows, tmp_path, shape):
    expected, _ = losses(tmp_path / "without", backbones["llama"], task_rows, **shape)
    found, _ = losses(tmp_path / "with", backbones["llama"], task_rows, cache_frozen_layers=True, **shape)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_row_goes_through_the_frozen_layers_once(backbones, task_rows, tmp_path):
    model = build(backbones["llama"])
    rows = encode_rows(task_rows, model.encoder, 60, guided=True)
    lowest, computed = layer_stack(model.get_decoder())[0], []
    lowest.self_attn.register_forward_hook(lambda module, args, kwargs, output: computed.append(1), with_kwargs=True)
    reads = [(2, "mean"), (2, "decision")]
    plain = warm_start(model, rows, reads)
    weight = model.cls_head.weight.clone()
    frozen = FrozenLayers(model, FIRST, tmp_path / "frozen_layers", model.read_layers())
    kept = warm_start(model, rows, reads, frozen_layers=frozen)
    assert kept.auroc == pytest.approx(plain.auroc)
    torch.testing.assert_close(model.cls_head.weight, weight, atol=1e-3, rtol=1e-3)
    files = set(tmp_path.rglob("*.safetensors"))
    computed.clear()
    labelled = rows.filter(lambda row: max(row["cls_labels"]) >= 0)
    args = arguments(tmp_path, cache_frozen_layers=True, num_train_epochs=2, max_steps=-1)
    ClsGenSFTTrainer(model, args, train_dataset=labelled, peft_config=lora()).train()
    assert computed == []
    assert set(tmp_path.rglob("*.safetensors")) == files
    assert len(files) == len(labelled)


def test_other_weights_find_nothing(model, tmp_path):
    row = [[3, 4, 5]]
    before = FrozenLayers(model, FIRST, tmp_path).states(row)[0][FIRST]
    with torch.no_grad():
        layer_stack(model.get_decoder())[1].mlp.up_proj.weight[0, 0] += 1
    after = FrozenLayers(model, FIRST, tmp_path).states(row)[0][FIRST]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model(torch.tensor(row), output_hidden_states=True).hidden_states[FIRST][0])


def test_the_first_trained_layer_is_found_and_nothing_frozen_is_refused(model, tmp_path):
    assert first_trained_layer(model) == 0
    with pytest.raises(ValueError, match="lora_first_layer"):
        FrozenLayers(model, first_trained_layer(model), tmp_path)
    model.requires_grad_(False)
    layer_stack(model.get_decoder())[3].requires_grad_(True)
    assert first_trained_layer(model) == 3


def test_a_full_disk_is_said_and_leaves_nothing(model, tmp_path):
    frozen = FrozenLayers(model, FIRST, tmp_path / "file" / "folder")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="train without `cache_frozen_layers`"):
        frozen.states([[3, 4, 5]])
    assert list(tmp_path.rglob("*.safetensors")) == []
