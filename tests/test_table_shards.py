"""Shards of a table hold each of its rows once, in order, whatever the format; what can't be a table is refused."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clsgen.table_files import read_rows, schema_of, write_rows
from clsgen.table_shards import cut_table, list_files, open_location, read_shard

TEXTS = ["plain", 'says "no",\r\nthen; yes', "über ∑ 漢\u2028字", "", " a\tb ", "=1+1", "\ufeffmarked", "x" * 20_000]


def rows(count):
    return [{"id": f"00{i}", "note": TEXTS[i % len(TEXTS)]} for i in range(count)]


def shards_of(folder, rows_per_shard=4, check=lambda file, columns: None):
    schema, shards = cut_table(str(folder), list_files(str(folder)), rows_per_shard, check)
    filesystem, _ = open_location(str(folder))
    return schema, shards, [read_shard(filesystem, shard, schema) for shard in shards]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("rows_per_shard", [1, 4, 11, 100])
def test_shards_hold_every_row_once_and_in_order(tmp_path, ending, rows_per_shard):
    path = tmp_path / f"in{ending}"
    write_rows(path, rows(11), schema_of("rows", rows(11)))
    if ending == ".parquet":
        pq.write_table(pq.read_table(path), path, row_group_size=3)
    _, shards, tables = shards_of(path, rows_per_shard)
    assert [row for table in tables for row in table.to_pylist()] == list(read_rows(path)) == rows(11)
    assert [(shard.first, shard.rows) for shard in shards] == [
        (first, min(rows_per_shard, 11 - first)) for first in range(0, 11, rows_per_shard)
    ]
    assert shards == shards_of(path, rows_per_shard)[1]


def test_shards_may_be_read_in_any_order_from_a_file_as_windows_writes_it(tmp_path):
    path = tmp_path / "in.csv"
    path.write_bytes(b'\xef\xbb\xbfid,note\r\n1,"a\r\nb"\r\n\r\n2,"c ""d"""\r\n3,\xc3\xa9\r\n')
    schema, shards, _ = shards_of(path, 1)
    filesystem, _ = open_location(str(path))
    found = [read_shard(filesystem, shard, schema).to_pylist()[0] for shard in reversed(shards)]
    assert found == list(read_rows(path))[::-1]
    assert found == [{"id": "3", "note": "é"}, {"id": "2", "note": 'c "d"'}, {"id": "1", "note": "a\r\nb"}]


def test_files_of_a_folder_become_one_table(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.jsonl").write_text('{"id": 2.5, "extra": {"k": [1]}}\n\n{"id": null}\n')
    (tmp_path / "a.jsonl").write_text('{"id": 1, "note": null}\n{"id": 2, "note": "x"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / ".hidden").write_text("not a table")
    (tmp_path / "_logs").mkdir()
    (tmp_path / "_logs" / "log.txt").write_text("not a table")
    seen = {}
    schema, shards, tables = shards_of(tmp_path, 1, lambda file, columns: seen.update({file.name: columns}))
    assert [shard.file.name for shard in shards] == ["a.jsonl", "a.jsonl", "b/2.jsonl", "b/2.jsonl"]
    assert seen == {"a.jsonl": ["id", "note"], "b/2.jsonl": ["id", "extra"]}
    assert {table.schema for table in tables} == {schema}
    assert pa.concat_tables(tables).to_pylist() == [
        {"id": 1.0, "note": None, "extra": None},
        {"id": 2.0, "note": "x", "extra": None},
        {"id": 2.5, "note": None, "extra": {"k": [1]}},
        {"id": None, "note": None, "extra": None},
    ]


def test_parquet_keeps_its_types(tmp_path):
    values = {
        "when": pa.array([1_234_567_890_123_456_789, None], pa.timestamp("ns", "UTC")),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "price": pa.array([1, 2], pa.decimal128(9, 2)),
        "parts": pa.array([[{"x": 1}], []]),
    }
    pq.write_table(pa.table(values), tmp_path / "1.parquet")
    pq.write_table(pa.table(values).select([3, 2, 1]), tmp_path / "2.parquet")
    schema, _, tables = shards_of(tmp_path)
    assert schema.types == [each.type for each in values.values()]
    assert tables[0] == pa.table(values)
    assert tables[1].to_pylist() == [{**row, "when": None} for row in pa.table(values).to_pylist()]


def test_errors_name_the_file_and_keep_texts_to_themselves(tmp_path):
    def refused(contents, match):
        folder = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=match) as error:
            shards_of(folder, 2)
        assert "secret" not in str(error.value)

    mixed = b'{"a": "secret"}\n{"a": 1}\n'
    refused({"1.jsonl": mixed}, "1.jsonl: the column 'a' holds int and str")
    refused({"1.jsonl": b'{"a": 1}\n' * 2, "2.jsonl": b'{"a": "secret"}\n'}, "2.jsonl: .* int64 vs string")
    refused({"1.jsonl": b'{"a": 1}\n' * 2 + b'{"a": "secret"}\n'}, "rows 3 to 3: .* int64 vs string")
    refused({"1.jsonl": b'{"a": 1}\n{"a"'}, "1.jsonl, line 2 is not JSON")
    refused({"1.csv": b"a,b\n1,2\n1\n"}, r"1.csv, line 3: 1 cell\(s\) for the 2 columns")
    refused({"1.csv": b"a,b\r1,2\r"}, "1.csv, line 1 is not CSV")
    refused({"1.csv": b"a,a\n1,2\n"}, "a column name stands twice")
    refused({"1.csv": b"a\n\xff\n"}, "1.csv is not UTF-8")
    refused({"1.parquet": b""}, "1.parquet is not Parquet")
    refused({"1.csv": b"a\n1\n", "1.jsonl": b"{}\n"}, r"one kind, but has \['.csv', '.jsonl'\]")
    refused({"1.csv.gz": b""}, "ending must be one of")
    refused({"1.jsonl": b"\n"}, "holds no rows")
    refused({}, "has none")


def test_row_groups_of_many_parts_are_warned_of(tmp_path, caplog):
    pq.write_table(pa.Table.from_pylist(rows(200)), tmp_path / "1.parquet", row_group_size=100)
    shards_of(tmp_path, 2)
    assert caplog.text == ""
    shards_of(tmp_path, 1)
    assert "1.parquet: a row group holds 100 rows, and each part of 1 reads it from its start" in caplog.text


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    write_rows(tmp_path / "1.csv", rows(5))
    schema, shards, _ = shards_of(tmp_path)
    write_rows(tmp_path / "1.csv", rows(6))
    with pytest.raises(ValueError, match=r"1\.csv was changed"):
        read_shard(open_location(str(tmp_path))[0], shards[-1], schema)


class _Denied(BaseHTTPRequestHandler):
    """A store that knows nobody."""

    def do_GET(self):
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_a_bucket_without_credentials_is_a_clear_error(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Denied)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"s3://bucket/notes?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{server.server_port}"
        with pytest.raises(OSError, match=r"bucket/notes.* can't be reached: .*ACCESS_DENIED.*credentials"):
            list_files(uri)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ValueError, match="keep keys in the environment"):
        list_files("s3://key:secret@bucket/notes")
    with pytest.raises(ValueError, match="nowhere://"):
        list_files("nowhere://bucket/notes")
    with pytest.raises(FileNotFoundError, match="/not/there is not there"):
        list_files("/not/there")


def test_json_lines_round_trip(tmp_path):
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(row) + "\r\n" for row in rows(9)))
    assert [row for table in shards_of(tmp_path, 2)[2] for row in table.to_pylist()] == rows(9)
