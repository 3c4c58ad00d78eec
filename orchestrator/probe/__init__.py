"""A short process that builds a base's class without memory and says what it consists of.

    python -m orchestrator.probe QUESTION.json ANSWER.json

The plan must not import torch, so `anatomy/learned.py` starts this module as a process of its own and reads its answer
(`anatomy/learning.py`). Nothing else imports it.

1. `classes.py` finds the transformers class for the config and the kind of head, and builds it on the meta device.
2. `structure.py` finds the blocks, the embeddings, the norm after the last block and the head, by modules and not by names.
3. `facts.py` reads what the plan needs to know of them: norms, MLP, experts, dropout, scaled logits.
4. `names.py` finds the stored tensors of each parameter.
5. `shrink.py` makes a tiny model of the same class, on which is tried how rows may be laid out.
6. `costs.py` counts the allocations and operations of each kind of block, on the class in its own size but without memory:
   `blocks.py` has the blocks with their arguments, `traces.py` runs them, `allocations.py` counts.
"""
