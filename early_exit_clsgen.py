"""The lower part of a decoder: all that a head in the middle needs."""

import copy

from torch import nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

_FINAL_NORMS = {"norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm"}


def layer_stack(decoder: nn.Module) -> nn.ModuleList | None:
    """The decoder's layers, where it is built in the usual way: one list of layers and one final norm."""
    children = dict(decoder.named_children())
    stacks = [child for child in children.values() if isinstance(child, nn.ModuleList)]
    return stacks[0] if len(stacks) == len(_FINAL_NORMS & children.keys()) == 1 else None


def decoder_up_to(decoder: nn.Module, depth: int) -> nn.Module:
    """`decoder` without its layers from `depth` on and without its final norm; all weights are shared.

    A copy, not a change: threads that run the whole decoder meanwhile don't notice. A decoder that is built in an
    unknown way, or whose `forward` was replaced (offloading hooks), comes back whole: slower, and right as well.

    Args:
        decoder (`nn.Module`): As `get_decoder()` gives it.
        depth (`int`): Index into `hidden_states` of the last one needed.
    """
    layers = layer_stack(decoder)
    if layers is None or not 0 < depth < len(layers) or "forward" in vars(decoder):
        return decoder
    # Before the copy: hooks that record hidden states would otherwise be put on the shared layers twice.
    maybe_install_capturing_hooks(decoder)
    lower = copy.copy(decoder)
    lower.__dict__["_modules"] = {
        name: layers[:depth] if child is layers else nn.Identity() if name in _FINAL_NORMS else child
        for name, child in decoder._modules.items()
    }
    return lower
