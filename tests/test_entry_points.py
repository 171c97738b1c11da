"""What finds a checkpoint by its folder alone: pipelines, decision models, Inference Endpoints."""

import importlib.util
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from conftest import PROMPT
from transformers import pipeline

from clsgen.checkpoint_folder import write_checkpoint

REPORT = {"base_model": "tiny", "task": "tiny", "command": "c", "seed": 0, "train_rows": 1, "threshold_method": "f1"}
LABELS = ["not_supported", "supported"]


@pytest.fixture
def folder(model, tmp_path):
    model.generation_config.max_new_tokens = 6
    model.config.base_rate = 0.5
    return str(write_checkpoint(model, tmp_path / "model", REPORT))


@pytest.mark.parametrize("task", [{"task": "text-classification"}, {}])
def test_pipeline_gives_label_score_and_explanation(folder, model, texts, task):
    classifier = pipeline(**task, model=folder, trust_remote_code=True, device=-1)
    expected = model.classify_and_explain(texts)
    answers = classifier(texts)
    for answer, prediction in zip(answers, expected, strict=True):
        assert answer["label"] == prediction.label
        assert answer["probability"] == pytest.approx(prediction.probability, abs=1e-4)
        assert answer["score"] == pytest.approx(max(prediction.probability, 1 - prediction.probability), abs=1e-4)
        assert answer["explanation"] == prediction.explanation
    one_by_one = classifier(texts[0]) + list(classifier(text for text in texts[1:]))
    for others in (one_by_one, classifier(texts, batch_size=2)):
        for other, answer in zip(others, answers, strict=True):
            assert other == {name: pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
                             for name, value in answer.items()}  # fmt: skip


def test_pipeline_options(folder, model, texts):
    classifier = pipeline(model=folder, trust_remote_code=True, device=-1)
    for answers in (classifier(texts[0], top_k=None), classifier(texts[0], top_k=2), classifier(texts, top_k=None)[0]):
        assert sorted(answer["label"] for answer in answers) == LABELS
        assert sum(answer["score"] for answer in answers) == pytest.approx(1)
        assert answers[0]["score"] >= answers[1]["score"]
    assert [answer["explanation"] for answer in classifier(texts, explain=False)] == [None] * 4
    moved = classifier(texts, prior=0.1, explain=False)
    expected = model.classify(texts, prior=0.1)
    assert [a["probability"] for a in moved] == pytest.approx([p.probability for p in expected], abs=1e-4)
    free = classifier(texts[0], mode="free", generate_kwargs={"max_new_tokens": 3})[0]
    assert free["explanation"] == model.classify_and_explain(texts[0], mode="free", max_new_tokens=3).explanation
    assert "lm_probability" not in classifier(texts[0], explain=False)[0]
    with pytest.raises(TypeError, match="top_n"):
        classifier(texts[0], top_n=3)
    with pytest.raises(ValueError, match="is empty"):
        classifier([texts[0], " "])


def test_decision_pipeline_answers_with_the_heads_probability_and_its_reason(folder, model, texts):
    decide = pipeline("decision", model=folder, trust_remote_code=True, device=-1)
    expected = model.classify_and_explain(texts[0])
    questions = {
        "a": {"type": "noul"},
        "b": {"type": "choice", "criteria": dict.fromkeys(LABELS), "instructions": PROMPT["question"]},
    }
    answers = decide({"state": texts[0], "questions": questions})
    assert answers["a"]["noul"] == pytest.approx(expected.probability, abs=1e-4)
    assert answers["b"]["probabilities"]["supported"] == pytest.approx(expected.probability, abs=1e-4)
    assert answers["b"]["choice"] == answers["a"]["label"] == expected.label
    assert answers["a"]["explanation"] == expected.explanation
    assert answers["a"]["explanation_cut"] == expected.explanation_cut
    assert decide(json.dumps({"state": texts[0], "questions": questions})) == answers
    decide.model.decision_config.explain = False
    without = decide({"state": "One text", "questions": {"q": {"type": "noul"}}})["q"]
    assert set(without) == {"type", "noul", "label", "threshold", "truncated"}


def test_decision_is_that_of_the_models_threshold_where_the_likelier_label_is_another(model, texts):
    model.config.calibration["bias"] = 0.2 - model.classify(texts[0]).logit / model.config.calibration["temperature"]
    model.config.threshold = 0.6
    expected = model.classify(texts[0])
    answer = answers_of(model, texts[0], {"q": {"type": "choice", "criteria": dict.fromkeys(LABELS)}})["q"]
    assert answer["probabilities"]["supported"] == pytest.approx(expected.probability, abs=1e-4)
    assert answer["label"] == expected.label
    assert answer["threshold"] == expected.threshold
    assert (answer["choice"], answer["confidence"]) == ("not_supported", 0)


@pytest.mark.parametrize("names", [["true", "false"], ["false", "true"]])
def test_labels_that_are_called_true_and_false_keep_their_probabilities(model, texts, names):
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    questions = {"a": {"type": "noul"}, "b": {"type": "choice", "criteria": dict.fromkeys(names)}}
    answers, expected = answers_of(model, texts[0], questions), model.classify(texts[0])
    assert answers["a"]["noul"] == pytest.approx(expected.probability, abs=1e-4)
    assert answers["b"]["probabilities"][names[1]] == pytest.approx(expected.probability, abs=1e-4)


