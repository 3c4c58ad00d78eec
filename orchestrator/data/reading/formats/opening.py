"""Open files: decompress, decode, detect damage."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

COMPRESSIONS = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00"}
"""Compression by the first bytes of the file."""
COMPRESSION_SUFFIXES = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""Errors raised while reading a damaged or truncated file or compressed stream."""
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
"""Encoding by byte order mark, the longer ones first."""
NOT_UTF8 = "not UTF-8 (perhaps Latin-1: `iconv -f latin1 -t utf-8` converts it)"
CHUNK = 1 << 20


def compression_of(head: bytes) -> str:
    """Return the compression that a file's first bytes show; empty if none."""
    return next((name for name, magic in COMPRESSIONS.items() if head.startswith(magic)), "")


def open_bytes(path: Path, compression: str) -> IO[bytes]:
    """Open the uncompressed content as a buffered stream.

    Raises:
        OSError: the file cannot be opened. Reading raises one of DAMAGE.
    """
    if compression == "zstd":
        import pyarrow as pa

        return io.BufferedReader(cast("io.RawIOBase", pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")), CHUNK)
    if not compression:
        return path.open("rb", buffering=CHUNK)
    openers = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    return io.BufferedReader(cast("io.RawIOBase", openers[compression](path, "rb")), CHUNK)


def encoding_of(head: bytes) -> str:
    return next((name for mark, name in ENCODINGS if head.startswith(mark)), "utf-8")


def text_chunks(stream: IO[bytes], encoding: str) -> Iterator[str]:
    """Yield the content in pieces of about 1 MiB.

    Raises:
        UnicodeDecodeError: it is not of this encoding.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    while piece := stream.read(CHUNK):
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)
