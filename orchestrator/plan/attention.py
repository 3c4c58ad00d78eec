"""How attention over packed rows is computed, which hangs on the device and the base's layout."""

from __future__ import annotations

from orchestrator.anatomy.values import ModelAnatomy


def attends_by_document(anatomy: ModelAnatomy, device: str, *, classify: bool) -> bool:
    """Whether the documents of a row are computed one by one (`train.attention`) instead of the whole row under a mask.

    On CPUs, for decoders that a fused kernel serves. Rows that are classified hold one document and its padding.
    """
    return device == "cpu" and anatomy.kind == "decoder" and anatomy.attention == "fused" and not classify
