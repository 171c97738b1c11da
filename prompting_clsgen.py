"""From a text to the ids of its prompt, and back: one encoder for training and inference, safe for untrusted text."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

ELLIPSIS = " ... "
VERDICT_PREFIX = "Verdict:"
_FIELD = re.compile(r"\{(\w+)\}")
# Private-use characters: no template, tokenizer or sane text holds them, so they mark where contents go.
_SYSTEM, _USER, _ASSISTANT = "\ue000clsgen-s\ue001", "\ue000clsgen-u\ue001", "\ue000clsgen-a\ue001"
_PLAIN_SKELETON = f"{_SYSTEM}\n\n{_USER}\n\nAnswer:"
# Templates that tell today's date (Llama-3.2, SmolLM3, Granite) would make a checkpoint's numbers change with the day.
_DATE = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024"}
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{directive}', '{value}')" for directive, value in _DATE.items())
    + " }}{% endmacro %}\n"  # the line ends within the block's own, so the template behind it stays as it is
)


def fill_template(template: str, values: dict[str, str]) -> str:
    """`template` with each `{field}` replaced by its value; what a value holds is never looked at again."""
    return _FIELD.sub(lambda match: values[match.group(1)], template)


@dataclass(frozen=True)
class TaskPrompt:
    """The words around a text: what is asked, of which fields, and how a verdict is put.

    Args:
        template (`str`): How the fields make up a text, with `{field}` in the place of each (substituted, never
            evaluated).
        question (`str`): The binary question, asked after the text.
        document (`str`): The field that is cut in its middle where a text is too long.
        verdicts (`list[str]`): The words of the verdict line for label 0 and label 1.
        system_prompt (`str`, *optional*): The system message.
    """

    template: str = "{text}"
    question: str = "Is the answer yes?"
    document: str = "text"
    verdicts: tuple[str, str] = ("no", "yes")
    system_prompt: str = ""

    def __post_init__(self):
        object.__setattr__(self, "verdicts", tuple(self.verdicts))
        if self.document not in self.fields:
            raise ValueError(f"`document` is {self.document!r}, which is none of the template's fields {self.fields}.")
        if len(self.verdicts) != 2 or not all(self.verdicts) or self.verdicts[0] == self.verdicts[1]:
            raise ValueError(f"`verdicts` must be two different phrases, for label 0 and 1, got {self.verdicts}.")

    @property
    def fields(self) -> list[str]:
        """Names of the template's fields, in their order."""
        return list(dict.fromkeys(_FIELD.findall(self.template)))

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> "TaskPrompt":
        """Builds the prompt from a config's `prompt`; raises `ValueError` on a key that is not one of its own."""
        unknown = set(values or {}) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(
                f"Unknown key(s) {sorted(unknown)} in the prompt; known: {[f.name for f in fields(cls)]}."
            )
        return cls(**(values or {}))

    def to_dict(self) -> dict[str, Any]:
        """The prompt as JSON-serialisable values."""
        return {**asdict(self), "verdicts": list(self.verdicts)}

    def verdict_line(self, label: int) -> str:
        """The line that a guided explanation of `label` (0 or 1) starts with."""
        return f"{VERDICT_PREFIX} {self.verdicts[label]}.\n"

    def split_verdict_line(self, text: str) -> tuple[int | None, str]:
        """The label of the verdict line that `text` begins with (`None` without one), and the words behind it."""
        text = text.strip()
        for label in sorted((0, 1), key=lambda label: -len(self.verdicts[label])):  # one may begin with the other
            line = self.verdict_line(label).strip()
            if text.startswith(line):
                return label, text[len(line) :].strip()
        return None, text

    def may_become_verdict_line(self, text: str) -> bool:
        """Whether `text`, the beginning of a longer one, can still turn out to be a verdict line."""
        return any(self.verdict_line(label).startswith(text.lstrip()) for label in (0, 1))

    def check_text(self, text: Any) -> dict[str, str]:
        """The text's fields; a `str` is a whole text, in the place of the filled-in template.

        Raises:
            TypeError: for anything but a `str`, or a `dict` of `str`.
            ValueError: for a missing, unknown or empty field, or one that is not valid Unicode.
        """
        if isinstance(text, str):
            values = {"text": text}
        elif isinstance(text, dict):
            values = text
            if set(values) != set(self.fields):
                raise ValueError(
                    f"A text of this task has the fields {self.fields}, got {list(values)}. Give exactly these, or "
                    "one string."
                )
        else:
            raise TypeError(
                f"A text is a `str`, or a `dict` with the fields {self.fields}, got {type(text).__name__}."
            )
        for name, value in values.items():
            if not isinstance(value, str):
                raise TypeError(f"The field {name!r} must be a `str`, got {type(value).__name__}.")
            if not value.strip():
                raise ValueError(f"The field {name!r} is empty: there is nothing to decide on.")
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"The field {name!r} holds a lone surrogate at character {error.start}: decode the input as UTF-8 "
                    "with errors='replace' first."
                ) from error
        return values


