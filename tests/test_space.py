"""The Space without a browser: what texts and files become. `test_space_browser.py` has the page itself."""

import ast
import csv
import re
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import batch
import loading
import pytest
import rendering
from answering import Answerer, Turn
from conftest import VOCABULARY
from huggingface_hub import SpaceCard

from clsgen.explaining_clsgen import STREAM_THREAD
from clsgen.prediction_clsgen import Attribution, Prediction

SPACE = Path(__file__).resolve().parent.parent / "space"
LABELS = ["not_supported", "supported"]
HOSTILE = "<img src=x onerror=alert(1)> & **bold** {{value}} ${1+1} \"quoted\" 'x'"
PREDICTION = Prediction(
    label="supported", label_id=1, probability=0.723, logit=1.2, threshold=0.54, lm_probability=0.61,
    explained_label="supported", prediction_set=("supported",),
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


def read(tmp_path, model, content, explain=False):
    path = tmp_path / "texts.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return batch.read_table(path, model.encoder.prompt.fields, model.encoder.encode, explain)


def answered(tmp_path, model, content, explain=False):
    """The written file's rows, as `csv` reads them."""
    table = read(tmp_path, model, content, explain)
    for _ in batch.answer_rows(model, table, explain):
        continue
    batch.write_table(tmp_path / "answers.csv", table, explain)
    with (tmp_path / "answers.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=table.delimiter))


# --- What a page shows ---


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


# --- Files ---


def test_all_rows_come_back_in_order_with_answers_or_reasons(tmp_path, model):
    content = (
        "id,claim,findings\n"
        "a,Drug A works,It did in 3 of 4.\n"
        "b,,Nothing was found.\n"
        "\n"
        "c,only two cells\n"
        'd,"Drug, D","line one\nline two"\n'
        "e,x,y,z\n"
    )
    rows = answered(tmp_path, model, content)
    assert [row["id"] for row in rows] == ["a", "b", "c", "d", "e"]
    expected = model.classify({"claim": "Drug, D", "findings": "line one\nline two"})
    assert float(rows[3]["clsgen_probability"]) == pytest.approx(expected.probability, abs=1e-6)
    assert rows[3]["clsgen_label"] == expected.label
    assert rows[3]["findings"] == "line one\nline two"
    assert [bool(row["clsgen_label"]) for row in rows] == [True, False, False, True, False]
    assert "'claim' is empty" in rows[1]["clsgen_error"]
    assert rows[2]["clsgen_error"] == "It has 2 cells, the header 3."
    assert rows[4]["clsgen_error"].endswith("Left over: z")


def test_row_numbers_are_those_of_a_spreadsheet(tmp_path, model):
    table = read(tmp_path, model, 'claim,findings\nx,"two\nlines"\n\n,y\n')
    assert [row.number for row in table.rows] == [2, 4]
    assert "<td>4</td>" in rendering.report(table.rows, LABELS, 5)


def test_explanations_are_written_where_asked_for(tmp_path, model):
    model.generation_config.max_new_tokens = 3
    rows = answered(tmp_path, model, "claim,findings\na,b\nc,d\n", explain=True)
    assert {"clsgen_explanation", "clsgen_lm_probability"} <= set(rows[0])
    reading = model.classify_and_explain({"claim": "c", "findings": "d"}, max_new_tokens=1).lm_probability
    assert float(rows[1]["clsgen_lm_probability"]) == pytest.approx(reading, abs=1e-5)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_spreadsheets_save_is_read_and_kept(tmp_path, model, delimiter):
    content = "\ufeff" + delimiter.join(("claim", "findings")) + "\r\n" + delimiter.join(("hält", "ja")) + "\r\n"
    rows = answered(tmp_path, model, content)
    assert rows[0]["claim"] == "hält"
    assert rows[0]["clsgen_label"] in LABELS


def test_whole_texts_are_read_from_one_column(tmp_path, model):
    rows = answered(tmp_path, model, "text\nDrug A works. It did.\n")
    expected = model.classify("Drug A works. It did.").probability
    assert float(rows[0]["clsgen_probability"]) == pytest.approx(expected, abs=1e-6)


def test_a_row_that_fails_in_the_model_costs_no_other(tmp_path, model, monkeypatch):
    table = read(tmp_path, model, "claim,findings\na,b\nc,d\ne,f\n")
    classify = model.classify

    def fails_on_c(texts):
        if any(text["claim"] == "c" for text in ([texts] if isinstance(texts, dict) else texts)):
            raise RuntimeError("out of memory")
        return classify(texts)

    monkeypatch.setattr(model, "classify", fails_on_c)
    assert list(batch.answer_rows(model, table, explain=False)) == [3]
    assert [row.prediction is None for row in table.rows] == [False, True, False]
    assert "RuntimeError" in table.rows[1].error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("claim,findings\n", "no rows"),
        ("claim,note\nx,y\n", "no column named 'findings'"),
        ("claim,claim,findings\nx,y,z\n", "More than one column"),
        ("claim,findings,clsgen_label\nx,y,z\n", "answers already"),
        ('claim,findings\n"x,y\n', "not CSV"),
        (b"claim,findings\n\xff\xfe,y\n", "not UTF-8"),
        (b"claim,findings\nx\0,y\n", "NUL"),
        (b"PK\x03\x04\0\0", "NUL"),
        ("claim,findings\n" + "x,y\n" * (batch.MAX_ROWS + 1), "at most 500"),
        ("claim,findings\nx," + "y" * batch.MAX_BYTES, "2.0 MB"),
    ],
)
def test_unusable_files_are_refused_with_what_to_do(tmp_path, model, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, model, content)


