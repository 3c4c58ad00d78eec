"""The command line: `orchestrator COMMAND`."""

from orchestrator.cli.commands import app, main

__all__ = ["app", "main"]
