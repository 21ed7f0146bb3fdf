"""Rounds against a clock and a grid with a script: who is waited for, what is counted, what is told."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.common.constant import ErrorCode

from fedserver.checkpoint import RunFolder, State, read_progress, read_state
from fedserver.cohort import Presence, choose
from fedserver.conversation import MOST_ATTEMPTS, _is_due
from fedserver.courier import Inline
from fedserver.rounds import carry_out
from fedserver.setting import Seat, Setting
from shared_models.errors import RoundPaused, StateInvalid, WeightsInvalid
from shared_models.files import read_lines
from shared_models.study import Evaluate, Rounds, Strategy, Study
from shared_models.weights import InMemory, load
from shared_models.wire import read_order
from tests.toys import Clock, Rubbish, ScriptedGrid, ToyLearner, new_run, nodes, toy_app

STUDY = Study(name="toy", rounds=Rounds(count=3, quorum=2, deadline_s=100, pause_s=50, gather_s=5))
SITES = ("east", "north", "south")


def play(
    tmp_path: Path,
    study: Study = STUDY,
    learner: ToyLearner | None = None,
    away: Mapping[str, str] | None = None,
    delays: Mapping[str, float] | None = None,
    errors: Mapping[tuple[str, int], int] | None = None,
    presence: Callable[[Clock], Presence] | None = None,
    bounded: bool = True,
    revoked: Callable[[Clock], Mapping[str, str]] = lambda clock: {},
) -> tuple[State, RunFolder, Clock, ScriptedGrid]:
    """One run over SITES, as the script says."""
    clock = Clock()
    numbers = {site: i for i, site in enumerate(SITES, start=1)}
    configs = {numbers[s]: c for s, c in nodes(SITES, tmp_path).items()}
    grid = ScriptedGrid(toy_app(learner), configs, clock, delays, errors)
    here = Presence({s: i for s, i in numbers.items() if s not in (away or {})}, away or {})
    folder = RunFolder(tmp_path / "toy") if (tmp_path / "toy").exists() else new_run(tmp_path, study)
    who = (lambda: presence(clock)) if presence else (lambda: here)
    setting = Setting(grid, folder, who, Inline(), clock, clock.sleep, poll_s=0.5, reask_s=1000.0, bounded=bounded)
    setting = replace(setting, revoked=lambda: revoked(clock))
    return carry_out(setting), folder, clock, grid


def line(folder: RunFolder, round_number: int) -> dict[str, Any]:
    return next(x for x in read_lines(folder.metrics) if x["round"] == round_number and not x.get("final"))


def test_the_weights_move_by_the_mean_weighted_by_examples(tmp_path):
    learner = ToyLearner(
        moves={"east": 1.0, "north": 2.0, "south": 4.0}, examples={"east": 10, "north": 30, "south": 10}
    )
    state, folder, _, _ = play(tmp_path, replace(STUDY, rounds=replace(STUDY.rounds, count=1)), learner)
    weights = load(folder.weights(1))
    np.testing.assert_allclose(weights["body.bias"], 0.5 + (10 * 1 + 30 * 2 + 10 * 4) / 50, rtol=1e-6)
    assert weights["steps"].tolist() == [9]
    assert weights["steps"].dtype == np.int64
    assert state.cohort == SITES


def test_uniform_weighting_forgets_how_many_examples_a_site_has(tmp_path):
    learner = ToyLearner(moves={"east": 1.0, "north": 2.0, "south": 6.0}, examples={"east": 1000})
    study = replace(STUDY, rounds=replace(STUDY.rounds, count=1), strategy=replace(STUDY.strategy, weighting="uniform"))
    _, folder, _, _ = play(tmp_path, study, learner)
    np.testing.assert_allclose(load(folder.weights(1))["body.bias"], 0.5 + 3.0, rtol=1e-6)


def test_a_site_that_never_joins_is_named_and_not_waited_for(tmp_path):
    state, folder, clock, _ = play(tmp_path, away={"south": "was invited and has not joined"})
    assert state.round == 3
    assert clock.now - 1000 < 20
    assert line(folder, 1)["left_out"]["south"] == {"state": "away", "reason": "was invited and has not joined"}
    assert line(folder, 1)["bytes_down"] == 2 * (12 * 4 + 4 * 4 + 8), "no weights were sent to it"


def test_a_slow_site_ends_at_the_deadline_and_is_named_late(tmp_path):
    study = replace(STUDY, rounds=replace(STUDY.rounds, count=1), evaluate=Evaluate(every=0))
    _, folder, clock, _ = play(tmp_path, study, delays={"north": 1e6})
    assert 100 <= clock.now - 1000 <= 105
    assert line(folder, 1)["left_out"]["north"]["state"] == "late"
    assert set(line(folder, 1)["sites"]) == {"east", "south"}


def test_in_a_simulation_no_site_is_late_nor_asked_twice_however_long_the_machine_takes(tmp_path):
    study = replace(STUDY, rounds=replace(STUDY.rounds, count=1), evaluate=Evaluate(every=0))
    _, folder, _clock, grid = play(tmp_path, study, delays={"north": 1200.0, "south": 2500.0}, bounded=False)
    assert set(line(folder, 1)["sites"]) == set(SITES)
    assert grid.asked == {"east": 1, "north": 1, "south": 1}


@pytest.mark.parametrize("bounded", [True, False])
def test_a_site_whose_node_goes_away_each_time_is_left_out_before_the_deadline(tmp_path, bounded):
    study = replace(STUDY, rounds=replace(STUDY.rounds, count=1), evaluate=Evaluate(every=0))
    died = {("north", attempt): ErrorCode.CLIENT_APP_CRASHED for attempt in range(1, 20)}
    _, folder, clock, grid = play(tmp_path, study, errors=died, bounded=bounded)
    assert line(folder, 1)["left_out"] == {
        "north": {"state": "failed", "reason": "its node went away 6 times while working"}
    }
    assert grid.asked["north"] == 6
    assert clock.now - 1000 < 20


def test_a_site_revoked_in_mid_round_is_not_waited_for_and_its_update_not_counted(tmp_path):
    words = {"north": "was revoked on 2026-11-26 02:40 UTC"}

    def at_30(clock: Clock) -> Mapping[str, str]:
        return words if clock.now >= 1030 else {}

    study = replace(STUDY, rounds=replace(STUDY.rounds, count=1), evaluate=Evaluate(every=0))
    _, folder, clock, _ = play(tmp_path / "waits", study, delays={"north": 1e6}, revoked=at_30)
    assert 30 <= clock.now - 1000 <= 32
    assert line(folder, 1)["left_out"] == {"north": {"state": "revoked", "reason": words["north"]}}
    _, folder, _, _ = play(tmp_path / "answers", study, revoked=lambda clock: words)  # it answers all the same
    assert set(line(folder, 1)["sites"]) == {"east", "south"}
    assert line(folder, 1)["left_out"]["north"]["state"] == "revoked"


def test_a_late_update_of_a_revoked_site_is_not_counted(tmp_path):
    learner = ToyLearner(moves={"east": 1.0, "north": 2.0, "south": 4.0})
    rounds = replace(STUDY.rounds, count=2, late="next", quorum=1)
    study = replace(STUDY, rounds=rounds, evaluate=Evaluate(every=0))

    def after_the_first(clock: Clock) -> Mapping[str, str]:
        return {"south": "was revoked"} if clock.now > 1101 else {}

    _, folder, _, _ = play(tmp_path, study, learner, delays={"south": 101.5}, revoked=after_the_first)
    assert set(line(folder, 1)["sites"]) == {"east", "north"}
    assert set(line(folder, 2)["sites"]) == {"east", "north"}


def test_without_a_quorum_the_run_pauses_says_for_whom_and_goes_on_later(tmp_path):
    with pytest.raises(RoundPaused, match=r"1 of 2 sites needed have answered.*north: is working on it"):
        play(tmp_path, delays={"north": 1e6, "south": 1e6})
    progress = read_progress(RunFolder(tmp_path / "toy"))
    assert progress["phase"] == "paused"
    assert progress["sites"]["north"]["state"] == "asked"
    state, _, _, _ = play(tmp_path)
    assert state.round == 3


def test_a_node_that_dies_is_asked_again_and_counted_once(tmp_path):
    _, folder, _, grid = play(tmp_path, errors={("east", 1): ErrorCode.NODE_UNAVAILABLE})
    assert line(folder, 1)["sites"]["east"]["attempt"] == 2
    np.testing.assert_allclose(load(folder.weights(3))["body.bias"], 3.5)
    assert grid.asked["east"] == 5  # three rounds, the one again, the final evaluation


def test_a_client_error_leaves_the_site_out_with_its_reason(tmp_path):
    study = replace(STUDY, rounds=replace(STUDY.rounds, count=1))
    _, folder, clock, _ = play(tmp_path, study, errors={("east", 1): ErrorCode.CLIENT_APP_RAISED_EXCEPTION})
    assert line(folder, 1)["left_out"]["east"] == {"state": "failed", "reason": "CLIENT_ERROR"}
    assert clock.now - 1000 < 20


def nan(trained: dict[str, np.ndarray]) -> None:
    trained["body.bias"] = np.full(4, np.nan, np.float32)


def test_a_site_whose_training_diverges_refuses_to_send_it(tmp_path):
    _, folder, _, _ = play(tmp_path, learner=ToyLearner(spoil={"north": nan}))
    assert line(folder, 1)["left_out"]["north"] == {"state": "refused", "reason": "TRAINING_DIVERGED"}
    np.testing.assert_allclose(load(folder.weights(3))["body.bias"], 3.5)


def test_a_site_that_appears_in_mid_round_is_asked_and_counted(tmp_path):
    def presence(clock: Clock) -> Presence:
        here = {"east": 1, "north": 2}
        return Presence(here | {"south": 3}) if clock.now > 1020 else Presence(here, {"south": "is not online"})

    study = replace(STUDY, rounds=replace(STUDY.rounds, count=1))
    _, folder, _, _ = play(tmp_path, study, delays={"east": 40.0}, presence=presence)
    assert set(line(folder, 1)["sites"]) == set(SITES)


def test_a_quorum_that_cannot_be_reached_any_more_pauses_at_once(tmp_path):
    raised = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    with pytest.raises(RoundPaused, match=r"1 of 2 sites needed .* north: CLIENT_ERROR. south: CLIENT_ERROR."):
        play(tmp_path, errors={("north", 1): raised, ("south", 1): raised})


def test_fewer_sites_than_the_quorum_never_make_a_round_and_one_that_joins_meanwhile_does(tmp_path):
    def alone(clock: Clock) -> Presence:
        return Presence({"east": 1})

    with pytest.raises(RoundPaused, match=r"1 of 2 sites needed have answered after 15\d s"):
        play(tmp_path / "alone", presence=alone)

    def joined(clock: Clock) -> Presence:
        return Presence({"east": 1} | ({"north": 2} if clock.now > 1060 else {}))

    state, folder, _, _ = play(tmp_path / "joined", presence=joined)
    assert state.round == 3
    assert set(line(folder, 1)["sites"]) == {"east", "north"}


def test_a_late_update_is_dropped_or_counted_at_its_staleness_weight(tmp_path):
    rounds = Rounds(count=2, quorum=2, deadline_s=30, gather_s=0, late="next", late_weight=0.5)
    learner = ToyLearner(moves={"east": 0.0, "north": 0.0, "south": 3.0})
    study = replace(STUDY, rounds=rounds, evaluate=Evaluate(every=0))
    _, folder, _, _ = play(tmp_path / "next", study, learner, delays={"south": 40.0})
    assert "south (round 1)" in line(folder, 2)["sites"]
    # round 2: east 10 x 0, north 10 x 0, south of round 1 at 5 x 3, and south's own answer is late again
    np.testing.assert_allclose(load(folder.weights(2))["body.bias"], 0.5 + 15 / 25, rtol=1e-6)
    study = replace(study, rounds=replace(rounds, late="drop"))
    _, folder, _, _ = play(tmp_path / "drop", study, learner, delays={"south": 40.0})
    np.testing.assert_allclose(load(folder.weights(2))["body.bias"], 0.5)


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    _, whole, _, _ = play(tmp_path / "whole")
    with pytest.raises(RoundPaused):
        play(tmp_path / "cut", delays={"north": 1e6, "south": 1e6})
    _, cut, _, _ = play(tmp_path / "cut")
    assert read_state(whole).weights_sha256 == read_state(cut).weights_sha256
    assert whole.weights(3).read_bytes() == cut.weights(3).read_bytes()


def test_the_cohort_is_a_function_of_seed_and_round_and_not_of_who_is_online():
    study = replace(STUDY, rounds=replace(STUDY.rounds, cohort=0.5, quorum=1))
    everyone = Presence({f"s{i}": i for i in range(10)})
    some = Presence({f"s{i}": i for i in range(5)}, {f"s{i}": "is not online" for i in range(5, 10)})
    chosen = [choose(study, r, everyone) for r in range(1, 20)]
    assert chosen == [choose(study, r, some) for r in range(1, 20)]
    assert {len(c) for c in chosen} == {5}
    assert len(set(chosen)) > 10


def test_a_site_that_was_invited_and_has_not_joined_takes_no_place_of_a_part_of_the_sites():
    study = replace(STUDY, rounds=replace(STUDY.rounds, cohort=0.5, quorum=1))
    joined = {f"s{i}": i for i in range(4)}
    invited = {f"t{i}": "was invited and has not joined" for i in range(6)}
    chosen = [choose(study, r, Presence(joined, invited, frozenset(invited))) for r in range(1, 20)]
    assert chosen == [choose(study, r, Presence(joined)) for r in range(1, 20)]
    assert {len(c) for c in chosen} == {2}


def test_seven_in_a_hundred_sites_are_seven():
    assert 0.07 * 100 > 7
    study = replace(STUDY, rounds=replace(STUDY.rounds, cohort=0.07, quorum=1))
    assert len(choose(study, 1, Presence({f"s{i}": i for i in range(100)}))) == 7


def test_the_final_line_holds_the_test_scores_of_every_site(tmp_path):
    _, folder, _, _ = play(tmp_path)
    final = read_lines(folder.metrics)[-1]
    assert final["final"]
    assert set(final["sites"]) == set(SITES)
    assert final["federation"]["lung"]["cases"] == 6
    assert final["federation"]["lung"]["dice"] == 0.625


def test_a_reply_that_flower_cannot_read_leaves_out_its_site_alone(tmp_path):
    numbers = {site: i for i, site in enumerate(SITES, start=1)}
    clock = Clock()
    grid = Rubbish(toy_app(), {numbers[s]: c for s, c in nodes(SITES, tmp_path).items()}, clock)
    folder = new_run(tmp_path, replace(STUDY, rounds=replace(STUDY.rounds, count=1), evaluate=Evaluate(every=0)))
    carry_out(Setting(grid, folder, lambda: Presence(numbers), Inline(), clock, clock.sleep, poll_s=0.5))
    assert set(line(folder, 1)["sites"]) == {"east", "south"}
    assert grid.asked == {"east": 1, "north": MOST_ATTEMPTS, "south": 1}
    assert line(folder, 1)["left_out"]["north"]["reason"].startswith("MESSAGE_UNREADABLE")


def test_a_second_answer_after_the_round_is_taken_away_and_never_counted(tmp_path):
    dropped = []

    class Noting:
        inline = Inline()

        def __getattr__(self, name):
            return getattr(self.inline, name)

        def drop(self, site, reply):
            dropped.append((site, reply.round, reply.attempt))

    clock = Clock()
    numbers = {site: i for i, site in enumerate(SITES, start=1)}
    configs = {numbers[s]: c for s, c in nodes(SITES, tmp_path).items()}
    grid = ScriptedGrid(toy_app(), configs, clock, delays={"east": 40.0})
    rounds = replace(STUDY.rounds, count=2, late="next")
    folder = new_run(tmp_path, replace(STUDY, rounds=rounds))
    setting = Setting(grid, folder, lambda: Presence(numbers), Noting(), clock, clock.sleep, poll_s=0.5, reask_s=30.0)
    carry_out(setting)
    assert ("east", 1, 2) in dropped
    assert set(line(folder, 2)["sites"]) == set(SITES)
    np.testing.assert_allclose(load(folder.weights(2))["body.bias"], 2.5)


# Rules over all updates at once

MEDIAN = replace(
    STUDY,
    rounds=replace(STUDY.rounds, quorum=3),
    strategy=Strategy(robust="median", malicious=1, weighting="uniform"),
    evaluate=Evaluate(every=0),
)
LIAR = ToyLearner(moves={"east": 1.0, "north": 2.0, "south": 60.0})


def test_a_liar_moves_the_mean_and_not_the_median_and_its_file_is_gone_with_the_round(tmp_path):
    _, folder, _, _ = play(tmp_path, MEDIAN, LIAR)
    np.testing.assert_allclose(load(folder.weights(3))["body.bias"], 0.5 + 3 * 2.0, rtol=1e-6)
    assert load(folder.weights(3))["steps"].tolist() == [13]
    assert not folder.spool.exists()
    assert set(line(folder, 1)["sites"]) == set(SITES)


def test_too_few_updates_for_a_rule_pause_the_run_and_it_goes_on_to_the_same_weights(tmp_path):
    _, whole, _, _ = play(tmp_path / "whole", MEDIAN, LIAR)
    with pytest.raises(RoundPaused, match=r"2 of 3 sites needed have answered.*south: is working on it"):
        play(tmp_path / "cut", MEDIAN, LIAR, delays={"south": 1e6})
    assert {p.stem for p in (tmp_path / "cut/toy/spool").iterdir()} == {"east", "north"}
    _, cut, _, _ = play(tmp_path / "cut", MEDIAN, LIAR)
    assert whole.weights(3).read_bytes() == cut.weights(3).read_bytes()


def test_krum_tells_whose_update_it_took(tmp_path):
    study = replace(MEDIAN, strategy=replace(MEDIAN.strategy, robust="krum"), rounds=replace(STUDY.rounds, quorum=5))
    sites = ("a", "b", "c", "d", "e")
    clock, numbers = Clock(), {site: i for i, site in enumerate(sites, start=1)}
    learner = ToyLearner(moves={"a": 9.0, "b": 1.0, "c": 1.25, "d": 1.5, "e": 3.0})
    grid = ScriptedGrid(toy_app(learner), {numbers[s]: c for s, c in nodes(sites, tmp_path).items()}, clock)
    folder = new_run(tmp_path, study)
    carry_out(Setting(grid, folder, lambda: Presence(numbers), Inline(), clock, clock.sleep, poll_s=0.5))
    assert [line(folder, n)["used"] for n in (1, 2, 3)] == [["c"]] * 3
    np.testing.assert_allclose(load(folder.weights(3))["body.bias"], 0.5 + 3 * 1.25, rtol=1e-6)


def test_a_late_update_has_no_second_vote_beside_the_sites_own(tmp_path):
    rounds = Rounds(count=2, quorum=2, deadline_s=30, gather_s=0, late="next", late_weight=0.5)
    study = replace(MEDIAN, rounds=rounds, strategy=Strategy(robust="norm_bound", norm_bound=1e6, weighting="uniform"))
    learner = ToyLearner(moves={"east": 0.0, "north": 0.0, "south": 3.0})
    _, folder, _, _ = play(tmp_path / "late", study, learner, delays={"south": 40.0})
    assert set(line(folder, 2)["sites"]) == {"east", "north", "south (round 1)"}
    np.testing.assert_allclose(load(folder.weights(2))["body.bias"], 0.5 + 0.5 * 3 / 2.5, rtol=1e-6)
    assert read_state(folder).counted == {"east": 2, "north": 2, "south": 1}
    _, folder, _, _ = play(tmp_path / "both", study, learner, delays={"south": 29.9, "east": 55.0})
    votes = [key for key in line(folder, 2)["sites"] if key.startswith("east")]
    assert len(votes) <= 1


def test_a_late_update_that_the_sites_own_has_overtaken_is_said_not_to_count(tmp_path):
    class Overtaken(ScriptedGrid):
        """South's answer to round 1 is there at 40 s; round 2 lasts from 30 s to 45 s, for east is slow in it."""

        def push_messages(self, messages):
            listed = list(messages)
            ids = list(super().push_messages(listed))
            for message_id, message in zip(ids, listed, strict=True):
                at, site, sent = self.sent[message_id]
                after = {(1, "south"): 40.0, (2, "east"): 15.0}.get((read_order(message).round, site), 0.0)
                self.sent[message_id] = at + after, site, sent
            return ids

    rounds = Rounds(count=2, quorum=2, deadline_s=30, gather_s=0, late="next", late_weight=0.5)
    study = replace(MEDIAN, rounds=rounds, strategy=Strategy(robust="norm_bound", norm_bound=1e6, weighting="uniform"))
    clock, numbers = Clock(), {site: i for i, site in enumerate(SITES, start=1)}
    learner = ToyLearner(moves={"east": 0.0, "north": 0.0, "south": 3.0})
    grid = Overtaken(toy_app(learner), {numbers[s]: c for s, c in nodes(SITES, tmp_path).items()}, clock)
    folder = new_run(tmp_path, study)
    carry_out(Setting(grid, folder, lambda: Presence(numbers), Inline(), clock, clock.sleep, poll_s=0.5, reask_s=1e3))
    assert set(line(folder, 2)["sites"]) == set(SITES)
    np.testing.assert_allclose(load(folder.weights(2))["body.bias"], 0.5 + 3.0 / 3, rtol=1e-6)
    south = read_progress(folder)["sites"]["south"]
    assert south["state"] == "counted"
    assert south["reason"].startswith("its late update was left out: SUPERSEDED")


