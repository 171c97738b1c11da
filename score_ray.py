"""Answers a table that is too large for one process or machine, with Ray Data: Parquet, JSONL or CSV in, Parquet out.

python score_ray.py --model outputs/trial_claims/model --input texts --output answers --concurrency 2
python score_ray.py --model YOU/clsgen --input s3://in/notes --output s3://out/answers --address auto --num_gpus 1

The input is cut into parts, always in the same way. A worker answers a part and renames it into place when whole. So
a part is there or not, whoever was killed, and the same command goes on with those that are not.
"""

import logging
import os
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import pyarrow as pa
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, HfArgumentParser
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import HF_MODULES_CACHE

from clsgen.part_folder import PartFolder
from clsgen.predict_clsgen import (
    FREE_TO_CHANGE,
    PredictArguments,
    answer_fields,
    answer_rows,
    check_columns,
    columns_to_read,
    describe_asked,
    describe_counts,
)
from clsgen.prompting_clsgen import TaskPrompt
from clsgen.table_shards import Shard, TableFile, cut_table, list_files, open_location, read_shard

logger = logging.getLogger("clsgen.score_ray")
ROOT = Path(__file__).resolve().parent
TRIES = 4  # of a part, where each ends its worker: Ray itself tries for ever
OBJECT_STORE = 128 * 2**20  # bytes; rows never pass through it
FREE = FREE_TO_CHANGE | {"output", "concurrency", "num_cpus", "num_gpus", "address"}


@dataclass
class ScoreArguments(PredictArguments):
    """What to answer, with which model, on how many workers."""

    input: str = field(default="", metadata={"help": "A file, folder or bucket's URI: Parquet, JSONL or CSV."})
    output: str = field(default="", metadata={"help": "A folder or bucket's URI, for Parquet; all machines reach it."})
    rows_per_part: int | None = field(
        default=None, metadata={"help": "Rows of an output file, lost with a killed worker. 1024, explained 128."}
    )
    concurrency: int = field(default=1, metadata={"help": "Workers; each holds a model."})
    num_cpus: float = field(default=1, metadata={"help": "Cores, and so threads, of a worker."})
    num_gpus: float = field(default=0, metadata={"help": "GPUs of a worker; with 0.5, two share one."})
    address: str | None = field(
        default=None, metadata={"help": "Of a Ray cluster, `auto` on its machines. Without one, this machine alone."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the output of another run."})

    def __post_init__(self):
        if not self.input or not self.output:
            raise ValueError("Give --input and --output.")
        if min(self.concurrency, self.num_cpus, 1 if self.rows_per_part is None else self.rows_per_part) <= 0:
            raise ValueError("--concurrency, --num_cpus and --rows_per_part must be above 0.")
        self.rows_per_part = self.rows_per_part or (128 if self.explain else 1024)


def added_fields(prefix: str) -> list[pa.Field]:
    """The new columns: where a row comes from (its file, its place there from 1), and those of `predict_clsgen.py`."""
    place = [pa.field(f"{prefix}file", pa.string()), pa.field(f"{prefix}row", pa.int64())]
    return [*place, *answer_fields(prefix)]


class Scorer:
    """What a worker holds: the model. Answers one part a call.

    Args:
        arguments (`ScoreArguments`): The command's.
        schema (`pyarrow.Schema`): Of the input.
        shards (`list[Shard]`): Rows of each part.
        output (`PartFolder`): Where parts go.
    """

    def __init__(self, arguments: ScoreArguments, schema: pa.Schema, shards: list[Shard], output: PartFolder):
        self.arguments, self.schema, self.shards, self.output = arguments, schema, shards, output
        self.filesystem, _ = open_location(arguments.input)
        about = {"revision": arguments.revision, "trust_remote_code": True}
        with FileLock(Path(HF_MODULES_CACHE) / "clsgen.lock"):  # a machine's workers share the cache of remote code
            config = AutoConfig.from_pretrained(arguments.model, **about)
            get_class_from_dynamic_module(config.auto_map["AutoModel"], arguments.model, revision=arguments.revision)
        self.model = AutoModel.from_pretrained(arguments.model, **about)
        if arguments.num_gpus:
            self.model.to("cuda")

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        """Answers the part `row["part"]` if need be; tells how many rows it has, or what a person must see to."""
        try:
            if not self.output.has(row["part"]):
                self.output.write_part(row["part"], self.answer(self.shards[row["part"]]))
        except (OSError, TypeError, ValueError) as error:
            return {"rows": 0, "error": str(error)}
        return {"rows": self.shards[row["part"]].rows, "error": ""}

    def answer(self, shard: Shard) -> pa.Table:
        """The shard's rows, with answers."""
        prefix, first = self.arguments.prefix, shard.first + 1
        table = read_shard(self.filesystem, shard, self.schema)
        wanted = columns_to_read(self.model.encoder.prompt.fields, self.arguments)
        named = replace(self.arguments, input=shard.file.name)
        answered = answer_rows(self.model, table.select(wanted).to_pylist(), first, named)
        answers = pa.Table.from_pylist(answered, schema=pa.schema(answer_fields(prefix)))
        place = [pa.array([shard.file.name] * shard.rows), pa.array(range(first, first + shard.rows))]
        schema = pa.schema([*table.schema, *added_fields(prefix)])
        return pa.Table.from_arrays([*table.columns, *place, *answers.columns], schema=schema)


class Tries:
    """How often each part was begun; an actor, for whoever begins one may not live to tell."""

    def __init__(self):
        self.counts = Counter()

    def begin(self, part: int) -> int:
        """Counts one more try of the part, and returns how many there have been."""
        self.counts[part] += 1
        return self.counts[part]


class RetriedScorer(Scorer):
    """A [`Scorer`] as Ray runs it: it gives up on a part that has ended several workers.

    Args:
        tries (`ray.actor.ActorHandle`): Of [`Tries`].
    """

    def __init__(self, tries: Any, *arguments: Any):
        super().__init__(*arguments)
        self.tries = tries

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        import ray

        if ray.get(self.tries.begin.remote(row["part"])) > TRIES:
            shard = self.shards[row["part"]]
            return {
                "rows": 0,
                "error": f"{shard.file.name}, rows {shard.first + 1} to {shard.first + shard.rows}: the worker died "
                f"{TRIES} times. Was it short of memory? Try a smaller --batch_size.",
            }
        return super().__call__(row)


def start_ray(arguments: ScoreArguments) -> Any:
    """Joins the cluster, or starts one of this machine that others can't reach. Returns the module `ray`.

    Raises:
        ImportError: without Ray; ValueError: where the workers don't fit on this machine.
    """
    address = arguments.address or os.environ.get("RAY_ADDRESS")
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}  # or it warns of restarts
    if not address:
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on any system: its ports are on loopback
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ImportError("score_ray.py needs Ray: pip install -r requirements-ray.txt (or `make ray`).") from error
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        ray.init(address, runtime_env={"working_dir": str(ROOT)}, **quiet)
    else:
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
        has, needs = ray.cluster_resources(), {"CPU": arguments.num_cpus, "GPU": arguments.num_gpus}
        if any(has.get(name, 0) < need * arguments.concurrency for name, need in needs.items()):
            ray.shutdown()
            raise ValueError(
                f"{arguments.concurrency} workers of {arguments.num_cpus:g} CPU and {arguments.num_gpus:g} GPU don't "
                f"fit on this machine, which has {has.get('CPU', 0):g} and {has.get('GPU', 0):g}."
            )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray


def run_workers(arguments: ScoreArguments, schema: pa.Schema, shards: list[Shard], output: PartFolder) -> None:
    """Answers the parts that are missing, on a cluster that it joins and leaves.

    Raises:
        ValueError: for what a worker says that a person must see to.
        OSError: where Ray gives up.
    """
    ray = start_ray(arguments)
    missing, rows = output.missing(), sum(shard.rows for shard in shards)
    done = rows - sum(shards[part].rows for part in missing)
    workers = min(arguments.concurrency, len(missing))
    tries = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Tries).remote()
    parts = ray.data.from_items([{"part": part} for part in missing], override_num_blocks=len(missing)).map(
        RetriedScorer,
        fn_constructor_args=(tries, arguments, schema, shards, output),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=arguments.num_cpus,
        num_gpus=arguments.num_gpus,
    )
    try:
        with tqdm(desc="Answering", unit="row", total=rows, initial=done) as progress:
            for answered in parts.iter_rows():
                if answered["error"]:
                    raise ValueError(answered["error"])
                progress.update(answered["rows"])
    except ray.exceptions.RayError as error:
        raise OSError(f"Ray gave up; the same command goes on from here. It said: {error}") from error
    finally:
        own = psutil.Process().children(recursive=True)  # of a cluster that this process started
        ray.shutdown()
        for straggler in psutil.wait_procs(own, timeout=10)[1]:  # seen: a worker that hung while it ended
            straggler.kill()


