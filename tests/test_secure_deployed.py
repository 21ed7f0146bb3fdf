"""Secure rounds over the real gateway: blobs, audit logs, policies, and the roster that hospitals fetch themselves."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclient import alike as alike_module
from fedclient import own_log
from fedclient.alike import alike
from fedclient.consent import Asked, alike_here, decide, find_asked
from fedclient.egress import sent
from fedclient.explain import explained
from fedclient.own_log import log_of
from fedclient.policy import Policy
from fedclient.site import Site
from fedserver.app import newest_roster
from fedserver.lifecycle import revoke
from shared_models.errors import RoundPaused, StateInvalid
from shared_models.files import read_lines
from shared_models.protect.secure import SecureAggregation
from shared_models.study import Evaluate, Study, load_study, sha256
from shared_models.weights import Spec, load
from tests.edge import Edge, running_edge
from tests.hospitals import Hospitals
from tests.order_path import FLOATS
from tests.test_secure_round import LEARNER, STUDY
from tests.toys import toy_app

INSIDE = Policy(approval="inside-policy", protections=("secure-sum",))
NAMES = ("a", "b", "c", "d")
PLAIN_STUDY = Study(name="toy", rounds=replace(STUDY.rounds, quorum=2))


@pytest.fixture
def edge(quick_folder: Path) -> Iterator[Edge]:
    with running_edge(quick_folder / "federation") as running:
        yield running


@pytest.fixture
def hospitals(edge: Edge, quick_folder: Path) -> Hospitals:
    made = Hospitals(edge, quick_folder / "sites")
    for name in NAMES:
        made.join(name, INSIDE)
    return made


def secure(hospitals: Hospitals, study: Study = STUDY, **change: Any):
    change = {"roster": lambda: newest_roster(hospitals.edge.federation)} | change
    return hospitals.run(study, app=toy_app(LEARNER), weights=FLOATS, **change)


def mean(*sites: str) -> float:
    weight = sum(LEARNER.examples[s] for s in sites)
    return sum(LEARNER.examples[s] * LEARNER.moves[s] for s in sites) / weight


def test_a_run_over_the_gateway_gives_the_mean_and_each_site_wrote_down_what_left(hospitals, edge):
    state, run = secure(hospitals)
    assert state.cohort == NAMES
    np.testing.assert_allclose(load(run.weights(1))["body.bias"], 0.5 + mean(*NAMES), atol=1e-6)
    assert not [p for p in (edge.blobs / "in").rglob("*") if p.is_file()]  # folded, and gone
    left = [line["kind"] for line in sent(hospitals.sites["a"])]
    steps = ["keys of a sum", "shares for other sites", "masked vector", "facts", "signature", "shares of a sum"]
    assert left == ["word", *steps, "word", *steps]  # the round, then the scores at its end
    final = read_lines(run.metrics)[-1]
    assert (final["sites"], final["federation"]["lung"]["cases"]) == ({}, 8)


def test_a_site_that_requires_secure_sums_takes_part_in_no_other_study(hospitals):
    with pytest.raises(RoundPaused, match=r"0 of 2 sites.*a: OUTSIDE_POLICY \(protections\)"):
        hospitals.run(PLAIN_STUDY, app=toy_app(LEARNER), weights=FLOATS)


def test_a_sites_own_least_cohort_holds_whatever_the_study_says(hospitals):
    hospitals.join("careful", replace(INSIDE, least_cohort=5))
    state, run = secure(hospitals, replace(STUDY, evaluate=Evaluate(every=0)))
    assert state.cohort == NAMES
    left = next(iter(read_lines(run.metrics)))["left_out"]
    assert left == {"careful": {"state": "refused", "reason": "OUTSIDE_POLICY (least_cohort)"}}


def test_a_site_sums_with_the_partners_that_its_own_file_names_and_is_left_out_where_they_are_few(hospitals):
    hospitals.join("choosy", replace(INSIDE, partners=("a", "elsewhere")))
    state, run = secure(hospitals, replace(STUDY, evaluate=Evaluate(every=0)))
    assert state.cohort == NAMES
    left = next(iter(read_lines(run.metrics)))["left_out"]
    assert left == {"choosy": {"state": "refused", "reason": "PARTNERS_FEW"}}


def test_a_coordinator_that_shows_an_older_roster_gets_no_keys(hospitals, edge):
    older = newest_roster(edge.federation)
    hospitals.join("newer", INSIDE)
    with pytest.raises(RoundPaused, match="a: ROSTER_MISMATCH"):
        secure(hospitals, roster=lambda: older)
    assert not list(hospitals.folder.rglob("sum-*"))


def test_a_site_that_is_revoked_during_a_sum_is_in_none_and_the_others_sum_on_the_next_roster(hospitals, edge):
    looked = []

    def revoking():
        looked.append(1)
        if len(looked) == 3:  # keys are there, shares are asked for next
            revoke(edge.federation, "d", "left the consortium")
        return newest_roster(edge.federation)

    state, run = secure(hospitals, replace(STUDY, evaluate=Evaluate(every=0)), roster=revoking)
    assert state.cohort == ("a", "b", "c")
    np.testing.assert_allclose(load(run.weights(1))["body.bias"], 0.5 + mean("a", "b", "c"), atol=1e-6)
    line = next(iter(read_lines(run.metrics)))
    assert line["together"]["attempt"] == 2
    assert line["left_out"]["d"]["state"] == "revoked"


def test_a_study_of_secure_sums_is_told_in_plain_words(hospitals):
    secure(hospitals)
    site = hospitals.site("a")
    told = explained(site, find_asked(site, "toy"))
    assert any("learns the sum over 3 or more sites, and nothing of this one by itself" in s for s in told["leaves"])
    assert any("the difference is its number of examples" in s for s in told["leaves"])
    assert any("sums of the sites' updates" in s for s in told["costs"])
    assert not any("ten mean losses" in s or "sees this site's update" in s for s in told["leaves"] + told["costs"])


def test_a_hospital_whose_whole_folder_was_put_back_from_a_backup_sums_no_more_until_a_person_mends_it(hospitals):
    secure(hospitals)
    here = hospitals.sites["d"]
    backup = here.with_name("backup")
    shutil.copytree(here, backup)
    again = replace(STUDY, name="toy-2", model=replace(STUDY.model, features=(8, 8, 8, 8, 8, 8)))
    state, _ = secure(hospitals, again, name="toy-2")
    assert state.cohort == NAMES
    shutil.rmtree(here)
    shutil.copytree(backup, here)  # its ledger, its sums and their witnesses with it
    own_log._opened.cache_clear()  # its processes were begun anew
    third = replace(again, name="toy-3", model=replace(again.model, features=(4, 4, 4, 4, 4, 4), groups=4))
    state, run = secure(hospitals, third, name="toy-3")
    assert state.cohort == ("a", "b", "c")
    left = next(iter(read_lines(run.metrics)))["left_out"]
    assert left == {"d": {"state": "refused", "reason": "OWN_LOG_CUT"}}
    mine = log_of(here, "d")
    for _ in range(200):
        mine.add("idle")  # however long its log grows meanwhile
    assert mine.was_cut(mine.log, 1, "coordinator")


def test_a_study_that_is_nearly_the_same_is_approved_by_no_policy_and_shown_for_what_it_is(hospitals):
    secure(hospitals)
    nearly = replace(STUDY, name="toy-2", train=replace(STUDY.train, learning_rate=STUDY.train.learning_rate * 1.001))
    with pytest.raises(RoundPaused, match="a: awaits approval at the site"):
        secure(hospitals, nearly, name=nearly.name)
    site = hospitals.site("a")
    found = find_asked(site, "toy-2")
    assert found.state == "pending"
    told = [s for s in explained(site, found)["leaves"] if "could be compared with those of toy (" in s]
    assert len(told) == 1
    with pytest.raises(StateInvalid, match=r"nearly that site's update.*--also-alike"):
        decide(site, found.sha256, "approved")
    for name in NAMES:
        decide(hospitals.site(name), found.sha256, "approved", also_alike=True)
    state, _ = secure(hospitals, nearly, name=nearly.name)
    assert state.cohort == NAMES


def test_a_study_stays_alike_after_its_approval_was_withdrawn_for_its_sums_are_out(hospitals):
    secure(hospitals)
    site = hospitals.site("a")
    decide(site, find_asked(site, "toy").sha256, "withdrawn")
    nearly = replace(STUDY, name="toy-2")
    assert [a.study.name for a in alike_here(site, sha256(nearly), nearly)] == ["toy"]
    other = replace(nearly, model=replace(nearly.model, features=(8, 8, 8, 8, 8, 8)))
    assert alike_here(site, sha256(other), other) == []
    noisy = replace(load_study("lung-ct-private"), model=nearly.model)
    private = replace(
        noisy, protect=replace(noisy.protect, secure_aggregation=SecureAggregation()), rounds=STUDY.rounds
    )
    assert alike_here(site, sha256(private), private) == []
    assert alike_here(site, sha256(PLAIN_STUDY), PLAIN_STUDY) == []


def likened(folder: Path, known: Study, study: Study) -> bool:
    """Whether a site that takes part in `known` finds `study` to be like it."""
    asked = Asked("f" * 64, known, "", 0.0, None, "approved")
    site = Site("a", folder, folder, (), "cpu", 1, 11, "salt", deployed=True)
    return alike(site, study, [asked]) == [asked]


def test_histograms_of_a_plan_are_the_same_in_every_study_that_asks_for_them(tmp_path):
    first = replace(STUDY, name="plan-1", plan="federated")
    other = replace(first, name="plan-2", seed=7, train=replace(first.train, learning_rate=1e-5))
    assert likened(tmp_path, first, other)


def test_one_label_more_changes_the_last_layer_and_hides_no_likeness(tmp_path):
    """Of lung-ct-secure's 495,905 weights 17 belong to the last layer: 16 and a bias, which two labels have twice."""
    study = load_study("lung-ct-secure")
    more = replace(study, name="more", task=replace(study.task, labels=(*study.task.labels, "heart")))
    assert likened(tmp_path, study, more)
    assert likened(tmp_path, more, study)


def test_networks_of_which_less_than_a_tenth_is_the_same_are_not_alike_and_from_a_tenth_they_are(tmp_path, monkeypatch):
    f4 = np.dtype(np.float32)
    of = {8: {"a": Spec((9,), f4), "b": Spec((91,), f4)}, 16: {"a": Spec((9,), f4), "b": Spec((92,), f4)}}
    monkeypatch.setattr(alike_module, "_schema", lambda study: of[study.model.features[0]])
    narrow, wide = (replace(STUDY, model=replace(STUDY.model, features=(n,) * 6)) for n in (8, 16))
    assert not likened(tmp_path, narrow, wide)  # 9 of 100
    of[8]["b"] = Spec((81,), f4)
    assert likened(tmp_path, narrow, wide)  # 9 of 90
    assert likened(tmp_path, wide, narrow)


def test_a_federated_plan_may_come_to_the_network_of_any_other_study(tmp_path):
    planned = replace(STUDY, name="plan-1", plan="federated")
    assert likened(tmp_path, planned, STUDY)
    assert likened(tmp_path, STUDY, planned)
    assert not likened(tmp_path, planned, PLAIN_STUDY)  # not summed at all
