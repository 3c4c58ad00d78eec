from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from orchestrator.data import TokenizedSet, build_set
from orchestrator.errors import TrainingError, UsageError
from orchestrator.train.batches import RowPlan
from orchestrator.train.evaluation import (
    Evaluation,
    answer_accuracy,
    class_prior,
    evaluate,
    exact_match,
    score_texts,
    text_metric,
)
from orchestrator.train.generate import generate_answers, prompt_and_answer, wanted_answers
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import Objective, final_norm_of
from orchestrator.train.ranks import Ranks

LENGTHS = [9, 14, 7, 30, 5, 21]


def documents(lengths: list[int], *, labels: list[int] | None = None, supervised: bool = True) -> TokenizedSet:
    generator = np.random.default_rng(0)
    pairs = [(generator.integers(3, 97, size=n), (np.arange(n) >= n // 2) & supervised) for n in lengths]
    return build_set(pairs, labels=labels)


def objective_of(base: LoadedBase) -> Objective:
    head = base.anatomy.classifier_weight if base.load.task == "classify" else base.anatomy.head_weight
    return Objective(
        base.model,
        base.model.get_submodule(base.anatomy.backbone),
        base.model.get_submodule(head.rpartition(".")[0]),
        base.load.task,
        encoder=base.anatomy.kind == "encoder",
        final_norm=final_norm_of(base.model, base.anatomy),
    )


@pytest.fixture
def base(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> LoadedBase:
    return base_of(llama_folder())


def test_every_document_has_the_loss_that_it_has_alone(base: LoadedBase) -> None:
    data = documents(LENGTHS)
    found = evaluate(objective_of(base), data, RowPlan(48, 2, pack=True), Ranks())
    for index in range(len(data)):
        ids, supervised = data.document(index)
        tokens = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logits = base.model(input_ids=tokens[None]).logits[0, :-1].float()
        losses = functional.cross_entropy(logits, tokens[1:], reduction="none")[torch.from_numpy(supervised[1:])]
        assert found.num_tokens[index] == len(losses)
        assert found.loss_sums[index] == pytest.approx(losses.double().sum().item(), rel=1e-5)
    assert found.loss == pytest.approx(found.loss_sums.sum() / found.num_tokens.sum())
    assert found.metrics == {"loss": found.loss, "perplexity": pytest.approx(math.exp(found.loss))}


def test_shares_of_ranks_make_the_whole(base: LoadedBase) -> None:
    """Two ranks' documents, scored one after the other, are those of one rank: each document on exactly one."""
    data = documents(LENGTHS)
    whole = evaluate(objective_of(base), data, RowPlan(48, 2, pack=True), Ranks())
    halves: list[tuple[np.ndarray, ...]] = []

    class Listening(Ranks):
        def gather(self, value: tuple[np.ndarray, ...]) -> list[tuple[np.ndarray, ...]]:
            halves.append(value)
            return halves

    for rank in (0, 1):
        both = evaluate(objective_of(base), data, RowPlan(48, 2, pack=True, rank=rank, num_ranks=2), Listening())
    assert not (halves[0][1].astype(bool) & halves[1][1].astype(bool)).any()
    np.testing.assert_array_equal(both.num_tokens, whole.num_tokens)
    np.testing.assert_allclose(both.loss_sums, whole.loss_sums, rtol=1e-5)


def test_evaluation_leaves_train_mode_as_it_was(base: LoadedBase) -> None:
    objective = objective_of(base)
    objective.train()
    evaluate(objective, documents([9]), RowPlan(16, 1, pack=True), Ranks())
    assert objective.training
    assert base.model.training


def test_nothing_supervised_is_an_error(base: LoadedBase) -> None:
    with pytest.raises(TrainingError, match="no supervised token"):
        evaluate(objective_of(base), documents([9], supervised=False), RowPlan(16, 1, pack=True), Ranks())


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_classes_are_counted(
    kind: str, llama_folder: Callable[..., Path], bert_folder: Path, base_of: Callable[..., LoadedBase]
) -> None:
    base = base_of(llama_folder() if kind == "decoder" else bert_folder, task="classify")
    data = documents(LENGTHS, labels=[0, 1, 2, 0, 1, 2])
    found = evaluate(objective_of(base), data, RowPlan(32, 4, pack=False), Ranks())
    assert found.predictions is not None
    assert found.num_tokens.tolist() == [1] * 6
    assert found.metrics["accuracy"] == pytest.approx((found.predictions == data.labels).mean())
    assert 0 <= found.metrics["macro_f1"] <= 1


def test_macro_f1_against_hand_counted() -> None:
    """Labels 0 0 1 2, prior says 0 everywhere: F1 of class 0 is 2*2/(4+2), of 1 and 2 zero."""
    data, train = documents([5] * 4, labels=[0, 0, 1, 2]), documents([5] * 5, labels=[0, 0, 0, 1, 2])
    found = class_prior(data, train, 3)
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["macro_f1"] == pytest.approx((4 / 6) / 3)
    assert found.loss == pytest.approx(-(2 * math.log(4 / 8) + 2 * math.log(2 / 8)) / 4)


def test_saved_numbers_come_back(tmp_path: Path) -> None:
    made = Evaluation(0.5, np.array([1.0, 2.0]), np.array([2, 4]), {"loss": 0.5}, np.array([0, 1]))
    made.save(tmp_path / "eval.npz")
    back = Evaluation.load(tmp_path / "eval.npz")
    assert back.loss == 0.5
    np.testing.assert_array_equal(back.loss_sums, made.loss_sums)
    np.testing.assert_array_equal(back.num_tokens, made.num_tokens)
    assert back.predictions is not None


class Letters:
    """The least of a tokenizer: token n is the word `n`; 1 ends, 2 pads."""

    eos_token_id = 1
    pad_token_id = 2

    def decode(self, ids: np.ndarray | torch.Tensor, *, skip_special_tokens: bool) -> str:
        kept = [int(i) for i in ids if not (skip_special_tokens and int(i) in (1, 2))]
        return " ".join(map(str, kept))


def test_answers_are_greedy_whatever_stands_beside_them(base: LoadedBase) -> None:
    """Batched and left-padded continuations are those of each prompt alone, token by token through full forward passes."""
    data = documents(LENGTHS)
    found = generate_answers(base.model, Letters(), data, Ranks(), rows=4)
    longest = max(len(prompt_and_answer(data, index)[1]) for index in range(len(data)))
    base.model.eval()
    for index in range(len(data)):
        ids = prompt_and_answer(data, index)[0].tolist()
        made: list[int] = []
        for _ in range(longest + 8):
            with torch.no_grad():
                made.append(int(base.model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
            if made[-1] == 1:
                break
        assert found[index] == Letters().decode(np.array(made), skip_special_tokens=True)
    base.model.train()


class Endless(Letters):
    """A tokenizer with neither an end token nor a padding token."""

    eos_token_id = None
    pad_token_id = None


def test_generation_stops_at_what_ends_the_answers_of_the_data(base: LoadedBase) -> None:
    data = documents(LENGTHS)
    whole = generate_answers(base.model, Endless(), data, Ranks(), rows=4)
    stop = int(whole[0].split()[3])
    stopped = generate_answers(base.model, Endless(), replace(data, stop_ids=(stop, 96)), Ranks(), rows=4)
    for text, longer in zip(stopped, whole, strict=True):
        words = longer.split()
        assert text.split() == words[: words.index(str(stop)) if str(stop) in words else len(words)]
    assert len(stopped[0].split()) <= 3


def test_the_accuracy_on_answers_is_what_greedy_decoding_gives(base: LoadedBase) -> None:
    """The model's own greedy answers, one of them with another token in its midst, and one document that is text."""
    pairs = []
    base.model.eval()
    for number, (ids, _) in enumerate(map(documents(LENGTHS).document, range(len(LENGTHS)))):
        made: list[int] = []
        for _ in range(5):
            with torch.no_grad():
                made.append(int(base.model(input_ids=torch.tensor([ids.tolist() + made])).logits[0, -1].argmax()))
        if number == 1:
            made[2] = (made[2] + 1) % 90 + 3
        pairs.append((np.asarray([*ids, *made]), np.arange(len(ids) + 5) >= len(ids)))
    answers = ["an answer"] * (len(pairs) - 1) + [""]
    data = build_set(pairs, prompts=["asked"] * len(pairs), answers=answers)
    found = evaluate(objective_of(base), data, RowPlan(48, 2, pack=True), Ranks())
    assert found.num_missed is not None
    assert found.num_missed[[0, 2, 3, 4, 5]].tolist() == [0] * 5
    assert answer_accuracy(found, data) == 4 / 5
    assert answer_accuracy(found, build_set(pairs)) is None


def test_the_answer_is_the_last_supervised_run() -> None:
    ids = np.arange(10, 20)
    data = build_set([(ids, np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], bool))])
    prompt, answer = prompt_and_answer(data, 0)
    assert prompt.tolist() == list(range(10, 16))
    assert answer.tolist() == [16, 17, 18]
    assert wanted_answers(data, Letters()) == ["16 17 18"]
    assert wanted_answers(replace(data, stop_ids=(18,), answers=["as the row said"]), Letters()) == ["16 17"]


def test_exact_match_ignores_outer_white_space() -> None:
    assert exact_match(["a ", "b", "c"], ["a", " b", "d"]) == pytest.approx(2 / 3)


def test_a_metric_of_ones_own_sees_texts() -> None:
    evaluation = Evaluation(1.0, np.ones(2), np.ones(2, np.int64), {}, np.array([0, 1]))
    data = documents([5, 5], labels=[0, 0])
    names = ("low", "high")
    assert score_texts("exact_match", evaluation, data, names, generate=lambda: ([], [])) == 0.5
    assert score_texts("loss", evaluation, data, names, generate=lambda: ([], [])) is None


@pytest.mark.parametrize("metric", ["nowhere:f", "math:no_such_function", "f", ""])
def test_a_metric_that_cannot_be_imported_is_named(metric: str) -> None:
    with pytest.raises(UsageError, match="cannot be imported"):
        text_metric(metric)
