"""Lesions from masks, boxes and points: where they are, how large, and what moves with the image around them."""

import csv
from pathlib import Path

import numpy as np
import pytest

from fedclient.data.augment import Change, draw, move_lesions
from fedclient.data.boxes import Box
from fedclient.data.cases import Boxes, Case, Channel, Marks, Mask, Shown, read_case
from fedclient.data.lesions import centres_lps_mm, from_mask, in_mm, in_window, lesions_of, of_examples, padded, places
from fedclient.data.listing import list_cases
from fedclient.data.luna16 import Mark
from fedclient.data.manifest import read_manifest
from fedclient.data.truths import has_truth
from fedclient.data.volume import FRONTAL_RAS, PICTURE_PIXELS, Volume
from fedclient.data.where import Where
from shared_models.errors import ImageUnreadable, ManifestInvalid
from shared_models.files import write_atomic
from shared_models.preprocess import Geometry
from shared_models.study import Augment, Task
from simulations.fixtures import LunaCase, Nodule, write_luna16
from simulations.fixtures.datasets import write_data_set
from simulations.fixtures.people import chest
from simulations.phantoms import nifti

NODULES = Task(kind="detection", labels=("nodule",), loss="centre")
ANYTHING = Task(kind="detection", labels=("lesion",), loss="centre")
TWO = Task(kind="detection", labels=("mass", "nodule"), loss="centre")
AFFINE = np.array([[-0.5, 0, 0, 90], [0, 0.5, 0, -100], [0, 0, 2.0, -300], [0, 0, 0, 1]])
VOLUME = Volume(np.zeros((1, 40, 30, 20), np.float32), np.diag([0.5, 0.5, 2.0, 1.0]), "CT")


def case(label: object = None, marks: Marks | None = None, structures: dict[str, str] | None = None) -> Case:
    return Case("k", "p", (Channel(files=(Path("x"),)),), label, "train", 1, structures or {}, {}, marks)  # type: ignore[arg-type]


def mark(x: float, y: float, z: float, diameter_mm: float | None, label: str = "nodule") -> Mark:
    return Mark(2, "", (x, y, z), diameter_mm, label=label)


def test_a_point_becomes_a_ball_in_voxels():
    # RAS affine of 0.5, 0.5, 2 mm: LPS (-5, -4, 6) is RAS (5, 4, 6), voxel (10, 8, 3); 6 mm wide is 6, 6 and 1.5 voxels
    found = lesions_of(case(Marks((mark(-5, -4, 6, 6.0),))), VOLUME, NODULES)
    assert found.tolist() == [[1, 10, 8, 3, 6, 6, 1.5]]


def test_what_luna16_excludes_is_irrelevant_and_ten_mm_wide_where_nobody_measured_it():
    found = lesions_of(case(Marks((), (mark(-5, -4, 6, None),))), VOLUME, NODULES)
    assert found.tolist() == [[127, 10, 8, 3, 10, 10, 2.5]]


def test_points_without_a_table_of_nodules_are_no_truth():
    assert not has_truth(case(Marks(None)), NODULES)
    with pytest.raises(ImageUnreadable, match=r"annotations\.csv"):
        lesions_of(case(Marks(None)), VOLUME, NODULES)


def test_classes_of_an_image_are_no_truth_and_an_empty_table_is():
    assert not has_truth(case(Shown(("nodule",))), NODULES)
    assert has_truth(case(Marks(())), NODULES)
    assert has_truth(case(Boxes(())), NODULES)


def test_marks_of_a_table_count_before_a_mask():
    found = lesions_of(case(Mask(Path("none")), Marks((mark(-5, -4, 6, 6.0),))), VOLUME, NODULES)
    assert len(found) == 1


