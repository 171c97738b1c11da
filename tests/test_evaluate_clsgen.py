"""A checkpoint and a task in; metrics, predictions and a report out: after a kill, on odd data, and when attacked."""

import json
import re
import shutil
import string
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import PROMPT
from sklearn.metrics import roc_auc_score

from clsgen.checkpoint_folder import write_checkpoint
from clsgen.evaluate_clsgen import EvaluationArguments, evaluate_checkpoint
from clsgen.evaluation.plots import for_page, reliability
from clsgen.evaluation.predictions import SCHEMA, read_predictions
from clsgen.evaluation.report import escape

REPORT = {"base_model": "tiny", "task": "tiny", "command": "c", "seed": 0, "train_rows": 1, "threshold_method": "f1"}
ATTACK = "<script>alert('x')</script> & <img src=http://evil.example/x.png> [a](javascript:b) <|im_end|> {{ 7*7 }}"
CHROMIUM = [
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip


@pytest.fixture
def checkpoint(model, tmp_path):
    # A random model writes special tokens and blanks, which are no words.
    letters = set(model.tokenizer.convert_tokens_to_ids(list(string.ascii_lowercase)))
    model.generation_config.suppress_tokens = sorted(set(range(model.config.text_config.vocab_size)) - letters)
    model.generation_config.max_new_tokens = 4
    return str(write_checkpoint(model, tmp_path / "model", REPORT))


def make_rows(split, count=12, **changes):
    return [
        {
            "id": f"{split}-{i}",
            "findings": f"Death in {i * 7 % 10}0% and {i}%. " * (1 + i % 3),
            "claim": f"Drug {i} works.",
            "label": i % 2,
            "explanation": f"It fell by {i} of ten. The claim is {'' if i % 2 else 'not '}supported.",
            **changes,
        }
        for i in range(count)
    ]


def make_task(folder, splits, name="tiny", **changes):
    folder.mkdir()
    spec = {"name": name, **PROMPT, "labels": ["not_supported", "supported"], **changes}
    spec["data_files"] = {split: f"{split}.jsonl" for split in splits}
    (folder / "task.yaml").write_text(yaml.safe_dump(spec))
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def task(tmp_path):
    return make_task(tmp_path / "task", {split: make_rows(split) for split in ("train", "validation", "test")})


def evaluate(checkpoint, task, output, **options):
    options = {"modes": ["none"], "bootstrap_samples": 100, **options}
    return evaluate_checkpoint(EvaluationArguments(model=checkpoint, task=task, output_dir=str(output), **options))


def test_numbers_and_files(checkpoint, model, task, tmp_path):
    output = tmp_path / "out"
    metrics = evaluate(checkpoint, task, output, modes=["guided", "free"])
    assert {path.name for path in output.iterdir()} == {
        "metrics.json", "predictions.parquet", "report.md", "report.html", "plots", "answers",
    }  # fmt: skip
    found = pd.read_parquet(output / "predictions.parquet")
    assert list(found.columns) == SCHEMA.names
    rows = make_rows("test")
    texts = [{"findings": row["findings"], "claim": row["claim"]} for row in rows]
    for mode in ("guided", "free"):
        of_mode = found[found["mode"] == mode]
        expected = model.classify_and_explain(texts, mode=mode)
        assert of_mode["id"].tolist() == [row["id"] for row in rows]
        assert of_mode["gold"].tolist() == [row["label"] for row in rows]
        assert of_mode["probability"].tolist() == pytest.approx([p.probability for p in expected], abs=1e-4)
        assert of_mode["predicted"].tolist() == [p.label_id for p in expected]
        assert of_mode["explanation"].tolist() == [p.explanation for p in expected]
        assert of_mode["lm_probability"].tolist() == pytest.approx([p.lm_probability for p in expected], abs=1e-4)
    written = json.loads((output / "metrics.json").read_text())
    assert written["classification"]["auroc"]["value"] == pytest.approx(
        roc_auc_score(of_mode["gold"], of_mode["probability"])
    )
    assert written["rows"] == {"reported": 12, "positive": 6, "unlabelled": 0, "truncated": 0}
    assert set(written) >= {
        "classification",
        "calibration",
        "thresholds",
        "alignment",
        "second_reading",
        "leakage",
        "language",
        "examples",
    }
    guided = found[found["mode"] == "guided"]
    assert written["second_reading"]["auroc"]["value"] == pytest.approx(
        roc_auc_score(guided["gold"], guided["lm_probability"])
    )
    assert set(written["alignment"]) == set(written["language"]) == {"guided", "free"}
    assert set(metrics["calibration"]) == {"validation (calibrated on it)", "tiny/test (not seen)"}
    markdown = (output / "report.md").read_text()
    for plot in re.findall(r"\]\((plots/.*?)\)", markdown):
        assert (output / plot).read_text().startswith("<svg")
    assert f"{written['classification']['auroc']['value']:.3f}" in markdown
    assert "Do the words agree with the number?" in (output / "report.html").read_text()


@pytest.mark.parametrize("modes", [["guided", "free"], ["free", "guided"]])
def test_words_that_are_the_same_in_both_modes_are_written_once(modes, checkpoint, model, task, tmp_path, caplog):
    caplog.set_level("INFO")
    model.config.lm_reading_weight = 0.1  # the number and the LM's reading decide alike of some rows, not of all
    texts = [{"findings": row["findings"], "claim": row["claim"]} for row in make_rows("test")]
    expected = {mode: model.classify_and_explain(texts, mode=mode, max_new_tokens=6) for mode in modes}
    alike = sum(one.explained_label == other.explained_label for one, other in zip(*expected.values(), strict=True))
    assert 0 < alike < len(texts)
    held = str(write_checkpoint(model, tmp_path / "held", REPORT))
    evaluate(held, task, tmp_path / "out", modes=modes, max_new_tokens=6)
    assert f"tiny/test, guided: {alike} of 12 answers are known already" in caplog.text
    found = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    for mode, answers in expected.items():
        of_mode = found[found["mode"] == mode]
        assert of_mode["id"].tolist() == [row["id"] for row in make_rows("test")]
        assert of_mode["explanation"].tolist() == [answer.explanation for answer in answers]
    assert found["explanation"].nunique() > len(texts)


def test_examples_are_what_their_titles_say(checkpoint, task, tmp_path):
    metrics = evaluate(checkpoint, task, tmp_path, modes=["guided"], examples=2)
    rows = pd.read_parquet(tmp_path / "predictions.parquet").set_index("id")
    distance = (rows["probability"] - metrics["threshold"]).abs().sort_values()
    right = rows["predicted"] == rows["gold"]
    contradictory = rows["judged_label"].notna() & (rows["judged_label"] != rows["predicted"])
    assert rows["judged_label"].notna().any()
    for title, of_kind, nearest in (
        ("right", right, False), ("wrong", ~right, False), ("contradictory", contradictory, False),
        ("least certain", right | ~right, True),
    ):  # fmt: skip
        ranked = [row_id for row_id in distance.index if of_kind[row_id]]
        expected = ranked[:2] if nearest else ranked[::-1][:2]
        assert distance[metrics["examples"][title]].tolist() == pytest.approx(distance[expected].tolist())
        assert of_kind[metrics["examples"][title]].all()


def test_words_at_another_guidance_than_the_checkpoints(checkpoint, model, task, tmp_path):
    options = {"modes": ["guided"], "limit": 4}
    evaluate(checkpoint, task, tmp_path / "plain", **options)
    evaluate(checkpoint, task, tmp_path / "out", explanation_guidance_scale=300.0, **options)
    plain, found = (pd.read_parquet(tmp_path / name / "predictions.parquet") for name in ("plain", "out"))
    rows = {row["id"]: {"findings": row["findings"], "claim": row["claim"]} for row in make_rows("test")}
    model.config.explanation_guidance_scale = 300.0
    expected = model.classify_and_explain([rows[each] for each in found["id"]])
    assert found["explanation"].tolist() == [p.explanation for p in expected] != plain["explanation"].tolist()
    with pytest.raises(ValueError, match="another"):
        evaluate(checkpoint, task, tmp_path / "out", explanation_guidance_scale=2.0, **options)


@pytest.mark.parametrize("modes", [["free"], ["guided"]])
@pytest.mark.parametrize("folder", sorted((Path(__file__).parent / "fixtures").glob("format_*")), ids=lambda f: f.name)
def test_checkpoints_of_every_format(folder, modes, task, tmp_path):
    found = evaluate(str(folder), task, tmp_path / "out", modes=modes, limit=4)
    assert found["rows"]["reported"] == 4
    assert found["language"][modes[0]]["rows"] == 4


@pytest.mark.parametrize("split", ["validation", "test"])
def test_weights_of_the_reading_are_offered_on_validation_rows_alone(checkpoint, split, task, tmp_path):
    found = evaluate(checkpoint, task, tmp_path / "out", split=split, modes=["guided"])
    assert ("auroc_by_weight" in found["second_reading"]) == (split == "validation")


def test_an_ended_run_goes_on_and_a_second_one_asks_nothing_again(checkpoint, task, tmp_path, caplog):
    caplog.set_level("INFO")
    output = tmp_path / "out"
    first = evaluate(checkpoint, task, output, modes=["free"])
    journal = output / "answers" / "tiny_test-free.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 13
    journal.write_text("".join(lines[:6]) + lines[6][:9])  # killed while it wrote the sixth answer
    caplog.clear()
    second = evaluate(checkpoint, task, output, modes=["free"])
    assert "5 of 12 answers are there already" in caplog.text
    values = [{name: found["value"] for name, found in each["classification"].items()} for each in (first, second)]
    assert values[1] == pytest.approx(values[0])  # the rest was asked in other batches
    pasted = lines[3].replace('"probability": ', '"probability": 0.1234567, "x": ', 1)
    journal.write_text("".join([*lines[:3], pasted, *lines[4:]]))
    evaluate(checkpoint, task, output, modes=["free"])
    assert pd.read_parquet(output / "predictions.parquet")["probability"][2] == 0.1234567
    evaluate(checkpoint, task, output, modes=["free"], overwrite=True)
    assert journal.read_text() == "".join(lines)


def test_calibration_on_training_rows_says_so(checkpoint, task, tmp_path):
    found = evaluate(checkpoint, task, tmp_path / "out", split="train", modes=["none"])
    assert set(found["calibration"]) == {"validation (calibrated on it)", "tiny/train (trained on it)"}


def test_answers_of_another_model_are_not_used(checkpoint, task, tmp_path):
    output = tmp_path / "out"
    evaluate(checkpoint, task, output)
    shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "threshold": 0.123456}))
    with pytest.raises(ValueError, match="another run"):
        evaluate(str(tmp_path / "other"), task, output)
    evaluate(str(tmp_path / "other"), task, output, overwrite=True)
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    with pytest.raises(ValueError, match="another run"):
        evaluate(str(tmp_path / "other"), task, output)


