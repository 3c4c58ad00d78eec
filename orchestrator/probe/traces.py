"""The forward and backward pass of a block, allocation by allocation, with gradients of what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter

from orchestrator.probe.allocations import AllocationCounter, Stored, operator_flops
from orchestrator.probe.blocks import BlockCall

ELEMENT_BYTES = 2
"""Blocks are traced in bfloat16; what has another dtype keeps it whatever the compute dtype is."""


Identity = tuple[str, int, int]


@dataclass
class Event:
    """Live memory after an allocation."""

    key: tuple[str, int]
    """The operator and the number of dimensions of its result: events of equal keys are compared between shapes."""
    elements: int
    """Of the compute dtype."""
    num_bytes: int
    """Of other dtypes."""
    at_weight: bool = False
    """Whether the gradient of the largest parameter exists."""

    @property
    def total(self) -> int:
        return ELEMENT_BYTES * self.elements + self.num_bytes

    def less(self, elements: int, num_bytes: int) -> None:
        self.elements -= elements
        self.num_bytes -= num_bytes


class Trace(AllocationCounter):
    """The allocations and operations of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.events: list[Event] = []
        """One for each storage, by its number."""
        self._live = Event(("", 0), 0, 0)

    @property
    def num_stored(self) -> int:
        return len(self.events)

    def allocated(self, stored: Stored, tensor: torch.Tensor, operator: str) -> None:
        self._live.less(*(-size for size in sizes([stored])))
        self.events.append(Event((operator, tensor.ndim), self._live.elements, self._live.num_bytes))

    def freed(self, stored: Stored) -> None:
        self._live.less(*sizes([stored]))

    def besides(self, saved: Iterable[Stored]) -> tuple[int, int]:
        """Return the (elements, bytes) that exist now besides these storages."""
        elements, num_bytes = sizes(saved)
        return self._live.elements - elements, self._live.num_bytes - num_bytes

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(operator, types, args, kwargs)
        self.flops += operator_flops(operator, args, kwargs or {}, result)
        return result


def sizes(storages: Iterable[Stored]) -> tuple[int, int]:
    """Return (elements of the compute dtype, bytes of other dtypes)."""
    elements = num_bytes = 0
    for stored in storages:
        if stored.element_bytes == ELEMENT_BYTES:
            elements += stored.num_bytes // ELEMENT_BYTES
        else:
            num_bytes += stored.num_bytes
    return elements, num_bytes


@dataclass(frozen=True)
class Traced:
    """A forward and backward pass of a block."""

    saved: dict[Identity, Stored]
    """What autograd saved."""
    inputs: dict[str, dict[Identity, Stored]]
    """What the watched layers were called with."""
    forward_flops: int
    again_flops: int
    """Operations until the last tensor was saved: as far as a checkpointed block is computed again."""
    backward_flops: int
    events: list[Event]
    """Of the backward pass; gradients of parameters are left out."""


class Opened:
    """What requires a gradient in a block during one pass, besides its input."""

    def __init__(self, block: nn.Module, stack: ExitStack, trace: Trace) -> None:
        self.block, self.trace = block, trace
        self.inputs: dict[str, dict[Identity, Stored]] = {}
        self.marks = [0]
        """Operations until a tensor was saved."""
        self._stack = stack
        self._learning: list[nn.Parameter] = []

    def train(self, parameters: Iterable[nn.Parameter]) -> None:
        """Train parameters; an engine takes the gradient of each as soon as it is there."""
        for parameter in parameters:
            parameter.requires_grad_(True)
            self._learning.append(parameter)
            self._stack.callback(parameter.requires_grad_, False)
            self._stack.callback(parameter.register_post_accumulate_grad_hook(self._take).remove)

    def _take(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        stored = self.trace.stored(gradient)
        parameter.grad = None
        if stored is None:
            return
        largest = parameter.numel() == max(each.numel() for each in self._learning)
        for event in self.trace.events[stored.number :]:
            event.less(*sizes([stored]))
            event.at_weight |= largest

    def watch(self, name: str) -> None:
        """Give the result of a linear layer a gradient of its own, as an adapter does."""

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            stored = self.trace.stored(inputs[0])
            self.inputs.setdefault(name, {}).update({stored.identity: stored} if stored else {})
            # The adapter runs after the layer, which therefore is computed again in a checkpointed block.
            self.marks.append(self.trace.flops)
            if not output.requires_grad:
                output.requires_grad_(True)

        self._stack.callback(self.block.get_submodule(name).register_forward_hook(hook).remove)

    def adapt(self, name: str, lora_rank: int) -> None:
        """Add an adapter to a linear layer."""

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            given = inputs[0].reshape(1, -1, inputs[0].shape[-1])
            a, b = (nn.Parameter(output.new_empty(1, size, lora_rank)) for size in (given.shape[-1], output.shape[-1]))
            self.train([a, b])
            for parameter in (a, b):
                self.trace.leave_out(parameter)
            result = output.reshape(1, -1, output.shape[-1])
            return torch.baddbmm(result, torch.bmm(given, a), b.mT).view(output.shape)

        self._stack.callback(self.block.get_submodule(name).register_forward_hook(hook).remove)


def trace_block(call: BlockCall, open_gradients: Callable[[Opened], None], *, passing: bool, backward: bool = True) -> Traced:
    """Run a block forward and backward on fake tensors.

    Args:
        open_gradients: Makes something of the block require a gradient.
        passing: Whether the block's input has a gradient.
        backward: Whether to run the backward pass too.
    """
    trace, saved = _trace_of(call), dict[Identity, Stored]()
    with ExitStack() as stack:
        opened = Opened(call.block, stack, trace)
        open_gradients(opened)

        def save(tensor: torch.Tensor) -> torch.Tensor:
            stored = trace.stored(tensor)
            if stored is not None:
                saved[stored.identity] = stored
            opened.marks.append(trace.flops)
            return tensor

        hidden = call.input().requires_grad_(passing)
        with trace, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            trace.add(hidden, "input")
            output = call.run(hidden)
        forward, num_stored = trace.flops, trace.num_stored
        if backward and output.requires_grad:
            # The input and the output, which in a model are the next blocks' to keep.
            others = trace.besides(saved.values())
            gradient = torch.empty_like(output)
            with trace:
                trace.add(gradient, "gradient")
                torch.autograd.backward([output], [gradient])
            for event in trace.events[num_stored:]:
                event.less(*others)
    return Traced(saved, opened.inputs, forward, max(opened.marks), trace.flops - forward, trace.events[num_stored:])


def _trace_of(call: BlockCall) -> Trace:
    """Return a trace without what is there before a block is called."""
    trace = Trace()
    given = tree_iter((call.args, dict(call.kwargs)))
    for tensor in (*call.block.parameters(), *call.block.buffers(), *given):
        if isinstance(tensor, torch.Tensor):
            trace.leave_out(tensor)
    return trace


def trace_forward(call: BlockCall) -> list[Event]:
    """Run a block forward, with nothing kept; its input is among what is live."""
    trace, hidden = _trace_of(call), call.input()
    with torch.no_grad(), trace:
        trace.add(hidden, "input")
        call.run(hidden)
    return trace.events
