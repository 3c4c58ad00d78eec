"""What is minimised: sums of token losses or of document losses, from a micro-batch.

Shapes: B rows, L tokens a row, H hidden size, V vocabulary, S supervised positions of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.memory.transient import LOGIT_CHUNK_BYTES
from orchestrator.spec.models import Task
from orchestrator.train import pulse
from orchestrator.train.model.attention import documents_apart
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.loss import is_plain, linear_cross_entropy, token_losses
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
    targets: torch.Tensor
    """int64[S]: the wanted one."""


class Objective(nn.Module):
    """The module that an engine trains: a branch's model, and from a micro-batch to its loss.

    Documents that share a row do not see each other: positions restart at each document, and the documents are computed
    apart (`train.model.attention`) or transformers turns restarting positions into a block-diagonal mask. What comes after the
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
        final_norm: nn.Module | None = None,
        blocks: nn.Module | None = None,
        cut: int = 0,
    ) -> None:
        """
        Args:
            backbone: Its forward returns `last_hidden_state` [B, L, H].
            head: From hidden states to logits.
            encoder: Whether the model is one, which classifies by itself.
            final_norm: What the backbone applies last (`final_norm_of`), by position; without it the backbone does so itself,
                at every position.
            blocks: The backbone's blocks, where `forward` may be given stored states for those below `cut`.
            cut: The first block that is computed then.
        """
        super().__init__()
        self.model: Any = model
        self._parts = (backbone, head)
        self._task: Task = task
        self._encoder = encoder
        self._blocks = (cast("nn.ModuleList", blocks),)
        self._cut = cut
        self._final_norm = (final_norm, *_place_in(backbone, final_norm)) if final_norm is not None else None

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
            num_trials: T. With several, the B rows are T equal copies, one under the other, and the sums are float32[T]: each
                made of its own copy alone, the same bits whatever the others come to.
        """
        pulse.beat()
        if self._task == "classify":
            logits = self._class_logits(self.run_blocks(input_ids, position_ids, lengths, hidden), lengths)
            wanted = class_labels >= 0
            logits, targets, owners = logits[wanted], class_labels[wanted], document_ids[:, 0][wanted]
            if not each:
                return _per_trial(_class_loss_sum, logits, targets, num_trials)
            losses = functional.cross_entropy(logits.float(), targets, reduction="none")
            return DocumentLosses(losses, owners, logits.argmax(-1), targets)
        wanted = labels != IGNORED
        states = self.run_blocks(input_ids, position_ids, lengths, hidden)[wanted]
        # By the module's own call, also where nothing is wanted: under ZeRO-3 that gathers its weight, on every rank.
        states = states if self._final_norm is None else self._final_norm[0](states)
        targets, owners = labels[wanted], document_ids[wanted]
        head = self._parts[1]
        if not each:
            return self._token_loss_sum(head, states, targets, num_trials)
        scored = [token_losses(head(part), part_targets) for part, part_targets in self._chunks(states, targets)]
        return DocumentLosses(torch.cat([s[0] for s in scored]), owners, torch.cat([s[1] for s in scored]), targets)

    def run_blocks(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, lengths: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, L, H] of a decoder, before its final norm; an encoder's own class logits [B, classes], from layers of its own.

        Args:
            input_ids: int64[B, L].
            position_ids: int64[B, L].
            lengths: int64[B].
            hidden: As in `forward`. The embeddings are not looked up then.
        """
        inputs = {"input_ids": input_ids} if hidden is None else {"inputs_embeds": hidden}
        with self._entering(hidden):
            if self._task != "classify":
                with self._norm_left_out(), documents_apart(self.model.config, position_ids):
                    return self._parts[0](**inputs, position_ids=position_ids, use_cache=False).last_hidden_state
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            mask = (positions < lengths.clamp(min=1)[:, None]).long()
            if self._encoder:
                return self.model(**inputs, attention_mask=mask).logits
            return self._parts[0](**inputs, attention_mask=mask, use_cache=False).last_hidden_state

    def _entering(self, hidden: torch.Tensor | None) -> AbstractContextManager[None]:
        return nullcontext() if hidden is None else entering(self._blocks[0], self._cut, hidden)

    @contextmanager
    def _norm_left_out(self) -> Iterator[None]:
        """The backbone ends with its last block's states: a stand-in returns what it is given."""
        if self._final_norm is None:
            yield
            return
        norm, parent, name = self._final_norm
        setattr(parent, name, nn.Identity())
        try:
            yield
        finally:
            setattr(parent, name, norm)

    def _token_loss_sum(self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, num_trials: int = 1) -> torch.Tensor:
        learns = any(parameter.requires_grad for parameter in head.parameters())
        if isinstance(head, nn.Linear) and is_plain(head) and not (learns and num_trials > 1):
            sums = linear_cross_entropy(head, hidden, targets, chunk_rows=self._chunk_rows(), num_groups=num_trials)
            return sums[0] if num_trials == 1 else sums

        def loss_sum(part: torch.Tensor, part_targets: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(head(part).float(), part_targets, reduction="sum")

        def trial_sum(part: torch.Tensor, part_targets: torch.Tensor) -> torch.Tensor:
            chunks = self._chunks(part, part_targets)
            if len(chunks) == 1:
                return loss_sum(*chunks[0])
            return torch.stack([checkpoint(loss_sum, *chunk, use_reentrant=False) for chunk in chunks]).sum()

        return _per_trial(trial_sum, hidden, targets, num_trials)

    def _chunks(self, hidden: torch.Tensor, targets: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pieces of hidden[S, H] and targets[S] whose float32 logits stay within LOGIT_CHUNK_BYTES; at least one, maybe empty.

        Under ZeRO-3 as many on every rank, since each use of the head gathers it.
        """
        rows = self._chunk_rows()
        chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True)) or [(hidden, targets)]
        partitioned = any(hasattr(parameter, "ds_tensor") for parameter in self._parts[1].parameters())
        if not (partitioned and dist.is_initialized()):
            return chunks
        most = torch.tensor(len(chunks), device=hidden.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return chunks + [(hidden[:0], targets[:0])] * (int(most) - len(chunks))

    def _chunk_rows(self) -> int:
        return max(1, LOGIT_CHUNK_BYTES // (4 * self.model.config.vocab_size))

    def _class_logits(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[B, classes]: an encoder's own, or a decoder's head on each row's last token."""
        if self._encoder:
            return states
        rows = torch.arange(states.shape[0], device=states.device)
        return self._parts[1](states[rows, (lengths - 1).clamp(min=0)])


def objective_of(base: LoadedBase, head: nn.Module, cut: int = 0) -> Objective:
    """What is minimised over the base as it is now, beginning from stored states at `cut` where it is given some."""
    model, anatomy = base.model, base.anatomy
    return Objective(
        model,
        model.get_submodule(anatomy.backbone),
        head,
        base.load.task,
        encoder=anatomy.kind == "encoder",
        final_norm=final_norm_of(model, anatomy),
        blocks=model.get_submodule(anatomy.blocks_module),
        cut=cut,
    )


def final_norm_of(model: nn.Module, anatomy: ModelAnatomy) -> nn.Module | None:
    """The norm after the last block; None where the base has none, or is an encoder."""
    if anatomy.kind == "encoder" or not anatomy.final_norm:
        return None
    return model.get_submodule(anatomy.final_norm[0].rpartition(".")[0])


def _place_in(backbone: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    """The parent of `module` within the backbone, and its name there."""
    for parent in backbone.modules():
        for name, child in parent.named_children():
            if child is module:
                return parent, name
    raise ValueError(f"the backbone {type(backbone).__name__} does not hold its final norm")


def _class_loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def _per_trial(
    loss_sum: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], values: torch.Tensor, targets: torch.Tensor, num_trials: int
) -> torch.Tensor:
    """The loss sum of all rows, or float32[num_trials] of as many equal parts of them."""
    if num_trials == 1:
        return loss_sum(values, targets)
    shape = (num_trials, values.shape[0] // num_trials)
    parts = zip(values.unflatten(0, shape).unbind(), targets.unflatten(0, shape).unbind(), strict=True)
    return torch.stack([loss_sum(part, part_targets) for part, part_targets in parts])
