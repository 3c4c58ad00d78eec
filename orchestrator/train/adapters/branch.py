"""The part of the base that one trial owns, put in and removed without a trace; and the branches of several trials at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from orchestrator.anatomy.selection import NEW_ROWS
from orchestrator.anatomy.values import LayerSelection
from orchestrator.errors import BaseLostError, SelectionError, TrainingError
from orchestrator.train.adapters.layers import ADAPTED_MODULES, adapt
from orchestrator.train.adapters.naming import AdapterSpec, adapted_name, own_parameters, stable_name
from orchestrator.train.adapters.new_rows import install_new_rows
from orchestrator.train.model.base import LoadedBase, initial_value, new_parameter_names
from orchestrator.train.model.heads import head_of


class WeightKeeper(Protocol):
    """Keeps the original values of the base's unfrozen tensors while a branch trains them.

    Where an engine partitions parameters (ZeRO-3), its keeper saves and restores the local part.
    """

    def save(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Save the base's own parameters that will be trained. Called once, before training."""
        ...

    def restore(self) -> None:
        """Restore every saved parameter, bit for bit. Called when the branch closes."""
        ...

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Return a context in which these parameters of the base are unpartitioned."""
        ...


class PlainKeeper:
    """Keeps copies of complete tensors in host memory; correct for everything except ZeRO-3."""

    def __init__(self) -> None:
        self._saved: list[tuple[nn.Parameter, torch.Tensor, dict[str, Any]]] = []

    def save(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._saved = [(parameter, parameter.data.to("cpu", copy=True), dict(vars(parameter))) for _, parameter in parameters]

    def restore(self) -> None:
        for parameter, data, attributes in self._saved:
            if _owns_its_storage(parameter, data):
                parameter.data.copy_(data)  # allocate nothing here: memory may just have run out
            else:
                parameter.data = data.to(parameter.device)
            vars(parameter).clear()
            vars(parameter).update(attributes)
        self._saved = []

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()


def _owns_its_storage(parameter: nn.Parameter, like: torch.Tensor) -> bool:
    """Return whether a parameter still has its own storage, instead of being a view of an engine's flat buffer."""
    own = parameter.data
    same = (own.shape, own.dtype, own.stride()) == (like.shape, like.dtype, like.stride())
    return same and own.untyped_storage().nbytes() == own.nbytes


