"""The trainers that `benchmarks.training` and `benchmarks.long_documents` set side by side, on encoded rows.

A builder takes a folder, encoded rows, `(task, data_dir, backbone)`, settings of its trainer, how many optimizer steps
there are, and how many rows one has.
"""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from clsgen import trainer_clsgen
from clsgen.backbones import resolve_backbone
from clsgen.losses_clsgen import IGNORE_INDEX
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.sft_config_clsgen import ClsGenSFTConfig
from clsgen.tasks import load_task
from clsgen.trainer_clsgen import ClsGenSFTTrainer
from clsgen.training_rows import encode_rows

MAX_LENGTH = 1024  # TRL's default: it cuts longer rows at their end, where the explanation is
MAX_EXPLANATION_LENGTH = 128
LORA_RANK = 16
FIRST_TRAINED_LAYER = 18  # as in recipes/trial_claims.yaml


def clsgen_model(task_name: str, data_dir: str | None, backbone: str) -> ClsGenForCausalLMAndClassification:
    """The task's model, whose head reads what the recipe of trial_claims reads."""
    task = load_task(task_name, data_dir)
    return ClsGenForCausalLMAndClassification.from_backbone(
        resolve_backbone(backbone),
        task=task.prompt,
        labels=task.labels,
        config_kwargs={
            "cls_reads": [(FIRST_TRAINED_LAYER, "mean"), (FIRST_TRAINED_LAYER, "decision")],
            "max_prompt_length": MAX_LENGTH - MAX_EXPLANATION_LENGTH,
        },
        dtype=torch.float32,
    )


def explained_rows(model: ClsGenForCausalLMAndClassification, task_name: str, data_dir: str | None, count: int):
    """`count` encoded training rows that have a label and an explanation, in random order."""
    rows = load_task(task_name, data_dir).splits["train"].shuffle(seed=0)
    rows = rows.filter(lambda row: row["label"] is not None and bool(row["explanation"])).select(range(count))
    return encode_rows(rows, model.encoder, MAX_EXPLANATION_LENGTH, guided=True)


def lora(first_layer: int = 0, num_layers: int | None = None, task_type: str = "CAUSAL_LM") -> LoraConfig:
    """LoRA on all linear layers, from `first_layer` on."""
    return LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(first_layer, num_layers)) if first_layer else None,
        task_type=task_type,
    )


def training_arguments(folder: str, steps: int, rows_per_step: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What all sides have in common, and their own settings over it."""
    batch_size = min(settings.get("per_device_train_batch_size", 8), rows_per_step)
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **settings,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": rows_per_step // batch_size,
    }


def build_clsgen(folder: str, rows: list[dict], model_arguments: tuple, settings: dict, steps: int, per_step: int):
    """Our trainer; `settings` may have `first_layer`, below which nothing trains."""
    model = clsgen_model(*model_arguments)
    settings = dict(settings)
    adapter = lora(settings.pop("first_layer", 0), model.config.text_config.num_hidden_layers)
    arguments = ClsGenSFTConfig(
        max_length=MAX_LENGTH,
        max_explanation_length=MAX_EXPLANATION_LENGTH,
        **training_arguments(folder, steps, per_step, settings),
    )
    return ClsGenSFTTrainer(model, arguments, Dataset.from_list(rows), peft_config=adapter)


def build_whole_lm_head(*arguments: Any) -> ClsGenSFTTrainer:
    """[`build_clsgen`] with the LM head at every position, for as long as the process lives."""
    trainer_clsgen.supervised_positions = lambda labels: torch.ones_like(labels, dtype=torch.bool)
    return build_clsgen(*arguments)


def build_trl(folder: str, rows: list[dict], model_arguments: tuple, settings: dict, steps: int, per_step: int):
    """TRL's trainer on the same tokens and the same labels."""
    backbone = resolve_backbone(model_arguments[-1])
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    arguments = SFTConfig(**{"max_length": MAX_LENGTH, **training_arguments(folder, steps, per_step, settings)})
    dataset = Dataset.from_list(rows).select_columns(["input_ids", "labels"])
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    return SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora())


def build_classifier(folder: str, rows: list[dict], model_arguments: tuple, settings: dict, steps: int, per_step: int):
    """`Trainer` with transformers' own classifier, on the prompts."""
    backbone = resolve_backbone(model_arguments[-1])
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=2, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    prompts = [prompt_of(row) for row in rows]
    return Trainer(
        get_peft_model(model, lora(task_type="SEQ_CLS")),
        TrainingArguments(**training_arguments(folder, steps, per_step, settings)),
        train_dataset=Dataset.from_list(prompts),
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def prompt_of(row: dict[str, Any]) -> dict[str, Any]:
    """An encoded row up to its decision token, and its label."""
    (decision,) = (i for i, label in enumerate(row["cls_labels"]) if label != IGNORE_INDEX)
    return {"input_ids": row["input_ids"][: decision + 1], "labels": int(row["cls_labels"][decision])}
