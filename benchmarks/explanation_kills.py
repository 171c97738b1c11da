"""Builds explanations with a real server while both sides get killed, and counts what is asked twice or lost.

python -m benchmarks.explanation_kills --model SmolLM2-135M-Instruct \\
    --serve "python -m benchmarks.llama_cpp_server SmolLM2-135M-Instruct.Q4_1.gguf {port}"
python -m benchmarks.explanation_kills --model FOLDER --serve "transformers serve FOLDER --device cpu --port {port}"
"""

import argparse
import contextlib
import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from clsgen.atomic_io import write_json
from clsgen.build_explanations import ANSWERS
from clsgen.explanations.answers import request_key
from clsgen.explanations.task_folder import REPORT
from clsgen.explanations.teacher import TeacherArguments
from clsgen.table_files import read_rows, write_rows
from clsgen.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
CLIENT_DIES_AFTER, SERVER_DIES_AFTER, SERVER_RESTS_SECONDS = 15, 30, 5.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LoggingProxy(ThreadingHTTPServer):
    """Passes requests on to the server, and notes of each whether its answer was on the disk when it came in.

    Where the server is down the connection breaks, as it would without a proxy.

    Args:
        upstream (`str`): The server's URL.
        answers (`Path`): The client's file of answers.
    """

    daemon_threads = True

    def __init__(self, upstream: str, answers: Path):
        super().__init__(("127.0.0.1", 0), _PassOn)
        self.upstream, self.answers, self.log, self.started = upstream, answers, [], time.monotonic()

    def note(self, event: str, **about) -> None:
        """Adds a line to the log."""
        self.log.append({"seconds": round(time.monotonic() - self.started, 2), "event": event, **about})

    def written(self) -> set[str]:
        """Keys of the answers that are on the disk, whole."""
        with contextlib.suppress(FileNotFoundError):
            whole = self.answers.read_bytes().rpartition(b"\n")[0].split(b"\n")
            return {json.loads(line)["key"] for line in whole[1:] if line}
        return set()


