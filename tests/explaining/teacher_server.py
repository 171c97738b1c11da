"""A teacher behind an OpenAI-compatible server on loopback, which behaves as a test tells it to."""

import json
import socket
import threading
from collections import Counter

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse


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


class Server:
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
            return found if isinstance(found, JSONResponse) else completion(found)

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)

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
