"""Random weights in the place of the base's: the control `scratch`."""

from __future__ import annotations

import copy
from typing import Any

import torch

from orchestrator.errors import TrainingError
from orchestrator.train.base import rng_devices
from orchestrator.train.branch import Branch


@torch.no_grad()
def begin_anew(branch: Branch, seed: int) -> None:
    """Give everything that learns in a branch the values that transformers gives a new model of this layout.

    They are a pure function of the seed. The base's own values come back when the branch closes.

    Args:
        branch: Freshly opened; no engine has taken its parameters.

    Raises:
        TrainingError: a parameter that a new model does not have, or of which this rank holds a part alone (ZeRO-3).
    """
    model: Any = branch.model
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(rng_devices(branch.base.device)):
        torch.manual_seed(seed)
        fresh = dict(type(model)(config).named_parameters())
    for name, parameter in branch.learning_parameters():
        if name not in fresh or fresh[name].shape != parameter.shape:
            raise TrainingError(
                f"the control `scratch` cannot begin anew with {name}", remedy="take scratch out of search.controls"
            )
        parameter.copy_(fresh[name])
