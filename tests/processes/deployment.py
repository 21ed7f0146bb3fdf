"""A federation of real processes on this machine, for tests and benchmarks that need one."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedserver.checkpoint import RunFolder, read_progress
from shared_models.supervise import read_status
from simulations.demo import await_port, background, command, free_port
from tests.processes.wiretap import Wiretap, wiretap


@dataclass(frozen=True)
class Deployment:
    """Folders and commands of a federation that is being served."""

    out: Path
    sites: tuple[str, ...]

    @property
    def federation(self) -> Path:
        return self.out / "federation"

    def site(self, name: str) -> Path:
        return self.out / "sites" / name

    def run_folder(self, name: str) -> RunFolder:
        return RunFolder(self.federation / "runs" / name)

    def fedserver(self, *words: str) -> str:
        return command(self.out, ["fedserver", *words, "--federation", str(self.federation)])

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.fedserver("status", "--json")))

    def run(self, name: str) -> dict[str, Any]:
        return next(r for r in self.status()["runs"] if r["id"] == name)

    def pid(self, child: str, site: str | None = None) -> int:
        """Of a supervised process: link, gateway, dispatch; or a site's node, executor."""
        pid = read_status(self.federation if site is None else self.site(site))["children"][child]["pid"]
        assert isinstance(pid, int)
        return pid

    def server_app_pid(self) -> int:
        """The process that carries out the run: the dispatcher's child."""
        return int(psutil.Process(self.pid("dispatch")).children()[0].pid)


@contextmanager
def deployed(
    out: Path,
    data: Path,
    sites: Sequence[str],
    join: bool = True,
    init: Sequence[str] = (),
    taps: list[Wiretap] | None = None,
) -> Iterator[Deployment]:
    """Starts a coordinator and its hospitals with the commands that people type, and ends them.

    Args:
        init: further words for `fedserver init`.
        taps: gets a wiretap through which everybody dials.
    """
    out.mkdir(parents=True, exist_ok=True)
    here = Deployment(out, tuple(sites))
    port = free_port()
    address = own = f"127.0.0.1:{port}"
    with ExitStack() as running:
        if taps is not None:
            taps.append(running.enter_context(wiretap(port)))
            address = taps[-1].address
        here.fedserver("init", "--name", "test", "--address", address, *init)
        serve = ["fedserver", "serve", "--host", "127.0.0.1", "--federation", str(here.federation), "--port", str(port)]
        running.enter_context(background(out / "serve.log", serve))
        await_port(own)
        for site in sites if join else ():
            joining = [
                "fedclient",
                "join",
                here.fedserver("invite", site).strip(),
                "--data",
                str(data),
                "--approve",
                "inside-policy",
            ]
            command(out, [*joining, "--manifest-site", site, "--site", str(here.site(site))])
            start = ["fedclient", "start", "--site", str(here.site(site))]
            running.enter_context(background(out / f"{site}.log", start))
        yield here


def until(what: Callable[[], Any], timeout_s: float, say: str, logs: Path | None = None) -> Any:
    """The first true answer of `what`; after `timeout_s` the test fails with `say` and the ends of the logs."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    tails = [
        f"--- {p}\n{p.read_text(errors='replace')[-1500:]}" for p in sorted((logs or Path("/nowhere")).rglob("*.log"))
    ]
    raise AssertionError(f"after {timeout_s:.0f} s still not: {say}\n" + "\n".join(tails))


def in_round(run: RunFolder, number: int) -> bool:
    """True while sites work on round `number`."""
    progress = read_progress(run)
    if not progress or progress["round"] != number or progress["phase"] != "train":
        return False
    return any(seat["state"] == "asked" for seat in progress["sites"].values())


def kill(pid: int) -> None:
    os.kill(pid, 9)
