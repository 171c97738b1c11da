"""Sentences, words and numbers of an explanation, as the judges and the measures of language count them."""

import re
from collections.abc import Iterable

# An end of sentence is followed by no word in small letters, so that "vs. placebo" and "14.3%" stay whole; "mRNA" and
# "iPTH" begin a sentence.
_CLOSING = "[\"')\\]\u201d\u2019]*"
_BOUNDARY = re.compile(rf"(?<=[.!?]){_CLOSING}\s+(?![a-z](?![A-Z])|\s)")
# "Verdict:", "**Verdict** =" or "Verdict - ", but no "verdict-based"; up to four marks of Markdown stand before it.
_VERDICT = r"[*_`#>-]{0,4}[ \t]?[*_`#>-]{0,4}(?<![^\W_])verdict[*_`]*"
_COLON = r"(?:[:=\uff1a\u2013\u2014]|(?<!\w)-(?!\w))[*_`]*"
_ANY_VERDICT = re.compile(rf"^[ \t]*{_VERDICT}[ \t]*{_COLON}(.*)$", re.IGNORECASE | re.MULTILINE)
_PROPER_END = re.compile(rf"[.!?]{_CLOSING}$")
_WORD = re.compile("\\w+(?:[.,'\u2019-]\\w+)*")
_NUMBER = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:[.·]\d+)?|(?<![\d.])\.\d+")
_NUMBER_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20,
}  # fmt: skip


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; none for an empty one."""
    text = text.strip()
    return [sentence for sentence in _BOUNDARY.split(text) if sentence] if text else []


def without_last_sentence(text: str) -> str:
    """The text without its last sentence, where a teacher puts the verdict; empty where there is no other."""
    return " ".join(split_sentences(text)[:-1])


def without_verdict_lines(text: str, verdicts: Iterable[str]) -> str:
    """The text without what names the verdict as a prompt's line does ("Verdict: supported."), in any mark-up.

    Args:
        text (`str`): An explanation.
        verdicts (`Iterable[str]`): The task's two. Where a line begins with another one, its sentence goes.
    """
    known = "|".join(re.escape(verdict) for verdict in sorted(verdicts, key=len, reverse=True))
    told = rf"{_VERDICT}\s*(?:{_COLON}|\n)[*_`\s]*(?:{known})(?!\w)[*_`]*\.?[*_`]*"
    text = re.sub(told, "\n", text, flags=re.IGNORECASE)
    return _ANY_VERDICT.sub(lambda line: " ".join(split_sentences(line.group(1))[1:]), text).strip()


def ends_properly(text: str) -> bool:
    """Whether the text ends as a sentence does, and so was not cut."""
    return bool(_PROPER_END.search(text.strip()))


def words(text: str) -> list[str]:
    """Words and numbers in small letters; "14.3", "p", "non-inferior" and "patient's" are one each."""
    return _WORD.findall(text.lower())


def ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` tokens, in their order."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def numbers(text: str) -> list[float]:
    """Numbers in figures, as values: "1,204" is 1204.0, "14.30%" is 14.3, "0·05" and ".05" are 0.05."""
    return [float(found.replace(",", "").replace("·", ".")) for found in _NUMBER.findall(text)]


def numbers_in_words(text: str) -> set[float]:
    """Values of the numbers from zero to twenty that are written as words."""
    return {float(_NUMBER_WORDS[word]) for word in re.findall(r"[a-z]+", text.lower()) if word in _NUMBER_WORDS}
