"""Model cards: rendered from a template and from what a checkpoint holds, and held to its `metrics.json`."""

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from clsgen.classification_metrics import HEADLINE_METRICS
from clsgen.configuration_clsgen import ClsGenConfig
from clsgen.prompting_clsgen import TaskPrompt, fill_template
from clsgen.run_record import without_local_paths

TEMPLATE = Path(__file__).with_name("model_card.md")
METRIC_IDS = {"auroc": "roc_auc", "brier": "brier_score"}  # as the Hub calls them, where it has another name
SPLITS = ("validation", "test")
TAGS = ["clsgen", "dual-head", "explanation", "calibration", "custom_code"]
LONGEST_LITERAL = 600
NEEDED_TRANSFORMERS = "5.23 or newer"


def model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    dataset_id: str | None = None,
    dataset_revision: str | None = None,
    test_rows: str | None = None,
    space_id: str | None = None,
    license: str | None = None,
    variant: str = "merged",
    template: str | Path = TEMPLATE,
) -> ModelCard:
    """The card of a checkpoint; every number in it is one of its `metrics.json`.

    Args:
        folder (`str` or `Path`): The checkpoint: `config.json` and `metrics.json`, and where there are any
            `examples.json` and `calibration.png`.
        repo_id, revision (`str`, *optional*): Where it is published, and the commit that snippets pin; without them
            snippets load the folder itself.
        dataset_id, dataset_revision, space_id (`str`, *optional*): What the card links to.
        test_rows (`str`, *optional*): [`tasks.rows_digest`] of that data set's test split. Results name the data set
            only where they are of these rows, which they are not after a calibration on others.
        license (`str`, *optional*): The Hub's id of the license.
        variant (`"merged"` or `"adapter"`): What the repository holds.
        template (`str` or `Path`): A Jinja template.

    Raises:
        ValueError: for a card whose numbers aren't those of `metrics.json`.
    """
    folder = Path(folder)
    config = ClsGenConfig.from_pretrained(folder)
    report = json.loads(without_local_paths((folder / "metrics.json").read_text(encoding="utf-8")))
    path = folder / "examples.json"
    examples = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    base_model = hub_id(report["base_model"])
    prompt = TaskPrompt.from_dict(config.prompt)
    of_dataset = test_rows is not None and test_rows == report.get("test_rows_sha256")
    data = ModelCardData(
        library_name="peft" if variant == "adapter" else "transformers",
        pipeline_tag="text-classification",
        tags=TAGS,
        license=license,
        base_model=base_model,
        base_model_relation=({"adapter": "adapter"}.get(variant, "finetune") if base_model else None),
        datasets=[dataset_id] if dataset_id else None,
        metrics=[METRIC_IDS.get(name, name) for name in HEADLINE_METRICS] if report.get("test") else None,
        eval_results=_eval_results(report, *((dataset_id, dataset_revision) if of_dataset else (None, None))),
        model_name=(repo_id or f"clsgen/{report['task']}").rpartition("/")[2],
        widget=[_widget_example(example, prompt) for example in examples] or None,
        co2_eq_emissions=_emissions(report),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        **_words(config, report, examples),
        repo_id=repo_id,
        source=_source(repo_id, revision, variant),
        served=f"{repo_id}@{revision}" if repo_id else "FOLDER",
        variant=variant,
        dataset_id=dataset_id,
        dataset_revision=dataset_revision,
        of_dataset=of_dataset,
        space_id=space_id,
        base_model=base_model,
        base_name=f"`{base_model or Path(report['base_model']).name}`",
        base_literal=repr(base_model),
        base_source=report.get("base_model_source"),
        title=repo_id.rpartition("/")[2] if repo_id else f"CLSGen on {report['task']}",
        license_name=license or "not stated",
        has_plot=(folder / "calibration.png").is_file(),
        text=_python_literal(examples, prompt),
        transformers_version=NEEDED_TRANSFORMERS,
    )
    check_numbers(str(card), report)
    return card


