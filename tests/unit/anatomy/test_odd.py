"""Checkpoints that are not quite what their class saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.anatomy import read_anatomy
from orchestrator.errors import BaseError

from .bases import BERT, LLAMA, config_of, implied_tensors, write_base

SINGLE = "model.safetensors"
UNTIED = config_of("llama", tie_word_embeddings=False)
HEAD = "lm_head.weight"


def tensors_of(config: dict[str, object], folder: Path, **changed: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """What the config implies, without what is None in `changed`, whose names have `__` for a dot."""
    tensors = implied_tensors(config, folder)
    for name, shape in changed.items():
        tensors.pop(name.replace("__", "."), None)
        if shape is not None:
            tensors[name.replace("__", ".")] = shape
    return tensors


def test_a_stored_head_that_equals_the_embedding_stays_tied(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA, tmp_path / "config", lm_head__weight=(40, 16))
    anatomy = read_anatomy(write_base(tmp_path / "base", LLAMA, (SINGLE, tensors)), need_weights=True)
    assert anatomy.tied
    assert HEAD not in anatomy.tensors
    assert [(copy.name, copy.stored_name) for copy in anatomy.copies] == [("model.embed_tokens.weight", HEAD)]
    assert anatomy.notes == ()


def test_one_byte_unties_the_head(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA, tmp_path / "config", lm_head__weight=(40, 16))
    folder = write_base(tmp_path / "base", LLAMA, (SINGLE, tensors))
    data = bytearray((folder / SINGLE).read_bytes())
    data[-1] = 1
    (folder / SINGLE).write_bytes(data)
    anatomy = read_anatomy(folder, need_weights=True)
    assert not anatomy.tied
    assert anatomy.tensors[HEAD].shape == (40, 16)
    assert anatomy.copies == ()
    assert "`tie_word_embeddings: false`" in anatomy.notes[0]


def test_a_classifier_is_no_base_for_completion_but_one_for_classify(tmp_path: Path) -> None:
    tensors = tensors_of(UNTIED, tmp_path / "config", lm_head__weight=None, score__weight=(3, 16))
    folder = write_base(tmp_path / "base", UNTIED, (SINGLE, tensors))
    with pytest.raises(BaseError, match="is missing: the checkpoint holds a classifier") as caught:
        read_anatomy(folder, need_weights=True)
    assert caught.value.remedy.startswith("set `task: classify`")
    anatomy = read_anatomy(folder, need_weights=True, task="classify")
    assert "score.weight" not in anatomy.tensors
    assert anatomy.notes == ("the checkpoint's score.weight is replaced by a new classifier of this task's classes",)


def test_a_backbone_is_no_base_for_completion_but_one_for_classify(tmp_path: Path) -> None:
    tensors = tensors_of(UNTIED, tmp_path / "config", lm_head__weight=None)
    stored = {name.removeprefix("model."): shape for name, shape in tensors.items()}
    folder = write_base(tmp_path / "base", UNTIED, (SINGLE, stored))
    with pytest.raises(BaseError, match="the checkpoint holds a model without a head"):
        read_anatomy(folder, need_weights=True)
    anatomy = read_anatomy(folder, need_weights=True, task="classify")
    assert anatomy.tensors["model.norm.weight"].stored_name == "norm.weight"


def test_another_head_is_left_out_and_what_is_inside_the_model_is_kept(tmp_path: Path) -> None:
    names = implied_tensors(BERT, tmp_path / "config")
    gamma = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): shape for name, shape in names.items()}
    added = {"cls.seq_relationship.weight": (2, 16), "bert.encoder.layer.0.scale": (1,)}
    anatomy = read_anatomy(write_base(tmp_path / "base", BERT, (SINGLE, {**gamma, **added})), need_weights=True, task="classify")
    assert anatomy.tensors["bert.embeddings.LayerNorm.weight"].stored_name == "bert.embeddings.LayerNorm.gamma"
    assert [tensor.name for tensor in anatomy.extra] == ["bert.encoder.layer.0.scale"]
    assert "1 stored tensors (cls.seq_relationship.weight) belong to another head" in anatomy.notes[1]


def test_adapters(tmp_path: Path) -> None:
    """Beside a model an adapter is ignored with a note; alone it is refused with the name of its base."""
    folder = write_base(tmp_path / "base", LLAMA, (SINGLE, tensors_of(LLAMA, tmp_path / "config")))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (note,) = read_anatomy(folder, need_weights=True).notes
    assert "LoRA adapter, which is not used" in note
    (folder / "config.json").unlink()
    with pytest.raises(BaseError, match="a LoRA adapter of org/base, not a model") as caught:
        read_anatomy(folder, need_weights=True)
    assert "`base.model: org/base`" in caught.value.remedy
