"""Surfaces in millimetres: by hand, against an independent computation, and one policy for sides that are empty."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import ndimage

from shared_models.errors import StudyInvalid
from shared_models.metrics import IGNORE, DiceCounts, as_row
from shared_models.parse import parse_json
from shared_models.study import Task
from shared_models.surface_counts import MICRO, SurfaceCounts, merge, surface_row
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.functions import CaseAnswer
from shared_models.tasks.surfaces import case_surface, surface_counts


def box(shape: tuple[int, ...], *edges: tuple[int, int]) -> np.ndarray:
    found = np.zeros(shape, bool)
    found[tuple(slice(a, b) for a, b in edges)] = True
    return found


def edge_distances(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """From each border voxel of `a` to the nearest of `b`, in mm."""
    border = [side & ~ndimage.binary_erosion(side) for side in (a, b)]
    away = ndimage.distance_transform_edt(~border[1], sampling=spacing)
    return np.asarray(away[border[0]])


def test_two_planes_apart_by_a_known_distance():
    truth, moved = box((12, 12, 12), (2, 8), (2, 8), (2, 8)), box((12, 12, 12), (2, 8), (2, 8), (2, 10))
    found = case_surface(moved, truth, (1.0, 1.0, 2.0), tolerance_mm=1.0)
    assert found is not None
    assert found.distance_mm == 4.0  # two voxels of 2 mm, on more than 5 % of the surface
    assert found.volume_error == pytest.approx(1 / 3)
    assert (found.lesions, found.found, found.false) == (1, 1, 0)
    same = case_surface(truth, truth, (1.0, 1.0, 2.0), 1.0)
    assert same is not None
    assert (same.agreement, same.distance_mm, same.volume_error) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dims", [2, 3])
def test_hd95_is_that_of_borders_measured_apart(seed, dims):
    rng = np.random.default_rng(seed)
    spacing = (0.7, 0.9, 2.5)[:dims]
    a, b = (ndimage.gaussian_filter(rng.standard_normal((20,) * dims), 2) > 0.08 for _ in range(2))
    a[(0,) * dims] = b[(0,) * dims] = False
    found = case_surface(a, b, spacing, 1.0)
    expected = max(np.percentile(edge_distances(*pair, spacing), 95) for pair in ((a, b), (b, a)))
    assert found is not None
    assert found.distance_mm == pytest.approx(expected, abs=1e-4)
    assert 0 < found.agreement < 1


@pytest.mark.parametrize(("tolerance_mm", "near"), [(1.0, 2), (2.9, 4)])
def test_surface_agreement_is_a_share_of_length(tolerance_mm, near):
    """A square of 8 voxels against one that reaches 3 farther; surfaces run through the corners of voxels, a piece of
    length 1 for each pair along an edge and one of half a diagonal at each corner (Nikolov et al. 2018)."""
    truth, longer = box((24, 24), (4, 12), (4, 12)), box((24, 24), (4, 12), (4, 15))
    found = case_surface(longer, truth, (1.0, 1.0), tolerance_mm)
    corner = math.sqrt(2) / 2
    length = (4 * 7 + 4 * corner) + (2 * 7 + 2 * 10 + 4 * corner)
    far = 7 - near  # of the square's upper edge, whose ends lie near the sides of the other
    far += 7 + 2 * corner  # the other's upper edge
    far += 2 if tolerance_mm < 2 else 0  # of its sides, the pieces 2 mm beyond the square
    assert found is not None
    assert found.agreement == pytest.approx(1 - far / length, abs=1e-6)


def test_sides_that_are_empty_have_one_policy():
    truth, nothing = box((6, 8, 10), (1, 4), (1, 4), (1, 4)), np.zeros((6, 8, 10), bool)
    assert case_surface(nothing, nothing, (1.0, 1.0, 1.0), 1.0) is None
    diagonal = math.sqrt(6**2 + 8**2 + 20**2)
    missed, false = (case_surface(a, b, (1.0, 1.0, 2.0), 1.0) for a, b in ((nothing, truth), (truth, nothing)))
    assert missed is not None
    assert false is not None
    assert missed.distance_mm == false.distance_mm == pytest.approx(diagonal)
    assert (missed.agreement, missed.volume_error) == (0.0, -1.0)
    assert (false.agreement, false.volume_error, false.lesions, false.false) == (0.0, None, 0, 1)


def test_lesions_are_counted_one_by_one():
    truth = box((30, 10), (1, 4), (1, 4)) | box((30, 10), (10, 13), (1, 4)) | box((30, 10), (20, 22), (1, 4))
    predicted = box((30, 10), (2, 12), (2, 3)) | box((30, 10), (25, 28), (6, 9))  # one finds two, one finds none
    found = case_surface(predicted, truth, (1.0, 1.0), 1.0)
    assert found is not None
    assert (found.lesions, found.found, found.false) == (3, 2, 1)
    row = surface_row(surface_counts([found, None], 1.0))
    assert row["lesion_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1), abs=1e-6)


def measured(*cases: CaseAnswer, smallest_count: int = 1) -> DiceCounts:
    task = Task(labels=("lesion",), tolerance_mm=1.0)
    found = functions_of(task).scores(cases, 0.5, smallest_count)["lesion"]
    assert isinstance(found, DiceCounts)
    return found


def answer(seed: int) -> CaseAnswer:
    rng = np.random.default_rng(seed)
    masks = (ndimage.gaussian_filter(rng.standard_normal((16, 16)), 2) > 0.1).astype(np.uint8)
    masks[0, :3] = IGNORE
    return CaseAnswer(rng.random((1, 1, 16, 16)).astype(np.float32), masks[None], (1.0, 1.5))


def test_the_sums_of_sites_merged_are_those_of_their_cases_together():
    one, two = measured(answer(1), answer(2)), measured(answer(3))
    both = measured(answer(1), answer(2), answer(3))
    assert merge(one.surface, two.surface) == both.surface
    row = as_row(both)
    assert row["nsd"] is not None
    assert row["tolerance_mm"] == 1.0
    assert sum(row["hd95_histogram"]) == 3
    withheld = measured(answer(1), smallest_count=11).surface
    assert withheld is not None
    assert withheld.distance == ()


def test_unlike_tolerances_do_not_add_up():
    with pytest.raises(ValueError, match="do not add up"):
        merge(SurfaceCounts(1.0), SurfaceCounts(2.0))


@pytest.mark.parametrize(
    "change",
    [
        {"agreement_micro": 3 * MICRO}, {"with_truth": 3}, {"distance": [1]}, {"distance": [1] * 15},
        {"volume_bias_micro": 10}, {"found": 4}, {"volume_error_micro": 10**9}, {"tolerance_mm": 0}, {"cases": -1},
    ],
)  # fmt: skip
def test_sums_that_no_cases_can_give_are_refused(change):
    sound = asdict(SurfaceCounts(1.0, cases=2, with_truth=2, lesions=3, found=2))
    assert parse_json(SurfaceCounts, json.dumps(sound), "here").found == 2
    with pytest.raises(StudyInvalid):
        parse_json(SurfaceCounts, json.dumps({**sound, **change}), "here")
