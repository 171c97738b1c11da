"""The server under load, on loopback: writes `benchmarks/results/serving.json`.

python -m benchmarks.serving --model outputs/trial_claims/model
"""

import argparse
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from benchmarks.inference import load, texts_of
from benchmarks.measuring import describe_run
from clsgen.atomic_io import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "serving.json"
DOCUMENTED = (429, 503)
NEW_TOKENS = 16


def expected_answers(model_folder: str, texts: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What the server must say, computed offline."""
    return [p.to_dict() for p in load(model_folder).classify_and_explain(texts, max_new_tokens=NEW_TOKENS)]


class Client(threading.Thread):
    """Asks one question after another until told to stop; every fifth wants an explanation."""

    def __init__(self, number: int, url: str, texts: list, expected: list, stop: threading.Event):
        super().__init__(name=f"client-{number}")
        self.number, self.url, self.texts, self.expected, self.stop = number, url, texts, expected, stop
        self.latencies: dict[bool, list[float]] = {True: [], False: []}
        self.outcomes: Counter = Counter()

    def run(self) -> None:
        i = self.number
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.stop.is_set():
                i += 7
                place, explain = i % len(self.texts), i % 5 == 0
                body = {"text": self.texts[place], "explain": explain}
                body |= {"max_new_tokens": NEW_TOKENS} if explain else {}
                start = time.perf_counter()
                try:
                    answer = client.post("/predict", json=body)
                except httpx.HTTPError as error:
                    self.outcomes[f"lost: {type(error).__name__}"] += 1
                    continue
                if answer.status_code in DOCUMENTED:
                    self.outcomes[str(answer.status_code)] += 1
                    time.sleep(float(answer.headers.get("retry-after", 1)))
                elif answer.status_code != 200:
                    self.outcomes[f"error {answer.status_code}"] += 1
                else:
                    self.latencies[explain].append(time.perf_counter() - start)
                    self.outcomes["right" if self._right(answer.json(), place, explain) else "wrong answer"] += 1

    def _right(self, answer: dict[str, Any], place: int, explain: bool) -> bool:
        expected = self.expected[place]
        same = abs(answer["probability"] - expected["probability"]) < 1e-4
        return same and (not explain or answer["explanation"] == expected["explanation"])


def percentiles(latencies: list[float]) -> dict[str, float] | None:
    """p50 and p99 in seconds."""
    if len(latencies) < 2:
        return None
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3), "count": len(latencies)}


def main() -> None:
    """Starts the server, loads it, checks every answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/trial_claims/model")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    texts = texts_of("trial_claims", None, ("test",), 40)
    expected = expected_answers(arguments.model, texts)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "serve_clsgen.py", "--model", arguments.model, "--port", str(port)])
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        stop = threading.Event()
        clients = [Client(i, url, texts, expected, stop) for i in range(arguments.clients)]
        start = time.perf_counter()
        for client in clients:
            client.start()
        time.sleep(arguments.seconds)
        stop.set()
        for client in clients:
            client.join()
        took = time.perf_counter() - start
    finally:
        server.terminate()
        server.wait()
    outcomes = sum((client.outcomes for client in clients), Counter())
    report = {
        **describe_run(),
        "clients": arguments.clients,
        "seconds": round(took, 1),
        "outcomes": dict(outcomes),
        "answers_per_second": round(outcomes["right"] / took, 2),
        "latency_seconds": {
            name: percentiles([value for client in clients for value in client.latencies[explain]])
            for name, explain in (("classify", False), ("explain", True))
        },
    }
    write_json(RESULTS, report)
    print(report)


if __name__ == "__main__":
    main()
