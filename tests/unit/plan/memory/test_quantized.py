"""Planned bytes of quantized matrices against the storages of real bitsandbytes modules on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from orchestrator.anatomy import read_anatomy, select
from orchestrator.plan.memory.footprint import make_footprint
from orchestrator.plan.memory.quantized import QuantizedBytes, dequantize_scratch_bytes, quantized_bytes
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.model.base import LoadedBase, load_base
from orchestrator.work.execution import BaseLoad

SHAPES = [(64, 64), (32, 8), (129, 255), (256, 1000), (1, 8), (8, 2049), (512, 300)]
"""One block and less, blocks that are not whole, just over 256 scales, odd sizes."""
DTYPES = [torch.bfloat16, torch.float32]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def quantized_4bit(shape: tuple[int, int], dtype: torch.dtype) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compute_dtype=dtype, quant_type="nf4", quant_storage=dtype)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(shape, dtype=dtype),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=dtype,
        module=layer,
    )
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu").train()


def quantized_8bit(shape: tuple[int, int], dtype: torch.dtype) -> bnb.nn.Linear8bitLt:
    layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(shape, dtype=dtype), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").train()


def tensors_4bit(weight: Any) -> dict[str, torch.Tensor]:
    state = weight.quant_state
    return {
        "packed": weight.data,
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "offset": state.offset,
        "code": state.code,
        "nested_code": state.state2.code,
    }


def held(parameter: torch.nn.Parameter) -> QuantizedBytes:
    """What a parameter of a loaded model takes, quantized or not."""
    if not hasattr(parameter, "quant_state"):
        return QuantizedBytes(packed=storage(parameter))
    return QuantizedBytes(**{name: storage(tensor) for name, tensor in tensors_4bit(parameter).items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_takes_what_is_planned_to_the_byte(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = quantized_4bit(shape, dtype).weight
    assert weight.data.dtype == dtype
    assert held(weight) == quantized_bytes(shape, "nf4", dtype.itemsize)


def test_no_two_matrices_share_a_tensor() -> None:
    first, second = (tensors_4bit(quantized_4bit((64, 64), torch.bfloat16).weight) for _ in range(2))
    assert not {tensor.data_ptr() for tensor in first.values()} & {tensor.data_ptr() for tensor in second.values()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_takes_what_is_planned_to_the_byte_before_and_after_its_first_use(shape: tuple[int, int]) -> None:
    layer = quantized_8bit(shape, torch.bfloat16)
    planned = quantized_bytes(shape, "int8", 2)
    assert layer.weight.CB.data_ptr() == layer.weight.data_ptr()
    assert QuantizedBytes(packed=storage(layer.weight.data), absmax=storage(layer.weight.SCB)) == planned
    layer(torch.randn(2, shape[1], dtype=torch.bfloat16))
    assert layer.weight.CB is None
    assert layer.state.CB.data_ptr() == layer.weight.data_ptr()
    assert QuantizedBytes(packed=storage(layer.weight.data), absmax=storage(layer.state.SCB)) == planned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loaded_base_takes_what_is_planned(tmp_path: Path, dtype: torch.dtype) -> None:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=328,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    anatomy = read_anatomy(tmp_path, need_weights=True)
    load = BaseLoad(folder=str(tmp_path), model_type="llama", quantize="nf4", task="completion")
    base = load_base(load, anatomy, dtype=dtype, device=torch.device("cpu"))
    matrices = {name for block in anatomy.linears for name in block}
    planned = {
        name: quantized_bytes(tensor.shape, "nf4" if name in matrices else "none", dtype.itemsize)
        for name, tensor in anatomy.tensors.items()
    }
    assert {name: held(parameter) for name, parameter in base.model.named_parameters()} == planned
    assert len(matrices) == 14
    _check_unfrozen(base, {name: planned[name].total for name in matrices})


def _check_unfrozen(base: LoadedBase, quantized: dict[str, int]) -> None:
    """What is unfrozen learns in the compute dtype beside its quantized matrix, which waits for the next trial."""
    selection = select(base.anatomy, "last:1", "full", None, task="completion")
    footprint = make_footprint(base.anatomy, selection, "nf4", base.dtype.itemsize)
    waiting = [weakref.ref(base.model.get_parameter(name)) for name in quantized]
    with open_branch(base, selection, lora_alpha=1, seed=0) as branch:
        assert all(parameter() is not None for parameter in waiting)
        plain = {name: parameter for name, parameter in branch.model.named_parameters() if not hasattr(parameter, "quant_state")}
        learning = [storage(parameter.data) for parameter in plain.values() if parameter.requires_grad]
        frozen = [storage(parameter.data) for parameter in plain.values() if not parameter.requires_grad]
    assert footprint.frozen_bytes == sum(frozen) + sum(quantized.values())
    assert [count * base.dtype.itemsize for count in footprint.learning_counts] == learning
    assert footprint.restore_bytes == 2 * 256 * base.dtype.itemsize, "two norms; matrices are read from the original"
    assert footprint.largest_block_bytes == sum(learning)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_stacked_experts_and_their_router_stay_in_16_bits(tmp_path: Path, quantize: str) -> None:
    """They are plain parameters of modules of their own, and transformers gives bitsandbytes `nn.Linear` alone."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = MixtralConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True) if quantize == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=how)
    kinds = {name.rpartition("layers.0.")[2]: type(p).__name__ for name, p in model.named_parameters() if "layers.0." in name}
    assert {name for name, kind in kinds.items() if kind in ("Params4bit", "Int8Params")} == {
        f"self_attn.{part}_proj.weight" for part in "qkvo"
    }
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"} < kinds.keys()