def test_fewer_rows_are_explained_than_answered(tmp_path, model):
    content = "claim,findings\n" + "x,y\n" * (batch.MAX_EXPLAINED_ROWS + 1)
    assert len(read(tmp_path, model, content).rows) == batch.MAX_EXPLAINED_ROWS + 1
    with pytest.raises(ValueError, match="with explanations"):
        read(tmp_path, model, content, explain=True)


def test_too_long_a_text_is_that_rows_error(tmp_path, model):
    table = read(tmp_path, model, "claim,findings\nx," + "y" * (batch.MAX_CHARACTERS + 1) + "\nx,y\n")
    assert "at most 50,000" in table.rows[0].error
    assert table.rows[1].error is None


@pytest.mark.parametrize(
    "cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\tx", "\r=1", " =1", "\uff1d1", "=1\n", "--1"]
)
def test_no_cell_is_a_formula(tmp_path, model, cell):
    assert batch.defused(cell) == f"'{cell}"
    table = batch.Table(["claim", cell], ",", [batch.Row(2, [cell, cell], error=cell)])
    batch.write_table(tmp_path / "x.csv", table, explain=False)
    with (tmp_path / "x.csv").open(encoding="utf-8-sig", newline="") as file:
        header, row = csv.reader(file)
    assert header[1] == row[0] == row[-1] == f"'{cell}"


@pytest.mark.parametrize("cell", ["", "-0.5", "+3", "-1e-3", "a=b", "'=1", "1-2", "95%"])
def test_numbers_and_words_stay_as_they_are(cell):
    assert batch.defused(cell) == cell


# --- The folder ---


def test_the_model_is_named_by_the_environment_or_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"CLSGEN_MODEL.*space\.json"):
        loading.read_source(tmp_path, {})
    (tmp_path / "space.json").write_text('{"model": "a/b", "revision": "c0ffee", "dataset": "a/d"}')
    assert loading.read_source(tmp_path, {}) == loading.Source("a/b", "c0ffee", "a/d")
    named = {"CLSGEN_MODEL": "e/f", "CLSGEN_REVISION": "1"}
    assert loading.read_source(tmp_path, named) == loading.Source("e/f", "1")
    (tmp_path / "space.json").write_text('{"revision": "c0ffee"}')
    with pytest.raises(ValueError, match="must hold"):
        loading.read_source(tmp_path, {})


def test_no_server_folder_is_shown():
    assert loading.Source("/home/someone/outputs/trial_claims/model").name == "trial_claims/model"
    assert loading.Source("user/name").name == "user/name"


def test_examples_of_another_task_are_left_out(tmp_path):
    assert [example.title for example in loading.read_examples(SPACE / "examples.json", ["claim", "findings"])]
    assert loading.read_examples(SPACE / "examples.json", ["note"]) == []
    assert loading.read_examples(tmp_path / "none.json", ["note"]) == []


def test_the_card_and_the_requirements_agree_with_the_project():
    card = SpaceCard.load(SPACE / "README.md").data
    own = dict(line.split("==") for line in (SPACE / "requirements.txt").read_text().split())
    project = dict(re.findall(r"^([\w-]+)==(\S+)$", (SPACE.parent / "requirements.txt").read_text(), re.MULTILINE))
    assert (card.sdk, card.app_file, card.sdk_version) == ("gradio", "app.py", own.pop("gradio"))
    assert len(card.short_description) <= 60
    assert own == {name: project[name] for name in own}


