"""FROC and CPM: LUNA16's rules on an example worked by hand, and counts of sites that are those of their scans."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclient.worth import FrocScores, difference, measure
from shared_models.class_counts import BINS
from shared_models.detection_counts import (
    RATES,
    DetectionCounts,
    ScanMarks,
    as_row,
    binned,
    cpm,
    detection_counts,
    froc,
    judged,
    merge,
)
from shared_models.errors import StudyInvalid
from shared_models.parse import parse_json, plain

seeds = st.integers(0, 2**31)
NOTHING = np.zeros((0, 6))


def marks(*rows: tuple[float, float, float, float]) -> np.ndarray:
    """(score, x, y, z), each a ball 4 mm wide."""
    return np.array([[*row, 2.0, 2.0, 2.0] for row in rows]).reshape(-1, 7)


def balls(*rows: tuple[float, float, float, float]) -> np.ndarray:
    """(x, y, z, diameter)."""
    return np.array([[x, y, z, d / 2, d / 2, d / 2] for x, y, z, d in rows]).reshape(-1, 6)


def worked() -> list[ScanMarks]:
    """Four scans, three nodules."""
    first = judged(
        marks(
            (0.9, 4.9, 0, 0),  # within 5 mm of the first nodule: finds it
            (0.8, 0, 3, 0),  # once more: counts nothing
            (0.7, 53, 0, 0),  # 3 mm from the second, whose radius is 3: not nearer, false
            (0.6, 100, 4, 0),  # in something irrelevant: counts nothing
            (0.5, 200, 0, 0),  # false
        ),
        balls((0, 0, 0, 10), (50, 0, 0, 6)),  # the second is missed
        balls((100, 0, 0, 10)),
    )
    without = judged(marks((0.85, 1, 1, 1)), NOTHING, NOTHING)  # false
    third = judged(marks((0.4, 0, 0, 9)), balls((0, 0, 0, 20)), NOTHING)  # finds the third nodule
    return [first, without, third, judged(marks(), NOTHING, NOTHING)]


def drawn(seed: int, scans: int) -> list[ScanMarks]:
    """Scans as a detector gives them: most lesions found, more false marks the lower the score."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(scans):
        lesions = int(rng.poisson(1.5))
        best = 1 / (1 + np.exp(-rng.normal(0.5, 1.5, lesions)))
        best[rng.random(lesions) < 0.2] = np.nan
        false = 1 / (1 + np.exp(-rng.normal(-1.5, 1.5, int(rng.poisson(4)))))
        found.append(ScanMarks(best, false, int(rng.poisson(0.5)), np.abs(rng.normal(0, 2, int((best > 0).sum())))))
    return found


def slow_cpm(scans: list[ScanMarks]) -> float:
    """Threshold by threshold, without bins."""
    best = np.concatenate([scan.best for scan in scans])
    false = np.concatenate([scan.false for scan in scans])
    thresholds = np.unique(np.concatenate([best[best > 0], false]))[::-1]
    rates = [0.0, *((false >= t).sum() / len(scans) for t in thresholds)]
    sensitivity = [0.0, *((best >= t).sum() / len(best) for t in thresholds)]
    return float(np.mean(np.interp(RATES, rates, sensitivity)))


def test_the_example_worked_by_hand_has_its_counts():
    counts = detection_counts(worked())
    assert (counts.scans, counts.lesions, counts.found, counts.marks, counts.ignored) == (4, 3, 2, 3, 1)


def test_the_example_worked_by_hand_has_its_curve():
    # from the highest score down: found, false, false, false, found; three nodules, four scans
    counts = detection_counts(worked())
    rates, sensitivity = froc(np.array(counts.hits), np.array(counts.false), 3, 4)
    steps = sorted({(rate, round(3 * s)) for rate, s in zip(rates, sensitivity, strict=True)})
    assert steps == [(0, 0), (0, 1), (0.25, 1), (0.5, 1), (0.75, 1), (0.75, 2)]


def test_the_example_worked_by_hand_has_its_cpm():
    # 1/3 at 1/8, 1/4 and 1/2; the curve ends at 0.75 false a scan, and stays at 2/3 for 1, 2, 4 and 8
    assert detection_counts(worked()).value == pytest.approx((3 / 3 + 4 * 2 / 3) / 7)


def test_between_two_thresholds_sensitivity_is_linear():
    rates, sensitivity = np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.2, 1.0])
    at = [0.2 + 0.8 * rate for rate in (1 / 8, 1 / 4, 1 / 2)]
    assert cpm(rates, sensitivity) == pytest.approx((sum(at) + 4) / 7)


def test_of_two_marks_in_a_lesion_the_higher_counts():
    scan = judged(marks((0.3, 0, 0, 1), (0.6, 0, 0, 2)), balls((0, 0, 0, 10)), NOTHING)
    assert scan.best.tolist() == [0.6]
    assert not len(scan.false)


def test_a_mark_in_two_lesions_finds_both():
    scan = judged(marks((0.6, 5, 0, 0)), balls((0, 0, 0, 12), (10, 0, 0, 12)), NOTHING)
    assert scan.best.tolist() == [0.6, 0.6]


def test_a_mark_in_a_lesion_and_in_something_irrelevant_finds_the_lesion():
    scan = judged(marks((0.6, 1, 0, 0)), balls((0, 0, 0, 6)), balls((2, 0, 0, 6)))
    assert scan.best.tolist() == [0.6]
    assert scan.ignored == 0


