"""From integer histograms that add up across sites to preprocessing, patch, batch and network.

A fingerprint is a set of counts on fixed grids, so that sites merge by addition and a secure sum can carry it: a case
adds at most 10,000 to any of its numbers (to the two sums of intensities at most 10^13). Spacings, shapes and extents
are rounded to their grid and read as order statistics; rounding keeps order, so the federation reads what pooled cases
would give, to the last digit. The plan follows nnU-Net (Isensee et al. 2021), as its version 2 has it.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import OrderRefused, StudyInvalid, UpdateRejected
from shared_models.files import canonical_json
from shared_models.parse import STRICT, Counts, plain

Axes: TypeAlias = tuple[Counts, Counts, Counts]  # along I, J, K

PER_CASE = 10_000  # counts of one case's intensities, however many voxels it has
LOWEST_HU, BIN_HU, BINS_HU = -1024, 4, 1024  # bin k holds the whole numbers from -1024 + 4 k on, to 3071
SPACING_UM = np.r_[5:1001:5, 1050:5001:50, 5500:12001:500, 15000:50001:5000]  # 0.625 mm and other usual ones are on it
LENGTH = np.r_[1:129, 132:513:4, 528:4097:16]  # voxels or mm; a few thick slices are counted to the slice
CROP_PERMILLE = np.arange(25, 1000, 50)  # the middles of 20 bins
MOST_LABELS = 32
MOST_CASES = 2**20  # of one site
BLOCK_VOXELS = 2**22  # looked at together: a whole body as indices would be 8 bytes a voxel
MOST_GREY = 100_000  # stored values of MR and pictures beyond it are counted as this
SHORTEST_EDGE = 4  # of the deepest level, along axes that are halved
FEWEST_LEVELS = 3  # of MONAI's DynUNet


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the plan has to know of some cases. A single case may stand alone at a place of a grid: `released` looks at
    a site as a whole, and secure aggregation is what hides the site.

    Attributes:
        cases, labelled: images, and those of them with any labelled voxel.
        intensity: CT: of labelled voxels, in bins of 4 HU, each labelled case in equal parts; else zeros. Several
            channels (phases of contrast) count alike: Hounsfield units are one scale, and are mapped as one.
        spacing, shape, extent: cases by their value on `SPACING_UM`, on `LENGTH` (voxels after cropping to what is not
            0 in every channel), and on `LENGTH` again (mm: shape times spacing. The shape after resampling follows
            from it, and not from the other two, whose joint distribution is lost).
        crop: cases by the share of their voxels that cropping leaves, on `CROP_PERMILLE`.
        present: cases that hold label k + 1.
        sum_milli, square_milli: not CT: sums over labelled cases of the mean of x, and of x squared, in thousandths;
            of all channels. They tell of the data and decide nothing: such images are standardised each by itself,
            channel by channel.

    Raises:
        ValueError: numbers that no cases can have; they may come from another machine.
    """

    __pydantic_config__ = STRICT
    cases: int
    labelled: int
    intensity: Counts
    spacing: Axes
    shape: Axes
    extent: Axes
    crop: Counts
    present: Counts
    sum_milli: int = 0
    square_milli: int = 0

    def __post_init__(self) -> None:
        lengths = [(self.intensity, BINS_HU), (self.crop, len(CROP_PERMILLE)), (self.present, MOST_LABELS)]
        for axes, grid in ((self.spacing, SPACING_UM), (self.shape, LENGTH), (self.extent, LENGTH)):
            lengths += [(counts, len(grid)) for counts in axes]
        for counts, length in lengths:
            if len(counts) != length:
                raise ValueError(f"a histogram has {len(counts)} numbers, {length} are agreed on")
            if min(counts) < 0:
                raise ValueError("a count lies below 0")
        if not 0 <= self.labelled <= self.cases:
            raise ValueError(f"{self.labelled} of {self.cases} cases cannot be labelled")
        if any(sum(counts) != self.cases for counts in (*self.spacing, *self.shape, *self.extent, self.crop)):
            raise ValueError(f"a histogram does not count each of {self.cases} cases once")
        if sum(self.intensity) not in (0, PER_CASE * self.labelled):
            raise ValueError(f"{self.labelled} labelled cases cannot have {sum(self.intensity)} intensities")
        if max(self.present) > self.labelled:
            raise ValueError(f"{max(self.present)} of {self.labelled} labelled cases cannot hold a label")
        if not _can_be_moments(self.labelled, self.sum_milli, self.square_milli):
            raise ValueError(f"{self.labelled} cases cannot have the sums {self.sum_milli} and {self.square_milli}")


