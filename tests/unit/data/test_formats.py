"""Rows out of files, each with its place; bad ones named, none lost."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
from pyarrow import ipc

from orchestrator.data.reading.formats import read_rows, sniff
from orchestrator.data.reading.row import Row, Unreadable
from orchestrator.errors import DataError
from tests.unit.data.reading import bad_rows, read, write

ROWS = [{"prompt": f"p{n}\n", "completion": f"ä, {n}; \t|"} for n in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def test_json_lines_keep_line_numbers_over_blank_lines_and_other_separators(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\n\n{"a": "x\u2028y\x85"}\r\n{"a": 3}')
    assert read(path) == ([(1, {"a": 1}), (3, {"a": "x\u2028y\x85"}), (4, {"a": 3})], [])


def test_json_lines_name_every_bad_row_and_read_on(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n' + b"[" * 99999 + b'\n{"a": 2}\n{"a": 1, "a": 2}\n'
    )
    good, bad = read(path)
    assert good == [(1, {"a": 1}), (6, {"a": 2})]
    assert [line for line, _ in bad] == [2, 3, 4, 5, 7]
    reasons = [reason for _, reason in bad]
    assert reasons[0] == "malformed JSON: Expecting value"
    assert reasons[1] == "a JSON list, expected an object"
    assert reasons[2].startswith("not UTF-8 (perhaps Latin-1")
    assert reasons[3].startswith("malformed JSON")
    assert reasons[4] == "a JSON object has the same key more than once"
    assert bad_rows(path)[2].detail == "byte 0xff at column 8"
    assert not any(row.ends_file for row in bad_rows(path))


ARRAY = '[\n {"a": 1,\n  "b": [{"c": "]"}]},\n\n {"a": 2}, {"a": 3}\n]\n'


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.json", ARRAY, [2, 5, 5]),
        ("a.jsonl", ARRAY, [2, 5, 5]),
        ("a.json", json.dumps([{"a": n} for n in (1, 2, 3)]), [1, 1, 1]),
        ("a.json", json.dumps([{"a": n} for n in (1, 2, 3)], indent=2), [2, 5, 8]),
        ("a", "\ufeff" + ARRAY.replace("\n]", ",\n]"), [2, 5, 5]),
        ("a.json", '{\n "version": "1",\n "data": ' + ARRAY + "}", [4, 7, 7]),
        ("a.json", '{"data": [{"a": 1}, {"a": 2}, {"a": 3}], "n": 3}', [1, 1, 1]),
        ("a.json", '{"meta": {"x": [1]}, "more": [1, 2],\n"rows": [{"a": 1},\n{"a": 2},\n{"a": 3}]}', [2, 3, 4]),
        ("a.json", '{"schema": {"fields": [{"name": "a"}]}, "data": [{"a": 1}, {"a": 2}, {"a": 3}]}', [1, 1, 1]),
        ("a.json", '{"a": 1}{"a": 2} {"a": 3}', [1, 1, 1]),
        ("a.json", '{\n "a": 1\n}\n{\n "a": 2\n}\n{"a": 3}', [1, 4, 7]),
        ("a.csv", '{"a": 1}\n{"a": 2}\n{"a": 3}\n', [1, 2, 3]),
        ("a.txt", '{"a": 1}\n{"a": 2}\n{"a": 3}\n', [1, 2, 3]),
        ("a.data", '{"a": 1}\n\n{"a": 2}\n{"a": 3}', [1, 3, 4]),
    ],
)
def test_json_is_found_by_its_content_with_the_line_of_every_row(
    tmp_path: Path, name: str, content: str, lines: list[int]
) -> None:
    good, bad = read(write(tmp_path / name, content))
    assert ([values["a"] for _, values in good], [line for line, _ in good], bad) == ([1, 2, 3], lines, [])


def test_a_large_array_is_read_in_pieces_with_exact_lines(tmp_path: Path) -> None:
    rows = [{"text": 'ä\\"]}' * (n % 50 * 20), "n": n} for n in range(4000)]
    good, bad = read(write(tmp_path / "a.json", json.dumps(rows, indent=1, ensure_ascii=False)))
    assert (good, bad) == ([(2 + 4 * n, row) for n, row in enumerate(rows)], [])
    long = [{"text": "x" * 5_000_000, "n": 1}, {"text": "", "n": 2}]
    assert read(write(tmp_path / "b.json", json.dumps(long)))[0] == [(1, row) for row in long]


@pytest.mark.parametrize(
    ("content", "num_rows", "line", "reason"),
    [
        ('[\n{"a": 1},\n{"a": 2', 1, 3, "malformed JSON"),
        ('[\n{"a": 1},\n', 1, 3, "the JSON array is not closed"),
        ('[\n{"a": 1}', 1, 2, "the JSON array is not closed"),
        ('[\n{"a": 1}\n{"a": 2}]', 1, 3, "malformed JSON: Expecting ','"),
        ('[\n{"a": 1},\n{"a": oops},\n{"a": 3}]', 1, 3, "malformed JSON: Expecting value"),
        ('{"train": [{"a": 1}],\n"test": [{"a": 2}]}', 1, 2, "the JSON object holds several lists of rows"),
        ('{\n"data": [{"a": 1}]}\n{"b": 1}', 1, 3, "text after the end of the JSON object"),
        ('[{"a": 1}]\n{"a": 2}', 1, 2, "text after the end of the JSON array"),
        ('[{"a": 1},\n{"a": "\xff"}]', 0, 1, "not UTF-8"),
        ('[{"a": 1},\n' + "[" * 99999, 1, 2, "malformed JSON"),
        ('{\n"a": 1\n}\n{\n"a": ', 1, 5, "malformed JSON"),
    ],
)
def test_damage_in_json_over_lines_ends_the_file_and_is_told(
    tmp_path: Path, content: str, num_rows: int, line: int, reason: str
) -> None:
    path = write(tmp_path / "a.json", content.encode("latin-1"))
    good, _ = read(path)
    (bad,) = bad_rows(path)
    assert len(good) == num_rows
    assert bad.line == line
    assert bad.reason.startswith(reason)
    assert bad.ends_file


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ('{"a": 1},', "malformed JSON: a comma after the object", "remove it, or put [ and ] around all lines"),
        ("{'a': 1}", "malformed JSON: single quotes", "column 2; written by Python's repr? use json.dumps"),
        ('{"a": "\x00"}', "NUL bytes, which text does not contain: the file is damaged, or was not written to its end", ""),
        ('"some words"', "a JSON text, expected an object", 'such as {"text": "..."}'),
        ('{"a": ' + "1" * 5000 + "}", "malformed JSON: a number of too many digits", ""),
        ('{"a": ' + "[" * 100_000, "malformed JSON: nested too deeply", ""),
    ],
)
def test_mistakes_of_whole_files_are_named_in_every_line(tmp_path: Path, line: str, reason: str, detail: str) -> None:
    bad = bad_rows(write(tmp_path / "a.jsonl", f"{line}\n{line}\n"))
    assert [(row.line, row.reason, row.detail) for row in bad] == [(n, reason, detail) for n in (1, 2)]


def test_a_few_nul_bytes_are_told_by_their_rows(tmp_path: Path) -> None:
    content = "prompt,completion\n" + "p,c\n" * 3 + "p,\x00\n" + "p,c\n" * 3
    good, bad = read(write(tmp_path / "a.csv", content), "prompt", "completion")
    assert len(good) == 6
    assert [(line, reason[:9]) for line, reason in bad] == [(5, "NUL bytes")]
    good, bad = read(write(tmp_path / "a.jsonl", LINES + "\x00" * 9000))
    assert len(good) == 5
    assert [(line, reason[:9]) for line, reason in bad] == [(6, "NUL bytes")]


def test_a_csv_under_the_name_of_json_is_read_as_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "prompt;completion\np;c\n")
    assert sniff(path, columns=("prompt", "completion")).label == "CSV with semicolons"
    assert sniff(path, columns=("text", "label")).kind == "JSON Lines"
    assert sniff(write(path, "prompt and completion\n"), columns=("prompt", "completion")).kind == "JSON Lines"


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}
CONTENTS = {
    ".jsonl": LINES,
    ".json": json.dumps(ROWS, indent=1),
    ".csv": "prompt,completion\n" + "".join(f'"p{n}\n","ä, {n}; \t|"\n' for n in range(5)),
    ".tsv": "prompt\tcompletion\n" + "".join(f'"p{n}\n"\t"ä, {n}; \t|"\n' for n in range(5)),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", CONTENTS)
def test_compressed_files_are_read_and_cut_ones_never_give_fewer_rows(tmp_path: Path, suffix: str, compression: str) -> None:
    content = COMPRESS[compression](CONTENTS[suffix].encode())
    for name in (f"a{suffix}{compression}", f"b{suffix}"):  # the content decides
        good, bad = read(write(tmp_path / name, content))
        assert ([values for _, values in good], bad) == (ROWS, [])
    twice = COMPRESS[compression](b"") + content
    assert len(read(write(tmp_path / f"c{suffix}{compression}", twice))[0]) == 5
    for cut in (len(content) - 3, len(content) // 2):
        (*_, bad_row) = bad_rows(write(tmp_path / f"d{suffix}{compression}", content[:cut]))
        assert bad_row.ends_file
        assert "cut short" in bad_row.reason
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 255
    if compression != ".zst":  # without a checksum, as most are written
        assert any(row.ends_file for row in bad_rows(write(tmp_path / f"e{suffix}{compression}", bytes(damaged))))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", CONTENTS)
def test_other_encodings_are_read_by_their_byte_order_mark(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = write(tmp_path / f"a{suffix}", CONTENTS[suffix].encode(encoding))
    good, bad = read(path)
    assert ([values for _, values in good], bad) == (ROWS, [])
    assert (encoding.upper() in sniff(path).label) == (encoding != "utf-8-sig")
    if encoding != "utf-8-sig":
        assert bad_rows(write(path, CONTENTS[suffix].encode(encoding)[:-1]))[-1].ends_file


def test_utf16_without_a_mark_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="UTF-16 without a byte order mark"):
        sniff(write(tmp_path / "a.jsonl", LINES.encode("utf-16-le")))


@pytest.mark.parametrize(("suffix", "content"), [(".csv", "a,b\nx,y\nk\xe4se,z\n"), (".jsonl", '{"a": 1}\n{"a": "k\xe4se"}\n')])
def test_latin1_is_one_reason_for_all_rows(tmp_path: Path, suffix: str, content: str) -> None:
    path = write(tmp_path / f"a{suffix}", (content * 3).encode("latin-1"))
    assert len({row.reason for row in bad_rows(path)}) == 1
    assert "iconv -f latin1" in bad_rows(path)[0].reason


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(tmp_path: Path, mark: str) -> None:
    others = ",;\t|".replace(mark, "")
    content = f"text{mark}label\n" + "".join(f"so{others} it goes{others * 2}{mark}x{n}\n" for n in range(8))
    for name in ("a.csv", "a.tsv"):
        assert [row["label"] for _, row in read(write(tmp_path / name, content))[0]] == [f"x{n}" for n in range(8)]


@pytest.mark.parametrize(
    ("name", "content", "columns", "expected"),
    [
        ("a.csv", "text\nhello; you | there\n", (), {"text": "hello; you | there"}),
        ("a.csv", 'text\n"hello, you"\n', (), {"text": "hello, you"}),
        ("a.csv", "sep=;\na;b\n1,5;2\n", (), {"a": "1,5", "b": "2"}),
        ("a.csv", '"sep=;"\na;b\n1,5;2\n', (), {"a": "1,5", "b": "2"}),
        ("a.csv", 'a, b\n1, "x, y"\n', (), {"a": "1", "b": "x, y"}),
        ("a.csv", "id|note;text;label\n1|2;x;y\n", ("text", "label"), {"text": "x", "label": "y"}),
        ("a.tsv", "a,b\n1,2\n", (), {"a": "1", "b": "2"}),
        ("a.csv", "a,b\n1,2\n3\n4,5,6\n7,8\n", (), {"a": "1", "b": "2"}),
    ],
)
def test_headers_decide_the_delimiter(
    tmp_path: Path, name: str, content: str, columns: tuple[str, ...], expected: dict[str, str]
) -> None:
    assert read(write(tmp_path / name, content), *columns)[0][0][1] == expected


def test_csv_places_are_where_a_row_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",x\n"a ""quote"", and \u2028",y\n\nlast,z\n')
    assert read(path) == (
        [
            (2, {"text": "two\nlines", "label": "x"}),
            (4, {"text": 'a "quote", and \u2028', "label": "y"}),
            (6, {"text": "last", "label": "z"}),
        ],
        [],
    )
    old = write(tmp_path / "b.csv", "text,label\ra,b\rc,d\r")
    assert [line for line, _ in read(old)[0]] == [2, 3]


def test_csv_names_ragged_and_malformed_rows_and_reads_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\na,x,extra\nb\n"c"d,y\n,\nok,z\n"c\nd\n"e,y\nok,z\n')
    good, bad = read(path)
    assert good == [(6, {"text": "ok", "label": "z"}), (10, {"text": "ok", "label": "z"})]
    assert [row.place.rpartition(":")[2] for row in bad_rows(path)] == ["2", "3", "4", "5", "7-9"]
    assert [reason for _, reason in bad[:2]] == ["more fields than the header", "fewer fields than the header"]
    assert bad[2][1].startswith("malformed CSV")
    assert bad[3][1] == "every field of the row is empty"


def test_an_open_quote_tells_how_many_lines_it_swallows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n" + "a,x\n" * 4 + '"b,x\n' + "a,x\n" * 35)
    good, _ = read(path)
    (bad,) = bad_rows(path)
    assert len(good) == 4
    assert (bad.line, bad.last_line, bad.ends_file) == (6, 41, True)
    assert bad.detail == "36 lines to the end of the file"


def test_only_columns_that_are_read_must_be_named_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b,b\n1,2,3\n")
    assert read(path)[1] == [(1, "the header names a column more than once")]
    assert read(path, "a") == ([(2, {"a": "1"})], [])


def columnar(path: Path, table: pa.Table) -> Path:
    """Write a table in the format of the path's suffix."""
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".feather":
        feather.write_feather(table, path)
    else:
        make = ipc.new_stream if path.suffix == ".stream" else ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


