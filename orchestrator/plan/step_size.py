"""Tokens of an optimizer step where the spec leaves them to the plan: `train.tokens_per_step: auto`."""

from __future__ import annotations

import math

from orchestrator.spec.models import TrainSpec

DOCUMENTS_PER_STEP = 0.25
"""Documents of a step, over the square root of the training documents."""
LEAST_STEPS = 40
"""Steps that a training is given, as long as a step holds a document at all: below, warm-up and decay are most of it."""
MOST_TOKENS = 65536
"""Of a step, however much data there is: larger steps gain little and delay every comparison of trials."""
FEW_STEPS = 30
"""Fewer steps than this are warned of: AdamW's second moment (beta 0.999) and the schedule have hardly begun."""
GRAIN = 16
"""A step's tokens are rounded up to a multiple of this."""


def auto_tokens_per_step(documents: int, tokens: int, longest_document_tokens: int, epochs: float) -> int:
    """Tokens of a step, from the training data alone: half the square root of the number of documents, at their mean length.

    So 300 documents make steps of 9 documents and 35 steps an epoch, 10,000 steps of 50 and 200 an epoch. Bounds, the later
    one first: at most MOST_TOKENS; at least LEAST_STEPS steps in the whole training; at least one document, the longest too.

    Sources. The batch size above which more examples a step no longer save steps (McCandlish et al. 2018, "An Empirical Model of
    Large-Batch Training") grows with the amount of data, about as its square root, and hardly with the model (Zhang et al. 2024,
    "How Does Critical Batch Size Scale in Pre-training?"). The factor is set between published recipes: 128 of Alpaca's 52,000
    examples a step (here 114), 32 of LIMA's 1,000 (16), 16 of OASST1's 9,846 in QLoRA (50); OpenAI's fine-tuning API took 0.2%
    of the examples, 20 of 10,000 (50). On three corpora against fixed sizes: `scripts/bench step_size`, docs/results.md.

    Args:
        documents: Of the training set, as they are after cutting and dropping.
        tokens: Of the training set.
        longest_document_tokens: Of the training set.
    """
    documents = max(1, documents)
    in_a_step = min(DOCUMENTS_PER_STEP * math.sqrt(documents), epochs * documents / LEAST_STEPS)
    wanted = min(max(1.0, in_a_step) * tokens / documents, MOST_TOKENS)
    return GRAIN * math.ceil(max(wanted, longest_document_tokens, 1) / GRAIN)


def few_steps_sentence(total_steps: int) -> str:
    """What a training of so many steps is worth; nothing where they are enough."""
    if total_steps >= FEW_STEPS:
        return ""
    count = "one optimizer step" if total_steps == 1 else f"{total_steps} optimizer steps"
    return f"the whole training is {count}: with fewer than {FEW_STEPS} a model learns little and trials cannot be compared well"


def more_steps(train: TrainSpec, auto: int, tokens: int, steps_per_epoch: int) -> str:
    """How a training gets LEAST_STEPS steps: smaller steps where the data has them, else more epochs.

    Args:
        auto: What `auto` comes to for this training set.
        tokens: Of the training set.
    """
    if train.tokens_per_step != "auto" and auto < train.tokens_per_step:
        steps = math.ceil(train.epochs * tokens / auto)
        more = f"train.tokens_per_step: auto ({auto} here) gives about {steps}"
        return more if steps >= FEW_STEPS else f"{more}; more train.epochs or more rows give more"
    epochs = math.ceil(LEAST_STEPS / max(1, steps_per_epoch))
    return f"train.epochs: {epochs} gives about {epochs * steps_per_epoch}; more rows are better"


def tokens_per_step(train: TrainSpec, documents: int, tokens: int, longest_document_tokens: int) -> int:
    """The spec's own number, or what `auto` comes to for this training set."""
    if train.tokens_per_step != "auto":
        return train.tokens_per_step
    return auto_tokens_per_step(documents, tokens, longest_document_tokens, train.epochs)
