"""Count what each kind of block costs, on its class and without memory, for the selections and shapes that a plan asks about.

A block runs forward and backward on fake tensors once for each thing in it that may have a gradient: what autograd saves then is
what that one needs kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from orchestrator.anatomy.costs import BlockCosts, Flops, Kept, PassFlops, Size
from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.probe.allocations import Stored, fake_parameters
from orchestrator.probe.blocks import BlockCall, capture_calls
from orchestrator.probe.traces import Event, Identity, Opened, Traced, sizes, trace_block, trace_forward

LENGTH = 256
"""Tokens of a row. A multiple of the chunks in which state-space models compute a row."""
SHAPES = ((1, LENGTH), (2, LENGTH), (1, 2 * LENGTH))
"""Rows and their tokens: three shapes for three coefficients."""
LORA_RANK = 8
"""Of the adapters with which peaks are counted, where their own tensors are small; what they keep is planned for the rank asked
for."""


class CountError(Exception):
    """Raised if a class cannot be run on fake tensors, or not twice in the same way."""


def count_costs(model: nn.Module, anatomy: ModelAnatomy) -> tuple[BlockCosts, ...]:
    """Return the costs of every kind of block, in the order of their numbers.

    Args:
        model: The class on the meta device, in bfloat16; it is of no other use afterwards.
        anatomy: Its anatomy.

    Raises:
        CountError: The class computes something that depends on values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_parameters(model, mode)
    model.train().requires_grad_(False)
    kinds = anatomy.block_kinds or (0,) * anatomy.num_blocks
    firsts = [kinds.index(kind) for kind in range(max(kinds) + 1)]
    linears = [_within_block(anatomy, first) for first in firsts]
    ways = (False, True) if _separates(anatomy) else (False,)
    try:
        calls = {
            by_document: [capture_calls(model, anatomy, mode, firsts, *shape, by_document=by_document) for shape in SHAPES]
            for by_document in ways
        }
        with mode:
            return tuple(
                _costs(names, *([shape[place] for shape in calls[way]] for way in ways)) for place, names in enumerate(linears)
            )
    except CountError:
        raise
    except Exception as error:  # a class of another project may do anything with fake tensors
        raise CountError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _separates(anatomy: ModelAnatomy) -> bool:
    """Return whether training may compute documents one by one."""
    return anatomy.kind == "decoder" and anatomy.ways.attention == "by_document" and anatomy.attention == "fused"


def _within_block(anatomy: ModelAnatomy, block: int) -> tuple[str, ...]:
    prefix = anatomy.block_prefix.format(block)
    return tuple(name.removeprefix(prefix).rpartition(".")[0] for name in anatomy.linears[block])


def _costs(linears: Sequence[str], rows: Sequence[BlockCall], documents: Sequence[BlockCall] = ()) -> BlockCosts:
    """Return the costs of a block from its calls at SHAPES, with whole rows and with documents one by one."""

    def adapt_all(opened: Opened) -> None:
        for name in linears:
            opened.adapt(name, LORA_RANK)

    def watch_all(opened: Opened) -> None:
        for name in linears:
            opened.watch(name)

    def train_all(opened: Opened) -> None:
        opened.train(opened.block.parameters())

    parts = [_Parts.of(call, linears) for call in rows]
    adapted, trained = ([trace_block(call, opens, passing=True) for call in rows] for opens in (adapt_all, train_all))
    first_adapted, first_trained = (
        [trace_block(call, opens, passing=False) for call in rows] for opens in (watch_all, train_all)
    )
    passing = [part.passing for part in parts]
    weights = [whole.backward_flops - part.backward_flops for whole, part in zip(trained, passing, strict=True)]
    return BlockCosts(
        kept=_kept(parts),
        kept_by_document=_kept([_Parts.of(call, linears) for call in documents]) if documents else (),
        adapted_peaks=_peaks([traced.events for traced in adapted]),
        trained_peaks=_peaks([traced.events for traced in trained]),
        at_weight_peaks=_peaks([[event for event in traced.events if event.at_weight] for traced in trained]),
        forward_peaks=_peaks([trace_forward(call) for call in rows]),
        forward=_flops([traced.forward_flops for traced in trained]),
        passing=_pass_flops(passing),
        adapted=_pass_flops(first_adapted),
        trained=_pass_flops(first_trained, weights),
        modules={name: _pass_flops([part.modules[name] for part in parts]) for name in parts[0].modules},
    )


