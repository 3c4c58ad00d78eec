"""A merge writes what the base stores, under its names, whichever way the class holds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

from orchestrator.anatomy import ModelAnatomy, read_anatomy
from orchestrator.anatomy.values import StoredPart, TensorInfo
from orchestrator.anatomy.weights import read_header, read_weights, seek_tensor
from orchestrator.plan.merge import make_merge_plan
from orchestrator.plan.merge_operations import LinkShard
from orchestrator.probe.names import map_names
from orchestrator.serve.dequantize import HeldWeight, hold_quantized
from orchestrator.serve.merging import merge

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (AutoModelForCausalLM, SMALL),
    "gpt_oss": (AutoModelForCausalLM, SMALL),
    "nomic_bert": (AutoModelForMaskedLM, SMALL),
    "gpt2": (AutoModelForCausalLM, {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "qwen3_vl_moe": (
        AutoModelForImageTextToText,
        {"text_config": SMALL, "vision_config": {**VISION, "deepstack_visual_indexes": [0]}},
    ),
}


class Base:
    """A saved model, its anatomy as far as a merge reads it, and the class that loads it."""

    def __init__(self, kind: str, folder: Path, *, transposes_experts: bool = False) -> None:
        self.auto, values = MODELS[kind]
        self.folder = folder
        config = AutoConfig.for_model(kind, **values, dtype="float32")
        torch.manual_seed(0)
        model = self.auto.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder, max_shard_size="12KB")
        for file in folder.glob("*.safetensors") if transposes_experts else ():
            tensors = load_file(file)
            turned = {name: tensor.transpose(1, 2) for name, tensor in tensors.items() if ".mlp.experts." in name}
            save_file({name: turned.get(name, tensor).contiguous() for name, tensor in tensors.items()}, file)
        with torch.device("meta"):
            empty = self.auto.from_config(config)
        stored = read_weights(folder)
        assert stored is not None
        self.names = map_names(empty, stored)

    def anatomy(self, sample: ModelAnatomy, **changes: Any) -> ModelAnatomy:
        """The sample's anatomy with these tensors."""
        given = {"folder": str(self.folder), "tensors": self.names.tensors, "extra": self.names.extra, "linears": ((),)}
        return sample.model_copy(update={**given, "tied": False, "head_weight": "lm_head.weight", **changes})

    def state(self, folder: Path) -> dict[str, torch.Tensor]:
        (folder / "config.json").write_bytes((self.folder / "config.json").read_bytes())
        model, info = self.auto.from_pretrained(folder, output_loading_info=True, dtype="float32")
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        return model.state_dict()


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture
def sample(make_base: Callable[..., ModelAnatomy]) -> ModelAnatomy:
    return make_base("sample")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mixtral", ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight"]),
        ("gpt_oss", ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.sinks"]),
        ("nomic_bert", ["nomic_bert.layers.1.self_attn.k_proj.weight", "nomic_bert.layers.0.post_attention_layernorm.weight"]),
        ("qwen3_vl_moe", ["model.language_model.layers.1.mlp.experts.down_proj"]),
    ],
)
def test_a_delta_is_written_in_the_stored_parts(
    kind: str, names: list[str], sample: ModelAnatomy, load_of: Callable, tools: Any, tmp_path: Path
) -> None:
    base = Base(kind, tmp_path / kind)
    before = base.state(tmp_path / kind)
    delta = {name: torch.randn_like(before[name]) for name in names}
    anatomy = base.anatomy(sample)
    after = base.state(merged(anatomy, tools.write_delta(tmp_path / "rung", delta), load_of, tmp_path / "out"))
    for name, weight in before.items():
        assert torch.equal(after[name], delta.get(name, weight)), name
    assert_stored_alike(base, tmp_path / "out")


def merged(anatomy: ModelAnatomy, artifact: Path, load_of: Callable, out: Path) -> Path:
    plan = make_merge_plan(anatomy, artifact, load_of(anatomy))
    out.mkdir()
    merge(plan, out)
    assert any(isinstance(shard, LinkShard) for shard in plan.shards)
    return out


def assert_stored_alike(base: Base, out: Path) -> None:
    """Names, shapes and types are those of the base."""
    found, wanted = stored_in(out), stored_in(base.folder)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()
    }


