"""Count what each kind of block costs, on its class and without memory, for the selections and shapes that a plan asks about.

A block runs forward and backward on fake tensors once for each thing in it that may have a gradient: what autograd saves then is
what that one needs kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from orchestrator.anatomy.costs import BlockCosts, Flops, Kept, PassFlops, Size
from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.memory.activations import attends_by_document, attention_of
from orchestrator.probe.allocations import Stored, fake_parameters
from orchestrator.probe.blocks import BlockCall, capture_calls
from orchestrator.probe.classes import build
from orchestrator.probe.traces import Event, Identity, Opened, Traced, sizes, trace_block, trace_forward

LENGTH = 512
"""Tokens of the shortest row: several of the chunks in which state-space models compute a row. A block is counted at this length,
at twice and at three times it, for three coefficients; with more rows, all of it is in proportion."""
LOOP_LENGTH = 64
"""The same for a class that computes a row token by token, in a loop."""
LORA_RANK = 8
"""Of the adapters with which peaks are counted, where their own tensors are small; what they keep is planned for the rank asked
for."""


class CountError(Exception):
    """Raised if a class cannot be run on fake tensors, or not twice in the same way."""


def with_costs(anatomy: ModelAnatomy, folder: Path) -> ModelAnatomy:
    """Return an anatomy that was learned from the class of a base with the costs of its blocks, or the reason why they are not
    known."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        return anatomy.model_copy(update={"block_costs": count_costs(build(config, anatomy.architecture), anatomy)})
    except CountError as error:
        return anatomy.model_copy(update={"costs_note": str(error)})


