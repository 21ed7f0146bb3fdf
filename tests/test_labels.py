"""Labels of all kinds: names to values, overlaps, grids, outlines, and tables with their rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedclient.data.boxes import EDGES, Box, box_indices
from fedclient.data.labels import Labels, Structure, choose, indices, meanings, numbered, paint, place, renumber
from fedclient.data.luna16 import read_annotations
from fedclient.data.manifest import boxes_of
from fedclient.data.polygons import enclosed
from fedclient.data.tables import read_table
from fedclient.data.volume import FRONTAL_RAS, PICTURE_PIXELS, Volume
from shared_models.errors import ImageUnreadable, ManifestInvalid, StudyInvalid

STRUCTURES = (Structure(1, "Liver", ("SCT:10200004",)), Structure(2, " tumour "), Structure(3, "Tumour"))


def refusal(code: str, call: Callable[..., object], *args: Any, **words: Any) -> str:
    with pytest.raises((ImageUnreadable, ManifestInvalid)) as e:
        call(*args, **words)
    assert e.value.code == code, str(e.value)  # type: ignore[attr-defined]
    return str(e.value)


def volume(shape: tuple[int, int, int], affine_ras: NDArray[np.float64] | None = None) -> Volume:
    return Volume(np.zeros((1, *shape), np.float32), np.eye(4) if affine_ras is None else affine_ras)


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def on_grid(labels: Labels, affine_ras: NDArray[np.float64], like: Volume) -> Labels:
    """A label map on its image's grid."""
    moved = np.zeros(like.voxels.shape[1:], np.uint8)
    place(labels, np.asarray(np.linalg.solve(like.affine_ras, affine_ras), np.float64), moved)
    return moved


def test_structures_are_chosen_by_name_number_or_code() -> None:
    assert choose(STRUCTURES, {"liver": 1, "TUMOUR": 2}, False) == [(1, (1,)), (2, (2, 3))]
    by_number: dict[str | int, int] = {1: 4, "3": 5}
    assert choose(STRUCTURES, by_number, False) == [(4, (1,)), (5, (3,))]
    assert choose(STRUCTURES, {"sct:10200004": 1}, False) == [(1, (1,))]
    named_like_a_number = (Structure(1, "2"), Structure(2, "1"))
    assert choose(named_like_a_number, {"2": 7}, False) == [(7, (1,))]  # a name comes before a number


def test_a_structure_that_is_absent_is_refused_unless_that_is_said_to_happen() -> None:
    message = refusal("LABEL_EMPTY", choose, STRUCTURES, {"spleen": 1}, False)
    assert "'spleen'" in message
    assert "Liver" not in message  # what somebody typed into the file stays there
    assert choose(STRUCTURES, {"spleen": 1}, True) == [(1, ())]


def test_two_entries_for_one_structure_are_refused() -> None:
    refusal("LABEL_VALUES", choose, STRUCTURES, {"liver": 1, "1": 2}, False)


def test_study_labels_become_their_numbers() -> None:
    assert numbered({"Liver": "organ", "Artefact": "ignore"}, ["organ", "lesion"]) == {"Liver": 1, "Artefact": 127}
    with pytest.raises(StudyInvalid, match="kidney"):
        numbered({"Kidney": "kidney"}, ["organ"])


def test_names_are_told_apart_in_any_script_and_by_their_signs() -> None:
    assert meanings(["脾臓", "肝臓"], {"肝臓": 1}) == {"肝臓": 1}
    assert meanings(["печень", "СЕЛЕЗЁНКА"], {"печень": 1, "селезёнка": 2}) == {"печень": 1, "СЕЛЕЗЁНКА": 2}
    assert meanings(["यकृत", "यकृति"], {"यकृत": 1}) == {"यकृत": 1}  # vowel signs are no letters to Unicode
    assert meanings(["ki67+", "ki67-"], {"KI67-": 1, "ki67+": 2}) == {"ki67+": 2, "ki67-": 1}
    assert meanings(["ki67+"], {"ki67-": 1, "ki67": 2}) == {}
    assert meanings(["ｶﾞﾝ", "le\u0301sion"], {"ガン": 1, "l\u00e9sion": 2}) == {"ｶﾞﾝ": 1, "le\u0301sion": 2}


