"""The probe against plain autograd on whole models: the same gradients, and a base that nobody touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.anatomy import LayerSelection
from orchestrator.data import TokenizedSet, build_set
from orchestrator.errors import TrainingError
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.batches import to_tensors
from orchestrator.train.integrity import fingerprint, tensors_of
from orchestrator.train.measure.layer_scores import MatrixSums, probe_batches, score_blocks
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import Objective
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.measurements import LayerScores, ProbePlan

EXECUTION = ExecutionPlan(
    device="cpu", ranks=1, threads_per_rank=1, executor="torch", dtype="float32", row_tokens=32, micro_batch_rows=4
)
PLAN = ProbePlan(num_batches=4, rows=2)
SEED = 3


def train_set(*, classify: bool = False) -> TokenizedSet:
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 24, size=30)
    pairs = [((np.arange(n) + generator.integers(90)) % 90 + 3, np.arange(n) >= n // 2) for n in lengths]
    return build_set(pairs, labels=generator.integers(3, size=30).tolist() if classify else None)


def objective_of(base: LoadedBase) -> Objective:
    """As a trial of the control `none` makes it."""
    frozen = LayerSelection(
        policy="none",
        tune="full",
        lora_rank=None,
        trainable=(),
        adapted=(),
        frozen=tuple(base.anatomy.tensors),
        cut=base.anatomy.num_blocks,
        num_trainable_parameters=0,
    )
    branch = open_branch(base, frozen, lora_alpha=0, seed=0)
    return Objective(branch.model, branch.backbone(), branch.head(), base.load.task, encoder=base.anatomy.kind == "encoder")


def scored(base: LoadedBase, plan: ProbePlan = PLAN, execution: ExecutionPlan = EXECUTION) -> LayerScores:
    data = train_set(classify=base.load.task == "classify")
    return score_blocks(base, objective_of(base), data, plan, execution, SEED)


def brute_force(base: LoadedBase, originals: dict[str, torch.Tensor] | None = None) -> tuple[list[float], list[float]]:
    """The same two figures from whole gradients that are all kept: autograd's own, in float64.

    Args:
        originals: Weights to put in place of quantized ones.
    """
    objective = objective_of(base)
    objective.eval()
    names = [name for block in base.anatomy.linears for name in block]
    parameters = dict(base.model.named_parameters())
    gradients: list[dict[str, torch.Tensor]] = []
    for batch in probe_batches(
        train_set(classify=base.load.task == "classify"), PLAN, EXECUTION, SEED, one_document_per_row=False
    ):
        for name in names:
            parameters[name].requires_grad_(True)
            parameters[name].grad = None
        (objective(**to_tensors(batch, base.device)) / batch.num_supervised).backward()
        gradients.append({name: parameters[name].grad.double() for name in names})  # type: ignore[union-attr]
    norms, ratios = [], []
    for block in base.anatomy.linears:
        weights = torch.cat([parameters[name].detach().double().flatten() for name in block])
        rows = torch.stack([torch.cat([each[name].flatten() for name in block]) for each in gradients])
        mean, deviation = rows.mean(0), rows.var(0, unbiased=True).sum().sqrt()
        norms.append(float(mean.norm() / weights.norm()))
        ratios.append(float(mean.norm() / deviation))
    for name in names:
        parameters[name].requires_grad_(False)
        parameters[name].grad = None
    objective.train()
    return norms, ratios


@pytest.mark.parametrize("tied", [True, False])
def test_the_scores_are_those_of_plain_autograd(
    tied: bool, llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]
) -> None:
    base = base_of(llama_folder(tied=tied))
    found = scored(base)
    norms, ratios = brute_force(base)
    assert found.relative_gradient_norms == pytest.approx(norms, rel=1e-4)
    assert found.signal_to_noise == pytest.approx(ratios, rel=1e-3)
    assert len(set(norms)) == 4
    assert found.num_batches == 4
    assert found.seconds > 0


def test_biases_and_other_layouts_are_scored_alike(qwen_folder: Path, base_of: Callable[..., LoadedBase]) -> None:
    base = base_of(qwen_folder)
    assert scored(base).relative_gradient_norms == pytest.approx(brute_force(base)[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_classifiers_and_encoders_are_scored_without_dropout(
    kind: str, llama_folder: Callable[..., Path], bert_folder: Path, base_of: Callable[..., LoadedBase]
) -> None:
    base = base_of(llama_folder() if kind == "llama" else bert_folder, task="classify")
    first, second = scored(base), scored(base)
    assert first.scores == second.scores
    assert all(score and score > 0 for score in first.scores)
    assert base.model.training


def test_a_quantized_base_is_scored_as_its_dequantized_weights(
    llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    quantized, plain = base_of(llama_folder(hidden_size=256), quantize="nf4"), base_of(llama_folder(hidden_size=256))
    before = fingerprint(tensors_of(quantized.model))
    found = scored(quantized)
    assert fingerprint(tensors_of(quantized.model)) == before
    with torch.no_grad():
        for name in (name for block in plain.anatomy.linears for name in block):
            weight = quantized.model.get_parameter(name)
            plain.model.get_parameter(name).copy_(dequantize_4bit(weight.data, weight.quant_state))  # type: ignore[attr-defined]
    norms, ratios = brute_force(plain)
    assert found.relative_gradient_norms == pytest.approx(norms, rel=1e-3)
    assert found.signal_to_noise == pytest.approx(ratios, rel=1e-2)


def test_the_base_is_bit_for_bit_what_it_was(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> None:
    base = base_of(llama_folder())
    before = fingerprint(tensors_of(base.model))
    scored(base)
    assert fingerprint(tensors_of(base.model)) == before
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.model.modules())
    assert base.model.training


def test_gradient_checkpointing_changes_no_score(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> None:
    base = base_of(llama_folder())
    plain, calls = scored(base), list[int]()
    base.model.get_submodule(f"{base.anatomy.blocks_module}.1.mlp").register_forward_pre_hook(lambda *_: calls.append(1))
    again = scored(base, execution=EXECUTION.model_copy(update={"checkpointing": True}))
    assert again.scores == pytest.approx(plain.scores, rel=1e-6)
    assert len(calls) == 2 * again.num_batches, "forwards once, and once again in the backward pass"
    assert all(module.training for module in base.model.modules())


def test_blocks_below_the_floor_have_no_score(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> None:
    base = base_of(llama_folder())
    whole, part = scored(base), scored(base, PLAN.model_copy(update={"floor": 2}))
    assert part.scores[:2] == part.signal_to_noise[:2] == (None, None)
    assert part.scores[2:] == pytest.approx(whole.scores[2:], rel=1e-6)


def test_blocks_below_the_floor_keep_nothing_for_a_backward_pass(
    llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]
) -> None:
    base, needs = base_of(llama_folder()), dict[int, bool]()
    blocks = list(base.model.get_submodule(base.anatomy.blocks_module).children())

    def listen(number: int) -> Callable[..., None]:
        return lambda _, __, output: needs.update({number: output.requires_grad})

    for number, block in enumerate(blocks):
        block.register_forward_hook(listen(number))
    scored(base, PLAN.model_copy(update={"floor": 2}))
    assert needs == {0: False, 1: False, 2: True, 3: True}


def test_one_micro_batch_has_no_signal_to_noise(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> None:
    found = scored(base_of(llama_folder()), ProbePlan(num_batches=1, rows=2))
    assert found.num_batches == 1
    assert found.signal_to_noise == (None,) * 4
    assert all(score and math.isfinite(score) for score in found.scores)


def test_micro_batches_are_those_of_the_seed_and_share_no_document() -> None:
    data = train_set()

    def documents(seed: int) -> list[set[int]]:
        batches = probe_batches(data, PLAN, EXECUTION, seed, one_document_per_row=False)
        return [{int(document) for document in batch.document_ids.flatten() if document >= 0} for batch in batches]

    first = documents(SEED)
    assert first == documents(SEED) != documents(SEED + 1)
    assert len(first) == 4
    assert sum(map(len, first)) == len(set().union(*first))
    smaller = EXECUTION.model_copy(update={"micro_batch_rows": 1})
    assert all(len(batch.lengths) == 1 for batch in probe_batches(data, PLAN, smaller, SEED, one_document_per_row=False))


def test_a_set_of_few_documents_gives_fewer_micro_batches() -> None:
    data = train_set().select(np.arange(3))
    assert len(list(probe_batches(data, PLAN, EXECUTION, SEED, one_document_per_row=False))) == 1


def test_what_is_kept_does_not_grow_with_the_micro_batches() -> None:
    sums = MatrixSums()
    for number in range(5):
        gradient = torch.full((3, 2), float(number))
        sums.add(gradient)
        assert sums.total is not None
    kept = [value for value in vars(sums).values() if torch.is_tensor(value)]
    assert len(kept) == 1
    assert kept[0].sum().item() == 60
    assert sums.squared_norms == pytest.approx(6 * (0 + 1 + 4 + 9 + 16))


def test_zero3_is_refused(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> None:
    execution = EXECUTION.model_copy(update={"executor": "deepspeed", "zero_stage": 3})
    with pytest.raises(TrainingError, match="ZeRO-3"):
        scored(base_of(llama_folder()), execution=execution)
