"""Mix the training sources by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.data.reading.examples import Example
from orchestrator.data.rng import WEIGHTS, generator
from orchestrator.data.summary import LeftOut
from orchestrator.spec.models import DataSource
from orchestrator.units import printable

THINNED = 0.5
"""Share of left-out rows above which a mixture gives a warning."""


def mixture(rows: Mapping[int, int], weights: Mapping[int, float]) -> dict[int, int]:
    """Return the number of rows to take from each source, proportional to the weights.

    No row is taken twice: the source that has the fewest rows for its weight is taken whole, and the others are thinned, as
    `datasets.interleave_datasets` does with `first_exhausted`. More passes over the mixture are `train.epochs`.

    Args:
        rows: Number of rows of each source that has some.
        weights: Above 0; only their ratios count.

    Returns:
        The nearest whole numbers, at least one row of each source.
    """
    # The scarcest source for its weight limits all others, since no row is repeated.
    scale = min(count / weights[source] for source, count in rows.items())
    return {source: min(count, max(1, round(scale * weights[source]))) for source, count in rows.items()}


def mixed(examples: list[Example], sources: str | Sequence[DataSource], seed: int, left_out: LeftOut) -> list[Example]:
    """Return train's rows with sources subsampled by weight; unchanged if no source has a weight.

    A source without a weight beside one that has counts as 1.
    """
    if isinstance(sources, str) or all(source.weight is None for source in sources):
        return examples
    by_source: dict[int, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    for number in sorted(set(range(len(sources))) - by_source.keys()):
        message = f"no row of {printable(sources[number].path)} is left for train, so its weight has no effect"
        left_out.warn(message, "give it more rows, or give eval and test files of their own")
    weights = {number: source.weight or 1.0 for number, source in enumerate(sources)}
    taken = mixture({number: len(rows) for number, rows in by_source.items()}, weights)
    result: list[Example] = []
    for number, rows in sorted(by_source.items()):
        # One salt per source: adding a source does not change the choice of the others.
        order = generator(seed, WEIGHTS + number).permutation(len(rows))
        chosen = set(order[: taken[number]].tolist())
        for index, row in enumerate(rows):
            if index in chosen:
                result.append(row)
            else:
                left_out.add("train", f"thinned by the weights of data.train ({weights[number]:g})", row.place)
    _note_mixture(sources, {number: len(rows) for number, rows in by_source.items()}, taken, weights, left_out)
    return result


def _note_mixture(
    sources: Sequence[DataSource],
    had: Mapping[int, int],
    taken: Mapping[int, int],
    weights: Mapping[int, float],
    left_out: LeftOut,
) -> None:
    whole = sum(taken.values())
    parts = [
        f"{taken[number] / whole:.1%} {printable(sources[number].path)} "
        f"({taken[number]:,} of {had[number]:,} rows, weight {weights[number]:g})"
        for number in sorted(taken)
    ]
    message = f"train is mixed by weight: {', '.join(parts)}; no row is repeated"
    if whole < (1 - THINNED) * sum(had.values()):
        remedy = "remove the weights to use every row once, or give more rows of the source that is used whole"
        left_out.warn(message, remedy)
    else:
        left_out.info(message)
