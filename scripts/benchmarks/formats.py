"""Measure the cost of reading: CPU seconds and peak memory for rows of every format, and for the whole preparation of one.

    scripts/bench formats [--rows 1000000] [--only jsonl parquet ...] [--json]

Each format is read in a process of its own (`read_examples`); `prepare` is `prepare_data` over JSON Lines: reading, splits,
tokens and masks, written to disk.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import gzip
import json
import lzma
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHUNK_ROWS = 10_000
Write = Callable[[Path, int], None]


def pairs(count: int) -> Iterator[dict[str, Any]]:
    """Rows of about 150 bytes, with a column that nothing reads."""
    for number in range(count):
        yield {
            "id": number,
            "prompt": f"Where is kettle number {number}, and which of the {number % 97} shelves holds it?",
            "completion": f"kettle {number} is in shed {number * 7919 % 1009}",
        }


def chats(count: int) -> Iterator[dict[str, Any]]:
    for row in pairs(count):
        yield {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}


def _lines(rows: Iterator[dict[str, Any]], path: Path, opener: Callable[..., Any] = open) -> None:
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _array(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.write("[\n")
        file.writelines(f"{',' if row['id'] else ''}{json.dumps(row, indent=1)}\n" for row in pairs(count))
        file.write("]\n")


def _csv(path: Path, count: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "completion"], delimiter=";")
        writer.writeheader()
        writer.writerows(pairs(count))


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[Any]:
    import itertools

    import pyarrow as pa

    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield pa.RecordBatch.from_pylist(chunk)


def _parquet(rows: Iterator[dict[str, Any]], path: Path) -> None:
    from pyarrow import parquet

    found = _batches(rows)
    first = next(found)
    with parquet.ParquetWriter(path, first.schema) as writer:
        writer.write_batch(first)
        for batch in found:
            writer.write_batch(batch)


def _arrow(path: Path, count: int) -> None:
    from pyarrow import ipc

    found = _batches(pairs(count))
    first = next(found)
    with ipc.new_stream(str(path), first.schema) as writer:
        writer.write_batch(first)
        for batch in found:
            writer.write_batch(batch)


def _zstd(path: Path, count: int) -> None:
    import pyarrow as pa

    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
        for row in pairs(count):
            file.write((json.dumps(row) + "\n").encode())


FORMATS: dict[str, tuple[str, str, Write]] = {
    "jsonl": ("completion", "rows.jsonl", lambda path, count: _lines(pairs(count), path)),
    "array": ("completion", "rows.json", _array),
    "gz": ("completion", "rows.jsonl.gz", lambda path, count: _lines(pairs(count), path, gzip.open)),
    "zst": ("completion", "rows.jsonl.zst", _zstd),
    "bz2": ("completion", "rows.jsonl.bz2", lambda path, count: _lines(pairs(count), path, bz2.open)),
    "xz": ("completion", "rows.jsonl.xz", lambda path, count: _lines(pairs(count), path, lzma.open)),
    "csv": ("completion", "rows.csv", _csv),
    "parquet": ("completion", "rows.parquet", lambda path, count: _parquet(pairs(count), path)),
    "arrow": ("completion", "rows.arrow", _arrow),
    "chat": ("chat", "chats.jsonl", lambda path, count: _lines(chats(count), path)),
    "chat-parquet": ("chat", "chats.parquet", lambda path, count: _parquet(chats(count), path)),
    "prepare": ("completion", "rows.jsonl", lambda path, count: _lines(pairs(count), path)),
}
"""By name: task, file, and what writes it."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench formats", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(_measure(options.measure[0], Path(options.measure[1]))))
        return
    results: list[dict[str, Any]] = []
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="bench-formats-") as folder:
            FORMATS[name][2](Path(folder) / FORMATS[name][1], options.rows)
            command = [sys.executable, __file__, "--measure", name, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            results.append({"format": name, "rows": options.rows, **json.loads(done.stdout)})
        if not options.json:
            print(_text(results[-1]), flush=True)
    if options.json:
        print(json.dumps(results))


def _measure(name: str, folder: Path) -> dict[str, float]:
    """Processor seconds and peak memory of reading, without those of starting the interpreter and its imports."""
    from orchestrator.data import prepare_data
    from orchestrator.data.reading.gather import find_sources, read_examples
    from orchestrator.data.summary import LeftOut
    from orchestrator.samples import SAMPLE_BASE
    from orchestrator.spec import load_spec

    task, file, _ = FORMATS[name]
    spec = {"name": "bench", "base": {"model": "sample"}, "task": task, "data": {"train": file}, "finetune": {}}
    (folder / "spec.yaml").write_text(json.dumps(spec))
    loaded = load_spec(folder / "spec.yaml")
    start = time.process_time()
    if name == "prepare":
        prepare_data(loaded, SAMPLE_BASE, folder / "out")
    else:
        left_out = LeftOut(folder)
        read_examples(loaded.spec, find_sources(loaded, left_out), left_out)
    seconds = time.process_time() - start
    return {"processor_seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _text(result: dict[str, Any]) -> str:
    seconds, peak = result["processor_seconds"], result["peak_bytes"] / 2**30
    return f"{result['format']:>13}  {result['rows']:>9,} rows  {seconds:7.1f} s of processor  {peak:6.2f} GiB"


if __name__ == "__main__":
    main()