def test_parts_of_a_mask_that_touch_are_one_lesion():
    mask = np.zeros((20, 20, 10), np.uint8)
    mask[2:6, 3:5, 4] = 1
    mask[6, 5, 5] = 1  # at a corner
    mask[12:15, 10:15, 2:4] = 2
    mask[0, 0, 0] = 127
    found = from_mask(mask)
    assert found[:, 0].tolist() == [1, 2, 127]
    np.testing.assert_allclose(found[0, 1:4], (np.array([3.5, 3.5, 4]) * 8 + [6, 5, 5]) / 9, rtol=1e-6)
    assert found[0, 4:].tolist() == [2.5, 1.5, 1.0]
    assert found[1].tolist() == [2, 13, 12, 2.5, 1.5, 2.5, 1.0]


def picture(rows: int = 60, columns: int = 80) -> Volume:
    return Volume(np.zeros((1, rows, columns, 1), np.float32), FRONTAL_RAS, "DX", voxel_of_pixel=PICTURE_PIXELS)


def test_a_box_has_its_middle_and_half_its_edges_and_is_as_deep_as_wide():
    boxes = Boxes((Box(2, ("nodule",), 10, 20, 30, 26),))  # columns 10 to 30, rows 20 to 26
    found = lesions_of(case(boxes), picture(), NODULES)
    assert found.tolist() == [[1, 22.5, 19.5, 0, 3, 10, 6.5]]


def test_boxes_on_an_image_of_several_slices_are_refused():
    # coronal: columns run along I, rows down K, slices along J
    coronal = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 3], [0, 0, 0, 1]], np.float64)
    volume = Volume(np.zeros((1, 12, 2, 4), np.float32), np.eye(4), "CT", voxel_of_pixel=coronal)
    for boxes in (Boxes((Box(2, ("nodule",), 1, 1, 3, 3),)), Boxes(())):
        with pytest.raises(ImageUnreadable, match=r"image has 2 slices: .* nodules\.csv") as e:
            lesions_of(case(boxes), volume, NODULES)
        assert e.value.code == "LABEL_GEOMETRY_MISMATCH"


def test_a_box_on_one_slice_is_deep_across_it_even_where_a_strip_is_as_narrow():
    # one coronal slice of 1 column: I and J are both 1 wide, and the slice lies across J
    coronal = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 8], [0, 0, 0, 1]], np.float64)
    volume = Volume(np.zeros((1, 1, 1, 9), np.float32), np.diag([1.0, 4.0, 2.0, 1.0]), "CT", voxel_of_pixel=coronal)
    found = lesions_of(case(Boxes((Box(2, ("nodule",), 0, 2, 1, 5),))), volume, NODULES)
    # half an edge is 0.5 and 1.5 voxels, 0.5 and 3 mm: 1.75 mm deep, which are 0.4375 voxels of 4 mm
    assert found.tolist() == [[1, 0, 0, 5, 0.5, 0.4375, 1.5]]


def test_names_are_read_as_the_site_maps_them():
    boxes = Boxes((Box(2, ("Adenocarcinoma(A)",), 1, 1, 3, 3), Box(3, ("Left mass",), 5, 5, 9, 9)))
    here = {"adenocarcinoma(a)": "nodule", "left mass": "mass"}
    assert lesions_of(case(boxes, structures=here), picture(), TWO)[:, 0].tolist() == [2, 1]


def test_findings_whose_names_hold_no_latin_letter_stay_apart():
    boxes = Boxes((Box(2, ("結節",), 1, 1, 3, 3), Box(3, ("腫瘤",), 5, 5, 9, 9)))
    here = {"結節": "nodule", "腫瘤": "mass"}
    assert lesions_of(case(boxes, structures=here), picture(), TWO)[:, 0].tolist() == [2, 1]
    with pytest.raises(ImageUnreadable, match="name that the study does not know"):
        lesions_of(case(boxes, structures={"結節": "nodule"}), picture(), TWO)


def test_a_name_mapped_to_background_is_forgotten_and_to_ignore_is_irrelevant():
    boxes = Boxes((Box(2, ("scar",), 1, 1, 3, 3), Box(3, ("clip",), 5, 5, 9, 9)))
    found = lesions_of(case(boxes, structures={"scar": "ignore", "clip": "background"}), picture(), NODULES)
    assert found[:, 0].tolist() == [127]


