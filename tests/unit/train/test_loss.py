"""The projection's cross entropy against torch's own, and each group by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from orchestrator.train.model import loss as loss_module
from orchestrator.train.model.loss import LogitMap, is_plain, linear_cross_entropy, token_losses

HIDDEN, VOCAB, ROWS = 48, 131, 60


def make_head(dtype: torch.dtype, *, bias: bool = False, learns: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=dtype)
    return head.requires_grad_(learns)


def make_inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True), torch.randint(0, VOCAB, (rows,))


def plain(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


def gradients(loss: torch.Tensor, head: nn.Linear, hidden: torch.Tensor, scale: float) -> list[torch.Tensor]:
    (loss * scale).sum().backward()
    found = [tensor.grad for tensor in (hidden, *head.parameters()) if tensor.grad is not None]
    hidden.grad = None
    head.zero_grad()
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [ROWS, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_those_of_plain_torch(
    dtype: torch.dtype, chunk_rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "LOGIT_PIECE_BYTES", 4 * VOCAB * 7)
    head, (hidden, targets) = make_head(dtype, bias=bias), make_inputs(dtype)
    loss = linear_cross_entropy(head, hidden, targets, chunk_rows=chunk_rows)
    expected = plain(head, hidden, targets)
    torch.testing.assert_close(loss[0], expected, rtol=1e-6, atol=0.0)
    found, wanted = gradients(loss, head, hidden, 1 / 13), gradients(expected, head, hidden, 1 / 13)
    assert len(found) == len(wanted) == 2 + bias
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        exact = dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=1e-5 if exact else 0.02, atol=1e-6 if exact else 2e-3)


@pytest.mark.parametrize("logit_map", [LogitMap(0.25), LogitMap(3.0, 2.0), LogitMap(1.0, 5.0)])
@pytest.mark.parametrize("chunk_rows", [ROWS, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_and_capped_logits_have_the_gradients_of_autograd(
    dtype: torch.dtype, chunk_rows: int, logit_map: LogitMap
) -> None:
    head, (hidden, targets) = make_head(dtype, bias=True), make_inputs(dtype)
    loss = linear_cross_entropy(head, hidden, targets, chunk_rows=chunk_rows, logit_map=logit_map)
    z = head(hidden).float() * logit_map.scale
    logits = logit_map.cap * torch.tanh(z / logit_map.cap) if logit_map.cap else z
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss[0], expected, rtol=1e-6, atol=0.0)
    exact = dtype == torch.float32
    for mine, theirs in zip(gradients(loss, head, hidden, 1 / 13), gradients(expected, head, hidden, 1 / 13), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5 if exact else 0.02, atol=1e-6 if exact else 6e-3)


def test_a_frozen_head_has_no_gradient_and_a_lone_head_needs_none_below() -> None:
    hidden, targets = make_inputs(torch.float32)
    frozen = make_head(torch.float32, learns=False)
    linear_cross_entropy(frozen, hidden, targets, chunk_rows=9).sum().backward()
    assert frozen.weight.grad is None
    assert hidden.grad is not None
    head = make_head(torch.float32)
    linear_cross_entropy(head, hidden.detach(), targets, chunk_rows=9).sum().backward()
    assert head.weight.grad is not None


def test_the_full_logits_are_never_there() -> None:
    """At most a chunk of them, and each chunk is computed once."""
    head, (hidden, targets) = make_head(torch.float32, learns=False), make_inputs(torch.float32)
    seen: list[int] = []
    linear = functional.linear

    class Watched:
        @staticmethod
        def linear(*arguments: torch.Tensor) -> torch.Tensor:
            logits = linear(*arguments)
            seen.append(logits.shape[0])
            return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "functional", Watched)
        linear_cross_entropy(head, hidden, targets, chunk_rows=25).sum().backward()
    assert seen == [25, 25, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_has_the_same_bits_alone_and_in_company(dtype: torch.dtype) -> None:
    head, (hidden, targets) = make_head(dtype, learns=False), make_inputs(dtype)
    groups, scales = 4, torch.tensor([0.1, 0.3, 0.7, 0.9])
    sums = linear_cross_entropy(head, hidden, targets, chunk_rows=7, num_groups=groups)
    (sums * scales).sum().backward()
    assert hidden.grad is not None
    for group, (states, wanted) in enumerate(zip(hidden.detach().chunk(groups), targets.chunk(groups), strict=True)):
        states.requires_grad_(True)
        alone = linear_cross_entropy(head, states, wanted, chunk_rows=7)
        (alone[0] * scales[group]).backward()
        assert torch.equal(alone[0], sums[group])
        assert states.grad is not None
        assert torch.equal(states.grad, hidden.grad.chunk(groups)[group])


def test_what_is_not_a_number_stays_in_its_group() -> None:
    head, (hidden, targets) = make_head(torch.float32, learns=False), make_inputs(torch.float32)
    broken = hidden.detach().clone()
    broken[20:40] = float("nan")
    broken.requires_grad_(True)
    whole = linear_cross_entropy(head, hidden, targets, chunk_rows=9, num_groups=3)
    sums = linear_cross_entropy(head, broken, targets, chunk_rows=9, num_groups=3)
    whole.sum().backward()
    sums.sum().backward()
    assert sums.isnan().tolist() == [False, True, False]
    assert torch.equal(sums[[0, 2]], whole[[0, 2]])
    assert broken.grad is not None
    assert hidden.grad is not None
    assert torch.equal(broken.grad[:20], hidden.grad[:20])
    assert torch.equal(broken.grad[40:], hidden.grad[40:])


def test_no_position_gives_zero_and_zero_gradients() -> None:
    head, (hidden, targets) = make_head(torch.float32), make_inputs(torch.float32, rows=0)
    sums = linear_cross_entropy(head, hidden, targets, chunk_rows=9)
    sums.sum().backward()
    assert sums.tolist() == [0.0]
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    assert linear_cross_entropy(head.requires_grad_(False), hidden, targets, chunk_rows=9, num_groups=3).tolist() == [0.0] * 3


def test_groups_that_cannot_be_are_refused() -> None:
    hidden, targets = make_inputs(torch.float32)
    with pytest.raises(ValueError, match="60 positions are not 7 groups"):
        linear_cross_entropy(make_head(torch.float32, learns=False), hidden, targets, chunk_rows=9, num_groups=7)
    with pytest.raises(ValueError, match="a trainable head has one group"):
        linear_cross_entropy(make_head(torch.float32), hidden, targets, chunk_rows=9, num_groups=3)


def test_scores_are_the_losses_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGIT_PIECE_BYTES", 4 * VOCAB * 7)
    head, (hidden, targets) = make_head(torch.bfloat16), make_inputs(torch.bfloat16)
    with torch.no_grad():
        logits = head(hidden)
    losses, predictions = token_losses(logits, targets)
    assert torch.equal(losses, functional.cross_entropy(logits.float(), targets, reduction="none"))
    assert torch.equal(predictions, logits.float().argmax(-1))


def test_a_plain_head_is_one_whole_matrix() -> None:
    class Adapted(nn.Linear): ...

    partitioned = make_head(torch.float32)
    partitioned.weight.ds_tensor = partitioned.weight.data  # type: ignore[attr-defined]
    assert is_plain(make_head(torch.float32, bias=True))
    assert not is_plain(Adapted(2, 2))
    assert not is_plain(partitioned)
