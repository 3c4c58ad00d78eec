from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from orchestrator.anatomy import read_anatomy
from orchestrator.errors import BaseError
from orchestrator.train.integrity import changed, fingerprint, tensors_of
from orchestrator.train.model.base import dequantized, load_base, loading_device, num_loads
from orchestrator.work.execution import BaseLoad, ExecutionPlan

IDS = torch.arange(1, 17)[None]


def test_a_loaded_base_is_frozen_in_train_mode_and_computes_what_transformers_does(llama_folder: Callable, base_of: Callable):
    folder = llama_folder()
    base = base_of(folder)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.training
    assert base.model.config.use_cache is False
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_has_the_asked_dtype(llama_folder: Callable, base_of: Callable, dtype: torch.dtype):
    base = base_of(llama_folder(), dtype=dtype)
    assert {parameter.dtype for parameter in base.model.parameters()} == {dtype}


def test_every_load_is_counted(llama_folder: Callable, base_of: Callable):
    before = num_loads()
    base = base_of(llama_folder())
    assert num_loads() == base.num_loads == before + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_nf4_compresses_the_blocks_only_and_survives_eval_mode(
    llama_folder: Callable, base_of: Callable, tied: bool, dtype: torch.dtype
):
    base = base_of(llama_folder(tied=tied, hidden_size=256), quantize="nf4", dtype=dtype)
    assert {parameter.dtype for parameter in base.model.parameters()} == {dtype}, "ZeRO-3 wants one dtype"
    before = fingerprint(tensors_of(base.model))
    assert "model.layers.0.self_attn.q_proj.weight.nested.absmax" in before
    base.model.eval()
    with torch.no_grad():
        quantized = base.model(input_ids=IDS).logits
    base.model.train()
    assert changed(before, fingerprint(tensors_of(base.model))) == []
    with torch.no_grad():
        exact = base_of(llama_folder(tied=tied, hidden_size=256), dtype=dtype).model(input_ids=IDS).logits
    assert not torch.equal(quantized, exact)


def test_nf4_weights_are_the_checkpoint_s_within_the_format_s_error(llama_folder: Callable, base_of: Callable):
    base = base_of(llama_folder(hidden_size=256), quantize="nf4", dtype=torch.bfloat16)
    name = "model.layers.3.mlp.down_proj.weight"
    parameter = base.model.get_parameter(name)
    original = base.read_original([name])[name].float()
    error = (dequantize_4bit(parameter.data, parameter.quant_state).float() - original).norm() / original.norm()
    assert 0.05 < error < 0.12, "16 levels of a normal distribution: about 9%"


def test_the_original_weights_of_a_quantized_base_are_within_reach(llama_folder: Callable, base_of: Callable):
    folder = llama_folder(hidden_size=256)
    base = base_of(folder, quantize="nf4", dtype=torch.bfloat16)
    name = "model.layers.2.mlp.up_proj.weight"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(base.read_original([name])[name], plain.get_parameter(name))
    with pytest.raises(BaseError, match="no tensor"):
        base.read_original(["model.layers.9.mlp.up_proj.weight"])


def test_original_weights_are_read_from_shards_and_under_the_names_that_files_use(
    qwen_folder: Path, bert_folder: Path, base_of: Callable, tmp_path: Path
):
    assert (qwen_folder / "model.safetensors.index.json").exists()
    bare = tmp_path / "bare"
    AutoModel.from_pretrained(bert_folder, add_pooling_layer=False).save_pretrained(bare)
    for folder, task in ((qwen_folder, "completion"), (bert_folder, "classify"), (bare, "classify")):
        base = base_of(folder, task=task)
        for name, tensor in base.read_original(base.anatomy.tensors).items():
            assert torch.equal(tensor, base.model.get_parameter(name)), name
    assert base.anatomy.tensors["bert.encoder.layer.0.output.dense.weight"].stored_name


def test_a_classifier_is_new_seeded_and_the_same_whatever_ran_before(
    llama_folder: Callable, bert_folder: Path, base_of: Callable
):
    for folder, name in ((llama_folder(), "score.weight"), (bert_folder, "bert.pooler.dense.weight")):
        torch.manual_seed(1)
        first = base_of(folder, task="classify")
        torch.manual_seed(2)
        state = torch.get_rng_state()
        second = base_of(folder, task="classify")
        assert torch.equal(torch.get_rng_state(), state), "loading leaves the global generator alone"
        assert torch.equal(first.model.get_parameter(name), second.model.get_parameter(name))
        assert first.model.get_parameter(name).std() > 0
        assert first.model.config.num_labels == 3
        assert first.model.config.id2label[1] == "mid"
        assert first.model.config.pad_token_id is not None