def test_an_unknown_name_is_refused_and_found_by_a_study_of_any_lesion():
    boxes = Boxes((Box(2, ("adenocarcinoma(A)",), 1, 1, 3, 3),))
    with pytest.raises(ImageUnreadable, match=r"(?s)name that the study does not know.*`structures`") as e:
        lesions_of(case(boxes), picture(), NODULES)
    assert e.value.code == "LABEL_VALUES"
    assert "adenocarcinoma" not in str(e.value)
    assert lesions_of(case(boxes), picture(), ANYTHING)[:, 0].tolist() == [1]


def test_a_study_of_any_lesion_leaves_out_what_the_site_maps_to_background(tmp_path: Path):
    mask = np.zeros(VOLUME.voxels.shape[1:], np.uint8)
    mask[2:6, 3:5, 4], mask[12:15, 10:15, 2:4] = 1, 2
    write_atomic(tmp_path / "m.nii.gz", nifti(mask, VOLUME.affine_ras))
    drawn = Mask(tmp_path / "m.nii.gz", {1: "Scar_1", 2: "腫瘤"})
    here = {"scar-1": "background", "腫瘤": "of-another-study"}
    found = lesions_of(case(drawn, structures=here), VOLUME, ANYTHING)
    assert found.tolist() == [[1, 13, 12, 2.5, 1.5, 2.5, 1]]


def test_millimetres_go_back_to_where_luna16s_table_has_them():
    volume = Volume(np.zeros((1, 300, 300, 100), np.float32), AFFINE @ np.diag([-1, 1, 1, 1]), "CT")
    places_lps = [(-95.5, 42.25, -200.0), (-120.0, 10.0, -150.5)]
    found = lesions_of(case(Marks(tuple(mark(*at, 8.0) for at in places_lps))), volume, NODULES)
    back = centres_lps_mm(in_mm(found, volume.spacing_mm)[:, 1:4], volume.affine_ras)
    np.testing.assert_allclose(back, places_lps, atol=1e-3)


def test_a_layout_of_luna16_gives_its_nodules_in_place(tmp_path: Path):
    volume = Volume(np.zeros((1, 32, 32, 16), np.float32), np.diag([1.5, 1.5, 2.5, 1.0]), "CT")
    nodule = Nodule((-15.0, -24.0, 20.0), 9.0, False)
    uids = ("1.2.840.1", "1.2.840.2")  # the second is stored with its axes turned
    write_luna16(
        tmp_path, [LunaCase(uid, volume, [nodule], [((-3.0, -3.0, 5.0), None)], turned=uid[-1] == "2") for uid in uids]
    )
    for each in list_cases(Where(tmp_path), "salt").cases:
        read = read_case(each)
        found = in_mm(lesions_of(each, read, NODULES), read.spacing_mm)
        assert found[:, 0].tolist() == [1, 127]
        np.testing.assert_allclose(centres_lps_mm(found[:, 1:4], read.affine_ras)[0], nodule.centre_lps_mm, atol=1e-3)
        np.testing.assert_allclose(found[0, 4:], 4.5, rtol=1e-6)


BALL = np.array([[1, 10, 8, 3, 5, 5, 2]], np.float32)  # two planes to either side


def planes(size: tuple[int, ...] = (40, 30), start: tuple[float, ...] = (0, 0), step: tuple[float, ...] = (1, 1)):
    return Geometry((40, 30, 20), (1.0, 1.0, 2.5), size, start, step)


def test_planes_show_the_cut_through_a_lesion():
    found = of_examples(BALL, planes())
    assert found.shape == (20, 1, 5)
    assert np.flatnonzero(found[:, 0, 0]).tolist() == [2, 3, 4]
    assert found[3, 0].tolist() == [1, 10, 8, 5, 5]
    np.testing.assert_allclose(found[2, 0], [1, 10, 8, *[5 * np.sqrt(1 - 0.25)] * 2], rtol=1e-6)


