"""Tasks: a folder with data, a prompt and a card becomes checked, normalised splits. No row goes missing unsaid."""

import csv
import importlib.util
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from datasets import Dataset, DatasetDict, Features, Value, load_dataset

from clsgen.prompting_clsgen import TaskPrompt

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")
PROMPT_KEYS = ("system_prompt", "template", "question", "document", "verdicts")
REQUIRED_KEYS = {"name", "template", "question", "document", "labels", "verdicts"}
OPTIONAL_KEYS = {
    "system_prompt", "label_column", "explanation_column", "id_column", "data_files", "dataset", "revision",
    "config_name", "prepare", "credentialed", "license",
}  # fmt: skip
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
LABELS = {0: 0.0, 1: 1.0, "0": 0.0, "1": 1.0}  # False, True, 0.0 and 1.0 equal 0 and 1


@dataclass(frozen=True)
class Task:
    """A loaded task.

    Args:
        name (`str`): Its name.
        prompt (`dict`): See [`TaskPrompt`].
        labels (`tuple[str, str]`): Names of label 0 and label 1.
        splits (`DatasetDict`): `train`, and where there are any `validation` and `test`, with the columns `id`, one a
            field, `label` (float64 0.0, 1.0 or null) and `explanation` (string or null).
        credentialed (`bool`): Whether nothing made from the data may be published.
        license (`str`, *optional*): Of the data.
    """

    name: str
    prompt: dict[str, Any]
    labels: tuple[str, str]
    splits: DatasetDict
    credentialed: bool = False
    license: str | None = None

    @property
    def fields(self) -> list[str]:
        """Names of the fields that make up a text."""
        return TaskPrompt.from_dict(self.prompt).fields


def load_task(name_or_path: str | Path, data_dir: str | None = None, on_bad_row: str = "error") -> Task:
    """Loads and checks a task.

    Args:
        name_or_path (`str` or `Path`): A folder with a `task.yaml`, or the name of one below `data/`.
        data_dir (`str`, *optional*): The source from which the task's `prepare.py` builds its data files.
        on_bad_row (`"error"` or `"skip"`): What becomes of a row with an empty text or an impossible label; skipped
            rows are counted in the log.

    Raises:
        FileNotFoundError: for a task or data file that is not there.
        ValueError: for a `task.yaml` or data that cannot be used, naming file, row and what is wrong.
    """
    folder = _find_folder(name_or_path)
    spec = _read_spec(folder / "task.yaml")
    if data_dir is not None or (spec.get("prepare") and not _all_files_exist(folder, spec)):
        _prepare(folder, spec, data_dir)
    splits, seen = DatasetDict(), {}
    for name, (origin, rows) in _load_raw(folder, spec).items():
        splits[name] = _normalise(rows, spec, name, origin, on_bad_row, seen)
        logger.info("%s/%s: %s", spec["name"], name, _in_words(class_counts(splits[name])))
    counts = class_counts(splits["train"])
    if not counts["positive"] or not counts["negative"]:
        raise ValueError(
            f"The training split of {spec['name']!r} needs labelled rows of both classes, got {_in_words(counts)}."
        )
    return Task(
        name=spec["name"],
        prompt={key: spec[key] for key in PROMPT_KEYS if key in spec},
        labels=tuple(spec["labels"]),
        splits=splits,
        credentialed=bool(spec.get("credentialed", False)),
        license=spec.get("license"),
    )


def class_counts(dataset: Dataset) -> dict[str, int]:
    """Counts of a normalised split: `rows`, `positive`, `negative`, `unlabelled` and `explained`."""
    labels = Counter(dataset["label"])
    return {
        "rows": len(dataset),
        "positive": labels[1.0],
        "negative": labels[0.0],
        "unlabelled": labels[None],
        "explained": sum(explanation is not None for explanation in dataset["explanation"]),
    }


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _find_folder(name_or_path: str | Path) -> Path:
    for folder in (Path(name_or_path), ROOT / "data" / name_or_path):
        if (folder / "task.yaml").is_file():
            return folder
    known = sorted(path.parent.name for path in (ROOT / "data").glob("*/task.yaml"))
    raise FileNotFoundError(
        f"There is no task {str(name_or_path)!r}: give a folder with a task.yaml, or one of {known}."
    )


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    keys = set(spec) if isinstance(spec, dict) else set()
    unknown, missing = keys - REQUIRED_KEYS - OPTIONAL_KEYS, REQUIRED_KEYS - keys
    if unknown or missing:
        raise ValueError(
            f"{path}: unknown key(s) {sorted(unknown)}, missing key(s) {sorted(missing)}. Required: "
            f"{sorted(REQUIRED_KEYS)}; optional: {sorted(OPTIONAL_KEYS)}."
        )
    if ("data_files" in spec) == ("dataset" in spec):
        raise ValueError(f"{path}: give either `data_files` or `dataset`.")
    if not isinstance(spec["labels"], list) or len(spec["labels"]) != 2:
        raise ValueError(f"{path}: `labels` must name label 0 and label 1, got {spec['labels']!r}.")
    try:
        TaskPrompt.from_dict({key: spec[key] for key in PROMPT_KEYS if key in spec})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    files = spec.get("data_files") or {}
    if spec.get("data_files") is not None and ("train" not in files or set(files) - set(SPLITS)):
        raise ValueError(f"{path}: `data_files` needs `train`, and takes {SPLITS}, got {sorted(files)}.")
    return spec


