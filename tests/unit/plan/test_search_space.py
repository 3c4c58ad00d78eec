"""Options: the cross product without its doubles, with rates; the grid over them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import SelectionError
from orchestrator.plan import grid_points, make_plan
from orchestrator.plan.search_space import search_choices
from orchestrator.plan.values import PlannedPoint, SearchPlan
from orchestrator.work.remedies import method_name


def names(choices: list[Any]) -> list[tuple[str, str, int | None]]:
    return [(c.selection.policy, c.selection.tune, c.selection.lora_rank) for c in choices]


def test_cross_product_with_ranks_for_lora_alone(base: Any, job: Any) -> None:
    loaded = job(search={"layers": ["last:1", "last:2"], "tune": ["lora", "full"], "lora_rank": [4, 8]})
    assert names(search_choices(loaded, base("tiny"), 0)) == [
        ("last:1", "lora", 4),
        ("last:1", "lora", 8),
        ("last:1", "full", None),
        ("last:2", "lora", 4),
        ("last:2", "lora", 8),
        ("last:2", "full", None),
    ]


def test_adapters_are_a_dimension_of_their_own(base: Any, job: Any) -> None:
    search = {
        "layers": ["last:1"],
        "lora_rank": [4, 8],
        "adapter": ["lora", "dora", "rslora"],
        "lora_alpha": [16, 32],
        "lora_dropout": [0.0, 0.05],
        "modules": ["all", "attention", ["q_proj", "v_proj"]],
    }
    choices = search_choices(job(search={**search, "tune": ["lora", "full"]}), base("tiny"), 0)
    assert len(choices) == 2 * 3 * 2 * 2 * 3 + 1
    methods = [method_name(c.selection.tune, c.selection.lora_rank, c.selection.adapter, c.remedies) for c in choices]
    assert len(set(methods)) == len(methods)
    assert methods[:2] == ["lora r4 · alpha 16", "lora r4 · alpha 16 · attention"]
    assert "lora r8" in methods, "an alpha of twice the rank is the default"
    assert "dora r8 · alpha 32 · dropout 0.05 · q_proj+v_proj" in methods
    assert methods[-1] == "full"


def test_modules_decide_what_is_adapted_and_how_much_that_is(base: Any, job: Any) -> None:
    anatomy = base("tiny")
    loaded = job(search={"layers": ["last:2"], "modules": ["all", "attention", "mlp", ["up_proj"]], "adapter": ["lora", "dora"]})
    for choice in search_choices(loaded, anatomy, 0):
        selection = choice.selection
        wanted = {
            "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "mlp": ("gate_proj", "up_proj", "down_proj"),
            ("up_proj",): ("up_proj",),
        }[selection.adapter.modules]
        assert {name.split(".")[-2] for name in selection.adapted} == set(wanted)
        assert len(selection.adapted) == 2 * len(wanted)
        per_matrix = [16 * sum(anatomy.tensors[name].shape) for name in selection.adapted]
        magnitudes = [anatomy.tensors[name].shape[0] for name in selection.adapted if selection.adapter.kind == "dora"]
        assert selection.num_trainable_parameters == sum(per_matrix) + sum(magnitudes)


def test_names_that_choose_the_same_layers_are_one_option(base: Any, job: Any) -> None:
    attention = ["q_proj", "k_proj", "v_proj", "self_attn.o_proj"]
    loaded = job(search={"layers": ["last:1"], "modules": ["attention", attention], "lora_alpha": [32]})
    (choice,) = search_choices(loaded, base("tiny"), 0)
    assert choice.selection.adapter.modules == "attention"
    assert choice.selection.adapter.alpha is None


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("search", {"modules": ["all", ["q_prj"]]}),
        ("search", {"algorithm": "fixed", "points": [{"layers": "all", "learning_rate": 1e-3, "modules": ["q_prj"]}]}),
        ("finetune", {"modules": ["q_prj"]}),
    ],
)
def test_a_module_that_no_block_has_is_an_error_with_near_names(
    base: Any, job: Any, data: Any, cores: Any, section: str, values: dict[str, Any]
) -> None:
    loaded = job(**{section: values})

    def planned() -> object:
        if section == "search":
            return search_choices(loaded, base("tiny"), 0)
        return make_plan(loaded, base("tiny"), data(), cores(), job="finetune", spec_sha256="")

    with pytest.raises(SelectionError, match=r"no linear layer 'q_prj'[\s\S]*did you mean q_proj") as raised:
        planned()
    assert raised.value.where == str(loaded.path)


def test_policies_that_mean_the_same_are_one_option(base: Any, job: Any) -> None:
    loaded = job(search={"layers": ["last:4", "all", "blocks:0-3"], "tune": ["lora"], "lora_rank": [8]})
    assert len(search_choices(loaded, base("tiny"), 0)) == 1


def test_a_policy_by_score_is_no_double_of_what_stands_in_for_it(base: Any, job: Any) -> None:
    loaded = job(search={"layers": ["last:2", "blocks:0,1", "top:0.5", "top:0.4"], "lora_rank": [8]})
    choices = search_choices(loaded, base("tiny"), 0)
    assert [choice.selection.policy for choice in choices] == ["last:2", "blocks:0-1", "top:0.5"], "0.4 of four is two as well"


def test_a_classifier_alone_is_the_same_for_lora_and_full(base: Any, job: Any) -> None:
    loaded = job(task="classify", search={"layers": ["head", "last:1"], "tune": ["lora", "full"], "lora_rank": [4, 8]})
    choices = search_choices(loaded, base("tiny"), 3)
    assert names(choices) == [("head", "full", None), ("last:1", "lora", 4), ("last:1", "lora", 8), ("last:1", "full", None)]


def test_a_language_head_differs_for_lora_and_full(base: Any, job: Any) -> None:
    loaded = job(search={"layers": ["head"], "tune": ["lora", "full"], "lora_rank": [8]})
    assert names(search_choices(loaded, base("tiny"), 0)) == [("head", "lora", 8), ("head", "full", None)]


def test_rates_by_method(base: Any, job: Any) -> None:
    search: dict[str, Any] = {"layers": ["head", "last:1"], "tune": ["full", "lora"], "learning_rate": {"lora": [1e-3, 1e-1]}}
    rates = [c.rates for c in search_choices(job(search=search), base("tiny"), 0)]
    assert rates == [pytest.approx(r) for r in ((1e-4, 1e-2), (1e-3, 1e-1), (1e-4, 1e-2), (1e-3, 1e-1))]
    search["learning_rate"]["full"] = [3e-5, 3e-4]
    fresh = search_choices(job(task="classify", search=search), base("tiny"), 3)
    assert fresh[0].rates == pytest.approx((3e-4, 3e-3)), "a new classifier alone takes ten times the rate"
    assert fresh[1].rates == pytest.approx((3e-5, 3e-4))


def test_a_policy_beyond_the_base_is_told_where_it_is_written(base: Any, job: Any) -> None:
    loaded = replace(job(search={"layers": ["head", "last:9"]}), places={"search.layers[1]": (7, 18)})
    with pytest.raises(SelectionError, match="9 blocks; the base has 4") as told:
        search_choices(loaded, base("tiny"), 0)
    assert told.value.where.endswith("test.yaml:7:18")


@pytest.fixture(scope="module")
def search_plan(base: Any, job: Any, cores: Any, data: Any) -> SearchPlan:
    spec = job(search={"layers": ["last:1", "all"], "tune": ["lora"], "trials": 14, "algorithm": "grid"})
    search = make_plan(spec, base("tiny"), data(), cores(), job="sweep", spec_sha256="0" * 64).search
    assert search is not None
    return search


def test_the_grid_has_as_many_points_as_trials(search_plan: SearchPlan) -> None:
    points = grid_points(search_plan)
    assert len(points) == len(set(points)) == 14
    low, high = search_plan.options[0].learning_rate_low, search_plan.options[0].learning_rate_high
    rates = sorted(rate for index, rate in points if index == 0)
    assert rates == pytest.approx([low * (high / low) ** (k / 8) for k in range(1, 8)]), (
        "seven rates, evenly spaced in the logarithm"
    )


def test_more_trials_move_no_grid_point(search_plan: SearchPlan) -> None:
    fewer = search_plan.model_copy(update={"num_trials": 5})
    assert grid_points(search_plan)[:5] == grid_points(fewer)


def test_the_first_grid_point_is_the_middle(search_plan: SearchPlan) -> None:
    option = search_plan.options[0]
    assert grid_points(search_plan)[0] == (0, pytest.approx(math.sqrt(option.learning_rate_low * option.learning_rate_high)))


POINTS = [
    {"layers": "all", "learning_rate": 2e-3, "lora_rank": 8},
    {"layers": "last:1", "learning_rate": 1e-3},
    {"layers": "last:4", "learning_rate": 5e-4, "lora_rank": 8},
    {"layers": "last:1", "tune": "full", "learning_rate": 1e-4},
]


def test_a_fixed_list_becomes_its_choices_and_its_trials_in_order(base: Any, job: Any, cores: Any, data: Any) -> None:
    spec = job(search={"algorithm": "fixed", "points": POINTS})
    search = make_plan(spec, base("tiny"), data(), cores(), job="sweep", spec_sha256="0" * 64).search
    assert search is not None
    options = [(o.layers, o.tune, o.lora_rank, o.learning_rate_low, o.learning_rate_high) for o in search.options]
    assert options == [
        ("all", "lora", 8, 5e-4, 2e-3),
        ("last:1", "lora", 16, 1e-3, 1e-3),
        ("last:1", "full", None, 1e-4, 1e-4),
    ], "on four blocks last:4 is all"
    assert search.points == tuple(
        PlannedPoint(option=option, learning_rate=rate) for option, rate in ((0, 2e-3), (1, 1e-3), (0, 5e-4), (2, 1e-4))
    )
    assert search.num_trials == 4, "no more trials than points"


def test_trials_bound_a_fixed_list(base: Any, job: Any, cores: Any, data: Any) -> None:
    spec = job(search={"algorithm": "fixed", "points": POINTS, "trials": 2})
    search = make_plan(spec, base("tiny"), data(), cores(), job="sweep", spec_sha256="0" * 64).search
    assert search is not None
    assert search.num_trials == 2


def test_a_point_beyond_the_base_is_told_where_it_is_written(base: Any, job: Any) -> None:
    points = [*POINTS, {"layers": "last:9", "learning_rate": 1e-3}]
    loaded = replace(job(search={"algorithm": "fixed", "points": points}), places={"search.points[4].layers": (9, 3)})
    with pytest.raises(SelectionError, match="9 blocks; the base has 4") as told:
        search_choices(loaded, base("tiny"), 0)
    assert told.value.where.endswith("test.yaml:9:3")


def test_a_decay_counts_only_where_blocks_below_the_top_learn(base: Any, job: Any) -> None:
    search = {"layers": ["head", "last:1", "last:2"], "tune": ["full"], "layer_decay": [1.0, 0.8]}
    found = [(c.selection.policy, str(c.remedies)) for c in search_choices(job(search=search), base("tiny"), 0)]
    assert found == [("head", ""), ("last:1", ""), ("last:2", ""), ("last:2", "decay 0.8")]


def test_an_anchor_counts_only_where_something_of_the_base_learns(base: Any, job: Any) -> None:
    anchors = ["none", {"kind": "l2sp", "strength": 30}, {"kind": "product", "strength": 2}]
    search = {"layers": ["head", "last:1"], "tune": ["lora", "full"], "lora_rank": [4], "anchor": anchors}
    choices = search_choices(job(task="classify", search=search), base("tiny"), 3)
    found = [(c.selection.policy, c.selection.tune, str(c.remedies)) for c in choices]
    assert found == [
        ("head", "full", ""),
        ("last:1", "lora", ""),
        ("last:1", "lora", "product 2"),
        ("last:1", "full", ""),
        ("last:1", "full", "l2sp 30"),
    ]