def test_a_late_update_that_breaks_off_within_the_sum_does_not_stay_in_it(tmp_path):
    class Torn(InMemory):
        """Reads well once, when it is doubted, and ends early when it is added."""

        def blocks(self, name):
            read.append(name)
            if read.count("body.weight") == 2:
                raise WeightsInvalid("ends within 'body.weight'")
            return super().blocks(name)

    class Late(Inline):
        def collect(self, site, reply, message):
            whole = super().collect(site, reply, message)
            assert isinstance(whole, InMemory)
            return Torn(whole.arrays) if (site, reply.round) == ("south", 1) else whole

    read: list[str] = []
    clock, numbers = Clock(), {site: i for i, site in enumerate(SITES, start=1)}
    grid = ScriptedGrid(
        toy_app(), {numbers[s]: c for s, c in nodes(SITES, tmp_path).items()}, clock, {"south": 40.0, "east": 20.0}
    )
    folder = new_run(tmp_path, replace(STUDY, rounds=replace(STUDY.rounds, count=2, deadline_s=30, late="next")))
    setting = Setting(grid, folder, lambda: Presence(numbers), Late(), clock, clock.sleep, poll_s=0.5, reask_s=1e3)
    with pytest.raises(StateInvalid, match="round 2: the sum was spoilt"):
        carry_out(setting)
    assert read_state(folder).round == 1


