"""Carries out the orders of a site's node: one warm process with the installed app, that never runs what it is sent.

Flower 1.41 starts a Python process for each message, which unpacks the archive that the coordinator sent and runs its
code. This one takes client tasks only, compares the archive's digest with that of its own package, and calls the app
that is installed. What an app raises stays here; the coordinator gets a code.
"""

import argparse
import base64
import errno
import faulthandler
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from fedclient.device_errors import DEVICE_FAILED, is_device_fault, is_out_of_memory
from fedclient.egress import release_code
from fedclient.node import EXECUTOR_LOST, NodeFiles, pause
from fedclient.overdue import GRACE_S, TRAIN_TIMEOUT, is_over, longest_at
from shared_models.archive import (
    CLIENT_APP,
    LOOPBACK,
    app_archive,
    digest,
    flower_module,
    load_app,
    patch_client,
    quiet_flower,
    start_log,
)
from shared_models.errors import FederationError, OrderRefused, ProcessFailed
from shared_models.files import read_json, write_json
from shared_models.supervise import kept_secret

if TYPE_CHECKING:  # flwr reads some switches when it is imported: see `quiet_flower`
    from collections.abc import Iterator

    from flwr.app import Context, Message
    from flwr.supercore.runtime import RuntimeHttpClient

    App = Callable[[Message, Context], Message]

SHORTEST_POLL_S, LONGEST_POLL_S = 0.1, 0.5  # between two questions for a task; Flower: 1 s
HANDOVER_S = 60.0  # a node that is restarted is back before; after that it knows the task no more
REPLY_CODES = re.compile(r"[A-Z][A-Z0-9_]{2,40}")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """What an executor needs for each task.

    Attributes:
        kept: holds the token, the order and the end of the task under way, for the process that comes after this one
            and for the supervisor (`fedclient.overdue`).
        approved: SHA-256 of the archive built from the installed package.
    """

    address: str
    kept: Path
    app: "App"
    approved: str


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fedclient.executor", description="Carries out orders of the node.")
    parser.add_argument("site", type=Path)
    parser.add_argument("--port", type=int, required=True, help="of the node's API, on loopback")
    parser.add_argument("--app", default=CLIENT_APP, metavar="MODULE:NAME", help="installed app to call")
    arguments = parser.parse_args()
    try:
        run_executor(NodeFiles(arguments.site), arguments.port, arguments.app)
    except FederationError as error:
        sys.exit(f"fedclient.executor: {error}")


def run_executor(files: NodeFiles, port: int, app_name: str) -> None:
    """Takes and carries out tasks until SIGTERM.

    Raises:
        ProcessFailed: the node cannot be asked for tasks, or a GPU has failed, which another process may use again.
    """
    os.umask(0o077)
    os.environ.update(quiet_flower(files.site / "node/flower", os.environ))
    start_log(files.data_folders())
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: _stop(ended))
    patch_client()
    address, kept = f"{LOOPBACK}:{port}", files.task
    _answer_lost_task(address, kept)  # before the app is loaded, which takes seconds
    work = Work(address, kept, load_app(app_name), digest(app_archive()))
    log.info("ready; app %s, archive %s", app_name, work.approved[:12])
    last_task = float("-inf")
    with _client(address, secret=kept_secret(files.secret)) as client:
        while not ended.is_set():
            token = _acquire(client)
            if token is None:
                ended.wait(pause(last_task, SHORTEST_POLL_S, LONGEST_POLL_S))
                continue
            if carry_out(work, token) == DEVICE_FAILED:
                raise ProcessFailed(
                    f"the GPU failed over an order, which is answered as {DEVICE_FAILED}; this process ends, for it "
                    "could compute nothing more. Another takes its place; if that fails too, look for Xid in `dmesg`."
                )
            last_task = time.monotonic()


def _stop(ended: threading.Event) -> None:
    """Ends the app's work too; the process after this one tells the node that the task was lost."""
    ended.set()
    raise SystemExit(0)


def _client(
    address: str, *, secret: bytes | None = None, token: str | None = None, patient: bool = True
) -> "RuntimeHttpClient":
    """A client of the node's API, for asking for tasks (`secret`) or for one task (`token`)."""
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.runtime import RuntimeHttpClient

    interceptors: list[Any] = [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")]
    if secret is not None:
        methods = flower_module("flwr.supercore.superexec.run_superexec")._SUPEREXEC_AUTH_METHODS
        interceptors.append(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=methods))
    if token is not None:
        interceptors.append(RuntimeTokenHttpInterceptor(token))
    return RuntimeHttpClient.from_server_address(
        address, True, None, interceptors, retry_invoker=_retry() if patient else None
    )


