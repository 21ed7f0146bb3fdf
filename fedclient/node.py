"""The SuperNode of a site: Flower's own loop, over mutual TLS, with short pauses, and without its 60 s of lock-out.

Flower 1.41 refuses a node whose last process died without saying so for up to 60 s, and forgets the order that the
process held. Here a new process carries on the session of the dead one, and tells the coordinator at once that the
order was lost. The node passes orders on; it carries out none: see fedclient/executor.py.
"""

import argparse
import logging
import os
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx

from fedclient.authorities import refresh
from fedclient.clock import await_clock
from fedclient.overdue import is_over
from fedclient.own_log import log_of
from fedclient.renewal import Keeper, certificate_of, check_keys
from fedclient.runtime_port import serve_executor
from fedclient.tls import ClientTls
from fedclient.welcome import await_welcome, shut_out
from shared_models.archive import LOOPBACK, flower_module, patch_client, quiet_flower, replace_name, start_log
from shared_models.errors import FederationError, ProcessFailed, StateInvalid
from shared_models.files import read_json, write_atomic, write_json
from shared_models.identity import load_secret
from shared_models.supervise import kept_secret

if TYPE_CHECKING:  # flwr reads some switches when it is imported: see `quiet_flower`
    from flwr.app import Message
    from flwr.supercore.run import Run
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.nodestate import NodeState

SHORTEST_POLL_S, LONGEST_POLL_S = 0.3, 2.0  # between two questions for an order; Flower: 3 s
WAIT_SHARE = 0.03  # the pause is this share of the time since the last order: 50 waiting sites leave the SuperLink idle
REPLY_POLL_S = 0.05  # between two looks for the answer of the executor; Flower: 0.5 s
NOTED_S = 5.0  # between two notes that the coordinator has answered
STRANDED_S = 10.0  # an answer whose executor died while handing it over is given up after this
NODE_LOST = 5  # flwr.common.constant.ErrorCode.NODE_UNAVAILABLE, on which the coordinator asks again
EXECUTOR_LOST = 8  # ErrorCode.CLIENT_APP_CRASHED, likewise

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """Where a site keeps what its node needs."""

    site: Path

    @property
    def keys(self) -> Path:
        return self.site / "keys"

    @property
    def session(self) -> Path:
        """Number of the node and process that last had the connection."""
        return self.site / "node/session.json"

    @property
    def order(self) -> Path:
        """Metadata of the order under way, as Flower's protobuf; no content."""
        return self.site / "node/order.pb"

    @property
    def secret(self) -> Path:
        return self.site / "secrets/superexec"

    @property
    def port(self) -> Path:
        return self.site / "node/port"

    @property
    def task(self) -> Path:
        """Note of the task that the executor works on; see `fedclient.executor.Work`."""
        return self.site / "secrets/task"

    @property
    def contact(self) -> Path:
        """An empty file whose time is that of the last answer of the coordinator, to about `NOTED_S`."""
        return self.site / "node/contact"

    def data_folders(self) -> list[str]:
        """The data folder of site.toml, as it is written and as it is: no log names what lies in it."""
        with suppress(OSError, tomllib.TOMLDecodeError, KeyError, TypeError):  # what is wrong with it is told later
            folder = str(tomllib.loads((self.site / "site.toml").read_text())["data"]["folder"])
            return sorted({folder, str(Path(folder).resolve())}, key=len, reverse=True)
        return []

    def coordinator(self) -> str:
        """`host:port` of site.toml."""
        try:
            return str(tomllib.loads((self.site / "site.toml").read_text())["coordinator"])
        except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
            raise StateInvalid(
                f"{self.site / 'site.toml'}: gives no coordinator ({error}). Enrol the site with `fedclient join`."
            ) from error


@dataclass(slots=True)
class Pace:
    """Stands in for `time` in Flower's node loop, which sleeps 3 s without an order and 0.5 s at a time for an answer.

    Attributes:
        waiting: called at each wait for an answer.
    """

    waiting: Callable[[], None]
    last_order: float = float("-inf")

    def sleep(self, seconds: float) -> None:
        if seconds >= 3:
            time.sleep(pause(self.last_order, SHORTEST_POLL_S, LONGEST_POLL_S))
        else:
            time.sleep(REPLY_POLL_S)
            self.waiting()


