"""The Space as a folder, and its answers step by step. `test_space_browser.py` has the page itself."""

import ast
import re
import sys
import threading
from pathlib import Path

import batch
import loading
import pytest
import rendering
from answering import Answerer, Turn
from conftest import VOCABULARY
from huggingface_hub import SpaceCard

from clsgen.explaining_clsgen import STREAM_THREAD

SPACE = Path(__file__).resolve().parent.parent / "space"


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
        cut=True,  # after `max_new_tokens`
    )
    assert "cut off" in steps[-1][2]
    assert "cut off" in steps[-2][0]
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


def test_stopping_before_the_sentences_weighs_none(answerer, monkeypatch):
    weighed = []
    monkeypatch.setattr(answerer.model, "attribute", weighed.append, raising=False)
    turn = Turn()
    turn.begin()
    steps = answerer.answer_text(TEXT, weigh=True, wanted=turn.wanted())
    complete = next(step for step in steps if "The explanation" in step[0])
    turn.stop()
    ((announced, *shown, sentences),) = steps
    assert (announced, tuple(shown)) == ("Stopped.", complete[1:3])
    assert "Stopped" in sentences
    assert weighed == []


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
