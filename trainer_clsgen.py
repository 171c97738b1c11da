"""TRL's `SFTTrainer` with a second loss: `ClsGenSFTTrainer` trains the LM and the classification head together."""

import contextlib
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, PreTrainedTokenizerBase
from trl import SFTTrainer

from clsgen.classification_metrics import HEADLINE_METRICS, classification_metrics
from clsgen.epoch_sampler import EpochSampler
from clsgen.frozen_layers import FrozenLayers, first_trained_layer
from clsgen.losses_clsgen import IGNORE_INDEX, supervised_positions, verdict_loss, verdict_positions
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.prompting_clsgen import PromptEncoder
from clsgen.sft_config_clsgen import ClsGenSFTConfig
from clsgen.text_variants import with_variants
from clsgen.training_rows import (
    EPOCH,
    TOKEN_COLUMNS,
    DataCollatorForClsGen,
    encode_rows,
    hard_labels,
    label_counts,
    pack_rows,
    token_columns,
)

LOSSES = {"lm_loss": "lm_weight", "cls_loss": "cls_weight", "verdict_loss": "verdict_weight"}


def resolve_pos_weight(pos_weight: str, rows: Dataset, cls_bias: bool) -> float:
    """`"none"`, `"balanced"` (negatives / positives of the encoded `rows`) or a number, as a number.

    Raises:
        ValueError: for `"balanced"` with rows of one class only; for a weight other than 1 of a head without a bias,
            which cannot hold the constant that inference subtracts.
    """
    if pos_weight == "none":
        return 1.0
    if pos_weight == "balanced":
        counts = label_counts(rows)
        if not counts["positive"] or not counts["negative"]:
            raise ValueError(f"`pos_weight='balanced'` needs training rows of both classes, got {counts}.")
        weight = counts["negative"] / counts["positive"]
    else:
        weight = float(pos_weight)
    if weight != 1 and not cls_bias:
        raise ValueError(
            f"`pos_weight={pos_weight!r}` needs a head with a bias, to hold the log of the weight that inference "
            "subtracts: train with `cls_bias=True`, or with `pos_weight='none'`."
        )
    return weight


def encode_split(dataset: Dataset, encoder: PromptEncoder, args: ClsGenSFTConfig, name: str) -> Dataset:
    """[`encode_rows`] as the arguments want it; the `"train"` split gets its `verdict_texts`."""
    if name == "train":
        dataset = with_variants(
            dataset, encoder.prompt, args.verdict_texts, math.ceil(args.num_train_epochs), args.seed
        )
    return encode_rows(
        dataset,
        encoder,
        args.max_explanation_length,
        guided=args.explanation_mode == "guided",
        name=name,
        num_proc=args.dataset_num_proc,
        teach_verdicts=args.verdict_weight > 0,
    )


