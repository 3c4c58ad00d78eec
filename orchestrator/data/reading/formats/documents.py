"""Read text files: each file, line or paragraph is a document."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.data.reading.formats.json_rows import cut_short
from orchestrator.data.reading.formats.opening import DAMAGE, NOT_UTF8, open_bytes
from orchestrator.data.reading.formats.sniff import DataFile
from orchestrator.data.reading.row import BadRow, Row
from orchestrator.spec.models import TextDocuments


def read_text(file: DataFile, documents: TextDocuments) -> Iterator[Row | BadRow]:
    """Yield documents with the line on which each begins; blank ones are skipped."""
    name = str(file.path)
    try:
        with open_bytes(file.path, file.compression) as stream:
            content = stream.read()
    except DAMAGE as error:
        yield cut_short(file, 1, error)
        return
    try:
        text = content.decode(file.encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reason = NOT_UTF8 if "utf-8" in file.encoding else f"damaged {file.encoding.upper()}"
        yield BadRow(
            name, line, reason, f"byte 0x{content[error.start]:02x} at offset {error.start}", ends_file=documents != "file"
        )
        return
    for line, document in _documents(text, documents):
        if document.strip():
            yield Row({"text": document}, name, line, is_document=True)


def _documents(text: str, documents: TextDocuments) -> Iterator[tuple[int, str]]:
    if documents == "file":
        yield 1, text
        return
    lines = text.replace("\r\n", "\n").split("\n")
    if documents == "line":
        yield from enumerate(lines, 1)
        return
    start = 0
    for index in range(len(lines) + 1):
        if index == len(lines) or not lines[index].strip():
            if index > start:
                yield start + 1, "\n".join(lines[start:index])
            start = index + 1
