"""Answers as HTML. Whatever a user or a model wrote is escaped here, and nowhere put into a page otherwise."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice
from typing import Any

UNDECIDED = 0.2  # an LM's own reading this near to a half speaks for neither label, so it contradicts none
STRENGTHS = 4
WEAKEST_SCALE = 0.5  # logits: where no sentence does more than this, none is shown as a strong one
SHAPES = ("◆", "●")  # of label 0 and label 1: nothing is told by its colour alone
CONTRADICTION = "The words contradict the verdict"
JOINER = "&#8288;"  # no line breaks between a sentence and its figure
_NEGATED = re.compile(
    r"\b(?:no|not|never|cannot|nor|neither|without|\w+n['\u2019]t)\b(?:\W+\w+){0,3}\W*$", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)")


def readable(name: str) -> str:
    """A field's or label's name as words: `not_supported` is "Not supported"."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def percent(share: float, digits: int = 1) -> str:
    """A share as per cent; one that only rounding would make 0 or 100 says so."""
    smallest = 10 ** -(digits + 2)
    if 0 < share < smallest / 2:
        return f"< {100 * smallest:.{digits}f}%"
    if 1 - smallest / 2 < share < 1:
        return f"> {100 - 100 * smallest:.{digits}f}%"
    return f"{100 * share:.{digits}f}%"


def digits_apart(probability: float, threshold: float) -> int:
    """Decimals of a per cent at which a probability does not look like the threshold that it misses."""
    same = (d for d in range(1, 6) if probability == threshold or percent(probability, d) != percent(threshold, d))
    return next(same, 6)


def answer(prediction: Any, labels: Sequence[str], error_rate: float | None = None) -> str:
    """Verdict, probability, gauge and warnings.

    Args:
        prediction (`Prediction`): The model's; its explanation is left out.
        labels (`Sequence[str]`): Names of label 0 and label 1.
        error_rate (`float`, *optional*): Of the prediction set.
    """
    digits = digits_apart(prediction.probability, prediction.threshold)
    figures = [
        (f"Probability of “{readable(labels[1])}”", percent(prediction.probability, digits), "pin"),
        ("Decision threshold", percent(prediction.threshold, digits), "threshold"),
    ]
    if prediction.lm_probability is not None:
        figures.append(("The language model's own reading", percent(prediction.lm_probability), "reading"))
    rows = "".join(
        f'<div><dt><span class="key key-{key}" aria-hidden="true"></span>{escape(name)}</dt>'
        f"<dd>{escape(value)}</dd></div>"
        for name, value, key in figures
    )
    return (
        f'<section class="card answer label-{prediction.label_id}" aria-label="Answer">'
        f'<p class="eyebrow">Verdict</p>'
        f'<p class="verdict"><span class="shape" aria-hidden="true">{SHAPES[prediction.label_id]}</span>'
        f"{escape(readable(prediction.label))}</p>"
        f"{gauge(prediction, labels, digits)}"
        f'<dl class="figures">{rows}</dl>'
        f"{''.join(warning(*each) for each in warnings(prediction, labels, error_rate))}"
        "</section>"
    )


def gauge(prediction: Any, labels: Sequence[str], digits: int = 1) -> str:
    """The scale from 0 to 100%, parted at the threshold, with the probability and the LM's own reading on it."""
    probability, threshold = prediction.probability, prediction.threshold
    told = (
        f"Probability of {readable(labels[1])}: {percent(probability, digits)}; decision threshold: "
        f"{percent(threshold, digits)}."
    )
    reading = ""
    if prediction.lm_probability is not None:
        told += f" The language model's own reading: {percent(prediction.lm_probability)}."
        reading = f'<span class="reading" style="left:{100 * prediction.lm_probability:.2f}%"></span>'
    return (
        f'<div class="gauge" role="img" aria-label="{escape(told)}">'
        f'<div class="bubble" style="--at:{100 * probability:.2f}%">{escape(percent(probability, digits))}</div>'
        '<div class="scale">'
        f'<span class="zone zone-0" style="width:{100 * threshold:.2f}%"></span>'
        f'<span class="zone zone-1" style="width:{100 - 100 * threshold:.2f}%"></span>'
        f'<span class="threshold" style="left:{100 * threshold:.2f}%"></span>{reading}'
        f'<span class="pin" style="left:{100 * probability:.2f}%"></span></div>'
        f'<div class="ends"><span>{SHAPES[0]} {escape(readable(labels[0]))}</span>'
        f"<span>{escape(readable(labels[1]))} {SHAPES[1]}</span></div></div>"
    )


