"""Replies over a real gateway with real keys: what is not signed for its order counts for nothing, shuts nobody out."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from typer.testing import CliRunner

import fedserver.cli
from fedclient.policy import Policy
from fedclient.renewal import renew
from fedserver import rounds
from fedserver.checkpoint import RunFolder, State, create_run
from fedserver.conversation import MOST_ATTEMPTS
from fedserver.courier import Beside
from fedserver.lifecycle import revoke, revoked_sites
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from fedserver.signed import signed_lines
from shared_models.alarms import alarm_words
from shared_models.envelope import signed
from shared_models.errors import StateInvalid
from shared_models.files import read_lines
from shared_models.identity import identity_public_key, load_secret, new_identity_key, sign
from shared_models.study import Evaluate, Rounds, Study, sha256
from shared_models.weights import Tensors, load
from shared_models.wire import Order, Reply, SignedReply, read_order, read_reply, read_signed, write_reply
from tests.edge import Edge, running_edge
from tests.hospitals import Hospitals, after
from tests.toys import WEIGHTS, Rubbish, ScriptedGrid, ToyLearner, toy_app

INSIDE = Policy(approval="inside-policy")
STUDY = Study(name="toy", rounds=Rounds(count=1, quorum=2, deadline_s=100, gather_s=0), evaluate=Evaluate(every=0))
LEARNER = ToyLearner(moves={"north": 1.0, "south": 3.0, "west": 8.0})
Lie = Callable[[Message, Message, Order], Message]  # the order's message, the honest reply, the order


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge") / "federation") as running:
        yield running


@pytest.fixture
def hospitals(edge: Edge, quick_folder: Path) -> Hospitals:
    made = Hospitals(edge, quick_folder / "sites")
    for name in ("north", "south", "west"):
        made.join(name, INSIDE)
    return made


@dataclass
class Lying:
    """The honest client; north's replies are first handed to `lie`, as often as `times`."""

    lie: Lie
    times: int = 1
    orders: list[Order] = field(default_factory=list)
    app: ClientApp = field(default_factory=ClientApp)

    def __post_init__(self) -> None:
        honest = toy_app(LEARNER)

        def answer(message: Message, context: Context) -> Message:
            order, reply = read_order(message), honest(message, context)
            if context.node_config["site"] != "north":
                return reply
            self.orders.append(order)
            return self.lie(message, reply, order) if len(self.orders) <= self.times else reply

        self.app.train()(answer)
        self.app.evaluate()(answer)
        self.app.query()(answer)


def with_parts(message: Message, reply: Message, **parts: bytes) -> Message:
    told = read_signed(reply, "north")
    return write_reply(replace(told, **parts), message)


def forged(message: Message, reply: Message, order: Order) -> Message:
    """By somebody who has north's certificate and node key, and not its identity key."""
    return write_reply(signed(read_reply(reply, "north"), order, new_identity_key()), message)


def unsigned(message: Message, reply: Message, order: Order) -> Message:
    return with_parts(message, reply, signature=b"")


def changed(message: Message, reply: Message, order: Order) -> Message:
    facts = read_signed(reply, "north").facts
    return with_parts(message, reply, facts=facts.replace(b'"examples":10,', b'"examples":90,'))


def bare(message: Message, reply: Message, order: Order) -> Message:
    """As a release from before there were envelopes answers."""
    record = ConfigRecord({"protocol": 2, "json": read_signed(reply, "north").facts})
    return Message(RecordDict({"facts": record}), reply_to=message)


def long(message: Message, reply: Message, order: Order) -> Message:
    return with_parts(message, reply, envelope=b" " * 4096)


def foreign(message: Message, reply: Message, order: Order) -> Message:
    return Message(RecordDict({"answer": ConfigRecord({"sum": 1})}), reply_to=message)


def line(run: RunFolder) -> dict[str, Any]:
    return next(x for x in read_lines(run.metrics) if not x.get("final"))


