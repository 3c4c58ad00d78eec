"""Small honest bases in several shards, and artifacts of real size on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.anatomy import ModelAnatomy, read_anatomy
from orchestrator.store.files import usual_mode
from orchestrator.work.execution import BaseLoad

VOCAB, HIDDEN = 97, 128
LORA_RANK, LORA_ALPHA = 4, 8


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., ModelAnatomy]:
    """(name=, tied=, sharded=, dtype=) -> the anatomy of a saved three-block Llama."""

    def build(
        name: str = "base", *, tied: bool = True, sharded: bool = True, dtype: torch.dtype = torch.bfloat16
    ) -> ModelAnatomy:
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            initializer_range=0.1,
            pad_token_id=0,
        )
        torch.manual_seed(7)
        model = LlamaForCausalLM(config).to(dtype)
        model.save_pretrained(tmp_path / name, max_shard_size="150KB" if sharded else "5GB")
        for shard in (tmp_path / name).glob("*.safetensors"):
            shard.chmod(usual_mode(tmp_path))  # safetensors writes 0600
        return read_anatomy(tmp_path / name, need_weights=True)

    return build


@pytest.fixture
def load_of() -> Callable[..., BaseLoad]:
    def build(
        anatomy: ModelAnatomy, *, quantize: str = "none", task: str = "completion", classes: tuple[str, ...] = ()
    ) -> BaseLoad:
        return BaseLoad.model_validate(
            {
                "folder": anatomy.folder,
                "model_type": anatomy.model_type,
                "quantize": quantize,
                "task": task,
                "num_classes": len(classes),
                "class_names": classes,
            }
        )

    return build


def weights_of(folder: Path | str) -> dict[str, torch.Tensor]:
    """Every tensor of a saved model."""
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def write_adapter(folder: Path, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], **config: object) -> Path:
    """`folder/adapter` in PEFT's format; `pairs` is by the weight's name, A[rank, in] and B[out, rank]."""
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    tensors = {}
    for name, (a, b) in pairs.items():
        module = "base_model.model." + name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": a.contiguous(), f"{module}.lora_B.weight": b.contiguous()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_ALPHA, "bias": "none", "task_type": "CAUSAL_LM"}
    targets = [name.removesuffix(".weight") for name in pairs]
    (adapter / "adapter_config.json").write_text(json.dumps(values | {"target_modules": targets} | config))
    return folder


def random_pairs(anatomy: ModelAnatomy, names: tuple[str, ...], seed: int = 1) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in names:
        rows, columns = anatomy.tensors[name].shape
        a = torch.randn(LORA_RANK, columns, generator=generator) * columns**-0.5
        pairs[name] = (a, torch.randn(rows, LORA_RANK, generator=generator) * 0.1)
    return pairs


def write_delta(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """`folder/delta` with these whole tensors."""
    delta = folder / "delta"
    delta.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, delta / "delta.safetensors")
    (delta / "delta.json").write_text(json.dumps({"format": 1, "trainable": sorted(tensors)}))
    return folder


class Tools:
    """The helpers above, for tests of this folder."""

    weights_of = staticmethod(weights_of)
    write_adapter = staticmethod(write_adapter)
    random_pairs = staticmethod(random_pairs)
    write_delta = staticmethod(write_delta)
    scale = LORA_ALPHA / LORA_RANK


@pytest.fixture
def tools() -> type[Tools]:
    return Tools
