"""Read rows, one module per file format: the content decides the format, and every row has its place."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.data.reading.formats.columnar import count_rows, read_columnar
from orchestrator.data.reading.formats.csv_rows import read_csv
from orchestrator.data.reading.formats.documents import read_text
from orchestrator.data.reading.formats.json_rows import read_json, read_json_lines
from orchestrator.data.reading.formats.sniff import READ, SUFFIXES, DataFile, data_suffix, sniff
from orchestrator.data.reading.row import BadRow, ChooseColumns, Row, all_columns
from orchestrator.spec.models import TextDocuments

__all__ = ["READ", "SUFFIXES", "DataFile", "count_rows", "data_suffix", "read_rows", "sniff"]


def read_rows(
    file: DataFile, choose: ChooseColumns = all_columns, *, text_documents: TextDocuments = "file"
) -> Iterator[Row | BadRow]:
    """Yield every row of a file, in order. A file without rows gives a `BadRow`.

    Args:
        choose: Gets the names of a table's columns (CSV, Parquet, Arrow) and gives those that are read.
        text_documents: What a document of a text file is.
    """
    is_empty = True
    for row in _rows(file, choose, text_documents):
        is_empty = False
        yield row
    if is_empty:
        yield BadRow(str(file.path), 1, "the file holds no row")


def _rows(file: DataFile, choose: ChooseColumns, text_documents: TextDocuments) -> Iterator[Row | BadRow]:
    if file.kind == "JSON Lines":
        return read_json_lines(file)
    if file.kind == "JSON":
        return read_json(file)
    if file.kind == "CSV":
        return read_csv(file, choose)
    if file.kind == "text":
        return read_text(file, text_documents)
    return read_columnar(file, choose)
