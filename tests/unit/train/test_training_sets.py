"""What a trial learns from: never what it is scored on."""

from __future__ import annotations

import numpy as np

from orchestrator.data import TokenizedSet, build_set
from orchestrator.train.training_sets import TrainingSets
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.work.assignment import TrainRung, WorkContext
from orchestrator.work.execution import DataPaths


def set_named(path: str) -> TokenizedSet:
    return build_set([(np.full(3, len(path)), np.ones(3, bool))])


def retention_of(**paths: str) -> TokenizedSet | None:
    assignment = TrainRung.model_construct(
        context=WorkContext.model_construct(data=DataPaths(train="train", eval="eval", **paths))
    )
    return TrainingSets(assignment, set_named, TrunkLibrary.__new__(TrunkLibrary)).retention


def test_weights_are_weighed_by_retention_text_that_is_not_scored() -> None:
    found = retention_of(retain="scored", replay="learned from")
    assert found is not None
    assert found.document(0)[0].tolist() == [len("learned from")] * 3
    assert retention_of(retain="scored") is None