class _PassOn(BaseHTTPRequestHandler):
    server: LoggingProxy

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        body = json.loads(content)
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
        asked = TeacherArguments(model=body["model"], temperature=body["temperature"], request_seed=body["seed"])
        key = request_key(asked, body["messages"], schema, body["max_tokens"])
        self.server.note("request", key=key, already_written=key in self.server.written())
        try:
            reply = httpx.post(f"{self.server.upstream}{self.path}", content=content, timeout=1200)
        except httpx.HTTPError as error:
            self.server.note("server gone", key=key, error=type(error).__name__)
            self.close_connection = True
            return
        self.server.note("reply", key=key, status=reply.status_code)
        with contextlib.suppress(OSError):  # the client is gone
            self.send_response(reply.status_code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""


def start_server(command: str, port: int, log: Path) -> subprocess.Popen:
    """Starts the server and waits for it to answer."""
    with log.open("a") as file:
        server = subprocess.Popen(shlex.split(command.format(port=port)), stdout=file, stderr=file, cwd=ROOT)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return server
        time.sleep(0.2)
    server.kill()
    raise RuntimeError(f"The server did not start: see {log}.")


def wait_for_answers(proxy: LoggingProxy, count: int, client: subprocess.Popen) -> None:
    """Returns when so many answers are on the disk; raises where the client ends before."""
    while len(proxy.written()) < count:
        if client.poll() is not None:
            raise RuntimeError(f"The client ended ({client.returncode}) before {count} answers were there.")
        time.sleep(0.05)


def kill(process: subprocess.Popen) -> None:
    """Ends a process at once, as a power cut would."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def run(arguments: argparse.Namespace, work: Path) -> tuple[LoggingProxy, int]:
    """The build with its two kills; returns the proxy with its log, and the exit code of the last client."""
    port = free_port()
    server = start_server(arguments.serve, port, work / "server.log")
    proxy = LoggingProxy(f"http://127.0.0.1:{port}", work / "built" / ANSWERS)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    command = [
        sys.executable, "build_explanations.py", "--task", arguments.task, "--limit", str(arguments.rows),
        "--model", arguments.model, "--base_url", f"http://127.0.0.1:{proxy.server_port}/v1",
        "--output_dir", str(work / "built"), "--max_tokens", str(arguments.max_tokens), "--max_reasks",
        str(arguments.max_reasks), "--timeout", "1200",
        "--concurrency", "4", "--min_kept_per_class", "0", "--allow_constant_teacher", "true", "--max_retries", "12",
    ]  # fmt: skip
    try:
        client = subprocess.Popen(command, cwd=ROOT)
        wait_for_answers(proxy, CLIENT_DIES_AFTER, client)
        kill(client)
        proxy.note("client killed", answers_on_disk=len(proxy.written()))
        client = subprocess.Popen(command, cwd=ROOT)
        wait_for_answers(proxy, SERVER_DIES_AFTER, client)
        kill(server)
        proxy.note("server killed", answers_on_disk=len(proxy.written()))
        time.sleep(SERVER_RESTS_SECONDS)
        server = start_server(arguments.serve, port, work / "server.log")
        proxy.note("server up again")
        code = client.wait()
        proxy.note("client done", exit_code=code, answers_on_disk=len(proxy.written()))
    finally:
        for process in (client, server):
            kill(process)
        proxy.shutdown()
    return proxy, code


def summarise(proxy: LoggingProxy, code: int, arguments: argparse.Namespace, work: Path) -> dict:
    """What was lost, and what asked twice."""
    source, built = load_task(arguments.task), load_task(work / "built")
    requests = [entry for entry in proxy.log if entry["event"] == "request"]
    answers = list(read_rows(work / "built" / ANSWERS))[1:]
    report = json.loads((work / "built" / REPORT).read_text())
    return {
        "command": shlex.join(["python", "-m", "benchmarks.explanation_kills", *sys.argv[1:]]),
        "exit_code": code,
        "rows_asked_about": len({answer["row"] for answer in answers}),
        "answers": len(answers),
        "answers_written_twice": len(answers) - len({answer["key"] for answer in answers}),
        "requests": len(requests),
        "requests_whose_answer_was_written_already": sum(entry["already_written"] for entry in requests),
        "requests_again_because_a_kill_took_the_answer": len(requests) - len({entry["key"] for entry in requests}),
        "events": [entry for entry in proxy.log if entry["event"] not in ("request", "reply")],
        "rows_lost": {
            split: sorted(set(source.splits[split]["id"]) - set(built.splits[split]["id"])) for split in source.splits
        },
        "finish_reasons": Counter(answer["reply"]["finish_reason"] for answer in answers),
        "report": report,
    }


def main() -> None:
    """Writes `kills.json` and the proxy's log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", required=True, help="command that starts the server; {port} stands for its port")
    parser.add_argument("--model", required=True, help="the server's name for the model")
    parser.add_argument("--task", default="trial_claims")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--max_tokens", type=int, default=256)
    parser.add_argument("--max_reasks", type=int, default=1)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/explanation_kills"))
    parser.add_argument("--results_dir", type=Path, default=ROOT / "results" / "explanations" / "kills")
    arguments = parser.parse_args()
    work = arguments.work_dir
    if (work / "built" / ANSWERS).exists():
        sys.exit(f"{arguments.work_dir} holds an older run: remove it, or name another --work_dir.")
    work.mkdir(parents=True, exist_ok=True)
    proxy, code = run(arguments, work)
    summary = summarise(proxy, code, arguments, work)
    arguments.results_dir.mkdir(parents=True, exist_ok=True)
    write_json(arguments.results_dir / "kills.json", summary)
    write_rows(arguments.results_dir / "requests.jsonl", proxy.log)
    print(json.dumps({name: value for name, value in summary.items() if name != "report"}, indent=2))


if __name__ == "__main__":
    main()
