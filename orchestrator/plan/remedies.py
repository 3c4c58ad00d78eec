"""Remedies against forgetting in a trial: replay, an anchor, and learning rates that decay with depth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.errors import PlanError
from orchestrator.spec import LoadedSpec
from orchestrator.spec.adapters import ADAPTER_KINDS
from orchestrator.spec.models import Anchor, AnchorSpec, JobSpec, SearchPoint, SearchSpec, TrainSpec, Tune
from orchestrator.work.remedies import AnchorPlan, Remedies

FISHER_DOCUMENTS = 64
"""Maximum number of retention documents for EWC: one backward pass for each, as expensive as a few steps."""


def anchor_fits(anchor: Anchor | AnchorPlan | None, tune: Tune) -> bool:
    """Return whether an anchor fits the tuning method."""
    return not isinstance(anchor, AnchorSpec | AnchorPlan) or anchor.traits.tune == tune


def remedies_of_train(train: TrainSpec, tune: Tune) -> Remedies:
    """Return the remedies of a job with one trial, without an anchor that does not fit the tuning method (the spec rejects
    one)."""
    anchor = train.anchor if anchor_fits(train.anchor, tune) else "none"
    return Remedies(replay=train.replay, anchor=_planned(anchor), layer_decay=train.layer_decay)


def searched_remedies(search: SearchSpec, train: TrainSpec, tune: Tune) -> list[Remedies]:
    """Return every distinct combination that fits the tuning method; without an anchor if none that is asked for fits."""
    anchors: Sequence[Anchor] = [anchor for anchor in search.anchor or (train.anchor,) if anchor_fits(anchor, tune)] or ["none"]
    combined = itertools.product(search.replay or (train.replay,), anchors, search.layer_decay or (train.layer_decay,))
    found = (Remedies(replay=replay, anchor=_planned(anchor), layer_decay=decay) for replay, anchor, decay in combined)
    # Anchors of strength 0 are equal to none, so distinct values of the spec may give equal trials.
    return list(dict.fromkeys(found))


def remedies_of_point(point: SearchPoint, train: TrainSpec) -> Remedies:
    """Return the remedies of one trial of a fixed list, without an anchor of `train` that does not fit its tuning method."""
    anchor = point.anchor if point.anchor is not None else train.anchor if anchor_fits(train.anchor, point.tune) else "none"
    return Remedies(
        replay=train.replay if point.replay is None else point.replay,
        anchor=_planned(anchor),
        layer_decay=train.layer_decay if point.layer_decay is None else point.layer_decay,
    )


def tunes_without_anchor(search: SearchSpec, train: TrainSpec) -> list[Tune]:
    """Return the tuning methods whose trials go without the anchor of `train` because it does not fit them."""
    if search.anchor or _planned(train.anchor) is None:
        return []
    taking: Sequence[Tune] = [point.tune for point in search.points if point.anchor is None] if search.points else search.tune
    return [tune for tune in dict.fromkeys(taking) if not anchor_fits(train.anchor, tune)]


def _planned(anchor: Anchor) -> AnchorPlan | None:
    """Return the anchor, or None for one without strength, so that such a trial is bit-identical to one without an anchor."""
    if isinstance(anchor, AnchorSpec) and anchor.strength > 0:
        return AnchorPlan(kind=anchor.kind, strength=anchor.strength)
    return None


def needs_replayed_text(spec: JobSpec) -> bool:
    """Return whether any trial needs retention text that is not scored."""
    return any(remedies.needs_replayed_text for remedies in _all_remedies(spec))


def most_replayed_tokens(spec: JobSpec, train_tokens: int) -> int:
    """Return the most tokens that any trial replays if it reads no token twice; at least enough for EWC's documents.

    Args:
        train_tokens: Number of training tokens.
    """
    # If a share s of all tokens is replayed, each token of the target comes with s / (1 - s) replayed ones.
    share = max((remedies.replay for remedies in _all_remedies(spec)), default=0.0)
    return max(round(share / (1.0 - share) * spec.train.epochs * train_tokens), FISHER_DOCUMENTS * spec.data.max_tokens)


def _all_remedies(spec: JobSpec) -> list[Remedies]:
    """Return the remedies of every trial that the spec's jobs may train."""
    search, train = spec.search, spec.train
    found = [remedies_of_train(train, spec.finetune.tune)] if spec.finetune is not None else []
    if search is None:
        return found
    if search.points:
        return found + [remedies_of_point(point, train) for point in search.points]
    return found + [remedies for tune in search.tune for remedies in searched_remedies(search, train, tune)]


