"""Discrete time against its closed form, pairs counted one by one, and censoring as Graf et al. weigh it."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclient.data.cases import Case
from fedclient.data.dataset import prepare
from fedclient.data.manifest import read_manifest
from fedclient.data.truths import covariates_of, follow_up
from shared_models.errors import ImageUnreadable, ManifestInvalid, StudyInvalid
from shared_models.parse import parse_json
from shared_models.study import Model, Study, Task, load_study
from shared_models.survival_counts import (
    SurvivalCounts,
    as_row,
    followed_weights,
    merge,
    observed,
    pairs_of,
    survival_counts,
)
from shared_models.task_table import Covariate
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.functions import CaseAnswer
from simulations.tables import join_tables

TASK = Task(
    kind="prognosis", labels=("death",), loss="hazard", intervals_days=(100.0, 200.0, 300.0),
    covariates=(Covariate("age", 60.0, 10.0), Covariate("stage")),
)  # fmt: skip
STUDY = Study(name="t", task=TASK, model=Model(name="mlp", features=(), norm="none"))
ENDS = np.array(TASK.intervals_days)
seeds = st.integers(0, 2**31)


def drawn(seed: int, cases: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Survival curves, times with ties, and events."""
    rng = np.random.default_rng(seed)
    survival = np.cumprod(np.round(1 - rng.random((cases, 3)) / 2, 1), axis=1)
    return survival, rng.integers(1, 8, cases) * 50.0, rng.random(cases) < 0.5


@pytest.mark.parametrize(
    ("time", "event", "likelihood"),
    [
        (50.0, 1, lambda h: h[0]),
        (100.0, 1, lambda h: h[0]),
        (150.0, 1, lambda h: (1 - h[0]) * h[1]),
        (300.0, 1, lambda h: (1 - h[0]) * (1 - h[1]) * h[2]),
        (900.0, 1, lambda h: (1 - h[0]) * (1 - h[1]) * (1 - h[2])),  # came later than anybody asked
        (50.0, 0, lambda h: 1.0),
        (100.0, 0, lambda h: 1 - h[0]),
        (250.0, 0, lambda h: (1 - h[0]) * (1 - h[1])),
        (900.0, 0, lambda h: (1 - h[0]) * (1 - h[1]) * (1 - h[2])),
    ],
)
def test_the_loss_is_minus_the_log_of_the_likelihood_of_discrete_time(time, event, likelihood):
    hazards = [0.1, 0.25, 0.6]
    logits = torch.tensor([[math.log(h / (1 - h)) for h in hazards]], dtype=torch.float64)
    loss = functions_of(TASK).loss(logits, torch.tensor([[time, event]], dtype=torch.float32))
    assert float(loss) == pytest.approx(-math.log(likelihood(hazards)), abs=1e-9)


def test_the_loss_of_sites_weighed_by_their_patients_is_that_of_all_together():
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 3, generator=rng, dtype=torch.float64)
    truth = torch.stack([torch.rand(9, generator=rng) * 400 + 1, torch.randint(0, 2, (9,), generator=rng)], dim=1)
    loss = functions_of(TASK).loss
    parts = 4 * loss(logits[:4], truth[:4]) + 5 * loss(logits[4:], truth[4:])
    torch.testing.assert_close(parts / 9, loss(logits, truth))


def slow_pairs(risk, time, event) -> tuple[int, int]:
    """Pair by pair (Harrell et al. 1982)."""
    wins = pairs = 0
    for i in range(len(time)):
        for j in range(len(time)):
            earlier = event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j]))
            if earlier and i != j:
                pairs += 1
                wins += 2 if risk[i] > risk[j] else 1 if risk[i] == risk[j] else 0
    return wins, pairs


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(0, 25))
def test_pairs_are_counted_exactly(seed, cases):
    survival, time, event = drawn(seed, cases)
    risk = -survival.sum(axis=1)
    assert pairs_of(risk, time, event) == slow_pairs(risk, time, event)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_pairs_of_sites_add_up_exactly_and_merging_has_a_zero(seed):
    sites = [drawn(seed + n, 5 + 4 * n) for n in range(3)]
    one, two, three = (survival_counts(*site, ENDS) for site in sites)
    whole = merge(merge(one, two), three)
    counted = [slow_pairs(-site[0].sum(axis=1), site[1], site[2]) for site in sites]
    assert (whole.wins, whole.pairs) == (sum(w for w, _ in counted), sum(p for _, p in counted))
    assert whole == merge(one, merge(two, three)) == merge(merge(three, two), one)
    assert merge(one, SurvivalCounts()) == merge(SurvivalCounts(), one) == one
    assert whole.cases == 5 + 9 + 13


