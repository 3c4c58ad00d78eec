"""What a run takes: operations, hours, money, disk.

`flops.py` counts the operations of one token, `accelerators.py` knows what a GPU reaches at most, `estimate.py` makes hours
and bytes of it for the whole run, and `calibration.py` does so again at the rate that the run's first steps reach.
"""
