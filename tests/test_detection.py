"""Detection: the loss against its definition, peaks into millimetres, and a network that learns to find things."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from fedclient.data.dataset import DataSet, prepare
from fedclient.data.lesions import from_mask, in_mm
from fedclient.data.listing import list_cases
from fedclient.data.patches import Patches
from fedclient.data.where import Where
from fedclient.training.case_scores import scored
from fedclient.training.evaluate import answers, evaluate
from fedclient.training.trainer import fit
from shared_models import nets
from shared_models.detection_counts import DetectionCounts
from shared_models.errors import StudyInvalid
from shared_models.parse import parse
from shared_models.preprocess import Geometry
from shared_models.scores import measure_of, merge, row_of
from shared_models.study import Augment, Evaluate, Model, Preprocess, Study, Task, Train, load_study
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.detection import centre_loss, chances, located
from shared_models.tasks.functions import CaseAnswer
from simulations.fixtures import LunaCase, Nodule, write_luna16
from tests.test_lesions import VOLUME

NODULE = Task(kind="detection", labels=("nodule",), loss="centre")
TWO = Task(kind="detection", labels=("mass", "nodule"), loss="centre")


def slow_loss(logits: np.ndarray, truth: np.ndarray, labels: int) -> float:
    """Pixel by pixel, as Zhou et al. 2019 have it in equations 1 and 4, extents in their logarithms."""
    batch, size, dims = len(logits), logits.shape[2:], logits.ndim - 2
    chance = 1 / (1 + np.exp(-logits[:, :labels].astype(np.float64)))
    heat, extent, near, centres = 0.0, 0.0, 0, 0
    for b in range(batch):
        rows = [row for row in truth[b].astype(np.float64) if row[0]]
        for at in np.ndindex(size):
            peaks, ignored = [], False
            for row in rows:
                away = np.array(at) - np.round(row[1 : 1 + dims])
                half = row[1 + dims :]
                if row[0] == 127:
                    ignored |= bool(((away / np.maximum(half, 1)) ** 2).sum() <= 1)
                else:
                    peaks.append((float(np.exp(-((away / np.maximum(half / 2, 1)) ** 2).sum() / 2)), int(row[0]), half))
            if ignored:
                continue
            for label in range(labels):
                y = max([peak for peak, kind, _ in peaks if kind == label + 1], default=0.0)
                p = chance[(b, label, *at)]
                heat -= (1 - p) ** 2 * math.log(p) if y == 1 else (1 - y) ** 4 * p**2 * math.log(1 - p)
                centres += y == 1
            if peaks and (best := max(peaks, key=lambda peak: peak[0]))[0] >= 0.5:
                near += 1
                extent += np.abs(logits[(b, slice(labels, None), *at)] - np.log(best[2])).sum()
    return heat / max(centres, 1) + extent / max(near * dims, 1)


@pytest.mark.parametrize("size", [(12, 10), (8, 6, 7)])
def test_the_loss_is_that_of_its_definition(size: tuple[int, ...]):
    dims, rng = len(size), np.random.default_rng(2)
    logits = rng.normal(0, 2, (2, 2 + dims, *size)).astype(np.float32)
    truth = np.zeros((2, 3, 1 + 2 * dims), np.float32)
    truth[0, 0] = [1, *[4.3] * dims, *[2.4] * dims]
    truth[0, 1] = [2, *[2.0] * dims, *[3.0] * dims]
    truth[0, 2] = [127, *[6.0] * dims, *[1.5] * dims]
    truth[1, 0] = [2, *[-1.0] * dims, *[3.0] * dims]  # its centre lies outside
    loss = centre_loss(torch.from_numpy(logits), torch.from_numpy(truth), 2)
    assert float(loss) == pytest.approx(slow_loss(logits, truth, 2), rel=1e-5)


def test_nothing_is_learnt_within_what_is_irrelevant():
    logits = torch.zeros((1, 3, 16, 16), requires_grad=True)
    centre_loss(logits, torch.tensor([[[127.0, 8, 8, 4, 4]]]), 1).backward()
    assert logits.grad is not None
    inside = (torch.arange(16)[:, None] - 8) ** 2 + (torch.arange(16) - 8) ** 2 <= 16
    assert torch.equal(logits.grad[0, 0] != 0, ~inside)
    assert not logits.grad[0, 1:].any()


def test_an_image_without_lesions_still_teaches_where_there_is_none():
    logits = torch.zeros((1, 3, 8, 8), requires_grad=True)
    centre_loss(logits, torch.zeros((1, 1, 5)), 1).backward()
    assert logits.grad is not None
    assert (logits.grad[0, 0] > 0).all()


def test_chances_are_probabilities_and_half_extents():
    given = chances(torch.tensor([0.0, math.log(3), 100.0]).view(1, 3, 1, 1), 1)
    assert given.flatten().tolist() == pytest.approx([0.5, 3.0, 1024.0])


def heat(peaks: dict[tuple[int, ...], float], size: tuple[int, ...], half: float, planes: int = 1) -> np.ndarray:
    """[planes, 1 + D, *size] with single pixels that stand out."""
    given = np.full((planes, 1 + len(size), *size), half, np.float32)
    given[:, 0] = 0.01
    for at, value in peaks.items():
        given[(at[0], 0, *at[1:])] = value
    return given


def test_peaks_of_planes_become_marks_in_millimetres():
    geometry = Geometry((60, 40, 3), (0.7, 0.8, 5.0), (32, 32), (1.0, -12.0), (2.0, 2.0))
    marks = located(heat({(2, 5, 9): 0.8}, (32, 32), 3.0, 3), geometry, 1)
    # row 5 is voxel 11, column 9 voxel 6; half-extents are 6 voxels, across as deep as wide
    np.testing.assert_allclose(marks[0], [1, 0.8, 11 * 0.7, 6 * 0.8, 2 * 5.0, 4.2, 4.8, 4.5], rtol=1e-6)
    assert marks[1:, 1].max(initial=0) == pytest.approx(0.01)


def test_peaks_of_a_volume_have_a_third_extent():
    geometry = Geometry((16, 16, 16), (1.0, 1.0, 2.0), (16, 16, 16), (0, 0, 0), (1, 1, 1))
    given = heat({(0, 3, 4, 5): 0.9}, (16, 16, 16), 2.0)
    given[:, 3] = 1.5
    np.testing.assert_allclose(located(given, geometry, 1)[0], [1, 0.9, 3, 4, 10, 2, 2, 3], rtol=1e-6)


def test_of_peaks_within_each_other_the_highest_stays_across_planes_too():
    geometry = Geometry((32, 32, 3), (1.0, 1.0, 2.0), (32, 32), (0, 0), (1, 1))
    peaks: dict[tuple[int, ...], float] = {(0, 10, 10): 0.6, (1, 10, 11): 0.9, (1, 14, 10): 0.7, (1, 25, 25): 0.5}
    marks = located(heat(peaks, (32, 32), 3.0, 3), geometry, 1)
    assert marks[marks[:, 1] > 0.1, 1].tolist() == pytest.approx([0.9, 0.7, 0.5])  # 2.2 mm, 4.1 mm, far away


def test_scores_are_of_each_label_alone():
    truth = np.array([[1, 10, 10, 0, 4, 4, 4], [2, 30, 30, 0, 4, 4, 4]], np.float64)
    marks = np.array([[2, 0.9, 10, 10, 0, 4, 4, 4], [2, 0.8, 30, 30, 0, 4, 4, 4]], np.float64)
    found = functions_of(TWO).scores([CaseAnswer(marks, truth, (1.0, 1.0, 1.0))], 0.5, 1)
    mass, nodule = found["mass"], found["nodule"]
    assert isinstance(mass, DetectionCounts)
    assert isinstance(nodule, DetectionCounts)
    assert (mass.found, mass.marks, nodule.found, nodule.marks) == (0, 0, 1, 1)


def study(task: Task = NODULE, dims: Literal[2, 3] = 2, name: str = "unet", **changes: object) -> Study:
    edge = 32 if dims == 2 else 16
    model = {"unet": Model(spatial_dims=dims, features=(8, 8, 8, 8, 8, 8), groups=4),
             "residual-unet": Model("residual-unet", dims, (8, 8, 8), groups=4),
             "segresnet": Model("segresnet", dims, (8,), groups=4)}[name]  # fmt: skip
    return replace(Study("found", task=task, model=model, preprocess=Preprocess((edge,) * dims)), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["unet", "residual-unet", "segresnet"])
@pytest.mark.parametrize("dims", [2, 3])
def test_an_untrained_network_finds_hardly_anything(name: str, dims: Literal[2, 3]):
    of = study(TWO, dims, name)
    with torch.no_grad():
        logits = nets.network(of).eval()(torch.rand(1, 1, *of.preprocess.size))
    assert logits.shape[1] == 2 + dims
    assert float(logits[:, :2].sigmoid().mean()) < 0.1


def test_a_detection_of_an_encoder_and_of_another_loss_is_refused():
    with pytest.raises(StudyInvalid, match=r'"resnet18" is not for a detection; use one of unet'):
        parse(Study, {"name": "x", "task": {"kind": "detection", "labels": ["nodule"], "loss": "centre"},
                      "model": {"name": "resnet18"}}, "here")  # fmt: skip
    with pytest.raises(StudyInvalid, match='loss = "bce" is not for a detection; allowed: centre'):
        parse(Study, {"name": "x", "task": {"kind": "detection", "labels": ["nodule"]}}, "here")
    with pytest.raises(StudyInvalid, match='specificity is for kind = "classification"'):
        parse(Task, {"kind": "detection", "loss": "centre", "specificity": 0.8}, "here")


def test_the_measure_of_a_detection_is_cpm():
    assert measure_of(NODULE) == "cpm"
    assert load_study("lung-detect").task == NODULE


LUNA = Preprocess((16, 16, 16), "patches")


def luna(folder: Path) -> DataSet:
    """Two scans of 40 x 30 x 20 voxels as patches in 3-D, a nodule and something irrelevant in each."""
    nodule = Nodule((-5.0, -4.0, 20.0), 6.0, False)
    scans = [LunaCase(f"1.2.840.{n}", VOLUME, [nodule], [((-14.0, -10.0, 20.0), None)]) for n in range(2)]
    write_luna16(folder / "luna", scans)
    of = study(dims=3, preprocess=LUNA, train=Train(foreground=1.0))
    return prepare(list_cases(Where(folder / "luna"), "salt").cases, of, folder / "cache")


def test_patches_of_a_volume_lie_around_lesions_and_hold_them_in_place(tmp_path: Path):
    data = luna(tmp_path)
    (batch,) = data.batches(8, np.random.default_rng(0), steps=1)
    assert batch.images.shape == (8, 1, 16, 16, 16)
    assert batch.masks.shape[2] == 7
    for rows in batch.masks:
        (found,) = rows[rows[:, 0] == 1]
        assert ((found[1:4] >= 0) & (found[1:4] < 16)).all()
        assert found[4:].tolist() == [6, 6, 1.5]
    assert len({tuple(rows[rows[:, 0] == 1][0, 1:4]) for rows in batch.masks}) > 4  # not always in the middle


def test_the_cache_tells_the_lesions_of_the_whole_image_and_of_its_examples(tmp_path: Path):
    (case, _) = luna(tmp_path).by_case()
    assert case.native is not None
    assert case.native[:, 0].tolist() == [1, 127]
    assert case.native[0].tolist() == [1, 10, 8, 10, 6, 6, 1.5]
    assert case.masks[0, 0].tolist() == case.native[0].tolist()


def blobs(cases: int, seed: int) -> DataSet:
    """Planes of noise with up to three bright discs of different width; the last case has none."""
    from fedclient.data.cache import Facts, Stored
    from fedclient.data.lesions import of_examples, places

    rng, made = np.random.default_rng(seed), []
    rows, columns = np.mgrid[:48, :48]
    for n in range(cases):
        image, table = rng.normal(0, 0.2, (1, 1, 48, 48)), []
        for at in rng.permutation(9)[: 0 if n == cases - 1 else int(rng.integers(1, 4))]:
            r, c = 8 + 16 * (at // 3) + rng.uniform(-3, 3), 8 + 16 * (at % 3) + rng.uniform(-3, 3)
            half = rng.uniform(2, 5)
            image[0, 0][(rows - r) ** 2 + (columns - c) ** 2 <= half**2] += 1
            table.append([1, r, c, 0, half, half, half])
        geometry = Geometry((48, 48, 1), (1.0, 1.0, 1.0), (48, 48), (0.0, 0.0), (1.0, 1.0))
        native = np.array(table, np.float32).reshape(-1, 7)
        truth = of_examples(native, geometry)
        labelled = tuple(places(truth, (48, 48), 1))
        made.append(Stored(f"{n}", image.astype(np.float16), truth, Facts(geometry, 0), labelled, native))
    return DataSet(tuple(made), Patches((32, 32), 0.7, lesions=True), lesions=True)


@pytest.fixture(scope="module")
def trained() -> tuple[Study, torch.nn.Module]:
    of = study(
        preprocess=Preprocess((32, 32), "patches"),
        augment=Augment(rotate_deg=90, scale=0.1, flip_left_right=True),
        train=Train(batch_size=8, learning_rate=4e-3),
        evaluate=Evaluate(overlap=0.25),
    )
    torch.manual_seed(0)
    net, rng = nets.network(of), np.random.default_rng(0)
    batches = blobs(24, 1).batches(8, rng, steps=40, augment=of.augment)
    fit(net, batches, functions_of(of.task).loss, of.train, torch.device("cpu"))
    return of, net


def test_a_network_learns_to_find_lesions_and_how_wide_they_are(trained: tuple[Study, torch.nn.Module]):
    of, net = trained
    row = row_of(evaluate(net, blobs(10, 2), of, functions_of(of.task), torch.device("cpu"), 1)["nodule"])
    assert row["cpm"] > 0.9
    assert row["off_mm"] < 2.5


def test_counts_of_two_sites_are_those_of_their_scans_together(trained: tuple[Study, torch.nn.Module]):
    of, net = trained
    here, there, device = blobs(5, 3), blobs(6, 4), torch.device("cpu")
    both = DataSet((*here.cases, *there.cases), here.patches, lesions=True)
    task = functions_of(of.task)
    a, b, c = (evaluate(net, each, of, task, device, 1)["nodule"] for each in (here, there, both))
    assert merge(a, b) == c


def test_scores_case_by_case_come_to_the_same_counts(trained: tuple[Study, torch.nn.Module]):
    of, net = trained
    data, task, device = blobs(6, 5), functions_of(of.task), torch.device("cpu")
    counts, cases = scored(of.task, task, answers(net, data, of, task, device), 0.5, 1)
    assert counts == evaluate(net, data, of, task, device, 1)
    assert cases.lesions.tolist() == [len(case.native) for case in data.cases]  # type: ignore[union-attr, arg-type]


def test_marks_lie_in_the_parts_of_a_mask_where_the_network_says_so():
    mask = np.zeros((16, 16, 1), np.uint8)
    mask[4:8, 5:9, 0] = 1
    lesions = in_mm(from_mask(mask), (1.5, 1.5, 3.0))
    geometry = Geometry((16, 16, 1), (1.5, 1.5, 3.0), (16, 16), (0.0, 0.0), (1.0, 1.0))
    marks = located(heat({(0, 6, 6): 0.9}, (16, 16), 2.0), geometry, 1)
    counts = functions_of(NODULE).scores([CaseAnswer(marks[:1], lesions, geometry.spacing_mm)], 0.5, 1)["nodule"]
    assert isinstance(counts, DetectionCounts)
    assert counts.found == 1
