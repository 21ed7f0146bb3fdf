"""Carries out the runs that are queued: each is a Flower run with a process of its own for the ServerApp.

Flower 1.41 never resumes a run whose ServerApp died. Here the run of ours outlives it: the Flower run is stopped and
another one started, whose process goes on from the last finished round. The process runs the installed package's app;
the archive is compared, never unpacked. Its task token comes through stdin (Flower's own executor shows it in `ps`).
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import httpx

from fedserver.checkpoint import RunFolder
from fedserver.link import Link, open_link, run_states, start_run, stop_run
from fedserver.queue import AT_ONCE, due, hold_of, unhold
from fedserver.queue import finished_round as round_of
from fedserver.queue import words as paused_words
from fedserver.state import ACTIVE, Run, change_run, check_state, find_run, list_runs
from shared_models.archive import (
    RUN_KEY,
    SERVER_APP,
    app_archive,
    digest,
    flower_module,
    load_app,
    patch_client,
    quiet_flower,
    replace_name,
    start_log,
)
from shared_models.errors import FederationError, ProcessFailed, RoundPaused, StateInvalid
from shared_models.logs import prune
from shared_models.supervise import Child, end, kept_secret, reap, rotate, spawn, stop_on_signals

if TYPE_CHECKING:  # flwr reads some switches when it is imported: see `quiet_flower`
    from flwr.app import Context
    from flwr.serverapp import Grid
    from flwr.supercore.runtime import RuntimeHttpClient

POLL_S = 0.2
LINK_PATIENCE_S = 2.0  # the loop comes back to what it could not do
MOST_DEATHS, WITHIN_S = 5, 120.0
ACQUIRE_S = 30.0  # a Flower run whose task has not been handed out by then is given up
GRACE_S = 8.0  # from SIGTERM to SIGKILL; Flower ends by force after 5
LOOK_S, HANGS_S = 10.0, 30.0  # between looks at the Flower run of a process; how long one may outlive it
LEASE_S, STARTS_S = 10.0, 300.0  # Flower takes a task back after 30 s; how long a process may take to begin
REPLY_S = 15.0  # for the content of a reply, which follows it at once: a site that keeps it back holds up the round
FINISHED, PAUSED = 40, 41  # exit codes of the ServerApp's process; Flower itself ends with 0 when it is told to stop

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Desk:
    """What the dispatcher works with.

    Attributes:
        at_once: runs that are carried out side by side.
    """

    folder: Path
    superlink: str
    app: str
    at_once: int = AT_ONCE

    @property
    def state(self) -> Path:
        return self.folder / "state.db"

    def link(self) -> Link:
        return replace(open_link(self.folder, self.superlink), patience_s=LINK_PATIENCE_S)


@dataclass(slots=True)
class Job:
    """A run that is being carried out.

    Attributes:
        flower_run_id: the Flower run that carries it out, once there is one.
        stale: Flower runs that have lost their process and are still to be stopped.
        deaths: when its processes died, without a finished round between.
        ending_since: when its process was told to end.
        token: of the task that the process has.
        child_at: when its process was started.
        leased_at: when Flower last heard from here that the task is in hand.
        looked_at: when it was last asked whether Flower's run goes on.
        outlived_at: when it was seen that the process outlives that run.
        resting: a person has paused it; one that lacks its quorum ends by itself.
    """

    run_id: str
    flower_run_id: int | None = None
    stale: list[int] = field(default_factory=list)
    child: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    next_start: float = 0.0
    deaths: list[float] = field(default_factory=list)
    round: int = 0
    ending_since: float | None = None
    token: str = field(default="", repr=False)
    child_at: float = 0.0
    leased_at: float = 0.0
    looked_at: float = 0.0
    outlived_at: float | None = None
    resting: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fedserver.dispatch", description="Carries out queued runs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--superlink", required=True, metavar="127.0.0.1:PORT")
    parser.add_argument("--app", default=SERVER_APP, metavar="MODULE:NAME", help="installed app to run")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="runs that are carried out side by side")
    parser.add_argument("--child", action="store_true", help="be the process of one run; reads a task token from stdin")
    arguments = parser.parse_args()
    desk = Desk(arguments.folder.resolve(), arguments.superlink, arguments.app, arguments.at_once)
    os.umask(0o077)
    os.environ.update(quiet_flower(desk.folder / "superlink/flower", os.environ))
    start_log()
    try:
        if arguments.child:
            run_child(desk, sys.stdin.readline().strip())
        else:
            dispatch(desk, stop_on_signals())
    except FederationError as error:
        sys.exit(f"fedserver.dispatch: {error}")


# ---- the dispatcher ----


def dispatch(desk: Desk, stop: threading.Event) -> None:
    """Takes up queued runs, and running ones that have no process, until `stop`; their processes end with it."""
    check_state(desk.state)
    jobs: dict[str, Job] = {}
    with _task_client(desk) as client:
        try:
            while not stop.wait(POLL_S):
                try:
                    step(desk, jobs, client)
                except (FederationError, httpx.HTTPError, OSError) as error:  # SuperLink away, disk full
                    log.warning("%s; trying again", error)
        finally:
            for job in jobs.values():
                if job.child is not None:
                    end(job.child, GRACE_S)


def step(desk: Desk, jobs: dict[str, Job], client: "RuntimeHttpClient") -> None:
    """Looks at each run once and does what is due."""
    runs = {run.id: run for run in list_runs(desk.state)}
    for run_id in due(list(runs.values()), jobs, desk.at_once):
        left = runs[run_id].flower_run_id
        jobs[run_id] = Job(run_id, stale=[] if left is None else [left], round=finished_round(desk.folder, run_id))
    for job in list(jobs.values()):
        watch(desk, job, runs[job.run_id])
    for job in list(jobs.values()):
        while job.stale:
            stop_run(desk.link(), job.stale[0])
            del job.stale[0]
        if job.child is None and find_state(desk, job.run_id) not in ACTIVE:
            del jobs[job.run_id]
            run_states(desk.link(), limit=20)  # Flower clears what a finished run left when runs are listed
        elif job.child is None and job.flower_run_id is None and time.monotonic() >= job.next_start:
            begin(desk, job)
    acquire(desk, jobs, client)


def watch(desk: Desk, job: Job, run: Run) -> None:
    """Ends the process of a stopped run, and settles a run whose process has ended."""
    now = time.monotonic()
    run = rest(desk, job, run)
    if job.child is None:
        if job.flower_run_id is not None and now - job.started_at > ACQUIRE_S:
            log.warning("run %s: Flower handed out no task for it", job.run_id)
            job.stale.append(job.flower_run_id)
            job.flower_run_id = None
        elif job.flower_run_id is not None and run.state not in ACTIVE:
            job.stale.append(job.flower_run_id)
            job.flower_run_id = None
        return
    if (run.state == "stopped" or job.resting) and job.ending_since is None:
        job.ending_since = now
        os.kill(job.child.pid, signal.SIGTERM)
    elif job.ending_since is not None and now - job.ending_since > GRACE_S:
        os.kill(job.child.pid, signal.SIGKILL)
    rotate(desk.folder / f"logs/run-{job.run_id}.log")
    code = reap(job.child)
    if code is None:
        hold(desk, job, now)
        end_hung(desk, job, job.child.pid, now)
    else:
        job.child, job.ending_since, job.outlived_at, job.resting = None, None, None, False
        if job.flower_run_id is not None and code != FINISHED:  # then Flower has finished it itself
            job.stale.append(job.flower_run_id)
        job.flower_run_id = None
        settle(desk, job, run, code)


def hold(desk: Desk, job: Job, now: float) -> None:
    """Keeps the task of a process that is still starting: under load its imports take longer than Flower's lease.

    Later the process speaks for itself, and one that hangs loses its task: see `end_hung`.
    """
    if now - job.child_at > STARTS_S or now - job.leased_at < LEASE_S:
        return
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

    job.leased_at = now
    with _task_client(desk, job.token) as client, suppress(httpx.HTTPError):  # it is tried again
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


def end_hung(desk: Desk, job: Job, pid: int, now: float) -> None:
    """Kills a process whose Flower run has long ended without it: one that hangs sends no heartbeat, nor ends itself.

    Flower then gives up its task and run, and our run would wait for the process for ever, with others behind it.
    """
    if job.flower_run_id is None or now - job.looked_at < LOOK_S:
        return
    job.looked_at = now
    try:
        state = run_states(desk.link()).get(job.flower_run_id, "")
    except (FederationError, httpx.HTTPError) as error:  # what is asked for later tells it too
        log.warning("run %s: whether Flower's run goes on could not be asked (%s)", job.run_id, type(error).__name__)
        return
    if not state.startswith("finished"):
        job.outlived_at = None
    elif job.outlived_at is None:
        job.outlived_at = now
    elif now - job.outlived_at > HANGS_S:
        log.warning("run %s: Flower's run is %s, but its process hangs and is killed", job.run_id, state)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def rest(desk: Desk, job: Job, run: Run) -> Run:
    """Pauses a run once the round is finished that a person has named; the run as it is then."""
    folder = RunFolder(desk.folder / "runs" / job.run_id)
    hold = hold_of(folder)
    if hold is None or run.state not in ACTIVE:
        return run
    done = finished_round(desk.folder, job.run_id)
    if done < hold.after:
        return run
    job.resting = True
    log.info("run %s: paused by a person after round %s", job.run_id, done)
    paused = change_run(desk.state, job.run_id, time.time(), "paused", paused_words(job.run_id, done), among=ACTIVE)
    unhold(folder)  # last: what could not be written down is still wanted
    return paused


def settle(desk: Desk, job: Job, run: Run, code: int) -> None:
    """Decides what becomes of a run whose process ended with `code`; its state may have been set by that process."""
    if run.state not in ACTIVE or code == PAUSED:
        return
    if code == FINISHED:
        change_run(desk.state, job.run_id, time.time(), "finished", among=ACTIVE)
        return
    now, done = time.monotonic(), finished_round(desk.folder, job.run_id)
    if done > job.round:
        job.deaths.clear()
        job.round = done
    job.deaths = [*(at for at in job.deaths if now - at < WITHIN_S), now]
    how = f"ended by signal {-code}" if code < 0 else f"ended with status {code}"
    where = f"see logs/run-{job.run_id}.log"
    if len(job.deaths) >= MOST_DEATHS:
        words = f"its process {how}, {len(job.deaths)} times in {WITHIN_S:.0f} s after round {done}; {where}"
        change_run(desk.state, job.run_id, time.time(), "failed", f"{words}. {run.message}".strip(), among=ACTIVE)
        return
    job.next_start = now + (2.0 ** (len(job.deaths) - 2) if len(job.deaths) > 1 else 0.0)
    log.warning("run %s: its process %s; goes on after round %s, %s", job.run_id, how, done, where)


def begin(desk: Desk, job: Job) -> None:
    """Starts the Flower run of a job."""
    flower_run_id = start_run(desk.link(), app_archive(), {RUN_KEY: job.run_id})
    begun = change_run(desk.state, job.run_id, time.time(), "running", flower_run_id=flower_run_id, among=ACTIVE)
    if begun.state != "running":  # stopped or paused meanwhile
        job.stale.append(flower_run_id)
        return
    job.flower_run_id, job.started_at, job.resting = flower_run_id, time.monotonic(), False


def acquire(desk: Desk, jobs: Mapping[str, Job], client: "RuntimeHttpClient") -> None:
    """Takes the tasks of the Flower runs that were begun, and gives each a process."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType

    while waiting := {j.flower_run_id: j for j in jobs.values() if j.flower_run_id is not None and j.child is None}:
        answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        if not (answer.HasField("task") and answer.token):
            return
        job = waiting.get(answer.task.run_id)
        if job is None:
            log.warning("Flower run %s: is none of ours and is stopped", answer.task.run_id)
            stop_run(desk.link(), answer.task.run_id)
            continue
        prune(desk.folder / "logs")
        child = Child(
            f"run {job.run_id}",
            [
                *(sys.executable, "-m", "fedserver.dispatch", str(desk.folder)),
                *("--superlink", desk.superlink, "--app", desk.app, "--child"),
            ],
            desk.folder / f"logs/run-{job.run_id}.log",
        )
        job.child, job.token = spawn(child, stdin=subprocess.PIPE), answer.token
        job.child_at = job.leased_at = time.monotonic()
        if job.child.stdin is not None:
            with suppress(BrokenPipeError), job.child.stdin as stdin:  # a child that died already is settled later
                stdin.write(answer.token.encode() + b"\n")
        log.info("run %s: process %s, Flower run %s", job.run_id, job.child.pid, job.flower_run_id)


