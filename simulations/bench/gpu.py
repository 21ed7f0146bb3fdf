"""Training on a GPU: images per second, peak memory, and the share of the time that the GPU waits for data.

    python -m simulations.bench.gpu [--device cuda:0] [--images N] [--patches N] [--json FILE]

One epoch of two studies as a site trains them, augmentation included, with half precision and without: `lung-ct` at
256 x 256 in batches of 16, and the 3-D network that the federated plan gives for phantom volumes in 8 GiB. The cases
are the phantom's, few of them and each taken many times over. The share of waiting is what an epoch from the cache
takes longer than the same number of steps, augmented alike, on batches that lie in the GPU's memory already. Target:
under 5 %.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fedclient.data.dataset import DataSet
from fedclient.fingerprint import site_fingerprint
from fedclient.site import Site, open_site
from fedclient.training.learner import data_set, drawn
from fedclient.training.trainer import on_device, stepper
from shared_models import nets
from shared_models.files import write_json
from shared_models.plan import derive
from shared_models.planned import constraints, planned
from shared_models.seeds import rng
from shared_models.study import Augment, Model, Preprocess, Study, Task, load_study
from shared_models.tasks.chosen import functions_of
from simulations.phantoms import PhantomPlan, phantom

MOST_WAITING = 0.05
RESIDENT = 8  # batches in the GPU's memory, in turn
WARM_UP = 10  # steps, before anything is timed
VOLUME = Study(
    name="planned-3d", task=Task(labels=("lung",), loss="dice_bce"), model=Model(spatial_dims=3), modality="ct",
    preprocess=Preprocess(size=(64, 64, 64)), augment=Augment(rotate_deg=15.0, scale=0.1, gamma=0.1, noise=0.02),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """One epoch of a study.

    Attributes:
        images: examples in it; for 3-D these are patches.
        waiting: share of `seconds` that would not be there had the batches lain on the GPU.
        peak_bytes: most memory that PyTorch held for tensors on the GPU.
    """

    study: str
    precision: str
    images: int
    seconds: float
    resident_seconds: float
    peak_bytes: int

    @property
    def waiting(self) -> float:
        return max(0.0, 1 - self.resident_seconds / self.seconds)


def epoch(study: Study, cases: DataSet, device: torch.device, steps: int) -> Found:
    """Trains `steps` batches from the cache, and as many that lie on the device."""
    site = open_site({"site": "bench", "data": ".", "work": ".", "device": str(device)})
    net = nets.network(study).to(device)
    step = stepper(net, functions_of(study.task).loss, study.train, device)

    def from_cache(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        return on_device(device, drawn(site, cases, study, device, rng("bench"), None, steps))

    size, chance = study.train.batch_size, rng("resident")
    held = [
        (torch.from_numpy(batch.images).to(device), torch.from_numpy(batch.masks).to(device), batch.change)
        for batch in cases.batches(size, chance, steps=RESIDENT, augment=study.augment, later=True)
    ]

    def resident(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, truth, change in itertools.islice(itertools.cycle(held), steps):
            yield (images.float(), truth) if change is None else change(images.clone(), truth.clone())

    def seconds(batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for images, truth in batches:
            step(images, truth)
        torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds(from_cache(WARM_UP))
    torch.cuda.reset_peak_memory_stats(device)
    took = seconds(from_cache(steps))
    peak = torch.cuda.max_memory_allocated(device)
    return Found(study.name, study.train.precision, steps * size, took, seconds(resident(steps)), peak)


def slices(folder: Path) -> tuple[Study, DataSet]:
    """`lung-ct` and its cases."""
    return cases_of(
        load_study("lung-ct"), folder, PhantomPlan(sites=("north",), train=16, val=0, test=0, slices=24, size=256)
    )


def volumes(folder: Path) -> tuple[Study, DataSet]:
    """The study that the federated plan of some volumes gives, and its cases."""
    plan = PhantomPlan(sites=("north",), train=6, val=0, test=0, slices=96, size=192)
    data = phantom(folder, plan, cores())
    told = site_fingerprint(site_at(data, folder), VOLUME)
    study = planned(replace(VOLUME, plan="federated"), derive(told, constraints(VOLUME)))
    return cases_of(study, folder, plan)


def cases_of(study: Study, folder: Path, plan: PhantomPlan) -> tuple[Study, DataSet]:
    return study, data_set(site_at(phantom(folder, plan, cores()), folder), study, "train")


def site_at(data: Path, work: Path) -> Site:
    return open_site({"site": "north", "manifest-site": "north", "data": str(data), "work": str(work), "device": "cpu"})


def cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m simulations.bench.gpu", description=__doc__)
    words.add_argument("--device", default="cuda:0")
    words.add_argument("--images", type=int, default=4800, help="slices in an epoch of lung-ct")
    words.add_argument("--patches", type=int, default=200, help="patches in an epoch of the 3-D network")
    words.add_argument("--json", type=Path)
    asked = words.parse_args()
    if not torch.cuda.is_available():
        words.error("PyTorch sees no GPU here, and this measures one. Run it where `fedclient doctor` finds a GPU.")
    device = torch.device(asked.device)
    found: list[Found] = []
    with TemporaryDirectory() as folder:
        for made, images in ((slices, asked.images), (volumes, asked.patches)):
            study, cases = made(Path(folder))
            size = study.train.batch_size
            print(f"{study.name}: batches of {size}, {'x'.join(map(str, study.preprocess.size))}", flush=True)
            for precision in ("float32", "auto"):
                each = replace(study, train=replace(study.train, precision=precision))
                found.append(epoch(each, cases, device, max(1, images // size)))
    print(f"\n{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}")
    print(f"{'study':12} {'precision':10} {'images/s':>9} {'peak GiB':>9} {'waiting':>8}")
    for one in found:
        rate, gib = one.images / one.seconds, one.peak_bytes / 2**30
        print(f"{one.study:12} {one.precision:10} {rate:9.1f} {gib:9.2f} {one.waiting:8.1%}")
    if asked.json is not None:
        write_json(asked.json, {"found": [{**asdict(one), "waiting": one.waiting} for one in found]})
    sys.exit(any(one.waiting > MOST_WAITING for one in found))


if __name__ == "__main__":
    main()
