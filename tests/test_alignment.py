"""Judges, agreement of words and number, leakage: against other implementations and cases worked out by hand."""

import json
import math
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PROMPT
from datasets import Dataset, DatasetDict
from scipy.special import logit
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM

from clsgen.evaluation.alignment import (
    alignment_metrics,
    alignment_report,
    auroc_by_weight,
    leakage_adjusted_simulatability,
    leakage_report,
    second_reading_report,
)
from clsgen.evaluation.judges import (
    Judge,
    LocalLMJudge,
    OpenAIJudge,
    TfidfJudge,
    make_judge,
    teacher_explanations,
)
from clsgen.evaluation.lm_scoring import answer_log_odds, continuation_log_likelihoods
from clsgen.loopback import is_loopback
from clsgen.prompting_clsgen import TaskPrompt
from clsgen.tasks import Task, find_task, load_task


class WordJudge(Judge):
    """Label 1 where the explanation has the word "good", no answer where it has "hm"."""

    def probabilities(self, texts):
        self.seen = texts
        return [None if "hm" in text else 0.9 if "good" in text else 0.2 for text in texts]


@pytest.fixture
def prompt():
    return TaskPrompt.from_dict(PROMPT)


@pytest.fixture
def judge(prompt):
    return WordJudge("words", prompt)


def rows_of(explanations, predicted, probability=None, gold=None):
    return pd.DataFrame(
        {
            "probability": predicted if probability is None else probability,
            "predicted": predicted,
            "explanation": explanations,
            "gold": predicted if gold is None else gold,
        }
    )


def kappa_by_hand(first, second):
    first, second = np.asarray(first), np.asarray(second)
    observed = (first == second).mean()
    expected = sum((first == label).mean() * (second == label).mean() for label in (0, 1))
    return (observed - expected) / (1 - expected)


class TestMetrics:
    def test_matches_independent_computation(self):
        generator = np.random.default_rng(0)
        judged, probabilities = generator.integers(0, 2, 60), generator.random(60).round(1)
        predicted = (probabilities >= 0.3).astype(int)
        found = alignment_metrics(probabilities, predicted, judged)
        pairs = probabilities[judged == 1][:, None] - probabilities[judged == 0]
        assert found["auroc_alignment"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
        assert found["kappa"] == pytest.approx(kappa_by_hand(predicted, judged))
        assert found["contradiction_rate"] == pytest.approx((predicted != judged).mean())
        assert found["undefined"] == {}

    @pytest.mark.parametrize(
        ("probabilities", "predicted", "judged", "undefined"),
        [
            ([], [], [], {"auroc_alignment", "kappa", "agreement", "contradiction_rate"}),
            ([0.7], [1], [1], {"auroc_alignment", "kappa"}),
            ([0.7, 0.2], [1, 0], [1, 1], {"auroc_alignment", "kappa"}),
            ([0.7, 0.8], [1, 1], [1, 0], {"kappa"}),
            ([0.5, 0.5], [1, 0], [1, 0], set()),
        ],
    )
    def test_undefined_values_are_named(self, probabilities, predicted, judged, undefined):
        found = alignment_metrics(probabilities, predicted, judged)
        assert set(found["undefined"]) == undefined
        assert {name for name, value in found.items() if isinstance(value, float) and math.isnan(value)} == undefined

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match=r"Probabilities must lie in \[0, 1\]"):
            alignment_metrics([math.nan, 0.2], [1, 0], [1, 0])


class TestReport:
    def test_counts_and_metrics(self, judge):
        rows = rows_of(["good", "bad", None, "hm", "  ", "good"], [1, 0, 1, 1, 0, 0], gold=[1, 1, None, 0, 0, 1])
        found = alignment_report(rows, judge)
        assert (found["rows"], found["explained"], found["judged"]) == (6, 4, 3)
        assert found["judged_label"] == [1, 0, None, None, None, 1]
        assert found["judged_probability"] == [0.9, 0.2, None, None, None, 0.9]
        assert found["contradiction_rate"] == pytest.approx(1 / 3)
        assert found["words_accuracy"] == pytest.approx(2 / 3)
        assert "words_auroc" in found["undefined"]
        json.dumps(found["undefined"])

    def test_nothing_to_judge(self, judge):
        for explanations in ([None, math.nan], ["", "hm"], []):
            found = alignment_report(rows_of(explanations, [1, 0][: len(explanations)]), judge)
            assert found["judged"] == 0
            assert math.isnan(found["kappa"])
            assert found["undefined"]["auroc_alignment"] == "no explanation was judged"

    def test_names_missing_columns(self, judge):
        with pytest.raises(ValueError, match=r"missing \['gold'\]"):
            alignment_report(rows_of(["good"], [1]).drop(columns="gold"), judge)


