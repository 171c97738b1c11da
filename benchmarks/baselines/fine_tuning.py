"""The backbone, fine-tuned as one would without CLSGen: on words alone, on labels alone, and two copies for both."""

import contextlib
import functools
import hashlib
import json
import logging
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    LogitsProcessorList,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from benchmarks.baselines.running import Baseline, Row, labelled, labels_of
from clsgen.atomic_io import write_json
from clsgen.batching_clsgen import pad_left, token_batches
from clsgen.evaluation.lm_scoring import answer_log_odds
from clsgen.explaining_clsgen import NoRepeatBehindPrompt
from clsgen.frozen_layers import FrozenLayers, first_trained_layer
from clsgen.losses_clsgen import IGNORE_INDEX
from clsgen.prompting_clsgen import PromptEncoder, TaskPrompt
from clsgen.resuming import TrainingClock
from clsgen.train_arguments import ModelArguments
from clsgen.train_sft_cls import lora_config
from clsgen.training_rows import hard_labels

logger = logging.getLogger(__name__)
FITTED = Path("outputs") / "baselines"
NO_REPEAT_NGRAM_SIZE = 6  # as CLSGen's checkpoints
MAX_BATCH_TOKENS = 8192
MAX_EXPLANATION_LENGTH = 128  # as in CLSGen's recipe for `trial_claims`
COMMON = {
    "lora_first_layer": 0, "lora_r": 16, "lora_alpha": 32, "batch_size": 4, "max_prompt_length": 1024,
}  # fmt: skip


class _FineTuned(Baseline):
    """LoRA on all linear layers from `lora_first_layer` on; prompts are CLSGen's.

    The adapter is kept below `outputs/baselines`: whoever asks again for the same training gets it from there, and a
    cut one goes on from its last checkpoint. After a change of this code, remove the folder.
    """

    name: ClassVar[str]

    def fit(self) -> dict[str, Any]:
        set_seed(self.seed)  # adapters and heads are drawn before a trainer would do it
        self._encoder = self.encoder()
        model, folder = self.base_model(), self.fitted_folder()
        record = folder / "fitted.json"
        if record.is_file():
            logger.info("%s: trained before, see %s", self.name, folder)
            model, found = PeftModel.from_pretrained(model, folder), json.loads(record.read_text(encoding="utf-8"))
            self.earlier_seconds = found["seconds"]
        else:
            training = folder / "training"
            training.mkdir(parents=True, exist_ok=True)
            clock = TrainingClock(training / "seconds.json")
            model, chosen = self.train(model, training, [clock])
            found = {"chosen": chosen, "seconds": clock.seconds}
            model.save_pretrained(folder)
            write_json(record, found)
            shutil.rmtree(training)
        self._model = model.merge_and_unload().eval()
        return found["chosen"]

    @abstractmethod
    def base_model(self) -> PreTrainedModel:
        """The backbone as it is before training."""

    @abstractmethod
    def train(
        self, model: PreTrainedModel, folder: Path, callbacks: list[TrainerCallback]
    ) -> tuple[PeftModel, dict[str, Any]]:
        """Trains an adapter of the base model; returns it there, and what was found on the way.

        Args:
            model (`PreTrainedModel`): Of [`base_model`].
            folder (`Path`): For checkpoints; what is found there is gone on with.
            callbacks (`list[TrainerCallback]`): For the trainer.
        """

    def fitted_folder(self) -> Path:
        """Where the adapter lies; another for whatever makes another."""
        rows = [labelled(self.task, split) for split in ("train", "validation")]
        made_of = json.dumps([self.task.prompt, rows, self.backbone, self.seed, self.settings], sort_keys=True)
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        return FITTED / self.task.name / f"{self.name}-{digest}"

    def encoder(self) -> PromptEncoder:
        tokenizer = AutoTokenizer.from_pretrained(self.backbone)
        return PromptEncoder(tokenizer, TaskPrompt.from_dict(self.task.prompt), self.settings["max_prompt_length"])

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        return [self._encoder.encode({name: row[name] for name in self.task.fields}).input_ids for row in rows]

    def lora(self, model: PreTrainedModel, task_type: str) -> LoraConfig:
        names = ("lora_r", "lora_alpha", "lora_first_layer")
        chosen = {name: self.settings[name] for name in names}
        return lora_config(model, ModelArguments(use_peft=True, lora_dropout=0.0, lora_task_type=task_type, **chosen))

    def has_words(self) -> bool:
        """Whether the training split has explanations: without them, words have nothing to be compared with."""
        return any(row["explanation"] for row in labelled(self.task, "train"))

    @torch.inference_mode()
    def generate(
        self, model: PreTrainedModel, prompts: list[list[int]], labels: Sequence[int] | None = None
    ) -> list[str]:
        """A causal LM's greedy explanations, without their verdict line; after those of `labels`, where given."""
        if labels is not None:
            prompts = [[*p, *self._encoder.encode_verdict(label)] for p, label in zip(prompts, labels, strict=True)]
        found, tokenizer = [""] * len(prompts), self._encoder.tokenizer
        stop = [i for i in (tokenizer.eos_token_id, self._encoder.end_of_turn_id) if i is not None]
        with tqdm(total=len(prompts), desc="Explaining") as bar:
            for indices in token_batches(list(map(len, prompts)), MAX_BATCH_TOKENS):
                batch = pad_left([prompts[i] for i in indices], tokenizer.pad_token_id or 0)
                start = batch["input_ids"].shape[1]
                ids = model.generate(
                    **batch,
                    do_sample=False,
                    max_new_tokens=self.settings["max_explanation_length"],
                    eos_token_id=stop,
                    logits_processor=LogitsProcessorList([NoRepeatBehindPrompt(NO_REPEAT_NGRAM_SIZE, start)]),
                )
                texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
                for i, text in zip(indices, texts, strict=True):
                    found[i] = self._encoder.prompt.split_verdict_line(text)[1]
                bar.update(len(indices))
        return found

    def training(self, folder: Path) -> dict[str, Any]:
        """Arguments that transformers' and TRL's trainers share."""
        return {
            "output_dir": str(folder),
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "num_train_epochs": self.settings["epochs"],
            "learning_rate": self.settings["learning_rate"],
            "per_device_train_batch_size": self.settings["batch_size"],
            "per_device_eval_batch_size": 2 * self.settings["batch_size"],
            "lr_scheduler_type": "cosine",
            "warmup_steps": 5,
            "seed": self.seed,
            "logging_steps": 10,
            "report_to": "none",
            "bf16": False,
            "dataloader_pin_memory": False,
        }


