"""Format bytes, tokens, counts, seconds and untrusted text for people."""

from __future__ import annotations

KIB = 1024
MIB = 1024**2
GIB = 1024**3


def format_bytes(num_bytes: float) -> str:
    """Format a size: `1536` -> `1.5 KiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_count(count: float) -> str:
    """Format a count: `6950000` -> `6.95M`."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            return f"{count / limit:.3g}{suffix}"
    return f"{count:g}"


def format_flops(operations: float) -> str:
    """Format operations: `2.24e10` -> `22.4 GFLOP`."""
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(operations) >= limit:
            return f"{operations / limit:.3g} {prefix}FLOP" if operations < 1e21 else f"{operations / limit:.0f} {prefix}FLOP"
    return f"{operations:.0f} FLOP"


def format_seconds(seconds: float) -> str:
    """Format a time: `75.2` -> `1m15s`; below a minute with one decimal."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def printable(text: str) -> str:
    """Return `text` with control characters, line breaks and unpaired surrogates as escapes, so that no terminal interprets
    them.

    `"\\x1b[31mred"` -> `"\\\\x1b[31mred"`. What a user reads out of data, file names, classes and column names goes through here.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)


def printable_lines(text: str) -> str:
    """Return `text` like `printable`, but keep its line feeds: for a message of several lines."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def quoted(name: str) -> str:
    """Return `printable` text in quotes: `'label'`."""
    return f"'{printable(name)}'"
