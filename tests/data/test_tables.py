"""Tables: the same rows from every kind of file, and for every kind of bad input a line that says where and what."""

import csv
import gzip
import json
import logging

import pyarrow
import pytest
from pyarrow import parquet

from gptjax import data
from gptjax.types import UserError

ROWS = [
    {"id": str(n), "body": f'Document {n}, "quoted",\nwith a second line\tand a tab: é' + "x" * (n % 7 * 40_000)}
    for n in range(60)
]


def jsonl(path, rows):
    path.write_text("\n\n".join(json.dumps(row) for row in rows))


def array(path, rows):
    path.write_text(json.dumps(rows, indent=2))


def line(path, rows):
    path.write_text(json.dumps(rows) + "\n")


def comma(path, rows, delimiter=",", header=True):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        if header:
            writer.writeheader()
        writer.writerows(rows)


def grouped(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("write", "name", "table"),
    [
        (jsonl, "a.jsonl", data.Jsonl),
        (array, "a.json", data.Jsonl),
        (line, "a.json", data.Jsonl),
        (comma, "a.csv", data.Csv),
        (lambda path, rows: comma(path, rows, "\t"), "a.tsv", data.Csv),
        (lambda path, rows: comma(path, rows, ";"), "a.csv", lambda *a, **k: data.Csv(*a, **k, delimiter=";")),
        (
            lambda path, rows: comma(path, rows, header=False),
            "a.csv",
            lambda *a, **k: data.Csv(*a, **k, columns=("id", "body")),
        ),
        (grouped, "a.parquet", data.Parquet),
    ],
)
def test_every_kind_of_file_has_the_same_documents(tmp_path, write, name, table):
    write(tmp_path / f"1-{name}", ROWS[:40])
    write(tmp_path / f"2-{name}", ROWS[40:])
    if name != "a.parquet":
        (tmp_path / f"2-{name}.gz").write_bytes(gzip.compress((tmp_path / f"2-{name}").read_bytes()))
        (tmp_path / f"2-{name}").unlink()
    source = table(str(tmp_path / "*"), "body", validation=0.3)
    train, validation = (list(source.documents(split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(row["body"] for row in ROWS)
    assert train == [row["body"] for row in ROWS if row["body"] in set(train)]
    jsonl(tmp_path / "all", ROWS)
    assert train == list(data.Jsonl(str(tmp_path / "all"), "body", validation=0.3).documents("train"))
    before = source.fingerprint()
    (tmp_path / f"1-{name}").touch()
    assert source.fingerprint() != before


@pytest.mark.parametrize(
    ("table", "content", "said"),
    [
        (data.Csv, "id,body\n1,a\n", r'text: \S+:2: got the fields id, body, must have a text in "text"'),
        (data.Csv, 'id,text\n1,"a\nb"\n2,c,d\n', r":4: got 3 fields, must be 2, as the columns id, text; quote"),
        (data.Csv, 'id,text\n1,a\n2,"b', r":3: not CSV \(unexpected end of data\)"),
        (data.Csv, 'text\n"a"b\n', r":2: not CSV"),
        (data.Csv, "text,text\na,b\n", r":1: got the columns text, text, must differ in name"),
        (data.Csv, b"text\n\xff\n", r":2: got invalid UTF-8"),
        (data.Csv, "text\n\n", r"validation: got 0.0, which leaves no document"),
        (data.Jsonl, '[{"text": "a"},\n{"body": "b"}]', r':2: got the fields body, must have a text in "text"'),
        (data.Jsonl, '[\n{"text": "a"}\n', r"not JSON \(.*must be one array, or one value per line"),
        (data.Jsonl, '{"text": 5}', r":1: got int in 'text', must be text"),
        (data.Parquet, b"PAR1 no", r"not Parquet, or damaged \("),
    ],
)
def test_errors_name_file_row_and_column(tmp_path, table, content, said):
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as caught:
        list(table(str(path), validation=0.0).documents("train"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_is_refused_by_its_columns_and_damage_is_named(tmp_path):
    grouped(tmp_path / "a.parquet", ROWS)
    with pytest.raises(UserError, match=r'a\.parquet:1: got the fields id, body, must have a text in "text"'):
        list(data.Parquet(str(tmp_path / "a.parquet")).documents("train"))
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[40:2000] = bytes(1960)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"not Parquet, or damaged"):
        list(data.Parquet(str(tmp_path / "a.parquet"), "body").documents("train"))


def test_nulls_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"text": None if n % 3 else f"text {n}"} for n in range(9)]
    grouped(tmp_path / "a.parquet", rows)
    with caplog.at_level(logging.WARNING):
        assert len(list(data.Parquet(str(tmp_path / "a.parquet"), validation=0.0).documents("train"))) == 3
    assert "left out 6 rows whose 'text' is null" in caplog.text