class _SftTrainer(SFTTrainer):
    """TRL's trainer as it is, but for what its frozen layers make of a row, which is computed once."""

    def __init__(self, model: PreTrainedModel, folder: Path, **kwargs):
        super().__init__(model, **kwargs)
        depth = first_trained_layer(model)
        self._frozen_layers = FrozenLayers(model, depth, folder) if depth else None

    def compute_loss(self, model, inputs, *args, **kwargs):
        with self._frozen_layers.replay(inputs) if self._frozen_layers else contextlib.nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)


class SftOnly(_FineTuned):
    """TRL's `SFTTrainer` on verdict line and explanation; the probability is that of the verdict's tokens.

    Schedule, LoRA and explanations are those of CLSGen's recipe for `trial_claims`; there is no head. A row without an
    explanation teaches the verdict line alone.
    """

    name = "sft-only"
    guided = True
    options = {  # noqa: RUF012
        **COMMON, "epochs": 2, "learning_rate": 1e-3, "lora_first_layer": 18, "sampling": "random",
        "max_explanation_length": MAX_EXPLANATION_LENGTH,
    }  # fmt: skip

    def base_model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.backbone, dtype=torch.float32)

    def train(
        self, model: PreTrainedModel, folder: Path, callbacks: list[TrainerCallback]
    ) -> tuple[PeftModel, dict[str, Any]]:
        arguments = SFTConfig(
            **self.training(folder),
            max_length=None,
            activation_checkpointing=False,
            train_sampling_strategy=self.settings["sampling"],
        )
        trainer = _SftTrainer(
            model,
            folder / "frozen_layers",
            args=arguments,
            train_dataset=Dataset.from_list([self._encoded(row) for row in labelled(self.task, "train")]),
            processing_class=self._encoder.tokenizer,
            peft_config=self.lora(model, "CAUSAL_LM"),
            callbacks=callbacks,
        )
        outcome = trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
        return trainer.model, {"train_loss": outcome.training_loss, "steps": outcome.global_step}

    def _encoded(self, row: Row) -> dict[str, list[int]]:
        prompt, label = self.prompts([row])[0], int(hard_labels(row["label"]))
        completion = self._encoder.encode_verdict(label)
        if row["explanation"]:  # without one, nothing tells how the words go on: not even that there are none
            longest = self.settings["max_explanation_length"]
            completion, _ = self._encoder.encode_completion(row["explanation"], label, longest)
        return {"input_ids": prompt + completion, "labels": [IGNORE_INDEX] * len(prompt) + completion}

    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        answers = (self._encoder.encode_verdict(0), self._encoder.encode_verdict(1))
        return np.array(answer_log_odds(self._model, self.prompts(rows), answers, description="Verdicts"))

    def explain(self, rows: Sequence[Row], predicted: Sequence[int]) -> dict[str, list[str]]:
        if not self.has_words():
            return {}
        prompts = self.prompts(rows)
        return {"free": self.generate(self._model, prompts), "guided": self.generate(self._model, prompts, predicted)}

    def language_model(self) -> Any:
        return self._model


def _auroc(evaluated: EvalPrediction) -> dict[str, float]:
    scores = evaluated.predictions
    return {"auroc": roc_auc_score(evaluated.label_ids, scores[:, 1] - scores[:, 0])}


class ClassificationOnly(_FineTuned):
    """`AutoModelForSequenceClassification` with LoRA; the epoch is that of the best validation AUROC."""

    name = "classification-only"
    options = {  # noqa: RUF012
        **COMMON, "epochs": 3, "learning_rate": 2e-4, "max_explanation_length": MAX_EXPLANATION_LENGTH,
    }  # fmt: skip

    def base_model(self) -> PreTrainedModel:
        tokenizer = self._encoder.tokenizer
        model = AutoModelForSequenceClassification.from_pretrained(self.backbone, num_labels=2, dtype=torch.float32)
        # The head reads the last token that is not padding; a prompt's last is the template's, never this one.
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.padding_side = "right"
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    def train(
        self, model: PreTrainedModel, folder: Path, callbacks: list[TrainerCallback]
    ) -> tuple[PeftModel, dict[str, Any]]:
        tokenizer = self._encoder.tokenizer
        model = get_peft_model(model, self.lora(model, "SEQ_CLS"))
        arguments = TrainingArguments(
            **self.training(folder), eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="auroc"
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=self._encoded(labelled(self.task, "train")),
            eval_dataset=self._encoded(labelled(self.task, "validation")),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=_auroc,
            callbacks=callbacks,
        )
        outcome = trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
        aurocs = [entry["eval_auroc"] for entry in trainer.state.log_history if "eval_auroc" in entry]
        found = {"train_loss": outcome.training_loss, "steps": outcome.global_step, "validation_aurocs": aurocs}
        return model, found

    def _encoded(self, rows: Sequence[Row]) -> Dataset:
        return Dataset.from_dict({"input_ids": self.prompts(rows), "labels": labels_of(rows)})

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        prompts, tokenizer = self.prompts(rows), self._encoder.tokenizer
        found = np.zeros(len(prompts))
        for indices in token_batches(list(map(len, prompts)), MAX_BATCH_TOKENS):
            batch = tokenizer.pad({"input_ids": [prompts[i] for i in indices]}, return_tensors="pt")
            scores = self._model(**batch).logits.double()
            found[indices] = (scores[:, 1] - scores[:, 0]).numpy()
        return found

    def explain(self, rows: Sequence[Row], predicted: Sequence[int]) -> dict[str, list[str]]:
        """What is left of its words, which nobody taught it."""
        if not self.has_words():
            return {}
        return {"free": self.generate(self.language_model(), self.prompts(rows))}

    def language_model(self) -> Any:
        return self._language_model

    @functools.cached_property
    def _language_model(self) -> PreTrainedModel:
        """The trained body under the backbone's own LM head: what is left of its language."""
        lm = AutoModelForCausalLM.from_pretrained(self.backbone, dtype=torch.float32)
        lm.get_decoder().load_state_dict(self._model.base_model.state_dict())
        return lm.eval()


class TwoModels(Baseline):
    """A classifier and an explainer, each a whole copy of the backbone: the price of not sharing.

    The classifier is `classification-only`, the explainer `sft-only`, which writes after the classifier's verdict.
    """

    options = {"classifier": {}, "explainer": {}}  # noqa: RUF012
    guided = True

    def fit(self) -> dict[str, Any]:
        arguments = (self.task, self.seed, self.backbone)
        self._classifier = ClassificationOnly(*arguments, **self.settings["classifier"])
        self._explainer = SftOnly(*arguments, **self.settings["explainer"])
        found = {"classifier": self._classifier.fit(), "explainer": self._explainer.fit()}
        self.earlier_seconds = self._classifier.earlier_seconds + self._explainer.earlier_seconds
        return found

    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        return self._classifier.logits(rows)

    def explain(self, rows: Sequence[Row], predicted: Sequence[int]) -> dict[str, list[str]]:
        explainer = self._explainer
        return {"guided": explainer.generate(explainer.language_model(), explainer.prompts(rows), predicted)}

    def language_model(self) -> Any:
        return self._explainer.language_model()
