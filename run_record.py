"""What a result file says of the run behind it."""

import re
import resource
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "scikit-learn")

_TOKEN_OPTION = r"--hub[_-]t\w*"  # argparse takes the start of a name, too
_TOKEN = re.compile(r"\bhf_\w{8,}")  # also of a mirror, whose tokens may look otherwise
# "user:password@", or a token alone; "git@" and "bucket@version" stay.
_PASSWORD = re.compile(r"(?<=://)(?:[^/\s'\"?#:]*:[^/\s'\"?#]*|[^/\s'\"?#@]{16,})@")


def without_secrets(text: str) -> str:
    """`text` without the Hub's tokens and what stands for a password in addresses; a file may be published."""
    return _PASSWORD.sub("...@", _TOKEN.sub("hf_...", text))


def peak_memory_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` counts what the parent held when it started this process, too
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def describe_run(script: str, argv: list[str]) -> dict[str, Any]:
    """Command, commit and versions, for a result file that somebody can make again."""
    commit = None
    with suppress(FileNotFoundError):  # there may be no git
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    shown = [
        "..." if re.fullmatch(_TOKEN_OPTION, before) else re.sub(rf"(?s)\A({_TOKEN_OPTION}=).*", r"\1...", part)
        for before, part in pairwise(["", *argv])
    ]
    return {
        "command": without_secrets(shlex.join(["python", script, *shown])),
        "commit": commit or None,
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
    }