def settle(arguments: ScoreArguments, commit: str | None) -> ScoreArguments:
    """The arguments as every worker and the next run understand them: whole paths, and the commit of a Hub's model."""
    source, target = (
        location if "://" in location else os.path.abspath(location)
        for location in (arguments.input, arguments.output)
    )
    above, below = (location.partition("?")[0] if "://" in location else location for location in (source, target))
    if PurePosixPath(below).is_relative_to(above):
        raise ValueError(f"{arguments.output} is inside the input: answers would be read as texts.")
    model = os.path.abspath(arguments.model) if Path(arguments.model).exists() else arguments.model
    return replace(arguments, input=source, output=target, model=model, revision=commit or arguments.revision)


def score(arguments: ScoreArguments) -> Counter:
    """Answers the whole input; goes on where a run that was ended left off. Returns counts of labels and errors.

    Raises:
        ImportError, OSError, ValueError: with what a person has to change.
    """
    config = AutoConfig.from_pretrained(arguments.model, revision=arguments.revision, trust_remote_code=True)
    if config.model_type != "clsgen":
        raise ValueError(f"{arguments.model} is no CLSGen checkpoint, but a {config.model_type} model.")
    arguments = settle(arguments, getattr(config, "_commit_hash", None))
    wanted = columns_to_read(TaskPrompt.from_dict(config.prompt).fields, arguments)
    added = [each.name for each in added_fields(arguments.prefix)]

    def check(file: TableFile, columns: list[str]) -> None:
        check_columns(wanted, columns, added, replace(arguments, input=file.name))

    files = list_files(arguments.input)
    schema, shards = cut_table(arguments.input, files, arguments.rows_per_part, check)
    run = {
        **describe_asked(arguments, FREE, config),
        "files": {file.name: [file.size, file.mtime_ns] for file in files},
    }
    output = PartFolder(arguments.output, run, len(shards))
    output.claim(arguments.overwrite)
    if output.missing():
        run_workers(arguments, schema, shards, output)
    return output.finish(arguments.prefix)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        arguments = HfArgumentParser(ScoreArguments).parse_args_into_dataclasses(argv)[0]
        counts = score(arguments)
    except KeyboardInterrupt:
        logger.error("Interrupted. The same command goes on from here.")
        return 130
    except (ImportError, OSError, ValueError) as error:
        logger.error("%s", error)
        return 1
    logger.info("%s: %s", arguments.output, describe_counts(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