def peak_bytes(call: Callable[[], torch.Tensor]) -> int:
    """The most that a call had allocated at once, what it returns included. Runs it once before, for what is made once."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _result = call()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("shape", [(256, 512), (128, 100)], ids=str)
def test_one_opened_matrix_at_a_time(shape: tuple[int, int]) -> None:
    """In float32, where the product itself takes no scratch. On a CPU the scales are there once, on a GPU twice."""
    rows, columns = shape
    inputs = torch.randn(1, columns, requires_grad=True)
    layer = quantized_4bit(shape, torch.float32)
    once = 4 * -(-rows * columns // 64)
    assert peak_bytes(lambda: layer(inputs)) == dequantize_scratch_bytes(shape, "nf4", 4) - once + 4 * rows

    def backward() -> torch.Tensor:
        return torch.autograd.grad(output, inputs, gradient, retain_graph=True)[0]

    output, gradient = layer(inputs), torch.ones(1, rows)
    assert peak_bytes(backward) == 4 * rows * columns + max(once, 4 * columns)


@pytest.mark.parametrize("shape", [(256, 512), (128, 100)], ids=str)
def test_int8_opens_a_matrix_and_scales_it_in_place(shape: tuple[int, int]) -> None:
    layer, inputs = quantized_8bit(shape, torch.float32), torch.randn(1, shape[1], requires_grad=True)
    rest = peak_bytes(lambda: layer(inputs)) - dequantize_scratch_bytes(shape, "int8", 4)
    assert 0 <= rest <= 16, "two numbers that were Python's"


def test_nothing_is_opened_where_nothing_is_quantized() -> None:
    assert quantized_bytes((3, 5), "none", 2) == QuantizedBytes(packed=30)
    assert quantized_bytes((3, 5), "none", 2).total == 30
    assert dequantize_scratch_bytes((3, 5), "none", 2) == 0


def test_bits_of_a_weight_in_nf4() -> None:
    """4.127 as published (QLoRA, section 3), and the two tables that the paper does not count."""
    elements = 8192 * 28672
    planned = quantized_bytes((8192, 28672), "nf4", 2)
    assert 8 * (planned.total - 1092) / elements == 4 + 8 / 64 + 32 / (64 * 256)