RANK, ALPHA = 2, 4


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("mixtral", "model.layers.1.mlp.experts.gate_up_proj"),
        ("mixtral", "model.layers.1.mlp.experts.down_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj"),
        ("qwen3_vl_moe", "model.language_model.layers.1.mlp.experts.down_proj"),
        ("qwen3_vl_moe transposed", "model.language_model.layers.1.mlp.experts.gate_up_proj"),
        ("nomic_bert", "nomic_bert.layers.1.self_attn.k_proj.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
    ],
)
def test_an_adapter_is_added_to_the_stored_parts(
    kind: str, name: str, sample: ModelAnatomy, load_of: Callable, tools: Any, tmp_path: Path
) -> None:
    kind, _, how = kind.partition(" ")
    base = Base(kind, tmp_path / kind, transposes_experts=bool(how))
    before = base.state(tmp_path / kind)
    from_right = kind in ("gpt_oss", "gpt2")
    logical = before[name].transpose(-2, -1) if from_right else before[name]
    a, b = adapter_of(logical.shape)
    artifact = write_adapter(tools, tmp_path / "rung", name, a, b)
    anatomy = base.anatomy(sample, transposed=(name,) if from_right else ())
    after = base.state(merged(anatomy, artifact, load_of, tmp_path / "out"))
    product = torch.stack([b[:, :, n] @ a[n] for n in range(a.shape[0])]) if logical.dim() == 3 else b[..., 0] @ a[0]
    wanted = logical + ALPHA / RANK * product
    assert torch.allclose(after[name].transpose(-2, -1) if from_right else after[name], wanted, atol=1e-6)
    assert not torch.equal(after[name], before[name])
    for other, weight in before.items():
        assert other == name or torch.equal(after[other], weight), other
    assert_stored_alike(base, tmp_path / "out")


def adapter_of(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """A[experts, r, in] and B[out, r, experts], as PEFT lays them out."""
    num_experts = shape[0] if len(shape) == 3 else 1
    return torch.randn(num_experts, RANK, shape[-1]), torch.randn(shape[-2], RANK, num_experts)


def write_adapter(tools: Any, folder: Path, name: str, a: torch.Tensor, b: torch.Tensor) -> Path:
    given: dict[str, object] = {"r": RANK, "lora_alpha": ALPHA}
    module = name.removesuffix(".weight")
    if module == name:
        # PEFT names the adapter of a parameter after the parameter's module.
        module = name.rpartition(".")[0]
        given["target_parameters"] = [name]
    return tools.write_adapter(folder, {f"{module}.weight": (a.flatten(0, 1), b.flatten(1))}, **given)


def test_parts_of_a_quantized_weight_are_those_that_training_used(
    sample: ModelAnatomy, load_of: Callable, tools: Any, tmp_path: Path
) -> None:
    """The scales of nf4 are quantized with all blocks of a parameter, of which a stored tensor may be a part, or more than it."""
    name, part = "model.layers.0.self_attn.qkv.weight", "model.layers.0.self_attn.{}.weight"
    base = Base("mixtral", tmp_path / "base")
    shape, halves = (32, 64), (part.format("q"), part.format("k"))
    stored = {half: torch.randn(16, 64) for half in halves}
    save_file({**stored, "other": torch.zeros(4)}, tmp_path / "base" / "model.safetensors")
    parts = tuple(
        StoredPart(name=half, file="model.safetensors", shape=(16, 64), dtype="F32", start=16 * number)
        for number, half in enumerate(halves)
    )
    fused = TensorInfo(name=name, shape=shape, dtype="F32", file="model.safetensors", parts=parts)
    other = TensorInfo(name="other", shape=(4,), dtype="F32", file="model.safetensors")
    save_file(
        {**load_file(tmp_path / "base" / "model.safetensors"), "other": torch.zeros(4)}, tmp_path / "base" / "model.safetensors"
    )
    anatomy = base.anatomy(sample, tensors={name: fused, "other": other}, linears=((name,),), extra=())
    artifact = tools.write_delta(tmp_path / "rung", {"other": torch.ones(4)})
    plan = make_merge_plan(anatomy, artifact, load_of(anatomy, quantize="nf4"), held_dtype="float32")
    (tmp_path / "out").mkdir()
    merge(plan, tmp_path / "out")
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    held = hold_quantized(torch.cat([before[half] for half in halves]), torch.float32)
    assert isinstance(held, HeldWeight)
    assert torch.equal(torch.cat([after[half] for half in halves]), held.rows(0, 32))


@pytest.mark.parametrize("extra_tensors", ["keep", "drop"])
def test_extra_tensors_are_kept_or_left_out(
    extra_tensors: Any, sample: ModelAnatomy, load_of: Callable, tools: Any, tmp_path: Path
) -> None:
    anatomy = sample
    file = sorted(Path(anatomy.folder).glob("*.safetensors"))[0]
    added = {"v_head.weight": torch.randn(1, 8), "scale": torch.ones(1, dtype=torch.int64)}
    save_file({**load_file(file), **added}, file)
    extra = [TensorInfo(name="v_head.weight", shape=(1, 8), dtype="F32", file=file.name)]
    extra.append(TensorInfo(name="scale", shape=(1,), dtype="I64", file=file.name))
    anatomy = anatomy.model_copy(update={"extra": tuple(extra)})
    name = next(name for name, info in anatomy.tensors.items() if info.file == file.name)
    artifact = tools.write_delta(tmp_path / "rung", {name: torch.zeros(anatomy.tensors[name].shape)})
    (tmp_path / "out").mkdir()
    merge(make_merge_plan(anatomy, artifact, load_of(anatomy), extra_tensors=extra_tensors), tmp_path / "out")
    found = stored_in(tmp_path / "out")
    kept = {name: tensor for name, tensor in found.items() if name in added}
    assert kept.keys() == (added.keys() if extra_tensors == "keep" else set())
    assert all(torch.equal(added[name], tensor) for name, tensor in kept.items())


def test_kept_tensors_of_types_that_torch_cannot_read_keep_their_bytes(
    sample: ModelAnatomy, load_of: Callable, tools: Any, tmp_path: Path
) -> None:
    added = {"u64": ("U64", 2, 16), "c64": ("C64", 3, 24), "e8m0": ("F8_E8M0", 5, 5), "f4": ("F4", 6, 3), "none": ("U16", 0, 0)}
    file = sorted(Path(sample.folder).glob("*.safetensors"))[0]
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:end]), data[end:]
    for name, (dtype, size, num_bytes) in added.items():
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [len(body), len(body) + num_bytes]}
        body += bytes(range(num_bytes))
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    extra = tuple(read_header(file)[name] for name in added)
    anatomy = sample.model_copy(update={"extra": extra})
    name = next(name for name, info in anatomy.tensors.items() if info.file == file.name)
    artifact = tools.write_delta(tmp_path / "rung", {name: torch.zeros(anatomy.tensors[name].shape)})
    (tmp_path / "out").mkdir()
    merge(make_merge_plan(anatomy, artifact, load_of(anatomy)), tmp_path / "out")
    stored = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        for name, info in read_header(shard).items():
            with shard.open("rb") as opened:
                stored[name] = (info.dtype, info.num_elements, opened.read(seek_tensor(opened, name)))
    assert {name: stored[name] for name in added} == {
        name: (dtype, size, bytes(range(num_bytes))) for name, (dtype, size, num_bytes) in added.items()
    }


