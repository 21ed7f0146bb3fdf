"""The node: sessions, renewed certificates, pauses, and orders that lost their task."""

import os
import socket
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from fedclient import node
from fedclient.node import NodeFiles, Pace, Stranded, _session_of_the_dead, pause
from fedclient.overdue import GRACE_S
from fedclient.tls import ClientTls
from shared_models.errors import ProcessFailed, StateInvalid
from shared_models.files import write_atomic, write_json
from shared_models.identity import issue_site, new_authority, new_site_keys, request_certificate


@pytest.fixture
def files(tmp_path: Path) -> NodeFiles:
    return NodeFiles(tmp_path)


def session(files: NodeFiles, pid: int, host: str | None = None) -> None:
    write_json(files.session, {"node": 2**63 + 5, "pid": pid, "host": host or socket.gethostname()})


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_session_of_a_dead_process_is_carried_on(files: NodeFiles) -> None:
    session(files, ended_pid())
    assert _session_of_the_dead(files) == 2**63 + 5
    session(files, os.getpid())  # in a container, the next process may have the number of the last
    assert _session_of_the_dead(files) == 2**63 + 5


def test_the_session_of_a_living_process_or_of_another_machine_is_left_alone(files: NodeFiles) -> None:
    assert _session_of_the_dead(files) is None
    session(files, os.getppid())
    assert _session_of_the_dead(files) is None
    session(files, ended_pid(), host="another")
    assert _session_of_the_dead(files) is None


def test_a_folder_without_a_coordinator_is_named_with_the_command_that_mends_it(files: NodeFiles) -> None:
    with pytest.raises(StateInvalid, match=r"site\.toml: gives no coordinator.*fedclient join"):
        files.coordinator()
    (files.site / "site.toml").write_text('coordinator = "fed.example.org:8443"\n')
    assert files.coordinator() == "fed.example.org:8443"


def test_an_answer_of_the_coordinator_is_noted_and_not_each_of_them(files: NodeFiles) -> None:
    files.contact.parent.mkdir(parents=True, exist_ok=True)
    node._note_contact(files)
    first = files.contact.stat().st_mtime_ns
    node._note_contact(files)
    assert files.contact.stat().st_mtime_ns == first
    os.utime(files.contact, (1_000, 1_000))
    node._note_contact(files)
    assert files.contact.stat().st_mtime_ns >= first


def test_the_data_folder_is_known_as_it_is_written_and_as_it_is(files: NodeFiles, tmp_path: Path) -> None:
    assert files.data_folders() == []
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (files.site / "site.toml").write_text(f'coordinator = "x:1"\n[data]\nfolder = "{tmp_path / "link"}"\n')
    assert set(files.data_folders()) == {str(tmp_path / "link"), str(tmp_path / "real")}


def give(files: NodeFiles, name: str, content: bytes, at: int) -> None:
    write_atomic(files.keys / name, content)
    os.utime(files.keys / name, (at, at))


def test_a_renewed_certificate_is_taken_up_with_its_key_and_a_new_node_key_ends_the_process(
    files: NodeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, old, new = new_authority("Test"), new_site_keys(), new_site_keys()
    before, after = (k.tls + issue_site(authority, request_certificate("north", k.tls), "north") for k in (old, new))
    write_atomic(files.keys / "ca.pem", authority.certificate)
    give(files, "tls.pem", before, at=1_000)
    give(files, "node.key", old.node, at=1_000)
    tls = ClientTls(files.keys)
    loaded: list[bytes] = []
    monkeypatch.setattr(tls, "context", Loads(tls.context, loaded))
    tls.refresh()
    assert loaded == []
    give(files, "tls.pem", after, at=2_000)
    tls.refresh()
    tls.refresh()
    assert loaded == [after]
    give(files, "node.key", new.node, at=3_000)
    with pytest.raises(ProcessFailed, match="joined again"):
        tls.refresh()


class Loads:
    """Notes the files that a context accepts."""

    def __init__(self, context: ssl.SSLContext, loaded: list[bytes]) -> None:
        self.context, self.loaded = context, loaded

    def load_cert_chain(self, credential: Path) -> None:
        self.context.load_cert_chain(credential)
        self.loaded.append(credential.read_bytes())


def test_the_pause_grows_with_the_silence_between_its_bounds() -> None:
    now = time.monotonic()
    assert pause(now, 0.3, 2.0) == 0.3
    assert pause(now - 30, 0.3, 2.0) == pytest.approx(0.9, abs=0.01)
    assert pause(float("-inf"), 0.3, 2.0) == 2.0


def test_only_a_wait_for_an_answer_looks_for_stranded_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    looked: list[bool] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    pace = Pace(waiting=lambda: looked.append(True))
    pace.sleep(3)
    assert (slept, looked) == ([node.LONGEST_POLL_S], [])
    pace.sleep(0.5)
    assert (slept[1:], looked) == ([node.REPLY_POLL_S], [True])


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> InMemoryNodeState:
    monkeypatch.setattr(node, "STRANDED_S", 0.0)
    made = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    made.set_node_id(7)
    return cast(InMemoryNodeState, made)


def hold_order(state: InMemoryNodeState) -> int:
    """Stores an order of run 1 and its task, as Flower's loop does."""
    metadata = Metadata(1, "0" * 64, 1, 7, "", "3", time.time(), 60.0, "train")
    state.store_message(make_message(metadata=metadata, content=RecordDict({"order": ConfigRecord({"round": 3})})))
    task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=1, fab_hash="0" * 64)
    assert task is not None
    return task