def _retry() -> Any:
    """Tries again while the node is away. Flower's own retry ends the process when a task is no longer known."""
    from flwr.supercore.retry import RetryInvoker, exponential

    def is_final(error: Exception) -> bool:
        return isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in (502, 503, 504)

    return RetryInvoker(
        wait_gen_factory=lambda: exponential(base_delay=0.1, max_delay=1),
        recoverable_exceptions=(httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=HANDOVER_S,
        should_giveup=is_final,
    )


def _acquire(client: "RuntimeHttpClient") -> str | None:
    """The token of a client task that waits, or None."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType

    try:
        answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
    except httpx.TransportError:
        log.warning("the node has been away for %.0f s", HANDOVER_S)
        return None
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        why = "it does not know the secret in secrets/superexec" if status == 401 else "see logs/node.log"
        raise ProcessFailed(
            f"the node's API answers {status}: {why}. Restart node and executor together (`fedclient start`)."
        ) from error
    return answer.token if answer.HasField("task") and answer.token else None


def carry_out(work: Work, token: str) -> str:
    """Takes one task to its end; whatever happens, the node gets a reply or an end of the task, if it is there.

    Returns:
        The code of the order's failure, "" where it did not fail.
    """
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

    flower = flower_module("flwr.supernode.runtime.run_clientapp")
    failed = ""
    _note(work.kept, {"token": token})
    with _client(work.address, token=token) as client:
        try:
            with _heartbeat(work.address, token):
                message, context, _, fab = flower.pull_task_input(client)
                with _bounded(work, token, message):
                    reply, failed = answer(work, message, context, fab.content)
                flower.push_message(client, reply, context)
                status = "failed" if failed else "completed"
                flower.push_task_output(client=client, context=context, sub_status=status, details=failed)
        except ObjectPullError:
            log.warning("an order came without its content; the node answers it")
            flower.push_task_output(client=client, context=None, sub_status="failed", details="ORDER_INCOMPLETE")
        except (httpx.HTTPError, ObjectPushError) as error:  # the run ended meanwhile, or the node was restarted
            log.warning(
                "a task could not be handed over (%s): its run ended or the node was restarted", type(error).__name__
            )
    work.kept.unlink(missing_ok=True)
    return failed


@contextmanager
def _bounded(work: Work, token: str, message: "Message") -> "Iterator[None]":
    """Notes by when the order is to be answered; shortly before it is killed for it, a process that hangs says where.

    faulthandler's thread needs no interpreter; it tells files and lines of code, and no value.
    """
    longest = longest_at(work.kept.parent.parent, message.metadata.ttl)
    until = time.monotonic() + longest
    _note(work.kept, {"token": token, "order": _frozen(message), "pid": os.getpid(), "until": until})
    faulthandler.dump_traceback_later(longest + GRACE_S / 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _note(kept: Path, task: Mapping[str, Any]) -> None:
    """Keeps what the process after this one needs, if the disk takes it; the work itself says when it is full."""
    try:
        write_json(kept, task)
    except OSError as error:
        log.warning("the task under way could not be noted: %s", error)


def answer(work: Work, message: "Message", context: "Context", archive: bytes) -> "tuple[Message, str]":
    """The app's reply and "", or an error reply and its code."""
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode

    sent = digest(archive)
    if sent != work.approved:
        log.error("refused an app: archive %s, this package's is %s", sent, work.approved)
        reason = f"APP_NOT_APPROVED {sent[:12]}"
        release_code(work.kept.parent.parent, reason)
        return Message(Error(ErrorCode.INVALID_FAB, reason), reply_to=message), reason
    try:
        return work.app(message, context), ""
    except Exception as error:
        reason = code_of(error)
        log.exception("the app failed; the coordinator is told %s", reason)
        release_code(work.kept.parent.parent, reason)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message), reason
    finally:  # the error is gone by now, and with it the frames that hold tensors
        _leave_gpu()


def _leave_gpu() -> None:
    """Leaves to others, until the next order, the memory of a GPU that PyTorch would keep."""
    if "torch" not in sys.modules:
        return
    from fedclient.training.device import free_memory

    with suppress(RuntimeError):  # of a GPU that has failed, as its order says
        free_memory()


def code_of(error: Exception) -> str:
    """What the coordinator may know of a failure: one upper-case word, no text of the exception."""
    if isinstance(error, OrderRefused) and REPLY_CODES.fullmatch(error.code):
        return error.code
    if isinstance(error, FederationError):
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).upper()
    if is_out_of_memory(error):
        return "OUT_OF_MEMORY"
    if is_device_fault(error):
        return DEVICE_FAILED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "DISK_FULL"
    return "APP_FAILED"


@contextmanager
def _heartbeat(address: str, token: str) -> "Iterator[None]":
    """Tells the node, in a thread, that the task is being worked on."""
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
    from flwr.supercore.heartbeat import HeartbeatSender

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.TransportError:
            return False  # the sender tries again
        except httpx.HTTPStatusError:
            log.warning("the node knows this task no more: it was restarted; the work goes on and may be of use")
        return True

    with _client(address, token=token, patient=False) as client:
        sender = HeartbeatSender(beat)
        sender.start()
        try:
            yield
        finally:
            sender.stop()


def _frozen(message: "Message") -> str:
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto

    return base64.b64encode(message_to_proto(remove_content_from_message(message)).SerializeToString()).decode()


def _answer_lost_task(address: str, path: Path) -> None:
    """Answers the task that the process before this one died over; the coordinator then asks again at once."""
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.common.constant import ErrorCode
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as MessageProto
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest

    if not path.exists():
        return
    flower = flower_module("flwr.supernode.runtime.run_clientapp")
    kept = read_json(path)
    with _client(address, token=kept["token"]) as client, suppress(httpx.HTTPError):
        waiting = client.PullMessages(PullAppMessagesRequest()).messages_list  # one that was not taken before
        protos = [*waiting, *(MessageProto.FromString(base64.b64decode(kept[k])) for k in ("order",) if k in kept)]
        number, code = EXECUTOR_LOST, "EXECUTOR_RESTARTED"
        if is_over(kept):  # the coordinator does not ask such a site again in this round
            number, code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION, TRAIN_TIMEOUT
        for order in map(message_from_proto, protos[:1]):
            release_code(path.parent.parent, code)
            reply = Message(Error(number, code), reply_to=order)
            run_id, node_id = order.metadata.run_id, order.metadata.dst_node_id
            flower.push_message(client, reply, Context(run_id, node_id, {}, RecordDict(), {}))
            log.warning("told the node that the order of message %s ended as %s", order.metadata.message_id, code)
        flower.push_task_output(client=client, context=None, sub_status="failed", details=code)
    path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
