"""What a classifier reads is decided by the spec, the files of a sentence encoder and the base's class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy, Pooling, pooled_for, read_anatomy, with_pooling
from orchestrator.anatomy.pooling import sentence_pooling
from orchestrator.errors import BaseError, SelectionError
from orchestrator.spec.models import JobSpec

from .bases import config_of, write_base


def spec(pooling: str | None = None, task: str = "classify") -> JobSpec:
    section = {} if pooling is None else {"classify": {"pooling": pooling}}
    values = {"name": "x", "base": {"model": "base"}, "task": task, "data": {"train": "x.jsonl"}}
    return JobSpec.model_validate(values | section)


def sentence_encoder(folder: Path, module: dict[str, Any], *, listed: bool = True, model_type: str = "bert") -> ModelAnatomy:
    write_base(folder, config_of(model_type))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(module))
    if listed:
        modules = [
            {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
    return read_anatomy(folder, need_weights=False, task="classify")


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_max_tokens": True}, "class"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "class"),
    ],
)
def test_auto_is_what_a_sentence_encoder_was_trained_with(tmp_path: Path, module: dict[str, Any], kind: str) -> None:
    anatomy = sentence_encoder(tmp_path / "base", module, listed="pooling_mode" not in module)
    assert pooled_for(anatomy, spec()).pooling.kind == kind
    assert pooled_for(anatomy, spec("cls")).pooling.kind == "cls", "the spec comes first"
    assert pooled_for(anatomy, spec(task="text")).pooling == Pooling()


def test_auto_is_the_classes_own_pooling_elsewhere(tmp_path: Path) -> None:
    for model_type in ("bert", "llama"):
        anatomy = read_anatomy(write_base(tmp_path / model_type, config_of(model_type)), need_weights=False)
        assert pooled_for(anatomy, spec()) == anatomy
    # A decoder whose embeddings are of another pooling is still read as its class reads it.
    decoder = sentence_encoder(tmp_path / "decoder", {"pooling_mode_mean_tokens": True}, model_type="llama")
    assert pooled_for(decoder, spec()).pooling.kind == "class"


def test_a_head_of_ours_needs_no_new_pooler(tmp_path: Path) -> None:
    roberta = read_anatomy(write_base(tmp_path / "roberta", config_of("roberta")), need_weights=False)
    assert roberta.new_tensors
    mean = pooled_for(roberta, spec("mean"))
    assert (mean.pooling.kind, mean.pooling.by_class, mean.new_tensors) == ("mean", False, ())
    assert with_pooling(roberta, mean.pooling) == mean


def test_a_class_that_pools_as_its_config_says_keeps_its_head(tmp_path: Path) -> None:
    anatomy = read_anatomy(write_base(tmp_path / "base", config_of("roberta")), need_weights=False)
    modern = anatomy.model_copy(update={"model_type": "modernbert"})
    mean = pooled_for(modern, spec("mean"))
    assert mean.pooling.by_class
    assert mean.pooling.config == {"classifier_pooling": "mean"}
    assert mean.new_tensors == modern.new_tensors
    assert not pooled_for(modern, spec("last")).pooling.by_class


def test_a_decoder(tmp_path: Path) -> None:
    llama = read_anatomy(write_base(tmp_path / "base", config_of("llama")), need_weights=False)
    assert pooled_for(llama, spec("last")) == llama, "that is what transformers' class does"
    assert not pooled_for(llama, spec("mean")).pooling.by_class
    with pytest.raises(SelectionError, match="first token sees none of the text"):
        pooled_for(llama, spec("cls"))


def test_a_damaged_module_is_said_to_be_one(tmp_path: Path) -> None:
    sentence_encoder(tmp_path / "base", {})
    (tmp_path / "base" / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(BaseError, match="not valid JSON"):
        sentence_pooling(tmp_path / "base")
