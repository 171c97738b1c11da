"""A table in, each of its rows once in the parts that come out, as `predict_clsgen.py` has it, whatever is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from transformers import HfArgumentParser

from clsgen import predict_clsgen, score_ray
from clsgen.checkpoint_folder import write_checkpoint
from clsgen.part_folder import COMPLETE, MANIFEST, PartFolder
from clsgen.score_ray import ScoreArguments, Scorer
from clsgen.table_files import read_rows, schema_of, write_rows
from clsgen.table_shards import cut_table, list_files

REPORT = {"base_model": "tiny", "task": "tiny", "command": "c", "seed": 0, "train_rows": 1, "threshold_method": "f1"}
ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(model, tmp_path):
    model.generation_config.max_new_tokens = 4
    return str(write_checkpoint(model, tmp_path / "model", REPORT))


@pytest.fixture
def rows(texts):
    return [{"id": f"00{i}", **texts[i % 4], "claim": f"Drug {i} lowers death."} for i in range(10)]


def command(folder, source, target, *more):
    return ["--model", folder, "--input", str(source), "--output", str(target), *more]


def parts_of(folder):
    """All rows, of the parts in the order of their names."""
    return [row for path in sorted(Path(folder).glob("part-*")) for row in pq.read_table(path).to_pylist()]


def score_here(*argv):
    """The whole run in this process: what workers would do, one part after another."""
    (arguments,) = HfArgumentParser(ScoreArguments).parse_args_into_dataclasses(list(argv))
    files = list_files(arguments.input)
    schema, shards = cut_table(arguments.input, files, arguments.rows_per_part, lambda file, columns: None)
    output = PartFolder(arguments.output, {}, len(shards))
    output.claim(overwrite=False)
    scorer = Scorer(arguments, schema, shards, output)
    said = [scorer({"part": part}) for part in range(len(shards))]
    return said, output


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("explain", ["true", "false"])
def test_parts_hold_what_predict_writes(folder, rows, tmp_path, ending, explain):
    rows[5]["claim"] = " "
    source, target, expected = tmp_path / f"in{ending}", tmp_path / "out", tmp_path / "expected.parquet"
    write_rows(source, rows, schema_of("rows", rows))
    options = ["--on_error", "skip", "--explain", explain]
    assert predict_clsgen.main(command(folder, source, expected, *options)) == 0
    said, output = score_here(*command(folder, source, target, *options, "--rows_per_part", "4"))
    assert said == [{"rows": count, "error": ""} for count in (4, 4, 2)]
    answered = parts_of(target)
    places = [(row.pop("clsgen_file"), row.pop("clsgen_row")) for row in answered]
    assert places == [(source.name, i) for i in range(1, 11)]
    for row, wanted in zip(answered, read_rows(expected), strict=True):
        assert row == {
            name: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
            for name, value in wanted.items()
        }
        assert list(row) == list(wanted)
    counts = output.finish("clsgen_")
    assert (counts.pop("errors"), sum(counts.values())) == (1, 9)
    assert len({pq.read_schema(path) for path in target.glob("part-*")}) == 1


def test_a_bad_row_stops_the_run_and_is_named(folder, rows, tmp_path):
    rows[5]["claim"] = ""
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "b.csv", rows)
    write_rows(tmp_path / "in" / "a.csv", rows[:2])
    argv = command(folder, tmp_path / "in", tmp_path / "out", "--explain", "false", "--rows_per_part", "5")
    said, output = score_here(*argv)
    assert [each["rows"] for each in said] == [2, 5, 0]
    assert said[2]["error"].startswith("b.csv, row 6: The field 'claim' is empty")
    assert output.missing() == [2]
    with pytest.raises(ValueError, match="lacks parts"):
        output.finish("clsgen_")


def test_what_cannot_work_is_refused_before_any_worker(folder, rows, tmp_path, caplog):
    source, target = tmp_path / "in" / "1.csv", tmp_path / "out"
    source.parent.mkdir()
    write_rows(source, rows)

    def refused(argv, message):
        caplog.clear()
        assert score_ray.main(argv) == 1
        assert message in caplog.text
        assert not list(target.glob("part-*"))

    refused(command(folder, source, target, "--text_column", "note"), "1.csv has no column(s) ['note']")
    refused(command(folder, source.parent, source.parent / "out"), "inside the input")
    refused(command(folder, tmp_path / "no.csv", target), "no.csv is not there")
    refused(command(folder, source, target, "--rows_per_part", "0"), "must be above 0")
    refused(command(folder, source, target, "--concurrency", "0"), "must be above 0")
    refused(["--model", folder], "Give --input and --output")
    write_rows(source.with_name("2.csv"), [{"findings": "x", "claim": "y", "clsgen_row": "1"}])
    refused(command(folder, source.parent, target), "2.csv has the column(s) ['clsgen_row'] already")
    source.with_name("2.csv").write_text("")
    refused(command(folder, source.parent, target), "2.csv has no column(s) ['findings', 'claim']; it has []")
    source.with_name("2.csv").write_text("findings,claim\n")
    target.mkdir()
    (target / "thesis.docx").write_text("precious")
    refused(command(folder, source.parent, target, "--overwrite", "true"), "holds other files")
    assert (target / "thesis.docx").read_text() == "precious"


def test_without_ray_one_message_says_what_to_install(folder, rows, tmp_path):
    write_rows(tmp_path / "in.csv", rows)
    code = "import sys; sys.modules['ray'] = None; from clsgen.score_ray import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, *command(folder, tmp_path / "in.csv", tmp_path / "out")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "score_ray.py needs Ray: pip install -r requirements-ray.txt (or `make ray`)."
    )


def table(count=2):
    return pa.table({"clsgen_label": ["yes"] * count, "clsgen_error": pa.nulls(count, pa.string())})


def test_a_folder_of_parts_is_of_one_run(tmp_path):
    target = tmp_path / "out"
    ours = PartFolder(str(target), {"input": "a", "prior": None}, 2)
    ours.claim(overwrite=False)
    ours.write_part(0, table())
    ours.claim(overwrite=False)
    assert ours.missing() == [1]
    theirs = PartFolder(str(target), {"input": "b", "prior": None}, 2)
    with pytest.raises(ValueError, match=r"another run: input changed\."):
        theirs.claim(overwrite=False)
    assert ours.missing() == [1]
    theirs.claim(overwrite=True)
    assert theirs.missing() == [0, 1]
    for part in (0, 1):
        theirs.write_part(part, table())
    ours.write_part(1, table())  # a straggler of the run that was replaced
    with pytest.raises(ValueError, match="strange"):
        theirs.finish("clsgen_")
    assert not (target / COMPLETE).exists()


def test_what_killed_workers_leave_goes_at_the_end(tmp_path):
    output = PartFolder(str(tmp_path), {}, 1)
    output.claim(overwrite=False)
    (tmp_path / "_part-000000-of-000001.parquet.0123").write_bytes(b"PAR1 torn")
    assert output.missing() == [0]
    output.write_part(0, table(3))
    assert output.finish("clsgen_") == {"yes": 3, "errors": 0}
    assert {path.name for path in tmp_path.iterdir()} == {output.part_name(0), MANIFEST, COMPLETE}


@pytest.fixture
def many(folder, texts, tmp_path):
    """A folder of inputs of 1,200 rows, the command that answers them, and what `predict_clsgen.py` answers."""
    rows = [{"id": f"{i}", **texts[i % 4], "claim": f"Drug {i} lowers death."} for i in range(1200)]
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "1.jsonl", rows[:700])
    write_rows(tmp_path / "in" / "2.jsonl", rows[700:])
    write_rows(tmp_path / "all.jsonl", rows)
    assert predict_clsgen.main(command(folder, tmp_path / "all.jsonl", tmp_path / "expected.jsonl")) == 0
    argv = command(folder, tmp_path / "in", tmp_path / "out", "--concurrency", "2", "--rows_per_part", "32")
    return [sys.executable, str(ROOT / "score_ray.py"), *argv], list(read_rows(tmp_path / "expected.jsonl"))


def start(argv):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_parts(process, target, count):
    deadline = time.monotonic() + 240
    while len(list(target.glob("part-*"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(process):
    """Ids of the processes that hold a model."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child.pid for child in children if "Scorer" in " ".join(child.cmdline())]