def test_near_the_end_of_a_lesion_a_plane_is_not_asked():
    found = of_examples(np.array([[1, 10, 8, 3.3, 5, 5, 2]], np.float32), planes())
    # 2 and 5 lie 1.3 and 1.7 from its middle: the latter is more than 0.7 of 2
    assert {k: found[k, 0, 0] for k in (2, 3, 4, 5)} == {2: 1, 3: 1, 4: 1, 5: 127}


def test_a_lesion_thinner_than_a_slice_is_on_the_plane_nearest_to_it():
    found = of_examples(np.array([[1, 10, 8, 3.4, 2, 2, 0.2]], np.float32), planes())
    assert np.flatnonzero(found[:, 0, 0]).tolist() == [3]
    assert found[3, 0, 0] == 1


def test_a_resampled_grid_moves_and_scales_lesions():
    found = of_examples(BALL, planes((20, 15), (0.5, 0.5), (2, 2)))
    assert found[3, 0].tolist() == [1, 4.75, 3.75, 2.5, 2.5]


def test_a_volume_has_its_lesions_in_all_three_axes():
    geometry = Geometry((40, 30, 20), (1.0, 1.0, 2.0), (40, 30, 40), (0, 0, -0.25), (1, 1, 0.5))
    assert of_examples(BALL, geometry).tolist() == [[[1, 10, 8, 6.5, 5, 5, 4]]]


def test_places_are_the_pixels_of_centres_and_leave_out_what_is_irrelevant():
    truth = padded([np.array([[1, 2.4, 3.6, 1, 1], [127, 0, 0, 1, 1]]), np.array([[2, 1, 0, 1, 1]])], 2)
    ones, twos = places(truth, (5, 6), 2)
    assert ones.tolist() == [2 * 6 + 4]
    assert twos.tolist() == [30 + 1 * 6 + 0]


def test_a_window_keeps_what_reaches_into_it():
    truth = np.array([[1, 10, 10, 2, 2], [1, 17, 10, 4, 4], [1, 30, 30, 2, 2], [0, 0, 0, 0, 0]], np.float32)
    assert in_window(truth, (4, 5), (10, 10)).tolist() == [[1, 6, 5, 2, 2], [1, 13, 5, 4, 4]]


@pytest.mark.parametrize("size", [(40, 60), (30, 40, 24)])
def test_lesions_move_with_the_image(size: tuple[int, ...]):
    dims, count = len(size), 6
    rng = np.random.default_rng(3)
    middle, images = np.array(size) / 2, np.zeros((count, 1, *size), np.float32)
    centre = middle + rng.uniform(-5, 5, (count, 1, dims))
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1)
    for n in range(count):
        images[n, 0] = np.exp(-((grid - centre[n, 0]) ** 2).sum(-1) / 8)
    lesions = np.concatenate([np.ones((count, 1, 1)), centre, np.full((count, 1, dims), 4.0)], axis=2).astype(
        np.float32
    )
    drawn = draw(Augment(rotate_deg=40, scale=0.2, shift=0.1, flip_left_right=True), count, dims, rng)
    axes = np.array([0, 1] * 3, np.intp)
    moved = move_lesions(lesions, size, axes, drawn)
    changed, _ = Change(axes, drawn, rng, True).of_arrays(images, np.zeros((count, *size), np.uint8))
    weights = changed[:, 0]
    found = np.array([[(w * grid[..., a]).sum() / w.sum() for a in range(dims)] for w in weights])
    np.testing.assert_allclose(moved[:, 0, 1 : 1 + dims], found, atol=0.15)


def test_a_turned_lesion_has_the_box_of_its_ellipse():
    lesions = np.array([[[1, 15.5, 15.5, 6, 2]]], np.float32)
    drawn = draw(Augment(), 1, 2, np.random.default_rng(0))
    drawn.angle_rad[:] = np.pi / 2
    np.testing.assert_allclose(
        move_lesions(lesions, (32, 32), np.zeros(1, np.intp), drawn)[0, 0, 3:], [2, 6], atol=1e-5
    )


