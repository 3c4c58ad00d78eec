"""The load-balancing loss of a mixture of experts, where the base's config turns it on (`output_router_logits`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from orchestrator.anatomy.values import Experts, ModelAnatomy

FUNCTION = "load_balancing_loss_func"
"""Name of the function in the modules of transformers' classes."""
ROUTER_LOGITS = "output_router_logits"
RouterLogits = list[tuple[torch.Tensor, ...]]


class BalanceLoss:
    """The class's own loss (Fedus et al. 2021, equations 4 to 6) times the config's factor.

    It is a mean over the tokens of a micro-batch and is added to the mean token loss. Objectives are sums over supervised
    positions, so it counts once for each of them: whatever the number of ranks and micro-batches, a step's loss is the mean
    token loss plus the mean of this one, weighted by supervised positions.
    """

    def __init__(self, experts: Experts, backbone: nn.Module, function: Callable[..., torch.Tensor]) -> None:
        self._experts = experts
        self._backbone = backbone
        self._function = function

    @contextmanager
    def recording(self) -> Iterator[RouterLogits]:
        """Collect the router logits [N, experts] of every block from the forward pass inside this context."""
        found: RouterLogits = []
        handle = self._backbone.register_forward_hook(lambda _module, _inputs, output: found.append(output.router_logits))
        try:
            yield found
        finally:
            handle.remove()

    def sum_over(self, router_logits: RouterLogits, is_token: torch.Tensor, num_supervised: int) -> torch.Tensor:
        """Return what is added to the loss sum of a micro-batch.

        Args:
            is_token: bool[B, L], False where a row is padded.
            num_supervised: Supervised positions of the micro-batch.
        """
        # A mean over no tokens would be NaN: the empty micro-batch of a rank counts its padding, no times.
        counted = (is_token | ~is_token.any()).long()
        loss = self._function(router_logits[-1], self._experts.num_experts, self._experts.experts_per_token, counted)
        return self._experts.balance * num_supervised * loss


@contextmanager
def without_router_logits(model: Any) -> Iterator[None]:
    """Keep the class from computing the loss inside this context.

    With padded rows it fails in cached decoding, where the attention mask is longer than the new tokens.
    """
    configs = [model.config, model.config.get_text_config()]
    asked = [config for config in configs if getattr(config, ROUTER_LOGITS, False)]
    for config in asked:
        setattr(config, ROUTER_LOGITS, False)
    try:
        yield
    finally:
        for config in asked:
            setattr(config, ROUTER_LOGITS, True)


def balance_of(model: nn.Module, backbone: nn.Module, anatomy: ModelAnatomy) -> BalanceLoss | None:
    """Return the loss of this base, or None if its config does not turn it on."""
    experts, module = anatomy.experts, cast("Any", sys.modules[type(model).__module__])
    if experts is None or not experts.balance or not hasattr(module, FUNCTION):
        return None
    return BalanceLoss(experts, backbone, getattr(module, FUNCTION))
