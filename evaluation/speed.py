"""What an answer costs: texts a second on this machine."""

import time
from functools import partial
from typing import Any

import torch

TEXTS = 64
EXPLANATIONS = 8


def speed_report(
    model: Any,
    texts: list[Any],
    mode: str | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Wall time of `classify`, and of `classify_and_explain`, in one call each after one on a single text.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): The model.
        texts (`list[str | dict[str, str]]`): The first 64 are classified, the first 8 explained.
        mode (`str`, *optional*): Of the explanations; without one none are written.
        batch_size, max_new_tokens (`int`, *optional*): See `classify_and_explain`.

    Returns:
        `dict`: `texts_per_second`, `explanations_per_second` (or None), how many of each (`texts`, `explanations`),
        `device`, `dtype` and `threads`.
    """
    calls = {"texts": (TEXTS, partial(model.classify, batch_size=batch_size))}
    if mode is not None:
        options = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        explain = partial(model.classify_and_explain, batch_size=batch_size, mode=mode, **options)
        calls["explanations"] = (EXPLANATIONS, explain)
    report: dict[str, Any] = {"explanations": 0, "explanations_per_second": None}
    for what, (most, answer) in calls.items():
        some = texts[:most]
        answer(some[:1])
        start = time.perf_counter()
        answer(some)  # numbers and strings come back: nothing is left running on a GPU
        report |= {what: len(some), f"{what}_per_second": len(some) / (time.perf_counter() - start)}
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        **report,
        "device": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
