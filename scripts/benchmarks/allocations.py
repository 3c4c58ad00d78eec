"""Every allocation of a training step, counted on tensors without memory.

`count_step` runs this project's own branch, objective and engine under torch's FakeTensorMode: shapes, lifetimes and kernels
are real, numbers are not, so that a step of a 70B model is counted on a laptop in seconds. Every document position is
supervised, which is the most that a step can need.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.anatomy import LayerSelection, ModelAnatomy
from orchestrator.train import LoadedBase, Objective, open_branch
from orchestrator.train.adapters.branch import Branch, PlainKeeper
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.model.objective import final_norm_of
from orchestrator.train.model.recompute import recomputed
from orchestrator.work.execution import BaseLoad

BY_MASK = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


@dataclass(frozen=True)
class Counted:
    """Peak allocations of a step."""

    peak_bytes: int
    peak_operator: str
    """The operator that reached it."""
    steady_bytes: int
    """Bytes that remain after a step: weights, fp32 master weights, sums, moments."""


class AllocationCounter(TorchDispatchMode):
    """Bytes of live storages, as the operators that run inside make them and let go of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_operator = ""
        self._known: set[int] = set()

    def add(self, tensor: torch.Tensor, operator: str) -> None:
        """Count a tensor's storage until it is gone."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, num_bytes)
        self.live_bytes += num_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_operator = self.live_bytes, operator

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # a fake tensor has no value to look at: the gradient norm
        if operator in BY_MASK:
            args = self._all_positions(args)
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor, str(operator))
        return result

    def _all_positions(self, args: Any) -> Any:
        """An index by a mask, whose result depends on values, as the one by all positions that it stands for."""
        tensor, indices, *rest = args
        if len(indices) != 1 or indices[0] is None or indices[0].dtype != torch.bool:
            return args
        mask = indices[0]
        positions = [mask.new_empty((mask.numel(),), dtype=torch.long) for _ in mask.shape]
        for position in positions:
            self.add(position, "aten.nonzero")
        return (tensor, positions, *rest)


def count_step(anatomy: ModelAnatomy, selection: LayerSelection, *, rows: int, row_tokens: int, checkpointing: bool) -> Counted:
    """Count the steps of one rank in bfloat16."""
    base = bare_base(anatomy, torch.device("meta"))
    lora_alpha = 2 * (selection.lora_rank or 0)
    with open_branch(base, selection, lora_alpha=lora_alpha, seed=0, keeper=Forgetful()) as branch, ExitStack() as stack:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake_parameters(base.model, mode)
        counter = AllocationCounter()
        for tensor in (*base.model.parameters(), *base.model.buffers()):
            counter.add(tensor, "the base")
        stack.enter_context(mode)
        inputs = batch(rows, row_tokens, torch.device("cpu"))
        stack.enter_context(counter)
        engine = train_and_score(branch, inputs, checkpointing=checkpointing)
        stack.callback(engine.close)
        return Counted(counter.peak_bytes, counter.peak_operator, counter.live_bytes)


def train_and_score(branch: Branch, inputs: dict[str, torch.Tensor], *, checkpointing: bool) -> TorchEngine:
    """Two optimizer steps, the first of which makes the moments, and an evaluation; the engine as it is then."""
    with ExitStack() as stack:
        if checkpointing:
            blocks = list(branch.model.get_submodule(branch.base.anatomy.blocks_module).children())
            stack.enter_context(recomputed(blocks[branch.selection.cut :]))
        norm = final_norm_of(branch.model, branch.base.anatomy)
        objective = Objective(branch.model, branch.backbone(), branch.head(), branch.base.load.task, final_norm=norm)
        # The branch's own list holds the parameters that there were before fake ones took their places.
        learning = [(name, parameter) for name, parameter in branch.model.named_parameters() if parameter.requires_grad]
        engine = TorchEngine(objective, learning, weight_decay=0.01, grad_clip=1.0)
        for _ in range(2):
            engine.backward(engine.loss(inputs), 1e-3)
            engine.step(1e-4)
        with torch.no_grad():
            objective.eval()(**inputs, each=True)
    return engine


class Forgetful(PlainKeeper):
    """A keeper that keeps nothing: there are no values to restore."""

    def save(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None: ...

    def restore(self) -> None: ...


def bare_base(anatomy: ModelAnatomy, device: torch.device) -> LoadedBase:
    """The base as `load_base` makes it, with whatever numbers its construction gives."""
    config = AutoConfig.from_pretrained(anatomy.folder, local_files_only=True)
    config._attn_implementation = "sdpa" if anatomy.attention == "fused" else "eager"
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.train()
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    load = BaseLoad(folder=anatomy.folder, model_type=anatomy.model_type, quantize="none", task="completion")
    return LoadedBase(model=model, anatomy=anatomy, load=load, dtype=torch.bfloat16, device=device)


def fake_parameters(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors in the place of a meta model's own."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(fake(parameter, mode), requires_grad=parameter.requires_grad)
                module._parameters[name] = known[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake(buffer, mode)


def fake(tensor: torch.Tensor, mode: FakeTensorMode) -> FakeTensor:
    return FakeTensor(mode, torch.empty_like(tensor, device="meta"), torch.device("cpu"))


def batch(rows: int, row_tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows of documents of one token each, every position supervised."""
    ids = torch.zeros(rows, row_tokens, dtype=torch.long, device=device)
    one = torch.zeros(rows, dtype=torch.long, device=device)
    return {
        "input_ids": ids,
        "position_ids": ids,
        "labels": ids,
        "document_ids": ids,
        "class_labels": one,
        "lengths": one,
    }
