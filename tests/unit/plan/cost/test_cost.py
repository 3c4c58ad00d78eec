"""What a run costs: operations and their parts, hours before and after early stopping, money, disk."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.errors import PlanError
from orchestrator.plan import make_plan
from orchestrator.plan.cost.accelerators import peak_flops
from orchestrator.plan.cost.choices import scored_flops
from orchestrator.plan.cost.estimate import ACHIEVED_SHARE, expected_rungs, expected_steps
from orchestrator.plan.explain import trials_within
from orchestrator.plan.schedule import follow_up_rung_steps
from orchestrator.plan.values import ClusterDescription, RunPlan, SearchPlan


@pytest.fixture(scope="session")
def plan(base: Any, job: Any, data: Any) -> Any:
    """A plan from a base's name, a cluster, and the sections of a spec."""

    def build(name: Any, cluster: ClusterDescription, *, kind: str = "sweep", size: Any = None, **sections: Any) -> RunPlan:
        return make_plan(
            job(**sections),
            base(name) if isinstance(name, str) else name,
            size or data(),
            cluster,
            job=kind,
            spec_sha256="0" * 64,
        )  # type: ignore[arg-type]

    return build


@pytest.mark.parametrize(("rungs", "steps"), [((90,), 90), ((10, 30, 90), 10 + 20 / 3 + 60 / 9)])
def test_early_stopping_halves_the_expected_steps(rungs: tuple[int, ...], steps: float) -> None:
    search = SearchPlan(
        options=(), num_trials=9, algorithm="random", scheduler="asha", rung_steps=rungs, total_steps=90,
        reduction_factor=3, concurrent_trials=1,
    )  # fmt: skip
    assert expected_steps(search) == pytest.approx(steps)
    assert expected_rungs(search) == pytest.approx({1: 1, 3: 1 + 1 / 3 + 1 / 9}[len(rungs)])


def part(found: RunPlan, name: str) -> float:
    assert found.cost is not None
    return {part.name: part.amount for part in found.cost.operations}[name]


def test_hours_are_operations_over_the_rate(plan: Any, gpus: Any) -> None:
    found = plan("8b", gpus(), quantize="nf4")
    cost = found.cost
    operations = sum(each.amount for each in cost.operations)
    assert cost.rate.flops == peak_flops("H100-80GB") * ACHIEVED_SHARE
    assert cost.gpu_hours == pytest.approx(operations / cost.rate.flops / 3600)
    assert (found.gpu_hours, found.disk_bytes) == (cost.gpu_hours, cost.disk_bytes)
    assert cost.core_hours is None
    assert cost.price is None


def test_the_trials_take_their_steps_at_the_mean_of_their_options(plan: Any, gpus: Any) -> None:
    found = plan("8b", gpus(), search={"layers": ["last:2", "all"], "trials": 10, "budget": 0.5}, quantize="nf4")
    per_token = [option.flops_per_token for option in found.cost.options]
    assert per_token[0] < per_token[1]
    tokens = found.total_tokens / found.total_steps
    assert part(found, "trials") == pytest.approx(10 * sum(per_token) / 2 * expected_steps(found.search) * tokens)
    assert part(found, "refit") == pytest.approx(per_token[1] * found.total_tokens)
    assert found.cost.operations_refit == part(found, "refit")


def test_early_stopping_saves_hours_and_money(plan: Any, gpus: Any) -> None:
    search = {"layers": ["last:2"], "trials": 9}
    found = plan("8b", gpus(), quantize="nf4", search=search, resources={"gpu_hour_price": 2.0})
    cost = found.cost
    assert cost.gpu_hours < 0.7 * cost.gpu_hours_without_stopping
    assert cost.price == pytest.approx(2 * cost.gpu_hours)
    assert cost.price_without_stopping == pytest.approx(2 * cost.gpu_hours_without_stopping)
    patient = plan("8b", gpus(), quantize="nf4", search={**search, "scheduler": "none"})
    assert patient.cost.gpu_hours == pytest.approx(patient.cost.gpu_hours_without_stopping)
    more_scoring = (
        (len(found.search.rung_steps) - 1) * part(patient, "scoring") + part(found, "controls") - part(patient, "controls")
    )
    expected = patient.cost.operations_without_stopping + more_scoring
    assert cost.operations_without_stopping == pytest.approx(expected), "it scores at every rung, and trains the same steps"


