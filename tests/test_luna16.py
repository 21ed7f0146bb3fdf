"""LUNA16: where the tables' millimetres lie in an image, whichever way it was stored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from fedclient.data.images import read_image, read_labels
from fedclient.data.luna16 import (
    LEFT_LUNG,
    RIGHT_LUNG,
    TRACHEA,
    Mark,
    lungs,
    mark_indices,
    read_annotations,
    read_excluded,
    spheres,
)  # fmt: skip
from fedclient.data.volume import Volume
from shared_models.errors import ImageUnreadable, ManifestInvalid
from simulations.fixtures import LunaCase, Nodule, write_luna16, write_mhd

itk: Any = SimpleITK
HEAD = "seriesuid,coordX,coordY,coordZ,"


def mark(x: float, y: float, z: float, diameter_mm: float | None = None, row: int = 2) -> Mark:
    return Mark(row, "1.2.3", (x, y, z), diameter_mm)


def raw(path: Path, transform: str, offset: str, spacing: str, values: np.ndarray[Any, Any]) -> Path:
    """A header typed by hand beside its voxels, x fastest."""
    path.with_suffix(".raw").write_bytes(values.astype("<i2").tobytes(order="F"))
    path.write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        f"TransformMatrix = {transform}\nOffset = {offset}\nCenterOfRotation = 0 0 0\nAnatomicalOrientation = RAI\n"
        f"ElementSpacing = {spacing}\nDimSize = {' '.join(map(str, values.shape))}\nElementType = MET_SHORT\n"
        f"ElementDataFile = {path.stem}.raw\n"
    )
    return path


@pytest.mark.parametrize(
    ("transform", "offset", "world", "index"),
    [
        # (world - offset) / spacing, by hand
        ("1 0 0 0 1 0 0 0 1", "-195 -180 -378.75", (-180.0, -176.0, -366.25), (20, 5, 5)),
        # the same with x and y the other way: (offset - world) / spacing
        ("-1 0 0 0 -1 0 0 0 1", "100 50 -200", (85.0, 42.0, -187.5), (20, 10, 5)),
    ],
)
def test_world_becomes_voxel_as_computed_by_hand(
    tmp_path: Path, transform: str, offset: str, world: tuple[float, float, float], index: tuple[int, ...]
) -> None:
    stored = np.full((24, 16, 8), -1000, np.int16)
    stored[index] = 100
    path = raw(tmp_path / "1.2.3.mhd", transform, offset, "0.75 0.8 2.5", stored)
    image = read_image(path)
    (found,) = mark_indices([mark(*world)], image)
    assert found == pytest.approx(np.rint(found))
    assert image.voxels[0][tuple(np.rint(found).astype(int))] == 100
    theirs = itk.ReadImage(str(path)).TransformPhysicalPointToContinuousIndex(world)
    assert theirs == pytest.approx(index)
    if transform.startswith("-1"):  # what is usually written would be off the image
        naive = (np.array(world) - np.array([float(o) for o in offset.split()])) / (0.75, 0.8, 2.5)
        assert (naive < 0).any()


def test_a_sphere_holds_the_voxels_within_its_radius() -> None:
    image = Volume(np.zeros((1, 9, 9, 9), np.float32), np.diag([-1.0, 1, 1, 1]))  # I runs to the left here
    labels = spheres([mark(4, -4, 4, 3.0)], image)  # radius 1.5 mm: the centre, 6 neighbours, 12 at sqrt(2)
    assert labels.sum() == 19
    assert labels[4, 4, 4] == labels[5, 5, 4] == 1
    assert labels[5, 5, 5] == 0  # sqrt(3) = 1.73 mm away
    flat = Volume(np.zeros((1, 9, 9, 9), np.float32), np.diag([-1.0, 1, 5, 1]))
    assert spheres([mark(4, -4, 20, 3.0)], flat).sum() == 9  # one plane only
    assert spheres([mark(4.4, -4, 21.9, 0.5)], flat)[4, 4, 4] == 1  # smaller than a voxel: the nearest one


def test_excluded_marks_are_left_out_and_nodules_win() -> None:
    image = Volume(np.zeros((1, 30, 9, 9), np.float32), np.diag([-1.0, 1, 1, 1]))
    labels = spheres([mark(4, -4, 4, 3.0)], image, value=2, excluded=[mark(20, -4, 4), mark(6, -4, 4, 4.0)])
    assert labels[4, 4, 4] == 2
    assert labels[5, 4, 4] == 2
    assert labels[7, 4, 4] == 127
    assert (labels[15:26, 4, 4] == 127).all()  # nobody measured it: 10 mm wide, as in the challenge's evaluation
    assert labels[14, 4, 4] == 0


def test_a_mark_outside_its_image_is_refused_by_row() -> None:
    image = Volume(np.zeros((1, 9, 9, 9), np.float32), np.eye(4))
    with pytest.raises(ImageUnreadable, match="row 7") as e:
        mark_indices([mark(-4, -4, 4), mark(4, -4, 4, row=7)], image)  # the sign of x is that of RAS
    assert e.value.code == "LABEL_GEOMETRY_MISMATCH"
    assert mark_indices([], image).shape == (0, 3)


def test_tables_are_read_with_their_kinds(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{HEAD}diameter_mm\n1.2.3,-128.69942,-175.31927,-298.38750,5.6514706\n")
    (found,) = read_annotations(path)
    assert (found.centre_lps_mm, found.diameter_mm) == ((-128.69942, -175.31927, -298.3875), 5.6514706)
    path.write_text(f"{HEAD}diameter_mm\n1.2.3,1,2,3,-1\n1.2.4,1,2,3,4.5\n")
    assert [m.diameter_mm for m in read_excluded(path)] == [None, 4.5]
    assert "1.2.4" not in repr(read_excluded(path))


@pytest.mark.parametrize(
    "row", ["1.2.3,1,2,3,-1", "1.2.3,1,2,3,0", "1.2.3,1,2,nan,4", "1.2.3,1,,3,4", "1.2.3,1,2,3,9e9"]
)
def test_impossible_annotations_are_refused_by_row(tmp_path: Path, row: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{HEAD}diameter_mm\n{row}\n")
    with pytest.raises(ManifestInvalid, match="row 2") as e:
        read_annotations(path)
    assert e.value.code == "LABEL_VALUES"
    assert "1.2.3" not in str(e.value)


@pytest.mark.parametrize("turned", [False, True])
def test_the_fixture_reads_back_with_its_nodules_in_place(tmp_path: Path, turned: bool) -> None:
    rng = np.random.default_rng(0)
    affine = np.array([[0.7, 0, 0, -40], [0, 0.7, 0, -30], [0, 0, 1.25, -200], [0, 0, 0, 1]])
    volume = Volume(rng.integers(-1000, 400, (1, 20, 24, 16)).astype(np.float32), affine)
    volume.voxels[0, 12, 6, 9] = 2000
    centre = tuple(float(v) for v in (np.diag([-1, -1, 1, 1]) @ affine @ (12, 6, 9, 1))[:3])
    airways = rng.choice([0, 3, 4, 5], volume.voxels.shape[1:]).astype(np.uint8)
    assert len(centre) == 3
    case = LunaCase("1.2.3", volume, (Nodule(centre, 4.0, True),), ((centre, None),), ((0, 0, 0),), airways, turned)
    root = write_luna16(tmp_path, [case])
    image = read_image(root / "subset0" / "1.2.3.mhd")
    assert (image.voxels == volume.voxels).all()
    assert image.affine_ras == pytest.approx(affine)
    (nodule,) = read_annotations(root / "annotations.csv")
    assert mark_indices([nodule], image)[0] == pytest.approx((12, 6, 9))
    assert read_excluded(root / "evaluationScript" / "annotations" / "annotations_excluded.csv")[0].diameter_mm is None
    stored = read_labels(root / "seg-lungs-LUNA16" / "1.2.3.mhd", like=image)
    assert (stored == airways).all()
    assert (lungs(stored, {LEFT_LUNG: 1, RIGHT_LUNG: 1, TRACHEA: 0}) == np.isin(airways, (3, 4))).all()
    with pytest.raises(ImageUnreadable, match="5") as e:
        lungs(stored, {LEFT_LUNG: 1, RIGHT_LUNG: 1})
    assert e.value.code == "LABEL_VALUES"


def test_the_header_is_the_one_that_itk_writes(tmp_path: Path) -> None:
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    affine = np.array([[0.5, 0, 0, 3], [0, 0.25, 0, 7], [0, 0, 2, -9], [0, 0, 0, 1]])
    for turned in (False, True):
        ours = write_mhd(tmp_path / "a.mhd", voxels, affine, turned=turned)
        itk.WriteImage(itk.ReadImage(str(ours)), str(tmp_path / "b.mhd"))
        theirs = (tmp_path / "b.mhd").read_text().splitlines()
        kept = [line for line in theirs if not line.startswith("ITK_")]  # newer ones add what they read
        assert ours.read_text().replace("a.raw", "b.raw").splitlines() == kept
        assert (tmp_path / "a.raw").read_bytes() == (tmp_path / "b.raw").read_bytes()
