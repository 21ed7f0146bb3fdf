"""Gateway, SuperLink, dispatcher, nodes and executors as real processes over mutual TLS, carrying out a toy app.

What is killed here is killed with SIGKILL, in the middle of its work; the run goes on, with each round counted once.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedclient.enrol import join
from fedserver.checkpoint import RunFolder
from fedserver.enrol import init_federation, invite
from fedserver.link import open_link, run_states
from fedserver.queue import finished_round, hold_file
from fedserver.state import Run, add_run, change_run, find_run, list_runs
from shared_models.files import read_json, read_lines, write_atomic, write_json
from shared_models.supervise import kept_port, read_status
from simulations.bench.faults.fleet import SERVE, START

pytestmark = pytest.mark.process
ROOT = Path(__file__).resolve().parents[2]
SITES = ("north", "south")
SERVER_APP, CLIENT_APP = "tests.processes.toy_apps:server_app", "tests.processes.toy_apps:client_app"


@dataclass(slots=True)
class Deployment:
    """A federation and its sites as processes on this machine."""

    folder: Path
    sites: dict[str, Path]
    port: int
    supervisors: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)

    def serve(self) -> None:
        self._supervise(self.folder, SERVE, str(self.port), SERVER_APP)

    def start(self, site: str) -> None:
        self._supervise(self.sites[site], START, CLIENT_APP)

    def _supervise(self, folder: Path, script: str, *more: str) -> None:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        with (folder / "logs/supervisor.log").open("ab") as log:
            command = [sys.executable, "-c", script, str(folder), *more]
            self.supervisors[folder] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def queue(self, run: str, rounds: int, sleep_s: float = 0.0) -> None:
        plan = {"rounds": rounds, "sleep_s": sleep_s, "sites": len(self.sites)}
        write_json(self.folder / "runs" / run / "plan.json", plan)
        now = time.time()
        add_run(self.folder / "state.db", Run(run, "toy", "0" * 64, "queued", None, now, now, ""))

    def run(self, run: str) -> Run:
        found = find_run(self.folder / "state.db", run)
        assert found is not None
        return found

    def finish(self, run: str, timeout_s: float = 90.0) -> None:
        wait(f"end of {run}", lambda: self.run(run).state not in ("queued", "running"), timeout_s)
        assert self.run(run).state == "finished", self.run(run)

    def lines(self, run: str) -> list[dict[str, Any]]:
        return read_lines(self.folder / "runs" / run / "rounds.jsonl")

    def pid(self, folder: Path, child: str) -> int:
        return int(read_status(folder)["children"][child]["pid"])

    def run_pids(self) -> list[int]:
        """Processes of runs: the children of the dispatcher."""
        return [child.pid for child in psutil.Process(self.pid(self.folder, "dispatch")).children()]

    def is_working(self, site: str) -> bool:
        return (self.sites[site] / "working.json").exists()

    def all_rounds_once(self, run: str, rounds: int) -> None:
        lines = self.lines(run)
        assert [line["round"] for line in lines] == list(range(1, rounds + 1))
        assert [line["sum"] for line in lines] == [len(SITES) * n**2 for n in range(1, rounds + 1)]


def wait(what: str, done: Callable[[], Any], timeout_s: float = 60.0) -> None:
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < timeout_s, f"no {what} within {timeout_s} s"
        time.sleep(0.05)


def kill(pid: int) -> float:
    """Kills a process and tells when (monotonic)."""
    assert pid > 1
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    tmp = tmp_path_factory.mktemp("deployment")
    port = kept_port(tmp / "port")
    federation = init_federation(tmp / "federation", "Toy", f"127.0.0.1:{port}")
    made = Deployment(federation.folder, {name: tmp / name for name in SITES}, port)
    try:
        made.serve()
        wait("listeners", lambda: listens(port) and (federation.folder / "superlink/state.db").exists())
        for name, site in made.sites.items():
            join(invite(federation, name), site)
            write_atomic(site / "site.toml", f'coordinator = "{federation.address}"\n'.encode())
            made.start(name)
        made.queue("first", rounds=1)
        made.finish("first")
        yield made
    finally:
        for supervisor in made.supervisors.values():
            supervisor.terminate()
        for supervisor in made.supervisors.values():
            try:
                supervisor.wait(20)
            except subprocess.TimeoutExpired:
                supervisor.kill()


@pytest.fixture(autouse=True)
def nothing_runs_on(deployment: Deployment) -> Iterator[None]:
    """A test that fails leaves no run to the next one."""
    yield
    state = deployment.folder / "state.db"
    left = [run.id for run in list_runs(state) if run.state in ("queued", "running")]
    for run in left:
        change_run(state, run, time.time(), "stopped")
    if left:
        wait("end of what was left", lambda: not deployment.run_pids(), 20)


def listens(port: int) -> bool:
    return any(c.laddr.port == port and c.status == "LISTEN" for c in psutil.net_connections("tcp"))


def test_a_round_waits_for_no_poll_of_flowers(deployment: Deployment) -> None:
    """Flower asks again after 3 s; of many rounds the quickest is told by that, however busy the machine is."""
    deployment.queue("timed", rounds=15)
    deployment.finish("timed")
    deployment.all_rounds_once("timed", 15)
    seconds = sorted(line["seconds"] for line in deployment.lines("timed"))
    print("seconds per round:", [round(s, 2) for s in seconds])
    assert seconds[0] <= 1.0


def test_no_token_or_secret_shows_in_a_command_line_or_environment(deployment: Deployment) -> None:
    deployment.queue("looked-at", rounds=2, sleep_s=2.0)
    wait("work", lambda: deployment.is_working("north"))
    token = read_json(deployment.sites["north"] / "secrets/task")["token"]
    secrets = [(deployment.folder / "secrets" / name).read_bytes().hex() for name in ("superexec", "control")]
    shown = ""
    for supervisor in deployment.supervisors.values():
        for process in psutil.Process(supervisor.pid).children(recursive=True):
            shown += " ".join([*process.cmdline(), *process.environ().values()])
    assert not any(secret in shown for secret in [*secrets, token])
    assert not [word for word in shown.split() if len(word) == 256]  # a task token is 128 bytes, hexadecimal
    deployment.finish("looked-at")


def test_a_killed_executor_is_replaced_and_its_order_given_again(deployment: Deployment) -> None:
    deployment.queue("executor", rounds=2, sleep_s=3.0)
    wait("work", lambda: deployment.is_working("north"))
    killed_at = kill(deployment.pid(deployment.sites["north"], "executor"))
    (deployment.sites["north"] / "working.json").unlink()
    wait("work again", lambda: deployment.is_working("north"))
    print(f"executor: working again after {time.monotonic() - killed_at:.1f} s")
    deployment.finish("executor")
    deployment.all_rounds_once("executor", 2)
    assert deployment.lines("executor")[0]["errors"] == ["8 EXECUTOR_RESTARTED"]


def test_a_killed_node_is_back_without_the_lock_out_and_its_order_given_again(deployment: Deployment) -> None:
    deployment.queue("node", rounds=2, sleep_s=2.0)
    wait("work", lambda: deployment.is_working("south"))
    killed_at = kill(deployment.pid(deployment.sites["south"], "node"))
    wait("rounds", lambda: len(deployment.lines("node")) >= 1)
    print(f"node: round finished {time.monotonic() - killed_at:.1f} s after the kill")
    assert time.monotonic() - killed_at < 30  # Flower alone: 60 s of lock-out, and the order is lost in silence
    deployment.finish("node")
    deployment.all_rounds_once("node", 2)
    assert deployment.lines("node")[0]["errors"] == ["5 NODE_RESTARTED"]


def test_a_killed_server_app_goes_on_after_its_last_round(deployment: Deployment) -> None:
    deployment.queue("child", rounds=4, sleep_s=1.0)
    wait("two rounds", lambda: len(deployment.lines("child")) >= 2)
    (pid,) = deployment.run_pids()
    killed_at = kill(pid)
    wait("a third", lambda: len(deployment.lines("child")) >= 3)
    print(f"ServerApp: next round finished after {time.monotonic() - killed_at:.1f} s")
    deployment.finish("child")
    deployment.all_rounds_once("child", 4)
    assert len({line["pid"] for line in deployment.lines("child")}) == 2


def test_a_killed_dispatcher_takes_its_processes_along_and_takes_over_again(deployment: Deployment) -> None:
    deployment.queue("dispatch", rounds=3, sleep_s=1.0)
    wait("a round", lambda: len(deployment.lines("dispatch")) >= 1)
    (child,) = deployment.run_pids()
    kill(deployment.pid(deployment.folder, "dispatch"))
    wait("end of the child", lambda: not psutil.pid_exists(child), 5)
    deployment.finish("dispatch")
    deployment.all_rounds_once("dispatch", 3)


def test_a_killed_superlink_costs_seconds_and_no_round(deployment: Deployment) -> None:
    deployment.queue("link", rounds=4, sleep_s=1.0)
    wait("a round", lambda: len(deployment.lines("link")) >= 1)
    wait("work", lambda: deployment.is_working("north"))
    killed_at = kill(deployment.pid(deployment.folder, "link"))
    wait("the next", lambda: len(deployment.lines("link")) >= 2)
    print(f"SuperLink: round finished {time.monotonic() - killed_at:.1f} s after the kill")
    deployment.finish("link")
    deployment.all_rounds_once("link", 4)
    assert len({line["pid"] for line in deployment.lines("link")}) == 1  # its process lived on


def test_a_killed_supervisor_leaves_nothing_behind_and_serve_goes_on(deployment: Deployment) -> None:
    deployment.queue("supervisor", rounds=3, sleep_s=1.0)
    wait("a round", lambda: len(deployment.lines("supervisor")) >= 1)
    supervisor = deployment.supervisors[deployment.folder]
    below = psutil.Process(supervisor.pid).children(recursive=True)
    assert len(below) == 4
    supervisor.kill()
    supervisor.wait()
    wait("end of all", lambda: not any(process.is_running() for process in below), 5)
    assert read_status(deployment.folder)["supervisor"] is None
    deployment.serve()
    deployment.finish("supervisor")
    deployment.all_rounds_once("supervisor", 3)


def test_a_stopped_run_ends_and_sites_are_free_for_the_next(deployment: Deployment) -> None:
    deployment.queue("stopped", rounds=100, sleep_s=1.0)
    wait("a round", lambda: len(deployment.lines("stopped")) >= 1)
    change_run(deployment.folder / "state.db", "stopped", time.time(), "stopped")
    wait("its end", lambda: not deployment.run_pids(), 15)
    deployment.queue("next", rounds=1)
    deployment.finish("next")
    assert deployment.run("stopped").state == "stopped"
    states = run_states(open_link(deployment.folder))
    stopped = deployment.run("stopped").flower_run_id
    assert stopped is not None
    wait("Flower's end", lambda: run_states(open_link(deployment.folder))[stopped].startswith("finished"))
    assert "running" not in {states[run] for run in states if run != stopped}


def test_a_run_rests_after_its_round_while_the_next_takes_its_turn_and_then_goes_on(deployment: Deployment) -> None:
    deployment.queue("rests", rounds=6, sleep_s=1.0)
    deployment.queue("in-turn", rounds=1)
    wait("a round", lambda: len(deployment.lines("rests")) >= 1)
    assert deployment.run("in-turn").state == "queued"
    folder = RunFolder(deployment.folder / "runs/rests")
    after = finished_round(folder) + 1
    write_json(hold_file(folder), {"after": after, "at": time.time()})
    wait("its rest", lambda: deployment.run("rests").state == "paused")
    assert after <= len(deployment.lines("rests")) < 6
    deployment.finish("in-turn")
    assert deployment.run("rests").state == "paused"
    change_run(deployment.folder / "state.db", "rests", time.time(), "queued")
    deployment.finish("rests")
    deployment.all_rounds_once("rests", 6)


def test_a_run_whose_process_dies_at_once_fails_with_a_word(deployment: Deployment) -> None:
    now = time.time()
    add_run(deployment.folder / "state.db", Run("no-plan", "toy", "0" * 64, "queued", None, now, now, ""))
    wait("failure", lambda: deployment.run("no-plan").state == "failed", 120)
    assert "5 times in 120 s after round 0; see logs/run-no-plan.log" in deployment.run("no-plan").message


def test_an_executor_whose_gpu_has_failed_says_so_and_is_replaced(deployment: Deployment) -> None:
    write_json(deployment.folder / "runs/gpu/state.json", {"round": 96})  # the toy's GPU breaks in round 97
    before = {name: deployment.pid(site, "executor") for name, site in deployment.sites.items()}
    deployment.queue("gpu", rounds=98)
    deployment.finish("gpu")
    errors = [line["errors"] for line in deployment.lines("gpu")]
    assert errors == [["2 DEVICE_FAILED"] * len(SITES), []]
    for name, site in deployment.sites.items():
        assert deployment.pid(site, "executor") != before[name]
        assert b"launch failure" not in (site / "logs/executor.log").read_bytes()


def test_an_error_of_the_app_is_a_code_at_the_coordinator_and_its_text_stands_in_no_file(
    deployment: Deployment,
) -> None:
    plan = {"rounds": 99, "sleep_s": 0.0, "sites": len(SITES)}
    write_json(deployment.folder / "runs/error/plan.json", plan)
    write_json(deployment.folder / "runs/error/state.json", {"round": 98})  # the toy raises in round 99
    now = time.time()
    add_run(deployment.folder / "state.db", Run("error", "toy", "0" * 64, "queued", None, now, now, ""))
    log = deployment.sites["north"] / "logs/executor.log"
    wait("the error", lambda: b'"type": "ValueError"' in log.read_bytes())
    assert b"the coordinator is told APP_FAILED" in log.read_bytes()
    change_run(deployment.folder / "state.db", "error", time.time(), "stopped")
    wait("its end", lambda: not deployment.run_pids(), 15)
    for folder in (deployment.folder, *deployment.sites.values()):
        for path in folder.rglob("*"):
            assert not path.is_file() or b"patient 4711" not in path.read_bytes(), path


def test_all_files_belong_to_their_owner_alone_and_flower_keeps_no_archive(deployment: Deployment) -> None:
    for folder in (deployment.folder, *deployment.sites.values()):
        for path in folder.rglob("*"):
            if path.name in ("supervisor.log", "site.toml", "logs"):
                continue  # made by this test
            assert path.stat().st_mode & 0o077 == 0, path
        assert not list(folder.rglob("apps/*"))
    run_states(open_link(deployment.folder))  # Flower clears what a finished run left when runs are listed
    with closing(sqlite3.connect(deployment.folder / "superlink/state.db")) as database:
        assert database.execute("SELECT count(*) FROM objects").fetchone()[0] == 0


def test_memory_of_each_process_stays_small(deployment: Deployment) -> None:
    for supervisor in deployment.supervisors.values():
        for process in psutil.Process(supervisor.pid).children():
            size_mib = process.memory_info().rss / 2**20
            print(f"{process.cmdline()[2]}: {size_mib:.0f} MiB")
            assert size_mib < 250
