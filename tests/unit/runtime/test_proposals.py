"""Proposals are pure: the same plan, seed, number and knowledge give the same trial."""

from __future__ import annotations

import itertools
import math

import pytest

from orchestrator.anatomy import LayerSelection
from orchestrator.plan.estimates import MemoryEstimate
from orchestrator.plan.values import PlannedPoint, SearchPlan, TrialOption
from orchestrator.runtime.proposals import Known, Proposal, num_initial, propose


def option(layers: str, tune: str, low: float, high: float) -> TrialOption:
    selection = LayerSelection(
        policy=layers,
        tune=tune,
        lora_rank=8 if tune == "lora" else None,
        trainable=(),
        adapted=(),
        frozen=(),
        cut=0,
        num_trainable_parameters=1,
    )
    return TrialOption(
        layers=layers,
        tune=tune,
        lora_rank=selection.lora_rank,
        selection=selection,
        memory=MemoryEstimate(terms=()),
        learning_rate_low=low,
        learning_rate_high=high,
    )


OPTIONS = tuple(
    option(layers, tune, *rates)
    for layers in ("head", "last:2", "all")
    for tune, rates in (("lora", (1e-4, 1e-2)), ("full", (1e-5, 1e-3)))
)


def search_plan(algorithm: str, trials: int = 24) -> SearchPlan:
    return SearchPlan(
        options=OPTIONS,
        num_trials=trials,
        algorithm=algorithm,
        scheduler="none",
        rung_steps=(9,),
        total_steps=9,
        reduction_factor=3,
        concurrent_trials=4,
    )


def loss_of(proposal: Proposal) -> float:
    """A made landscape: `all` with LoRA near 2e-3 is best."""
    penalty = {"all": 0.0, "last:2": 0.4, "head": 1.0}[OPTIONS[proposal.option].layers]
    return penalty + abs(math.log(proposal.learning_rate / 2e-3)) / 4


def run(search: SearchPlan, seed: int) -> list[Known]:
    known: list[Known] = []
    for number in range(search.num_trials):
        proposal = propose(search, seed, number, known)
        known.append(Known(proposal, loss_of(proposal)))
    return known


@pytest.mark.parametrize("algorithm", ["optuna", "random", "grid"])
def test_same_knowledge_same_proposals(algorithm: str) -> None:
    assert run(search_plan(algorithm), seed=3) == run(search_plan(algorithm), seed=3)


@pytest.mark.parametrize("algorithm", ["optuna", "random"])
def test_the_seed_matters(algorithm: str) -> None:
    assert run(search_plan(algorithm), seed=3) != run(search_plan(algorithm), seed=4)


@pytest.mark.parametrize("algorithm", ["optuna", "random", "grid"])
def test_rates_lie_in_their_options_range(algorithm: str) -> None:
    for entry in run(search_plan(algorithm), seed=1):
        chosen = OPTIONS[entry.proposal.option]
        assert chosen.learning_rate_low * 0.999 <= entry.proposal.learning_rate <= chosen.learning_rate_high * 1.001


def test_every_option_is_tried_before_the_sampler_learns() -> None:
    search = search_plan("optuna")
    first = [entry.proposal.option for entry in run(search, seed=5)[: num_initial(search)]]
    assert sorted(set(first)) == list(range(len(OPTIONS)))


def test_the_sampler_finds_what_random_search_finds_later() -> None:
    """Mean best loss over seeds: TPE with the initial design is better than random draws of the same number."""
    seeds = range(8)
    best = {
        algorithm: sum(min(entry.score for entry in run(search_plan(algorithm), seed)) for seed in seeds) / len(seeds)
        for algorithm in ("optuna", "random")
    }
    assert best["optuna"] < best["random"]


def run_side_by_side(search: SearchPlan, seed: int, *, liar: bool) -> list[Proposal]:
    """Four proposals at a time, none of which knows the others' scores."""
    made: list[Proposal] = []
    for number in range(search.num_trials):
        first = number - number % 4
        known = [Known(proposal, loss_of(proposal)) for proposal in made[:first]]
        made.append(propose(search, seed, number, known, made[first:] if liar else ()))
    return made


