"""Timings that can be compared: the sides of a comparison take turns in one process, and medians are reported."""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clsgen import run_record


def take_turns(sides: dict[str, Callable[[], Any]], repeats: int, warm: bool = False) -> dict[str, list[float]]:
    """Seconds of each call of each side, after one call of each to warm up.

    Args:
        sides (`dict[str, Callable]`): What to time.
        repeats (`int`): Calls of each.
        warm (`bool`, *optional*, defaults to `False`): Whether the sides are warm already.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(repeats + (not warm)):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if i or warm:
                seconds[name].append(round(time.perf_counter() - start, 4))
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each side, in seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def describe_machine() -> dict[str, Any]:
    """Processor, cores and threads."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        model = platform.machine()
    return {"processor": model, "threads": torch.get_num_threads(), "system": platform.system()}


def describe_run() -> dict[str, Any]:
    """Machine, command, commit and versions, for a result file."""
    spec = sys.modules["__main__"].__spec__  # `None` where nobody said `-m`, as in a worker of pytest-xdist
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    return {"machine": describe_machine(), **run_record.describe_run("-m", [module, *sys.argv[1:]])}