def test_a_name_is_a_known_one_as_a_word_only_where_no_other_name_is() -> None:
    assert meanings(["Left_Lung", "Right (lung)"], {"left-lung": 1, "right-lung": 2}) == {
        "Left_Lung": 1,
        "Right (lung)": 2,
    }
    assert meanings(["Left Lung", "left-lung"], {"left-lung": 1}) == {"left-lung": 1}
    assert meanings(["Left Lung", "left_lung"], {"left-lung": 1}) == {}
    assert meanings(["left_lung"], {"Left Lung": 1, "left-lung": 2}) == {}
    assert meanings(["LEFT LUNG"], {"Left Lung": 1, "left-lung": 2}) == {"LEFT LUNG": 1}
    assert meanings(["?", "-", "!"], {"!": 1, "*": 2}) == {"!": 1}


def test_a_voxel_of_two_structures_belongs_to_the_one_that_was_said_to_win() -> None:
    one, two = np.array([[[True, True, False]]]), np.array([[[False, True, True]]])
    masks = [(1, one), (2, two)]
    assert "1 voxels" in refusal("LABEL_VALUES", paint, masks, one.shape, "refuse", False)
    assert paint(masks, one.shape, "first", False).tolist() == [[[1, 1, 2]]]
    assert paint(masks, one.shape, "last", False).tolist() == [[[1, 2, 2]]]
    assert paint([(1, one), (1, two)], one.shape, "refuse", False).tolist() == [[[1, 1, 1]]]


def test_a_structure_without_a_voxel_is_refused_unless_that_is_said_to_happen() -> None:
    none = np.zeros((1, 1, 3), np.bool_)
    refusal("LABEL_EMPTY", paint, [(1, none)], none.shape, "refuse", False)
    assert not paint([(1, none)], none.shape, "refuse", True).any()


