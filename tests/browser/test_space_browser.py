"""The Space's page in a real Chromium: what is typed, streamed, uploaded, refused, and how it looks and reads.

make test-space     # screenshots are left in outputs/space_screenshots
"""

import csv
from pathlib import Path

import pytest
from apps_in_chromium import Browser, served
from conftest import VOCABULARY, build

pytestmark = pytest.mark.browser
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
AXE = HERE / "node_modules" / "axe-core" / "axe.min.js"
CLAIM = "Drug A lowers mortality."
FINDINGS = "Mortality was 8.1% with drug A. It was 12.4% with placebo. The trial had 900 patients."
HOSTILE = '<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script> {{value}} ${window.hacked=1} **b**'
RECORD = """
window.seen = {words: [], announced: []};
new MutationObserver(() => {
  const words = document.querySelector('#explanation .words');
  if (words && document.querySelector('.caret')) seen.words.push(words.textContent.length);
}).observe(document.getElementById('explanation'), {subtree: true, childList: true, characterData: true});
const status = document.querySelector('#announcer [role=status]');
new MutationObserver(() => seen.announced.push([status.textContent, status.isConnected]))
  .observe(status, {childList: true, characterData: true, subtree: true});
"""


@pytest.fixture(scope="session")
def shown_model(backbones, tokenizer, tmp_path_factory):
    """A tiny model that writes long enough for its writing to be watched, and its folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build(
        backbones["llama"],
        conformal={"error_rate": 0.1, "quantiles": [0.99, 0.99]},
        threshold=0.4,
        calibration={"temperature": 4.0, "bias": 0.0},  # its number is none of those that are shown as "< 0.1%"
        explanation_no_repeat_ngram_size=3,
    )
    readable = {*tokenizer("abcdefgh .")["input_ids"]}
    model.generation_config.update(
        max_new_tokens=400, suppress_tokens=[i for i in range(VOCABULARY) if i not in readable]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def address(shown_model, tmp_path_factory):
    """Where the app is served."""
    with served(ROOT / "space" / "app.py", tmp_path_factory.mktemp("app"), CLSGEN_MODEL=str(shown_model[1])) as url:
        yield url


class SpaceBrowser(Browser):
    """What a visitor of the Space's page does there."""

    def open(self, width=1280, dark=False):
        super().open(width, dark)
        self.wait("#ask")
        self.run(RECORD)

    def field(self, label):
        return self.driver.find_element("xpath", f"//label[.//span[normalize-space()='{label}']]//textarea")

    def write(self, claim=CLAIM, findings=FINDINGS):
        for label, text in (("Claim", claim), ("Findings", findings)):
            self.run("arguments[0].value = ''", self.field(label))
            self.field(label).send_keys(text or " ")

    def ask(self):
        self.wait("#ask").click()

    def answer(self):
        self.ask()
        self.wait("#sentences section")

    def choose_file(self, path, explain=False):
        self.press("A file of texts")
        self.wait("#ask-file")
        self.all("#file input[type=file]")[0].send_keys(str(path))
        self.until(lambda: path.stem in self.text("#file"), "the file's name")
        if explain:
            self.driver.find_element("xpath", "//label[contains(., 'Write explanations')]").click()
        self.wait("#ask-file").click()

    def press(self, name):
        buttons = self.driver.find_elements("xpath", f"//button[normalize-space()='{name}']")
        next(button for button in buttons if button.is_displayed()).click()  # narrow tab bars hold hidden copies

    def download(self, folder):
        """The file that the download button gives."""
        behaviour = {"behavior": "allow", "downloadPath": str(folder)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
        self.wait("#download").click()
        return self.until(lambda: next(iter(folder.glob("*.csv")), None), "the download")


@pytest.fixture(scope="session")
def session_browser(address, tmp_path_factory):
    assert AXE.is_file(), f"{AXE} is not there: run `make test-space`, which installs it."
    browser = SpaceBrowser(tmp_path_factory.mktemp("profile"), address)
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(session_browser):
    """The open page; afterwards, its console must hold no error, and all it loaded must be the app's own."""
    session_browser.open()
    yield session_browser
    log = session_browser.driver.get_log("browser")
    assert [entry for entry in log if entry["level"] == "SEVERE"] == []
    loaded = session_browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith((session_browser.url, "data:", "blob:"))] == []


