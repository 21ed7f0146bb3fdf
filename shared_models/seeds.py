"""Randomness as a function of what it is for: the same words give the same stream, on any machine, in any order."""

import hashlib

import numpy as np


def seed_of(*words: object) -> int:
    """63-bit seed of (study seed, study, round, site, purpose, ...)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, words)).encode()).digest()[:8], "big") >> 1


def rng(*words: object) -> np.random.Generator:
    return np.random.default_rng(seed_of(*words))
