"""The self-test of a base: what its class allows, found by computing a few short documents in several ways.

Training lays documents out in rows, separates them by positions or a mask, pads, computes the output projection at supervised
positions only, and lets stored states enter at a cut. Each of these is an assumption about the class. Here four documents are
computed by this package's own objective under each assumption, and the loss of every token is compared with that of the class's
own logits, one document at a time. `try_ways` finds out what holds, on a small instance of the class; `failed_ways` checks what
a plan assumed, on the base itself.

The comparison needs weights that make a wrong way visible. Those of a pretrained base do; a small instance is given such by
`sharpen`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from orchestrator.anatomy.values import ModelAnatomy, Ways
from orchestrator.data import TokenizedSet
from orchestrator.spec.tasks import TASKS, Task
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.model.attention import BY_DOCUMENT
from orchestrator.train.model.loss import AS_PROJECTED, LogitMap
from orchestrator.train.model.objective import Objective, make_objective
from orchestrator.train.model.self_test_documents import LENGTHS, completion_losses, documents_of, joined, with_prompts
from orchestrator.train.trunk.port import leaving

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest mean difference of a token's loss, in nats, that rounding explains, by the dtype of the computation."""
ROUNDING_SHARE = 2.0**-9
"""Mean difference between two roundings of a number to bfloat16, as a share of it: a quarter of a step of at most 2**-7."""
Attention = Literal["by_document", "sdpa", "eager"]
WAY_NAMES = {
    "splits": "the prompt as the encoder's input, and the completion as the decoder's",
    "answers": "generating",
    "projects": "the head path (logits as the output projection of the last hidden states)",
    "packs": "packing (restarting positions keep the documents of a row apart)",
    "pads": "padding at the end of a row",
    "injects": "stored hidden states in place of the lower blocks",
}
"""What each field of `Ways` means in a sentence; `splits` is what every encoder-decoder must do."""
NOT_FOR_BOTH = "a document of an encoder-decoder is a prompt and a completion, in a row of its own"


class Difference(NamedTuple):
    """What a way was seen to do."""

    nats: float
    """Mean difference of a token's loss from the class's own; infinite if it could not be computed."""
    failure: str = ""
    """Why it could not be computed."""

    def wrong(self, tolerance: float) -> str:
        """Return what is wrong; empty if the difference is within the tolerance."""
        if self.failure:
            return self.failure
        if self.nats <= tolerance:
            return ""
        return f"losses differ from the class's own by {self.nats:.3g} nats a token"


