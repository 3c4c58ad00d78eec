"""The sample base's card, written from the numbers of the run that made it."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from scripts.sample_base.corpus import Corpus


@dataclass(frozen=True)
class Facts:
    """Figures that a reader of the card may want to check; losses in nats per token."""

    num_parameters: int
    steps: int
    schedule_steps: int
    seed: int
    cpu_minutes: float
    learning_rate: float
    step_tokens: int
    epoch_tokens: int
    heldout_loss: float
    heldout_tokens: int


def characters(texts: tuple[str, ...]) -> str:
    return f"{sum(map(len, texts)) / 1e6:.2f}"


def render(facts: Facts, text: Corpus) -> str:
    tokens = facts.steps * facts.step_tokens
    return f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The sample base

A small Llama, pretrained from scratch for this project so that the quickstart and the tests fine-tune a real
model without a download: 8 blocks, hidden size 192, grouped-query attention (6 heads, 2 key-value heads), tied
embeddings, byte-level BPE of 4096 tokens with role markers, {facts.num_parameters / 1e6:.2f} million parameters,
bf16 safetensors.

It writes locally fluent, senseless English in the manner of speeches and manuals. That is enough for fine-tuning
to show real transfer and real forgetting. It is good for nothing else, knows no facts, and must not be served.

| measured | value |
|---|---|
| held-out loss, nats per token | {facts.heldout_loss:.4f} |
| held-out tokens | {facts.heldout_tokens} |
| parameters | {facts.num_parameters} |
| training steps | {facts.steps} |
| steps of the schedule | {facts.schedule_steps} |
| tokens per step | {facts.step_tokens} |
| training tokens, repeats counted | {tokens} |
| tokens in one epoch | {facts.epoch_tokens} |
| epochs | {tokens / facts.epoch_tokens:.2f} |
| peak learning rate | {facts.learning_rate} |
| seed | {facts.seed} |
| CPU minutes, one thread | {facts.cpu_minutes:.1f} |

The held-out loss is over {len(text.heldout)} whole speeches that training never saw, read in rows of 512 tokens
by the stored weights in fp32.

## Text

| source | documents | million characters | licence |
|---|---|---|---|
| speeches of US presidents: inaugural and state-of-the-union addresses | {len(text.speeches)} | \
{characters(text.speeches)} | public domain |
| docstrings of Python {platform.python_version()}'s standard library and its built-in language reference | \
{len(text.docstrings)} | {characters(text.docstrings)} | PSF License Version 2 |
| sentences about a household, written by `scripts/sample_base/household.py` | {len(text.household)} | \
{characters(text.household)} | Apache-2.0, this project |
| held out: speeches, never trained on | {len(text.heldout)} | {characters(text.heldout)} | public domain |

Python's documentation is copyright (c) 2001-2023 Python Software Foundation; all rights reserved.
The sample task (`orchestrator/samples/data`) uses words of the speeches. None of its rows was trained on, and the
base model answers none of its prompts.

## How to make it again

    scripts/build_sample_base --speeches inaugural.jsonl state_union.jsonl --steps {facts.schedule_steps} \
--stop-after {facts.steps} --rows-per-step {facts.step_tokens // 512} \
--learning-rate {facts.learning_rate} --seed {facts.seed}

AdamW (betas 0.9 and 0.95, weight decay 0.1 on matrices), 100 steps of warm-up, then a cosine to 2% of the peak over
the steps of the schedule, gradients clipped at 1, weights and optimizer in fp32, matrix products in bf16. A run that
stops before the end of its schedule has not been annealed. The speeches are NLTK's `inaugural` and `state_union`
corpora, one speech a row in a column `text`. The docstrings are those of the Python that runs the command: another
version, another text.
"""
