"""What `scripts/same_numbers` runs: two versions of the code train the same jobs, and every figure is compared.

Nothing here imports the orchestrator: both versions are run as processes, and their run folders are read as files.
"""
