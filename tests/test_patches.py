"""Patches: the whole image is seen, a share lies around labels, and windows over it give one answer for each voxel."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import nn

import fedclient.data.dataset as dataset
from fedclient.data.dataset import DataSet, prepare
from fedclient.data.manifest import read_manifest
from fedclient.gate.facts import needs_of
from fedclient.gate.inspect import look_at
from fedclient.training.evaluate import evaluate
from fedclient.training.windows import logits
from fedclient.windows import begins, weights
from shared_models.errors import ImageUnreadable
from shared_models.preprocess import plan_geometry, preprocess, preprocess_labels, restore
from shared_models.study import Evaluate, Model, Preprocess, Study, Task, Train
from shared_models.tasks.chosen import functions_of

CPU = torch.device("cpu")
DEEP = Study(
    name="t",
    task=Task(labels=("lung", "nodule")),
    model=Model(spatial_dims=3),
    preprocess=Preprocess(size=(16, 16, 16), fit="patches", window_hu=(0.0, 1000.0), spacing_mm=(1.0, 1.0, 2.0)),
    train=Train(batch_size=4, foreground=0.5),
)
FLAT = replace(
    DEEP,
    model=Model(spatial_dims=2),
    preprocess=replace(DEEP.preprocess, size=(16, 16), spacing_mm=(1.0, 1.0)),
)
SHAPE = (40, 30, 24)


def voxels_of(seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Every voxel its own grey level, nearly; label 1 in a corner block, label 2 in a single voxel."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:8, 2:8, 1:4] = 1
    labels[38, 28, 22] = 2
    return np.random.default_rng(seed).integers(0, 1000, SHAPE).astype(np.int16), labels


def written(folder: Path, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 2.0), count: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    rows = ["patient_id,image,mask,split"]
    for n in range(count):
        affine = np.diag([*spacing_mm, 1.0])
        for kind, content in zip(("image", "mask"), voxels_of(n), strict=True):
            image: Any = nibabel.Nifti1Image(content, affine)
            image.set_sform(affine, code="scanner")
            nibabel.save(image, folder / f"{kind}{n}.nii")
        rows.append(f"p{n},image{n}.nii,mask{n}.nii,train")
    (folder / "manifest.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("patches"))


def data(folder: Path, study: Study) -> DataSet:
    return prepare(read_manifest(folder, None, "salt"), study, folder / "cache")


def share_around_labels(found: DataSet, steps: int = 60) -> float:
    """Patches that hold the one voxel of label 2, which few random ones do."""
    batches = found.batches(4, np.random.default_rng(0), steps=steps)
    return float(np.mean([(mask == 2).any() for batch in batches for mask in batch.masks]))


# Geometry


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 2.0), (0.7, 1.3, 5.0), (0.4, 0.4, 0.8), (2.6, 2.1, 2.0)])
@pytest.mark.parametrize("study", [DEEP, FLAT])
def test_every_voxel_of_the_image_is_seen_and_gets_an_answer(spacing_mm, study):
    geometry = plan_geometry(SHAPE, spacing_mm, study.preprocess)
    assert all(edge >= least for edge, least in zip(geometry.size, study.preprocess.size, strict=True))
    for n, mm, pixel_mm, edge, least in zip(
        SHAPE, spacing_mm, study.preprocess.spacing_mm or (), geometry.size, study.preprocess.size, strict=False
    ):
        assert max(0, n * mm / pixel_mm - 1e-3) <= edge < max(least, n * mm / pixel_mm) + 1
    answer = np.ones((geometry.examples, 1, *geometry.size), np.float32)
    assert restore(answer, geometry).shape == (1, *SHAPE)
    assert (np.abs(restore(answer, geometry) - 1) < 1e-5).all()


def test_an_image_at_the_plan_s_spacing_comes_back_to_its_grid_to_the_bit():
    voxels = np.random.default_rng(0).random((1, *SHAPE), np.float32)
    plan = replace(DEEP.preprocess, window_hu=(0.0, 1.0), size=(48, 16, 32))
    examples = preprocess(voxels, (1.0, 1.0, 2.0), plan)
    assert examples.geometry.size == (48, 30, 32)
    assert (restore(examples.images, examples.geometry) == voxels).all()


@pytest.mark.parametrize("study", [DEEP, FLAT])
def test_an_image_in_metres_is_one_case_and_not_the_end_of_an_order(tmp_path, study):
    folder = written(tmp_path / "data")
    for name in ("image1.nii", "mask1.nii"):
        header = bytearray((folder / name).read_bytes())
        header[123] = 1  # xyzt_units: metres
        (folder / name).write_bytes(header)
    sound, metres = sorted(read_manifest(folder, None, "salt"), key=lambda case: case.row)
    assert look_at(sound, folder, needs_of(study), "s").facts is not None
    found = look_at(metres, folder, needs_of(study), "s").findings
    assert [(each.code, each.severity, each.case) for each in found] == [("INPUT_TOO_LARGE", "block", metres.key)]
    with pytest.raises(ImageUnreadable, match=r"1000 x 1000 x 2000 mm; .* right\?") as e:
        prepare([sound, metres], study, tmp_path / "cache")
    assert metres.key in str(e.value)
    assert sound.key not in str(e.value)
    assert len(prepare([sound], study, tmp_path / "cache").cases) == 1


# Training


def test_patches_are_pieces_of_the_whole_image_with_their_masks(folder):
    found = data(folder, DEEP)
    voxels, labels = voxels_of(0)
    whole = (voxels.astype(np.float32) / 1000).astype(np.float16)
    other = (voxels_of(1)[0].astype(np.float32) / 1000).astype(np.float16)
    seen = np.zeros(SHAPE, bool)
    of_first = 0
    for batch in found.batches(4, np.random.default_rng(1), steps=60):
        for image, mask in zip(batch.images[:, 0], batch.masks, strict=True):
            alike = np.argwhere(whole[:25, :15, :9] == image[0, 0, 0])
            corners = [c for c in alike if (whole[tuple(slice(a, a + 16) for a in c)] == image).all()]
            if corners:
                window = tuple(slice(a, a + 16) for a in corners[0])
                assert (labels[window] == mask).all()
                seen[window] = True
                of_first += 1
            else:
                assert image[0, 0, 0] in other
    assert 80 < of_first < 160
    assert seen.mean() > 0.9  # its corners too, which a crop of the centre never shows


def test_a_share_of_the_patches_lies_around_labels_each_label_as_often(folder):
    for study in (DEEP, FLAT):
        plain = share_around_labels(data(folder, replace(study, train=replace(study.train, foreground=0.0))))
        half = share_around_labels(data(folder, study))
        every = share_around_labels(data(folder, replace(study, train=replace(study.train, foreground=1.0))))
        assert plain < 0.1
        assert half == pytest.approx(0.25 + plain, abs=0.1)
        assert every == pytest.approx(0.5, abs=0.1)


def test_a_third_is_drawn_around_labels_where_the_study_says_nothing(folder):
    found = data(folder, replace(DEEP, train=replace(DEEP.train, foreground=None)))
    assert found.patches is not None
    assert found.patches.foreground == 0.33


def test_an_epoch_has_as_many_patches_as_cover_the_images(folder):
    assert len(data(folder, DEEP)) == 2 * 3 * 2 * 2  # 40 x 30 x 24 in pieces of 16
    assert len(data(folder, FLAT)) == 2 * 24 * 3 * 2
    batches = list(data(folder, DEEP).batches(5, np.random.default_rng(0), epochs=1))
    assert [len(batch.masks) for batch in batches] == [5, 5, 5, 5, 4]


def test_the_same_rng_draws_the_same_patches_from_memory_and_from_disk(folder, monkeypatch):
    for study in (DEEP, FLAT):
        held = data(folder, study)
        monkeypatch.setattr(dataset, "MEMORY_BYTES", 0)
        mapped = data(folder, study)
        monkeypatch.undo()
        assert isinstance(mapped.cases[0].images, np.memmap)
        one, two = (
            list(d.batches(4, np.random.default_rng(7), steps=5, ahead=ahead))
            for d, ahead in ((held, False), (mapped, True))
        )
        for a, b in zip(one, two, strict=True):
            assert a.images.dtype == np.float16
            assert (a.images == b.images).all()
            assert (a.masks == b.masks).all()


def test_an_image_smaller_than_the_patch_is_padded_with_its_lowest_value_and_background(tmp_path):
    large = replace(DEEP, preprocess=replace(DEEP.preprocess, size=(48, 32, 32)))
    batch = next(data(written(tmp_path / "data"), large).batches(2, np.random.default_rng(0), steps=1))
    assert batch.images.shape == (2, 1, 48, 32, 32)
    assert (batch.images[:, :, :4] == 0).all()
    assert (batch.masks[:, 44:] == 0).all()
    assert (batch.masks == 2).sum() == 2


# Prediction


class Mean(nn.Module):
    """Two channels: the mean of what is around a voxel, and twice that; near the edge of a window it is wrong."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.pool = (nn.AvgPool2d, nn.AvgPool3d)[dims - 2](5, stride=1, padding=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.pool(images), 2 * self.pool(images)], dim=1)


