"""Compare a bundle, loaded by plain transformers, with the distributions saved from the trained model.

Run as a script by a fresh interpreter that does not know this package (docs/design.md, law 5):

    python -I verification_process.py PROBE.safetensors BUNDLE ANSWER.json --device cpu --dtype float32

Nothing of this package may be imported here. The probe holds `ids` int64[N], `offsets` int64[D + 1] of D documents, and
`log_probs` float32[P, V] of the trained model: P positions (for classification: documents), V tokens (classes). For an
encoder-decoder it also holds `prompts` int64[D]: how many tokens of each document are the encoder's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

LOGIT_BYTES = 256 * 1024**2
"""Limit on the logits (float32) of one forward pass."""
RESIDENT_SHARE = 0.7
"""Share of free memory above which a model is offloaded to disk, block by block."""


@torch.no_grad()
def distributions(
    model: Any, documents: Sequence[torch.Tensor], *, by_document: bool, pads: bool = True
) -> Iterator[torch.Tensor]:
    """Yield the log-probabilities of each document, in order: float32[L, V] at its L positions, or [1, classes].

    Args:
        model: A whole transformers model, in eval mode.
        documents: int64[L] each. Several share a forward pass, padded on the right.
        by_document: One prediction for a document, at its end; each document is then alone in its forward pass.
        pads: False if padding changes what the model computes; each document is then alone, too.
    """
    if by_document:
        for ids in documents:
            logits = model(
                input_ids=ids[None].to(model.device), attention_mask=torch.ones_like(ids)[None].to(model.device)
            ).logits
            yield torch.log_softmax(logits.float(), dim=-1).cpu()
        return
    for batch in _batches(documents, LOGIT_BYTES // (4 * model.config.get_text_config().vocab_size) if pads else 0):
        # Padded on the right under a causal mask, so padding cannot affect earlier positions.
        width = max(len(ids) for ids in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, document in enumerate(batch):
            ids[row, : len(document)] = document
            mask[row, : len(document)] = 1
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        for row, document in enumerate(batch):
            yield torch.log_softmax(logits[row, : len(document)].float(), dim=-1).cpu()


@torch.no_grad()
def completion_distributions(
    model: Any, documents: Sequence[torch.Tensor], prompts: Sequence[int], start: int
) -> Iterator[torch.Tensor]:
    """Yield an encoder-decoder's log-probabilities of each document, float32[T, V] at the T tokens after its prompt.

    Args:
        model: A whole transformers model, in eval mode.
        documents: int64[L] each.
        prompts: Tokens of each that are the encoder's.
        start: The id that the decoder begins with.
    """
    for ids, size in zip(documents, prompts, strict=True):
        shifted = torch.cat([torch.tensor([start]), ids[size:-1]])
        inputs = {"input_ids": ids[None, :size].to(model.device), "decoder_input_ids": shifted[None].to(model.device)}
        logits = model(**inputs, use_cache=False).logits[0]
        yield torch.log_softmax(logits.float(), dim=-1).cpu()


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the sum over positions of KL(reference || other), nats; both log-probabilities [positions, V]."""
    # 0 * -inf is NaN; the limit of p log p at 0 is 0.
    terms = reference.exp() * (reference - other)
    return float(terms.masked_fill_(reference == -torch.inf, 0.0).sum(dtype=torch.float64))


def answer_gaps(reference: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Return for each document by how much probability the reference prefers its own class to that of the other; 0 where they
    agree. Both log-probabilities [documents, classes]."""
    shares = reference.exp()
    chosen = shares.gather(1, other.argmax(-1, keepdim=True))
    return (shares.max(-1).values - chosen[:, 0]).tolist()


def documents_of(ids: torch.Tensor, offsets: torch.Tensor) -> list[torch.Tensor]:
    bounds = offsets.tolist()
    return [ids[begin:end] for begin, end in itertools.pairwise(bounds)]


def _batches(documents: Sequence[torch.Tensor], tokens: int) -> Iterator[list[torch.Tensor]]:
    """Group consecutive documents: at most `tokens` with padding, at least one document."""
    batch: list[torch.Tensor] = []
    for document in documents:
        widest = max(len(ids) for ids in [*batch, document])
        if batch and widest * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _load(
    bundle: Path, *, auto_model: str, loader: str, own_code: bool, device: str, dtype: str, free_bytes: int, offload: str
) -> tuple[Any, dict[str, Any]]:
    """Load the bundle by plain transformers, or by its own loader, offloading to disk what does not fit."""
    stored = sum(file.stat().st_size for file in bundle.glob("*.safetensors"))
    # Weights are stored in 16 bits and doubled when loaded as float32.
    needed = stored * 2 if dtype == "float32" else stored
    if needed <= RESIDENT_SHARE * free_bytes:
        place: dict[str, Any] = {"device_map": {"": device}}
    else:
        limits = {"cpu": int(RESIDENT_SHARE * free_bytes)}
        place = {"device_map": "auto", "offload_folder": offload, "max_memory": limits}
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True, "trust_remote_code": own_code}
    if not loader:
        return getattr(transformers, auto_model).from_pretrained(bundle, output_loading_info=True, **options, **place)
    # The loader does not tell what was missing: without memory, transformers does.
    meta: Any = transformers.AutoModel.from_pretrained(bundle, output_loading_info=True, device_map={"": "meta"}, **options)
    # A pooler that the base does not have is not read.
    missing = [name for name in meta[1]["missing_keys"] if not name.startswith("pooler.")]
    classifier = runpy.run_path(str(bundle / loader))["Classifier"]
    return classifier(bundle, **options, **place), {**meta[1], "missing_keys": missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("probe", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("answer", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--free-bytes", type=int, required=True, help="memory that the model may take")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as offload, safe_open(options.probe, framework="pt", device="cpu") as probe:
        head = probe.metadata()
        model, loading = _load(
            options.bundle,
            auto_model=head["auto_model"],
            loader=head.get("loader", ""),
            own_code=bool(head.get("own_code")),
            device=options.device,
            dtype=options.dtype,
            free_bytes=options.free_bytes,
            offload=offload,
        )
        model.eval()
        documents = documents_of(probe.get_tensor("ids"), probe.get_tensor("offsets"))
        by_document = head["supervises"] == "documents"
        trained, kls, gaps, start = probe.get_slice("log_probs"), list[float](), list[float](), 0
        if "prompts" in probe.keys():  # noqa: SIM118 (no mapping)
            every = completion_distributions(model, documents, probe.get_tensor("prompts").tolist(), int(head["decoder_start"]))
        else:
            every = distributions(model, documents, by_document=by_document, pads=head["pads"] == "1")
        for found in every:
            reference = trained[start : start + len(found)]
            kls.append(divergence(reference, found))
            gaps += answer_gaps(reference, found) if by_document else []
            start += len(found)
    answer = {
        "kls": kls,
        "gaps": gaps,
        "positions": start,
        "missing": sorted(map(str, loading["missing_keys"])),
        "mismatched": sorted(map(str, loading["mismatched_keys"])),
        "offloaded": "disk" in set(map(str, getattr(model, "hf_device_map", {}).values())),
        "knows_package": "orchestrator" in sys.modules,
    }
    options.answer.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
