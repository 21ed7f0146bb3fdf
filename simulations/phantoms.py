"""Data sets of made-up chest CTs from several hospitals, written once and kept: NIfTI files and a manifest.

Every patient is a function of the plan's seed, the site's name and the patient's number, so a folder that was
begun can be finished by any process, and two that write it at once write the same bytes.
"""

import csv
import gzip
import hashlib
import io
import math
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from zlib import crc32

import nibabel
import numpy as np
from numpy.typing import NDArray

from shared_models.errors import ProcessFailed, StudyInvalid
from shared_models.files import canonical_json, read_json, write_atomic, write_json
from simulations.anatomy import LUNG_SPAN_MM, Body, Field, Nodule, Point, cut, grid
from simulations.scanner import SITES, Site, acquire, site_named

GENERATOR = 3  # raise it whenever equal plans would give other files
TOLD = 10  # lines about a phantom that is being made
KINDS = ("solid", "part-solid", "ground-glass", "calcified")
MANIFEST = ("site", "patient_id", "image", "mask", "truth", "split", "sex", "age", "nodules")
NODULES = ("patient_id", "x_mm", "y_mm", "z_mm", "diameter_mm", "type", "malignancy")
_nifti: Any = nibabel.Nifti1Image  # has no types


Shift = Literal["both", "image", "label"]
TestLabels = Literal["site", "truth"]


@dataclass(frozen=True, slots=True)
class PhantomPlan:
    """What a data set holds.

    Attributes:
        sites: how many, the built-in ones first, or their names; a name beyond those gets a scanner drawn by seed.
        train, val, test: patients of each site; a patient has one image and is in one split.
        slices, size: planes of an image, spread from the tops of the lungs to the domes; pixels along its edges.
        nodules: mean number in a patient.
        shift: what sites differ in: `both` images and labels; `image` alone: scanners and patients, all labels exact;
            `label` alone: how readers draw, all images by the scanner of the first built-in site.
        test_labels: what test patients are scored against: the `site` reader's label, or the `truth`.
    """

    sites: int | tuple[str, ...] = 3
    train: int = 16
    val: int = 4
    test: int = 6
    slices: int = 6
    size: int = 128
    seed: int = 0
    nodules: float = 1.6
    shift: Shift = "both"
    test_labels: TestLabels = "site"

    def __post_init__(self) -> None:
        names = site_names(self)
        bad = [name for name in names if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,39}", name)]
        if bad or not names or len(set(names)) < len(names):
            raise StudyInvalid(
                f"phantom plan: sites {list(names)} do not name at least one folder each. Use different names of "
                f"lower-case letters, digits, - and _, or a number of sites from 1."
            )
        for key, kinds in (("shift", get_args(Shift)), ("test_labels", get_args(TestLabels))):
            if getattr(self, key) not in kinds:
                raise StudyInvalid(f"phantom plan: {key} {getattr(self, key)!r}; allowed are {', '.join(kinds)}.")
        few = [k for k in ("train", "val", "test", "seed", "nodules") if getattr(self, k) < 0]
        if few or self.train + self.val + self.test == 0 or self.slices < 1 or not 16 <= self.size <= 1024:
            raise StudyInvalid(
                f"phantom plan: {self} cannot be drawn. Give at least one patient and one slice, 16 to 1024 pixels, "
                f"and nothing below zero."
            )


def site_names(plan: PhantomPlan) -> tuple[str, ...]:
    """The sites of a plan: north, south, east, west, then site-05 and so on."""
    if not isinstance(plan.sites, int):
        return tuple(plan.sites)
    further = (f"site-{number:02d}" for number in range(len(SITES) + 1, plan.sites + 1))
    return (*list(SITES)[: max(plan.sites, 0)], *further)


def site_of(name: str, plan: PhantomPlan) -> Site:
    """The hospital of that name under the plan's shift."""
    site = site_named(name, plan.seed)
    if plan.shift == "image":
        return replace(site, style="exact")
    if plan.shift == "label":
        return replace(next(iter(SITES.values())), name=name, style=site.style)
    return site


def folder_name(plan: PhantomPlan) -> str:
    named = asdict(replace(plan, sites=site_names(plan)))
    for key, usual in (("shift", "both"), ("test_labels", "site")):
        if named[key] == usual:  # such plans had names before there were these keys
            del named[key]
    digest = hashlib.sha256(canonical_json({"generator": GENERATOR, "plan": named})).hexdigest()
    return f"phantom-{digest[:12]}"


