"""Linear layers by oneDNN: whose they are, when they are used, and what they compute."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clsgen import linear_clsgen
from clsgen.linear_clsgen import use_onednn_in_inference_mode


@pytest.fixture
def products(monkeypatch):
    """Shapes of what went through oneDNN."""
    found, compute = [], linear_clsgen._ONEDNN_LINEAR
    monkeypatch.setattr(
        linear_clsgen, "_ONEDNN_LINEAR", lambda input, *args: found.append(tuple(input.shape)) or compute(input, *args)
    )
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (2, 1, 24), (0, 24)])
def test_computes_what_torch_computes(bias, shape, products):
    layer, input = nn.Linear(24, 7, bias=bias), torch.randn(shape)
    use_onednn_in_inference_mode(layer)
    with torch.inference_mode():
        torch.testing.assert_close(layer(input), F.linear(input, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
        part = torch.randn(2, 9, 24)[:, -1:]
        torch.testing.assert_close(layer(part), F.linear(part, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert products == ([shape] if 0 not in shape else []) + [(2, 1, 24)]


def test_nothing_changes_outside_of_inference_mode(products):
    layer, input = nn.Linear(24, 7), torch.randn(3, 24)
    plain = copy.deepcopy(layer)
    use_onednn_in_inference_mode(layer)
    layer(input).sum().backward()
    plain(input).sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    with torch.no_grad():
        assert torch.equal(layer(input), plain(input))
    assert products == []


def test_other_precisions_go_by_torch(products):
    layer, input = nn.Linear(24, 7), torch.randn(3, 24)
    use_onednn_in_inference_mode(layer)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(input).dtype == torch.bfloat16
    layer.bfloat16()
    with torch.inference_mode():
        assert layer(input.bfloat16()).dtype == torch.bfloat16
    assert products == []


def test_a_layer_goes_through_pickle():
    layer, input = nn.Linear(24, 7), torch.randn(3, 24)
    use_onednn_in_inference_mode(layer)
    restored = pickle.loads(pickle.dumps(layer))
    with torch.inference_mode():
        torch.testing.assert_close(restored(input), layer(input), rtol=1e-5, atol=1e-5)


def test_copies_have_weights_of_their_own():
    layer, input = nn.Linear(24, 7), torch.randn(3, 24)
    use_onednn_in_inference_mode(layer)
    other = copy.deepcopy(layer)
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    with torch.inference_mode():
        assert not other(input).any()
        assert layer(input).all()


def test_quantised_layers_are_left_alone(products):
    model = nn.Sequential(nn.Linear(24, 7))
    use_onednn_in_inference_mode(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.inference_mode():
        assert quantised(torch.randn(3, 24)).shape == (3, 7)
    assert products == []


def test_the_models_own_methods_use_it(model, texts, products):
    model.classify(texts[1])
    assert products
    products.clear()
    ids = torch.tensor([model.encoder.encode(texts[1]).input_ids])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert products == []
