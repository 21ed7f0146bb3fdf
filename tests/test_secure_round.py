"""Rounds through secure sums, with sites that go away and a coordinator that is killed: the right mean, or none."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedclient.site import Site
from fedclient.sums import Sums
from fedclient.work import Holding, Learned
from fedserver import secure_round
from fedserver.checkpoint import RunFolder, State, read_progress, read_state
from fedserver.cohort import Presence
from fedserver.courier import Inline
from fedserver.report import facts, write_report
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from shared_models.class_counts import ClassCounts, class_counts, temperature
from shared_models.errors import OrderRefused, RoundPaused, SumAborted
from shared_models.files import read_lines
from shared_models.metrics import counts
from shared_models.protect.messages import Adverts, Sealed
from shared_models.protect.privacy import Protect
from shared_models.protect.secure import SecureAggregation
from shared_models.roster import Roster
from shared_models.scores import row_of, total
from shared_models.study import Evaluate, Model, Rounds, Strategy, Study, Task
from shared_models.weights import Arrays, load
from shared_models.wire import Split, read_order
from simulations.engine import LocalGrid, run_local, with_members
from simulations.roster import roster_of
from tests.order_path import FLOATS, SECURE
from tests.toys import Clock, ToyLearner, new_run, nodes, toy_app

SITES = ("a", "b", "c", "d", "e")
LEARNER = ToyLearner({"a": 1.0, "b": 2.0, "c": -3.0, "d": 0.5, "e": 0.0}, {"a": 10, "b": 20, "c": 5, "d": 1, "e": 64})
STUDY = Study(name="toy", rounds=Rounds(count=1, quorum=3, deadline_s=1000, pause_s=100), protect=SECURE)
Lost = Callable[[str, str, int], str | None]  # site, kind, how often asked -> "before" or "after" it did the work
STEPS = ("advertise", "share", "mask", "confirm", "unmask")


class Killed(BaseException):
    """The coordinator's process ends here."""