def test_speed_is_kept_and_measured_anew_for_another_batch_size(checkpoint, task, tmp_path):
    first, again, other = (
        evaluate(checkpoint, task, tmp_path / "out", batch_size=size)["speed"] for size in (4, 4, 8)
    )
    assert first == again != other


def test_speed_is_measured_of_what_is_asked_for(checkpoint, task, tmp_path):
    found = evaluate(checkpoint, task, tmp_path / "out", modes=["guided"])["speed"]
    assert (found["texts"], found["explanations"], found["device"]) == (12, 8, "cpu")
    assert found["texts_per_second"] > 0
    assert found["explanations_per_second"] > 0
    assert "with an explanation" in (tmp_path / "out" / "report.md").read_text()
    found = evaluate(checkpoint, task, tmp_path / "numbers", modes=["none"])["speed"]
    assert (found["texts"], found["explanations"], found["explanations_per_second"]) == (12, 0, None)
    assert "with an explanation" not in (tmp_path / "numbers" / "report.md").read_text()


def test_also_on_other_data(checkpoint, model, task, tmp_path):
    other_rows = [{"id": str(i), "note": f"Note {i}.", "label": i % 2} for i in range(8)]
    splits = {"train": other_rows, "test": [{**row, "id": f"t{row['id']}"} for row in other_rows]}
    other = make_task(tmp_path / "other", splits, name="other", template="A note: {note}", document="note")
    metrics = evaluate(checkpoint, task, tmp_path / "out", also_on=[other])
    found = metrics["calibration"]["other/test (of another task than the model's)"]
    expected = [prediction.probability for prediction in model.classify([f"A note: Note {i}." for i in range(8)])]
    assert found["mean_probability"] == pytest.approx(sum(expected) / 8, abs=1e-4)
    assert found["ece"]["value"] is not None
    assert "Reliability on other/test" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ValueError, match="names no `prepare` script"):  # so the source reached the task
        evaluate(checkpoint, task, tmp_path / "out", also_on=[f"{other}={tmp_path}"])


