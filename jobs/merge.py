"""Merge a trial of a finished run into a verified bundle:

    ray job submit --working-dir . -- python -m jobs.merge RUN

The same call as `orchestrator merge`, with the same options and exit codes.
"""

import sys

from orchestrator.cli.commands import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
