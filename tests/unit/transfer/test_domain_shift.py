"""The proxy A-distance: 0 where nothing tells two sets apart, 2 where everything does, and honest about few documents."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.transfer.domain_shift import advise, proxy_a_distance

WIDTH = 32


def drawn(seed: int, count: int, *, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, WIDTH)) + shift * np.eye(WIDTH)[0]


def test_sets_of_one_domain_have_no_distance() -> None:
    """Over many pairs: the interval begins at 0 in nearly all."""
    found = [proxy_a_distance(drawn(2 * pair, 100), drawn(2 * pair + 1, 100), seed=pair) for pair in range(40)]
    assert np.mean([distance for distance, _, _ in found]) < 0.2
    assert sum(low > 0 for _, low, _ in found) <= 4


def test_sets_that_anything_tells_apart_are_at_2() -> None:
    distance, low, high = proxy_a_distance(drawn(0, 100), drawn(1, 100, shift=20.0), seed=0)
    assert (distance, high) == (2.0, 2.0)
    assert 1.8 < low < 2.0


def test_a_known_overlap_has_its_distance() -> None:
    """Two normals a shift of 2 apart: the best line errs in 15.9% of cases."""
    found = [proxy_a_distance(drawn(2 * pair, 400), drawn(2 * pair + 1, 400, shift=2.0), seed=pair) for pair in range(10)]
    wanted = 2 * (1 - 2 * 0.1587)
    assert np.mean([distance for distance, _, _ in found]) == pytest.approx(wanted, abs=0.1)
    assert sum(low <= wanted <= high for _, low, high in found) >= 7


def test_unequal_sides_weigh_alike() -> None:
    distance, _, _ = proxy_a_distance(drawn(0, 1000), drawn(1, 40), seed=0)
    assert distance < 0.6, "a probe that calls everything the larger side would look right in 96 of 100 cases"


@pytest.mark.parametrize(
    ("target", "reference", "said"),
    [
        (drawn(0, 9), drawn(1, 100), "at least 10"),
        (drawn(0, 30), drawn(1, 30)[:, :5], "expected"),
        (drawn(0, 30), np.full((30, WIDTH), np.nan), "not finite"),
    ],
)
def test_what_cannot_be_told_is_refused(target: np.ndarray, reference: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        proxy_a_distance(target, reference, seed=0)


@pytest.mark.parametrize(
    ("distances", "target", "retention", "documents", "kind"),
    [
        ([1.9, 2.0], 5.3, 3.1, 900, "far"),
        ([1.9, 2.0], 3.2, 3.1, 900, "near"),
        ([0.4, 0.6], 5.3, 3.1, 900, "near"),
        ([1.2], 5.3, 3.1, 900, "none"),
        ([1.9], None, None, 900, "none"),
        ([1.9], 5.3, None, 900, "none"),
        ([0.4], None, None, 900, "near"),
        ([1.2], 3.2, 3.1, 900, "near"),
        ([], 5.3, 3.1, 900, "far"),
        ([], None, None, 900, "none"),
        ([0.1], 1.0, 3.0, 60, "few"),
    ],
)
def test_advice_needs_features_and_losses_to_agree(
    distances: list[float], target: float | None, retention: float | None, documents: int, kind: str
) -> None:
    found = advise(distances, target_loss=target, retention_loss=retention, num_documents=documents)
    assert found.kind == kind
    assert f"{documents} training examples" in found.sentence
    if distances:
        assert f"distance {sum(distances) / len(distances):.2f} of 2" in found.sentence
    if target is not None and retention is not None:
        assert f"{target:.2f} on the target and {retention:.2f} on the retention set" in found.sentence