def _can_be_moments(cases: int, total: int, squares: int) -> bool:
    """Cauchy and Schwarz, each case rounded by up to half a unit."""
    least = max(0, 2 * abs(total) - cases)
    return 0 <= squares <= 1000 * MOST_GREY**2 * cases and least**2 <= 2000 * cases * (2 * squares + cases)


def _zeros(length: int) -> Counts:
    return (0,) * length


def _axes(length: int) -> Axes:
    return _zeros(length), _zeros(length), _zeros(length)


NO_CASES = Fingerprint(
    0, 0, _zeros(BINS_HU), _axes(len(SPACING_UM)), _axes(len(LENGTH)), _axes(len(LENGTH)),
    _zeros(len(CROP_PERMILLE)), _zeros(MOST_LABELS),
)  # fmt: skip


def merge(a: Fingerprint, b: Fingerprint) -> Fingerprint:
    """The cases of both; associative and commutative, with `NO_CASES` as zero."""
    return Fingerprint(*(_sum(getattr(a, f.name), getattr(b, f.name)) for f in fields(Fingerprint)))


def total(parts: Iterable[Fingerprint]) -> Fingerprint:
    return reduce(merge, parts, NO_CASES)


def _sum(a: Any, b: Any) -> Any:
    return tuple(map(_sum, a, b)) if isinstance(a, tuple) else a + b


def fingerprint_of(
    voxels: NDArray[np.float32],
    labels: NDArray[np.uint8],
    spacing_mm: Sequence[float],
    ct: bool,
    label_count: int = MOST_LABELS,
) -> Fingerprint:
    """The fingerprint of one case on its native grid: voxels [C, I, J, K], or [I, J, K] of a single channel, and labels
    [I, J, K]; label values above `label_count` are background here (127 is `ignore`)."""
    channels = voxels.reshape(-1, *labels.shape)
    box = _box(channels)
    spacing_um = [round(float(mm) * 1000) for mm in spacing_mm]  # a header's 0.99999988 is 1
    extent_mm = [n * um / 1000 for n, um in zip(box, spacing_um, strict=True)]
    bins, values, grey = np.zeros(BINS_HU, np.int64), np.zeros(256, np.int64), np.zeros(2)
    for block in _blocks(channels):
        marks = labels[block]
        chosen = (marks > 0) & (marks <= label_count)
        found = np.clip(channels[:, block][:, chosen], -MOST_GREY, MOST_GREY).astype(np.float64).ravel()
        values += np.bincount(marks[chosen], minlength=256)
        at = np.floor((found - (LOWEST_HU - 0.5)) / BIN_HU)
        bins += np.bincount(np.clip(at, 0, BINS_HU - 1).astype(np.intp), minlength=BINS_HU)
        grey += found.sum(), np.square(found).sum()
    count = int(values.sum())
    mean, square = (0, 0) if ct or not count else (round(1000 * float(each) / count / len(channels)) for each in grey)
    return Fingerprint(
        cases=1,
        labelled=int(count > 0),
        intensity=_in_equal_parts(bins) if ct and count else _zeros(BINS_HU),
        spacing=_each_on(SPACING_UM, spacing_um),
        shape=_each_on(LENGTH, box),
        extent=_each_on(LENGTH, extent_mm),
        crop=_on(CROP_PERMILLE, 1000 * math.prod(box) / labels.size),
        present=tuple((values[1 : MOST_LABELS + 1] > 0).astype(int).tolist()),
        sum_milli=mean,
        square_milli=square,
    )


