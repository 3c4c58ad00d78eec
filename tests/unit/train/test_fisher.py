"""EWC's Fisher information against brute force: each document alone, its gradient squared by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.anatomy import LayerSelection
from orchestrator.data import TokenizedSet, build_set
from orchestrator.plan.remedies import FISHER_DOCUMENTS
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.batches import RowPlan
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.measure.fisher import fisher_information, importances, read_fisher, write_fisher
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import objective_of
from orchestrator.train.model.recompute import recomputed
from orchestrator.train.ranks import ALONE


def texts(count: int) -> TokenizedSet:
    generator = np.random.default_rng(7)
    documents = [generator.integers(3, 90, size=n) for n in generator.integers(6, 20, size=count)]
    return build_set([(ids, np.ones(len(ids), bool)) for ids in documents])


def by_hand(base: LoadedBase, learning: list[tuple[str, torch.nn.Parameter]], data: TokenizedSet) -> torch.Tensor:
    """Of transformers' own loss, one document at a time."""
    total = torch.zeros(sum(parameter.numel() for _, parameter in learning))
    for document in range(len(data)):
        ids = torch.as_tensor(data.document(document)[0].astype(np.int64))[None]
        logits = base.model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum")
        gradients = torch.autograd.grad(loss, [parameter for _, parameter in learning])
        total += torch.cat([gradient.reshape(-1) for gradient in gradients]).square()
    return total / len(data)


def test_it_is_the_mean_of_squared_gradients_of_single_documents(
    llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase], selection_on: Callable[..., LayerSelection]
) -> None:
    base, data = base_of(llama_folder()), texts(9)
    with open_branch(base, selection_on(base, "last:2", "full"), lora_alpha=0, seed=0) as branch:
        learning = branch.learning_parameters()
        wanted = by_hand(base, learning, data)
        objective = objective_of(base, branch.head())
        engine = TorchEngine(objective, learning, weight_decay=0.0, grad_clip=1e-3, measuring=True)
        before = [parameter.detach().clone() for _, parameter in learning]
        (found,) = fisher_information(engine, data, RowPlan(32, 4, pack=True), ALONE, seed=1)
        engine.close()
        assert all(torch.equal(old, parameter) for old, (_, parameter) in zip(before, learning, strict=True))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=float(wanted.max()) * 1e-6)


def test_activations_are_computed_again_where_they_are_in_training(
    llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase], selection_on: Callable[..., LayerSelection]
) -> None:
    """A document that trains with checkpointing alone must not be kept whole to be measured. And nothing else is measured."""
    base, data, calls = base_of(llama_folder()), texts(3), list[str]()
    found: list[torch.Tensor] = []
    with open_branch(base, selection_on(base, "last:2", "full"), lora_alpha=0, seed=0) as branch:
        blocks = list(base.model.model.layers)
        blocks[-1].mlp.register_forward_pre_hook(lambda *_: calls.append("top"))
        blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append("bottom"))
        for again in ([], blocks[-2:]):
            calls.clear()
            objective = objective_of(base, branch.head())
            engine = TorchEngine(objective, branch.learning_parameters(), weight_decay=0.0, grad_clip=1.0, measuring=True)
            with recomputed(again):
                found += fisher_information(engine, data, RowPlan(32, 4, pack=True), ALONE, seed=1)
            engine.close()
            assert (calls.count("top"), calls.count("bottom")) == ((2 if again else 1) * len(data), len(data))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0.0)


def test_importances_are_1_on_average_and_all_1_where_nothing_matters() -> None:
    padded = torch.tensor([0.0, 0.0, 0.0])
    found = importances([torch.tensor([1.0, 3.0]), padded], 4, ALONE, partitioned=True)
    assert [part.tolist() for part in found] == [[1.0, 3.0], [0.0, 0.0, 0.0]]
    assert importances([torch.zeros(3)], 3, ALONE, partitioned=False)[0].tolist() == [1.0] * 3


def test_what_was_written_is_read_and_damage_is_not(tmp_path: Path) -> None:
    file, cpu = tmp_path / "fisher" / "x.safetensors", torch.device("cpu")
    assert read_fisher(file, cpu) is None
    parts = [torch.rand(5), torch.rand(3)]
    write_fisher(file, parts)
    again = read_fisher(file, cpu)
    assert again is not None
    assert all(torch.equal(old, new) for old, new in zip(parts, again, strict=True))
    file.write_bytes(file.read_bytes()[:-4])
    assert read_fisher(file, cpu) is None


@pytest.mark.parametrize("count", [3, FISHER_DOCUMENTS + 5])
def test_no_more_documents_are_taken_than_pay(count: int) -> None:
    steps: list[float] = []

    class Counting:
        objective = torch.nn.Identity()

        def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.zeros(())

        def backward(self, loss: torch.Tensor, scale: float) -> None:
            pass

        def step(self, rate: float) -> float:
            steps.append(rate)
            return 0.0

        def squared_gradients(self) -> list[torch.Tensor]:
            return [torch.ones(1)]

    fisher_information(Counting(), texts(count), RowPlan(32, 4, pack=True), ALONE, seed=0)  # type: ignore[arg-type]
    assert steps == [0.0] * min(count, FISHER_DOCUMENTS)