def warnings(prediction: Any, labels: Sequence[str], error_rate: float | None = None) -> list[tuple[str, str]]:
    """Titles and texts of what a reader must know before using the answer."""
    found = []
    if prediction.abstained:
        rate = "" if error_rate is None else f" at an error rate of {percent(error_rate, 0)}"
        left = "the text is unlike either label's rows"
        if len(prediction.prediction_set) == 2:
            left = "neither label can be ruled out"
        elif prediction.prediction_set:
            left = "the label given is ruled out, and the other is not"
        found.append(("Uncertain: a person should decide", f"By the validation data, {left}{rate}."))
    if disagrees(prediction):
        found.append(
            (
                "The number and the language model disagree",
                f"The probability is {percent(prediction.probability)}, but the language model, asked without a hint, "
                f"puts “{readable(labels[1])}” at {percent(prediction.lm_probability)}. Look closer before you use "
                "either.",
            )
        )
    if prediction.truncated:
        found.append(("Not all of the text was read", "It is too long for this model: its middle was left out."))
    return found


def disagrees(prediction: Any) -> bool:
    """Whether the language model's own reading comes down on the side of the other label."""
    reading = prediction.lm_probability
    return reading is not None and abs(reading - 0.5) >= UNDECIDED and (reading > 0.5) != bool(prediction.label_id)


def warning(title: str, text: str) -> str:
    """A note that can't be overlooked."""
    return (
        '<div class="note"><span class="sign" aria-hidden="true">!</span>'
        f"<p><strong>{escape(title)}.</strong> {escape(text)}</p></div>"
    )


def problem(message: str) -> str:
    """An error, read out at once by screen readers."""
    return (
        '<div class="note problem" role="alert"><span class="sign" aria-hidden="true">!</span>'
        f"<p>{escape(message)}</p></div>"
    )


def progress(message: str, done: int | None = None, total: int | None = None) -> str:
    """What is being done; a bar where its length is known."""
    bar = "" if not total else f'<progress max="{total}" value="{done}" aria-label="{escape(message)}"></progress>'
    return (
        '<div class="card working"><p><span class="spinner" aria-hidden="true"></span>'
        f"{escape(message)}</p>{bar}</div>"
    )


def explanation(
    text: str, argues_for: str | None, other_verdict: str | None = None, writing: bool = False, cut: bool = False
) -> str:
    """The explanation so far.

    Args:
        text (`str`): Its words.
        argues_for (`str`, *optional*): Name of the label that it was told to argue for.
        other_verdict (`str`, *optional*): The words of the other verdict, looked for in it once it is complete.
        writing (`bool`): Whether it goes on.
        cut (`bool`): Whether it reached its greatest length before its end.
    """
    hint = f"Argues for “{readable(argues_for)}”. " if argues_for else ""
    caret = '<span class="caret" aria-hidden="true"></span>' if writing else ""
    words = escape(text) or ("" if writing else "<em>The model wrote nothing.</em>")
    note = ""
    if not writing and other_verdict and argues_for:
        note = warning(CONTRADICTION, f"They also say “{other_verdict}”. Read the text before you use either.")
    if cut:
        note += warning("The explanation was cut off", "It is at its greatest length; its conclusion may be missing.")
    return (
        f'<section class="card" aria-busy="{str(writing).lower()}"><h2>Explanation</h2>'
        f'<p class="words">{words}{caret}</p>{note}'
        f'<p class="hint">{escape(hint)}Written after the number was fixed: no proof of how it came about.</p>'
        "</section>"
    )