def _in_equal_parts(bins: NDArray[np.int64]) -> Counts:
    """Counts that add up to `PER_CASE`. Running sums are rounded, not counts, so that thin tails keep their weight."""
    summed = np.cumsum(bins)
    return tuple(np.diff(np.rint(summed * (PER_CASE / summed[-1])).astype(np.int64), prepend=0).tolist())


def _box(channels: NDArray[np.float32]) -> tuple[int, int, int]:
    """Edges of the smallest box that holds all voxels that are not 0 in some channel; the whole where there are none
    (Isensee et al. 2021: cropping)."""
    shape = channels.shape[1:]
    occupied = [np.zeros(n, np.bool_) for n in shape]
    for block in _blocks(channels):
        solid = (channels[:, block] != 0).any(axis=0)
        planes = solid.any(axis=0)
        occupied[0][block] = solid.any(axis=(1, 2))
        occupied[1] |= planes.any(axis=1)
        occupied[2] |= planes.any(axis=0)
    sides = [np.flatnonzero(axis) for axis in occupied]
    i, j, k = (int(s[-1] - s[0]) + 1 if s.size else n for s, n in zip(sides, shape, strict=True))
    return i, j, k


def _blocks(channels: NDArray[Any]) -> Iterator[slice]:
    """Pieces of axis I that hold at most `BLOCK_VOXELS` (or one plane)."""
    step = max(1, BLOCK_VOXELS // max(1, channels[:, 0].size))
    return (slice(at, at + step) for at in range(0, channels.shape[1], step))


def _on(grid: NDArray[np.int64], value: float) -> Counts:
    """One case, at the grid's nearest point; from half-way on at the upper one."""
    at = int(np.searchsorted((grid[1:] + grid[:-1]) / 2, value, side="right"))
    return (*_zeros(at), 1, *_zeros(len(grid) - at - 1))


def _each_on(grid: NDArray[np.int64], values: Sequence[float]) -> Axes:
    i, j, k = (_on(grid, value) for value in values)
    return i, j, k


def released(fingerprint: Fingerprint, smallest_count: int) -> Fingerprint:
    """The fingerprint, if it may leave its site as it is.

    Raises:
        OrderRefused: `FEW_CASES`: of fewer cases than `smallest_count`, all of them or those in whose labels grey
            levels were counted, only a sum with other sites may be seen.
    """
    if min(fingerprint.cases, fingerprint.labelled) < smallest_count:
        raise OrderRefused(
            "FEW_CASES",
            f"{fingerprint.cases} cases for training, something is marked in {fingerprint.labelled}; counts of fewer "
            f"than {smallest_count} do not leave this site. Add cases, or take part in studies whose plan is given.",
        )
    return fingerprint


def doubted(fingerprint: Fingerprint, site: str, ct: bool, label_count: int, sites: int = 1) -> Fingerprint:
    """A site's fingerprint as it came, or that of several `sites` together; what gets past may be merged.

    Raises:
        UpdateRejected: `FINGERPRINT_RANGE` or `FINGERPRINT_KIND`.
    """
    if not 0 < fingerprint.labelled <= fingerprint.cases <= MOST_CASES * sites:
        raise UpdateRejected(
            "FINGERPRINT_RANGE",
            f"site {site!r}: claims {fingerprint.labelled} labelled of {fingerprint.cases} cases, allowed are 1 to "
            f"{MOST_CASES * sites}. See the site's manifest.",
        )
    grey = fingerprint.sum_milli, fingerprint.square_milli
    if any(fingerprint.present[label_count:]) or any(grey if ct else fingerprint.intensity) or (
        ct and not any(fingerprint.intensity)
    ):  # fmt: skip
        raise UpdateRejected(
            "FINGERPRINT_KIND",
            f"site {site!r}: counts of another modality or of labels that the study does not have. "
            f"Site and coordinator must run the same released version.",
        )
    return fingerprint


def percentile(histogram: Sequence[int], q: float) -> float:
    """HU below which `q` per cent of the counts lie; within a bin they are taken to lie evenly. NaN without counts."""
    summed = np.cumsum(np.asarray(histogram, np.float64))
    if not summed[-1]:
        return math.nan
    wanted = summed[-1] * q / 100
    at = int(np.searchsorted(summed, wanted, side="left")) if wanted else int(np.flatnonzero(summed)[0])
    before = summed[at - 1] if at else 0.0
    return float(LOWEST_HU - 0.5 + BIN_HU * (at + (wanted - before) / histogram[at]))


def moments(histogram: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation in HU; within a bin the counts are taken to lie evenly. NaN without counts."""
    counts = np.asarray(histogram, np.float64)
    if not counts.sum():
        return math.nan, math.nan
    middles = LOWEST_HU - 0.5 + BIN_HU * (np.arange(BINS_HU) + 0.5)
    mean = float(counts @ middles / counts.sum())
    # whole numbers in bins of 4 spread by (4^2 - 1) / 12
    return mean, math.sqrt(float(counts @ (middles - mean) ** 2 / counts.sum()) + (BIN_HU**2 - 1) / 12)


def nth(counts: Sequence[int], grid: NDArray[np.int64], q: float = 50) -> int:
    """The grid's value at `q` per cent of the cases: one that some case has (numpy's `inverted_cdf`)."""
    summed = np.cumsum(np.asarray(counts, np.int64))
    return int(grid[np.searchsorted(summed, max(1, math.ceil(summed[-1] * q / 100)))])


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan must fit into.

    Attributes:
        memory_bytes: of the smallest accelerator that trains it.
        labels: output channels.
        edge_most: of a patch, in voxels.
    """

    memory_bytes: int
    spatial_dims: Literal[2, 3]
    modality: Literal["ct", "xray", "mr", "photo"]
    labels: int = 1
    batch_least: int = 2
    batch_most: int = 256
    edge_most: int = 1024


@dataclass(frozen=True, slots=True)
class Topology:
    """A U-Net's levels for a patch: strides and kernels of each encoder level, the first at full size."""

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Preprocessing, patch, batch and network of a run; data that a study takes over, known by its digest.

    Attributes:
        fingerprint_sha256, cases: of what it was derived from.
        spacing_mm: voxel size to resample to, along rows, columns[, planes]; None for pictures, which state none.
        median_shape: of a case at that spacing, along I, J, K.
        patch: voxels of one example.
        strides, kernels: of each level of the encoder, the first level at full size.
        clip_hu, mean, deviation: CT: clip, subtract, divide; None: each image by its own mean and deviation.
        nonzero: those are taken over voxels that are not 0, and 0 stays 0.
    """

    __pydantic_config__ = STRICT
    fingerprint_sha256: str
    cases: int
    spatial_dims: Literal[2, 3]
    spacing_mm: tuple[float, ...] | None
    median_shape: tuple[int, int, int]
    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    batch_size: int
    clip_hu: tuple[float, float] | None
    mean: float | None
    deviation: float | None
    nonzero: bool

    def __post_init__(self) -> None:
        real = [*(self.spacing_mm or ()), *(self.clip_hu or ()), self.mean or 0.0, self.deviation or 0.0]
        if not all(math.isfinite(x) for x in real):
            raise ValueError("a plan holds finite numbers only")


def derive(fingerprint: Fingerprint, constraints: Constraints) -> Plan:
    """The plan for the cases of a fingerprint.

    Raises:
        StudyInvalid: no labelled case, or too little memory for the smallest patch.
    """
    ct = constraints.modality == "ct"
    if not fingerprint.labelled or ct != any(fingerprint.intensity):
        raise StudyInvalid(f"the plan of a {constraints.modality} study needs labelled {constraints.modality} cases.")
    target_mm = target_spacing(fingerprint)
    extent_mm = [nth(counts, LENGTH) for counts in fingerprint.extent]
    i, j, k = (max(1, round(mm / step)) for mm, step in zip(extent_mm, target_mm, strict=True))
    dims = constraints.spatial_dims
    chosen, batch_size = fitted(target_mm[:dims], (i, j, k), fingerprint.cases, constraints)
    low, high = (round(percentile(fingerprint.intensity, q), 2) for q in (0.5, 99.5))
    mean, deviation = (round(x, 3) for x in moments(fingerprint.intensity))
    return Plan(
        fingerprint_sha256=hashlib.sha256(canonical_json(plain(fingerprint))).hexdigest(),
        cases=fingerprint.cases,
        spatial_dims=dims,
        spacing_mm=None if constraints.modality in ("xray", "photo") else target_mm[:dims],
        median_shape=(i, j, k),
        patch=chosen.patch,
        strides=chosen.strides,
        kernels=chosen.kernels,
        features=features_of(chosen),
        batch_size=batch_size,
        # a foreground of one value still has a range
        clip_hu=(low, max(high, low + BIN_HU)) if ct else None,
        mean=mean if ct else None,
        deviation=deviation if ct else None,
        nonzero=not ct and nth(fingerprint.crop, CROP_PERMILLE) < 750,
    )


def target_spacing(fingerprint: Fingerprint) -> tuple[float, float, float]:
    """Median voxel size in mm; on an axis more than three times coarser and three times shorter (in voxels) than the
    others the 10th percentile, so that thin slices are not thrown away for thick ones."""
    um = [nth(counts, SPACING_UM) for counts in fingerprint.spacing]
    voxels = [nth(counts, LENGTH) for counts in fingerprint.shape]
    worst = int(np.argmax(um))
    others = [axis for axis in range(3) if axis != worst]
    coarsest = max(um[axis] for axis in others)
    if um[worst] > 3 * coarsest and 3 * voxels[worst] < min(voxels[axis] for axis in others):
        um[worst] = max(coarsest, nth(fingerprint.spacing[worst], SPACING_UM, 10))
    i, j, k = (each / 1000 for each in um)
    return i, j, k


def fitted(
    spacing_mm: tuple[float, ...], median_shape: tuple[int, int, int], cases: int, constraints: Constraints
) -> tuple[Topology, int]:
    """The largest patch of the data's aspect whose network trains in the memory, and the batch size for what is left.

    A batch holds at most 5 % of all voxels, but never fewer than `batch_least` examples.
    """
    dims, least = len(spacing_mm), constraints.batch_least
    fits = memory_elements(constraints.memory_bytes, dims)
    edge_mm = {2: 2048, 3: 256}[dims] * math.prod(spacing_mm) ** (1 / dims)  # larger than any budget
    most = constraints.edge_most
    patch = [min(round(edge_mm / mm), n, most) for mm, n in zip(spacing_mm, median_shape, strict=False)]
    chosen = topology(spacing_mm, patch)
    while least * feature_maps(chosen, constraints.labels) > fits:
        smaller = shrunk(chosen, spacing_mm, median_shape)
        if smaller is None:
            raise StudyInvalid(
                f"memory for training: {constraints.memory_bytes} bytes do not hold {least} patches of "
                f"{'x'.join(map(str, chosen.patch))}. Allow more memory, or set spatial_dims = 2."
            )
        chosen = smaller
    share = round(0.05 * math.prod(median_shape) * cases / math.prod(chosen.patch))
    room = fits // feature_maps(chosen, constraints.labels)
    return chosen, max(least, min(room, share, constraints.batch_most))


def topology(spacing_mm: Sequence[float], size: Sequence[int]) -> Topology:
    """Levels for examples of `size`, which is padded to what they can halve.

    An axis is halved while it has 8 voxels and its voxels are less than twice as long as the finest axis that can be
    halved (an axis alone: while it has 12). It is convolved across once its voxels are less than twice the finest.
    """
    axes = range(len(size))
    edge, mm, kernel = list(size), list(spacing_mm), [1] * len(size)
    strides, kernels = [(1,) * len(size)], []
    while True:
        long = [a for a in axes if edge[a] >= 2 * SHORTEST_EDGE]
        halved = [a for a in long if mm[a] < 2 * min(mm[b] for b in long)]
        if not halved or (len(halved) == 1 and edge[halved[0]] < 3 * SHORTEST_EDGE):
            break
        kernel = [3 if mm[a] < 2 * min(mm) else kernel[a] for a in axes]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if a in halved else 1 for a in axes))
        for a in halved:
            edge[a], mm[a] = math.ceil(edge[a] / 2), mm[a] * 2
    kernels.append((3,) * len(size))
    while len(strides) < FEWEST_LEVELS:
        strides.append((1,) * len(size))
        kernels.append((3,) * len(size))
    patch = tuple(math.ceil(n / d) * d for n, d in zip(size, divisors(strides), strict=True))
    return Topology(patch, tuple(strides), tuple(kernels))


def divisors(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What the edges of an example must be multiples of."""
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def shrunk(of: Topology, spacing_mm: Sequence[float], median_shape: Sequence[int]) -> Topology | None:
    """The next smaller patch, cut along the axis that holds most of its images' length; None if it has no levels."""
    edges = list(enumerate(zip(of.patch, divisors(of.strides), strict=True)))
    held = [(n / median_shape[a], a) for a, (n, d) in edges if n > d]
    if not held:
        return None
    axis = max(held)[1]
    less = [n - d * (a == axis) for a, (n, d) in edges]
    # 256 halved six times would go to 192 and miss 224, which can be halved five times
    step = divisors(topology(spacing_mm, less).strides)[axis]
    smaller = topology(spacing_mm, [n - step * (a == axis) for a, n in enumerate(of.patch)])
    return smaller if math.prod(divisors(smaller.strides)) > 1 else None


def features_of(of: Topology) -> tuple[int, ...]:
    """32 channels, doubled at each level, up to 320 in 3-D and 512 in 2-D."""
    return tuple(min(32 * 2**level, {2: 512, 3: 320}[len(of.patch)]) for level in range(len(of.strides)))


def feature_maps(of: Topology, labels: int) -> int:
    """Numbers in all feature maps of one example: two convolutions a level, and on the way up a transposed one more."""
    size, found = of.patch, 0
    for level, (stride, features) in enumerate(zip(of.strides, features_of(of), strict=True)):
        size = tuple(n // s for n, s in zip(size, stride, strict=True))
        deepest = level == len(of.strides) - 1
        found += math.prod(size) * features * (2 if deepest else 5)
    return found + math.prod(of.patch) * labels


def memory_elements(memory_bytes: int, spatial_dims: int) -> int:
    """Numbers in feature maps that training may hold: nnU-Net's measure, 2 x 5.6e8 (3-D), 12 x 8.5e7 (2-D) in 8 GiB.

    It is meant for mixed precision: in float32 each is kept as 8.0 bytes (measured), 95 % of the memory.
    """
    return int({2: 12 * 8.5e7, 3: 2 * 5.6e8}[spatial_dims] * memory_bytes / 2**33)


def sha256(plan: Plan) -> str:
    """The digest of a plan's canonical JSON; every order and update of its run carries it."""
    return hashlib.sha256(canonical_json(plain(plan))).hexdigest()