@pytest.mark.parametrize(("study", "whole"), [(DEEP, (40, 32, 24)), (FLAT, (40, 24))])
def test_windows_give_what_monai_s_sliding_window_gives(study, whole):
    images = np.random.default_rng(0).random((3 if len(whole) == 2 else 1, 1, *whole)).astype(np.float16)
    found = logits(Mean(len(whole)), images, study, CPU)
    given = sliding_window_inference(
        torch.from_numpy(images).float(), study.preprocess.size, 4, Mean(len(whole)), overlap=0.5, mode="gaussian"
    )
    assert found.shape == (len(images), 2, *whole)
    assert torch.allclose(found, given, atol=1e-4)  # type: ignore[arg-type]


def test_what_every_window_agrees_on_is_not_changed_by_their_weights():
    class Itself(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 3 * images

    images = np.random.default_rng(0).normal(size=(5, 1, 37, 50)).astype(np.float32)
    found = logits(Itself(), images, replace(FLAT, evaluate=Evaluate(overlap=0.25)), CPU)
    assert torch.allclose(found, 3 * torch.from_numpy(images), atol=1e-5)


def test_windows_lie_evenly_from_end_to_end_and_overlap_as_much_as_is_wanted():
    assert begins(40, 16, 0.5) == [0, 8, 16, 24]
    assert begins(41, 16, 0.5) == [0, 6, 12, 19, 25]
    assert begins(16, 16, 0.5) == [0]
    assert begins(17, 16, 0.0) == [0, 1]


def test_a_window_counts_most_in_its_middle_and_somewhat_in_its_corners():
    share = weights((16, 32))
    assert share.shape == (16, 32)
    assert share.argmax() == 7 * 32 + 15
    assert share.min() == pytest.approx(1e-3)
    assert share[4, 15] == pytest.approx(float(np.exp(-(1.75**2 + 0.125**2) / 2)), rel=1e-4)


def test_dice_is_taken_over_the_whole_case_and_not_over_a_patch_of_it(folder):
    class Everywhere(nn.Module):
        """Answers "everywhere", which the whole case punishes."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 2, *images.shape[2:]), 5.0)

    scores = evaluate(Everywhere(), data(folder, DEEP), DEEP, functions_of(DEEP.task), CPU, smallest_count=1)
    labelled, voxels = 6 * 6 * 3, 40 * 30 * 24
    assert scores["lung"].value == pytest.approx(2 * labelled / (labelled + voxels), abs=1e-6)
    assert scores["nodule"].value == pytest.approx(2 / (1 + voxels), abs=1e-6)


def test_labels_of_the_whole_image_lie_where_its_voxels_lie():
    labels = voxels_of(0)[1]
    geometry = plan_geometry(SHAPE, (1.0, 1.0, 2.0), DEEP.preprocess)
    assert (preprocess_labels(labels, geometry)[0] == labels).all()
