"""Filters: each refuses what it is for, says why, and leaves honest explanations alone."""

import pytest

from clsgen.explanations.filters import (
    FILTERS,
    Candidate,
    FilterArguments,
    find_near_duplicates,
    find_problems,
    longest_common_run,
)
from clsgen.explanations.numbers_in_text import unsupported_numbers
from clsgen.explanations.verdicts import parse_verdict, verdict_disagreement
from clsgen.tasks import load_task

TEXT = (
    "Mortality at 30 days was 8.1% (33 of 408) with drug A and 12.4% (50 of 403) with placebo (HR 0.65, 95% CI 0.42 "
    "to 0.99; p=0.04). Two hundred ninety-six patients stayed for 12 weeks; HbA1c fell by 1,234 units in an open "
    "label arm."
)
GOOD = (
    "Fewer patients died with drug A than with placebo, 8.1% against 12.4%, and the interval of the hazard ratio "
    "ends below 1."
)


def names(explanation, arguments=None, **others):
    candidate = Candidate(explanation, TEXT, label_names=("not_supported", "supported"), **others)
    return [finding.filter for finding in find_problems(candidate, arguments or FilterArguments())]


def test_a_good_explanation_passes_them_all():
    assert names(GOOD, label=1, verdict=1) == []
    assert names("In this open-label trial the label's owner changed nothing: drug A was better, as 8.1% died.") == []


@pytest.mark.parametrize(
    ("explanation", "expected"),
    [
        ("I'm sorry, but I can't help with medical questions about the effects of drugs on patients.", "refusal"),
        ("As an AI language model, I have no opinion on whether drug A lowers mortality at all.", "refusal"),
        ("The correct label is supported, since fewer patients died with drug A than with placebo.", "label_leakage"),
        ("Fewer patients died with drug A than with placebo, so that this must be not_supported in the end.",
         "label_leakage"),
        ("Too few words here.", "length"),
        ("Weniger Patienten starben unter dem Medikament als unter Placebo, und das Intervall ist eng genug.",
         "language"),
        ("Drug A was better than placebo. " * 8, "repetition"),
        (f"So it is said: {TEXT[:150]}", "copied_input"),
        ("Fewer patients died with drug A than with placebo, 7.3% against 12.4%, which is a clear difference.",
         "unsupported_number"),
        ("Fewer patients died with drug A than with placebo, as one can see.<|im_end|>", "artefact"),
        ('{"explanation": "Fewer patients died with drug A than with placebo, as one can see."}', "artefact"),
    ],
)  # fmt: skip
def test_each_filter_refuses_what_it_is_for(explanation, expected):
    assert expected in names(explanation)


@pytest.mark.parametrize(
    "explanation",
    [
        "In this open-label 1:1 randomised trial, fewer patients died with drug A than with placebo.",
        "In this open label 1:1 randomised trial, fewer patients died with drug A than with placebo.",
        "Drug A was the treatment of choice 1 year ago, and fewer patients died with it than with placebo.",
        "Drug A is the better option a doctor has, for fewer patients died with it than with placebo.",
        "The correct answer rate was higher with drug A than with placebo, which the interval shows to be no chance.",
        "We cannot answer the question of mortality because too few patients died with drug A or with placebo.",
        "We cannot help but see that fewer patients died with drug A than with placebo in this trial.",
    ],
)
def test_clinical_sentences_are_no_leaks_and_no_refusals(explanation):
    assert names(explanation) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        *((words, "label_leakage") for words in (
            "so this is label 1.", "hence label: 1 is not said but label 0, as given", "it is labelled as true",
            "so option A is right", "so option b is right", "the right choice 1, as one sees", "choice B is right",
            "which the correct answer says", "the true label rates it so", "the ground truth label is the same",
            "Answer: it is so", "the label is the same",
        )),
        *((words, "refusal") for words in (
            "I cannot answer this question.", "I can't answer that", "I won't answer the question as it stands",
            "We cannot answer this question!", "I am unable to answer the request, as an assistant",
            "I cannot help with that", "we will not provide medical advice",
        )),
    ],
)  # fmt: skip
def test_leaks_and_refusals_in_other_words(words, expected):
    assert expected in names(f"Fewer patients died with drug A than with placebo in this trial, and {words}")


def test_verdict_agreement():
    assert names(GOOD, label=1, verdict=0) == ["verdict_agreement"]
    assert names(GOOD, label=1, verdict=None) == []
    assert verdict_disagreement(None, 1) is None
    assert [parse_verdict(value) for value in ("TRUE", " no ", 1.0, "0")] == [1, 0, 1, 0]
    assert parse_verdict("Not Supported", (("not supported", "supported"),)) == 0
    with pytest.raises(ValueError, match="The verdict is 'maybe'; it must be one of"):
        parse_verdict("maybe")


def test_only_chosen_filters_are_used():
    assert names("Too few 99.", FilterArguments(filters=["unsupported_number"])) == []
    assert names("Too few words here.", FilterArguments(filters=["none"])) == []
    for wrong in ({"filters": ["odd"]}, {"language": "xx"}, {"min_words": 9, "max_words": 8},
                  {"near_duplicate_similarity": 1.0}, {"max_repetition": 2.0}):  # fmt: skip
        with pytest.raises(ValueError, match=r"filter|language|words|similarity|repetition"):
            FilterArguments(**wrong)


@pytest.mark.parametrize(
    "explanation",
    [
        "296 patients stayed for 12 weeks", "about 3 months", "1234 units of HbA1c", "a gap of 4.3 points",
        "33 of 408, or 8%", "811 patients in both arms", "a third fewer deaths, or 34.7% less", "a 35% lower hazard",
        "two arms, 95% interval, p below 0.05", "0.65 (0.42-0.99)", "p = .04", "83 deaths in all", "91.9% lived",
        "the SGLT2 drug and COVID-19",
    ],
)  # fmt: skip
def test_numbers_that_the_text_gives_ground_for(explanation):
    assert unsupported_numbers(explanation, TEXT) == []


@pytest.mark.parametrize(
    ("explanation", "found"),
    [("8.7% died", ["8.7"]), ("a hazard ratio of 0.56", ["0.56"]), ("2,900 patients", ["2900"]),
     ("after 29 weeks", ["29"]),     ("p = 0.013 and 8.1%", ["0.013"])],
)  # fmt: skip
def test_numbers_that_the_text_does_not_hold(explanation, found):
    assert unsupported_numbers(explanation, TEXT) == found


def test_near_duplicates_name_the_first():
    other = "The interval of the risk difference includes no effect, and the trial was stopped early for slow accrual."
    found = find_near_duplicates([("a", GOOD), ("b", other), ("c", GOOD.replace("Fewer", "Less")), ("d", other)], 0.8)
    assert set(found) == {"c", "d"}
    assert found["d"].reason == "100% alike to the explanation of b"


def test_longest_common_run():
    assert longest_common_run(list("abcdef"), list("xxcdexxcdef"), 99) == 4
    assert longest_common_run(list("abcdef"), list("xxcdexxcdef"), 3) == 3
    assert longest_common_run([], list("ab"), 9) == 0


def test_explanations_written_by_hand_pass():
    """None of the 440 explanations of the embedded task is refused: a row filtered wrongly is the worse error."""
    task, arguments = load_task("trial_claims"), FilterArguments()
    rows = [row for split in task.splits.values() for row in split]
    for row in rows:
        assert (
            find_problems(Candidate(row["explanation"], task.text_of(row), label_names=task.labels), arguments) == []
        )
    assert find_near_duplicates([(row["id"], row["explanation"]) for row in rows], 0.8) == {}
    assert len(FILTERS) == 10
