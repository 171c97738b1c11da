"""Tasks: a folder with data, a prompt and a card becomes checked, normalised splits. No row goes missing unsaid."""

import hashlib
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets

from clsgen.prompting_clsgen import PromptEncoder, TaskPrompt, fill_template
from clsgen.task_sources import SPLITS, Source, read_sources

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent
PROMPT_KEYS = ("system_prompt", "template", "question", "document", "verdicts")
REQUIRED_KEYS = {"name", "template", "question", "document", "labels", "verdicts"}
OPTIONAL_KEYS = {
    "system_prompt", "label_column", "explanation_column", "id_column", "data_files", "dataset", "revision",
    "config_name", "prepare", "credentialed", "license",
}  # fmt: skip
TEXT_KEYS = (REQUIRED_KEYS | OPTIONAL_KEYS) - {"labels", "verdicts", "data_files", "credentialed"}
ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
LABELS = {0: 0.0, 1: 1.0, "0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}  # False, True, 0.0 and 1.0 equal 0 and 1


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

    @property
    def asked(self) -> str:
        """The question and both verdicts, whose numbers an explanation may name though no text holds them."""
        return " ".join([self.prompt["question"], *self.prompt["verdicts"]])

    def text_of(self, row: dict[str, Any]) -> str:
        """A row's text: the template with the row's fields in their places."""
        return fill_template(self.prompt["template"], row)


def load_task(
    name_or_path: str | Path,
    data_dir: str | None = None,
    on_bad_row: str = "error",
    log: logging.Logger = logger,
) -> Task:
    """Loads and checks a task.

    Args:
        name_or_path (`str` or `Path`): A folder with a `task.yaml`, or the name of one below `data/`.
        data_dir (`str`, *optional*): The source from which the task's `prepare.py` builds its data files.
        on_bad_row (`"error"` or `"skip"`): What becomes of a row with an empty text or an impossible label; skipped
            rows are counted in the log.
        log (`logging.Logger`): Where the counts of each split go.

    Raises:
        FileNotFoundError: for a task or data file that is not there.
        ValueError: for a `task.yaml` or data that cannot be used, naming file, row and what is wrong.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"`on_bad_row` is 'error' or 'skip', got {on_bad_row!r}.")
    folder = _find_folder(name_or_path)
    spec = _read_spec(folder / "task.yaml")
    if data_dir is not None or (spec.get("prepare") and not _all_files_exist(folder, spec)):
        _prepare(folder, spec, data_dir)
    splits, seen, columns = DatasetDict(), {}, set()
    for source in read_sources(folder, spec):
        columns.update(source.columns)
        _check_label_names(source, spec, log)
        splits[source.split], skipped = _normalise(source, spec, seen, on_bad_row)
        for problem, count in skipped.items():
            log.warning("%s: skipped %d row(s): %s", source.origin, count, problem)
        log.info("%s/%s: %s", spec["name"], source.split, _in_words(class_counts(splits[source.split])))
    if "explanation_column" in spec and spec["explanation_column"] not in columns:
        raise ValueError(
            f"{folder / 'task.yaml'}: `explanation_column` is {spec['explanation_column']!r}, but no split has that "
            f"column; found {sorted(columns)}."
        )
    task = Task(
        name=spec["name"],
        prompt={key: spec[key] for key in PROMPT_KEYS if key in spec},
        labels=tuple(spec["labels"]),
        splits=splits,
        credentialed=bool(spec.get("credentialed", False)),
        license=spec.get("license"),
    )
    _check_training_split(task)
    _warn_of_texts_seen_in_training(task, log)
    return task


def rows_that_fit(task: Task, encoder: PromptEncoder, on_bad_row: str = "error", log: logging.Logger = logger) -> Task:
    """The task for one model: without the rows that are too long for it, whatever is cut out of their document.

    Args:
        task ([`Task`]): With rows of any length.
        encoder ([`PromptEncoder`]): The model's.
        on_bad_row (`"error"` or `"skip"`): What becomes of such rows; skipped ones are counted in the log.
        log (`logging.Logger`): Where the counts go.

    Raises:
        ValueError: for such a row, naming split and id; or where skipping leaves training rows of one class.
    """
    splits = DatasetDict()
    for split, rows in task.splits.items():
        fitting, problem = [], ""
        for index, row in enumerate(rows.select_columns(["id", *task.fields])):
            try:
                encoder.fit({name: row[name] for name in task.fields})
            except ValueError as error:
                problem = f"Row {row['id']!r} of {split}: {error}"
                if on_bad_row == "error":
                    raise ValueError(f"{problem} Or skip such rows with `on_bad_row`: skip.") from error
            else:
                fitting.append(index)
        if problem:
            log.warning("%s/%s: skipped %d row(s). %s", task.name, split, len(rows) - len(fitting), problem)
        splits[split] = rows.select(fitting)
    task = replace(task, splits=splits)
    _check_training_split(task)
    return task


def _check_training_split(task: Task) -> None:
    counts = class_counts(task.splits["train"])
    if not counts["positive"] or not counts["negative"]:
        raise ValueError(
            f"The training split of {task.name!r} needs labelled rows of both classes, got {_in_words(counts)}."
        )


def _warn_of_texts_seen_in_training(task: Task, log: logging.Logger) -> None:
    trained = {task.text_of(row) for row in task.splits["train"]}
    for split in task.splits:
        count = 0 if split == "train" else sum(task.text_of(row) in trained for row in task.splits[split])
        if count:
            log.warning(
                "%s/%s: %d of its %d texts stand in the training split too; its numbers will flatter a model.",
                task.name, split, count, len(task.splits[split]),
            )  # fmt: skip


def find_task(name_or_path: str | Path) -> tuple[Path, dict[str, Any]]:
    """A task's folder and its checked `task.yaml`, without its data; raises as [`load_task`] does."""
    folder = _find_folder(name_or_path)
    return folder, _read_spec(folder / "task.yaml")


def raw_splits(folder: Path, spec: dict[str, Any]) -> DatasetDict:
    """A task's splits with the columns of all, as they stand in its data files; null where a row has no such column.

    A column has one type in all splits, without which nobody could load them together.

    Raises:
        ValueError: for a column that holds values of several types, naming it.
    """
    rows, names, places = [], {}, {}
    for source in read_sources(folder, spec):
        start = len(rows)
        rows += [row for _, row in source.rows]
        names.update(dict.fromkeys(source.columns))
        places[source.split] = range(start, len(rows))
    columns = []
    for name in names:
        try:
            columns.append(Dataset.from_dict({name: [row.get(name) for row in rows]}))
        except (TypeError, ValueError) as error:  # pyarrow's are the one or the other
            raise ValueError(
                f"{folder}: values of the column {name!r} are not all of one type ({error}). Mend them, or remove the "
                "column."
            ) from error
    whole = concatenate_datasets(columns, axis=1)
    return DatasetDict({split: whole.select(place) for split, place in places.items()})


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


def rows_digest(rows: Dataset) -> str:
    """SHA-256 of the labelled rows of a normalised split, without explanations: of what metrics are measured on."""
    digest = hashlib.sha256()
    for row in rows.remove_columns("explanation"):
        if row["label"] is not None:
            digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    keys = set(spec) if isinstance(spec, dict) else set()
    unknown, missing = keys - REQUIRED_KEYS - OPTIONAL_KEYS, REQUIRED_KEYS - keys
    if unknown or missing:
        raise ValueError(
            f"{path}: unknown key(s) {sorted(map(str, unknown))}, missing key(s) {sorted(missing)}. Required: "
            f"{sorted(REQUIRED_KEYS)}; optional: {sorted(OPTIONAL_KEYS)}."
        )
    for problem in (*_value_problems(spec), *_file_problems(spec)):
        raise ValueError(f"{path}: {problem}")
    return spec


def _value_problems(spec: dict[str, Any]) -> Iterator[str]:
    for key in sorted(TEXT_KEYS & set(spec)):
        if not isinstance(spec[key], str):
            yield f"`{key}` must be a string, got {spec[key]!r}."
            return
    if not isinstance(spec.get("credentialed", False), bool):
        yield f"`credentialed` must be true or false, got {spec['credentialed']!r}."
    for key in ("labels", "verdicts"):
        words = spec[key]
        if not isinstance(words, list) or len(words) != 2 or not all(isinstance(word, str) for word in words):
            yield f"`{key}` must name label 0 and label 1 by two strings (quote yes and no), got {words!r}."
            return
    if spec["labels"][0] == spec["labels"][1]:
        yield f"`labels` must name label 0 and label 1 differently, got {spec['labels']!r}."
    try:
        fields = _prompt(spec).fields
    except (TypeError, ValueError) as error:
        yield str(error)
        return
    names = _column_names(spec)
    leaks = set(fields) & {"id", "label", "explanation", names["label"], names["explanation"]}
    if leaks:
        yield f"`template` must not show {sorted(leaks)}: id, label and explanation are no part of a text."


def _file_problems(spec: dict[str, Any]) -> Iterator[str]:
    if ("data_files" in spec) == ("dataset" in spec):
        yield "give either `data_files` or `dataset`."
        return
    if "dataset" in spec:
        if "prepare" in spec:
            yield "`prepare` builds `data_files`; it does not go with `dataset`."
        return
    files = spec["data_files"]
    if not isinstance(files, dict) or "train" not in files or set(files) - set(SPLITS):
        yield f"`data_files` needs `train`, and takes {SPLITS}, got {files!r}."
    elif not all(isinstance(file, str) and file.endswith(ENDINGS) for file in files.values()):
        yield f"`data_files` end in one of {ENDINGS}, got {files!r}."
    elif len(set(files.values())) < len(files):
        yield f"two splits of `data_files` are the same file: {files!r}."


def _prompt(spec: dict[str, Any]) -> TaskPrompt:
    return TaskPrompt.from_dict({key: spec[key] for key in PROMPT_KEYS if key in spec})


def _column_names(spec: dict[str, Any]) -> dict[str, str]:
    return {key: spec.get(f"{key}_column", key) for key in ("id", "label", "explanation")}


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
            f"The data files of {spec['name']!r} are not built yet. Run `python train_sft_cls.py --task {folder} "
            f"--data_dir SOURCE`, or call `load_task({str(folder)!r}, data_dir=SOURCE)`, with the source that "
            f"{folder / spec['prepare']} reads (see {folder / 'README.md'})."
        )
    load_module(folder / spec["prepare"]).prepare(source=data_dir, output_dir=folder / "prepared")


