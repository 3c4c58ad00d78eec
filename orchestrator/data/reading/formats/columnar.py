"""Read rows from Parquet, Arrow IPC and Feather files: only the needed columns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.data.reading.formats.sniff import DataFile
from orchestrator.data.reading.row import BadRow, ChooseColumns, Row, RowError, Unreadable
from orchestrator.units import printable

BATCH_ROWS = 4096
STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Bytes that close an Arrow stream."""


def read_columnar(file: DataFile, choose: ChooseColumns) -> Iterator[Row | BadRow]:
    """Yield rows; a row's line is its number, from 1."""
    import pyarrow as pa

    name, line = str(file.path), 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pyarrow's about Feather V1
            for names, batch in _batches(file, choose):
                columns = [_values(batch.column(index)) for index in range(len(names))]
                for values in zip(*columns, strict=True):
                    line += 1
                    yield Row(dict(zip(names, values, strict=True)), name, line, has_absent_as_null=True)
    except RowError as problem:
        yield BadRow(name, 1, problem.reason, problem.detail, ends_file=True)
    except (OSError, ValueError, EOFError, pa.ArrowException) as error:
        detail = printable(next(iter(str(error).splitlines()), type(error).__name__))
        yield BadRow(name, line + 1, f"damaged {file.kind}", detail, ends_file=True)


def count_rows(file: DataFile) -> int:
    """Return the number of rows, from the file's metadata if it has any.

    Raises:
        OSError, ValueError: it is damaged.
    """
    import pyarrow as pa
    from pyarrow import ipc, parquet

    if file.kind == "Parquet":
        return parquet.read_metadata(file.path).num_rows
    if file.kind == "Feather V1":
        return _feather_v1(file, lambda names: names[:1]).num_rows
    with pa.memory_map(str(file.path)) as source:
        if file.kind == "Arrow":
            return ipc.open_file(source).count_rows()
        return sum(batch.num_rows for batch in ipc.open_stream(source))


def _batches(file: DataFile, choose: ChooseColumns) -> Iterator[tuple[Sequence[str], Any]]:
    """Yield (names, record batch of these columns in this order) for the whole file."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    if file.kind == "Parquet":
        # Read in batches: a whole file may not fit in memory.
        with parquet.ParquetFile(file.path) as table:
            names = _chosen(table.schema_arrow.names, choose)
            for batch in table.iter_batches(BATCH_ROWS, columns=names):
                yield names, batch.select(names)
        return
    if file.kind == "Feather V1":
        table = _feather_v1(file, choose)
        for batch in table.to_batches(BATCH_ROWS):
            yield table.column_names, batch
        return
    with pa.memory_map(str(file.path)) as source:
        if file.kind == "Arrow":
            reader = ipc.open_file(source)
            found = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            _check_end(file)
            reader = found = ipc.open_stream(source)
        names = _chosen(reader.schema.names, choose)
        for batch in found:
            # A stored batch may hold millions of rows; Python objects are made for a slice at a time.
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield names, batch.select(names).slice(start, BATCH_ROWS)


def _feather_v1(file: DataFile, choose: ChooseColumns) -> Any:
    from pyarrow import feather

    names = feather.read_table(file.path, memory_map=True).column_names
    return feather.read_table(file.path, columns=_chosen(names, choose))


def _check_end(file: DataFile) -> None:
    """Check that the stream was closed: one that is truncated between two batches would silently give fewer rows.

    Raises:
        ValueError: it was not.

    """
    with file.path.open("rb") as stream:
        stream.seek(max(0, file.path.stat().st_size - 8))
        if not stream.read().endswith(STREAM_END):
            raise ValueError("the stream is not closed: the file is cut short")


def _chosen(names: Sequence[str], choose: ChooseColumns) -> list[str]:
    chosen = list(choose(names))
    twice = sorted({name for name in chosen if list(names).count(name) > 1})
    if twice:
        raise RowError("the table has a column more than once", printable(", ".join(map(repr, twice))))
    return chosen


def _values(array: Any) -> list[Any]:
    """Return Python values of a column; dates, times and types that Python cannot represent are `Unreadable`."""
    from pyarrow import types

    kind = array.type
    # Dates have no canonical text, and some values are outside the range of Python's types.
    if types.is_temporal(kind):
        return [_unreadable(value, str(kind)) for value in array]
    try:
        return array.to_pylist(maps_as_pydicts="lossy")
    except Exception:  # whatever one value raises, the others can be read
        return [_value(value, str(kind)) for value in array]


def _value(scalar: Any, kind: str) -> Any:
    try:
        return scalar.as_py()
    except Exception:  # pyarrow raises ValueError, OverflowError, UnicodeDecodeError and errors of its own
        return Unreadable(kind, "")


def _unreadable(scalar: Any, kind: str) -> Unreadable | None:
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    try:
        return Unreadable(kind, str(scalar.cast(pa.string()).as_py()))
    except Exception:  # an unknown time zone, for example
        return Unreadable(kind, "")
