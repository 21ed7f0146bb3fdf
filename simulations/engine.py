"""The simulation engine: the real client and server code on one machine, with no SuperLink and no Ray.

`LocalGrid` is Flower's `Grid` for one process. Sequential, it carries out an order when its reply is pulled, so one
reply is in memory at a time; with workers it hands orders to processes of their own (`simulations.worker`).
"""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedserver.checkpoint import RunFolder, State, read_study
from fedserver.cohort import Presence
from fedserver.courier import Inline
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from shared_models.errors import ProcessFailed
from shared_models.files import canonical_json
from simulations.roster import members, roster_of

NodeConfig = Mapping[str, str | int]


def answer(app: ClientApp, message: Message, node_config: NodeConfig) -> Message:
    """One order carried out as a node would: an exception of the app becomes an error reply, without its words."""
    context = Context(
        run_id=1, node_id=message.metadata.dst_node_id, node_config=dict(node_config), state=RecordDict(), run_config={}
    )
    try:
        return app(message, context)
    except Exception as e:  # the round must go on; the researcher sees the trace here
        sys.excepthook(type(e), e, e.__traceback__)
        error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="CLIENT_ERROR " + type(e).__name__)
        return Message(error, reply_to=message)


def identify() -> None:
    """Flower stamps messages with the identity of the task that makes them; here there is only one."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class LocalGrid(Grid):
    """Flower's Grid over clients in this process or in worker processes of its own."""

    def __init__(self, app: ClientApp | None, nodes: Mapping[int, NodeConfig], workers: int = 0) -> None:
        """`app` carries out orders in this process; without it `workers` processes run the installed client."""
        identify()
        self._app, self._nodes = app, nodes
        self._queue: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._ids = count(1)
        threads = max((int(config.get("threads", 0)) for config in nodes.values()), default=0)
        self._pool = Pool(workers, threads) if app is None else None
        self._run: Run | None = None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = f"m{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = message_id  # Flower sets it the same way (http_grid.py)
            ids.append(message_id)
            if self._pool is None:
                self._queue[message_id] = message
            else:
                self._pool.submit(message_id, message, self._nodes[message.metadata.dst_node_id])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self._pool is not None:
            self._replies.update(self._pool.take())
            return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]
        replies = []
        for message_id in list(message_ids):
            if message := self._queue.pop(message_id, None):
                assert self._app is not None
                replies.append(answer(self._app, message, self._nodes[message.metadata.dst_node_id]))
        return replies

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=i, name=str(c.get("site", i)), status="online") for i, c in self._nodes.items()]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting, until = set(self.push_messages(messages)), time.monotonic() + (timeout or float("inf"))
        replies: list[Message] = []
        while waiting and time.monotonic() < until:
            got = list(self.pull_messages(waiting))
            replies += got
            waiting -= {m.metadata.reply_to_message_id for m in got}
        return replies

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return cast(Run, self._run)


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    busy_with: str | None = None
    message: Message | None = None

    def end(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of an order that a dead worker never read
                    pipe.close()
        self.process.kill()  # not asked to end: an order that nobody waits for may take hours
        self.process.wait()


@dataclass(slots=True)
class _Idle:
    """Workers that a run has left and the next one may take: to start one costs ten seconds and more of a core.

    Attributes:
        kept: (threads, worker); None where nobody keeps them.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    kept: list[tuple[int, _Worker]] | None = None

    def give(self, threads: int, worker: _Worker) -> bool:
        """Takes a worker in; False where it is to be ended."""
        with self.lock:
            if self.kept is not None:
                self.kept.append((threads, worker))
            return self.kept is not None

    def take(self, threads: int) -> _Worker | None:
        """One that lives and was started with so many threads."""
        with self.lock:
            kept = self.kept or []
            for place, (of, worker) in enumerate(kept):
                if of == threads and worker.process.poll() is None:
                    del kept[place]
                    return worker
        return None


_idle = _Idle()


@contextmanager
def kept_workers() -> Iterator[None]:
    """Runs within the block, also those at once, hand their workers on to each other; they end with the block."""
    with _idle.lock:
        mine = _idle.kept is None
        if mine:
            _idle.kept = []
    try:
        yield
    finally:
        if mine:
            with _idle.lock:
                left, _idle.kept = _idle.kept or [], None
            for _, worker in left:
                worker.end()


@dataclass(slots=True)
class Pool:
    """Worker processes that each carry out one order at a time; one that dies is replaced, its order fails.

    Attributes:
        threads: of numpy's own library in each, as of PyTorch's; 0 for as many as there are cores.
    """

    size: int
    threads: int = 0
    workers: list[_Worker] = field(default_factory=list)
    queue: deque[tuple[str, Message, NodeConfig]] = field(default_factory=deque)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def submit(self, message_id: str, message: Message, node_config: NodeConfig) -> None:
        self.queue.append((message_id, message, node_config))
        self._feed()

    def take(self, wait_s: float = 0.02) -> dict[str, Message]:
        """Replies that are ready, by the id of their order."""
        self._feed()
        ready: dict[str, Message] = {}
        for key, _ in self.selector.select(wait_s):
            worker: _Worker = key.data
            message_id, order = worker.busy_with, worker.message
            frame = read_frame(cast(IO[bytes], worker.process.stdout))
            if message_id is None or order is None:
                self._end(worker)  # it died while it had nothing to do
            elif frame is None:
                error = Error(code=ErrorCode.CLIENT_APP_CRASHED, reason="WORKER_DIED")
                ready[message_id] = Message(error, reply_to=order)
                self._end(worker)
            else:
                ready[message_id] = message_from_proto(ProtoMessage.FromString(frame))
                worker.busy_with = worker.message = None
        self._feed()
        return ready

    def _feed(self) -> None:
        while self.queue:
            worker = next((w for w in self.workers if w.busy_with is None), None)
            if worker is None:
                if len(self.workers) >= self.size:
                    return
                worker = self._start()
            message_id, message, node_config = self.queue.popleft()
            to = cast(IO[bytes], worker.process.stdin)
            worker.busy_with, worker.message = message_id, message
            with suppress(BrokenPipeError):  # it has died: `take` hears the end of its other pipe
                write_frame(to, canonical_json(dict(node_config)))
                write_frame(to, message_to_proto(message).SerializeToString())

    def _start(self) -> _Worker:
        idle = _idle.take(self.threads)
        if idle is not None:
            self.workers.append(idle)
            self.selector.register(cast(IO[bytes], idle.process.stdout), selectors.EVENT_READ, idle)
            return idle
        command = [sys.executable, "-m", "simulations.worker"]
        env = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}  # read by OpenBLAS and MKL too
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**env, **os.environ})
        worker = _Worker(process)
        self.workers.append(worker)
        self.selector.register(cast(IO[bytes], process.stdout), selectors.EVENT_READ, worker)
        if read_frame(cast(IO[bytes], process.stdout)) != b"ready":
            self._end(worker)
            raise ProcessFailed("simulations.worker: did not start. Its message stands above.")
        return worker

    def _leave(self, worker: _Worker) -> None:
        self.selector.unregister(cast(IO[bytes], worker.process.stdout))
        self.workers.remove(worker)

    def _end(self, worker: _Worker) -> None:
        self._leave(worker)
        worker.end()

    def close(self) -> None:
        """Ends the workers, or leaves those that have nothing to do to the next run (`kept_workers`)."""
        for worker in list(self.workers):
            self._leave(worker)
            if worker.busy_with is not None or not _idle.give(self.threads, worker):
                worker.end()
        self.selector.close()


def write_frame(to: IO[bytes], content: bytes) -> None:
    to.write(len(content).to_bytes(8, "little"))
    to.write(content)
    to.flush()


def read_frame(source: IO[bytes]) -> bytes | None:
    """The next frame, or None at the end of the pipe."""
    head = source.read(8)
    if len(head) < 8:
        return None
    content = source.read(int.from_bytes(head, "little"))
    return content if len(content) == int.from_bytes(head, "little") else None


def read_config(frame: bytes) -> NodeConfig:
    return cast(NodeConfig, json.loads(frame))


def with_members(folder: Path, nodes: Mapping[str, NodeConfig]) -> Mapping[str, NodeConfig]:
    """`nodes` with keys and roster, where the study of the run in `folder` sums its updates securely."""
    if read_study(RunFolder(folder)).protect.secure_aggregation is None:
        return nodes
    return {site: {**nodes[site], "sums": str(path)} for site, path in members(folder, nodes).items()}


def run_local(
    folder: Path,
    nodes: Mapping[str, NodeConfig],
    app: ClientApp | None = None,
    workers: int = 0,
    stop: threading.Event | None = None,
) -> State:
    """Carries out the run in `folder` with one client for each of `nodes` (site -> node configuration).

    Args:
        app: another client than the installed one, for tests and benchmarks; always in this process.
        workers: processes that carry out orders; 0 is this process alone.
        stop: ends the run when it is set, at once where workers carry out its orders.

    Raises:
        ProcessFailed: `stop` was set.
    """

    def clock() -> float:
        if stop is not None and stop.is_set():
            raise ProcessFailed(f"{folder}: was stopped. The same command goes on from its last finished round.")
        return time.monotonic()

    if app is None and workers == 0:
        from fedclient.app import app as installed  # imports torch

        app = installed
    nodes = with_members(folder, nodes)
    numbered = {i: nodes[site] for i, site in enumerate(sorted(nodes), start=1)}
    grid = LocalGrid(app, numbered, workers)
    presence = Presence({site: i for i, site in enumerate(sorted(nodes), start=1)})
    try:
        return carry_out(
            Setting(
                grid,
                RunFolder(folder),
                lambda: presence,
                Inline(),
                clock,
                poll_s=0.0,
                presence_s=float("inf"),
                bounded=False,
                roster=lambda: roster_of(folder),
            )
        )
    finally:
        grid.close()