def count_costs(model: Any, anatomy: ModelAnatomy) -> tuple[BlockCosts, ...]:
    """Return the costs of every kind of block, in the order of their numbers.

    Args:
        model: The class on the meta device; it is of no other use afterwards.
        anatomy: Its anatomy.

    Raises:
        CountError: The class computes something that depends on values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model.to(torch.bfloat16).train().requires_grad_(False)
    fake_parameters(model, mode)
    kinds = anatomy.block_kinds or (0,) * anatomy.num_blocks
    firsts = [kinds.index(kind) for kind in range(max(kinds) + 1)]
    linears = [_within_block(anatomy, first) for first in firsts]
    ways = (False, True) if attends_by_document(anatomy, "cpu", one_document_per_row=False) else (False,)
    try:
        model.set_attn_implementation(attention_of(anatomy, "cuda", one_document_per_row=False))
        length = LOOP_LENGTH if _loops(model, anatomy, mode, firsts) else LENGTH
        if anatomy.max_positions:  # learned positions have no more rows
            length = max(1, min(length, anatomy.max_positions // 3))
        calls = {
            by_document: [
                capture_calls(model, anatomy, mode, firsts, times * length, by_document=by_document) for times in (1, 2, 3)
            ]
            for by_document in ways
        }
        with mode:
            return tuple(
                _costs(length, names, *([called[place] for called in calls[way]] for way in ways))
                for place, names in enumerate(linears)
            )
    except CountError:
        raise
    except Exception as error:  # a class of another project may do anything with fake tensors
        raise CountError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _within_block(anatomy: ModelAnatomy, block: int) -> tuple[str, ...]:
    prefix = anatomy.block_prefix.format(block)
    return tuple(name.removeprefix(prefix).rpartition(".")[0] for name in anatomy.linears[block])


def _loops(model: Any, anatomy: ModelAnatomy, mode: FakeTensorMode, blocks: Sequence[int]) -> bool:
    """Return whether one of these blocks computes a row token by token: every token then takes allocations of its own."""
    short, long = (capture_calls(model, anatomy, mode, blocks, length, by_document=False) for length in (16, 32))
    with mode:
        return any(len(trace_forward(b)) - len(trace_forward(a)) >= 16 for a, b in zip(short, long, strict=True))


def _costs(length: int, linears: Sequence[str], rows: Sequence[BlockCall], documents: Sequence[BlockCall] = ()) -> BlockCosts:
    """Return the costs of a block from its calls at `length`, twice and three times it, with whole rows and with documents one by
    one."""

    def adapt_all(opened: Opened) -> None:
        for name in linears:
            opened.adapt(name, LORA_RANK)

    def train_all(opened: Opened) -> None:
        opened.train(opened.block.parameters())

    parts = [_Parts.of(call, linears) for call in rows]
    adapted, trained = ([trace_block(call, opens, passing=True) for call in rows] for opens in (adapt_all, train_all))
    first = [trace_block(call, train_all, passing=False) for call in rows]
    passing = [part.passing for part in parts]
    weights = [whole.backward_flops - part.backward_flops for whole, part in zip(trained, passing, strict=True)]
    return BlockCosts(
        kept=_kept(length, parts),
        kept_by_document=_kept(length, [_Parts.of(call, linears, backward=False) for call in documents]) if documents else (),
        adapted_peaks=_peaks(length, [traced.events for traced in adapted]),
        trained_peaks=_peaks(length, [traced.events for traced in trained]),
        at_weight_peaks=_peaks(length, [[event for event in traced.events if event.at_weight] for traced in trained]),
        forward_peaks=_peaks(length, [trace_forward(call) for call in rows]),
        forward=_flops(length, [traced.forward_flops for traced in passing]),
        passing=_pass_flops(length, passing),
        adapted=_pass_flops(length, [part.adapted for part in parts]),
        trained=_pass_flops(length, first, weights),
    )


@dataclass(frozen=True)
class _Parts:
    """Passes of a block of one length, each with one kind of things that have a gradient: see `Kept`."""

    passing: Traced
    adapted: Traced
    others: Traced

    @classmethod
    def of(cls, call: BlockCall, linears: Sequence[str], *, backward: bool = True) -> _Parts:
        def adapt(opened: Opened) -> None:
            for name in linears:
                opened.watch(name)

        def train_others(opened: Opened) -> None:
            modules = dict(opened.block.named_modules())
            opened.train(own for name in modules.keys() - set(linears) for own in modules[name].parameters(recurse=False))

        return cls(
            passing=trace_block(call, lambda _: None, passing=True, backward=backward),
            adapted=trace_block(call, adapt, passing=False, backward=backward),
            others=trace_block(call, train_others, passing=False, backward=False),
        )

    def kept(self) -> dict[_Reasons, tuple[int, int]]:
        """Return (elements, bytes) of what is kept, by its reasons."""
        called = self.adapted.inputs
        stored: dict[Identity, Stored] = {}
        for saved in (self.passing.saved, self.adapted.saved, self.others.saved, *called.values()):
            stored |= saved
        by_reasons: dict[_Reasons, list[Stored]] = defaultdict(list)
        for identity, each in stored.items():
            reasons = _Reasons(
                identity in self.passing.saved,
                identity in self.adapted.saved,
                identity in self.others.saved,
                tuple(name for name in called if identity in called[name]),
            )
            by_reasons[reasons].append(each)
        return {reasons: sizes(each) for reasons, each in by_reasons.items()}


class _Reasons(NamedTuple):
    """The reasons of a `Kept`."""

    passing: bool
    adapted: bool
    others: bool
    inputs: tuple[str, ...]


def _kept(length: int, parts: Sequence[_Parts]) -> tuple[Kept, ...]:
    found = [part.kept() for part in parts]
    every = dict.fromkeys(reasons for each in found for reasons in each)
    kept = (Kept(size=_size(length, [each.get(reasons, (0, 0)) for each in found]), **reasons._asdict()) for reasons in every)
    return tuple(each for each in kept if each.size != Size())


def _size(length: int, counted: Sequence[tuple[int, int]]) -> Size:
    """Return the coefficients of (elements, bytes) counted at the three lengths."""
    elements, num_bytes = (_coefficients(length, values) for values in zip(*counted, strict=True))
    return Size(
        row_elements=round(elements[0]),
        token_elements=round(elements[1]),
        pair_elements=round(elements[2]),
        row_bytes=round(num_bytes[0]),
        token_bytes=round(num_bytes[1]),
        pair_bytes=round(num_bytes[2]),
    )


def _coefficients(length: int, values: Sequence[float]) -> tuple[float, float, float]:
    """Return (per row, per token, per pair) of what was counted at the three lengths."""
    short, middle, long = values
    pair = (long - 2 * middle + short) / (2 * length * length)
    if pair < 0:  # not a sum of these three: a line through the longer rows
        token = (long - middle) / length
        return long - 3 * token * length, token, 0.0
    token = (middle - short) / length - 3 * pair * length
    return short - token * length - pair * length * length, token, pair


def _flops(length: int, counted: Sequence[float]) -> Flops:
    _, token, pair = _coefficients(length, counted)
    return Flops(token=token, pair=pair)


def _pass_flops(length: int, traced: Sequence[Traced], weights: Sequence[int] = (0, 0, 0)) -> PassFlops:
    """Return what the passes took, less what the gradients of weights did."""
    backward = [each.backward_flops - weight for each, weight in zip(traced, weights, strict=True)]
    return PassFlops(backward=_flops(length, backward), again=_flops(length, [each.again_flops for each in traced]))


def _peaks(length: int, events: Sequence[Sequence[Event]]) -> tuple[Size, ...]:
    """Return the peaks that are the highest for some shape of rows, from the events at the three lengths.

    Where the same operators ran at every length, event is compared with event. A class that goes through a row in a loop has more
    of them the longer the row is: there, the highest of each operator is compared.
    """
    same = all([event.key for event in each] == [event.key for event in events[0]] for each in events)
    by_key = [dict(enumerate(each)) if same else _highest_of_each(each) for each in events]
    common = set(by_key[0]).intersection(*by_key[1:])
    return _highest([_size(length, [(found[key].elements, found[key].num_bytes) for found in by_key]) for key in common])


def _highest_of_each(events: Sequence[Event]) -> dict[Any, Event]:
    found: dict[Any, Event] = {}
    for event in events:
        if event.key not in found or event.total > found[event.key].total:
            found[event.key] = event
    return found


def _highest(found: Sequence[Size]) -> tuple[Size, ...]:
    """Leave out what is never the highest: another is higher per row, per token and per pair, in 16 bits."""
    left: list[Size] = []
    for size in sorted(found, key=_height, reverse=True):
        if not any(all(a >= b for a, b in zip(_height(other), _height(size), strict=True)) for other in left):
            left.append(size)
    return tuple(left)


def _height(size: Size) -> tuple[int, int, int]:
    return size.per_token(2), size.per_pair(2), size.per_row(2)
