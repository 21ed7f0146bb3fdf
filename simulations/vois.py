"""Made-up regions of interest of lungs on CT: half of them hold a nodule, anywhere in them, and one knows where.

A region is a square window of one plane, cut out on the scanner's own pixels. Where its nodule lies is drawn evenly
over the window, so that nobody finds it by looking at the middle. `label` is `nodule` or `none`; `mask` is where.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import StudyInvalid
from shared_models.files import canonical_json, read_json, write_atomic, write_json
from shared_models.seeds import rng
from simulations.anatomy import LUNG_SPAN_MM
from simulations.phantoms import (
    GENERATOR,
    PhantomPlan,
    draw_nodules,
    drawn,
    grow,
    lattice,
    nifti,
    record_of,
    site_names,
    site_of,
    table,
    with_vessels,
)
from simulations.scanner import Scan, acquire

MANIFEST = ("site", "patient_id", "image", "mask", "split", "label", "diameter_mm")
PLANE = 256  # pixels along the edge of the plane that a window is cut out of
EDGE = 6  # pixels: so far from the edge of its window lies the middle of a nodule
NODULES = 2.0  # mean number in the plane of a patient who has one
AGAIN = 100  # draws of a patient in whose plane a nodule fits


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """What a data set of regions holds.

    Attributes:
        sites: how many, as a `PhantomPlan` has them.
        train, val, test: patients of each site, with one region each; every second one has a nodule in it.
        size: pixels along the edge of a region.
        between_mm: diameters of nodules; in one plane a small one is no different from a vessel that is cut across.
    """

    sites: int = 3
    train: int = 200
    val: int = 30
    test: int = 60
    size: int = 64
    between_mm: tuple[float, float] = (14.0, 30.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 32 <= self.size <= PLANE // 2 or min(self.train, self.val, self.test) < 2:
            raise StudyInvalid(
                f"regions: {self} cannot be drawn. Give two patients or more for each split, 32 to {PLANE // 2} pixels."
            )

    @property
    def people(self) -> PhantomPlan:
        """Of whom the regions are."""
        return PhantomPlan(self.sites, self.train, self.val, self.test, slices=1, size=PLANE, seed=self.seed)


def regions(
    root: Path, plan: RegionPlan, processes: int = 2, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Returns the plan's data set `root/regions-<digest>`, written first if it is not there whole.

    Raises:
        ProcessFailed: as `phantom`.
    """
    digest = hashlib.sha256(canonical_json({"generator": GENERATOR, "plan": asdict(plan)})).hexdigest()
    folder = root / f"regions-{digest[:12]}"
    if (folder / "manifest.csv").exists():
        return folder
    everyone = [(name, n) for name in site_names(plan.people) for n in range(plan.train + plan.val + plan.test)]
    missing = [who for who in everyone if not record_of(folder, *who).exists()]
    for done, _ in enumerate(drawn(partial(write_region, folder, plan), folder, missing, processes)):
        if progress:
            progress(len(everyone) - len(missing) + done, len(everyone))
    records = [read_json(record_of(folder, *who))["patient"] for who in everyone]
    write_atomic(folder / "manifest.csv", table(MANIFEST, records))  # last: now it is whole
    return folder


def write_region(folder: Path, plan: RegionPlan, name: str, number: int) -> None:
    """Draws one patient and writes the region, where the nodule is in it, and last the record."""
    record = record_of(folder, name, number)
    if record.exists():
        return
    chance = rng("region", plan.seed, name, number)
    ill = number % 2 == 0
    scan = _scan(chance, plan, name, ill)
    at = _window(chance, scan.lesion[..., 0] if ill else scan.truth[..., 0], plan.size)
    window = (*(slice(begin, begin + plan.size) for begin in at), slice(None))
    affine = scan.affine_ras.copy()
    affine[:3, 3] += affine[:3, :2] @ at
    files = [f"{name}/{kind}/{record.stem}.nii.gz" for kind in ("images", "lesions")]
    lesion = scan.lesion[window] if ill else np.zeros_like(scan.lesion[window])
    for file, voxels in zip(files, (scan.hu[window], lesion), strict=True):
        write_atomic(folder / file, nifti(np.ascontiguousarray(voxels), affine))
    split = "train" if number < plan.train else "val" if number < plan.train + plan.val else "test"
    largest = max((n.diameter_mm for n in scan.nodules), default=0.0)
    row = [name, record.stem, *files, split, "nodule" if ill else "none", round(largest, 2)]
    write_json(record, {"patient": row})


def _scan(chance: np.random.Generator, plan: RegionPlan, name: str, ill: bool) -> Scan:
    """One plane of somebody, with nodules in it or without any."""
    site = site_of(name, plan.people)
    for _ in range(AGAIN):
        bare = grow(chance, site)
        points = lattice(bare)
        body = bare
        low, high = (end * body.scale[2] for end in LUNG_SPAN_MM)
        plane_mm = np.array([chance.uniform(0.75 * low, 0.75 * high)])
        if ill:
            body = replace(body, nodules=draw_nodules(chance, body, points, plane_mm, NODULES, plan.between_mm))
            if not body.nodules:
                continue
        scan = acquire(with_vessels(body, points, chance), site, plane_mm, PLANE, chance)
        if scan.lesion.any() == ill and scan.truth.sum() > plan.size**2 / 4:
            return scan
    raise StudyInvalid(f"regions: no nodule fits into {AGAIN} patients of {name}. Choose another seed.")


def _window(chance: np.random.Generator, wanted: NDArray[np.uint8], size: int) -> NDArray[np.intp]:
    """Where a window begins that has a drawn pixel of `wanted` anywhere in it, but not at its very edge."""
    pixels = np.argwhere(wanted)
    inside = chance.integers(EDGE, size - EDGE, 2)
    begin = pixels[chance.integers(len(pixels))] - inside
    found: NDArray[np.intp] = np.clip(begin, 0, np.array(wanted.shape) - size)
    return found
