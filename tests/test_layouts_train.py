"""From the folder of each layout to weights: one round with the real learner, and its loss falls."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import simulations.fixtures.datasets as datasets
from fedclient.data.layouts.flamby import KEPT
from fedserver.checkpoint import create_run, read_state
from shared_models.files import read_lines
from shared_models.nets import initial_weights
from shared_models.study import Evaluate, Model, Preprocess, Rounds, Study, Task, Train, load_study
from simulations.engine import run_local
from simulations.fixtures import brain, chest, write_flamby
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, node_configs

TINY = Model(features=(4, 4, 8, 8, 16, 8), groups=2)
TRAIN = Train(local_steps=15, batch_size=4, learning_rate=1e-2, deterministic=True)
STUDY = Study(
    name="tiny",
    model=TINY,
    preprocess=Preprocess(size=(32, 32)),
    train=TRAIN,
    rounds=Rounds(count=1, quorum=1),
    evaluate=Evaluate(every=0),
)
BRATS = load_study("brats-tumour")
LEVELS = load_study("fed-kits19").model.levels[:3]
READY = {"pacs": "lung-ct", "lidc-idri": "ct-nodule", "luna16": "ct-nodule", "table": "chest-xray"}  # else lung-ct


@pytest.fixture(autouse=True, scope="module")
def _patients() -> Iterator[None]:
    """The same few chests for all layouts, drawn once; torch's settings are put back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets, "chest", cache(chest))
        patched.setattr(datasets, "brain", cache(brain))
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def tiny(layout: str) -> Study:
    """The ready study of a layout, at a size for tests."""
    if layout.startswith("brats"):
        labels, more = BRATS.task.labels, ("cavity",) * (layout == "brats-2024")
        plan = replace(BRATS.preprocess, size=(32, 32))
        task = Task(labels=labels + more, loss=BRATS.task.loss)
        return replace(STUDY, modality="mr", channels=BRATS.channels, task=task, preprocess=plan)
    ready = load_study(READY.get(layout, "lung-ct"))
    return replace(STUDY, modality=ready.modality, task=ready.task, preprocess=replace(ready.preprocess, size=(32, 32)))


def smaller(name: str) -> Study:
    """A study of FLamby's data, at a size for tests; in colour, 3-D and by bags as it is."""
    study = load_study(name)
    study = replace(study, rounds=STUDY.rounds, evaluate=STUDY.evaluate)
    train = replace(study.train, local_steps=12, batch_size=4, learning_rate=1e-2, deterministic=True)
    match name:
        case "fed-ixi":
            model = replace(study.model, features=(8, 8, 8))
            return replace(study, model=model, train=train, preprocess=replace(study.preprocess, size=(16, 16, 16)))
        case "fed-kits19":
            levels = tuple(replace(level, features=8) for level in LEVELS)  # which halve every axis twice
            plan = replace(study.preprocess, size=(16, 16, 4), spacing_mm=None)
            return replace(study, model=replace(study.model, levels=levels), train=train, preprocess=plan)
        case "fed-isic2019":
            model = Model(name="resnet18", groups=8)
            task = replace(study.task, class_weights=())
            small = replace(study.preprocess, size=(32, 32))
            return replace(study, model=model, task=task, train=replace(train, learning_rate=1e-3), preprocess=small)
        case _:
            return replace(study, model=replace(study.model, features=(8, 16, 8)), train=train)


def losses(folder: Path, study: Study, work: Path) -> list[float]:
    """Of one site's one round."""
    nodes = node_configs(work, [folder], Machine(device="cpu"), 1)
    (site,) = nodes
    run = create_run(work, "run", study, initial_weights(study))
    run_local(run.path, nodes)
    assert read_state(run).round == 1
    (trained,) = [line["sites"][site]["losses"] for line in read_lines(run.metrics) if not line.get("final")]
    return list(trained)


@pytest.mark.parametrize("layout", datasets.WRITTEN)
def test_a_round_trains_on_each_layout_and_the_loss_falls(tmp_path: Path, layout: str) -> None:
    folder = datasets.write_data_set(tmp_path / "data", layout, patients=4, slices=4, size=32)
    found = losses(folder, tiny(layout), tmp_path / "work")
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("layout", KEPT)
def test_a_round_trains_on_each_of_flambys_data_sets_and_the_loss_falls(tmp_path: Path, layout: str) -> None:
    folder = write_flamby(tmp_path / "data", layout, 6, 1, size=16 if layout == "fed-ixi" else 32)
    found = losses(folder, smaller(layout), tmp_path / "work")
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


def test_a_round_trains_on_a_manifest_and_the_loss_falls(tmp_path: Path) -> None:
    plan = PhantomPlan(sites=("site",), train=2, val=1, test=1, slices=2, size=32)
    found = losses(phantom(tmp_path / "data", plan, processes=1), tiny("manifest"), tmp_path / "work")
    assert found[-1] < 0.9 * found[0]
