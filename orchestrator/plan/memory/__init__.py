"""Memory of one rank, term by term.

`footprint.py` derives from a base and a selection what does not depend on the configuration of the gang: the size of the
weights (`quantized.py`, to the byte) and of the activations that blocks keep (`activations.py`; `counted.py` for layouts whose
blocks were counted on their class). `candidate.py` is one configuration. Together they give the resident memory (`resident.py`,
with `shards.py` for what the training engines hold, to the byte) and the transient memory of each phase of a step
(`transient.py`); `estimate.py` adds them up.
"""
