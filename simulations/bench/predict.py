"""Prediction: images a second beside eager PyTorch, a cold start of the real command, memory over a long series.

    python -m simulations.bench.predict [--threads 1] [--repeats 3]

Ways are measured in turn within one process and by CPU seconds, because a machine that others use makes wall seconds
of chance; its load is told. Peak memory is that of processes of their own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedclient.data.volume import Volume
from fedclient.predict.case import predict_case
from fedclient.predict.model import Model, load_model
from fedclient.windows import moved
from fedserver.publish.exports import to_onnx
from shared_models.files import private_folder, write_atomic
from shared_models.identity import issue_signer, new_authority
from shared_models.nets import arrays_of, network
from shared_models.parity import TOLERANCE
from shared_models.preprocess import preprocess, restore
from shared_models.release import FORMAT, ONNX, STUDY, WEIGHTS, Manifest, Origin, Release, Trust, open_release, seal
from shared_models.study import Model as Network
from shared_models.study import Preprocess, Study, canonical, load_study, sha256
from shared_models.tasks.decide import chances_of
from shared_models.weights import save_arrays
from simulations.fixtures.dicom import write_dicom_series, write_long_series

LEAST_TIMES_FASTER = 1.5
MOST_COLD_S = 5.0
SHORT, LONG = 100, 1000  # slices
MOST_GROWTH = 1.15  # of peak memory from the short series to the long one
BATCHES = (1, 4, 16)  # of eager PyTorch
AS_EVALUATED = "PyTorch, 16 at once"  # all planes of this case; evaluation takes up to 32
PLANES = 16
EDGE = 512
# by a small process between this one and the command: a child's peak counts that of the process that it was made from
MEASURED = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def chest(planes: int) -> Volume:
    """Air around a body with two lungs, noise on all of it: float32[1, 512, 512, planes] in Hounsfield units."""
    y, x = np.mgrid[-1 : 1 : EDGE * 1j, -1 : 1 : EDGE * 1j]
    plane = np.full((EDGE, EDGE), -1000.0)
    plane[(x / 0.85) ** 2 + (y / 0.6) ** 2 < 1] = 40
    for side in (-0.4, 0.4):
        plane[((x - side) / 0.28) ** 2 + (y / 0.42) ** 2 < 1] = -850
    noise = np.random.default_rng(0).normal(0, 15, (EDGE, EDGE, planes))
    voxels = np.rint(plane[..., None] + noise).astype(np.float32)[None]
    return Volume(voxels, np.diag([0.7, 0.7, 1.0, 1.0]), "CT")


def release_of(study: Study, folder: Path) -> Release:
    """A signed research release of a network with made-up weights: what prediction reads of one, and no card."""
    ca, net = new_authority("bench"), network(study).eval()
    private_folder(folder)
    save_arrays(folder / WEIGHTS, arrays_of(net))
    to_onnx(net, study, folder / ONNX)
    write_atomic(folder / STUDY, canonical(study))
    origin = Origin(
        kind="simulation", federation="", run="bench", round=1, made_at=1.8e9, study_sha256=sha256(study),
        weights_sha256="0" * 64, sites={},
    )  # fmt: skip
    made = Manifest(
        format=FORMAT, name=study.name, version="1", title="bench", origin=origin, exports={}, tolerance=1e-4,
        privacy=None, signer_sha256="0" * 64, authority_sha256="0" * 64, files={},
    )  # fmt: skip
    seal(folder, made, issue_signer(ca), ca.certificate)
    return open_release(folder, Trust(research=True))


def cpu_s(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def fastest(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least CPU seconds of each, measured in turn."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        for name, work in ways.items():
            best[name] = min(best.get(name, np.inf), cpu_s(work))
    return best


def speed(release: Release, threads: int, repeats: int) -> bool:
    """Prints images a second of the network alone and of the whole path; true when both hold.

    The whole path is held against PyTorch in batches as a site's evaluation takes them; the batch that PyTorch is
    fastest with is shown too.
    """
    default = load_model(release, threads=threads)
    eager = load_model(release, threads=threads, engine="torch")
    images: NDArray[np.float32] = np.random.default_rng(0).random((PLANES, 1, 256, 256)).astype(np.float32)
    ways: dict[str, tuple[Model, int]] = {"onnxruntime": (default, default.planes)}
    ways |= {f"PyTorch, {batch} at once": (eager, batch) for batch in BATCHES}
    alone = fastest({name: partial(m.through, images[:b]) for name, (m, b) in ways.items()}, repeats)
    alone = {name: seconds / ways[name][1] for name, seconds in alone.items()}
    quick = min((name for name in alone if name != "onnxruntime"), key=lambda name: alone[name])
    volume = chest(PLANES)
    paths = {name: replace(ways[name][0], planes=ways[name][1]) for name in ("onnxruntime", quick, AS_EVALUATED)}
    whole = fastest({name: partial(predict_case, m, volume) for name, m in paths.items()}, repeats)
    for name, seconds in alone.items():
        path = f", whole path {PLANES / whole[name]:6.2f} slices of 512 x 512" if name in whole else ""
        print(f"  {name:24} network alone {1 / seconds:6.2f} images{path} per CPU second")
    print(
        f"  onnxruntime over PyTorch at its fastest ({quick}): network alone "
        f"{alone[quick] / alone['onnxruntime']:.2f}, whole path {whole[quick] / whole['onnxruntime']:.2f}"
    )
    ratio = whole[AS_EVALUATED] / whole["onnxruntime"]
    print(f"  the default path over eager PyTorch as evaluation runs it: {ratio:.2f}")
    return ratio >= LEAST_TIMES_FASTER and same_masks(default, eager, volume)


def same_masks(default: Model, eager: Model, volume: Volume) -> bool:
    """Prints how many voxels differ; true where each of them lies on the threshold but for what a release may be off.

    A network with made-up weights, which says about a half everywhere, has many of those; one that has learnt hardly
    any.
    """
    study = default.study
    examples = preprocess(volume.voxels, volume.spacing_mm, study.preprocess)
    ours, theirs = (
        restore(chances_of(study.task, moved(m.through, examples.images, study, m.planes)), examples.geometry)
        for m in (default, eager)
    )
    threshold = study.evaluate.threshold
    apart = (ours > threshold) != (theirs > threshold)
    near = np.abs(ours - threshold) < TOLERANCE
    far = int((apart & ~near).sum())
    print(
        f"  masks of both engines differ at {int(apart.sum())} of {apart.size} voxels, {far} of them farther than "
        f"{TOLERANCE:g} from the threshold ({int(near.sum())} voxels are nearer)"
    )
    return far == 0


def command(release: Path, images: Path, out: Path, threads: int) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak MiB of the real command in a process of its own."""
    words = ["-m", "fedclient.cli", "predict", str(release), str(images), "-o", str(out), "--research"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    asked = [sys.executable, "-c", MEASURED, sys.executable, *words, "--threads", str(threads)]
    told = subprocess.run(asked, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    code, wall, cpu, peak = json.loads(told.stdout)
    if code:
        sys.exit("fedclient predict failed")
    return wall, cpu, peak


def cold(release: Release, folder: Path, threads: int, repeats: int) -> bool:
    """Prints what the first result takes: process, imports, signature, network, one DICOM slice, all formats.

    Wall seconds count; where more processes want to run than there are cores, which halves what each of them gets, CPU
    seconds do.
    """
    slices = write_dicom_series(folder / "one", chest(1), patient_id="COLD")
    runs = [command(release.folder, slices.paths[0].parent, folder / f"cold-{n}", threads) for n in range(repeats)]
    wall, cpu, peak = (min(run[n] for run in runs) for n in range(3))
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    busy = load > cores + 1  # this process and the command take turns
    print(
        f"  cold start to the results of one slice: {wall:.2f} s wall, {cpu:.2f} s CPU, peak {peak:.0f} MiB (the "
        f"machine's load is {load:.1f} on {cores} cores, so {'CPU' if busy else 'wall'} seconds count)"
    )
    return (cpu if busy else wall) < MOST_COLD_S


def memory(folder: Path, threads: int) -> bool:
    """Prints the peak over a short and a long series: of a small network, because slices are what is counted."""
    small = Study(
        name="small", model=Network(features=(8, 8, 8, 8, 8, 8), groups=4), preprocess=Preprocess(size=(64, 64))
    )
    release = release_of(small, folder / "small")
    slices = write_dicom_series(folder / "like", chest(1), patient_id="LONG")
    peaks: dict[int, float] = {}
    for count in (SHORT, LONG):
        write_long_series(folder / f"series-{count}", count, slices.paths[0])
        _, cpu, peaks[count] = command(release.folder, folder / f"series-{count}", folder / f"out-{count}", threads)
        print(f"  a series of {count:5} slices of 512 x 512, all formats: peak {peaks[count]:.0f} MiB, {cpu:.0f} s CPU")
    growth = peaks[LONG] / peaks[SHORT]
    print(f"  peak memory of {LONG} slices over that of {SHORT}: {growth:.2f}")
    return growth <= MOST_GROWTH


def main() -> None:
    words = argparse.ArgumentParser(description="Prediction: speed, cold start, memory.")
    words.add_argument("--threads", type=int, default=1, help="of every way")
    words.add_argument("--repeats", type=int, default=3, help="times that each is measured; the shortest counts")
    given = words.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        release = release_of(load_study("lung-ct"), folder / "lung-ct")
        held = {
            f"{LEAST_TIMES_FASTER} times eager PyTorch": speed(release, given.threads, given.repeats),
            f"a cold start below {MOST_COLD_S:g} s": cold(release, folder, given.threads, given.repeats),
            f"memory grows to {MOST_GROWTH:g} at most": memory(folder, given.threads),
        }
    for target, holds in held.items():
        print(f"  {target}: {'held' if holds else 'FALLS SHORT'}")
    if not all(held.values()):
        sys.exit("falls short of its target")


if __name__ == "__main__":
    main()
