"""Distances between two surfaces of one case in millimetres, volumes, and single lesions (MONAI's measures)."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from numpy.typing import NDArray
from scipy import ndimage

from shared_models.surface_counts import DISTANCE_MM, MICRO, SurfaceCounts

WORST_VOLUME_ERROR = 10.0  # a speck of truth beside a large false find is off by no more than this


@dataclass(frozen=True, slots=True)
class CaseSurface:
    """One case where either side holds the label; `volume_error` is signed, None without a truth."""

    agreement: float
    distance_mm: float
    volume_error: float | None
    lesions: int
    found: int
    false: int


def case_surface(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm: tuple[float, ...], tolerance_mm: float
) -> CaseSurface | None:
    """Surfaces of one case from bool[*size], `spacing_mm` along each axis; None where both sides are empty."""
    if not predicted.any() and not truth.any():
        return None
    size, holds = int(truth.sum()), bool(truth.any())
    error = (int(predicted.sum()) - size) / size if holds else None
    lesions, found, false = _lesions(predicted, truth)
    if not predicted.any() or not holds:
        diagonal = sqrt(sum((n * mm) ** 2 for n, mm in zip(predicted.shape, spacing_mm, strict=True)))
        agreement, distance = 0.0, diagonal
    else:
        both = np.nonzero(predicted | truth)
        box = tuple(slice(max(0, int(at.min()) - 2), int(at.max()) + 3) for at in both)
        a, b = (_one_hot(side[box]) for side in (predicted, truth))
        agreement = float(
            compute_surface_dice(a, b, [tolerance_mm], include_background=True, spacing=spacing_mm, use_subvoxels=True)
        )
        distance = float(compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing_mm))
    return CaseSurface(agreement, distance, error, lesions, found, false)


def _one_hot(side: NDArray[np.bool_]) -> torch.Tensor:
    return torch.from_numpy(np.pad(side, 1)[None, None].astype(np.float32))


def _lesions(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Connected parts (over faces) of the truth, those that a prediction touches, and predicted ones on no truth."""
    in_truth, lesions = ndimage.label(truth)
    marked, parts = ndimage.label(predicted)
    found = len(set(np.unique(in_truth[predicted]).tolist()) - {0})
    right = len(set(np.unique(marked[truth]).tolist()) - {0})
    return int(lesions), found, int(parts) - right


def surface_counts(cases: Iterable[CaseSurface | None], tolerance_mm: float, smallest_count: int = 1) -> SurfaceCounts:
    """The sums of one site; the histogram of distances is withheld below `smallest_count` cases."""
    known = [case for case in cases if case is not None]
    ends = np.array(DISTANCE_MM)
    places = np.searchsorted(ends, [case.distance_mm for case in known], "left")
    errors: list[Any] = [case.volume_error for case in known if case.volume_error is not None]
    bounded = np.rint(np.clip(np.array(errors, dtype=np.float64), -1, WORST_VOLUME_ERROR) * MICRO)
    return SurfaceCounts(
        tolerance_mm=tolerance_mm,
        cases=len(known),
        agreement_micro=sum(round(case.agreement * MICRO) for case in known),
        distance_um=sum(round(case.distance_mm * 1000) for case in known),
        distance=tuple(int(n) for n in np.bincount(places, minlength=len(ends) + 1))
        if len(known) >= max(1, smallest_count)
        else (),
        volume_error_micro=int(np.abs(bounded).sum()),
        volume_bias_micro=int(bounded.sum()),
        with_truth=len(errors),
        lesions=sum(case.lesions for case in known),
        found=sum(case.found for case in known),
        false=sum(case.false for case in known),
    )
