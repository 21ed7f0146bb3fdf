"""Preprocessing beside MONAI's transforms, and random crops from the cache beside slices of a plain file.

    python -m simulations.bench.pipeline [--repeats N]

CT volumes of 256 x 256 x 64 int16 NIfTI, from the file to the resampled and scaled float32 voxels: CPU time, one thread
each, in turns. MONAI: LoadImage, Orientation, Spacing (linear; in float64, its default, which counts, and in float32)
and ScaleIntensityRange. Ours: the reader and `preprocess`, asked for the very grid that MONAI's result lies on. Where
voxels become smaller both are linear and must agree. Where they become larger ours is a triangle as wide as the step
(as torch's `interpolate(antialias=True)`), so that fine lines do not turn into false ones: another computation, of up
to 100 voxels for a pixel where MONAI looks at 8, so its time and difference are shown and have no target.
Crops: patches with their masks, in batches of 4, as training takes them from the mapped cache,
float16; the floor copies slices of the same sizes out of memory-mapped files of plain float16 and uint8.
"""

import argparse
import gzip
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedclient.data import dataset
from fedclient.data.images import read_image
from fedclient.data.manifest import read_manifest
from shared_models.preprocess import Geometry, sampled
from shared_models.study import Model, Preprocess, Study
from simulations.phantoms import nifti

SHAPE = (256, 256, 64)
MOST_HU = 1e-3
LEAST_TIMES_FASTER = 5.0
MOST_OVER_FLOOR = 1.3
WIDE = (-2048.0, 2048.0)  # clips nothing, and scales by a power of two
LUNG = (-1000.0, 400.0)
BATCH, PATCH = 4, (96, 96, 64)


@dataclass(frozen=True, slots=True)
class Kind:
    """A volume of one scanner, and the voxels that a plan wants."""

    name: str
    spacing_mm: tuple[float, float, float]
    target_mm: tuple[float, float, float]
    packed: bool = False

    @property
    def shrinks(self) -> bool:
        return any(to > of for of, to in zip(self.spacing_mm, self.target_mm, strict=True))


KINDS = (
    Kind("thick slices made thin", (0.7, 0.7, 2.5), (0.7, 0.7, 1.25)),
    Kind("finer in plane", (0.9, 0.9, 2.5), (0.75, 0.75, 2.5)),
    Kind("finer along all axes", (0.8, 0.8, 1.5), (0.7, 0.7, 1.0)),
    Kind("the same, nii.gz", (0.8, 0.8, 1.5), (0.7, 0.7, 1.0), packed=True),
    Kind("coarser in plane", (0.7, 0.7, 2.5), (1.0, 1.0, 2.5)),
    Kind("coarser along all axes", (0.7, 0.7, 1.25), (1.0, 1.0, 2.5)),
)


def seconds(repeats: int, *of: Callable[[], Any]) -> list[float]:
    """The shortest of `repeats` CPU times for each, in turns, so that other work on the machine meets all alike."""
    taken = [[0.0] * len(of) for _ in range(repeats)]
    for row in taken:
        for n, call in enumerate(of):
            began = time.process_time()
            call()
            row[n] = time.process_time() - began
    return [min(column) for column in zip(*taken, strict=True)]


def write_volume(path: Path, spacing_mm: tuple[float, float, float], seed: int) -> NDArray[np.int16]:
    """A body in air with some structure and a scanner's noise; stored from left to right and front to back."""
    rng = np.random.default_rng(seed)
    i, j, k = (np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE)
    away = np.sqrt((i / 0.9)[:, None, None] ** 2 + (j / 0.7)[None, :, None] ** 2 + 0.2 * k[None, None] ** 2)
    waves = np.sin(25 * i)[:, None, None] * np.cos(19 * j)[None, :, None] + np.sin(9 * k)[None, None]
    hu = np.where(away < 1, 40 + 60 * waves, -1000) + rng.normal(0, 20, SHAPE)
    voxels = np.clip(hu, -1024, 2000).astype(np.int16)
    affine_ras = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
    affine_ras[:3, 3] = 90, 80, -40
    _write(path, voxels, affine_ras)
    return voxels


def _write(path: Path, voxels: NDArray[Any], affine_ras: NDArray[np.float64]) -> None:
    packed = nifti(voxels, affine_ras)
    path.write_bytes(packed if path.suffix == ".gz" else gzip.decompress(packed))


