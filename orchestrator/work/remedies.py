"""A trial's remedies against forgetting, as values: replay, an anchor to the base, learning rates that decay with depth."""

from __future__ import annotations

from typing import ClassVar

from orchestrator.spec.adapters import AdapterOptions
from orchestrator.spec.anchors import ANCHORS, AnchorKind, AnchorTraits
from orchestrator.spec.models import Tune
from orchestrator.values import Value


class AnchorPlan(Value):
    """A pull of the weights back to the base after each update."""

    kind: AnchorKind
    strength: float

    @property
    def traits(self) -> AnchorTraits:
        """Return the traits of the kind."""
        return ANCHORS[self.kind]

    def __str__(self) -> str:
        return f"{self.kind} {self.strength:g}"


class Remedies(Value):
    """All remedies of a trial; the defaults do nothing."""

    PER_TRIAL: ClassVar[frozenset[str]] = frozenset({"anchor", "layer_decay"})
    """Fields that each trial's own optimizer step applies, so that they may differ between the trials of a fused batch. Any other
    field changes the shared batches or the shared objective."""
    replay: float = 0.0
    """Share of retention tokens among the tokens that are trained on."""
    anchor: AnchorPlan | None = None
    layer_decay: float = 1.0
    """Ratio of each block's learning rate to that of the block above it."""

    def __str__(self) -> str:
        """Return `replay 0.1 · l2sp 30 · decay 0.8`; empty without remedies."""
        parts = [f"replay {self.replay:g}"] if self.replay else []
        parts += [str(self.anchor)] if self.anchor else []
        parts += [f"decay {self.layer_decay:g}"] if self.layer_decay != 1.0 else []
        return " · ".join(parts)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return which remedies are used: `replay`, the anchor's kind, `decay`."""
        replay = ("replay",) if self.replay else ()
        anchor = (self.anchor.kind,) if self.anchor is not None else ()
        return (*replay, *anchor, *(("decay",) if self.layer_decay != 1.0 else ()))

    @property
    def shared_in_batch(self) -> tuple[object, ...]:
        """Return the values that must be equal for trials to share a batch: those of every field except PER_TRIAL."""
        return tuple(getattr(self, name) for name in type(self).model_fields if name not in self.PER_TRIAL)

    def total_tokens(self, target_tokens: int) -> int:
        """Return the tokens that are trained on if `target_tokens` of them are the target's."""
        return round(target_tokens / (1.0 - self.replay))

    @property
    def needs_replayed_text(self) -> bool:
        """Return whether retention text that is not scored is needed: to train on, or to estimate weight importances."""
        return self.replay > 0 or (self.anchor is not None and self.anchor.traits.uses_fisher)


NOTHING = Remedies()


def method_name(tune: Tune, lora_rank: int | None, adapter: AdapterOptions, remedies: Remedies) -> str:
    """Return `lora r16 · replay 0.1`: all of a choice except its layers, for display and to distinguish choices."""
    method = adapter.method(lora_rank) if tune == "lora" else "full"
    return f"{method} · {remedies}" if remedies != NOTHING else method