def test_other_label_values_are_refused_by_number() -> None:
    stored = np.array([[[0, 3, 4, 127]]], np.uint8)
    assert renumber(stored, {3: 1, 4: 0}).tolist() == [[[0, 1, 0, 127]]]
    assert "[4]" in refusal("LABEL_VALUES", renumber, stored, {3: 1})


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(3)), st.tuples(*[st.sampled_from((1, -1))] * 3), st.tuples(*[st.integers(0, 2)] * 3))
def test_a_turned_and_cropped_label_lands_on_the_same_place_in_the_patient(
    axes: list[int], signs: tuple[int, ...], cut: tuple[int, ...]
) -> None:
    like = volume((5, 6, 7), np.array([[0.7, 0, 0, -9], [0, 0.8, 0, 4], [0, 0, 2.5, 30], [0, 0, 0, 1.0]]))
    truth = np.zeros((5, 6, 7), np.uint8)
    truth[2:4, 2:4, 3] = 1
    truth[2, 3, 4] = 2
    cropped = truth[cut[0] :, cut[1] :, cut[2] :]
    stored = cropped.transpose(axes)[tuple(slice(None, None, s) for s in signs)]
    way = np.zeros((4, 4))  # stored index -> index in the image
    for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        way[axis, column] = sign
        way[axis, 3] = cut[axis] + (stored.shape[column] - 1 if sign < 0 else 0)
    way[3, 3] = 1
    assert (on_grid(stored, like.affine_ras @ way, like) == truth).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (np.array([[1, 0, 0, 0.4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "beside"),
        (np.array([[1, 0, 0, 0], [0, 1.3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "beside"),
        (np.array([[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "another size"),
        (np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "askew"),
        (np.array([[1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "outside"),
        (np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -3], [0, 0, 0, 1]]), "outside"),
    ],
)
def test_grids_that_do_not_coincide_are_refused(change: NDArray[np.float64], words: str) -> None:
    labels = np.ones((4, 4, 4), np.uint8)
    assert words in refusal("LABEL_GEOMETRY_MISMATCH", on_grid, labels, change, volume((4, 4, 4)))


def test_a_tenth_of_a_voxel_at_the_far_corner_is_borne_and_empty_labels_fit_everywhere() -> None:
    like = volume((40, 40, 40))
    wide = np.diag([1.002, 1.002, 1.002, 1])
    labels = np.ones((40, 40, 40), np.uint8)
    assert on_grid(labels, wide, like).all()
    refusal("LABEL_GEOMETRY_MISMATCH", on_grid, labels, np.diag([1.004, 1, 1, 1]), like)
    assert not on_grid(np.zeros((3, 3, 3), np.uint8), np.diag([9.0, 9, 9, 1]), like).any()


def test_marks_add_up_where_they_are_placed() -> None:
    into = np.zeros((1, 1, 4), np.uint8)
    place(np.full((1, 1, 2), 3, np.uint8), np.eye(4), into)
    place(np.full((1, 1, 2), 2, np.uint8), np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1.0]]), into)
    assert into.tolist() == [[[3, 3, 2, 0]]]


def test_world_to_index_solves_the_whole_affine() -> None:
    affine_ras = np.array([[-0.5, 0, 0, 30], [0, 0, 2, -10], [0, 0.5, 0, 5], [0, 0, 0, 1]])
    found = indices(np.array([[-29.0, 6.0, 7.5], [-30.0, 10.0, 5.0]]), affine_ras)  # LPS: x and y the other way
    assert found == pytest.approx(np.array([[2.0, 5.0, 2.0], [0.0, 0.0, 0.0]]))


def inside(x: float, y: float, corners: list[tuple[int, int]]) -> bool:
    """Even-odd by a ray, the textbook's way."""
    odd = False
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (x1 > x) != (x2 > x) and y < y1 + (x - x1) / (x2 - x1) * (y2 - y1):
            odd = not odd
    return odd


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 11), st.integers(-3, 11)), min_size=3, max_size=8))
def test_pixels_inside_an_outline_are_those_that_a_ray_finds(corners: list[tuple[int, int]]) -> None:
    dx, dy = np.pi / 10, np.e / 20  # no line through corners moved like this meets a pixel centre
    moved = np.array(corners, np.float64) + np.array([dx, dy])
    found = enclosed([moved], (9, 8))
    for a, b in np.ndindex(9, 8):
        assert found[a, b] == inside(a - dx, b - dy, corners)


def test_outlines_within_outlines_are_holes_and_shared_edges_count_once() -> None:
    square = np.array([(0.5, 0.5), (5.5, 0.5), (5.5, 5.5), (0.5, 5.5)])
    hole = np.array([(2.5, 2.5), (3.5, 2.5), (3.5, 3.5), (2.5, 3.5)])
    assert enclosed([square, hole], (7, 7)).sum() == 25 - 1
    keyhole = np.array([*square, square[0], hole[0], *hole[::-1]])
    assert (enclosed([keyhole], (7, 7)) == enclosed([square, hole], (7, 7))).all()
    left, right = np.array([(0, 0), (2, 0), (2, 4), (0, 4.0)]), np.array([(2, 0), (4, 0), (4, 4), (2, 4.0)])
    assert not (enclosed([left], (6, 6)) & enclosed([right], (6, 6))).any()


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("picture,label\nDOE.png,mass\n", "LABEL_UNREADABLE", "lacks the columns image. Add them"),
        ("image,label,image\nDOE.png,mass,b.png\n", "LABEL_UNREADABLE", "a column twice"),
        ("image;label\nDOE.png;mass\n", "LABEL_UNREADABLE", "commas"),
        ("image,label\nDOE.png,mass,more\n", "LABEL_UNREADABLE", "row 2 has 3 fields"),
        ("image,label\n", "LABEL_EMPTY", "no rows"),
        ('image,label\na.png,mass\nDOE.png,"mass\nb.png,none\n', "LABEL_UNREADABLE", "row 3 is not CSV"),
        ('image,label,n\na.png,mass,"l\nDOE.png,mass,r"\n', "LABEL_UNREADABLE", "row 2 is not CSV"),
    ],
)
def test_tables_are_refused_by_row_and_without_names(tmp_path: Path, text: str, code: str, words: str) -> None:
    message = refusal(code, read_table, table(tmp_path / "DOE.csv", text), "class table", ["image", "label"])
    assert words in message
    assert "DOE" not in message


