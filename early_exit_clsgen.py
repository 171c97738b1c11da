"""The lower part of a decoder: all that a head in the middle needs."""

import copy

from torch import nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

_FINAL_NORMS = {"norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm"}


def decoder_up_to(decoder: nn.Module, depth: int) -> nn.Module:
    """`decoder` without its layers from `depth` on and without its final norm; all weights are shared.

    A copy, not a change: threads that run the whole decoder meanwhile don't notice. A decoder that is built in an
    unknown way, or whose `forward` was replaced (offloading hooks), comes back whole: slower, and right as well.

    Args:
        decoder (`nn.Module`): As `get_decoder()` gives it.
        depth (`int`): Index into `hidden_states` of the last one needed.
    """
    names = [name for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)]
    norms = _FINAL_NORMS & dict(decoder.named_children()).keys()
    if len(names) != 1 or len(norms) != 1 or "forward" in vars(decoder):
        return decoder
    layers = getattr(decoder, names[0])
    if not 0 < depth < len(layers):
        return decoder
    # Before the copy: hooks that record hidden states would otherwise be put on the shared layers twice.
    maybe_install_capturing_hooks(decoder)
    lower = copy.copy(decoder)
    lower.__dict__["_modules"] = {**decoder._modules, names[0]: layers[:depth], norms.pop(): nn.Identity()}
    return lower
