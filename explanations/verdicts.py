"""A teacher's verdict, read and held against the label."""

from typing import Any

_VERDICTS = {"false": 0, "no": 0, "0": 0, "0.0": 0, "true": 1, "yes": 1, "1": 1, "1.0": 1}


def parse_verdict(value: Any, names: tuple[tuple[str, str], ...] = ()) -> int:
    """0 or 1, from TRUE or FALSE, yes or no, 1 or 0, or one of a task's own names.

    Args:
        value: As it stands in a file.
        names (`tuple[tuple[str, str], ...]`, *optional*): Pairs of names for label 0 and 1.

    Raises:
        ValueError: for anything else.
    """
    known = {**_VERDICTS, **{name.lower(): label for pair in names for label, name in enumerate(pair)}}
    found = known.get(str(value).strip().lower())
    if found is None:
        raise ValueError(f"The verdict is {value!r}; it must be one of {sorted(known)}.")
    return found


def contradict(verdict: int, probability: float) -> bool:
    """Whether a verdict and the probability of label 1 are on two sides of one half."""
    return probability != 0.5 and (probability > 0.5) != bool(verdict)


def verdict_disagreement(label: int | None, verdict: int | None) -> str | None:
    """Why a blind verdict does not fit the gold label; `None` where it does, or where one of them is missing."""
    if label is None or verdict is None or label == verdict:
        return None
    return f"the blind verdict is {verdict}, the label {label}"
