"""Why an answer may not hold for an image: it is of another kind than what the network has learnt from.

By what header, grid and grey values say, and by how far it lies from the images that the release was measured on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedclient.data.cases import Case
from fedclient.data.volume import Volume
from fedclient.gate.facts import needs_of
from fedclient.gate.inspect import oddities
from fedclient.gate.pixels import sample
from fedclient.predict.model import Model
from shared_models.drift import bounds_text, outlying, read_reference
from shared_models.errors import StateInvalid
from shared_models.study import Study

AIR_HU = -300.0  # the darkest hundredth of a patient in Hounsfield units lies below this, or hardly any air is in it
LUNG_HU = -700.0
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Doubt:
    """One reason.

    Attributes:
        distance: share of the features in which the image lies beyond every reference case, 0 to 1; None where it is
            not a matter of distance.
    """

    code: str
    words: str
    distance: float | None = None


def doubts_of(model: Model, case: Case, volume: Volume, cells: Mapping[str, int], picture: bool) -> tuple[Doubt, ...]:
    """All that is odd about an image, the gravest first.

    Args:
        volume: the image, or some of its planes.
        cells: where it lies on the grids of `shared_models.drift`.
    """
    study = model.study
    found = _of_series(case)
    found += [Doubt(each.code, each.what) for each in oddities(case, volume, needs_of(study), picture)]
    found += _of_kind(study, volume, picture)
    try:
        profiles = read_reference(model.fingerprint, study, f"release {model.name}")
    except StateInvalid as error:  # made by a version that counted otherwise
        profiles = ()
        words = f"whether it is like the images that the release was measured on is not known: {error}"
        found.append(Doubt("REFERENCE_UNKNOWN", words))
    if profiles and (beyond := outlying(cells, profiles)):
        told = ", ".join(f"{name} {bounds_text(name, study, cells[name])}" for name in beyond[:SHOWN])
        distance = len(beyond) / len(cells)
        words = f"{len(beyond)} of {len(cells)} features lie beyond every case it was measured on: {told}."
        found.append(Doubt("OUT_OF_DISTRIBUTION", words, distance))
    first = {each.code: each for each in reversed(found)}
    return tuple(first.values())[::-1]


def _of_series(case: Case) -> list[Doubt]:
    """That it may be a part of what somebody took for one image."""
    series = case.channels[0].series if case.channels else None
    if series is None or not series.siblings:
        return []
    words = (
        f"its DICOM series holds {series.siblings + 1} images, by patient, kind, orientation or acquisition, of which "
        f"each is answered on its own; this one has {len(series.slices)} slices. Is it whole?"
    )
    return [Doubt("SERIES_SEVERAL", words)]


def _of_kind(study: Study, volume: Volume, picture: bool) -> list[Doubt]:
    """What a file without a modality gives away."""
    if study.modality != "ct" or volume.modality is not None:
        return []
    if picture:
        return [Doubt("MODALITY_MISMATCH", "a picture holds no Hounsfield units; the network was trained on CT.")]
    values = sample(volume.voxels[0])
    darkest = float(np.percentile(values, 1))
    if study.preprocess.window_hu[0] <= LUNG_HU and darkest > AIR_HU:
        words = f"hardly a voxel is as dark as air (1 % lie below {darkest:.0f}); is it CT, in Hounsfield units?"
        return [Doubt("MODALITY_MISMATCH", words)]
    return []
