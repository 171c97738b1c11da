"""A Hugging Face model in this process as teacher: nothing leaves it. Requests that wait are answered as one batch."""

import asyncio
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from clsgen.backbones import resolve_backbone
from clsgen.explanations.teacher import (
    TOO_LONG,
    TRUNCATED,
    Messages,
    RefusedRowError,
    Reply,
    TeacherArguments,
    TeacherError,
)
from clsgen.prompting_clsgen import PromptEncoder, TaskPrompt

# Private-use characters mark where contents go, so that no text becomes a control token.
_MARK, _MARKS = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")


class LocalTeacher:
    """A causal language model with a chat template.

    Args:
        arguments (`TeacherArguments`): `model`, `temperature`, `request_seed`, and `concurrency` as the batch size.

    Raises:
        TeacherError: No model is named, it cannot be loaded, or it has no chat template.
    """

    def __init__(self, arguments: TeacherArguments):
        if not arguments.model:
            raise TeacherError("Name the teacher with --model: a folder or a Hub id.")
        try:
            folder = resolve_backbone(arguments.model)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        except (OSError, ValueError) as error:
            raise TeacherError(f"The teacher {arguments.model!r} cannot be loaded: {error}") from error
        if self.tokenizer.chat_template is None:
            raise TeacherError(
                f"The teacher {arguments.model!r} has no chat template: use an instruction-tuned model."
            )
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.arguments = arguments
        self._encoder = PromptEncoder(self.tokenizer, TaskPrompt(), max_length=0)
        self._waiting: list[tuple[list[int], int, asyncio.Future[Reply]]] = []
        self._generating = asyncio.Lock()

    async def ask(self, messages: Messages, schema: dict[str, Any], max_tokens: int) -> Reply:
        ids = self._encode(messages)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(ids) + max_tokens > longest:
            raise RefusedRowError(TOO_LONG)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((ids, max_tokens, future))
        async with self._generating:
            if not future.done():
                await self._answer_batch()
        return await future

    async def _answer_batch(self) -> None:
        batch = self._waiting[: self.arguments.concurrency]
        del self._waiting[: len(batch)]
        try:
            replies = await asyncio.to_thread(
                self._generate, [ids for ids, _, _ in batch], max(m for _, m, _ in batch)
            )
        except Exception as error:  # whoever waits must hear of it, whatever it is
            failure = TeacherError(f"The local teacher failed: {type(error).__name__}: {error}")
            for _, _, future in batch:
                future.set_exception(failure)
            return
        for (_, _, future), reply in zip(batch, replies, strict=True):
            if not future.done():  # cancelled meanwhile
                future.set_result(reply)

    def _encode(self, messages: Messages) -> list[int]:
        marked = [{"role": each["role"], "content": _MARK.format(i)} for i, each in enumerate(messages)]
        try:
            skeleton = self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        except Exception:  # templates refuse a system role by raising whatever they like
            system, user, *others = marked
            joined = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
            skeleton = self.tokenizer.apply_chat_template(
                [joined, *others], tokenize=False, add_generation_prompt=True
            )
        ids: list[int] = []
        for i, piece in enumerate(_MARKS.split(skeleton)):
            if i % 2:
                ids += self._encoder.encode_plain(messages[int(piece)]["content"])
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def _generate(self, prompts: list[list[int]], max_tokens: int) -> list[Reply]:
        """Replies of a batch of prompts, padded on the left."""
        batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.arguments.temperature > 0:
            set_seed(self.arguments.request_seed)
            sampling = {"do_sample": True, "temperature": self.arguments.temperature}
        with torch.inference_mode():
            output = self.model.generate(
                **batch, max_new_tokens=max_tokens, pad_token_id=self.tokenizer.pad_token_id, **sampling
            )
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        replies = []
        for prompt, row in zip(prompts, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            length = next((i for i, token in enumerate(row) if token in ends), None)
            content = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            finish_reason = TRUNCATED if length is None else "stop"
            replies.append(Reply(content, finish_reason, None, len(prompt), length or len(row)))
        return replies
