"""Compare two versions of the code: both train the same jobs, and every figure is compared. Run by `scripts/same_numbers`.

Nothing here imports the orchestrator: both versions are run as processes, and their run folders are read as files.
"""
