"""Random patches of whole images, a share of them around labelled voxels; all chance comes from the rng handed in."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cache import Stored
from fedclient.data.lesions import in_window, padded

ANYWHERE = 0.8  # of its patch, in which the centre of a lesion comes to lie


@dataclass(frozen=True, slots=True)
class Patches:
    """What is drawn.

    Attributes:
        size: pixels of a patch; no image in the cache is smaller.
        foreground: share of each batch that is drawn around a labelled voxel of its case, where the case has one
            (Isensee et al. 2021, online methods: a third).
        lesions: the truth is tables of lesions; then the lesion lies anywhere in its patch, as a network would learn
            that it lies in the middle.
    """

    size: tuple[int, ...]
    foreground: float
    lesions: bool = False

    def of_plane(self, case: Stored) -> int:
        """Patches that it takes to cover a plane (2-D) or the volume: so many of it make an epoch."""
        return prod(-(-n // edge) for n, edge in zip(case.images.shape[2:], self.size, strict=True))

    def batch(
        self, chosen: Sequence[tuple[Stored, int]], rng: np.random.Generator
    ) -> tuple[NDArray[np.float16], NDArray[Any]]:
        """A patch for each (case, plane): images float16[B, C, *size], and its truth: masks uint8[B, *size], or lesions
        float32[B, M, 1 + 2 D].

        In 2-D a patch around a labelled voxel is taken from that voxel's plane. As many numbers are drawn whatever the
        share is.
        """
        count, dims = len(chosen), len(self.size)
        drawn = rng.random((count, dims + 2))
        around = int(count * self.foreground + rng.random())  # the fraction of a patch is left to chance
        images = np.empty((count, chosen[0][0].images.shape[1], *self.size), np.float16)
        truth: list[NDArray[Any]] = []
        for n, (case, plane) in enumerate(chosen):
            centre = _labelled(case, drawn[n, dims:]) if n >= count - around else None
            if centre is None:
                window = self._anywhere(case, drawn[n, :dims])
            else:
                plane, *at = centre
                if self.lesions:
                    away = (drawn[n, :dims] - 0.5) * np.array(self.size) * ANYWHERE
                    at = [int(a + d) for a, d in zip(at, away, strict=True)]
                window = self._around(case, at)
            images[n] = case.images[plane][(slice(None), *window)]
            if self.lesions:
                truth.append(in_window(case.masks[plane], [along.start for along in window], self.size))
            else:
                truth.append(case.masks[plane][window])
        return images, padded(truth, dims) if self.lesions else np.stack(truth)

    def _anywhere(self, case: Stored, drawn: NDArray[np.float64]) -> tuple[slice, ...]:
        room = [n - edge for n, edge in zip(case.images.shape[2:], self.size, strict=True)]
        return self._window([int(share * (most + 1)) for share, most in zip(drawn, room, strict=True)])

    def _around(self, case: Stored, centre: Sequence[int]) -> tuple[slice, ...]:
        """As near to around `centre` as the image allows."""
        room = [n - edge for n, edge in zip(case.images.shape[2:], self.size, strict=True)]
        placed = zip(centre, self.size, room, strict=True)
        return self._window([min(max(at - edge // 2, 0), most) for at, edge, most in placed])

    def _window(self, begins: Sequence[int]) -> tuple[slice, ...]:
        return tuple(slice(begin, begin + edge) for begin, edge in zip(begins, self.size, strict=True))


def _labelled(case: Stored, drawn: NDArray[np.float64]) -> list[int] | None:
    """A voxel of one of the case's labels, each label as likely as another: (plane, *at); None without labels."""
    labels = [places for places in case.labelled if len(places)]
    if not labels:
        return None
    places = labels[int(drawn[0] * len(labels))]
    whole = (len(case.images), *case.images.shape[2:])
    at = np.unravel_index(int(places[int(drawn[1] * len(places))]), whole)
    return [int(each) for each in at]
