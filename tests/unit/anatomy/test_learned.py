"""Learning a base in a process of its own, once: what is kept, and what goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import learned, read_anatomy
from orchestrator.anatomy.learning import Answer, Question, Refusal
from orchestrator.anatomy.learning_cache import cache_folder, key_of, locked, recall, remember
from orchestrator.anatomy.values import TensorInfo
from orchestrator.errors import BaseError
from orchestrator.spec.tasks import Task

from .bases import SIZES, write_base

OLMO: dict[str, Any] = {"model_type": "olmo2", **SIZES, "pad_token_id": 1}
REFUSED = Answer(refusal=Refusal(kind="config", what="it cannot be"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "anatomy"


def test_a_class_is_built_once_in_a_process_of_its_own(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Question] = []
    ask = learned.ask
    monkeypatch.setattr(learned, "ask", lambda question: asked.append(question) or ask(question))
    first = read_anatomy(write_base(tmp_path / "a", OLMO), need_weights=False)
    assert (first.source, first.architecture, first.num_blocks) == ("class", "Olmo2ForCausalLM", 3)
    assert first.tensors["model.layers.2.self_attn.q_norm.weight"].shape == (16,)
    other = read_anatomy(
        write_base(tmp_path / "b", {**OLMO, "transformers_version": "4.0", "_name_or_path": "x"}), need_weights=False
    )
    assert other.folder == str(tmp_path / "b")
    same = {"folder", "config_sha256"}
    assert other.model_dump(exclude=same) == first.model_dump(exclude=same)
    assert len(asked) == 1
    assert [path.suffix for path in cache.iterdir()] == [".gz"], "the lock is gone"


def test_what_an_answer_depends_on() -> None:
    tensor = TensorInfo(name="a", shape=(2,), dtype="F32", file="model.safetensors")
    key = key_of(OLMO, None, "language_model")
    assert key_of({**OLMO, "auto_map": {}, "id2label": {"0": "x"}}, None, "language_model") == key
    others = [
        key_of({**OLMO, "hidden_size": 32}, None, "language_model"),
        key_of(OLMO, {"a": tensor}, "language_model"),
        key_of(OLMO, {"a": tensor.model_copy(update={"shape": (3,)})}, "language_model"),
        key_of(OLMO, None, "classification"),
    ]
    assert len({key, *others}) == 5


def test_a_damaged_answer_is_none(cache: Path) -> None:
    assert recall("k") is None
    with locked("k"):
        remember("k", REFUSED)
    assert recall("k") == REFUSED
    (cache / "k.json.gz").write_bytes(b"\x1f\x8b torn")
    assert recall("k") is None


def test_without_a_folder_to_keep_it_in_a_class_is_still_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "file"))
    with locked("k"):
        remember("k", REFUSED)
    assert recall("k") is None
    monkeypatch.delenv("ORCHESTRATOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "orchestrator" / "anatomy"


def test_a_process_that_fails_is_an_error_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ModuleNotFoundError: No module named torch >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(BaseError, match="could not be looked at: ModuleNotFoundError: No module named torch") as caught:
        learned.ask(Question(folder=str(tmp_path), head="language_model"))
    assert caught.value.where == str(tmp_path)


def test_a_refusal_says_what_and_where(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "ask", lambda _: REFUSED)
    folder = write_base(tmp_path / "a", OLMO)
    with pytest.raises(BaseError, match="it cannot be") as caught:
        read_anatomy(folder, need_weights=False)
    assert caught.value.where == str(folder / "config.json")
    assert caught.value.remedy


T5: dict[str, Any] = {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = {
    "model_type": "bart",
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}


@pytest.mark.parametrize(("config", "task"), [(T5, "text"), (T5, "chat"), (BART, "classify")])
def test_an_encoder_decoder_only_completes_prompts(tmp_path: Path, cache: Path, config: dict[str, Any], task: Task) -> None:
    assert cache
    with pytest.raises(BaseError, match=f"{config['model_type']!r}, an encoder-decoder, which is not trained for") as caught:
        read_anatomy(write_base(tmp_path / "base", config), need_weights=False, task=task)
    assert caught.value.exit_code == 2
