"""Numbers that an explanation states and its text does not hold, with the benefit of the doubt.

A number is supported where the text has it in any notation, to the precision that it is printed with, or where simple
arithmetic on the text's numbers gives it: a sum of counts, a percentage of counts, a difference, a relative change,
another unit of time.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations

from text_to_num import alpha2digit

_SPACED_THOUSANDS = re.compile(r"(?<=\d)[\u00a0\u2009\u202f ](?=\d{3}(?!\d))")
_NUMBER = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+")
_NAME_BEFORE = re.compile(r"[^\W\d_x\u00d7][-\u2010\u2011]?$")  # HbA1c, SGLT2, COVID-19
_TIME_UNIT = re.compile(r"[- \u00a0]?(?:minute|hour|day|week|month|year)s?\b")
_PERCENT = re.compile(r"\s?(?:%|per ?cent)")
_AS_WORDS = {"half": 0.5, "third": 3.0, "quarter": 0.25, "once": 1.0, "twice": 2.0, "double": 2.0, "dozen": 12.0}
# No finding of a text but a convention: counts of things, no effect, the whole, the usual levels and intervals.
_CONVENTIONS = {*map(float, range(11)), 50.0, 90.0, 95.0, 99.0, 100.0, 0.05, 0.025, 0.01, 0.001, 0.5, 0.95}
_TIME_FACTORS = (7.0, 12.0, 24.0, 30.0, 52.0, 60.0, 365.0, 4.0)
_MOST_NUMBERS_TO_PAIR = 150


@dataclass(frozen=True)
class _Stated:
    """A number as an explanation prints it."""

    string: str
    value: float
    is_percent: bool
    is_time: bool

    @property
    def tolerance(self) -> float:
        """Half of the last printed place; of a round number in thousands, half of its last place that is not 0."""
        decimals = len(self.string.partition(".")[2])
        zeros = len(self.string) - len(self.string.rstrip("0")) if not decimals and self.value >= 1000 else 0
        return 0.51 * 10.0 ** (zeros - decimals)  # a little more: a half may be rounded either way

    def is_among(self, candidates: Iterator[float]) -> bool:
        return any(abs(candidate - self.value) <= self.tolerance for candidate in candidates)


def unsupported_numbers(explanation: str, text: str, language: str = "en") -> list[str]:
    """The numbers of `explanation`, as they stand there, that `text` gives no ground for.

    Args:
        explanation (`str`): Digits in it are checked; number words and the digits inside names (HbA1c) are not.
        text (`str`): What the explanation is about, the question included.
        language (`str`, *optional*, defaults to `"en"`): In which numbers may be written as words in the text.
    """
    stated = [number for number in _stated_numbers(explanation) if number.value not in _CONVENTIONS]
    if not stated:
        return []
    known = _known_numbers(text, language)
    doubtful = [number for number in stated if not number.is_among(_rescaled(known, number))]
    if len(known) <= _MOST_NUMBERS_TO_PAIR:
        doubtful = [number for number in doubtful if not number.is_among(_derived(known, number))]
    return list(dict.fromkeys(number.string for number in doubtful))


def _plain(text: str) -> str:
    return _SPACED_THOUSANDS.sub("", text.replace("\u00b7", "."))  # The Lancet's decimal point


def _value(string: str) -> float:
    return float(string.replace(",", ""))


def _stated_numbers(explanation: str) -> Iterator[_Stated]:
    explanation = _plain(explanation)
    for match in _NUMBER.finditer(explanation):
        if _NAME_BEFORE.search(explanation[max(0, match.start() - 2) : match.start()]):
            continue
        rest = explanation[match.end() :]
        string = match.group().replace(",", "")
        yield _Stated(string, float(string), bool(_PERCENT.match(rest)), bool(_TIME_UNIT.match(rest)))


def _known_numbers(text: str, language: str) -> set[float]:
    text = _plain(text)
    with contextlib.suppress(ValueError):  # a language whose number words the library doesn't know
        text = f"{text} {alpha2digit(text, language)}"
    words = set(re.findall(r"\w+", text.lower()))
    known = {_value(match.group()) for match in _NUMBER.finditer(text)}
    return known | {number for word, number in _AS_WORDS.items() if word in words}


def _rescaled(known: set[float], stated: _Stated) -> Iterator[float]:
    for number in known:
        yield number
        if number <= 1 or stated.value <= 1:
            yield from (100.0 * number, number / 100.0, abs(1.0 - number))
        if stated.is_percent and number <= 100:
            yield 100.0 - number
        if stated.is_time:
            for factor in _TIME_FACTORS:
                yield from (number * factor, number / factor)


def _derived(known: set[float], stated: _Stated) -> Iterator[float]:
    """What a reader would compute: only the kinds of result that the stated number can be."""
    whole = sorted(number for number in known if number.is_integer() and number >= 2)
    if stated.value.is_integer() and not stated.is_percent:
        for a, b in combinations(whole, 2):
            yield from (a + b, b - a)
        yield from (2.0 * number for number in whole)  # two arms of the same size
        yield from (sum(arms) for arms in combinations(whole, 3) if arms[2] <= 2 * arms[0])
        return
    for a, b in permutations(known, 2):
        yield a - b
        if b and stated.is_percent:
            yield from (100.0 * a / b, 100.0 * (a - b) / b)