def test_many_bad_rows_make_one_short_complaint(tmp_path: Path) -> None:
    rows = "".join(f"1.2.{n},0,0,0,-1\n" for n in range(40))
    path = table(tmp_path / "a.csv", f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{rows}")
    message = refusal("LABEL_VALUES", read_annotations, path)
    assert "40 of 40 rows" in message
    assert "and 35 more" in message


BOXES = "image,x_min,y_min,x_max,y_max,label\n"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("DOE,9,2,3,4,mass", "row 2: `x_max` is not above"),
        ("DOE,1,9,3,4,mass", "row 2: `y_max` is not above"),
        ("DOE,-1,2,3,4,mass", "`x_min` is below 0"),
        ("DOE,1,2,3,nan,mass", "`y_max` is not finite"),
        ("DOE,1,2,3,4,", "`label` is empty"),
        ("DOE,1,2,,4,mass", "`x_max` is empty"),
        ("DOE,1,2,3,4,mass\nDOE,,,,,", "with boxes and without"),
    ],
)
def test_boxes_that_are_none_are_refused_by_row(tmp_path: Path, rows: str, words: str) -> None:
    lines = read_table(table(tmp_path / "b.csv", f"{BOXES}{rows}\n"), "labels.csv", ["image", *EDGES, "label"])
    message = refusal("LABEL_VALUES", boxes_of, lines)
    assert words in message
    assert "DOE" not in message


def test_boxes_lie_on_the_pixels_that_they_name_and_not_beyond() -> None:
    picture = Volume(np.zeros((1, 40, 30, 1), np.float32), FRONTAL_RAS, voxel_of_pixel=PICTURE_PIXELS)
    found = box_indices([Box(2, ("mass",), 0, 0, 30, 40), Box(3, ("mass",), 4, 7, 5, 9)], picture)
    assert found.tolist() == [[[-0.5, -0.5, -0.5], [39.5, 29.5, 0.5]], [[6.5, 3.5, -0.5], [8.5, 4.5, 0.5]]]
    assert box_indices([], picture).shape == (0, 2, 3)
    message = refusal("LABEL_GEOMETRY_MISMATCH", box_indices, [Box(7, ("mass",), 0, 0, 31, 40)], picture)
    assert "row 7" in message
    assert "30 x 40" in message
    stored_from_the_left = np.array([[-1, 0, 0, 29], [0, -1, 0, 39], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    scan = Volume(np.zeros((1, 30, 40, 3), np.float32), np.eye(4), voxel_of_pixel=stored_from_the_left)
    (box,) = box_indices([Box(2, ("mass",), 4, 7, 5, 9)], scan, slice_number=2)
    assert box.tolist() == [[24.5, 30.5, 1.5], [25.5, 32.5, 2.5]]  # column 4 is I = 25, rows 7 and 8 are J = 32, 31
    refusal("LABEL_GEOMETRY_MISMATCH", box_indices, [], volume((3, 3, 3)))


def test_two_names_of_one_structure_may_say_the_same_and_nothing_else() -> None:
    liver = (Structure(1, "Liver", ("SCT:10200004",)),)
    assert choose(liver, {"liver": 1, "Liver": 1, "SCT:10200004": 1}, empty_ok=False) == [(1, (1,))]
    with pytest.raises(ImageUnreadable, match="'liver' and 'SCT:10200004' both fit structure 1"):
        choose(liver, {"liver": 1, "SCT:10200004": 2}, empty_ok=False)