def test_the_copy_of_a_tied_embedding_goes_with_it(
    make_base: Callable[..., ModelAnatomy], load_of: Callable, tools: Any, tmp_path: Path
) -> None:
    sample = make_base(sharded=False)
    embedding = sample.tensors[sample.embeddings[0]]
    file = Path(sample.folder) / embedding.file
    save_file({**load_file(file), "lm_head.weight": load_file(file)[embedding.name].clone()}, file)
    anatomy = read_anatomy(sample.folder, need_weights=True)
    assert [copy.stored_name for copy in anatomy.copies] == ["lm_head.weight"]
    norm = anatomy.final_norm[0]
    for number, name in enumerate((norm, embedding.name)):
        artifact = tools.write_delta(tmp_path / f"rung{number}", {name: torch.zeros(anatomy.tensors[name].shape)})
        (tmp_path / f"out{number}").mkdir()
        merge(make_merge_plan(anatomy, artifact, load_of(anatomy)), tmp_path / f"out{number}")
    assert "lm_head.weight" in stored_in(tmp_path / "out0")
    assert "lm_head.weight" not in stored_in(tmp_path / "out1")


def test_only_the_rows_of_new_tokens_are_replaced(
    make_base: Callable[..., ModelAnatomy], load_of: Callable, tools: Any, tmp_path: Path
) -> None:
    anatomy = make_base(sharded=False).model_copy(update={"new_rows": (7, 3)})
    embedding = anatomy.embeddings[0]
    before = stored_in(Path(anatomy.folder))
    trained = torch.randn(2, anatomy.hidden_size)
    artifact = tools.write_delta(tmp_path / "rung", {f"{embedding.removesuffix('weight')}new_rows": trained})
    (tmp_path / "out").mkdir()
    merge(make_merge_plan(anatomy, artifact, load_of(anatomy)), tmp_path / "out")
    after = stored_in(tmp_path / "out")
    expected = before[embedding].clone()
    expected[[7, 3]] = trained.to(expected.dtype)
    assert torch.equal(after[embedding], expected)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {embedding})


def test_a_head_that_differs_from_the_embedding_is_not_tied(make_base: Callable[..., ModelAnatomy]) -> None:
    tied = make_base(sharded=False)
    embedding = tied.tensors[tied.embeddings[0]]
    file = Path(tied.folder) / embedding.file
    save_file({**load_file(file), "lm_head.weight": load_file(file)[embedding.name] + 1}, file)
    anatomy = read_anatomy(tied.folder, need_weights=True)
    assert not anatomy.tied
    assert anatomy.tensors["lm_head.weight"].file == embedding.file
    assert "differs from the embedding" in anatomy.notes[0]
