"""AUROC, AUPRC and calibration that add up: the federation's figures are those of its pooled scores."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_models import class_counts as counts_module
from shared_models.class_counts import (
    BINS,
    CELLS,
    NO_CLASS,
    ClassCounts,
    as_row,
    auprc,
    auroc,
    bin_of,
    calibrated_error,
    calibration_error,
    class_counts,
    merge,
    sensitivity_at,
    temperature,
)
from shared_models.errors import StudyInvalid
from shared_models.parse import parse_json

seeds = st.integers(0, 2**31)


def drawn(seed: int, cases: int, gap: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and truth as a network gives them: normal in the logit, `gap` apart."""
    rng = np.random.default_rng(seed)
    truth = rng.random(cases) < 0.4
    truth[:2] = True, False
    return 1 / (1 + np.exp(-width * (rng.standard_normal(cases) + gap * truth - gap / 2))), truth


def slow_auroc(scores, truth) -> float:
    """Pair by pair (Hanley & McNeil 1982)."""
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[truth] for n in scores[~truth]]
    return float(np.mean(pairs))


def slow_average_precision(scores, truth) -> float:
    """A step at each positive, from the highest score down."""
    order = np.argsort(-scores, kind="stable")
    hits = truth[order]
    return float(np.mean((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits]))


def slow_calibration(scores, truth) -> float:
    total = 0.0
    for cell in range(CELLS):
        here = (scores >= cell / CELLS) & ((scores < (cell + 1) / CELLS) | (cell == CELLS - 1))
        if here.any():
            total += here.sum() * abs(scores[here].mean() - truth[here].mean())
    return total / len(scores)


def of(scores, truth, smallest_count: int = 1) -> ClassCounts:
    return class_counts(scores, truth, scores > 0.5, smallest_count)


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(400, 800), st.floats(0, 3), st.floats(0.3, 3), st.integers(1, 5))
def test_the_federations_figures_are_those_of_the_pooled_scores_within_two_thousandths(seed, cases, gap, width, sites):
    scores, truth = drawn(seed, cases, gap, width)
    parts = [of(scores[s::sites], truth[s::sites]) for s in range(sites)]
    whole = NO_CLASS
    for part in parts:
        whole = merge(whole, part)
    assert whole.value == pytest.approx(slow_auroc(scores, truth), abs=0.002)
    assert calibration_error(whole) == pytest.approx(slow_calibration(scores, truth), abs=0.002)
    assert whole.square_micro / 1e6 / cases == pytest.approx(np.mean((scores - truth) ** 2), abs=1e-6 * sites)
    called = scores > 0.5
    assert (whole.true_positives, whole.false_positives) == ((called & truth).sum(), (called & ~truth).sum())
    assert (whole.positives, whole.negatives) == (truth.sum(), (~truth).sum())


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1000, 2000), st.floats(0, 3), st.floats(0.5, 2))
def test_average_precision_is_that_of_the_pooled_scores_within_two_thousandths(seed, cases, gap, width):
    scores, truth = drawn(seed, cases, gap, width)
    whole = merge(of(scores[::2], truth[::2]), of(scores[1::2], truth[1::2]))
    assert auprc(whole.positive, whole.negative) == pytest.approx(slow_average_precision(scores, truth), abs=0.002)


def test_average_precision_of_full_bins_is_that_of_their_cases_ranked_and_counts_of_any_size_have_one(monkeypatch):
    positive, negative = [0, 4000, 3000, 0, 2500], [700, 9000, 1000, 50, 0]
    ranked = auprc(positive, negative)
    monkeypatch.setattr(counts_module, "MOST_RANKED", 100)
    assert auprc(positive, negative) == pytest.approx(ranked, abs=1e-4)
    assert auprc([2**52], [2**52]) == pytest.approx(0.5, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 60))
def test_one_sites_auroc_is_exact(seed, cases):
    scores, truth = drawn(seed, cases, 1.0, 1.0)
    scores = np.round(scores, 1)  # many ties
    assert of(scores, truth, smallest_count=1000).value == pytest.approx(slow_auroc(scores, truth), abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([1, 20]))
def test_merge_is_associative_and_commutative_with_a_zero(seed, smallest_count):
    one, two, three = (of(*drawn(seed + n, 10 + 8 * n, 1.0, 1.0), smallest_count) for n in range(3))
    assert merge(one, merge(two, three)) == merge(merge(one, two), three)
    assert merge(one, two) == merge(two, one)
    assert merge(one, NO_CLASS) == merge(NO_CLASS, one) == one


