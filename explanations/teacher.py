"""Teachers: what is asked for explanations, at an OpenAI-compatible endpoint or in this process. Nothing that a log
shows holds a key or a text."""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import openai
from aiolimiter import AsyncLimiter

from clsgen.loopback import is_loopback
from clsgen.run_record import without_secrets

logger = logging.getLogger(__name__)
Messages = list[dict[str, str]]
TRUNCATED, CONTENT_FILTER, TOO_LONG = "length", "content_filter", "too_long"
_REFUSED = {
    CONTENT_FILTER: "the endpoint's content filter refuses the text",
    TOO_LONG: "the text does not fit into the teacher",
}
_ECHO_CHARACTERS = 20
_MOST_CONSECUTIVE_FAILURES = 3


class TeacherError(RuntimeError):
    """The teacher cannot be asked at all; its message says why and what to do."""


class NoReplyError(RuntimeError):
    """The teacher failed on one row, for reasons that may pass."""


class RefusedRowError(RuntimeError):
    """The teacher does not take one row's text; `reason` is its name in the ledger. That is no answer, and not kept:
    the same server may take the text another day, by a larger context or another filter."""

    def __init__(self, reason: str):
        super().__init__(_REFUSED[reason])
        self.reason = reason


@dataclass(frozen=True)
class Reply:
    """One answer of a teacher.

    Args:
        content (`str`): Its words, without reasoning.
        finish_reason (`str`): `"stop"`, or why there is no whole answer: `"length"`, `"content_filter"`.
        refusal (`str`, *optional*): The teacher's own word that it refuses.
        prompt_tokens, completion_tokens (`int`): As counted by the endpoint; reasoning is in the second.
    """

    content: str
    finish_reason: str = "stop"
    refusal: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Teacher(Protocol):
    """What [`build`] asks."""

    async def ask(self, messages: Messages, schema: dict[str, Any], max_tokens: int) -> Reply:
        """Answers one conversation; raises [`NoReplyError`], [`RefusedRowError`] or [`TeacherError`]."""


