"""Deltas as whole numbers modulo 2**32 or 2**24, so that a sum of masked vectors is the sum of the vectors.

A site's share of the mean is applied before it is rounded: the shares of a cohort add up to 1, so the sum of all
clipped deltas never exceeds the clip, and no bits are kept free for the number of sites or for their weights.

A vector holds the float tensors by name, then counts in limbs of 16 bits, then a canary of two elements whose sum
everybody knows. Both rings are computed modulo 2**32; of the smaller one, three bytes an element travel.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import WeightsInvalid
from shared_models.files import canonical_json
from shared_models.protect.prg import CHUNK
from shared_models.weights import Schema, Tensors, schema_sha256

MOST_SITES = 128  # limbs of 16 bits of so many sites fit into the 24-bit ring
LIMBS, LIMB_BITS = 3, 16  # of a count, below 2**48
OWN_COUNTS = ("clipped", "weight")  # elements that were clipped; the site's weight in the mean
CANARIES = 2


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a number becomes an element of the ring.

    Attributes:
        clip: largest |element| of a delta; what lies beyond is clipped and counted.
        scale: elements of the ring for 1.0.
        bits: of an element, 32 or 24.
    """

    clip: float
    scale: float
    bits: int

    @property
    def problem(self) -> str | None:
        """Why sums could leave the ring, or None."""
        if self.bits not in (24, 32):
            return f"a ring of {self.bits} bits; allowed are 24 and 32"
        if not (isfinite(self.clip) and isfinite(self.scale) and self.clip > 0 and self.scale > 0):
            return f"clip {self.clip:g} and scale {self.scale:g}; both must be above 0"
        if self.clip * self.scale > 2 ** (self.bits - 1) - MOST_SITES // 2:  # each site rounds by half a unit
            return f"clip {self.clip:g} times scale {self.scale:g} is beyond a ring of {self.bits} bits"
        return None


