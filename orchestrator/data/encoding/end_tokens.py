"""End tokens: where an answer ends and generation stops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.encoding.control_tokens import ControlTokens
from orchestrator.data.sets import TokenizedSet
from orchestrator.data.summary import LeftOut
from orchestrator.errors import IntegrityError
from orchestrator.spec.models import Task
from orchestrator.spec.tasks import TASKS
from orchestrator.store import read_json
from orchestrator.units import printable

NO_END_IN_TEMPLATE = "write the end token after the assistant's content in the base's chat template ({{ eos_token }})"
NO_END = "set eos_token in the base's tokenizer_config.json"


def declared_ends(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids at which the base stops: its tokenizer's end token, and those in its generation_config.json or, if there
    is none, its config.json."""
    config: dict[str, Any] = {}
    # transformers reads config.json only if there is no generation_config.json.
    for name in ("generation_config.json", "config.json"):
        try:
            config = read_json(folder / name)
            break
        except (FileNotFoundError, IntegrityError):
            continue
    given = config.get("eos_token_id")
    ids = given if isinstance(given, list) else [given]
    size = len(tokenizer)
    # `type`, not isinstance: JSON's true is an int in Python. Ids outside the vocabulary are ignored.
    found = [tokenizer.eos_token_id, *(number for number in ids if type(number) is int and 0 <= number < size)]
    return tuple(dict.fromkeys(number for number in found if number is not None))


def end_tokens(train: TokenizedSet, control: ControlTokens, declared: Sequence[int]) -> tuple[int, ...]:
    """Return the ids at which generation stops: control tokens that end supervised text, most frequent first, and those
    declared.

    A token that also occurs within an answer (such as one that ends its reasoning) is excluded.
    """
    ends = _run_ends(train)
    numbers, counts = np.unique(train.ids[ends], return_counts=True)
    # A token inside an answer, such as one that only ends the reasoning, must not stop generation.
    within = set(np.unique(train.ids[train.supervised & ~ends]).tolist())
    known = set(control.ids.values()) - within
    learned = [int(numbers[place]) for place in np.argsort(-counts, kind="stable") if int(numbers[place]) in known]
    return tuple(dict.fromkeys((*learned, *declared)))


def note_end_tokens(train: TokenizedSet, tokenizer: Any, task: Task, left_out: LeftOut) -> None:
    """Report the tokens at which answers end; warn if no end is trained on."""
    stops = train.stop_ids
    remedy = NO_END_IN_TEMPLATE if TASKS[task].uses_chat_template else NO_END
    last = train.ids[_last_supervised(train)]
    numbers, counts = np.unique(last[np.isin(last, np.asarray(stops, np.int32))], return_counts=True)
    learned = [int(number) for number in numbers[np.argsort(-counts, kind="stable")]]
    unended = len(last) - int(counts.sum())
    others = [number for number in stops if number not in learned]
    if not learned:
        known = (
            f"only at its length limit or at {_named(others, tokenizer)}, which no training row contains"
            if others
            else "only at its length limit, since no end token is known"
        )
        left_out.warn(f"no answer ends with an end token: generation stops {known}", remedy)
    elif unended:
        left_out.warn(f"{unended} of {len(last)} training rows do not end with an end token, so no end is trained on", remedy)
    if learned and (TASKS[task].uses_chat_template or others):
        also = f" and at {_named(others, tokenizer)}" if others else ""
        left_out.info(f"answers end with {_named(learned, tokenizer)}: generation stops there{also}, in the bundle too")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        left_out.info(f"the tokenizer has no padding token: prompts are padded with token {padding(tokenizer, stops)}")


def _named(ids: Sequence[int], tokenizer: Any) -> str:
    return ", ".join(f"'{printable(str(text))}'" for text in tokenizer.convert_ids_to_tokens(list(ids)))


def padding(tokenizer: Any, stops: Sequence[int]) -> int:
    """Return the id that pads shorter prompts: the tokenizer's, or else any; padding is masked."""
    # Any id will do: padded positions are masked.
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id, *stops, 0)
    return next(int(number) for number in given if number is not None)


def _run_ends(data: TokenizedSet) -> np.ndarray:
    """Return bool[N]: the last token of every run of supervised tokens."""
    following = np.append(data.supervised[1:], False)
    # A run does not continue into the next document.
    following[data.offsets[1:] - 1] = False
    return data.supervised & ~following


def _last_supervised(data: TokenizedSet) -> np.ndarray:
    """Return int64[D']: position of each document's last supervised token; documents without one are left out."""
    ends = np.flatnonzero(_run_ends(data))
    owners = np.searchsorted(data.offsets, ends, side="right") - 1
    return ends[np.append(owners[1:] != owners[:-1], True)] if len(ends) else ends