def noted(edge: Edge, run: str, event: str) -> list[dict[str, Any]]:
    lines = read_lines(edge.federation.audit)
    return [x["facts"] for x in lines if x["event"] == event and x["facts"].get("run") == run]


def codes(edge: Edge, run: str) -> list[str]:
    found = noted(edge, run, "answer-forged")
    assert {facts["site"] for facts in found} <= {"north"}
    return [facts["why"].partition(":")[0] for facts in found]


LIES: dict[str, tuple[Lie, str]] = {
    "forged": (forged, "BAD_SIGNATURE"),
    "unsigned": (unsigned, "BAD_SIGNATURE"),
    "changed": (changed, "CONTENT_CHANGED"),
    "bare": (bare, "MESSAGE_INVALID"),
    "long": (long, "MESSAGE_INVALID"),
    "foreign": (foreign, "MESSAGE_INVALID"),
}


@pytest.mark.parametrize("name", LIES)
def test_what_is_no_answer_is_written_down_and_the_site_is_counted_with_the_honest_one_after_it(hospitals, edge, name):
    lie, code = LIES[name]
    lying = Lying(lie)
    _, run = hospitals.run(STUDY, f"once-{name}", lying.app)
    assert codes(edge, run.id) == [code]
    np.testing.assert_allclose(load(run.weights(1))["body.bias"], 0.5 + (1 + 3 + 8) / 3)
    assert line(run)["left_out"] == {}
    assert line(run)["sites"]["north"]["attempt"] == 2
    assert len({order.nonce for order in lying.orders}) == 2


def test_a_site_in_whose_name_others_answer_each_time_is_left_out_by_that_name_and_the_round_goes_on(hospitals, edge):
    _, run = hospitals.run(STUDY, "always", Lying(forged, MOST_ATTEMPTS).app)
    assert codes(edge, run.id) == ["BAD_SIGNATURE"] * MOST_ATTEMPTS
    np.testing.assert_allclose(load(run.weights(1))["body.bias"], 0.5 + (3 + 8) / 2)
    left = line(run)["left_out"]["north"]
    assert (left["state"], left["reason"].partition(":")[0]) == ("rejected", "BAD_SIGNATURE")
    assert [f["site"] for f in noted(edge, run.id, "reply-rejected")] == ["north"]


def test_the_answer_to_an_order_that_was_given_before_is_a_replay(hospitals, edge):
    first: list[SignedReply] = []

    def again(message: Message, reply: Message, order: Order) -> Message:
        first.append(read_signed(reply, "north"))
        if len(first) == 1:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "lost"), reply_to=message)
        return write_reply(first[0], message)

    _, run = hospitals.run(STUDY, "replayed", Lying(again, 2).app)
    assert codes(edge, run.id) == ["OTHER_ATTEMPT"]
    assert line(run)["sites"]["north"]["attempt"] == 3


def test_the_answer_to_the_same_attempt_of_a_process_that_was_killed_is_a_replay_by_its_nonce(hospitals, edge):
    kept: list[SignedReply] = []

    def keep(message: Message, reply: Message, order: Order) -> Message:
        kept.append(read_signed(reply, "north"))
        raise KeyboardInterrupt

    study = replace(STUDY, rounds=replace(STUDY.rounds, quorum=3))
    with pytest.raises(KeyboardInterrupt):  # the coordinator is killed in the middle of its round
        hospitals.run(study, "killed", Lying(keep).app)
    _, run = hospitals.run(study, "killed", Lying(lambda message, reply, order: write_reply(kept[0], message)).app)
    assert codes(edge, run.id) == ["REPLAYED"]
    assert set(line(run)["sites"]) == {"north", "south", "west"}


def test_work_that_was_finished_before_a_kill_is_signed_for_the_order_that_comes_again(hospitals, edge):
    lost = Lying(lambda message, reply, order: Message(Error(ErrorCode.CLIENT_APP_CRASHED, "x"), reply_to=message))
    _, run = hospitals.run(STUDY, "resumed", lost.app)
    assert codes(edge, run.id) == []
    first, second = lost.orders
    (envelope,) = [e for s, e in signed_lines(run) if s.site == "north"]
    assert (envelope.asked.attempt, envelope.asked.nonce) == (2, second.nonce)
    assert first.nonce != second.nonce
    uploads = {s["sha256"] for s in _sent(hospitals.sites["north"]) if s["kind"] == "tensors" and s["run"] == "resumed"}
    assert envelope.tensors is not None
    assert uploads == {envelope.tensors.sha256}  # trained once: the bytes are the same