def encoding(clip: float, bits: int = 32) -> Encoding:
    """The finest encoding for deltas up to `clip`."""
    return Encoding(clip, (2 ** (bits - 1) - MOST_SITES) / clip, bits)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things stand in the vector of a site.

    Attributes:
        schema: of the delta; float tensors only.
        counts: names of the caller's counts, beside `OWN_COUNTS`.
    """

    schema: Schema
    counts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, spec in self.schema.items():
            if spec.dtype.kind != "f":
                raise WeightsInvalid(
                    f"{name!r} is {spec.dtype}: a secure sum adds float tensors only. Use a network without integer "
                    f"buffers, or plain aggregation."
                )
        if len(set(self.all_counts)) < len(self.all_counts):
            raise ValueError(f"counts {self.counts} must differ from each other and from {OWN_COUNTS}")

    @property
    def all_counts(self) -> tuple[str, ...]:
        return (*OWN_COUNTS, *self.counts)

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """Tensor -> its first element and the one behind its last."""
        places, at = {}, 0
        for name in sorted(self.schema):
            size = prod(self.schema[name].shape)
            places[name], at = (at, at + size), at + size
        return places

    @property
    def tail(self) -> int:
        """Where the counts begin."""
        return sum(prod(spec.shape) for spec in self.schema.values())

    @property
    def elements(self) -> int:
        return self.tail + LIMBS * len(self.all_counts) + CANARIES

    @property
    def sha256(self) -> str:
        """One digest for the tensors and the counts: two sides with the same mean the same by every element."""
        return hashlib.sha256(canonical_json([schema_sha256(self.schema), list(self.all_counts)])).hexdigest()


def encode(
    delta: Tensors,
    share: float,
    weight: int,
    counts: Mapping[str, int],
    layout: Layout,
    how: Encoding,
    canary: int,
) -> Iterator[NDArray[np.uint32]]:
    """The vector of a site in blocks of at most `CHUNK` elements, each good until the next is asked for.

    Args:
        share: `weight` over the weights of the whole cohort, at most 1.
        counts: of `layout.counts`, 0 to 2**48 - 1 each.

    Raises:
        WeightsInvalid: a delta of another schema, or with NaN or infinity in it.
        ValueError: a share or a count out of range.
    """
    if not 0 < share <= 1 or not 0 < weight < 2**48:
        raise ValueError(f"weight {weight} is a share of {share:g}; allowed are shares above 0 and up to 1")
    if dict(delta.schema) != dict(layout.schema):
        raise WeightsInvalid("the delta is not of the model that the secure sum is about. Train from its weights.")
    scaled, numbers = np.empty(CHUNK, np.float64), np.empty(CHUNK, np.int32)
    clipped = 0
    for name in sorted(layout.schema):
        for whole in delta.blocks(name):
            for at in range(0, whole.size, CHUNK):
                part = whole[at : at + CHUNK]
                low, high = float(part.min()), float(part.max())
                if not (isfinite(low) and isfinite(high)):
                    raise WeightsInvalid(f"{name!r} holds NaN or infinity. Its training diverged.")
                into, out = scaled[: part.size], numbers[: part.size]
                if max(-low, high) > how.clip:
                    clipped += int(np.count_nonzero(np.abs(part) > how.clip))
                    part = np.clip(part, -how.clip, how.clip)
                np.multiply(part, share * how.scale, out=into, dtype=np.float64)
                np.rint(into, out=into)
                np.copyto(out, into, casting="unsafe")
                yield out.view(np.uint32)
    yield _tail({**counts, "clipped": clipped, "weight": weight}, layout, canary)


def _tail(counts: Mapping[str, int], layout: Layout, canary: int) -> NDArray[np.uint32]:
    if set(counts) != set(layout.all_counts) or not all(0 <= count < 2**48 for count in counts.values()):
        raise ValueError(f"counts {sorted(counts)}: expected {sorted(layout.all_counts)}, 0 to 2**48 - 1 each")
    limbs = [counts[name] >> (LIMB_BITS * i) & 0xFFFF for name in layout.all_counts for i in range(LIMBS)]
    return np.array([*limbs, 1, canary & 0xFFFF], np.uint32)


def packed(block: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """The bytes of elements as they travel, little-endian; a view where the ring is of 32 bits."""
    octets = block.astype("<u4", copy=False).view(np.uint8)
    return octets if bits == 32 else octets.reshape(-1, 4)[:, :3].reshape(-1)


def unpacked(octets: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """The inverse of `packed`, modulo 2**`bits`."""
    if bits == 32:
        return octets.view("<u4").astype(np.uint32, copy=False)
    wide = np.zeros((octets.size // 3, 4), np.uint8)
    wide[:, :3] = octets.reshape(-1, 3)
    return wide.reshape(-1).view("<u4").astype(np.uint32, copy=False)


def signed(elements: NDArray[np.uint32], bits: int) -> NDArray[np.int32]:
    """Elements as whole numbers around 0; what stands above `bits` counts for nothing."""
    return elements.view(np.int32) if bits == 32 else (elements << np.uint32(8)).view(np.int32) >> np.int32(8)


def bytes_of(layout: Layout, bits: int) -> int:
    """How long a masked vector is as it travels."""
    return layout.elements * bits // 8


@dataclass(frozen=True, slots=True)
class Counted:
    """What the tail of a sum says.

    Attributes:
        sites: how many vectors are in the sum, by the canary; None when it does not hold, and so nothing does.
    """

    sites: int | None
    counts: dict[str, int]


def read_tail(vector: NDArray[np.uint32], layout: Layout, bits: int, canary: int) -> Counted:
    """The counts of a sum that was freed of its masks."""
    tail = [int(element) & (2**bits - 1) for element in vector[layout.tail :]]
    counts = {
        name: sum(tail[LIMBS * place + i] << (LIMB_BITS * i) for i in range(LIMBS))
        for place, name in enumerate(layout.all_counts)
    }
    sites, mark = tail[-2:]
    sound = 0 < sites <= MOST_SITES and mark == sites * (canary & 0xFFFF)
    return Counted(sites if sound else None, counts)


def mean_of(vector: NDArray[np.uint32], layout: Layout, how: Encoding, name: str, share: float) -> NDArray[np.float64]:
    """The weighted mean of one tensor; `share` is what the sites in the sum weigh of the whole cohort.

    No mean of clipped deltas is beyond the clip, whatever weight a site that lies has made the sum say.
    """
    begin, end = layout.places[name]
    mean = np.empty(end - begin, np.float64)
    for at in range(begin, end, CHUNK):
        part = vector[at : min(at + CHUNK, end)]
        np.multiply(signed(part, how.bits), 1.0 / (how.scale * share), out=mean[at - begin : at - begin + part.size])
    np.clip(mean, -how.clip, how.clip, out=mean)
    return mean.reshape(layout.schema[name].shape)
