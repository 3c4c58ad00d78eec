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
    """T branches, in the order of their rows. Each has its own parameters, and none affects the numbers of another."""

    def __init__(self, branches: Sequence[Branch], undo: ExitStack) -> None:
        self.branches = tuple(branches)
        self._undo = undo

    def __enter__(self) -> BranchGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove the adapters again: the base is bit for bit what it was.

        Raises:
            BaseLostError: the base could not be restored.
        """
        put_back(self._undo)


def open_group(base: LoadedBase, specs: Sequence[AdapterSpec]) -> BranchGroup:
    """Attach the adapters of every trial to the base; each trial computes the same as it would on its own.

    Args:
        base: The base model, not in use by another branch.
        specs: The adapters of LoRA trials that train nothing but adapters in blocks and have the same cut.

    Raises:
        SelectionError: a name does not exist in the model, or a trial cannot share a batch.
        TrainingError: the trainable parameters are not the planned ones (law 1), or the base has an open branch.
        BaseLostError: it failed to open, and the base could not be restored.
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
