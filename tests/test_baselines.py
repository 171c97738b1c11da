"""Baselines: each learns what is there to learn, writes what the table reads, and says what it can't use."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import PROMPT
from datasets import Dataset, DatasetDict
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.baselines import fine_tuning
from benchmarks.baselines.__main__ import SYSTEMS, parse_options, system_class
from benchmarks.baselines.cnn import TextCnn
from benchmarks.baselines.fine_tuning import ClassificationOnly, SftOnly, TwoModels
from benchmarks.baselines.prompting import first_difference, verbalised_probability
from benchmarks.baselines.running import RefusedRunError, labelled, labels_of, run
from clsgen.backbones import DEFAULT_BACKBONE
from clsgen.frozen_layers import FrozenLayers
from clsgen.tasks import Task


@pytest.fixture(scope="module")
def task():
    """A task whose label stands in the text, in words."""
    generator = np.random.default_rng(0)

    def split(name, rows):
        return Dataset.from_list(
            [
                {
                    "id": f"{name}-{i}",
                    "findings": f"Mortality {'fell' if i % 2 else 'rose'} in {generator.integers(100)} patients.",
                    "claim": f"Drug {generator.integers(10)} works.",
                    "label": float(i % 2),
                    "explanation": f"It {'fell' if i % 2 else 'rose'}. So {'yes' if i % 2 else 'no'}.",
                }
                for i in range(rows)
            ]
        )

    splits = DatasetDict(train=split("train", 40), validation=split("validation", 12), test=split("test", 16))
    return Task("my_own", PROMPT, ("no", "yes"), splits)


@pytest.fixture(autouse=True)
def fitted(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuning, "FITTED", tmp_path / "fitted")


SMALL = {
    "cnn": {"epochs": 8, "learning_rates": [3e-3]},
    "zero-shot-verbalised": {"max_new_tokens": 2},
    "few-shot": {"examples": [2]},
    "sft-only": {"lora_first_layer": 1, "lora_r": 2, "max_explanation_length": 24},
    "classification-only": {"epochs": 1, "lora_r": 2},
    "two-models": {
        "classifier": {"epochs": 1, "lora_r": 2},
        "explainer": {"lora_r": 2, "lora_first_layer": 0, "max_explanation_length": 24},
    },
}
EXPLAINING = {"sft-only": {"free", "guided"}, "two-models": {"guided"}, "classification-only": {"free"}}
WITH_LANGUAGE_MODEL = {"sft-only", "two-models", "classification-only"}


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_result_files(system, task, backbones, tmp_path):
    baseline = system_class(system)(task, 0, backbones["llama"], **SMALL.get(system, {}))
    report = run(baseline, system, tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert written["system"] == system
    assert written["test"]["rows"] == 16
    predictions = json.loads((tmp_path / "test_predictions.json").read_text(encoding="utf-8"))
    labels, probabilities = zip(*((row["label"], row["probability"]) for row in predictions), strict=True)
    agreed = sum(row["predicted"] == row["label"] for row in predictions) / len(predictions)
    assert agreed == pytest.approx(written["test"]["accuracy"])
    assert roc_auc_score(labels, probabilities) == pytest.approx(written["test"]["auroc"])
    assert set(report.get("alignment", {})) == set(report.get("language", {})) == EXPLAINING.get(system, set())
    assert ("collapse" in report) == (system in WITH_LANGUAGE_MODEL)
    if system in ("tfidf", "cnn"):
        assert written["test"]["auroc"] == 1.0
    for mode, judged in report.get("alignment", {}).items():
        assert set(judged) == {"tfidf", "tfidf-no-verdict"}
        assert report["language"][mode]["rows"] == 16


def explained_as(explanation, task):
    splits = {
        name: Dataset.from_list([{**row, "explanation": explanation} for row in rows], features=rows.features)
        for name, rows in task.splits.items()
    }
    return replace(task, splits=DatasetDict(splits))


def test_without_a_judge_there_are_numbers_still(task, backbones, tmp_path):
    baseline = SftOnly(explained_as("It fell.", task), 0, backbones["llama"], **SMALL["sft-only"])
    report = run(baseline, "sft-only", tmp_path)
    assert report["test"]["rows"] == 16
    assert report["alignment"]["undefined"]["tfidf-no-verdict"].startswith("The offline judge needs explanations")
    assert report["language"]["guided"]["rows"] == 16
    assert (tmp_path / "metrics.json").is_file()


def test_seed_is_all_that_changes_a_cnn(task):
    rows = labelled(task, "test")
    options = {"epochs": 2, "learning_rates": [1e-3]}
    logits = []
    for seed in (0, 0, 1):
        baseline = system_class("cnn")(task, seed, "", **options)
        baseline.fit()
        logits.append(baseline.logits(rows))
    assert np.array_equal(logits[0], logits[1])
    assert not np.allclose(logits[0], logits[2])


def test_cnn_ignores_padding():
    torch.manual_seed(0)
    model = TextCnn(20).eval()
    short, long = [2, 3, 4], [5, 6, 7, 8, 9, 2, 3]
    together = model(torch.tensor([[*short, 0, 0, 0, 0], long]))
    assert together.tolist() == pytest.approx([model(torch.tensor([row])).item() for row in (short, long)])


def test_classifier_reads_the_prompts_last_token(task, backbones):
    baseline = ClassificationOnly(task, 0, backbones["llama"], epochs=1, lora_r=2)
    baseline.fit()
    rows = labelled(task, "test")
    together = baseline.logits(rows)
    assert together == pytest.approx([baseline.logits([row])[0] for row in rows], abs=1e-5)
    ids = torch.tensor([baseline.prompts(rows[:1])[0]])
    body = baseline._model.base_model(input_ids=ids).last_hidden_state[0, -1]
    scores = baseline._model.score(body).detach()
    assert together[0] == pytest.approx(float(scores[1] - scores[0]), abs=1e-5)


def test_sft_learns_words_and_verdicts_alone_on_completions(task, backbones):
    baseline = SftOnly(task, 0, backbones["llama"], lora_first_layer=0, learning_rate=2e-2)
    rows = labelled(task, "train")
    baseline.fit()
    before = AutoModelForCausalLM.from_pretrained(backbones["llama"])
    changed = [
        name for (name, old), new in zip(before.named_parameters(), baseline._model.parameters(), strict=True)
        if not torch.equal(old, new)
    ]  # fmt: skip
    assert changed
    assert not any("embed" in name or "norm" in name for name in changed)
    gained = baseline.logits(rows)
    baseline._model = before
    gained -= baseline.logits(rows)
    assert gained[labels_of(rows) == 1].mean() > gained[labels_of(rows) == 0].mean()


def test_sft_row_without_explanation_teaches_the_verdict_and_not_to_stop_there(task, backbones):
    baseline = SftOnly(task, 0, backbones["llama"])
    encoder = baseline._encoder = baseline.encoder()
    row = labelled(task, "train")[0]
    explained, bare = baseline._encoded(row), baseline._encoded({**row, "explanation": None})
    verdict = encoder.encode_verdict(int(row["label"]))
    prompt = baseline.prompts([row])[0]
    assert bare == {"input_ids": prompt + verdict, "labels": [-100] * len(prompt) + verdict}
    assert explained["input_ids"][: len(bare["input_ids"])] == bare["input_ids"]
    assert explained["labels"][-1] == encoder.end_of_turn_id
    assert encoder.end_of_turn_id not in bare["labels"]


def test_sft_trains_alike_whether_frozen_layers_are_kept_or_not(task, backbones, monkeypatch):
    options = {"lora_first_layer": 1, "sampling": "group_by_length", "learning_rate": 2e-2}
    depths = []

    def frozen_layers(model, depth, folder):
        depths.append(depth)
        return FrozenLayers(model, depth, folder)

    monkeypatch.setattr(fine_tuning, "FrozenLayers", frozen_layers)
    kept = SftOnly(task, 0, backbones["llama"], **options).fit()
    assert depths == [1]
    monkeypatch.setattr(fine_tuning, "first_trained_layer", lambda model: 0)
    monkeypatch.setattr(fine_tuning, "FITTED", fine_tuning.FITTED / "again")
    assert SftOnly(task, 0, backbones["llama"], **options).fit() == {
        **kept, "train_loss": pytest.approx(kept["train_loss"], rel=1e-5)
    }  # fmt: skip


@pytest.mark.parametrize("kind", [SftOnly, ClassificationOnly])
def test_a_cut_training_goes_on_from_its_last_checkpoint(kind, task, backbones, monkeypatch):
    options = {"epochs": 2, "lora_r": 2, "lora_first_layer": 0}
    whole = kind(task, 0, backbones["llama"], **options)
    expected = whole.fit()
    monkeypatch.setattr(fine_tuning, "FITTED", fine_tuning.FITTED / "again")
    cut = kind(task, 0, backbones["llama"], **options)

    class Cut(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch >= 1:
                raise KeyboardInterrupt

    train = cut.train
    monkeypatch.setattr(cut, "train", lambda model, folder, callbacks: train(model, folder, [*callbacks, Cut()]))
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    clock = cut.fitted_folder() / "training" / "seconds.json"
    before = json.loads(clock.read_text(encoding="utf-8"))
    again = kind(task, 0, backbones["llama"], **options)
    found = again.fit()
    assert found["steps"] == expected["steps"]
    rows = labelled(task, "test")
    assert again.logits(rows) == pytest.approx(whole.logits(rows), abs=1e-4)
    record = json.loads((cut.fitted_folder() / "fitted.json").read_text(encoding="utf-8"))
    assert record["seconds"] > before > 0
    assert not clock.parent.exists()


@pytest.mark.parametrize("kind", [ClassificationOnly, SftOnly])
def test_there_are_no_words_to_judge_where_nobody_wrote_any(kind, task, backbones):
    baseline = kind(explained_as(None, task), 0, backbones["llama"], lora_r=2, lora_first_layer=0, epochs=1)
    baseline.fit()
    assert baseline.explain(labelled(task, "test"), [1] * 16) == {}
    assert baseline.language_model() is baseline.language_model()


def test_two_models_are_the_classifier_and_the_explainer_trained_once(task, backbones):
    parts = {ClassificationOnly: {"epochs": 1, "lora_r": 2}, SftOnly: {"lora_first_layer": 0, "epochs": 1}}
    alone = [part(task, 0, backbones["llama"], **options) for part, options in parts.items()]
    both = TwoModels(
        task, 0, backbones["llama"], **dict(zip(("classifier", "explainer"), parts.values(), strict=True))
    )
    assert [alone[0].fit(), alone[1].fit()] == list(both.fit().values())
    rows = labelled(task, "test")
    assert np.array_equal(both.logits(rows), alone[0].logits(rows))
    written = alone[1].generate(alone[1].language_model(), alone[1].prompts(rows), [1] * len(rows))
    assert both.explain(rows, [1] * len(rows)) == {"guided": written}
    assert both.earlier_seconds > 0 == alone[0].earlier_seconds
    other = SftOnly(task, 1, backbones["llama"], **parts[SftOnly])
    assert other.fitted_folder() != alone[1].fitted_folder()


def test_few_shot_examples_are_balanced_and_from_training(task, backbones):
    baseline = system_class("few-shot")(task, 0, backbones["llama"])
    baseline.load()
    examples = baseline._examples(4)
    assert examples.count("Answer: not supported") == 2
    assert examples.count("Answer: supported") == 2
    known = {task.text_of(row) for row in labelled(task, "train")}
    assert sum(text in examples for text in known) == 4
    assert baseline._examples(4) == examples


@pytest.mark.parametrize(
    ("system", "options"),
    [("zero-shot-logprob", {}), ("few-shot", {"examples": [2, 4]}), ("zero-shot-verbalised", {"max_new_tokens": 2})],
)
def test_prompted_systems_keep_the_validation_logits_of_the_chosen_way(system, options, task, backbones):
    baseline = system_class(system)(task, 0, backbones["llama"], **options)
    chosen = baseline.fit()
    kept, rows = baseline.validation_logits(), labelled(task, "validation")
    assert kept == pytest.approx(baseline.logits(rows), abs=1e-5)
    assert len(chosen["validation_aurocs"]) == 2
    assert roc_auc_score(labels_of(rows), kept) == pytest.approx(max(chosen["validation_aurocs"].values()))


def test_verbalised_replies_go_on_from_their_beginning_in_the_order_of_the_rows(task, backbones):
    baseline = system_class("zero-shot-verbalised")(task, 0, backbones["llama"], max_new_tokens=3)
    baseline.fit()
    tokenizer, prompts = baseline._tokenizer, [[5, 6, 7] * length for length in (1, 9, 4)]
    expected = [
        baseline._model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0, len(ids) :]
        for ids in prompts
    ]
    assert baseline._replies(prompts) == tokenizer.batch_decode(expected, skip_special_tokens=True)
    asked = []
    baseline._replies = lambda prompts: asked.extend(prompts) or ["70%"] * len(prompts)
    rows = labelled(task, "validation")
    for baseline._way in ("", "Probability:"):
        assert baseline.logits(rows) == pytest.approx([np.log(0.7 / 0.3)] * len(rows))
    plain, begun = asked[: len(rows)], asked[len(rows) :]
    assert [tokenizer.decode(ids) for ids in begun] == [f"{tokenizer.decode(ids)}Probability:" for ids in plain]


@pytest.mark.parametrize(
    ("reply", "probability"),
    [
        ("85%", 0.85), ("The probability is 85", 0.85), ("0.85", 0.85), ("1%", 0.01), ("1", 1.0), ("0", 0.0),
        ("0.5%", 0.005), ("40 percent", 0.4), ("250", None), ("likely", None), ("", None), ("-5", 0.05),
    ],
)  # fmt: skip
def test_verbalised_probability(reply, probability):
    assert verbalised_probability(reply) == (None if probability is None else pytest.approx(probability))


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 4]) == ([1, 2], [1, 4])
    with pytest.raises(ValueError, match="No token tells"):
        first_difference([1, 2], [1, 2, 3])


def test_options():
    assert parse_options(["epochs=2", "learning_rate=2e-4", "examples=[2, 1e-3]", "way=none"]) == {
        "epochs": 2, "learning_rate": 2e-4, "examples": [2, 1e-3], "way": "none"
    }  # fmt: skip
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_options(["epochs"])


def test_results_of_other_settings_are_not_replaced(task, tmp_path):
    run(system_class("cnn")(task, 0, "", epochs=1), "cnn", tmp_path)
    before = (tmp_path / "metrics.json").read_text()
    for changed, (seed, epochs, backbone) in {
        "settings": (0, 2, None), "seed": (1, 1, None), "backbone": (0, 1, "one")
    }.items():  # fmt: skip
        with pytest.raises(RefusedRunError, match=f"another value of `{changed}`"):
            run(system_class("cnn")(task, seed, "", epochs=epochs), "cnn", tmp_path, backbone=backbone)
    assert (tmp_path / "metrics.json").read_text() == before
    run(system_class("cnn")(task, 0, "", epochs=1), "cnn", tmp_path)


def test_a_result_file_that_lacks_a_setting_had_its_default(task, backbones, tmp_path):
    folder = tmp_path / "results"
    again = partial(run, system_class("zero-shot-logprob")(task, 0, backbones["llama"]), "zero-shot-logprob", folder)
    again(backbone=DEFAULT_BACKBONE)
    report = json.loads((folder / "metrics.json").read_text())
    former = {name: value for name, value in report.items() if name != "backbone"}
    former["settings"] = {}
    (folder / "metrics.json").write_text(json.dumps(former))
    again(backbone=DEFAULT_BACKBONE)
    (folder / "metrics.json").write_text(json.dumps(former))
    with pytest.raises(RefusedRunError, match="another value of `backbone`"):
        again(backbone="another/one")


def test_says_what_it_cannot_use(task):
    one_class = task.splits["validation"].filter(lambda row: row["label"] == 1)
    splits = DatasetDict({**task.splits, "validation": one_class})
    with pytest.raises(RefusedRunError, match="holds one class only"):
        run(system_class("cnn")(replace(task, splits=splits), 0, ""), "cnn")
    with pytest.raises(ValueError, match=r"has no option \['epoch'\]; it has \['batch_size'"):
        system_class("cnn")(task, 0, "", epoch=3)
    bare = Task("bare", PROMPT, ("no", "yes"), DatasetDict(train=task.splits["train"]))
    with pytest.raises(ValueError, match="labelled rows in the validation split of 'bare'"):
        run(system_class("tfidf")(bare, 0, ""), "tfidf")
    assert labels_of(labelled(task, "test")).tolist() == [0, 1] * 8
    assert math.isfinite(labels_of(labelled(task, "train")).mean())
