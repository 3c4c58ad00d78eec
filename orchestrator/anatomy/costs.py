"""What a kind of block costs, counted once on its class (`probe/costs.py`): memory and operations, for any selection and shape.

Everything that a block allocates or computes is a part per row of a micro-batch (states), a part per token, and a part per pair:
token and position of its row. It is counted on rows of three lengths, from which the three coefficients follow.
"""

from __future__ import annotations

from collections.abc import Collection

from orchestrator.values import Value


class Size(Value):
    """Memory of a block: bytes of dtypes of their own, and elements of the compute dtype."""

    row_bytes: int = 0
    token_bytes: int = 0
    pair_bytes: int = 0
    row_elements: int = 0
    token_elements: int = 0
    pair_elements: int = 0

    def per_row(self, element_bytes: int) -> int:
        return self.row_bytes + element_bytes * self.row_elements

    def per_token(self, element_bytes: int) -> int:
        return self.token_bytes + element_bytes * self.token_elements

    def per_pair(self, element_bytes: int) -> int:
        return self.pair_bytes + element_bytes * self.pair_elements


class Kept(Value):
    """Memory that a block keeps from its forward to its backward pass for the same reasons, of which one is enough.

    Autograd saves a tensor for each input of an operator that has a gradient, so that a selection keeps the union of what each of
    its parts keeps.
    """

    size: Size
    passing: bool = False
    """Kept if the input of the block has a gradient."""
    adapted: bool = False
    """Kept if the results of its linear layers have gradients of their own, since the layers are trained or adapted."""
    others: bool = False
    """Kept if its other parameters are trained: norms, stacked experts."""
    inputs: tuple[str, ...] = ()
    """Linear layers within the block: kept as the input of one that is trained or adapted."""


class Flops(Value):
    """Operations per token, and per token and attended position."""

    token: float = 0.0
    pair: float = 0.0

    def at(self, attended_tokens: float) -> float:
        return self.token + self.pair * attended_tokens


class PassFlops(Value):
    """Operations that the gradients of activations take."""

    backward: Flops
    again: Flops
    """The forward pass as far as a checkpointed block is computed again."""


class BlockCosts(Value):
    """Costs of a kind of block."""

    kept: tuple[Kept, ...]
    kept_by_document: tuple[Kept, ...] = ()
    """The same if documents are computed one by one (`train.model.attention`); empty if the class does not allow that."""
    adapted_peaks: tuple[Size, ...]
    """Peaks of the backward pass if every linear layer is adapted: what is kept, gradients of activations, the output's among
    them, and temporary tensors; not gradients of parameters. Which peak is the highest depends on the shape."""
    trained_peaks: tuple[Size, ...]
    """The same if every parameter is trained."""
    at_weight_peaks: tuple[Size, ...]
    """Those of them while the gradient of the largest parameter exists."""
    forward_peaks: tuple[Size, ...]
    """Peaks of the forward pass if nothing is kept, with the block's input."""
    forward: Flops
    passing: PassFlops
    """If the input of the block has a gradient, and nothing in the block is trained."""
    adapted: PassFlops
    """If every linear layer is adapted, and nothing before the block is."""
    trained: PassFlops
    """If every parameter is trained, and nothing before the block is."""

    def keeps(self, kept: Collection[Kept], *, passing: bool, adapted: bool, others: bool, inputs: Collection[str]) -> list[Size]:
        """Return what of `kept` or `kept_by_document` is kept for these reasons."""
        needed = set(inputs)
        return [
            each.size
            for each in kept
            if (passing and each.passing)
            or (adapted and each.adapted)
            or (others and each.others)
            or not needed.isdisjoint(each.inputs)
        ]
