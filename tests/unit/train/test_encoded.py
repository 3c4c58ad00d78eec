"""Bases that are quantized already: decoded on loading, read and merged in 16 bit, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.anatomy import read_anatomy
from orchestrator.errors import BaseError
from orchestrator.plan.merge import make_merge_plan
from orchestrator.serve.bundle import bundle_config
from orchestrator.serve.merging import merge
from orchestrator.train.model.base import load_base
from orchestrator.work.execution import BaseLoad

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
BLOCK = 8


def save_quantized(folder: Path, kind: str, method: str, key: str = "quantization_config") -> Path:
    config = AutoConfig.for_model(kind, **SMALL, dtype="bfloat16")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= QUANTIZE[method](name, tensor) if method in QUANTIZE else {name: tensor}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values[key] = {"quant_method": method, **({"weight_block_size": [BLOCK, BLOCK]} if method == "fp8" else {})}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def to_fp8(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if "proj" not in name:
        return {name: tensor}
    blocks = tensor.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return {name: codes.reshape(tensor.shape), f"{name}_scale_inv": scales}


def to_mxfp4(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if "experts" not in name or "bias" in name:
        return {name: tensor}
    experts, width, out = tensor.shape
    blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.randint(118, 124, blocks.shape[:-1], dtype=torch.uint8)}


QUANTIZE = {"fp8": to_fp8, "mxfp4": to_mxfp4}
KINDS = [("qwen3", "fp8"), ("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4")]


@pytest.mark.parametrize(("kind", "method"), KINDS)
def test_what_is_decoded_is_what_transformers_loads(kind: str, method: str, tmp_path: Path) -> None:
    folder = save_quantized(tmp_path / "base", kind, method)
    anatomy = read_anatomy(folder, need_weights=True)
    assert anatomy.encoding == method
    assert "in 16 bit" in anatomy.notes[0]
    assert anatomy.extra == ()
    load = BaseLoad(folder=str(folder), model_type=kind, quantize="none", task="completion")
    base = load_base(load, anatomy, dtype=torch.float32, device=torch.device("cpu"))
    original = base.read_original(anatomy.tensors)
    for name, parameter in base.model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, original[name]), name


@pytest.mark.parametrize(("kind", "method"), KINDS)
def test_the_bundle_is_in_16_bit(kind: str, method: str, tmp_path: Path) -> None:
    folder = save_quantized(tmp_path / "base", kind, method)
    anatomy = read_anatomy(folder, need_weights=True)
    norm = anatomy.final_norm[0]
    (tmp_path / "rung" / "delta").mkdir(parents=True)
    save_file({norm: torch.full((32,), 2.0)}, tmp_path / "rung" / "delta" / "delta.safetensors")
    load = BaseLoad(folder=str(folder), model_type=kind, quantize="none", task="completion")
    plan = make_merge_plan(anatomy, tmp_path / "rung", load)
    (tmp_path / "out").mkdir()
    merge(plan, tmp_path / "out")
    config = bundle_config(json.loads((folder / "config.json").read_text()), plan)
    assert "quantization_config" not in config
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    base = load_base(load, anatomy, dtype=torch.bfloat16, device=torch.device("cpu"))
    for name, parameter in model.named_parameters():
        wanted = torch.full((32,), 2.0) if name == norm else base.model.get_parameter(name)
        assert torch.equal(parameter, wanted.to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("method", "key"),
    [("gptq", "quantization_config"), ("awq", "quantization_config"), ("compressed-tensors", "compression_config")],
)
def test_other_methods_are_refused(method: str, key: str, tmp_path: Path) -> None:
    folder = save_quantized(tmp_path / "base", "qwen3", method, key)
    with pytest.raises(BaseError, match="quantized already") as caught:
        read_anatomy(folder, need_weights=False)
    assert key in caught.value.what
    assert method in caught.value.what
    assert caught.value.exit_code == 2
    assert "original weights" in caught.value.remedy


def test_scales_that_transformers_does_not_decode_are_refused(tmp_path: Path) -> None:
    folder = save_quantized(tmp_path / "base", "qwen3", "fp8")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    tensors[name] = torch.ones(3, tensors[name].shape[1])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BaseError, match="scales"):
        read_anatomy(folder, need_weights=True)


@pytest.mark.parametrize(("block", "readable"), [(None, True), ([8, 8], True), ([32, 32], False), ([20, 8], False)])
def test_blocks_are_those_of_the_config(block: list[int] | None, readable: bool, tmp_path: Path) -> None:
    """Two scales for 32 rows in blocks of 20 are of 20 and 12 rows, which transformers decodes as 16 and 16."""
    folder = save_quantized(tmp_path / "base", "qwen3", "fp8")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        rows, columns = tensors[name.removesuffix("_scale_inv")].shape
        grid = (1, 1) if block is None else (rows // 8, columns // 8) if block == [8, 8] else (-(-rows // 20), columns // 8)
        tensors[name] = torch.ones(grid)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (folder / "config.json").write_text(json.dumps(config))
    if readable:
        assert read_anatomy(folder, need_weights=True).encoding == "fp8"
    else:
        with pytest.raises(BaseError, match="weight_block_size"):
            read_anatomy(folder, need_weights=True)


def test_a_tensor_of_one_block_that_is_not_full_is_decoded(tmp_path: Path) -> None:
    folder = save_quantized(tmp_path / "base", "qwen3", "fp8")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.ones(1, 1) for name in tensors if name.endswith("_scale_inv")}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["weight_block_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_anatomy(folder, need_weights=True).encoding == "fp8"
