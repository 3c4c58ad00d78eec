"""The kinds of adapters: tensors, sizes and operations that each adds to a frozen weight. `train.adapters.kinds` computes them.

To add a kind, add its name to `AdapterName`, a class and a row of `ADAPTER_KINDS` here, and its computation there.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod, sqrt
from typing import Annotated, ClassVar, Literal

from annotated_types import MinLen

from orchestrator.values import Value

AdapterName = Literal["lora", "rslora", "dora"]
ModuleGroup = Literal["all", "attention", "mlp", "experts"]
Modules = ModuleGroup | Annotated[tuple[str, ...], MinLen(1)]
"""Modules of a block: all its linear layers, those of its attention or of its MLP, its routed experts; or several of these
groups and of names."""
Shape = tuple[int, ...]
LORA_A, LORA_B, LORA_MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


class AdapterKind:
    """LoRA, W + scale * B @ A (Hu et al. 2021), and the base class of the other kinds. W is [out, in], r the rank.

    The matrices of E routed experts are one weight, [E, out, in]. Each expert has its own A and B, in two matrices as PEFT lays
    them out: A is [E r, in], expert by expert, and B [out, r E], whose columns begin with the first one of every expert.

    Tensors are named by what PEFT appends to the adapted module's name when it saves them.
    """

    name: ClassVar[AdapterName] = "lora"
    title: ClassVar[str] = "LoRA"
    peft_options: ClassVar[Mapping[str, bool]] = {}
    """The options of PEFT's `LoraConfig` that make an adapter one of this kind."""
    runs_layer_on_its_input: ClassVar[bool] = False
    """True if the frozen layer must run a second time, on the adapter's input, when dropout makes it differ from the layer's."""
    adds_product: ClassVar[bool] = True
    """True if scale * B @ A is the entire change of the weight, which the anchor `product` assumes."""
    adapts_experts: ClassVar[bool] = True
    """True if PEFT has the kind for stacked weights of routed experts."""

    def scale(self, alpha: float, lora_rank: int) -> float:
        return alpha / lora_rank

    def shapes(self, weight: Shape, lora_rank: int) -> dict[str, Shape]:
        """Return the shapes of the trainable tensors by suffix, in the order in which the model lists them."""
        columns = prod(weight[:-2]) * lora_rank
        return {LORA_A: (columns, weight[-1]), LORA_B: (weight[-2], columns)}

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(self.shapes((0, 0), 0))

    def num_elements(self, weight: Shape, lora_rank: int) -> int:
        return sum(prod(shape) for shape in self.shapes(weight, lora_rank).values())

    def multiplied_elements(self, weight: Shape, lora_rank: int) -> int:
        """Return how many of the adapter's elements each token is multiplied with; of routed experts, those of one expert."""
        return lora_rank * (weight[-2] + weight[-1])

    def kept_elements(self, weight: Shape, lora_rank: int) -> int:
        """Return how many numbers per token are kept for the backward pass, not counting the input of the layer."""
        return lora_rank

    def elements_per_pass(self, weight: Shape, lora_rank: int) -> int:
        """Return the multiply-adds of a forward pass that do not depend on the number of tokens."""
        return 0


class RankStabilizedLora(AdapterKind):
    """LoRA whose product is divided by the root of its rank (Kalajdzievski 2023)."""

    name = "rslora"
    title = "rank-stabilised LoRA"
    peft_options: ClassVar[Mapping[str, bool]] = {"use_rslora": True}

    def scale(self, alpha: float, lora_rank: int) -> float:
        return alpha / sqrt(lora_rank)


class Dora(AdapterKind):
    """LoRA on a weight that is split into the direction and the magnitude m [out] of each row (Liu et al. 2024)."""

    name = "dora"
    title = "DoRA"
    peft_options: ClassVar[Mapping[str, bool]] = {"use_dora": True}
    adds_product = False
    adapts_experts = False
    runs_layer_on_its_input = True

    def shapes(self, weight: Shape, lora_rank: int) -> dict[str, Shape]:
        return {**super().shapes(weight, lora_rank), LORA_MAGNITUDE: (weight[0],)}

    def kept_elements(self, weight: Shape, lora_rank: int) -> int:
        """Include the output that the magnitudes are multiplied with, which their gradient needs."""
        return lora_rank + weight[0]

    def elements_per_pass(self, weight: Shape, lora_rank: int) -> int:
        """Return the multiply-adds of B @ A, which the norms of the rows need."""
        return lora_rank * weight[0] * weight[1]


ADAPTER_KINDS: dict[AdapterName, AdapterKind] = {kind.name: kind for kind in (AdapterKind(), RankStabilizedLora(), Dora())}


class AdapterOptions(Value):
    """The options of a trial's adapters, except their rank; the defaults are plain LoRA."""

    kind: AdapterName = "lora"
    alpha: int | None = None
    """The key lora_alpha; None is twice the rank, the field's usual choice (Hu et al. 2021 keep it fixed)."""
    dropout: float = 0.0
    """Share of an adapter's input that is dropped out in training."""
    modules: Modules = "all"
    """The modules of the blocks that are adapted."""

    def method(self, lora_rank: int | None) -> str:
        """Return `lora r16 · alpha 8`: the kind, the rank, and every option that is not the default."""
        parts = [f"{self.kind} r{lora_rank}"]
        parts += [f"alpha {self.alpha}"] if self.alpha is not None else []
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        parts += [] if self.modules == "all" else [self._modules()]
        return " · ".join(parts)

    def sentence(self, lora_rank: int | None) -> str:
        """Return `LoRA, rank 16, alpha 32`, for readers who do not know the keys of the spec."""
        parts = [ADAPTER_KINDS[self.kind].title, f"rank {lora_rank}", f"alpha {self.alpha_of(lora_rank)}"]
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        parts += [] if self.modules == "all" else [f"on {self._modules()}"]
        return ", ".join(parts)

    def _modules(self) -> str:
        return self.modules if isinstance(self.modules, str) else "+".join(self.modules)

    def alpha_of(self, lora_rank: int | None) -> int:
        return 2 * (lora_rank or 0) if self.alpha is None else self.alpha


PLAIN_LORA = AdapterOptions()
