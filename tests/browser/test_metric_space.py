"""The metric's Space: a copy of `metrics/clsgen`, started, asked through its API and by a visitor."""

import re
import shutil

import pytest
from apps_in_chromium import Browser, served
from sklearn import metrics

from clsgen.tasks import ROOT

pytestmark = pytest.mark.browser
ROWS = [[0.1, 0], [0.7, 0], [0.6, 1], [0.9, 1], [0.4, 1]]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a copy is served, from a folder of the name that the Hub gives a Space's files."""
    folder = tmp_path_factory.mktemp("user") / "app"
    shutil.copytree(ROOT / "metrics" / "clsgen", folder, ignore=shutil.ignore_patterns("__pycache__"))
    with served(
        folder / "app.py", tmp_path_factory.mktemp("app"), HF_HOME=str(tmp_path_factory.mktemp("home"))
    ) as url:
        yield url


@pytest.fixture(scope="module")
def ask(address, tmp_path_factory):
    from gradio_client import Client

    client = Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))

    def ask(rows, configuration="classification", threshold=0.5):
        table = {"headers": ["predictions", "references"], "data": rows, "metadata": None}
        return client.predict(table, configuration, threshold, api_name="/compute")

    yield ask
    client.close()


def test_values_are_those_of_sklearn(ask):
    probabilities, labels = zip(*ROWS, strict=True)
    found = ask(ROWS, threshold=0.65)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(labels, probabilities))
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(labels, probabilities))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, [p >= 0.65 for p in probabilities]))
    assert found["undefined"] == {}


def test_the_other_configuration_compares_with_judged_labels(ask):
    found = ask(ROWS, "alignment")
    probabilities, judged = zip(*ROWS, strict=True)
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score([p >= 0.5 for p in probabilities], judged))
    assert found["contradiction_rate"] == pytest.approx(2 / 5)


def test_what_the_rows_leave_undefined_is_empty_and_has_a_reason(ask):
    found = ask([[0.2, 1], [0.8, 1], ["", ""]])
    assert found["auroc"] is None
    assert found["undefined"]["auroc"] == "all references are 1"
    assert found["rows"] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.2, ""], [0.8, 1]], "both a probability and a label"),
        ([["", ""]], "Give a row at least"),
        ([[1.2, 0], [0.8, 1]], "must lie in [0, 1]"),
        ([[0.2, 2], [0.8, 1]], "Labels must be 0 or 1"),
    ],
)
def test_rows_that_cannot_be_scored_say_why(ask, rows, message):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=re.escape(message)):
        ask(rows)


def test_a_visitor_gets_the_values_of_the_example(address, tmp_path):
    browser = Browser(tmp_path, address)
    try:
        browser.open()
        submit = "//button[normalize-space()='Submit']"
        button = browser.until(lambda: browser.driver.find_elements("xpath", submit), "the button")[0]
        assert "0.75" not in browser.text("body")
        button.click()
        browser.until(lambda: "0.75" in browser.text("body"), "the AUROC")
        browser.screenshot("metric", 1280)
    finally:
        browser.driver.quit()
