"""The simulation engine: the same weights in this process, in worker processes and on Ray; a death costs one order."""

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto

from fedclient.client import client_app
from fedclient.site import Site
from fedclient.work import Learned
from fedserver.checkpoint import RunFolder, create_run, finish_round, read_state
from shared_models.envelope import signed
from shared_models.errors import ProcessFailed
from shared_models.files import read_lines
from shared_models.nets import initial_weights
from shared_models.study import Augment, Evaluate, Model, Preprocess, Rounds, Study, Train, canonical, sha256
from shared_models.weights import Arrays
from shared_models.wire import Order, Reply, pack, read_order, read_reply, tensors_of, write_order, write_reply
from simulations.engine import (
    LocalGrid,
    NodeConfig,
    Pool,
    identify,
    kept_workers,
    read_frame,
    run_local,
    write_frame,
)
from simulations.phantoms import PhantomPlan, phantom
from tests.toys import WEIGHTS, ToyLearner, new_run, nodes, toy_app

pytestmark = pytest.mark.usefixtures("settings_of_torch")

STUDY = Study(
    name="tiny",
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2, dropout=0.1),
    preprocess=Preprocess(size=(32, 32)),
    augment=Augment(rotate_deg=10, noise=0.05),
    train=Train(local_epochs=1, batch_size=3),
    rounds=Rounds(count=2),
)
TOY = Study(name="toy", rounds=Rounds(count=2, quorum=1), evaluate=Evaluate(every=0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = PhantomPlan(sites=("north", "south"), train=2, val=1, test=1, slices=2, size=32)
    return phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)


def configs(data: Path, work: Path) -> dict[str, NodeConfig]:
    common: dict[str, str | int] = {"data": str(data), "work": str(work), "device": "cpu", "threads": 1}
    return {site: {**common, "site": site, "manifest-site": site} for site in ("north", "south")}


def started(folder: Path, study: Study = STUDY) -> RunFolder:
    return create_run(folder, "run", study, initial_weights(study))


@pytest.fixture(scope="module")
def sequential(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that all others must equal."""
    folder = tmp_path_factory.mktemp("sequential")
    run = started(folder)
    run_local(run.path, configs(data, folder))
    return run


def weights_of(run: RunFolder) -> list[bytes]:
    return [run.weights(r).read_bytes() for r in range(read_state(run).round + 1)]


def scores_of(run: RunFolder) -> list[object]:
    return [[(s, part["scores"]) for s, part in sorted(line["sites"].items())] for line in read_lines(run.metrics)]


# The same weights


def test_the_real_client_trains_in_this_process(sequential):
    assert read_state(sequential).round == 2
    assert read_state(sequential).cohort == ("north", "south")
    assert len(set(weights_of(sequential))) == 3
    final = read_lines(sequential.metrics)[-1]
    assert final["final"]
    assert final["federation"]["lung"]["cases"] == 2


def test_worker_processes_give_the_same_weights_and_scores_bit_for_bit(sequential, data, tmp_path):
    run = started(tmp_path)
    run_local(run.path, configs(data, tmp_path), workers=2)
    assert weights_of(run) == weights_of(sequential)
    assert scores_of(run) == scores_of(sequential)


def test_a_run_that_was_interrupted_gives_the_same_weights(sequential, data, tmp_path, monkeypatch):
    run = started(tmp_path)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedserver.rounds.finish_round", lambda f, s, *rest: (finish_round, die)[s.round](f, s, *rest))
        with pytest.raises(KeyboardInterrupt):
            run_local(run.path, configs(data, tmp_path))
    assert read_state(run).round == 1
    run_local(run.path, configs(data, tmp_path))
    assert weights_of(run) == weights_of(sequential)
    assert scores_of(run) == scores_of(sequential)


def test_a_finished_run_is_not_carried_out_again(sequential, data):
    before = {p.name: p.read_bytes() for p in sequential.path.glob("*.*") if p.name != "progress.json"}
    run_local(sequential.path, configs(data, sequential.path.parent), app=toy_app())
    assert {p.name: p.read_bytes() for p in sequential.path.glob("*.*") if p.name != "progress.json"} == before


@pytest.mark.process
def test_the_ray_engine_gives_the_same_weights_bit_for_bit(sequential, data, tmp_path):
    run = started(tmp_path)
    code = (
        "import sys, json, pathlib\nfrom simulations.ray_engine import run_ray\n"
        "run_ray(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), workers=2, gpus=0.0)"
    )
    words = [sys.executable, "-c", code, str(run.path), json.dumps(configs(data, tmp_path))]
    subprocess.run(words, check=True, timeout=300, capture_output=True)
    assert weights_of(run) == weights_of(sequential)
    assert scores_of(run) == scores_of(sequential)


# The grid


def order(kind: str = "train") -> Order:
    return Order(kind, "toy", 1, 1, canonical(TOY).decode(), sha256(TOY), "b" * 64)  # type: ignore[arg-type]


def numbered(folder: Path, *sites: str) -> dict[int, NodeConfig]:
    return dict(enumerate(nodes(sites, folder).values(), start=1))


def test_an_order_is_carried_out_when_its_reply_is_pulled_and_not_before(tmp_path):
    did: list[str] = []

    @dataclass(frozen=True)
    class Noting(ToyLearner):
        def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
            did.append(site.name)
            return ToyLearner.learn(self, site, study, round_number, weights)

    grid = LocalGrid(client_app(Noting()), numbered(tmp_path, "a", "b"))
    one, two = grid.push_messages([write_order(order(), node, pack(WEIGHTS)) for node in (1, 2)])
    assert did == []
    (reply,) = grid.pull_messages([two])
    assert did == ["b"]
    assert reply.metadata.reply_to_message_id == two
    assert read_reply(reply, "b").site == "b"
    assert tensors_of(reply, "b") is not None
    assert list(grid.pull_messages([two])) == []
    assert [m.metadata.reply_to_message_id for m in grid.pull_messages([one, two, "unknown"])] == [one]


def test_messages_may_be_sent_and_awaited_at_once_and_nodes_are_known_by_their_site(tmp_path):
    grid = LocalGrid(toy_app(), numbered(tmp_path, "a", "b", "c"))
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert [(n.name, n.status) for n in grid.get_nodes()] == [("a", "online"), ("b", "online"), ("c", "online")]
    replies = grid.send_and_receive([write_order(order("hello"), n) for n in grid.get_node_ids()])
    assert sorted(read_reply(m, "x").site for m in replies) == ["a", "b", "c"]


def test_an_exception_of_the_client_fails_its_order_and_the_round_goes_on(tmp_path, capsys):
    @dataclass(frozen=True)
    class Raising(ToyLearner):
        def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
            if site.name == "b":
                raise ZeroDivisionError("/data/of/Jane_Doe")
            return ToyLearner.learn(self, site, study, round_number, weights)

    run = new_run(tmp_path, TOY)
    state = run_local(run.path, nodes(["a", "b", "c"], tmp_path), client_app(Raising()))
    assert state.round == 2
    for line in read_lines(run.metrics):
        assert set(line["sites"]) == {"a", "c"}
        assert line["left_out"] == {"b": {"state": "failed", "reason": "CLIENT_ERROR"}}
    assert "ZeroDivisionError" in capsys.readouterr().err  # the researcher sees why
    assert "Jane_Doe" not in run.metrics.read_text()


# Worker processes, with a stand-in that starts in a moment

WORKER = """#!{python}
import base64, json, os, sys, time

def read():
    head = sys.stdin.buffer.read(8)
    return sys.stdin.buffer.read(int.from_bytes(head, "little")) if len(head) == 8 else sys.exit()

def write(content):
    sys.stdout.buffer.write(len(content).to_bytes(8, "little") + content)
    sys.stdout.buffer.flush()

write(b"ready")
while True:
    config, message = json.loads(read()), read()
    if config["does"] == "dies":
        os.kill(os.getpid(), 9)
    if config["does"] == "dies while it answers":
        sys.stdout.buffer.write((1000).to_bytes(8, "little") + b"half")
        sys.stdout.buffer.flush()
        os.kill(os.getpid(), 9)
    time.sleep(config.get("takes_s", 0))
    write(base64.b64decode(config["reply"]))
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pool]]:
    """Makes pools of stand-in workers."""
    script = tmp_path / "worker"
    script.write_text(WORKER.format(python=sys.executable))
    script.chmod(0o700)
    made: list[Pool] = []

    def make(size: int, threads: int = 0) -> Pool:
        made.append(Pool(size, threads))
        return made[-1]

    monkeypatch.setattr(sys, "executable", str(script))
    identify()
    yield make
    for each in made:
        each.close()