def test_compared_with_another_system(checkpoint, task, tmp_path):
    evaluate(checkpoint, task, tmp_path / "first", modes=["guided", "free"])
    ours = tmp_path / "first" / "predictions.parquet"
    theirs = tmp_path / "theirs.csv"
    pd.DataFrame({"id": [f"test-{i}" for i in range(11)], "probability": [i % 2 for i in range(11)]}).to_csv(
        theirs, index=False
    )
    found = evaluate(checkpoint, task, tmp_path / "out", compare=[str(ours), str(theirs)])["comparison"]
    assert found[str(ours)]["delong"]["reason"] == "the two models rank the rows alike"
    assert found[str(theirs)]["rows"] == 11
    assert found[str(theirs)]["rows_not_shared"] == 1
    probabilities = pd.read_parquet(ours)["probability"][:11]
    auroc = roc_auc_score([i % 2 for i in range(11)], probabilities)
    assert found[str(theirs)]["differences"]["auroc"]["value"] == pytest.approx(auroc - 1)
    pd.DataFrame({"id": ["test-0"], "probability": [0.5], "gold": [1]}).to_csv(theirs, index=False)
    with pytest.raises(ValueError, match="gold labels are not those"):
        evaluate(checkpoint, task, tmp_path / "out", compare=[str(theirs)])
    pd.DataFrame({"id": ["elsewhere"], "probability": [0.5]}).to_csv(theirs, index=False)
    with pytest.raises(ValueError, match="none of its ids"):
        evaluate(checkpoint, task, tmp_path / "out", compare=[str(theirs)])


