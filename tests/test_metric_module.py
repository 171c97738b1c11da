"""The `evaluate` module in metrics/clsgen: loads without a network, and agrees with scikit-learn and our own code."""

import math
import subprocess
import sys

import evaluate
import numpy as np
import pytest
from sklearn import metrics

from clsgen.classification_metrics import classification_metrics
from clsgen.evaluation.alignment import alignment_metrics
from clsgen.tasks import ROOT

FOLDER = str(ROOT / "metrics" / "clsgen")


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(FOLDER)


@pytest.fixture(scope="module")
def alignment():
    return evaluate.load(FOLDER, "alignment")


@pytest.fixture
def rows():
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 2, 90)
    return labels, (0.3 * labels + 0.7 * generator.random(90)).round(2)  # with ties


def test_matches_sklearn(metric, rows):
    labels, probabilities = rows
    found = metric.compute(predictions=probabilities, references=labels, threshold=0.6)
    predicted = probabilities >= 0.6
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(labels, probabilities))
    assert found["average_precision"] == pytest.approx(metrics.average_precision_score(labels, probabilities))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, predicted))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert found["mcc"] == pytest.approx(metrics.matthews_corrcoef(labels, predicted))
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(labels, probabilities))
    assert found["undefined"] == {}


def test_agrees_with_the_local_code(metric, alignment, rows):
    labels, probabilities = rows
    for threshold in (0.5, 0.65):
        ours = classification_metrics(labels, probabilities, threshold)
        found = metric.compute(predictions=probabilities, references=labels, threshold=threshold)
        assert {name: found[name] for name in ours} == pytest.approx(ours, abs=1e-12)
        ours = alignment_metrics(probabilities, (probabilities >= threshold).astype(int), labels)
        found = alignment.compute(predictions=probabilities, references=labels, threshold=threshold)
        assert {name: found[name] for name in ours} == ours


@pytest.mark.parametrize("label", [0, 1])
def test_undefined_values_are_named(metric, alignment, label):
    found = metric.compute(predictions=[0.3], references=[label])
    undefined = {name for name, value in found.items() if isinstance(value, float) and math.isnan(value)}
    assert undefined == set(found["undefined"])
    assert {"auroc", "average_precision", "mcc"} <= undefined
    found = alignment.compute(predictions=[0.3, 0.9], references=[label, label])
    assert set(found["undefined"]) == {"auroc_alignment", "kappa"}
    assert math.isnan(found["kappa"])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0.5], [2], "Labels must be"),
        ([0.5], [0.9], "Labels must be"),
        ([math.nan], [1], "Probabilities must lie"),
        ([1.2], [1], "Probabilities must"),
    ],
)
def test_refuses_what_cannot_be_scored(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)


def test_unknown_configuration():
    with pytest.raises(ValueError, match="one of"):
        evaluate.load(FOLDER, "wrong")


def test_needs_nothing_of_this_repository(tmp_path):
    """From another folder, without a network: as somebody who got the folder alone."""
    (tmp_path / "clsgen").mkdir()
    for name in ("clsgen.py", "README.md"):
        (tmp_path / "clsgen" / name).write_text((ROOT / "metrics" / "clsgen" / name).read_text(encoding="utf-8"))
    code = (
        "import evaluate; m = evaluate.load('./clsgen'); "
        "print(m.compute(predictions=[0.2, 0.8, 0.6, 0.4], references=[0, 1, 0, 1])['auroc'])"
    )
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "0.75"