def says_other_verdict(text: str, verdicts: Sequence[str], label_id: int) -> str | None:
    """The words of the other label's verdict, where an explanation says them and doesn't take them back.

    A sign, not a proof: verdicts are looked for as they stand, the longer first ("not supported" is no "supported"),
    and one that follows a negation within three words doesn't count.
    """
    longest_first = "|".join(re.escape(verdict) for verdict in sorted(verdicts, key=len, reverse=True))
    other = verdicts[1 - label_id]
    for match in re.finditer(rf"\b(?:{longest_first})\b", text, re.IGNORECASE):
        if match.group().lower() == other.lower() and not _NEGATED.search(text[: match.start()]):
            return other
    return None


def relevance(fields: dict[str, str], attributions: Iterable[Any], labels: Sequence[str], truncated: bool) -> str:
    """The text with what each of its sentences does to the answer.

    Args:
        fields (`dict[str, str]`): The text's fields; `{"text": ...}` for one string.
        attributions (`Iterable[Attribution]`): Of this text.
        labels (`Sequence[str]`): Names of label 0 and label 1.
        truncated (`bool`): Whether the model read only a part of the text.
    """
    attributions = list(attributions)
    largest = max([WEAKEST_SCALE, *(abs(each.score) for each in attributions)])
    blocks = []
    for name, value in fields.items():
        pieces, at = [], 0
        for each in sorted((each for each in attributions if each.field == name), key=lambda each: each.start):
            pieces += [_unscored(value[at : each.start], truncated), _scored(value, each, largest, labels)]
            at = each.end
        pieces.append(_unscored(value[at:], truncated))
        heading = f"<h3>{escape(readable(name))}</h3>" if len(fields) > 1 else ""
        blocks.append(f'{heading}<p class="sentences">{"".join(pieces)}</p>')
    legend = "".join(
        f'<span class="speaks for-{label}"><span aria-hidden="true">{SHAPES[label]}</span> {sign} speaks for '
        f"“{escape(readable(labels[label]))}”</span>"
        for label, sign in ((1, "+"), (0, "\u2212"))
    )
    return (
        f'<section class="card"><h2>What each sentence does</h2><p class="legend">{legend}</p>{"".join(blocks)}'
        '<p class="hint">Each sentence is left out in turn and the number is read again; the figures are by how much '
        "the log-odds fall without it.</p></section>"
    )


def _scored(value: str, each: Any, largest: float, labels: Sequence[str]) -> str:
    label = int(each.score > 0)
    strength = round(STRENGTHS * abs(each.score) / largest)
    sentence = escape(value[each.start : each.end])
    figure = f"{each.score:+.2f}".replace("-", "\u2212") if abs(each.score) >= 0.005 else "0.00"
    if strength == 0:
        return f'<span class="scored">{sentence}{JOINER}<sup>{figure}</sup></span>'
    return (
        f'<mark class="scored for-{label} strength-{strength}">{sentence}{JOINER}<sup>{figure}'
        f'<span class="unseen"> for {escape(readable(labels[label]))}</span></sup></mark>'
    )


def _unscored(text: str, truncated: bool) -> str:
    if not text.strip() or not truncated:
        return escape(text)
    return f' <span class="unread"><span class="tag">not read</span> {escape(text.strip())}</span> '


