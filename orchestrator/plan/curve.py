"""The learning curve: on which shares of the training documents the promoted trial is trained once more."""

from __future__ import annotations

SHARES = (0.0625, 0.125, 0.25, 0.5)
"""Of the training documents, beside all of them: each share doubles the one before, so that points lie even on a log scale.
The smallest costs next to nothing, and two points more than the law has numbers tell how far a point may lie from it: in
simulations the interval that follows tells a gain twice as often as with one."""
FEWEST_POINTS = 4
"""A law of three numbers goes through any three points, and leaves nothing to tell by how sure it is."""


def share_documents(share: float, num_documents: int) -> int:
    """How many documents a share is of."""
    return round(share * num_documents)


def curve_shares(num_documents: int) -> tuple[float, ...]:
    """The shares to train on beside all documents: those of at least one document; none where the points would be too few."""
    shares = {share_documents(share, num_documents): share for share in SHARES}
    shares = {count: share for count, share in shares.items() if 0 < count < num_documents}
    return tuple(shares.values()) if len(shares) + 1 >= FEWEST_POINTS else ()


def too_few_documents(num_documents: int) -> str:
    """What to hear where a curve was asked for and there are no shares."""
    return (
        f"search.learning_curve is left out: of {num_documents} training document{'' if num_documents == 1 else 's'} there are "
        f"not {FEWEST_POINTS} different shares"
    )
