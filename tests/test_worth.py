"""Whether a federation was worth it: measures of resamples, and a planted harm that is flagged where none is not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclient.comparing import subgroups, told
from fedclient.data.cases import Case
from fedclient.training.case_scores import scored
from fedclient.worth import (
    AnyScores,
    CaseScores,
    difference,
    interval,
    mean_scores,
    measure,
    part_of,
    ranked_scores,
    worst_tenth,
)
from shared_models.class_counts import class_counts
from shared_models.metrics import DiceCounts
from shared_models.survival_counts import pairs_of
from shared_models.task_table import Task
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.functions import CaseAnswer


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_mean_leaves_out_cases_without_a_score():
    scores = mean_scores([0.5, float("nan"), 1.0])
    np.testing.assert_allclose(measure(scores, np.array([[1, 1, 1], [3, 9, 1.0]])), [0.75, 0.625])


def test_auroc_of_a_resample_is_that_of_the_cases_repeated():
    risks, shown = np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False])
    scores = ranked_scores(risks, shown[:, None] & ~shown[None])
    assert measure(scores, np.ones((1, 4)))[0] == class_counts(risks, shown, shown).value == 0.875
    counts = np.array([1, 3, 2, 0])
    repeated = np.repeat(risks, counts), np.repeat(shown, counts)
    assert measure(scores, counts[None].astype(float))[0] == class_counts(*repeated, repeated[1]).value


def chest(dice: list[float]) -> list[CaseAnswer]:
    """Cases of 100 voxels whose truth is all, and of which so much is found that Dice is as said."""
    found = []
    for d in dice:
        chances = np.zeros((1, 1, 10, 10), np.float32)
        chances.reshape(-1)[: round(100 * d / (2 - d))] = 1.0
        found.append(CaseAnswer(chances, np.ones((1, 10, 10), np.uint8)))
    return found


def test_counts_that_leave_and_scores_that_stay_are_of_the_same_cases():
    task = Task(labels=("lung",))
    counts, cases = scored(task, functions_of(task), iter(chest([1.0, 2 / 3])), 0.5, 1)
    assert counts["lung"] == functions_of(task).scores(chest([1.0, 2 / 3]), 0.5, 1)["lung"]
    assert isinstance(cases, CaseScores)
    np.testing.assert_allclose(cases.top, [1.0, 2 / 3], atol=1e-6)


@pytest.mark.parametrize("smallest", [1, 3, 4])
def test_histograms_of_cases_scored_one_by_one_leave_where_they_would_of_all(smallest):
    task, cases = Task(labels=("lung",)), [1.0, 2 / 3, 0.5]
    counts, _ = scored(task, functions_of(task), iter(chest(cases)), 0.5, smallest)
    assert counts == functions_of(task).scores(chest(cases), 0.5, smallest)
    (lung,) = counts.values()
    assert isinstance(lung, DiceCounts)
    assert sum(lung.histogram) == (3 if smallest <= 3 else 0)


def test_surfaces_of_cases_scored_one_by_one_are_those_of_all():
    task = Task(labels=("lung",), tolerance_mm=1.0)
    cases = [case._replace(spacing_mm=(1.0, 1.0)) for case in chest([1.0, 0.5])]
    for smallest in (1, 3):
        whole = functions_of(task).scores(cases, 0.5, smallest)
        assert scored(task, functions_of(task), iter(cases), 0.5, smallest)[0] == whole


def test_of_what_is_restored_a_resample_is_scored_as_all_cases_are():
    """Off by 1 of 10 and by 1 of 1: 2 of 11 are left of the error, and not the mean of a tenth and all."""
    task = Task(kind="reconstruction", labels=("image",), loss="masked_l1")
    where = np.array([[[[0.0, 1.0]]]])
    answers = [CaseAnswer(np.full((1, 1, 1, 2), far - 1.0), np.concatenate([np.array([[[[0.0, far]]]]), where], axis=1))
               for far in (10.0, 1.0)]  # fmt: skip
    counts, cases = scored(task, functions_of(task), iter(answers), 0.5, 1)
    assert measure(cases, np.ones((1, 2)))[0] == pytest.approx(counts["image"].value) == pytest.approx(9 / 11)
    assert worth_of_each(cases) == pytest.approx([0.9, 0.0])
    assert worst_tenth([cases]) == pytest.approx(0.09)


def worth_of_each(cases: AnyScores) -> list[float]:
    return [float(measure(cases, row[None])[0]) for row in np.eye(2)]


def test_the_c_index_of_all_cases_is_that_of_the_counts():
    task = Task(kind="prognosis", labels=("death",), loss="hazard", intervals_days=(100.0, 200.0))
    hazards, times, events = [(0.6, 0.5), (0.1, 0.1), (0.3, 0.2), (0.3, 0.2)], [50, 250, 120, 60], [1, 0, 1, 0]
    answers = [
        CaseAnswer(np.array([h], np.float32), np.array([[t, e]], np.float32))
        for h, t, e in zip(hazards, times, events, strict=True)
    ]
    counts, cases = scored(task, functions_of(task), answers, 0.5, 1)
    risks = -np.cumprod(1 - np.array(hazards), axis=1).sum(axis=1)
    wins, pairs = pairs_of(risks, np.array(times, float), np.array(events, bool))
    assert measure(cases, np.ones((1, 4)))[0] == counts["death"].value == wins / 2 / pairs


def test_a_planted_harmed_site_is_flagged_and_an_unharmed_one_is_not():
    rng = draw(5)
    own = rng.uniform(0.8, 0.95, 30)
    patients = [f"p{n}" for n in range(30)]
    harmed = difference([mean_scores(own - 0.05 + rng.normal(0, 0.03, 30))], [mean_scores(own)], patients, draw())
    alike = difference([mean_scores(own + rng.normal(0, 0.03, 30))], [mean_scores(own)], patients, draw())
    better = difference([mean_scores(own + 0.04)], [mean_scores(own)], patients, draw())
    assert (harmed.verdict, alike.verdict, better.verdict) == ("harmed", "no clear difference", "gains")
    assert told(harmed)["verdict"] == "harmed"


def test_a_site_that_nothing_was_done_to_is_seldom_flagged():
    flagged = 0
    for seed in range(100):
        rng = draw(seed)
        own = rng.uniform(0.8, 0.95, 25)
        found = difference([mean_scores(own + rng.normal(0, 0.02, 25))], [mean_scores(own)], [*map(str, range(25))],
                           rng, resamples=400)  # fmt: skip
        flagged += found.verdict == "harmed"
    assert flagged <= 8, "2.5 of 100 are expected"


def test_the_interval_of_a_mean_is_the_normal_one_for_many_patients():
    rng = draw(1)
    gains = rng.normal(0.02, 0.1, 400)
    found = difference([mean_scores(gains)], [mean_scores(np.zeros(400))], [*map(str, range(400))], draw())
    error = gains.std() / 20
    assert found.value == pytest.approx(gains.mean())
    assert (found.low, found.high) == pytest.approx(
        (gains.mean() - 1.96 * error, gains.mean() + 1.96 * error), abs=2e-3
    )


def test_images_of_one_patient_are_drawn_together():
    gains = np.repeat(draw(2).normal(0, 0.1, 20), 10)
    apart = difference([mean_scores(gains)], [mean_scores(0 * gains)], [*map(str, range(200))], draw())
    together = difference([mean_scores(gains)], [mean_scores(0 * gains)], [str(n // 10) for n in range(200)], draw())
    assert together.high - together.low > 2 * (apart.high - apart.low)
    assert together.patients == 20


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=12), st.floats(-0.5, 0.5))
def test_two_models_that_differ_alike_everywhere_differ_by_just_that(scores, by):
    a = [mean_scores(np.array(scores) + by)], [mean_scores(scores)]
    found = difference(*a, [*map(str, range(len(scores)))], draw(), resamples=50)
    assert (found.value, found.low, found.high) == pytest.approx((by, by, by), abs=1e-9)


def test_few_patients_have_no_interval_and_no_verdict():
    found = difference([mean_scores([0.1] * 8)], [mean_scores([0.9] * 8)], ["a", "b", "c", "d"] * 2, draw())
    assert (found.patients, found.verdict) == (4, "too few patients")
    assert found.value == pytest.approx(-0.8)
    assert told(found)["low"] is None


def test_seeds_are_averaged_before_patients_are_drawn():
    up, down = [mean_scores([0.6] * 6), mean_scores([0.4] * 6)], [mean_scores([0.5] * 6), mean_scores([0.5] * 6)]
    found = difference(up, down, list("abcdef"), draw())
    assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0))
    assert found.patients == 6


def test_the_worst_tenth_is_of_scores_that_a_case_has_alone():
    assert worst_tenth([mean_scores(np.arange(11) / 10)]) == pytest.approx(0.1)
    assert worst_tenth([ranked_scores(np.array([0.1, 0.2]), np.array([[False, True], [False, False]]))]) is None


def test_a_group_of_patients_keeps_its_pairs():
    shown = np.array([True, False, True, False])
    scores = ranked_scores(np.array([0.9, 0.1, 0.2, 0.8]), shown[:, None] & ~shown[None])
    assert measure(part_of(scores, np.array([2, 3])), np.ones((1, 2)))[0] == 0.0


def test_groups_are_told_from_eleven_patients_on_and_ages_come_in_bands():
    ages = ["39"] * 11 + ["41"] * 10 + ["080Y"] * 12 + ["?"] + ["nan"] * 11 + ["inf"] * 11 + ["-1"] * 11
    cases = [Case(f"k{n}", f"p{n}", (), None, "test", facts={"Age": age, "sex": "F"}) for n, age in enumerate(ages)]
    found = {name: len(places) for name, places in subgroups(cases)}
    assert found == {"sex F": 67, "age under 40": 11, "age 65 or more": 12}


def test_a_score_has_an_interval_over_patients():
    rng = draw(1)
    scores = rng.uniform(0.6, 1.0, 400)
    found, error = interval([mean_scores(scores)], [*map(str, range(400))], draw()), scores.std() / 20
    assert found.value == pytest.approx(scores.mean())
    assert (found.low, found.high) == pytest.approx(
        (scores.mean() - 1.96 * error, scores.mean() + 1.96 * error), abs=2e-3
    )


def test_a_score_of_few_patients_has_none():
    found = interval([mean_scores([0.5, 0.6, 0.7])], ["a", "b", "c"], draw())
    assert found.value == pytest.approx(0.6)
    assert found.patients == 3
    assert np.isnan([found.low, found.high]).all()
