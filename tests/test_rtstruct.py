"""RTSTRUCT: contours into voxels, holes and keyholes, and contours that lie beside the image's planes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sequence import Sequence as Items

from fedclient.data.dicom import read_series
from fedclient.data.rtstruct import read_regions, read_rtstruct
from fedclient.data.volume import Volume
from shared_models.errors import ImageUnreadable
from simulations.fixtures import Written, chest, write_dicom_series, write_rtstruct

AFFINE = np.array([[0.9, 0, 0, -30], [0, 0.9, 0, -25], [0, 0, 2.5, -100], [0, 0, 0, 1.0]])
SHAPE = (64, 56, 8)
IMAGE = Volume(np.zeros((1, *SHAPE), np.float32), AFFINE)


def refusal(code: str, call: Callable[..., object], *args: Any, **words: Any) -> str:
    with pytest.raises(ImageUnreadable) as e:
        call(*args, **words)
    assert e.value.code == code, str(e.value)
    return str(e.value)


def dice(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_dicom_series(tmp_path_factory.mktemp("series"), IMAGE)


def ball(centre: tuple[float, float, float], radius_mm: float) -> NDArray[np.bool_]:
    at = np.moveaxis(np.indices(SHAPE), 0, -1) - centre
    return np.asarray(np.linalg.norm(at * (0.9, 0.9, 2.5), axis=-1) <= radius_mm)


def redrawn(path: Path, contours: list[NDArray[np.float64]], kind: str = "CLOSED_PLANAR") -> Path:
    """Replaces what was drawn by these lines: float[n, 3] each, in index coordinates of the image."""
    data = pydicom.dcmread(path)
    items = []
    for corners in contours:
        lps = np.column_stack([corners, np.ones(len(corners))]) @ (np.diag([-1, -1, 1, 1]) @ AFFINE).T
        item = Dataset()
        item.ContourGeometricType, item.NumberOfContourPoints = kind, len(corners)
        item.ContourData = [f"{v:.6f}" for v in lps[:, :3].ravel()]
        items.append(item)
    data.ROIContourSequence[0].ContourSequence = Items(items)
    data.save_as(path)
    return path


def circle(i: float, j: float, k: float, radius: float, corners: int = 90) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.column_stack([i + radius * np.cos(angle), j + radius * np.sin(angle), np.full(corners, k)])


@pytest.mark.parametrize("directions", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_a_mask_comes_back_from_its_contours(tmp_path: Path, directions: tuple[int, int, int]) -> None:
    person = chest(1, size=96, slices=10)
    series = write_dicom_series(tmp_path / "series", person.volume, directions=directions)
    lung, nodule = person.lung == 1, person.nodule_masks[0]
    path = write_rtstruct(tmp_path / "r.dcm", series, {"Lung": lung, "GTV-1": nodule})
    image = read_series(series.paths)
    found = read_rtstruct(path, image, {"lung": 1, "gtv-1": 2}, overlap="last")
    assert dice(found > 0, lung | nodule) == 1  # at least 0.99 was asked for; outlines along pixel edges lose nothing
    assert ((found == 2) == nodule).all()
    assert (read_rtstruct(path, image, {2: 1}) == nodule).all()


def test_smooth_contours_as_planners_draw_them_give_the_same_body(tmp_path: Path, series: Written) -> None:
    mask = ball((30, 28, 4), 9)
    path = write_rtstruct(tmp_path / "r.dcm", series, {"GTV": mask})
    radii = [np.sqrt(max(81 - (2.5 * (k - 4)) ** 2, 0)) / 0.9 for k in range(8)]
    redrawn(path, [circle(30, 28, k, r) for k, r in enumerate(radii) if r])
    assert dice(read_rtstruct(path, IMAGE, {"GTV": 1}) == 1, mask) >= 0.99


def test_holes_islands_and_keyholes_are_counted_out(tmp_path: Path, series: Written) -> None:
    yes = np.ones(SHAPE[:2], np.bool_)
    distance = np.hypot(*(np.indices(SHAPE[:2]) - np.array([30, 28])[:, None, None]))
    ring = (distance <= 20.3) & (distance > 12.3) | (distance <= 4.3) & yes
    path = write_rtstruct(tmp_path / "r.dcm", series, {"ring": np.repeat(ring[:, :, None], 8, axis=2)})
    assert (read_rtstruct(path, IMAGE, {"ring": 1})[:, :, 3] == ring).all()
    redrawn(path, [circle(30, 28, 3, r) for r in (20.3, 12.3, 4.3)])
    assert dice(read_rtstruct(path, IMAGE, {"ring": 1})[:, :, 3] == 1, ring) >= 0.99
    outer, inner = circle(30, 28, 3, 20.3), circle(30, 28, 3, 12.3)
    keyhole = np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])
    solid = (distance <= 20.3) & (distance > 12.3)
    assert dice(read_rtstruct(redrawn(path, [keyhole]), IMAGE, {"ring": 1})[:, :, 3] == 1, solid) >= 0.99


def test_contours_may_stand_across_any_axis_of_the_image(tmp_path: Path, series: Written) -> None:
    path = write_rtstruct(tmp_path / "r.dcm", series, {"GTV": ball((30, 28, 4), 9)})
    sagittal = [np.array([(i, 10, 1), (i, 20, 1), (i, 20, 6), (i, 10, 6.0)]) + np.array([0, 0.5, 0.5]) for i in (4, 5)]
    labels = read_rtstruct(redrawn(path, sagittal), IMAGE, {"GTV": 1})
    expected = np.zeros(SHAPE, np.uint8)
    expected[4:6, 11:21, 2:7] = 1
    assert (labels == expected).all()


@pytest.mark.parametrize(
    ("contours", "words"),
    [
        ([circle(30, 28, 3.4, 9)], "0.4 planes beside"),
        ([circle(30, 28, 3, 9), circle(30, 28, 4.5, 9)], "beside"),
        ([circle(30, 28, 9, 9)], "outside"),
        ([circle(60, 28, 3, 9)], "outside"),
        ([circle(30, 28, 3, 9) + (0, 0, 1) * np.linspace(0, 1, 90)[:, None]], "askew"),
        ([circle(30, 28, k, 9) for k in (1, 3, 5, 7)], "one of 2 planes"),
        ([circle(30, 28, k, 9) for k in (0, 2, 4, 7)], "one of 2 planes"),
        ([circle(30, 28, k, 9) for k in (0, 2, 3, 5, 7)], "one of 2 planes"),
        ([circle(30, 28, k, 9) for k in (0, 1, 3, 4, 6, 7)], "one of 2 planes"),
        ([circle(30, 28, k, 9) for k in (0, 1, 4, 5, 7)], "over 2 stretches"),
        ([circle(10 + 7 * k, 28, k, 4) for k in (0, 2, 4)], "one of 2 planes"),
        ([circle(30 + k, 28, k, 4) for k in (0, 4, 7)], "one of 3 planes"),
    ],
)
def test_contours_off_the_planes_are_refused(
    tmp_path: Path, series: Written, contours: list[NDArray[np.float64]], words: str
) -> None:
    path = redrawn(write_rtstruct(tmp_path / "r.dcm", series, {"GTV": ball((30, 28, 4), 9)}), contours)
    assert words in refusal("LABEL_GEOMETRY_MISMATCH", read_rtstruct, path, IMAGE, {"GTV": 1})


def test_islands_of_one_plane_each_leave_out_no_plane(tmp_path: Path, series: Written) -> None:
    path = write_rtstruct(tmp_path / "r.dcm", series, {"GTV": ball((30, 28, 4), 9)})
    apart = redrawn(path, [circle(10 + 7 * k, 28, k, 4) for k in (0, 2, 5)])
    assert np.flatnonzero(read_rtstruct(apart, IMAGE, {"GTV": 1}).any(axis=(0, 1))).tolist() == [0, 2, 5]
    above = redrawn(path, [circle(30, 28, k, 9) for k in (0, 1, 2, 5, 6)])
    assert np.flatnonzero(read_rtstruct(above, IMAGE, {"GTV": 1}).any(axis=(0, 1))).tolist() == [0, 1, 2, 5, 6]


def test_a_moved_image_is_refused(tmp_path: Path, series: Written) -> None:
    path = write_rtstruct(tmp_path / "r.dcm", series, {"GTV": ball((30, 28, 4), 9)})
    moved = AFFINE.copy()
    moved[2, 3] += 1.2
    refusal("LABEL_GEOMETRY_MISMATCH", read_rtstruct, path, replace(IMAGE, affine_ras=moved), {"GTV": 1})


def test_points_and_numbers_that_are_none_are_refused(tmp_path: Path, series: Written) -> None:
    path = write_rtstruct(tmp_path / "r.dcm", series, {"GTV": ball((30, 28, 4), 9)})
    assert "POINT" in refusal(
        "LABEL_VALUES", read_rtstruct, redrawn(path, [np.array([[3.0, 4, 3]])], "POINT"), IMAGE, {"GTV": 1}
    )
    broken = redrawn(path, [np.array([[3.0, 4, 3], [np.nan, 4, 3], [5, 5, 3]])])
    refusal("LABEL_UNREADABLE", read_rtstruct, broken, IMAGE, {"GTV": 1})


def test_regions_are_named_once_and_absent_ones_are_refused(tmp_path: Path, series: Written) -> None:
    path = write_rtstruct(tmp_path / "r.dcm", series, {"JANE DOE": ball((30, 28, 4), 9), "GTV": ball((12, 28, 4), 5)})
    assert "DOE" not in refusal("LABEL_EMPTY", read_rtstruct, path, IMAGE, {"PTV": 1})
    assert not read_rtstruct(path, IMAGE, {"PTV": 1}, empty_ok=True).any()
    referenced, regions = read_regions(path)
    assert referenced.series_uid == series.stored.series_uid
    assert [(r.number, r.name) for r in regions] == [(1, "JANE DOE"), (2, "GTV")]
    data = pydicom.dcmread(path)
    data.StructureSetROISequence[0].ROIName = "gtv "
    data.save_as(path)
    refusal("LABEL_VALUES", read_rtstruct, path, IMAGE, {"GTV": 1})
    assert read_rtstruct(path, IMAGE, {2: 1}).any()


def test_other_objects_are_refused(tmp_path: Path, series: Written) -> None:
    path = tmp_path / "JANE_DOE.dcm"
    for content in (series.paths[0].read_bytes(), b"", b"DOE" * 99):
        path.write_bytes(content)
        assert "DOE" not in refusal("LABEL_UNREADABLE", read_rtstruct, path, IMAGE, {"GTV": 1})
