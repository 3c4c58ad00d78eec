"""Near-duplicates among many texts, found by MinHash and locality-sensitive hashing.

Two texts are near-duplicates where their sets of character 5-grams have a Jaccard similarity of at least `NEAR`. Comparing all
pairs would be quadratic; so each text gets a signature of `NUM_BINS` minima (Broder 1997, "On the resemblance and containment
of documents"), taken from one hash function whose range is cut into bins (Li, Owen and Zhang 2012, "One permutation hashing"),
empty bins filled by rotation (Shrivastava and Li 2014, "Densifying one permutation hashing"). Texts that agree in a whole band
of the signature are candidates (Leskovec, Rajaraman and Ullman, "Mining of massive datasets", ch. 3): with 8 bands of 4, a pair
of similarity 0.8 is one with probability 0.985, a pair of 0.5 with 0.40. Candidates are then compared exactly.

The cost grows with the characters, of which a text counts at most `MAX_CHARACTERS`, and not with the number of pairs.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

NEAR = 0.8
"""Jaccard similarity from which two texts are near-duplicates."""
SHINGLE = 5
"""Number of characters in an n-gram."""
NUM_BINS = 32
ROWS_PER_BAND = 4
MAX_CHARACTERS = 1000
"""Number of leading characters of a text that are compared."""
COMMON = 0.5
"""Share of the texts above which an n-gram belongs to a template and does not distinguish them."""
SAMPLED_TEXTS = 400
MIN_SAMPLED = 8
CHUNK_CHARACTERS = 500_000
VERIFIED_CHARACTERS = 40_000_000
"""Total characters up to which candidates are compared exactly; beyond, by the estimate from their signatures."""
LIKELY = 0.6
"""Signature agreement below which candidates are not compared."""
SHORT = 200
"""Length up to which texts that contain different numbers are different: item 12 is not item 13."""
_NUMBER = re.compile(r"\d+")
_PUNCTUATION = re.compile(r"[\W_]+")
_ASCII_WORDS = bytes(code if chr(code).isalnum() else 32 for code in range(128)) + bytes(128)
_CHANCE = 8
"""Only n-grams among the lowest _CHANCE x NUM_BINS of a text's hashes are used: a bin is left empty with probability e^-8."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
    """Return `text` in Unicode's NFKC form, case folded, runs of white space as one space."""
    # NFKC changes no ASCII text, and is slow.
    if text.isascii():
        return " ".join(text.lower().split())
    # Normalised twice: case folding may leave text that is not in NFKC.
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def near_pairs(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return pairs of near-duplicates: enough to connect each text with its near-duplicates, not all pairs.

    Args:
        texts: As `normalised` gives them, all different; punctuation does not count. They are read one by one, none is held.

    Returns:
        Pairs (i, j) of indices, i < j, sorted.
    """
    common = _common_shingles(texts)
    signatures, filled = signatures_of((compared(text) for text in texts), common)
    pairs = _candidates(signatures, filled)
    agreement = np.concatenate(
        [(signatures[part[:, 0]] == signatures[part[:, 1]]).mean(axis=1) for part in _parts(pairs)] or [np.zeros(0)]
    )
    likely = agreement >= LIKELY
    found: list[tuple[int, int]] = []
    budget = VERIFIED_CHARACTERS
    for pair, estimate in zip(pairs[likely], agreement[likely].tolist(), strict=True):
        first, second = int(pair[0]), int(pair[1])
        if budget > 0:
            one, other = compared(texts[first]), compared(texts[second])
            budget -= len(one) + len(other)
            # Short texts that differ in a number only, such as items of a list, are not duplicates.
            estimate = 0.0 if _other_numbers(one, other) else similarity(one, other, common)
        if estimate >= NEAR:
            found.append((first, second))
    return found


def similarity(first: str, second: str, common: frozenset[str] = frozenset()) -> float:
    """Return the Jaccard similarity of two texts' n-grams, without those of the template; 0 if none are left."""
    a, b = _shingles(first) - common, _shingles(second) - common
    return len(a & b) / len(a | b) if a and b else 0.0


def signatures_of(words: Iterable[str], common: frozenset[str] = frozenset()) -> tuple[np.ndarray, np.ndarray]:
    """Return (uint16[N, NUM_BINS], bool[N]): the signatures, and whether a text has any n-gram to compare.

    Two texts agree in a bin with a probability equal to their similarity. The lowest 16 bits of a minimum are kept (b-bit
    minwise hashing, Li and König 2010): bins of different texts agree by chance once in 65536.
    """
    # Sorted once, for a binary search in every chunk.
    left_out = np.sort(np.concatenate([_hashes(gram) for gram in common])) if common else np.zeros(0, np.uint64)
    made = [_chunk_signatures(chunk, left_out) for chunk in _chunks(words)]
    if not made:
        return np.zeros((0, NUM_BINS), np.uint16), np.zeros(0, bool)
    return np.concatenate([table for table, _ in made]), np.concatenate([filled for _, filled in made])


def _chunk_signatures(chunk: Sequence[str], left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hashes, owner = _chunk_hashes(chunk)
    if len(left_out):
        at = np.minimum(np.searchsorted(left_out, hashes), len(left_out) - 1)
        own = left_out[at] != hashes
        hashes, owner = hashes[own], owner[own]
    # The top 5 bits choose one of the 32 bins; the rest is the value whose minimum is kept.
    values = hashes << np.uint64(5)
    counts = np.bincount(owner, minlength=len(chunk))
    # A minimum is nearly always among the lowest hashes: dropping the others saves most of the scatter below.
    limits = (np.minimum(1.0, _CHANCE * NUM_BINS / np.maximum(counts, 1)) * (2.0**64 - 2.0**12)).astype(np.uint64)
    low = values <= limits[owner]
    repetitive = np.bincount(owner[low], minlength=len(chunk)) < NUM_BINS  # few different n-grams: all of them count
    low |= repetitive[owner]
    hashes, owner, values = hashes[low], owner[low], values[low]
    slots = owner * NUM_BINS + (hashes >> np.uint64(59)).astype(np.int64)
    minima = np.full(len(chunk) * NUM_BINS, np.iinfo(np.uint64).max)
    np.minimum.at(minima, slots, values)
    return _densified(minima.reshape(len(chunk), NUM_BINS))


def _densified(minima: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill empty bins with the minimum of the next filled bin, altered by its distance."""
    empty = minima == np.iinfo(np.uint64).max
    has = ~empty.all(axis=1)
    filled, result = minima.copy(), minima.copy()
    for distance in range(1, NUM_BINS):
        missing = result == np.iinfo(np.uint64).max
        if not missing[has].any():
            break
        # One step to the next bin each time, so that the distance is known.
        filled = np.roll(filled, -1, axis=1)
        borrowed = missing & (filled != np.iinfo(np.uint64).max)
        result[borrowed] = _mixed(filled[borrowed] + np.uint64(distance))
    return (result >> np.uint64(16)).astype(np.uint16), has


def _candidates(signatures: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Return int64[P, 2], sorted: in each band's buckets, each text with the one before it and with the bucket's first."""
    rows = np.flatnonzero(filled)
    found: list[np.ndarray] = []
    for start in range(0, NUM_BINS, ROWS_PER_BAND):
        keys = np.ascontiguousarray(signatures[rows, start : start + ROWS_PER_BAND]).view(np.uint64).ravel()
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
        begins = np.ones(len(order), bool)
        begins[same] = False
        first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
        # Neighbour and first member of a bucket connect it; all pairs would be quadratic in large buckets.
        later = rows[order[same]]
        found += [rows[order[before]] * len(signatures) + later for before in (same - 1, first[same])]
    pairs = np.sort(np.concatenate(found))  # np.unique's table of hashes is several times as slow here
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    return np.stack(np.divmod(pairs, max(1, len(signatures))), axis=1)


def _parts(pairs: np.ndarray, size: int = 1 << 18) -> Iterator[np.ndarray]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def compared(text: str) -> str:
    """Return the words of the text's beginning without punctuation; at least one n-gram long unless empty."""
    beginning = text[: 2 * MAX_CHARACTERS]
    if beginning.isascii():
        bare = " ".join(beginning.encode().translate(_ASCII_WORDS).decode().split())
    else:
        bare = _PUNCTUATION.sub(" ", beginning)
    words = bare[:MAX_CHARACTERS].strip()
    # Shorter texts would have no n-gram at all.
    return words.ljust(SHINGLE) if words else ""


def _other_numbers(first: str, second: str) -> bool:
    return max(len(first), len(second)) <= SHORT and Counter(_NUMBER.findall(first)) != Counter(_NUMBER.findall(second))


def _shingles(words: str) -> set[str]:
    return {words[start : start + SHINGLE] for start in range(len(words) - SHINGLE + 1)}


def _common_shingles(texts: Sequence[str]) -> frozenset[str]:
    """Return the n-grams of the template shared by most texts, from a sample at even distances."""
    sample = [compared(texts[at]) for at in range(0, len(texts), max(1, len(texts) // SAMPLED_TEXTS))]
    if len(sample) < MIN_SAMPLED:
        return frozenset()
    counts = Counter(gram for text in sample for gram in _shingles(text))
    return frozenset(gram for gram, count in counts.items() if count > COMMON * len(sample))


def _chunks(words: Iterable[str]) -> Iterator[Sequence[str]]:
    chunk: list[str] = []
    size = 0
    for text in words:
        chunk.append(text)
        # Both the text and its row of bins take memory.
        size += len(text) + NUM_BINS
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _chunk_hashes(chunk: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (uint64[H], int64[H]): the hash of every n-gram, and the index of its text in the chunk."""
    lengths = np.fromiter(map(len, chunk), np.int64, len(chunk))
    hashes = _hashes("".join(chunk))
    # All texts are hashed as one; n-grams across a border are dropped after.
    owner = np.repeat(np.arange(len(chunk)), lengths)[: len(hashes)]
    ends = np.cumsum(lengths)[owner]
    whole = np.arange(len(hashes)) + SHINGLE <= ends
    return hashes[whole], owner[whole]


def _hashes(text: str) -> np.ndarray:
    """Return uint64: the hash of every n-gram of a text, by Horner's rule modulo 2^64, mixed."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    count = max(0, len(points) - SHINGLE + 1)
    total = np.zeros(count, np.uint64)
    for offset in range(SHINGLE):
        total *= _MULTIPLIER
        total += points[offset : offset + count]
    return _mixed(total)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): every bit depends on every other."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