def test_an_order_whose_task_waits_is_not_stranded(state: InMemoryNodeState, tmp_path: Path) -> None:
    hold_order(state)
    Stranded(state, tmp_path / "task").look()
    assert not state.get_messages_legacy(is_reply=True)


def test_an_order_whose_task_ended_without_an_answer_is_answered_with_an_error(
    state: InMemoryNodeState, tmp_path: Path
) -> None:
    state.finish_task(hold_order(state), SubStatus.FAILED, "")
    Stranded(state, tmp_path / "task").look()
    (reply,) = state.get_messages_legacy(is_reply=True)
    assert (reply.error.code, reply.error.reason) == (node.EXECUTOR_LOST, "EXECUTOR_LOST")


def test_an_answer_that_came_in_half_is_given_up(state: InMemoryNodeState, tmp_path: Path) -> None:
    task = hold_order(state)
    (order,) = state.get_messages_legacy(is_reply=False)
    reply = Message(RecordDict({"answer": ConfigRecord({"round": 3})}), reply_to=order)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    state.store_message_and_object_tree(reply, get_object_tree(reply), state.start_session(1))
    state.finish_task(task, SubStatus.FAILED, "")
    assert state.get_messages_legacy(is_reply=True)  # Flower's loop has taken it and waits for its content
    with pytest.raises(ProcessFailed, match="ask again"):
        Stranded(state, tmp_path / "task").look()


class FlowersClock:
    """The time of Flower's own state, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = datetime.now(UTC)
        monkeypatch.setattr(in_memory_corestate, "now", lambda: self.at)

    def sleep(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


def wait_for_an_answer(
    state: InMemoryNodeState, note: Path, clock: FlowersClock, *, pid: int, until: float
) -> str | None:
    """Two minutes of the loop's looks while an executor, noted so, sends no heartbeat; the token of its task then."""
    task = hold_order(state)
    token = state.claim_task(task)
    assert token is not None
    assert state.activate_task(task)
    write_json(note, {"token": token, "pid": pid, "until": until})
    for _ in range(12):
        clock.sleep(10.0)
        Stranded(state, note).look()
        if state.get_task_by_token(token) is None:
            return None
    return token


def test_the_node_keeps_the_task_of_an_executor_whose_interpreter_is_held(
    state: InMemoryNodeState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, until = FlowersClock(monkeypatch), time.monotonic() + 5.0
    token = wait_for_an_answer(state, tmp_path / "task", clock, pid=os.getpid(), until=until)
    assert token is not None
    assert not state.get_messages_legacy(is_reply=True), "the coordinator would take it for a site that went away"
    clock.sleep(55.0)  # it is killed, and its successor starts
    assert state.get_task_by_token(token), "the successor can still say why"


@pytest.mark.parametrize(("pid", "over_s"), [(os.getpid(), GRACE_S + 1.0), (None, -5.0)], ids=["over", "dead"])
def test_the_task_of_an_executor_that_is_over_or_dead_is_taken_back_by_flower(
    state: InMemoryNodeState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: int | None, over_s: float
) -> None:
    clock, until = FlowersClock(monkeypatch), time.monotonic() - over_s
    note = tmp_path / "task"
    assert wait_for_an_answer(state, note, clock, pid=pid or ended_pid(), until=until) is None
    (reply,) = state.get_messages_legacy(is_reply=True)
    assert reply.error.code == node.EXECUTOR_LOST
