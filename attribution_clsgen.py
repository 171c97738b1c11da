"""Where an answer comes from: each sentence is left out in turn, and the head is asked again."""

import re
from collections.abc import Iterable
from itertools import count

from .batching_clsgen import windows
from .prompting_clsgen import ELLIPSIS, PromptEncoder

_ABBREVIATIONS = "".join(rf"(?<!\b{word}\.)" for word in ("vs", "Dr", "al", "e\\.g", "i\\.e", "approx", "No", "Fig"))
# White space is matched from its beginning alone: from each of its places, a long run would take quadratic time.
_BOUNDARY = re.compile(rf"(?<=[.!?]){_ABBREVIATIONS}\s+(?=[A-Z0-9(\[\"'])|(?<!\s)\s*\n\s*")
MOST_SPANS = 64  # each is a prompt of its own, and short sentences are cheap to send
Span = tuple[int, int]


def sentence_spans(text: str) -> list[Span]:
    """Start and end of each sentence, without white space around it. Line breaks end one, too."""
    starts = [0, *(match.end() for match in _BOUNDARY.finditer(text))]
    ends = [*(match.start() for match in _BOUNDARY.finditer(text)), len(text)]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if text[start:end].strip()]


def occlusions(
    encoder: PromptEncoder, text: str | dict[str, str]
) -> tuple[list[int], list[tuple[str, int, int]], Iterable[list[int]]]:
    """The prompt of `text`, and the prompts of what is left of it without each of its sentences.

    Leave-one-out erasure (Li, Monroe and Jurafsky, 2016, "Understanding Neural Networks through Representation
    Erasure"), by sentences. A text that is too long is shortened first, so that every prompt is one of the same text;
    what was cut has no sentences. Of more than `MOST_SPANS` sentences, neighbouring ones are left out together.

    Args:
        encoder (`PromptEncoder`): The model's.
        text (`str` or `dict`): See [`PromptEncoder.encode`].

    Returns:
        Ids of the whole prompt; field, start and end of each sentence, or of joined ones; and the ids of the prompt
        without it.
    """
    fitted = encoder.fit(text)
    runs = []  # what may be joined: sentences of a field, on one side of the cut
    for name, value in fitted.values.items():
        spans = sentence_spans(value)
        cut = fitted.cut if name == fitted.document else None
        runs += [(name, side) for side in (_outside(spans, cut) if cut else (spans,))]
    most = max(MOST_SPANS, len(runs))
    size = next(size for size in count(1) if sum(-(-len(spans) // size) for _, spans in runs) <= most)
    places = [(name, group[0][0], group[-1][1]) for name, spans in runs for group in windows(spans, size)]

    def without(name: str, start: int, end: int) -> list[int]:
        value = fitted.values[name]
        removed = [(start, end, "")]
        if fitted.cut and name == fitted.document:
            removed.append((*fitted.cut, ELLIPSIS))
        for left, right, replacement in sorted(removed, reverse=True):
            value = value[:left] + replacement + value[right:]
        return encoder.encode_values(fitted.template, {**fitted.shortened, name: value.strip() or ELLIPSIS.strip()})

    return fitted.input_ids, places, (without(*place) for place in places)


def _outside(spans: list[Span], cut: Span) -> tuple[list[Span], list[Span]]:
    """What a cut leaves of spans, before it and behind it."""
    left, right = cut
    return (
        [(start, min(end, left)) for start, end in spans if start < left],
        [(max(start, right), end) for start, end in spans if end > right],
    )