def test_bert_keeps_its_dropout_for_training(bert_folder: Path, base_of: Callable):
    base = base_of(bert_folder, task="classify")
    with torch.no_grad():
        assert not torch.equal(base.model(input_ids=IDS).logits, base.model(input_ids=IDS).logits)
        base.model.eval()
        assert torch.equal(base.model(input_ids=IDS).logits, base.model(input_ids=IDS).logits)


def test_what_cannot_be_loaded_is_refused(llama_folder: Callable, tmp_path: Path):
    folder = tmp_path / "base"
    shutil.copytree(llama_folder(), folder)
    anatomy = read_anatomy(folder, need_weights=True)
    load = BaseLoad(folder=str(folder), model_type="llama", quantize="none", task="completion")
    cpu = torch.device("cpu")
    with pytest.raises(BaseError, match="no weights"):
        load_base(load, anatomy.model_copy(update={"has_weights": False}), dtype=torch.float32, device=cpu)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BaseError, match="cannot be loaded"):
        load_base(load, anatomy, dtype=torch.float32, device=cpu)
    weights.unlink()
    with pytest.raises(BaseError, match="cannot be loaded"):
        load_base(load, anatomy, dtype=torch.float32, device=cpu)


@pytest.mark.parametrize(
    ("stage", "quantize", "where"), [(3, "none", "cpu"), (2, "none", "cuda:0"), (0, "none", "cuda:0"), (3, "nf4", "cuda:0")]
)
def test_what_zero_3_partitions_is_loaded_beside_the_gpu(stage: int, quantize: str, where: str):
    """A 70B in 16 bit is larger than any GPU that gets a part of it."""
    execution = ExecutionPlan.model_validate(
        {"device": "cuda", "ranks": 2, "threads_per_rank": 1, "executor": "deepspeed", "zero_stage": stage}
        | {"row_tokens": 8, "micro_batch_rows": 1}
    )
    load = BaseLoad.model_validate({"folder": "", "model_type": "llama", "quantize": quantize, "task": "text"})
    assert loading_device(load, execution, torch.device("cuda", 0)) == torch.device(where)


def test_weights_are_put_where_loading_wants_them(llama_folder: Callable):
    folder = llama_folder()
    load = BaseLoad(folder=str(folder), model_type="llama", quantize="none", task="completion")
    there, here = torch.device("meta"), torch.device("cpu")
    base = load_base(load, read_anatomy(folder, need_weights=True), dtype=torch.bfloat16, device=there, load_on=here)
    assert base.device == there
    assert {parameter.device for parameter in base.model.parameters()} == {here}


def test_a_base_on_the_cpu_is_mapped_and_not_copied(tmp_path: Path):
    """What lets every rank of a node load a base that fits the node's memory once."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, pad_token_id=0
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size
    load = BaseLoad(folder=str(tmp_path), model_type="llama", quantize="none", task="completion")
    anatomy = read_anatomy(tmp_path, need_weights=True)
    before = _anonymous_bytes()
    base = load_base(load, anatomy, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert _anonymous_bytes() - before < 0.3 * stored
    assert sum(parameter.numel() for parameter in base.model.parameters()) * 2 == pytest.approx(stored, rel=0.01)


def _anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_int8_multiplies_with_dequantized_weights(llama_folder: Callable, base_of: Callable):
    """Outputs and input gradients are those of the weights that `dequantized` gives, in train mode and in eval mode."""
    base = base_of(llama_folder(), quantize="int8")
    plain = base_of(llama_folder())
    layers = {name.removesuffix(".weight") for block in base.anatomy.linears for name in block}
    for name in sorted(layers):
        layer, inputs = base.model.get_submodule(name), torch.randn(2, 3, base.model.get_submodule(name).in_features)
        weight = dequantized(layer.weight)
        original = plain.model.get_parameter(f"{name}.weight").float()
        error = (weight.float() - original).abs().amax(dim=1) / original.abs().amax(dim=1)
        assert 0 < error.max() < 0.01, name
        inputs = inputs.to(base.dtype).requires_grad_()
        for mode in (True, False):
            layer.train(mode)
            out = layer(inputs)
            (gradient,) = torch.autograd.grad(out.sum(), inputs)
            assert torch.equal(out, torch.nn.functional.linear(inputs, weight))
            assert torch.allclose(gradient, torch.ones_like(out) @ weight, atol=1e-5)
    assert any(name.endswith(".absmax") for name, _ in tensors_of(base.model))
