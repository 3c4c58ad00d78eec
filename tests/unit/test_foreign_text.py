"""Text out of data, file names, columns, classes and labels: no terminal obeys it, and no file or log breaks of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from orchestrator.cli.commands import app
from orchestrator.errors import DataError, SpecError, SpecProblem, UsageError
from orchestrator.report.console import SafeConsole
from orchestrator.report.terminal import JsonView, LogView, SweepView
from orchestrator.store import append_jsonl, read_json, read_jsonl, write_json
from orchestrator.transfer.run_view import RunView
from orchestrator.units import printable, printable_lines
from orchestrator.values import printable_json

NASTY = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b31m\r\x08\u202eevil\x7f\udcff"
foreign = st.text(st.characters(codec=None), max_size=40) | st.sampled_from([NASTY, "\x1b[0m", "[red]", "[/]", ":smile:"])


def obeyed(text: str) -> list[str]:
    """Characters that a terminal may act on, or that cannot be written."""
    return [char for char in text if char != "\n" and not char.isprintable()]


@given(text=foreign)
def test_what_is_printable_is_kept_and_all_else_is_spelled_out(text: str) -> None:
    assert not obeyed(printable(text))
    assert "\n" not in printable(text)
    assert printable_lines(text).count("\n") == text.count("\n")
    assert printable(printable(text)) == printable(text)
    if text.isprintable():
        assert printable(text) == printable_lines(text) == text


@given(text=foreign)
def test_json_says_the_same_and_is_printable(text: str) -> None:
    written = printable_json(json.dumps({text: [text]}, ensure_ascii=False, indent=2))
    assert not obeyed(written)
    assert json.loads(written) == {text: [text]}
    written.encode()


@given(text=foreign)
def test_errors_spell_out_what_they_quote(text: str) -> None:
    for error in (
        DataError(text, where=text, expected=text, remedy=text),
        UsageError(text),
        SpecError([SpecProblem(text, text, text, 1, 2, text)]),
    ):
        assert not obeyed(str(error))
    assert str(SpecProblem("a", text)).count("\n") == 0, "a problem of a spec is one line"


@given(text=foreign)
def test_views_of_a_run_spell_out_what_they_show(text: str) -> None:
    stream, lines, live = io.StringIO(), io.StringIO(), io.StringIO()
    table = SweepView(SafeConsole(file=live, width=100, color_system=None))
    views: list[RunView] = [LogView(stream), JsonView(lines), table]
    for view in views:
        view.phase(text, text)
        view.event(text, text, field=text)
        view.event("warning", text)
    SafeConsole(file=live, width=100, color_system=None).print(table.render())
    for written in (stream, lines, live):
        assert not obeyed(written.getvalue())
    assert json.loads(lines.getvalue().splitlines()[1])["message"] == text


@given(text=foreign)
def test_a_console_shows_cells_and_brackets_as_they_are(text: str) -> None:
    file = io.StringIO()
    table = Table()
    table.add_column("column")
    table.add_row(text)
    table.add_row(Text(text))
    SafeConsole(file=file, width=100, color_system=None).print(table, text)
    assert not obeyed(file.getvalue())


def test_a_console_keeps_its_own_colours() -> None:
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=True, color_system="standard").print(Text("[b]\x1b[31m", style="green"))
    assert file.getvalue() == "\x1b[32m[b]\\x1b[31m\x1b[0m\n"


@given(text=foreign)
def test_records_hold_any_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("records")
    write_json(folder / "a.json", {"text": text})
    append_jsonl(folder / "a.jsonl", {"text": text})
    assert read_json(folder / "a.json") == {"text": text}
    assert read_jsonl(folder / "a.jsonl") == [{"text": text}]


def spec_of(folder: Path, data: Path, columns: str) -> Path:
    spec = folder / "spec.yaml"
    fields = {"task": "classify", "name": "a", "base": {"model": "sample"}, "search": {"layers": ["head"]}}
    fields["data"] = {"train": str(data), "columns": json.loads(columns)}
    spec.write_text(json.dumps(fields))  # JSON is YAML
    return spec


def wrong_column(folder: Path) -> Path:
    (folder / "a.jsonl").write_text(json.dumps({"text\x1b[31m": "x", "label\x9b": "y"}) + "\n")
    return spec_of(folder, folder / "a.jsonl", json.dumps({"text": "te\u001b[2Jxt", "label": "label"}))


def wild_classes(folder: Path) -> Path:
    rows = [{"text": f"row {number} {NASTY[:-1]}", "label": f"\x1b[3{number % 2}m\r"} for number in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return spec_of(folder, folder / "a.jsonl", json.dumps({"text": "text", "label": "label"}))


def wild_file(folder: Path) -> Path:
    file = folder / "a\x1b[31m\x9b.jsonl"
    rows = [{"text": f"row {number}", "label": f"class {number % 2}"} for number in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"text": "x"}\n')
    return spec_of(folder, folder, json.dumps({"text": "text", "label": "label"}))


@pytest.mark.parametrize("make", [wrong_column, wild_classes, wild_file])
@pytest.mark.parametrize("command", ["data", "plan", "render"])
def test_commands_print_nothing_that_a_terminal_obeys(tmp_path: Path, make: Callable[[Path], Path], command: str) -> None:
    (tmp_path / "data").mkdir()
    spec = make(tmp_path / "data")
    spec = spec.rename(tmp_path / "spec.yaml")
    for extra in ([], ["--json"]):
        done = CliRunner().invoke(app, [command, str(spec), *extra])
        assert not obeyed(done.output), done.output
        assert "this is a bug" not in done.output