def manifest(folder: Path, rows: list[dict[str, object]], name: str = "manifest.csv") -> Path:
    for row in rows:
        if name == "manifest.csv":
            (folder / str(row["image"])).touch()
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return folder


EDGES = {"x_min": 1, "y_min": 2, "x_max": 5, "y_max": 9}
BARE = dict.fromkeys(EDGES, "")


def test_a_manifest_of_boxes_has_a_row_for_each(tmp_path: Path):
    a, b = ({"patient_id": p, "image": f"{p}.png"} for p in "ab")
    rows: list[dict[str, object]] = [
        {**a, "label": "nodule", **EDGES}, {**a, "label": "mass", **EDGES}, {**b, "label": "", **BARE},
    ]  # fmt: skip
    found = {c.patient: c for c in read_manifest(manifest(tmp_path, rows), None, "salt")}
    assert isinstance(found["a"].label, Boxes)
    assert isinstance(found["b"].label, Boxes)
    assert [box.labels for box in found["a"].label.boxes] == [("nodule",), ("mass",)]
    assert found["b"].label.boxes == ()
    assert found["a"].facts["label"] == "nodule|mass"


def test_an_image_with_boxes_and_without_is_refused(tmp_path: Path):
    a = {"patient_id": "a", "image": "a.png"}
    with pytest.raises(ManifestInvalid, match="with boxes and without"):
        read_manifest(manifest(tmp_path, [{**a, "label": "nodule", **EDGES}, {**a, "label": "", **BARE}]), None, "s")


def test_rows_of_one_image_must_be_of_one_patient(tmp_path: Path):
    rows = [{"patient_id": p, "image": "a.png", "label": "nodule", **EDGES} for p in "ab"]
    with pytest.raises(ManifestInvalid, match="`patient_id` differs"):
        read_manifest(manifest(tmp_path, rows), None, "salt")


AT = {"x_mm": 1, "y_mm": -2, "z_mm": 3.5, "diameter_mm": 6}


def test_nodules_stand_in_a_table_beside_the_manifest(tmp_path: Path):
    sites = {"a": "north", "b": "north", "c": "south"}
    manifest(tmp_path, [{"patient_id": p, "image": f"{p}.nii", "mask": "", "site": s} for p, s in sites.items()])
    manifest(tmp_path, [{"patient_id": p, **AT} for p in ("a", "c", "of-no-study")], "nodules.csv")
    found = {c.patient: c.marks for c in read_manifest(tmp_path, "north", "salt")}
    assert found == {"a": Marks((Mark(2, "", (1.0, -2.0, 3.5), 6.0),)), "b": Marks(())}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"patient_id": "7"}, r"row 2: `patient_id` is written otherwise in the manifest"),  # a spreadsheet had 007
        ({"patient_id": "elsewhere"}, r"none of its patients is in the manifest"),
        ({"patient_id": "007", "image": "a"}, r"row 2: `image` is none of the patient's images"),
        ({"patient_id": "007", "image": "b.nii"}, r"row 2: `image` is none of the patient's images"),
    ],
    ids=["patient", "other patients alone", "typo", "another patient's"],
)
def test_a_nodule_that_is_on_no_image_of_the_manifest_is_refused(tmp_path: Path, row: dict[str, object], told: str):
    manifest(tmp_path, [{"patient_id": p, "image": i, "mask": ""} for p, i in (("007", "a.nii"), ("012", "b.nii"))])
    manifest(tmp_path, [{**row, **AT}], "nodules.csv")
    with pytest.raises(ManifestInvalid, match=told) as e:
        read_manifest(tmp_path, None, "salt")
    assert e.value.code == "LABEL_VALUES"


