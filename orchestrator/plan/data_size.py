"""How much data there is; guessed from file sizes, enough to plan before anything is tokenised."""

from __future__ import annotations

import math

from orchestrator.plan.remedies import most_replayed_tokens, needs_replayed_text
from orchestrator.spec.models import JobSpec, TrainSpec
from orchestrator.values import Value

BYTES_PER_TOKEN = 4
"""English text under the usual vocabularies of 32k to 128k entries; other text differs by a factor of two and more."""


class DataSize(Value):
    """What the plan needs to know of the tokenised data. Estimated from file sizes where nothing was tokenised yet."""

    train_documents: int
    train_tokens: int
    steps_per_epoch: int
    tokens_per_step: int = 0
    """Of a step, at most; 0 in plans of older versions, whose specs all have a number."""
    step_ranks: int = 1
    """Ranks of a gang that `auto` gave a row each in a full step; 1 where the spec has a number."""

    def with_step(self, tokens_per_step: int, step_ranks: int) -> DataSize:
        """With other steps; how many they are is estimated."""
        steps = max(1, math.ceil(self.train_tokens / tokens_per_step))
        update = {"tokens_per_step": tokens_per_step, "step_ranks": step_ranks, "steps_per_epoch": steps}
        return self.model_copy(update=update)

    eval_tokens: int
    retain_tokens: int
    """Of the retention set, what is scored."""
    longest_document_tokens: int
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    sets_sha256: str = ""
    """Over every split's tokens, masks and classes."""
    supervised_share: float = 1.0
    """Positions that are predicted, of all, or documents. The output projection is computed at these alone."""
    document_tokens: float | None = None
    """Length of the document that a training token stands in, on average: squared lengths over lengths, summed. None: unknown."""
    replay_tokens: int = 0
    """Of the retention set, what is learned from."""
    exact: bool = True
    """False when estimated from file sizes."""


def estimate_data_size(
    num_bytes: int,
    num_rows: int,
    spec: JobSpec,
    *,
    eval_bytes: int | None = None,
    retain_bytes: int = 0,
    num_classes: int = 0,
) -> DataSize:
    """A DataSize with `exact=False`. How much of it is supervised is not known either: all of it, at most.

    Args:
        num_bytes: Of the training files, before the splits are taken off.
        num_rows: Of the training files.
        eval_bytes: Of the eval file, where eval is a path.
        retain_bytes: Of the retention files.
    """
    share = 1.0 - sum(part for part in (spec.data.eval, spec.data.test) if isinstance(part, float))
    tokens = max(1, round(num_bytes / BYTES_PER_TOKEN))
    rows = max(1, num_rows)
    if spec.traits.cuts_into_chunks:
        rows = max(rows, math.ceil(tokens / spec.data.max_tokens))
    else:  # longer rows are dropped or cut
        tokens = min(tokens, rows * spec.data.max_tokens)
    train_tokens = max(1, round(share * tokens))
    if isinstance(spec.data.eval, float):
        eval_tokens = round(min(spec.data.eval * rows, spec.data.eval_rows) * tokens / rows)
    else:
        eval_tokens = min(round((eval_bytes or 0) / BYTES_PER_TOKEN), spec.data.eval_rows * spec.data.max_tokens)
    retain_tokens = round(retain_bytes / BYTES_PER_TOKEN)
    documents = max(1, round(share * rows))
    in_a_step = tokens_per_step(spec.train, documents, train_tokens, min(spec.data.max_tokens, math.ceil(tokens / rows)))
    replayed = min(max(0, retain_tokens - spec.data.retain_tokens), most_replayed_tokens(spec, train_tokens))
    return DataSize(
        train_documents=documents,
        train_tokens=train_tokens,
        steps_per_epoch=max(1, math.ceil(train_tokens / in_a_step)),
        tokens_per_step=in_a_step,
        eval_tokens=eval_tokens,
        retain_tokens=min(retain_tokens, spec.data.retain_tokens),
        longest_document_tokens=spec.data.max_tokens,
        num_classes=num_classes,
        supervised_share=min(1.0, rows / tokens) if spec.traits.head.supervises == "documents" else 1.0,
        replay_tokens=replayed if needs_replayed_text(spec) else 0,
        exact=False,
    )


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
