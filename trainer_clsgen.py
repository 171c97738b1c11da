"""TRL's `SFTTrainer` with a second loss: `ClsGenSFTTrainer` trains the LM and the classification head together."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from clsgen.classification_metrics import classification_metrics
from clsgen.frozen_layers import FrozenLayers, first_trained_layer
from clsgen.losses_clsgen import IGNORE_INDEX, supervised_positions, verdict_loss
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.training_rows import DataCollatorForClsGen, encode_rows, hard_labels, label_counts, pack_rows

LOSSES = {"lm_loss": "lm_weight", "cls_loss": "cls_weight", "verdict_loss": "verdict_weight"}
EVALUATION_METRICS = ("auroc", "average_precision", "f1", "accuracy", "brier", "ece")
CHECKPOINT_COMPLETE = "trainer_state.json"  # the last file that `Trainer` writes into a checkpoint


@dataclass
class ClsGenSFTConfig(SFTConfig):
    """Arguments of [`ClsGenSFTTrainer`]: TRL's [`SFTConfig`], and those of the second head.

    Args:
        lm_weight, cls_weight (`float`, *optional*, default to 1.0): Weights of the two losses.
        verdict_weight (`float`, *optional*, defaults to 0.0): Weight of a third loss: cross-entropy of the LM's own
            verdict (what `lm_probability` reads), one token among dozens to the LM's loss.
        pos_weight (`str`, *optional*, defaults to `"none"`): Weight of the positive class in the BCE loss: `"none"`,
            `"balanced"` (negatives / positives of the training rows) or a number. Undone at inference.
        cls_learning_rate (`float`, *optional*): Learning rate of the head; `learning_rate` by default.
        cls_dropout (`float`, *optional*, defaults to 0.0): Dropout on the head's features.
        max_explanation_length (`int`, *optional*, defaults to 160): Most tokens of an explanation with its verdict
            line. `max_length` less this is left for the prompt.
        explanation_mode (`str`, *optional*, defaults to `"guided"`): `"guided"` teaches a verdict line before each
            explanation, `"free"` none.
        padding_side (`str`, *optional*, defaults to `"right"`): Side of the padding in batches.
        train_sampling_strategy (`str`, *optional*, defaults to `"auto"`): As in `TrainingArguments`; `"auto"` is
            `"group_by_length"` on a CPU and `"random"` elsewhere.
        cache_frozen_layers (`bool`, *optional*, defaults to `False`): Keep the states of the layers below the lowest
            trained one in `output_dir/frozen_layers`, so that a row goes through them once and not in every epoch.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS

    lm_weight: float = field(default=1.0, metadata={"help": "Weight of the language-modelling loss."})
    cls_weight: float = field(default=1.0, metadata={"help": "Weight of the classification loss."})
    verdict_weight: float = field(default=0.0, metadata={"help": "Weight of the loss of the LM's own verdict."})
    pos_weight: str = field(
        default="none", metadata={"help": "Weight of the positive class: 'none', 'balanced' or a number."}
    )
    cls_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the head."})
    cls_dropout: float = field(default=0.0, metadata={"help": "Dropout on the head's features."})
    max_explanation_length: int = field(default=160, metadata={"help": "Most tokens of an explanation."})
    explanation_mode: str = field(
        default="guided",
        metadata={"help": "Whether a verdict line comes before explanations.", "choices": ["guided", "free"]},
    )
    padding_side: str = field(default="right", metadata={"help": "Side of padding.", "choices": ["left", "right"]})
    train_sampling_strategy: str = field(
        default="auto",
        metadata={
            "help": "Sampler for training; 'auto' is 'group_by_length' on a CPU and 'random' elsewhere.",
            "choices": ["auto", "random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )

    cache_frozen_layers: bool = field(
        default=False, metadata={"help": "Keep on disk what the layers below the trained ones make of each row."}
    )

    def __post_init__(self):
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16 = False  # TRL's default is bfloat16, which a CPU emulates
        if self.train_sampling_strategy == "auto":
            # `super` checks the strategy and finds the device.
            self.train_sampling_strategy = "random"
            super().__post_init__()
            if self.device.type == "cpu":
                self.train_sampling_strategy = "group_by_length"
        else:
            super().__post_init__()
        self._check()

    def _check(self) -> None:
        for name in ("lm_weight", "cls_weight", "verdict_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if self.lm_weight == self.cls_weight == 0:
            raise ValueError("`lm_weight` and `cls_weight` are both 0: there is nothing to train.")
        if self.verdict_weight and self.explanation_mode == "free":
            raise ValueError(
                "`verdict_weight` needs `explanation_mode='guided'`: free explanations have no verdict line."
            )
        if self.pos_weight not in ("none", "balanced"):
            try:
                positive = 0 < float(self.pos_weight) < float("inf")
            except ValueError:
                positive = False
            if not positive:
                raise ValueError(
                    f"`pos_weight` must be 'none', 'balanced' or a number above 0, got {self.pos_weight!r}."
                )
        if self.max_length is None or self.max_length <= self.max_explanation_length:
            raise ValueError(
                f"`max_length` ({self.max_length}) must be larger than `max_explanation_length` "
                f"({self.max_explanation_length}): the rest is the prompt's."
            )
        for name, supported in (("loss_type", "nll"), ("packing_strategy", "bfd"), ("label_smoothing_factor", 0.0)):
            if getattr(self, name) != supported:
                raise ValueError(f"`{name}` must be {supported!r} for two losses, got {getattr(self, name)!r}.")
        if self.assistant_only_loss or self.completion_only_loss is False or self.use_liger_kernel:
            raise ValueError(
                "`assistant_only_loss`, `completion_only_loss=False` and `use_liger_kernel` have no meaning here: the "
                "LM is trained on explanations, the head on decision tokens."
            )


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


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """A [`LengthGroupedSampler`] whose order depends on seed and epoch alone, so that a resumed run sees the same."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by `Trainer` at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


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
            what it is given, [`ClsGenSFTTrainer.decisions`] makes logits and labels.

    Raises:
        TypeError: for another model class.
        ValueError: for arguments that two losses cannot have, or rows that would vanish.
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
        # QLoRA casts every trainable parameter to bfloat16.
        for name, parameter in self.model.named_parameters():
            if "cls_head" in name:
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
            self._frozen_layers = FrozenLayers(clsgen, first_trained_layer(clsgen), frozen_layers_dir(args))
        self.loss_is_scaled_for_ga = True
        if self.compute_metrics is None:
            self.compute_metrics = self._classification_metrics

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if "input_ids" not in dataset.column_names:
            dataset = encode_rows(
                dataset,
                self._encoder,
                args.max_explanation_length,
                guided=args.explanation_mode == "guided",
                name=dataset_name,
                num_proc=args.dataset_num_proc,
            )
        missing = {"labels", "cls_labels"} - set(dataset.column_names)
        if missing:
            raise ValueError(f"Encoded rows need the column(s) {sorted(missing)}; found {dataset.column_names}.")
        # Evaluation stays one row a text: its metrics need each decision once.
        if self._pack and dataset_name == "train":
            dataset = pack_rows(dataset, args.max_length, seed=args.seed)
        return dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "labels", "cls_labels", "seq_lengths"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in train_dataset["input_ids"]]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededLengthGroupedSampler(batch_size, lengths, seed)

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

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Labelled tokens and decisions in the given batches of all processes, shape `(2,)`."""
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batch_samples:
            counts[0] += (batch["labels"][:, 1:] != IGNORE_INDEX).sum().to(device)
            counts[1] += (batch["cls_labels"] != IGNORE_INDEX).sum().to(device)
        return self.accelerator.reduce(counts, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        tokens, decisions = self._local_counts(inputs)
        step_tokens, step_decisions = (tokens, decisions) if num_items_in_batch is None else num_items_in_batch
        with self._frozen_layers.replay(inputs) if self._frozen_layers else contextlib.nullcontext():
            outputs = model(
                **inputs,
                use_cache=False,
                logits_to_keep=supervised_positions(inputs["labels"]),
                num_items_in_batch=step_tokens,
                num_decisions_in_batch=step_decisions,
            )
        loss = outputs.loss
        losses = [
            outputs.lm_loss.detach() * step_tokens,
            tokens,
            outputs.cls_loss.detach() * step_decisions,
            decisions,
        ]
        if self.args.verdict_weight:
            of_verdicts = verdict_loss(
                outputs.logits, inputs["labels"], inputs["cls_labels"], self._verdict_lines, step_decisions
            )
            loss = loss + self.args.verdict_weight * of_verdicts
            losses += [of_verdicts.detach() * step_decisions, decisions]
        totals = torch.stack([value.double().to(self.args.device) for value in losses])
        previous = self._loss_totals[mode]
        self._loss_totals[mode] = totals if previous is None else previous + totals
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which gradients are averaged over
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def _local_counts(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        decisions = (inputs["cls_labels"] != IGNORE_INDEX).sum()
        return tokens, decisions

    def _pop_losses(self, mode: str) -> dict[str, float]:
        """The losses since the last call, means over tokens or decisions of all processes."""
        if self._loss_totals[mode] is None:
            return {}
        sums = self.accelerator.reduce(self._loss_totals[mode], "sum").tolist()
        self._loss_totals[mode] = None
        return {name: sums[2 * i] / max(sums[2 * i + 1], 1) for i, name in enumerate(LOSSES) if 2 * i < len(sums)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._pop_losses("train"))
        super().log(logs, start_time)

    def _without_repeats(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Takes the labels off rows that stand twice, to give the last batch of each process the same size."""
        state, size = self.accelerator.gradient_state, len(inputs["input_ids"])
        if state.end_of_dataloader and state.remainder > 0:
            repeats = torch.arange(size) + self.accelerator.process_index * size >= state.remainder
            for name in ("labels", "cls_labels"):
                inputs[name] = inputs[name].masked_fill(repeats[:, None].to(inputs[name].device), IGNORE_INDEX)
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
        logits, labels = self.decisions(prediction)
        if not len(labels):
            return {}
        probabilities = 1 / (1 + np.exp(-logits))
        metrics = classification_metrics(labels, probabilities)
        return {name: metrics[name] for name in EVALUATION_METRICS}

    def decisions(self, prediction: Any) -> tuple[np.ndarray, np.ndarray]:
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


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint below `output_dir` that was written to its end, if any."""
    complete = [folder.parent for folder in Path(output_dir).glob(f"checkpoint-*/{CHECKPOINT_COMPLETE}")]
    return str(max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]))) if complete else None


def _train_head_in_full(peft_config: PeftConfig) -> None:
    if peft_config.is_prompt_learning:
        raise ValueError("Prompt-learning adapters shift the decision token; use LoRA or another weight adapter.")
    modules = peft_config.modules_to_save or []
    peft_config.modules_to_save = list(dict.fromkeys([*modules, "cls_head"]))
