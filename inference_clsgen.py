"""What a user calls on a CLSGen model: `classify`, `classify_and_explain`, their iterators, `explain` and `stream`."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging

from .attribution_clsgen import occlusions
from .batching_clsgen import pass_tokens, token_batches, windows
from .caching_clsgen import SharedPrefix
from .explaining_clsgen import Prefill, stream_pieces
from .prediction_clsgen import Attribution, DecisionRule, NoNumberError, Prediction
from .prompting_clsgen import EncodedPrompt
from .tokenizing_clsgen import ClsGenTokenizerMixin, Text

MAX_GENERATION_BATCH_TOKENS = 16384  # a decoding step costs nearly the same for few rows and for many
WINDOW = 1024


class ClsGenInferenceMixin(ClsGenTokenizerMixin):
    """Inference methods of [`ClsGenForCausalLMAndClassification`].

    They change nothing in the model but its mode (to evaluation), so threads may call them side by side.
    """

    def _mode(self, mode: str | None) -> str:
        mode = mode or self.config.explanation_mode
        if mode not in ("guided", "free"):
            raise ValueError(f"`mode` must be 'guided' or 'free', got {mode!r}.")
        return mode

    def _predict_iter(
        self,
        texts: Iterable[Text],
        predict: Callable[[list[EncodedPrompt], SharedPrefix], list[Prediction]],
        *,
        whole: bool,
        batch_size: int | None,
        max_batch_tokens: int | None,
        attributions: bool,
        progress: bool,
    ) -> Iterator[Prediction]:
        """Predictions in the order of `texts`, batched over windows of them, so that memory stays constant."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.eval()
        total = len(texts) if hasattr(texts, "__len__") else None
        done = 0
        with logging.tqdm(total=total, desc="Classifying", unit="text", disable=not progress) as bar:
            for window in windows(texts, WINDOW):
                prompts = self._encode_all(window, first=done)
                predictions: dict[int, Prediction] = {}
                prefix = SharedPrefix.of(self, [prompt.input_ids for prompt in prompts], whole)
                lengths = [len(prompt.input_ids) for prompt in prompts]
                for indices in token_batches(lengths, max_batch_tokens or pass_tokens(self.device), batch_size):
                    try:
                        with torch.inference_mode():  # here, not around the loop: callers run their own code between
                            answers = predict([prompts[i] for i in indices], prefix)
                    except NoNumberError as error:
                        raise NoNumberError(sorted(done + indices[row] for row in error.texts)) from error
                    predictions.update(zip(indices, answers, strict=True))
                    bar.update(len(indices))
                done += len(window)
                for i, text in enumerate(window):
                    found = self.attribute(text, max_batch_tokens, batch_size) if attributions else None
                    yield replace(predictions[i], attributions=found)

    def classify_iter(
        self,
        texts: Iterable[Text],
        batch_size: int | None = None,
        *,
        prior: float | None = None,
        attributions: bool = False,
        max_batch_tokens: int | None = None,
        progress: bool = False,
    ) -> Iterator[Prediction]:
        """[`classify`] for any iterable: an iterator in the same order, in constant memory.

        Texts are read 1,024 ahead. `progress` shows a bar. For the rest see [`classify`].
        """
        rule = DecisionRule.from_config(self.config)
        rule.prior_shift(prior)

        def predict(prompts: list[EncodedPrompt], prefix: SharedPrefix) -> list[Prediction]:
            cls_logits, readings = self._read([prompt.input_ids for prompt in prompts], prefix)
            return rule.predict(cls_logits, [prompt.truncated for prompt in prompts], prior, readings)

        return self._predict_iter(
            texts, predict, whole=rule.lm_reading_weight > 0, batch_size=batch_size, max_batch_tokens=max_batch_tokens,
            attributions=attributions, progress=progress,
        )  # fmt: skip

    def _read(
        self, prompts: list[list[int]], prefix: SharedPrefix
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None]:
        """What [`DecisionRule.logits`] takes, of a batch of prompts that begin with `prefix`.

        The head's logits, of shape `(rows,)` on the CPU, and of the same shape the LM's readings where they count.
        """
        if self.config.lm_reading_weight > 0:
            prefill = Prefill(self, prompts, prefix)
            return prefill.cls_logits, prefill.read_verdicts()
        batch, past = prefix.batch(self, prompts)
        return self.run_to_head(**batch, **past)[0].cpu(), None

    def classify(
        self,
        texts: Text | list[Text],
        batch_size: int | None = None,
        *,
        prior: float | None = None,
        attributions: bool = False,
        max_batch_tokens: int | None = None,
    ) -> Prediction | list[Prediction]:
        """The task's answer for each text, without an explanation.

        Only the layers below the head are run, unless the LM's own reading is a part of the number (the config's
        `lm_reading_weight`).

        Args:
            texts (`str`, `dict` or a list of them): A `dict` has the task's fields; a `str` is a whole text.
            batch_size (`int`, *optional*): Most texts a forward pass; answers don't depend on it.
            prior (`float`, *optional*): Another base rate of label 1 to re-base probabilities to, in (0, 1).
            attributions (`bool`, *optional*, defaults to `False`): Whether to say what each sentence does to the
                answer; costs about one more text a sentence, and at most 64 (see [`attribute`]).
            max_batch_tokens (`int`, *optional*): Most tokens a forward pass, padding included. Defaults to 2048 on a
                CPU and 8192 elsewhere.

        Returns:
            [`Prediction`], or for a list a list of them in the same order.

        Raises:
            TypeError, ValueError: for a text or `prior` that cannot be used, naming its place and what is wrong; for
                a text whose logit is not a number ([`NoNumberError`]).
        """
        single = isinstance(texts, str | dict)
        options = {"prior": prior, "attributions": attributions, "max_batch_tokens": max_batch_tokens}
        predictions = list(self.classify_iter([texts] if single else texts, batch_size, **options))
        return predictions[0] if single else predictions

    def classify_and_explain_iter(
        self,
        texts: Iterable[Text],
        batch_size: int | None = None,
        mode: str | None = None,
        *,
        prior: float | None = None,
        attributions: bool = False,
        max_batch_tokens: int = MAX_GENERATION_BATCH_TOKENS,
        progress: bool = False,
        **generate_kwargs,
    ) -> Iterator[Prediction]:
        """[`classify_and_explain`] for any iterable; see [`classify_iter`]."""
        mode = self._mode(mode)
        rule = DecisionRule.from_config(self.config)
        rule.prior_shift(prior)

        def predict(prompts: list[EncodedPrompt], prefix: SharedPrefix) -> list[Prediction]:
            prefill = Prefill(self, [prompt.input_ids for prompt in prompts], prefix)
            predictions = self._answers(prefill, [prompt.truncated for prompt in prompts], mode, prior)
            return self._explained(prefill, predictions, self._verdicts(prefill, predictions, mode), generate_kwargs)

        return self._predict_iter(
            texts, predict, whole=True, batch_size=batch_size, max_batch_tokens=max_batch_tokens,
            attributions=attributions, progress=progress,
        )  # fmt: skip

    def classify_and_explain(
        self,
        texts: Text | list[Text],
        batch_size: int | None = None,
        mode: str | None = None,
        *,
        prior: float | None = None,
        attributions: bool = False,
        max_batch_tokens: int = MAX_GENERATION_BATCH_TOKENS,
        **generate_kwargs,
    ) -> Prediction | list[Prediction]:
        """The task's answer for each text, and an explanation generated from the same prefill.

        Args:
            texts, batch_size, prior, attributions: As in [`classify`].
            max_batch_tokens (`int`, *optional*, defaults to 16384): Most prompt tokens of a batch, padding included.
            mode (`"guided"` or `"free"`, *optional*): `"guided"` starts the explanation from the verdict line of its
                decision, `"free"` gives the LM no hint: it writes a line of its own (with the config's
                `lm_reading_weight` or `explanation_guidance_scale`, that which its reading decides for, cut where the
                number is). Defaults to the config's `explanation_mode`.
            generate_kwargs: For `generate`, over the stored generation config; e.g. `max_new_tokens`, `do_sample`.

        Returns:
            [`Prediction`], or for a list a list of them in the same order.

        Raises:
            TypeError, ValueError: for a text, `prior` or `mode` that cannot be used.
        """
        single = isinstance(texts, str | dict)
        options = {"prior": prior, "attributions": attributions, "max_batch_tokens": max_batch_tokens}
        predictions = list(
            self.classify_and_explain_iter(
                [texts] if single else texts, batch_size, mode, **options, **generate_kwargs
            )
        )
        return predictions[0] if single else predictions

    @torch.inference_mode()
    def explain(
        self,
        text: Text,
        label: str | int | list[str | int] | None = None,
        *,
        prior: float | None = None,
        **generate_kwargs,
    ) -> Prediction | list[Prediction]:
        """An explanation of a verdict of the caller's choice: what would speak for it, were it true?

        The number stays the model's own; `explained_label` names the verdict that the words argue for.

        Args:
            text (`str` or `dict`): As in [`classify`].
            label (`str`, `int` or a list of them, *optional*): Name or id of the label to argue for; several share one
                prefill. Defaults to the model's decision.
            prior: As in [`classify`].
            generate_kwargs: For `generate`.

        Returns:
            [`Prediction`], or for a list of labels a list of them.

        Raises:
            TypeError, ValueError: for a text, label or `prior` that cannot be used.
        """
        several = isinstance(label, list | tuple)
        wanted = [self._label_id(each) for each in (label if several else [label])]
        prompts = self._encode_all([text])
        DecisionRule.from_config(self.config).prior_shift(prior)
        self.eval()
        prefill = Prefill(self, [prompts[0].input_ids])
        predictions = self._answers(prefill, [prompts[0].truncated], "guided", prior)
        explained = []
        for i, label_id in enumerate(wanted):
            labels = [predictions[0].label_id if label_id is None else label_id]
            last = i + 1 == len(wanted)
            explained += self._explained(prefill if last else prefill.copy(), predictions, labels, generate_kwargs)
        return explained if several else explained[0]

    def _label_id(self, label: str | int | None) -> int | None:
        names = self.config.label_names
        if label is None or (label in (0, 1) and not isinstance(label, bool | float)):
            return label
        if label in names:
            return names.index(label)
        raise ValueError(f"`label` is one of {names}, 0 or 1, got {label!r}.")

    def _explained(
        self,
        prefill: Prefill,
        predictions: list[Prediction],
        labels: list[int] | None,
        generate_kwargs: dict[str, Any],
    ) -> list[Prediction]:
        if labels is not None:
            prefill.write_verdicts(labels)
        written, words, cut = zip(*prefill.explain(generate_kwargs), strict=True)
        names = [None if label is None else self.config.label_names[label] for label in labels or written]
        return [
            replace(prediction, explanation=text, explained_label=name, explanation_cut=was_cut)
            for prediction, text, name, was_cut in zip(predictions, words, names, cut, strict=True)
        ]

    def _answers(
        self, prefill: Prefill, truncated: list[bool], mode: str | None, prior: float | None = None
    ) -> list[Prediction]:
        """Predictions for computed prompts, before any words; verdicts are read if these, or the number, need it."""
        rule = DecisionRule.from_config(self.config)
        readings = prefill.read_verdicts() if mode or rule.lm_reading_weight else None
        return rule.predict(prefill.cls_logits, truncated, prior, readings)

    def _verdicts(self, prefill: Prefill, predictions: list[Prediction], mode: str) -> list[int] | None:
        """Labels of the verdict lines that explanations are to begin with; `None` where the LM writes its own.

        What the LM writes is what it finds likelier than one half. Where its reading counts, in the number or for
        guidance, it is cut where the number is: a threshold for a high sensitivity would else make words contradict.
        """
        if mode == "guided":
            return [prediction.label_id for prediction in predictions]
        if self.config.explanation_guidance_scale == 1 and not self.config.lm_reading_weight:
            return None
        return DecisionRule.from_config(self.config).labels_by_reading(prefill.readings, predictions[0].prior)

    def stream(
        self,
        text: Text,
        mode: str | None = None,
        *,
        prior: float | None = None,
        timeout: float | None = None,
        **generate_kwargs,
    ) -> Iterator[Prediction | str]:
        """The number at once, then the words while they are written.

        Args:
            text, mode, prior: As in [`classify_and_explain`].
            timeout (`float`, *optional*): Longest wait for a piece, in seconds.
            generate_kwargs: For `generate`.

        Returns:
            An iterator over a [`Prediction`] without explanation, then pieces of the explanation (`str`), then the
            finished [`Prediction`]. Closing it early ends the generation.

        Raises:
            TypeError, ValueError: at the call, for a text, `mode` or `prior` that cannot be used.
        """
        mode = self._mode(mode)
        prompts = self._encode_all([text])
        DecisionRule.from_config(self.config).prior_shift(prior)
        return self._stream(prompts, mode, prior, timeout, generate_kwargs)

    @torch.inference_mode()
    def _stream(
        self,
        prompts: list[EncodedPrompt],
        mode: str,
        prior: float | None,
        timeout: float | None,
        generate_kwargs: dict[str, Any],
    ) -> Iterator[Prediction | str]:
        self.eval()
        prefill = Prefill(self, [prompts[0].input_ids])
        (prediction,) = self._answers(prefill, [prompts[0].truncated], mode, prior)
        labels = self._verdicts(prefill, [prediction], mode)
        if labels is not None:
            prefill.write_verdicts(labels)
            prediction = replace(prediction, explained_label=self.config.label_names[labels[0]])
        yield prediction
        inputs = prefill.start(generate_kwargs)
        written, words, cut = yield from stream_pieces(self, inputs, timeout, None if labels is None else labels[0])
        if labels is None and written is not None:
            prediction = replace(prediction, explained_label=self.config.label_names[written])
        yield replace(prediction, explanation=words, explanation_cut=cut)

    async def astream(self, text: Text, mode: str | None = None, **kwargs) -> AsyncIterator[Prediction | str]:
        """[`stream`] for `async for`: the event loop stays free while the model works."""
        events = self.stream(text, mode, **kwargs)
        loop = asyncio.get_running_loop()
        worker = ThreadPoolExecutor(1)  # one thread: `close` comes after a `next` that nobody waits for any more
        try:
            while (event := await loop.run_in_executor(worker, next, events, None)) is not None:
                yield event
        finally:
            closing = loop.run_in_executor(worker, events.close)
            worker.shutdown(wait=False)
            await asyncio.shield(closing)

    @torch.inference_mode()
    def attribute(
        self, text: Text, max_batch_tokens: int | None = None, batch_size: int | None = None
    ) -> tuple[Attribution, ...]:
        """What each sentence of a text does to the logit, by leaving it out.

        Of a text of more than 64 sentences, as many neighbouring ones are left out together as make it 64 parts or
        fewer, so that it costs no more than 64 further texts.

        Args:
            text (`str` or `dict`): As in [`classify`].
            max_batch_tokens, batch_size (`int`, *optional*): As in [`classify`].

        Returns:
            `tuple[Attribution, ...]`: In the order of the text; nothing for what was cut from too long a text.
        """
        whole, places, variants = occlusions(self.encoder, text)
        prompts, rule = [whole, *variants], DecisionRule.from_config(self.config)
        logits = torch.empty(len(prompts), dtype=torch.float64)
        self.eval()
        prefix = SharedPrefix.of(self, prompts, whole=rule.lm_reading_weight > 0)
        most = max_batch_tokens or pass_tokens(self.device)
        for indices in token_batches(list(map(len, prompts)), most, batch_size):
            logits[indices] = rule.logits(*self._read([prompts[i] for i in indices], prefix))
        scores = (logits[0] - logits[1:]).tolist()
        return tuple(Attribution(*place, score=score) for place, score in zip(places, scores, strict=True))

    @torch.inference_mode()
    def _decide(self, input_ids: list[int], explain: bool) -> Prediction:
        """The prediction for a prompt that is encoded already."""
        self.eval()
        prefill = Prefill(self, [input_ids])
        mode = self.config.explanation_mode if explain else None
        predictions = self._answers(prefill, [False], mode)
        if explain:
            predictions = self._explained(prefill, predictions, self._verdicts(prefill, predictions, mode), {})
        return predictions[0]
