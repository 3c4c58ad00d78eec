"""Printing of the commands, and their `--json` option."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.units import printable
from orchestrator.values import Value, printable_json, strict_json

if TYPE_CHECKING:
    from rich.console import RenderableType

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print strict JSON: NaN and infinity become null."""
    text = json.dumps(strict_json(value), indent=indent, ensure_ascii=False, allow_nan=False)
    print(printable_json(text), flush=True)


def print_facts(value: Value) -> None:
    """Print one line per field."""
    for name, content in value.model_dump(mode="json").items():
        print(printable(f"{name.replace('_', ' '):<24} {content}"))


def print_rich(content: RenderableType) -> None:
    """Print in at most 100 columns, without control codes where stdout is not a terminal."""
    from orchestrator.report.console import SafeConsole

    console = SafeConsole()
    console.width = min(100, console.width) if console.is_terminal else 100
    console.print(content)
