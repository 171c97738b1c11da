"""Answers a whole file of texts, or one after another as they are typed.

python predict_clsgen.py --model outputs/trial_claims/model --input texts.csv --output answers.csv
python predict_clsgen.py --model outputs/trial_claims/model      # type a text, get an answer
"""

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm
from transformers import AutoModel, HfArgumentParser

from clsgen.journal import Journal
from clsgen.run_record import describe_checkpoint
from clsgen.table_files import check_ending, read_columns, read_rows, read_schema, write_rows

logger = logging.getLogger("clsgen.predict_clsgen")
COLUMNS = {
    "label": pa.string(), "probability": pa.float64(), "explanation": pa.string(), "explained_label": pa.string(),
    "lm_probability": pa.float64(), "prediction_set": pa.string(), "abstained": pa.bool_(), "truncated": pa.bool_(),
    "explanation_cut": pa.bool_(), "error": pa.string(),
}  # fmt: skip
FREE_TO_CHANGE = {"batch_size", "on_error", "overwrite"}  # between a run and the one that goes on with it


@dataclass
class PredictArguments:
    """What to answer, with which model."""

    model: str = field(metadata={"help": "A CLSGen checkpoint: a folder or a Hub id. Its code is run."})
    revision: str | None = field(default=None, metadata={"help": "Commit of the Hub repo; pin what you have read."})
    input: str | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet; without one, type texts."})
    output: str | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet: the input and the answers."})
    text_column: str | None = field(
        default=None, metadata={"help": "The column with whole texts, where there is not one for each field."}
    )
    prefix: str = field(default="clsgen_", metadata={"help": "Of the new columns' names."})
    explain: bool = field(default=True, metadata={"help": "`--explain false` gives numbers alone, and is faster."})
    mode: str | None = field(default=None, metadata={"help": "`guided` or `free` explanations."})
    prior: float | None = field(default=None, metadata={"help": "Base rate to re-base probabilities to."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest explanation, in tokens."})
    batch_size: int | None = field(default=None, metadata={"help": "Most texts of a batch."})
    on_error: str = field(
        default="fail", metadata={"help": "A row that can't be answered stops the run, or is written with its error.",
                                  "choices": ["fail", "skip"]}
    )  # fmt: skip
    overwrite: bool = field(default=False, metadata={"help": "Replace an output, and forget an unfinished one."})


def text_of(row: dict[str, Any], fields: list[str], text_column: str | None) -> Any:
    """What `classify` takes, from a row; an empty cell counts as an empty text."""
    if text_column is not None:
        return row.get(text_column) or ""
    return {name: row.get(name) or "" for name in fields}


def predict_texts(model: Any, texts: list[Any], arguments: PredictArguments) -> list[Any]:
    """The predictions that the command asks for."""
    options = {"batch_size": arguments.batch_size, "prior": arguments.prior}
    if not arguments.explain:
        return model.classify(texts, **options)
    length = {} if arguments.max_new_tokens is None else {"max_new_tokens": arguments.max_new_tokens}
    return model.classify_and_explain(texts, mode=arguments.mode, **options, **length)


def answer_rows(model: Any, rows: list[dict[str, Any]], first: int, arguments: PredictArguments) -> list[dict]:
    """Answers of rows, whose places in the file start at `first` (counted from 1).

    Raises:
        ValueError: for a row that can't be answered, with `--on_error fail`.
    """
    fields = model.encoder.prompt.fields
    texts, errors = {}, {}

    def refuse(i: int, reason: str, error: Exception) -> None:
        if arguments.on_error == "fail":
            raise ValueError(f"{arguments.input}, row {first + i}: {reason}") from error
        errors[i] = reason

    for i, row in enumerate(rows):
        text = text_of(row, fields, arguments.text_column)
        try:
            model.encoder.encode(text)
            texts[i] = text
        except (TypeError, ValueError) as error:
            refuse(i, str(error), error)
    predictions = None
    while predictions is None:
        try:
            predictions = iter(predict_texts(model, list(texts.values()), arguments))
        except ValueError as error:
            if type(error).__name__ != "NoNumberError":  # of the checkpoint's own code, so no class to import
                raise
            rows_left = list(texts)
            for i in (rows_left[place] for place in error.texts):
                del texts[i]
                refuse(i, error.reason, error)
    answers = []
    for i in range(len(rows)):
        values = dict.fromkeys(COLUMNS)
        if i in errors:
            values["error"] = errors[i]
        else:
            found = next(predictions).to_dict()
            values.update({name: found[name] for name in COLUMNS if name in found})
            if found["prediction_set"] is not None:
                values["prediction_set"] = " | ".join(found["prediction_set"])
        answers.append({f"{arguments.prefix}{name}": value for name, value in values.items()})
    return answers


def answer_fields(prefix: str) -> list[pa.Field]:
    """The new columns, as Parquet has them."""
    return [pa.field(f"{prefix}{name}", kind) for name, kind in COLUMNS.items()]


def columns_to_read(fields: list[str], arguments: PredictArguments) -> list[str]:
    """The columns that make up a text: the prompt's `fields`, or the one with whole texts."""
    return fields if arguments.text_column is None else [arguments.text_column]


def check_columns(wanted: list[str], columns: list[str], added: list[str], arguments: PredictArguments) -> None:
    """Raises `ValueError` where the input lacks what is wanted, or has what is going to be added."""
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise ValueError(
            f"{arguments.input} has no column(s) {missing}; it has {columns}. Name the column that holds whole texts "
            "with --text_column."
        )
    taken = [name for name in added if name in columns]
    if taken:
        raise ValueError(f"{arguments.input} has the column(s) {taken} already: choose another --prefix.")


def describe_asked(arguments: PredictArguments, free_to_change: set[str], config: Any) -> dict[str, Any]:
    """What answers depend on besides the input: the options, and the checkpoint, whose `config` was loaded."""
    options = {name: value for name, value in asdict(arguments).items() if name not in free_to_change}
    return {**options, **describe_checkpoint(config)}


def describe_counts(counts: Counter) -> str:
    """Counts of labels and errors in words."""
    told = ", ".join(f"{count} {label}" for label, count in sorted(counts.items()) if label != "errors")
    return (told or "no rows") + (f"; {counts['errors']} rows with an error" if counts["errors"] else "")


def predict_file(model: Any, arguments: PredictArguments) -> Counter:
    """Answers the input file; goes on where a run that was ended left off. Returns counts of labels and errors.

    Raises:
        OSError, ValueError: with what a person has to change.
    """
    source, target = Path(arguments.input), Path(arguments.output)
    check_ending(target)
    stamp = _stamp(source)
    added = answer_fields(arguments.prefix)
    wanted = columns_to_read(model.encoder.prompt.fields, arguments)
    if target.suffix == ".parquet":
        schema = read_schema(source)
    else:
        schema = pa.schema([(name, pa.string()) for name in read_columns(source)])
    check_columns(wanted, schema.names, [field.name for field in added], arguments)
    if target.exists() and not arguments.overwrite:
        raise FileExistsError(
            f"{target} is there already: name another --output, or replace it with --overwrite true."
        )
    run = describe_asked(arguments, FREE_TO_CHANGE, model.config) | {source.name: stamp}
    counts = Counter()
    blank = {} if target.suffix == ".jsonl" else dict.fromkeys(schema.names)  # JSON lines may lack some

    def check_unchanged() -> None:
        if _stamp(source) != stamp:
            raise ValueError(f"{source} was changed while it was read. Run the command again with --overwrite true.")

    def joined() -> Iterator[dict[str, Any]]:
        for row, answer in zip(read_rows(source), journal, strict=True):
            error = answer[f"{arguments.prefix}error"]
            counts["errors" if error else answer[f"{arguments.prefix}label"]] += 1
            yield {**blank, **row, **answer}
        check_unchanged()

    with Journal(target.with_name(f".{target.name}.journal.jsonl"), run, arguments.overwrite) as journal:
        _answer_rest(model, read_rows(source), journal, arguments)
        check_unchanged()
        write_rows(target, joined(), pa.schema([*schema, *added]))
        journal.remove()
    return counts


def _answer_rest(model: Any, rows: Iterator[dict[str, Any]], journal: Journal, arguments: PredictArguments) -> None:
    """Answers the rows that the journal lacks."""
    journal.check_fits(sum(1 for _ in islice(rows, journal.count)))
    if journal.count:
        logger.info("Going on after %d rows that %s holds.", journal.count, journal.path)
    chunk = 64 if arguments.explain else 1024
    with tqdm(desc="Answering", unit="row", initial=journal.count) as progress:
        while window := list(islice(rows, chunk)):
            journal.append(answer_rows(model, window, journal.count + 1, arguments))
            progress.update(len(window))


def _stamp(file: Path) -> list[int]:
    """What changes where a file does."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def talk(model: Any, arguments: PredictArguments) -> None:
    """Asks for one text after another, and streams the answers."""
    fields = ["text"] if arguments.text_column else model.encoder.prompt.fields
    print(f"{model.config.prompt['question']} An empty line ends it.")
    length = {} if arguments.max_new_tokens is None else {"max_new_tokens": arguments.max_new_tokens}
    while True:
        values = {}
        for name in fields:
            values[name] = input(f"{name}: ")
            if not values[name].strip():
                return
        text = values["text"] if arguments.text_column else values
        if not arguments.explain:
            print(model.classify(text, prior=arguments.prior))
            continue
        events = model.stream(text, arguments.mode, prior=arguments.prior, **length)
        print(next(events))
        for event in events:
            if isinstance(event, str):
                print(event, end="", flush=True)
        print("\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring. Returns the exit code."""
    arguments = HfArgumentParser(PredictArguments).parse_args_into_dataclasses(argv)[0]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        if (arguments.input is None) != (arguments.output is None):
            raise ValueError("Give both --input and --output, or neither.")
        if arguments.input and not Path(arguments.input).is_file():
            raise FileNotFoundError(f"{arguments.input} is not there.")
        about = {"revision": arguments.revision, "trust_remote_code": True}
        model = AutoModel.from_pretrained(arguments.model, device_map="auto", **about)
        if arguments.input is None:
            with contextlib.suppress(EOFError):
                talk(model, arguments)
            return 0
        counts = predict_file(model, arguments)
    except KeyboardInterrupt:
        logger.error("Interrupted. The same command goes on from here.")
        return 130
    except (OSError, ValueError) as error:
        logger.error("%s", error)
        return 1
    logger.info("%s: %s", arguments.output, describe_counts(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