@dataclass(frozen=True)
class _Parts:
    """Passes of a block at one shape, each with one thing that has a gradient."""

    passing: Traced
    modules: dict[str, Traced]
    inputs: dict[str, dict[Identity, Stored]]
    """What each linear layer was called with."""

    @classmethod
    def of(cls, call: BlockCall, linears: Sequence[str]) -> _Parts:
        passing = trace_block(call, lambda _: None, passing=True)
        modules, inputs = dict[str, Traced](), dict[str, dict[Identity, Stored]]()
        for name, module in call.block.named_modules():
            own = list(module.parameters(recurse=False))
            if not own:
                continue
            traced = trace_block(call, partial(_open_one, name if name in linears else None, own), passing=False)
            # A layer whose weight another module uses is never called.
            if name in linears and name not in traced.inputs:
                traced = trace_block(call, partial(_open_one, None, own), passing=False)
            modules[name] = traced
            inputs |= traced.inputs
        return cls(passing, modules, inputs)

    def kept(self) -> dict[_Reasons, tuple[int, int]]:
        """Return (elements, bytes) of what is kept, by its reasons."""
        stored = dict(self.passing.saved)
        for saved in (*(traced.saved for traced in self.modules.values()), *self.inputs.values()):
            stored |= saved
        by_reasons: dict[_Reasons, list[Stored]] = defaultdict(list)
        for identity, each in stored.items():
            through = tuple(name for name, traced in self.modules.items() if identity in traced.saved)
            inputs = tuple(name for name, called in self.inputs.items() if identity in called)
            by_reasons[identity in self.passing.saved, through, inputs].append(each)
        return {reasons: sizes(each) for reasons, each in by_reasons.items()}


_Reasons = tuple[bool, tuple[str, ...], tuple[str, ...]]
"""`passing`, `through` and `inputs` of a `Kept`."""


def _open_one(linear: str | None, parameters: Sequence[nn.Parameter], opened: Opened) -> None:
    if linear is None:
        opened.train(parameters)
    else:
        opened.watch(linear)


def _kept(parts: Sequence[_Parts]) -> tuple[Kept, ...]:
    found = [part.kept() for part in parts]
    if any(each.keys() != found[0].keys() for each in found):
        raise CountError("what is kept hangs on the shape of the rows")
    return tuple(
        Kept(size=_size([each[reasons] for each in found]), passing=passing, through=through, inputs=inputs)
        for reasons in found[0]
        for passing, through, inputs in [reasons]
    )


def _size(counted: Sequence[tuple[int, int]]) -> Size:
    """Return the coefficients of (elements, bytes) counted at SHAPES."""
    (fixed_elements, token_elements, pair_elements), (fixed_bytes, token_bytes, pair_bytes) = (
        tuple(round(value) for value in _coefficients(values)) for values in zip(*counted, strict=True)
    )
    return Size(
        fixed_bytes=fixed_bytes,
        token_bytes=token_bytes,
        pair_bytes=pair_bytes,
        fixed_elements=fixed_elements,
        token_elements=token_elements,
        pair_elements=pair_elements,
    )


def _coefficients(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (constant, per token, per pair) of what was counted at SHAPES."""
    one, more_rows, longer = values
    pair = (longer - more_rows) / (2 * LENGTH * LENGTH)
    token = (more_rows - one) / LENGTH - pair * LENGTH
    return one - token * LENGTH - pair * LENGTH * LENGTH, token, pair


def _flops(counted: Sequence[float]) -> Flops:
    _, token, pair = _coefficients(counted)
    return Flops(token=token, pair=pair)


def _pass_flops(traced: Sequence[Traced], weights: Sequence[int] = (0, 0, 0)) -> PassFlops:
    """Return what the passes took, less what the gradients of weights did."""
    backward = [each.backward_flops - weight for each, weight in zip(traced, weights, strict=True)]
    return PassFlops(backward=_flops(backward), again=_flops([each.again_flops for each in traced]))


def _peaks(events: Sequence[Sequence[Event]]) -> tuple[Size, ...]:
    """Return the peaks that are the highest for some shape, from the events at SHAPES.

    The same operators run at every shape, so that the highest event of each operator is compared, not the highest of all.
    """
    highest: list[dict[tuple[str, int], Event]] = []
    for each in events:
        found: dict[tuple[str, int], Event] = {}
        for event in each:
            if event.key not in found or event.total > found[event.key].total:
                found[event.key] = event
        highest.append(found)
    common = [key for key in highest[0] if all(key in found for found in highest)]
    return _highest([_size([(found[key].elements, found[key].num_bytes) for found in highest]) for key in common])


def _highest(found: Sequence[Size]) -> tuple[Size, ...]:
    """Leave out what is never the highest: another is higher per token and per pair, in 16 bits."""
    left: list[Size] = []
    for size in sorted(found, key=_height, reverse=True):
        if not any(all(a >= b for a, b in zip(_height(other), _height(size), strict=True)) for other in left):
            left.append(size)
    return tuple(left)


def _height(size: Size) -> tuple[int, int]:
    return size.per_token(2), size.per_pair(2)