def test_a_site_that_puts_its_answer_off_for_days_is_asked_again_every_two_minutes():
    pending = Seat("pending", asked_at=1000.0, put_off=2000)
    assert not _is_due(pending, 1119.0, 60.0)
    assert _is_due(pending, 1120.0, 60.0)


def test_an_order_tells_each_site_which_of_its_updates_was_counted_last(tmp_path):
    asked: list[tuple[str, int, int]] = []

    class Listening(ScriptedGrid):
        def push_messages(self, messages):
            listed = list(messages)
            for message in listed:
                order = read_order(message)
                asked.append((str(self.configs[message.metadata.dst_node_id]["site"]), order.round, order.counted))
            return super().push_messages(listed)

    clock, numbers = Clock(), {site: i for i, site in enumerate(SITES, start=1)}
    configs = {numbers[s]: c for s, c in nodes(SITES, tmp_path).items()}
    grid = Listening(toy_app(), configs, clock, errors={("south", 2): ErrorCode.CLIENT_APP_RAISED_EXCEPTION})
    folder = new_run(tmp_path, replace(STUDY, evaluate=Evaluate(every=0)))
    carry_out(Setting(grid, folder, lambda: Presence(numbers), Inline(), clock, clock.sleep, poll_s=0.5))
    assert [(r, c) for site, r, c in asked if site == "north"] == [(1, 0), (2, 1), (3, 2)]
    assert [(r, c) for site, r, c in asked if site == "south"] == [(1, 0), (2, 1), (3, 1)]


