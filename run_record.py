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
# In quotes (of JSON or of a shell) a path may hold spaces; without, a second part tells it from a unit.
_PATH = re.compile(
    r"""(?<=["'])(?P<flag>[\w-]*=)?/(?:[^/"'\s](?:[^/"'\n]*[^/"'\s])?/)*(?P<quoted>[^/"'\s][^/"'\n]*)/?(?=["'])"""
    r"""|(?<![^\s=:,\[(`])/(?:[^\s/"'`]+/)+(?P<plain>[^\s/"'`,;)\]]+)/?"""
)


def without_secrets(text: str) -> str:
    """`text` without the Hub's tokens and what stands for a password in addresses; a file may be published."""
    return _PASSWORD.sub("...@", _TOKEN.sub("hf_...", text))


def without_local_paths(text: str) -> str:
    """`text` with the last part alone of each absolute path, in a form that is no name of a repository."""
    return _PATH.sub(lambda match: f"{match['flag'] or ''}.../{match['quoted'] or match['plain']}", text)


def peak_memory_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` counts what the parent held when it started this process, too
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def describe_checkpoint(config: Any) -> dict[str, Any]:
    """Which checkpoint gives the answers: a folder's files as they are now, or a Hub id with its commit.

    Args:
        config (`PreTrainedConfig`): As it was loaded.
    """
    folder = Path(config.name_or_path)
    if not folder.is_dir():
        return {"model": config.name_or_path, "commit": getattr(config, "_commit_hash", None)}
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json", ".jinja", ".py"))
    ignored = {"metrics.json"}  # written beside the weights, and no part of an answer
    stats = {file.name: file.stat() for file in files if file.name not in ignored}
    return {"model": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


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