def test_gangs_side_by_side_save_wall_time_and_no_gpu_hours(plan: Any, gpus: Any) -> None:
    search, resources = {"layers": ["all"]}, {"cache_bytes": 0}
    one, eight = (plan("8b", gpus(each=each), quantize="nf4", search=search, resources=resources).cost for each in (1, 8))
    assert eight.gpu_hours == pytest.approx(one.gpu_hours)
    assert eight.wall_hours == pytest.approx(one.wall_hours / 8)


def test_gangs_share_the_stored_trunk_too(plan: Any, gpus: Any) -> None:
    search = {"layers": ["last:2"], "trials": 64}
    one, eight = (plan("8b", gpus(each=each), quantize="nf4", search=search) for each in (1, 8))
    assert part(eight, "trunk") == part(one, "trunk") > 0
    assert eight.gpu_hours == pytest.approx(one.gpu_hours)
    assert eight.cost.wall_hours == pytest.approx(one.cost.wall_hours / 8)
    without = plan("8b", gpus(each=1), quantize="nf4", search=search, resources={"cache_bytes": 0})
    assert one.cost.wall_hours < without.cost.wall_hours / 3


def test_a_sweep_takes_no_less_than_its_longest_trial(plan: Any, gpus: Any) -> None:
    search = {"trials": 8, "scheduler": "none", "layers": ["last:1", "last:2", "last:3", "all"]}
    found = plan("8b", gpus(), quantize="nf4", search=search).cost
    assert found.gpu_hours / 8 < found.wall_hours
    assert found.wall_hours * 3600 == pytest.approx(max(option.trial_seconds for option in found.options))


def test_one_training(plan: Any, gpus: Any) -> None:
    found = plan("8b", gpus(), kind="finetune", finetune={}, quantize="nf4")
    option = found.cost.options[0]
    assert part(found, "training") == pytest.approx(option.flops_per_token * found.total_tokens)
    assert found.cost.gpu_hours == found.cost.gpu_hours_without_stopping
    assert found.cost.wall_hours == pytest.approx(found.cost.gpu_hours / found.execution.ranks)


def test_only_supervised_positions_pay_for_the_head(plan: Any, gpus: Any, data: Any) -> None:
    whole, half = (
        plan("8b", gpus(), kind="finetune", finetune={}, quantize="nf4", size=data(supervised_share=share))
        for share in (1.0, 0.5)
    )
    flops = [{term.name: term.flops for term in found.cost.options[0].terms} for found in (whole, half)]
    assert flops[1]["forward, head"] == pytest.approx(flops[0]["forward, head"] / 2)
    assert flops[1]["forward, blocks"] == flops[0]["forward, blocks"]


def test_cores_have_core_hours_and_no_price(plan: Any, cores: Any) -> None:
    cost = plan("tiny", cores(4), resources={"gpu_hour_price": 2.0}).cost
    assert (cost.gpu_hours, cost.price) == (None, None)
    assert cost.core_hours > 0
    assert cost.wall_hours == pytest.approx(cost.core_hours / 4, rel=0.05)


def test_a_gpu_that_the_table_lacks(plan: Any, gpus: Any) -> None:
    found = plan("8b", gpus(name="Quantum 9000"), quantize="nf4", resources={"max_gpu_hours": 1e-9})
    assert (found.gpu_hours, found.cost.wall_hours, found.cost.options[0].trial_seconds) == (None, None, None)
    assert "GPU-hours unknown: the peak rate of Quantum 9000 is not in the table" in found.notes
    assert found.cost.operations_without_stopping > 0


def test_the_slowest_of_unlike_gpus_counts(plan: Any, gpus: Any) -> None:
    (fast,), (slow,) = gpus(1).nodes, gpus(1, name="NVIDIA A100-SXM4-80GB").nodes
    mixed = ClusterDescription(nodes=(fast, slow), source="test")
    assert plan("8b", mixed, quantize="nf4").cost.rate.peak_flops == 312e12


def test_the_price_of_the_cluster_file_and_of_the_spec(plan: Any, gpus: Any) -> None:
    (node,) = gpus().nodes
    dear, cheap = (node.model_copy(update={"gpu_hour_price": price}) for price in (4.0, 2.0))
    cluster = ClusterDescription(nodes=(dear, cheap.model_copy(update={"count": 3})), source="test")
    assert plan("tiny", cluster).cost.price_per_gpu_hour == pytest.approx((4 + 3 * 2) / 4)
    assert plan("tiny", cluster, resources={"gpu_hour_price": 9.0}).cost.price_per_gpu_hour == 9.0
    half_known = ClusterDescription(nodes=(dear, node), source="test")
    assert plan("tiny", half_known).cost.price_per_gpu_hour is None


