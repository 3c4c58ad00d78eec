"""What one trial learns from: its steps, and what is stored of their documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from orchestrator.data import TokenizedSet, documents_of_share, shuffled
from orchestrator.train.batches import StepPlan
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.train.trunk.states import TrunkStates, chosen_states, joined_states
from orchestrator.work.assignment import EvaluateBase, TrainRung


@dataclass(frozen=True)
class LearnedSets:
    """The training set of an assignment and, where it replays, the retention text beside it."""

    assignment: TrainRung | EvaluateBase
    load_set: Callable[[str], TokenizedSet]
    trunk: TrunkLibrary

    @cached_property
    def chosen(self) -> np.ndarray | None:
        """The training documents that it learns from, where they are a share; None where they are all."""
        trial = self.assignment.trial
        if trial.share == 1.0:
            return None
        return documents_of_share(self.load_set(self.assignment.data.train), trial.share, trial.seed)

    @cached_property
    def steps(self) -> StepPlan:
        trial, paths = self.assignment.trial, self.assignment.data
        read = self.load_set(paths.train)
        target = shuffled(read, trial.seed) if trial.control == "shuffled" else read
        target = target if self.chosen is None else target.select(self.chosen)
        replayed = self.load_set(paths.replay) if paths.replay is not None else None
        return StepPlan.of(target, replayed, self.assignment.settings.tokens_per_step, trial.seed, trial.remedies.replay)

    @cached_property
    def states(self) -> TrunkStates | None:
        """What is stored of these documents at the trial's cut. Other answers are other documents, and are not stored."""
        assignment = self.assignment
        if assignment.trunk is None or assignment.trial.control == "shuffled":
            return None
        cut, paths = assignment.selection.cut, assignment.data
        target = self.trunk.states(paths.train, cut)
        if target is not None and self.chosen is not None:
            target = chosen_states(target, self.chosen)
        if not assignment.trial.remedies.replay or paths.replay is None:
            return target
        replayed = self.trunk.states(paths.replay, cut)
        return None if target is None or replayed is None else joined_states(target, replayed)

    @cached_property
    def retention(self) -> TokenizedSet | None:
        """Retention text that is not scored; a trial that wants some has some, or its data would have been refused."""
        replay = self.assignment.data.replay
        return self.load_set(replay) if replay is not None else None
