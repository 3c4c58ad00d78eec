"""What a trial does against forgetting, beside its layers and its rate: replay, an anchor, rates that fall with depth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.errors import PlanError
from orchestrator.spec import LoadedSpec
from orchestrator.spec.models import Anchor, AnchorSpec, JobSpec, SearchPoint, SearchSpec, TrainSpec, Tune
from orchestrator.work.remedies import AnchorPlan, Remedies

FISHER_DOCUMENTS = 64
"""Retention documents that EWC takes at most: with one backward pass for each, a few steps' work."""


def fits(anchor: Anchor | AnchorPlan | None, tune: Tune) -> bool:
    """Return whether an anchor can pull what this tuning method trains."""
    return not isinstance(anchor, AnchorSpec | AnchorPlan) or anchor.traits.tune == tune


def remedies_of_train(train: TrainSpec, tune: Tune) -> Remedies:
    """Of a job with one trial; an anchor that does not fit its way of tuning, which the spec refuses, is left out."""
    anchor = train.anchor if fits(train.anchor, tune) else "none"
    return Remedies(replay=train.replay, anchor=_planned(anchor), layer_decay=train.layer_decay)


def searched_remedies(search: SearchSpec, train: TrainSpec, tune: Tune) -> list[Remedies]:
    """Every combination that fits a way of tuning, without what comes to the same. Where no anchor that is asked for fits,
    there is none."""
    anchors: Sequence[Anchor] = [anchor for anchor in search.anchor or (train.anchor,) if fits(anchor, tune)] or ["none"]
    combined = itertools.product(search.replay or (train.replay,), anchors, search.layer_decay or (train.layer_decay,))
    found = (Remedies(replay=replay, anchor=_planned(anchor), layer_decay=decay) for replay, anchor, decay in combined)
    return list(dict.fromkeys(found))


def remedies_of_point(point: SearchPoint, train: TrainSpec) -> Remedies:
    """Of a trial of a fixed list; an anchor of `train` that does not fit its way of tuning is left out."""
    anchor = point.anchor if point.anchor is not None else train.anchor if fits(train.anchor, point.tune) else "none"
    return Remedies(
        replay=train.replay if point.replay is None else point.replay,
        anchor=_planned(anchor),
        layer_decay=train.layer_decay if point.layer_decay is None else point.layer_decay,
    )


def left_out(search: SearchSpec, train: TrainSpec) -> list[Tune]:
    """The ways of tuning whose trials would have the anchor of `train`, if it fitted them."""
    if search.anchor or _planned(train.anchor) is None:
        return []
    taking: Sequence[Tune] = [point.tune for point in search.points if point.anchor is None] if search.points else search.tune
    return [tune for tune in dict.fromkeys(taking) if not fits(train.anchor, tune)]


def _planned(anchor: Anchor) -> AnchorPlan | None:
    """None too for one that does not pull, so that such a trial is bit for bit a plain one."""
    if isinstance(anchor, AnchorSpec) and anchor.strength > 0:
        return AnchorPlan(kind=anchor.kind, strength=anchor.strength)
    return None


def needs_replayed_text(spec: JobSpec) -> bool:
    """Whether any trial wants retention text that is not scored."""
    return any(remedies.needs_replayed_text for remedies in _all_remedies(spec))


def most_replayed_tokens(spec: JobSpec, train_tokens: int) -> int:
    """Of all trials, what one replays at most, if it read no token twice; and enough for EWC's documents.

    Args:
        train_tokens: Of the training set.
    """
    share = max((remedies.replay for remedies in _all_remedies(spec)), default=0.0)
    return max(round(share / (1.0 - share) * spec.train.epochs * train_tokens), FISHER_DOCUMENTS * spec.data.max_tokens)


def _all_remedies(spec: JobSpec) -> list[Remedies]:
    """Those of every trial that the spec's jobs may train."""
    search, train = spec.search, spec.train
    found = [remedies_of_train(train, spec.finetune.tune)] if spec.finetune is not None else []
    if search is None:
        return found
    if search.points:
        return found + [remedies_of_point(point, train) for point in search.points]
    return found + [remedies for tune in search.tune for remedies in searched_remedies(search, train, tune)]


