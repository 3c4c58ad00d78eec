"""Every allocation of a training step, counted on tensors without memory.

`count_step` runs this project's own branch, objective and engine under torch's FakeTensorMode: shapes, lifetimes and kernels
are real, numbers are not, so that a step of a 70B model is counted on a laptop in seconds. Every document position is
supervised, which is the most that a step can need.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.anatomy import LayerSelection, ModelAnatomy
from orchestrator.plan.memory.activations import attention_of
from orchestrator.probe.allocations import AllocationCounter, fake_parameters
from orchestrator.train import LoadedBase, open_branch
from orchestrator.train.adapters.branch import Branch, PlainKeeper
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.model.experts import ADAPTED
from orchestrator.train.model.objective import objective_of
from orchestrator.train.model.recompute import recomputed
from orchestrator.work.execution import BaseLoad


@dataclass(frozen=True)
class Counted:
    """Peak allocations of a step."""

    peak_bytes: int
    peak_operator: str
    """The operator that reached it."""
    steady_bytes: int
    """Bytes that remain after a step: weights, fp32 master weights, sums, moments."""


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
        objective = objective_of(branch.base, branch.head())
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
    config._experts_implementation = ADAPTED if anatomy.experts is not None else None
    attention = attention_of(anatomy, "cuda", one_document_per_row=False)
    kind: Any = getattr(transformers, anatomy.architecture) if anatomy.architecture else AutoModelForCausalLM
    make = kind._from_config if anatomy.architecture else kind.from_config
    with device:
        model = make(config, dtype=torch.bfloat16, attn_implementation=attention)
    model.train()
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    load = BaseLoad(folder=anatomy.folder, model_type=anatomy.model_type, quantize="none", task="completion")
    return LoadedBase(model=model, anatomy=anatomy, load=load, dtype=torch.bfloat16, device=device)


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