def test_weights_of_censoring_by_hand():
    time, event = np.array([50.0, 80.0, 150.0, 400.0]), np.array([True, False, True, False])
    weights = followed_weights(time, event, ENDS)
    left = 2 / 3  # one of three in follow-up is censored at 80
    assert weights[0].tolist() == [1.0, 1.0, 1.0]  # its event came before anybody was censored
    assert weights[1].tolist() == [0.0, 0.0, 0.0]
    assert weights[2].tolist() == pytest.approx([1 / left] * 3)
    assert weights[3].tolist() == pytest.approx([1 / left] * 3)


def test_without_censoring_the_brier_score_is_a_mean_of_squares():
    survival, time, _ = drawn(4, 20)
    event = np.ones(20, bool)
    expected = np.mean([np.mean((survival[:, j] - (time > end)) ** 2) for j, end in enumerate(ENDS)])
    found = as_row(survival_counts(survival, time, event, ENDS))
    assert found["brier"] == pytest.approx(expected, abs=1e-6)


def test_who_was_followed_to_the_last_day_of_an_interval_weighs_one():
    """A trial that ended on day 100: nobody left it before, so that nobody stands for another."""
    time, event = np.array([50.0, 100.0, 100.0, 100.0]), np.array([True, True, False, False])
    assert followed_weights(time, event, np.array([100.0]))[:, 0].tolist() == [1.0, 1.0, 1.0, 1.0]
    survival = np.array([[0.2], [0.2], [0.9], [0.9]])
    found = as_row(survival_counts(survival, time, event, np.array([100.0])))
    assert found["brier"] == pytest.approx((0.2**2 + 0.2**2 + 0.1**2 + 0.1**2) / 4, abs=1e-6)  # day 100 is the event's


def test_observed_survival_is_the_life_table_of_all_sites():
    event, time = np.array([True, True, False, False]), np.array([50.0, 150.0, 150.0, 900.0])
    found = survival_counts(np.full((4, 3), 0.5), time, event, ENDS)
    assert (found.at_risk, found.came) == ((4, 2, 1), (1, 1, 0))
    assert observed(found) == [0.75, 0.375, 0.375]
    assert as_row(found)["curve"]["predicted"] == [0.5, 0.5, 0.5]


def test_curves_of_few_cases_are_withheld_and_pairs_are_not():
    found = survival_counts(*drawn(1, 10), ENDS, 11)
    assert (found.at_risk, found.came, found.predicted_micro) == ((), (), ())
    assert (found.pairs > 0, found.told_cases) == (True, 0)
    assert math.isnan(SurvivalCounts().value)
    assert as_row(SurvivalCounts())["c_index"] is None


def test_the_interval_of_one_patients_event_or_going_does_not_leave():
    survival, time, _ = drawn(1, 40)
    for events, told in ((0, True), (1, False), (11, True), (29, True), (39, False), (40, True)):
        assert bool(survival_counts(survival, time, np.arange(40) < events, ENDS, 11).came) == told


def test_a_site_that_withholds_its_curves_lowers_nobody_elses():
    survival = np.array([0.9, 0.8, 0.7])
    told, shut = (
        survival_counts(np.tile(survival, (cases, 1)), *drawn(2, cases)[1:], ENDS, smallest_count=10)
        for cases in (40, 9)
    )  # fmt: skip
    whole = merge(told, shut)
    assert (whole.cases, whole.told_cases) == (49, 40)
    assert as_row(whole)["curve"] == as_row(told)["curve"]
    assert as_row(whole)["curve"]["predicted"] == survival.tolist()


def test_curves_of_earlier_versions_are_of_all_their_cases():
    sound = survival_counts(*drawn(1, 10), ENDS)
    earlier = {name: value for name, value in asdict(sound).items() if name != "told_cases"}
    assert parse_json(SurvivalCounts, json.dumps(earlier), "here") == sound


def test_the_answer_of_a_case_is_a_product_of_what_its_hazards_leave():
    answer = CaseAnswer(np.array([[0.1, 0.5, 0.0]], np.float32), np.array([[400.0, 0.0]], np.float32))
    found = functions_of(TASK).scores([answer], 0.5, 1)["death"]
    assert isinstance(found, SurvivalCounts)
    assert found.predicted_micro == pytest.approx((900_000, 450_000, 450_000), abs=1)
    assert functions_of(TASK).scores([], 0.5, 1)["death"].value != 0


