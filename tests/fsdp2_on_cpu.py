"""Runs `train_sft_cls.py` with accelerate's FSDP on CPUs.

torch's FSDP2 runs on CPUs with gloo, but accelerate takes `distributed_type: FSDP` for accelerators only: on CPUs its
state says MULTI_CPU and drops the FSDP plugin without a word. This puts it back; all else is accelerate's own.
"""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def _init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = _init_with_fsdp

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from clsgen.train_sft_cls import main

    main()
    assert not torch.distributed.is_initialized()