class TestJudges:
    @pytest.mark.parametrize(
        ("explanation", "seen"),
        [
            ("Verdict: supported.\nIt is good.", ["It is good."]),
            ("Verdict: not supported. It is good.", ["It is good."]),
            ("It is good.\nVERDICT: not supported", ["It is good."]),
            ("Verdict: maybe.\nIt is good.", ["It is good."]),
            ("Verdict: supported.\nVerdict: maybe.\nIt is good.", ["It is good."]),
            ("Verdict: supported.", []),
            ("It is good.\n**Verdict:** not supported.", ["It is good."]),
            ("Verdict - supported.\nIt is good.", ["It is good."]),
            ("- __Verdict__ : supported. It is good.", ["It is good."]),
            ("It is good.\nverdict: who knows", ["It is good."]),
            ("Verdict\u2014supported. It is good.", ["It is good."]),
            ("## Verdict\nnot supported\nIt is good.", ["It is good."]),
            ("Verdict = supported.\nIt is good.", ["It is good."]),
            ("Verdict: the ratio of 0.65 shows it is supported.\nIt is good.", ["It is good."]),
            ("Verdict:\nIt is good.", ["It is good."]),
            ("Verdict-based, it is good.", ["Verdict-based, it is good."]),
            (" ", []),
            (None, []),
        ],
    )
    def test_never_sees_the_verdict_line(self, judge, explanation, seen):
        assert len(judge.judge([explanation])) == 1
        assert judge.seen == seen

    @pytest.mark.parametrize("verdict", ["yes (present)", "no (absent)"])
    def test_never_sees_a_verdict_that_ends_in_a_mark(self, prompt, verdict):
        marked = WordJudge("words", replace(prompt, verdicts=("no (absent)", "yes (present)")))
        marked.judge([f"It fell.\nVerdict: {verdict}.\nGood."])
        assert [text.split() for text in marked.seen] == [["It", "fell.", "Good."]]

    def test_without_verdict_sentence(self, prompt):
        judge = WordJudge("words", prompt, keeps_verdict=False)
        assert judge.judge(["Death fell by 1.5%. That is good.", "That is good."]) == [0.2, None]
        assert judge.seen == ["Death fell by 1.5%."]

    def test_fitness(self, judge):
        fitness = judge.measure(["good", "bad", "good", "hm"], [1, 0, 0, 1])
        assert (fitness.accuracy, fitness.rows, fitness.judged, fitness.fit) == (pytest.approx(2 / 3), 4, 3, False)
        assert fitness.auroc == pytest.approx(roc_auc_score([1, 0, 0], [0.9, 0.2, 0.9]))
        assert "UNFIT" in str(fitness)
        assert judge.measure(["good", "bad"], [1, 0]).fit is True
        assert judge.measure([], []).fit is None
        assert "unmeasured" in str(judge.fitness)
        assert judge.measure([""], [1]).fit is False
        assert math.isnan(judge.fitness.accuracy)
        shy = judge.measure(["good", *["hm"] * 9], [1] * 10)  # right whenever it answers, but it hardly does
        assert (shy.accuracy, shy.judged, shy.fit) == (1.0, 1, False)

    def test_offline_judges_of_the_embedded_task(self):
        task = load_task("trial_claims")
        kept, removed = (make_judge(spec, task) for spec in ("tfidf", "tfidf-no-verdict"))
        assert kept.fitness.fit
        assert kept.fitness.rows == removed.fitness.rows == 60
        assert 0.75 < removed.fitness.accuracy < kept.fitness.accuracy
        assert removed.fitness.fit is None
        supported, not_supported = kept.judge(
            ["Deaths fell from 12% to 8% (p=0.01). The claim is supported.",
             "Deaths were 12% and 11% (p=0.7). The claim is not supported."]
        )  # fmt: skip
        assert supported > 0.5 > not_supported

    def test_teacher_labels_are_the_teachers_verdicts(self):
        spec = find_task("clinifact")[1]
        task = Task("clinifact", spec, tuple(spec["labels"]), DatasetDict())
        explanations, labels = teacher_explanations(task, "train")
        assert (len(explanations), set(labels)) == (628, {0, 1})
        row = {"explanation": "It fell.", "label": 1.0}
        split = Dataset.from_list([row, {**row, "label": None}, {**row, "explanation": None}])
        own = Task("my_own", PROMPT, ("no", "yes"), DatasetDict(train=split))
        assert teacher_explanations(own, "train") == (["It fell."], [1])
        turned = replace(own, name="clinifact")  # ours by name alone: another question, and other labels
        assert teacher_explanations(turned, "train") == (["It fell."], [1])
        assert teacher_explanations(own, "validation") == ([], [])

    def test_too_few_explanations(self, prompt):
        with pytest.raises(ValueError, match="five of each at least; got 0 for label 0 and 7"):
            TfidfJudge("tfidf", prompt).fit(["It fell."] * 7, [1] * 7)

    def test_unknown_spec(self):
        task = Task("my_own", PROMPT, ("no", "yes"), DatasetDict())
        for spec in ("bert", "openai:", "lm:", ""):
            with pytest.raises(ValueError, match="There is no judge"):
                make_judge(spec, task)

    def test_local_lm(self, prompt, backbones, tokenizer):
        model = AutoModelForCausalLM.from_pretrained(backbones["llama"])
        judge = LocalLMJudge("lm:tiny", prompt, model, tokenizer)
        explanations = ["It fell by ten of a hundred. Good.", "No.<|im_end|>"]
        answers = judge.judge(explanations)
        for explanation, answer in zip(explanations, answers, strict=True):
            ids = judge._encoder.encode({"explanation": explanation}).input_ids
            asked = tokenizer.decode(ids)
            assert explanation in asked
            assert 'argue that the answer is "supported", rather than "not supported"? Reply Yes or No' in asked
            scores = []
            for word in ("No", "Yes"):
                continuation = tokenizer(word)["input_ids"]
                logits = model(torch.tensor([ids + continuation])).logits[0].detach().log_softmax(-1)
                scores.append(sum(logits[len(ids) - 1 + i, token] for i, token in enumerate(continuation)))
            assert answer == pytest.approx(float(torch.sigmoid(scores[1] - scores[0])), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_log_likelihoods_do_not_depend_on_the_batch(backbones, family):
    model = AutoModelForCausalLM.from_pretrained(backbones[family])
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 255, n).tolist() for n in (3, 40, 11, 1)]
    beginning = generator.integers(0, 255, 60).tolist()
    continuations = [generator.integers(0, 255, n).tolist() for n in (5, 1, 9, 2)]
    together = continuation_log_likelihoods(model, prompts, continuations)
    alone = continuation_log_likelihoods(model, prompts, continuations, max_batch_tokens=1)
    by_loss = [
        -model(input_ids=torch.tensor([p + c]), labels=torch.tensor([[-100] * len(p) + c])).loss.item() * len(c)
        for p, c in zip(prompts, continuations, strict=True)
    ]
    assert together == pytest.approx(by_loss, rel=1e-4)
    assert alone == pytest.approx(by_loss, rel=1e-4)
    for asked in (prompts, [beginning + prompt for prompt in prompts]):
        for answers in (([7, 8], [7, 9]), ([5], [6]), ([5], [6, 7]), ([5, 6, 7], [8, 9])):
            zero, one = (continuation_log_likelihoods(model, asked, [answer] * 4) for answer in answers)
            assert answer_log_odds(model, asked, answers) == pytest.approx(np.subtract(one, zero), abs=1e-4)
    assert answer_log_odds(model, [], ([5], [6])) == []
    with pytest.raises(ValueError, match="a token at least"):
        continuation_log_likelihoods(model, [[]], [[1]])


