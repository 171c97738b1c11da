"""A small HTTP server for one checkpoint: concurrent requests are answered in batches, explanations can be streamed.

python serve_clsgen.py --model outputs/trial_claims/model --port 8000     # then open /docs
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoModel, HfArgumentParser

logger = logging.getLogger("clsgen.serve_clsgen")
LOOK_EVERY_S = 0.1  # whether a client has gone
FAILED = "The model failed on this request; the server's log says why."


@dataclass
class ServeArguments:
    """Which model, where, and within which limits."""

    model: str = field(metadata={"help": "A CLSGen checkpoint: a folder or a Hub id. Its code is run."})
    revision: str | None = field(default=None, metadata={"help": "Commit of the Hub repo; pin what you have read."})
    host: str = field(default="127.0.0.1", metadata={"help": "There is no authentication: put a proxy in front."})
    port: int = 8000
    max_batch_size: int = field(default=16, metadata={"help": "Most texts of a batch."})
    max_wait_ms: float = field(default=5.0, metadata={"help": "How long a batch waits for company."})
    queue_size: int = field(default=256, metadata={"help": "Most requests that wait; further ones get 503."})
    max_streams: int = field(default=4, metadata={"help": "Most streams at a time; further ones get 503."})
    timeout_s: float = field(default=120.0, metadata={"help": "Longest time for an answer; then 504."})
    max_body_bytes: int = field(default=1_000_000, metadata={"help": "Largest request; a larger one gets 413."})
    max_characters: int = field(default=200_000, metadata={"help": "Longest text; a longer one gets 413."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest explanation that may be asked for."})


class StreamRequest(BaseModel):
    """One text, to be explained."""

    model_config = ConfigDict(extra="forbid")

    text: str | dict[str, str] = Field(description="A whole text, or the task's fields.")
    mode: Literal["guided", "free"] | None = None
    prior: float | None = Field(default=None, gt=0, lt=1, description="Base rate to re-base the probability to.")
    max_new_tokens: int | None = Field(default=None, ge=1)


class PredictRequest(StreamRequest):
    """One text and what to say about it."""

    explain: bool = Field(default=True, description="Whether to write an explanation.")
    attributions: bool = Field(default=False, description="Whether to say what each sentence does to the answer.")


class Batcher:
    """Answers requests in batches, on one thread that owns the model's compute.

    Requests that ask for the same options share a batch. One whose client has gone, or whose time is up, is dropped
    before it costs anything.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): The model.
        arguments ([`ServeArguments`]): The limits.
    """

    def __init__(self, model: Any, arguments: ServeArguments):
        self.model = model
        self.arguments = arguments
        self.queue: asyncio.Queue = asyncio.Queue(arguments.queue_size)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="clsgen-batch")
        self._task: asyncio.Task | None = None

    async def __aenter__(self) -> "Batcher":
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        while not self.queue.empty():
            self.queue.get_nowait()[1].cancel()
        self._executor.shutdown()

    async def submit(self, request: PredictRequest) -> Any:
        """The prediction.

        Raises:
            asyncio.QueueFull: where too many wait already.
            TimeoutError: where it takes longer than `timeout_s`.
        """
        future = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((request, future))
        return await asyncio.wait_for(future, self.arguments.timeout_s)

    async def _next_batch(self) -> list[tuple[PredictRequest, asyncio.Future]]:
        batch = [await self.queue.get()]
        if self.queue.qsize() + 1 < self.arguments.max_batch_size:
            await asyncio.sleep(self.arguments.max_wait_ms / 1000)
        while not self.queue.empty() and len(batch) < self.arguments.max_batch_size:
            batch.append(self.queue.get_nowait())
        return [item for item in batch if not item[1].done()]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            groups: dict[tuple, list] = {}
            for item in await self._next_batch():
                request = item[0]
                options = (request.explain, request.mode, request.prior, request.attributions, request.max_new_tokens)
                groups.setdefault(options, []).append(item)
            pending = list(groups.values())
            while pending:
                items = pending.pop()
                try:
                    predictions = await loop.run_in_executor(
                        self._executor, self._predict, [item[0] for item in items]
                    )
                except Exception as error:  # one request's failure is its own answer, not that of its company
                    logger.exception("A batch of %d failed", len(items))
                    if len(items) > 1:
                        pending += [[item] for item in items]
                        continue
                    answers = [(items[0][1], error)]
                else:
                    answers = [(item[1], found) for item, found in zip(items, predictions, strict=True)]
                for future, answer in answers:
                    if not future.done():
                        failed = isinstance(answer, Exception)
                        future.set_exception(answer) if failed else future.set_result(answer)

    def _predict(self, requests: list[PredictRequest]) -> list[Any]:
        first, texts = requests[0], [request.text for request in requests]
        options = {"prior": first.prior, "attributions": first.attributions}
        if not first.explain:
            return self.model.classify(texts, **options)
        return self.model.classify_and_explain(texts, mode=first.mode, **options, **length_of(first))


def length_of(request: StreamRequest) -> dict[str, int]:
    """The options of `generate` that a request may set."""
    return {} if request.max_new_tokens is None else {"max_new_tokens": request.max_new_tokens}


async def unless_gone(http: Request, answer: Coroutine[Any, Any, Any]) -> Any:
    """Waits for an answer, and gives up on it (status 499, which nobody reads) once its client has gone."""

    async def gone() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(LOOK_EVERY_S)

    tasks = [asyncio.ensure_future(each) for each in (answer, gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(499, "The client has gone.")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


class BodyLimit:
    """Refuses bodies that are too large while they arrive, whatever their header says (ASGI middleware)."""

    def __init__(self, app: Any, max_bytes: int):
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                answer = {"detail": f"The request is larger than {self.max_bytes} bytes."}
                await JSONResponse(answer, 413)(scope, receive, send)
                return
        sent = False

        async def replay() -> dict[str, Any]:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


async def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
    """What is wrong with a request, and where, without what stood there: that may be a patient's text, or no JSON."""
    detail = [{name: problem[name] for name in ("loc", "msg", "type")} for problem in error.errors()]
    return JSONResponse({"detail": detail}, 422)


