"""What an engine leaves on modules, taken off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class ModuleStates:
    """Hooks, attributes and train mode of every module, as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._states = [(module, set(vars(module)), module.training, _hooks(module)) for module in model.modules()]

    def restore(self) -> None:
        """Take off hooks and attributes that came later; they keep an old engine's tensors alive."""
        for module, attributes, training, hooks in self._states:
            for name in set(vars(module)) - attributes:
                del vars(module)[name]
            for name, entries in hooks.items():
                registered = vars(module)[name]
                registered.clear()
                registered.update(entries)
            module.training = training


def _hooks(module: nn.Module) -> dict[str, dict[int, Callable[..., Any]]]:
    return {name: dict(value) for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)}
