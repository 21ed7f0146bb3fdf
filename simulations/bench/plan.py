"""The federated plan beside what pooled data would give: intensities, voxel size, topology of the network.

    python -m simulations.bench.plan [--data DIR] [--cache DIR]

Four phantom sites that differ in scanner, voxel size and number of patients; with --data also the sites of a folder
with CT, a manifest.csv and one label (lung_nodule_ct). Federated: every site's fingerprint, as it would travel, added
up. Pooled: the raw voxels of all sites, every case in equal parts, and nnU-Net's rules on raw spacings and shapes; no
histogram. Targets: each percentile within 1 % of the pooled range (0.5 to 99.5), mean and deviation within 1 % of
theirs, the same spacing (to the grid that the plan rounds to) and the same topology.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cases import read_case, read_case_labels
from fedclient.data.images import IGNORE
from fedclient.data.listing import list_cases
from fedclient.data.manifest import sites_of
from fedclient.fingerprint import site_fingerprint
from fedclient.site import Site, open_site
from shared_models.files import canonical_json
from shared_models.parse import parse_json, plain
from shared_models.plan import (
    SPACING_UM,
    Constraints,
    Fingerprint,
    Topology,
    derive,
    fitted,
    moments,
    percentile,
    total,
)
from shared_models.study import Study, Task
from simulations.phantoms import PhantomPlan, phantom

PERCENTILES = (0.5, 5.0, 25.0, 50.0, 75.0, 95.0, 99.5)
MOST_SHARE = 0.01
MEMORY_BYTES = 8 << 30
SKEWED = {"north": (12, 64), "south": (4, 96), "east": (7, 128), "west": (3, 80)}  # patients, pixels along an edge


@dataclass(frozen=True, slots=True)
class Pooled:
    """All cases in one place.

    Attributes:
        hu, weights: labelled voxels in rising order, and their weights: 1 for each case together.
        spacing_mm, shape: float64[cases, 3], along I, J, K; shapes after cropping to what is not 0.
    """

    hu: NDArray[np.float64]
    weights: NDArray[np.float64]
    spacing_mm: NDArray[np.float64]
    shape: NDArray[np.float64]

    def percentile(self, q: float) -> float:
        summed = np.cumsum(self.weights)
        return float(self.hu[np.searchsorted(summed, summed[-1] * q / 100)])

    def moments(self) -> tuple[float, float]:
        mean = float(np.average(self.hu, weights=self.weights))
        return mean, float(np.sqrt(np.average((self.hu - mean) ** 2, weights=self.weights)))

    def spacing(self) -> NDArray[np.float64]:
        """nnU-Net's target spacing: medians, or the 10th percentile of an axis that is much coarser and shorter."""
        target, size = (_nth(of, 50) for of in (self.spacing_mm, self.shape))
        axis = int(target.argmax())
        coarsest, shortest = np.delete(target, axis).max(), np.delete(size, axis).min()
        if target[axis] > 3 * coarsest and 3 * size[axis] < shortest:
            target[axis] = max(coarsest, _nth(self.spacing_mm, 10)[axis])
        return target

    def topology(self, constraints: Constraints) -> Topology:
        target = self.spacing()
        i, j, k = _nth(np.rint(self.shape * self.spacing_mm / target), 50).astype(int).tolist()
        spacing_mm = tuple(target.tolist()[: constraints.spatial_dims])
        return fitted(spacing_mm, (i, j, k), len(self.shape), constraints)[0]


def _nth(of: NDArray[np.float64], q: float) -> NDArray[np.float64]:
    return np.asarray(np.percentile(of, q, axis=0, method="inverted_cdf"))


def pooled(sites: Sequence[Site], label: str) -> Pooled:
    """Every training case of the sites, read again, without a fingerprint."""
    levels: list[NDArray[np.float64]] = []
    weights: list[NDArray[np.float64]] = []
    spacings: list[tuple[float, ...]] = []
    shapes: list[tuple[int, ...]] = []
    for voxels, labels, spacing_mm in _cases(sites, label):
        found, counts = np.unique(voxels[(labels > 0) & (labels != IGNORE)], return_counts=True)
        levels.append(found.astype(np.float64))
        weights.append(counts / max(1, counts.sum()))
        spacings.append(spacing_mm)
        shapes.append(tuple(int(np.ptp(side)) + 1 for side in np.nonzero(voxels)))
    hu, weight = np.concatenate(levels), np.concatenate(weights)
    order = np.argsort(hu, kind="stable")
    return Pooled(hu[order], weight[order], np.array(spacings), np.array(shapes, np.float64))


