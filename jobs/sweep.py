"""Search layers x learning rate, refit, merge, verify, bundle:

    ray job submit --working-dir . -- python -m jobs.sweep SPEC

The same call as `orchestrator sweep`, with the same options and exit codes.
"""

import sys

from orchestrator.cli.commands import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