@pytest.fixture
def api():
    """An OpenAI-compatible server on loopback that replies by the explanation, or from `replies`; it fails first."""
    requests, replies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            failed = len(requests) == 1
            text = body["messages"][1]["content"]
            usual = "B." if "good" in text else "A" if "bad" in text else "I can't say"
            reply = replies[-1] if replies else usual
            message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [message]}
            payload = json.dumps(answer).encode()
            self.send_response(404 if reply is None else 500 if failed else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", requests, replies
    server.shutdown()
    server.server_close()


class TestOpenAI:
    def test_answers(self, api, prompt, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        url, requests, _ = api
        judge = OpenAIJudge("m", prompt, url, credentialed=True, workers=2)
        explanations = ["Verdict: supported.\nIt is bad.", "It is good.", None, "Who knows?"]
        assert judge.judge(explanations) == [0.0, 1.0, None, None]
        assert len(requests) == 4  # three, and one again after the failure
        assert not any("Verdict" in request["messages"][1]["content"] for request in requests)

    def test_through_make_judge(self, api, monkeypatch, tmp_path):
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        rows = [{"explanation": f"It is {word}.", "label": label} for word, label in (("good", 1.0), ("bad", 0.0))]
        task = Task("my_own", PROMPT, ("no", "yes"), DatasetDict(validation=Dataset.from_list(rows)))
        judge = make_judge(f"openai:m@{api[0]}", task, tmp_path)
        assert judge.fitness.accuracy == 1.0
        assert "secret" not in json.dumps(judge.describe())
        asked = len(api[1])
        assert make_judge(f"openai:m@{api[0]}", task, tmp_path).fitness == judge.fitness
        assert len(api[1]) == asked
        (kept,) = tmp_path.iterdir()
        assert "127.0.0.1" not in kept.read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("reply", "answer"),
        [
            ("A", 0.0), ("(B)", 1.0), ("B. It fell.", 1.0), ("**A**", 0.0), ("A:\nno", 0.0), ("A\n\nIt rose.", 0.0),
            ("X", None), ("A conclusion: B", None), ("A/B", None), ("", None), ("Better", None),
        ],
    )  # fmt: skip
    def test_letter_of_a_reply(self, reply, answer, api, prompt):
        url, _, replies = api
        replies.append(reply)
        assert OpenAIJudge("m", prompt, url).judge(["Who knows?"]) == [answer]

    def test_no_answer_is_paid_for_twice(self, api, prompt, tmp_path):
        url, requests, replies = api
        judge = OpenAIJudge("m", prompt, url, workers=1, folder=tmp_path)
        assert judge.judge(["It is good.", "It is bad.", "It is good."]) == [1.0, 0.0, 1.0]
        replies.append(None)
        with pytest.raises(ValueError, match="gave no answer"):
            judge.judge(["It is good.", "Who knows?"])
        replies.clear()
        asked = len(requests)
        again = OpenAIJudge("m", prompt, url, folder=tmp_path)
        assert again.judge(["It is bad.", "Who knows?", "It is good."]) == [0.0, None, 1.0]
        assert len(requests) == asked + 1
        OpenAIJudge("another", prompt, url, folder=tmp_path).judge(["It is bad."])
        assert len(requests) == asked + 2

    def test_no_key(self, prompt, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(ValueError, match=r"needs a key for https://api\.example\.com/v1: set OPENAI_API_KEY"):
            OpenAIJudge("m", prompt, "https://api.example.com/v1")

    def test_a_server_that_refuses(self, api, prompt):
        url, _, replies = api
        replies.append(None)
        with pytest.raises(ValueError, match=r"judge openai:m gave no answer: .*404"):
            OpenAIJudge("m", prompt, url).judge(["It is good."])

    def test_credentialed_explanations_stay_here(self, prompt):
        for url in ("https://api.openai.com/v1", "http://localhost.example.com/v1", "http://10.0.0.1/v1"):
            assert not is_loopback(url)
            with pytest.raises(ValueError, match="credentialed"):
                OpenAIJudge("m", prompt, url, credentialed=True)
        assert all(map(is_loopback, ("http://localhost:1/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1")))

    def test_credentialed_default_url_is_refused(self, prompt, monkeypatch):
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        with pytest.raises(ValueError, match="credentialed"):
            OpenAIJudge("m", prompt, credentialed=True)


class TestLeakage:
    def test_las_by_hand(self):
        # Leaking rows: both right where the text alone was wrong in one of two. Others: right, lost.
        found = leakage_adjusted_simulatability(
            input_only=[True, False, False, True], explanation_only=[True, True, False, False], both=[1, 1, 1, 0]
        )
        assert found == {
            "las": pytest.approx(0.25), "gain_leaking": 0.5, "gain_not_leaking": 0.0,
            "leaking_rows": 2, "not_leaking_rows": 2,
        }  # fmt: skip

    def test_explanation_that_says_the_answer_leaks(self):
        generator = np.random.default_rng(0)
        predicted = generator.integers(0, 2, 80)
        texts = [f"trial number {generator.integers(1000)} of drug {generator.integers(1000)}" for _ in predicted]
        explanations = [f"the claim is {'good' if label else 'bad'}" for label in predicted]
        found = leakage_report(rows_of(explanations, predicted), texts)
        assert found["predicted"]["explanation_only"] == 1.0
        assert abs(found["predicted"]["input_only"] - 0.5) < 0.25
        assert found["leaking_rows"] == 80
        assert math.isnan(found["las"])
        assert found["gain_leaking"] > 0.2
        assert found["undefined"] == {
            "las": "all rows leak, or none does",
            "gain_not_leaking": "all rows leak, or none does",
        }

    def test_text_that_tells_the_answer(self):
        predicted = np.arange(60) % 2
        texts = [f"{'lower' if label else 'higher'} mortality" for label in predicted]
        explanations = [f"see table {i % 7}" for i in range(60)]
        found = leakage_report(rows_of(explanations, predicted, gold=[None] * 60), texts)
        assert found["predicted"]["input_only"] == 1.0
        assert "gold" in found["undefined"]
        assert math.isnan(found["gold"]["both"])
        assert found["las"] == pytest.approx(0.0)

    def test_marks_alone_are_read(self):
        found = leakage_report(rows_of(["...", "?!"] * 10, [0, 1] * 10), ["---"] * 20)
        assert found["predicted"]["explanation_only"] == 1.0

    def test_degenerate_rows(self):
        for explanations, predicted in (
            ([], []),
            (["good"], [1]),
            ([None] * 20, [0, 1] * 10),
            (["good"] * 8, [0, 1, 1, 1, 1, 1, 1, 1]),
            (["good"] * 20, [1] * 20),
        ):
            found = leakage_report(rows_of(explanations, predicted), ["text"] * len(predicted))
            assert math.isnan(found["las"])
            assert {"predicted", "gold", "las"} <= set(found["undefined"])
        with pytest.raises(ValueError, match="a text a row"):
            leakage_report(rows_of(["good"], [1]), [])


def test_what_a_second_reading_is_worth():
    rows = pd.DataFrame(
        {
            "gold": [1, 1, 0, 0, 1, 0],
            "predicted": [1, 1, 0, 0, 0, 1],
            "probability": [0.9, 0.7, 0.1, 0.3, 0.4, 0.6],
            "lm_probability": [0.8, 0.6, 0.2, 0.6, 0.9, 0.3],
        }
    )
    rows["logit"] = logit(rows["probability"])
    found = second_reading_report(rows, 0.5, samples=200)
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(rows["gold"], rows["lm_probability"]))
    by_weight = auroc_by_weight(rows, 0.0)
    assert by_weight["0.0"] == pytest.approx(roc_auc_score(rows["gold"], rows["probability"]))
    assert by_weight["1.0"] == pytest.approx(roc_auc_score(rows["gold"], rows["lm_probability"]))
    pooled = rows.assign(logit=0.7 * logit(rows["probability"]) + 0.3 * logit(rows["lm_probability"]))
    assert by_weight["0.3"] == pytest.approx(roc_auc_score(rows["gold"], pooled["logit"]))
    assert auroc_by_weight(pooled, 0.3) == pytest.approx(by_weight)
    assert auroc_by_weight(rows, 1.0) == auroc_by_weight(rows[:2], 0.0) == {}
    assert found["agreement"]["value"] == 0.5  # the first three
    assert found["errors_where_agreed"]["value"] == 0.0
    assert found["errors_where_not"]["value"] == pytest.approx(2 / 3)  # but for the fourth
    # Distances of the wrong: 0.5 and 0.3; of the right: 0.1, 0.1, 0.1 and 0.3, so that one of eight pairs is a tie.
    assert found["auroc_of_distance"]["value"] == pytest.approx(7.5 / 8)
    assert found["auroc_of_closeness"]["value"] == 1.0
    flawless = second_reading_report(rows[:3], 0.5, samples=200)
    assert flawless["errors_where_not"]["reason"] == "no row where they differ"
    assert flawless["auroc_of_distance"]["reason"] == "no wrong decision"
