"""Attention by document against one call under a block-diagonal mask, on every kind of decoder."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from orchestrator.train.model import attention
from orchestrator.train.model.attention import BY_DOCUMENT, document_lengths, documents_apart
from orchestrator.train.model.recompute import recomputed

LENGTHS = [[9, 14, 5, 4], [32], [1, 31], [20, 10, 2]]
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **GROUPED},
    "mistral": {"model_type": "mistral", **GROUPED, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", **GROUPED},
    "qwen3": {"model_type": "qwen3", **GROUPED, "head_dim": 32},
    "gemma": {"model_type": "gemma", **SIZES, "num_key_value_heads": 1, "head_dim": 32},
    "gemma3": {"model_type": "gemma3_text", **GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 100}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"model_type": "phi", **SIZES},
    "phi3": {"model_type": "phi3", **GROUPED, "pad_token_id": 0, "sliding_window": 8},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES},
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "mixtral": {"model_type": "mixtral", **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def packed_positions() -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])


def make_model(name: str, implementation: str) -> Any:
    """The same random weights whatever the implementation, and gradients into the embeddings."""
    config = AutoConfig.for_model(**DECODERS[name])
    set_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)
    return model.train()


def states_and_gradient(name: str, implementation: str, *, checkpointing: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    model, positions = make_model(name, implementation), packed_positions()
    ids = torch.randint(3, 97, positions.shape, generator=torch.Generator().manual_seed(5))
    with ExitStack() as stack:
        if checkpointing:
            stack.enter_context(recomputed(model.base_model.layers))
        with documents_apart(model.config, positions):
            hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        # The backward pass, and with it what is computed again, runs after the forward pass's context is left.
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    return hidden.detach(), gradient


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_agrees_with_the_mask(name: str) -> None:
    found, expected = states_and_gradient(name, BY_DOCUMENT), states_and_gradient(name, "sdpa")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_computed_again_it_is_the_same(name: str) -> None:
    found = states_and_gradient(name, BY_DOCUMENT, checkpointing=True)
    expected = states_and_gradient(name, BY_DOCUMENT)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_no_mask_is_built_and_no_pair_of_documents_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    kernel = attention.scaled_dot_product_attention

    def watched(query: torch.Tensor, *arguments: Any, attn_mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        assert attn_mask is None
        lengths.append(query.shape[2])
        return kernel(query, *arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(attention, "sdpa_mask", None)
    states_and_gradient("llama", BY_DOCUMENT)
    assert lengths == 2 * [length for row in LENGTHS for length in row]


def test_a_document_begins_wherever_positions_do_not_go_on() -> None:
    assert document_lengths(packed_positions()) == tuple(length for row in LENGTHS for length in row)
    assert document_lengths(torch.tensor([[3, 4, 5, 9, 10], [11, 0, 1, 2, 3]])) == (3, 2, 1, 4)


@pytest.mark.parametrize("padded", [False, True])
def test_where_no_documents_are_named_it_is_sdpa(padded: bool) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[0, :5] = 0
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(5))
    models = [make_model("mistral", implementation) for implementation in (BY_DOCUMENT, "sdpa")]
    found, expected = (model.eval()(input_ids=ids, attention_mask=mask, use_cache=False).logits for model in models)
    assert torch.equal(found, expected)
    written = [model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0) for model in models]
    assert torch.equal(*written)


def test_documents_are_forgotten_after_an_exception() -> None:
    model, positions = make_model("llama", BY_DOCUMENT), packed_positions()

    def fail() -> None:
        with documents_apart(model.config, positions):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert attention._lengths.get() is None
