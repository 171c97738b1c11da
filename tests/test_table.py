"""The side-by-side table: what it reads from result files, and what it leaves empty."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.rivals import auroc_differences, no_worse
from benchmarks.table import COLUMNS, contests, markdown, shortfalls, table_rows, write_tables
from clsgen.atomic_io import write_json

UNMEASURED = (
    "not compared with zero-shot-logprob, zero-shot-verbalised, few-shot, sft-only, classification-only, two-models, "
    "which have not been measured here."
)
SCORES = {"average_precision": 0.8, "f1": 0.7, "balanced_accuracy": 0.6, "brier": 0.2, "ece": 0.05}


def run(auroc, **others):
    return {"test": {"auroc": auroc, **SCORES}, **others}


@pytest.fixture
def results(tmp_path):
    judge = {"fitness": {"accuracy": 0.96, "fit": True}}
    words = {
        "judge": judge, "judged": 9, "rows": 10, "auroc_alignment": 0.9, "kappa": 0.8, "contradiction_rate": 0.1,
    }  # fmt: skip
    evaluation = {
        "split": "test",
        "arguments": {"limit": None},
        "classification": {"auroc": {"value": 0.851}},
        "alignment": {
            "free": {"tfidf": words, "tfidf-no-verdict": {**words, "auroc_alignment": 0.6}},
            "guided": {"tfidf": {**words, "kappa": None}},
        },
        "language": {"free": {"flesch_reading_ease": 40.0, "rep4": 0.01}, "guided": {"rep4": 0.03}},
        "collapse": {"general": {"ratio": 1.05}},
        "speed": {"texts_per_second": 3.0},
    }
    for seed, auroc in enumerate((0.70, 0.74, 0.72)):
        write_json(tmp_path / f"my/cnn/seed-{seed}/metrics.json", run(auroc, system="cnn", train_seconds=seed))
    write_json(tmp_path / "my/encoder-probe/seed-0/metrics.json", run(0.86, system="encoder-probe"))
    write_json(tmp_path / "my/tfidf/seed-0/metrics.json", run(0.90, system="tfidf", texts_per_second=10.0))
    write_json(tmp_path / "my/small/metrics.json", run(0.85, wall_seconds=7.0, threshold=0.4))
    write_json(tmp_path / "my/small/evaluation/metrics.json", evaluation)
    write_json(tmp_path / "my/ablations/packing/seed-0/metrics.json", run(0.99))
    write_json(tmp_path / "my/unfinished/metrics.json", {"validation": {"auroc": 0.9}})
    return tmp_path


def test_rows(results):
    rows = table_rows(results, ["my", "missing"])
    assert [(row["system"], row["mode"], row["seeds"]) for row in rows] == [
        ("clsgen-small", "free", 1), ("clsgen-small", "guided", 1), ("cnn", "", 3), ("encoder-probe", "", 1),
        ("tfidf", "", 1), ("ablation-packing", "", 1),
    ]  # fmt: skip
    free, guided, cnn, _, tfidf, _ = rows
    assert cnn["auroc_mean"] == pytest.approx(0.72)
    assert cnn["auroc_std"] == pytest.approx(0.02)  # of -0.02, 0.02 and 0: sqrt(0.0008 / 2)
    assert cnn["train_seconds"] == pytest.approx(1.0)
    assert (tfidf["auroc_std"], tfidf["train_seconds"], tfidf["texts_per_second"]) == (None, None, 10.0)
    assert (free["kappa_mean"], free["rep4"], free["perplexity_general_ratio"]) == (0.8, 0.01, 1.05)
    assert (guided["kappa_mean"], guided["flesch_reading_ease"], guided["rep4"]) == (None, None, 0.03)
    assert (free["auroc_alignment_mean"], free["auroc_alignment_no_verdict"]) == (0.9, 0.6)
    assert (free["train_seconds"], free["texts_per_second"]) == (7.0, 3.0)
    assert (free["judged_share"], free["judge_accuracy"], tfidf["judged_share"]) == (0.9, 0.96, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "validation"}, "not of the whole test split"),
        ({"arguments": {"limit": 40}}, "not of the whole test split"),
        (
            {"classification": {"auroc": {"value": 0.9}}},
            r"another checkpoint: its AUROC is 0\.9000, the run's 0\.8500",
        ),
        ({"threshold": 0.41}, r"another checkpoint: its threshold is 0\.4100, the run's 0\.4000"),
    ],
)
def test_an_evaluation_of_something_else_is_refused(results, change, message):
    file = results / "my/small/evaluation/metrics.json"
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **change})
    with pytest.raises(ValueError, match=message):
        table_rows(results, ["my"])


def test_an_unfit_judge_is_told(results):
    file = results / "my/small/evaluation/metrics.json"
    evaluation = json.loads(file.read_text(encoding="utf-8"))
    for mode in ("guided", "free"):
        evaluation["alignment"][mode]["tfidf"]["judge"]["fitness"] = {"accuracy": 0.6, "fit": False}
    write_json(file, evaluation)
    sentence = "my, clsgen-small: the judge tfidf is unfit (its accuracy is 0.600): alignment by it means little."
    assert sentence in shortfalls(table_rows(results, ["my"]))


def test_a_seed_without_a_number_leaves_the_mean_empty(results):
    write_json(results / "my/cnn/seed-3/metrics.json", {"system": "cnn", "test": {"auroc": None, "f1": 0.7}})
    cnn = table_rows(results, ["my"])[2]
    assert (cnn["seeds"], cnn["auroc_mean"], cnn["auroc_std"], cnn["f1_mean"]) == (4, None, None, pytest.approx(0.7))


def test_calibration_error_by_chance(results):
    write_json(results / "my/small/metrics.json", {"test": {"auroc": 0.85, **SCORES, "ece": 0.4}})
    rows = [{"id": i, "label": 1, "predicted": 1, "probability": 0.5, "logit": 0.0} for i in range(4)]
    write_json(results / "my/small/test_predictions.json", rows)
    free = table_rows(results, ["my"])[0]
    # |k / 4 - 1 / 2| of k positives among four rows: 0.5 twice in 16 draws of them, 0.25 eight times, else 0.
    assert free["ece_by_chance"] == pytest.approx(3 / 16, abs=0.01)
    sentence = f"ece_mean is 0.400 (a perfectly calibrated model's: {free['ece_by_chance']:.3f}); its target"
    assert sentence in shortfalls([free])[0]


def test_shortfalls_are_said(results):
    assert shortfalls(table_rows(results, ["my"])) == [
        "my, clsgen-small: auroc_alignment_mean (free) is 0.900; its target is at least 0.95.",
        "my, clsgen-small: auroc_alignment_mean (guided) is 0.900; its target is at least 0.98.",
        "my, clsgen-small: no kappa_mean (guided) yet; its target is at least 0.9.",
        "my, clsgen-small: rep4 (guided) is 0.030; its target is at most 0.02.",
        "my, clsgen-small: AUROC 0.850 is below the 0.900 of tfidf.",
        "my, clsgen-small: AUROC 0.850 is below the 0.860 of encoder-probe.",
        f"my, clsgen-small: {UNMEASURED}",
    ]


def test_tfidf_has_to_be_beaten(results):
    write_json(results / "my/small/metrics.json", run(0.86))
    evaluation = json.loads((results / "my/small/evaluation/metrics.json").read_text(encoding="utf-8"))
    evaluation["classification"]["auroc"]["value"] = 0.86
    write_json(results / "my/small/evaluation/metrics.json", evaluation)
    write_json(results / "my/tfidf/seed-0/metrics.json", run(0.86, system="tfidf"))
    told = [sentence for sentence in shortfalls(table_rows(results, ["my"])) if "AUROC" in sentence]
    assert told == ["my, clsgen-small: AUROC 0.860 is no better than the 0.860 of tfidf."]


def test_shortfalls_tell_what_was_tried(results):
    tried = [
        {"task": "my", "target": "kappa_mean (guided)", "tried": "more rows."},
        {"task": "other", "target": "auroc_mean", "tried": "nothing."},
    ]
    plain, told = (shortfalls(table_rows(results, ["my"]), known) for known in ((), tried))
    changed = [(one, other) for one, other in zip(plain, told, strict=True) if one != other]
    assert changed == [(one, f"{one} Tried: more rows.") for one in plain if "kappa_mean (guided)" in one]
    assert len(changed) == 1


def test_a_task_without_explanations_has_no_words_to_judge(results):
    write_json(results / "my/small/metrics.json", run(0.95, train_rows={"explained": 0}))
    (results / "my/small/evaluation/metrics.json").unlink()
    assert shortfalls(table_rows(results, ["my"])) == [
        "my, clsgen-small: its training rows have no explanations, so it learned no words to be judged.",
        "my, clsgen-small: no perplexity_general_ratio yet; its target is at most 1.1.",
        f"my, clsgen-small: {UNMEASURED.replace(', two-models', '')}",
    ]


def test_what_baselines_do_as_well_or_better_is_said(results):
    ((ours, rivals),) = contests(table_rows(results, ["my"]))
    told = list(no_worse(ours, rivals))
    assert "my, clsgen-small: auroc_mean is 0.850; encoder-probe 0.860, tfidf 0.900." in told
    assert "my, clsgen-small: brier_mean is 0.200; cnn 0.200, encoder-probe 0.200, tfidf 0.200." in told
    assert not any("kappa" in sentence or "alignment" in sentence for sentence in told)  # of systems without words


def test_auroc_differences_are_tested_on_the_same_rows(results):
    random, ids = np.random.default_rng(0), [str(i) for i in range(40)]
    labels = [i % 2 for i in range(40)]
    kept = {}
    for system in ("small", "cnn/seed-0", "cnn/seed-1", "cnn/seed-2"):
        kept[system] = [float(value) for value in (0.5 * np.array(labels) + random.random(40)) / 1.5]
        rows = zip(ids, labels, kept[system], strict=True)
        records = [{"id": i, "label": label, "probability": probability} for i, label, probability in rows]
        write_json(results / f"my/{system}/test_predictions.json", records[::-1])
    (contest,) = contests(table_rows(results, ["my"]))
    ((task, system, difference, _, p_value),) = auroc_differences(*contest)
    seeds = [roc_auc_score(labels, kept[f"cnn/seed-{seed}"]) for seed in range(3)]
    assert (task, system) == ("my", "cnn")
    assert float(difference) == pytest.approx(roc_auc_score(labels, kept["small"]) - np.mean(seeds), abs=5e-4)
    assert 0 < float(p_value) < 1
    write_json(results / "my/cnn/seed-1/test_predictions.json", records[1:])
    with pytest.raises(ValueError, match="other rows"):
        list(auroc_differences(*contest))


def test_paper_is_apart(results):
    ours, _, paper = markdown(table_rows(results, ["my"])).partition("## The paper's numbers")
    assert "Llama" not in ours
    assert "| CliniFact and LCD-30 | CLSGen on Llama-3.1-8B-Instruct | AUROC-alignment | 0.95 to 0.98 |" in paper
    assert "None" not in ours
    assert "nan" not in ours


def test_writes_both(results):
    assert write_tables(results, ["my"]) == 6
    with (results / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert (rows[2]["auroc_mean"], rows[2]["kappa_mean"], rows[2]["seeds"]) == ("0.720000", "", "3")
    assert (results / "table.md").read_text(encoding="utf-8").startswith("# Side by side")
    with pytest.raises(ValueError, match=r"no result files of \['other'\]"):
        write_tables(results, ["other"])


def test_broken_file_is_named(results):
    (results / "my/cnn/seed-1/metrics.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"seed-1/metrics.json is not JSON"):
        table_rows(results, ["my"])
    assert json.loads((results / "my/cnn/seed-0/metrics.json").read_text(encoding="utf-8"))
