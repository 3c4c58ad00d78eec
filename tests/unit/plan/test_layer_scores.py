"""The probe in the plan: whether there is one, what it may cost, and what the scores make of the options."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import PlanError
from orchestrator.plan import make_plan, make_trial, train_rung, with_scores, work_context
from orchestrator.plan.cost.choices import option_terms
from orchestrator.plan.measurements import MOST_OF_A_TRIAL, score_shares
from orchestrator.plan.values import RunPlan
from orchestrator.work.execution import DataPaths, TrainSettings
from orchestrator.work.measurements import LayerScores

SCORES = LayerScores(relative_gradient_norms=(0.1, 0.4, 0.2, 0.3), signal_to_noise=(None,) * 4, num_batches=1)


@pytest.fixture
def planned(base: Any, job: Any, cores: Any, data: Any) -> Any:
    def plan(
        layers: list[str], *, shape: str = "tiny", cluster: Any = None, size: Any = None, kind: Any = "sweep", **sections: Any
    ) -> RunPlan:
        search = {"layers": layers, **sections.pop("search", {})}
        loaded = job(search=search, **sections)
        return make_plan(loaded, base(shape), size or data(), cluster or cores(), job=kind, spec_sha256="0" * 64)

    return plan


@pytest.mark.parametrize(
    ("layers", "search", "there", "required"),
    [
        (["last:1", "all"], {}, True, False),
        (["last:1", "all"], {"probe": False}, False, False),
        (["last:1", "last:1+head", "head"], {}, False, False),
        (["last:2"], {"tune": ["lora", "full"], "lora_rank": [4, 8]}, False, False),
        (["top:0.5"], {}, True, True),
        (["top:1.0"], {}, False, False),
    ],
)
def test_blocks_are_scored_where_there_is_a_choice(
    planned: Any, layers: list[str], search: dict[str, Any], there: bool, required: bool
) -> None:
    probe = planned(layers, search=search).probe
    assert (probe is not None) is there
    if probe is not None:
        assert probe.required is required


def test_a_finetune_is_scored_for_a_policy_by_score_alone(planned: Any) -> None:
    assert planned(["all"], kind="finetune", finetune={"layers": "last:2"}).probe is None
    plan = planned(["all"], kind="finetune", finetune={"layers": "top:0.25"})
    assert plan.probe is not None
    assert plan.probe.required
    assert plan.finetune is not None
    assert plan.finetune.selection.pending


def test_the_probe_takes_no_more_than_its_share_of_the_cheapest_trial(planned: Any, data: Any, base: Any) -> None:
    for steps in (1, 2, 5, 45, 900):
        size = data(train_tokens=steps * 8000, steps_per_epoch=steps)
        plan = planned(["head", "last:1", "all"], size=size, train={"epochs": 1})
        probe = plan.probe
        assert probe is not None
        assert 1 <= probe.num_batches <= 4
        assert 1 <= probe.rows <= plan.execution.micro_batch_rows
        assert probe.share_of_trial <= MOST_OF_A_TRIAL or (probe.num_batches, probe.rows) == (1, 1)
        cheapest = min(
            sum(term.flops for term in option_terms(plan, base("tiny"), option.selection)) for option in plan.search.options
        )
        every = sum(term.flops for term in option_terms(plan, base("tiny"), all_blocks(plan)))
        tokens = probe.num_batches * probe.rows * plan.execution.row_tokens
        assert probe.share_of_trial == pytest.approx(every * tokens / (cheapest * plan.total_tokens), rel=0.3)
    assert (probe.num_batches, probe.share_of_trial < MOST_OF_A_TRIAL) == (4, True)


def all_blocks(plan: RunPlan) -> Any:
    return next(option.selection for option in plan.search.options if option.layers == "all")


def test_a_budget_below_the_whole_makes_the_probe_smaller(planned: Any, data: Any) -> None:
    size = data(train_tokens=24 * 8000, steps_per_epoch=24)
    whole, part = (planned(["last:1", "all"], size=size, search={"budget": budget}).probe for budget in (1.0, 0.1))
    assert part.num_batches * part.rows < whole.num_batches * whole.rows


def test_the_plan_weighs_the_worst_case_and_says_so(planned: Any) -> None:
    plan = planned(["top:0.5"], search={"tune": ["lora", "full"]})
    first, worst = plan.search.options[1], planned(["blocks:0,1"], search={"tune": ["full"]}).search.options[0]
    assert first.memory.total_bytes == worst.memory.total_bytes
    assert any("top:0.5 is planned as its worst case, 2 of the largest blocks" in reason for reason in plan.reasons)
    assert any("is scored before the search" in reason for reason in plan.reasons)


def test_zero3_refuses_a_policy_by_score_and_scores_nothing(planned: Any, gpus: Any) -> None:
    resources = {"ranks_per_gang": 2, "zero": 3}
    with pytest.raises(PlanError, match=r"top:0.5 needs scored blocks.*ZeRO-3") as told:
        planned(["last:1", "top:0.5"], cluster=gpus(), resources=resources)
    assert "last:2" in told.value.remedy
    plan = planned(["last:1", "all"], cluster=gpus(), resources=resources)
    assert plan.probe is None
    assert any("not scored" in note for note in plan.notes)


def test_a_run_whose_blocks_are_scored_may_go_on_under_zero3(base: Any, job: Any, gpus: Any, data: Any) -> None:
    loaded = job(search={"layers": ["last:1", "top:0.5"]}, resources={"ranks_per_gang": 2, "zero": 3})
    plan = make_plan(loaded, base("tiny"), data(), gpus(), job="sweep", spec_sha256="0" * 64, scores=SCORES)
    assert plan.probe is None
    assert plan.search.options[1].selection.blocks == (1, 3)


def test_where_memory_is_short_the_lowest_blocks_are_not_scored(planned: Any, gpus: Any, base: Any) -> None:
    small = gpus(nodes=1, each=1, memory=24)
    plan = planned(["last:1", "last:2"], shape="8b", cluster=small, quantize="nf4")
    assert plan.probe is not None
    assert 0 < plan.probe.floor < 32
    assert any(f"blocks 0 to {plan.probe.floor - 1} do not fit" in reason for reason in plan.reasons)
    matrices = [[base("8b").tensors[name].num_elements for name in block] for block in base("8b").linears]
    assert 4 * sum(map(sum, matrices[plan.probe.floor :])) < 24 * 2**30
    assert planned(["last:1", "last:2"], shape="8b", cluster=gpus(each=1), quantize="nf4").probe.floor == 0
    with pytest.raises(PlanError, match="gradient sums of only"):
        planned(["top:0.9"], shape="8b", cluster=small, quantize="nf4")


def test_scores_resolve_the_policies_and_leave_every_option_in_its_place(planned: Any, base: Any, job: Any) -> None:
    plan = planned(["head", "top:0.5", "last:1", "top:0.25+head"], search={"tune": ["lora", "full"], "lora_rank": [4]})
    spec = job(search={"layers": ["top:0.5"]}).spec
    scored: Any = with_scores(plan, spec, base("tiny"), SCORES)
    names = [(option.layers, option.tune) for option in plan.search.options]
    assert names == [(option.layers, option.tune) for option in scored.search.options]
    by_name = {option.layers: option.selection for option in scored.search.options}
    assert [by_name[name].blocks for name in ("head", "top:0.5", "last:1", "top:0.25+head")] == [(), (1, 3), (3,), (1,)]
    assert not any(option.selection.pending for option in scored.search.options)
    shares = dict(zip((option.layers for option in scored.search.options), scored.search.shares, strict=True))
    assert shares == pytest.approx({"head": 0.0, "top:0.5": 0.7, "last:1": 0.3, "top:0.25+head": 0.4})
    assert with_scores(scored, spec, base("tiny"), SCORES) == scored
    assert plan.trunk is None or 1 not in plan.trunk.cuts
    assert scored.trunk is not None
    assert 1 in scored.trunk.cuts, "a policy by score has found its cut"
    assert scored.notes[-1].startswith("after scoring, activations entering blocks")


def test_a_failed_probe_leaves_the_plan_as_it_is(planned: Any, base: Any, job: Any) -> None:
    plan, spec = planned(["last:1", "all"]), job(search={"layers": ["all"]}).spec
    assert with_scores(plan, spec, base("tiny"), LayerScores(failed="it broke")) == plan
    assert with_scores(plan, spec, base("tiny"), None) == plan


def test_shares_without_a_score() -> None:
    assert score_shares([(0, 1), (1,), ()], [None, 0.5]) == (1.0, 1.0, 0.0)
    assert score_shares([(0,)], [0.0, 0.0]) == (0.0,)


def test_nobody_is_given_a_selection_that_is_pending(planned: Any) -> None:
    plan = planned(["top:0.5"])
    option = plan.search.options[0]
    settings = TrainSettings(warmup=0, schedule="constant", weight_decay=0, grad_clip=0, tokens_per_step=512)
    context = work_context(plan, settings=settings, data=DataPaths(train="t", eval="e"), metric="loss")
    with pytest.raises(AssertionError, match="scored before"):
        train_rung(plan, context, make_trial(plan, option, 1e-3, 0, 0), option.selection, folder="f", stop_step=1)