class SteppedGrid(LocalGrid):
    """Sites that are lost at steps of a sum, and a coordinator that is killed as it sends its nth order of a kind."""

    def __init__(self, configs, clock: Clock, lost: Lost, kill: tuple[str, int] | None) -> None:
        super().__init__(toy_app(LEARNER), configs)
        self.clock, self.lost, self.kill, self.configs = clock, lost, kill, configs
        self.asked: dict[tuple[str, str], int] = {}
        self.kinds: dict[str, tuple[str, str, int]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        listed = list(messages)
        for message in listed:
            kind = read_order(message).kind
            if self.kill and kind == self.kill[0]:
                if self.kill[1] == 0:
                    raise Killed
                self.kill = (kind, self.kill[1] - 1)
        ids = list(super().push_messages(listed))
        for message_id, message in zip(ids, listed, strict=True):
            site, kind = str(self.configs[message.metadata.dst_node_id]["site"]), read_order(message).kind
            self.asked[site, kind] = self.asked.get((site, kind), 0) + 1
            self.kinds[message_id] = site, kind, self.asked[site, kind]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies: list[Message] = []
        for message_id in list(message_ids):
            when = self.lost(*self.kinds[message_id])
            if when == "before":
                continue
            came = list(super().pull_messages([message_id]))
            replies += [] if when == "after" else came
        return replies


def nobody(site: str, kind: str, times: int) -> str | None:
    return None


def play(
    folder: Path,
    study: Study = STUDY,
    lost: Lost = nobody,
    kill: tuple[str, int] | None = None,
    roster: Callable[[Path], Roster | None] = roster_of,
) -> tuple[State, RunFolder, SteppedGrid]:
    run = RunFolder(folder / "toy") if (folder / "toy").exists() else new_run(folder, study, FLOATS)
    configs = dict(enumerate(with_members(run.path, nodes(SITES, folder)).values(), start=1))
    clock, presence = Clock(), Presence({s: i for i, s in enumerate(SITES, start=1)})
    grid = SteppedGrid(configs, clock, lost, kill)
    setting = Setting(
        grid, run, lambda: presence, Inline(), clock, clock.sleep, poll_s=0.5, roster=lambda: roster(run.path)
    )
    return carry_out(setting), run, grid


def at(*lost: tuple[str, str, str]) -> Lost:
    """Sites that are lost, once and for all, at a step: (site, kind, before or after)."""
    order = ("train", *STEPS)

    def when(site: str, kind: str, times: int) -> str | None:
        for one, step, how in lost:
            if site == one and kind in order and order.index(kind) >= order.index(step):
                return how if kind == step else "before"
        return None

    return when


def mean(*sites: str) -> float:
    """What the bias becomes: 0.5, and the mean of the sites' moves by their examples."""
    weight = sum(LEARNER.examples[s] for s in sites)
    return 0.5 + sum(LEARNER.examples[s] * LEARNER.moves[s] for s in sites) / weight


def line(run: RunFolder, number: int = 1) -> dict[str, Any]:
    return next(x for x in read_lines(run.metrics) if x["round"] == number and not x.get("final"))


def bias(run: RunFolder, number: int = 1) -> np.ndarray:
    return load(run.weights(number))["body.bias"]


def test_a_run_through_secure_sums_ends_with_the_weights_of_the_plain_one(quick_folder):
    plain = replace(STUDY, protect=Protect(), rounds=replace(STUDY.rounds, count=2), evaluate=Evaluate(every=0))
    runs = {}
    for name, study in (("plain", plain), ("secure", replace(plain, protect=SECURE))):
        run = new_run(quick_folder / name, study, FLOATS)
        run_local(run.path, nodes(SITES, quick_folder / name), toy_app(LEARNER))
        runs[name] = load(run.weights(2))
    for tensor, expected in runs["plain"].items():
        np.testing.assert_allclose(runs["secure"][tensor], expected, atol=1e-6, rtol=0)


def test_of_no_site_is_anything_known_but_that_it_is_in_the_sum(quick_folder):
    _, run, _ = play(quick_folder)
    found = line(run)
    assert found["sites"] == {}
    together = found["together"]
    assert (together["sites"], together["examples"], together["losses"]) == (list(SITES), 100, [0.75])
    final = read_lines(run.metrics)[-1]
    assert final["final"]
    assert final["sites"] == {}
    assert final["federation"]["lung"]["cases"] == 10  # two of each
    told = b"".join(p.read_bytes() for p in run.path.glob("*.json*"))
    assert b'"seconds":0' not in told.replace(b'"seconds":0.0', b"")
    for own in (b'"examples":10,', b'"examples":20,', b'"examples":64', b'"cases":2,', b'"steps":'):
        assert own not in told


def test_of_more_sites_than_one_sum_holds_some_sit_a_round_out_and_others_the_next(quick_folder, monkeypatch):
    monkeypatch.setattr(secure_round, "MOST_SITES", 3)
    two = replace(STUDY, rounds=replace(STUDY.rounds, count=2), evaluate=Evaluate(every=0, reference=False))
    _, run, _ = play(quick_folder, two)
    for number in (1, 2):
        found = line(run, number)
        inside = tuple(found["together"]["sites"])
        assert (len(inside), len(found["left_out"])) == (3, len(SITES) - 3)
        assert all(why["reason"].startswith("SUM_FULL: one sum holds 3") for why in found["left_out"].values())
        assert set(inside) | set(found["left_out"]) == set(SITES)
        if number == 1:
            np.testing.assert_allclose(bias(run), mean(*inside), atol=1e-6)
    assert line(run, 1)["left_out"] != line(run, 2)["left_out"]


def test_validation_scores_of_the_sites_are_known_together_alone(quick_folder):
    study = replace(STUDY, rounds=replace(STUDY.rounds, count=2))
    _, run, _ = play(quick_folder, study)
    assert line(run, 2)["together"]["scores"]["lung"]["cases"] == 10
    assert line(run, 2)["together"]["scores"]["lung"]["dice"] == 0.625
    assert line(run, 2)["scored_round"] == 1


@pytest.mark.parametrize(
    ("lost", "counted"),
    [
        (("c", "train", "before"), "abde"),
        (("c", "advertise", "after"), "abde"),
        (("c", "share", "after"), "abde"),
        (("c", "mask", "before"), "abde"),
        (("c", "mask", "after"), "abde"),
        (("c", "confirm", "before"), "abcde"),
        (("c", "unmask", "before"), "abcde"),
    ],
)
def test_a_site_that_is_lost_at_any_step_costs_its_update_or_nothing(quick_folder, lost, counted):
    state, run, _ = play(quick_folder, replace(STUDY, evaluate=Evaluate(every=0)), at(lost))
    assert state.cohort == tuple(counted)
    np.testing.assert_allclose(bias(run), mean(*counted), atol=1e-6)
    assert set(line(run)["left_out"]) == set(SITES) - set(counted)
    assert line(run)["together"]["attempt"] == 1


def test_when_too_few_are_left_the_round_is_attempted_again_under_another_number(quick_folder):
    def first_time(site: str, kind: str, times: int) -> str | None:
        return "after" if kind == "share" and site in "bcd" and times == 1 else None

    def until_asked_anew(site: str, kind: str, times: int) -> str | None:
        return "before" if kind == "share" and site in "bcd" and times <= 5 else None

    study = replace(STUDY, evaluate=Evaluate(every=0))
    _, run, _ = play(quick_folder / "reasked", study, first_time)  # a lost answer is asked for again: no new attempt
    assert line(run)["together"]["attempt"] == 1
    _, run, grid = play(quick_folder / "again", study, until_asked_anew)
    assert line(run)["together"]["attempt"] == 2
    assert line(run)["left_out"] == {}
    np.testing.assert_allclose(bias(run), mean(*SITES), atol=1e-6)
    assert grid.asked["a", "advertise"] == 2


def test_a_round_whose_sums_all_fail_is_paused_says_why_and_goes_on_later(quick_folder):
    gone = at(("b", "share", "before"), ("c", "share", "before"))
    study = replace(STUDY, evaluate=Evaluate(every=0))
    with pytest.raises(RoundPaused, match=r"5 secure sums failed.*3 of 4 sites needed.*Nothing was revealed"):
        play(quick_folder, study, gone)
    assert read_state(RunFolder(quick_folder / "toy")).round == 0
    _, run, _ = play(quick_folder, study)
    assert line(run)["together"]["attempt"] == 6
    np.testing.assert_allclose(bias(run), mean(*SITES), atol=1e-6)


def test_sites_that_refuse_a_step_keep_the_others_from_no_sum(quick_folder, monkeypatch):
    share = Sums.share

    def refuse(sums: Sums, adverts: Adverts) -> Sealed:
        if sums.member.name in ("d", "e"):
            raise OrderRefused("DISK_FULL", "of two sites")
        return share(sums, adverts)

    monkeypatch.setattr(Sums, "share", refuse)
    _, run, _ = play(quick_folder)
    told = line(run)
    assert (told["together"]["sites"], told["together"]["attempt"]) == (["a", "b", "c"], 2)
    assert told["left_out"] == {s: {"state": "refused", "reason": "DISK_FULL"} for s in ("d", "e")}
    np.testing.assert_allclose(bias(run), mean("a", "b", "c"), atol=1e-6)


def dealing_falsely(monkeypatch, *, to: str, by: str = "d") -> None:
    """Site `by` seals what does not open at the sites `to`."""
    share = Sums.share

    def lying(sums: Sums, adverts: Adverts) -> Sealed:
        told = share(sums, adverts)
        if sums.member.name != by:
            return told
        return replace(told, boxes={s: "0" * 188 if s in to else box for s, box in told.boxes.items()})

    monkeypatch.setattr(Sums, "share", lying)


def test_a_site_that_deals_what_does_not_open_is_accused_and_the_next_attempt_does_without_it(
    quick_folder, monkeypatch
):
    dealing_falsely(monkeypatch, to="abc")
    _, run, _ = play(quick_folder, replace(STUDY, evaluate=Evaluate(every=0)))
    told = line(run)
    assert (told["together"]["sites"], told["together"]["attempt"]) == (["a", "b", "c", "e"], 2)
    assert told["left_out"] == {"d": {"state": "rejected", "reason": "SHARE_FORGED: 3 of the others say so"}}
    np.testing.assert_allclose(bias(run), mean("a", "b", "c", "e"), atol=1e-6)


def test_where_one_site_accuses_one_other_the_sum_does_without_the_vector_of_the_one_and_names_both(
    quick_folder, monkeypatch
):
    dealing_falsely(monkeypatch, to="a")
    _, run, _ = play(quick_folder, replace(STUDY, evaluate=Evaluate(every=0)))
    told = line(run)
    assert (told["together"]["sites"], told["together"]["attempt"]) == (["b", "c", "d", "e"], 1)
    assert told["left_out"] == {"a": {"state": "refused", "reason": "SHARE_FORGED (from d)"}}


def test_of_two_sites_of_which_one_must_lie_the_next_attempt_has_neither(quick_folder, monkeypatch):
    dealing_falsely(monkeypatch, to="a")

    def until_asked_anew(site: str, kind: str, times: int) -> str | None:
        return "before" if (site, kind) == ("b", "mask") and times <= 5 else None  # so that three of four mask

    _, run, _ = play(quick_folder, replace(STUDY, evaluate=Evaluate(every=0)), until_asked_anew)
    told = line(run)
    assert told["together"]["sites"] == ["b", "c", "e"]
    assert told["left_out"] == {
        "a": {"state": "refused", "reason": "SHARE_FORGED (from d)"},
        "d": {"state": "rejected", "reason": "SHARE_FORGED: 1 of the others say so"},
    }


def test_a_site_that_deals_shares_of_no_secret_of_its_own_ends_the_run_and_is_named(quick_folder, monkeypatch):
    from fedclient import secagg

    share = secagg.share

    def lying(state, member, message, random_bytes):
        false = replace(state, secret="11" * 32) if member.name == "d" else state
        return share(false, member, message, random_bytes)

    monkeypatch.setattr(secagg, "share", lying)
    with pytest.raises(SumAborted, match=r"'d' dealt shares of another secret.*another seed without d") as aborted:
        play(quick_folder, replace(STUDY, evaluate=Evaluate(every=0)))
    assert aborted.value.culprits == ("d",)


def test_fewer_sites_than_the_quorum_never_make_a_sum(quick_folder):
    gone = at(*((site, "train", "before") for site in "cde"))
    with pytest.raises(RoundPaused, match="2 of 3 sites needed"):
        play(quick_folder, STUDY, gone)
    assert not list((quick_folder / "toy").rglob("sum-*"))


def test_once_the_survivors_are_told_the_coordinator_waits_for_shares_and_then_ends_the_same_sum(quick_folder):
    study = replace(STUDY, evaluate=Evaluate(every=0))
    with pytest.raises(RoundPaused, match="3 of 4 sites needed"):
        play(quick_folder, study, at(("b", "unmask", "before"), ("c", "unmask", "before")))
    assert read_progress(RunFolder(quick_folder / "toy"))["phase"] == "paused"
    _, run, grid = play(quick_folder, study)
    assert line(run)["together"]["attempt"] == 1
    assert ("a", "train") not in grid.asked  # nothing is trained again
    assert ("a", "mask") not in grid.asked
    np.testing.assert_allclose(bias(run), mean(*SITES), atol=1e-6)


@pytest.mark.parametrize("step", ["train", *STEPS])
@pytest.mark.parametrize("nth", [0, 2])
def test_a_coordinator_that_is_killed_at_any_step_goes_on_to_the_same_weights(quick_folder, step, nth):
    study = replace(STUDY, evaluate=Evaluate(every=0))
    with pytest.raises(Killed):
        play(quick_folder, study, kill=(step, nth))
    _, run, _ = play(quick_folder, study)
    np.testing.assert_allclose(bias(run), mean(*SITES), atol=1e-6)
    begun_anew = step in ("advertise", "share", "mask")
    assert line(run)["together"]["attempt"] == (2 if begun_anew else 1)
    assert not (run.path / "sum").exists()


def test_a_killed_coordinator_sends_the_confirmations_that_it_had_sent_though_more_could_be_had(quick_folder):
    study = replace(STUDY, evaluate=Evaluate(every=0))
    with pytest.raises(Killed):
        play(quick_folder, study, at(("e", "confirm", "before")), kill=("unmask", 2))
    _, run, grid = play(quick_folder, study)
    assert ("e", "confirm") not in grid.asked
    np.testing.assert_allclose(bias(run), mean(*SITES), atol=1e-6)


@dataclass(frozen=True)
class Doctor:
    """A toy that tells the sick from the well, too sure of itself."""

    toy: ToyLearner = LEARNER

    def learn(self, *words: Any) -> Learned:
        return self.toy.learn(*words)

    def holding(self, *words: Any) -> Holding:
        return self.toy.holding(*words)

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> dict[str, ClassCounts]:
        return {"sick": answers_of(split)}


def answers_of(split: Split) -> ClassCounts:
    truth = np.arange(24) % 3 > 0
    logits = np.where(truth, 1.0, -1.0) + np.linspace(-2, 2, 24)
    return class_counts(1 / (1 + np.exp(-(3.0 if split == "val" else 2.0) * logits)), truth, truth)


def test_probabilities_are_calibrated_by_the_validation_patients_of_all_sites_together(quick_folder):
    task = Task(kind="classification", labels=("sick",), loss="bce")
    study = replace(STUDY, task=task, model=Model(name="resnet18"))
    run = new_run(quick_folder, study, FLOATS)
    run_local(run.path, nodes(SITES, quick_folder), toy_app(Doctor()))
    final = read_lines(run.metrics)[-1]
    told = final["calibration"]["sick"]
    whole = total(answers_of("val") for _ in SITES)
    assert isinstance(whole, ClassCounts)
    assert told["temperature"] == pytest.approx(temperature(whole), abs=1e-6)
    assert (told["cases"], final["sites"], facts(run)["calibration"]["sick"]) == (5 * 24, {}, told)
    assert write_report(run).read_text().count("all sites together") >= 2  # the reliability curve is theirs


def test_the_sites_own_models_have_one_figure_of_all_cases_together(quick_folder):
    _, run, _ = play(quick_folder)
    *rounds, final = read_lines(run.metrics)
    own = {"lung": row_of(counts([0.75] * 12, 1))}
    final["together"]["personalised"] = own
    rounds[0]["together"]["personalised"] = own
    run.metrics.write_text("".join(json.dumps(each) + "\n" for each in (*rounds, final)))
    told = facts(run)
    assert told["test"]["lung"]["personalised_all_cases"]["value"] == 0.75
    assert told["rounds"][0]["together"]["personalised"]["lung"]["dice"] == 0.75
    assert "its own model" in write_report(run).read_text()


def test_a_killed_final_evaluation_is_summed_once(quick_folder):
    confirms = len(SITES) + 1  # of the round, then the second of the evaluation
    with pytest.raises(Killed):
        play(quick_folder, kill=("confirm", confirms))
    play(quick_folder)
    finals = [x for x in read_lines(quick_folder / "toy" / "metrics.jsonl") if x.get("final")]
    assert [x["federation"]["lung"]["cases"] for x in finals] == [10]


def test_a_roster_that_changes_during_a_sum_ends_the_attempt_and_the_next_is_on_the_new_one(quick_folder):
    looked = []

    def changing(path: Path) -> Roster | None:
        looked.append(1)
        found = roster_of(path)
        assert found is not None
        return replace(found, epoch=2) if len(looked) in (3, 4) else found

    _, run, _ = play(quick_folder, replace(STUDY, evaluate=Evaluate(every=0)), roster=changing)
    assert line(run)["together"]["attempt"] == 3
    np.testing.assert_allclose(bias(run), mean(*SITES), atol=1e-6)


def test_a_site_that_masks_something_else_spoils_the_sum_which_is_thrown_away(quick_folder, monkeypatch):
    from fedserver import courier

    honest = courier.Inline.vector

    def lying(self, site, reply, message):
        vector = honest(self, site, reply, message)
        return vector + np.uint8(1) if site == "c" else vector

    monkeypatch.setattr(courier.Inline, "vector", lying)
    with pytest.raises(SumAborted, match=r"one of a, b, c, d, e has sent.*another seed on a roster without") as aborted:
        play(quick_folder)
    assert aborted.value.code == "SUM_MASK_RESIDUE"
    assert read_state(RunFolder(quick_folder / "toy")).round == 0


def test_a_site_that_spoils_the_sum_of_the_last_scores_costs_them_and_not_the_run(quick_folder, monkeypatch):
    from fedserver import courier

    honest = courier.Inline.vector

    def lying(self, site, reply, message):
        vector = honest(self, site, reply, message)
        return vector + np.uint8(1) if site == "c" and lies else vector

    lies = False

    def roster(path: Path) -> Roster | None:
        nonlocal lies
        lies = read_state(RunFolder(path)).round == 1
        return roster_of(path)

    monkeypatch.setattr(courier.Inline, "vector", lying)
    state, run, _ = play(quick_folder, roster=roster)
    final = read_lines(run.metrics)[-1]
    assert (state.round, final["final"], final["federation"]) == (1, True, {"lung": None})
    assert final["left_out"]["c"]["reason"] == "SUM_MASK_RESIDUE: the sum of the scores"
    assert (facts(run)["finished"], facts(run)["test"]["lung"]["all_cases"]) == (True, None)


def test_a_ring_of_24_bits_sends_three_quarters_and_gives_the_mean_to_its_own_resolution(quick_folder):
    sent = {}
    for bits in (24, 32):
        protect = Protect(secure_aggregation=SecureAggregation(clip=8.0, most_examples=64, ring_bits=bits))
        study = replace(STUDY, protect=protect, evaluate=Evaluate(every=0))
        _, run, _ = play(quick_folder / str(bits), study)
        whole = 5 * 64 / sum(LEARNER.examples.values())  # what the bound on the weights costs
        np.testing.assert_allclose(bias(run), mean(*SITES), atol=5 / 2 * 8.0 * 2.0 ** (1 - bits) * whole + 1e-6)
        assert line(run)["together"]["clipped"] == 0
        sent[bits] = line(run)["bytes_up"]
    assert 4 * sent[24] == 3 * sent[32]


def test_uniform_weighting_tells_no_number_of_examples_at_all(quick_folder):
    study = replace(STUDY, strategy=Strategy(weighting="uniform"), evaluate=Evaluate(every=0))
    _, run, _ = play(quick_folder, study)
    np.testing.assert_allclose(bias(run), 0.5 + (1 + 2 - 3 + 0.5 + 0) / 5, atol=1e-6)
    assert line(run)["together"]["examples"] is None


def test_a_site_with_more_examples_than_the_study_counts_weighs_as_so_many(quick_folder):
    protect = Protect(secure_aggregation=SecureAggregation(clip=8.0, most_examples=10))
    _, run, _ = play(quick_folder, replace(STUDY, protect=protect, evaluate=Evaluate(every=0)))
    capped = {s: min(n, 10) for s, n in LEARNER.examples.items()}
    due = 0.5 + sum(capped[s] * LEARNER.moves[s] for s in SITES) / sum(capped.values())
    np.testing.assert_allclose(bias(run), due, atol=1e-6)


def test_what_is_clipped_is_counted(quick_folder):
    protect = Protect(secure_aggregation=SecureAggregation(clip=1.0, most_examples=64))
    _, run, _ = play(quick_folder, replace(STUDY, protect=protect, evaluate=Evaluate(every=0)))
    assert line(run)["together"]["clipped"] == 2 * 16  # b and c move all 16 weights by more than 1
