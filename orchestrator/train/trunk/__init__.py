"""The trunk, computed once: hidden states at a cut, stored per document, which replace the blocks below the cut in training.

port.py     skip the blocks below a cut and feed stored states to those above; or record states at several cuts
chunks.py   states of a set at one cut, in checksummed pieces on local disk or in memory
cache.py    the local folder of such sets, by content, under a budget
states.py   rows of a micro-batch out of the pieces
build.py    one forward pass for what is missing, shared by all processes that want it
"""
