"""One trial of the search, or a control."""

from __future__ import annotations

from typing import Literal

from orchestrator.spec.adapters import PLAIN_LORA, AdapterOptions
from orchestrator.spec.models import Tune
from orchestrator.values import Value
from orchestrator.work.remedies import NOTHING, Remedies, method_name


class TrialSpec(Value):
    """One point of the search, or a control. It does not depend on the cluster."""

    trial_id: str
    number: int
    control: Literal["none", "head", "shuffled", "scratch", "repeat", "curve"] | None = None
    share: float = 1.0
    """Share of the training documents that it is trained on; below 1 for points of the learning curve."""
    layers: str
    tune: Tune
    learning_rate: float
    lora_rank: int | None = None
    adapter: AdapterOptions = PLAIN_LORA
    total_steps: int
    """Steps of the full budget: the learning-rate schedule ends there."""
    total_tokens: int
    """Training tokens (with prompts and what is replayed, without padding) of the full budget."""
    seed: int
    remedies: Remedies = NOTHING

    @property
    def method(self) -> str:
        """Return how its layers are trained, `lora r16 · replay 0.1`."""
        return method_name(self.tune, self.lora_rank, self.adapter, self.remedies)

    @property
    def lora_alpha(self) -> int:
        """Return LoRA's alpha; its scale is alpha / rank, or alpha / sqrt(rank) for rslora."""
        return self.adapter.alpha_of(self.lora_rank)