@pytest.mark.parametrize("cache_bytes", [0, "auto"])
def test_the_head_alone_stops_at_the_last_rung(plan: Any, gpus: Any, base: Any, cache_bytes: Any) -> None:
    """Its scoring begins where its training does; the untouched base is scored whole."""
    half, whole = (
        plan("8b", gpus(), quantize="nf4", search={"budget": budget, "scheduler": "none"}, resources={"cache_bytes": cache_bytes})
        for budget in (0.5, 1.0)
    )
    untouched, head = (scored_flops(whole, base("8b"), cut) for cut in (0, base("8b").num_blocks))
    assert (head < untouched / 10) == (cache_bytes == "auto")
    trained = [part(found, "controls") - untouched - head for found in (half, whole)]
    assert trained[0] / trained[1] == pytest.approx(half.search.rung_steps[-1] / half.total_steps)


def test_shuffled_answers_cost_a_whole_training(plan: Any, gpus: Any) -> None:
    sections: dict[str, Any] = {"quantize": "nf4", "resources": {"gpu_hour_price": 2.0}}
    without = plan("8b", gpus(), **sections)
    found = plan("8b", gpus(), **sections, search={"controls": ["shuffled"]})
    whole = max(option.flops_per_token for option in found.cost.options) * found.total_tokens
    assert part(found, "shuffled") == pytest.approx(whole, rel=0.2)
    assert part(found, "shuffled") >= whole
    more = part(found, "shuffled") / found.cost.rate.flops / 3600
    assert found.cost.gpu_hours == pytest.approx(without.cost.gpu_hours + more)
    assert found.cost.price == pytest.approx(2 * found.cost.gpu_hours)
    assert found.cost.wall_hours == pytest.approx(without.cost.wall_hours + more / found.execution.ranks)
    hours = {"max_gpu_hours": without.gpu_hours * 1.0001}
    warned = plan("8b", gpus(), quantize="nf4", search={"controls": ["shuffled"]}, resources=hours)
    assert any("max_gpu_hours" in warning for warning in warned.warnings)


def test_a_learning_curve_costs_its_shares(plan: Any, gpus: Any, base: Any, data: Any) -> None:
    sections: dict[str, Any] = {"quantize": "nf4"}
    without = plan("8b", gpus(), **sections)
    found = plan("8b", gpus(), **sections, search={"learning_curve": True})
    assert "curve" not in {each.name for each in without.cost.operations}
    assert found.search.curve_shares == (0.0625, 0.125, 0.25, 0.5)
    training = max(option.flops_per_token for option in found.cost.options) * found.total_tokens
    scoring = max(scored_flops(found, base("8b"), option.selection.cut) for option in found.search.options)
    assert part(found, "curve") == pytest.approx(0.9375 * training + 4 * scoring)
    more = part(found, "curve") / found.cost.rate.flops / 3600
    assert found.cost.gpu_hours == pytest.approx(without.cost.gpu_hours + more)
    longest = max(more / found.num_gangs, more * 0.5 / 0.9375)  # half of the data, in one gang
    assert found.cost.wall_hours == pytest.approx(without.cost.wall_hours + longest / found.execution.ranks)
    few = plan("8b", gpus(), **sections, size=data(train_documents=500), search={"learning_curve": True})
    whole = max(option.flops_per_token for option in few.cost.options) * few.total_tokens
    steps = [math.ceil(share * few.total_steps) for share in few.search.curve_shares]
    scorings = sum(len(follow_up_rung_steps(few.search, few.total_steps, each)) for each in steps)
    assert scorings > 4, "with early stopping a share is scored as often as the searched trials are"
    scoring_few = max(scored_flops(few, base("8b"), option.selection.cut) for option in few.search.options)
    assert part(few, "curve") == pytest.approx(0.9375 * whole + scorings * scoring_few)
    short = plan("8b", gpus(), **sections, search={"learning_curve": True, "budget": 0.5})
    assert part(short, "curve") == pytest.approx(1.9375 * training + 5 * scoring), "nothing of the search has the full budget"


def test_too_few_documents_leave_the_curve_out_and_say_so(plan: Any, gpus: Any, data: Any) -> None:
    few = data().model_copy(update={"train_documents": 2})
    found = plan("8b", gpus(), size=few, quantize="nf4", search={"learning_curve": True})
    assert found.search.curve_shares == ()
    assert "curve" not in {each.name for each in found.cost.operations}
    assert any("search.learning_curve is skipped: 2 training documents" in warning for warning in found.warnings)