def monai_chain(target_mm: tuple[float, ...], window: tuple[float, float], dtype: Any) -> Callable[[Path], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import monai.transforms  # after the warnings of its import are silenced

        of: Any = monai.transforms
        chain = of.Compose(
            [
                of.LoadImage(image_only=True, ensure_channel_first=True),
                of.Orientation("RAS"),
                of.Spacing(target_mm, mode="bilinear", dtype=dtype),
                of.ScaleIntensityRange(*window, 0.0, 1.0, clip=True),
            ]
        )
    return lambda path: chain(str(path))


def ours(path: Path, geometry: Geometry, window: tuple[float, float]) -> NDArray[np.float32]:
    plan = Preprocess(size=geometry.size, fit="crop_pad", intensity="window", window_hu=window)
    images: NDArray[np.float32] = sampled(read_image(path).voxels, geometry, plan).images[0]
    return images


def grid_of(result: Any, path: Path) -> Geometry:
    """The grid that MONAI's result lies on, as its affine tells."""
    volume = read_image(path)
    index = np.linalg.solve(volume.affine_ras, result.affine.numpy().astype(np.float64))
    i, j, k = volume.voxels.shape[1:]
    steps, starts = np.round(np.diag(index)[:3], 9), np.round(index[:3, 3], 9)
    return Geometry((i, j, k), volume.spacing_mm, tuple(result.shape[1:]), tuple(starts), tuple(steps))


def look(kind: Kind, folder: Path, repeats: int) -> bool:
    """Prints the row of one kind of volume; true when it holds."""
    path = folder / ("volume.nii.gz" if kind.packed else "volume.nii")
    write_volume(path, kind.spacing_mm, seed=len(kind.name))
    theirs = monai_chain(kind.target_mm, WIDE, np.float64)(path)
    geometry = grid_of(theirs, path)
    scale = WIDE[1] - WIDE[0]
    apart = np.abs(ours(path, geometry, WIDE) - theirs.numpy()) * scale
    chains = [monai_chain(kind.target_mm, LUNG, dtype) for dtype in (np.float64, np.float32)]
    mine, monai, single = seconds(repeats, lambda: ours(path, geometry, LUNG), *(lambda c=c: c(path) for c in chains))
    faster = monai / mine
    holds = kind.shrinks or (faster >= LEAST_TIMES_FASTER and float(apart.max()) <= MOST_HU)
    print(
        f"  {kind.name:24} {monai * 1e3:7.0f} ms {mine * 1e3:7.1f} ms {faster:6.1f} x {single / mine:8.1f} x   "
        f"{float(apart.max()):9.2g} {float(np.median(apart)):9.2g}"
        f"{'  (antialiased)' if kind.shrinks else ''}{'' if holds else '  FALLS SHORT'}",
        flush=True,
    )
    return holds


def crops(folder: Path, repeats: int) -> bool:
    """Prints what a batch of patches costs; true when it holds."""
    data = folder / "data"
    data.mkdir()
    rows = ["patient_id,image,mask,split"]
    for n in range(3):
        voxels = write_volume(data / f"{n}.nii", (0.7, 0.7, 1.25), seed=n)
        affine_ras = np.diag([-0.7, -0.7, 1.25, 1.0])
        affine_ras[:3, 3] = 90, 80, -40
        _write(data / f"{n}-mask.nii", (voxels > 120).astype(np.uint8), affine_ras)
        rows.append(f"p{n},{n}.nii,{n}-mask.nii,train")
    (data / "manifest.csv").write_text("\n".join(rows))
    plan = Preprocess(size=PATCH, fit="patches", intensity="window", window_hu=LUNG, spacing_mm=(0.7, 0.7, 1.0))
    study = Study(name="pipeline", model=Model(spatial_dims=3), preprocess=plan)
    dataset.MEMORY_BYTES = 0  # as for a data set that does not fit into memory
    cases = read_manifest(data, None, "bench")
    began = time.perf_counter()
    cached = dataset.prepare(cases, study, folder / "cache")
    made_s = time.perf_counter() - began
    plain = [(_plain(folder / f"{n}.f16", c.images[0]), _plain(folder / f"{n}.u8", c.masks[0])) for n, c in
             enumerate(cached.cases)]  # fmt: skip
    steps, rng = 25, np.random.default_rng(0)

    def from_cache() -> None:
        for batch in cached.batches(BATCH, np.random.default_rng(0), steps=steps):
            assert batch.images.shape == (BATCH, 1, *PATCH)

    def as_tensors() -> None:
        for batch in cached.batches(BATCH, np.random.default_rng(0), steps=steps):
            torch.from_numpy(batch.images).float()

    def slices(masks: bool) -> None:
        for _ in range(steps * BATCH):
            image, mask = plain[int(rng.integers(len(plain)))]
            corner = [int(rng.integers(n - edge + 1)) for n, edge in zip(mask.shape, PATCH, strict=True)]
            window = tuple(slice(at, at + edge) for at, edge in zip(corner, PATCH, strict=True))
            np.array(image[(slice(None), *window)])
            if masks:
                np.array(mask[window])

    mine, floor, images, tensors = seconds(repeats, from_cache, lambda: slices(True), lambda: slices(False), as_tensors)
    each = 1e3 / (steps * BATCH)
    over = mine / floor
    print(
        f"  a patch {'x'.join(map(str, PATCH))} from the mapped cache: {mine * each:.3f} ms; slices of plain files "
        f"{floor * each:.3f} ms (image alone {images * each:.3f}): {over:.2f} of the floor"
        f"{'' if over <= MOST_OVER_FLOOR else '  FALLS SHORT'}"
    )
    print(f"  the same as float32 tensors: {tensors * each:.3f} ms; a case into the cache: {made_s / 3 * 1e3:.0f} ms")
    return over <= MOST_OVER_FLOOR


def _plain(path: Path, content: NDArray[Any]) -> NDArray[Any]:
    content.tofile(path)
    return np.memmap(path, content.dtype, mode="r", shape=content.shape)


def main() -> None:
    words = argparse.ArgumentParser(description="Preprocessing beside MONAI, and crops beside slices of a file.")
    words.add_argument("--repeats", type=int, default=7, help="times that each is measured; the shortest counts")
    given = words.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(
            f"  {'256x256x64 int16':24} {'MONAI':>10} {'ours':>10} {'faster':>8} {'(float32)':>10}   most HU    median"
        )
        held = [look(kind, Path(folder), given.repeats) for kind in KINDS]
        held.append(crops(Path(folder), given.repeats))
    print(f"  targets: {LEAST_TIMES_FASTER:g} x, {MOST_HU:g} HU, {MOST_OVER_FLOOR:g} of the floor")
    if not all(held):
        sys.exit("falls short of its target")


if __name__ == "__main__":
    main()
