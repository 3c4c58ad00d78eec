"""The training objective: sums of token losses or of document losses over a micro-batch.

Shapes: B rows, L tokens a row, H hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, cast

import torch
from torch import nn

from orchestrator.anatomy.values import ModelAnatomy, Pooling, Ways
from orchestrator.spec.models import Task
from orchestrator.train import heartbeat
from orchestrator.train.model.balance import BalanceLoss, balance_of
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.encoder_decoder import LABELS, EncoderDecoderHead, head_for
from orchestrator.train.model.heads import DEFAULT_WAYS, DocumentLosses, FinalNorm, Head, Parts, Targets, head_of
from orchestrator.train.model.loss import AS_PROJECTED, LogitMap
from orchestrator.train.model.pooling import read_by_head
from orchestrator.train.trunk.port import entering

CLASS_POOLING = Pooling()


class Objective(nn.Module):
    """The module that an engine trains: a branch's model, which maps a micro-batch to its loss.

    Documents that share a row do not see each other: positions restart at each document, and the documents are computed
    singly (`train.model.attention`) or transformers turns restarting positions into a block-diagonal mask. What comes after the
    last block, the final norm and the output projection, is computed at supervised positions only.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: nn.Module,
        head: nn.Module,
        task: Task,
        *,
        encoder: bool = False,
        pooling: Pooling = CLASS_POOLING,
        final_norm: nn.Module | None = None,
        blocks: nn.Module | None = None,
        cut: int = 0,
        balance: BalanceLoss | None = None,
        ways: Ways = DEFAULT_WAYS,
        logit_map: LogitMap = AS_PROJECTED,
        computes: Head | None = None,
    ) -> None:
        """
        Args:
            backbone: A module whose forward returns `last_hidden_state` [B, L, H].
            head: The map from hidden states to logits.
            encoder: Whether the model is an encoder, which classifies by itself unless `pooling` says otherwise.
            pooling: What a classifier reads.
            final_norm: The backbone's last norm (`final_norm_of`), applied here to the positions that need it; if None, the
                backbone applies it itself at every position.
            blocks: The backbone's blocks, needed if `forward` is given stored states for those below `cut`.
            cut: The first block that is computed then.
            balance: The load-balancing loss that is added in training.
            ways: What the class allows.
            logit_map: What the class does with the head's result.
            computes: Computes logits and losses; by default the task's.
        """
        super().__init__()
        self.model: Any = model
        norm = FinalNorm(final_norm, *_place_in(backbone, final_norm)) if final_norm is not None else None
        # Inside values: as attributes, nn.Module would register these modules a second time, beside `model`.
        self._head = computes or head_of(task)
        self._parts = Parts(model, backbone, head, encoder, read_by_head(pooling, encoder=encoder), norm, ways, logit_map)
        self._blocks = (cast("nn.ModuleList | None", blocks),)
        self._cut = cut
        self._balance = balance

    @property
    def cut(self) -> int:
        """The first block that is computed where stored states are given."""
        return self._cut

    def forward(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        document_ids: torch.Tensor,
        class_labels: torch.Tensor,
        lengths: torch.Tensor,
        hidden: torch.Tensor | None = None,
        each: bool = False,
        num_trials: int = 1,
    ) -> torch.Tensor | DocumentLosses:
        """Return the micro-batch's loss sum, or with `each` every single loss.

        Args:
            input_ids: int64[B, L].
            position_ids: int64[B, L], restarting at 0 with each document.
            labels: int64[B, L], already shifted: the token to be predicted at each position, or -100.
            document_ids: int64[B, L], -1 where a row is padded.
            class_labels: int64[B], the class of each row's one document, or -1 (an empty row).
            lengths: int64[B], tokens of each row.
            hidden: [B, L, H], the input of the block at the cut; replaces the blocks below it.
            each: Whether to return single losses, with predictions.
            num_trials: T. With several, the B rows are T equal copies, one after the other, and the sums are float32[T], each
                of its own copy only: the same bits whatever the other trials compute.
        """
        heartbeat.beat()
        targets = Targets(labels, document_ids, class_labels, lengths)
        balance = None if each else self._balance
        with nullcontext([]) if balance is None else balance.recording() as router_logits:
            # The states of all positions lose their name: they are freed before the logits are made.
            states = self.run_blocks(input_ids, position_ids, lengths, hidden, labels=labels)
            supervised = self._head.select(self._parts, states, targets)
            del states
        if each:
            return self._head.losses(self._parts, supervised)
        loss_sum = self._head.loss_sum(self._parts, supervised, num_trials)
        if balance is not None:
            loss_sum = loss_sum + balance.sum_over(router_logits, document_ids >= 0, supervised.targets.numel())
        return loss_sum

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the model. In train mode everything below the cut stays in eval mode: nothing there is trained, and its
        states are features, the same at every step, whether they are stored or not. So there is no dropout below the cut."""
        super().train(mode)
        blocks = self._blocks[0]
        if mode and isinstance(self._head, EncoderDecoderHead):
            # Nothing of the encoder is trained: the decoder reads the same features at every step.
            self.model.get_encoder().eval()
        if mode and self._cut and blocks is not None:
            live = {module for block in list(blocks)[self._cut :] for module in block.modules()}
            for module in self._parts.backbone.modules():
                module.training = module in live
        return self

    def class_logits(self, input_ids: torch.Tensor, lengths: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Return a classifier's logits [B, classes], as training computes them, of one document a row.

        Args:
            input_ids: int64[B, L].
            lengths: int64[B], tokens of each row; at least 1.
            hidden: As in `forward`.
        """
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        states = self.run_blocks(input_ids, position_ids, lengths, hidden)
        every = torch.zeros_like(lengths)
        return self._head.select(self._parts, states, Targets(input_ids, torch.zeros_like(input_ids), every, lengths)).values

    def run_blocks(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: torch.Tensor,
        hidden: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [B, L, H] before the final norm (for a classifier after it), or an encoder's own class logits [B, classes].

        Args:
            input_ids: int64[B, L].
            position_ids: int64[B, L].
            lengths: int64[B].
            hidden: As in `forward`. The embeddings are not looked up then.
            labels: As in `forward`; an encoder-decoder needs them, to tell prompts from completions.
        """
        inputs = {"input_ids": input_ids} if hidden is None else {"inputs_embeds": hidden}
        if isinstance(self._head, EncoderDecoderHead):
            assert labels is not None
            inputs[LABELS] = labels
        with self._entering(hidden):
            return self._head.run_blocks(self._parts, inputs, position_ids, lengths)

    def _entering(self, hidden: torch.Tensor | None) -> AbstractContextManager[None]:
        if hidden is None:
            return nullcontext()
        assert self._blocks[0] is not None
        return entering(self._blocks[0], self._cut, hidden)


def objective_of(base: LoadedBase, head: nn.Module, cut: int = 0) -> Objective:
    """Return the objective over the base as it is now, starting from stored states at `cut` if it gets any."""
    balance = balance_of(base.model, base.model.get_submodule(base.anatomy.backbone), base.anatomy)
    return make_objective(base.model, base.anatomy, base.load.task, head, cut=cut, balance=balance)


def make_objective(
    model: nn.Module,
    anatomy: ModelAnatomy,
    task: Task,
    head: nn.Module | None = None,
    cut: int = 0,
    balance: BalanceLoss | None = None,
) -> Objective:
    """Return the objective over a model as its anatomy describes it.

    Args:
        head: The map from hidden states to logits; by default the module of the task's head.
        cut: See `Objective`.
        balance: See `Objective`.
    """
    computes = head_for(anatomy, task)
    weight = computes.weight_name(anatomy)
    return Objective(
        model,
        model.get_submodule(anatomy.backbone),
        head if head is not None else model.get_submodule(weight.rpartition(".")[0]),
        task,
        encoder=anatomy.kind == "encoder",
        pooling=anatomy.pooling,
        final_norm=final_norm_of(model, anatomy),
        blocks=model.get_submodule(anatomy.blocks_module),
        cut=cut,
        balance=balance,
        ways=anatomy.ways,
        logit_map=LogitMap(anatomy.logit_scale, anatomy.logit_cap),
        computes=computes,
    )


def final_norm_of(model: nn.Module, anatomy: ModelAnatomy) -> nn.Module | None:
    """Return the norm after the last block; None if the base has none, or if its class applies it in any case."""
    if anatomy.kind != "decoder" or not anatomy.final_norm:
        return None
    return model.get_submodule(anatomy.final_norm[0].rpartition(".")[0])


def _place_in(backbone: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    """Return the parent of `module` within the backbone, and its name there."""
    for parent in backbone.modules():
        for name, child in parent.named_children():
            if child is module:
                return parent, name
    raise ValueError(f"the backbone {type(backbone).__name__} does not hold its final norm")