def pause(last_work: float, shortest_s: float, longest_s: float) -> float:
    """How long to wait before asking again: the longer nothing came (monotonic seconds), the longer."""
    return min(longest_s, max(shortest_s, WAIT_SHARE * (time.monotonic() - last_work)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fedclient.node", description="The SuperNode of a site.")
    parser.add_argument("site", type=Path)
    parser.add_argument("--port", type=int, required=True, help="of its API for the executor, on loopback")
    arguments = parser.parse_args()
    code: int | str | None = 0
    try:
        run_node(NodeFiles(arguments.site), arguments.port)
    except FederationError as error:
        print(f"fedclient.node: {error}", file=sys.stderr)
        code = 1
    except SystemExit as exit_:  # Flower's way to end, after it has told the coordinator
        code = exit_.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)  # the HTTP server's thread would hold the process


def run_node(files: NodeFiles, port: int) -> None:
    """Runs the node until SIGTERM, or returns when the coordinator turned it away; then start it again."""
    os.umask(0o077)
    home = files.site / "node/flower"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ.update(quiet_flower(home, os.environ))
    start_log(files.data_folders())
    check_keys(files.site)
    with suppress(FederationError):  # it is away, or a list that is refused is told by what comes next
        refresh(files.site, certificate_of(files.site).name, files.coordinator())
    await_welcome(files.site, files.coordinator())
    tls = ClientTls(files.keys)
    await_clock(
        files.site,
        files.coordinator(),
        tls.context,
        lambda: log_of(files.site, certificate_of(files.site).name).add("refused", code="CLOCK"),
    )
    loop = flower_module("flwr.supernode.start_client_internal")
    state_factory = _state_factory()
    state = state_factory.state()
    pace = Pace(waiting=Stranded(state, files.task).look)
    patch_client()
    replace_name(loop, "time", pace)
    fleet = flower_module("flwr.supernode.fleet_http_connection")
    replace_name(fleet, "FleetHttpClient", SimpleNamespace(from_server_address=partial(_fleet_client, files, tls)))
    connect = replace_name(loop, "http_request_response", None)
    replace_name(loop, "http_request_response", partial(_connection, files, tls, pace, connect))
    name = certificate_of(files.site).name
    serve_executor(state_factory, kept_secret(files.secret), port, files.site, name)
    write_json(files.port, port)
    keeper = Keeper(files.site, name, files.coordinator())
    threading.Thread(target=keeper.run, args=(threading.Event(),), name="keeper", daemon=True).start()
    loop.start_client_internal(
        state_factory=state_factory,
        server_address=files.coordinator(),
        node_config={"site-dir": str(files.site.resolve())},  # for the app; stays on this machine
        root_certificates=str(files.keys / "ca.pem"),
        insecure=False,
        authentication_keys=_node_keys(files.keys / "node.key"),
        isolation="process",
        runtime_api_address=f"{LOOPBACK}:{port}",
        superexec_auth_secret=kept_secret(files.secret),
        runtime_dependency_install=False,
    )


def _state_factory() -> Any:
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate import NodeStateFactory

    return NodeStateFactory(objectstore_factory=ObjectStoreFactory())


def _node_keys(path: Path) -> Any:
    """The node's key pair, read by Flower's own reader."""
    load_secret(path)
    cli = flower_module("flwr.supernode.cli.flower_supernode")
    named = argparse.Namespace(auth_supernode_private_key=str(path), auth_supernode_public_key=None)
    return cli._try_setup_client_authentication(named)


def _fleet_client(
    files: NodeFiles, tls: ClientTls, server_address: str, insecure: bool, _root: object, interceptors: Any
) -> "FleetHttpClient":
    """In place of `FleetHttpClient.from_server_address`, which knows no client certificates."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    if insecure:
        raise ProcessFailed(f"{server_address}: a connection without TLS was asked for, and is never made.")
    client = FleetHttpClient(f"https://{server_address}", interceptors=interceptors, verify=tls.context)
    setattr(client, "ActivateNode", partial(_activate, files, client, client.ActivateNode))  # noqa: B010
    return client


def _activate(files: NodeFiles, client: "FleetHttpClient", activate: Any, request: Any) -> Any:
    """Opens the node's session, or carries on the one that a dead process of this folder left open."""
    from flwr.proto.fleet_pb2 import ActivateNodeResponse
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.error import ApiErrorCode, FlowerError

    try:
        response = activate(request)
    except httpx.HTTPStatusError as error:
        told = FlowerError.from_json(error.response.text)
        left = _session_of_the_dead(files)
        if told is None or told.code != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED or left is None:
            raise
        beat = SendNodeHeartbeatRequest(node=Node(node_id=left), heartbeat_interval=request.heartbeat_interval)
        if not client.SendNodeHeartbeat(beat).success:
            raise
        log.info("carrying on the session of node %s", left)
        response = ActivateNodeResponse(node_id=left)
    write_json(files.session, {"node": response.node_id, "pid": os.getpid(), "host": socket.gethostname()})
    return response


def _session_of_the_dead(files: NodeFiles) -> int | None:
    """The node number of the last process, if that ran on this machine and is no more.

    A copy of the folder that is started elsewhere does not take the session of a process that lives.
    """
    try:
        session = read_json(files.session)
    except FileNotFoundError:
        return None
    if session["host"] != socket.gethostname():
        return None
    if session["pid"] != os.getpid():
        try:
            os.kill(session["pid"], 0)
        except ProcessLookupError:
            pass
        except PermissionError:
            return None
        else:
            return None
    return int(session["node"])


@contextmanager
def _connection(
    files: NodeFiles, tls: ClientTls, pace: Pace, connect: Any, *arguments: Any
) -> Iterator[tuple[Any, ...]]:
    """Flower's connection with three things added: order kept on disk, agents refused, certificate renewed."""
    from flwr.common.serde import message_to_proto
    from flwr.supercore.constant import TaskType
    from flwr.supercore.run import RunNotRunningException

    with connect(*arguments) as (node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm):

        def keep_order() -> "tuple[Message, Any] | None":
            tls.refresh()
            received: tuple[Message, Any] | None = _let_in(files, receive)
            _note_contact(files)
            if received is not None:
                pace.last_order = time.monotonic()
                try:
                    write_atomic(files.order, message_to_proto(received[0]).SerializeToString())
                except OSError as error:  # a full disk: killed now, the node could not tell that the order was lost
                    log.warning("the order under way could not be noted: %s", error)
            return received

        def forget_order(message: "Message", *rest: Any) -> Any:
            answer = send(message, *rest)
            pace.last_order = time.monotonic()
            files.order.unlink(missing_ok=True)
            return answer

        def known_run(run_id: int) -> "Run":
            run: Run = get_run(run_id)
            if run.primary_task_type != TaskType.SERVER_APP:
                log.error("run %s: is a %s, which no site takes part in", run_id, run.primary_task_type)
                log_of(files.site, certificate_of(files.site).name).add("refused", code="TASK_TYPE", run=str(run_id))
                raise RunNotRunningException
            return run

        def while_running(call: Callable[..., Any], *what: Any) -> Any:
            """A run that ends while its order is fetched: Flower lets this pass its own clean-up, a BaseException, and
            the half-fetched order would block the executor (1.41)."""
            try:
                return call(*what)
            except RunNotRunningException as ended:
                raise ProcessFailed("the run has ended; its order is dropped") from ended

        _answer_lost_order(files, send, push_object)
        pull, confirmed = partial(while_running, pull_object), partial(while_running, confirm)
        yield node_id, keep_order, forget_order, known_run, get_fab, pull, push_object, confirmed


def _note_contact(files: NodeFiles) -> None:
    """The coordinator has answered; noted for the status page and the metrics, and not at each of its answers."""
    with suppress(OSError):  # a full disk
        if not files.contact.exists() or abs(time.time() - files.contact.stat().st_mtime) > NOTED_S:
            files.contact.touch(0o600)


def _let_in(files: NodeFiles, receive: Any) -> Any:
    """Asks for an order; Flower takes every 403 for the end of a run and would ask on, three times a second.

    Raises:
        ProcessFailed: the coordinator shuts this site out, with its words; the next process then asks once a minute.
    """
    from flwr.supercore.run import RunNotRunningException

    try:
        return receive()
    except RunNotRunningException:
        why = shut_out(files.site, files.coordinator())
        if why is None:
            raise
        raise ProcessFailed(why) from None


def _answer_lost_order(files: NodeFiles, send: Any, push_object: Any) -> None:
    """Tells the coordinator that the order which the last process of this node held will not be answered."""
    from flwr.app import Error, Message
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as MessageProto
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
    from flwr.supercore.run import RunNotRunningException

    if not files.order.exists():
        return
    from fedclient.egress import release_code  # imports what reads images, which the node else does not

    order = message_from_proto(MessageProto.FromString(files.order.read_bytes()))
    release_code(files.site, "NODE_RESTARTED")
    reply = Message(Error(NODE_LOST, "NODE_RESTARTED"), reply_to=order)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    contents = {name: thing.deflate() for name, thing in get_all_nested_objects(reply).items()}
    try:
        wanted, session = send(reply, get_object_tree(reply), 0.0)
        for name in wanted:
            push_object(order.metadata.run_id, session, name, contents[name])
        log.warning("told the coordinator that the order of message %s was lost", order.metadata.message_id)
    except RunNotRunningException:
        log.info("the run of the order that was lost has ended")
    files.order.unlink(missing_ok=True)


@dataclass(slots=True)
class Stranded:
    """Frees the node from an order that nobody will answer: Flower's loop would wait for its answer for ever.

    Attributes:
        task: note of the task under way. Flower 1.41 takes a task back 60 s after its last heartbeat, and a call that
            holds the interpreter of the executor holds its heartbeat too: the coordinator would take the site for one
            that went away, and ask it again. While the noted process is there and its time is not over, the node beats
            for it; whoever ends it (`fedclient.overdue`) then leaves its successor the time to answer.
    """

    state: "NodeState"
    task: Path
    since: float | None = None
    looked_at: float = float("-inf")

    def look(self) -> None:
        """Called while the loop waits; answers the order with an error, or raises where an answer came in half.

        Raises:
            ProcessFailed: the executor died while it handed its answer over; Flower's loop then drops that answer.
        """
        from flwr.common.constant import Status

        now = time.monotonic()
        if now - self.looked_at < 1.0:
            return
        self.looked_at = now
        self._beat()
        if self.state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]):
            self.since = None
            return
        self.since = self.since or now
        if now - self.since < STRANDED_S:
            return
        self.since = None
        if not self._answer():
            raise ProcessFailed("the executor ended while it handed its answer over; the coordinator will ask again")

    def _beat(self) -> None:
        """Keeps the task of an executor that lives, and whose order has time left; one without a note is its own."""
        with suppress(OSError, ValueError, KeyError, TypeError):  # it is idle, or has ended
            noted = read_json(self.task)
            os.kill(noted["pid"], 0)
            if not is_over(noted) and (task := self.state.get_task_by_token(noted["token"])):
                self.state.acknowledge_task_heartbeat(task.task_id)

    def _answer(self) -> bool:
        """Answers every order that was never taken or never answered; False when there is none."""
        from flwr.app import Error

        self.state.get_messages_legacy(is_reply=False)  # marks orders as taken, which the next line asks for
        open_orders = {
            entry.message.metadata.run_id
            for entry in self.state.msg_store.values()  # type: ignore[attr-defined]  # of the in-memory state
            if not entry.message.metadata.reply_to_message_id
        }
        before = len(self.state.msg_store)  # type: ignore[attr-defined]
        self.state._store_error_replies(open_orders, Error(EXECUTOR_LOST, "EXECUTOR_LOST"))  # type: ignore[attr-defined]
        return len(self.state.msg_store) > before  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
