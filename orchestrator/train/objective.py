"""What is minimised: sums of token losses or of document losses, from a micro-batch.

Shapes: B rows, L tokens a row, H hidden size, V vocabulary, S supervised positions of the micro-batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from orchestrator.plan.memory.moving import LOGIT_CHUNK_BYTES
from orchestrator.spec.models import Task
from orchestrator.train.trunk.port import entering

IGNORED = -100
"""A label that stands for no label."""


class DocumentLosses(NamedTuple):
    """What evaluation wants to know of a micro-batch; one entry a supervised position (or, to classify, a row)."""

    losses: torch.Tensor
    """float32[S]: negative log-likelihoods, nats."""
    document_ids: torch.Tensor
    """int64[S]: the document of each."""
    predictions: torch.Tensor
    """int64[S]: the likeliest token or class."""


class Objective(nn.Module):
    """The module that an engine trains: a branch's model, and from a micro-batch to its loss.

    Documents that share a row do not see each other: positions restart at each document, and transformers turns
    restarting positions into a block-diagonal mask where no other mask is given. The output projection is computed
    at supervised positions only.

    Args:
        model: The whole model.
        backbone: Its part that returns hidden states.
        head: From hidden states to logits.
        task: What is learned.
        encoder: Whether tokens see those to come.
        blocks: The backbone's blocks, where `forward` may be given stored states for those below `cut`.
        cut: The first block that is computed then.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: nn.Module,
        head: nn.Module,
        task: Task,
        *,
        encoder: bool = False,
        blocks: nn.Module | None = None,
        cut: int = 0,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self._parts = (backbone, head)
        self._task: Task = task
        self._encoder = encoder
        self._blocks = (cast("nn.ModuleList", blocks),)
        self._cut = cut

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
    ) -> torch.Tensor | DocumentLosses:
        """The micro-batch's loss sum, or with `each` every loss by itself.

        Args:
            input_ids: int64[B, L].
            position_ids: int64[B, L], restarting at 0 with each document.
            labels: int64[B, L], already shifted: the token to be predicted at each position, or -100.
            document_ids: int64[B, L], -1 where a row is padded.
            class_labels: int64[B], the class of each row's one document, or -1 (an empty row).
            lengths: int64[B], tokens of each row.
            hidden: [B, L, H], what enters the block at the cut, instead of the blocks below it.
            each: Whether the losses are wanted one by one, with predictions.
        """
        if self._task == "classify":
            logits = self._class_logits(self.run_blocks(input_ids, position_ids, lengths, hidden), lengths)
            wanted = class_labels >= 0
            logits, targets, owners = logits[wanted], class_labels[wanted], document_ids[:, 0][wanted]
            if not each:
                return functional.cross_entropy(logits.float(), targets, reduction="sum")
            losses = functional.cross_entropy(logits.float(), targets, reduction="none")
            return DocumentLosses(losses, owners, logits.argmax(-1))
        head = self._parts[1]
        states = self.run_blocks(input_ids, position_ids, lengths, hidden)
        wanted = labels != IGNORED
        states, targets, owners = states[wanted], labels[wanted], document_ids[wanted]
        if not each:
            return self._token_loss_sum(head, states, targets)
        pieces = [
            (functional.cross_entropy(logits, part_targets, reduction="none"), logits.argmax(-1))
            for part, part_targets in self._pieces(states, targets)
            for logits in [head(part).float()]
        ]
        return DocumentLosses(torch.cat([p[0] for p in pieces]), owners, torch.cat([p[1] for p in pieces]))

    def _token_loss_sum(self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        def loss_sum(part: torch.Tensor, part_targets: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(head(part).float(), part_targets, reduction="sum")

        pieces = self._pieces(hidden, targets)
        if len(pieces) == 1:
            return loss_sum(*pieces[0])
        return torch.stack([checkpoint(loss_sum, *piece, use_reentrant=False) for piece in pieces]).sum()

    def _pieces(self, hidden: torch.Tensor, targets: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Chunks of the supervised positions; under ZeRO-3 as many on every rank, since each use of the head gathers it."""
        pieces = _chunks(hidden, targets, self._vocab_size())
        partitioned = any(hasattr(parameter, "ds_tensor") for parameter in self._parts[1].parameters())
        if not (partitioned and dist.is_initialized()):
            return pieces
        most = torch.tensor(len(pieces), device=hidden.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return pieces + [(hidden[:0], targets[:0])] * (int(most) - len(pieces))

    def run_blocks(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, lengths: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, L, H] of a decoder; an encoder's own class logits [B, classes], which end in layers of its own.

        Args:
            input_ids: int64[B, L].
            position_ids: int64[B, L].
            lengths: int64[B].
            hidden: As in `forward`. The embeddings are not looked up then.
        """
        inputs = {"input_ids": input_ids} if hidden is None else {"inputs_embeds": hidden}
        with self._entering(hidden):
            if self._task != "classify":
                return self._parts[0](**inputs, position_ids=position_ids, use_cache=False).last_hidden_state
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            mask = (positions < lengths.clamp(min=1)[:, None]).long()
            if self._encoder:
                return self.model(**inputs, attention_mask=mask).logits
            return self._parts[0](**inputs, attention_mask=mask, use_cache=False).last_hidden_state

    def _entering(self, hidden: torch.Tensor | None) -> AbstractContextManager[None]:
        return nullcontext() if hidden is None else entering(self._blocks[0], self._cut, hidden)

    def _class_logits(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[B, classes]: an encoder's own, or a decoder's head on each row's last token."""
        if self._encoder:
            return states
        rows = torch.arange(states.shape[0], device=states.device)
        return self._parts[1](states[rows, (lengths - 1).clamp(min=0)])

    def _vocab_size(self) -> int:
        return self.model.config.vocab_size


def _chunks(hidden: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces of hidden[S, H] and targets[S] whose float32 logits stay within LOGIT_CHUNK_BYTES; at least one, maybe empty."""
    rows = max(1, LOGIT_CHUNK_BYTES // (4 * vocab_size))
    return list(zip(hidden.split(rows), targets.split(rows), strict=True)) or [(hidden, targets)]
