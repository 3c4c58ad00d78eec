"""ZeRO-3 in a process that runs many trials: the cleanup of what deepspeed 0.19.8 leaves behind.

The base is partitioned once and stays so. An engine leaves, on modules and parameters that outlive it: its place in
FWD_MODULE_STACK, an entry per module in a class-wide cache (`__params_to_release`), `pre_bwd_fn` and `post_bwd_fn`
on modules (a later backward pass would call the *first* engine), `_z3_optimizer` on parameters, and after a failure
gathered parameters that are never partitioned again. `release` removes all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from orchestrator.train.ranks import Ranks

_MODULE_ATTRIBUTES = (
    "pre_bwd_fn",
    "post_bwd_fn",
    "applied_pre_backward_ref_cnt",
    "ds_grads_remaining",
    "ds_id",
    "ds_recompute_parameters",
    "ds_inflight_param_registry",
    "_external_params",
)


class PartitionKeeper:
    """Keeps this rank's part of the base's unfrozen tensors in host memory; see `train.adapters.branch.WeightKeeper`."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def save(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._saved = [
            (p, p.ds_tensor.data, p.ds_tensor.data.to("cpu", copy=True))  # type: ignore[attr-defined]
            for _, p in parameters
        ]

    def restore(self) -> None:
        for parameter, own, values in self._saved:
            _partition_again(parameter)
            own.copy_(values)
            parameter.ds_tensor.data = own
        self._saved = []

    @contextmanager
    def whole(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield


def partition(model: nn.Module, config: dict[str, Any], device: torch.device | None, *, offload: str) -> None:
    """Leave each rank its part of every parameter; with `offload: parameters` on the CPU.

    A model on the CPU passes through the device one parameter at a time. Its buffers stay complete and go to `device` if one is
    given.
    """
    import deepspeed

    remote = "cpu" if offload == "parameters" else None
    deepspeed.zero.Init(module=model, config_dict_or_path=config, remote_device=remote)
    for module in model.modules() if device is not None else ():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def gather(parameters: Sequence[tuple[str, nn.Parameter]], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Gather complete parameters on rank 0's CPU, one at a time; other ranks take part and get an empty dictionary."""
    import deepspeed

    whole: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        with deepspeed.zero.GatheredParameters([parameter]):
            if ranks.first:
                whole[name] = parameter.detach().cpu().clone()
    return whole


def assign_whole(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter, partitioned or not, to a complete value, which every rank has."""
    import deepspeed

    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


def release(objective: nn.Module) -> None:
    """Remove every trace of a destroyed engine from the model and from the library."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
    _release_cache().cache_clear()
    modules: list[Any] = list(objective.modules())
    for module in modules:
        for name in _MODULE_ATTRIBUTES:
            module.__dict__.pop(name, None)
        # Set while a module computes; a failure leaves it set, and reading a parameter would then gather it.
        if hasattr(module._parameters, "_in_forward"):
            module._parameters._in_forward = False
    parameters: list[Any] = list(objective.parameters())
    for parameter in parameters:
        parameter.__dict__.pop("_z3_optimizer", None)
        if hasattr(parameter, "ds_tensor"):
            _partition_again(parameter)


def _release_cache() -> Any:
    """Return the lru_cache of `__params_to_release`, which keeps every coordinator and module alive; a decorator hides it."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for holder in (method, *(cell.cell_contents for cell in method.__closure__ or ())):
        if hasattr(holder, "cache_clear"):
            return holder
    raise RuntimeError("this deepspeed keeps no cache of __params_to_release: read its source again and fix this module")


def _partition_again(parameter: Any) -> None:
    """Release the complete parameter if a failure, or the last forward pass, left it gathered."""
    parameter.ds_active_sub_modules.clear()
    if parameter.ds_status.name == "AVAILABLE":
        parameter.partition()
