"""Linear layers of a float32 model on a CPU: oneDNN's matrix products, faster than those of `nn.functional.linear`."""

from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F

_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def use_onednn_in_inference_mode(module: nn.Module) -> None:
    """Lets the linear layers of `module` go through oneDNN on a CPU.

    Only under `torch.inference_mode()`, as CLSGen's own methods run: training and everybody's `forward` and `generate`
    stay as they are, to the last bit. Layers that are quantised, sharded or compiled stay so too. The layers' class
    and weights are not changed, so that adapters, quantisers and `save_pretrained` find what they know.

    Args:
        module (`nn.Module`): Its layers of exactly the class `nn.Linear` are meant.
    """
    if _ONEDNN_LINEAR is not None:
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.forward = MethodType(forward, layer)  # by this name it is looked up when a copy is unpickled


def forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and _suits_onednn(input, self.weight):
        return _ONEDNN_LINEAR(input, self.weight, self.bias, "none", [], "")
    return F.linear(input, self.weight, self.bias)


def _suits_onednn(input: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and type(weight) is nn.Parameter  # quantised and sharded weights are of classes of their own
        and input.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )
