"""What a user calls on a CLSGen model: `classify` and `classify_and_explain`, and the `Prediction` they return."""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BatchEncoding, DynamicCache, PreTrainedTokenizerBase
from transformers.utils import logging

from .prompting_clsgen import EncodedPrompt, PromptEncoder, TaskPrompt

logger = logging.get_logger(__name__)
Text = str | dict[str, str]


@dataclass(frozen=True)
class Prediction:
    """The answer to the task's question about one text.

    Args:
        label (`str`): Name of the label given.
        label_id (`int`): 1 where `probability >= threshold`, else 0.
        probability (`float`): Calibrated, of label 1.
        logit (`float`): Of the head, before calibration, corrected for the `pos_weight` of training.
        threshold (`float`): The decision threshold on `probability`.
        explanation (`str`, *optional*): In words; `None` from `classify`.
        lm_probability (`float`, *optional*): The LM's own probability of the verdict of label 1 against that of label
            0. Far from `probability`, it is a sign to look closer. `None` from `classify` and in `free` mode.
        truncated (`bool`): Whether the text was too long, and read without the middle of its document.
    """

    label: str
    label_id: int
    probability: float
    logit: float
    threshold: float
    explanation: str | None = None
    lm_probability: float | None = None
    truncated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON-serialisable values."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.label} (probability {self.probability:.3f}, threshold {self.threshold:.3f})"
        notes = ", text truncated" if self.truncated else ""
        return f"{head}{notes}" + (f": {self.explanation}" if self.explanation is not None else "")


class ClsGenInferenceMixin:
    """Inference methods of [`ClsGenForCausalLMAndClassification`]."""

    _tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded from the model's own repository on first use, unless set."""
        if self._tokenizer is None:
            # With the backbone's config, so that no remote code is asked for once more.
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.config.name_or_path,
                config=self.config.text_config,
                revision=getattr(self.config, "_commit_hash", None),
            )
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def encoder(self) -> PromptEncoder:
        """Encodes this model's prompts, verdict lines and explanations."""
        prompt = TaskPrompt.from_dict(self.config.prompt)
        key = (id(self.tokenizer), prompt, self.config.max_prompt_length)
        if getattr(self, "_encoder_key", None) != key:
            self._encoder = PromptEncoder(self.tokenizer, prompt, self.config.max_prompt_length)
            self._encoder_key = key
        return self._encoder

    def _stop_at_end_of_turn(self) -> None:
        """Makes `generate` stop at the chat template's end of turn, which is not always the eos token."""
        stops = self.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if self.encoder.end_of_turn_id is not None and self.encoder.end_of_turn_id not in stops:
            self.generation_config.eos_token_id = [*stops, self.encoder.end_of_turn_id]
        if self.generation_config.pad_token_id is None:
            pad, eos = self.tokenizer.pad_token_id, self.generation_config.eos_token_id
            self.generation_config.pad_token_id = pad if pad is not None else eos[0] if isinstance(eos, list) else eos

    def calibrated(self, logits: torch.FloatTensor) -> tuple[torch.FloatTensor, torch.FloatTensor]:
        """Raw head logits of any shape to (logits corrected for `pos_weight`, calibrated probabilities)."""
        logits = logits.double() - math.log(self.config.pos_weight)
        calibration = self.config.calibration
        return logits, torch.sigmoid(logits / calibration["temperature"] + calibration["bias"])

    def predictions(self, logits: torch.FloatTensor, prompts: list[EncodedPrompt]) -> list[Prediction]:
        """Raw head logits of shape `(n,)` to predictions without explanations."""
        corrected, probabilities = self.calibrated(logits)
        predictions = []
        for prompt, logit, probability in zip(prompts, corrected.tolist(), probabilities.tolist(), strict=True):
            label_id = int(probability >= self.config.threshold)
            predictions.append(
                Prediction(
                    label=self.config.label_names[label_id],
                    label_id=label_id,
                    probability=probability,
                    logit=logit,
                    threshold=self.config.threshold,
                    truncated=prompt.truncated,
                )
            )
        return predictions

    def _encode_all(self, texts: Iterable[Text]) -> list[EncodedPrompt]:
        prompts = []
        for i, text in enumerate(texts):
            try:
                prompts.append(self.encoder.encode(text))
            except (TypeError, ValueError) as error:
                raise type(error)(f"Text {i}: {error}") from error
        return prompts

    def _batches(self, prompts: list[EncodedPrompt], batch_size: int) -> Iterator[tuple[list[int], BatchEncoding]]:
        """Indices and left-padded ids of batches of alike lengths, the longest first (memory runs out at once)."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].input_ids))
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices, self._pad_left([prompts[i].input_ids for i in indices])

    def _pad_left(self, rows: list[list[int]]) -> BatchEncoding:
        length = max(map(len, rows))
        pad = self.generation_config.pad_token_id or 0
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    @torch.inference_mode()
    def classify(self, texts: Text | list[Text], batch_size: int = 8) -> Prediction | list[Prediction]:
        """The task's answer for each text, without an explanation.

        Args:
            texts (`str`, `dict` or a list of them): A `dict` has the task's fields; a `str` is a whole text.
            batch_size (`int`, *optional*, defaults to 8): Texts a forward pass; answers don't depend on it.

        Returns:
            [`Prediction`], or for a list a list of them in the same order.

        Raises:
            TypeError, ValueError: for a text that cannot be used, naming its place and what is wrong.
        """
        single = isinstance(texts, str | dict)
        prompts = self._encode_all([texts] if single else texts)
        self.eval()
        logits = torch.empty(len(prompts))
        nothing = torch.empty(0, dtype=torch.long, device=self.device)
        for indices, batch in self._batches(prompts, batch_size):
            logits[indices] = self(**batch, use_cache=False, logits_to_keep=nothing).cls_logits[:, -1].cpu()
        predictions = self.predictions(logits, prompts)
        return predictions[0] if single else predictions

    @torch.inference_mode()
    def classify_and_explain(
        self, texts: Text | list[Text], batch_size: int = 8, mode: str | None = None, **generate_kwargs
    ) -> Prediction | list[Prediction]:
        """The task's answer for each text, and an explanation generated from the same prefill.

        Args:
            texts (`str`, `dict` or a list of them): As in [`classify`].
            batch_size (`int`, *optional*, defaults to 8): Texts a batch.
            mode (`"guided"` or `"free"`, *optional*): `"guided"` starts the explanation from the verdict line of the
                head's decision, `"free"` gives the LM no hint. Defaults to the config's `explanation_mode`.
            generate_kwargs: For `generate`, over the stored generation config; e.g. `max_new_tokens`, `do_sample`.

        Returns:
            [`Prediction`], or for a list a list of them in the same order.

        Raises:
            TypeError, ValueError: for a text or `mode` that cannot be used.
        """
        mode = mode or self.config.explanation_mode
        if mode not in ("guided", "free"):
            raise ValueError(f"`mode` must be 'guided' or 'free', got {mode!r}.")
        single = isinstance(texts, str | dict)
        prompts = self._encode_all([texts] if single else texts)
        self.eval()
        results: dict[int, Prediction] = {}
        for indices, batch in self._batches(prompts, batch_size):
            explained = self._explain_batch([prompts[i] for i in indices], batch, mode, generate_kwargs)
            results.update(zip(indices, explained, strict=True))
        return results[0] if single else [results[i] for i in range(len(prompts))]

    def _explain_batch(
        self, prompts: list[EncodedPrompt], batch: BatchEncoding, mode: str, generate_kwargs: dict[str, Any]
    ) -> list[Prediction]:
        cache = DynamicCache(config=self.config.text_config)
        if mode == "free":
            cache.activate_past_recording()  # sliding windows can be cropped then
        prefill = self(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        predictions = self.predictions(prefill.cls_logits[:, -1].cpu(), prompts)
        lm_probabilities = [None] * len(prompts)
        if mode == "guided":
            lm_probabilities = self._lm_probabilities(prefill, batch["attention_mask"]).tolist()
            verdicts = self._pad_left([self.encoder.encode_verdict(p.label_id) for p in predictions])
            batch = {name: torch.cat([batch[name], verdicts[name]], dim=1) for name in batch}
        else:
            cache.crop(-1)  # the cache holds the whole prompt, and generate needs a token to start from
        if "max_length" not in generate_kwargs:
            generate_kwargs = {"max_new_tokens": self.generation_config.max_new_tokens or 128, **generate_kwargs}
        generated = self.generate(**batch, past_key_values=cache, return_dict_in_generate=False, **generate_kwargs)
        new_ids = generated[:, batch["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        return [
            replace(
                prediction, explanation=self.encoder.prompt.strip_verdict_line(text), lm_probability=lm_probability
            )
            for prediction, text, lm_probability in zip(predictions, texts, lm_probabilities, strict=True)
        ]

    def _lm_probabilities(self, prefill: Any, attention_mask: torch.Tensor) -> torch.FloatTensor:
        """P(verdict of 1) / (P(verdict of 0) + P(verdict of 1)) by the LM, shape `(batch_size,)`."""
        scores = []
        for label in (0, 1):
            verdict = torch.tensor([self.encoder.encode_verdict(label)], device=self.device)
            verdict = verdict.expand(len(attention_mask), -1)
            logits = prefill.logits[:, -1:]
            if verdict.shape[1] > 1:
                given = verdict[:, :-1]
                following = self(
                    input_ids=given,
                    attention_mask=F.pad(attention_mask, (0, given.shape[1]), value=1),
                    past_key_values=copy.deepcopy(prefill.past_key_values),
                )
                logits = torch.cat([logits, following.logits], dim=1)
            log_probabilities = logits.float().log_softmax(dim=-1)
            scores.append(log_probabilities.gather(2, verdict[..., None]).sum(dim=(1, 2)))
        return torch.sigmoid(scores[1] - scores[0])
