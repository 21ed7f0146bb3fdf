"""`[protect.secure_aggregation]` of a study: what it decides, what it refuses and why; and numbers inside a sum."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models.class_counts import BINS, CELLS, ClassCounts
from shared_models.detection_counts import DetectionCounts
from shared_models.errors import StudyInvalid
from shared_models.metrics import DiceCounts, counts
from shared_models.parse import parse
from shared_models.plan import fingerprint_of
from shared_models.plan import total as planned_together
from shared_models.protect.counted import counts_of, names_of, told_in
from shared_models.protect.counted_plan import fingerprint_in, plan_counts, plan_names
from shared_models.protect.privacy import Privacy, Protect
from shared_models.protect.secure import SecureAggregation, layout_of, training_s, wanted, weight_in_sum
from shared_models.restored_counts import RestoredCounts
from shared_models.scores import total as together
from shared_models.study import Rounds, Study, canonical, from_json, load_study
from shared_models.surface_counts import DISTANCE_MM, SurfaceCounts
from shared_models.survival_counts import SurvivalCounts
from shared_models.task_table import Task
from shared_models.weights import schema_of
from simulations.run import jobs

SECURE = load_study("lung-ct-secure")
RESNET = replace(load_study("nodule-malignancy").model, spatial_dims=2)


def study(**change: Any) -> Study:
    tables: dict[str, Any] = {
        name: replace(getattr(SECURE, name), **of) if isinstance(of, dict) else of for name, of in change.items()
    }
    return replace(SECURE, **tables)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": {"robust": "median"}}, "robust must be .none.: a robust rule looks at each update by itself"),
        ({"strategy": {"weighting": "inverse_variance"}}, "compares a number of each site"),
        ({"strategy": {"normalise_steps": True}, "train": {"optimizer": "sgd"}}, "divides each update by the steps"),
        ({"rounds": {"late": "next"}}, "a late vector fits no other sum"),
        ({"train": {"scaffold": True, "optimizer": "sgd", "momentum": 0.0}}, "a control variate is a gradient"),
        ({"model": {"norm": "batch"}, "personal": {"keep": ("norm",)}}, "batch norm counts its batches"),
        ({"rounds": {"quorum": 2}}, "rounds.quorum must be 3 or more, it is 2"),
        ({"rounds": {"deadline_s": 600.0}}, "rounds.deadline_s must be above 600"),
    ],
)
def test_what_a_secure_sum_hides_no_other_key_may_need(change, words):
    with pytest.raises(ValueError, match=f"^with protect.secure_aggregation .*{words}"):
        study(**change)


def test_personal_models_proximal_pulls_partial_cohorts_and_patient_privacy_go_with_it():
    study(personal={"ditto_lambda": 0.1}, train={"proximal_mu": 0.1}, rounds={"cohort": 0.5})
    private = replace(SECURE.protect, privacy=Privacy(1.0, 0.5))
    off = {"local_steps": 5, "deterministic": False}
    study(protect=private, train=off, evaluate={"every": 0})


@pytest.mark.parametrize("value", [True, {}, {"clip": 1.0}])
def test_true_is_the_table_with_its_defaults(value):
    made = parse(Study, {"name": "s", "rounds": {"quorum": 3}, "protect": {"secure_aggregation": value}}, "here")
    assert made.protect.secure_aggregation == SecureAggregation()
    assert from_json(canonical(made), "there") == made
    off = parse(Study, {"name": "s", "protect": {"secure_aggregation": False}}, "here")
    assert off.protect.secure_aggregation is None


@pytest.mark.parametrize(
    ("table", "words"),
    [({"threshold": 0.66}, "threshold"), ({"ring_bits": 16}, "ring_bits"), ({"clp": 1}, "Did you mean `clip`")],
)
def test_a_wrong_key_or_value_is_named(table, words):
    with pytest.raises(StudyInvalid, match=words):
        parse(Study, {"name": "s", "rounds": {"quorum": 3}, "protect": {"secure_aggregation": table}}, "here")


@pytest.mark.parametrize(
    ("sites", "share", "threshold"),
    [(3, 0.67, 3), (5, 0.67, 4), (10, 0.67, 7), (50, 0.67, 34), (5, 0.8, 4), (5, 0.9, 5), (10, 1.0, 10)],
)
def test_the_threshold_is_the_studys_share_and_above_two_thirds(sites, share, threshold):
    made = study(protect=Protect(secure_aggregation=SecureAggregation(threshold=share)))
    layout = layout_of(made, {}, False, False)
    context = wanted(made, run="r", round_number=1, attempt=1, cohort=tuple(f"s{i:02}" for i in range(sites)),
                     roster_sha256="a" * 64, model_sha256="b" * 64, layout=layout, study_sha256="c" * 64,
                     trained=True)  # fmt: skip
    assert (context.threshold, context.least_cohort, context.whole) == (threshold, 3, sites)


def test_the_steps_are_part_of_the_deadline():
    assert training_s(SECURE) == 3600 - 5 * 60
    assert training_s(Study(name="plain", rounds=Rounds(deadline_s=50))) == 50


def test_weights_are_examples_up_to_the_studys_most_or_one():
    by_examples = study(strategy={"weighting": "examples"})
    assert weight_in_sum(by_examples, 77, True) == 77
    assert weight_in_sum(by_examples, 10**6, True) == 2**14
    assert weight_in_sum(by_examples, 77, False) == 1  # scores alone
    assert weight_in_sum(SECURE, 77, True) == 1


# Numbers in a sum


def summed(of: Study, parts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in names_of(of, True, True)}


@given(st.lists(st.lists(st.floats(0, 1), max_size=20), min_size=1, max_size=6), st.integers(1, 12))
def test_dice_of_the_sites_adds_up_to_what_their_counts_merge_to(sites, smallest):
    each = [counts(scores, smallest) for scores in sites]
    parts = [counts_of(SECURE, True, True, (0.5,), {"lung": one}, {}) for one in each]
    told = told_in(SECURE, True, True, summed(SECURE, parts))
    whole = together(each)
    assert told.scores == ({"lung": whole} if whole != DiceCounts() else {})
    assert told.loss == 0.5


def test_surfaces_with_a_bias_of_either_sign_add_up():
    made = study(task={"tolerance_mm": 2.0})
    bins = len(DISTANCE_MM) + 1
    one = SurfaceCounts(2.0, 3, 2_000_000, 9000, (1, 2, *[0] * (bins - 2)), 700_000, -600_000, 3, 4, 3, 1)
    two = replace(one, volume_bias_micro=100_000, distance=())
    each = [replace(counts([0.5, 0.25, 1.0], 1), surface=s) for s in (one, two)]
    parts = [counts_of(made, True, True, (), {"lung": score}, {}) for score in each]
    told = told_in(made, True, True, summed(made, parts))
    assert told.scores["lung"] == together(each)
    assert told.loss is None


def test_classes_and_survival_add_up_and_what_all_withhold_stays_withheld():
    classes = replace(SECURE, task=Task(kind="classification", labels=("sick",), loss="bce"), model=RESNET)
    told_bins = [0] * BINS
    told_bins[500] = 2
    cells = (2, *[0] * (CELLS - 1))
    open_ = ClassCounts(positives=2, negatives=0, square_micro=5, positive=tuple(told_bins), negative=(0,) * BINS,
                        cell_cases=cells, cell_positives=cells, cell_micro=(9, *[0] * (CELLS - 1)))  # fmt: skip
    shut = ClassCounts(positives=1, negatives=3, true_positives=1, wins=4, pairs=3)
    assert len(names_of(classes, True, True)) > 2 * BINS
    for each in ([open_, shut], [shut, shut]):
        parts = [counts_of(classes, True, True, (), {"sick": score}, {}) for score in each]
        made = told_in(classes, True, True, summed(classes, parts))
        assert made.scores["sick"] == together(each)
    days = (100.0, 200.0)
    task = Task(kind="prognosis", labels=("death",), loss="hazard", intervals_days=days)
    lives = replace(SECURE, task=task, model=RESNET)
    one = SurvivalCounts(cases=4, events=2, wins=5, pairs=4, square_micro=(10, 20), predicted_micro=(3, 4),
                         at_risk=(4, 2), came=(1, 1))  # fmt: skip
    two = SurvivalCounts(cases=2, events=1, wins=1, pairs=1, square_micro=(1, 2))
    doomed = SurvivalCounts(cases=3, square_micro=(3, 3), predicted_micro=(0, 0), at_risk=(0, 0), came=(0, 0))
    for pair in ([one, two], [two, two], [doomed, two]):
        parts = [counts_of(lives, True, True, (), {lives.task.answers[0]: score}, {}) for score in pair]
        made = told_in(lives, True, True, summed(lives, parts))
        assert made.scores[lives.task.answers[0]] == together(pair)


def test_validation_counts_of_a_classification_are_in_the_last_sum_and_in_no_other():
    classes = replace(SECURE, task=Task(kind="classification", labels=("sick",), loss="bce"), model=RESNET)
    test, val = ClassCounts(positives=1, negatives=2, wins=2, pairs=2), ClassCounts(positives=4, negatives=3)
    last = names_of(classes, False, True)
    assert len(last) == 2 * (len(names_of(classes, True, True)) - 2)  # but for the losses
    assert names_of(SECURE, False, True) == names_of(SECURE, True, True)[2:]  # a segmentation has none
    parts = [counts_of(classes, False, True, (), {"sick": test}, {}, {"sick": val}) for _ in range(2)]
    told = told_in(classes, False, True, {name: sum(part[name] for part in parts) for name in last})
    assert (told.scores["sick"], told.validation["sick"]) == (together([test, test]), together([val, val]))


def test_histograms_of_a_plan_add_up_and_what_no_cases_can_have_is_found_out():
    draw = np.random.default_rng(5)
    each = [
        fingerprint_of(draw.normal(40, 20, (6, 7, 5)).astype(np.float32), np.ones((6, 7, 5), np.uint8), mm, ct=ct)
        for mm, ct in (((1.0, 1.0, 2.5), True), ((0.7, 0.7, 5.0), True))
    ]
    dark = fingerprint_of(np.full((4, 4, 4), -9.0, np.float32), np.ones((4, 4, 4), np.uint8), (1.0, 1.0, 1.0), ct=False)
    assert dark.sum_milli < 0
    for parts in (each, [dark, dark]):
        told = [plan_counts(part) for part in parts]
        sums = {name: sum(part[name] for part in told) for name in plan_names()}
        assert fingerprint_in(sums) == planned_together(parts)
    with pytest.raises(ValueError, match="does not count each of 3 cases"):
        fingerprint_in({**sums, "plan/cases": 3})


def test_lesions_add_up_and_a_network_that_marks_nothing_has_told_so():
    made = replace(SECURE, task=Task(kind="detection", labels=("nodule",), loss="centre"))
    bins = [0] * BINS
    bins[700] = 2
    told = DetectionCounts(scans=12, lesions=5, found=2, marks=2, ignored=1, off_um=900, hits=tuple(bins),
                           false=tuple(bins), told_scans=12, told_lesions=5)  # fmt: skip
    shut = DetectionCounts(scans=3, lesions=2, found=1, marks=4, off_um=50)
    blank = DetectionCounts(scans=11, lesions=4, hits=(0,) * BINS, false=(0,) * BINS, told_scans=11, told_lesions=4)
    for each in ([told, shut], [shut, shut], [blank, shut]):
        parts = [counts_of(made, True, True, (), {"nodule": score}, {}) for score in each]
        assert told_in(made, True, True, summed(made, parts)).scores["nodule"] == together(each)


def test_restored_images_add_up():
    made = replace(SECURE, task=Task(kind="reconstruction", labels=("image",), loss="masked_l1"))
    each = [RestoredCounts(cases=3, error_micro=120_000, blank_micro=500_000), RestoredCounts(cases=1, error_micro=9)]
    parts = [counts_of(made, True, True, (), {made.task.answers[0]: score}, {}) for score in each]
    assert told_in(made, True, True, summed(made, parts)).scores[made.task.answers[0]] == together(each)


def test_own_models_have_counts_of_their_own_and_a_private_study_has_none():
    own = study(personal={"ditto_lambda": 0.1})
    plain, both = names_of(SECURE, True, True), names_of(own, True, True)
    assert len(both) - 2 == 2 * (len(plain) - 2)
    parts = [counts_of(own, True, True, (1.0,), {"lung": counts([0.5])}, {"lung": counts([0.75])})]
    told = told_in(own, True, True, summed(own, parts))
    assert (told.scores["lung"].value, told.own_scores["lung"].value) == (0.5, 0.75)
    private = study(
        protect=replace(SECURE.protect, privacy=Privacy(1.0, 0.5)),
        train={"local_steps": 5, "deterministic": False},
        evaluate={"every": 0},
    )
    assert names_of(private, True, False) == ()


@pytest.mark.parametrize(("losses", "told"), [((1.0, 2.0), 1.5), ((1.0, None), None), ((), None), ((-4.0,), 0.0)])
def test_a_loss_that_was_not_finite_is_no_sites_loss(losses, told):
    parts = [counts_of(SECURE, True, False, losses, {}, {})]
    assert told_in(SECURE, True, False, parts[0]).loss == told


def test_the_length_of_a_vector_is_the_same_whatever_a_site_has():
    schema = schema_of({"w": np.zeros(4, np.float32)})
    layout = layout_of(SECURE, schema, True, True)
    empty = counts_of(SECURE, True, True, (), {}, {})
    full = counts_of(SECURE, True, True, (0.5,), {"lung": counts([0.5] * 20)}, {})
    assert empty.keys() == full.keys() == set(layout.counts)
    assert set(empty.values()) == {0}


def test_sums_that_no_counts_can_give_are_found_out():
    parts = counts_of(SECURE, True, True, (), {"lung": counts([0.5])}, {})
    parts["score/lung/sum_micro"] = 10**9
    with pytest.raises(ValueError):
        told_in(SECURE, True, True, parts)


def test_a_number_beyond_all_counts_is_no_score_of_sites():
    made = replace(SECURE, task=Task(kind="detection", labels=("nodule",), loss="centre"))
    lied = dict.fromkeys(names_of(made, True, True), 0)
    lied |= {f"score/nodule/{name}": 2**60 for name in ("scans", "lesions", "found")}
    with pytest.raises(ValueError, match="larger than any"):
        told_in(made, True, True, lied)


# Simulations


def test_a_site_alone_and_all_pooled_have_nobody_to_hide_among_and_two_sites_make_no_sum():
    nodes = {site: {"site": site, "data": "/", "manifest-site": site, "work": "/"} for site in ("a", "b", "c")}
    listed = {job.name: job.study for job in jobs(SECURE, nodes, compare=True)}
    assert listed.pop("federated").protect.secure_aggregation == SECURE.protect.secure_aggregation
    assert [study.protect.secure_aggregation for study in listed.values()] == [None] * 4
    with pytest.raises(StudyInvalid, match="a secure sum needs 3 sites, there are 2"):
        jobs(SECURE, {site: nodes[site] for site in ("a", "b")}, compare=False)