def test_a_nodules_image_may_be_spelt_with_a_dot_before_it(tmp_path: Path):
    manifest(tmp_path, [{"patient_id": "a", "image": f"{n}.nii", "mask": ""} for n in "12"])
    manifest(tmp_path, [{"patient_id": "a", "image": "./2.nii", **AT}], "nodules.csv")
    found = {c.channels[0].files[0].name: c.marks for c in read_manifest(tmp_path, None, "salt")}
    assert found == {"1.nii": Marks(()), "2.nii": Marks((Mark(2, "", (1.0, -2.0, 3.5), 6.0),))}


def test_a_patient_of_several_images_needs_to_have_them_named(tmp_path: Path):
    manifest(tmp_path, [{"patient_id": "a", "image": f"{n}.nii", "mask": ""} for n in "12"])
    with pytest.raises(ManifestInvalid, match="several images"):
        read_manifest(manifest(tmp_path, [{"patient_id": "a", **AT}], "nodules.csv"), None, "salt")
    manifest(tmp_path, [{"patient_id": "a", "image": "2.nii", "label": "mass", **AT}], "nodules.csv")
    found = {c.channels[0].files[0].name: c.marks for c in read_manifest(tmp_path, None, "salt")}
    assert found["1.nii"] == Marks(())
    assert found["2.nii"] is not None
    assert [each.label for each in found["2.nii"].nodules or ()] == ["mass"]


@pytest.mark.parametrize("quote", ['"left', '"left\nb,1,-2,3.5,6,right"'])
def test_a_stray_quote_leaves_no_patient_without_his_nodules(tmp_path: Path, quote: str):
    manifest(tmp_path, [{"patient_id": p, "image": f"{p}.nii", "mask": ""} for p in "abc"])
    rows = f"patient_id,x_mm,y_mm,z_mm,diameter_mm,note\na,1,-2,3.5,6,{quote}\nc,1,-2,3.5,6,\n"
    (tmp_path / "nodules.csv").write_text(rows)
    with pytest.raises(ManifestInvalid, match=r"nodules\.csv: row 2 is not CSV"):
        read_manifest(tmp_path, None, "salt")
    (tmp_path / "nodules.csv").write_text('patient_id,"x_mm,y_mm,z_mm,diameter_mm\na,1,-2,3.5,6\n')
    with pytest.raises(ManifestInvalid, match=r"nodules\.csv: row 1 is not CSV"):
        read_manifest(tmp_path, None, "salt")


def test_a_table_of_that_name_with_other_columns_is_left_alone(tmp_path: Path):
    manifest(tmp_path, [{"patient_id": "a", "image": "a.nii", "mask": ""}])
    manifest(tmp_path, [{"patient_id": "a", "count": 3}], "nodules.csv")
    (found,) = read_manifest(tmp_path, None, "salt")
    assert found.marks is None


def test_a_diameter_that_cannot_be_is_refused(tmp_path: Path):
    manifest(tmp_path, [{"patient_id": "a", "image": "a.nii", "mask": ""}])
    with pytest.raises(ManifestInvalid, match=r"nodules\.csv.*\n.*row 2: `diameter_mm`"):
        read_manifest(manifest(tmp_path, [{"patient_id": "a", **AT, "diameter_mm": 0}], "nodules.csv"), None, "salt")


@pytest.mark.parametrize("task", [NODULES, ANYTHING], ids=["nodule", "lesion"])
def test_nodules_that_half_of_lidcs_readers_see_are_in_their_places(tmp_path: Path, task: Task):
    (each,) = list_cases(Where(write_data_set(tmp_path / "lidc", "lidc-idri", patients=1, seed=4)), "salt").cases
    volume = read_case(each)
    found = in_mm(lesions_of(each, volume, task), volume.spacing_mm)
    there = chest(0, seed=4, slices=6).nodules
    away = centres_lps_mm(found[:, 1:4], volume.affine_ras)[:, None] - np.array([n.centre_lps_mm for n in there])
    assert found[:, 0].tolist() == [1] * len(there)
    for nodule, gaps in zip(there, np.linalg.norm(away, axis=2).T, strict=True):
        assert gaps.min() < nodule.diameter_mm / 2  # a network that points there hits it