def test_a_json_list_of_predictions_is_read(tmp_path):
    (tmp_path / "test_predictions.json").write_text('[{"id": 7, "label": 1, "probability": 0.25, "logit": -1}]')
    frame = read_predictions(tmp_path / "test_predictions.json")
    assert frame.loc["7", ["gold", "probability"]].tolist() == [1, 0.25]


def test_odd_data_gives_named_gaps_and_a_report(checkpoint, tmp_path):
    splits = {"train": make_rows("train", explanation=None), "test": make_rows("test", count=3, label=1)}
    splits["test"].append({**splits["test"][0], "id": "no-label", "label": None})
    metrics = evaluate(
        checkpoint, make_task(tmp_path / "odd", splits), tmp_path / "out", modes=["free"], max_new_tokens=2
    )
    assert metrics["rows"]["unlabelled"] == 1
    assert metrics["classification"]["auroc"]["value"] is None
    assert "label 1" in metrics["classification"]["auroc"]["reason"]
    assert all(entry["threshold"]["value"] is None for entry in metrics["thresholds"][2:])
    assert set(metrics["alignment"]["undefined"]) == {"tfidf", "tfidf-no-verdict"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "undefined" in page
    assert ">nan<" not in page
    assert "1 rows without a label left out" in page


def test_a_judge_with_nothing_to_learn_from_leaves_the_other(checkpoint, tmp_path):
    said = [f"It did {'' if i % 2 else 'not '}fall by {i}." for i in range(12)]
    splits = {name: make_rows(name) for name in ("train", "validation", "test")}
    for rows in splits.values():
        for row, text in zip(rows, said, strict=True):
            row["explanation"] = text
    task = make_task(tmp_path / "short", splits)
    found = evaluate(checkpoint, task, tmp_path / "out", modes=["free"])["alignment"]
    assert set(found["free"]) == {"tfidf"}
    assert found["free"]["tfidf"]["judge"]["fitness"]["rows"] == 12
    assert "got 0 for label 0 and 0 for label 1" in found["undefined"]["tfidf-no-verdict"]
    assert "Alignment by tfidf-no-verdict is undefined" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ValueError, match="five of each"):  # it was asked for by name
        evaluate(checkpoint, task, tmp_path / "out", modes=["free"], judges=["tfidf-no-verdict"])