@dataclass
class TeacherArguments:
    """Whom to ask, and how."""

    model: str | None = field(default=None, metadata={"help": "The teacher: the endpoint's name for it, a Hub id or a "
                                                              "folder."})  # fmt: skip
    teacher: str = field(
        default="endpoint", metadata={"help": "An OpenAI-compatible endpoint, or a model in this process.",
                                      "choices": ["endpoint", "local"]}
    )  # fmt: skip
    base_url: str | None = field(
        default=None, metadata={"help": "Of the endpoint, e.g. http://localhost:8000/v1; OpenAI's own by default."}
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the key; there is no other way "
                                                    "to give one. A loopback endpoint needs none."}
    )  # fmt: skip
    temperature: float = field(default=0.0, metadata={"help": "Of sampling; 0 for the likeliest answer."})
    max_tokens: int = field(default=1024, metadata={"help": "Longest answer, reasoning included; doubled in a re-ask "
                                                            "where it was cut."})  # fmt: skip
    request_seed: int = field(default=0, metadata={"help": "Seed that requests carry."})
    max_reasks: int = field(default=2, metadata={"help": "Further tries for an answer that has not the right form."})
    structured_output: str = field(
        default="auto", metadata={"help": "Ask for the answer's JSON schema where the endpoint takes one, or never; "
                                          "answers are validated either way.", "choices": ["auto", "never"]}
    )  # fmt: skip
    concurrency: int = field(default=8, metadata={"help": "Most requests at a time (`local`: the batch size)."})
    requests_per_minute: float | None = field(default=None, metadata={"help": "Rate limit on this side."})
    max_retries: int = field(
        default=8, metadata={"help": "Further tries, with back-off, where an endpoint is down, overloaded or failing."}
    )
    timeout: float = field(default=300.0, metadata={"help": "Seconds to wait for one answer."})
    input_price: float = field(default=0.0, metadata={"help": "US dollars for a million tokens of prompts."})
    output_price: float = field(default=0.0, metadata={"help": "US dollars for a million tokens of answers."})

    def __post_init__(self):
        for name in ("max_tokens", "concurrency", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be more than 0, got {getattr(self, name)}.")
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise ValueError(f"`requests_per_minute` must be more than 0, got {self.requests_per_minute}.")
        if min(self.max_reasks, self.max_retries, self.temperature, self.input_price, self.output_price) < 0:
            raise ValueError("`max_reasks`, `max_retries`, `temperature` and prices can't be negative.")

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """US dollars."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


class EndpointTeacher:
    """An OpenAI-compatible chat endpoint. Its client tries again, with back-off and as `Retry-After` says.

    Args:
        arguments (`TeacherArguments`): Whom to ask.
        loopback_only (`bool`, *optional*): Refuse any endpoint that is not on this machine, and follow no redirect.

    Raises:
        TeacherError: No key, no model, or an endpoint that may not be asked.
    """

    def __init__(self, arguments: TeacherArguments, loopback_only: bool = False):
        if not arguments.model:
            raise TeacherError("Name the teacher with --model.")
        base_url = arguments.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        if not base_url.startswith(("http://", "https://")):
            raise TeacherError(f"`base_url` starts with http:// or https://, got {without_secrets(base_url)!r}.")
        loopback, told_url = is_loopback(base_url), without_secrets(base_url)
        if loopback_only and not loopback:
            raise TeacherError(
                f"These data are credentialed: they must not leave this machine, and {told_url} is not on it. Use a "
                "teacher on loopback or `--teacher local`; where you have the right to send them, say so with "
                "`--credentialed_data_may_leave true`."
            )
        key = os.environ.get(arguments.api_key_env) or ("none" if loopback else None)
        if key is None:
            raise TeacherError(f"There is no key in the environment variable {arguments.api_key_env}: export it.")
        self.arguments, self._told_url, self._key = arguments, told_url, key
        self._limiter = AsyncLimiter(arguments.requests_per_minute, 60) if arguments.requests_per_minute else None
        # A proxy from the environment would carry what is meant for loopback elsewhere.
        http_client = openai.DefaultAsyncHttpx2Client(trust_env=not loopback, follow_redirects=not loopback_only)
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=base_url, max_retries=arguments.max_retries, timeout=arguments.timeout,
            http_client=http_client,
        )  # fmt: skip
        self._options: dict[str, Any] = {"temperature": arguments.temperature, "seed": arguments.request_seed}
        self._length_name = "max_tokens"
        self._structured = arguments.structured_output == "auto"
        self._consecutive_failures = 0

    async def ask(self, messages: Messages, schema: dict[str, Any], max_tokens: int) -> Reply:
        async with self._limiter or contextlib.nullcontext():
            while True:
                request = self._request(schema, max_tokens)
                try:
                    completion = await self._client.chat.completions.create(
                        model=self.arguments.model, messages=messages, **request
                    )
                except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                    reason = self._row_problem(error)
                    if reason is not None:
                        raise RefusedRowError(reason) from None
                    # What this request was refused for, another one may have been told meanwhile.
                    if request == self._request(schema, max_tokens) and not self._adapt(error):
                        raise TeacherError(self._told(error, messages)) from None
                except openai.OpenAIError as error:
                    raise self._failure(error, messages) from None
                else:
                    self._consecutive_failures = 0
                    return _read_completion(completion)

    def _request(self, schema: dict[str, Any], max_tokens: int) -> dict[str, Any]:
        request = {**self._options, self._length_name: max_tokens}
        if self._structured:
            form = {"name": "explanation", "schema": schema, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": form}
        return request

    @staticmethod
    def _row_problem(error: openai.APIStatusError) -> str | None:
        """By name, an error that lies in the text; `None` for any other."""
        said = f"{error.code} {error.message}".lower()
        if "content_filter" in said or "content management policy" in said:
            return CONTENT_FILTER
        if "context_length" in said or "context length" in said or "maximum context" in said:
            return TOO_LONG
        return None

    def _adapt(self, error: openai.APIStatusError) -> bool:
        """Leaves out, or calls otherwise, an option that the endpoint does not take; whether there was one."""
        said = f"{error.param} {error.message}"
        if self._structured and re.search(r"response_format|json_schema|schema|guided|grammar", said):
            logger.warning("The endpoint takes no JSON schema: answers are asked for in words, and validated.")
            self._structured = False
            return True
        if self._length_name == "max_tokens" and "max_tokens" in said and "max_completion_tokens" in said:
            self._length_name = "max_completion_tokens"
            return True
        for name in list(self._options):
            if name in said:
                logger.warning("The endpoint does not take `%s`: requests leave it out.", name)
                del self._options[name]
                return True
        return False

    def _failure(self, error: openai.OpenAIError, messages: Messages) -> Exception:
        """The error to raise: a [`NoReplyError`] where only this row may be at fault, else a [`TeacherError`]."""
        retries = self.arguments.max_retries
        if isinstance(error, openai.RateLimitError):
            return TeacherError(
                f"{self._told_url} still answers 429 (too many requests; code {error.code}) after {retries} further "
                "tries with back-off. Lower --concurrency or --requests_per_minute, or see whether the quota is used "
                "up; the same command then goes on from here."
            )
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return TeacherError(
                f"{self._told_url} refuses the key (status {error.status_code}). Put a valid one into the environment "
                f"variable {self.arguments.api_key_env}."
            )
        if isinstance(error, openai.NotFoundError):
            return TeacherError(
                f"{self._told_url} knows no chat endpoint, or no model {self.arguments.model!r} (status 404). A base "
                "URL mostly ends in /v1."
            )
        if isinstance(error, openai.InternalServerError | openai.APITimeoutError):
            status = getattr(error, "status_code", None)
            kind = f"status {status}" if status else f"no answer in {self.arguments.timeout:g} seconds"
            self._consecutive_failures += 1
            if self._consecutive_failures < _MOST_CONSECUTIVE_FAILURES:
                return NoReplyError(f"{kind} after {retries} further tries")
            return TeacherError(
                f"{self._told_url} fails ({kind}) on {self._consecutive_failures} rows in a row, after {retries} "
                "further tries each. Look at its log; the same command then goes on from here."
            )
        if isinstance(error, openai.APIConnectionError):
            return TeacherError(
                f"{self._told_url} cannot be reached ({retries} further tries). Is it up? The same command goes on "
                "from here."
            )
        return TeacherError(self._told(error, messages))

    def _told(self, error: openai.OpenAIError, messages: Messages) -> str:
        """The endpoint's own words, unless they repeat a piece of a text or the key."""
        status = getattr(error, "status_code", None)
        words = " ".join(str(getattr(error, "message", "")).split())[:300]
        pieces = (words[i : i + _ECHO_CHARACTERS] for i in range(max(1, len(words) - _ECHO_CHARACTERS + 1)))
        sent = " ".join(" ".join(message["content"].split()) for message in messages)
        if self._key in words or any(len(piece) == _ECHO_CHARACTERS and piece in sent for piece in pieces):
            words = "its message repeats what was sent, and is left out here"
        return f"{self._told_url} refuses the request (status {status}, {type(error).__name__}): {words}"

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._client.close()


def _read_completion(completion: Any) -> Reply:
    """Content, and what else is of use; a server's `reasoning_content` is left where it is."""
    if not getattr(completion, "choices", None):
        return Reply("", "stop")
    choice, usage = completion.choices[0], completion.usage
    return Reply(
        content=choice.message.content or "",
        finish_reason=choice.finish_reason or "stop",
        refusal=getattr(choice.message, "refusal", None),
        prompt_tokens=getattr(usage, "prompt_tokens", 0) or 0,
        completion_tokens=getattr(usage, "completion_tokens", 0) or 0,
    )


@contextlib.asynccontextmanager
async def open_teacher(arguments: TeacherArguments, loopback_only: bool = False) -> AsyncIterator[Teacher]:
    """The teacher that the arguments name, closed at the end."""
    if arguments.teacher == "local":
        from clsgen.explanations.local_teacher import LocalTeacher  # torch is needed by this one alone

        yield await asyncio.to_thread(LocalTeacher, arguments)
        return
    teacher = EndpointTeacher(arguments, loopback_only)
    try:
        yield teacher
    finally:
        await teacher.aclose()
