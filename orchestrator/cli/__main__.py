"""`python -m orchestrator.cli`: the command line."""

from orchestrator.cli.commands import main

main()
