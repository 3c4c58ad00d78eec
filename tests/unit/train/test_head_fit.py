"""A new linear head starts from logistic regression on the base's features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from orchestrator.anatomy import Pooling, with_pooling
from orchestrator.data import build_set
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.batches import RowPlan
from orchestrator.train.head_fit import features_of, starts_from_fit
from orchestrator.train.model.base import load_base
from orchestrator.train.model.logistic import PENALTIES, fit
from orchestrator.train.model.objective import objective_of


def problem(num: int = 300, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes with a linear border, on features of very different scales and means."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(num, width, generator=generator)
    noise = 0.5 * torch.randn(num, 3, generator=generator)
    labels = (plain @ torch.randn(width, 3, generator=generator) + noise).argmax(1)
    return plain * torch.logspace(-3, 3, width) + torch.linspace(-50, 50, width), labels


def test_it_is_the_minimum_of_the_penalised_loss_on_standardised_features() -> None:
    features, labels = problem()
    head = fit(features, labels, 3, seed=0)
    assert head.penalty in PENALTIES
    assert head.num_documents == 300
    scale = features.std(0, correction=0)
    standard = (features - features.mean(0)) / scale
    weight = (head.weight * scale).requires_grad_(True)
    bias = (head.bias + head.weight @ features.mean(0)).requires_grad_(True)
    (functional.cross_entropy(standard @ weight.T + bias, labels) + head.penalty / 2 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 2e-3
    logits = features @ head.weight.T + head.bias
    assert (logits.argmax(1) == labels).float().mean() > 0.85


def test_the_same_problem_gives_the_same_bits_and_a_head_without_bias_has_none() -> None:
    features, labels = problem()
    first, again = fit(features, labels, 3, seed=0), fit(features, labels, 3, seed=0)
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    plain = fit(features - features.mean(0), labels, 3, seed=0, biased=False)
    assert torch.equal(plain.bias, torch.zeros(3))


def test_few_documents_choose_a_penalty_too() -> None:
    features, labels = problem(4)
    assert fit(features, labels, 3, seed=0).weight.isfinite().all()


def test_features_are_what_the_head_reads_of_each_document(bert_folder: Path, base_of: Callable, selection_on: Callable) -> None:
    base = base_of(bert_folder, task="classify")
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 20, 9)
    data = build_set([(generator.integers(3, 90, n), np.zeros(n, bool)) for n in lengths], labels=[0, 1, 2] * 3)
    with open_branch(base, selection_on(base, "head", "full"), lora_alpha=8, seed=1) as branch:
        objective = objective_of(base, branch.head()).eval()
        with torch.no_grad():
            documents, features = features_of(objective, branch.head(), data, np.arange(9), RowPlan(32, 2, pack=False), None)
            order = documents.argsort()
            assert documents[order].tolist() == list(range(9))
            for index in range(9):
                ids = torch.tensor(data.document(index)[0].astype(np.int64))[None]
                own = objective.class_logits(ids, torch.tensor([ids.shape[1]]))
                torch.testing.assert_close(branch.head()(features[order][index]), own[0])


def test_which_heads_start_so(bert_folder: Path, base_of: Callable, selection_on: Callable) -> None:
    base = base_of(bert_folder, task="classify")

    def starts(policy: str, tune: str = "full", control: str | None = None) -> bool:
        with open_branch(base, selection_on(base, policy, tune), lora_alpha=8, seed=1) as branch:
            return starts_from_fit(branch, control)

    # Its pooler is missing: it is trained with the classifier, and from random weights.
    assert not starts("head")
    assert not starts("last:1")
    anatomy = with_pooling(base.anatomy, Pooling(kind="mean"))
    load = base.load.model_copy(update={"pooling": anatomy.pooling})
    base = load_base(load, anatomy, dtype=torch.float32, device=torch.device("cpu"))
    assert starts("head")
    assert starts("last:1", "lora")
    assert not starts("last:1", control="scratch")
