"""Drift monitoring on the phantom: how soon a changed site is told, and how often one that is as it was is called so.

    python -m simulations.bench.drift [--seeds 5] [--network RUN/weights.safetensors]

Cases are patients of the phantom's hospitals, answered by a network (trained by `fedsim run lung-ct-quick`, or, where
none is given, drawn at random). The release's reference is of 40 patients of each of three sites; then 200 more come
one by one, from a site as it was, or from one with another scanner. Target: every change within 200 cases in every
seed; of windows without one at most one in a hundred is called a drift, so that at most as many may be that chance
allows (95 %).
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom

from fedclient.training.windows import logits
from shared_models import nets
from shared_models.betting import ALARM, WINDOW, watched
from shared_models.control import without_control
from shared_models.drift import Profile, answered, cells_of, profile_of
from shared_models.preprocess import preprocess, restore
from shared_models.study import Study, load_study
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.decide import predicted_of
from shared_models.weights import load
from simulations.phantoms import grow
from simulations.scanner import SITES, Site, acquire

REFERENCE = 40  # patients of each site
HEARD = ("north", "south", "east")
CHANGES = {
    "a fourth hospital": SITES["west"],
    "thicker slices": replace(SITES["north"], thickness_mm=5.0),
    "a third of the dose": replace(SITES["north"], noise_hu=SITES["north"].noise_hu * 3**0.5 * 1.5),
    "a sharp kernel": replace(SITES["north"], edge=1.2, psf_mm=1.0, noise_cutoff_per_mm=0.55),
    "contrast agent": replace(SITES["north"], contrast_hu=250.0),
    "shallow breath": replace(SITES["north"], lung_hu=-740.0),
}


def cases(site: Site, study: Study, net: torch.nn.Module, rng: np.random.Generator) -> Iterator[dict[str, int]]:
    """Patients of a hospital without end, two planes of 64 pixels each, as a release counts them."""
    device = torch.device("cpu")
    while True:
        scan = acquire(grow(rng, site), site, np.array([-20.0, 30.0]), 64, rng)
        voxels = np.clip(scan.hu[None].astype(np.float32), -1024, None)
        spacing = (site.fov_mm / 64, site.fov_mm / 64, site.thickness_mm)
        examples = preprocess(voxels, spacing, study.preprocess)
        chances = restore(
            functions_of(study.task).chances(logits(net, examples.images, study, device)).numpy(), examples.geometry
        )
        marked = predicted_of(study.task, chances[None], study.evaluate.threshold)[0]
        yield cells_of(study, voxels, spacing, examples.images, answered(study.task, chances, marked), marked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--network", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    study = load_study("lung-ct-quick")
    net = nets.network(study)
    weights = load(asked.network, str(asked.network)) if asked.network else nets.initial_weights(study)
    nets.load_arrays(net, without_control(weights))
    net.eval()
    calm: list[int | None] = []
    told: dict[str, list[int | None]] = {name: [] for name in CHANGES}
    with torch.inference_mode():
        for seed in range(asked.seeds):
            streams = [cases(SITES[name], study, net, np.random.default_rng([seed, n])) for n, name in enumerate(HEARD)]
            reference = [profile_of(study, islice(stream, REFERENCE)) for stream in streams]
            for name, stream in zip(HEARD, streams, strict=True):
                calm.append(watched(reference, list(islice(stream, WINDOW)), (seed, name)).alarm)
            for n, (name, site) in enumerate(CHANGES.items()):
                told[name].append(
                    first_alarm(reference, cases(site, study, net, np.random.default_rng([seed, 9, n])), name)
                )
            print(f"seed {seed}: unchanged {calm[-3:]}, changed {[found[-1] for found in told.values()]}", flush=True)
    false = sum(alarm is not None for alarm in calm)
    allowed = int(binom.ppf(0.95, len(calm), 1 / ALARM))
    print(f"false alarms: {false} of {len(calm)} windows of {WINDOW} cases (by chance at most {allowed})")
    missed = 0
    for name, found in told.items():
        missed += sum(alarm is None for alarm in found)
        delays = sorted(alarm for alarm in found if alarm is not None)
        words = f"median {statistics.median(delays):.0f}, longest {delays[-1]}" if delays else "never"
        print(f"{name}: told in {len(delays)} of {len(found)} seeds, after {words} cases")
    sys.exit(1 if missed or false > allowed else 0)


def first_alarm(reference: list[Profile], stream: Iterator[dict[str, int]], name: str) -> int | None:
    """After how many cases a window ends in an alarm; cases are drawn as far as needed."""
    seen: list[dict[str, int]] = []
    for step in (40, 60, 100):
        seen += islice(stream, step)
        found = watched(reference, seen, (name,)).alarm
        if found is not None:
            return found
    return None


if __name__ == "__main__":
    main()