def _all_files_exist(folder: Path, spec: dict[str, Any]) -> bool:
    return all((folder / file).is_file() for file in spec["data_files"].values())


def load_module(path: Path) -> ModuleType:
    """The module in the file `path`, whether or not its folder is a package."""
    spec = importlib.util.spec_from_file_location(f"clsgen_task_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prepare(folder: Path, spec: dict[str, Any], data_dir: str | None) -> None:
    if "prepare" not in spec:
        raise ValueError(f"`data_dir` is given, but {folder / 'task.yaml'} names no `prepare` script to read it.")
    if data_dir is None:
        raise FileNotFoundError(
            f"The data files of {spec['name']!r} are not built yet: give `--data_dir`, the source that "
            f"{folder / spec['prepare']} reads (see {folder / 'README.md'})."
        )
    load_module(folder / spec["prepare"]).prepare(source=data_dir, output_dir=folder / "prepared")


def _load_raw(folder: Path, spec: dict[str, Any]) -> dict[str, tuple[str, Dataset]]:
    """By split, where its rows come from and the rows as they are."""
    if "dataset" in spec:
        loaded = load_dataset(spec["dataset"], spec.get("config_name"), revision=spec.get("revision"))
        if "train" not in loaded:
            raise ValueError(f"The data set {spec['dataset']} has no train split, only {list(loaded)}.")
        return {name: (spec["dataset"], loaded[name]) for name in SPLITS if name in loaded}
    raw = {}
    for name in SPLITS:
        if name not in spec["data_files"]:
            continue
        path = folder / spec["data_files"][name]
        if not path.is_file():
            raise FileNotFoundError(f"{path}, the {name} split of {spec['name']!r}, is not there.")
        raw[name] = (str(path), _load_file(path))
    return raw


def _load_file(path: Path) -> Dataset:
    if path.suffix not in LOADERS:
        raise ValueError(f"{path}: data files end in one of {sorted(LOADERS)}.")
    if path.suffix == ".jsonl":
        rows = _read_jsonl(path)
    elif path.suffix == ".csv":
        # As strings: type inference would turn an id of digits into a number, and the text "nan" into nothing.
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]
    else:
        return load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    columns = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list([{name: _as_text(row.get(name)) for name in columns} for row in rows])


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is {type(row).__name__}, not an object with columns.")
        rows.append(row)
    return rows


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; write null for a missing label")


def _as_text(value: Any) -> str | None:
    """One column type whatever the mixture of values in a file: each as JSON, but strings as they are."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _normalise(
    rows: Dataset, spec: dict[str, Any], split: str, origin: str, on_bad_row: str, seen: dict[str, str]
) -> Dataset:
    fields = TaskPrompt.from_dict({key: spec[key] for key in PROMPT_KEYS if key in spec}).fields
    names = {key: spec.get(f"{key}_column", key) for key in ("id", "label", "explanation")}
    missing = [name for name in (*fields, names["label"]) if name not in rows.column_names]
    if missing:
        raise ValueError(f"{origin}: missing column(s) {missing}; found {rows.column_names}.")
    good, bad = [], Counter()
    for number, row in enumerate(rows, start=1):
        row_id = str(row.get(names["id"]) if row.get(names["id"]) is not None else f"{split}-{number}")
        place = f"{origin}, row {number} (id {row_id!r})"
        if row_id in seen:
            raise ValueError(f"{place}: this id stands in {seen[row_id]} too; ids must be unique over all splits.")
        seen[row_id] = f"{split}, row {number}"
        problem = _problem(row, fields, names["label"])
        if problem and on_bad_row == "error":
            raise ValueError(f"{place}: {problem}. Mend it, or run with `--on_bad_row skip`.")
        if problem:
            bad[f"{problem} (label {row[names['label']]!r})"] += 1
            continue
        explanation = row.get(names["explanation"])
        good.append(
            {
                "id": row_id,
                **{name: row[name] for name in fields},
                "label": _label(row[names["label"]]),
                "explanation": explanation if explanation and explanation.strip() else None,
            }
        )
    for problem, count in bad.items():
        logger.warning("%s: skipped %d row(s): %s", origin, count, problem)
    if not good:
        raise ValueError(f"{origin}: no usable rows in the {split} split.")
    types = {"id": "string", **dict.fromkeys(fields, "string"), "label": "float64", "explanation": "string"}
    return Dataset.from_list(good, features=Features({name: Value(kind) for name, kind in types.items()}))


def _problem(row: dict[str, Any], fields: list[str], label_column: str) -> str | None:
    for name in fields:
        if not isinstance(row[name], str):
            return f"the field {name!r} is {'missing' if row[name] is None else type(row[name]).__name__}, not text"
        if not row[name].strip():
            return f"the field {name!r} is empty"
    try:
        _label(row[label_column])
    except ValueError as error:
        return str(error)
    return None


def _label(value: Any) -> float | None:
    """0.0 or 1.0, or `None` for an unlabelled row; raises `ValueError` for anything else."""
    if value is None:
        return None
    if isinstance(value, str):
        value = {"true": 1, "false": 0, "1.0": 1, "0.0": 0}.get(value.strip(), value.strip())
    if value not in LABELS:
        raise ValueError(f"the label is {value!r}; it must be 0, 1 or null")
    return LABELS[value]
