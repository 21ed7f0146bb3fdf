"""The coordinator's three processes under one supervisor: gateway, SuperLink, dispatcher."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedserver.queue import AT_ONCE
from shared_models.archive import LOOPBACK, SERVER_APP, quiet_flower
from shared_models.errors import ProcessFailed
from shared_models.supervise import Child, kept_port, kept_secret, only_one, supervise, tell_deaths

PAGES = {"metrics": "fedserver.gauges", "dashboard": "fedserver.dashboard.web"}
PORT_PATIENCE_S = 3.0  # for the gateway of a supervisor that was killed a moment ago


def serve(
    folder: Path,
    host: str,
    port: int,
    stop: threading.Event,
    app: str = SERVER_APP,
    at_once: int = AT_ONCE,
    metrics: int | None = None,
    dashboard: int | None = None,
    begun: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves a federation until `stop`: hospitals at `host:port`, Flower on a free port of loopback.

    Args:
        at_once: runs that are carried out side by side; the others wait for one to end.
        metrics, dashboard: ports on loopback of figures for Prometheus, and of the dashboard; None serves none.
        begun: called once the folder is ours and the port is free.
        say: gets a sentence for each process that dies.

    Raises:
        ProcessFailed: the folder is being served already, or `host:port` cannot be listened on.
    """
    folder = folder.resolve()
    with only_one(folder):
        _await_free(host, port)
        begun()
        pages = {"metrics": metrics, "dashboard": dashboard}
        supervise(_children(folder, host, port, app, at_once, pages), stop, folder, on_change=tell_deaths(say))


def _await_free(host: str, port: int) -> None:
    """Raises ProcessFailed when something else listens there; the supervisor would try again for ever."""
    until = time.monotonic() + PORT_PATIENCE_S
    while True:
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                return probe.bind((host, port))
        except (OSError, OverflowError) as error:
            if time.monotonic() > until or isinstance(error, OverflowError | socket.gaierror):
                why = getattr(error, "strerror", None) or "no such port"
                raise ProcessFailed(
                    f"{host}:{port}: cannot be listened on ({why}). Stop what uses it, or choose another --host or "
                    "--port."
                ) from None
        time.sleep(0.1)


def _children(
    folder: Path, host: str, port: int, app: str, at_once: int, pages: Mapping[str, int | None]
) -> list[Child]:
    for name in ("superexec", "control"):
        kept_secret(folder / "secrets" / name)
    inner = kept_port(folder / "superlink/port")
    superlink = f"{LOOPBACK}:{inner}"
    env = quiet_flower(folder / "superlink/flower", os.environ)
    python, logs = (sys.executable, "-m"), folder / "logs"
    children = [
        Child("link", [*python, "fedserver.link", str(folder), "--port", str(inner)], logs / "link.log", env),
        Child(
            "gateway",
            [
                *(*python, "fedserver.gateway", str(folder)),
                *("--host", host, "--port", str(port), "--superlink", superlink),
            ],
            logs / "gateway.log",
            env,
        ),
        Child(
            "dispatch",
            [
                *(*python, "fedserver.dispatch", str(folder), "--superlink", superlink),
                *("--app", app, "--at-once", str(at_once)),
            ],
            logs / "dispatch.log",
            env,
        ),
    ]
    for name, page in pages.items():
        if page is not None:
            command = [*python, PAGES[name], str(folder), "--port", str(page)]
            children.append(Child(name, command, logs / f"{name}.log", env))
    return children