@dataclass(frozen=True)
class EncodedPrompt:
    """Ids of one prompt. The last is the decision token; `truncated` says whether the document was cut."""

    input_ids: list[int]
    truncated: bool


@dataclass(frozen=True)
class FittedText:
    """A text as a prompt that is not too long.

    Args:
        input_ids (`list[int]`): Of the prompt.
        template, document (`str`): Of [`TaskPrompt`]; of a whole text where the text is a `str`.
        values, shortened (`dict[str, str]`): The fields as given, and as they stand in the prompt.
        cut (`tuple[int, int]`, *optional*): Characters of the document that the prompt leaves out.
    """

    input_ids: list[int]
    template: str
    document: str
    values: dict[str, str]
    shortened: dict[str, str]
    cut: tuple[int, int] | None


class PromptEncoder:
    """Encodes texts, verdict lines and explanations of one task for one tokenizer.

    Only the chat template's own text may become control tokens: contents are encoded apart from it, and a control
    token's name inside them is split so that it stays plain text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template, or without (a plain prompt is used then).
        prompt (`TaskPrompt`): The task's prompt.
        max_length (`int`): Longest prompt, in tokens.

    Attributes:
        control_ids (`set[int]`): Ids of tokens that mean something to a chat template or a model.
        end_of_turn_id (`int`, *optional*): The one that ends the assistant's turn.

    Raises:
        ValueError: for a tokenizer that isn't fast, or whose chat template does not show what it is given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: TaskPrompt, max_length: int):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is no fast tokenizer: it doesn't tell which characters a token stands "
                "for, as cutting too long a text takes. Use one with a `tokenizer.json`."
            )
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_length = max_length
        control = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special or re.fullmatch(r"<.*>|\[.*\]", token.content)
        }
        # An unknown character is none, unless its token has another job too (GPT-2's has all of them).
        harmless = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self.control_ids = set(control.values()) - harmless
        names = sorted(control, key=len, reverse=True)
        self._control_names = re.compile("|".join(map(re.escape, names))) if names else None
        self.prefix_ids, self.suffix_ids, self.end_of_turn_id = self._encode_skeleton()

    def _render(self, messages: list[dict[str, str]], **kwargs) -> str:
        template = _FIXED_DATE + self.tokenizer.get_chat_template()
        kwargs |= {"tokenize": False, "chat_template": template, "enable_thinking": False}
        return self.tokenizer.apply_chat_template(messages, **kwargs)

    def _encode_skeleton(self) -> tuple[list[int], list[int], int | None]:
        """Ids before and after the user's content, and the id that ends the assistant's turn."""
        system, end_of_turn_id = self.prompt.system_prompt, self.tokenizer.eos_token_id
        if self.tokenizer.chat_template is None:
            skeleton = _PLAIN_SKELETON if system else _PLAIN_SKELETON.removeprefix(f"{_SYSTEM}\n\n")
            skeleton = (self.tokenizer.bos_token or "") + skeleton
        else:
            user, messages = {"role": "user", "content": _USER}, []
            if system:
                messages = [{"role": "system", "content": _SYSTEM}]
            try:
                skeleton = self._render([*messages, user], add_generation_prompt=True)
            except Exception:  # templates refuse a system role by raising whatever they like: Gemma's, TemplateError
                user = {"role": "user", "content": f"{_SYSTEM}\n\n{_USER}"}
                messages = []
                skeleton = self._render([user], add_generation_prompt=True)
            assistant = {"role": "assistant", "content": _ASSISTANT}
            ending = self._render([*messages, user, assistant]).rpartition(_ASSISTANT)[2]
            ending_ids = self._encode_template(ending)
            end_of_turn_id = next((i for i in ending_ids if i in self.control_ids), end_of_turn_id)
        if skeleton.count(_USER) != 1 or (system and skeleton.count(_SYSTEM) != 1):
            raise ValueError("The tokenizer's chat template does not show the system and user message exactly once.")
        before, _, after = skeleton.partition(_USER)
        head, _, middle = before.partition(_SYSTEM) if system else (before, "", "")
        prefix = self._encode_template(head) + self.encode_plain(system) + self._encode_template(middle)
        return prefix, self._encode_template(after), end_of_turn_id

    def _encode_template(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text`, none of them a control token's."""
        ids = [i for piece in self._split_control_names(text) for i in self._encode_template(piece)]
        if self.control_ids.intersection(ids):  # matched after the tokenizer's own normalisation
            ids = [i for character in text for i in self._encode_template(character)]
        return ids

    def _split_control_names(self, text: str) -> list[str]:
        """`text` in pieces that end within each control token's name."""
        pieces, start = [], 0
        for match in self._control_names.finditer(text) if self._control_names else ():
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [*pieces, text[start:]]

    def _plain_offsets(self, text: str) -> list[tuple[int, int]]:
        """The characters of `text` that each of its plain tokens stands for."""
        offsets, start = [], 0
        for piece in self._split_control_names(text):
            encoding = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            offsets += [(start + first, start + end) for first, end in encoding["offset_mapping"]]
            start += len(piece)
        return offsets

    def encode(self, text: str | dict[str, str]) -> EncodedPrompt:
        """Ids of the prompt of `text`, at most `max_length` of them.

        Raises:
            TypeError, ValueError: see [`TaskPrompt.check_text`]; also where the prompt is too long without its
                document.
        """
        fitted = self.fit(text)
        return EncodedPrompt(fitted.input_ids, truncated=fitted.cut is not None)

    def fit(self, text: str | dict[str, str]) -> "FittedText":
        """The text, shortened in the middle of its document where it is too long; raises as [`encode`] does."""
        values = self.prompt.check_text(text)
        template, document = self.prompt.template, self.prompt.document
        if isinstance(text, str):
            template, document = "{text}", "text"
        ids = self.encode_values(template, values)
        if len(ids) <= self.max_length:
            return FittedText(ids, template, document, values, values, cut=None)
        offsets = self._plain_offsets(values[document])
        room = self.max_length - len(self.encode_values(template, {**values, document: ELLIPSIS}))
        keep = min(room, len(offsets))
        while keep > 1:
            head, tail = (keep + 1) // 2, keep // 2
            start, end = offsets[head - 1][1], offsets[-tail][0]
            shortened = {**values, document: values[document][:start] + ELLIPSIS + values[document][end:]}
            ids = self.encode_values(template, shortened)
            if len(ids) <= self.max_length:
                return FittedText(ids, template, document, values, shortened, cut=(start, end))
            # The document may make more tokens here than alone: then the surplus says too much.
            keep = max(keep - (len(ids) - self.max_length), keep // 2)
        raise ValueError(
            f"The prompt is longer than {self.max_length} tokens even without its document ({document!r}). Shorten "
            "the other fields, or raise the model's `max_prompt_length`."
        )

    def encode_values(self, template: str, values: dict[str, str]) -> list[int]:
        """Ids of the prompt with these values, however many they are."""
        body = fill_template(template, values)
        return self.prefix_ids + self.encode_plain(f"{body}\n\n{self.prompt.question}") + self.suffix_ids

    def encode_verdict(self, label: int) -> list[int]:
        """Ids of the verdict line of `label` (0 or 1)."""
        return self.encode_plain(self.prompt.verdict_line(label))

    def encode_completion(self, explanation: str, verdict: int | None, max_length: int) -> tuple[list[int], bool]:
        """Ids of an explanation, and whether it was cut.

        Args:
            explanation (`str`): The explanation.
            verdict (`int`, *optional*): The label whose verdict line comes first; `None` for no line.
            max_length (`int`): Most tokens, the end-of-turn token included; a longer explanation loses its end (and
                no end of turn is taught then).
        """
        ids = [] if verdict is None else self.encode_verdict(verdict)
        ids = ids + self.encode_plain(explanation.strip())
        if self.end_of_turn_id is not None:
            ids.append(self.end_of_turn_id)
        return ids[:max_length], len(ids) > max_length
