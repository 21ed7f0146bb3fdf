"""A hospital's word: what the policy allows, what a person decided, and what becomes of work that is not wanted."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from typer.testing import CliRunner

import fedclient.cli
from fedclient.client import client_app
from fedclient.consent import (
    Decision,
    admitted,
    all_asked,
    check_decision,
    decide,
    find_asked,
    find_digest,
    list_asked,
    read_decision,
)
from fedclient.explain import explained
from fedclient.policy import Policy, in_words, objections
from fedclient.site import Site
from fedclient.work import Learned
from fedserver.app import proof
from fedserver.checkpoint import RunFolder, read_progress
from fedserver.show import waits_for
from shared_models import transfer
from shared_models.errors import OrderRefused, RoundPaused, StateInvalid, StudyInvalid
from shared_models.files import read_lines
from shared_models.study import SIGNED, Evaluate, Model, Rounds, Study, canonical, load_study, sha256, statement
from shared_models.weights import Arrays
from shared_models.wire import Order
from tests.edge import Edge, running_edge
from tests.hospitals import Hospitals, after
from tests.toys import WEIGHTS, ToyLearner

STUDY = Study(name="toy", rounds=Rounds(count=2, quorum=2, deadline_s=300, gather_s=0, pause_s=300))
ASK, INSIDE = Policy(), Policy(approval="inside-policy")


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    with running_edge(tmp_path / "federation") as running:
        yield running


@pytest.fixture
def hospitals(edge: Edge, tmp_path: Path) -> Hospitals:
    return Hospitals(edge, tmp_path / "sites")


def order(edge: Edge, study: Study = STUDY, run: str = "toy", **change: Any) -> Order:
    """An order as the coordinator of `edge` signs it."""
    digest = sha256(study)
    signed = proof(edge.federation, SIGNED, statement(run, digest))
    made = Order("hello", run, 1, 1, canonical(study).decode(), digest, "b" * 64, study_proof=signed)
    return replace(made, **change)


def refused(of: Order, site: Site, now_s: float | None = None) -> OrderRefused:
    with pytest.raises(OrderRefused) as found:
        admitted(of, site, *([] if now_s is None else [lambda: now_s]))
    return found.value


# The policy


@pytest.mark.parametrize(
    ("policy", "study", "keys"),
    [
        (Policy(tasks=("detection",)), STUDY, ["tasks"]),
        (Policy(models=("dynunet",)), STUDY, ["models"]),
        (Policy(models=("unet",)), replace(STUDY, plan="federated"), ["models"]),
        (Policy(most_rounds=1), STUDY, ["most_rounds"]),
        (Policy(least_cohort=3), STUDY, ["least_cohort"]),
        (Policy(protections=("secure-sum",)), STUDY, ["protections"]),
        (Policy(protections=("differential-privacy",)), STUDY, ["protections"]),
        (Policy(protections=("differential-privacy",)), load_study("lung-ct-private"), []),
        (Policy(protections=("secure-sum",)), load_study("lung-ct-secure"), []),
        (Policy(protections=("secure-sum", "differential-privacy")), load_study("lung-ct-secure"), ["protections"]),
        (Policy(least_threshold=0.8), load_study("lung-ct-secure"), ["least_threshold"]),
        (Policy(least_threshold=0.8), STUDY, []),
        (Policy(least_cohort=4), load_study("lung-ct-secure"), ["least_cohort"]),
        (Policy(tasks=("detection",), most_rounds=1, least_cohort=9), STUDY, ["tasks", "most_rounds", "least_cohort"]),
        (Policy(tasks=("segmentation",), models=("unet",), most_rounds=2, least_cohort=2), STUDY, []),
        (Policy(), STUDY, []),
    ],
)
def test_a_study_is_held_against_every_key_of_the_policy(policy, study, keys):
    assert [objection.key for objection in objections(policy, study)] == keys


@pytest.mark.parametrize(
    ("hours", "zone", "when", "is_open"),
    [
        ((), "UTC", "2026-07-01 12:00", True),
        (("20:00-06:00",), "UTC", "2026-07-01 20:00", True),
        (("20:00-06:00",), "UTC", "2026-07-01 05:59", True),
        (("20:00-06:00",), "UTC", "2026-07-01 06:00", False),
        (("20:00-06:00",), "UTC", "2026-07-01 19:59", False),
        (("12:00-13:00", "18:00-19:00"), "UTC", "2026-07-01 18:30", True),
        (("12:00-13:00",), "Europe/Berlin", "2026-07-01 10:30", True),  # 12:30 there in summer
        (("12:00-13:00",), "Europe/Berlin", "2026-01-01 10:30", False),  # 11:30 there in winter
        (("12:00-12:00",), "UTC", "2026-01-01 03:00", True),  # round the clock
    ],
)
def test_hours_are_those_of_the_hospitals_clock_and_may_pass_midnight(hours, zone, when, is_open):
    at = datetime.fromisoformat(when).replace(tzinfo=ZoneInfo("UTC")).timestamp()
    assert Policy(hours=hours, time_zone=zone).is_open(at) is is_open


@pytest.mark.parametrize("change", [{"hours": ("20-6",)}, {"hours": ("24:00-06:00",)}, {"time_zone": "Berlin"}])
def test_hours_that_are_none_are_refused(change):
    with pytest.raises(ValueError, match=r"hours|time_zone"):
        Policy(**change)


def test_every_key_of_the_policy_is_told_in_words():
    policy = Policy(17, "ask", 93, ("prognosis",), ("mlp",), 71, 5, ("secure-sum",), ("20:00-06:00",), "UTC", 0.79,
                    ("west-7",))  # fmt: skip
    told = " ".join(in_words(policy))
    for word in (
        "79%",
        "17",
        "`fedclient approve`",
        "93 days",
        "prognosis",
        "mlp",
        "71 rounds",
        "5 or more",
        "secure-sum",
        "20:00",
        "west-7",
    ):
        assert word in told


def test_a_study_outside_the_policy_is_refused_with_the_names_of_the_keys_and_not_what_they_say(edge, hospitals):
    hospitals.join("north", Policy(tasks=("detection",), most_rounds=1))
    error = refused(order(edge), hospitals.site("north"))
    assert (error.code, error.keys) == ("OUTSIDE_POLICY", ("tasks", "most_rounds"))
    assert "most_rounds: the study has 2 rounds, allowed: 1" in str(error)
    assert not (hospitals.sites["north"] / "studies").exists()


# The signature


def test_a_study_that_the_coordinator_did_not_sign_for_this_run_is_not_looked_at(edge, hospitals, tmp_path):
    hospitals.join("north", INSIDE)
    site, good = hospitals.site("north"), order(edge)
    assert refused(replace(good, study_proof=None), site).code == "STUDY_UNSIGNED"
    for wrong in (replace(good, run="other"), replace(good, study="{}", study_sha256="c" * 64)):
        assert refused(wrong, site).code == "STUDY_SIGNATURE"
    for_a_plan = proof(edge.federation, "plan", statement("toy", good.study_sha256))
    assert refused(replace(good, study_proof=for_a_plan), site).code == "STUDY_SIGNATURE"
    with running_edge(tmp_path / "other") as other:
        assert refused(order(other), site).code == "STUDY_SIGNATURE"
    assert refused(replace(good, study=canonical(replace(STUDY, seed=1)).decode()), site).code == "STUDY_MISMATCH"
    assert not (site.folder / "studies").exists()
    assert admitted(good, site).name == "north"


def test_a_study_that_is_refused_is_written_down_at_the_site(edge, hospitals):
    hospitals.join("north", INSIDE)
    with pytest.raises(RoundPaused):
        hospitals.run(STUDY, "unsigned", sign=None)
    lines = read_lines(hospitals.sites["north"] / "audit.jsonl")
    codes = {line["facts"]["code"] for line in lines if line["event"] == "order-refused"}
    assert codes == {"STUDY_UNSIGNED"}


@pytest.mark.parametrize(
    "title",
    [
        "Lung\x1b[1A\x1b[2K",
        "Lung\nPrivacy: epsilon 0.1.",
        "Lung\u202e.1.0 nolispe",
        "Lu\u200bng",
        "Lung\u2028",
        "\u3164",
    ],
)
def test_a_title_that_would_change_what_the_approver_reads_is_no_study(edge, hospitals, title):
    hospitals.join("north", INSIDE)
    with pytest.raises(StudyInvalid, match=r"`title` is .*; allowed: visible characters on one line"):
        admitted(order(edge, replace(STUDY, title=title)), hospitals.site("north"))
    assert not (hospitals.sites["north"] / "studies").exists()


def test_a_title_may_be_in_any_language(edge, hospitals):
    hospitals.join("north", INSIDE)
    titled = replace(STUDY, title="Œdème : tumeur cérébrale / 肺　結節 / опухоль / بخش\u200cبندی, \u00a7 5")
    assert admitted(order(edge, titled), hospitals.site("north")).name == "north"


# The decision


def spoil(site: Site, study: Study) -> None:
    """As an earlier version has taken it: with a title that is none today."""
    path = site.folder / "studies" / sha256(study) / "study.json"
    path.write_text(path.read_text().replace('"title":""', '"title":"Lung\\nof old"'))


def test_a_study_that_this_version_does_not_read_hides_no_other_and_can_be_ended(edge, hospitals):
    hospitals.join("north", INSIDE)
    site = hospitals.site("north")
    old, new = replace(STUDY, seed=7), replace(STUDY, seed=8)
    admitted(order(edge, old), site)
    spoil(site, old)
    admitted(order(edge, new), site)
    assert [asked.sha256 for asked in list_asked(site)] == [sha256(new)]
    assert all_asked(site)[1] == [sha256(old)]
    assert find_digest(site, sha256(old)[:12])[0] == sha256(old)
    decide(site, sha256(old), "withdrawn")
    with pytest.raises(OrderRefused, match="was withdrawn by"):
        check_decision(site, sha256(old), 0.0)


def test_a_person_decides_where_an_unread_study_may_tell_what_a_sum_hides(edge, hospitals):
    hospitals.join("north", INSIDE)
    site = hospitals.site("north")
    ready = load_study("lung-ct-secure")
    old, summed = replace(STUDY, seed=7), replace(STUDY, rounds=ready.rounds, protect=ready.protect)
    admitted(order(edge, old), site)
    spoil(site, old)
    assert refused(order(edge, summed), site).code == "APPROVAL_PENDING"
    with pytest.raises(StateInvalid, match=f"took part in {sha256(old)[:12]}, which this version does not read"):
        decide(site, sha256(summed), "approved")
    decide(site, sha256(summed), "approved", also_alike=True)
    admitted(order(edge, summed), site)


def test_a_study_waits_until_somebody_approves_it(edge, hospitals):
    hospitals.join("north")
    site = hospitals.site("north")
    assert refused(order(edge), site).code == "APPROVAL_PENDING"
    (asked,) = list_asked(site)
    assert (asked.study, asked.state) == (STUDY, "pending")
    with pytest.raises(StateInvalid, match="at most 500"):
        decide(site, asked.sha256, "approved", "x" * 501)
    decide(site, asked.sha256, "approved", "ethics vote 12")
    assert admitted(order(edge), site).name == "north"
    assert admitted(order(edge, run="again"), site).name == "north"
    assert find_asked(site, "toy").state == "approved"


def test_who_starts_the_node_is_told_which_studies_wait_and_how_to_decide(edge, hospitals, monkeypatch):
    def held(site: Path, stop: object, begun: Callable[[], None], **_: object) -> None:
        begun()

    monkeypatch.setattr("fedclient.start.start", held)
    monkeypatch.setattr("shared_models.supervise.stop_on_signals", lambda: None)  # else it is pytest's own signals
    folder = hospitals.join("north", ASK)

    def told() -> list[str]:
        done = CliRunner().invoke(fedclient.cli.app, ["start", "--site", str(folder)])
        assert done.exit_code == 0, done.output
        return done.stdout.splitlines()[1:]

    assert told() == []
    digest = sha256(STUDY)[:12]
    refused(order(edge), hospitals.site("north"))
    assert told() == [
        f"Study toy waits for a decision here: `fedclient show {digest}`, then `fedclient approve {digest}`, or "
        f"`refuse`."
    ]
    assert CliRunner().invoke(fedclient.cli.app, ["approve", digest, "--site", str(folder)]).exit_code == 0
    assert told() == []
    (folder / "studies" / sha256(STUDY) / "decision.json").write_text("{}")
    (damaged,) = told()  # it stops its study, and not the node
    assert "decision.json: `verdict` is missing" in damaged


def test_any_change_of_a_study_asks_anew(edge, hospitals):
    hospitals.join("north")
    site = hospitals.site("north")
    refused(order(edge), site)
    decide(site, sha256(STUDY), "approved")
    assert refused(order(edge, replace(STUDY, seed=1)), site).code == "APPROVAL_PENDING"
    assert [a.state for a in list_asked(site)] == ["approved", "pending"]


@pytest.mark.parametrize("verdict", ["refused", "withdrawn"])
def test_a_decision_against_a_study_holds_whatever_the_policy_says(edge, hospitals, verdict):
    hospitals.join("north", INSIDE)
    site = hospitals.site("north")
    going_on = admitted(order(edge), site)
    going_on.go_on()
    decide(site, sha256(STUDY), verdict)
    assert refused(order(edge), site).code == "STUDY_WITHDRAWN"
    with pytest.raises(OrderRefused) as found:
        going_on.go_on()
    assert found.value.code == "STUDY_WITHDRAWN"


def test_a_study_that_nobody_has_approved_is_refused_and_one_that_somebody_has_is_withdrawn(edge, hospitals):
    hospitals.join("north")
    site = hospitals.site("north")
    refused(order(edge), site)
    assert decide(site, sha256(STUDY), "refused").verdict == "refused"
    assert refused(order(edge), site).code == "STUDY_REFUSED"
    assert decide(site, sha256(STUDY), "approved").verdict == "approved"
    for _ in range(2):
        assert decide(site, sha256(STUDY), "refused").verdict == "withdrawn"
    assert refused(order(edge), site).code == "STUDY_WITHDRAWN"


def test_an_approval_runs_out(edge, hospitals):
    hospitals.join("north")
    site = hospitals.site("north")
    refused(order(edge), site)
    until = decide(site, sha256(STUDY), "approved", days=3).until_s
    assert until is not None
    check_decision(site, sha256(STUDY), until - 1)
    assert refused(order(edge), site, until).code == "APPROVAL_PENDING"


def test_where_the_policy_decides_nobody_is_asked_until_it_is_told_to_ask(edge, hospitals):
    hospitals.join("north", INSIDE)
    site = hospitals.site("north")
    admitted(order(edge), site)
    decision = read_decision(site.folder, sha256(STUDY))
    assert decision is not None
    assert (decision.verdict, decision.by) == ("approved", "policy")
    asking = replace(site, policy=ASK)
    assert refused(order(edge), asking).code == "APPROVAL_PENDING"
    assert list_asked(asking)[0].state == "pending"
    until = decision.until_s
    assert until is not None
    assert admitted(order(edge), site, lambda: until + 1).name == "north"  # the policy decides anew


def test_outside_its_hours_a_site_does_nothing_and_stops_what_it_does(edge, hospitals):
    hospitals.join("north", replace(INSIDE, hours=("20:00-06:00",)))
    site, noon, night = hospitals.site("north"), 1_782_907_200.0, 1_782_943_200.0  # 2026-07-01, 12:00 and 22:00 UTC
    assert refused(order(edge), site, noon).code == "OUTSIDE_HOURS"
    now = [night]
    going_on = admitted(order(edge), site, lambda: now[0])
    now[0] = noon
    with pytest.raises(OrderRefused):
        going_on.go_on()


def test_a_study_outside_the_policy_cannot_be_approved(edge, hospitals):
    hospitals.join("north")
    site = hospitals.site("north")
    refused(order(edge), site)
    strict = replace(site, policy=Policy(most_rounds=1))
    with pytest.raises(StateInvalid, match=r"most_rounds: the study has 2 rounds, allowed: 1\. Change \[policy\]"):
        decide(strict, sha256(STUDY), "approved")


def test_a_coordinator_that_sends_ever_new_studies_fills_no_disk(edge, hospitals, monkeypatch):
    monkeypatch.setattr("fedclient.consent.MOST_PENDING", 2)
    hospitals.join("north")
    site = hospitals.site("north")
    codes = [refused(order(edge, replace(STUDY, seed=seed)), site).code for seed in range(3)]
    assert codes == ["APPROVAL_PENDING", "APPROVAL_PENDING", "TOO_MANY_STUDIES"]


def test_where_the_policy_decides_ever_new_studies_fill_no_disk_either(edge, hospitals, monkeypatch):
    monkeypatch.setattr("fedclient.consent.MOST_A_DAY", 2)
    monkeypatch.setattr("fedclient.consent.MOST_PENDING", 1)
    hospitals.join("north", INSIDE)
    site, now = hospitals.site("north"), 1_782_907_200.0
    asked = [order(edge, replace(STUDY, seed=seed)) for seed in range(4)]
    for of in asked[:2]:
        admitted(of, site, lambda: now)
    error = refused(asked[2], site, now + 60.0)
    assert error.code == "APPROVAL_PENDING"
    assert "the policy has approved 2 studies within a day" in str(error)
    assert refused(asked[3], site, now + 60.0).code == "TOO_MANY_STUDIES"
    admitted(asked[0], site, lambda: now + 60.0)  # what is approved goes on
    decide(site, asked[2].study_sha256, "approved")
    assert admitted(asked[2], site).name == "north"
    assert admitted(asked[3], site, lambda: now + 86400.0).name == "north"  # a new day


@pytest.mark.parametrize("words", ["other", "abc", "ffff"])
def test_a_study_that_has_not_come_is_told_with_those_that_have(edge, hospitals, words):
    hospitals.join("north")
    site = hospitals.site("north")
    refused(order(edge), site)
    with pytest.raises(StateInvalid, match=rf"is no study here. Known: toy \({sha256(STUDY)[:12]}\)"):
        find_asked(site, words)


def test_a_name_that_two_studies_have_is_asked_for_by_digest_and_a_name_like_a_digest_hides_none(edge, hospitals):
    hospitals.join("north")
    site, first = hospitals.site("north"), sha256(STUDY)
    refused(order(edge), site)
    assert find_asked(site, "toy").sha256 == first
    second = replace(STUDY, seed=99)
    refused(order(edge, second), site)
    with pytest.raises(StateInvalid, match=rf"means several here: {first[:16]} \(toy, pending, came .*by its digest"):
        find_asked(site, "toy")
    assert find_asked(site, sha256(second)[:12]).study.seed == 99
    decide(site, sha256(second), "refused")
    refused(order(edge, replace(STUDY, name=first[:12])), site)
    with pytest.raises(StateInvalid, match="means several here"):
        find_asked(site, first[:12])
    assert find_asked(site, first).sha256 == first


def test_what_is_new_in_a_study_is_told_key_by_key(edge, hospitals):
    hospitals.join("north")
    site = hospitals.site("north")
    refused(order(edge), site)
    decide(site, sha256(STUDY), "approved")
    changed = replace(STUDY, rounds=replace(STUDY.rounds, count=7), model=Model(dropout=0.5))
    refused(order(edge, changed), site)
    told = explained(site, find_asked(site, sha256(changed)[:12]))["changes"]
    assert told == [
        f"Compared with toy ({sha256(STUDY)[:12]}), approved last:",
        "  model.dropout: 0.0 -> 0.5",
        "  rounds.count: 2 -> 7",
    ]


def test_a_decision_that_was_spoilt_approves_nothing(edge, hospitals):
    hospitals.join("north", INSIDE)
    site = hospitals.site("north")
    admitted(order(edge), site)
    (site.folder / "studies" / sha256(STUDY) / "decision.json").write_text('{"verdict":"approved"}')
    with pytest.raises(StateInvalid, match="`by` is missing"):
        admitted(order(edge), site)


def test_no_person_decides_under_the_name_that_stands_for_the_policy(edge, hospitals, monkeypatch):
    hospitals.join("north", INSIDE)
    site = hospitals.site("north")
    admitted(order(edge), site)
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, "policy")
    decide(site, sha256(STUDY), "approved")
    decision = read_decision(site.folder, sha256(STUDY))
    assert decision is not None
    assert decision.by == "login policy"
    admitted(order(edge), replace(site, policy=ASK))
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # as in a container with a user of no name
    assert decide(site, sha256(STUDY), "withdrawn").by == str(2**31 - 7)


def test_decisions_stand_in_the_sites_log_with_their_reason(edge, hospitals):
    hospitals.join("north")
    site = hospitals.site("north")
    refused(order(edge), site)
    decision = decide(site, sha256(STUDY), "refused", "no vote of the ethics board")
    lines = read_lines(site.folder / "audit.jsonl")
    assert [line["event"] for line in lines] == ["opened", "study-asked", "study-refused"]
    assert Decision(**{k: v for k, v in lines[2]["facts"].items() if k != "study"}) == decision


# A run over hospitals


def test_a_round_does_without_a_site_that_has_not_decided_and_takes_it_in_once_it_has(hospitals):
    hospitals.join("east", INSIDE)
    hospitals.join("north", INSIDE)
    hospitals.join("south", ASK)
    one = replace(STUDY, rounds=replace(STUDY.rounds, count=1))
    _, run = hospitals.run(one)
    assert hospitals.clock.now < 1010.0
    line = read_lines(run.metrics)[0]
    assert set(line["sites"]) == {"east", "north"}
    assert line["left_out"]["south"] == {"state": "pending", "reason": "awaits approval at the site"}
    two = replace(STUDY, rounds=replace(STUDY.rounds, count=1), seed=2)
    hospitals.run(two, "second")
    decide(hospitals.site("south"), sha256(two), "approved")
    _, third = hospitals.run(two, "third")
    assert set(read_lines(third.metrics)[0]["sites"]) == {"east", "north", "south"}


def test_a_run_that_needs_the_site_waits_says_so_and_goes_on_when_it_is_approved_without_a_restart(hospitals):
    hospitals.join("north", INSIDE)
    hospitals.join("south", ASK)
    seen: list[dict[str, str]] = []

    def approve() -> None:
        seen.append(waits_for(read_progress(RunFolder(hospitals.edge.federation.runs / "toy"))))
        decide(hospitals.site("south"), sha256(STUDY), "approved")

    state, run = hospitals.run(STUDY, sleep=after(hospitals.clock, 200, approve))
    assert seen == [{"south": "awaits approval at the site"}]
    assert state.round == 2
    assert all(set(line["sites"]) == {"north", "south"} for line in read_lines(run.metrics))
    assert hospitals.clock.now < 1000 + 200 + 125  # asked again within two minutes


def test_a_site_that_is_never_approved_ends_in_a_pause_that_names_it(hospitals):
    hospitals.join("north", INSIDE)
    hospitals.join("south", ASK)
    with pytest.raises(RoundPaused, match="south: awaits approval at the site"):
        hospitals.run(STUDY)


def test_one_sites_refusal_neither_stops_the_others_nor_is_told_to_them(hospitals):
    for name in ("east", "north", "south"):
        hospitals.join(name, Policy(most_rounds=1) if name == "south" else INSIDE)
    state, run = hospitals.run(STUDY)
    assert state.round == 2
    left_out = read_lines(run.metrics)[0]["left_out"]
    assert left_out == {"south": {"state": "refused", "reason": "OUTSIDE_POLICY (most_rounds)"}}
    for name in ("east", "north"):
        here = b"".join(p.read_bytes() for p in hospitals.sites[name].rglob("*") if p.is_file())
        assert b"south" not in here
        assert b"OUTSIDE_POLICY" not in here


def test_consent_withdrawn_in_the_middle_of_training_ends_it_at_the_next_step_and_nothing_leaves(hospitals):
    hospitals.join("north", INSIDE)
    hospitals.join("south", INSIDE)
    steps: list[int] = []

    class Long(ToyLearner):
        def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
            for step in range(10):
                site.go_on()
                if site.name == "south":
                    steps.append(step)
                if site.name == "south" and step == 3:
                    decide(hospitals.site("south"), sha256(one), "withdrawn", "a patient objected")
            return ToyLearner.learn(self, site, study, round_number, weights)

    one = replace(STUDY, rounds=replace(STUDY.rounds, count=1, quorum=2), evaluate=Evaluate(every=0))
    hospitals.join("west", INSIDE)
    _, run = hospitals.run(one, app=client_app(Long()))
    assert steps == [0, 1, 2, 3]
    line = read_lines(run.metrics)[0]
    assert set(line["sites"]) == {"north", "west"}
    assert line["left_out"]["south"]["reason"] == "STUDY_WITHDRAWN"
    assert not list((hospitals.sites["south"] / "runs").rglob("*"))
    kinds = [x["facts"]["kind"] for x in read_lines(hospitals.sites["south"] / "audit.jsonl") if x["event"] == "sent"]
    assert kinds == ["code"]


def test_consent_withdrawn_while_the_update_is_sent_ends_that_and_nothing_is_counted(hospitals, monkeypatch):
    one = replace(STUDY, rounds=replace(STUDY.rounds, count=1, quorum=2), evaluate=Evaluate(every=0))
    for name in ("north", "south", "west"):
        hospitals.join(name, INSIDE)
    send, found = transfer._send, list[str]()

    def sent(blobs: transfer.Blobs, digest: str, path: Path, left_s: float, go_on: Callable[[], None]) -> None:
        if "south" in str(path) and not found:
            found.append(digest)
            decide(hospitals.site("south"), sha256(one), "withdrawn", "a patient objected")
        send(blobs, digest, path, left_s, go_on)

    monkeypatch.setattr(transfer, "_send", sent)
    _, run = hospitals.run(one)
    line = read_lines(run.metrics)[0]
    assert set(line["sites"]) == {"north", "west"}
    assert line["left_out"]["south"]["reason"] == "STUDY_WITHDRAWN"
    assert not list(hospitals.edge.blobs.glob(f"in/south/{found[0]}*"))
    assert not list((hospitals.sites["south"] / "runs").rglob("round-*"))


def test_the_statistics_of_a_plan_wait_for_approval_too(edge, hospitals):
    hospitals.join("north")
    asked = order(edge, replace(STUDY, plan="federated"), kind="statistics")
    assert refused(asked, hospitals.site("north")).code == "APPROVAL_PENDING"
    assert json.loads((hospitals.sites["north"] / "studies" / asked.study_sha256 / "study.json").read_text())["name"]


def test_the_weights_of_the_tests_are_those_of_the_toy(hospitals):
    hospitals.join("north", INSIDE)
    hospitals.join("south", INSIDE)
    state, _ = hospitals.run(STUDY)
    assert state.cohort == ("north", "south")
    assert WEIGHTS.keys() == {"body.weight", "body.bias", "steps"}