def _normalise(source: Source, spec: dict[str, Any], seen: dict[str, str], on_bad_row: str) -> tuple[Dataset, Counter]:
    """The checked rows, and how many were skipped by reason and label; ids are added to `seen`."""
    prompt, names = _prompt(spec), _column_names(spec)
    needed = [*prompt.fields, names["label"], *([names["id"]] if "id_column" in spec else [])]
    missing = [name for name in needed if name not in source.columns]
    if missing:
        raise ValueError(f"{source.origin}: missing column(s) {missing}; found {source.columns}.")
    good, skipped = [], Counter()
    for number, (place, row) in enumerate(source.rows, start=1):
        row_id = row.get(names["id"])
        row_id = f"{source.split}-{number}" if row_id is None else str(row_id)
        place = f"{source.origin}, {place} (id {row_id!r})"
        if row_id in seen:
            raise ValueError(f"{place}: this id stands in {seen[row_id]} too; ids must be unique over all splits.")
        seen[row_id] = place
        try:
            good.append({"id": row_id, **_checked(row, prompt, names)})
        except (TypeError, ValueError) as error:
            if on_bad_row == "error":
                raise ValueError(f"{place}: {error} Mend it, or skip such rows with `on_bad_row`: skip.") from error
            skipped[f"{error} (label {row.get(names['label'])!r})"] += 1
    if not good:
        raise ValueError(f"{source.origin}: no usable rows in the {source.split} split; skipped: {dict(skipped)}.")
    types = {"id": "string", **dict.fromkeys(prompt.fields, "string"), "label": "float64", "explanation": "string"}
    return Dataset.from_list(good, features=Features({name: Value(kind) for name, kind in types.items()})), skipped


