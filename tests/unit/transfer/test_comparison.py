"""Intervals hold what they promise, and figures that cannot be compared are refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from orchestrator.transfer import between_trained, over_seeds, paired_comparison
from orchestrator.transfer.comparison import bootstrap_interval, sign_flip_interval


def test_positive_means_that_the_candidate_is_better() -> None:
    reference = np.linspace(3.0, 4.0, 250)
    comparison = paired_comparison(reference - 0.5, reference, seed=1)
    assert comparison.mean == pytest.approx(0.5)
    assert comparison.low == pytest.approx(0.5)
    assert comparison.method == "bootstrap"


def test_weights_make_the_mean_a_difference_of_corpus_losses() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 200, 300)
    candidate_sums, reference_sums = rng.gamma(2.0, tokens), rng.gamma(3.0, tokens)
    comparison = paired_comparison(candidate_sums / tokens, reference_sums / tokens, tokens, seed=0)
    corpus = reference_sums.sum() / tokens.sum() - candidate_sums.sum() / tokens.sum()
    assert comparison.mean == pytest.approx(corpus)
    assert comparison.low < corpus < comparison.high


@pytest.mark.parametrize(("num_examples", "method"), [(199, "sign_flip"), (200, "bootstrap")])
def test_the_method_changes_at_200_examples(num_examples: int, method: str) -> None:
    rng = np.random.default_rng(3)
    comparison = paired_comparison(rng.normal(size=num_examples), rng.normal(size=num_examples), num_flips=500)
    assert comparison.method == method
    assert (comparison.p_value is None) == (method == "bootstrap")


def test_the_same_seed_gives_the_same_interval() -> None:
    rng = np.random.default_rng(4)
    losses = rng.normal(size=(2, 220))
    first, again, other = (paired_comparison(losses[0], losses[1], seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert first.low != other.low


def losses(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two models that are equally good, as mean losses of examples are: skewed, and alike for what both find hard."""
    hardness = rng.gamma(4.0, 0.5, shape)
    return hardness * rng.gamma(8.0, 1 / 8, shape), hardness * rng.gamma(8.0, 1 / 8, shape)


def rate_error(rate: float, count: int) -> float:
    """Standard error of a rate over so many simulations."""
    return math.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("weighted", [False, True])
def test_bootstrap_intervals_hold_the_truth_in_93_to_97_of_100(weighted: bool) -> None:
    """200 examples, 2,000 simulations, nominally 95: a standard error is half a point. With weights, short answers gain most:
    20 / tokens on average, so that the corpus gains 20 / 52, the mean of the tokens."""
    rng = np.random.default_rng(11)
    hits = 0
    for seed in range(2000):
        weight = rng.integers(5, 100, 200).astype(float) if weighted else np.ones(200)
        first, second = losses(rng, (200,))
        difference = rng.gamma(2.0, 10.0 / weight, 200) if weighted else second - first + 0.1
        low, high = bootstrap_interval(difference, weight, seed, num_resamples=400)
        hits += low <= (20.0 / 52.0 if weighted else 0.1) <= high
    assert 0.93 <= hits / 2000 <= 0.97


def test_bootstrap_interval_shrinks_with_the_root_of_the_examples() -> None:
    rng = np.random.default_rng(5)
    widths = []
    for num_examples in (400, 1600):
        difference = rng.normal(0.3, 1.0, num_examples)
        low, high = bootstrap_interval(difference, np.ones(num_examples), 0, num_resamples=2000)
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize("num_examples", [12, 25, 50, 100])
def test_sign_flip_false_positives_stay_below_the_nominal_rate(num_examples: int) -> None:
    """Equally good models, unequal weights: 1,000 tests at 5% call at most 5% a difference, within three standard errors."""
    assert_few_false_positives(num_examples, num_tests=1000, num_flips=500)


@pytest.mark.slow
@pytest.mark.parametrize("num_examples", [12, 15, 20, 35, 75, 100, 199])
def test_sign_flip_false_positives_at_more_sizes(num_examples: int) -> None:
    """Likewise, at more sizes, in 2,000 tests of four times as many flips."""
    assert_few_false_positives(num_examples, num_tests=2000, num_flips=2000)


def assert_few_false_positives(num_examples: int, num_tests: int, num_flips: int) -> None:
    rng = np.random.default_rng(6)
    rejected, excluded = 0, 0
    for seed in range(num_tests):
        weight = rng.integers(1, 50, num_examples).astype(float)
        first, second = losses(rng, (num_examples,))
        low, high, p_value = sign_flip_interval(first - second, weight, seed, num_flips=num_flips)
        rejected += p_value <= 0.05
        excluded += not low <= 0 <= high
    bound = 0.05 + 3 * rate_error(0.05, num_tests)
    assert rejected / num_tests <= bound
    assert excluded / num_tests <= bound
    assert rejected / num_tests >= 0.02, "a test that never rejects is no test"


