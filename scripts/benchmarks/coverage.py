"""Measure the coverage of confidence intervals on simulated losses with a known difference.

    scripts/bench coverage [--simulations 2000] [--resamples 2000] [--flips 2000] [--seed 0] [--json]

interval: 200 examples of two models, the candidate 0.1 nats better on average; how often the bootstrap's 95% interval holds what
    that comes to. 93% to 97% is asked for.
sign flips: 12 to 100 examples of two models that are equally good; how often the sign-flip test at 5% calls them different. At
    most 5% is asked for, within three standard errors of so many simulations.

Losses of an example are skewed, as mean losses are: gamma, or log-normal. With weights, an example counts by its tokens, which
its loss depends on: short answers are harder. `skewed` differences have mean zero and are not symmetric about it, which the
sign-flip test supposes they are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from orchestrator.transfer.comparison import bootstrap_interval, sign_flip_interval

Floats: TypeAlias = NDArray[np.float64]
Draw: TypeAlias = Callable[[np.random.Generator, int], tuple[Floats, Floats, float]]
"""(differences, weights, the weighted mean that they have in the long run)"""

GAIN = 0.1
NUM_EXAMPLES = 200
SIZES = (12, 25, 50, 100)
NOMINAL = 0.05


def tokens_of(random: np.random.Generator, count: int) -> Floats:
    return random.integers(5, 100, count).astype(float)


def gamma_losses(random: np.random.Generator, count: int) -> tuple[Floats, Floats, float]:
    """Two models on the same examples: what an example costs is shared, what a model makes of it is its own."""
    hardness = random.gamma(4.0, 0.5, count)
    candidate, reference = hardness * random.gamma(8.0, 1 / 8, count) - GAIN, hardness * random.gamma(8.0, 1 / 8, count)
    return reference - candidate, np.ones(count), GAIN


def skewed_gains(random: np.random.Generator, count: int) -> tuple[Floats, Floats, float]:
    """Most examples gain nothing and a few gain much."""
    return random.lognormal(0.0, 1.0, count), np.ones(count), math.exp(0.5)


def weighted_gains(random: np.random.Generator, count: int) -> tuple[Floats, Floats, float]:
    """Gains that fall with the tokens they are weighed by: mean E[w / w] * 20 / E[w], with w uniform on 5 to 99."""
    tokens = tokens_of(random, count)
    return random.gamma(2.0, 10.0 / tokens, count), tokens, 20.0 / 52.0


def alike(random: np.random.Generator, count: int) -> tuple[Floats, Floats, float]:
    difference, weight, gain = gamma_losses(random, count)
    return difference - gain, weight, 0.0


def alike_weighted(random: np.random.Generator, count: int) -> tuple[Floats, Floats, float]:
    tokens = tokens_of(random, count)
    losses = random.gamma(2.0, 10.0 / tokens, (2, count))
    return losses[0] - losses[1], tokens, 0.0


def skewed_nothing(random: np.random.Generator, count: int) -> tuple[Floats, Floats, float]:
    return random.gamma(2.0, 0.5, count) - 1.0, np.ones(count), 0.0


INTERVALS: dict[str, Draw] = {"losses": gamma_losses, "skewed": skewed_gains, "weighted by tokens": weighted_gains}
NULLS: dict[str, Draw] = {"losses": alike, "weighted by tokens": alike_weighted, "skewed": skewed_nothing}


def coverage(draw: Draw, num_simulations: int, num_resamples: int, seed: int) -> float:
    """Share of the simulations whose interval holds the true mean."""
    random = np.random.default_rng(seed)
    hits = 0
    for simulation in range(num_simulations):
        difference, weight, true = draw(random, NUM_EXAMPLES)
        low, high = bootstrap_interval(difference, weight, simulation, num_resamples=num_resamples)
        hits += low <= true <= high
    return hits / num_simulations


def false_positives(draw: Draw, count: int, num_simulations: int, num_flips: int, seed: int) -> float:
    """Share of the simulations in which the sign-flip test calls no difference one."""
    random = np.random.default_rng(seed)
    called = 0
    for simulation in range(num_simulations):
        difference, weight, _ = draw(random, count)
        called += sign_flip_interval(difference, weight, simulation, num_flips=num_flips)[2] <= NOMINAL
    return called / num_simulations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    given = options.simulations
    intervals = {name: coverage(draw, given, options.resamples, options.seed) for name, draw in INTERVALS.items()}
    rates = {
        name: {size: false_positives(draw, size, given, options.flips, options.seed) for size in SIZES}
        for name, draw in NULLS.items()
    }
    if options.json:
        print(json.dumps({"coverage": intervals, "false_positives": rates}, indent=1))
        return
    print(f"95% intervals of {NUM_EXAMPLES} examples, {given} simulations; a standard error is {error(0.95, given):.2%}")
    for name, share in intervals.items():
        print(f"  {name:<20}{share:>8.1%}")
    print(f"sign-flip test at 5%, {given} simulations; a standard error is {error(NOMINAL, given):.2%}")
    print(f"  {'examples':<20}" + "".join(f"{size:>8}" for size in SIZES))
    for name, by_size in rates.items():
        print(f"  {name:<20}" + "".join(f"{rate:>8.1%}" for rate in by_size.values()))


def error(rate: float, count: int) -> float:
    """Standard error of a rate over so many simulations."""
    return math.sqrt(rate * (1 - rate) / count)


if __name__ == "__main__":
    main()