def whole_adapters_anchor(choices: Iterable[Remedies]) -> AnchorPlan | None:
    """Return the first anchor that needs whole adapters, which DeepSpeed would partition; see `Load.whole_adapters`."""
    return next((remedies.anchor for remedies in choices if remedies.anchor and remedies.anchor.traits.whole_adapters), None)


def no_whole_adapters(anchor: AnchorPlan, loaded: LoadedSpec, job: Literal["sweep", "finetune"], error: PlanError) -> PlanError:
    """Return the error for a job that would fit with DeepSpeed, but whose anchor on products rules DeepSpeed out.

    Args:
        error: The error saying that nothing fits without DeepSpeed.
    """
    place = _place_of(anchor, loaded.spec, job)
    return PlanError(
        f"the anchor `{anchor}` needs whole adapters, which DeepSpeed partitions; and without DeepSpeed {error.what}",
        where=f"{loaded.where(place)}: {place}",
        remedy=f"remove the anchor, and DeepSpeed fits; or {error.remedy}",
    )


def _place_of(anchor: AnchorPlan, spec: JobSpec, job: Literal["sweep", "finetune"]) -> str:
    """Return the key of the spec that selects the anchor: an item of `search`, or `train.anchor`."""
    if job == "sweep" and spec.search is not None:
        for number, point in enumerate(spec.search.points):
            if point.anchor is not None and _planned(point.anchor) == anchor:
                return f"search.points[{number}].anchor"
        for number, listed in enumerate(spec.search.anchor):
            if _planned(listed) == anchor:
                return f"search.anchor[{number}]"
    return "train.anchor"


class LearningGroup(NamedTuple):
    """Consecutive parameters with the same learning rate and the same anchor."""

    names: tuple[str, ...]
    rate_factor: float
    """Ratio to the trial's learning rate."""
    anchored: bool
    """True if they have a value in the base that an anchor can pull towards."""


def learning_groups(
    anatomy: ModelAnatomy, selection: LayerSelection, remedies: Remedies, names: Sequence[str]
) -> list[LearningGroup]:
    """Split the trainable parameters, in their order, where the rate or the anchor changes; without remedies there is one
    group.

    The last block and the head use the full rate, each block below at `layer_decay` times the rate of the block above it
    (Howard and Ruder 2018, "discriminative fine-tuning"; as a factor for every layer: Clark et al. 2020, ELECTRA). A new
    classifier is not part of the base, so no anchor applies to it.

    Args:
        names: Parameter names as in checkpoints; the name of an adapter's matrix begins with that of its module.
    """
    new = {anatomy.classifier_weight, anatomy.classifier_bias, *(tensor.name for tensor in anatomy.new_tensors)}
    new = new if selection.new_classifier else set[str]()
    depth = {
        name: block
        for block, tensors in enumerate(anatomy.blocks)
        for tensor in tensors
        # The adapter of a parameter that is no layer of its own (of routed experts) has the parameter's name.
        for name in (_module(tensor), tensor)
    }
    top = anatomy.num_blocks - 1

    def kind(name: str) -> tuple[float, bool]:
        # Parameters outside the blocks, such as the head, are trained at the rate of the last block.
        factor = remedies.layer_decay ** (top - depth.get(_module(name), top)) if remedies.layer_decay != 1.0 else 1.0
        return factor, name not in new or remedies.anchor is None

    # Only neighbours are grouped, so that the groups one after another keep the model's order.
    runs = ((factor, anchored, tuple(run)) for (factor, anchored), run in itertools.groupby(names, kind))
    return [LearningGroup(run, factor, anchored) for factor, anchored, run in runs]


def effective(anatomy: ModelAnatomy, selection: LayerSelection, remedies: Remedies) -> Remedies:
    """Return the remedies without those that have no effect on what is trained: a decay if everything uses the full rate,
    an anchor if nothing that it could pull is trained. A policy whose blocks are not known yet keeps all."""
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
    """Return the module of a parameter: its name without the suffix of an adapter's tensor, or without its last part."""
    suffixes = (suffix for kind in ADAPTER_KINDS.values() for suffix in kind.suffixes)
    return next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name.rpartition(".")[0])
