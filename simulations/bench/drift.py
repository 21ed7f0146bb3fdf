"""Drift monitoring on the phantom: how soon a changed site is told, and how often one that is as it was is called so.

    python -m simulations.bench.drift [--seeds 5] [--network RUN/weights.safetensors]

Cases are patients of the phantom's hospitals, two slices each, predicted on as `fedclient predict` and `serve-model`
do it; what is counted of a case is what `serve-model` counts. The network is that of lung-ct-quick at 64x64, trained
here for half a minute on patients of the three hospitals that the release is of (or by `fedsim run lung-ct-quick`, if
a file of its weights is given). The release's reference is of 40 further patients of each of them. Then 200 more come
one by one, from a hospital as it was, or from one with another scanner. Every seed has other patients.

Target: every change is told within 200 cases in every seed; and a hospital without one is not: of windows of 200 cases
at most one in a hundred may be called a drift, so that at most as many are as chance allows (95 %).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from fedclient.data.dataset import Batch
from fedclient.data.volume import Volume
from fedclient.predict.case import predict_case
from fedclient.predict.model import Model
from fedclient.training.trainer import fit
from shared_models import nets
from shared_models.betting import ALARM, WINDOW, watched
from shared_models.control import without_control
from shared_models.drift import Profile, profile_of
from shared_models.preprocess import preprocess, preprocess_labels
from shared_models.runtimes import torch_runner
from shared_models.study import Study, load_study
from shared_models.tasks.chosen import functions_of
from shared_models.weights import load
from simulations.phantoms import grow
from simulations.scanner import SITES, Scan, Site, acquire

REFERENCE = 40  # patients of each site
HEARD = ("north", "south", "east")
EDGE = 64
PLANES = 2  # next to each other
STEPS, BATCH = 120, 8  # of training
CHANGES = {
    "a fourth hospital": SITES["west"],
    "thicker slices": replace(SITES["north"], thickness_mm=5.0),
    "a third of the dose": replace(SITES["north"], noise_hu=SITES["north"].noise_hu * 3**0.5 * 1.5),
    "a sharp kernel": replace(SITES["north"], edge=1.2, psf_mm=1.0, noise_cutoff_per_mm=0.55),
    "contrast agent": replace(SITES["north"], contrast_hu=250.0),
    "shallow breath": replace(SITES["north"], lung_hu=-740.0),
}


def scans(site: Site, rng: np.random.Generator) -> Iterator[Scan]:
    """Patients of a hospital without end, two slices of each from somewhere in the chest."""
    while True:
        body = grow(rng, site)
        planes_mm = np.linspace(0, site.thickness_mm, PLANES) + rng.uniform(-30, 40)
        yield acquire(body, site, planes_mm, EDGE, rng)


def volume(scan: Scan) -> Volume:
    return Volume(np.clip(scan.hu[None].astype(np.float32), -1024, None), scan.affine_ras, "CT")


def batches(study: Study, rng: np.random.Generator) -> Iterator[Batch]:
    """Slices of patients of all three hospitals with their truth."""
    streams = [scans(SITES[name], rng) for name in HEARD]
    for step in range(STEPS):
        images: list[NDArray[np.float32]] = []
        masks: list[NDArray[np.uint8]] = []
        for n in range(BATCH // PLANES):
            scan = next(streams[(step + n) % len(streams)])
            seen = volume(scan)
            examples = preprocess(seen.voxels, seen.spacing_mm, study.preprocess)
            images.append(np.asarray(examples.images, np.float32))
            masks.append(preprocess_labels(scan.truth, examples.geometry))
        yield Batch(np.concatenate(images), np.concatenate(masks))


def network(study: Study, file: Path | None) -> torch.nn.Module:
    """The study's network by a file of its weights, or trained here."""
    net = nets.network(study)
    weights = load(file, str(file)) if file else nets.initial_weights(study)
    nets.load_arrays(net, without_control(weights))
    if file is None:
        drawn = batches(study, np.random.default_rng([1, 2]))
        losses = fit(net, drawn, functions_of(study.task).loss, study.train, torch.device("cpu")).losses
        print(f"trained on {STEPS} batches of {BATCH} slices: loss {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)
    return net.eval()


def cases(model: Model, site: Site, rng: np.random.Generator) -> Iterator[dict[str, int]]:
    """Patients of a hospital without end, as a release counts them."""
    for scan in scans(site, rng):
        yield dict(predict_case(model, volume(scan)).cells)


def first_alarm(reference: list[Profile], stream: Iterator[dict[str, int]], words: tuple[object, ...]) -> int | None:
    """After how many cases a window ends in an alarm; cases are drawn as far as needed."""
    seen: list[dict[str, int]] = []
    for step in (25, 25, 50, 100):
        seen += islice(stream, step)
        found = watched(reference, seen, words).alarm
        if found is not None:
            return found
    assert len(seen) == WINDOW
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--network", type=Path, help="weights of a run of lung-ct-quick; else it is trained here")
    asked = parser.parse_args()
    began = time.process_time()
    torch.set_num_threads(1)
    study = load_study("lung-ct-quick")
    study = replace(study, preprocess=replace(study.preprocess, size=(EDGE, EDGE)))
    runner = torch_runner(network(study, asked.network))
    model = Model("lung-ct-quick", "bench", "0" * 64, study, runner, "PyTorch", planes=PLANES)
    calm: list[int | None] = []
    told: dict[str, list[int | None]] = {name: [] for name in CHANGES}
    for seed in range(asked.seeds):
        streams = [cases(model, SITES[name], np.random.default_rng([seed, n])) for n, name in enumerate(HEARD)]
        reference = [profile_of(study, islice(stream, REFERENCE)) for stream in streams]
        for name, stream in zip(HEARD, streams, strict=True):
            calm.append(first_alarm(reference, stream, (seed, name)))
        for n, (name, site) in enumerate(CHANGES.items()):
            stream = cases(model, site, np.random.default_rng([seed, 9, n]))
            told[name].append(first_alarm(reference, stream, (seed, name)))
        print(f"seed {seed}: unchanged {calm[-3:]}, changed {[found[-1] for found in told.values()]}", flush=True)
    false = sum(alarm is not None for alarm in calm)
    allowed = int(binom.ppf(0.95, len(calm), 1 / ALARM))
    print(f"false alarms: {false} of {len(calm)} windows of {WINDOW} cases (by chance at most {allowed})")
    missed = 0
    for name, found in told.items():
        missed += sum(alarm is None for alarm in found)
        delays = sorted(alarm for alarm in found if alarm is not None)
        words = f"after {delays[0]} to {delays[-1]} cases, median {statistics.median(delays):g}" if delays else "never"
        print(f"{name}: told in {len(delays)} of {len(found)} seeds, {words}")
    print(f"{time.process_time() - began:.0f} s of CPU")
    if missed or false > allowed or not calm:
        sys.exit("falls short of its target")


if __name__ == "__main__":
    main()