class ClsGenSFTTrainer(SFTTrainer):
    """Trains both heads of a [`ClsGenForCausalLMAndClassification`].

    Both losses are means over the whole optimizer step (all micro-batches and processes), so gradients don't depend on
    how a step is cut up. The head is float32 and trained in full, with or without PEFT.

    Args:
        model (`ClsGenForCausalLMAndClassification`): With its task's prompt in the config.
        args ([`ClsGenSFTConfig`], *optional*): Written into the model's config where it concerns inference.
        train_dataset, eval_dataset (`Dataset`): Rows of the task (its fields, `label`, `explanation`), or encoded ones
            (`input_ids`, `labels`, `cls_labels`).
        processing_class (`PreTrainedTokenizerBase`, *optional*): Defaults to the model's tokenizer.
        peft_config (`PeftConfig`, *optional*): For the backbone; prompt learning is refused.
        kwargs: As for [`SFTTrainer`]. `compute_metrics` takes the place of the metrics of the head's probabilities; of
            what it is given, [`ClsGenSFTTrainer.logits_and_labels`] makes logits and labels.

    Raises:
        TypeError: for another model class.
        ValueError: for arguments that two losses cannot have, a head that would not train, or rows that would vanish.
    """

    def __init__(
        self,
        model: ClsGenForCausalLMAndClassification,
        args: ClsGenSFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        clsgen = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(getattr(clsgen, "config", None), "model_type", None) != "clsgen":
            raise TypeError(
                f"`model` must be a ClsGenForCausalLMAndClassification, got {type(model).__name__}. Make one of "
                "a plain LLM with `ClsGenForCausalLMAndClassification.from_backbone(name_or_path, task=...)`."
            )
        args = args or ClsGenSFTConfig("clsgen-sft")
        if processing_class is not None:
            clsgen.tokenizer = processing_class
        config = clsgen.config
        config.lm_weight, config.cls_weight, config.cls_dropout = args.lm_weight, args.cls_weight, args.cls_dropout
        config.explanation_mode = args.explanation_mode
        config.max_prompt_length = args.max_length - args.max_explanation_length
        self._encoder = clsgen.encoder
        self._verdict_lines = [clsgen.encoder.encode_verdict(label) for label in (0, 1)]
        self._loss_totals = {"train": None, "eval": None}
        if peft_config is not None:
            _train_head_in_full(peft_config)

        pad_token_id = clsgen.generation_config.pad_token_id or 0
        # TRL insists on its own collator and truncation for these; both are ours (see `_prepare_dataset`).
        flags = {name: getattr(args, name) for name in ("packing", "padding_free")}
        args.packing = args.padding_free = False
        self._pack = flags["packing"]
        super().__init__(
            model=model,
            args=args,
            data_collator=DataCollatorForClsGen(
                pad_token_id,
                args.padding_side,
                padding_free=flags["packing"] or flags["padding_free"],
                pad_to_multiple_of=args.pad_to_multiple_of,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=clsgen.tokenizer,
            peft_config=peft_config,
            **kwargs,
        )
        for name, value in flags.items():
            setattr(args, name, value)
        head = [parameter for name, parameter in self.model.named_parameters() if "cls_head" in name]
        if args.cls_weight and not any(parameter.requires_grad for parameter in head):
            raise ValueError(
                'No weight of the head would train. A `PeftModel` of your own needs `modules_to_save=["cls_head"]` '
                "in its config; or pass that config as `peft_config` here, which adds it."
            )
        # QLoRA casts every trainable parameter to bfloat16.
        for parameter in head:
            parameter.data = parameter.data.float()
        if args.cache_frozen_layers and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "`cache_frozen_layers` needs whole weights in each process: train without it, or use DDP."
            )
        if self.accelerator.is_fsdp2:
            # Autocast casts where it should. FSDP2's own policy would cast the head and both losses too.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        config.pos_weight = resolve_pos_weight(args.pos_weight, self.train_dataset, config.cls_bias)
        self._frozen_layers = None
        if args.cache_frozen_layers:
            depth, folder = first_trained_layer(clsgen), frozen_layers_dir(args)
            self._frozen_layers = FrozenLayers(clsgen, depth, folder, clsgen.read_layers())
        self.loss_is_scaled_for_ga = True
        if self.compute_metrics is None:
            self.compute_metrics = self._classification_metrics

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if "input_ids" not in dataset.column_names:
            dataset = encode_split(dataset, self._encoder, args, dataset_name)
        missing = {"labels", "cls_labels", *(["verdicts"] if args.verdict_weight else [])} - set(dataset.column_names)
        if missing:
            raise ValueError(f"Encoded rows need the column(s) {sorted(missing)}; found {dataset.column_names}.")
        # Evaluation stays one row a text: its metrics need each decision once.
        if self._pack and dataset_name == "train":
            dataset = pack_rows(dataset, args.max_length, seed=args.seed)
        return dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", *TOKEN_COLUMNS, "seq_lengths", EPOCH]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        by_length = self.args.train_sampling_strategy == "group_by_length"
        epochs = train_dataset[EPOCH] if EPOCH in train_dataset.column_names else [None] * len(train_dataset)
        lengths = [len(ids) for ids in train_dataset["input_ids"]] if by_length else None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(
            list(epochs),
            seed,
            lambda: int(self.state.epoch),
            lengths,
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler:
        return SequentialSampler(eval_dataset)  # predictions come in row order, whatever training does

    def _get_dataloader(self, dataset, description, *args, is_training: bool = False, **kwargs):
        collator = self.data_collator
        if not is_training and isinstance(collator, DataCollatorForClsGen):
            self.data_collator = collator.padded()
        try:
            return super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        head = {id(parameter) for name, parameter in model.named_parameters() if "cls_head" in name}
        rate = self.args.cls_learning_rate
        for group in list(optimizer.param_groups):
            parameters = [parameter for parameter in group["params"] if id(parameter) in head]
            if parameters and rate is not None:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                optimizer.add_param_group({**group, "params": parameters, "lr": rate})
        # Sharded checkpoints tell groups by their parameters: one without any could not be loaded again.
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _clip_grad_norm(self, model):
        """Clips the head's gradients apart from all others; the norm that comes back is of all.

        The head reads states that are not normalised, so the norm of its gradients is far above that of the
        rest's where it errs: under one norm for all, such a row would teach the LM next to nothing.
        """
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            return super()._clip_grad_norm(model)  # these clip what they hold by themselves
        of_head = [parameter for name, parameter in model.named_parameters() if "cls_head" in name]
        known = {id(parameter) for parameter in of_head}
        others = [parameter for parameter in model.parameters() if id(parameter) not in known]
        clip = self.accelerator.clip_grad_norm_
        if self.accelerator.scaler is not None:  # fp16: gradients may be unscaled but once a step
            self.accelerator.unscale_gradients()
            clip = torch.nn.utils.clip_grad_norm_
        norms = [clip(group, self.args.max_grad_norm) for group in (of_head, others)]
        return torch.linalg.vector_norm(torch.stack([_whole(norm) for norm in norms]))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Labelled tokens, decisions and verdicts in the given batches of all processes, shape `(3,)`."""
        counts = torch.zeros(3, dtype=torch.long, device=device)
        for batch in batch_samples:
            counts += self._local_counts(batch).to(device)
        return self.accelerator.reduce(counts, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        counts = self._local_counts(inputs)
        of_step = counts if num_items_in_batch is None else num_items_in_batch
        kept = supervised_positions(inputs["labels"])
        verdicts, inputs = inputs.get("verdicts"), {n: value for n, value in inputs.items() if n != "verdicts"}
        teaches = self.args.verdict_weight > 0
        if teaches:
            said_at = verdict_positions(verdicts, self._verdict_lines)
            kept |= said_at
        with self._frozen_layers.replay(inputs) if self._frozen_layers else contextlib.nullcontext():
            outputs = model(
                **inputs,
                use_cache=False,
                logits_to_keep=kept,
                num_items_in_batch=of_step[0],
                num_decisions_in_batch=of_step[1],
            )
        loss = outputs.loss
        losses = [outputs.lm_loss, outputs.cls_loss]
        if teaches:
            shift = math.log(self.accelerator.unwrap_model(model).config.pos_weight)
            probabilities = torch.sigmoid(outputs.cls_logits[verdicts] - shift)
            losses.append(verdict_loss(outputs.logits[said_at[kept]], probabilities, self._verdict_lines, of_step[2]))
            loss = loss + self.args.verdict_weight * losses[-1].to(loss.device)
        sums = [value.detach().float().to(self.args.device) * n for value, n in zip(losses, of_step, strict=False)]
        totals = torch.stack([torch.stack(sums), counts[: len(sums)].to(sums[0])])
        previous = self._loss_totals[mode]
        self._loss_totals[mode] = totals if previous is None else previous + totals
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which gradients are averaged over
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def _local_counts(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Labelled tokens, decisions and verdicts of a batch, shape `(3,)`."""
        tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        decisions = (inputs["cls_labels"] != IGNORE_INDEX).sum()
        verdicts = inputs["verdicts"].sum() if "verdicts" in inputs else torch.zeros_like(tokens)
        return torch.stack([tokens, decisions, verdicts])

    def _pop_losses(self, mode: str) -> dict[str, float]:
        """The losses since the last call, means over tokens, decisions or verdicts of all processes."""
        if self._loss_totals[mode] is None:
            return {}
        sums, counts = self.accelerator.reduce(self._loss_totals[mode], "sum").tolist()
        self._loss_totals[mode] = None
        return {name: total / max(n, 1) for name, total, n in zip(LOSSES, sums, counts, strict=False)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._pop_losses("train"))
        super().log(logs, start_time)

    def _without_repeats(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Takes the labels off rows that stand twice, to give the last batch of each process the same size."""
        state, size = self.accelerator.gradient_state, len(inputs["input_ids"])
        if state.end_of_dataloader and state.remainder > 0:
            repeats = torch.arange(size) + self.accelerator.process_index * size >= state.remainder
            for name in token_columns(inputs):
                fill, _ = TOKEN_COLUMNS[name]
                inputs[name] = inputs[name].masked_fill(repeats[:, None].to(inputs[name].device), fill)
        return inputs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        inputs = self._without_repeats(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        is_decision = inputs["cls_labels"] != IGNORE_INDEX
        most = max(int(is_decision.sum(dim=-1).max()), 1)
        first = is_decision.long().argsort(dim=-1, descending=True, stable=True)[:, :most]
        return loss, outputs.cls_logits.gather(1, first), inputs["cls_labels"].gather(1, first)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._loss_totals["eval"] = None
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        losses = self._pop_losses("eval")
        if losses:
            loss = sum(getattr(self.args, LOSSES[name]) * value for name, value in losses.items())
            for name, value in {"loss": loss, **losses}.items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _classification_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = self.logits_and_labels(prediction)
        if not len(labels):
            return {}
        probabilities = 1 / (1 + np.exp(-logits))
        metrics = classification_metrics(labels, probabilities)
        return {name: metrics[name] for name in HEADLINE_METRICS}

    def logits_and_labels(self, prediction: Any) -> tuple[np.ndarray, np.ndarray]:
        """Logits (corrected for `pos_weight`, float64) and [`hard_labels`] of predicted decisions, in row order."""
        config = self.accelerator.unwrap_model(self.model).config
        labels = np.asarray(prediction.label_ids).ravel()
        logits = np.asarray(prediction.predictions, dtype=np.float64).ravel() - np.log(config.pos_weight)
        return logits[labels != IGNORE_INDEX], hard_labels(labels[labels != IGNORE_INDEX])

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes none: TRL's would tell of another model; `publishing/cards.py` makes one of what was measured."""

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            # `Trainer` looks whether the best checkpoint is there before it writes this one: with shards, not all
            # processes would see it, and some would wait for the others for ever when the best one is loaded.
            folder.mkdir(parents=True, exist_ok=True)
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:  # the last: `torch.save` on a full disk
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
            raise OSError(
                f"The checkpoint {folder} could not be written ({error}). Checkpoints before it are whole: make room, "
                "then run again with `--resume_from_checkpoint true`."
            ) from error


def frozen_layers_dir(args: ClsGenSFTConfig) -> Path:
    """Where `cache_frozen_layers` keeps its files."""
    return Path(args.output_dir) / "frozen_layers"


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _train_head_in_full(peft_config: PeftConfig) -> None:
    if peft_config.is_prompt_learning:
        raise ValueError("Prompt-learning adapters shift the decision token; use LoRA or another weight adapter.")
    modules = peft_config.modules_to_save or []
    peft_config.modules_to_save = list(dict.fromkeys([*modules, "cls_head"]))