def test_the_folder_stands_alone():
    allowed = {
        "torch",
        "transformers",
        "gradio",
        *sys.stdlib_module_names,
        *(path.stem for path in SPACE.glob("*.py")),
    }
    for path in SPACE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, path


# --- Answers, step by step ---


def always():
    return True


@pytest.fixture
def answerer(model):
    model.generation_config.max_new_tokens = 6
    return Answerer(model)


TEXT = {"findings": "Deaths fell. Costs rose.", "claim": "It works."}


def test_the_number_comes_before_the_words_and_the_sentences_last(answerer):
    steps = list(answerer.answer_text(TEXT, weigh=True, wanted=always))
    expected = answerer.model.classify_and_explain(TEXT, attributions=True)
    number = rendering.answer(expected, answerer.labels)
    assert [step[1] == number for step in steps] == [False] + [True] * (len(steps) - 1)
    assert 'class="caret"' in steps[1][2]
    assert steps[-1][2] == rendering.explanation(
        expected.explanation,
        expected.explained_label,
        rendering.says_other_verdict(expected.explanation, answerer.prompt.verdicts, expected.label_id),
    )
    assert steps[-1][3] == rendering.relevance(TEXT, expected.attributions, answerer.labels, expected.truncated)
    assert all(step[3] == "" for step in steps[:-2])
    assert rendering.percent(expected.probability) in steps[1][0]


def test_sentences_are_left_alone_where_not_asked_for(answerer):
    assert list(answerer.answer_text(TEXT, weigh=False, wanted=always))[-1][3] == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({**TEXT, "claim": " "}, "“Claim” is empty"),
        ("", "“Text” is empty"),
        ("x" * (batch.MAX_CHARACTERS + 1), "at most 50,000"),
        ({**TEXT, "claim": "x" * 500}, "without its document"),
    ],
)
def test_a_text_that_cannot_be_answered_leaves_nothing_but_the_reason(answerer, text, message):
    ((_, answer, *others),) = answerer.answer_text(text, weigh=True, wanted=always)
    assert message in answer
    assert others == ["", ""]


def test_stopping_ends_the_writing_and_its_thread(answerer):
    model = answerer.model
    readable = model.tokenizer("ab .")["input_ids"]
    model.generation_config.update(
        max_new_tokens=300, suppress_tokens=[i for i in range(VOCABULARY) if i not in readable]
    )
    model.config.explanation_no_repeat_ngram_size = 5
    turn = Turn()
    turn.begin()
    steps = answerer.answer_text(TEXT, weigh=True, wanted=turn.wanted())
    shown = [next(steps) for _ in range(4)]
    assert "caret" in shown[-1][2]
    turn.stop()
    ((announced, _, explanation, sentences),) = steps
    assert announced == "Stopped."
    assert "caret" not in explanation
    assert "Stopped" in sentences
    assert not [thread for thread in threading.enumerate() if thread.name == STREAM_THREAD]


def test_a_newer_request_takes_the_turn_of_an_older_one():
    turn = Turn()
    turn.begin()
    older = turn.wanted()
    turn.begin()
    newer = turn.wanted()
    assert (older(), newer()) == (False, True)
    turn.stop()
    assert not newer()
    turn.begin()
    assert turn.wanted()()


def test_the_written_file_is_there_for_one_step_only(answerer, tmp_path):
    path = tmp_path / "trials.csv"
    path.write_text("claim,findings\na,b\n,b\n")
    steps = answerer.answer_file(str(path), explain=False, wanted=always)
    written = next(step[2] for step in steps if step[2])
    assert written.name == "trials_answers.csv"
    assert len(written.read_text(encoding="utf-8-sig").splitlines()) == 3
    assert list(steps) == []
    assert not written.exists()


def test_a_stopped_file_writes_nothing(answerer, tmp_path):
    path = tmp_path / "trials.csv"
    path.write_text("claim,findings\na,b\n")
    steps = list(answerer.answer_file(str(path), explain=False, wanted=lambda: False))
    assert "Nothing was written" in steps[-1][1]
    assert all(step[2] is None for step in steps)


def test_no_file_is_a_clear_message(answerer):
    ((_, report, written),) = answerer.answer_file(None, explain=False, wanted=always)
    assert "Upload a CSV file first" in report
    assert written is None
