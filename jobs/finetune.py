"""Train the one trial of a spec, merge, verify, bundle:

    ray job submit --working-dir . -- python -m jobs.finetune SPEC

The same call as `orchestrator finetune`, with the same options and exit codes.
"""

import sys

from orchestrator.cli.commands import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
