"""Exports answer as the checkpoint does, without its code: same tokens, same probability."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, PROMPT, build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from clsgen.checkpoint_folder import write_checkpoint
from clsgen.export import export, head_constant, main, stock_form_problem

STOCK = [(-1, "decision")]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=[*CONFIGS, pytest.param("smollm2", marks=pytest.mark.slow)])
def backbone(request, backbones):
    """Folders of tiny backbones, and of the real small one."""
    return request.getfixturevalue("smollm2") if request.param == "smollm2" else backbones[request.param]


def stock_model(folder):
    model = build(folder, reads=STOCK)
    model.config.cls_bias = False
    weight = model.cls_head.weight.detach().clone()
    model.set_reads(STOCK)
    with torch.no_grad():
        model.cls_head.weight.copy_(weight)
    model.config.calibration = {"temperature": 0.7, "bias": 0.0}
    model.config.threshold = 0.6
    return model


def plain(texts):
    return [f"Findings: {text['findings']}\n\nClaim: {text['claim']}" for text in texts]


def test_stock_classifier_gives_the_same_probabilities(backbone, texts, tmp_path):
    model = stock_model(backbone)
    expected = [prediction.probability for prediction in model.classify(texts)]
    export(model, tmp_path / "out")
    folder = tmp_path / "out" / "sequence_classification"
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(classifier).__module__.startswith("transformers.")
    assert classifier.config.id2label == {0: "not_supported", 1: "supported"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sides = ["right"] if classifier.config.model_type == "gpt2" else ["right", "left"]  # its positions are absolute
    for side in sides:
        batch = tokenizer(plain(texts), return_tensors="pt", padding=True, padding_side=side)
        with torch.no_grad():
            probabilities = classifier(**batch).logits.softmax(-1)[:, 1].tolist()
        assert probabilities == pytest.approx(expected, abs=1e-5)
    answers = pipeline("text-classification", model=str(folder), device=-1)(plain(texts), top_k=None, batch_size=3)
    scores = [{answer["label"]: answer["score"] for answer in each}["supported"] for each in answers]
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "text",
    ["One.", "Ends in a break.\n", "\n\n Starts so", "ünïcödé 漢字 🙂", "a\r\nb\tc", "0.05 (p<0.01)", "{claim} {{x}}"],
)
def test_the_exported_tokenizer_makes_the_prompt_that_the_model_was_trained_on(text, backbones, tmp_path):
    model = stock_model(backbones["llama"])
    export(model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "sequence_classification")
    assert tokenizer(text)["input_ids"] == model.encoder.encode(text).input_ids


def test_a_text_forges_no_control_token_in_the_export(backbones, tmp_path):
    model = stock_model(backbones["llama"])
    export(model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "sequence_classification")
    for ids in (tokenizer("a<|im_end|>b")["input_ids"], tokenizer(["a<|im_end|>b", "c"])["input_ids"][0]):
        assert ids.count(257) == model.encoder.encode("ab").input_ids.count(257)
        assert tokenizer.decode(ids).count("<|im_end|>") == tokenizer.decode(tokenizer("ab")["input_ids"]).count(
            "<|im_end|>"
        ) + 1  # fmt: skip


def test_the_language_model_writes_the_same_tokens(backbone, texts, tmp_path):
    model = build(backbone, explanation_no_repeat_ngram_size=0)
    export(model, tmp_path / "out")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "causal_lm")
    assert type(lm).__module__.startswith("transformers.")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "causal_lm")
    facts = json.loads((tmp_path / "out" / "clsgen.json").read_text())
    for prediction, text in zip(model.classify_and_explain(texts, max_new_tokens=12), texts, strict=True):
        prompt = model.encoder.encode(text).input_ids + facts["verdict_ids"][prediction.label_id]
        written = lm.generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :]
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == prediction.explanation
    ids = torch.tensor([model.encoder.encode(texts[0]).input_ids])
    with torch.no_grad():
        assert torch.equal(lm(ids).logits, model(ids).logits)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_serving_recipe_computes_the_same_probability_from_hidden_states(backbone, texts, tmp_path, weight):
    """The first Python blocks of docs/serving.md, run as they stand, against another head than the stock one."""
    model = build(backbone, pos_weight=3.0)
    model.config.calibration = {"temperature": 0.7, "bias": -0.2}
    model.config.lm_reading_weight = weight
    export(model, tmp_path / "out")
    assert not (tmp_path / "out" / "sequence_classification").exists()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), flags=re.DOTALL)
    recipe = {}
    for block in blocks[:2]:
        exec(
            compile(block.replace("outputs/trial_claims/export", str(tmp_path / "out")), "serving.md", "exec"), recipe
        )
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "causal_lm")
    for text, prediction in zip(texts, model.classify(texts), strict=True):
        ids = recipe["prompt_ids"](plain([text])[0])
        assert ids == model.encoder.encode(text).input_ids
        with torch.no_grad():
            hidden = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states
        states = {layer: hidden[layer][0].numpy() for layer, _ in recipe["facts"]["cls_reads"]}
        scores = []
        for line in recipe["facts"]["verdict_ids"]:
            with torch.no_grad():
                following = lm(torch.tensor([ids + line])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            scores.append(following[range(len(line)), line].sum().item())
        reading = (scores[1] - scores[0],) if weight else ()
        assert recipe["probability"](states, *reading) == pytest.approx(prediction.probability, abs=1e-5)


def test_a_number_with_the_lms_reading_in_it_has_no_stock_classifier(backbones, tmp_path):
    model = stock_model(backbones["llama"])
    assert stock_form_problem(model) is None
    model.config.lm_reading_weight = 0.5
    assert "lm_reading_weight" in stock_form_problem(model)


def test_the_head_is_written_as_it_is(model, tmp_path):
    export(model, tmp_path / "out")
    head = load_file(tmp_path / "out" / "cls_head.safetensors")
    assert torch.equal(head["weight"].flatten(), model.cls_head.weight.detach()[0])
    assert head["weight"].shape == (2, 32)
    facts = json.loads((tmp_path / "out" / "clsgen.json").read_text())
    assert facts["cls_reads"] == [[2, "mean"], [3, "decision"]]
    assert (facts["question"], facts["labels"]) == (PROMPT["question"], ["not_supported", "supported"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_reads": [[2, "mean"]]}, "the head reads"),
        ({"pos_weight": 2.0}, "the constant term -0.99"),
        ({"calibration": {"temperature": 1.0, "bias": 0.25}}, "the constant term 0.25"),
    ],
)
def test_heads_that_stock_classes_cannot_hold_are_named(backbones, change, message):
    model = stock_model(backbones["llama"])
    assert stock_form_problem(model) is None
    assert head_constant(model) == 0
    for name, value in change.items():
        setattr(model.config, name, value)
    assert message in stock_form_problem(model)


def test_the_command_writes_all_or_nothing(backbones, tmp_path):
    model = stock_model(backbones["llama"])
    report = {"base_model": "tiny", "task": "t", "command": "c", "seed": 0, "train_rows": 1, "threshold_method": "f1"}
    folder = write_checkpoint(model, tmp_path / "model", report)
    command = [sys.executable, str(ROOT / "export.py"), "--model", str(folder), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "causal_lm, cls_head.safetensors, clsgen.json, sequence_classification" in done.stdout
    with pytest.raises(SystemExit, match="is there already"):
        main(command[2:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
