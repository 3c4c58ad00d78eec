"""The anchors: one row of traits each.

An anchor is a penalty that keeps the weights near the base. To add one, add its name to `AnchorKind`, a row to `ANCHORS`, and a
class to `train.anchors`. Other modules branch on the traits, never on the name of an anchor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

AnchorKind = Literal["l2sp", "ewc", "product"]


@dataclass(frozen=True)
class AnchorTraits:
    """Facts about a kind of anchor: the tuning method that it fits, and what it needs."""

    tune: Literal["lora", "full"]
    """The tuning method that it fits: unfrozen weights have no adapter, and adapters have no value in the base."""
    uses_fisher: bool
    """True if weights are pulled by their Fisher information on the retention set, measured once for each selection: it needs
    retention text, and takes a backward pass for each document."""
    whole_adapters: bool
    """True if it needs both factors of an adapter on one rank; DeepSpeed partitions them."""
    copies: int
    """Number of additional float32 numbers per trainable element: its value in the base, and its importance."""
    misfit: str
    """Why it does not fit the other tuning method; {where} is the place in the spec that selects that method."""
    instead: str
    """The remedy in the error message: what to write instead."""
    recommended_strength: float | None = None
    """The strength that the recommendations against forgetting suggest; None for an anchor that they never suggest. They suggest
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