def test_a_text_is_answered_while_it_is_written(browser, shown_model):
    browser.write()
    browser.answer()
    model, text = shown_model[0], {"claim": CLAIM, "findings": FINDINGS}
    expected = model.classify_and_explain(text, attributions=True)
    assert browser.text("#answer .verdict").endswith(expected.label.replace("_", " ").capitalize())
    assert browser.text("#answer .bubble") == f"{100 * expected.probability:.1f}%"
    shown = browser.run("return document.querySelector('#explanation .words').textContent")
    assert shown.split() == expected.explanation.split()
    assert len(browser.all("#sentences .scored")) == len(expected.attributions)
    lengths = browser.run("return [...new Set(seen.words)]")
    assert len(lengths) > 3
    assert lengths == sorted(lengths)


def test_screen_readers_hear_the_number_first_and_the_end_last(browser):
    browser.write()
    browser.answer()
    announced = browser.run("return seen.announced")
    assert all(same for _, same in announced)  # a live region that was replaced would be silent
    told = [text.strip() for text, _ in announced if text.strip()]
    assert "probability" in told[1]
    assert told[0] == "Reading the text."
    assert told[-1] == "The sentences are weighed."


def test_the_keyboard_alone_is_enough(browser):
    from selenium.webdriver.common.keys import Keys

    browser.write()
    browser.field("Findings").send_keys(Keys.TAB)
    for _ in range(6):
        focused = browser.driver.switch_to.active_element
        outline = browser.run("return getComputedStyle(arguments[0]).outlineStyle", focused)
        assert outline != "none"
        if focused.get_attribute("id") == "ask":
            focused.send_keys(Keys.ENTER)
            break
        focused.send_keys(Keys.TAB)
    browser.wait("#sentences section")


def test_shift_enter_in_a_field_asks(browser):
    from selenium.webdriver.common.keys import Keys

    browser.write()
    browser.field("Findings").send_keys(Keys.SHIFT, Keys.ENTER)
    browser.wait("#sentences section")


def test_an_example_fills_the_fields(browser):
    browser.press("A clear result")
    browser.until(lambda: browser.field("Claim").get_attribute("value"), "the example")
    assert "12.4%" in browser.field("Findings").get_attribute("value")


def test_one_text_can_be_pasted_whole(browser, shown_model):
    browser.driver.find_element("xpath", "//label[normalize-space()='As one text']").click()
    browser.wait("#whole textarea").send_keys(f"{CLAIM} {FINDINGS}")
    browser.answer()
    expected = shown_model[0].classify(f"{CLAIM} {FINDINGS}")
    assert browser.text("#answer .bubble") == f"{100 * expected.probability:.1f}%"


def test_hostile_text_stays_text(browser):
    browser.write(claim=HOSTILE, findings=HOSTILE)
    browser.answer()
    assert browser.run("return window.hacked") is None
    assert browser.all("#sentences img, #sentences script, #sentences b") == []
    assert "{{value}} ${window.hacked=1} **b**" in browser.text("#sentences")


@pytest.mark.parametrize(
    ("claim", "message"), [("", "“Claim” is empty"), ("x" * 3000, "longer than 400 tokens even without its document")]
)
def test_texts_that_cannot_be_answered_say_why(browser, claim, message):
    browser.write(claim=claim)
    browser.ask()
    assert message in browser.wait("#answer [role=alert]").text
    assert browser.all("#explanation section") == []


