"""What a training run cost in energy and carbon: an estimate by formula, with every assumption beside it."""

import os
from typing import Any

WATTS_PER_CPU_CORE = 12.0
WATTS_PER_GPU = 400.0
WATTS_PER_GIB = 0.3725 * 1.073741824  # 0.3725 W a GB of memory
GRAMS_PER_KWH = 475.0  # world average of 2018


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def estimate_footprint(seconds: float, memory_gib: float, cpu_cores: int, gpus: int = 0) -> dict[str, Any]:
    """Energy and carbon of a run at full load, after Lannelongue, Grealey and Inouye (2021), "Green Algorithms:
    Quantifying the Carbon Footprint of Computation": hours x (cores, GPUs and memory in watts) x grams a kWh.

    Nothing is measured but the hours and the memory; power is assumed, and a data centre's cooling is left out.

    Args:
        seconds (`float`): Wall time.
        memory_gib (`float`): Peak memory, in GiB.
        cpu_cores, gpus (`int`): What the run could use.

    Returns:
        `dict`: `hours`, `hardware` (in words), `energy_kwh`, `co2_eq_grams`, `method`.
    """
    hours = seconds / 3600
    watts = WATTS_PER_CPU_CORE * cpu_cores + WATTS_PER_GPU * gpus + WATTS_PER_GIB * memory_gib
    energy = hours * watts / 1000
    return {
        "hours": hours,
        "hardware": f"{cpu_cores} CPU core(s), {gpus} GPU(s)",
        "energy_kwh": energy,
        "co2_eq_grams": energy * GRAMS_PER_KWH,
        "method": (
            f"estimate: hours x ({WATTS_PER_CPU_CORE:g} W a CPU core + {WATTS_PER_GPU:g} W a GPU + 0.3725 W a GB of "
            f"memory) x {GRAMS_PER_KWH:g} g CO2eq a kWh"
        ),
    }
