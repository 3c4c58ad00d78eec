"""The trunk, paid for once: hidden states at a cut, stored per document, and where they enter a model instead of its blocks.

port.py     blocks below a cut stand still and stored states enter above them; or states are taken at several cuts
chunks.py   states of a set at one cut, in checksummed pieces on local disk or in memory
cache.py    the local folder of such sets, by content, under a budget
states.py   rows of a micro-batch out of the pieces
build.py    one forward pass for what is missing, shared by all processes that want it
"""