def check_answers(target, expected):
    answered = parts_of(target)
    assert [row["id"] for row in answered] == [row["id"] for row in expected]
    assert len({(row["clsgen_file"], row["clsgen_row"]) for row in answered}) == len(expected)
    for row, wanted in zip(answered, expected, strict=True):
        assert row["clsgen_probability"] == pytest.approx(wanted["clsgen_probability"], abs=1e-5)
        assert row["clsgen_explanation"] == wanted["clsgen_explanation"]
    assert not list(target.glob("_part-*"))


@pytest.mark.slow
def test_killed_workers_are_replaced(many, tmp_path):
    argv, expected = many
    process = start(argv)
    wait_for_parts(process, tmp_path / "out", 2)
    workers = workers_of(process)
    assert len(workers) == 2
    connections = [each for worker in workers for each in psutil.Process(worker).net_connections("tcp")]
    listening = {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert listening
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    _, messages = process.communicate(timeout=400)
    assert process.returncode == 0, messages
    check_answers(tmp_path / "out", expected)


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_a_changed_input_is_refused(many, tmp_path):
    argv, expected = many
    target = tmp_path / "out"
    written = 0
    for number in (signal.SIGKILL, signal.SIGINT):
        process = start(argv)
        wait_for_parts(process, target, written + 2)
        process.send_signal(number)
        _, messages = process.communicate(timeout=120)
        written = len(list(target.glob("part-*")))
        assert not (target / COMPLETE).exists()
    assert process.returncode == 130
    assert "The same command goes on" in messages
    kept = {path: path.stat().st_mtime_ns for path in target.glob("part-*")}
    process = start(argv)
    _, messages = process.communicate(timeout=400)
    assert process.returncode == 0, messages
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    check_answers(target, expected)
    again = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    (tmp_path / "in" / "2.jsonl").write_text(json.dumps({"findings": "x", "claim": "y"}) + "\n")
    changed = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert changed.returncode == 1
    assert "holds the answers of another run: files changed." in changed.stderr
    check_answers(target, expected)


@pytest.fixture
def bucket(monkeypatch):
    """The URI of an empty bucket, up to its query, and the query; credentials are in the environment."""
    from moto.server import ThreadedMotoServer  # here, for the quick tests do without these packages

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"region=us-east-1&scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true"
    filesystem, _ = fs.FileSystem.from_uri(f"s3://bucket?{query}")
    filesystem.create_dir("bucket")
    yield "s3://bucket", query, filesystem
    server.stop()


@pytest.mark.slow
def test_from_bucket_to_bucket_on_a_cluster_that_loses_a_machine(many, tmp_path, bucket):
    from ray.cluster_utils import Cluster

    argv, expected = many
    uri, query, filesystem = bucket
    fs.copy_files(str(tmp_path / "in"), "bucket/in", destination_filesystem=filesystem)
    located = {str(tmp_path / name): f"{uri}/{name}?{query}" for name in ("in", "out")}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
    process = start([*(located.get(each, each) for each in argv), "--address", cluster.address])
    try:
        deadline = time.monotonic() + 240
        while len(filesystem.get_file_info(fs.FileSelector("bucket/out", allow_not_found=True))) < 4:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        cluster.remove_node(machines[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        _, messages = process.communicate(timeout=400)
        assert process.returncode == 0, messages
    finally:
        process.kill()
        cluster.shutdown()
    (tmp_path / "out").mkdir()
    fs.copy_files("bucket/out", str(tmp_path / "out"), source_filesystem=filesystem)
    check_answers(tmp_path / "out", expected)


@pytest.mark.slow
def test_a_text_that_ends_every_worker_ends_the_run_and_is_named(many, tmp_path):
    argv, _ = many
    code = tmp_path / "model" / "prompting_clsgen.py"
    start_of_check = '"""The text\'s fields;'
    fatal = f'if "Drug 40 " in str(text):\n            __import__("os").abort()\n        {start_of_check}'
    code.write_text(code.read_text().replace(start_of_check, fatal))
    (tmp_path / "in" / "2.jsonl").unlink()
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 1
    assert "1.jsonl, rows 33 to 64: the worker died 4 times" in done.stderr.splitlines()[-1]
