"""The state that a rank of a gang keeps for all its work: loaded base, other ranks, data, checkpoints, activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.data import TokenizedSet
from orchestrator.data.sets import load_known
from orchestrator.train import heartbeat
from orchestrator.train.adapters.branch import head_name
from orchestrator.train.batches import RowPlan
from orchestrator.train.checkpoint.saving import Saver
from orchestrator.train.engines.construction import forward_ready
from orchestrator.train.engines.engine import is_partitioned
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.logistic import FittedHead
from orchestrator.train.model.objective import objective_of
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.work.execution import DataPaths, ExecutionPlan, TrunkPlan


class SetCache:
    """Tokenised sets, each read once per process."""

    def __init__(self) -> None:
        self._sets: dict[str, TokenizedSet] = {}

    def load(self, path: str) -> TokenizedSet:
        """Return a set, read at its first use.

        Raises:
            DataError: the set changed after it was written.
        """
        if path not in self._sets:
            self._sets[path] = load_known(Path(path))
        return self._sets[path]

    def clear(self) -> None:
        """Read every set again at its next use."""
        self._sets.clear()


@dataclass(frozen=True)
class HostContext:
    """The common inputs of training, evaluating and measuring on this rank. Every rank of the gang has one."""

    base: LoadedBase
    fingerprint: Mapping[str, str]
    """Hashes of the base's tensors as they were loaded."""
    execution: ExecutionPlan
    """The execution with which the base was loaded; a trial may use a smaller one of the same gang."""
    ranks: Ranks
    sets: SetCache
    trunk: TrunkLibrary
    saver: Saver
    base_test: str = ""
    """What the self-test of the base found."""
    fitted_heads: dict[str, FittedHead] = field(default_factory=dict[str, FittedHead])
    """Classifiers fitted on the base's features (`head_fit`), by what they depend on."""

    @classmethod
    def create(cls, base: LoadedBase, fingerprint: Mapping[str, str], execution: ExecutionPlan, ranks: Ranks) -> HostContext:
        """Return the context of a freshly loaded base: nothing is read, stored or remembered yet."""
        sets = SetCache()
        return cls(base, fingerprint, execution, ranks, sets, TrunkLibrary(base, fingerprint, ranks, sets.load), Saver())

    def rows(self, execution: ExecutionPlan) -> RowPlan:
        """Return how documents share this rank's rows under an execution."""
        alone = self.base.load.traits.head.one_document_per_row or not self.base.anatomy.ways.packs
        return RowPlan.of(execution, self.ranks.rank, one_document_per_row=alone)

    @property
    def head_module(self) -> str:
        """The name of the base's own head."""
        return head_name(self.base).rpartition(".")[0]

    def open_trunk(self, plan: TrunkPlan | None, data: DataPaths, note: Callable[[str], None]) -> float:
        """Compute the planned activations that are not stored yet. Called on every rank, with no branch open.

        Returns:
            Seconds that it took.
        """
        if plan is None:
            return 0.0
        # Only the blocks are run, but an objective needs a head: the base's own.
        objective = objective_of(self.base, self.base.model.get_submodule(self.head_module))
        with forward_ready(objective, self.execution):
            heartbeat.enter("caching activations")
            partitioned = is_partitioned(self.execution)
            return self.trunk.open(plan, data, self.rows(self.execution), objective, partitioned=partitioned, note=note)

    def release_cached_state(self) -> bool:
        """Write and forget the checkpoints and rung states that any rank holds in memory; called on every rank.

        Where memory runs out this comes first: a trial must not be trained by a smaller execution because of what its gang
        ran before it.

        Returns:
            Whether any rank held some.
        """
        return any(self.ranks.gather(self.saver.give_up()))
