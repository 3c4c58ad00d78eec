"""Near-duplicates: the estimate against exact similarities, and what is found among many texts."""

from __future__ import annotations

import random

import numpy as np

from orchestrator.data.splitting import minhash
from orchestrator.data.splitting.minhash import NEAR, NUM_BINS, normalised, signatures_of, similarity

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def near_pairs(texts: list[str]) -> list[tuple[int, int]]:
    return minhash.near_pairs([normalised(text) for text in texts])


def words(number: int, seed: int, length: int = 6) -> list[str]:
    drawn = random.Random(seed)
    return ["".join(drawn.choices(LETTERS, k=length)) for _ in range(number)]


def test_equal_texts_are_those_that_differ_in_case_blanks_and_unicode_form() -> None:
    assert normalised("  Who\tIS\nit? ") == "who is it?"
    assert normalised("\uff37\uff48\uff4f\u00a0is \ufb01t") == "who is fit"
    assert normalised("STRASSE") == normalised("straße")
    assert normalised("e\u0301") == normalised("\u00c9")
    assert normalised("it") != normalised("it?")


def test_signatures_agree_as_often_as_the_sets_are_similar() -> None:
    """Of 200 pairs each, whose exact similarities are known; within four standard errors of 32 bins."""
    for shared in (0, 10, 20, 30, 38):
        agreed, exact = [], []
        for seed in range(200):
            mine = words(40, seed)
            pair = [" ".join(mine), " ".join(mine[:shared] + words(40 - shared, seed + 10**6))]
            signatures, filled = signatures_of(pair)
            assert filled.all()
            agreed.append((signatures[0] == signatures[1]).mean())
            exact.append(similarity(*pair))
        mean = float(np.mean(exact))
        bound = 4 * np.sqrt(mean * (1 - mean) / NUM_BINS / 200) + 0.002
        assert abs(np.mean(agreed) - mean) < bound, (shared, np.mean(agreed), mean)


def test_a_similarity_is_that_of_the_sets() -> None:
    assert similarity("abcdef", "abcdeg") == 1 / 3
    assert similarity("abcdef", "abcdef") == 1.0
    assert similarity("abcdef", "ghijkl") == 0.0
    assert similarity("abcdef", "abcdefg", frozenset({"abcde", "bcdef"})) == 0.0


def test_changed_copies_are_found_among_many_and_nothing_else() -> None:
    texts = [" ".join(words(30, seed)) for seed in range(800)]
    copies = [" ".join(["changed", *text.split()[1:]]) for text in texts[:100]]
    assert set(near_pairs(texts + copies)) == {(index, 800 + index) for index in range(100)}


def test_case_blanks_and_punctuation_do_not_part_near_duplicates() -> None:
    texts = [
        "How do I reset my password",
        "how do i  reset my password?!",
        "Where is the nearest branch",
        "猫が好きです。とても。",
        "猫が好きです とても",
    ]
    assert near_pairs(texts) == [(0, 1), (3, 4)]


def test_what_a_template_says_tells_no_two_texts_apart() -> None:
    template = "Below is an instruction that describes a task. Write a response that completes the request. "
    texts = [template + " ".join(words(4, seed)) for seed in range(60)]
    assert similarity(texts[0], texts[1]) > NEAR / 2
    assert near_pairs(texts) == []
    assert near_pairs([*texts, texts[7] + " x"]) == [(7, 60)]


def test_short_texts_about_other_numbers_are_others() -> None:
    assert near_pairs(["What is the price of the kettle in lot 12?", "What is the price of the kettle in lot 13?"]) == []
    assert near_pairs(["What is the price of the kettle in lot 12?", "What is the price of the kettle in lot 12 now?"]) == [
        (0, 1)
    ]


def test_odd_texts_end_no_run() -> None:
    assert near_pairs([]) == []
    assert near_pairs(["", "?", "a", "\ud800", "\x00"]) == []
    assert near_pairs(["a" * 10_000, "a" * 9_000 + "b"]) == [(0, 1)]
