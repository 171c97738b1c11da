"""The Space's CSV files: each row comes back, with an answer or a reason."""

import csv

import batch
import pytest
import rendering

LABELS = ["not_supported", "supported"]


def read(tmp_path, model, content, explain=False):
    path = tmp_path / "texts.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return batch.read_table(path, model.encoder.prompt.fields, model.encoder.encode, explain)


def answered(tmp_path, model, content, explain=False):
    """The written file's rows, as `csv` reads them."""
    table = read(tmp_path, model, content, explain)
    for _ in batch.answer_rows(model, table, explain):
        continue
    batch.write_table(tmp_path / "answers.csv", table, explain)
    with (tmp_path / "answers.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=table.delimiter))


def test_all_rows_come_back_in_order_with_answers_or_reasons(tmp_path, model):
    content = (
        "id,claim,findings\n"
        "a,Drug A works,It did in 3 of 4.\n"
        "b,,Nothing was found.\n"
        "\n"
        "c,only two cells\n"
        'd,"Drug, D","line one\nline two"\n'
        "e,x,y,z\n"
    )
    rows = answered(tmp_path, model, content)
    assert [row["id"] for row in rows] == ["a", "b", "c", "d", "e"]
    expected = model.classify({"claim": "Drug, D", "findings": "line one\nline two"})
    assert float(rows[3]["clsgen_probability"]) == pytest.approx(expected.probability, abs=1e-6)
    assert rows[3]["clsgen_label"] == expected.label
    assert rows[3]["findings"] == "line one\nline two"
    assert [bool(row["clsgen_label"]) for row in rows] == [True, False, False, True, False]
    assert "'claim' is empty" in rows[1]["clsgen_error"]
    assert rows[2]["clsgen_error"] == "It has 2 cells, the header 3."
    assert rows[4]["clsgen_error"].endswith("Left over: z")


def test_row_numbers_are_those_of_a_spreadsheet(tmp_path, model):
    table = read(tmp_path, model, 'claim,findings\nx,"two\nlines"\n\n,y\n')
    assert [row.number for row in table.rows] == [2, 4]
    assert "<td>4</td>" in rendering.report(table.rows, LABELS, 5)


def test_explanations_are_written_where_asked_for(tmp_path, model):
    model.generation_config.max_new_tokens = 3
    rows = answered(tmp_path, model, "claim,findings\na,b\nc,d\n", explain=True)
    assert {"clsgen_explanation", "clsgen_lm_probability"} <= set(rows[0])
    reading = model.classify_and_explain({"claim": "c", "findings": "d"}, max_new_tokens=1).lm_probability
    assert float(rows[1]["clsgen_lm_probability"]) == pytest.approx(reading, abs=1e-5)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_spreadsheets_save_is_read_and_kept(tmp_path, model, delimiter):
    content = "\ufeff" + delimiter.join(("claim", "findings")) + "\r\n" + delimiter.join(("hält", "ja")) + "\r\n"
    rows = answered(tmp_path, model, content)
    assert rows[0]["claim"] == "hält"
    assert rows[0]["clsgen_label"] in LABELS


def test_whole_texts_are_read_from_one_column(tmp_path, model):
    rows = answered(tmp_path, model, "text\nDrug A works. It did.\n")
    expected = model.classify("Drug A works. It did.").probability
    assert float(rows[0]["clsgen_probability"]) == pytest.approx(expected, abs=1e-6)


def test_a_row_that_fails_in_the_model_costs_no_other(tmp_path, model, monkeypatch):
    table = read(tmp_path, model, "claim,findings\na,b\nc,d\ne,f\n")
    classify = model.classify

    def fails_on_c(texts):
        if any(text["claim"] == "c" for text in ([texts] if isinstance(texts, dict) else texts)):
            raise RuntimeError("out of memory")
        return classify(texts)

    monkeypatch.setattr(model, "classify", fails_on_c)
    assert list(batch.answer_rows(model, table, explain=False)) == [3]
    assert [row.prediction is None for row in table.rows] == [False, True, False]
    assert "RuntimeError" in table.rows[1].error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("claim,findings\n", "no rows"),
        ("claim,note\nx,y\n", "no column named 'findings'"),
        ("claim,claim,findings\nx,y,z\n", "More than one column"),
        ("claim,findings,clsgen_label\nx,y,z\n", "answers already"),
        ('claim,findings\n"x,y\n', "not CSV"),
        (b"claim,findings\n\xff\xfe,y\n", "not UTF-8"),
        (b"claim,findings\nx\0,y\n", "NUL"),
        (b"PK\x03\x04\0\0", "NUL"),
        ("claim,findings\n" + "x,y\n" * (batch.MAX_ROWS + 1), "at most 500"),
        ("claim,findings\nx," + "y" * batch.MAX_BYTES, "2.0 MB"),
    ],
)
def test_unusable_files_are_refused_with_what_to_do(tmp_path, model, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, model, content)


def test_fewer_rows_are_explained_than_answered(tmp_path, model):
    content = "claim,findings\n" + "x,y\n" * (batch.MAX_EXPLAINED_ROWS + 1)
    assert len(read(tmp_path, model, content).rows) == batch.MAX_EXPLAINED_ROWS + 1
    with pytest.raises(ValueError, match="with explanations"):
        read(tmp_path, model, content, explain=True)


def test_too_long_a_text_is_that_rows_error(tmp_path, model):
    table = read(tmp_path, model, "claim,findings\nx," + "y" * (batch.MAX_CHARACTERS + 1) + "\nx,y\n")
    assert "at most 50,000" in table.rows[0].error
    assert table.rows[1].error is None


@pytest.mark.parametrize(
    "cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\tx", "\r=1", " =1", "\uff1d1", "=1\n", "--1"]
)
def test_no_cell_is_a_formula(tmp_path, model, cell):
    assert batch.defused(cell) == f"'{cell}"
    table = batch.Table(["claim", cell], ",", [batch.Row(2, [cell, cell], error=cell)])
    batch.write_table(tmp_path / "x.csv", table, explain=False)
    with (tmp_path / "x.csv").open(encoding="utf-8-sig", newline="") as file:
        header, row = csv.reader(file)
    assert header[1] == row[0] == row[-1] == f"'{cell}"


@pytest.mark.parametrize("cell", ["", "-0.5", "+3", "-1e-3", "a=b", "'=1", "1-2", "95%"])
def test_numbers_and_words_stay_as_they_are(cell):
    assert batch.defused(cell) == cell