def held_product(choices: Iterable[Remedies]) -> AnchorPlan | None:
    """Return the first anchor that needs whole adapters, which DeepSpeed partitions: see `Load.whole_adapters`."""
    return next((remedies.anchor for remedies in choices if remedies.anchor and remedies.anchor.traits.whole_adapters), None)


def no_whole_adapters(held: AnchorPlan, loaded: LoadedSpec, job: Literal["sweep", "finetune"], misfit: PlanError) -> PlanError:
    """Of a job that DeepSpeed would fit: an anchor on products stands in its way.

    Args:
        misfit: Says that nothing without DeepSpeed fits.
    """
    place = _place_of(held, loaded.spec, job)
    return PlanError(
        f"the anchor `{held}` needs whole adapters, which DeepSpeed partitions; and without DeepSpeed {misfit.what}",
        where=f"{loaded.where(place)}: {place}",
        remedy=f"remove the anchor, and DeepSpeed fits; or {misfit.remedy}",
    )


def _place_of(anchor: AnchorPlan, spec: JobSpec, job: Literal["sweep", "finetune"]) -> str:
    """Where the spec asks for it: what a search does not list itself is `train`'s."""
    if job == "sweep" and spec.search is not None:
        for number, point in enumerate(spec.search.points):
            if point.anchor is not None and _planned(point.anchor) == anchor:
                return f"search.points[{number}].anchor"
        for number, listed in enumerate(spec.search.anchor):
            if _planned(listed) == anchor:
                return f"search.anchor[{number}]"
    return "train.anchor"


class LearningGroup(NamedTuple):
    """Parameters that learn alike and follow each other in the model."""

    names: tuple[str, ...]
    rate_factor: float
    """Share of the trial's learning rate."""
    anchored: bool
    """Whether they have a value in the base that an anchor may pull to."""


def learning_groups(
    anatomy: ModelAnatomy, selection: LayerSelection, remedies: Remedies, names: Sequence[str]
) -> list[LearningGroup]:
    """What learns, in its order, cut where the rate or the anchor changes; without remedies one group.

    The last block and the head learn at the whole rate, each block below at `layer_decay` of the one above it (Howard and
    Ruder 2018, "discriminative fine-tuning"; as a factor for every layer: Clark et al. 2020, ELECTRA). A new classifier was
    never in the base, and no anchor pulls at it.

    Args:
        names: Of the parameters, as checkpoints have them; an adapter's begins with its module's.
    """
    new = {anatomy.classifier_weight, anatomy.classifier_bias, *(tensor.name for tensor in anatomy.new_tensors)}
    new = new if selection.new_classifier else set[str]()
    depth = {_module(tensor): block for block, tensors in enumerate(anatomy.blocks) for tensor in tensors}
    top = anatomy.num_blocks - 1

    def kind(name: str) -> tuple[float, bool]:
        factor = remedies.layer_decay ** (top - depth.get(_module(name), top)) if remedies.layer_decay != 1.0 else 1.0
        return factor, name not in new or remedies.anchor is None

    runs = ((factor, anchored, tuple(run)) for (factor, anchored), run in itertools.groupby(names, kind))
    return [LearningGroup(run, factor, anchored) for factor, anchored, run in runs]


def effective(anatomy: ModelAnatomy, selection: LayerSelection, remedies: Remedies) -> Remedies:
    """The remedies without those that change nothing of what learns: a decay where all of it learns at the whole rate, an anchor
    where nothing that it could pull learns. A policy whose blocks are not known yet keeps all."""
    if selection.pending:
        return remedies
    groups = learning_groups(anatomy, selection, remedies, (*selection.trainable, *selection.adapted))
    decays = any(group.rate_factor != 1.0 for group in groups)
    anchor = remedies.anchor
    if anchor is not None and anchor.traits.tune == "lora":
        pulls = bool(selection.adapted)
    else:
        pulls = any(group.anchored for group in groups)
    return remedies.model_copy(
        update={"layer_decay": remedies.layer_decay if decays else 1.0, "anchor": anchor if pulls else None}
    )


def _module(name: str) -> str:
    return name.rpartition(".lora_")[0] or name.rpartition(".")[0]