def test_stop_ends_the_writing(browser):
    browser.write()
    assert not browser.wait("#stop").is_enabled()
    browser.ask()
    browser.until(lambda: browser.run("return seen.words.length > 2"), "the first words")
    browser.wait("#stop").click()
    assert "Stopped" in browser.wait("#sentences .empty").text
    assert browser.all(".caret") == []
    browser.answer()  # and the next text is answered


def test_a_file_comes_back_with_all_its_rows(browser, shown_model, tmp_path):
    path = tmp_path / "trials.csv"
    path.write_text(f'id,claim,findings\n1,{CLAIM},{FINDINGS}\n=2,,"x"\n3,{HOSTILE},y\n4,too few\n', encoding="utf-8")
    browser.choose_file(path)
    browser.wait("#report section")
    assert browser.text("#report h2") == "2 of 4 rows answered"
    table = browser.text("#report .table")
    assert "3 The field 'claim' is empty" in table
    assert "5 It has 2 cells" in table
    saved = browser.download(tmp_path / "downloads")
    assert saved.name == "trials_answers.csv"
    with saved.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["1", "'=2", "3", "4"]
    expected = shown_model[0].classify({"claim": CLAIM, "findings": FINDINGS})
    assert float(rows[0]["clsgen_probability"]) == pytest.approx(expected.probability, abs=1e-5)
    assert [bool(row["clsgen_error"]) for row in rows] == [False, True, False, True]


def test_a_file_is_explained_where_asked_for(browser, tmp_path):
    path = tmp_path / "two.csv"
    path.write_text("claim,findings\na,b\nc,d\n", encoding="utf-8")
    browser.choose_file(path, explain=True)
    browser.wait("#report section")
    assert browser.text("#report h2") == "2 of 2 rows answered"


@pytest.mark.parametrize(
    ("content", "message"),
    [("claim,note\nx,y\n", "no column named 'findings'"), ("claim,findings\n" + "x,y\n" * 501, "at most 500")],
)
def test_unusable_files_say_why(browser, tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_text(content, encoding="utf-8")
    browser.choose_file(path)
    assert message in browser.wait("#report [role=alert]").text


def test_no_file_is_a_clear_message(browser):
    browser.press("A file of texts")
    browser.wait("#ask-file").click()
    assert "Upload a CSV file first" in browser.wait("#report [role=alert]").text


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("light", 1280, False), ("dark", 1280, True), ("phone", 390, False)]
)
def test_it_is_accessible_and_fits(browser, tmp_path, name, width, dark):
    path = tmp_path / "trials.csv"
    path.write_text(f"claim,findings\n{CLAIM},{FINDINGS}\n,x\n", encoding="utf-8")
    browser.open(width, dark)
    browser.write(findings=f"{FINDINGS} " * 10)
    browser.answer()
    assert browser.all("#answer .note")
    check_accessible(browser)
    browser.screenshot(f"text_{name}", width)
    check_fits(browser, width)
    browser.resize(width, 900)
    browser.choose_file(path)
    browser.wait("#report section")
    check_accessible(browser)
    browser.screenshot(f"file_{name}", width)
    check_fits(browser, width)


def check_fits(browser, width):
    """Raises where something that can be seen reaches beyond the screen's edge, but for tables that scroll."""
    edges = browser.run(
        "return [...document.querySelectorAll('main *')].filter((each) => !each.closest('.table *') && each.innerText)"
        ".map((each) => [each.getBoundingClientRect().right, each.className])"
    )
    assert [(right, name) for right, name in edges if right > width + 0.5] == []


def check_accessible(browser):
    """Raises where axe-core finds a violation that it calls serious or critical."""
    browser.run(AXE.read_text(encoding="utf-8"))
    found = browser.driver.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    assert found["passes"]
    serious = [
        (each["id"], [(node["html"][:200], node["failureSummary"]) for node in each["nodes"]])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []
