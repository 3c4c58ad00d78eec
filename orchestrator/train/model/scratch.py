"""Random weights in the place of the base's: the control `scratch`."""

from __future__ import annotations

import copy
from typing import Any

import torch

from orchestrator.errors import TrainingError
from orchestrator.train.adapters.branch import Branch
from orchestrator.train.model.base import rng_devices


@torch.no_grad()
def begin_anew(branch: Branch, seed: int) -> None:
    """Initialise all trainable weights of a branch as transformers initialises a new model of this layout.

    They are a pure function of the seed, and drawn module by module, so that memory never holds a second model. The base's own
    values are restored when the branch closes.

    Args:
        branch: Newly opened; no engine has taken its parameters.

    Raises:
        TrainingError: a parameter that a new model does not have or leaves without values, or of which this rank holds only
            a part (ZeRO-3).
    """
    model: Any = branch.model
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Without memory: each module gets its storage only while its values are drawn.
    with torch.device("meta"):
        fresh: Any = type(model)(config)
    learning = dict(branch.learning_parameters())
    # transformers draws from the global generator, whose state dropout continues from.
    with torch.random.fork_rng(rng_devices(branch.base.device)):
        torch.manual_seed(seed)
        for place, module in fresh.named_modules():
            own = {f"{place}.{name}" if place else name: name for name, _ in module.named_parameters(recurse=False)}
            if not own.keys() & learning.keys():
                continue
            module.to_empty(device="cpu", recurse=False)
            for parameter in module.parameters(recurse=False):
                # Shows which parameters transformers leaves uninitialised.
                parameter.fill_(torch.nan)
            fresh._init_weights(module)
            for whole_name in own.keys() & learning.keys():
                _copy(whole_name, learning.pop(whole_name), getattr(module, own[whole_name]))
            module.to_empty(device="meta", recurse=False)
    if learning:
        raise _cannot_begin_with(next(iter(learning)))


def _copy(name: str, parameter: torch.Tensor, drawn: torch.Tensor) -> None:
    if drawn.shape != parameter.shape or drawn.isnan().any():
        raise _cannot_begin_with(name)
    parameter.copy_(drawn)


def _cannot_begin_with(name: str) -> TrainingError:
    return TrainingError(f"the control `scratch` cannot reinitialise {name}", remedy="remove scratch from search.controls")
