"""Builds the CliniFact task from a checkout of its repository (ds4dh/CliniFact), a folder of its CSVs, or a URL.

python -m data.clinifact.prepare --source CliniFact
"""

import argparse
import csv
import http.client
import io
import itertools
import json
import logging
import os
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path

from clsgen.explanations.verdicts import parse_verdict, verdict_disagreement

logger = logging.getLogger(__name__)
HERE = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")
COLUMNS = ("index", "nctId", "PMID", "claim", "article_title", "article_abstract", "label")
TRUE, FALSE, NONE = "1", "0", "2"
# Label of each task by CliniFact's label; a label that is left out is counted in the log.
TASK_LABELS = {"clinifact": {FALSE: 0, TRUE: 1}, "clinifact_evidence": {NONE: 0, FALSE: 1, TRUE: 1}}
NO_TITLE = "(no title)"


def prepare(source: str | Path, output_dir: str | Path, task: str = "clinifact") -> dict[str, Counter]:
    """Writes `train.jsonl`, `validation.jsonl` and `test.jsonl`, each whole, and none before all are checked.

    A teacher's explanation is used where its verdict, given without the label, agrees with the gold label; a row where
    it does not has `explanation: null` and still trains the head. A row without an abstract or claim is counted and
    kept: loading the task then refuses it, or skips it where told to. An empty title becomes `(no title)`.

    Args:
        source (`str` or `Path`): A folder that holds `train.csv` or `train_set.csv` (and so on) at any depth, or the
            http(s) URL of a zip of one, or of a folder with the files right in it.
        output_dir (`str` or `Path`): Where the files go.
        task (`"clinifact"` or `"clinifact_evidence"`): TRUE against FALSE, or any evidence against NONE.

    Returns:
        `dict[str, Counter]`: Counts by split.

    Raises:
        FileNotFoundError: for a source without the files, or one that cannot be reached.
        ValueError: for columns, labels or explanations that do not fit.
    """
    if task not in TASK_LABELS:
        raise ValueError(f"`task` is one of {sorted(TASK_LABELS)}, got {task!r}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = _fetch(str(source), Path(temporary))
        tables = {split: _read_csv(_find(folder, split)) for split in SPLITS}
    _report_shared_trials(tables)
    explanations = _read_explanations() if task == "clinifact" else {}
    counts = {split: Counter() for split in SPLITS}
    rows = {
        split: _build_rows(table, split, TASK_LABELS[task], explanations, counts[split])
        for split, table in tables.items()
    }
    _report_unused(explanations, tables)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        _write(Path(output_dir) / f"{split}.jsonl", rows[split])
        logger.info("%s/%s: %s", task, split, ", ".join(f"{count} {name}" for name, count in counts[split].items()))
    return counts


def _write(target: Path, rows: list[dict]) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _fetch(source: str, temporary: Path) -> Path:
    if not source.startswith(("http://", "https://")):
        if not Path(source).is_dir():
            raise FileNotFoundError(
                f"{source} is not a folder. Give a CliniFact checkout, or the URL of a zip of one."
            )
        return Path(source)
    content = _download(source)
    if content is not None and zipfile.is_zipfile(io.BytesIO(content)):
        try:
            zipfile.ZipFile(io.BytesIO(content)).extractall(temporary)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{source} is a broken zip file ({error}). Download it again.") from error
        return temporary
    for split, name in itertools.product(SPLITS, ("{}.csv", "{}_set.csv")):
        content = _download(f"{source.rstrip('/')}/{name.format(split)}")
        if content is not None:
            (temporary / name.format(split)).write_bytes(content)
    if not any(temporary.iterdir()):
        raise ValueError(
            f"{source} is neither a zip file nor a folder with CliniFact's files in it. Give the URL of a zip of the "
            "CliniFact repository."
        )
    return temporary


def _download(url: str) -> bytes | None:
    """What the URL holds, or `None` where the server says there is no such thing."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        if error.code in (403, 404):  # servers that list no folders say so for the folder, not for its files
            return None
        raise FileNotFoundError(f"{url} cannot be read ({error}). Download it and give the folder.") from error
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(f"{url} cannot be reached ({error}). Download it and give the folder.") from error


def _find(folder: Path, split: str) -> Path:
    found = sorted(path for name in (f"{split}.csv", f"{split}_set.csv") for path in folder.rglob(name))
    if not found:
        raise FileNotFoundError(f"There is no {split}.csv or {split}_set.csv in {folder} or below it.")
    if len(found) > 1:
        raise ValueError(
            f"Several files could be the {split} split: {[str(path) for path in found]}. Name one folder."
        )
    return found[0]


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            missing = set(COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"{path}: missing column(s) {sorted(missing)}; found {reader.fieldnames}.")
            table = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {reader.line_num} cannot be read as CSV: {error}.") from error
    indices = Counter(row["index"] for row in table)
    for number, row in enumerate(table, start=1):
        if None in row or None in row.values():
            raise ValueError(f"{path}, row {number}: not as many cells as the {len(reader.fieldnames)} columns.")
        if row["label"] not in (TRUE, FALSE, NONE):
            raise ValueError(f"{path}, row {number}: the label is {row['label']!r}, not 0, 1 or 2.")
        if indices[row["index"]] > 1:
            raise ValueError(f"{path}, row {number}: the index {row['index']!r} stands there more than once.")
    return table


def _report_shared_trials(tables: dict[str, list[dict[str, str]]]) -> None:
    """The published splits share trials: no reason to change them, but to say so."""
    trials = {split: {row["nctId"] for row in table} for split, table in tables.items()}
    for first, second in itertools.combinations(SPLITS, 2):
        shared = len(trials[first] & trials[second])
        if shared:
            logger.warning(
                "CliniFact: %d of the %d trials of %s are in %s too", shared, len(trials[second]), second, first
            )


def _read_explanations() -> dict[tuple[str, str], dict]:
    lines = (HERE / "explanations.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return {(row["split"], str(row["index"])): row for row in rows}


def _report_unused(explanations: dict[tuple[str, str], dict], tables: dict[str, list[dict[str, str]]]) -> None:
    used = {(split, row["index"]) for split, table in tables.items() for row in table if row["label"] != NONE}
    unused = len(set(explanations) - used)
    if unused:
        logger.warning(
            "CliniFact: %d of the %d explanations belong to no TRUE or FALSE row of this source: is it all of it?",
            unused, len(explanations),
        )  # fmt: skip


def _build_rows(
    table: list[dict[str, str]], split: str, labels: dict[str, int], explanations: dict, counts: Counter
) -> list[dict]:
    rows = []
    for source in table:
        if source["label"] not in labels:
            counts["left out (NONE)"] += 1
            continue
        label = labels[source["label"]]
        row = {
            "id": f"{source['nctId']}-{source['PMID']}-{source['index']}",
            "title": source["article_title"] if source["article_title"].strip() else NO_TITLE,
            "abstract": source["article_abstract"],
            "claim": source["claim"],
            "label": label,
        }
        side = "positive" if label else "negative"
        counts[side] += 1
        for column in ("article_title", "article_abstract", "claim"):
            if not source[column].strip():
                counts[f"{side} with an empty {column}"] += 1
        if explanations:
            row.update(_teacher_columns(explanations.get((split, source["index"])), source, label, counts))
        rows.append(row)
    return rows


def _teacher_columns(teacher: dict | None, source: dict[str, str], label: int, counts: Counter) -> dict:
    side = "positive" if label else "negative"
    if teacher is None:
        counts[f"{side} without a teacher's explanation"] += 1
        return {"explanation": None, "teacher_verdict": None, "teacher_probability": None}
    if (teacher["nctId"], teacher["PMID"]) != (source["nctId"], source["PMID"]):
        raise ValueError(
            f"The teacher's explanation of index {source['index']} is of {teacher['nctId']}, {teacher['PMID']}, not "
            f"of {source['nctId']}, {source['PMID']}: this is another version of CliniFact."
        )
    agrees = verdict_disagreement(label, parse_verdict(teacher["teacher_verdict"])) is None
    counts[f"{side} {'explained' if agrees else 'whose teacher disagrees (no explanation)'}"] += 1
    return {
        "explanation": teacher["explanation"] if agrees else None,
        "teacher_verdict": teacher["teacher_verdict"],
        "teacher_probability": teacher["teacher_probability"],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="a folder, or the URL of a zip or of a folder")
    parser.add_argument("--task", choices=sorted(TASK_LABELS), default="clinifact")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare(arguments.source, HERE.parent / arguments.task / "prepared", arguments.task)


if __name__ == "__main__":
    main()