COLUMNAR = (".parquet", ".feather", ".arrow", ".stream")


@pytest.mark.parametrize("suffix", COLUMNAR)
def test_columns_of_tables_are_read_and_rows_count_from_one(tmp_path: Path, suffix: str) -> None:
    table = pa.table(
        {
            "a": pa.array(["x", None, "y"]).dictionary_encode(),
            "b": [[{"role": "user", "content": "hi"}], [], None],
            "far": pa.array([3_000_000] * 3, pa.int32()).cast(pa.date32()),
            "zone": pa.array([1] * 3, pa.timestamp("ns", "Mars/Olympus")),
        }
    )
    path = columnar(tmp_path / f"a{suffix}", table)
    assert read(path, "a", "b")[0] == [
        (1, {"a": "x", "b": [{"role": "user", "content": "hi"}]}),
        (2, {"a": None, "b": []}),
        (3, {"a": "y", "b": None}),
    ]
    far = [row.values for row in read_rows(sniff(path)) if isinstance(row, Row)]
    assert all(isinstance(row["far"], Unreadable) and isinstance(row["zone"], Unreadable) for row in far)
    assert far[0]["far"].text == "10183-09-21"


@pytest.mark.parametrize("suffix", COLUMNAR)
def test_damaged_tables_are_told_and_never_give_fewer_rows(tmp_path: Path, suffix: str) -> None:
    content = columnar(tmp_path / f"a{suffix}", pa.table({"a": [f"text {n}" for n in range(9)]})).read_bytes()
    for cut in (len(content) - 8, len(content) - 20, len(content) // 2, 12):
        (bad,) = bad_rows(write(tmp_path / f"b{suffix}", content[:cut]))
        assert bad.ends_file
        assert "damaged" in bad.reason
    assert bad_rows(write(tmp_path / "c.parquet", b"no table"))[0].reason == "damaged Parquet"


def test_a_stream_that_is_cut_between_batches_is_damaged(tmp_path: Path) -> None:
    content = columnar(tmp_path / "a.stream", pa.table({"a": ["x", "y", "z", "w"]})).read_bytes()
    (bad,) = bad_rows(write(tmp_path / "b.arrow", content[:-8]))
    assert bad.detail.startswith("the stream is not closed")


def test_values_that_python_cannot_hold_spoil_their_row_alone(tmp_path: Path) -> None:
    values = [{"when": datetime.datetime(2020, 1, 1), "what": "x"}, None]
    table = pa.table({"a": pa.array(values, pa.struct({"when": pa.timestamp("ns", "Mars/Olympus"), "what": pa.string()}))})
    rows = [row.values["a"] for row in read_rows(sniff(columnar(tmp_path / "a.parquet", table))) if isinstance(row, Row)]
    assert isinstance(rows[0], Unreadable)
    assert rows[1] is None


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", [(1, "one\ntwo\n\n\nthree\n")]),
        ("line", [(1, "one"), (2, "two"), (5, "three")]),
        ("paragraph", [(1, "one\ntwo"), (5, "three")]),
    ],
)
def test_documents_of_a_text_file(tmp_path: Path, documents: str, expected: list[tuple[int, str]]) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo\n\n\nthree\n")
    good, bad = read(path, text_documents=documents)
    assert ([(line, row["text"]) for line, row in good], bad) == (expected, [])
    (bad_row,) = bad_rows(write(tmp_path / "b.txt", b"one\n\xfftwo"))
    assert (bad_row.line, bad_row.ends_file) == (2, False)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", "a,b\n"), ("a.csv", ""), ("a.txt", " \n"), ("a.json", "[]"), ("a", "")],
)
def test_a_file_without_rows_is_named(tmp_path: Path, name: str, content: str) -> None:
    assert read(write(tmp_path / name, content)) == ([], [(1, "the file holds no row")])


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.xlsx", b"PK\x03\x04rest", "a zip archive or a spreadsheet"),
        ("a.csv", b"PK\x03\x04rest", "a zip archive or a spreadsheet"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        ("a.json", b"\n<!doctype html><html>", "an HTML page"),
        ("a.bin", b"\x01\x02 something", "of a kind that is not recognized"),
        ("a.yaml", b"a: 1\n", "of a kind that is not recognized"),
        ("a.parquet.gz", gzip.compress(b"PAR1rest", mtime=0), "Parquet inside gzip"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "gzip inside gzip"),
        ("a.pkl", b"\x80\x02}q", "a pickle"),
        ("a.tar", b"x" * 257 + b"ustar" + b"x" * 99, "a tar archive"),
    ],
)
def test_kinds_that_are_not_read_are_named_with_a_remedy(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        sniff(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(caught.value)
    assert caught.value.remedy
    assert "Parquet, Arrow and Feather" in caught.value.expected
