"""Secure rounds over the real gateway: blobs, audit logs, policies, and the roster that hospitals fetch themselves."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedclient import own_log
from fedclient.alike import alike
from fedclient.cli import app
from fedclient.consent import Asked, Decision, alike_here, decide, find_asked
from fedclient.egress import sent
from fedclient.explain import explained
from fedclient.overview import overview
from fedclient.own_log import log_of
from fedclient.partners import partners_of
from fedclient.policy import Policy
from fedclient.renewal import Keeper, renew
from fedclient.site import Site
from fedserver.lifecycle import revoke
from shared_models.alarms import events
from shared_models.audit import UNSEEN
from shared_models.errors import RoundPaused, StateInvalid
from shared_models.files import read_lines
from shared_models.protect.privacy import Protect
from shared_models.protect.secure import SecureAggregation
from shared_models.study import Evaluate, Model, Personal, Study, Task, Transfer, load_study, sha256
from shared_models.task_table import Covariate, Region
from shared_models.weights import load
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


def test_a_partner_with_another_key_is_a_stranger_until_a_person_has_compared_its_words_by_telephone(hospitals, edge):
    choosy = hospitals.join("choosy", replace(INSIDE, partners=("a", "b")))
    Keeper(choosy, "choosy", edge.address).look()  # first sees them, as a running node does every minute
    renew(hospitals.sites["b"], "b", edge.address)
    Keeper(choosy, "choosy", edge.address).look()
    assert json.loads(call("partners", "--json", at=choosy))["partners"][1]["counts"], "a certificate is no identity"
    renew(hospitals.sites["b"], "b", edge.address, identity=True)
    all_of_them = replace(STUDY, rounds=replace(STUDY.rounds, quorum=5), evaluate=Evaluate(every=0))
    with pytest.raises(RoundPaused, match="choosy: PARTNERS_FEW"):
        secure(hospitals, all_of_them)
    assert [line["facts"]["partner"] for line in events(choosy / "audit.jsonl", ("partner-seen",))] == ["a", "b"]
    (changed,) = events(choosy / "audit.jsonl", ("partner-changed",))
    assert "b: has another identity key" in changed["facts"]["why"]
    renew(hospitals.sites["c"], "c", edge.address)  # another epoch, and no other change of b
    Keeper(choosy, "choosy", edge.address).look()
    assert len(list(events(choosy / "audit.jsonl", ("partner-changed",)))) == 1
    (warned,) = (words for words in overview(choosy)["warnings"] if "identity key" in words)
    assert "`fedclient partners --confirm b --words WORDS`" in warned
    words = json.loads(call("partners", "--json", at=hospitals.sites["b"]))["words"]  # what b reads to choosy
    others = json.loads(call("partners", "--json", at=hospitals.sites["a"]))["words"]
    assert "these are not the words of its key" in call("partners", "--confirm", "b", "--words", others, at=choosy)
    assert "is not named" in call("partners", "--confirm", "c", "--words", words, at=choosy)
    assert not json.loads(call("partners", "--json", at=choosy))["partners"][1]["counts"]
    assert f"b: counts; {words}" in call("partners", "--confirm", "b", "--words", words, at=choosy)
    assert not [words for words in overview(choosy)["warnings"] if "identity key" in words]
    state, _ = secure(hospitals, all_of_them)
    assert state.cohort == ("a", "b", "c", "choosy", "d")


def test_one_list_of_partners_serves_all_hospitals_as_nobody_is_his_own_partner(tmp_path):
    assert [partner.name for partner in partners_of(tmp_path, "a", ("a", "b"), None)] == ["b"]


def call(*words: str, at: Path) -> str:
    done = CliRunner().invoke(app, [*words, "--site", str(at)])
    return done.output


def test_a_coordinator_that_shows_an_older_roster_gets_no_keys(hospitals):
    older = hospitals.records.roster()
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
        return hospitals.records.roster()

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


@pytest.mark.parametrize("more", [0, 200])
def test_a_hospital_whose_whole_folder_was_put_back_from_a_backup_sums_no_more_until_a_person_mends_it(hospitals, more):
    secure(hospitals)
    here = hospitals.sites["d"]
    backup = here.with_name("backup")
    shutil.copytree(here, backup)
    again = replace(STUDY, name="toy-2", model=replace(STUDY.model, features=(8, 8, 8, 8, 8, 8)))
    with pytest.raises(RoundPaused):
        secure(hospitals, again, name="toy-2")
    accept(hospitals, again)
    state, _ = secure(hospitals, again, name="toy-2")
    assert state.cohort == NAMES
    shutil.rmtree(here)
    shutil.copytree(backup, here)  # its ledger, its sums and their witnesses with it
    own_log._opened.cache_clear()  # its processes were begun anew
    mine = log_of(here, "d")
    for _ in range(more):
        mine.add("idle")  # its log is longer by now than the coordinator knows it
    third = replace(again, name="toy-3", model=replace(again.model, features=(4, 4, 4, 4, 4, 4), groups=4))
    with pytest.raises(RoundPaused, match="d: OWN_LOG_CUT"):
        secure(hospitals, third, name="toy-3")
    for name in ("a", "b", "c"):
        decide(hospitals.site(name), sha256(third), "approved", also_alike=True)
    state, run = secure(hospitals, third, name="toy-3")
    assert state.cohort == ("a", "b", "c")
    left = next(iter(read_lines(run.metrics)))["left_out"]
    assert left == {"d": {"state": "refused", "reason": "OWN_LOG_CUT"}}
    assert mine.was_cut(UNSEEN, "coordinator")  # whatever it hears from then on


def test_a_study_that_is_nearly_the_same_is_approved_by_no_policy_and_shown_for_what_it_is(hospitals):
    secure(hospitals)
    nearly = replace(STUDY, name="toy-2", train=replace(STUDY.train, learning_rate=STUDY.train.learning_rate * 1.001))
    with pytest.raises(RoundPaused, match="a: awaits approval at the site"):
        secure(hospitals, nearly, name=nearly.name)
    site = hospitals.site("a")
    found = find_asked(site, "toy-2")
    assert found.state == "pending"
    told = [s for s in explained(site, found)["leaves"] if "reads the same here as toy (" in s]
    assert len(told) == 1
    assert "): images. Whatever network, labels and settings the two have" in told[0]
    with pytest.raises(StateInvalid, match=r"as toy \(\w{12}\): images.*nearly that site's update.*--also-alike"):
        decide(site, found.sha256, "approved")
    accept(hospitals, nearly)
    state, _ = secure(hospitals, nearly, name=nearly.name)
    assert state.cohort == NAMES


def test_a_twin_without_masks_is_approved_by_no_policy_for_its_updates_can_be_taken_off_the_sums(edge, quick_folder):
    hospitals = Hospitals(edge, quick_folder / "sites")
    for name in NAMES:
        hospitals.join(name, replace(INSIDE, protections=()))
    secure(hospitals)
    with pytest.raises(RoundPaused, match="a: awaits approval at the site"):
        hospitals.run(PLAIN_STUDY, app=toy_app(LEARNER), weights=FLOATS, name="twin")
    site = hospitals.site("a")
    [told] = [s for s in explained(site, find_asked(site, sha256(PLAIN_STUDY)))["leaves"] if "reads the same" in s]
    assert "sees this site's updates to this study by themselves, and can take them off the sums of toy (" in told


def test_a_twin_without_masks_is_known_after_a_person_has_refused_what_policy_approved(edge, quick_folder):
    hospitals = Hospitals(edge, quick_folder / "sites")
    for name in NAMES:
        hospitals.join(name, replace(INSIDE, protections=()))
    one = replace(PLAIN_STUDY, rounds=replace(PLAIN_STUDY.rounds, count=1))
    hospitals.run(one, app=toy_app(LEARNER), weights=FLOATS, name="twin")
    for name in NAMES:
        decide(hospitals.site(name), sha256(one), "refused", "that is enough of it")
    with pytest.raises(RoundPaused, match="a: awaits approval at the site"):
        secure(hospitals)


def accept(hospitals: Hospitals, study: Study) -> None:
    """A person at each hospital approves a study that is like another one."""
    for name in NAMES:
        decide(hospitals.site(name), sha256(study), "approved", also_alike=True)


def test_a_study_stays_alike_after_its_approval_was_withdrawn_for_its_sums_are_out(hospitals):
    secure(hospitals)
    site = hospitals.site("a")
    decide(site, find_asked(site, "toy").sha256, "withdrawn")
    nearly = replace(STUDY, name="toy-2")
    assert [a.asked.study.name for a in alike_here(site, sha256(nearly), nearly)] == ["toy"]


def likened(folder: Path, known: Study, study: Study, decision: Decision | None = None, state: str = "approved"):
    """What a site that takes part in `known` is told of `study`."""
    asked = Asked("f" * 64, known, "", 0.0, decision, state)
    site = Site("a", folder, folder, (), "cpu", 1, 11, "salt", deployed=True)
    return alike(site, study, [asked])


KNOWN = load_study("lung-ct-secure")
PRIVATE = load_study("lung-ct-private-secure")
SUMS = Protect(secure_aggregation=SecureAggregation())
BARE = replace(KNOWN, protect=Protect())
TABLE = replace(
    load_study("brca-prognosis"), protect=SUMS, rounds=KNOWN.rounds, strategy=replace(KNOWN.strategy, name="fedavg")
)
BAGS = replace(load_study("fed-camelyon16"), protect=SUMS, rounds=KNOWN.rounds)
UNET, TASK, SEEN = KNOWN.model, KNOWN.task, KNOWN.preprocess
CLASSES = Task("classification", ("lung",), "bce")
RENAMED = replace(TASK, labels=("thorax",))
HEART = replace(TASK, labels=("heart", "lung"))
EVASIONS: dict[str, Study] = {
    "another name and title": replace(KNOWN, name="another", title="Another"),
    "another seed": replace(KNOWN, seed=7),
    "a network twice as wide": replace(KNOWN, model=replace(UNET, features=(32, 32, 64, 128, 256, 32))),
    "a narrower network": replace(KNOWN, model=replace(UNET, features=(8,) * 6)),
    "a residual network, and a layer less": replace(KNOWN, model=Model("residual-unet", features=(16, 32, 64))),
    "another norm": replace(KNOWN, model=replace(UNET, norm="instance")),
    "one label more": replace(KNOWN, task=replace(TASK, labels=("lung", "heart"))),
    "labels in another order": replace(KNOWN, task=HEART),
    "a label of another name": replace(KNOWN, task=RENAMED),
    "another loss": replace(KNOWN, task=replace(TASK, loss="focal")),
    "regions instead of labels": replace(KNOWN, task=replace(TASK, regions=(Region("all", ("lung",)),))),
    "classes instead of masks": replace(KNOWN, task=CLASSES, model=Model("resnet18")),
    "no labels at all": replace(KNOWN, task=Task("reconstruction", ("lung",), "masked_l1")),
    "another size of images": replace(KNOWN, preprocess=replace(SEEN, size=(128, 128))),
    "another window": replace(KNOWN, preprocess=replace(SEEN, window_hu=(-1001.0, 400.0))),
    "another modality": replace(KNOWN, modality="mr", preprocess=replace(SEEN, intensity="percentile")),
    "a named channel": replace(KNOWN, channels=("t1",)),
    "a federated plan": replace(KNOWN, plan="federated"),
    "pre-trained weights and frozen layers": replace(KNOWN, transfer=Transfer("a" * 64, freeze=2)),
    "a head that stays at the site": replace(KNOWN, personal=Personal(keep=("head",))),
    "another rate and schedule": replace(KNOWN, train=replace(KNOWN.train, learning_rate=1e-5, schedule="cosine")),
    "another number of rounds": replace(KNOWN, rounds=replace(KNOWN.rounds, count=1)),
    "another strategy": replace(KNOWN, strategy=replace(KNOWN.strategy, name="fedadam")),
    "another ring": replace(KNOWN, protect=Protect(secure_aggregation=SecureAggregation(ring_bits=24))),
    "no masks": BARE,
}


@pytest.mark.parametrize("evasion", EVASIONS)
def test_nothing_that_a_coordinator_writes_makes_a_study_of_the_same_images_another_one(evasion, tmp_path):
    for one, other in ((KNOWN, EVASIONS[evasion]), (EVASIONS[evasion], KNOWN)):
        assert [found.reads for found in likened(tmp_path, one, other)] == [("images",)]


@pytest.mark.parametrize(("one", "other"), [(KNOWN, TABLE), (KNOWN, BAGS), (TABLE, BAGS)])
def test_studies_that_read_nothing_in_common_are_not_asked_about(one, other, tmp_path):
    assert likened(tmp_path, one, other) == likened(tmp_path, other, one) == []


def test_tables_are_alike_by_any_column_that_both_read_however_it_is_written(tmp_path):
    own = Task("prognosis", ("death",), "hazard", intervals_days=(100.0, 200.0), time_column="days",
               event_column="died", covariates=(Covariate("weight"),))  # fmt: skip
    other = replace(TABLE, task=own)
    assert likened(tmp_path, TABLE, other) == []
    age = TABLE.task.covariates[0].column
    again = replace(other, task=replace(own, covariates=(Covariate("weight"), Covariate(age.upper()))))
    assert [found.reads for found in likened(tmp_path, TABLE, again)] == [(f"the column {age.casefold()!r}",)]
    followed = replace(other, task=replace(own, time_column=TABLE.task.time_column))
    assert len(likened(tmp_path, TABLE, followed)) == 1


def test_a_prognosis_from_images_and_one_from_a_table_are_alike_by_what_they_foretell(tmp_path):
    of_images = replace(TABLE.task, covariates=())
    seen = replace(KNOWN, task=of_images, model=Model("resnet18"))
    [found] = likened(tmp_path, TABLE, seen)
    assert found.reads == ("the column 'e'", "the column 't'")  # whether and when the event came


def test_private_updates_and_two_studies_without_masks_are_not_asked_about(tmp_path):
    for one, other in ((KNOWN, PRIVATE), (PRIVATE, KNOWN), (BARE, replace(BARE, seed=7)), (PRIVATE, BARE)):
        assert likened(tmp_path, one, other) == []


def test_a_study_without_masks_is_known_while_its_updates_are_out_and_one_that_was_refused_never_is(tmp_path):
    withdrawn, refused = (Decision(verdict, "steward", 0.0) for verdict in ("withdrawn", "refused"))
    assert len(likened(tmp_path, BARE, KNOWN, withdrawn, "withdrawn")) == 1
    assert likened(tmp_path, BARE, KNOWN, refused, "refused") == []
    assert likened(tmp_path, BARE, KNOWN, None, "pending") == []
    assert likened(tmp_path, KNOWN, BARE, withdrawn, "withdrawn") == []  # no sum of it was confirmed
