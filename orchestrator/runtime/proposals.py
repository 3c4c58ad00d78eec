"""Propose the next trial: proposal n is a pure function of the plan, the seed, n, and the results known so far.

So a resumed sweep proposes the same trials again when the same results are known, and a recorded trial is never drawn
twice. Tune asks through `RecordedSearch` in search.py.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.plan import grid_points
from orchestrator.plan.search_space import van_der_corput
from orchestrator.plan.values import SearchPlan, TrialOption

NUM_CANDIDATES = 8
"""Optuna's default of 24 is for hundreds of trials: with a dozen it copies the single best."""


@dataclass(frozen=True)
class Proposal:
    """An option of the plan (by index) and a learning rate."""

    option: int
    learning_rate: float


@dataclass(frozen=True)
class Known:
    """A finished, stopped or failed trial: what was proposed and how it scored (lower is better)."""

    proposal: Proposal
    score: float


def propose(search: SearchPlan, seed: int, number: int, known: Sequence[Known], pending: Sequence[Proposal] = ()) -> Proposal:
    """Return the proposal of this number.

    `fixed` takes the spec's points in order. `grid` walks log-spaced rates of every option. `random` draws an option
    and a log-uniform rate. `optuna` first visits every option once, those with the highest scores first where the blocks
    were scored, with rates spread evenly over its range (so that no layer policy is left untried by chance), then asks Optuna's
    TPE sampler (Bergstra et al. 2011) with all known results. A `pending` proposal, which has no score yet, counts as bad there
    ("constant liar"), so that simultaneous proposals differ.
    """
    if search.algorithm == "fixed":
        point = search.points[number]
        return Proposal(point.option, point.learning_rate)
    if search.algorithm == "grid":
        option, rate = grid_points(search)[number]
        return Proposal(option, rate)
    if search.algorithm == "random":
        return _random(search, seed, number)
    if number < num_initial(search):
        return _initial(search, seed, number)
    return _tpe(search, seed, number, known, pending)


def num_initial(search: SearchPlan) -> int:
    """Return the number of proposals that cover the space before the sampler is used: every option once, at most half of the
    trials."""
    return min(max(len(search.options), 4), math.ceil(search.num_trials / 2))


def _uniform(seed: int, number: int, purpose: str) -> float:
    digest = hashlib.sha256(f"{seed}/{number}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _between(option: TrialOption, share: float) -> float:
    """Return the rate at `share` of the way from low to high, on a log scale."""
    low, high = math.log(option.learning_rate_low), math.log(option.learning_rate_high)
    return math.exp(low + share * (high - low))


def _random(search: SearchPlan, seed: int, number: int) -> Proposal:
    option = int(_uniform(seed, number, "option") * len(search.options))
    return Proposal(option, _between(search.options[option], _uniform(seed, number, "rate")))


def _initial(search: SearchPlan, seed: int, number: int) -> Proposal:
    """Options in `_order`; rates by van der Corput's sequence in base 2, turned by the seed."""
    order = _order(search, seed)
    option = order[number % len(order)]
    share = (van_der_corput(number + 1) + _uniform(seed, 0, "turn")) % 1.0
    if search.prior == "near":  # small rates first; the sampler sees the whole range later
        share /= 2
    return Proposal(option, _between(search.options[option], share))


def _order(search: SearchPlan, seed: int) -> list[int]:
    """Return every option once: first those that the domain shift advises, among these first those whose blocks have the
    largest share of the summed scores; ties in a seeded order.

    So a choice of blocks comes before its subsets, and an option that trains no block comes last. Without scores all are equal.
    If the target lies near, more blocks come before fewer. If it lies far or examples are few, the option with the most frozen
    blocks below comes first (the head before any block), and among these fewer blocks before more. Ties go to LoRA before full
    fine-tuning if examples are few, since it trains fewer parameters.
    """
    shares = search.shares or (0.0,) * len(search.options)

    def advised(blocks: Sequence[int]) -> tuple[float, int]:
        if search.prior in ("far", "few"):
            return -min(blocks, default=math.inf), len(blocks)
        return 0.0, -len(blocks) if search.prior == "near" else 0

    def key(index: int) -> tuple[tuple[float, int], float, bool, float]:
        option = search.options[index]
        costly = search.prior == "few" and option.tune == "full"
        return advised(option.selection.blocks), -shares[index], costly, _uniform(seed, index, "order")

    return sorted(range(len(search.options)), key=key)


def _tpe(search: SearchPlan, seed: int, number: int, known: Sequence[Known], pending: Sequence[Proposal]) -> Proposal:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=_sampler_seed(seed, number),
            n_startup_trials=0,
            multivariate=True,
            group=True,
            n_ei_candidates=NUM_CANDIDATES,
            constant_liar=True,
        )
    study = optuna.create_study(sampler=sampler)
    for entry in known:
        study.add_trial(_as_optuna(search, entry.proposal, entry.score))
    for proposal in pending:
        study.add_trial(_as_optuna(search, proposal, None))
    trial = study.ask()
    names = list(dict.fromkeys(option.layers for option in search.options))
    layers = trial.suggest_categorical("layers", names)
    indices = [index for index, option in enumerate(search.options) if option.layers == layers]
    index = indices[0]
    if len(indices) > 1:
        index = trial.suggest_categorical(f"way/{layers}", indices)
    option = search.options[index]
    rate = trial.suggest_float(f"rate/{option.tune}", option.learning_rate_low, option.learning_rate_high, log=True)
    return Proposal(index, rate)


def _as_optuna(search: SearchPlan, proposal: Proposal, score: float | None):
    """Return a finished Optuna trial, or a running one if there is no score."""
    import optuna

    option = search.options[proposal.option]
    names = list(dict.fromkeys(other.layers for other in search.options))
    indices = [index for index, other in enumerate(search.options) if other.layers == option.layers]
    parameters: dict[str, object] = {"layers": option.layers, f"rate/{option.tune}": proposal.learning_rate}
    spaces: dict[str, optuna.distributions.BaseDistribution] = {
        "layers": optuna.distributions.CategoricalDistribution(names),
        f"rate/{option.tune}": optuna.distributions.FloatDistribution(
            option.learning_rate_low, option.learning_rate_high, log=True
        ),
    }
    if len(indices) > 1:
        parameters[f"way/{option.layers}"] = proposal.option
        spaces[f"way/{option.layers}"] = optuna.distributions.CategoricalDistribution(indices)
    state = optuna.trial.TrialState.RUNNING if score is None else optuna.trial.TrialState.COMPLETE
    return optuna.trial.create_trial(state=state, params=parameters, distributions=spaces, value=score)


def _sampler_seed(seed: int, number: int) -> int:
    return int(_uniform(seed, number, "sampler") * 2**31)
