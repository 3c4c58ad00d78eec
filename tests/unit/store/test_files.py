"""Single files: old or new, never half."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.errors import IntegrityError
from orchestrator.store import append_jsonl, files, read_json, read_jsonl, sampled_sha256, sha256_file, write_atomic, write_json
from orchestrator.values import Value

OLD, NEW = b"old" * 1000, b"new" * 5000


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path, killed_everywhere) -> None:
    path = tmp_path / "state.json"
    seen = set()
    for where in killed_everywhere(lambda: write_atomic(path, NEW), lambda: path.write_bytes(OLD) and None):
        content = path.read_bytes()
        assert content in (OLD, NEW), where
        seen.add(content)
    assert seen == {OLD, NEW}, "the deaths should fall on both sides of the rename"


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a" / "state.json"
    path.parent.mkdir()
    path.mkdir()
    with pytest.raises(OSError, match=r"state\.json"):
        write_atomic(path, "x")
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]


def test_readers_never_see_half_a_file_while_a_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"number": -1, "filler": []})
    script = (
        "import itertools, sys; from pathlib import Path; from orchestrator.store import write_json\n"
        "for number in itertools.count():\n"
        "    write_json(Path(sys.argv[1]), {'number': number, 'filler': [number] * 20_000})\n"
    )
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", script, str(path)])
        begun = time.monotonic()
        before = path.stat().st_ino
        while path.stat().st_ino == before or time.monotonic() - begun < 0.5:
            value = read_json(path)
            assert set(value["filler"]) <= {value["number"]}
            assert time.monotonic() - begun < 60
        writer.kill()
        writer.wait()
        value = read_json(path)
        assert set(value["filler"]) == {value["number"]}


class Figures(Value):
    loss: float | None
    best: float
    metrics: dict[str, float]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_what_json_cannot_say_is_written_by_name_and_read_back(tmp_path: Path) -> None:
    figures = Figures(loss=math.nan, best=-math.inf, metrics={"perplexity": math.inf})
    write_json(tmp_path / "a.json", figures)
    append_jsonl(tmp_path / "a.jsonl", {"name": "ü\u2028", **figures.model_dump()})
    for file in ("a.json", "a.jsonl"):
        json.loads((tmp_path / file).read_text(), parse_constant=refuse)
    for found in (Figures.model_validate(read_json(tmp_path / "a.json")), read_jsonl(tmp_path / "a.jsonl")[0]):
        plain = found.model_dump() if isinstance(found, Figures) else found
        assert math.isnan(float(plain["loss"]))
        assert float(plain["best"]) == -math.inf
        assert float(plain["metrics"]["perplexity"]) == math.inf
    assert read_jsonl(tmp_path / "a.jsonl")[0]["name"] == "ü\u2028"


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_a_torn_line_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    assert read_jsonl(path) == []
    for step in range(3):
        append_jsonl(path, {"step": step, "note": "two\u2028parts\x85and\nmore"})
    whole = path.read_bytes()
    lines = whole.count(b"\n")
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = [row["step"] for row in read_jsonl(path)]
        assert kept == [0, 1, 2][: len(kept)]
        append_jsonl(path, {"step": 9})
        assert [row["step"] for row in read_jsonl(path)] == [*kept, 9]
    assert lines == 3


def test_lines_of_killed_appenders_are_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    script = (
        "import itertools, sys, time; from pathlib import Path; from orchestrator.store import append_jsonl, read_jsonl\n"
        "begin = len(read_jsonl(Path(sys.argv[1])))\n"
        "for number in itertools.count(begin):\n"
        "    append_jsonl(Path(sys.argv[1]), {'number': number, 'filler': 'x' * (number % 7 * 9000)})\n"
        "    time.sleep(0.002)\n"
    )
    for _ in range(2):
        before = len(read_jsonl(path))
        writer = subprocess.Popen([sys.executable, "-c", script, str(path)])
        begun = time.monotonic()
        while len(rows := read_jsonl(path)) < before + 20:
            assert [row["number"] for row in rows] == list(range(len(rows)))
            assert time.monotonic() - begun < 60
        writer.kill()
        writer.wait()
        rows = read_jsonl(path)
        assert [row["number"] for row in rows] == list(range(len(rows)))
        assert all(len(row["filler"]) == row["number"] % 7 * 9000 for row in rows)


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "big").write_bytes(b"x" * (9 * 1024**2 + 1))
    assert sha256_file(tmp_path / "big") != sha256_file(tmp_path / "a")


def test_a_large_file_is_known_by_its_size_and_spread_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "NUM_SAMPLES", 4)
    monkeypatch.setattr(files, "SAMPLE_BYTES", 10)
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    contents = [bytes(1000), bytes(1001), b"x" + bytes(999), bytes(999) + b"x", bytes(335) + b"x" + bytes(664)]
    hashes = set()
    for number, content in enumerate(contents):
        (tmp_path / f"{number}").write_bytes(content)
        hashes.add(sampled_sha256(tmp_path / f"{number}"))
    assert len(hashes) == len(contents)
    (tmp_path / "small").write_bytes(bytes(300))
    assert sampled_sha256(tmp_path / "small") == sha256_file(tmp_path / "small")
