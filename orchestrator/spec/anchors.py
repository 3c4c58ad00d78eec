"""The anchors: one row of traits each.

An anchor is a penalty that keeps the weights near the base. To add one, add its name to `AnchorKind`, a row to `ANCHORS`, and a
class to `train.anchors`. Other files ask for the trait that they need, never for an anchor's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

AnchorKind = Literal["l2sp", "ewc", "product"]


@dataclass(frozen=True)
class AnchorTraits:
    """What an anchor pulls, and what it needs."""

    tune: Literal["lora", "full"]
    """The tuning method that it fits: unfrozen weights have no adapter, and adapters have no value in the base."""
    uses_fisher: bool
    """Weights are pulled by their Fisher information on the retention set, which is measured once for each selection: it needs
    retention text, and takes a backward pass for each document."""
    whole_adapters: bool
    """It needs both factors of an adapter on one rank, which DeepSpeed partitions."""
    copies: int
    """float32 numbers held beside each trainable one: its value in the base, and its importance."""
    misfit: str
    """Why it does not fit the other tuning method; {where} is where the spec asks for that."""
    instead: str
    """What to write instead."""
    recommended_strength: float | None = None
    """The strength that advice against forgetting recommends to try; None for an anchor that it does not recommend. It recommends
    one anchor for each tuning method."""


ANCHORS: Mapping[AnchorKind, AnchorTraits] = {
    "l2sp": AnchorTraits(
        tune="full",
        uses_fisher=False,
        whole_adapters=False,
        copies=1,
        misfit=("l2sp is for full fine-tuning; with lora ({where}) adapters are added to the base's weights, which stay frozen"),
        instead="write product, or tune: full",
        recommended_strength=30,
    ),
    "ewc": AnchorTraits(
        tune="full",
        uses_fisher=True,
        whole_adapters=False,
        copies=2,
        misfit=(
            "ewc is for full fine-tuning; with lora ({where}) "
            "the gradient by A is zero at the start, since B is, and so is its Fisher information"
        ),
        instead="write product, or tune: full",
    ),
    "product": AnchorTraits(
        tune="lora",
        uses_fisher=False,
        whole_adapters=True,
        copies=0,
        misfit="unfrozen weights ({where}) have no adapter, which `product` needs",
        instead="write l2sp or ewc, or tune: lora",
        recommended_strength=30,
    ),
}