def test_the_winner_from_other_seeds_is_in_the_plan(plan: Any, gpus: Any, data: Any, base: Any) -> None:
    few = {"quantize": "nf4", "size": data(train_documents=500)}
    without, found = (plan("8b", gpus(nodes=2), **few, search={"repeats": repeats}) for repeats in (1, "auto"))
    assert (without.search.repeats, found.search.repeats) == (1, 5)
    assert plan("8b", gpus(), quantize="nf4", size=data(train_documents=501)).search.repeats == 1
    whole = max(option.flops_per_token for option in found.cost.options) * found.total_tokens
    assert part(found, "repeats") == pytest.approx(4 * (whole + len(found.search.rung_steps) * scored_flops(found, base("8b"))))
    more = part(found, "repeats") / found.cost.rate.flops / 3600
    assert found.cost.gpu_hours == pytest.approx(without.cost.gpu_hours + more)
    assert found.num_gangs > 4, "each training has a gang"
    assert found.cost.wall_hours == pytest.approx(without.cost.wall_hours + more / 4 / found.execution.ranks)


# -- EWC ---------------------------------------------------------------------------------------------------------------

EWC = {"kind": "ewc", "strength": 30}


def test_ewc_measures_once_for_each_selection_and_decay(plan: Any, gpus: Any, data: Any) -> None:
    """64 documents as long as a row, through all that a trial trains through, whatever is stored of the trunk."""
    search = {"layers": ["last:2", "all"], "tune": ["full"], "trials": 30}
    size = data(replay_tokens=10**6, supervised_share=0.5)
    one_row: dict[str, Any] = {"resources": {"ranks_per_gang": 8}, "train": {"tokens_per_step": 8 * 512}}

    def costs(**more: Any) -> RunPlan:
        return plan("8b", gpus(), **{"size": size, **one_row, **more, "search": {**search, **more["search"]}})

    without, found = (costs(search={"anchor": anchor}) for anchor in ([], ["none", EWC]))
    assert "fisher" not in {each.name for each in without.cost.operations}
    bare = costs(search={}, size=data(), resources={"ranks_per_gang": 8, "cache_bytes": 0})
    assert found.trunk is not None, "which the measurement does not begin from"
    per_token = [option.flops_per_token for option in bare.cost.options]
    tokens = 8 * 64 * 512  # every rank computes every document
    assert part(found, "fisher") == pytest.approx(tokens * sum(per_token))
    more = part(found, "fisher") / found.cost.rate.flops / 3600
    rest = sum(each.amount for each in found.cost.operations if each.name != "fisher") / found.cost.rate.flops / 3600
    assert found.cost.gpu_hours == pytest.approx(rest + more)
    decays = costs(search={"anchor": [EWC], "layer_decay": [1.0, 0.8]})
    assert part(decays, "fisher") == pytest.approx(2 * part(found, "fisher"))
    one = costs(search={"anchor": ["none", EWC], "trials": 1})
    assert part(one, "fisher") == pytest.approx(tokens * max(per_token)), "one trial has one selection"
    few = costs(search={"anchor": [EWC]}, size=data(replay_tokens=1000))
    assert part(few, "fisher") == pytest.approx(part(found, "fisher") * 1000 / (64 * found.execution.row_tokens))


def test_one_training_measures_once(plan: Any, gpus: Any, data: Any) -> None:
    train, size = {"anchor": EWC}, data(replay_tokens=10**6)
    found = plan("tiny", gpus(), kind="finetune", finetune={"tune": "full"}, train=train, size=size)
    (per_token,) = [option.flops_per_token for option in found.cost.options]
    assert part(found, "fisher") == pytest.approx(found.execution.ranks * 64 * 512 * per_token)
    assert found.cost.operations_without_stopping == sum(each.amount for each in found.cost.operations)


def test_another_seed_and_a_refit_in_another_layout_measure_again(plan: Any, gpus: Any, data: Any) -> None:
    sections: dict[str, Any] = {"size": data(replay_tokens=10**6), "train": {"tokens_per_step": 8192}}
    search = {"layers": ["all"], "tune": ["full"], "budget": 0.5, "repeats": 3}
    without, found = (plan("tiny", gpus(), **sections, search={**search, "anchor": anchor}) for anchor in ([], [EWC]))
    assert found.execution.ranks == 1 < found.refit_execution.ranks
    assert part(found, "repeats") - part(without, "repeats") == pytest.approx(2 * part(found, "fisher"))
    assert found.cost.operations_refit - without.cost.operations_refit == pytest.approx(
        found.refit_execution.ranks * part(found, "fisher")
    )
    alone = plan("tiny", gpus(), **sections, search={**search, "anchor": [EWC]}, resources={"gangs": 1})
    assert alone.refit_execution == alone.execution
    assert alone.cost.operations_refit == pytest.approx(without.cost.operations_refit)