def test_decision_answers_say_that_a_text_was_cut(model):
    request = {"state": "word " * 3000, "questions": {"q": {"type": "noul"}}}
    assert model.decision_config.prepare_inputs(request, model.tokenizer)[0][1][0].truncated


def answers_of(model, state, questions):
    """What `pipeline("decision")` answers."""
    inputs, parsed = model.decision_config.prepare_inputs({"state": state, "questions": questions}, model.tokenizer)[0]
    scores = model.decide(**inputs, decision_questions=parsed)
    return {
        question.name: question.answer(of_options.softmax(-1).tolist())
        for question, of_options in zip(parsed, scores, strict=True)
    }


@pytest.mark.parametrize(
    "question",
    [
        {"type": "noul", "instructions": "Is it raining?"},
        {"type": "choice", "criteria": {"wet": None, "dry": None}},
        {"type": "score", "criteria": ["low", "high"]},
        {"type": "noul", "criteria": {"true": "It rains", "false": "It is dry"}},
    ],
)
def test_decision_pipeline_answers_no_question_but_its_own(model, question):
    with pytest.raises(ValueError, match="Question 'q'"):
        model.decision_config.prepare_inputs({"state": "text", "questions": {"q": question}}, model.tokenizer)


def test_decision_requests_that_are_none(model):
    for request in ({"state": "text"}, [], '{"questions": {}}'):
        with pytest.raises(ValueError, match="A request looks like"):
            model.decision_config.prepare_inputs(request, model.tokenizer)
    with pytest.raises(ValueError, match="is empty"):
        model.decision_config.prepare_inputs({"state": "", "questions": {"q": {"type": "noul"}}}, model.tokenizer)


def test_endpoint_handler_as_the_toolkit_calls_it(folder, model, texts):
    spec = importlib.util.spec_from_file_location("handler", f"{folder}/handler.py")
    handler_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(handler_module)
    handler = handler_module.EndpointHandler(folder)
    answers = handler({"inputs": texts, "parameters": {"generate_kwargs": {"max_new_tokens": 4}}})
    expected = model.classify_and_explain(texts, max_new_tokens=4)
    assert [a["explanation"] for a in answers] == [p.explanation for p in expected]
    assert [a["probability"] for a in answers] == pytest.approx([p.probability for p in expected], abs=1e-4)
    alone = handler({"inputs": "One text", "parameters": {"explain": False, "prior": 0.2}})
    assert alone[0]["prior"] == 0.2
    assert alone[0]["explanation"] is None
    json.dumps(answers)
    for request in ({}, {"inputs": "a", "parameters": {"temprature": 1}}, {"inputs": ""}):
        with pytest.raises(ValueError, match=r"request is|temprature|is empty"):
            handler(request)
    code = Path(folder) / "evil" / "custom_generate" / "generate.py"
    code.parent.mkdir(parents=True)
    code.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    loading = {"custom_generate": str(code.parent.parent), "trust_remote_code": True}
    with pytest.raises(ValueError, match="custom_generate"):
        handler({"inputs": "a", "parameters": {"generate_kwargs": loading}})
    assert not code.with_name("ran").exists()


def test_a_fresh_process_elsewhere_finds_every_entry_point(folder, tmp_path):
    script = """
import sys
from transformers import AutoModelForDecision, pipeline
folder = sys.argv[1]
classifier = pipeline(model=folder, trust_remote_code=True, device=-1)
decide = pipeline("decision", model=folder, trust_remote_code=True, device=-1)
p = classifier("Findings: A.")[0]["probability"]
q = decide({"state": "Findings: A.", "questions": {"q": {"type": "noul"}}})["q"]["noul"]
r = AutoModelForDecision.from_pretrained(folder, trust_remote_code=True).classify("Findings: A.").probability
assert abs(p - q) < 1e-4 and abs(p - r) < 1e-4, (p, q, r)
assert not any(name.split(".")[0] == "clsgen" for name in sys.modules)
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, folder], cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_decide_reads_the_given_ids(model):
    ids = torch.tensor([model.encoder.encode("One text").input_ids])
    question = model.decision_config.prepare_inputs(
        {"state": "One text", "questions": {"q": {"type": "noul"}}}, model.tokenizer
    )[0][1]
    scores = model.decide(ids, torch.tensor([ids.shape[1]]), question)[0]
    options = dict(zip(question[0].options, scores.softmax(-1).tolist(), strict=True))
    assert options["true"] == pytest.approx(model.classify("One text").probability, abs=1e-4)


def test_transformers_serve_answers_systemone_requests(folder, model, texts):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder, "--trust-remote-code"]
    server = subprocess.Popen([*command, "--port", str(port), "--device", "cpu", "--host", "127.0.0.1"])
    try:
        for _ in range(300):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        body = {"model": folder, "state": texts[0], "questions": {"answer": {"type": "noul"}}}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/systemone", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        expected = model.classify_and_explain(texts[0])
        assert answer.json()["answers"]["answer"]["noul"] == pytest.approx(expected.probability, abs=1e-4)
        assert answer.json()["answers"]["answer"]["explanation"] == expected.explanation
        body["questions"]["answer"]["instructions"] = "Is it raining?"
        refused = httpx.post(f"http://127.0.0.1:{port}/v1/systemone", json=body, timeout=60)
        assert refused.status_code == 400
        assert "this model answers one question" in refused.text
    finally:
        server.terminate()
        server.wait()
