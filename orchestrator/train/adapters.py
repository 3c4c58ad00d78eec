"""LoRA on a live model, by PEFT: put in by exact names, seeded by name, taken out again."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel

from orchestrator.anatomy.values import LayerSelection
from orchestrator.train.base import LoadedBase, generator_for, rng_devices

ADAPTER = "default"
"""PEFT's name of the one adapter that a branch has."""


def adapt(base: LoadedBase, selection: LayerSelection, lora_alpha: int, seed: int, undo: ExitStack) -> None:
    """Put a LoRA beside each adapted weight; `undo` takes them out again."""
    config = LoraConfig(
        r=selection.lora_rank or 0,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=[name.rpartition(".")[0] for name in selection.adapted],
    )
    with torch.random.fork_rng(devices=rng_devices(base.device)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # the merge unties it
        tuner = LoraModel(base.model, config, ADAPTER)
    undo.callback(tuner.unload)
    for name, module in base.model.named_modules():
        if isinstance(module, LoraLayer):
            _initialise_adapter(base, name, seed)


def _initialise_adapter(base: LoadedBase, name: str, seed: int) -> None:
    """A uniform(-1/sqrt(in), 1/sqrt(in)) (kaiming with a = sqrt 5, as Hu et al. 2021 and PEFT do), B zero."""
    a = base.model.get_parameter(f"{name}.lora_A.{ADAPTER}.weight")
    b = base.model.get_parameter(f"{name}.lora_B.{ADAPTER}.weight")
    bound = a.shape[1] ** -0.5
    values = torch.empty(a.shape).uniform_(-bound, bound, generator=generator_for(seed, f"{name}.lora_A.weight"))
    a.data = values.to(device=base.device, dtype=base.dtype)
    b.data = torch.zeros(b.shape, device=base.device, dtype=base.dtype)


def stable_name(name: str) -> str:
    """PEFT's live name without the wrapping: `q_proj.lora_A.default.weight` -> `q_proj.lora_A.weight`."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")
