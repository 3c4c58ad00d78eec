from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from orchestrator.anatomy import LayerSelection
from orchestrator.data import TokenizedSet, build_set
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.model import heads as heads_module
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import Objective, final_norm_of

CPU = torch.device("cpu")


def documents(lengths: list[int], *, labels: list[int] | None = None, seed: int = 0) -> TokenizedSet:
    """Random ids; the second half of each document is supervised."""
    generator = np.random.default_rng(seed)
    pairs = [(generator.integers(3, 97, size=n), np.arange(n) >= n // 2) for n in lengths]
    return build_set(pairs, labels=labels)


def objective_of(base: LoadedBase) -> Objective:
    """The untouched base's objective, with gradients into the embeddings."""
    head = base.anatomy.classifier_weight if base.load.task == "classify" else base.anatomy.head_weight
    model = base.model
    return Objective(
        model,
        model.get_submodule(base.anatomy.backbone),
        model.get_submodule(head.rpartition(".")[0]),
        base.load.task,
        encoder=base.anatomy.kind == "encoder",
        final_norm=final_norm_of(model, base.anatomy),
    )


def alone(base: LoadedBase, data: TokenizedSet, index: int) -> torch.Tensor:
    """Token losses of one document by itself, through the model's own forward and all its logits."""
    ids, supervised = data.document(index)
    logits = base.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].float()
    targets = torch.from_numpy(ids[1:].astype(np.int64))
    return functional.cross_entropy(logits, targets, reduction="none")[torch.from_numpy(supervised[1:])]


@pytest.fixture
def base(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> LoadedBase:
    return base_of(llama_folder())


def test_packed_documents_do_not_see_each_other(base: LoadedBase) -> None:
    data = documents([9, 14, 7, 30, 5, 21])
    (batch,) = RowPlan(48, 8, pack=True).batches(data, np.arange(len(data)))
    assert len(batch.input_ids) < len(data), "nothing was packed"
    scored = objective_of(base)(**to_tensors(batch, CPU), each=True)
    for index in range(len(data)):
        expected = alone(base, data, index)
        torch.testing.assert_close(scored.losses[scored.document_ids == index], expected, rtol=1e-5, atol=1e-5)


def test_packed_documents_have_the_gradient_of_lone_ones(base: LoadedBase) -> None:
    data = documents([9, 14, 7, 30])
    weight = base.model.get_parameter(base.anatomy.embeddings[0])
    weight.requires_grad_(True)
    (batch,) = RowPlan(64, 8, pack=True).batches(data, np.arange(len(data)))
    objective_of(base)(**to_tensors(batch, CPU)).backward()
    packed, weight.grad = weight.grad, None
    torch.cat([alone(base, data, index) for index in range(len(data))]).sum().backward()
    torch.testing.assert_close(packed, weight.grad, rtol=1e-4, atol=1e-5)
    weight.requires_grad_(False)


def test_the_sum_is_that_of_the_losses_one_by_one(base: LoadedBase) -> None:
    data = documents([20, 20, 9])
    (batch,) = RowPlan(32, 4, pack=True).batches(data, np.arange(3))
    tensors = to_tensors(batch, CPU)
    objective = objective_of(base)
    torch.testing.assert_close(objective(**tensors), objective(**tensors, each=True).losses.sum())
    assert objective(**tensors).dtype == torch.float32


def test_long_logits_in_pieces_change_nothing(base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    data = documents([40, 40, 33])
    (batch,) = RowPlan(40, 4, pack=True).batches(data, np.arange(3))
    weight = base.model.get_parameter(base.anatomy.embeddings[0])
    weight.requires_grad_(True)

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        loss = objective_of(base)(**to_tensors(batch, CPU))
        loss.backward()
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        return loss.detach(), gradient

    whole = loss_and_gradient()
    monkeypatch.setattr(heads_module, "LOGIT_CHUNK_BYTES", 4 * 97 * 7)
    pieces = loss_and_gradient()
    torch.testing.assert_close(pieces[0], whole[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(pieces[1], whole[1], rtol=1e-4, atol=1e-5)
    weight.requires_grad_(False)


@pytest.mark.parametrize("task", ["completion", "classify"])
def test_an_empty_micro_batch_adds_nothing_and_has_a_gradient(
    llama_folder: Callable[..., Path],
    base_of: Callable[..., LoadedBase],
    selection_on: Callable[..., LayerSelection],
    task: str,
) -> None:
    base = base_of(llama_folder(), task=task)
    with open_branch(base, selection_on(base, "last:1"), lora_alpha=8, seed=0) as branch:
        norm = final_norm_of(branch.model, base.anatomy)
        objective = Objective(branch.model, branch.backbone(), branch.head(), base.load.task, final_norm=norm)
        data = documents([12], labels=[1])
        (batch,) = RowPlan(16, 2, pack=False, rank=1, num_ranks=2).batches(data, np.arange(1))
        loss = objective(**to_tensors(batch, CPU))
        assert loss.item() == 0.0
        loss.backward()
        assert all(p.grad is not None and not p.grad.any() for _, p in branch.learning_parameters())


def test_a_decoder_classifies_by_its_last_token(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> None:
    base = base_of(llama_folder(), task="classify")
    data = documents([12, 5, 30], labels=[2, 0, 1])
    (batch,) = RowPlan(32, 3, pack=False).batches(data, np.arange(3))
    objective = objective_of(base)
    scored = objective(**to_tensors(batch, CPU), each=True)
    for index in range(3):
        ids = torch.from_numpy(data.document(index)[0].astype(np.int64))[None]
        hidden = base.model.model(input_ids=ids).last_hidden_state[0, -1]
        logits = base.model.get_submodule("score")(hidden).float()
        mine = scored.document_ids == index
        expected = functional.cross_entropy(logits, torch.tensor(int(data.labels[index])))
        torch.testing.assert_close(scored.losses[mine][0], expected, rtol=1e-4, atol=1e-5)
        assert scored.predictions[mine].item() == logits.argmax().item()
    torch.testing.assert_close(objective(**to_tensors(batch, CPU)), scored.losses.sum())


def test_an_encoder_classifies_without_looking_at_padding(bert_folder: Path, base_of: Callable[..., LoadedBase]) -> None:
    base = base_of(bert_folder, task="classify")
    base.model.eval()
    data = documents([12, 5, 30], labels=[2, 0, 1])
    (batch,) = RowPlan(32, 3, pack=False).batches(data, np.arange(3))
    scored = objective_of(base)(**to_tensors(batch, CPU), each=True)
    for index in range(3):
        ids = torch.from_numpy(data.document(index)[0].astype(np.int64))[None]
        logits = base.model(input_ids=ids).logits[0].float()
        expected = functional.cross_entropy(logits, torch.tensor(int(data.labels[index])))
        torch.testing.assert_close(scored.losses[scored.document_ids == index][0], expected, rtol=1e-4, atol=1e-5)


def test_the_final_norm_sees_supervised_positions_alone(base: LoadedBase) -> None:
    data = documents([20, 20, 9])
    (batch,) = RowPlan(32, 4, pack=True).batches(data, np.arange(3))
    norm = base.model.get_submodule("model.norm")
    seen: list[int] = []
    hook = norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    objective = objective_of(base)
    objective(**to_tensors(batch, CPU))
    objective(**to_tensors(batch, CPU), each=True)
    hook.remove()
    assert seen == [batch.num_supervised] * 2
    assert base.model.get_submodule("model.norm") is norm


def test_a_failed_forward_pass_leaves_the_norm_in_its_place(base: LoadedBase) -> None:
    (batch,) = RowPlan(32, 4, pack=True).batches(documents([20]), np.arange(1))
    objective, norm = objective_of(base), base.model.get_submodule("model.norm")

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    hook = base.model.get_submodule("model.layers.2").register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        objective(**to_tensors(batch, CPU))
    hook.remove()
    assert base.model.get_submodule("model.norm") is norm


def test_a_norm_from_elsewhere_is_refused(base: LoadedBase) -> None:
    with pytest.raises(ValueError, match="LlamaModel does not hold its final norm"):
        Objective(base.model, base.model.model, base.model.lm_head, "completion", final_norm=nn.LayerNorm(4))


@pytest.mark.parametrize(("task", "policy"), [("completion", "all"), ("completion", "all+head"), ("classify", "last:1")])
def test_stacked_trials_have_a_loss_each(
    llama_folder: Callable[..., Path],
    base_of: Callable[..., LoadedBase],
    selection_on: Callable[..., LayerSelection],
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    policy: str,
) -> None:
    """Losses, and gradients of the states that they are made of: the same bits as alone, whatever the neighbour comes to."""
    monkeypatch.setattr(heads_module, "LOGIT_CHUNK_BYTES", 4 * 97 * 7)
    base = base_of(llama_folder(), task=task)
    data = documents([12, 9, 14], labels=[1, 0, 2] if task == "classify" else None)
    (batch,) = RowPlan(24, 3, pack=task != "classify").batches(data, np.arange(3))
    tensors = to_tensors(batch, CPU)
    stacked = {name: tensor.repeat(3, *[1] * (tensor.dim() - 1)) for name, tensor in tensors.items()}
    with open_branch(base, selection_on(base, policy), lora_alpha=8, seed=0) as branch:
        norm = final_norm_of(branch.model, base.anatomy)
        objective = Objective(branch.model, branch.backbone(), branch.head(), base.load.task, final_norm=norm)
        made: list[torch.Tensor] = []
        hook = branch.backbone().register_forward_hook(lambda _, __, output: spoil_the_second_of_three(output, made))
        alone, sums = objective(**tensors), objective(**stacked, num_trials=3)
        hook.remove()
        (alone + sums[0] + sums[2]).backward()
    assert sums.dtype == torch.float32
    assert sums.isnan().tolist() == [False, True, False]
    assert torch.equal(sums[0], alone)
    assert torch.equal(sums[2], alone)
    expected, found = (states.grad for states in made)
    assert expected is not None
    assert found is not None
    first, second, third = found.chunk(3)
    assert expected.any()
    assert not second.any()
    same = torch.equal if task == "completion" else torch.allclose  # products of three rows round as they like
    assert same(first, expected)
    assert same(third, expected)


def spoil_the_second_of_three(output: Any, made: list[torch.Tensor]) -> Any:
    """Note the states and their gradients; of stacked trials the second's are no numbers from here on."""
    made.append(output.last_hidden_state)
    made[-1].retain_grad()
    if len(made) == 2:
        first, second, third = made[-1].chunk(3)
        output.last_hidden_state = torch.cat([first, torch.full_like(second, float("nan")), third])
    return output
