"""Rows out of files, each with its place; bad ones named, none lost."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from orchestrator.data.reading import BadRow, Row, find_files, read_rows
from orchestrator.errors import DataError


def read(path: Path) -> tuple[list[tuple[int, dict]], list[tuple[int, str]]]:
    """(line, values) of good rows, (line, reason) of bad ones."""
    rows = list(read_rows(str(path)))
    assert all(row.file == str(path) for row in rows)
    good = [(row.line, row.values) for row in rows if isinstance(row, Row)]
    return good, [(row.line, row.reason) for row in rows if isinstance(row, BadRow)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_jsonl_keeps_line_numbers_over_blank_lines_and_other_separators(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\n\n{"a": "x\u2028y\x85"}\r\n{"a": 3}')
    assert read(path) == ([(1, {"a": 1}), (3, {"a": "x\u2028y\x85"}), (4, {"a": 3})], [])


def test_jsonl_names_every_bad_row_and_reads_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n' + b"[" * 99999 + b'\n{"a": 2}\n')
    good, bad = read(path)
    assert good == [(1, {"a": 1}), (6, {"a": 2})]
    assert [line for line, _ in bad] == [2, 3, 4, 5]
    reasons = [reason for _, reason in bad]
    assert reasons[0].startswith("malformed JSON")
    assert reasons[1] == "a JSON list, expected an object"
    assert reasons[2] == "not UTF-8: byte 0xff at column 8"
    assert reasons[3].startswith("malformed JSON")


def test_jsonl_tells_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1, "b": 2, "a": 3}\n{"a": [{"c": 1, "c": 2}]}\n{"a": 1}\n')
    assert read(path) == (
        [(3, {"a": 1})],
        [
            (1, "malformed JSON: the key 'a' stands there more than once"),
            (2, "malformed JSON: the key 'c' stands there more than once"),
        ],
    )


def test_csv_places_are_where_a_row_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",x\n"a ""quote"", and \u2028",y\n\nlast,z\n')
    good, bad = read(path)
    assert good == [
        (2, {"text": "two\nlines", "label": "x"}),
        (4, {"text": 'a "quote", and \u2028', "label": "y"}),
        (6, {"text": "last", "label": "z"}),
    ]
    assert bad == []


def test_csv_names_ragged_and_malformed_rows_and_reads_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\na,x,extra\nb\n"c"d,y\nok,z\n"open,y\n')
    good, bad = read(path)
    assert good == [(5, {"text": "ok", "label": "z"})]
    assert [line for line, _ in bad] == [2, 3, 4, 6]
    assert bad[0][1] == "3 fields, the header has 2 (text, label)"
    assert bad[1][1] == "1 fields, the header has 2 (text, label)"
    assert bad[2][1].startswith("malformed CSV")
    assert bad[3][1].startswith("malformed CSV")


def test_csv_tells_a_column_that_stands_twice_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", "a,b,a\n1,2,3\n"))[1] == [(1, "the header names 'a' more than once")]
    assert read(write(tmp_path / "b.csv", b"a,b\n1,2\n3,\xe4\n"))[1] == [(3, "not UTF-8: byte 0xe4 at offset 10")]
    assert read(write(tmp_path / "c.tsv", "a\tb\n1,5\t2\n"))[0] == [(2, {"a": "1,5", "b": "2"})]


def test_parquet_rows_count_from_one_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"a": ["x", None], "b": [[{"role": "user", "content": "hi"}], []]}), path)
    assert read(path)[0] == [(1, {"a": "x", "b": [{"role": "user", "content": "hi"}]}), (2, {"a": None, "b": []})]
    path.write_bytes(path.read_bytes()[:-9])
    ((line, reason),) = read(path)[1]
    assert line == 1
    assert reason.startswith("damaged Parquet")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (row,) = read_rows(str(write(tmp_path / "a.txt", "one\n\ntwo\n")))
    assert isinstance(row, Row)
    assert row.is_document
    assert row.values == {"text": "one\n\ntwo\n"}
    assert read(write(tmp_path / "b.txt", b"one\n\xfftwo"))[1] == [(2, "not UTF-8: byte 0xff at offset 4")]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", "a,b\n"), ("a.csv", ""), ("a.txt", " \n")]
)
def test_a_file_without_rows_is_named(tmp_path: Path, name: str, content: str) -> None:
    assert read(write(tmp_path / name, content)) == ([], [(1, "the file holds no row")])


def test_files_are_found_by_path_folder_and_glob(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.csv", "README.md", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    names = lambda pattern: [str(path.relative_to(tmp_path)) for path in find_files(str(tmp_path / pattern))]  # noqa: E731
    assert names("a.jsonl") == ["a.jsonl"]
    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("**/*.csv") == ["deep/c.csv"]
    assert names("") == ["a.jsonl", "b.jsonl", "deep/c.csv"]
    assert [row.file for row in read_rows(str(tmp_path / "*.jsonl")) if isinstance(row, Row)] == [
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
    ]


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"did you mean train\.jsonl\?") as caught:
        find_files(str(tmp_path / "tain.jsonl"))
    assert str(tmp_path / "tain.jsonl") in str(caught.value)
    with pytest.raises(DataError, match="does not exist either"):
        find_files(str(tmp_path / "no" / "train.jsonl"))
    with pytest.raises(DataError, match="no such data file"):
        find_files(str(tmp_path / "*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in this folder"):
        find_files(str(tmp_path / "empty"))


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"files of kind \.xlsx are not read"):
        list(read_rows(str(write(tmp_path / "a.xlsx", "x"))))
