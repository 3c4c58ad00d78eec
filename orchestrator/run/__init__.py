"""A run on disk, without Ray: what the driver writes and what reports read, by the same functions.

layout        names of the files in a run's folder
directory     the folder while a driver has it locked: spec, base, lock
ledger        trials, their rungs and ends
scoring       from a rung's result to the score that the search minimises
records       the summary of trials and runs that is shown; sweep.json and transfer.json
hours         GPU-hours used, and whether more work may start
activities    what a run is doing at this moment
reader        all of it, tolerating missing or damaged files: `read_run(folder)`
"""