def phantom(
    root: Path, plan: PhantomPlan, processes: int = 2, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Returns the plan's data set `root/phantom-<digest>`, written first if it is not there whole.

    Patients that an earlier, interrupted call wrote are kept. `progress` hears (patients done, patients in all).
    With more than one process the caller's main module must be importable, as for any `multiprocessing` spawn.
    """
    folder = root / folder_name(plan)
    if (folder / "manifest.csv").exists():
        return folder
    everyone = [(name, n) for name in site_names(plan) for n in range(plan.train + plan.val + plan.test)]
    missing = [who for who in everyone if not record_of(folder, *who).exists()]
    folder.mkdir(parents=True, exist_ok=True)
    draw = partial(write_patient, folder, plan)
    for written, _ in enumerate(drawn(draw, folder, missing, processes)):
        if progress:
            progress(len(everyone) - len(missing) + written, len(everyone))
    records = [read_json(record_of(folder, *who)) for who in everyone]
    write_atomic(folder / "nodules.csv", table(NODULES, [row for r in records for row in r["nodules"]]))
    write_atomic(folder / "manifest.csv", table(MANIFEST, [r["patient"] for r in records]))  # last: now it is whole
    return folder


def in_lines(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Progress (patients done, patients in all) in a few lines, for who sees no bar."""
    said: list[int] = []

    def progress(done: int, of: int) -> None:
        if done not in said and (done in (0, of) or done % max(1, of // TOLD) == 0):
            said.append(done)
            say(f"phantom: {done} of {of}")

    return progress


def drawn(
    draw: Callable[[str, int], None], folder: Path, missing: Sequence[tuple[str, int]], processes: int
) -> Iterator[None]:
    """Calls `draw` for each (site, patient) in any order; yields once before the first and once after each.

    Raises:
        ProcessFailed: one of the processes died.
    """
    yield
    if processes <= 1 or len(missing) < 2:
        for who in missing:
            draw(*who)
            yield
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(missing)), spawn, initializer=_leave_ctrl_c_to_the_caller) as pool:
        try:
            for future in as_completed([pool.submit(draw, *who) for who in missing]):
                future.result()
                yield
        except BrokenProcessPool as error:
            raise ProcessFailed(
                f"{folder}: a process that draws phantoms ended early, most often for want of memory. The patients "
                f"written so far are kept: run the same command again, with fewer processes."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _leave_ctrl_c_to_the_caller() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_patient(folder: Path, plan: PhantomPlan, name: str, number: int) -> None:
    """Draws one patient and writes image, label, truth, and last the record that says they are whole."""
    record = record_of(folder, name, number)
    if record.exists():  # by another process, meanwhile
        return
    site = site_of(name, plan)
    rng = np.random.default_rng([plan.seed, crc32(name.encode()), number])
    body, planes_mm = draw_patient(rng, site, plan)
    scan = acquire(body, site, planes_mm, plan.size, rng)
    who = record.stem
    files = [f"{name}/{kind}/{who}.nii.gz" for kind in ("images", "masks", "truth")]
    voxels: list[NDArray[Any]] = [scan.hu, scan.mask, scan.truth]
    for file, content in zip(files, voxels, strict=True):
        write_atomic(folder / file, nifti(content, scan.affine_ras))
    split = "train" if number < plan.train else "val" if number < plan.train + plan.val else "test"
    labelled = files[2] if split == "test" and plan.test_labels == "truth" else files[1]
    row = [name, who, files[0], labelled, files[2], split, "F" if body.female else "M", body.age, len(scan.nodules)]
    nodules = [
        [who, *(round(c, 2) for c in n.centre_mm), round(n.diameter_mm, 2), n.kind, int(n.malignant)]
        for n in scan.nodules
    ]
    write_json(record, {"patient": row, "nodules": nodules})


def record_of(folder: Path, name: str, number: int) -> Path:
    return folder / "patients" / f"{name}-{number + 1:04d}.json"


def nifti(voxels: NDArray[Any], affine_ras: NDArray[np.float64]) -> bytes:
    """A .nii.gz whose bytes follow from its content alone."""
    image: Any = _nifti(voxels, affine_ras)
    image.set_sform(affine_ras, code="scanner")
    image.set_qform(affine_ras, code="scanner")
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def draw_patient(rng: np.random.Generator, site: Site, plan: PhantomPlan) -> tuple[Body, NDArray[np.float64]]:
    """Somebody whom this site scans, and the heights (mm of the body) at which it does."""
    bare = grow(rng, site)
    points = lattice(bare)
    body = with_vessels(bare, points, rng)
    low, high = (end * body.scale[2] for end in LUNG_SPAN_MM)
    planes_mm = np.linspace(low, high, plan.slices) if plan.slices > 1 else np.array([(low + high) / 2])
    return replace(body, nodules=draw_nodules(rng, body, points, planes_mm, plan.nodules)), planes_mm


def draw_nodules(
    rng: np.random.Generator,
    body: Body,
    points: Field,
    planes_mm: NDArray[np.float64],
    mean: float,
    between_mm: tuple[float, float] | None = None,
) -> tuple[Nodule, ...]:
    """Nodules wholly inside the lungs and apart from each other, each met by one of the planes at least.

    Args:
        between_mm: diameters are drawn evenly from here, instead of as screening finds them.
    """
    found: list[Nodule] = []
    count = int(rng.poisson(mean))
    for _ in range(count):
        if between_mm is None:
            diameter_mm = float(np.clip(rng.lognormal(2.1, 0.5), 4, 30))
        else:
            diameter_mm = float(rng.uniform(*between_mm))
        kind = str(rng.choice(KINDS, p=(0.62, 0.14, 0.16, 0.08)))
        rough = kind != "calcified" and rng.uniform() < 0.35
        spiculation = float(rng.uniform(0.15, 0.4)) if rough else 0.0
        lobulation = float(rng.uniform(0, 0.18))
        reach_mm = diameter_mm / 2 * (1 + lobulation + spiculation) + 1.5
        height = float(rng.choice(planes_mm) + rng.uniform(-0.3, 0.3) * diameter_mm)
        near = points[(np.abs(points[:, 2] - height) < 4) & (points[:, 3] > reach_mm)]
        for x, y in rng.permutation(near)[:30, :2] + rng.uniform(-2, 2, (min(len(near), 30), 2)):
            centre = (float(x), float(y), height)
            if all(math.dist(centre, n.centre_mm) > reach_mm + n.diameter_mm for n in found) and _holds(
                body, centre, reach_mm
            ):
                malignant = bool(rng.uniform() < malignancy(body, centre, diameter_mm, kind, spiculation, count))
                phase = float(rng.uniform(0, 2 * np.pi))
                found.append(Nodule(centre, diameter_mm, kind, malignant, lobulation, spiculation, phase))
                break
    return tuple(found)


def _holds(body: Body, centre: Point, reach_mm: float) -> bool:
    """Whether a ball lies wholly inside the lungs, as seen in seven planes through it."""
    x, y, z = centre
    pixel = grid(body, np.full((1, 1), x, np.float32), np.full((1, 1), y, np.float32), 1.0)
    return all(
        float(-cut(body, pixel, z + share * reach_mm).lung_mm[0, 0]) > reach_mm * math.sqrt(1 - share**2)
        for share in (0, -0.9, 0.9, -0.6, 0.6, -0.3, 0.3)
    )


def malignancy(body: Body, centre_mm: Point, diameter_mm: float, kind: str, spiculation: float, count: int) -> float:
    """Probability of cancer after McWilliams et al. 2013 (model 2b), raised by 2.5 in the logit: a small data set
    is to hold both kinds. Calcified nodules count as benign.
    """
    if kind == "calcified":
        return 0.01
    logit = (
        2.5
        - 6.7892
        + 0.0287 * (body.age - 62)
        + 0.6011 * body.female
        + 0.2953 * (body.emphysema_hu > 0)
        - 5.3854 * ((diameter_mm / 10) ** -0.5 - 1.58113883)
        + {"ground-glass": -0.1276, "part-solid": 0.377}.get(kind, 0.0)
        + 0.6581 * (centre_mm[2] > 10)
        - 0.0824 * (count - 4)
        + 0.7729 * (spiculation > 0)
    )
    return 1 / (1 + math.exp(-logit))


def grow(rng: np.random.Generator, site: Site) -> Body:
    """A body without vessels and nodules."""
    female, age = bool(rng.uniform() < 0.45), int(np.clip(rng.normal(63, 9), 40, 88))
    size = rng.normal(1, 0.05) * (0.94 if female else 1.02)
    fat_mm = float(np.clip(rng.lognormal(2.6, 0.4), 4, 38))
    waves = np.stack(
        [*rng.uniform(-0.022, 0.022, (2, 5)), rng.uniform(0, 6.28, 5), *rng.normal(0, 1.7, (2, 5))], axis=1
    )
    scale = tuple(float(np.clip(size * rng.normal(1, s), 0.86, 1.16)) for s in (0.04, 0.05, 0.04))
    empty = np.zeros((0, 7), np.float32)
    return Body(
        female=female,
        age=age,
        scale=(scale[0], scale[1], scale[2]),
        waves=waves.astype(np.float32),
        dome_mm=(float(rng.normal(-60, 6)), float(rng.normal(-70, 6))),
        fat_mm=fat_mm,
        muscle=float(np.clip(rng.normal(0.9 if female else 1.05, 0.1), 0.7, 1.3)),
        heart=float(np.clip(rng.normal(1 + 0.002 * (age - 60), 0.05), 0.88, 1.13)),
        aorta=float(np.clip(rng.normal(1 + 0.004 * (age - 60), 0.05), 0.85, 1.25)),
        bone=float(np.clip(rng.normal(1 - 0.012 * (age - 60), 0.15), 0.5, 1.5)),
        lung_hu=float(np.clip(rng.normal(site.lung_hu, 18), -920, -600)),
        gravity_hu=float(rng.uniform(25, 60)),
        atelectasis_hu=float(site.atelectasis_hu * rng.uniform(0.5, 1.5)),
        emphysema_hu=float(max(0, site.emphysema_hu * rng.normal(1, 0.5))),
        vessels=empty,
        bronchi=empty,
        nodules=(),
    )


def with_vessels(body: Body, points: Field, rng: np.random.Generator) -> Body:
    """Gives each lung an artery, a vein, and bronchi beside the wider arteries; `points` as from `lattice`."""
    trees = []
    for side in (-1, 1):
        lung = points[(points[:, 0] * side > 0) & (points[:, 3] > 5), :3]
        for root in ((38, 2, -12), (36, 0, -30)):
            ends = rng.choice(lung, 150, replace=False) + rng.uniform(-3, 3, (150, 3))
            trees.append(_tree(rng, np.array(root) * (side, 1, 1) * body.scale, ends))
    wide = np.concatenate(trees[::2])
    wide = wide[wide[:, 6] > 1.8]
    beside = np.cross(wide[:, 3:6] - wide[:, :3], (0.3, 0.2, 0.93))
    beside *= 2.0 * wide[:, 6:] / (np.linalg.norm(beside, axis=1, keepdims=True) + 1e-6)
    bronchi = np.concatenate([wide[:, :3] + beside, wide[:, 3:6] + beside, 0.7 * wide[:, 6:]], axis=1)
    return replace(body, vessels=np.concatenate(trees), bronchi=bronchi.astype(np.float32))


def lattice(body: Body, step_mm: float = 6.0) -> NDArray[np.float32]:
    """Points inside the lungs with their depth: float32[n, 4], x, y, z in mm of the body and mm below the surface."""
    x, y = np.meshgrid(np.arange(-150, 151, step_mm, dtype=np.float32), np.arange(-100, 101, step_mm, dtype=np.float32))
    g = grid(body, x, y, step_mm)
    found = []
    for z in np.arange(-120, 105, step_mm):
        deep = -cut(body, g, float(z) * body.scale[2]).lung_mm
        at = deep > 0
        found.append(np.stack([x[at], y[at], np.full(at.sum(), z * body.scale[2], np.float32), deep[at]], axis=1))
    return np.concatenate(found)


def _tree(rng: np.random.Generator, root: NDArray[np.float64], ends: NDArray[np.float64]) -> NDArray[np.float32]:
    """Joins each end, nearest first, to the node that makes the way to it short; radii grow with the ends they feed."""
    nodes = np.empty((len(ends) * 40 + 1, 3))
    way = np.empty(len(nodes))
    parent = np.zeros(len(nodes), np.intp)
    nodes[0], way[0], count, tips = root, 0, 1, []
    for end in ends[np.argsort(np.linalg.norm(ends - root, axis=1))]:
        gap = np.linalg.norm(nodes[:count] - end, axis=1)
        at = int(np.argmin(gap + 0.45 * way[:count]))
        pieces = max(int(gap[at] / 7), 1)
        line = np.linspace(nodes[at], end, pieces + 1)[1:]
        bow = np.sin(np.linspace(0, np.pi, pieces + 1)[1:])[:, None] * rng.normal(0, 0.08 * gap[at], 3)
        fresh = np.arange(count, count + pieces)
        nodes[fresh] = line + bow
        way[fresh] = way[at] + gap[at] * np.arange(1, pieces + 1) / pieces
        parent[fresh] = [at, *fresh[:-1]]
        count += pieces
        tips.append(count - 1)
    load = np.zeros(count)
    load[tips] = 1
    for node in range(count - 1, 0, -1):
        load[parent[node]] += load[node]
    radius = 0.85 * load[1:, None] ** 0.36
    return np.concatenate([nodes[parent[1:count]], nodes[1:count], radius], axis=1).astype(np.float32)
