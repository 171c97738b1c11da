"""How a model comes by its tokenizer, and texts become its prompts."""

import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .prompting_clsgen import EncodedPrompt, PromptEncoder, TaskPrompt

Text = str | dict[str, str]


class ClsGenTokenizerMixin:
    """Tokenizer and prompt encoder of [`ClsGenForCausalLMAndClassification`]."""

    _tokenizer: PreTrainedTokenizerBase | None = None
    _loaded_from: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As any model's. The tokenizer, which is loaded on first use, will come from the same place."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        place = str(pretrained_model_name_or_path)
        known = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # A relative path would mean another folder, or a name on the Hub, once the working directory has changed.
        model._loaded_from = {**known, "place": os.path.abspath(place) if os.path.isdir(place) else place}
        return loaded

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded from the model's own repository on first use, unless set."""
        if self._tokenizer is None:
            # With the backbone's config, so that no remote code is asked for once more.
            known = {"place": self.config.name_or_path, **(self._loaded_from or {})}
            self._tokenizer = AutoTokenizer.from_pretrained(
                known.pop("place"),
                config=self.config.text_config,
                revision=getattr(self.config, "_commit_hash", None),
                **known,
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
        made = getattr(self, "_encoder", None)
        if made is None or made[0] != key:
            made = self._encoder = (key, PromptEncoder(self.tokenizer, prompt, self.config.max_prompt_length))
        return made[1]

    @property
    def pad_token_id(self) -> int:
        """What rows are padded with; attention never sees it."""
        return self.generation_config.pad_token_id or 0

    def _stop_at_end_of_turn(self) -> None:
        """Makes `generate` stop at the chat template's end of turn, which is not always the eos token."""
        stops = self.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if self.encoder.end_of_turn_id is not None and self.encoder.end_of_turn_id not in stops:
            self.generation_config.eos_token_id = [*stops, self.encoder.end_of_turn_id]
        if self.generation_config.pad_token_id is None:
            pad, eos = self.tokenizer.pad_token_id, self.generation_config.eos_token_id
            self.generation_config.pad_token_id = pad if pad is not None else eos[0] if isinstance(eos, list) else eos

    def _encode_all(self, texts: list[Text], first: int = 0) -> list[EncodedPrompt]:
        prompts = []
        for i, text in enumerate(texts, start=first):
            try:
                prompts.append(self.encoder.encode(text))
            except (TypeError, ValueError) as error:
                raise type(error)(f"Text {i}: {error}") from error
        return prompts
