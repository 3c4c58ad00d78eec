"""The values that pass between planner, runtime and trainer: trials, assignments, results, executions, artifacts."""
