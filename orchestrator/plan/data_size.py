"""The size of the data; estimated from file sizes, which is enough to plan before anything is tokenized."""

from __future__ import annotations

import math

from orchestrator.plan.remedies import most_replayed_tokens, needs_replayed_text
from orchestrator.spec.models import JobSpec, TrainSpec
from orchestrator.values import Value
from orchestrator.work.execution import Padding

BYTES_PER_TOKEN = 4
"""Bytes per token of English text with typical vocabularies of 32k to 128k entries; other text may differ by a factor of two or
more."""


class DataSize(Value):
    """Size of the tokenized data as far as the plan needs it. Estimated from file sizes if nothing is tokenized yet."""

    train_documents: int
    train_tokens: int
    steps_per_epoch: int
    tokens_per_step: int = 0
    """Maximum number of tokens in a step; 0 in plans of older versions, whose specs all give a number."""
    step_ranks: int = 1
    """Number of ranks that `auto` gave one row each in a full step; 1 if the spec gives a number."""

    def with_step(self, tokens_per_step: int, step_ranks: int) -> DataSize:
        """Return this size with other steps; the number of steps per epoch is then an estimate."""
        steps = max(1, math.ceil(self.train_tokens / tokens_per_step))
        update = {"tokens_per_step": tokens_per_step, "step_ranks": step_ranks, "steps_per_epoch": steps}
        return self.model_copy(update=update)

    eval_tokens: int
    retain_tokens: int
    """Tokens of the retention set that are scored."""
    longest_document_tokens: int
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    padding: Padding | None = None
    """The token that pads texts to classify; None for other tasks, and until the data is tokenized."""
    sets_sha256: str = ""
    """SHA-256 over the tokens, masks and classes of every split."""
    supervised_share: float = 1.0
    """Share of positions that are predicted (for `classify`, documents per token). The output projection is computed only at
    these."""
    document_tokens: float | None = None
    """Average length of the document that a training token belongs to: sum of squared lengths divided by sum of lengths. None if
    unknown."""
    replay_tokens: int = 0
    """Tokens of the retention set that replay trains on."""
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
    """Estimate the size of the data from its files' sizes.

    Args:
        num_bytes: Size of the training files, including what the splits take.
        num_rows: Number of rows in the training files.
        eval_bytes: Size of the eval file, if eval is a path.
        retain_bytes: Size of the retention files.
    """
    share = 1.0 - sum(part for part in (spec.data.eval, spec.data.test) if isinstance(part, float))
    tokens = max(1, round(num_bytes / BYTES_PER_TOKEN))
    rows = max(1, num_rows)
    if spec.traits.cuts_into_chunks:  # cut into chunks
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
    # Tokens that are scored are never trained on, so replay has what is left of the retention set.
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
"""Documents in a step, divided by the square root of the number of training documents."""
MIN_TOTAL_STEPS = 40
"""Minimum number of steps in a training run, if each can hold a document: with fewer, warm-up and decay dominate."""
MAX_STEP_TOKENS = 65536
"""Maximum number of tokens in a step, however large the data: larger steps gain little and delay every comparison of trials."""
TOO_FEW_STEPS = 30
"""Fewer steps than this cause a warning: AdamW's second moment (beta 0.999) and the schedule have hardly begun."""
STEP_TOKENS_MULTIPLE = 16
"""The tokens of a step are rounded up to a multiple of this."""


def auto_tokens_per_step(documents: int, tokens: int, longest_document_tokens: int, epochs: float) -> int:
    """Derive the tokens of a step from the training data: DOCUMENTS_PER_STEP times the square root of the number of documents, at
    their mean length.

    So 300 documents make steps of about 4 documents and 70 steps an epoch; 10,000 make steps of 25 documents and 400 steps an
    epoch. Bounds, the later one taking precedence: at most MAX_STEP_TOKENS; at least MIN_TOTAL_STEPS steps in the whole training;
    at least the longest document.

    Sources. The batch size above which more examples a step no longer save steps (McCandlish et al. 2018, "An Empirical Model of
    Large-Batch Training") grows with the amount of data, about as its square root, and hardly with the model (Zhang et al. 2024,
    "How Does Critical Batch Size Scale in Pre-training?"). The factor was chosen on three small corpora, against fixed sizes
    (`scripts/bench step_size`, docs/results.md). Published recipes take between 0.6 and 4 times as many examples a step: 128 of
    Alpaca's 52,000 (here 57), 32 of LIMA's 1,000 (8), 16 of OASST1's 9,846 in QLoRA (25); OpenAI's fine-tuning API took 0.2% of
    the examples, 20 of 10,000 (25).

    Args:
        documents: Number of training documents after truncating and dropping.
        tokens: Number of training tokens.
        longest_document_tokens: Length of the longest training document.
        epochs: Number of passes over the training set.
    """
    documents = max(1, documents)
    in_a_step = min(DOCUMENTS_PER_STEP * math.sqrt(documents), epochs * documents / MIN_TOTAL_STEPS)
    wanted = min(max(1.0, in_a_step) * tokens / documents, MAX_STEP_TOKENS)
    return STEP_TOKENS_MULTIPLE * math.ceil(max(wanted, longest_document_tokens, 1) / STEP_TOKENS_MULTIPLE)


def too_few_steps_warning(total_steps: int) -> str:
    """Return a warning about a training run of so few steps, or an empty text if there are enough."""
    if total_steps >= TOO_FEW_STEPS:
        return ""
    count = "one optimizer step" if total_steps == 1 else f"{total_steps} optimizer steps"
    return (
        f"the whole training is {count}: with fewer than {TOO_FEW_STEPS} a model learns little and trials cannot be compared well"
    )


def more_steps(train: TrainSpec, auto: int, tokens: int, steps_per_epoch: int) -> str:
    """Suggest how a training run can get MIN_TOTAL_STEPS steps: smaller steps if the data allows them, else more epochs.

    Args:
        auto: Tokens per step that `auto` gives for this training set.
        tokens: Number of training tokens.
    """
    if train.tokens_per_step != "auto" and auto < train.tokens_per_step:
        steps = math.ceil(train.epochs * tokens / auto)
        more = f"train.tokens_per_step: auto ({auto} here) gives about {steps}"
        return more if steps >= TOO_FEW_STEPS else f"{more}; more train.epochs or more rows give more"
    epochs = math.ceil(MIN_TOTAL_STEPS / max(1, steps_per_epoch))
    return f"train.epochs: {epochs} gives about {epochs * steps_per_epoch}; more rows are better"


def tokens_per_step(train: TrainSpec, documents: int, tokens: int, longest_document_tokens: int) -> int:
    """Return the spec's own number, or what `auto` gives for this training set."""
    if train.tokens_per_step != "auto":
        return train.tokens_per_step
    return auto_tokens_per_step(documents, tokens, longest_document_tokens, train.epochs)
