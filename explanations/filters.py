"""What an explanation is refused for. Each filter tells its reason; a row that is filtered wrongly is worse than one
that is kept wrongly, so each one asks for plain evidence."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from datasketch import MinHash, MinHashLSH
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from clsgen.explanations.numbers_in_text import unsupported_numbers
from clsgen.explanations.verdicts import verdict_disagreement

_WORD = re.compile(r"\w+(?:[.,'\u2019-]\w+)*")
_LEAKS = re.compile(
    r"\b(?:gold|ground[- ]truth|true|correct|given|provided|assigned|stated|expected)[- ]"
    r"(?:label|verdict|answer(?![- ](?:rate|score|count|percentage|proportion|frequency)))\b"
    r"|(?<![-\w])(?:the|its|this) label (?:is|was|says|of|indicates|given)\b"
    r"|(?<![-\w])(?<!open )label(?:l?ed)? (?:as )?(?:0|1|true|false)\b(?![:.,/]?\d)"
    r"|\b(?<!of )(?:option|choice) (?-i:[ABb]\b|[01]\b(?![:.,/]?\d| (?:day|week|month|year)))"
    r"|\banswer:|\bverdict:|\bprobability (?:of|is|=|:) ?(?:0?\.\d|1\.0\b|\d+ ?%) that\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"^\W*(?:i['\u2019]?m sorry|i am sorry|sorry,|i apologi[sz]e|as an ai\b|as a (?:large )?language model)"
    r"|\b(?:i|we) (?:cannot|can['\u2019]?t|am unable to|am not able to|will not|won['\u2019]?t) "
    r"(?:assist|help(?! but\b)|comply|fulfil|provide (?:medical|an answer|an explanation)|give medical"
    r"|answer (?:this|that|the)\b(?! question (?:of|whether|about)\b))"
    r"|\bas an ai (?:language )?model\b",
    re.IGNORECASE,
)
_ARTEFACT = re.compile(
    r"<\|[^|\n]{1,40}\|>|</?(?:think|thinking|reasoning|s|eos|bos)>|\[/?INST\]|```|^\s*[{\[]\s*\""
    r"|\"(?:verdict|probability|explanation)\"\s*:|^\W*(?:explanation|assistant|system)\s*:",
    re.IGNORECASE,
)
_SHINGLE_WORDS = 3
_REPEATED_WORDS = 4


@dataclass(frozen=True)
class Finding:
    """Why an explanation is refused: the filter's name, and the evidence in words."""

    filter: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """An explanation and what it is held against.

    Args:
        explanation (`str`): The words.
        text (`str`): The text that it explains, as the prompt shows it, with the question and both verdicts.
        label (`int`, *optional*): The gold label, where there is one.
        verdict (`int`, *optional*): The teacher's own, given without the label; `None` where the label was given.
        label_names (`tuple[str, ...]`): How the data call the labels.
    """

    explanation: str
    text: str
    label: int | None = None
    verdict: int | None = None
    label_names: tuple[str, ...] = ()


