"""A federation of real processes on this machine whose sites work by a script: coordinator, nodes, executors, TLS.

Each site dials the coordinator through a line of its own, which can be cut. Processes end with the one that made them.
Waits are long, because a machine may be busy; they say nothing of how long a thing takes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from fedclient.enrol import join
from fedclient.policy import Policy
from fedclient.site import Data, SiteFile, site_toml
from fedserver.checkpoint import RunFolder, create_run, read_progress, read_state
from fedserver.enrol import Federation, init_federation, invite
from fedserver.state import Run, add_run, change_run, find_run
from shared_models.errors import ProcessFailed
from shared_models.files import read_lines, write_atomic, write_json
from shared_models.study import Evaluate, Rounds, Study, sha256
from shared_models.supervise import Child, end, kept_port, read_status, reap, spawn
from simulations.bench.faults.app import FIRST, script_file, working_file
from simulations.bench.faults.line import Line
from simulations.demo import ONE_THREAD, await_port

APP = "simulations.bench.faults.app:app"
ROOT = Path(__file__).resolve().parents[3]
SERVE = (  # what `fedserver serve` does, with another app where one is named
    "import sys; from pathlib import Path; from fedserver.serve import serve; "
    "from shared_models.supervise import stop_on_signals; "
    "serve(Path(sys.argv[1]), '127.0.0.1', int(sys.argv[2]), stop_on_signals(), *sys.argv[3:])"
)
START = (  # what `fedclient start` does, with another app
    "import sys; from pathlib import Path; from fedclient.start import start; "
    "from shared_models.supervise import stop_on_signals; start(Path(sys.argv[1]), stop_on_signals(), sys.argv[2])"
)
COORDINATOR = "coordinator"
GRACE_S = 20.0


class FellShort(Exception):
    """A fault did not come to what it has to; the message is what was seen."""


@dataclass(slots=True)
class Fleet:
    """A coordinator and its sites, each with a supervisor of its own.

    Attributes:
        running: supervisors by site, and the coordinator's by `COORDINATOR`.
        marks: characters in the log of a site's executor as it was last started.
    """

    out: Path
    sites: tuple[str, ...]
    federation: Federation
    port: int
    lines: dict[str, Line] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)

    # ---- folders and processes ----

    def folder(self, who: str) -> Path:
        return self.federation.folder if who == COORDINATOR else self.out / who

    def serve(self, env: Mapping[str, str] | None = None, awaited: bool = True) -> None:
        """Starts the coordinator, with more in its environment where that is given, and waits until it listens."""
        self._supervise(COORDINATOR, [SERVE, str(self.federation.folder), str(self.port)], env or {})
        if awaited:
            await_port(f"127.0.0.1:{self.port}", 180.0)

    def join(self, site: str, policy: Policy | None = None) -> None:
        """Enrols a site, as `fedclient join` does; it will dial through a line of its own."""
        joined = join(invite(self.federation, site), self.folder(site))
        self.lines[site] = Line(self.port)
        images = self.out / "images"
        images.mkdir(exist_ok=True)
        allowed = policy or Policy(approval="inside-policy", least_cohort=1)
        address = f"127.0.0.1:{self.lines[site].port}"
        self.write_site(SiteFile(joined.site, address, joined.federation, Data(str(images)), policy=allowed))

    def write_site(self, file: SiteFile) -> None:
        write_atomic(self.folder(file.name) / "site.toml", site_toml(file).encode())

    def start(self, *sites: str, env: Mapping[str, str] | None = None) -> None:
        for site in sites:
            self.marks[site] = len(self.log(site, "executor"))
            self._supervise(site, [START, str(self.folder(site)), APP], env or {})

    def ready(self, *sites: str, timeout_s: float = 300.0) -> None:
        """Waits until the executors have loaded their app, and the coordinator's side of every node is known."""
        for site in sites:
            await_that(f"{site} is ready", partial(self._is_ready, site), timeout_s)

    def _is_ready(self, site: str) -> bool:
        return "ready; app" in self.log(site, "executor")[self.marks.get(site, 0) :]

    def stop(self, who: str) -> None:
        end(self.running.pop(who), GRACE_S)

    def kill(self, who: str) -> None:
        """A power cut: the supervisor and all its processes at once."""
        supervisor = self.running.pop(who)
        below = psutil.Process(supervisor.pid).children(recursive=True)
        for process in [psutil.Process(supervisor.pid), *below]:
            with_pid(process.pid, signal.SIGKILL)
        await_that(f"{who} has ended", lambda: reap(supervisor) is not None, 20)

    def pid(self, who: str, child: str) -> int | None:
        """Number of a supervised process: link, gateway, dispatch of the coordinator; node, executor of a site."""
        found = read_status(self.folder(who))["children"].get(child, {}).get("pid")
        return int(found) if found else None

    def run_pid(self) -> int | None:
        """The process that carries out a run: the dispatcher's child."""
        dispatcher = self.pid(COORDINATOR, "dispatch")
        children = psutil.Process(dispatcher).children() if dispatcher else []
        return int(children[0].pid) if children else None

    def killed(self, who: str, child: str) -> int:
        """Kills a supervised process, and returns its number."""
        pid = self.run_pid() if child == "run" else self.pid(who, child)
        if pid is None:
            raise FellShort(f"{who}: {child} does not run")
        with_pid(pid, signal.SIGKILL)
        return pid

    def restarts(self, who: str, child: str) -> int:
        return int(read_status(self.folder(who))["children"].get(child, {}).get("restarts", 0))

    def log(self, who: str, name: str) -> str:
        path = self.folder(who) / f"logs/{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _supervise(self, who: str, script: Sequence[str], env: Mapping[str, str]) -> None:
        path = os.pathsep.join(filter(None, (env.get("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH"))))
        child = Child(
            who, [sys.executable, "-c", *script], self.out / f"{who}.log", {**ONE_THREAD, **env, "PYTHONPATH": path}
        )
        self.running[who] = spawn(child)

    # ---- what sites do ----

    def script(
        self,
        site: str,
        do: str = "",
        seconds: float = 0.0,
        rounds: Sequence[int] = (),
        each: Mapping[int, str] | None = None,
    ) -> None:
        """What a site does from its next order on; see `app.script_file`."""
        words = {str(number): word for number, word in (each or {}).items()}
        made = {"do": do, "seconds": seconds, "rounds": list(rounds), "each": words}
        write_json(script_file(self.folder(site)), made)

    def honest(self, seconds: float = 0.0) -> None:
        """All sites work honestly, for so long on each order."""
        for site in self.sites:
            self.script(site, seconds=seconds)

    def works(self, site: str) -> bool:
        return working_file(self.folder(site)).exists()

    # ---- runs ----

    def begin(self, name: str, study: Study) -> RunFolder:
        run = create_run(self.federation.runs, name, study, FIRST)
        now = time.time()
        add_run(self.federation.state, Run(name, study.name, sha256(study), "queued", None, now, now, ""))
        return run

    def run(self, name: str) -> Run:
        found = find_run(self.federation.state, name)
        if found is None:
            raise FellShort(f"run {name}: is gone")
        return found

    def finish(self, name: str, timeout_s: float = 240.0) -> RunFolder:
        """Waits until a run is finished.

        Raises:
            FellShort: it has not by then, or ends in another way.
        """
        await_that(f"run {name} has ended", lambda: self.run(name).state not in ("queued", "running"), timeout_s)
        found = self.run(name)
        if found.state != "finished":
            raise FellShort(f"run {name}: is {found.state}: {found.message}")
        return RunFolder(self.federation.runs / name)

    def cease(self, name: str) -> RunFolder:
        """Stops a run that has shown what it was to show, and waits until its process has ended."""
        change_run(self.federation.state, name, time.time(), "stopped")
        await_that(f"the process of {name} has ended", lambda: self.run_pid() is None, 30)
        return RunFolder(self.federation.runs / name)


