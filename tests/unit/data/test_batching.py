"""Steps, rows and micro-batches: properties over many sets, ranks and sizes."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import UNSUPERVISED, MicroBatch, TokenizedSet, build_set, documents_of_steps, micro_batches, pack_rows


@st.composite
def sets(draw: st.DrawFn, classify: bool = False) -> TokenizedSet:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=40))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    masks = [random.random(length) < 0.5 for length in lengths]
    for mask in masks:
        mask[0] = False
    parts = [(random.integers(1, 1000, length), mask & (not classify)) for length, mask in zip(lengths, masks, strict=True)]
    return build_set(parts, labels=random.integers(0, 3, len(lengths)).tolist() if classify else None)


ranks = st.integers(1, 5)
rows_at_once = st.integers(1, 4)


def batches_of_all(data: TokenizedSet, documents: np.ndarray, num_ranks: int, at_once: int, pack: bool) -> list[list[MicroBatch]]:
    rows = pack_rows(data.lengths, documents, 48, pack)
    return [micro_batches(data, rows, rank, num_ranks, at_once) for rank in range(num_ranks)]


@given(sets(), st.integers(1, 200), st.integers(-5, 5), st.integers(0, 3))
def test_steps_hold_every_document_once_and_no_more_tokens_than_asked(
    data: TokenizedSet, size: int, seed: int, epoch: int
) -> None:
    steps = documents_of_steps(data.offsets, size, seed, epoch)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(data)))
    for step in steps:
        assert len(step) == 1 or data.lengths[step].sum() <= size
    for step, following in itertools.pairwise(steps):
        assert data.lengths[step].sum() + data.lengths[following[0]] > size, "a step was cut early"
    again = documents_of_steps(data.offsets, size, seed, epoch)
    assert all((a == b).all() for a, b in zip(steps, again, strict=True))


def test_the_order_follows_seed_and_epoch() -> None:
    offsets = np.arange(101) * 3
    orders = {tuple(np.concatenate(documents_of_steps(offsets, 30, seed, epoch))) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_the_same_on_every_machine() -> None:
    assert documents_of_steps(np.arange(9) * 2, 6, 3, 1)[0].tolist() == [7, 1, 0]


@given(sets(), st.booleans(), st.integers(8, 60))
def test_rows_hold_every_document_once_and_are_not_too_wide(data: TokenizedSet, pack: bool, width: int) -> None:
    rows = pack_rows(data.lengths, range(len(data)), width, pack)
    assert sorted(document for row in rows for document in row) == list(range(len(data)))
    assert all(len(row) == 1 or sum(data.lengths[row]) <= width for row in rows)
    assert pack or all(len(row) == 1 for row in rows)
    total, longest = int(data.lengths.sum()), int(data.lengths.max())
    if pack and longest <= width:
        assert len(rows) <= 2 * -(-total // width), "first fit leaves at most one row half empty"


@given(sets(), ranks, rows_at_once, st.booleans())
def test_every_document_is_computed_once_with_all_its_predictions(
    data: TokenizedSet, num_ranks: int, at_once: int, pack: bool
) -> None:
    shares = batches_of_all(data, np.arange(len(data)), num_ranks, at_once, pack)
    assert len({len(share) for share in shares}) == 1, "collectives wait for everybody"
    seen: Counter[int] = Counter()
    for batch in (batch for share in shares for batch in share):
        assert batch.input_ids.shape == batch.position_ids.shape == batch.labels.shape == batch.document_ids.shape
        assert batch.input_ids.shape[0] <= at_once
        assert batch.input_ids.shape[1] == max(8, -(-batch.lengths.max() // 8) * 8)
        assert batch.num_tokens == (batch.document_ids >= 0).sum()
        for row in range(len(batch.lengths)):
            assert (batch.document_ids[row, batch.lengths[row] :] == -1).all()
            for document in np.unique(batch.document_ids[row, : batch.lengths[row]]).tolist():
                seen[document] += 1
                check_document(data, document, batch, row)
        assert (batch.labels[batch.document_ids < 0] == UNSUPERVISED).all()
    assert seen == Counter(range(len(data)))
    total = sum(batch.num_supervised for share in shares for batch in share)
    assert total == int(data.supervised.sum())


def check_document(data: TokenizedSet, document: int, batch: MicroBatch, row: int) -> None:
    ids, supervised = data.document(document)
    places = np.flatnonzero(batch.document_ids[row] == document)
    assert (np.diff(places) == 1).all()
    np.testing.assert_array_equal(batch.input_ids[row, places], ids)
    np.testing.assert_array_equal(batch.position_ids[row, places], np.arange(len(ids)))
    wanted = [int(token) if learned else UNSUPERVISED for token, learned in zip(ids[1:], supervised[1:], strict=True)]
    assert batch.labels[row, places].tolist() == [*wanted, UNSUPERVISED]


@given(sets(), st.integers(0, 3), rows_at_once)
def test_the_documents_of_a_step_are_the_same_for_any_number_of_ranks(data: TokenizedSet, seed: int, at_once: int) -> None:
    for step in documents_of_steps(data.offsets, 60, seed, 0):
        found = []
        for num_ranks in (1, 2, 3, 7):
            shares = batches_of_all(data, step, num_ranks, at_once, True)
            documents = {int(d) for share in shares for batch in share for d in np.unique(batch.document_ids)} - {-1}
            found.append((documents, sum(batch.num_supervised for share in shares for batch in share)))
        assert all(entry == found[0] for entry in found)
        assert found[0][0] == set(step.tolist())


@given(sets(), ranks)
def test_padding_restarts_its_positions(data: TokenizedSet, num_ranks: int) -> None:
    for batch in (batch for share in batches_of_all(data, np.arange(len(data)), num_ranks, 2, True) for batch in share):
        for row, length in enumerate(batch.lengths.tolist()):
            np.testing.assert_array_equal(batch.position_ids[row, length:], np.arange(batch.input_ids.shape[1] - length))


@given(sets(classify=True), ranks, rows_at_once)
def test_classified_documents_stand_alone_with_their_class(data: TokenizedSet, num_ranks: int, at_once: int) -> None:
    shares = batches_of_all(data, np.arange(len(data)), num_ranks, at_once, False)
    classes = {}
    for batch in (batch for share in shares for batch in share):
        for row, document in enumerate(batch.document_ids[:, 0].tolist()):
            if document >= 0:
                classes[document] = int(batch.class_labels[row])
            else:
                assert batch.class_labels[row] == -1
    assert classes == dict(enumerate(data.labels.tolist()))
    assert sum(batch.num_supervised for share in shares for batch in share) == len(data)


def test_shares_are_of_about_equal_tokens() -> None:
    random = np.random.default_rng(0)
    data = build_set([(np.ones(length, int), np.zeros(length, bool)) for length in random.integers(1, 40, 400)])
    shares = batches_of_all(data, np.arange(400), 4, 1, False)
    tokens = [sum(batch.num_tokens for batch in share) for share in shares]
    assert max(tokens) - min(tokens) < 40


def test_no_documents_still_give_every_rank_a_round() -> None:
    data = build_set([(np.ones(3, int), np.asarray([False, True, True]))])
    shares = batches_of_all(data, np.asarray([0]), 3, 2, True)
    assert [batch.num_supervised for share in shares for batch in share] == [2, 0, 0]
    assert all(share[0].input_ids.shape == (1, 8) for share in shares)


@given(sets(), ranks, rows_at_once)
def test_full_micro_batches_are_of_one_shape_where_that_is_asked_for(data: TokenizedSet, num_ranks: int, at_once: int) -> None:
    rows = pack_rows(data.lengths, range(len(data)), 48, pack=True)
    for rank in range(num_ranks):
        plain, wide = (micro_batches(data, rows, rank, num_ranks, at_once, width) for width in (0, 48))
        for own, padded in zip(plain, wide, strict=True):
            if len(own.lengths) == at_once and own.num_tokens:  # an empty one only fills a round
                assert padded.input_ids.shape == (at_once, 48)
            else:
                assert padded.input_ids.shape == own.input_ids.shape
            width = own.input_ids.shape[1]
            for name in ("input_ids", "position_ids", "labels", "document_ids"):
                assert (getattr(padded, name)[:, :width] == getattr(own, name)).all()
            assert (padded.labels[:, width:] == UNSUPERVISED).all()
            assert (padded.document_ids[:, width:] == -1).all()
            assert padded.lengths.tolist() == own.lengths.tolist()
