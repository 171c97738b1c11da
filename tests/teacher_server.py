"""A teacher behind an OpenAI-compatible server on loopback, which behaves as a test tells it to."""

import inspect
import json
import socket
import threading
import time
from collections import Counter

import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

SPEC = {
    "name": "mine",
    "system_prompt": "You read reports.",
    "template": "Report {text}",
    "document": "text",
    "question": "Is it good?",
    "labels": ["bad", "good"],
    "verdicts": ["not good", "good"],
    "data_files": {"train": "train.jsonl", "validation": "validation.jsonl"},
    "license": "cc0-1.0",
}
ROWS = 12


def answer(verdict="good", probability=None, words="", **others):
    """A teacher's whole answer, as JSON."""
    explanation = f"The report number {words} speaks of an outcome that many people would call {verdict} on the whole."
    probability = probability if probability is not None else {"good": 0.9, "not good": 0.1}[verdict]
    return json.dumps({"explanation": explanation, "verdict": verdict, "probability": probability, **others})


def number_of(body):
    """The number of the report that a request is about."""
    return int(body["messages"][1]["content"].partition("Report ")[2].split()[0])


def sound(body):
    """A teacher that is right about every report but number 3, and finds no ground for what it is told about that."""
    number = number_of(body)
    if "An expert has settled" in body["messages"][1]["content"]:
        told = {
            "explanation": f"Nothing in the report number {number} speaks for the answer that was given to me here."
        }
        return json.dumps({**told, "supported_by_text": False})
    return answer("good" if (number % 2 == 1) != (number == 3) else "not good", words=str(number))


class TeacherServer:
    """An OpenAI-compatible server that behaves as told, and remembers what it was asked."""

    def __init__(self):
        self.behave, self.bodies, self.headers = sound, [], []
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def complete(request: Request):
            body = await request.json()
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            found = self.behave(body)
            found = await found if inspect.isawaitable(found) else found
            return found if isinstance(found, JSONResponse) else completion(found)

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        return self

    def __exit__(self, *failure):
        self.server.should_exit = True
        self.thread.join()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def asked(self):
        """How often each report was asked about."""
        return Counter(map(number_of, self.bodies))


def completion(content, finish_reason="stop", **message):
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return JSONResponse({"id": "1", "object": "chat.completion", "created": 0, "model": "teacher", "choices": [choice],
                         "usage": usage})  # fmt: skip


def failure(status, message="no", code=None, param=None):
    error = {"message": message, "code": code, "param": param, "type": "error"}
    return JSONResponse({"error": error}, status, headers={"retry-after-ms": "1"})


def rejected(report, split="train"):
    return {label: counts["rejected"] for label, counts in report["ledger"][split].items()}


def write_source(path, rows=ROWS, **spec):
    """A task's folder without explanations, with so many training rows."""
    path.mkdir(exist_ok=True)
    for split, numbers in (("train", range(rows)), ("validation", range(rows, rows + 4))):
        lines = [
            {"id": f"r{n}", "text": f"{n} tells of a {'good' if n % 2 else 'poor'} day.", "label": n % 2}
            for n in numbers
        ]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "task.yaml").write_text(yaml.safe_dump({**SPEC, **spec}))
    return path