def test_of_two_answers_to_two_orders_one_is_counted_and_the_other_noted_as_a_duplicate(hospitals, edge):
    run = create_run(edge.federation.runs, "twice", STUDY, WEIGHTS)
    setting = hospitals.setting(run, reask_s=30.0)
    delays = {"north": 40.0, "south": 90.0, "west": 90.0}
    grid = ScriptedGrid(toy_app(LEARNER), setting.grid._nodes, hospitals.clock, delays)
    carry_out(replace(setting, grid=grid))
    assert [f["site"] for f in noted(edge, "twice", "reply-duplicate")] == ["north"]
    assert [f["why"] for f in noted(edge, "twice", "reply-duplicate")] == ["DUPLICATE"]
    np.testing.assert_allclose(load(run.weights(1))["body.bias"], 0.5 + (1 + 3 + 8) / 3)
    assert not [p for p in (edge.blobs / "in").rglob("*") if p.is_file()]


def test_what_comes_of_a_site_that_is_counted_and_leaves_the_roster_then_takes_nothing_back(hospitals, edge):
    run = create_run(edge.federation.runs, "left", STUDY, WEIGHTS)
    setting = hospitals.setting(run, reask_s=30.0)
    delays = {"north": 40.0, "south": 90.0, "west": 90.0}
    grid = ScriptedGrid(toy_app(LEARNER), setting.grid._nodes, hospitals.clock, delays)
    leaves = after(hospitals.clock, 50.0, lambda: revoke(edge.federation, "north", "left the consortium"))
    carry_out(replace(setting, grid=grid, sleep=leaves))
    assert [f["why"] for f in noted(edge, "left", "answer-forged")] == ["NOT_ON_ROSTER"]
    assert set(line(run)["sites"]) == {"north", "south", "west"}
    np.testing.assert_allclose(load(run.weights(1))["body.bias"], 0.5 + (1 + 3 + 8) / 3)
    assert noted(edge, "left", "round-closed")[0]["counted"] == ["north", "south", "west"]


def test_a_reply_that_flower_cannot_read_is_written_down_and_takes_none_of_another_site_with_it(hospitals, edge):
    run = create_run(edge.federation.runs, "unreadable", STUDY, WEIGHTS)
    setting = hospitals.setting(run)
    grid = Rubbish(toy_app(LEARNER), setting.grid._nodes, hospitals.clock)
    carry_out(replace(setting, grid=grid))
    assert codes(edge, run.id) == ["MESSAGE_UNREADABLE"] * MOST_ATTEMPTS
    assert grid.asked == {"north": MOST_ATTEMPTS, "south": 1, "west": 1}
    assert line(run)["left_out"]["north"]["reason"].startswith("MESSAGE_UNREADABLE")
    np.testing.assert_allclose(load(run.weights(1))["body.bias"], 0.5 + (3 + 8) / 2)


def test_a_reply_of_a_site_that_has_left_the_roster_counts_for_nothing(hospitals, edge):
    def revoked(message: Message, reply: Message, order: Order) -> Message:
        revoke(edge.federation, "north", "left the consortium")
        return reply

    _, run = hospitals.run(STUDY, "revoked", Lying(revoked).app)  # this setting has not heard of it otherwise
    left = line(run)["left_out"]["north"]
    assert (left["state"], left["reason"].partition(":")[0]) == ("revoked", "NOT_ON_ROSTER")
    assert set(line(run)["sites"]) == {"south", "west"}


