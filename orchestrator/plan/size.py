"""How much data there is; guessed from file sizes, enough to plan before anything is tokenised."""

from __future__ import annotations

import math

from orchestrator.plan.remedies import most_replayed_tokens, needs_replayed_text
from orchestrator.plan.step_size import tokens_per_step
from orchestrator.spec.models import JobSpec
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
    """Positions that are predicted, of all; to classify, documents. The output projection is computed at these alone."""
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
    if spec.task == "text":  # cut into chunks
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
        supervised_share=min(1.0, rows / tokens) if spec.task == "classify" else 1.0,
        replay_tokens=replayed if needs_replayed_text(spec) else 0,
        exact=False,
    )
