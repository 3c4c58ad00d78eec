"""Count allocations and operations on tensors without memory.

Under torch's FakeTensorMode shapes, lifetimes and kernels are real and numbers are not, so that a block of any size is counted in
a moment.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
BY_MASK = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Stored(NamedTuple):
    """A storage, as it was allocated."""

    number: int
    """Counts the storages from 0 in the order of their allocation."""
    num_bytes: int
    element_bytes: int
    """Bytes of an element if it is floating-point, else 0."""
    operator: str
    occurrence: int
    """How many storages of this size the operator had made before."""

    @property
    def identity(self) -> tuple[str, int, int]:
        """What makes it the same storage in another pass of the same module. Its number does not: where other things have
        gradients, an operator that works in place may first copy its input."""
        return self.operator, self.num_bytes, self.occurrence


class AllocationCounter(TorchDispatchMode):
    """Bytes of live storages, as the operators that run inside make them and let go of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_operator = ""
        self._known: dict[int, Stored] = {}
        self._outside: set[int] = set()
        self._num_stored = 0
        self._occurrences: Counter[tuple[str, int]] = Counter()

    def add(self, tensor: torch.Tensor, operator: str) -> None:
        """Count a tensor's storage until it is gone."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known or key in self._outside:
            return
        element_bytes = tensor.itemsize if tensor.is_floating_point() else 0
        occurrence = self._occurrences[operator, num_bytes]
        self._known[key] = stored = Stored(self._num_stored, num_bytes, element_bytes, operator, occurrence)
        self._num_stored += 1
        self._occurrences[operator, num_bytes] += 1
        weakref.finalize(storage, self._forget, key)
        self.live_bytes += num_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_operator = self.live_bytes, operator
        self.allocated(stored, tensor, operator)

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor's storage, nor views of it: what was there before."""
        storage = tensor.untyped_storage()
        self._forget(storage._cdata)
        self._outside.add(storage._cdata)
        weakref.finalize(storage, self._outside.discard, storage._cdata)

    def stored(self, tensor: torch.Tensor) -> Stored | None:
        """Return a tensor's storage; None if it was not allocated inside."""
        return self._known.get(tensor.untyped_storage()._cdata)

    def allocated(self, stored: Stored, tensor: torch.Tensor, operator: str) -> None:
        """Called after each allocation, for subclasses."""

    def freed(self, stored: Stored) -> None:
        """Called after a storage is gone, for subclasses."""

    def _forget(self, key: int) -> None:
        stored = self._known.pop(key, None)
        if stored is None:
            return
        self.live_bytes -= stored.num_bytes
        self.freed(stored)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is aten._local_scalar_dense.default:
            return 1.0  # a fake tensor has no value to look at: the gradient norm
        if operator in BY_MASK:
            args = self._all_positions(args)
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor, str(operator))
        return result

    def _all_positions(self, args: Any) -> Any:
        """An index by a mask, whose result depends on values, as the one by all positions that it stands for."""
        tensor, indices, *rest = args
        if len(indices) != 1 or indices[0] is None or indices[0].dtype != torch.bool:
            return args
        mask = indices[0]
        positions = [mask.new_empty((mask.numel(),), dtype=torch.long) for _ in mask.shape]
        for position in positions:
            self.add(position, "aten.nonzero")
        return (tensor, positions, *rest)


def operator_flops(operator: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the operations of one operator: those that torch's FlopCounterMode counts, and the kernels that it does not know."""
    packet = getattr(operator, "_overloadpacket", operator)
    if packet in KERNELS:
        return KERNELS[packet](*args)
    formula = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=result) if formula is not None else 0


def _attention(query: Any, key: Any, value: Any, *_: Any) -> int:
    return sdpa_flop_count(query.shape, _of_heads(query, key), _of_heads(query, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, _of_heads(query, key), _of_heads(query, value))


def _of_heads(query: Any, states: Any) -> list[int]:
    """Return the shape of keys or values with as many heads as the queries, each of which multiplies them."""
    return [states.shape[0], query.shape[1], *states.shape[2:]]


def _grouped(first: Any, second: Any, *_: Any) -> int:
    """Count [S, in] x [experts, in, out], or of the gradient of the weight [in, S] x [S, out]."""
    return 2 * first.shape[-2] * first.shape[-1] * second.shape[-1]


KERNELS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._grouped_mm: _grouped,
}


def fake_parameters(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors in the place of a meta model's own."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(fake(parameter, mode), requires_grad=parameter.requires_grad)
                module._parameters[name] = known[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake(buffer, mode)


def fake(tensor: torch.Tensor, mode: FakeTensorMode) -> FakeTensor:
    return FakeTensor(mode, torch.empty_like(tensor, device="meta"), torch.device("cpu"))
