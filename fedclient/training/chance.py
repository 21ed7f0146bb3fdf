"""Chance that nobody else can know: who is in a lot, and the noise upon it, from a cryptographic generator.

The study's seed is known to the coordinator, so nothing that privacy rests on may follow from it. A key of the
operating system's, used for one round and kept nowhere, makes a stream of AES-256-CTR; a round that is trained anew has
other noise, and is paid for anew.
"""

import os
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared_models.protect.prg import keystream

HALF = 2.0**-65  # of a step between two uniform numbers: none of them is 0, whose logarithm is none


class Stream(Protocol):
    """A keystream: what it makes of zeros is chance."""

    def update(self, data: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Chance:
    """One stream of secret chance; what was drawn from it never comes again."""

    stream: Stream = field(default_factory=lambda: keystream(os.urandom(32)), repr=False)

    def words(self, count: int) -> NDArray[np.uint64]:
        """uint64[count], even."""
        return np.frombuffer(self.stream.update(bytes(8 * count)), "<u8")

    def taken(self, count: int, rate: float) -> NDArray[np.bool_]:
        """bool[count]: each true with probability `rate`, to 2^-53, independently (Poisson sampling)."""
        if rate >= 1:
            return np.ones(count, np.bool_)
        return self.words(count) < np.uint64(int(rate * 2.0**64))

    def normal(self, count: int) -> NDArray[np.float64]:
        """float64[count] of mean 0 and deviation 1 (Box & Muller 1958), up to 9.5 deviations away.

        Uniform numbers of 64 bits: those of 53 end at 8.6 deviations, which a long training would come to.
        """
        half = (count + 1) // 2
        even = self.words(2 * half).astype(np.float64) * 2.0**-64 + HALF
        radius, angle = np.sqrt(-2 * np.log(even[:half])), 2 * np.pi * even[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def generator(self) -> np.random.Generator:
        """A generator for whatever else is drawn for one patient, with a seed of 256 bits."""
        return np.random.default_rng(self.words(4))

    def seed(self) -> int:
        """63 bits, for PyTorch's generators: dropout."""
        return int(self.words(1)[0] >> np.uint64(1))