def _cases(
    sites: Sequence[Site], label: str
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint8], tuple[float, ...]]]:
    for site in sites:
        for case in list_cases(site.where, site.salt).cases:
            if case.split == "train" and case.label is not None:
                image = read_case(case)
                yield image.voxels[0], read_case_labels(case, image, [label]), image.spacing_mm


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, federated and pooled; `error` is a share of what `limit` is one of."""

    name: str
    federated: str
    pooled: str
    error: float
    limit: float = MOST_SHARE

    @property
    def holds(self) -> bool:
        return self.error <= self.limit


def compared(parts: Mapping[str, Fingerprint], raw: Pooled, constraints: Constraints) -> list[Row]:
    """The plan's figures beside the pooled ones."""
    whole = total(parts.values())
    low, high = raw.percentile(0.5), raw.percentile(99.5)
    rows = []
    for q in PERCENTILES:
        ours, theirs = percentile(whole.intensity, q), raw.percentile(q)
        rows.append(Row(f"p{q:g} HU", f"{ours:.1f}", f"{theirs:.1f}", abs(ours - theirs) / (high - low)))
    for name, ours, theirs in zip(("mean HU", "deviation HU"), moments(whole.intensity), raw.moments(), strict=True):
        rows.append(Row(name, f"{ours:.2f}", f"{theirs:.2f}", abs(ours - theirs) / abs(theirs)))
    plan, spacing_mm, levels = derive(whole, constraints), raw.spacing(), raw.topology(constraints)
    for axis, ours, theirs in zip("IJK", plan.spacing_mm or (), spacing_mm.tolist(), strict=False):
        half_um = float(np.diff(SPACING_UM)[np.searchsorted(SPACING_UM[1:-1], 1000 * theirs)]) / 2
        limit = (half_um + 1e-3) / (1000 * theirs)
        rows.append(Row(f"spacing {axis} mm", f"{ours:g}", f"{theirs:.6g}", abs(ours - theirs) / theirs, limit))
    same = Topology(plan.patch, plan.strides, plan.kernels) == levels
    name, shown = f"topology {constraints.spatial_dims}-D", _shown(plan.patch, plan.strides)
    rows.append(Row(name, shown, _shown(levels.patch, levels.strides), not same, 0))
    return rows


def naive(parts: Mapping[str, Fingerprint], q: float) -> float:
    """What other systems do: the mean of the sites' own percentiles, weighted by cases."""
    return float(
        np.average([percentile(p.intensity, q) for p in parts.values()], weights=[p.cases for p in parts.values()])
    )


def _shown(patch: Sequence[int], strides: Sequence[Sequence[int]]) -> str:
    return "x".join(map(str, patch)) + " " + " ".join("".join(map(str, s)) for s in strides[1:])


def look(title: str, sites: Sequence[Site], label: str) -> bool:
    """Prints the table of some sites; true when every figure holds."""
    study = Study(name="plan", task=Task(labels=(label,)))
    parts: dict[str, Fingerprint] = {}
    for site in sites:
        sent = canonical_json(plain(site_fingerprint(site, study)))
        parts[site.name] = parse_json(Fingerprint, sent, site.name)
        print(f"{title}: {site.name}: {parts[site.name].cases} cases, {len(sent)} bytes", flush=True)
    raw = pooled(sites, label)
    two, three = (Constraints(MEMORY_BYTES, dims, study.modality) for dims in (2, 3))
    rows = compared(parts, raw, three)
    rows.append(compared(parts, raw, two)[-1])
    print(f"  {'':14} {'federated':>26} {'pooled':>26} {'error':>9}")
    for row in rows:
        mark = "" if row.holds else "  FALLS SHORT"
        print(f"  {row.name:14} {row.federated:>26} {row.pooled:>26} {row.error:9.3%}{mark}")
    theirs = raw.percentile(99.5)
    off = abs(naive(parts, 99.5) - theirs) / (theirs - raw.percentile(0.5))
    print(f"  for comparison: the mean of the sites' own p99.5 is {naive(parts, 99.5):.1f} HU, off by {off:.1%}\n")
    return all(row.holds for row in rows)


def phantom_sites(cache: Path) -> list[Site]:
    found = []
    for name, (patients, size) in SKEWED.items():
        data = phantom(cache, PhantomPlan(sites=(name,), train=patients, val=0, test=0, slices=24, size=size))
        found.append(site_of(name, data))
    return found


def site_of(name: str, data: Path) -> Site:
    return open_site({"site": name, "manifest-site": name, "data": str(data), "work": str(data)})


def main() -> None:
    words = argparse.ArgumentParser(description="The federated plan beside what pooled data would give.")
    words.add_argument("--data", type=Path, help="folder with CT, a manifest.csv that names sites, and one label")
    words.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "fedimaging" / "phantom")
    given = words.parse_args()
    sources = [("phantom", phantom_sites(given.cache), "lung")]
    if given.data:
        sources.append((given.data.name, [site_of(name, given.data) for name in sites_of(given.data)], "nodule"))
    held = [look(*source) for source in sources]
    if not all(held):
        sys.exit("falls short of its target")


if __name__ == "__main__":
    main()