def check_numbers(content: str, report: dict[str, Any]) -> None:
    """Holds a card to a report: its eval results, its table of results and its numbers of calibration.

    Args:
        content (`str`): The card, with its metadata.
        report (`dict`): The content of `metrics.json`.

    Raises:
        ValueError: naming each number that differs, or is missing or unknown.
    """
    problems = []
    stated = {
        (result.dataset_split, result.metric_type): result.metric_value
        for result in ModelCard(content).data.eval_results or []
    }
    expected = {
        (result.dataset_split, result.metric_type): result.metric_value
        for result in _eval_results(report, None, None) or []
    }
    for key in sorted({*stated, *expected}, key=str):
        if stated.get(key) != expected.get(key):
            problems.append(f"model-index, {key}: {stated.get(key)} stands there, {expected.get(key)} was measured")
    rows = _table_rows(content)
    for name, cells in _table(report).items():
        if rows.get(name) != cells:
            problems.append(f"row {name!r}: {rows.get(name)} stands there, {cells} was measured")
    for name in set(rows) & set(SPLITS) - set(_table(report)):
        problems.append(f"row {name!r}: {rows[name]} stands there, nothing was measured")
    if problems:
        raise ValueError("The card's numbers are not those of metrics.json: " + "; ".join(problems) + ".")


def _table_rows(content: str) -> dict[str, list[str]]:
    """Cells of the card's Markdown tables by the first cell of their row."""
    rows = {}
    for line in re.findall(r"^\|(.*)\|\s*$", content, flags=re.MULTILINE):
        name, *cells = (cell.strip() for cell in line.split("|"))
        rows[name] = cells
    return rows


def _table(report: dict[str, Any]) -> dict[str, list[str]]:
    """What the rows of a card's tables have to say."""
    rows = {
        split: [*(_number(report[split][name]) for name in HEADLINE_METRICS), str(report[split]["rows"])]
        for split in SPLITS
        if report.get(split)
    }
    if report.get("validation"):
        for name in ("temperature", "bias"):
            rows[name] = [_number(report["calibration"][name])]
        rows["threshold"] = [_number(report["threshold"])]
    return rows


def _number(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.3f}"


def hub_id(name: str) -> str | None:
    """The name, where it has the form of a Hub id; a path of this machine is nobody else's business."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).is_dir() else name


def _source(repo_id: str | None, revision: str | None, variant: str) -> str:
    if repo_id is None:
        return '".", None' if variant == "adapter" else '"."'
    return f'"{repo_id}", "{revision}"' if variant == "adapter" else f'"{repo_id}", revision="{revision}"'


def _eval_results(
    report: dict[str, Any], dataset_id: str | None, dataset_revision: str | None
) -> list[EvalResult] | None:
    """One result a metric of the test split; undefined ones are left out."""
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=dataset_id or report["task"],
            dataset_name=report["task"],
            dataset_split="test",
            dataset_revision=dataset_revision,
            metric_type=METRIC_IDS.get(name, name),
            metric_name=name,
            metric_value=round(report["test"][name], 4),
        )
        for name in (HEADLINE_METRICS if report.get("test") else ())
        if _number(report["test"][name]) != "undefined"
    ]
    return results or None


def _emissions(report: dict[str, Any]) -> dict[str, Any] | None:
    footprint = report.get("footprint")
    if not footprint:
        return None
    return {
        "emissions": round(footprint["co2_eq_grams"], 2),
        "source": footprint["method"],
        "training_type": "fine-tuning",
        "hardware_used": footprint["hardware"],
    }


def _widget_example(example: dict[str, Any], prompt: TaskPrompt) -> dict[str, Any]:
    """A text with the answer that the checkpoint gave: the page shows it, as live widgets run no custom code."""
    probability = example["prediction"]["probability"]
    scores = sorted(zip((1 - probability, probability), example["labels"], strict=True), reverse=True)
    return {
        "example_title": example["id"],
        "text": fill_template(prompt.template, example["text"]),
        "output": [{"label": label, "score": round(score, 4)} for score, label in scores],
    }


def _python_literal(examples: list[dict[str, Any]], prompt: TaskPrompt) -> str:
    """A text for the snippets, as Python: the first example, unless it is long or would end the code block."""
    lines = [
        f"    {json.dumps(name)}: {value!r}," for name, value in (examples[0]["text"] if examples else {}).items()
    ]
    literal = "\n".join(["{", *lines, "}"])
    if not lines or len(literal) > LONGEST_LITERAL or "```" in literal:
        literal = json.dumps(dict.fromkeys(prompt.fields, "..."))
    return literal


def _words(config: ClsGenConfig, report: dict[str, Any], examples: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a card that are made of the config, the report and the examples."""
    table = _table(report)
    head = "| split | " + " | ".join((*HEADLINE_METRICS, "rows")) + " |\n" + "|---" * (len(HEADLINE_METRICS) + 2) + "|"
    results = [f"| {split} | {' | '.join(table[split])} |" for split in SPLITS if split in table]
    conformal = config.conformal and (
        f"Prediction sets rule labels out at an error rate of {config.conformal['error_rate']:g} in either class "
        f"(split-conformal, fitted on the validation split).{_coverage(config, report)}"
    )
    return {
        "question": config.prompt["question"],
        "labels": config.label_names,
        "results": "\n".join([head, *results]) if results else "No validation or test split.",
        "command": report["command"].replace("`", "'"),
        "commit": report.get("commit"),
        "calibration": _calibration(config, report, table),
        "conformal": conformal,
        "lm_reading_weight": config.lm_reading_weight,
        "examples": "\n\n".join(_example(example, config.label_names[1]) for example in examples),
        "examples_split": examples[0]["split"] if examples else None,
        "training": _training(config, report),
        "footprint": _footprint(report),
    }


