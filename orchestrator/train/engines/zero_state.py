"""Access to the fp32 master weights of each ZeRO stage of deepspeed 0.19.8, and their way back into the model.

A rank's state is `master.<i>` and `<moment>.<i>` of its i-th flat master: complete tensors at stage 0, this rank's partition
above. `engine.save_checkpoint` is not used: it pickles, and it fails on 4-bit weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from orchestrator.errors import TrainingError


def masters(engine: Any) -> list[torch.Tensor]:
    """Return the tensors that AdamW updates on this rank."""
    optimizer = engine.optimizer
    match type(optimizer).__name__:
        case "BF16_Optimizer":
            return list(optimizer.fp32_groups_flat_partition)
        case "DeepSpeedZeroOptimizer":
            return list(optimizer.single_partition_of_fp32_groups)
        case "DeepSpeedZeroOptimizer_Stage3":
            return list(optimizer.fp32_partitioned_groups_flat)
        case "FP16_UnfusedOptimizer":
            return [master for group in optimizer.fp32_groups for master in group]
        case "AnchoredAdamW" | "SquaredGradients":
            return [parameter for group in optimizer.param_groups for parameter in group["params"]]
        case other:
            raise TrainingError(
                f"deepspeed's optimizer {other} keeps its fp32 master weights in an unknown place",
                remedy="install the versions of constraints.txt",
            )


def masters_of_groups(engine: Any, wanted: Sequence[bool]) -> list[torch.Tensor]:
    """Return the master weights of the wanted parameter groups of the optimizer."""
    optimizer = engine.optimizer
    match type(optimizer).__name__:
        case "DeepSpeedZeroOptimizer_Stage3":
            groups = [optimizer.sub_group_to_group_id[index] for index in range(len(optimizer.fp32_partitioned_groups_flat))]
        case "FP16_UnfusedOptimizer":
            groups = [index for index, group in enumerate(optimizer.fp32_groups) for _ in group]
        case "AnchoredAdamW" | "SquaredGradients":
            groups = [index for index, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        case _:
            groups = list(range(len(wanted)))
    return [master for group, master in zip(groups, masters(engine), strict=True) if wanted[group]]


def save(engine: Any) -> dict[str, torch.Tensor]:
    """Return copies of this rank's master weights and moments, on the CPU."""
    state: dict[str, torch.Tensor] = {}
    for index, master in enumerate(masters(engine)):
        state[f"master.{index}"] = master.detach().cpu().clone()
        for key, value in engine.basic_optimizer.state.get(master, {}).items():
            if torch.is_tensor(value):
                state[f"{key}.{index}"] = value.detach().cpu().clone()
    return state


@torch.no_grad()
def load(engine: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Load master weights and moments from `state`, and round the master weights into the model's own tensors."""
    for index, master in enumerate(masters(engine)):
        master.data.copy_(state[f"master.{index}"])
        moments = {key.rpartition(".")[0]: value for key, value in state.items() if key.endswith(f".{index}")}
        del moments["master"]
        if moments:
            engine.basic_optimizer.state[master] = {key: value.to(master.device, copy=True) for key, value in moments.items()}
    _write_back(engine.optimizer)


def num_bytes(engine: Any) -> int:
    """Return the bytes of master weights and moments on this rank."""
    tensors = [
        tensor
        for master in masters(engine)
        for tensor in (master, *engine.basic_optimizer.state.get(master, {}).values())
        if torch.is_tensor(tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _write_back(optimizer: Any) -> None:
    match type(optimizer).__name__:
        case "BF16_Optimizer" | "DeepSpeedZeroOptimizer":
            # DeepSpeed has no common method for this: each class rounds its master weights into the model in another one.
            optimizer.update_lp_params()
        case "DeepSpeedZeroOptimizer_Stage3":
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
        case "FP16_UnfusedOptimizer":
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for parameter, master in zip(low, high, strict=True):
                    parameter.copy_(master)