@contextmanager
def fleet(out: Path, count: int, started: int | None = None, folder: Path | None = None) -> Iterator[Fleet]:
    """Founds and serves a federation with sites s1, s2, ...; all are ended with the block.

    Args:
        started: how many of them are started; all unless given.
        folder: of the federation; `out`/federation unless given.
    """
    out.mkdir(parents=True, exist_ok=True)
    port = kept_port(out / "port")
    federation = init_federation(folder or out / "federation", "faults", f"127.0.0.1:{port}")
    sites = tuple(f"s{i}" for i in range(1, count + 1))
    made = Fleet(out, sites, federation, port)
    try:
        made.serve()
        for site in sites:
            made.join(site)
        at_once = sites[:started]
        made.start(*at_once)
        made.ready(*at_once)
        yield made
    finally:
        for line in made.lines.values():
            line.close()
        for process in made.running.values():
            if reap(process) is None:
                with_pid(process.pid, signal.SIGTERM)
        for process in made.running.values():
            if process.returncode is None:
                end(process, GRACE_S)


def study(name: str, rounds: int, **bounds: Any) -> Study:
    """A study of short rounds that neither evaluates nor looks at images."""
    given = {"quorum": 2, "deadline_s": 60.0, "gather_s": 20.0, "pause_s": 120.0, **bounds}
    return Study(name, rounds=Rounds(rounds, **given), evaluate=Evaluate(every=0))


def await_that(what: str, done: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    """The first true answer; raises FellShort with `what` once the time is over."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if found := done():
            return found
        time.sleep(0.05)
    raise FellShort(f"after {timeout_s:.0f} s still not: {what}")


def await_finished(run: RunFolder, number: int, timeout_s: float) -> None:
    """Waits until a round is finished."""
    await_that(f"round {number} of {run.id} is finished", lambda: round_of(run) >= number, timeout_s)


def round_of(run: RunFolder) -> int:
    """The last finished round."""
    return read_state(run).round


def seat(run: RunFolder, site: str) -> str:
    """How a site stands in the round in progress."""
    return str(read_progress(run).get("sites", {}).get(site, {}).get("state", ""))


def told(run: RunFolder, number: int) -> dict[str, Any]:
    """The line of a finished round."""
    for line in read_lines(run.metrics):
        if line["round"] == number:
            return dict(line)
    raise FellShort(f"round {number}: is not in metrics.jsonl")


def with_pid(pid: int, number: int) -> None:
    """Sends a signal to a process, if it is there."""
    if pid <= 1:
        raise ProcessFailed(f"process {pid}: is none of ours")
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