@pytest.mark.parametrize(
    "change",
    [
        {"events": 11}, {"pairs": 46}, {"wins": 1000}, {"square_micro": [10**9] * 3}, {"came": [9, 9, 9]},
        {"at_risk": [11, 1, 1]}, {"at_risk": [1]}, {"predicted_micro": [10**8] * 3}, {"cases": -1}, {"measure": "dice"},
        {"told_cases": 11}, {"told_cases": 1}, {"predicted_micro": [], "at_risk": [], "came": []},
    ],
)  # fmt: skip
def test_counts_that_no_cases_can_give_are_refused(change):
    sound = asdict(survival_counts(*drawn(1, 10), ENDS))
    assert parse_json(SurvivalCounts, json.dumps(sound), "here").cases == 10
    with pytest.raises(StudyInvalid):
        parse_json(SurvivalCounts, json.dumps({**sound, **change}), "here")


# From a table


def table_folder(folder: Path) -> Path:
    (folder / "tables").mkdir()
    for site in ("north", "south"):
        rows = [f"{site}{n},{50 + n},{n % 3},{40 * n + 1},{n % 2},{'test' if n > 8 else 'train'}" for n in range(12)]
        (folder / "tables" / f"{site}.csv").write_text("\n".join(["pid,age,stage,time,event,split", *rows]) + "\n")
    return join_tables(folder / "tables", folder, "pid").parent


def test_a_table_of_each_site_becomes_cases_without_images(tmp_path):
    cases = read_manifest(table_folder(tmp_path), "north", "salt")
    assert len(cases) == 12
    assert {case.channels for case in cases} == {()}
    data = prepare([case for case in cases if case.split == "train"], STUDY, tmp_path / "cache")
    assert len(data) == 9
    seen = {tuple(round(float(v), 2) for v in c.images[0]): tuple(c.masks[0].tolist()) for c in data.by_case()}
    assert seen[(-0.9, 1.0)] == (41.0, 1.0)
    assert data.cases[0].masks.dtype == np.float32


def test_a_row_of_a_table_is_trained_on_as_it_is_predicted_on_however_large_its_numbers(tmp_path):
    """Platelets, as laboratories count them, are above what float16 holds."""
    task = replace(TASK, covariates=(Covariate("age", 57.8, 13.0), Covariate("platelets")))
    facts = {"age": "71", "platelets": "250001", "time": "9", "event": "1"}
    case = Case("0" * 16, "p", (), None, "train", facts=facts)
    (batch,) = prepare([case], replace(STUDY, task=task), tmp_path).batches(1, np.random.default_rng(0), epochs=1)
    assert batch.images.tolist() == [covariates_of(case, task).tolist()]
    assert batch.images[0, 1] == 250001


def test_a_covariate_that_no_network_can_see_is_refused_by_its_column(tmp_path):
    case = Case("0" * 16, "p", (), None, "train", facts={"age": "1e300", "stage": "1", "time": "9", "event": "1"})
    with pytest.raises(ImageUnreadable, match="`age` is too large") as refused:
        covariates_of(case, TASK)
    assert refused.value.code == "LABEL_VALUES"


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"time": "0", "event": "1"}, "LABEL_VALUES"),
        ({"time": "nan", "event": "1"}, "LABEL_VALUES"),
        ({"time": "Miller", "event": "1"}, "LABEL_VALUES"),
        ({"time": "3", "event": "2"}, "LABEL_VALUES"),
        ({"time": "3"}, "LABEL_MISSING"),
    ],
)
def test_a_follow_up_that_cannot_be_is_refused_without_its_words(facts, code):
    with pytest.raises(ImageUnreadable) as refused:
        follow_up(Case("k", "p", (), None, "train", facts=facts), TASK)
    assert refused.value.code == code
    assert "Miller" not in str(refused.value)


def test_tables_of_unlike_columns_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("pid,time\n")
    with pytest.raises(ManifestInvalid, match="no column 'patient_id'"):
        join_tables(tmp_path, tmp_path / "out", "patient_id")
    (tmp_path / "b.csv").write_text("pid,event\n")
    with pytest.raises(ManifestInvalid, match="other columns"):
        join_tables(tmp_path, tmp_path / "out", "pid")
    (tmp_path / "b.csv").write_text('pid,time\n1,"5\n2,6\n')
    with pytest.raises(ManifestInvalid, match=r"b\.csv: row 2 is not CSV"):
        join_tables(tmp_path, tmp_path / "out", "pid")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"intervals_days": (100.0,)}, "two or more days that rise"),
        ({"intervals_days": (200.0, 100.0)}, "two or more days that rise"),
        ({"labels": ("a", "b")}, "the one event"),
        ({"covariates": (Covariate("age"), Covariate("age"))}, "must differ"),
    ],
)
def test_a_prognosis_that_does_not_hold_together_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Task(**{"kind": "prognosis", "loss": "hazard", "intervals_days": (1.0, 2.0), **change})


def test_the_ready_study_sees_39_columns():
    study = load_study("brca-prognosis")
    assert (len(study.task.covariates), study.task.outputs, study.table_only) == (39, 7, True)