class Branch:
    """The base with exactly the planned parameters trainable. Open it with `open_branch`; it is a context manager."""

    def __init__(
        self,
        base: LoadedBase,
        selection: LayerSelection,
        lora_alpha: int,
        learning: list[tuple[str, nn.Parameter]],
        undo: ExitStack,
    ) -> None:
        self.base = base
        self.selection = selection
        self.lora_alpha = lora_alpha
        self._learning = learning
        self._undo = undo

    @property
    def model(self) -> nn.Module:
        """The base's own model object, changed in place."""
        return self.base.model

    def backbone(self) -> nn.Module:
        """The module whose forward returns `last_hidden_state` [B, L, hidden_size]."""
        return self.model.get_submodule(self.base.anatomy.backbone)

    def head(self) -> nn.Module:
        """The module from hidden states to logits: the output projection, or the classifier."""
        return self.model.get_submodule(_module_of(head_name(self.base)))

    def learning_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters by checkpoint name, in the model's order; LoRA's are `<module>.lora_A.weight` and so on."""
        return list(self._learning)

    def close(self) -> None:
        """Remove everything that was added: the base is bit for bit what it was. A second call does nothing.

        Raises:
            BaseLostError: the base could not be restored.
        """
        put_back(self._undo)
        self._learning = []

    def __enter__(self) -> Branch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_branch(
    base: LoadedBase, selection: LayerSelection, *, lora_alpha: int, seed: int, keeper: WeightKeeper | None = None
) -> Branch:
    """Make exactly the planned parameters of the base trainable.

    The same (selection, seed) gives the same values of every new parameter, whatever ran before.
    New parameters have the base's dtype; engines keep their own float32 master weights.

    Args:
        base: The base model, not in use by another branch.
        selection: Its names must exist in the model.
        lora_alpha: LoRA's product is scaled by `lora_alpha / lora_rank`.
        seed: Seed of the first values of LoRA's A and of a new classifier.
        keeper: Keeps the unfrozen tensors of the base; `PlainKeeper` unless given.

    Raises:
        SelectionError: A planned name does not exist in the model, or cannot be trained as planned.
        TrainingError: The trainable parameters are not the planned ones (law 1), or the base has an open branch.
        BaseLostError: It failed to open, and the base could not be restored.
    """
    if any(parameter.requires_grad for parameter in base.model.parameters()):
        raise TrainingError("the base already has an open branch", remedy="close it before opening another")
    undo = ExitStack()
    try:
        check_names(base, selection)
        undo.callback(ModuleStates(base.model).restore)
        rows = install_new_rows(base, selection, undo)
        new = _new_parameters(base, selection, seed, undo)
        keeper = keeper or PlainKeeper()
        _unfreeze(base, [name for name in selection.trainable if name not in new | rows], keeper, undo)
        if selection.adapted:
            adapt(base, [AdapterSpec(selection, lora_alpha, seed)], undo, keeper.whole)
        for name in selection.trainable:
            parameter_named(base.model, name).requires_grad_(True)
        learning = learning_parameters(base.model)
        check_learning(selection, learning)
        return Branch(base, selection, lora_alpha, learning, undo)
    except BaseException:
        put_back(undo)
        raise


def put_back(undo: ExitStack) -> None:
    """Undo everything. An error here fails the gang, not the trial: a smaller micro-batch could not fix it."""
    try:
        undo.close()
    except Exception as error:
        raise BaseLostError(f"the base could not be restored after a trial: {type(error).__name__}: {error}") from error


def learning_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return every parameter with a gradient by its stable name."""
    return [(stable_name(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def head_name(base: LoadedBase) -> str:
    """Return the name of the weight of the head that the base's task trains with."""
    return head_of(base.load.task).weight_name(base.anatomy)


def parameter_named(model: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter with this checkpoint name, also inside a LoRA layer."""
    module = model.get_submodule(_module_of(name))
    if isinstance(module, ADAPTED_MODULES):
        module = module.base_layer
    return module.get_parameter(name.rpartition(".")[2])


def _module_of(parameter_name: str) -> str:
    return parameter_name.rpartition(".")[0]


def check_names(base: LoadedBase, selection: LayerSelection) -> None:
    """Raise SelectionError if a name does not exist in the model, or the selection omits one."""
    known = {name for name, _ in base.model.named_parameters(remove_duplicate=False)}
    known |= {name for name in selection.trainable if name.endswith(f".{NEW_ROWS}")}
    for name in (*selection.trainable, *selection.adapted):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise SelectionError(
                f"the base has no parameter {name}", where=base.load.folder, expected=f"for example {', '.join(near)}"
            )
    for name in selection.adapted:
        if name not in base.anatomy.routed and not isinstance(base.model.get_submodule(_module_of(name)), nn.Linear | Conv1D):
            raise SelectionError(f"{name} is not a matrix product: LoRA cannot adapt it", where=base.load.folder)
    planned = {*selection.trainable, *selection.adapted, *selection.frozen}
    forgotten = {name for name, _ in base.model.named_parameters() if name in base.anatomy.tensors} - planned
    if forgotten:
        raise SelectionError(
            f"the selection does not cover {sorted(forgotten)[0]}",
            where=base.load.folder,
            remedy="recompute the selection from this base's files",
        )
    if selection.adapted and not selection.lora_rank:
        raise SelectionError("LoRA needs a lora_rank")


def _new_parameters(base: LoadedBase, selection: LayerSelection, seed: int, undo: ExitStack) -> set[str]:
    """Install parameters that replace the base's own until the branch closes; return their names."""
    model, names = base.model, set()
    learning = set(selection.trainable)
    if base.load.traits.head.is_new:
        std = getattr(model.config, "initializer_range", 0.02)
        for name in new_parameter_names(model, base.anatomy):
            if name in learning:
                shape = full_shape(model.get_parameter(name))
                _stand_in(base, name, initial_value(name, shape, seed, std), undo)
                names.add(name)
    if selection.unties_head and base.anatomy.head_weight in learning:
        tied_to = base.anatomy.embeddings[0]
        _stand_in(base, base.anatomy.head_weight, base.read_original([tied_to])[tied_to], undo)
        undo.callback(setattr, model.config, "tie_word_embeddings", model.config.tie_word_embeddings)
        model.config.tie_word_embeddings = False
        names.add(base.anatomy.head_weight)
    quantized = [name for name in selection.trainable if hasattr(model.get_parameter(name), "quant_state")]
    for name, weight in base.read_original(quantized).items():
        _stand_in_linear(model, _module_of(name), weight, undo)
        names.add(name)
    return names


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the complete shape of a parameter, also if an engine has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _stand_in(base: LoadedBase, name: str, value: torch.Tensor, undo: ExitStack) -> None:
    module, attribute = base.model.get_submodule(_module_of(name)), name.rpartition(".")[2]
    undo.callback(setattr, module, attribute, getattr(module, attribute))
    setattr(module, attribute, nn.Parameter(value.to(device=base.device, dtype=base.dtype), requires_grad=False))


def _stand_in_linear(model: nn.Module, name: str, weight: torch.Tensor, undo: ExitStack) -> None:
    """Replace a quantized linear layer by a plain one with this weight [out, in], or [in, out] where the class multiplies from
    the right; the bias is shared."""
    parent, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    quantized = getattr(parent, attribute)
    plain: Any
    if issubclass(getattr(quantized, "source_cls", nn.Linear), Conv1D):
        with torch.device("meta"):
            plain = Conv1D(weight.shape[1], weight.shape[0])
    else:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = quantized.bias
    plain.train(quantized.training)
    undo.callback(setattr, parent, attribute, quantized)
    setattr(parent, attribute, plain)


def _unfreeze(base: LoadedBase, names: Iterable[str], keeper: WeightKeeper, undo: ExitStack) -> None:
    named = [(name, base.model.get_parameter(name)) for name in names]

    def freeze() -> None:
        for _, parameter in named:
            parameter.requires_grad_(False)
            parameter.grad = None
        keeper.restore()

    keeper.save(named)
    undo.callback(freeze)


def check_learning(selection: LayerSelection, learning: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Check law 1 in both directions: every planned parameter is trainable, and no other one is."""
    planned = set(selection.trainable)
    for name in selection.adapted:
        planned |= {adapted_name(name) + suffix for suffix in selection.adapter_kind.suffixes}
    actual = {name for name, _ in learning}
    if planned != actual:
        name = sorted(planned ^ actual)[0]
        state = "is trainable but was not planned" if name in actual else "was planned but is not trainable"
        raise TrainingError(f"{name} {state}", expected=f"{len(planned)} trainable parameters, found {len(actual)}")
    count = sum(full_shape(parameter).numel() for _, parameter in learning)
    if count != selection.num_trainable_parameters:
        raise TrainingError(f"{count} elements are trainable; the plan says {selection.num_trainable_parameters}")


class ModuleStates:
    """A snapshot of the hooks, attributes and train mode of every module."""

    def __init__(self, model: nn.Module) -> None:
        self._states = [(module, set(vars(module)), module.training, _hooks(module)) for module in model.modules()]

    def restore(self) -> None:
        """Remove hooks and attributes that were added since: they would keep an old engine's tensors in memory."""
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
        beside = spec.selection.trainable or not {base.anatomy.head_weight, *base.anatomy.routed}.isdisjoint(
            spec.selection.adapted
        )
        if beside or spec.selection.adapter.dropout or spec.selection.cut != specs[0].selection.cut:
            raise SelectionError(
                f"{spec.selection.policy} cannot share a batch",
                expected="only LoRA on linear layers in blocks, with the same cut",
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
