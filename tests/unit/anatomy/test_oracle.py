"""What is learned from the classes of the table's layouts is what the table says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy, known_layouts
from orchestrator.anatomy.learning import Question
from orchestrator.probe.learn import learn

from .bases import config_of, row_of, write_base

TEXTS = sorted(set(known_layouts()) - {"vit"})
"""transformers has no class for texts of the vision transformer."""
SAME = (
    *("model_type", "kind", "has_weights", "num_blocks", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads"),
    *("head_dim", "vocab_size", "max_positions", "block_prefix", "blocks_module", "backbone", "classifier_weight"),
    *("classifier_bias", "attention", "norm", "mlp", "activation", "experts", "dropout", "new_tensors"),
)
DECODERS_ALONE = ("head_weight", "head_bias", "tied")
"""An encoder is loaded as its classifier, which has no output projection."""
NOT_IN_THE_TABLE = {"gemma2": {"logit_cap": 30.0}, "gpt2": {"transposed"}}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in TEXTS),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    ("phi", {"tie_word_embeddings": True, "qk_layernorm": True}),
    ("qwen2_moe", {"mlp_only_layers": [0, 2]}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ("gpt2", {"n_inner": 40}),
    ("opt", {"enable_bias": False}),
]


def learned(folder: Path, head: Any = "language_model") -> ModelAnatomy:
    return learn(Question(folder=str(folder), head=head))


def shapes(anatomy: ModelAnatomy) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in anatomy.tensors.items()}


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_the_class_says_what_the_table_says(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    folder = write_base(tmp_path, config_of(model_type, **changes))
    row, found = row_of(folder), learned(folder)
    assert found.source == "class"
    fields = SAME if row.kind == "encoder" else (*SAME, *DECODERS_ALONE)
    assert {name: getattr(found, name) for name in fields} == {name: getattr(row, name) for name in fields}
    # An encoder's masked-language-model head belongs to another class.
    assert shapes(found) == shapes(row)
    for name in ("embeddings", "final_norm"):
        assert sorted(getattr(found, name)) == sorted(getattr(row, name)), name
    assert found.embeddings[0] == row.embeddings[0]
    assert [set(block) for block in found.blocks] == [set(block) for block in row.blocks]
    assert found.stacked == row.stacked
    assert [set(block) for block in found.linears] == [set(block) for block in row.linears]
    for mine, theirs in zip(found.linears, row.linears, strict=True):
        # The plan takes the last matrix of the attention and of the MLP for the one that leads out of it.
        for part in ("attn", "attention", "mlp", ""):
            assert [name for name in mine if part in name][-1:] == [name for name in theirs if part in name][-1:]


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "phi", "gpt2", "mixtral"])
def test_a_decoder_that_classifies_keeps_its_names(tmp_path: Path, model_type: str) -> None:
    folder = write_base(tmp_path, config_of(model_type))
    row, found = row_of(folder), learned(folder, "classification")
    assert (found.classifier_weight, found.classifier_bias) == (row.classifier_weight, row.classifier_bias)
    assert (found.head_weight, found.tied, found.backbone) == (row.head_weight, row.tied, row.backbone)
    assert shapes(found) == {name: shape for name, shape in shapes(row).items() if name not in (row.head_weight, row.head_bias)}
    assert found.blocks == tuple(
        tuple(sorted(block, key=mine.index)) for block, mine in zip(row.blocks, found.blocks, strict=True)
    )


def test_what_the_table_does_not_say(tmp_path: Path) -> None:
    gemma2 = learned(
        write_base(
            tmp_path / "a", config_of("gemma2", layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4)
        )
    )
    assert (gemma2.logit_cap, gemma2.logit_scale, gemma2.ways.attention) == (30.0, 1.0, "eager")
    assert gemma2.block_kinds == (0, 1, 0, 1)
    gpt2 = learned(write_base(tmp_path / "b", config_of("gpt2")))
    assert set(gpt2.transposed) == {name for block in gpt2.linears for name in block}
    mixtral = learned(write_base(tmp_path / "c", config_of("mixtral")))
    assert mixtral.routers == tuple((f"model.layers.{number}.mlp.gate.weight",) for number in range(3))
    assert mixtral.transposed == ()