def test_other_data_of_the_same_name_are_kept_apart(checkpoint, task, tmp_path):
    sites = []  # of the same name as the reported one
    for site, count in (("here", 6), ("there", 8)):
        rows = [{**row, "id": f"{site}-{row['id']}"} for row in make_rows("test")[:count]]
        sites.append(make_task(tmp_path / site, {"train": make_rows("train"), "test": rows}))
    found = evaluate(checkpoint, task, tmp_path / "out", also_on=sites)["calibration"]
    assert [found[f"also_on {site}/test (not seen)"]["rows"] for site in sites] == [6, 8]
    assert found["tiny/test (not seen)"]["rows"] == 12


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_threshold_sheet_says_what_its_rows_are(checkpoint, split, task, tmp_path):
    evaluate(checkpoint, task, tmp_path / "out", split=split)
    told = (tmp_path / "out" / "report.md").read_text()
    assert ("which had no part in it" in told) == (split == "test")
    assert ("where the stored threshold was chosen" in told) == (split != "test")


def test_limit_keeps_both_classes_of_a_sorted_file(checkpoint, tmp_path):
    rows = sorted(make_rows("test", count=40), key=lambda row: row["label"])
    task = make_task(tmp_path / "sorted", {"train": make_rows("train"), "test": rows})
    metrics = evaluate(checkpoint, task, tmp_path / "out", limit=16)
    assert metrics["rows"]["reported"] == 16
    assert 3 <= metrics["rows"]["positive"] <= 13
    assert "limited to 16 rows" in (tmp_path / "out" / "report.md").read_text()


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.addresses = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]


def test_text_never_becomes_markup_and_nothing_is_fetched(checkpoint, tmp_path):
    splits = {name: make_rows(name, claim=ATTACK) for name in ("train", "validation", "test")}
    task = make_task(tmp_path / "attack", splits, labels=["<b>no</b>", "yes & <i>"])
    evaluate(checkpoint, task, tmp_path / "out", modes=["free"])
    page = (tmp_path / "out" / "report.html").read_text()
    parser = _Tags()
    parser.feed(page)
    assert not parser.tags & {"script", "img", "iframe", "link", "object", "embed", "b2", "i"}
    assert all(address.startswith("#") for address in parser.addresses)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "{{ 7*7 }}" in page
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "<script" not in markdown
    assert "](javascript" not in markdown


def test_markdown_escape():
    assert escape("a|b\n# c") == r"a\|b \# c"
    assert escape("<b>") == "&lt;b&gt;"


def test_plots_follow_the_page():
    svg = for_page(reliability(pd.Series([0, 1] * 20).to_numpy(), pd.Series([0.2, 0.7] * 20).to_numpy()), 'a"<b')
    assert 'aria-label="a&quot;&lt;b"' in svg
    assert "var(--one)" in svg
    assert not re.search(r"#0072b2|DejaVu", svg)
    assert "nan" not in svg


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_in_a_browser(checkpoint, task, tmp_path, width):
    if not shutil.which("chromium"):
        pytest.fail("This test needs Debian's package chromium.")
    evaluate(checkpoint, task, tmp_path / "out", modes=["guided", "free"])
    page, probe = tmp_path / "out" / "report.html", tmp_path / "probe.html"
    # Labels that are cut off: text of an SVG that reaches outside of it, and a page that must be scrolled sideways.
    script = """<script>
    const cut = [];
    for (const svg of document.querySelectorAll("svg")) {
      const box = svg.getBoundingClientRect();
      for (const text of svg.querySelectorAll("text")) {
        const t = text.getBoundingClientRect();
        if (t.left < box.left - 1 || t.right > box.right + 1 || t.top < box.top - 1 || t.bottom > box.bottom + 1)
          cut.push(text.textContent);
      }
    }
    const wide = document.documentElement.scrollWidth > window.innerWidth + 1;
    document.title = JSON.stringify({cut, wide, plots: document.querySelectorAll("svg text").length});
    </script>"""
    probe.write_text(re.sub(r"<meta http-equiv.*?>", "", page.read_text()).replace("</body>", script + "</body>"))
    flags = [f"--window-size={width},2000", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*CHROMIUM, *flags, "--dump-dom", probe.as_uri()], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    found = json.loads(re.search(r"<title>(.*?)</title>", shown).group(1))
    assert found["cut"] == []
    assert found["wide"] is False
    assert found["plots"] > 50
    image = tmp_path / "page.png"
    subprocess.run(
        [*CHROMIUM, *flags, f"--screenshot={image}", page.as_uri()], capture_output=True, check=True, timeout=120
    )
    assert image.stat().st_size > 20_000
    assert Path(page).read_text().count("Content-Security-Policy") == 1
