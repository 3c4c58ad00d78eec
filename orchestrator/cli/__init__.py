"""The command line: `orchestrator COMMAND`."""

from orchestrator.cli.commands import main

__all__ = ["main"]
