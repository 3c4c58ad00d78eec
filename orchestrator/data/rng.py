"""The only source of random numbers in this package."""

from __future__ import annotations

import numpy as np

SHUFFLED_ANSWERS = 0x5FFE
WEIGHTS = 0x3E1
CAPS = 0xCA9
RETENTION = 0x4E7
REPLAY = 0x4E9
FISHER = 0xF15
SHOTS = 0x5407
FEATURES = 0xFEA7
SHARES = 0x5A4E
HEAD_FIT = 0x4F17
"""Salts that keep different choices from one seed independent."""


def generator(seed: int, salt: int) -> np.random.Generator:
    """Return a generator that is a pure function of both numbers, the same on every machine (Philox; Salmon et al., SC 2011)."""
    return np.random.Generator(np.random.Philox([seed % 2**64, salt]))
