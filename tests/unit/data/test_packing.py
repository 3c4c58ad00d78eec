"""Documents that share a row do not see each other: packed and unpacked losses agree, in the real attention code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from orchestrator.data import TokenizedSet, build_set, micro_batches, pack_rows

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = {"Llama": {}, "Qwen2": {}, "Mistral": {"sliding_window": 8}}


def make_model(kind: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(scope="module")
def documents() -> TokenizedSet:
    random = np.random.default_rng(0)
    lengths = [3, 17, 9, 30, 1, 5, 12, 1, 28, 40]
    return build_set([(random.integers(3, 200, length), np.r_[False, random.random(length - 1) < 0.7]) for length in lengths])


def losses(model: Any, data: TokenizedSet, *, pack: bool, rows: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss sum of each document, gradient of the whole sum)."""
    sums = torch.zeros(len(data))
    model.zero_grad()
    for batch in micro_batches(data, pack_rows(data.lengths, range(len(data)), 64, pack), 0, 1, rows):
        ids, positions, labels = (torch.tensor(a) for a in (batch.input_ids, batch.position_ids, batch.labels))
        owners = torch.tensor(batch.document_ids)
        options = {"position_ids": positions, **{name: make(batch) for name, make in more.items()}}
        logits = model(input_ids=ids, **options).logits
        found = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        found.sum().backward()
        sums.index_add_(0, owners[owners >= 0], found.detach()[owners >= 0])
    return sums, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_losses_and_gradients_are_those_of_the_documents_alone(
    documents: TokenizedSet, kind: str, attention: str, rows: int
) -> None:
    model = make_model(kind, attention)
    alone, gradient = losses(model, documents, pack=False, rows=1, use_cache=lambda _: False)
    packed, packed_gradient = losses(model, documents, pack=True, rows=rows, use_cache=lambda _: False)
    assert (alone > 0).sum() == (documents.num_supervised > 0).sum()
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {"use_cache": lambda _: False, "attention_mask": lambda batch: torch.tensor(batch.document_ids >= 0).long()},
        {"use_cache": lambda _: True},
        {
            "use_cache": lambda _: False,
            "position_ids": lambda batch: torch.arange(batch.input_ids.shape[1]).expand(batch.input_ids.shape),
        },
    ],
    ids=["padding mask", "cache", "positions that run on"],
)
def test_what_the_manual_warns_of_is_true(documents: TokenizedSet, more: dict[str, Any]) -> None:
    """A mask, a cache or positions that do not restart let documents see each other: the packing test can fail."""
    model = make_model("Llama", "sdpa")
    alone, _ = losses(model, documents, pack=False, rows=1, use_cache=lambda _: False)
    packed, _ = losses(model, documents, pack=True, rows=2, **more)
    assert (packed - alone).abs().max() > 0.1