def asked(message_id: str) -> Message:
    sent = write_order(order("hello"), 1)
    sent.metadata.__dict__["_message_id"] = message_id
    return sent


def told(message: Message) -> NodeConfig:
    """What makes a stand-in answer `message`."""
    facts = Reply("hello", "a", "toy", 1, 1, sha256(TOY), "b" * 64)
    reply = write_reply(signed(facts, read_order(message), None), message)
    return {"does": "answers", "reply": base64.b64encode(message_to_proto(reply).SerializeToString()).decode()}


def submit(pool: Pool, message_id: str, does: str = "answers", takes_s: float = 0) -> None:
    message = asked(message_id)
    pool.submit(message_id, message, {**told(message), "does": does, "takes_s": takes_s})  # type: ignore[dict-item]


def replies(pool: Pool, count: int, timeout_s: float = 20) -> Mapping[str, Message]:
    found: dict[str, Message] = {}
    until = time.monotonic() + timeout_s
    while len(found) < count and time.monotonic() < until:
        found |= pool.take()
    return found


@pytest.mark.parametrize("does", ["dies", "dies while it answers"])
def test_a_worker_that_dies_fails_its_order_and_no_other(pool, does):
    workers = pool(2)
    for message_id, what in (("m1", "answers"), ("m2", does), ("m3", "answers"), ("m4", "answers")):
        submit(workers, message_id, what)
    found = replies(workers, 4)
    assert {i for i, m in found.items() if m.has_error()} == {"m2"}
    assert found["m2"].error.code == ErrorCode.CLIENT_APP_CRASHED  # the round asks the site again
    assert found["m2"].metadata.reply_to_message_id == "m2"
    assert all(read_reply(found[i], "a").kind == "hello" for i in ("m1", "m3", "m4"))


