"""Training in several processes, or on quantised weights: checks before it, and the model in one piece after it."""

import copy
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from transformers.distributed.fsdp import is_fsdp_enabled
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig

from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.sft_config_clsgen import ClsGenSFTConfig


def check_launch(
    warm_start: bool,
    training: ClsGenSFTConfig,
    model_arguments: ModelConfig,
    lm_reading_weight: float | None = None,
) -> None:
    """Refuses what this machine or several processes would do wrong without a word.

    Args:
        warm_start (`bool`): Whether the head starts from a linear probe.
        training ([`ClsGenSFTConfig`]), model_arguments (`ModelConfig`): Of the run.
        lm_reading_weight (`float`, *optional*): See [`ClsGenConfig`]; 0 without.

    Raises:
        ValueError: which says what to change.
    """
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and training.world_size == 1:
        raise ValueError("Launched as several processes, but there is no GPU: `--use_cpu true` trains on CPUs.")
    if warm_start and (is_fsdp_enabled() or is_deepspeed_zero3_enabled()):
        raise ValueError(
            "The probe needs whole weights in each process; ZeRO-3 and `fsdp_cpu_ram_efficient_loading: true` don't "
            "load them. Train without it (`--warm_start false`), or with recipes/accelerate/fsdp2.yaml as it is."
        )
    if is_deepspeed_zero3_enabled() and (training.bf16 or training.fp16):
        raise ValueError(
            "DeepSpeed's ZeRO-3 wants one dtype of all trained weights, and the head is float32: add `--bf16 false "
            "--dtype float32`, or launch with recipes/accelerate/fsdp2.yaml, which trains in bfloat16."
        )
    if lm_reading_weight and (fsdp or is_deepspeed_zero3_enabled()):
        raise ValueError(
            "The LM's reading needs whole weights in each process. Train with `--lm_reading_weight 0`; "
            "`calibrate_clsgen.py --lm_reading_weight` gives it to the finished checkpoint."
        )
    if fsdp and training.num_train_epochs == 0 and training.max_steps <= 0:
        raise ValueError("A probe alone trains no weights that could be sharded: launch it with ddp.yaml.")
    if model_arguments.load_in_4bit or model_arguments.load_in_8bit:
        if fsdp or training.deepspeed_plugin is not None:
            raise ValueError("QLoRA keeps a whole copy in each process: launch it with recipes/accelerate/ddp.yaml.")
        if training.device.type == "cpu":
            raise ValueError(
                "Quantised training needs a GPU. On CPUs, bitsandbytes packs weights for inference and, on some, gets "
                "others back when it unpacks them (seen with 0.50.2): the checkpoint would not be what was trained."
            )


def gather_model(
    accelerator: Accelerator, trained: torch.nn.Module
) -> ClsGenForCausalLMAndClassification | PeftModel | None:
    """The trained model in one piece and in its own precision, so that an adapter can be merged and weights written.

    All processes have to call this: shards (FSDP, ZeRO-3) are gathered. 4-bit and 8-bit weights are de-quantised:
    merging into them would round what was trained, and other probabilities than the calibrated ones would come out.

    Args:
        accelerator (`Accelerator`): That prepared the model.
        trained (`torch.nn.Module`): As the accelerator returned it, still with its adapter if it has one.

    Returns:
        The model itself where its weights are whole already. Else a copy on the main process, and `None` on others.
    """
    model = accelerator.unwrap_model(trained)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if not sharded and not getattr(base, "is_quantized", False):
        return model
    weights = accelerator.get_state_dict(trained) if sharded else _dequantized_weights(model)
    if not accelerator.is_main_process:
        return None
    unset_hf_deepspeed_config()  # what is built or loaded from here on is whole
    config = copy.deepcopy(base.config)
    for each in (config, config.text_config):
        vars(each).pop("quantization_config", None)
    with torch.device("meta"):  # takes the gathered weights; computed buffers are no part of a checkpoint
        whole = plain = ClsGenForCausalLMAndClassification(config)
        if isinstance(model, PeftModel):
            whole = get_peft_model(plain, model.peft_config[model.active_adapter], autocast_adapter_dtype=False)
    whole.load_state_dict({name: weights[name] for name in whole.state_dict()}, assign=True)
    plain.lm.tie_weights()
    plain.tokenizer, plain.generation_config = base.tokenizer, base.generation_config
    return whole.eval()


def _dequantized_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = model.state_dict()
    for name, module in model.named_modules():
        if "weight" in dict(module.named_parameters(recurse=False)):
            weights[f"{name}.weight"] = dequantize_module_weight(module).detach().cpu()  # too much for small GPUs
    return weights
