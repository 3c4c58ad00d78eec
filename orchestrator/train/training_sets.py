"""The training data of one trial: its steps, and the stored activations of their documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from orchestrator.data import TokenizedSet, documents_of_share, shuffled
from orchestrator.train.batches import StepPlan
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.train.trunk.states import TrunkStates, chosen_states, joined_states
from orchestrator.work.assignment import TrainRung


@dataclass(frozen=True)
class TrainingSets:
    """The training set of a trial and, if it uses replay, the retention text."""

    work: TrainRung
    load_set: Callable[[str], TokenizedSet]
    trunk: TrunkLibrary

    @cached_property
    def chosen(self) -> np.ndarray | None:
        """Return the documents that the trial trains on if they are a share of the set; None if they are all."""
        trial = self.work.trial
        if trial.share == 1.0:
            return None
        return documents_of_share(self.load_set(self.work.data.train), trial.share, trial.seed)

    @cached_property
    def steps(self) -> StepPlan:
        """Return the documents of every step."""
        trial, paths = self.work.trial, self.work.data
        read = self.load_set(paths.train)
        target = shuffled(read, trial.seed) if trial.control == "shuffled" else read
        target = target if self.chosen is None else target.select(self.chosen)
        replayed = self.load_set(paths.replay) if paths.replay is not None else None
        return StepPlan.of(target, replayed, self.work.settings.tokens_per_step, trial.seed, trial.remedies.replay)

    @cached_property
    def states(self) -> TrunkStates | None:
        """Return the stored activations of these documents at the trial's cut; none are stored for shuffled answers."""
        work = self.work
        if work.trunk is None or work.trial.control == "shuffled":
            return None
        cut, paths = work.selection.cut, work.data
        target = self.trunk.states(paths.train, cut)
        if target is not None and self.chosen is not None:
            target = chosen_states(target, self.chosen)
        if not work.trial.remedies.replay or paths.replay is None:
            return target
        replayed = self.trunk.states(paths.replay, cut)
        return None if target is None or replayed is None else joined_states(target, replayed)

    @cached_property
    def retention(self) -> TokenizedSet | None:
        """Retention text that is not scored. A trial that needs some has some: the data would have been rejected otherwise."""
        replay = self.work.data.replay
        return self.load_set(replay) if replay is not None else None