def test_progress_says_since_when_each_site_is_in_its_state_and_anew_for_each_order(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fedserver.setting.time.time", lambda: 5000.0 + now[0])
    since: dict[tuple[int, str, str], set[float]] = {}  # round, site, state -> since

    def presence(clock: Clock) -> Presence:
        now[0] = clock.now - 1000.0
        progress = read_progress(RunFolder(tmp_path / "toy"))
        for site, seat in progress.get("sites", {}).items():
            since.setdefault((progress["round"], site, seat["state"]), set()).add(seat["since"] - 5000.0)
        here = {site: i for i, site in enumerate(SITES, start=1) if site != "north" or now[0] > 20}
        return Presence(here, {"north": "is not online"})

    study = replace(STUDY, rounds=replace(STUDY.rounds, count=2, gather_s=0), evaluate=Evaluate(every=0))
    play(tmp_path, study, presence=presence, delays={"south": 30.0})
    assert {key: len(times) for key, times in since.items() if len(times) > 1} == {}, "a moment is told once"
    told = {key: next(iter(times)) for key, times in since.items()}
    assert told[1, "south", "asked"] == pytest.approx(0.0, abs=1.5)
    assert told[1, "north", "away"] == pytest.approx(0.0, abs=1.5)
    assert told[1, "north", "counted"] == pytest.approx(20.0, abs=2.5)
    assert told[2, "south", "asked"] == pytest.approx(30.0, abs=1.5)


def test_a_paused_run_says_until_when_it_waits_before_it_gives_up(tmp_path):
    told: list[tuple[float, float]] = []

    def presence(clock: Clock) -> Presence:
        progress = read_progress(RunFolder(tmp_path / "toy"))
        if progress.get("phase") == "paused":
            told.append((clock.now - 1000.0, progress["deadline_in_s"]))
        return Presence({"east": 1}, {"north": "is not online", "south": "is not online"})

    study = replace(STUDY, rounds=replace(STUDY.rounds, gather_s=0))
    with pytest.raises(RoundPaused):
        play(tmp_path, study, presence=presence)
    assert told
    for at, left in told:  # the deadline is at 100, and it gives up 50 later
        assert left == pytest.approx(150.0 - at, abs=3.0)