def complete_sentences(text: str, start: int) -> int:
    """Where the last complete sentence of a text that is being written ends, looked for from `start` on."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text, start)]
    return ends[-1] if ends else start


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table that scrolls inside itself, by keyboard too."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def report(rows: Sequence[Any], labels: Sequence[str], preview: int) -> str:
    """What became of the rows of a file: counts, the rows without an answer, and the first answers."""
    answered, failed = [row for row in rows if row.prediction], [row for row in rows if row.error]
    counts = "".join(
        f'<div><dt><span aria-hidden="true">{shape}</span> {escape(readable(label))}</dt>'
        f"<dd>{sum(row.prediction.label_id == label_id for row in answered)}</dd></div>"
        for label_id, (label, shape) in enumerate(zip(labels, SHAPES, strict=True))
    )
    uncertain = sum(bool(row.prediction.abstained) for row in answered)
    parts = [
        f"<h2>{len(answered)} of {len(rows)} rows answered</h2>",
        f'<dl class="figures">{counts}<div><dt>Uncertain</dt><dd>{uncertain}</dd></div>'
        f"<div><dt>Without an answer</dt><dd>{len(failed)}</dd></div></dl>",
    ]
    if failed:
        title = "One row has no answer" if len(failed) == 1 else f"{len(failed)} rows have no answer"
        parts.append(warning(title, "The file has each of these too, with its reason."))
        parts.append(table(("Row", "Why"), _first(((str(r.number), r.error) for r in failed), preview), "No answer"))
    cells = (
        (
            str(row.number),
            f"{SHAPES[row.prediction.label_id]} {readable(row.prediction.label)}",
            percent(row.prediction.probability),
            "yes" if row.prediction.abstained else "",
            "yes" if row.prediction.truncated else "",
        )
        for row in answered
    )
    caption = "Answers" if len(answered) <= preview else f"The first {preview} answers; the file has all"
    columns = ("Row", "Verdict", f"Probability of {readable(labels[1])}", "Uncertain", "Shortened")
    parts.append(table(columns, _first(cells, preview), caption))
    return f'<section class="card">{"".join(parts)}</section>'


def _first(rows: Iterable[Sequence[str]], most: int) -> list[Sequence[str]]:
    return list(islice(rows, most))


def header(question: str, model: str) -> str:
    """The page's title: what is asked, and who answers."""
    return (
        f'<header class="title"><p class="eyebrow">CLSGen · <span>{escape(model)}</span></p>'
        f"<h1>{escape(question)}</h1>"
        "<p>A calibrated probability, and the reason in words, from one language model.</p></header>"
    )


def empty(text: str) -> str:
    """The place of something that is yet to come."""
    return f'<div class="card empty"><p>{escape(text)}</p></div>'


def file_help(fields: Sequence[str], limits: Any) -> str:
    """What a file must look like, and what is done with it."""
    columns = ", ".join(f"<code>{escape(name)}</code>" for name in fields)
    alternative = "" if list(fields) == ["text"] else ", or one column <code>text</code> of whole texts"
    return (
        f'<div class="help"><p>A CSV file (UTF-8) whose first line names the columns {columns}{alternative}; '
        f"others may stand beside them. At most {limits.MAX_ROWS} rows and {limits.MAX_BYTES / 1e6:.0f} MB. You get "
        f"the same rows back with answers in columns that start with <code>{limits.PREFIX}</code>; a row that can't "
        "be answered stays, and says why. Cells that a spreadsheet would run as a formula get an apostrophe in "
        "front.</p></div>"
    )


def about(source: Any, config: Any, error_rate: float | None) -> str:
    """What the model is, and what its answers are not."""
    labels = (f"{shape} {readable(name)}" for shape, name in zip(SHAPES, config.label_names, strict=True))
    rows = {
        "Model": source.name,
        "Revision": source.revision,
        "Data set": source.dataset,
        "Labels": " · ".join(labels),
        "Threshold": percent(config.threshold),
        "Error rate of “uncertain”": None if error_rate is None else percent(error_rate, 0),
    }
    terms = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items() if value
    )
    return (
        f'<footer class="about"><h2>About this model</h2><dl>{terms}</dl>'
        "<p>The probability is calibrated for texts like those the model was validated on. An explanation argues for "
        "the verdict; it is no proof. A demonstration, not advice: a person decides. Texts are not stored; files are "
        "deleted from the server after an hour or two.</p></footer>"
    )
