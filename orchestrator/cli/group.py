"""The command line's help, with commands in groups, and its version."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from orchestrator import __version__

GROUPS: dict[str, tuple[str, ...]] = {
    "Prepare": ("init", "render", "data", "plan", "doctor"),
    "Train": ("sweep", "finetune", "merge"),
    "Look at runs": ("runs", "compare", "report"),
    "Use a bundle": ("chat", "predict", "verify"),
}
"""Heading in `--help` -> commands, in the order of a typical workflow."""
EPILOG = (
    """A first spec of your own: orchestrator init DATA.jsonl --base FOLDER. Options of a command: orchestrator COMMAND --help."""
)


class GroupedHelp(TyperGroup):
    """A command group whose help lists commands by purpose."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        listed = {name for names in GROUPS.values() for name in names}
        groups = GROUPS | {"Other": tuple(sorted(set(self.commands) - listed))}
        for heading, names in groups.items():
            rows = [(name, self.commands[name].get_short_help_str(200)) for name in names if name in self.commands]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def print_version(asked: bool) -> None:
    """Print the version and exit, as the callback of `--version`."""
    if asked:
        print(f"orchestrator {__version__}")
        raise typer.Exit
