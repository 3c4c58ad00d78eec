"""What one rank needs, term by term.

`footprint.py` weighs a selection on a base: its weights (`quantized.py`: to the byte) and what its blocks keep
(`activations.py`). `way.py` is one way to run it. From both follow what a rank holds all the time (`held.py`, with
`shards.py` and `reduction.py` for what DeepSpeed's engines hold, to the byte) and what comes and goes (`moving.py`);
`estimate.py` puts them together.
"""
