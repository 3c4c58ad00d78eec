"""The heads on top of the blocks, one class each: how the model is loaded, what its forward pass is given, and its losses.

To add a kind of head, add a row of `HeadTraits` (`spec.tasks`) and a class here.

Shapes: B rows, L tokens a row, H hidden size, V vocabulary, S supervised positions of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from orchestrator.anatomy.values import ModelAnatomy, Ways
from orchestrator.bases.own_code import class_named
from orchestrator.plan.memory.transient import LOGIT_CHUNK_BYTES
from orchestrator.spec.tasks import TASKS, HeadKind, Task
from orchestrator.train.model.attention import documents_apart
from orchestrator.train.model.loss import AS_PROJECTED, LogitMap, is_plain, linear_cross_entropy, token_losses
from orchestrator.train.model.pooling import Read, classify_config, pooled
from orchestrator.work.execution import BaseLoad

IGNORED = -100
"""The label of a position without a label."""


DEFAULT_WAYS = Ways()


class DocumentLosses(NamedTuple):
    """The figures of a micro-batch for evaluation, one entry per supervised position or, for a classifier, per row."""

    losses: torch.Tensor
    """float32[S]: negative log-likelihoods, nats."""
    document_ids: torch.Tensor
    """int64[S]: the document of each."""
    predictions: torch.Tensor
    """int64[S]: the likeliest token or class."""
    targets: torch.Tensor
    """int64[S]: the expected one."""


class FinalNorm(NamedTuple):
    """The norm that the backbone applies last, and its place in the backbone."""

    module: nn.Module
    parent: nn.Module
    name: str


@dataclass(frozen=True, eq=False)
class Parts:
    """A model in the parts that its loss is computed from."""

    model: Any
    backbone: nn.Module
    """Its forward returns `last_hidden_state` [B, L, H]."""
    head: nn.Module
    """The map from hidden states to logits."""
    encoder: bool
    read: Read
    """What a classifier reads of a row; `class`: the model computes the logits with its own layers."""
    final_norm: FinalNorm | None
    ways: Ways = DEFAULT_WAYS
    logit_map: LogitMap = AS_PROJECTED
    """What the class does with the head's result."""


class Targets(NamedTuple):
    """The prediction targets of a micro-batch, and their documents."""

    labels: torch.Tensor
    """int64[B, L], already shifted: the token to be predicted at each position, or -100."""
    document_ids: torch.Tensor
    """int64[B, L], -1 where a row is padded."""
    class_labels: torch.Tensor
    """int64[B], the class of each row's one document, or -1 (an empty row)."""
    lengths: torch.Tensor
    """int64[B], tokens of each row."""


class Supervised(NamedTuple):
    """The supervised positions of a micro-batch, or, of a classifier, its documents."""

    values: torch.Tensor
    """[S, H] after the final norm, which the head takes; logits [S, classes] of a classifier, and [S, V] of a class that
    computes its own (`Ways.projects`)."""
    targets: torch.Tensor
    """int64[S]: the token or class to be predicted."""
    document_ids: torch.Tensor
    """int64[S]: the document of each."""


