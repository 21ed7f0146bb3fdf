"""Attacks: each succeeds where nothing protects, and gets as little as is claimed where something does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import simulations.cli
from fedclient.app import app as installed
from shared_models import nets
from shared_models.envelope import signed
from shared_models.errors import StudyInvalid
from shared_models.protect.privacy import Privacy, Protect
from shared_models.protect.secure import SecureAggregation
from shared_models.study import Evaluate, Model, Study, canonical, load_study
from shared_models.wire import read_order, read_reply, write_reply
from simulations.attacks import claim, curious, imprint, inversion, membership, report
from simulations.attacks import run as attacks
from simulations.attacks.finding import Finding, Row, judged, psnr
from simulations.attacks.people import people_of, small
from simulations.attacks.sums import mean_of, secure_sum
from simulations.audit import Guesses
from simulations.engine import NodeConfig
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, node_configs

PRIVATE = load_study("lung-ct-private")
SMALL = Model(features=(4, 4, 4, 4, 4, 4), groups=2)
TINY = replace(PRIVATE, model=SMALL, train=replace(PRIVATE.train, local_steps=2, batch_size=2))
PLAIN = replace(TINY, protect=Protect(), evaluate=Evaluate(every=1))
COARSE = Protect(secure_aggregation=SecureAggregation(ring_bits=24, threshold=0.7))
SECURED = replace(PLAIN, rounds=replace(PLAIN.rounds, quorum=3), protect=COARSE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = PhantomPlan(sites=3, train=4, val=1, test=1, slices=2, size=32)
    return phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)


@pytest.fixture(scope="module")
def nodes(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NodeConfig]:
    return node_configs(tmp_path_factory.mktemp("work"), [data], Machine(device="cpu"), None)


@pytest.fixture(scope="module")
def people(nodes):
    return people_of(TINY, nodes, inversion.EDGE, 90)


def row(finding: Finding, against: str, figure: str = ""):
    [found] = [r for r in finding.rows if r.against.startswith(against) and figure in r.figure]
    return found


# What is measured


def test_psnr_is_in_decibels_of_the_whole_range():
    assert psnr(np.zeros((4, 4)), np.full((4, 4), 0.1)) == pytest.approx(20.0)
    assert psnr(np.full(4, 0.5), np.full(4, 0.5)) == 200.0
    assert psnr(np.ones(4), np.full(4, 7.0)) == 200.0  # what is whiter than white is white


def test_slices_of_a_volume_are_its_middle_plane_from_black_to_white():
    volume = np.zeros((1, 2, 4, 4, 3), np.float16)
    volume[0, 0, :2, :, 1] = 5.0
    volume[0, 0, :, :, 2] = 9.0  # another plane
    volume[0, 1] = 3.0  # another channel
    assert small(volume, 2).tolist() == [[[1.0, 1.0], [0.0, 0.0]]]


def test_all_slices_of_a_person_are_one_patient_and_sites_take_turns(people):
    assert len(people) == 18
    assert [p.site for p in people[:4]] == ["east", "north", "south", "east"]
    assert {p.slices.shape for p in people} == {(2, 32, 32)}


def test_the_share_of_members_at_one_percent_false_positives_is_counted_by_hand():
    outside, inside = np.arange(200.0), np.array([196.5, 198.0, 198.5, 500.0])
    scores, members = np.concatenate([outside, inside]), np.arange(204) >= 200
    found = membership.reach(scores, members)
    assert found.found == 0.75  # above 197, which two of 200 are
    assert found.auc == pytest.approx((197 + 198.5 + 199 + 200) / 800)


def test_the_interval_of_what_is_found_draws_patients_with_all_their_networks():
    """Of ten patients nine are found in every network, so that a resample finds a binomial share of them."""
    members = np.tile(np.array([[True], [False]]), (20, 10))
    scores = np.where(members, 2.0, 1.0)
    scores[:, 9] = 0.0
    found = membership.reach_between(scores, members, TINY)
    assert found.found == pytest.approx(0.9)
    assert found.between == (0.7, 1.0)  # 2.5 % of a binomial of 10 at 0.9, and its upper end


def test_whitened_slices_are_uncorrelated_and_of_one_size(people):
    flat = np.concatenate([p.slices[:, 0] for p in membership.whitened(people)]).astype(np.float64)
    assert len(flat) == sum(len(p.slices) for p in people)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.eye(flat.shape[1]), atol=1e-4)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-4)


def test_the_likelihood_ratio_judges_a_network_by_the_others_alone():
    members = np.array([[True], [True], [False], [False], [True]])
    sure = np.array([[5.0], [5.0], [1.0], [1.0], [1.0]])
    score = membership.likelihood_ratio(sure, members)
    assert score[4, 0] < 0 < score[0, 0]  # the last is a member that looks like none
    assert score[2, 0] < 0


# Inversion


def test_a_plain_step_gives_the_picture_away_and_a_protected_one_does_not(people):
    found = inversion.attack(TINY, people, 700)
    assert not found.missed
    assert row(found, "nothing").value > 30
    assert row(found, "clipping alone").value > 30  # which nobody calls differential privacy
    assert row(found, "differential privacy").value < 15
    assert [r.holds for r in found.rows if r.against.startswith("secure sum")] == [True] * 3
    assert next(iter(found.strips[0].pictures)) == "original"


def test_a_private_update_that_shows_more_than_a_picture_made_up_is_not_called_no_better():
    nothing = np.zeros((2, 2), np.float32)
    told = {decibels: inversion._verdict(TINY, {inversion.PRIVATE: (decibels, nothing)}, 12.0) for decibels in (11, 13)}
    assert "gets 11.0 dB, no better than a picture that is made up (12.0 dB" in told[11]
    assert "gets 13.0 dB, better than a picture that is made up (12.0 dB" in told[13]


def test_an_inversion_that_fails_without_protection_shows_nothing_of_any(people):
    found = inversion.attack(TINY, people, 2)
    assert [r.against for r in found.missed] == ["nothing"]
    assert found.verdict.startswith("The control failed: nothing is shown (PSNR, dB against 'nothing' is ")
    assert "better" not in found.verdict
    assert [r.holds for r in found.rows if r.must and not r.control] == [None] * 4
    assert {found.word(r) for r in found.rows if r.must} == {"CONTROL FAILED", "nothing is shown"}


# What a failed control leaves of a finding

CONTROL = judged("nothing", "AUC", 0.61, above=0.8, control=True)
HOLDS = judged("differential privacy", "AUC", 0.5, below=0.7, study=True)
WORSE = judged("differential privacy", "AUC", 0.75, below=0.7, study=True)
GETS = "The attacker gets nothing."


def of(*rows: Row) -> Finding:
    return Finding("name", "Title", "setting", rows, GETS)


def test_a_protection_holds_only_beside_a_control_that_succeeds():
    succeeds = replace(CONTROL, value=0.9, holds=True)
    assert (of(succeeds, HOLDS).verdict, of(succeeds, HOLDS).rows[1].holds) == (GETS, True)
    failed = of(CONTROL, HOLDS)
    assert (
        failed.verdict == "The control failed: nothing is shown (AUC against 'nothing' is 0.61, and must be above 0.8)."
    )
    assert [failed.word(r) for r in failed.rows] == ["CONTROL FAILED", "nothing is shown"]


def test_one_control_of_several_that_fails_is_enough():
    succeeds = replace(CONTROL, figure="TPR", value=0.9, holds=True)
    assert not of(succeeds, CONTROL, HOLDS).shown


def test_a_finding_without_a_judged_control_shows_nothing():
    told = Row("nothing", "TPR", 0.3, control=True)
    assert of(told, HOLDS).verdict == "The control failed: nothing is shown (there is none)."
    assert of(told, HOLDS).rows[1].holds is None


def test_a_protection_that_is_worse_than_claimed_is_told_whatever_the_control_says():
    worse = "Worse than claimed: AUC against 'differential privacy' is 0.75, and must be below 0.7."
    failed, sound = of(CONTROL, WORSE), of(replace(CONTROL, value=0.9, holds=True), WORSE)
    assert sound.verdict == f"{worse} {GETS}"
    assert failed.verdict.endswith(f"must be above 0.8). {worse}")
    assert failed.word(failed.rows[1]) == sound.word(sound.rows[1]) == "WORSE THAN CLAIMED"


def test_machines_and_the_page_are_told_that_nothing_is_shown():
    numbers = report.numbers(TINY, [of(CONTROL, HOLDS)])
    assert (numbers["holds"], numbers["shown"], numbers["attacks"][0]["shown"]) == (False, False, False)
    assert [r["holds"] for r in numbers["attacks"][0]["rows"]] == [False, None]
    page = report.page(TINY, [of(CONTROL, HOLDS)], {})
    assert page.count('<span class="flag">nothing is shown</span>') == 1
    assert page.count("The control failed: nothing is shown (AUC") == 2
    assert '<span class="good">' not in page
    assert GETS not in page


def _none_found(*_: object) -> np.ndarray:
    return np.zeros((1, inversion.EDGE, inversion.EDGE), np.float32)


def test_an_imprint_layer_that_reads_no_picture_shows_nothing(people, nodes, monkeypatch):
    monkeypatch.setattr(imprint, "recovered", _none_found)
    found = imprint.attack(TINY, nodes, people)
    assert not found.shown
    assert "The control failed: nothing is shown (slices above 30 dB, of 8 against 'nothing' is 0" in found.verdict


def test_a_client_that_refuses_every_order_has_not_shown_that_it_refuses_an_imprint_layer(people, nodes, monkeypatch):
    monkeypatch.setattr(imprint, "asked", lambda *_: "WEIGHTS_MISMATCH")
    found = imprint.attack(TINY, nodes, people)
    assert not found.shown
    assert 'answered by against "nothing: asked: the study\'s own weights" is WEIGHTS_MISMATCH' in found.verdict
    assert "Nothing: the client trains no network" not in found.verdict


def test_membership_inference_that_finds_nobody_without_protection_shows_nothing(people, monkeypatch):
    def guessing(known, labels, members, *_: object) -> Any:
        return np.random.default_rng(0).standard_normal(members.shape)

    monkeypatch.setattr(membership, "confidences", guessing)
    found = membership.attack(TINY, people, 11)
    controls = [r.figure for r in found.missed]
    assert controls == ["LiRA: AUC", "LiRA: TPR at 1 % FPR, at least (95 %)", "loss threshold: AUC"]
    assert found.verdict.startswith("The control failed: nothing is shown (LiRA: AUC against 'nothing'")
    assert {r.holds for r in found.rows if not r.control} == {None}


@pytest.mark.parametrize("attacker", ["LiRA", "loss threshold"])
def test_each_membership_attack_is_a_control_of_its_own(attacker):
    weak = membership.Reach(0.6, 0.02, (0.0, 0.04))
    rows = membership._rows("nothing", attacker, weak, weak, False, "private")
    assert [r.holds for r in rows if r.control and r.must] == [False] * (2 if attacker == "LiRA" else 1)
    protected = membership._rows("private", attacker, weak, weak, True, "private")
    assert {r.holds for r in protected} == {None}
    assert any(r.must for r in protected)


def test_a_private_network_that_the_loss_alone_tells_members_of_is_worse_than_claimed():
    strong, leaky = membership.Reach(0.98, 0.5), membership.Reach(0.8, 0.1)
    rows = membership._rows("private", "loss threshold", leaky, strong, True, "private")
    assert (rows[0].must, rows[0].holds) == ("below 0.79", False)


def test_an_audit_that_does_not_find_the_noise_left_out_shows_nothing(monkeypatch):
    monkeypatch.setattr(claim, "audit", lambda *_: claim.Audit(2.85, 0.5, Guesses(600, 10, 6)))
    found = claim.attack(TINY, Privacy(1.0, 0.5), 600)
    assert [r.against for r in found.missed] == ["nothing: accounted for, the noise left out"]
    assert found.verdict.startswith("The control failed: nothing is shown (epsilon at least (2.85 claimed)")
    assert found.rows[1].holds is None


def test_a_listener_that_would_find_no_update_in_any_file_shows_nothing(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(curious, "on_disk", lambda *_: 0)
    found = curious.attack(PLAIN, nodes, tmp_path)
    assert [r.against for r in found.missed] == ["nothing: each update in a file of its own"]
    assert found.verdict.startswith("The control failed: nothing is shown (updates of single sites")


# The imprint layer


def test_an_imprint_layer_reads_pictures_off_a_sum_too_and_the_client_refuses_it_by_name(people, nodes):
    found = imprint.attack(TINY, nodes, people)
    assert not found.missed
    assert row(found, "nothing", "slices").value >= 6  # of 8
    assert row(found, "secure sum of").value >= 16  # of 24
    assert [r.value for r in found.rows if r.against.startswith("nothing: asked")] == ["trained", "added up"]
    told = {r.against: r.value for r in found.rows if r.against.startswith("admission")}
    assert sorted(told.values()) == ["SCHEMA_MISMATCH", "STUDY_MISMATCH", "WEIGHTS_MISMATCH", "WEIGHTS_MISMATCH"]


def test_the_same_question_with_the_studys_own_weights_is_answered_by_training(nodes):
    text = canonical(PLAIN).decode()
    assert imprint.asked(PLAIN, nodes, nets.initial_weights(PLAIN), text) == "trained"


# Membership and the claim


def test_members_are_found_by_patient_and_differential_privacy_hides_them(people):
    found = membership.attack(TINY, people, 11)
    private = f"differential privacy, epsilon {7.98:.3g}"
    assert row(found, "nothing", "LiRA: AUC").value > 0.8
    assert row(found, "nothing", "loss threshold: AUC").value > 0.8
    assert 0.3 < row(found, private[:20], "LiRA: AUC").value < 0.7
    assert row(found, "clipping and sampling", "loss threshold: AUC").value > 0.7


def test_half_of_the_networks_learn_from_each_patient():
    assert membership.halves(10, 40, TINY).sum(0).tolist() == [5] * 40


def test_the_claim_holds_and_without_its_noise_it_does_not():
    found = claim.attack(TINY, Privacy(1.0, 0.5), 600)
    assert not found.missed
    honest, silent = row(found, "differential privacy"), row(found, "nothing")
    assert 0 < honest.value <= 2.85 < silent.value


def test_an_audit_with_more_noise_than_the_study_has_is_none_of_the_study():
    noisy, quiet = (replace(TINY, protect=Protect(privacy=Privacy(noise, 0.5))) for noise in (1.0, 0.5))
    own, other = (claim.attack(study, Privacy(1.0, 0.5), 200) for study in (noisy, quiet))
    assert row(own, "differential privacy").study
    assert not row(other, "differential privacy").study
    assert "with noise 1 (the study's own, 0.5, is less)" in other.setting


def test_as_many_steps_are_audited_as_the_canaries_can_disprove():
    assert (claim.most_steps(1.0), claim.most_steps(3.0)) == (1, 7)


# The curious coordinator


def test_a_plain_round_tells_a_site_apart_and_a_secure_sum_does_not(nodes, tmp_path):
    found = curious.attack(PLAIN, nodes, tmp_path)
    assert not found.missed
    assert set(found.details["told"]) >= {"examples", "losses", "scores of its patients", "seconds"}
    assert row(found, "nothing: the same").value > 0.999
    assert row(found, "secure sum", "largest difference").value < 1e-6
    assert row(found, "secure sum", "together").value == "cases, clipped, weight"


def test_a_private_round_tells_no_number_of_a_site(nodes, tmp_path):
    found = curious.attack(TINY, nodes, tmp_path)
    assert not found.missed
    assert found.details["told"] == []


def test_a_transcript_of_a_secure_sum_holds_the_mean_and_no_update():
    draw = np.random.default_rng(0)
    deltas = {f"site-{n}": {"w": draw.standard_normal((50, 40)).astype(np.float32)} for n in range(4)}
    made = secure_sum(deltas, clip=6.0)
    mean = np.mean([delta["w"].astype(np.float64) for delta in deltas.values()], axis=0)
    assert np.abs(mean_of(made)["w"] - mean).max() < 1e-6
    one = deltas["site-0"]["w"].ravel()
    assert curious.alike(one, made.read_as_plain("site-0")["w"].ravel()) < 0.12
    assert curious.alike(one, curious.half_unmasked(made, "site-0")) < 0.12
    assert curious.alike(one, made.without_masks(deltas["site-0"])["w"].ravel()) > 0.999


def test_a_secure_sum_is_in_the_ring_and_to_the_threshold_of_its_study():
    """A ring of 24 bits has (2**23 - 128) / 6 elements for 1: each of four sites rounds by half of one at most."""
    draw = np.random.default_rng(0)
    deltas = {f"site-{n}": {"w": draw.standard_normal((50, 40)).astype(np.float32)} for n in range(4)}
    made = secure_sum(deltas, clip=6.0, table=SecureAggregation(ring_bits=24, threshold=1.0))
    mean = np.mean([delta["w"].astype(np.float64) for delta in deltas.values()], axis=0)
    assert made.context.threshold == 4
    assert {vector.size % 3 for vector in made.vectors.values()} == {0}
    assert np.abs(mean_of(made)["w"] - mean).max() < 2 * 6 / (2**23 - 128)
    one = deltas["site-0"]["w"].ravel()
    assert curious.alike(one, made.without_masks(deltas["site-0"])["w"].ravel()) > 0.999
    assert curious.alike(one, made.read_as_plain("site-0")["w"].ravel()) < 0.12
    assert curious.alike(one, curious.half_unmasked(made, "site-0")) < 0.12


def test_a_secured_study_is_listened_to_in_its_own_ring(nodes, tmp_path):
    found = curious.attack(SECURED, nodes, tmp_path)
    assert not found.missed
    assert "in a ring of 24 bits, 3 of 3 sites needed to its end" in found.setting
    real = [r for r in found.rows if r.against == "secure sum, a round of the study"]
    assert [r.value for r in real[:2]] == ["no number", 0.0]
    assert row(found, "nothing: one count planted").value == "cases"
    assert row(found, "nothing: each update of the secure round").value == 3.0
    assert found.verdict.endswith("the mean and sums over all sites, and of one site nothing.")


def test_a_secure_round_in_which_a_site_tells_a_count_is_not_said_to_tell_nothing(nodes, tmp_path, monkeypatch):
    def telling(message: Any, context: Any) -> Any:
        asked, reply = read_order(message), installed(message, context)
        if asked.kind != "train" or context.node_config["site"] != "east" or "sums" not in context.node_config:
            return reply
        said = replace(read_reply(reply, "a reply"), train_cases=4)
        return write_reply(signed(said, asked, None), message)

    monkeypatch.setattr(curious, "installed", telling)
    found = curious.attack(SECURED, nodes, tmp_path)
    assert [(r.against, r.value) for r in found.missed] == [("secure sum, a round of the study", "cases")]
    assert "is not shown: told of one site of cases under" in found.verdict


@pytest.mark.parametrize("control", [False, True])
def test_that_a_secure_sum_tells_nothing_is_not_said_of_one_that_tells_something(control):
    failed = Row("nothing" if control else "secure sum", "likeness", 0.5, "as it must", False, control)
    rows = (Row("secure sum", "numbers", 0.0, "below 1", True), failed)
    words = f"is not shown: likeness of 0.5 under '{failed.against}'."
    assert curious._verdict(SECURED, rows, []) == f"That the coordinator reads nothing of one site {words}"
    assert curious._verdict(PLAIN, rows, []).endswith(f"That a secure sum would tell less {words}")
    assert curious._verdict(SECURED, rows[:1], []).endswith("of one site nothing.")


def test_numbers_that_a_private_study_tells_are_told():
    assert "noisy update of each site, and losses, seconds." in curious._verdict(TINY, (), ["losses", "seconds"])
    assert "noisy update of each site, and nothing else." in curious._verdict(TINY, (), [])


def test_two_sites_are_too_few_for_a_secure_sum(nodes, tmp_path):
    with pytest.raises(StudyInvalid, match="needs 3 sites, there are 2"):
        curious.attack(TINY, dict(list(nodes.items())[:2]), tmp_path)


# The command


def attack(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(simulations.cli.app, ["attack", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_the_command_writes_report_pictures_and_numbers(data, tmp_path):
    words = ["lung-ct-private", "--data", data, "--attacks", "imprint,claim", "--quick", "--out", tmp_path / "out"]
    code, out = attack(*words, "--json", "-")
    assert code == 0
    told = json.loads(out)
    assert [found["attack"] for found in told["attacks"]] == ["imprint", "claim"]
    assert told["holds"] is True
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == told
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "WEIGHTS_MISMATCH" in page
    assert (tmp_path / "out" / "imprint-1.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_fails_when_a_control_fails(data, tmp_path, monkeypatch):
    monkeypatch.setattr(attacks, "QUICK", attacks.Size(iterations=1, patients=8))
    code, out = attack("lung-ct-private", "--data", data, "--attacks", "inversion", "--quick", "--out", tmp_path / "o")
    assert code == 1
    assert "CONTROL FAILED" in out
    assert "Gradient inversion. The control failed: nothing is shown" in " ".join(out.split())
    assert "holds" not in out
    page = (tmp_path / "o" / "report.html").read_text()
    assert "The control failed: nothing is shown" in page
    assert "no better" not in out + page


def test_unknown_attacks_and_studies_without_a_network_or_images_are_refused(nodes, tmp_path):
    with pytest.raises(StudyInvalid, match="allowed are inversion, imprint, membership, claim, curious"):
        attacks.chosen("inversion,guessing")
    assert attacks.chosen("claim, inversion") == ("inversion", "claim")
    assert attacks.chosen("all") == attacks.ATTACKS
    with pytest.raises(StudyInvalid, match="has no network yet"):
        attacks.carry_out(Study(name="s", plan="federated"), nodes, tmp_path, ["claim"], attacks.QUICK)
    with pytest.raises(StudyInvalid, match="sees tables and no images"):
        people_of(load_study("brca-prognosis"), nodes, 32, 90)