def test_a_box_is_hit_within_its_ellipse():
    box = np.array([[0.0, 0, 0, 10, 4, 4]])
    scan = judged(marks((0.9, 9, 0, 0), (0.8, 0, 5, 0)), box, NOTHING)
    assert scan.best.tolist() == [0.9]
    assert scan.false.tolist() == [0.8]


def test_the_diameter_is_off_by_that_of_the_best_mark():
    scan = judged(marks((0.9, 0, 0, 0), (0.8, 1, 0, 0)), balls((0, 0, 0, 10), (50, 0, 0, 5)), NOTHING)
    assert scan.off_mm.tolist() == [6.0]  # 4 mm for 10 mm; the missed one has none


@settings(max_examples=30)
@given(seeds, st.integers(0, 30), st.integers(0, 30))
def test_counts_of_sites_together_are_those_of_all_their_scans(seed, here, there):
    a, b = drawn(seed, here), drawn(seed + 1, there)
    assert merge(detection_counts(a), detection_counts(b)) == detection_counts(a + b)


@settings(max_examples=30)
@given(seeds, st.integers(1, 40))
def test_cpm_of_bins_is_off_by_no_more_than_the_fullest_bin_holds(seed, scans):
    of = drawn(seed, scans)
    counts = detection_counts(of)
    if counts.lesions:
        assert abs(counts.value - slow_cpm(of)) <= max(counts.hits) / counts.lesions + 1e-12


def test_cpm_of_many_scans_in_bins_is_near_that_of_their_scores():
    of = drawn(5, 300)
    assert detection_counts(of).value == pytest.approx(slow_cpm(of), abs=0.002)


def test_nothing_added_changes_nothing():
    assert merge(DetectionCounts(), detection_counts(worked())) == detection_counts(worked())


def test_a_site_that_withholds_its_histograms_leaves_the_curve_of_the_others():
    told, withheld = detection_counts(worked()), detection_counts(worked(), smallest_count=11)
    both = merge(told, withheld)
    assert (both.scans, both.lesions, both.value) == (8, 6, told.value)


def test_the_marks_of_one_patient_with_lesions_among_many_without_do_not_leave():
    hit, clean = judged(marks((0.5, 0, 0, 0)), balls((0, 0, 0, 4)), NOTHING), judged(marks(), NOTHING, NOTHING)
    assert detection_counts([clean] * 12, 11).told_scans == 12
    assert detection_counts([hit] + [clean] * 12, 11).hits == ()
    assert detection_counts([hit] * 11 + [clean], 11).told_lesions == 11


def test_a_site_with_few_scans_tells_no_distribution_and_its_sums():
    withheld = detection_counts(worked(), smallest_count=5)
    assert (withheld.hits, withheld.told_scans, math.isnan(withheld.value)) == ((), 0, True)
    assert (withheld.found, withheld.marks) == (2, 3)


def test_scans_without_lesions_have_no_cpm():
    assert as_row(detection_counts([judged(marks((0.5, 0, 0, 0)), NOTHING, NOTHING)]))["cpm"] is None


def test_a_row_tells_the_seven_points():
    row = as_row(detection_counts(worked()))
    assert [rate for rate, _ in row["froc"]] == [*RATES]
    assert row["at_1"] == pytest.approx(2 / 3, abs=1e-6)


def test_counts_come_back_as_they_went():
    counts = detection_counts(worked())
    assert parse_json(DetectionCounts, json.dumps(plain(counts)), "here") == counts


@pytest.mark.parametrize(
    "odd",
    [
        {"scans": 1, "lesions": 2, "found": 3},
        {"lesions": 1},
        {"scans": 2, "told_scans": 1},
        {"scans": 1, "lesions": 1, "found": 1, "hits": [2] + [0] * (BINS - 1), "false": [0] * BINS, "told_lesions": 1},
        {"scans": 1, "marks": 1, "hits": [0] * BINS, "false": [2] + [0] * (BINS - 1), "told_scans": 1},
        {"scans": 1, "hits": [0] * BINS, "false": [0] * 3},
    ],
)
def test_counts_that_no_scans_can_give_are_refused(odd):
    with pytest.raises(StudyInvalid):
        parse_json(DetectionCounts, json.dumps(odd), "a site")


def froc_scores(of: list[ScanMarks]) -> FrocScores:
    pairs = [binned(scan) for scan in of]
    hits, false = (np.array([pair[side] for pair in pairs], np.float64) for side in (0, 1))
    return FrocScores(hits, false, np.array([float(len(scan.best)) for scan in of]))


@settings(max_examples=20)
@given(seeds)
def test_a_resample_is_scored_as_its_scans_are(seed):
    of = drawn(seed, 6)
    times = np.random.default_rng(seed).multinomial(6, [1 / 6] * 6)
    resample = [scan for scan, n in zip(of, times, strict=True) for _ in range(n)]
    found = measure(froc_scores(of), times[None].astype(np.float64))[0]
    assert found == pytest.approx(detection_counts(resample).value, nan_ok=True)


def test_a_better_detector_gains_with_its_whole_interval():
    rng, bad = np.random.default_rng(1), drawn(3, 40)
    good = [ScanMarks(np.full(len(scan.best), 0.99), scan.false / 2, 0, np.zeros(0)) for scan in bad]
    found = difference([froc_scores(good)], [froc_scores(bad)], [f"p{n}" for n in range(40)], rng, resamples=200)
    assert found.verdict == "gains"
    assert found.low < found.value < found.high