def test_numbers_done_by_hand():
    scores, truth = np.array([0.9, 0.8, 0.7, 0.2]), np.array([True, False, True, False])
    found = of(scores, truth)
    assert (found.wins, found.pairs) == (6, 4)  # three of four pairs are in order
    row = as_row(found)
    assert (row["auroc"], row["prevalence"], row["cases"], row["positives"]) == (0.75, 0.5, 4, 2)
    assert row["auprc"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert (row["sensitivity"], row["specificity"], row["balanced_accuracy"]) == (1.0, 0.5, 0.75)
    assert row["brier"] == pytest.approx((0.01 + 0.64 + 0.09 + 0.04) / 4)
    assert row["ece"] == pytest.approx((0.1 + 0.8 + 0.3 + 0.2) / 4)
    assert row["sensitivity_at_specificity"] == 0.5  # at 0.9: no false positive is allowed
    assert [c["cases"] for c in row["reliability"] if c] == [1, 1, 1, 1]


def test_sensitivity_is_that_of_the_lowest_threshold_that_is_specific_enough():
    positive, negative = (1, 0, 2, 1), (6, 3, 1, 0)
    assert sensitivity_at(0.9, positive, negative) == 0.75
    assert sensitivity_at(0.95, positive, negative) == 0.25
    assert sensitivity_at(0.5, positive, negative) == 0.75
    assert math.isnan(sensitivity_at(0.9, (0,), (4,)))


def test_bins_reach_from_one_end_to_the_other():
    assert bin_of(np.array([0.0, 1e-9, 0.5, 1 - 1e-9, 1.0])).tolist() == [0, 0, BINS // 2, BINS - 1, BINS - 1]


def test_curves_of_few_cases_are_withheld_and_figures_of_the_site_are_not():
    scores, truth = drawn(1, 10, 1.0, 1.0)
    found = of(scores, truth, smallest_count=11)
    assert (found.positive, found.negative, found.cell_cases) == ((), (), ())
    assert found.value == slow_auroc(scores, truth)
    row = as_row(found)
    assert (row["auprc"], row["ece"], row["sensitivity_at_specificity"]) == (None, None, None)
    assert row["brier"] is not None


@pytest.mark.parametrize(
    ("positives", "told"), [(0, True), (1, False), (10, False), (11, True), (29, True), (30, False)]
)
def test_the_score_of_one_positive_patient_among_many_does_not_leave(positives, told):
    scores, _ = drawn(1, 40, 1.0, 1.0)
    found = of(scores, np.arange(40) < positives, smallest_count=11)
    assert (bool(found.positive), bool(found.negative), bool(found.cell_cases)) == (told, told, told)
    assert (found.positives, of(scores, np.arange(40) < positives).cases) == (positives, 40)


def test_without_one_of_the_classes_there_is_no_figure():
    only = class_counts(np.array([0.4, 0.6]), np.array([True, True]), np.array([False, True]))
    assert math.isnan(only.value)
    assert as_row(only)["auroc"] is None
    assert as_row(NO_CLASS)["brier"] is None
    assert math.isnan(auroc((), ()))


@given(seeds, st.sampled_from([1, 30]))
@settings(max_examples=10, deadline=None)
def test_sound_counts_come_back_from_their_json(seed, smallest_count):
    found = of(*drawn(seed, 25, 1.0, 2.0), smallest_count)
    assert parse_json(ClassCounts, json.dumps(asdict(found)), "here") == found


SOUND = asdict(of(*drawn(3, 30, 1.0, 1.0)))


@pytest.mark.parametrize(
    "change",
    [
        {"true_positives": 31}, {"false_positives": 31}, {"wins": 10**6}, {"pairs": 10**6}, {"square_micro": 10**9},
        {"positive": [1] * 3}, {"positive": []}, {"positive": [1] * BINS}, {"cell_cases": [30] + [0] * 14},
        {"cell_positives": [40] * 15}, {"cell_micro": [10**9] * 15}, {"positives": -1}, {"names": ["x"]},
        {"measure": "dice"}, {"specificity": 1.5},
    ],
)  # fmt: skip
def test_counts_that_no_cases_can_give_are_refused(change):
    with pytest.raises(StudyInvalid):
        parse_json(ClassCounts, json.dumps({**SOUND, **change}), "site 'north'")


def test_counts_at_unlike_specificities_do_not_add_up():
    scores, truth = drawn(1, 10, 1.0, 1.0)
    with pytest.raises(ValueError, match="do not add up"):
        merge(of(scores, truth), class_counts(scores, truth, scores > 0.5, 1, 0.95))


@settings(max_examples=15)
@given(seeds, st.floats(0.3, 3.0))
def test_the_temperature_undoes_a_factor_of_the_logits(seed, factor):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, 4000)
    truth = rng.random(4000) < 1 / (1 + np.exp(-logits))
    found = temperature(class_counts(1 / (1 + np.exp(-factor * logits)), truth, truth))
    assert found == pytest.approx(factor, rel=0.2)


@settings(max_examples=15)
@given(seeds)
def test_the_temperature_has_the_least_cross_entropy(seed):
    scores, truth = drawn(seed, 300, 1.0, 2.0)
    found = temperature(class_counts(scores, truth, truth))
    logits = np.log(scores / (1 - scores))

    def cross_entropy(by: float) -> float:
        return float(np.logaddexp(0, np.where(truth, -logits, logits) / by).sum())

    assert cross_entropy(found) <= min(cross_entropy(found * 0.97), cross_entropy(found * 1.03)) + 0.01


@settings(max_examples=15)
@given(seeds)
def test_the_temperature_of_sites_together_is_that_of_their_cases(seed):
    (a, of_a), (b, of_b) = drawn(seed, 40, 1.0, 2.0), drawn(seed + 1, 60, 0.5, 3.0)
    both = class_counts(np.concatenate([a, b]), np.concatenate([of_a, of_b]), np.concatenate([of_a, of_b]))
    apart = merge(class_counts(a, of_a, of_a), class_counts(b, of_b, of_b))
    assert temperature(apart) == temperature(both)


def test_calibration_error_in_bins_is_near_that_of_the_scores():
    scores, truth = drawn(3, 2000, 1.0, 2.0)
    counts = class_counts(scores, truth, truth)
    assert calibrated_error(counts, 1.0) == pytest.approx(calibration_error(counts), abs=0.005)


def test_without_cases_of_both_kinds_there_is_no_temperature():
    truth = np.ones(5, bool)
    assert math.isnan(temperature(class_counts(np.full(5, 0.7), truth, truth)))
    assert math.isnan(calibrated_error(NO_CLASS, 1.0))