@dataclass
class FilterArguments:
    """Which explanations are refused."""

    filters: list[str] = field(
        default_factory=lambda: list(FILTERS), metadata={"help": "The filters to use; `none` for no filter at all."}
    )
    language: str = field(default="en", metadata={"help": "Two-letter code of the language to explain in."})
    min_words: int = field(default=8, metadata={"help": "A shorter explanation is refused."})
    max_words: int = field(default=250, metadata={"help": "A longer explanation is refused."})
    max_repetition: float = field(
        default=0.25, metadata={"help": "Most of its runs of 4 words that may be repeats of others."}
    )
    max_copied_words: int = field(default=25, metadata={"help": "Longest run of words that may be the text's own."})
    near_duplicate_similarity: float = field(
        default=0.8, metadata={"help": "Jaccard similarity of 3-word shingles from which an explanation is a repeat."}
    )

    def __post_init__(self):
        if self.filters == ["none"]:
            self.filters = []
        unknown = sorted(set(self.filters) - set(FILTERS))
        if unknown:
            raise ValueError(f"Unknown filter(s) {unknown}; known: {list(FILTERS)}.")
        if self.language not in _identifier().labels:
            raise ValueError(f"`language` is a two-letter code such as 'en', got {self.language!r}.")
        if not 0.1 <= self.near_duplicate_similarity <= 0.95:
            raise ValueError(
                f"`near_duplicate_similarity` lies in [0.1, 0.95], got {self.near_duplicate_similarity}. To keep "
                "all, leave `near_duplicate` out of `filters`."
            )
        if not 0 <= self.max_repetition <= 1:
            raise ValueError(f"`max_repetition` is a share between 0 and 1, got {self.max_repetition}.")
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(f"`min_words` {self.min_words} is more than `max_words` {self.max_words}, or below 0.")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; a number such as 1.5 is one."""
    return _WORD.findall(text.lower())


def _agreement(candidate: Candidate, _: FilterArguments) -> str | None:
    return verdict_disagreement(candidate.label, candidate.verdict)


def _refusal(candidate: Candidate, _: FilterArguments) -> str | None:
    return _quoted(_REFUSAL.search(candidate.explanation))


def _artefact(candidate: Candidate, _: FilterArguments) -> str | None:
    return _quoted(_ARTEFACT.search(candidate.explanation))


def _length(candidate: Candidate, arguments: FilterArguments) -> str | None:
    count = len(candidate.explanation.split())
    fits = arguments.min_words <= count <= arguments.max_words
    return None if fits else f"{count} words, not {arguments.min_words} to {arguments.max_words}"


def _language(candidate: Candidate, arguments: FilterArguments) -> str | None:
    found, confidence = _identifier().classify(candidate.explanation)
    # Drug names and numbers mislead it in short texts: the text's own language counts as right, too.
    if found == arguments.language or confidence < 0.99 or len(words_of(candidate.explanation)) < 10:
        return None
    if found == _identifier().classify(candidate.text)[0]:
        return None
    return f"written in {found}"


def _repetition(candidate: Candidate, arguments: FilterArguments) -> str | None:
    runs = Counter(_runs(words_of(candidate.explanation), _REPEATED_WORDS))
    share = 1 - len(runs) / runs.total() if runs else 0.0
    if share <= arguments.max_repetition:
        return None
    return f"{share:.0%} of its runs of {_REPEATED_WORDS} words are repeats"


def _leakage(candidate: Candidate, _: FilterArguments) -> str | None:
    found = _LEAKS.search(candidate.explanation)
    if found:
        return _quoted(found)
    # A label's name is a leak where nobody would write it in prose: `not_supported`, but not `supported`.
    names = [re.escape(name) for name in candidate.label_names if re.search(r"[_\d]|[a-z][A-Z]", name)]
    pattern = rf"(?<!\w)(?:{'|'.join(names)})(?!\w)"
    return _quoted(re.search(pattern, candidate.explanation)) if names else None


def _copied(candidate: Candidate, arguments: FilterArguments) -> str | None:
    run = longest_common_run(words_of(candidate.explanation), words_of(candidate.text), arguments.max_copied_words + 1)
    return None if run <= arguments.max_copied_words else f"{run} or more words in a row are the text's own"


def _numbers(candidate: Candidate, arguments: FilterArguments) -> str | None:
    found = unsupported_numbers(candidate.explanation, candidate.text, arguments.language)
    return f"not in the text: {', '.join(found)}" if found else None


# In the order in which they name a row's reason; near-duplicates compare what all others keep.
_SINGLE: dict[str, Callable[[Candidate, FilterArguments], str | None]] = {
    "verdict_agreement": _agreement,
    "refusal": _refusal,
    "artefact": _artefact,
    "length": _length,
    "language": _language,
    "repetition": _repetition,
    "label_leakage": _leakage,
    "copied_input": _copied,
    "unsupported_number": _numbers,
}
NEAR_DUPLICATE = "near_duplicate"
FILTERS = (*_SINGLE, NEAR_DUPLICATE)


def find_problems(candidate: Candidate, arguments: FilterArguments) -> list[Finding]:
    """All that the chosen filters have against one explanation, by itself; empty where it can be kept."""
    reasons = ((name, _SINGLE[name](candidate, arguments)) for name in _SINGLE if name in arguments.filters)
    return [Finding(name, reason) for name, reason in reasons if reason is not None]


def find_near_duplicates(explanations: Iterable[tuple[str, str]], similarity: float) -> dict[str, Finding]:
    """Explanations that repeat an earlier one that is kept, by the id of their row.

    Args:
        explanations (`Iterable[tuple[str, str]]`): Ids and explanations, in the order of the data.
        similarity (`float`): Jaccard similarity of the sets of 3-word shingles, as MinHash estimates it with 128
            permutations (Broder, 1997, "On the resemblance and containment of documents").
    """
    index, found = MinHashLSH(threshold=similarity, num_perm=128), {}
    kept: dict[str, MinHash] = {}
    for row_id, explanation in explanations:
        words = words_of(explanation)
        sketch = MinHash(num_perm=128)
        sketch.update_batch([" ".join(run).encode() for run in _runs(words, _SHINGLE_WORDS)] or [b""])
        similar = [(sketch.jaccard(kept[other]), other) for other in index.query(sketch)]
        closest, other = max(similar, default=(0.0, ""))
        if closest >= similarity:
            found[row_id] = Finding(NEAR_DUPLICATE, f"{closest:.0%} alike to the explanation of {other}")
        else:
            kept[row_id] = sketch
            index.insert(row_id, sketch)
    return found


def longest_common_run(words: list[str], others: list[str], enough: int) -> int:
    """Length of the longest run of `words` that stands in `others` too; the search ends at `enough`."""
    longest, previous = 0, Counter()
    for word in words:
        current = Counter()
        for place, other in enumerate(others):
            if word == other:
                current[place] = previous[place - 1] + 1
        longest = max(longest, *current.values(), 0)
        if longest >= enough:
            break
        previous = current
    return longest


def _runs(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def _quoted(match: re.Match | None) -> str | None:
    return f"it says {match.group().strip()!r}" if match else None


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
