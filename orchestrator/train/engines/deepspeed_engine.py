"""The engine that partitions across ranks: DeepSpeed, ZeRO 0 to 3.

Checked against deepspeed 0.19.8. How it is used here:

* `managed_gradient_accumulation: false`: `backward` accumulates and `step` is the boundary, so a step may have any number of
rounds. DeepSpeed averages gradients over the ranks; `backward` multiplies by their number to get the sum.
* Gradients are summed and sent in float32 (`grad_accum_dtype`, `communication_data_type`), masters and moments are
  float32. Only ZeRO 0 in bf16 sums rounds in bf16, since DeepSpeed offers nothing else there.
* torch's fused AdamW: DeepSpeed's own is compiled at first use, and torch's other variants hold two more copies of what they
update.
* Small buckets, as large as the plan counts them.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

import torch
from torch import nn

from orchestrator.plan.memory.resident import REDUCE_BUCKET_ELEMENTS
from orchestrator.plan.remedies import LearningGroup
from orchestrator.train.anchors import Anchor, AnchoredAdamW, SquaredGradients
from orchestrator.train.engines import zero3_warm, zero_state
from orchestrator.train.engines.engine import ADAM_BETAS, ADAM_EPSILON, check_norm, register_engine
from orchestrator.train.ranks import Ranks
from orchestrator.work.execution import ExecutionPlan, TrainSettings


def deepspeed_config(execution: ExecutionPlan, *, grad_clip: float) -> dict[str, Any]:
    """Return DeepSpeed's configuration of one engine: the only place in this project that writes one."""
    bf16 = execution.dtype == "bfloat16"
    accumulate_bf16 = bf16 and execution.zero_stage == 0
    zero: dict[str, Any] = {
        "stage": execution.zero_stage,
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        "allgather_bucket_size": REDUCE_BUCKET_ELEMENTS,
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    if execution.zero_stage == 3:
        zero |= {
            # At the default, small parameters stay whole on every rank: restoring the base would then silently keep a trial's
            # weights.
            "stage3_param_persistence_threshold": 0,
            # A gathered weight is released at once; at the default it waits for its next use, in memory that the plan does not
            # count.
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": REDUCE_BUCKET_ELEMENTS,
            # One sub-group per parameter group of ordinary size: masters and moments are saved by the number of their sub-
            # group.
            "sub_group_size": 10**9,
        }
        pin = execution.device == "cuda"
        if execution.offload in ("optimizer", "parameters"):
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
        if execution.offload == "parameters":
            zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
    return {
        # DeepSpeed demands a batch size. Ours varies from round to round, and only its own counters use this one.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed would count rounds up to a fixed number; our steps have any number of rounds.
        "managed_gradient_accumulation": False,
        "gradient_clipping": grad_clip,
        # Without the check a NaN would reach the weights; with it the step is skipped, and `step` raises.
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "bf16" if accumulate_bf16 else "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # With offloading DeepSpeed would demand its own CPU Adam, which is compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
        # Never: DeepSpeed would print its own progress every ten steps.
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedTrainer:
    """One trial's DeepSpeed engine; see `orchestrator.train.engines.engine.Engine`."""

    def __init__(
        self,
        objective: nn.Module,
        learning_parameters: Sequence[tuple[str, nn.Parameter]],
        execution: ExecutionPlan,
        settings: TrainSettings,
        ranks: Ranks,
        groups: Sequence[LearningGroup] = (),
        *,
        measuring: bool = False,
    ) -> None:
        """
        Args:
            groups: Parameter groups over the trainable tensors, in their order; without them all have one rate.
            measuring: Whether steps sum squared gradients and change no weight.
        """
        self.objective = objective
        # From stage 2 on gradients are reduced as soon as a bucket is full, so in the backward pass.
        self.communicates_in_backward = execution.zero_stage >= 2
        self._learning = list(learning_parameters)
        self._stage = execution.zero_stage
        self._ranks = ranks
        self._groups = list(groups) or [LearningGroup(tuple(name for name, _ in self._learning), 1.0, True)]
        parameters = dict(self._learning)
        grouped: list[dict[str, Any]] = [{"params": [parameters[name] for name in group.names]} for group in self._groups]
        self._optimizer = (
            SquaredGradients(grouped)
            if measuring
            else AnchoredAdamW(
                grouped, lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=settings.weight_decay, fused=True
            )
        )
        clip = 0.0 if measuring else settings.grad_clip
        self._engine: Any = _initialize(objective, deepspeed_config(execution, grad_clip=clip), self._optimizer)
        self.name = f"{type(self._engine).__name__}/{type(self._engine.optimizer).__name__}"
        coordinator = [self._engine.optimizer.parameter_offload.param_coordinator] if self._stage == 3 else []
        register_engine(self._engine, self._engine.optimizer, *coordinator)

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._engine(**batch)

    def backward(self, loss_sum: torch.Tensor, scale: float) -> None:
        # DeepSpeed averages over ranks, and our gradients are sums: hence the number of ranks as a factor.
        self._engine.backward(loss_sum * (scale * self._ranks.count), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        for group, options in zip(self._groups, self._engine.basic_optimizer.param_groups, strict=True):
            options["lr"] = learning_rate * group.rate_factor
        if self._engine.optimizer is self._engine.basic_optimizer:
            return self._step_without_wrapper()
        self._engine.step()
        # On an overflow DeepSpeed skips the update and only sets this flag.
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        return check_norm(float("nan") if overflow else float(self._engine.get_global_grad_norm()))

    def full_tensors(self) -> dict[str, torch.Tensor]:
        if self._stage == 3:
            return zero3_warm.gather(self._learning, self._ranks)
        return {name: parameter.detach().cpu().clone() for name, parameter in self._learning}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return zero_state.save(self._engine)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        zero_state.load(self._engine, state)

    def set_anchor(self, anchor: Anchor) -> None:
        assert isinstance(self._optimizer, AnchoredAdamW), "an engine built with measuring=True takes no anchor"
        self._optimizer.anchor = anchor

    def refresh_masters(self) -> None:
        if self._engine.optimizer is not self._engine.basic_optimizer:
            self._engine.optimizer.refresh_fp32_params()

    def anchored_masters(self) -> list[torch.Tensor]:
        return zero_state.masters_of_groups(self._engine, [group.anchored for group in self._groups])

    def squared_gradients(self) -> list[torch.Tensor]:
        assert isinstance(self._optimizer, SquaredGradients), "only an engine built with measuring=True sums squared gradients"
        return [self._optimizer.sums[id(master)] for master in self.anchored_masters()]

    @property
    def state_bytes(self) -> int:
        return zero_state.num_bytes(self._engine)

    def close(self) -> None:
        engine, self._engine = self._engine, None
        _release(engine, self.objective, self._stage)

    def _step_without_wrapper(self) -> float:
        """Reduce the gradients and check the norm before the step: at ZeRO 0 in float32 DeepSpeed steps torch's own optimizer
        without."""
        # What `engine.step` does around a step: the engine reduces gradients only at a boundary, and this flag marks one.
        self._engine._running_engine_step = True
        self._engine.allreduce_gradients()
        gradients = [parameter.grad for _, parameter in self._learning if parameter.grad is not None]
        norm = check_norm(float(nn.utils.get_total_norm(gradients)))
        clip = self._engine.gradient_clipping()
        if 0 < clip < norm:
            for gradient in gradients:
                # The epsilon of torch's `clip_grad_norm_`, as in the torch engine: both engines give the same losses.
                gradient.mul_(clip / (norm + 1e-6))
        self._engine.optimizer.step()
        self._engine.zero_grad()
        self._engine._running_engine_step = False
        return norm


def prepare_base(model: nn.Module, execution: ExecutionPlan, device: torch.device | None = None) -> None:
    """Start DeepSpeed's communication, and for ZeRO-3 partition the base; it stays so until the process ends.

    Args:
        device: Where the model computes, if it was loaded elsewhere.
    """
    deepspeed = load_deepspeed(execution.device)
    # No discovery: with a variable missing DeepSpeed would look for MPI instead of failing.
    deepspeed.init_distributed(dist_backend=execution.backend, auto_mpi_discovery=False, verbose=False)
    if execution.zero_stage == 3:
        zero3_warm.partition(model, deepspeed_config(execution, grad_clip=0.0), device, offload=execution.offload)


@contextmanager
def forward_only(objective: nn.Module, execution: ExecutionPlan) -> Iterator[None]:
    """Let a partitioned base compute without trainable parameters: its parts are gathered module by module."""
    engine = _initialize(objective, deepspeed_config(execution, grad_clip=0.0), None)
    try:
        yield
    finally:
        _release(engine, objective, 3)


def _initialize(objective: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> Any:
    """Return a DeepSpeed engine around `objective`, without broadcasting frozen weights: every rank loaded the same files."""
    deepspeed = load_deepspeed("")
    engine_class = deepspeed.DeepSpeedEngine
    broadcast = engine_class._broadcast_model
    # Each engine of a gang would broadcast the whole base again, for every trial.
    engine_class._broadcast_model = _broadcast_learning
    try:
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory, whatever the log level
            return deepspeed.initialize(model=objective, optimizer=optimizer, config=config, dist_init_required=False)[0]
    finally:
        engine_class._broadcast_model = broadcast


def _broadcast_learning(engine: Any) -> None:
    """Broadcast rank 0's trainable parameters: they were made from one seed, so this is a safeguard."""
    for parameter in engine.module.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_status"):
            torch.distributed.broadcast(parameter.data, 0, group=engine.seq_data_parallel_group)


def _release(engine: Any, objective: nn.Module, stage: int) -> None:
    """Detach the engine from the model, so that neither keeps the other alive."""
    # `destroy` leaves the hooks on the model: they kept 12 to 117 MB of old tensors alive over 30 trials.
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    if stage == 3:
        zero3_warm.release(objective)
    for parameter in objective.parameters():
        parameter.grad = None
    engine.optimizer = engine.basic_optimizer = None


def load_deepspeed(device: str) -> Any:
    """Import DeepSpeed quietly, for the planned device, and without compiling its shared-memory operator on a CPU.

    On first import it stores the current process group in default arguments for the life of the process: so it is imported
    before one exists.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device == "cpu":
        # Compiling that operator took 104 s from a cold cache, longer than Ray Train waits for a worker group to start.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