def num_near_duplicates(made: list[Proposal]) -> int:
    """Pairs of one batch, after the initial ones, with one option and rates within a tenth."""
    batches = [made[first : first + 4] for first in range(8, len(made), 4)]
    return sum(
        one.option == other.option and abs(math.log(one.learning_rate / other.learning_rate)) < 0.1
        for batch in batches
        for one, other in itertools.combinations(batch, 2)
    )


def test_proposals_made_at_one_time_keep_away_from_each_other() -> None:
    search, seeds = search_plan("optuna"), range(8)
    alone, together = (
        sum(num_near_duplicates(run_side_by_side(search, seed, liar=liar)) for seed in seeds) for liar in (False, True)
    )
    assert alone > 20
    assert together < alone / 4


def test_a_fixed_list_is_proposed_as_it_stands() -> None:
    points = (PlannedPoint(option=4, learning_rate=2e-3), PlannedPoint(option=0, learning_rate=1e-4))
    search = search_plan("fixed", trials=2).model_copy(update={"points": points})
    assert [entry.proposal for entry in run(search, seed=5)] == [Proposal(4, 2e-3), Proposal(0, 1e-4)]


SHARES = (0.0, 0.0, 0.5, 0.5, 1.0, 1.0)
"""Of OPTIONS: `head`, `last:2`, `all`, each with lora and full."""


@pytest.mark.parametrize("seed", range(4))
def test_the_first_proposals_go_to_the_largest_share_of_the_scores(seed: int) -> None:
    search = search_plan("optuna").model_copy(update={"shares": SHARES})
    first = [propose(search, seed, number, ()).option for number in range(num_initial(search))]
    assert sorted(first) == list(range(len(OPTIONS)))
    assert [SHARES[index] for index in first] == sorted(SHARES, reverse=True)
    assert first == [propose(search, seed, number, ()).option for number in range(num_initial(search))]


def test_options_with_equal_shares_keep_the_order_of_the_seed() -> None:
    unscored = search_plan("optuna")
    alike = unscored.model_copy(update={"shares": (0.3,) * len(OPTIONS)})
    for seed in range(4):
        for number in range(num_initial(unscored)):
            assert propose(alike, seed, number, ()) == propose(unscored, seed, number, ())


def test_scores_move_no_rate() -> None:
    """A number's place in its option's range is what it would be without scores."""
    search = search_plan("optuna")
    scored = search.model_copy(update={"shares": SHARES})

    def place(proposal: Proposal) -> float:
        chosen = OPTIONS[proposal.option]
        low, high = math.log(chosen.learning_rate_low), math.log(chosen.learning_rate_high)
        return (math.log(proposal.learning_rate) - low) / (high - low)

    for number in range(num_initial(search)):
        assert place(propose(scored, 2, number, ())) == pytest.approx(place(propose(search, 2, number, ())))


@pytest.mark.parametrize("prior", ["far", "few"])
def test_upper_blocks_come_before_lower_ones_where_the_target_lies_far(prior: str) -> None:
    blocks = {"first:1": (0,), "all": tuple(range(8)), "last:4": (4, 5, 6, 7), "last:1": (7,), "blocks:4": (4,), "head": ()}
    options = tuple(option(layers, "lora", 1e-4, 1e-2) for layers in blocks)
    options = tuple(
        each.model_copy(update={"selection": each.selection.model_copy(update={"blocks": blocks[each.layers]})})
        for each in options
    )
    search = search_plan("optuna").model_copy(update={"options": options, "prior": prior})
    order = [options[propose(search, 5, number, []).option].layers for number in range(len(options))]
    assert order == ["head", "last:1", "blocks:4", "last:4", "first:1", "all"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shares", [(), (0.0, 0.0, 0.2, 0.2, 0.9, 0.9)], ids=["unscored", "scored"])
def test_with_few_examples_lora_comes_before_full_on_the_same_blocks(seed: int, shares: tuple[float, ...]) -> None:
    blocks = {"head": (), "last:2": (6, 7), "all": tuple(range(8))}
    options = tuple(
        each.model_copy(update={"selection": each.selection.model_copy(update={"blocks": blocks[each.layers]})})
        for each in reversed(OPTIONS)
    )
    search = search_plan("optuna").model_copy(update={"options": options, "prior": "few", "shares": shares[::-1]})
    order = [options[propose(search, seed, number, []).option] for number in range(num_initial(search))]
    assert [(each.layers, each.tune) for each in order] == [(layers, tune) for layers in blocks for tune in ("lora", "full")]