def test_after_a_new_identity_key_the_old_one_signs_nothing_any_more(hospitals, edge):
    old = load_secret(hospitals.sites["north"] / "keys/identity.key")

    def by_the_old(message: Message, reply: Message, order: Order) -> Message:
        renew(hospitals.sites["north"], "north", edge.address, identity=True)
        return write_reply(signed(read_reply(reply, "north"), order, old), message)

    _, run = hospitals.run(STUDY, "renewed", Lying(by_the_old).app)
    assert codes(edge, run.id) == ["BAD_SIGNATURE"]
    assert set(line(run)["sites"]) == {"north", "south", "west"}  # the next answer is signed with the new one


def told_otherwise(hospitals: Hospitals, change: Callable[[Reply], Reply]) -> Lie:
    def lie(message: Message, reply: Message, order: Order) -> Message:
        key = load_secret(hospitals.sites["north"] / "keys/identity.key")
        return write_reply(signed(change(read_reply(reply, "north")), order, key), message)

    return lie


@pytest.mark.parametrize(
    ("run", "change", "code", "words"),
    [
        ("headless", lambda r: replace(r, head=None), "HEAD_MISSING", "nothing vouches for it any more"),
        (
            "false-head",
            lambda r: replace(r, head=replace(r.head, root="0" * 64)),
            "HEAD_SIGNATURE",
            "what vouches for it is not signed by its key",
        ),
    ],
)
def test_a_site_that_keeps_its_log_from_us_is_left_out_and_raises_an_alarm(hospitals, edge, run, change, code, words):
    _, folder = hospitals.run(STUDY, run, Lying(told_otherwise(hospitals, change), MOST_ATTEMPTS).app)
    left = line(folder)["left_out"]["north"]
    assert (left["state"], left["reason"].partition(":")[0]) == ("rejected", code)
    assert set(line(folder)["sites"]) == {"south", "west"}
    assert any(f"The log of north: {words}" in sentence for sentence in alarm_words(edge.federation.audit))


def test_the_run_keeps_what_each_hospital_has_signed_and_the_log_names_it(hospitals, edge):
    _, run = hospitals.run(STUDY, "kept", toy_app(LEARNER))
    found = {s.site: (s, e) for s, e in signed_lines(run)}
    assert set(found) == {"north", "south", "west"}
    (closed,) = noted(edge, "kept", "round-closed")
    assert closed["signed"] == {site: s.sha256 for site, (s, _) in found.items()}
    assert {site: told["signed"] for site, told in line(run)["sites"].items()} == closed["signed"]
    for site, (_, envelope) in found.items():
        left = [x for x in _sent(hospitals.sites[site]) if x["run"] == "kept"]
        assert envelope.tensors is not None
        assert [x["sha256"] for x in left] == [envelope.tensors.sha256, envelope.facts.sha256]  # by its own log too
        assert (envelope.asked.run, envelope.asked.round) == ("kept", 1)
        assert envelope.asked.study_sha256 == sha256(STUDY)


def test_a_line_of_what_was_signed_that_was_edited_is_named(hospitals):
    _, run = hospitals.run(STUDY, "edited", toy_app(LEARNER))
    lines = run.signed.read_text().splitlines()
    told = json.loads(lines[1])
    told["envelope"] = told["envelope"].replace('"attempt":1', '"attempt":2')
    run.signed.write_text("\n".join([lines[0], json.dumps(told)]) + "\n")
    with pytest.raises(StateInvalid, match=r"line 2: is not as '(north|south|west)' signed it"):
        list(signed_lines(run))


def audit(edge: Edge) -> tuple[int, str]:
    """Exit code and words of `fedserver audit verify`."""
    done = CliRunner().invoke(fedserver.cli.app, ["audit", "verify", "--federation", str(edge.federation.folder)])
    return done.exit_code, " ".join(done.output.split())


