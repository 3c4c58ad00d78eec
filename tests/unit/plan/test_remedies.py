"""Remedies: which combinations are tried, what a learning group is, and what a trial is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy, select
from orchestrator.plan import make_plan
from orchestrator.plan.remedies import (
    learning_groups,
    remedies_of_point,
    remedies_of_train,
    searched_remedies,
    tunes_without_anchor,
)
from orchestrator.spec.adapters import PLAIN_LORA
from orchestrator.spec.models import SearchPoint, SearchSpec, TrainSpec
from orchestrator.work.remedies import NOTHING, AnchorPlan, Remedies, method_name

L2SP, PRODUCT = {"kind": "l2sp", "strength": 30}, {"kind": "product", "strength": 2}


def searched(tune: Any, train: dict[str, Any] | None = None, **search: Any) -> list[str]:
    found = searched_remedies(SearchSpec.model_validate(search), TrainSpec.model_validate(train or {}), tune)
    return [str(remedies) for remedies in found]


def test_without_lists_a_search_takes_what_train_says() -> None:
    assert searched("lora") == [""]
    assert searched("full", {"replay": 0.1, "anchor": L2SP, "layer_decay": 0.5}) == ["replay 0.1 · l2sp 30 · decay 0.5"]


def test_one_trial_has_the_anchor_of_train_where_it_fits() -> None:
    train = TrainSpec.model_validate({"replay": 0.1, "anchor": L2SP})
    assert str(remedies_of_train(train, "full")) == "replay 0.1 · l2sp 30"
    assert remedies_of_train(train, "full").kinds == ("replay", "l2sp")
    assert remedies_of_train(train, "lora").kinds == ("replay",)
    assert str(remedies_of_train(train, "lora")) == "replay 0.1"


def test_every_combination_is_tried_once_with_the_anchors_that_fit() -> None:
    lists = {"replay": [0.0, 0.1], "anchor": ["none", L2SP, PRODUCT], "layer_decay": [1.0]}
    assert searched("lora", **lists) == ["", "product 2", "replay 0.1", "replay 0.1 · product 2"]
    assert searched("full", **lists) == ["", "l2sp 30", "replay 0.1", "replay 0.1 · l2sp 30"]
    assert searched("lora", anchor=[L2SP]) == [""], "unfrozen weights alone are held"
    assert searched("full", anchor=["none", {"kind": "ewc", "strength": 0}]) == [""], "an anchor that does not pull is none"


def test_a_point_says_its_own_and_else_what_train_says() -> None:
    train = TrainSpec.model_validate({"replay": 0.2, "anchor": L2SP})
    full = SearchPoint.model_validate({"layers": "all", "tune": "full", "learning_rate": 1e-4})
    lora = SearchPoint.model_validate({"layers": "all", "learning_rate": 1e-4, "replay": 0.0, "anchor": PRODUCT})
    assert str(remedies_of_point(full, train)) == "replay 0.2 · l2sp 30"
    assert str(remedies_of_point(lora, train)) == "product 2"


@pytest.mark.parametrize(
    ("search", "left"),
    [
        ({"tune": ["lora", "full"]}, ["lora"]),
        ({"tune": ["full"]}, []),
        ({"tune": ["lora", "full"], "anchor": ["none"]}, []),
        (
            {"points": [{"layers": "all", "learning_rate": 1e-3}, {"layers": "all", "tune": "full", "learning_rate": 1e-4}]},
            ["lora"],
        ),
        ({"points": [{"layers": "all", "learning_rate": 1e-3, "anchor": PRODUCT}]}, []),
    ],
)
def test_trials_that_go_without_the_anchor_of_train_are_known(search: dict[str, Any], left: list[str]) -> None:
    held, free = (TrainSpec.model_validate({"anchor": {**L2SP, "strength": strength}}) for strength in (30, 0))
    assert tunes_without_anchor(SearchSpec.model_validate(search), held) == left
    assert tunes_without_anchor(SearchSpec.model_validate(search), free) == []


def test_the_plan_notes_which_trials_go_without_the_anchor_of_train(base: Any, job: Any, cores: Any, data: Any) -> None:
    def notes(**search: Any) -> list[str]:
        loaded = job(search=search, train={"anchor": L2SP})
        plan = make_plan(loaded, base("tiny"), data(), cores(), job="sweep", spec_sha256="0" * 64)
        return [note for note in plan.notes if "anchor" in note]

    assert notes(tune=["lora", "full"]) == ["train.anchor (l2sp) does not apply to lora trials"]
    assert notes(tune=["full"]) == []


def test_replay_adds_its_tokens_and_a_name() -> None:
    assert Remedies(replay=0.2).total_tokens(800) == 1000
    assert NOTHING.total_tokens(800) == 800
    assert method_name("lora", 8, PLAIN_LORA, NOTHING) == "lora r8"
    assert method_name("full", None, PLAIN_LORA, Remedies(layer_decay=0.8)) == "full · decay 0.8"


def test_without_remedies_what_learns_is_one_group(base: Callable[[str], ModelAnatomy]) -> None:
    anatomy = base("tiny")
    selection = select(anatomy, "all+head", "full", None, task="completion")
    (group,) = learning_groups(anatomy, selection, NOTHING, selection.trainable)
    assert group == (selection.trainable, 1.0, True)


def test_rates_fall_with_depth_from_the_last_block_down(base: Callable[[str], ModelAnatomy]) -> None:
    anatomy = base("tiny")
    selection = select(anatomy, "all+head", "full", None, task="completion")
    groups = learning_groups(anatomy, selection, Remedies(layer_decay=0.5), selection.trainable)
    factors = {name: group.rate_factor for group in groups for name in group.names}
    top = anatomy.num_blocks - 1
    for block, names in enumerate(anatomy.blocks):
        assert {factors[name] for name in names} == {0.5 ** (top - block)}
    assert factors[anatomy.head_weight] == 1.0
    adapters = [f"{name.removesuffix('.weight')}.lora_A.weight" for name in anatomy.linears[0]]
    lora = select(anatomy, "all", "lora", 4, task="completion")
    (group,) = learning_groups(anatomy, lora, Remedies(layer_decay=0.5), adapters)
    assert group.rate_factor == 0.5**top


def test_a_new_classifier_is_not_anchored(base: Callable[[str], ModelAnatomy]) -> None:
    anatomy = base("tiny")
    selection = select(anatomy, "last:1", "full", None, task="classify", num_classes=3)
    held = Remedies(anchor=AnchorPlan(kind="l2sp", strength=1.0))
    groups = learning_groups(anatomy, selection, held, selection.trainable)
    assert {name for group in groups if not group.anchored for name in group.names} == {anatomy.classifier_weight}


@pytest.mark.parametrize("remedies", [Remedies(replay=0.1), Remedies(anchor=AnchorPlan(kind="ewc", strength=1))])
def test_replay_and_ewc_want_text_that_is_not_scored(remedies: Remedies) -> None:
    assert remedies.needs_replayed_text
    assert not NOTHING.needs_replayed_text