def finished_round(folder: Path, run_id: str) -> int:
    """Last finished round of a run of the federation in `folder`."""
    return round_of(RunFolder(folder / "runs" / run_id))


def find_state(desk: Desk, run_id: str) -> str:
    run = find_run(desk.state, run_id)
    return run.state if run else "stopped"


def _task_client(desk: Desk, token: str = "") -> "RuntimeHttpClient":
    """A client that may ask the SuperLink for tasks, or speak for the one task of `token`."""
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.runtime import RuntimeHttpClient

    interceptors: list[Any] = [RuntimeVersionHttpInterceptor("fedserver")]
    if token:
        interceptors.append(RuntimeTokenHttpInterceptor(token))
    else:
        methods = flower_module("flwr.supercore.superexec.run_superexec")._SUPEREXEC_AUTH_METHODS
        secret = kept_secret(desk.folder / "secrets/superexec")
        interceptors.append(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=methods))
    ca_pem = (desk.folder / "ca/ca.pem").read_bytes()
    return RuntimeHttpClient.from_server_address(desk.superlink, False, ca_pem, interceptors)


# ---- the process of one run ----


def run_child(desk: Desk, token: str) -> None:
    """Runs Flower's own ServerApp runtime in this process and never returns; the exit code says how it went."""
    outcome = {"code": 1}
    flower = flower_module("flwr.superlink.runtime.run_serverapp")
    patch_client(REPLY_S)
    replace_name(flower, "install_from_fab", _check_archive)
    components = {"tool": {"flwr": {"app": {"components": {"serverapp": desk.app}}}}}
    replace_name(flower, "get_project_config", lambda _folder: components)
    replace_name(flower, "get_fused_config_from_dir", partial(_run_config, desk.folder))
    replace_name(flower, "start_log_uploader", lambda **_: None)  # logs stay in logs/, not in Flower's database
    replace_name(flower, "run_", partial(_run_app, desk, outcome))
    try:
        flower.run_serverapp(
            runtime_api_address=desk.superlink,
            log_queue=Queue(),
            token=token,
            insecure=False,
            certificates=(desk.folder / "ca/ca.pem").read_bytes(),
            parent_pid=os.getppid(),  # for systems without PR_SET_PDEATHSIG
        )
    except SystemExit:
        log.info("Flower has ended")
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome["code"])


