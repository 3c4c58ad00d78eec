"""Whether blocks are compiled: what speaks against it, whether it is measured, and what follows from the measurement."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import PlanError
from orchestrator.plan import make_plan
from orchestrator.plan.measurements import KIND_SECONDS, WORTH, choice_of, gang_seconds, standing_choice, with_choice
from orchestrator.plan.values import RunPlan
from orchestrator.work.measurements import CompileChoice, CompilePlan, CompileTimes


@pytest.fixture
def planned(base: Any, job: Any, cores: Any, data: Any) -> Any:
    """A sweep over `last:2` and `all` on two cores, as long as `epochs` make it."""

    def plan(epochs: float = 2, *, cluster: Any = None, kind: Any = "sweep", anatomy: Any = None, **sections: Any) -> RunPlan:
        search = {"layers": ["last:2", "all"], "scheduler": "none", **sections.pop("search", {})}
        loaded = job(search=search, train={"epochs": epochs}, **sections)
        return make_plan(
            loaded,
            anatomy or base("tiny"),
            data(num_classes=3 if sections.get("task") == "classify" else 0),
            cluster or cores(),
            job=kind,
            spec_sha256="0" * 64,
        )

    return plan


LONG = 1e5


def note(plan: RunPlan) -> str:
    return next((line for line in plan.notes if "compil" in line), "")


def test_a_short_search_is_not_measured_and_a_long_one_is(planned: Any) -> None:
    short, long = planned(), planned(LONG)
    assert short.compiling.option is None
    assert "a gang trains for" in note(short)
    assert (long.compiling.option, long.compiling.num_kinds) == (1, 1)
    assert long.compiling.gang_seconds == pytest.approx(gang_seconds(long))
    assert long.compiling.gang_seconds >= WORTH * KIND_SECONDS
    assert "is measured before the search" in note(long)
    assert not long.execution.compiled, "nothing is chosen yet"


def test_code_is_needed_for_each_way_of_learning(planned: Any) -> None:
    plan = planned(LONG, search={"tune": ["lora", "full"], "lora_rank": [4, 8], "layers": ["head", "last:1", "all"]})
    assert plan.compiling.num_kinds == 3
    assert plan.search.options[plan.compiling.option].layers == "all"


def test_a_gang_trains_for_its_part_of_the_search(planned: Any) -> None:
    one, two = (planned(LONG, resources={"gangs": gangs}) for gangs in (1, 2))
    per_core = [plan.compiling.gang_seconds * plan.execution.threads_per_rank * plan.num_gangs for plan in (one, two)]
    assert per_core[0] == pytest.approx(per_core[1])


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"quantize": "nf4"}, "nf4"),
        ({"data": {"pack": False}}, "not packed"),
        ({"task": "classify"}, "not packed"),
        ({"resources": {"zero": 2}}, "DeepSpeed"),
    ],
)
def test_what_cannot_be_compiled_is_told_and_refused_where_it_is_asked_for(
    planned: Any, sections: dict[str, Any], why: str
) -> None:
    plan = planned(LONG, **sections)
    assert plan.compiling.option is None
    assert why in note(plan)
    resources = {**sections.get("resources", {}), "compile": "on"}
    with pytest.raises(PlanError, match=why) as told:
        planned(LONG, **{**sections, "resources": resources})
    assert told.value.where == "resources.compile"


def test_what_drops_out_is_not_compiled(planned: Any, base: Any) -> None:
    plan = planned(LONG, anatomy=base("tiny").model_copy(update={"dropout": "attention_dropout 0.1"}))
    assert "attention_dropout 0.1" in note(plan)


def test_trials_that_share_batches_are_not_compiled_unless_asked(planned: Any) -> None:
    shared = planned(LONG, resources={"max_fused": 4})
    assert shared.search.max_fused > 1
    assert "share batches" in note(shared)
    asked = planned(resources={"max_fused": 4, "compile": "on"})
    assert asked.search.max_fused == 1
    assert asked.compiling.required
    assert asked.compiling.option is not None


def test_off_measures_nothing_and_says_nothing(planned: Any) -> None:
    plan = planned(LONG, resources={"compile": "off"})
    assert plan.compiling is None
    assert note(plan) == ""


def test_where_the_rate_is_unknown_nothing_is_measured(planned: Any, gpus: Any) -> None:
    plan = planned(LONG, cluster=gpus(nodes=1, each=1, name="some GPU"), resources={"max_fused": 1})
    assert plan.compiling.option is None
    assert "unknown" in note(plan)


@pytest.mark.parametrize("asked", ["auto", "on", "off"])
def test_one_training_is_compiled_where_it_is_asked_for(planned: Any, asked: str) -> None:
    plan = planned(kind="finetune", finetune={"layers": "last:2"}, resources={"compile": asked})
    assert plan.refit_execution.compiled is (asked == "on")
    assert plan.compiling is None


@pytest.mark.parametrize(
    ("compiled", "compile_seconds", "gang_s", "pays"),
    [
        (0.5, 100.0, 1000.0, True),
        (0.5, 300.0, 1000.0, False),  # two kinds take 600 s and save 500
        (0.94, 10.0, 1000.0, True),
        (0.96, 0.0, 1e9, False),  # too little to be sure of
        (1.5, 0.0, 1e9, False),
    ],
)
def test_compiled_blocks_pay_where_they_save_more_than_they_take(
    compiled: float, compile_seconds: float, gang_s: float, pays: bool
) -> None:
    plan = CompilePlan(option=0, reason="", num_kinds=2, gang_seconds=gang_s)
    times = CompileTimes(eager_seconds=1.0, compiled_seconds=compiled, compile_seconds=compile_seconds)
    choice = choice_of(plan, times)
    assert (choice.compiled, choice.times) == (pays, times)
    assert f"{compiled:.2f} of 1000.0 ms" in choice.reason
    assert choice_of(plan.model_copy(update={"required": True}), times).compiled


def test_what_is_not_full_saves_nothing() -> None:
    plan = CompilePlan(option=0, reason="", num_kinds=1, gang_seconds=1000.0)
    times = CompileTimes(eager_seconds=1.0, compiled_seconds=0.5, compile_seconds=100.0)
    assert choice_of(plan, times.model_copy(update={"full_share": 0.21})).compiled
    assert not choice_of(plan, times.model_copy(update={"full_share": 0.19})).compiled


def test_what_failed_is_not_compiled_whoever_asks() -> None:
    times = CompileTimes(failed="there is no C++ compiler (g++)")
    for required in (False, True):
        choice = choice_of(CompilePlan(option=0, reason="", num_kinds=1, gang_seconds=1e9, required=required), times)
        assert not choice.compiled
        assert "no C++ compiler" in choice.reason


def test_a_choice_stands_until_something_else_is_asked_for() -> None:
    yes, no = (CompileChoice(compiled=compiled, reason="measured") for compiled in (True, False))
    assert standing_choice("auto", None) is standing_choice("on", None) is None
    assert standing_choice("auto", yes) == standing_choice("on", yes) == yes
    assert standing_choice("auto", no) == no
    assert standing_choice("on", no) is None
    off = standing_choice("off", yes)
    assert off is not None
    assert not off.compiled


def test_the_choice_is_the_whole_runs(planned: Any, cores: Any) -> None:
    plan = planned(LONG, resources={"max_fused": 4}, cluster=cores(1))
    assert with_choice(plan, None) is plan
    yes = with_choice(plan, CompileChoice(compiled=True, reason=""))
    assert (yes.execution.compiled, yes.refit_execution.compiled, yes.compiling) == (True, True, None)
    assert yes.search is not None
    assert yes.search.max_fused == 1
    assert yes.search.concurrent_trials < plan.search.concurrent_trials
    no = with_choice(plan, CompileChoice(compiled=False, reason=""))
    assert (no.execution, no.refit_execution, no.search) == (plan.execution, plan.refit_execution, plan.search)