class Head(Protocol):
    """The interface in which the kinds of heads differ."""

    def load_model(self, load: BaseLoad, options: Mapping[str, Any], architecture: str = "") -> PreTrainedModel:
        """Load the base's model for this head, with these options of `from_pretrained`.

        Args:
            architecture: The transformers class that does so (`ModelAnatomy.architecture`); empty for the auto class.
        """
        ...

    def weight_name(self, anatomy: ModelAnatomy) -> str:
        """Return the name of the head's weight."""
        ...

    def run_blocks(
        self, parts: Parts, inputs: Mapping[str, torch.Tensor], position_ids: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return what `select` takes, from `input_ids` or `inputs_embeds`.

        Args:
            position_ids: int64[B, L], restarting at 0 with each document.
            lengths: int64[B].
        """
        ...

    def select(self, parts: Parts, states: torch.Tensor, targets: Targets) -> Supervised:
        """Return what is supervised of the states that `run_blocks` gave."""
        ...

    def loss_sum(self, parts: Parts, supervised: Supervised, num_trials: int) -> torch.Tensor:
        """Return the loss sum of the micro-batch, or float32[num_trials] of as many equal parts of its rows."""
        ...

    def losses(self, parts: Parts, supervised: Supervised) -> DocumentLosses:
        """Return every single loss."""
        ...


class LanguageModelHead:
    """The base's own output projection: the loss of each supervised token.

    The final norm and the output projection are computed at supervised positions only, unless the logits are more than
    that projection: then the class computes them, at every position.
    """

    def load_model(self, load: BaseLoad, options: Mapping[str, Any], architecture: str = "") -> PreTrainedModel:
        kind: Any = class_named(architecture) if architecture else AutoModelForCausalLM
        return kind.from_pretrained(load.folder, **options)

    def weight_name(self, anatomy: ModelAnatomy) -> str:
        return anatomy.head_weight

    def run_blocks(
        self, parts: Parts, inputs: Mapping[str, torch.Tensor], position_ids: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Run the blocks and return [B, L, H] before the final norm, or the class's own logits [B, L, V]."""
        places = document_places(parts.ways, position_ids, lengths)
        with documents_apart(parts.model.config, position_ids):
            if not parts.ways.projects:
                return parts.model(**inputs, **places, use_cache=False).logits
            with _norm_left_out(parts.final_norm):
                return parts.backbone(**inputs, **places, use_cache=False).last_hidden_state

    def select(self, parts: Parts, states: torch.Tensor, targets: Targets) -> Supervised:
        chosen = targets.labels != IGNORED
        states = states[chosen]
        if not parts.ways.projects:
            return Supervised(states, targets.labels[chosen], targets.document_ids[chosen])
        # By the module's own call, also where nothing is supervised: under ZeRO-3 that gathers its weight, on every rank.
        states = states if parts.final_norm is None else parts.final_norm.module(states)
        return Supervised(states, targets.labels[chosen], targets.document_ids[chosen])

    def loss_sum(self, parts: Parts, supervised: Supervised, num_trials: int) -> torch.Tensor:
        if not parts.ways.projects:
            return _per_trial(_cross_entropy_sum, supervised.values, supervised.targets, num_trials)
        return self.token_loss_sum(parts, supervised.values, supervised.targets, num_trials)

    def losses(self, parts: Parts, supervised: Supervised) -> DocumentLosses:
        states, tokens, owners = supervised
        if not parts.ways.projects:
            losses, predictions = token_losses(states, tokens)
            return DocumentLosses(losses, owners, predictions, tokens)
        scored = [
            token_losses(parts.head(part), part_tokens, parts.logit_map) for part, part_tokens in _chunks(parts, states, tokens)
        ]
        return DocumentLosses(torch.cat([s[0] for s in scored]), owners, torch.cat([s[1] for s in scored]), tokens)

    def token_loss_sum(self, parts: Parts, hidden: torch.Tensor, tokens: torch.Tensor, num_trials: int = 1) -> torch.Tensor:
        """Return the loss sum of tokens[S] from hidden[S, H] after the final norm, a chunk of logits at a time."""
        head = parts.head
        learns = any(parameter.requires_grad for parameter in head.parameters())
        # Adapted, quantized and partitioned heads need their own forward pass, and so autograd's backward pass.
        if isinstance(head, nn.Linear) and is_plain(head) and not (learns and num_trials > 1):
            sums = linear_cross_entropy(
                head, hidden, tokens, chunk_rows=_chunk_rows(parts), num_groups=num_trials, logit_map=parts.logit_map
            )
            return sums[0] if num_trials == 1 else sums

        def loss_sum(part: torch.Tensor, part_tokens: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(parts.logit_map(head(part).float()), part_tokens, reduction="sum")

        def trial_sum(part: torch.Tensor, part_tokens: torch.Tensor) -> torch.Tensor:
            chunks = _chunks(parts, part, part_tokens)
            if len(chunks) == 1:
                return loss_sum(*chunks[0])
            return torch.stack([checkpoint(loss_sum, *chunk, use_reentrant=False) for chunk in chunks]).sum()

        return _per_trial(trial_sum, hidden, tokens, num_trials)


class ClassificationHead:
    """A new head over the classes: the loss of each document, off the pooled states of its row."""

    def load_model(self, load: BaseLoad, options: Mapping[str, Any], architecture: str = "") -> PreTrainedModel:
        kind: Any = getattr(transformers, architecture) if architecture else AutoModelForSequenceClassification
        return kind.from_pretrained(
            # A checkpoint may have a classifier for other classes: ours is new in any case.
            load.folder,
            config=classify_config(load),
            ignore_mismatched_sizes=True,
            **options,
        )

    def weight_name(self, anatomy: ModelAnatomy) -> str:
        return anatomy.classifier_weight

    def run_blocks(
        self, parts: Parts, inputs: Mapping[str, torch.Tensor], position_ids: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return [B, L, H] after the backbone or, of an encoder that pools by itself, its class logits [B, classes]."""
        num_tokens = position_ids.shape[1]
        positions = torch.arange(num_tokens, device=position_ids.device)
        mask = (positions < lengths.clamp(min=1)[:, None]).long()
        if parts.read == "class":
            return parts.model(**inputs, attention_mask=mask).logits
        options = {} if parts.encoder else {"use_cache": False}
        return parts.backbone(**inputs, attention_mask=mask, **options).last_hidden_state

    def select(self, parts: Parts, states: torch.Tensor, targets: Targets) -> Supervised:
        """Select the rows that hold a document."""
        logits = states if parts.read == "class" else parts.head(pooled(states, targets.lengths, parts.read))
        chosen = targets.class_labels >= 0
        return Supervised(logits[chosen], targets.class_labels[chosen], targets.document_ids[:, 0][chosen])

    def loss_sum(self, parts: Parts, supervised: Supervised, num_trials: int) -> torch.Tensor:
        return _per_trial(_cross_entropy_sum, supervised.values, supervised.targets, num_trials)

    def losses(self, parts: Parts, supervised: Supervised) -> DocumentLosses:
        logits, classes, owners = supervised
        losses = functional.cross_entropy(logits.float(), classes, reduction="none")
        return DocumentLosses(losses, owners, logits.argmax(-1), classes)


HEADS: Mapping[HeadKind, Head] = {"language_model": LanguageModelHead(), "classification": ClassificationHead()}


def head_of(task: Task) -> Head:
    """Return the head that a task trains with."""
    return HEADS[TASKS[task].head.kind]


def document_places(ways: Ways, position_ids: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of a forward pass that say where documents are: positions that restart with each, or, of a class that
    does not heed them, the mask of rows that hold one document each."""
    if ways.packs:
        return {"position_ids": position_ids}
    if not ways.pads:
        return {}
    return {"attention_mask": attention_mask(position_ids.shape[1], lengths)}


def attention_mask(width: int, lengths: torch.Tensor) -> torch.Tensor:
    """Return int64[B, width], 1 at the tokens of each row; an empty row has one, since a softmax needs a term."""
    return (torch.arange(width, device=lengths.device) < lengths.clamp(min=1)[:, None]).long()


@contextmanager
def _norm_left_out(norm: FinalNorm | None) -> Iterator[None]:
    """Let the backbone end with its last block's states: a stand-in returns what it is given."""
    if norm is None:
        yield
        return
    setattr(norm.parent, norm.name, nn.Identity())
    try:
        yield
    finally:
        setattr(norm.parent, norm.name, norm.module)


def _chunks(parts: Parts, hidden: torch.Tensor, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pieces of hidden[S, H] and tokens[S] whose float32 logits stay within LOGIT_CHUNK_BYTES; at least one, maybe empty.

    Under ZeRO-3 as many on every rank, since each use of the head gathers it.
    """
    rows = _chunk_rows(parts)
    chunks = list(zip(hidden.split(rows), tokens.split(rows), strict=True)) or [(hidden, tokens)]
    partitioned = any(hasattr(parameter, "ds_tensor") for parameter in parts.head.parameters())
    if not (partitioned and dist.is_initialized()):
        return chunks
    most = torch.tensor(len(chunks), device=hidden.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return chunks + [(hidden[:0], tokens[:0])] * (int(most) - len(chunks))


def _chunk_rows(parts: Parts) -> int:
    return max(1, LOGIT_CHUNK_BYTES // (4 * parts.model.config.get_text_config().vocab_size))


def _cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def _per_trial(
    loss_sum: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], values: torch.Tensor, targets: torch.Tensor, num_trials: int
) -> torch.Tensor:
    """Return the loss sum of all rows, or float32[num_trials] of as many equal parts of them."""
    if num_trials == 1:
        return loss_sum(values, targets)
    shape = (num_trials, values.shape[0] // num_trials)
    parts = zip(values.unflatten(0, shape).unbind(), targets.unflatten(0, shape).unbind(), strict=True)
    return torch.stack([loss_sum(part, part_targets) for part, part_targets in parts])