def _check_archive(archive: bytes, **_: object) -> None:
    """In place of unpacking it."""
    if digest(archive) != digest(app_archive()):
        raise ProcessFailed(f"archive {digest(archive)[:12]}: is not of this package. Start runs with `fedserver run`.")


def _run_config(folder: Path, _app_folder: Path, sent: Mapping[str, Any]) -> dict[str, Any]:
    """What the ServerApp is told; the folder is added here, so that it is not sent to the hospitals."""
    return {RUN_KEY: "", **sent, "federation": str(folder)}


def _run_app(desk: Desk, outcome: dict[str, int], grid: "Grid", context: "Context", **_: object) -> "Context":
    """Calls the installed app, and keeps how it ended."""
    run_id = str(context.run_config[RUN_KEY])
    try:
        load_app(desk.app)(grid=grid, context=context)
    except RoundPaused as paused:
        outcome["code"] = PAUSED
        change_run(desk.state, run_id, time.time(), "paused", str(paused), among=("running",))
        raise
    except (FederationError, OSError) as error:  # OSError: a full disk
        with suppress(StateInvalid):  # which keeps the state from being written too
            change_run(desk.state, run_id, time.time(), "running", str(error), among=("running",))
        raise
    outcome["code"] = FINISHED
    return context


if __name__ == "__main__":
    main()
