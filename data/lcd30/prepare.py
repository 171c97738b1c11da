"""Builds the LCD-30 task from your own MIMIC-IV-Note file and the benchmark's labels. No note is ever printed.

python -m data.lcd30.prepare --source FOLDER     # with discharge.csv or discharge.csv.gz, and labels.json
"""

import argparse
import contextlib
import csv
import gzip
import hashlib
import json
import logging
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)
HERE = Path(__file__).resolve().parent
LABEL = "out_hospital_mortality_30"
SPLITS = {"train": "train", "dev": "validation", "test": "test"}
PUBLISHED_ROWS = {"train": 34_759, "validation": 7_505, "test": 7_568}
DISCHARGE_SHA1 = {"c4f0cfcd00bb8cbb118b1613a5c93f31a361e82b", "a9ac402818385f6ab5a574b4516abffde95d641a"}
_SALT = "Landmark Center 401 park drive"
_KEY_LENGTH = 32


def prepare(
    source: str | Path, output_dir: str | Path, expected_rows: dict[str, int] | None = None
) -> dict[str, Counter]:
    """Writes `train.jsonl`, `validation.jsonl` and `test.jsonl`; none of them unless every label has found its note.

    Args:
        source (`str` or `Path`): A folder with `discharge.csv` (or `.csv.gz`) and `labels.json`.
        output_dir (`str` or `Path`): Where the files go.
        expected_rows (`dict[str, int]`, *optional*): Rows by split; the published ones by default.

    Returns:
        `dict[str, Counter]`: Counts of each split's classes.

    Raises:
        FileNotFoundError: for a folder without the files.
        ValueError: for files that are not these, or do not belong together.
    """
    notes, labels = _find(Path(source), "discharge.csv", "discharge.csv.gz"), _read_labels(Path(source))
    target = Path(output_dir)
    target.mkdir(parents=True, exist_ok=True)
    partial = {split: target / f".{split}.{uuid.uuid4().hex}" for split in SPLITS.values()}
    counts = {split: Counter() for split in SPLITS.values()}
    try:
        _write_splits(notes, labels, partial, counts)
        _check_counts(counts, expected_rows or PUBLISHED_ROWS)
        for split, path in partial.items():
            path.replace(target / f"{split}.jsonl")
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    for split, found in counts.items():
        logger.info("lcd30/%s: %d rows, %d positive", split, found.total(), found[1])
    return counts


def clean(text: str) -> str:
    """A note as the benchmark cleans it; its key depends on each step and on their order."""
    text = text.replace("&#039;", "'").replace("\n", " <cr> ").replace("\r", " <cr> ")
    text = text.replace("\t", " ").replace('"', "")
    return " ".join(re.sub(r"_{2,}\s*", "", text).split())


def note_key(note_id: str, cleaned: str) -> str:
    """The benchmark's name for a note: three SHA-256 digests, combined by XOR, the first 32 characters as `hex` writes
    them."""
    combined = 0
    for part in (note_id, cleaned, _SALT):
        combined ^= int.from_bytes(hashlib.sha256(part.encode("utf-8")).digest(), "big")
    return hex(combined)[:_KEY_LENGTH]


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"There is no {' or '.join(names)} in {folder}: see {HERE / 'README.md'}.")


def _read_labels(folder: Path) -> dict[str, tuple[str, int]]:
    """Split and label by key, checked against the checksum beside them where there is one."""
    path = _find(folder, "labels.json")
    content = path.read_bytes()
    checksum = next((file for file in folder.glob("labels.json*sha1sum")), None)
    if checksum and checksum.read_text().split()[0].lower() != hashlib.sha1(content).hexdigest():
        raise ValueError(f"{path} is not what {checksum} was made for: download both again.")
    try:
        entries = json.loads(content)
        labels = {key: (SPLITS[entry["data_type"]], entry[LABEL]) for key, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the benchmark's labels.json of {LABEL}: {error!r}.") from error
    wrong = sorted({repr(label) for _, label in labels.values() if label not in (0, 1)})
    if wrong:
        raise ValueError(f"{path}: a label must be 0 or 1, found {', '.join(wrong[:5])}.")
    return labels


class _Digested:
    """Lines of a file in binary mode, decoded, while its SHA-1 and the bytes read are kept."""

    def __init__(self, path: Path, progress: tqdm):
        self.path, self.sha1, self._progress = path, hashlib.sha1(), progress

    def __iter__(self) -> Iterator[str]:
        opened = gzip.open if self.path.suffix == ".gz" else open
        with opened(self.path, "rb") as file:
            for line in file:
                self.sha1.update(line)
                self._progress.update(len(line))
                yield line.decode("utf-8")


def _write_splits(
    notes: Path, labels: dict[str, tuple[str, int]], partial: dict[str, Path], counts: dict[str, Counter]
) -> None:
    seen: set[str] = set()
    for path in partial.values():
        path.touch(mode=0o600)  # confidential: for this user alone
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(path.open("w", encoding="utf-8")) for split, path in partial.items()}
        for row in _read_notes(notes):
            cleaned = clean(row["text"])
            key = note_key(row["note_id"], cleaned)
            if key not in labels:
                continue
            if key in seen:
                raise ValueError(f"{notes}: two notes have the key {key}.")
            seen.add(key)
            split, label = labels[key]
            counts[split][label] += 1
            files[split].write(json.dumps({"id": key, "note": cleaned, "label": label}, ensure_ascii=False) + "\n")
    missing = len(labels) - len(seen)
    if missing:
        raise ValueError(
            f"{missing} of the {len(labels)} labels have no note in {notes}: it must be the whole discharge.csv of "
            "MIMIC-IV-Note 2.2, as PhysioNet gives it."
        )


def _read_notes(notes: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    size = notes.stat().st_size if notes.suffix == ".csv" else None
    with tqdm(total=size, unit="B", unit_scale=True, desc="Reading notes") as progress:
        lines = _Digested(notes, progress)
        reader = csv.DictReader(iter(lines), strict=True)
        try:
            missing = {"note_id", "text"} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"{notes}: missing column(s) {sorted(missing)}; found {reader.fieldnames}.")
            for row in reader:
                if row["note_id"] is None or row["text"] is None:
                    raise ValueError(f"{notes}, line {reader.line_num}: not as many cells as columns.")
                yield row
        except (csv.Error, UnicodeDecodeError, EOFError, OSError) as error:
            kind = type(error).__name__  # the message could quote a note
            raise ValueError(f"{notes}, near line {reader.line_num}, cannot be read as CSV ({kind}).") from None
    if lines.sha1.hexdigest() not in DISCHARGE_SHA1:
        logger.warning(
            "%s is none of the versions whose checksum is known; the counts are checked all the same.", notes
        )


def _check_counts(counts: dict[str, Counter], expected: dict[str, int]) -> None:
    found = {split: counter.total() for split, counter in counts.items()}
    if found != expected:
        raise ValueError(f"The rows are {found}, not {expected} as published: is labels.json whole?")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder with discharge.csv(.gz) and labels.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare(arguments.source, HERE / "prepared")


if __name__ == "__main__":
    main()