# -- max_gpu_hours ----------------------------------------------------------------------------------------------------


def test_a_sweep_beyond_its_hours_says_how_many_trials_fit(plan: Any, gpus: Any) -> None:
    free = plan("8b", gpus(), quantize="nf4")
    assert not any("max_gpu_hours" in warning for warning in free.warnings)
    bounded = plan("8b", gpus(), quantize="nf4", resources={"max_gpu_hours": free.gpu_hours / 2})
    (said,) = [warning for warning in bounded.warnings if "max_gpu_hours" in warning]
    fit = trials_within(bounded, free.gpu_hours / 2)
    assert 8 <= fit <= 12
    assert f"about {fit} of its 24 trials fit" in said
    fewer = plan("8b", gpus(), quantize="nf4", search={"trials": fit}, resources={"max_gpu_hours": free.gpu_hours / 2})
    assert fewer.gpu_hours <= free.gpu_hours / 2
    assert not any("max_gpu_hours" in warning for warning in fewer.warnings)
    one_more = plan("8b", gpus(), quantize="nf4", search={"trials": fit + 1}, resources={"max_gpu_hours": free.gpu_hours / 2})
    assert one_more.gpu_hours > free.gpu_hours / 2


def test_hours_that_hold_no_trial(plan: Any, gpus: Any) -> None:
    found = plan("8b", gpus(), quantize="nf4", resources={"max_gpu_hours": 1e-6})
    assert any("not even the controls and one trial fit" in warning for warning in found.warnings)


def test_one_training_beyond_its_hours_is_refused(plan: Any, gpus: Any) -> None:
    with pytest.raises(PlanError, match=r"max_gpu_hours allows 0\.001") as caught:
        plan("8b", gpus(), kind="finetune", finetune={}, resources={"max_gpu_hours": 0.001})
    assert (caught.value.exit_code, caught.value.where) == (3, "resources.max_gpu_hours")


# -- disk -------------------------------------------------------------------------------------------------------------


def test_disk_holds_the_bundle_every_rung_and_what_may_go_on(plan: Any, cores: Any, base: Any) -> None:
    found = plan("tiny", cores(2), search={"layers": ["last:1", "last:2"], "trials": 6}, train={"dtype": "float32"})
    learn = [option.selection.num_trainable_parameters for option in found.search.options]
    disk = {each.name: each.amount for each in found.cost.disk}
    assert disk["bundle"] == found.cost.bundle_bytes == 2 * found.num_parameters
    assert base("tiny").tied
    assert disk["trials"] == pytest.approx(6 * expected_rungs(found.search) * 4 * sum(learn) / 2)
    assert disk["open trials"] == found.search.concurrent_trials * 12 * max(learn)
    assert disk["control head"] == 4 * len(found.search.rung_steps) * 512 * 64
    assert found.cost.checkpoint_bytes == (4 + 12) * max(learn)
    assert disk["intermediate checkpoints"] == 2 * found.cost.checkpoint_bytes
    assert disk["tokens"] == found.cost.cache_bytes == 5 * (400_000 + 40_000 + 16_384)
    assert found.disk_bytes == round(sum(disk.values()))
    one = plan("tiny", cores(2), kind="finetune", finetune={})
    assert {each.name for each in one.cost.disk} == {"bundle", "intermediate checkpoints", "tokens"}


def test_the_bundle_is_as_wide_as_the_base_is_stored_and_has_a_head_of_its_own(plan: Any, cores: Any, base: Any) -> None:
    """Tied weights are one tensor until the head learns; a base of float32 is merged in float32."""
    tied = plan("tiny", cores(2), search={"layers": ["last:1+head"]})
    assert tied.cost.bundle_bytes == 2 * tied.num_parameters + 2 * 512 * 64
    wide = base("tiny").model_copy(
        update={"tensors": {name: each.model_copy(update={"dtype": "F32"}) for name, each in base("tiny").tensors.items()}}
    )
    found = plan(wide, cores(2), search={"layers": ["last:1"]})
    assert found.cost.bundle_bytes == 4 * found.num_parameters
