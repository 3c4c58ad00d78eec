"""The state of a trial at one step, on the CPU, and its commit as a checkpoint: completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from orchestrator.errors import OrchestratorError
from orchestrator.store import commit_folder, write_json
from orchestrator.train.adapters.artifacts import ReadyArtifact, ready_artifact
from orchestrator.train.adapters.branch import Branch
from orchestrator.train.engines.engine import FLAT, Engine
from orchestrator.train.evaluation import Evaluation
from orchestrator.train.loop import LoopState
from orchestrator.train.ranks import Ranks

RANDOM = "random."
"""Prefix of the names of a rank's random state, among its master weights and moments."""


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of a checkpoint. Its tensors are copies: training may continue, or the branch be closed, before it is
    written."""

    state: LoopState
    seed: int
    ranks: int
    layout: str
    """The layout of master weights and moments; see `engine.layout_of`."""
    rank_states: Mapping[int, Mapping[str, torch.Tensor]]
    """Master weights, moments and random state, by rank; empty if the trial ends here."""
    artifact: ReadyArtifact | None
    """The trained weights, on rank 0."""
    evaluations: Mapping[str, Evaluation]
    owner: Mapping[str, object] = field(default_factory=dict[str, object])
    """Whose it is, for the manifest (`work.assignment`)."""

    @property
    def num_bytes(self) -> int:
        return state_bytes(self.rank_states) + (self.artifact.num_bytes if self.artifact is not None else 0)

    def record(self) -> dict[str, object]:
        """Return the content of state.json."""
        loss = self.state.loss
        return {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": loss,
            "loss_hex": None if loss is None else loss.hex(),
            "seed": self.seed,
            "ranks": self.ranks,
            "layout": self.layout,
            "has_optimizer": bool(self.rank_states),
        }


def state_bytes(rank_states: Mapping[int, Mapping[str, torch.Tensor]]) -> int:
    return sum(tensor.nbytes for tensors in rank_states.values() for tensor in tensors.values())


def take_snapshot(
    branch: Branch,
    engine: Engine,
    state: LoopState,
    ranks: Ranks,
    *,
    seed: int,
    layout: str,
    keep_optimizer: bool,
    evaluations: Mapping[str, Evaluation],
    gathered: bool,
    owner: Mapping[str, object],
) -> Snapshot:
    """Take a snapshot of the trial as it is now. Called on every rank.

    Args:
        gathered: Whether rank 0 gathers the states of all ranks and writes them.
        owner: The owner of the folder, for the manifest.

    Raises:
        TrainingError: the trained weights cannot be saved (law 4). Every rank raises it.
    """
    tensors = engine.full_tensors()
    artifact: ReadyArtifact | None = None
    failure: OrchestratorError | None = None
    if ranks.first:
        try:
            artifact = ready_artifact(branch, tensors)
        except OrchestratorError as error:
            failure = error
    # All ranks raise together: a rank that continued would wait in the next collective for the others.
    for error in ranks.gather(failure):
        if error is not None:
            raise error
    states: dict[int, dict[str, torch.Tensor]] = {}
    if keep_optimizer:
        own = _rank_state(engine, ranks, whole=layout == FLAT)
        others = ranks.gather(None if ranks.first else own) if gathered else []
        states = {rank: other for rank, other in enumerate(others) if other is not None} | {ranks.rank: own}
    return Snapshot(state, seed, ranks.count, layout, states, artifact, evaluations, owner)


def write_snapshot(final: Path, snapshot: Snapshot, ranks: Ranks) -> None:
    """Write `final`, together: every rank the states that it has, rank 0 the rest. Called on every rank."""
    with ExitStack() as commit:
        folder = Path(
            ranks.broadcast(str(commit.enter_context(commit_folder(final, about=dict(snapshot.owner)))) if ranks.first else None)
        )
        for rank, tensors in snapshot.rank_states.items():
            save_file(dict(tensors), folder / f"state-rank{rank}.safetensors")
        if snapshot.artifact is not None:
            snapshot.artifact.write(folder)
            for name, evaluation in snapshot.evaluations.items():
                evaluation.save(folder / f"{name}.npz")
            write_json(folder / "state.json", snapshot.record())
        ranks.barrier()  # rank 0 commits what all have written
    # No rank continues, to read or delete a checkpoint, before the folder has its final name.
    ranks.barrier()


def _rank_state(engine: Engine, ranks: Ranks, *, whole: bool) -> dict[str, torch.Tensor]:
    """Masters and moments that every rank holds `whole` are rank 0's to write."""
    tensors = dict(engine.state_dict()) if ranks.first or not whole else {}
    # Each rank draws its own dropout masks, so its random state belongs to the checkpoint.
    tensors[RANDOM + "cpu"] = torch.get_rng_state()
    if ranks.device.type == "cuda":
        tensors[RANDOM + "cuda"] = torch.cuda.get_rng_state(ranks.device)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
