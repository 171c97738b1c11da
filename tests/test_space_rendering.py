"""The Space's HTML: what texts become of it, and what a reader must see. `test_space_browser.py` has the page."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import batch
import loading
import pytest
import rendering

from clsgen.prediction_clsgen import Attribution, Prediction

LABELS = ["not_supported", "supported"]
HOSTILE = "<img src=x onerror=alert(1)> & **bold** {{value}} ${1+1} \"quoted\" 'x'"
PREDICTION = Prediction(
    label="supported", label_id=1, positive_label="supported", probability=0.723, logit=1.2, threshold=0.54,
    lm_probability=0.61, explained_label="supported", prediction_set=("supported",),
)  # fmt: skip


class _Reader(HTMLParser):
    """What a browser would make of some HTML: its elements, and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def having(self, css_class):
        return [attrs for _, attrs in self.elements if css_class in (attrs.get("class") or "").split()]


@pytest.mark.parametrize(
    "render",
    [
        lambda text: rendering.explanation(text, text, text),
        lambda text: rendering.relevance({text: text}, [Attribution(text, 0, 9, 0.4)], [text, text], True),
        lambda text: rendering.relevance({"a": text, "b": text}, [], [text, text], True),
        lambda text: rendering.problem(text),
        lambda text: rendering.warning(text, text),
        lambda text: rendering.table([text], [[text]], text),
        lambda text: rendering.header(text, text),
        lambda text: rendering.answer(replace(PREDICTION, label=text), [text, text], 0.1),
        lambda text: rendering.about(loading.Source(text, text, text), _Config([text, text]), 0.1),
        lambda text: rendering.report([batch.Row(2, [], error=text)], [text, text], 5),
        lambda text: rendering.file_help([text], batch),
        lambda text: rendering.progress(text, 1, 2),
    ],
)
def test_no_text_becomes_an_element_or_an_attribute(render):
    plain, hostile = _Reader(render("ordinary words")), _Reader(render(HOSTILE))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(attrs) for _, attrs in hostile.elements] == [sorted(attrs) for _, attrs in plain.elements]
    assert "onerror=alert(1)>" in hostile.text.lower()


class _Config:
    threshold = 0.5

    def __init__(self, label_names):
        self.label_names = label_names


def test_the_gauge_stands_where_the_numbers_are():
    html = _Reader(rendering.answer(PREDICTION, LABELS))
    gauge = html.having("gauge")[0]
    assert gauge["aria-label"] == (
        "Probability of Supported: 72.3%; decision threshold: 54.0%. The language model's own reading: 61.0%."
    )
    places = [html.having(name)[-1]["style"] for name in ("pin", "threshold", "reading")]
    assert places == ["left:72.30%", "left:54.00%", "left:61.00%"]
    assert [each["style"] for each in html.having("zone")] == ["width:54.00%", "width:46.00%"]


@pytest.mark.parametrize(
    ("share", "told"), [(0, "0.0%"), (0.0001, "< 0.1%"), (0.5, "50.0%"), (0.99999, "> 99.9%"), (1, "100.0%")]
)
def test_rounding_never_makes_a_probability_certain(share, told):
    assert rendering.percent(share) == told


def test_a_probability_just_below_the_threshold_looks_below_it():
    html = rendering.answer(replace(PREDICTION, probability=0.53998, label_id=0, label="not_supported"), LABELS)
    assert "53.998%" in html
    assert "54.000%" in html


@pytest.mark.parametrize(
    ("changed", "title"),
    [
        ({"prediction_set": ("not_supported", "supported")}, "Uncertain"),
        ({"prediction_set": ()}, "Uncertain"),
        ({"truncated": True}, "Not all"),
        ({"lm_probability": 0.2}, "disagree"),
        ({"lm_probability": 0.9, "label_id": 0}, "disagree"),
    ],
)
def test_what_a_reader_must_know_is_told(changed, title):
    assert rendering.warnings(PREDICTION, LABELS) == []
    ((told, _),) = rendering.warnings(replace(PREDICTION, **changed), LABELS)
    assert title in told


@pytest.mark.parametrize("reading", [None, 0.45, 0.55, 0.9])
def test_a_reading_that_is_undecided_or_agrees_warns_of_nothing(reading):
    assert rendering.warnings(replace(PREDICTION, lm_probability=reading), LABELS) == []


@pytest.mark.parametrize(
    ("text", "label_id", "found"),
    [
        ("The claim is supported.", 0, "supported"),
        ("The claim is Not Supported here.", 1, "not supported"),
        ("The claim is not supported.", 0, None),
        ("The claim isn't clearly supported, nor is it well supported.", 0, None),
        ("It is not supported. But the claim is supported.", 0, "supported"),
        ("An unsupported claim.", 0, None),
        ("The claim is supported.", 1, None),
    ],
)
def test_an_explanation_that_says_the_other_verdict_is_found(text, label_id, found):
    assert rendering.says_other_verdict(text, ("not supported", "supported"), label_id) == found


def test_sentences_show_their_side_by_more_than_a_colour():
    text = "Death fell. Nothing else did. It was cold."
    found = [Attribution("text", 0, 11, 1.0), Attribution("text", 12, 29, -0.5), Attribution("text", 30, 42, 0.01)]
    html = rendering.relevance({"text": text}, found, LABELS, truncated=False)
    page = _Reader(html)
    assert [each["class"].split()[1:] for each in page.having("scored")] == [
        ["for-1", "strength-4"], ["for-0", "strength-2"], [],
    ]  # fmt: skip
    assert "+1.00 for Supported" in page.text
    assert "\u22120.50 for Not supported" in page.text
    shown = re.sub(r"<sup>.*?</sup>|&#8288;", "", html[html.index('<p class="sentences">') :])
    assert _Reader(shown).text.startswith(text)


def test_what_a_long_text_lost_is_marked_as_not_read(model):
    text = {"findings": "Deaths fell by half. " * 60, "claim": "It works."}
    prediction = model.classify(text, attributions=True)
    assert prediction.truncated
    page = _Reader(rendering.relevance(text, prediction.attributions, LABELS, prediction.truncated))
    assert len(page.having("unread")) == 1
    assert len(page.having("scored")) == len(prediction.attributions)


def test_each_sentence_is_announced_once():
    text, told, announced = "", 0, []
    for piece in ("It fel", "l. By 0.5", " of ten? ", "Yes", "."):
        text += piece
        end = rendering.complete_sentences(text, told)
        if end > told:
            announced.append(text[told:end].strip())
            told = end
    assert [*announced, text[told:].strip()] == ["It fell.", "By 0.5 of ten?", "Yes."]
