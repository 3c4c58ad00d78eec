"""Cost of a run: operations, hours, price and disk space.

`flops.py` counts the operations of one token (`blocks.py` those of the blocks), `choices.py` those of one trial of each choice,
`accelerators.py` lists the peak rate of GPUs, `estimate.py` turns them into hours and bytes for the whole run, `disk.py` counts
what it leaves on disk, and `duration.py` estimates wall-clock time, again once the run's first steps have been measured.
"""
