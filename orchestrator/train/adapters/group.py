"""The branches of several LoRA trials on one base at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from orchestrator.errors import SelectionError, TrainingError
from orchestrator.train.adapters.branch import Branch, ModuleStates, check_learning, check_names, put_back
from orchestrator.train.adapters.layers import AdapterSpec, adapt, own_parameters
from orchestrator.train.model.base import LoadedBase


class BranchGroup:
    """T branches, in the order of their rows. Each has parameters of its own, and none sees another's numbers."""

    def __init__(self, branches: Sequence[Branch], undo: ExitStack) -> None:
        self.branches = tuple(branches)
        self._undo = undo

    def __enter__(self) -> BranchGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Take the adapters out again: the base is bit for bit what it was.

        Raises:
            BaseLostError: it could not be put back.
        """
        put_back(self._undo)


def open_group(base: LoadedBase, specs: Sequence[AdapterSpec]) -> BranchGroup:
    """Put the adapters of every trial beside the base's weights; a trial gets the same as if it were alone.

    Args:
        base: Not in use by another branch.
        specs: Of LoRA trials whose adapters in blocks are all that learns, with one cut.

    Raises:
        SelectionError: a name that the model does not have, or a trial that cannot share a batch.
        TrainingError: what learns is not what was planned (law 1), or the base has an open branch.
        BaseLostError: it failed to open, and the base could not be put back.
    """
    if any(parameter.requires_grad for parameter in base.model.parameters()):
        raise TrainingError("the base already has an open branch", remedy="close it before opening another")
    for spec in specs:
        check_names(base, spec.selection)
        beside = spec.selection.trainable or base.anatomy.head_weight in spec.selection.adapted
        if beside or spec.selection.adapter.dropout or spec.selection.cut != specs[0].selection.cut:
            raise SelectionError(
                f"{spec.selection.policy} cannot share a batch", expected="only LoRA in blocks, with the same cut"
            )
    undo = ExitStack()
    try:
        undo.callback(ModuleStates(base.model).restore)
        adapt(base, specs, undo)
        return BranchGroup([_branch(base, spec, trial) for trial, spec in enumerate(specs)], undo)
    except BaseException:
        put_back(undo)
        raise


def _branch(base: LoadedBase, spec: AdapterSpec, trial: int) -> Branch:
    learning = own_parameters(base.model, trial)
    check_learning(spec.selection, learning)
    return Branch(base, spec.selection, spec.lora_alpha, learning, ExitStack())
