"""Score the bundle, the untouched base and the controls on the test set, which is read once."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from orchestrator.data import TokenizedSet, load_tokenizer, with_shots
from orchestrator.data.sets import load_known
from orchestrator.serve.bundle_inputs import BundleInputs
from orchestrator.serve.verification import fitting_device
from orchestrator.train.adapters.artifacts import attach_artifact
from orchestrator.train.batches import RowPlan
from orchestrator.train.evaluation import Evaluation, answer_accuracy, class_prior, evaluate, exact_match
from orchestrator.train.generate import generate_answers, wanted_answers
from orchestrator.train.model.base import LoadedBase, load_base
from orchestrator.train.model.heads import head_of
from orchestrator.train.model.objective import Objective, final_norm_of
from orchestrator.train.ranks import Ranks
from orchestrator.transfer import forgetting
from orchestrator.transfer.records import ModelScores, PromptComparison
from orchestrator.values import Value

PROMOTED, UNTOUCHED, SHOWN = "promoted", "none", "k_shot"
NUM_PROMPTS = 4
GENERATED_TOKENS = 8192
"""Token budget for generated answers: the first documents of the test set that fit are answered."""
ROW_TOKENS, PROMPTS_AT_ONCE = 1024, 32


class HeldOutScores(Value):
    """Scores on the test set."""

    models: tuple[ModelScores, ...]
    """Scores of `promoted`, then `none`, then the controls that ran."""
    prompts: tuple[PromptComparison, ...]
    folder: str
    """Folder with <model>.npz: per-document losses, see `document_scores`."""
    seconds: float


def score_test(
    bundle: Path,
    inputs: BundleInputs,
    folder: Path,
    *,
    device: str | None = None,
    num_prompts: int = NUM_PROMPTS,
    generated_tokens: int | None = GENERATED_TOKENS,
) -> HeldOutScores:
    """Score bundle, untouched base and controls on the test set, and the retention set where there is one.

    Losses are teacher-forced; a `completion` or `chat` is also answered greedily by bundle and base.

    Args:
        bundle: A folder that transformers can load; need not be finished.
        folder: Where the per-document scores go; made if need be.
        device: As for `verify`.
        num_prompts: So many prompts are answered for people to read.
        generated_tokens: Budget of greedy answers by each of the two models; None answers every document.
    """
    started = time.monotonic()
    place = torch.device(device or fitting_device(inputs.anatomy, inputs.held_dtype))
    scorer = _Scorer(inputs, place, num_prompts, generated_tokens)
    scorer.score_bundle(bundle)
    base = load_base(inputs.base, inputs.anatomy, dtype=scorer.dtype, device=scorer.device)
    scorer.score_untouched(base)
    if inputs.shots:
        scorer.score_with_shots(base)
    for control, artifact in inputs.controls.items():
        with attach_artifact(base, Path(artifact)) as branch:
            scorer.score(control, branch.model, generate=False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, evaluation in scorer.test.items():
        evaluation.save(folder / f"{name}.npz")
    return HeldOutScores(
        models=tuple(scorer.model_scores(name) for name in scorer.test),
        prompts=scorer.prompts(num_prompts),
        folder=str(folder),
        seconds=time.monotonic() - started,
    )


def document_scores(folder: Path | str, model: str) -> Evaluation:
    """Read the per-document losses that `score_test` wrote for `promoted`, `none`, or a control."""
    return Evaluation.load(Path(folder) / f"{model}.npz")


class _Scorer:
    def __init__(self, inputs: BundleInputs, device: torch.device, num_prompts: int, generated_tokens: int | None) -> None:
        self._inputs = inputs
        self._ranks = Ranks(device=device)
        self._tokenizer = load_tokenizer(Path(inputs.base.folder))
        self._data = load_known(inputs.test_set)
        self._head = inputs.base.traits.head
        retained = inputs.retain_set if self._head.scores_retention else None
        self._retained = load_known(retained) if retained else None
        answered = _affordable(self._data, num_prompts, generated_tokens) if inputs.base.traits.has_answers else 0
        self._generated = self._data.select(np.arange(answered))
        self.device, self.dtype = device, getattr(torch, inputs.held_dtype)
        self.test: dict[str, Evaluation] = {}
        self._retain: dict[str, float] = {}
        self._retain_accuracy: dict[str, float | None] = {}
        self._answers: dict[str, list[str]] = {}
        self.num_shots: float | None = None
        """Examples in a prompt of `k_shot`, on average."""

    def score_bundle(self, bundle: Path) -> None:
        kind = getattr(transformers, self._head.auto_model)
        model = kind.from_pretrained(bundle, dtype=self.dtype, local_files_only=True, device_map={"": str(self.device)})
        self.score(PROMOTED, model, generate=True)
        del model
        gc.collect()

    def score_untouched(self, base: LoadedBase) -> None:
        if self._head.untouched == "class prior":
            train = load_known(self._inputs.train_set)
            self.test[UNTOUCHED] = class_prior(self._data, train, self._inputs.base.num_classes)
        else:
            self.score(UNTOUCHED, base.model, generate=True)

    @torch.no_grad()
    def score_with_shots(self, base: LoadedBase) -> None:
        """Score the untouched base with examples of the training set in its prompts."""
        limit, seed = self._inputs.anatomy.max_positions, self._inputs.trial.seed
        found = with_shots(self._data, load_known(self._inputs.train_set), self._inputs.shots, limit, seed)
        self.num_shots = found.mean
        with _evaluating(base.model):
            self.test[SHOWN] = self._evaluate(self._objective(base.model), found.data)

    def _objective(self, model: nn.Module) -> Objective:
        anatomy = self._inputs.anatomy
        head = head_of(self._inputs.base.task).weight_name(anatomy)
        return Objective(
            model,
            model.get_submodule(anatomy.backbone),
            model.get_submodule(head.rpartition(".")[0]),
            self._inputs.base.task,
            encoder=anatomy.kind == "encoder",
            final_norm=final_norm_of(model, anatomy),
        )

    @torch.no_grad()
    def score(self, name: str, model: nn.Module, *, generate: bool) -> None:
        objective = self._objective(model)
        with _evaluating(model):
            self.test[name] = self._evaluate(objective, self._data)
            if self._retained is not None:
                retained = self._evaluate(objective, self._retained)
                self._retain[name] = retained.loss
                self._retain_accuracy[name] = answer_accuracy(retained, self._retained)
            if generate and len(self._generated):
                self._answers[name] = generate_answers(model, self._tokenizer, self._generated, self._ranks, rows=PROMPTS_AT_ONCE)

    def _evaluate(self, objective: Objective, data: TokenizedSet) -> Evaluation:
        longest = int(data.lengths.max())
        if self._head.one_document_per_row:
            return evaluate(objective, data, RowPlan(longest, 16, pack=False), self._ranks)
        return evaluate(objective, data, RowPlan(max(longest, ROW_TOKENS), 2, pack=True), self._ranks)

    def model_scores(self, name: str) -> ModelScores:
        metrics = dict(self.test[name].metrics)
        if name in self._answers:
            metrics["exact_match"] = exact_match(self._answers[name], wanted_answers(self._generated, self._tokenizer))
        retain, before = self._retain.get(name), self._retain.get(UNTOUCHED)
        lost = forgetting(retain, before) if retain is not None and before is not None else None
        return ModelScores(
            model=name,
            metrics=metrics,
            num_documents=len(self._data),
            num_answered=len(self._answers.get(name, ())),
            retain_loss=retain,
            retain_accuracy=self._retain_accuracy.get(name),
            forgetting=lost,
            num_shots=self.num_shots if name == SHOWN else None,
        )

    def prompts(self, count: int) -> tuple[PromptComparison, ...]:
        """Return the first `count` test documents with the answers of base and bundle."""
        if self._head.supervises == "documents":
            return tuple(self._classified(index) for index in range(min(count, len(self._data))))
        wanted = wanted_answers(self._generated, self._tokenizer) if self._answers else []
        return tuple(
            PromptComparison(
                prompt=self._prompt(index),
                expected=wanted[index].strip(),
                base_answer=self._answers[UNTOUCHED][index].strip(),
                tuned_answer=self._answers[PROMOTED][index].strip(),
            )
            for index in range(min(count, len(wanted)))
        )

    def _prompt(self, index: int) -> str:
        if self._generated.prompts:
            return self._generated.prompts[index].strip()
        ids, supervised = self._generated.document(index)
        return self._tokenizer.decode(ids[: int(np.argmax(supervised))], skip_special_tokens=True).strip()

    def _classified(self, index: int) -> PromptComparison:
        names = _names(self._inputs)
        base, tuned = self.test[UNTOUCHED].predictions, self.test[PROMOTED].predictions
        assert base is not None
        assert tuned is not None
        return PromptComparison(
            prompt=self._tokenizer.decode(self._data.document(index)[0], skip_special_tokens=True).strip(),
            expected=names[int(self._data.labels[index])],
            base_answer=names[int(base[index])],
            tuned_answer=names[int(tuned[index])],
        )


def _affordable(data: TokenizedSet, at_least: int, tokens: int | None) -> int:
    """Return how many documents can be answered if each answer takes as long as the longest expected one."""
    if tokens is None:
        return len(data)
    return min(len(data), max(at_least, tokens // max(1, int(data.num_supervised.max()))))


def _names(inputs: BundleInputs) -> list[str]:
    return list(inputs.base.class_names) or [str(number) for number in range(inputs.base.num_classes)]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
