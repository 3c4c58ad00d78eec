"""The one source of randomness of this room."""

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
"""Salts, so that choices of one seed do not follow one another."""


def generator(seed: int, salt: int) -> np.random.Generator:
    """A stream that is a pure function of both numbers, the same on every machine (Philox; Salmon et al., SC 2011)."""
    return np.random.Generator(np.random.Philox([seed % 2**64, salt]))