def _coverage(config: ClsGenConfig, report: dict[str, Any]) -> str:
    """How often prediction sets held the true label on the test split, and how often they were no answer."""
    if not (measured := report.get("test_conformal")):
        return ""
    pairs = zip(config.label_names, measured["coverage"], strict=True)
    coverage = " and ".join(f"{_number(share)} of the rows of `{label}`" for label, share in pairs)
    abstained = _number(measured["abstained"])
    return f" On the test split they hold the true label of {coverage}, and abstain on {abstained} of all."


def _calibration(config: ClsGenConfig, report: dict[str, Any], table: dict[str, list[str]]) -> str:
    formula = "`probability = sigmoid(logit / temperature + bias)`, positive from the threshold on"
    formula += ", where the logit is the head's less `log(pos_weight)`"
    if weight := config.lm_reading_weight:
        formula += (
            f", times {1 - weight:g}, plus {weight:g} times the language model's own log-odds of the two verdicts"
        )
    if not report.get("validation"):
        return (
            "**None: the task has no validation split**, so probabilities are the head's own. The threshold is "
            f"{_number(config.threshold)}."
        )
    rows = [f"| {name} | {table[name][0]} |" for name in ("temperature", "bias", "threshold") if name in table]
    table_text = "\n".join(["| | fitted on validation |", "|---|---|", *rows])
    method = f" ({report['threshold_method']})" if report.get("threshold_method") else ""
    parts = [f"{formula}{method}.", table_text]
    if recalibration := report.get("recalibration"):
        command = recalibration["command"].replace("`", "'")
        parts.append(f"Fitted after training: `{command}`.")
    return "\n\n".join(parts)


def _example(example: dict[str, Any], positive_label: str) -> str:
    prediction = example["prediction"]
    fields = "\n".join(f"> **{name}**: {_one_line(value)}\n>" for name, value in example["text"].items())
    gold = f"; gold label {example['gold']}" if example["gold"] else ""
    verdict = f"**{prediction['label']}** (P({positive_label}) = {prediction['probability']:.3f}{gold})"
    words = _one_line(prediction["explanation"] or "")
    return f"{fields}\n> {verdict}: {words}"


def _one_line(text: str) -> str:
    """Text as one line of Markdown that holds no markup: what a row says may not become part of the page."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _training(config: ClsGenConfig, report: dict[str, Any]) -> str:
    rows = report["train_rows"]
    counts = ", ".join(f"{count} {name}" for name, count in rows.items()) if isinstance(rows, dict) else rows
    reads = ", ".join(f"{layer}:{pooling}" for layer, pooling in config.cls_reads)
    lines = [f"Training rows: {counts}; seed {report['seed']}. The head reads {reads} (layer:pooling)."]
    if report.get("wall_seconds"):
        lines.append(f"Wall time {report['wall_seconds']:.0f} s, peak memory {report['peak_memory_gib']:.1f} GiB.")
    if report.get("versions"):
        lines.append(
            "Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "."
        )
    return "\n".join(lines)


def _footprint(report: dict[str, Any]) -> str:
    footprint = report.get("footprint")
    if not footprint:
        return "Environmental cost: not recorded."
    return (
        f"Environmental cost: about {footprint['energy_kwh']:.3f} kWh and {footprint['co2_eq_grams']:.1f} g CO2eq for "
        f"{footprint['hours']:.2f} hours on {footprint['hardware']}. Not measured: {footprint['method']}."
    )