def test_sign_flip_p_value_is_that_of_all_sign_patterns() -> None:
    difference, weight = np.array([0.9, 0.4, -0.2, 1.1, 0.3, 0.6, -0.1]), np.array([3.0, 1.0, 2.0, 5.0, 1.0, 2.0, 4.0])
    observed = abs(weight @ difference)
    sums = [abs(np.array(signs) @ (weight * difference)) for signs in itertools.product((1, -1), repeat=7)]
    expected = np.mean([s >= observed - 1e-12 for s in sums])
    assert sign_flip_interval(difference, weight, 0)[2] == pytest.approx(expected)


def test_sign_flip_interval_is_the_test_turned_round() -> None:
    """Just inside an end the shifted data are not rejected, just outside they are."""
    difference, weight = np.random.default_rng(9).normal(0.5, 1.0, 10), np.ones(10)
    low, high, _ = sign_flip_interval(difference, weight, 0)
    for end, outward in ((low, -1), (high, 1)):
        assert sign_flip_interval(difference - end - outward * 1e-6, weight, 0)[2] <= 0.05
        assert sign_flip_interval(difference - end + outward * 1e-6, weight, 0)[2] > 0.05


def test_drawn_flips_agree_with_all_flips() -> None:
    """15 examples are drawn; the p-value is that of the 2^15 patterns within the noise of 20,000 draws."""
    difference, weight = np.random.default_rng(10).normal(0.35, 1.0, 15), np.ones(15)
    patterns = 1.0 - 2.0 * ((np.arange(2**15)[:, None] >> np.arange(15)) & 1)
    exact = np.mean(np.abs(patterns @ difference) >= abs(difference.sum()) - 1e-12)
    assert sign_flip_interval(difference, weight, 0)[2] == pytest.approx(exact, abs=0.01)


def test_five_examples_have_no_interval() -> None:
    comparison = paired_comparison([1.0] * 5, [2.0] * 5)
    assert (comparison.low, comparison.high) == (-math.inf, math.inf)
    assert comparison.p_value == pytest.approx(2 / 32)


def test_equal_models_have_a_difference_of_zero() -> None:
    for num_examples in (12, 250):
        comparison = paired_comparison([1.5] * num_examples, [1.5] * num_examples)
        assert (comparison.mean, comparison.low, comparison.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("candidate", "reference", "weights", "message"),
    [
        ([], [], None, "no example"),
        ([1.0], [1.0, 2.0], None, "unequal lengths"),
        ([1.0, math.nan], [1.0, 2.0], None, "candidate of example 1 is nan"),
        ([1.0, 1.0], [1.0, 2.0], [1.0, 0.0], "weight of example 1"),
    ],
)
def test_bad_figures_are_refused(
    candidate: list[float], reference: list[float], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_comparison(candidate, reference, weights)


def test_two_seeds_of_one_training_are_seldom_called_different() -> None:
    """Two models that are truly unlike, by luck of their seeds alone, on so many examples that these see it every time."""
    rng, num_repetitions, luck = np.random.default_rng(11), 400, 0.05
    seen, called = 0, 0
    for repetition in range(num_repetitions):
        trained = rng.normal(3.0, luck, 6)  # five of one training, and a rival
        examples = rng.normal(0.0, 0.3, 250)
        pair = paired_comparison(trained[0] + examples, trained[5] + examples, seed=repetition, num_resamples=50)
        found = between_trained(pair, over_seeds(range(5), list(4.0 - trained[:5])))
        assert (found.mean, found.over_seeds, found.p_value) == (pair.mean, True, None)
        assert found.low <= pair.low <= pair.high <= found.high
        seen += not pair.low <= 0 <= pair.high
        called += not found.low <= 0 <= found.high
    assert seen > 0.9 * num_repetitions
    assert called / num_repetitions <= 0.05 + 3 * rate_error(0.05, num_repetitions)
    assert called > 0, "an interval that holds everything says nothing"


def test_without_other_seeds_a_comparison_stays_as_it_is() -> None:
    pair = paired_comparison([1.0] * 8, [2.0] * 8)
    assert between_trained(pair, None) is pair


def test_a_comparison_becomes_its_record() -> None:
    record = paired_comparison([1.0] * 8, [2.0] * 8).record("head")
    assert (record.against, record.mean, record.num_examples) == ("head", 1.0, 8)