def test_a_worker_that_dies_while_it_has_nothing_to_do_is_replaced(pool):
    workers = pool(1)
    submit(workers, "m1")
    replies(workers, 1)
    workers.workers[0].process.kill()
    workers.workers[0].process.wait()
    assert replies(workers, 1, timeout_s=0.2) == {}
    assert workers.workers == []
    submit(workers, "m2")
    assert not replies(workers, 1)["m2"].has_error()


def test_a_worker_that_has_died_as_it_is_given_an_order_fails_that_order(pool):
    workers = pool(1)
    submit(workers, "m1")
    replies(workers, 1)
    workers.workers[0].process.kill()
    workers.workers[0].process.wait()
    submit(workers, "m2")  # nobody has looked at it since
    submit(workers, "m3")
    found = replies(workers, 2)
    assert found["m2"].error.code == ErrorCode.CLIENT_APP_CRASHED
    assert not found["m3"].has_error()


def test_no_more_workers_are_started_than_asked_for_and_none_before_it_is_needed(pool):
    workers = pool(3)
    assert workers.workers == []
    submit(workers, "m0")
    assert len(workers.workers) == 1
    for n in range(1, 6):
        submit(workers, f"m{n}", takes_s=0.05)
    assert len(workers.workers) == 3
    assert set(replies(workers, 6)) == {f"m{n}" for n in range(6)}
    assert len(workers.workers) == 3


def test_closing_the_pool_ends_its_workers_also_those_with_an_order_that_nobody_waits_for(pool):
    workers = pool(2)
    submit(workers, "m1")
    submit(workers, "m2", takes_s=60)
    replies(workers, 1)
    processes = [worker.process for worker in workers.workers]
    began = time.monotonic()
    workers.close()
    assert time.monotonic() - began < 10
    assert [process.returncode is not None for process in processes] == [True, True]


def test_a_worker_that_is_kept_serves_the_next_run_of_as_many_threads_and_ends_with_the_block(pool):
    with kept_workers():
        first = pool(1)
        submit(first, "m1")
        replies(first, 1)
        (kept,) = first.workers
        first.close()
        assert kept.process.poll() is None
        other, same = pool(1, threads=2), pool(1)
        for workers in (other, same):
            submit(workers, "m2")
            assert not replies(workers, 1)["m2"].has_error()
        assert other.workers[0].process.pid != kept.process.pid
        assert same.workers[0].process.pid == kept.process.pid
        for workers in (other, same):
            workers.close()
    assert kept.process.returncode is not None


def test_a_kept_worker_that_has_died_is_not_taken_and_a_busy_one_not_kept(pool):
    with kept_workers():
        first = pool(2)
        submit(first, "m1")
        submit(first, "m2", takes_s=60)
        replies(first, 1)
        idle, busy = sorted(first.workers, key=lambda worker: worker.busy_with is not None)
        first.close()
        assert busy.process.returncode is not None
        idle.process.kill()
        idle.process.wait()
        second = pool(1)
        submit(second, "m3")
        assert not replies(second, 1)["m3"].has_error()
        assert second.workers[0].process.pid not in (idle.process.pid, busy.process.pid)


def test_a_worker_takes_no_more_threads_than_it_was_given_unless_the_environment_says_so(pool, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for said, expected in ((None, b"OMP_NUM_THREADS=2"), ("5", b"OMP_NUM_THREADS=5")):
        if said:
            monkeypatch.setenv("OMP_NUM_THREADS", said)
        workers = pool(1, threads=2)
        submit(workers, "m1")
        environ = Path(f"/proc/{workers.workers[0].process.pid}/environ").read_bytes()
        assert expected in environ.split(b"\0")


def test_a_worker_that_cannot_start_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    workers = Pool(1)
    with pytest.raises(ProcessFailed, match="did not start"):
        submit(workers, "m1")
    assert workers.workers == []
    workers.close()


def test_a_large_order_passes_whole(pool):
    """Larger than a pipe holds: the worker must read while we write."""
    workers, message = pool(1), asked("m1")
    workers.submit("m1", message, {**told(message), "ballast": "x" * (4 << 20)})
    assert not replies(workers, 1)["m1"].has_error()


def test_frames_come_back_and_torn_ones_are_the_end(tmp_path):
    with (tmp_path / "pipe").open("w+b") as pipe:
        for content in (b"", b"ready", b"\0" * 100_000):
            write_frame(pipe, content)
        pipe.seek(0)
        assert [read_frame(pipe) for _ in range(4)] == [b"", b"ready", b"\0" * 100_000, None]
        pipe.truncate(20)
        pipe.seek(0)
        assert [read_frame(pipe), read_frame(pipe)] == [b"", None]
