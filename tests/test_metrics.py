"""Dice that adds up: counts of sites merged are the counts of their cases together, and odd counts are refused."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models.errors import StudyInvalid
from shared_models.metrics import BINS, MICRO, DiceCounts, as_row, counts, dice, merge
from shared_models.parse import parse_json
from shared_models.scores import total

scores = st.lists(st.none() | st.floats(0, 1), max_size=30)
sites = st.lists(st.tuples(scores, st.sampled_from([1, 11])), min_size=1, max_size=5)
pixels = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(sites)
def test_the_federations_dice_is_that_of_all_cases_pooled_to_the_last_digit(federation):
    pooled = counts([score for cases, _ in federation for score in cases])
    assert total(counts(cases) for cases, _ in federation) == pooled


@given(scores, scores, scores, st.sampled_from([1, 5, 11]))
def test_merge_is_associative_and_commutative_with_a_zero(a, b, c, smallest_count):
    one, two, three = (counts(cases, smallest_count) for cases in (a, b, c))
    assert merge(one, merge(two, three)) == merge(merge(one, two), three)
    assert merge(one, two) == merge(two, one)
    nothing = DiceCounts()
    assert merge(one, nothing) == merge(nothing, one) == one


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_mean_and_deviation_are_those_of_the_scores(known):
    found = counts(known)
    assert found.mean == pytest.approx(np.mean(known), abs=1 / MICRO)
    assert found.deviation == pytest.approx(np.std(known), abs=2e-3)  # of a millionth in the squares
    assert found.cases == len(known) == sum(found.histogram)


def test_numbers_done_by_hand():
    found = counts([1.0, 0.5, None, 0.0])
    assert found == DiceCounts(3, 1, 1_500_000, 1_250_000, (1, *[0] * 9, 1, *[0] * 8, 1))
    assert found.mean == 0.5
    assert found.deviation == pytest.approx(math.sqrt(1 / 6))
    assert as_row(found) == {
        "measure": "dice", "dice": 0.5, "deviation": 0.408248, "cases": 3, "empty": 1,
        "histogram": [1, *[0] * 9, 1, *[0] * 8, 1],
    }  # fmt: skip


@pytest.mark.parametrize(("score", "place"), [(0.0, 0), (0.049, 0), (0.05, 1), (0.95, 19), (0.999, 19), (1.0, 19)])
def test_a_score_is_in_its_bin_and_a_perfect_one_in_the_last(score, place):
    assert np.flatnonzero(counts([score]).histogram).tolist() == [place]


def test_cases_where_neither_side_holds_the_label_are_counted_apart_and_move_no_mean():
    assert counts([None, None]) == DiceCounts(empty=2)
    assert math.isnan(counts([None]).mean)
    assert math.isnan(counts([]).deviation)
    assert as_row(counts([None]))["dice"] is None
    assert counts([0.25, None]).mean == counts([0.25]).mean == 0.25


def test_a_histogram_of_few_cases_is_withheld_and_its_mean_is_not():
    assert counts([0.5] * 10, smallest_count=11).histogram == ()
    assert sum(counts([0.5] * 11, smallest_count=11).histogram) == 11
    assert counts([0.5] * 10, smallest_count=11).mean == 0.5
    # cases without a score hide nobody
    assert counts([0.5] * 10 + [None] * 5, smallest_count=11).histogram == ()


def test_what_one_site_withholds_is_not_in_the_federations_histogram():
    merged = merge(counts([0.5] * 20, 11), counts([1.0] * 3, 11))
    assert merged.cases == 23
    assert merged.histogram == counts([0.5] * 20).histogram


# Dice of one case


def masks(voxels: list[tuple[bool, bool, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    predicted, truth, valid = np.array(voxels, dtype=bool).T
    return predicted, truth, valid


@given(pixels)
def test_dice_lies_between_0_and_1_and_does_not_care_which_side_is_the_truth(voxels):
    predicted, truth, valid = masks(voxels)
    found = dice(predicted, truth, valid)
    assert found == dice(truth, predicted, valid)
    assert found is None or 0 <= found <= 1
    assert (found is None) == (not ((predicted | truth) & valid).any())


@given(pixels, st.randoms())
def test_what_is_ignored_never_shows(voxels, random):
    predicted, truth, valid = masks(voxels)
    noise = np.array([random.random() < 0.5 for _ in voxels])
    assert dice(predicted ^ (noise & ~valid), truth, valid) == dice(predicted, truth, valid)


def test_dice_by_hand():
    everywhere = np.ones(4, bool)
    one, two = np.array([1, 1, 0, 0], bool), np.array([0, 1, 1, 1], bool)
    assert dice(one, two, everywhere) == 2 * 1 / (2 + 3)
    assert dice(one, one, everywhere) == 1.0
    assert dice(one, ~one, everywhere) == 0.0
    assert dice(one, ~everywhere, everywhere) == 0.0
    assert dice(~everywhere, ~everywhere, everywhere) is None
    assert dice(one, two, ~everywhere) is None


# Counts that come from another machine


@given(scores, st.sampled_from([1, 11]))
def test_sound_counts_come_back_from_their_json(cases, smallest_count):
    found = counts(cases, smallest_count)
    assert parse_json(DiceCounts, json.dumps(asdict(found)), "here") == found


@pytest.mark.parametrize(
    "text",
    [
        '{"cases":2,"sum_micro":3000000,"square_micro":0}',  # a mean Dice of 1.5
        '{"cases":0,"sum_micro":1,"square_micro":0}',
        '{"cases":1,"sum_micro":500000,"square_micro":600000}',  # squares of numbers below 1 are smaller
        '{"cases":1,"histogram":[1]}',  # would not add up with those of 20 bins
        '{"cases":1,"histogram":[0,0,0]}',
        f'{{"cases":1,"histogram":{[1] * BINS}}}',
        f'{{"cases":1,"histogram":{[0] * (BINS + 1)}}}',
        '{"cases":-1}',
        '{"cases":1.5}',
        f'{{"cases":{2**60}}}',
        '{"cases":true}',
        '{"cases":1,"case_names":["x"]}',
    ],
)
def test_counts_that_no_cases_can_give_are_refused(text):
    with pytest.raises(StudyInvalid):
        parse_json(DiceCounts, text, "site 'north'")