def create_app(model: Any, arguments: ServeArguments) -> FastAPI:
    """The server as an ASGI application.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): The model.
        arguments ([`ServeArguments`]): The limits.
    """
    streams = asyncio.Semaphore(arguments.max_streams)
    batcher = Batcher(model, arguments)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    app = FastAPI(title="CLSGen", description=model.config.prompt["question"], lifespan=lifespan)
    app.add_middleware(BodyLimit, max_bytes=arguments.max_body_bytes)
    app.add_exception_handler(RequestValidationError, refuse)

    def check(request: StreamRequest) -> None:
        length = len(request.text) if isinstance(request.text, str) else sum(map(len, request.text.values()))
        if length > arguments.max_characters:
            raise HTTPException(413, f"The text has {length} characters; at most {arguments.max_characters} are read.")
        if (request.max_new_tokens or 0) > arguments.max_new_tokens:
            raise HTTPException(422, f"`max_new_tokens` may be at most {arguments.max_new_tokens}.")
        try:
            model.encoder.encode(request.text)
        except (TypeError, ValueError) as error:
            raise HTTPException(422, str(error)) from error
        if request.prior is not None and model.config.base_rate is None:
            raise HTTPException(422, "This model holds no base rate, so `prior` cannot be used with it.")

    @app.post("/predict")
    async def predict(request: PredictRequest, http: Request) -> dict[str, Any]:
        """The prediction for one text. 413 and 422: the request; 503: too busy, try again; 504: took too long."""
        await asyncio.to_thread(check, request)
        try:
            prediction = await unless_gone(http, batcher.submit(request))
        except asyncio.QueueFull as error:
            raise HTTPException(503, "Too many requests wait; try again.", {"Retry-After": "1"}) from error
        except asyncio.TimeoutError as error:
            raise HTTPException(504, f"No answer within {arguments.timeout_s:g} s.") from error
        except HTTPException:
            raise
        except Exception as error:
            raise HTTPException(500, getattr(error, "reason", FAILED)) from error
        return prediction.to_dict()

    async def checked_stream(request: StreamRequest) -> AsyncIterator[ServerSentEvent]:
        events = model.astream(
            request.text, request.mode, prior=request.prior, timeout=arguments.timeout_s, **length_of(request)
        )
        first = True
        try:
            async for event in events:
                if isinstance(event, str):
                    yield ServerSentEvent(data=event, event="text")
                else:
                    yield ServerSentEvent(data=event.to_dict(), event="prediction" if first else "done")
                first = False
        except Exception as error:  # the status is sent already
            logger.exception("A stream failed")
            yield ServerSentEvent(data=getattr(error, "reason", FAILED), event="error")

    async def admitted(request: StreamRequest) -> AsyncIterator[StreamRequest]:
        """Takes a place before anything else can be waited for; FastAPI gives it back when the stream has ended."""
        if streams.locked():
            raise HTTPException(503, "Too many streams are open; try again.", {"Retry-After": "1"})
        async with streams:
            await asyncio.to_thread(check, request)
            yield request

    @app.post("/predict/stream", response_class=EventSourceResponse)
    async def predict_stream(request: StreamRequest = Depends(admitted)) -> AsyncIterator[ServerSentEvent]:  # noqa: B008
        """Server-sent events: `prediction` at once, then `text` pieces, then `done` with the finished prediction.

        Where the model fails, `error` says why and is the last.
        """
        async for event in checked_stream(request):
            yield event

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server answers, for which question, and how many requests wait."""
        return {
            "status": "ok",
            "question": model.config.prompt["question"],
            "labels": model.config.label_names,
            "fields": model.encoder.prompt.fields,
            "waiting": batcher.queue.qsize(),
        }

    return app


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring. Returns the exit code."""
    arguments = HfArgumentParser(ServeArguments).parse_args_into_dataclasses(argv)[0]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        about = {"revision": arguments.revision, "trust_remote_code": True}
        model = AutoModel.from_pretrained(arguments.model, device_map="auto", **about)
    except (OSError, ValueError) as error:
        logger.error("%s", error)
        return 1
    uvicorn.run(create_app(model, arguments), host=arguments.host, port=arguments.port, access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
