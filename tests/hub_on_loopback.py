"""A Hub as a process on loopback, and processes that talk to it as users' do: fresh home, no other network."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from huggingface_hub import HfApi

ROOT = Path(__file__).resolve().parents[1]
TOKEN, READ_TOKEN = "hf_alice_write_token", "hf_bob_read_token"
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "200ms",
    "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class LoopbackHub:
    """The server of `hub_server/`; can be stopped and started again on the same data."""

    def __init__(self, folder: Path, xet: bool):
        self.folder, self.xet = folder, xet
        self.port, self.cdn_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None
        self.start()

    def start(self) -> None:
        command = [
            sys.executable, str(ROOT / "tests" / "hub_server"), "--port", str(self.port), "--cdn-port",
            str(self.cdn_port), "--data", str(self.folder / "hub"), "--user", f"alice:{TOKEN}:write", "--user",
            f"bob:{READ_TOKEN}:read", *(["--xet"] if self.xet else []),
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{self.url}/api/models")
                return
            time.sleep(0.05)
        raise RuntimeError("The Hub did not start.")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def faults(self, *faults: dict) -> None:
        """Makes the next matching requests fail."""
        httpx.post(f"{self.url}/_test/faults", json=[{"times": 1, **fault} for fault in faults]).raise_for_status()

    def requests(self) -> list[dict]:
        """The log of all requests so far."""
        return [json.loads(line) for line in (self.folder / "hub" / "requests.jsonl").read_text().splitlines()]

    def api(self) -> HfApi:
        """A client of the owner, in this process."""
        return HfApi(endpoint=self.url, token=TOKEN)

    def environment(self, home: str, token: str | None = None, endpoint: str | None = None) -> dict[str, str]:
        """Variables of a user's process, who knows this Hub alone, or what stands before it."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not re.match(r"(HF_|TRANSFORMERS_|PYTHONPATH$)|.*_proxy$", name, flags=re.IGNORECASE)
        }
        mine = {"HF_ENDPOINT": endpoint or self.url, "HF_HOME": str(self.folder / home), **QUIET}
        if not self.xet:
            mine["HF_HUB_DISABLE_XET"] = "1"
        if token:
            mine["HF_TOKEN"] = token
        return {**kept, **mine}

    def push(self, *arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
        """`python push_to_hub.py ...` in a process of its own."""
        return self.command("push_to_hub.py", *arguments, token=token)

    def command(self, script: str, *arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
        """A script of the repository in a process of its own."""
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            env=self.environment("publisher", token), capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    def hf(self, *arguments: str) -> str:
        """What the Hub's own command line prints, called by the owner."""
        return subprocess.run(
            [Path(sys.executable).with_name("hf"), *arguments],
            env=self.environment("publisher", TOKEN), capture_output=True, text=True, check=True, timeout=300,
        ).stdout  # fmt: skip

    def run(
        self, script: str, home: str, *arguments: str, token: str | None = None, endpoint: str | None = None
    ) -> subprocess.CompletedProcess:
        """A script in a fresh process, in an empty folder, with a home of its own."""
        elsewhere, user = self.folder / f"elsewhere-{home}", self.folder / f"{home}-user"
        elsewhere.mkdir(exist_ok=True)
        user.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=elsewhere, env={**self.environment(home, token, endpoint), "HOME": str(user)},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
