from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from orchestrator.errors import NonFiniteLossError
from orchestrator.plan.memory.resident import REDUCE_BUCKET_ELEMENTS
from orchestrator.train.engines.deepspeed_engine import deepspeed_config
from orchestrator.train.engines.engine import layout_of, num_live_engines
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.work.execution import ExecutionPlan


class Line(nn.Module):
    """A bf16 layer and its squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 8, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layer(x).float() - y).square().sum()


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(4, 16, generator=generator).bfloat16(), "y": torch.randn(4, 8, generator=generator)}
        for _ in range(count)
    ]


def engine_of(model: Line, *, weight_decay: float = 0.1, grad_clip: float = 0.5) -> TorchEngine:
    return TorchEngine(model, list(model.named_parameters()), weight_decay=weight_decay, grad_clip=grad_clip)


def train(engine: TorchEngine, steps: list[list[dict[str, torch.Tensor]]], rate: float = 0.05) -> list[float]:
    norms = []
    for rounds in steps:
        for batch in rounds:
            engine.backward(engine.loss(batch), 1 / 32)
        norms.append(engine.step(rate))
    return norms


def test_the_arithmetic_is_float32_adamw_on_masters() -> None:
    """Against torch's AdamW and clip_grad_norm_ on float32 copies, gradients added up in float32 by hand."""
    model, reference = Line(), Line()
    masters = [nn.Parameter(p.detach().float()) for p in reference.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=0.05, weight_decay=0.1)
    steps = [batches(6)[i : i + 2] for i in (0, 2, 4)]
    norms = train(engine_of(model), steps)
    for rounds, norm in zip(steps, norms, strict=True):
        for master in masters:
            master.grad = torch.zeros_like(master)
        for batch in rounds:
            reference.zero_grad()
            (reference(**batch) / 32).backward()
            for master, parameter in zip(masters, reference.parameters(), strict=True):
                assert parameter.grad is not None
                assert master.grad is not None
                master.grad += parameter.grad.float()
        assert norm == pytest.approx(nn.utils.clip_grad_norm_(masters, 0.5).item(), rel=1e-5)
        optimizer.step()
        for master, parameter in zip(masters, reference.parameters(), strict=True):
            parameter.data.copy_(master)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_small_updates_are_kept_in_the_masters() -> None:
    """A step too small for bf16 changes no weight, and many of them do."""
    model = Line()
    before = model.layer.weight.detach().clone()
    engine = engine_of(model, weight_decay=0.0)
    batch = batches(1)
    train(engine, [batch], rate=1e-6)
    assert torch.equal(model.layer.weight, before)
    train(engine, [batch] * 3000, rate=1e-6)
    assert not torch.equal(model.layer.weight, before)


def test_no_weight_moves_when_the_norm_is_not_finite() -> None:
    model = Line()
    engine = engine_of(model)
    train(engine, [batches(1)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    poisoned = batches(1)[0]
    poisoned["y"][0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match="gradient norm"):
        train(engine, [[poisoned]])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_state_goes_on_bit_identically() -> None:
    straight, first, second = Line(), Line(), Line()
    steps = [[batch] for batch in batches(6)]
    train(engine_of(straight), steps)
    engine = engine_of(first)
    train(engine, steps[:3])
    resumed = engine_of(second)
    resumed.load_state_dict(engine.state_dict())
    assert torch.equal(second.layer.weight, first.layer.weight)
    train(resumed, steps[3:])
    assert torch.equal(second.layer.weight, straight.layer.weight)
    assert torch.equal(second.layer.bias, straight.layer.bias)


def test_a_closed_engine_is_collected() -> None:
    gc.collect()
    before = num_live_engines()
    engine = engine_of(Line())
    train(engine, [batches(1)])
    assert num_live_engines() == before + 1
    assert engine.state_bytes == 4 * 3 * (16 * 8 + 8) + 4
    engine.close()
    del engine
    assert num_live_engines() == before


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_deepspeed_config_of_a_plan(stage: int) -> None:
    execution = ExecutionPlan.model_validate(
        {
            "device": "cpu",
            "ranks": 2,
            "threads_per_rank": 1,
            "executor": "deepspeed",
            "zero_stage": stage,
            "offload": "parameters" if stage == 3 else "none",
            "row_tokens": 8,
            "micro_batch_rows": 1,
        }
    )
    config = deepspeed_config(execution, grad_clip=0.7)
    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["reduce_bucket_size"] == REDUCE_BUCKET_ELEMENTS, "what the plan counts"
    assert config["gradient_clipping"] == 0.7
    assert config["communication_data_type"] == "fp32"
    assert (zero.get("stage3_param_persistence_threshold") == 0) == (stage == 3)
    assert ("offload_param" in zero) == (stage == 3)
    assert layout_of(execution) == f"zero-{stage} bfloat16"