def _check_label_names(source: Source, spec: dict[str, Any], log: logging.Logger) -> None:
    """Raises where the data set's own names say that its 0 is the task's 1; warns of names that the task has not."""
    names = getattr(source.features.get(_column_names(spec)["label"]), "names", None)
    found, known = _folded(names or ()), [_folded(spec["labels"]), _folded(spec["verdicts"])]
    if names is None or found in known:
        return
    if found[::-1] in known:
        raise ValueError(
            f"{source.origin}: the data set calls label 0 {names[0]!r} and label 1 {names[1]!r}; task.yaml has them "
            f"the other way round: `labels` {spec['labels']}, `verdicts` {spec['verdicts']}."
        )
    log.warning("%s: the data set calls its labels %s, task.yaml %s.", source.origin, names, spec["labels"])


def _folded(names: Iterable[str]) -> list[str]:
    return [name.lower().replace("_", " ").replace("-", " ").strip() for name in names]


def _checked(row: dict[str, Any], prompt: TaskPrompt, names: dict[str, str]) -> dict[str, Any]:
    """Fields, label and explanation of a row, held to what inference asks of a text."""
    texts = prompt.check_text({name: row.get(name) for name in prompt.fields})
    label = _label(row.get(names["label"]))
    explanation = row.get(names["explanation"])
    if explanation is not None and not isinstance(explanation, str):
        raise ValueError(f"The explanation must be text or null, got {type(explanation).__name__}.")
    if not explanation or not explanation.strip():
        explanation = None
    elif any("\ud800" <= character <= "\udfff" for character in explanation):
        raise ValueError("The explanation holds a lone surrogate, which is no character.")
    return {**texts, "label": label, "explanation": explanation}


def _label(value: Any) -> float | None:
    """0.0 or 1.0, or `None` for an unlabelled row; raises `ValueError` for anything else."""
    if value is None:
        return None
    key = value.strip() if isinstance(value, str) else value
    if not isinstance(key, (str, int, float)) or key not in LABELS:
        raise ValueError(f"The label is {value!r}; it must be 0, 1 or null.")
    return LABELS[key]
