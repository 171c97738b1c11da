"""The server over real HTTP on loopback: right answers to the right clients, and every limit with its status."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from clsgen.serve_clsgen import ServeArguments, create_app


@contextmanager
def serving(model, **limits):
    arguments = ServeArguments(model="", **limits)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(model, arguments), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def model(model):
    model.generation_config.max_new_tokens = 5
    model.config.base_rate = 0.5
    return model


def events_of(response):
    events = []
    for block in response.text.replace("\r\n", "\n").strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "event" in lines:
            events.append((lines["event"], json.loads(lines["data"])))
    return events


def test_concurrent_clients_get_their_own_answers(model, texts):
    texts = [{**text, "claim": f"{text['claim']} {i}"} for i in range(12) for text in texts]
    expected = model.classify_and_explain(texts)
    with serving(model) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: client.post("/predict", json={"text": text}), texts))
    assert {answer.status_code for answer in answers} == {200}
    for answer, prediction in zip(answers, expected, strict=True):
        assert answer.json()["probability"] == pytest.approx(prediction.probability, abs=1e-4)
        assert answer.json()["explanation"] == prediction.explanation


def test_options_and_health(model, texts):
    with serving(model) as client:
        health = client.get("/health").json()
        assert health["status"] == "ok"
        assert health["fields"] == ["findings", "claim"]
        body = {"text": texts[0], "explain": False, "prior": 0.1, "attributions": True}
        answer = client.post("/predict", json=body).json()
        expected = model.classify(texts[0], prior=0.1, attributions=True).to_dict()
        assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-4)
        assert len(answer["attributions"]) == len(expected["attributions"]) > 0
        assert "/predict/stream" in client.get("/openapi.json").json()["paths"]
        assert client.get("/docs").status_code == 200


def test_a_stream_is_the_number_then_the_words(model, texts):
    with serving(model) as client:
        response = client.post("/predict/stream", json={"text": texts[1]})
    assert response.headers["content-type"].startswith("text/event-stream")
    (first, number), *pieces, (last, whole) = events_of(response)
    expected = model.classify_and_explain(texts[1])
    assert (first, last) == ("prediction", "done")
    assert number["explanation"] is None
    assert number["probability"] == whole["probability"] == pytest.approx(expected.probability, abs=1e-4)
    assert {name for name, _ in pieces} <= {"text"}
    assert "".join(piece for _, piece in pieces).strip() == whole["explanation"] == expected.explanation


@pytest.mark.parametrize("path", ["/predict", "/predict/stream"])
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"text": " "}, 422, "is empty"),
        ({"text": {"claim": "a"}}, 422, "has the fields"),
        ({"text": 3}, 422, "text"),
        ({"text": "a", "nonsense": 1}, 422, "nonsense"),
        ({"text": "a", "prior": 1.5}, 422, "prior"),
        ({"text": "a", "max_new_tokens": 10_000}, 422, "max_new_tokens"),
        ({"text": float("nan")}, 422, "text"),
        ({"text": "a", "prior": float("nan")}, 422, "prior"),
        ({"text": "a", "prior": float("inf")}, 422, "prior"),
        ({"text": "a", "max_new_tokens": float("inf")}, 422, "max_new_tokens"),
        ({"text": "a", "nonsense": float("nan")}, 422, "nonsense"),
        ({"text": "a", "\ud800": 1}, 422, "unicode"),
        ({"text": {"\ud800": "a"}}, 422, "ud800"),
        ({"text": {"\ud800": 1}}, 422, "dict"),
        ({"text": "a" * 600}, 413, "600 characters"),
        ({"text": "a" * 3000}, 413, "2000 bytes"),
    ],
)
def test_bad_requests_are_told_so(model, path, body, status, message):
    with serving(model, max_characters=500, max_body_bytes=2000) as client:
        # Not `json=`: httpx writes neither NaN nor Infinity, which other clients do.
        answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code == status
        assert message in answer.text
        assert client.post("/predict", json={"text": "fine", "explain": False}).status_code == 200


def test_a_refusal_does_not_repeat_the_text(model):
    with serving(model) as client:
        answer = client.post("/predict", json={"text": ["Mrs Smith, born 1950"], "note": "Mrs Smith"})
    assert answer.status_code == 422
    assert "Smith" not in answer.text
    assert {tuple(problem) for problem in answer.json()["detail"]} == {("loc", "msg", "type")}


def test_a_full_queue_and_a_slow_answer_are_told_so(model, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    classify = model.classify

    def slow(*args, **kwargs):
        started.set()
        go_on.wait(30)
        return classify(*args, **kwargs)

    monkeypatch.setattr(model, "classify", slow, raising=False)
    body = {"text": "One text", "explain": False}
    with serving(model, queue_size=1, timeout_s=1.0, max_batch_size=1) as client, ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.post, "/predict", json=body)
        started.wait(30)
        waiting = pool.submit(client.post, "/predict", json=body)
        while client.get("/health").json()["waiting"] < 1:
            time.sleep(0.01)
        refused = client.post("/predict", json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert first.result().status_code == waiting.result().status_code == 504
        go_on.set()
        while client.get("/health").json()["waiting"]:
            time.sleep(0.01)
        assert client.post("/predict", json=body).status_code == 200


def test_a_client_that_has_gone_costs_nothing(model, monkeypatch):
    started, go_on, asked = threading.Event(), threading.Event(), []
    classify = model.classify

    def slow(texts, **kwargs):
        asked.extend(texts)
        started.set()
        go_on.wait(30)
        return classify(texts, **kwargs)

    monkeypatch.setattr(model, "classify", slow, raising=False)
    with serving(model, max_batch_size=1) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/predict", json={"text": "first", "explain": False})
        started.wait(30)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/predict", json={"text": "gone", "explain": False}, timeout=0.3)
        last = pool.submit(client.post, "/predict", json={"text": "last", "explain": False})
        while client.get("/health").json()["waiting"] < 2:
            time.sleep(0.01)
        time.sleep(1)  # in which the server sees that its client has gone
        go_on.set()
        assert first.result().status_code == last.result().status_code == 200
    assert asked == ["first", "last"]


def test_streams_beyond_the_most_are_refused_even_if_they_come_together(model, monkeypatch):
    begun, go_on, stream = threading.Event(), threading.Event(), model.astream

    async def slow(*args, **kwargs):
        begun.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        async for event in stream(*args, **kwargs):
            yield event

    monkeypatch.setattr(model, "astream", slow, raising=False)
    with serving(model, max_streams=2) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, "/predict/stream", json={"text": "One text"}) for _ in range(8)]
        begun.wait(30)
        while sum(answer.done() for answer in asked) < 6:
            time.sleep(0.01)
        assert {answer.result().status_code for answer in asked if answer.done()} == {503}
        go_on.set()
        assert sorted(answer.result().status_code for answer in asked) == [200] * 2 + [503] * 6
        for _ in range(4):  # the places are given back, if a moment after a stream's end has been read
            deadline = time.monotonic() + 30
            while (answer := client.post("/predict/stream", json={"text": "One text"})).status_code == 503:
                assert time.monotonic() < deadline, answer.text
                time.sleep(0.01)
            assert answer.status_code == 200


@pytest.mark.parametrize("option", [{"attributions": True}, {"explain": False}])
def test_a_stream_takes_no_option_that_it_has_no_answer_to(model, option):
    with serving(model) as client:
        assert client.post("/predict/stream", json={"text": "fine", **option}).status_code == 422


def test_a_text_without_a_number_fails_alone_and_says_why(model):
    model.get_input_embeddings().weight.data[model.tokenizer.convert_tokens_to_ids("~")] = float("nan")
    bodies = [{"text": text, "explain": False} for text in ("fine", "A ~ B.", "fine as well")]
    with serving(model, max_wait_ms=500) as client, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda body: client.post("/predict", json=body), bodies))
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert "not a number" in answers[1].text
        ((name, reason),) = events_of(client.post("/predict/stream", json={"text": "A ~ B."}))
        assert name == "error"
        assert "not a number" in reason


def test_a_failed_batch_fails_alone(model, monkeypatch):
    classify = model.classify

    def failing(texts, **kwargs):
        if "poison" in texts[0]:
            raise RuntimeError("out of memory")
        return classify(texts, **kwargs)

    monkeypatch.setattr(model, "classify", failing, raising=False)
    with serving(model) as client:
        assert client.post("/predict", json={"text": "poison", "explain": False}).status_code == 500
        assert client.post("/predict", json={"text": "fine", "explain": False}).status_code == 200
