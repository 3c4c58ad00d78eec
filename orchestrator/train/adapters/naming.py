"""Names of live adapters, and what one trial's adapters are.

A live adapter's tensor is named by its suffix and its trial, `lora_A_0`; one of routed experts, whose module has several adapted
parameters, by its parameter too: `gate_up_proj__lora_A_0`. Stable names, without trial and wrappers, are the weight's name
with the suffix of PEFT: `q_proj.lora_A.weight`, `experts.gate_up_proj.lora_A.weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from orchestrator.anatomy.values import LayerSelection
from orchestrator.spec.adapters import ADAPTER_KINDS

BASE_LAYER = "base_layer"
"""Attribute of an adapted module with the module that it wraps; stable names of frozen parameters omit it."""
LIVE_NAMES = {
    suffix: suffix.removeprefix(".").removesuffix(".weight") for kind in ADAPTER_KINDS.values() for suffix in kind.suffixes
}
"""Attribute name by suffix, `.lora_A.weight` -> `lora_A`: the parameter of trial 0 is `lora_A_0`."""
WITHIN = "__"
"""Stands between the name of an expert's parameter and that of its adapter's tensor."""


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of one trial."""

    selection: LayerSelection
    lora_alpha: int
    seed: int

    @property
    def scale(self) -> float:
        """The factor of the product B @ A."""
        return self.selection.adapter_kind.scale(self.lora_alpha, self.selection.lora_rank or 0)


def live_name(suffix: str, trial: int, parameter: str = "") -> str:
    """Return the attribute of an adapter's tensor in its module: `.lora_A.weight` -> `lora_A_0`."""
    return f"{parameter}{WITHIN if parameter else ''}{LIVE_NAMES[suffix]}_{trial}"


def own_parameters(model: nn.Module, trial: int) -> list[tuple[str, nn.Parameter]]:
    """Return one trial's adapters by their stable names, in the model's order."""
    own = tuple(f"{mark}{live_name(suffix, trial)}" for suffix in LIVE_NAMES for mark in (".", WITHIN))
    return [(stable_name(name, trial), parameter) for name, parameter in model.named_parameters() if name.endswith(own)]


def stable_name(name: str, trial: int = 0) -> str:
    """Return a parameter's name as PEFT saves it, without wrapper names: `q_proj.lora_A_0` -> `q_proj.lora_A.weight`."""
    name = name.replace(f".{BASE_LAYER}.", ".")
    for suffix in LIVE_NAMES:
        for mark in (".", WITHIN):
            live = f"{mark}{live_name(suffix, trial)}"
            name = name.removesuffix(live) + suffix if name.endswith(live) else name
    return name


def adapted_name(weight: str) -> str:
    """Return the stable name of a weight's adapter, to which the suffixes are appended."""
    return weight.removesuffix(".weight")