@dataclass(frozen=True)
class SelfTest:
    """The documents, and the model that computes them in several ways."""

    model: Any
    anatomy: ModelAnatomy
    task: Task
    device: torch.device

    @property
    def data(self) -> TokenizedSet:
        data = documents_of(self.model, self.anatomy, num_classes=self._num_classes)
        return with_prompts(data) if self.anatomy.kind == "encoder_decoder" else data

    @property
    def tolerance(self) -> float:
        dtypes = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        return TOLERANCE[torch.float32 if dtypes == {torch.float32} else torch.bfloat16]

    @property
    def _num_classes(self) -> int:
        return int(self.model.config.num_labels) if TASKS[self.task].head.is_new else 0

    @property
    def rows_alone(self) -> RowPlan:
        return RowPlan(max(LENGTHS), 1, pack=False, pads=False)

    @property
    def rows_packed(self) -> RowPlan:
        return RowPlan(sum(LENGTHS), 1, pack=True)

    @property
    def rows_padded(self) -> RowPlan:
        return RowPlan(max(LENGTHS), len(LENGTHS), pack=False)

    def objective(self, ways: Ways, cut: int = 0) -> Objective:
        return make_objective(self.model, self.anatomy.model_copy(update={"ways": ways}), self.task, cut=cut)

    @torch.no_grad()
    def own_losses(self) -> np.ndarray:
        """Return the loss of every token by the class's own logits, one document at a time; of a classifier, whose logits are the
        head's own affair, by the objective."""
        if self._num_classes:
            return self.losses(self.objective(Ways(packs=False)), self.rows_alone)
        if self.anatomy.kind == "encoder_decoder":
            return completion_losses(self.model, self.data, self.device)
        found: list[torch.Tensor] = []
        data = self.data
        for index in range(len(data)):
            ids = torch.from_numpy(data.document(index)[0].astype(np.int64)).to(self.device)[None]
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            found.append(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        return torch.cat(found).double().cpu().numpy()

    @torch.no_grad()
    def losses(self, objective: Objective, rows: RowPlan, *, store: bool = False) -> np.ndarray:
        """Return the loss of every token, document after document; with `store` from stored states at the objective's cut."""
        data = self.data
        losses, owners = [], []
        for batch in rows.batches(data, np.arange(len(data))):
            tensors = to_tensors(batch, self.device)
            if store:
                tensors["hidden"] = self._states(objective, tensors)
            scored = cast("Any", objective(**tensors, each=True))
            losses.append(scored.losses.double().cpu().numpy())
            owners.append(scored.document_ids.cpu().numpy())
        order = np.argsort(np.concatenate(owners), kind="stable")
        return np.concatenate(losses)[order]

    def _states(self, objective: Objective, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return [B, L, H], what enters the block at the objective's cut."""
        blocks, cut = cast("nn.ModuleList", self.model.get_submodule(self.anatomy.blocks_module)), objective.cut
        with leaving(blocks, [cut]) as taken:
            objective.run_blocks(tensors["input_ids"], tensors["position_ids"], tensors["lengths"])
        return taken[cut]

    @torch.no_grad()
    def trained_loss(self, objective: Objective) -> float:
        """Return the loss sum as training computes it, over documents in rows of their own."""
        data = self.data
        batches = self.rows_alone.batches(data, np.arange(len(data)))
        return sum(float(cast("torch.Tensor", objective(**to_tensors(batch, self.device)))) for batch in batches)

    def head_path(self, own: np.ndarray, ways: Ways) -> Difference:
        """Compare the logits, both as they are scored and as they are trained on."""

        def compute() -> float:
            objective = self.objective(ways.model_copy(update={"packs": False, "pads": False}))
            scored = _mean_difference(self.losses(objective, self.rows_alone), own)
            return max(scored, abs(self.trained_loss(objective) - float(own.sum())) / len(own))

        return _seen(compute)

    def answers(self) -> Difference:
        """Try whether the class generates: transformers' cache of a T5 with more blocks in the decoder does not."""
        ids = torch.from_numpy(self.data.ids[None, : LENGTHS[0]].astype(np.int64)).to(self.device)
        return _seen(lambda: 0.0 * float(self.model.generate(input_ids=ids, max_new_tokens=2).sum()))

    def layout(self, own: np.ndarray, ways: Ways, rows: RowPlan) -> Difference:
        """Compare the losses of documents in these rows."""
        return _seen(lambda: _mean_difference(self.losses(self.objective(ways), rows), own))

    def injection(self, own: np.ndarray, ways: Ways, cuts: tuple[int, ...]) -> Difference:
        """Compare the losses computed from stored states at each of these cuts."""
        rows = self.rows_padded if ways.pads else self.rows_alone

        def compute() -> float:
            return max(_mean_difference(self.losses(self.objective(ways, cut), rows, store=True), own) for cut in cuts)

        return _seen(compute)

    @property
    def cuts(self) -> tuple[int, ...]:
        """The cut in the middle, and the one above the last block."""
        return tuple(sorted({max(1, self.anatomy.num_blocks // 2), self.anatomy.num_blocks}))


def try_ways(model: nn.Module, anatomy: ModelAnatomy, task: Task) -> Ways:
    """Return what a class allows, tried on a small instance of it.

    The attention implementation that the model has is the same afterwards. No random number is drawn.

    Args:
        model: In float32, with weights that make a wrong way visible (`sharpen`).
        anatomy: The anatomy of this very instance: its modules, and what follows the output projection. Its `ways` are ignored.
        task: Decides which head the model has.
    """
    test = SelfTest(model, anatomy, task, next(model.parameters()).device)
    before = test.model.config._attn_implementation
    try:
        with computing(test.model):
            if anatomy.kind == "encoder_decoder":
                return _try_encoder_decoder(test)
            return _try_attention(test) if TASKS[task].head.is_new else _try_decoder(test)
    finally:
        test.model.set_attn_implementation(before)


def _try_decoder(test: SelfTest) -> Ways:
    ways, reasons = _fused_attention(test)
    own = test.own_losses()
    if wrong := test.head_path(own, ways).wrong(test.tolerance):
        ways, reasons["projects"] = ways.model_copy(update={"projects": False}), wrong
    if wrong := test.layout(own, ways, test.rows_packed).wrong(test.tolerance) or _unseen(test, own, ways):
        ways, reasons["packs"] = ways.model_copy(update={"packs": False}), wrong
    if wrong := test.layout(own, ways, test.rows_padded).wrong(test.tolerance):
        ways, reasons["pads"] = ways.model_copy(update={"pads": False}), wrong
    if wrong := test.injection(own, ways, test.cuts).wrong(test.tolerance):
        ways, reasons["injects"] = ways.model_copy(update={"injects": False}), wrong
    if ways.attention == "sdpa" and ways.packs:
        test.model.set_attn_implementation(BY_DOCUMENT)
        wrong = test.layout(own, ways, test.rows_packed).wrong(test.tolerance)
        ways = ways if wrong else ways.model_copy(update={"attention": "by_document"})
        reasons |= {"attention": f"document by document: {wrong}"} if wrong else {}
    elif ways.attention == "sdpa":
        reasons["attention"] = "a row holds one document"
    return ways.model_copy(update={"reasons": reasons})


def _try_encoder_decoder(test: SelfTest) -> Ways:
    """Try rows of one document each, whose prompt the encoder reads; the class computes its logits, and nothing is stored."""
    ways, reasons = _fused_attention(test)
    ways = ways.model_copy(update={"packs": False, "projects": False, "injects": False})
    reasons |= dict.fromkeys(("packs", "projects", "injects"), NOT_FOR_BOTH)
    if ways.attention == "sdpa":
        reasons["attention"] = "a row holds one document"
    own = test.own_losses()
    if wrong := test.head_path(own, ways).wrong(test.tolerance):
        raise ValueError(f"{WAY_NAMES['splits']}: {wrong}")
    if wrong := test.layout(own, ways, test.rows_padded).wrong(test.tolerance):
        ways, reasons["pads"] = ways.model_copy(update={"pads": False}), wrong
    return ways.model_copy(update={"reasons": reasons})


def _try_attention(test: SelfTest) -> Ways:
    """Try what a classifier needs: rows of one document each, padded, and stored states."""
    ways, reasons = _fused_attention(test)
    # One document a row: there is nothing to keep apart.
    ways = ways.model_copy(update={"attention": "by_document" if ways.attention == "sdpa" else "eager"})
    own = test.own_losses()
    if wrong := test.layout(own, ways, test.rows_padded).wrong(test.tolerance):
        ways, reasons["pads"] = ways.model_copy(update={"pads": False}), wrong
    if wrong := test.injection(own, ways, test.cuts).wrong(test.tolerance):
        ways, reasons["injects"] = ways.model_copy(update={"injects": False}), wrong
    return ways.model_copy(update={"reasons": reasons})


def _fused_attention(test: SelfTest) -> tuple[Ways, dict[str, str]]:
    """Set the best attention of the class: sdpa, or eager where it has none; return it as ways."""
    backbone: Any = test.model.get_submodule(test.anatomy.backbone)
    reason = "" if getattr(backbone, "_supports_sdpa", False) else f"{type(test.model).__name__} has no sdpa attention"
    if not reason:
        test.model.set_attn_implementation("sdpa")
        reason = _seen(lambda: float(test.own_losses().mean() * 0.0)).wrong(test.tolerance)
    if not reason:
        return Ways(attention="sdpa"), {}
    test.model.set_attn_implementation("eager")
    return Ways(attention="eager"), {"attention": reason}


def _unseen(test: SelfTest, own: np.ndarray, ways: Ways) -> str:
    """Return that this instance would not show documents that see each other; empty if it would."""
    losses = _losses_of(test, joined(test.data), ways)
    same = losses is not None and _mean_difference(losses, own) <= 10 * test.tolerance
    return "the small instance does not show whether documents see each other" if same else ""


def _losses_of(test: SelfTest, data: TokenizedSet, ways: Ways) -> np.ndarray | None:
    """Return the losses of one document that all documents were joined to, at the same tokens; None if that fails."""
    (batch,) = RowPlan(data.num_tokens, 1, pack=False).batches(data, np.arange(1))
    try:
        with torch.no_grad():
            scored = cast("Any", test.objective(ways)(**to_tensors(batch, test.device), each=True))
    except (RuntimeError, ValueError, TypeError):
        return None
    return scored.losses.double().cpu().numpy()


CAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "final_logit_soft_cap")
"""Config keys of the bound c in c * tanh(logits / c)."""


@torch.no_grad()
def measured_logit_map(model: nn.Module, anatomy: ModelAnatomy) -> LogitMap:
    """Return what a class does with the result of its output projection, by comparing its logits with that result.

    A cap is read from the config, a scale is measured, and where a number of the config or its inverse is the scale to five
    digits, that number is returned. A class that does something else gets the identity: `try_ways` then finds that its logits
    are not the projection.

    Args:
        model: As for `try_ways`.
        anatomy: Its modules.
    """
    test = SelfTest(model, anatomy, "text", next(model.parameters()).device)
    config = test.model.config.get_text_config()
    cap = next((float(value) for key in CAP_KEYS if (value := getattr(config, key, None))), 0.0)
    with computing(test.model):
        ids = torch.from_numpy(test.data.ids[: LENGTHS[0]].astype(np.int64)).to(test.device)[None]
        logits = test.model(input_ids=ids, use_cache=False).logits.double()
        hidden = test.model.get_submodule(anatomy.backbone)(input_ids=ids, use_cache=False).last_hidden_state
        projected = test.model.get_submodule(anatomy.head_weight.rpartition(".")[0])(hidden).double()
    if logits.shape != projected.shape:
        return AS_PROJECTED
    for each in (0.0, cap):
        straight = logits if not each else torch.atanh((logits / each).clamp(-1 + 1e-9, 1 - 1e-9)) * each
        # Near the cap the inverse loses its digits.
        chosen = (logits.abs() < 0.9 * each) if each else torch.ones_like(logits, dtype=torch.bool)
        scale = float((straight * projected)[chosen].sum() / projected[chosen].square().sum())
        found = LogitMap(_configured(scale, config), each)
        if torch.allclose(found(projected), logits, rtol=1e-4, atol=1e-4):
            return found
    return AS_PROJECTED


def _configured(scale: float, config: Any) -> float:
    """Return the number of the config, or the inverse of one, that a measured scale is; else the scale itself, to six digits."""
    numbers = [float(v) for v in vars(config).values() if isinstance(v, int | float) and not isinstance(v, bool) and v]
    exact = [1.0, *numbers, *(1.0 / number for number in numbers)]
    near = [number for number in exact if abs(number - scale) <= 1e-5 * abs(scale)]
    return near[0] if near else float(f"{scale:.6g}")


def failed_ways(model: nn.Module, anatomy: ModelAnatomy, task: Task, device: torch.device) -> dict[str, Difference]:
    """Return how far each way that the anatomy allows is from the class's own logits, on the base as it is loaded.

    Args:
        model: With its attention implementation and dtype of training; possibly quantized.
        device: Where it computes.
    """
    test, ways = SelfTest(model, anatomy, task, device), anatomy.ways
    found: dict[str, Difference] = {}
    with computing(test.model):
        own = test.own_losses()
        new_head = TASKS[task].head.is_new
        if anatomy.kind == "encoder_decoder":
            found["splits"] = test.head_path(own, ways)
            found["answers"] = test.answers()
        if ways.projects and not new_head:
            found["projects"] = test.head_path(own, ways)
        if ways.packs and not new_head:
            found["packs"] = test.layout(own, ways, test.rows_packed)
        if ways.pads:
            found["pads"] = test.layout(own, ways, test.rows_padded)
        if ways.injects:
            found["injects"] = test.injection(own, ways, test.cuts)
    return found


def tolerance_of(model: nn.Module, anatomy: ModelAnatomy, task: Task, device: torch.device) -> float:
    """Return the largest mean difference, in nats a token, that rounding explains in this model.

    Two computations of one logit in bfloat16 may be rounded to neighbours, which lie further apart the larger the logit is
    (GPT-2's are near -110, where the step is 0.5).
    """
    test = SelfTest(model, anatomy, task, device)
    if test.tolerance == TOLERANCE[torch.float32] or TASKS[task].head.is_new:
        return test.tolerance
    ids = torch.from_numpy(test.data.document(0)[0].astype(np.int64)).to(device)[None]
    with computing(test.model), torch.no_grad():
        largest = float(test.model(input_ids=ids, use_cache=False).logits.abs().max())
    return max(test.tolerance, largest * ROUNDING_SHARE)


@contextmanager
def computing(model: nn.Module) -> Iterator[None]:
    """Let the model compute without dropout in this context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def sharpen(model: nn.Module, seed: int = 0) -> None:
    """Give a small instance weights with which every token's loss depends on its context: matrices that keep the size of their
    input, embeddings of size 1, biases of size 0.1. Vectors that are no biases, and decay rates, stay as the class draws them.
    """
    draw = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if not parameter.is_floating_point() or kind.lower().startswith(("a_log", "dt_", "d_")):
            continue
        if parameter.ndim >= 2:
            std = 1.0 if id(parameter) in embeddings else float(np.prod(parameter.shape[1:])) ** -0.5
        elif kind.endswith("bias"):
            std = 0.1
        else:
            continue
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * std)


def _seen(compute: Callable[[], float]) -> Difference:
    """Return the difference, or why it cannot be computed: a class may refuse an argument in any way."""
    try:
        nats = compute()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Difference(float("inf"), f"{type(error).__name__}: {first}")
    return Difference(nats) if np.isfinite(nats) else Difference(float("inf"), "the losses are not finite")


def _mean_difference(losses: np.ndarray, own: np.ndarray) -> float:
    return float(np.abs(losses - own).mean()) if losses.shape == own.shape else float("inf")