def test_audit_verify_counts_what_hospitals_have_signed_and_names_a_run_that_lacks_or_changed_it(quick_folder):
    with running_edge(quick_folder / "federation") as own:
        hospitals = Hospitals(own, quick_folder / "own")
        for name in ("north", "south"):
            hospitals.join(name, INSIDE)
        _, run = hospitals.run(STUDY, "one", toy_app(LEARNER))
        renew(hospitals.sites["north"], "north", own.address, identity=True)  # what the old key signed stays good
        code, words = audit(own)
        assert code == 0
        assert "2 answers in 1 runs are as the hospitals signed them, and none that was counted is missing." in words
        whole = run.signed.read_text()
        run.signed.write_text(whole.splitlines()[0] + "\n")
        code, words = audit(own)
        assert (code, "lacks 1 answers that the audit log says were counted" in words) == (1, True)
        line, other = json.loads(whole.splitlines()[0]), new_identity_key()
        line["signature"] = sign(other, "answer", line["envelope"].encode()).hex()
        line["key"] = identity_public_key(other).hex()
        run.signed.write_text(json.dumps(line) + "\n" + whole.splitlines()[1] + "\n")
        code, words = audit(own)
        assert (code, "under a key that no roster ever had for it" in words) == (1, True)


@pytest.mark.parametrize("becomes", ["renewed", "revoked"])
def test_a_site_that_renews_its_key_or_is_revoked_while_its_update_is_added_is_counted_everywhere(
    quick_folder, becomes
):
    with running_edge(quick_folder / "federation") as own:
        hospitals = Hospitals(own, quick_folder / "own")
        for name in ("north", "south"):
            hospitals.join(name, INSIDE)

        class Meanwhile(Beside):
            def collect(self, site: str, reply: Reply, message: Message) -> Tensors:
                found = super().collect(site, reply, message)
                if site == "north" and becomes == "renewed":
                    renew(hospitals.sites["north"], "north", own.address, identity=True)
                elif site == "north":
                    revoke(own.federation, "north", "left the consortium")
                return found

        run = create_run(own.federation.runs, "one", STUDY, WEIGHTS)
        courier = Meanwhile(own.blobs / "out", own.blobs / "in", run.id)
        revoked = partial(revoked_sites, own.federation.state)
        state = carry_out(hospitals.setting(run, toy_app(LEARNER), courier=courier, revoked=revoked))
        np.testing.assert_allclose(load(run.weights(1))["body.bias"], 0.5 + (1 + 3) / 2)
        assert (set(line(run)["sites"]), line(run)["left_out"]) == ({"north", "south"}, {})
        assert state.counted == {"north": 1, "south": 1}
        (closed,) = noted(own, "one", "round-closed")
        assert closed["counted"] == ["north", "south"]
        assert set(closed["signed"].values()) == {told.sha256 for told, _ in signed_lines(run)}
        code, words = audit(own)
        assert code == 0, words
        assert "2 answers in 1 runs are as the hospitals signed them" in words


def _sent(site: Path) -> list[dict[str, Any]]:
    return [x["facts"] for x in read_lines(site / "audit.jsonl") if x["event"] == "sent"]


class Killed(Exception):
    """The process ends here."""


def test_a_round_that_a_kill_kept_out_of_the_log_is_written_down_by_the_next_process(hospitals, edge, monkeypatch):
    def note_closed(setting: Setting, state: State, line: Mapping[str, Any]) -> None:
        raise Killed

    study = replace(STUDY, rounds=replace(STUDY.rounds, count=2))
    with monkeypatch.context() as patched:
        patched.setattr(rounds, "note_closed", note_closed)
        with pytest.raises(Killed):
            hospitals.run(study, "kept-out", toy_app(LEARNER))
    assert noted(edge, "kept-out", "round-closed") == []
    _, run = hospitals.run(study, "kept-out", toy_app(LEARNER))
    closed = noted(edge, "kept-out", "round-closed")
    assert [facts["round"] for facts in closed] == [1, 2]
    assert closed[0]["counted"] == ["north", "south", "west"]
    assert closed[0]["weights"] == line(run)["weights_sha256"]
    signed_then = {told.sha256 for told, envelope in signed_lines(run) if envelope.asked.round == 1}
    assert set(closed[0]["signed"].values()) == signed_then
    assert len(signed_then) == 3
