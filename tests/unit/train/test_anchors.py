"""Anchors against their definitions: exact at any strength, nothing at strength 0, and the same bits whoever calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orchestrator.plan.remedies import LearningGroup
from orchestrator.train.anchors import ElementAnchor, ProductAnchor
from orchestrator.train.engines.torch_engine import TorchEngine

RATE = 0.05


class Pair(nn.Module):
    """Two layers and their squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = nn.Linear(12, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.high(self.low(x).tanh()) - y).square().sum()


def engine_of(model: Pair, groups: list[LearningGroup] | None = None) -> TorchEngine:
    return TorchEngine(model, list(model.named_parameters()), weight_decay=0.0, grad_clip=0.0, groups=groups or ())


def train(engine: TorchEngine, num_steps: int = 5) -> torch.Tensor:
    """What learned, in one row."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        batch = {"x": torch.randn(8, 12, generator=generator), "y": torch.randn(8, 4, generator=generator)}
        engine.backward(engine.loss(batch), 1 / 8)
        engine.step(RATE)
    return torch.cat([tensor.reshape(-1) for tensor in engine.full_tensors().values()])


def trained(strength: float | None, importances: torch.Tensor | None = None) -> torch.Tensor:
    engine = engine_of(Pair())
    if strength is not None:
        weights = None if importances is None else [importances]
        engine.set_anchor(ElementAnchor(engine.anchored_masters(), strength, weights))
    return train(engine)


def start() -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in Pair().parameters()])


def test_a_pull_is_the_minimum_of_the_penalty_and_of_staying() -> None:
    """Of f/2 (w - w0)^2 + (w - v)^2 / (2 r), found by setting its derivative to zero in float64."""
    generator = torch.Generator().manual_seed(2)
    before, moved = torch.randn(40, generator=generator), torch.randn(40, generator=generator)
    importance = torch.rand(40, generator=generator)
    for weights, f in ((None, torch.full((40,), 3.0)), ([importance], 3.0 * importance)):
        master = before.clone()
        anchor = ElementAnchor([master], 3.0, weights)
        master.copy_(moved)
        anchor.pull(master, RATE)
        wanted = (moved.double() / RATE + f.double() * before.double()) / (1 / RATE + f.double())
        torch.testing.assert_close(master.double(), wanted, rtol=1e-6, atol=1e-7)


def test_strength_0_is_plain_training_and_more_strength_stays_nearer() -> None:
    """Also bit for bit, since the pull is then by a share of 0."""
    assert torch.equal(trained(0.0), trained(None))
    distances = [float((trained(strength) - start()).norm()) for strength in (0.0, 1.0, 10.0, 100.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.5 * distances[0]


def test_with_very_large_strength_weights_stay() -> None:
    torch.testing.assert_close(trained(1e9), start(), rtol=0, atol=1e-6)


def test_what_does_not_matter_is_free_and_what_does_is_held() -> None:
    importance = torch.zeros(len(start()))
    importance[:10] = 1e9
    moved = (trained(1.0, importance) - start()).abs()
    assert moved[:10].max() < 1e-6
    assert moved[10:].mean() > 0.01


def test_groups_learn_at_their_rates_and_what_is_new_is_not_pulled() -> None:
    names = [name for name, _ in Pair().named_parameters()]
    groups = [LearningGroup(tuple(names[:2]), 0.0, True), LearningGroup(tuple(names[2:]), 1.0, False)]
    engine = engine_of(Pair(), groups)
    engine.set_anchor(ElementAnchor(engine.anchored_masters(), 1e9))
    moved = (train(engine) - start()).abs()
    num_low = 12 * 6 + 6
    assert torch.equal(moved[:num_low], torch.zeros(num_low))
    assert moved[num_low:].min() > 0


def test_equal_rates_in_several_groups_are_the_numbers_of_one_group() -> None:
    """To the last bits but one: AdamW's kernel rounds otherwise at the ends of what it is given."""
    names = [name for name, _ in Pair().named_parameters()]
    groups = [LearningGroup((name,), 1.0, True) for name in names]
    apart, together = engine_of(Pair(), groups), engine_of(Pair())
    torch.testing.assert_close(train(apart), train(together), rtol=1e-6, atol=1e-7)
    states = apart.state_dict(), together.state_dict()
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-5, atol=1e-7)
    resumed = engine_of(Pair(), groups)
    resumed.load_state_dict(states[0])
    assert torch.equal(train(resumed), train(apart))


def product_norm(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return sum(float((b.double() @ a.double()).square().sum()) for a, b in pairs)


def test_the_pull_on_a_product_is_exact_in_each_factor() -> None:
    """Against the minimum over one factor, the other held, of strength/2 |s B A|^2 + |A - A'|^2 / (2 r), by its gradient."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 30, generator=generator), torch.randn(20, 4, generator=generator)
    was_a, was_b, scale, strength = a.clone(), b.clone(), 2.0, 0.7
    master = torch.zeros(1)
    anchor = ProductAnchor({id(master): [(a, b)]}, strength, scale)
    anchor.pull(master, RATE)
    for value, old, gradient in (
        (a, was_a, scale**2 * was_b.T @ (was_b @ a)),
        (b, was_b, scale**2 * (b @ a) @ a.T),
    ):
        torch.testing.assert_close(strength * gradient, (old - value) / RATE, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.1, 10.0, 1e6])
def test_a_product_shrinks_at_any_strength(strength: float) -> None:
    generator = torch.Generator().manual_seed(4)
    pairs = [(torch.randn(4, 30, generator=generator), torch.randn(20, 4, generator=generator)) for _ in range(3)]
    before, master = product_norm(pairs), torch.zeros(1)
    anchor = ProductAnchor({id(master): pairs}, strength, 2.0)
    norms = [before]
    for _ in range(5):
        anchor.pull(master, RATE)
        norms.append(product_norm(pairs))
    assert norms == sorted(norms, reverse=True)
    assert all(torch.isfinite(tensor).all() for pair in pairs for tensor in pair)
    assert norms[-1] < 1e-3 * before or strength < 1e6
