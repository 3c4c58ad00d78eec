"""Bases that cannot be used: each refused with its reason, the place and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import read_anatomy, resolve_base
from orchestrator.errors import BaseError

from .bases import BERT, LLAMA, implied_tensors, write_base, write_safetensors


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", LLAMA, ("model.safetensors", implied_tensors(LLAMA, tmp_path / "shape")))


def error_of(folder: Path, *, need_weights: bool = True) -> BaseError:
    with pytest.raises(BaseError) as caught:
        read_anatomy(folder, need_weights=need_weights)
    error = caught.value
    assert error.exit_code == 2
    assert error.remedy
    assert str(folder) in error.where
    return error


def with_config(base: Path, **changes: Any) -> Path:
    values = {**json.loads((base / "config.json").read_text()), **changes}
    (base / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))
    return base


def test_the_base_of_these_tests_is_good(base: Path) -> None:
    assert read_anatomy(base, need_weights=True).has_weights


def test_no_weights_can_be_planned_with_but_not_trained(base: Path) -> None:
    (base / "model.safetensors").unlink()
    assert not read_anatomy(base, need_weights=False).has_weights
    assert "no weights: it can be planned for, not trained" in error_of(base).what


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_weights_tell_both_sizes(base: Path, cut: int) -> None:
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-cut])
    error = error_of(base)
    assert error.where == str(weights)
    assert error.what.startswith(f"truncated: {len(whole) - cut} bytes")
    assert error.expected.startswith(f"{len(whole)} bytes")


@pytest.mark.parametrize(("length", "what"), [(0, "truncated: 0 bytes"), (5, "truncated"), (100, "truncated within its header")])
def test_weights_cut_in_their_header(base: Path, length: int, what: str) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    assert error_of(base).what.startswith(what)


def test_weights_that_are_too_long(base: Path) -> None:
    with (base / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert "longer than its header says" in error_of(base).what


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"PK\x03\x04" + b"z" * 100, "not a safetensors file"),
        (b"\x04" + bytes(7) + b"nope", "the header is not valid JSON"),
        (b"\x02" + bytes(7) + b"[]", "not a JSON object"),
        (b"\x02" + bytes(7) + b"{}", "holds no tensor"),
        (b"\x07" + bytes(7) + b'{"a":1}', "is not valid"),
    ],
)
def test_what_is_no_safetensors_file(base: Path, content: bytes, what: str) -> None:
    (base / "model.safetensors").write_bytes(content)
    assert what in error_of(base).what


def test_offsets_that_do_not_fit_the_shape(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(
        weights.read_bytes().replace(
            b'"model.norm.weight": {"dtype": "BF16", "shape": [16]', b'"model.norm.weight": {"dtype": "BF16", "shape": [17]'
        )
    )
    error = error_of(base)
    assert "model.norm.weight has 32 bytes" in error.what
    assert "34 bytes" in error.expected


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(base: Path, name: str) -> None:
    (base / "model.safetensors").rename(base / name)
    for need_weights in (True, False):
        error = error_of(base, need_weights=need_weights)
        assert name in error.what
        assert "can run code" in error.what
        assert "convert to safetensors" in error.remedy


def test_a_pickle_beside_safetensors_does_no_harm(base: Path) -> None:
    (base / "pytorch_model.bin").write_bytes(b"x")
    assert read_anatomy(base, need_weights=True).has_weights


def test_code_of_a_base_is_refused_where_transformers_does_not_have_its_type(base: Path) -> None:
    code = {"AutoModel": "modeling_own.Own"}
    error = error_of(with_config(base, auto_map=code, model_type="own"))
    assert "comes with its own code" in error.what
    assert error.where.endswith("config.json")
    assert "not run" in error.what
    assert "pin it" in error.remedy


def test_code_of_a_base_is_ignored_where_transformers_has_its_type(base: Path) -> None:
    assert read_anatomy(with_config(base, auto_map={"AutoModel": "modeling_own.Own"}), need_weights=True).source == "table"


def test_an_unknown_type_names_the_near_one(base: Path) -> None:
    error = error_of(with_config(base, model_type="lama"))
    assert "'lama'" in error.what
    assert "types that transformers has" in error.expected
    assert "did you mean llama" in error.remedy


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_type": "gone"}, "model_type is missing"),
        ({"hidden_size": "gone"}, "hidden_size is missing"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": "40"}, "vocab_size is '40'"),
        ({"num_attention_heads": 3}, "do not divide"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already (quantization_config, method 'gptq')"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"num_hidden_layers": 4}, "9 tensors missing: model.layers.3"),
        ({"num_hidden_layers": 2}, "3 blocks are stored, and config.json says 2"),
        ({"intermediate_size": 25}, "model.layers.0.mlp.gate_proj.weight has shape [24, 16]"),
    ],
)
def test_configs_that_do_not_fit(base: Path, changes: dict[str, Any], what: str) -> None:
    assert what in error_of(with_config(base, **changes)).what


def test_a_config_that_is_no_json(base: Path) -> None:
    (base / "config.json").write_text("{")
    assert "not valid JSON" in error_of(base).what
    (base / "config.json").write_bytes(b"\xff\xfe{")
    assert "not valid JSON" in error_of(base).what
    (base / "config.json").write_text("[]")
    assert "not hold a JSON object" in error_of(base).what


def test_folders_that_are_no_base(tmp_path: Path, base: Path) -> None:
    assert "no such folder" in error_of(tmp_path / "nowhere").what
    assert "is a file" in error_of(base / "config.json").what
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in error_of(tmp_path / "empty").what
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in error_of(tmp_path / "empty").what


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", LLAMA, ("model.safetensors", implied_tensors(LLAMA, tmp_path / "shape")), dtype="U8")
    assert "is stored as U8" in error_of(folder).what


def sharded(tmp_path: Path) -> Path:
    tensors = implied_tensors(LLAMA, tmp_path / "shape")
    names = list(tensors)
    first, second = ({name: tensors[name] for name in part} for part in (names[:7], names[7:]))
    return write_base(tmp_path / "sharded", LLAMA, ("model-1.safetensors", first), ("model-2.safetensors", second))


def test_shards_are_read_together(tmp_path: Path) -> None:
    anatomy = read_anatomy(sharded(tmp_path), need_weights=True)
    assert {tensor.file for tensor in anatomy.tensors.values()} == {"model-1.safetensors", "model-2.safetensors"}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model-2.safetensors").unlink()
    assert error_of(folder).what == "1 of 2 shards missing: model-2.safetensors"


def test_a_shard_without_the_tensor_that_the_index_puts_there(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    write_safetensors(folder / "model-2.safetensors", {"other": (2,)})
    assert "is not in model-2.safetensors" in error_of(folder).what


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}'])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "not a valid index" in error_of(folder).what


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    assert "outside the folder" in error_of(folder).what


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    assert "without model.safetensors.index.json" in error_of(folder).what


def test_buffers_and_foreign_heads_are_tolerated(tmp_path: Path) -> None:
    tensors = implied_tensors(LLAMA, tmp_path / "shape")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,), "lm_head.weight": (40, 16)}
    folder = write_base(tmp_path / "base", LLAMA, ("model.safetensors", {**tensors, **extra}))
    assert set(read_anatomy(folder, need_weights=True).tensors) == set(tensors)


def test_a_checkpoint_without_the_backbones_prefix(tmp_path: Path) -> None:
    tensors = implied_tensors(LLAMA, tmp_path / "shape")
    bare = {name.removeprefix("model."): shape for name, shape in tensors.items()}
    anatomy = read_anatomy(write_base(tmp_path / "base", LLAMA, ("model.safetensors", bare)), need_weights=True)
    assert set(anatomy.tensors) == set(tensors)
    assert anatomy.tensors["model.norm.weight"].stored_name == "norm.weight"


def test_an_encoder_without_a_pooler_gets_a_new_one(tmp_path: Path) -> None:
    tensors = implied_tensors(BERT, tmp_path / "shape")
    stored = {name: shape for name, shape in tensors.items() if "pooler" not in name} | {"cls.predictions.bias": (40,)}
    anatomy = read_anatomy(write_base(tmp_path / "base", BERT, ("model.safetensors", stored), dtype="F32"), need_weights=True)
    assert [tensor.name for tensor in anatomy.new_tensors] == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert set(anatomy.tensors) == set(tensors) - {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_where_the_base_lies(tmp_path: Path) -> None:
    assert resolve_base("./models/x", tmp_path) == tmp_path / "models" / "x"
    assert resolve_base("/models/x", tmp_path) == Path("/models/x")
    assert resolve_base("~/x", tmp_path) == Path.home() / "x"
    assert resolve_base("sample", tmp_path).name == "base"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"quantization_config": "nf4"}, "quantized already (quantization_config, method 'unknown')"),
        ({"quantization_config": ["bitsandbytes"]}, "quantized already"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "3 key-value heads for 4 attention heads"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 8},
            "8 experts a token, of 4",
        ),
    ],
)
def test_a_config_that_makes_no_sense(base: Path, changes: dict[str, Any], what: str) -> None:
    assert what in error_of(with_config(base, **changes)).what
