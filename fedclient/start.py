"""A site's two processes under one supervisor: node and executor."""

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedclient.overdue import hanging
from shared_models.archive import CLIENT_APP, quiet_flower
from shared_models.supervise import Child, kept_port, kept_secret, only_one, supervise, tell_deaths


def start(
    site: Path,
    stop: threading.Event,
    app: str = CLIENT_APP,
    page: int | None = None,
    begun: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Keeps a site in the federation until `stop`.

    Args:
        page: port on loopback of the status page and the figures; None serves none.
        begun: called once the folder is ours.
        say: gets a sentence for each process that dies.

    Raises:
        ProcessFailed: the site is being served already.
    """
    site = site.resolve()
    with only_one(site):
        begun()
        supervise(_children(site, app, page), stop, site, on_change=tell_deaths(say))


def _children(site: Path, app: str, page: int | None) -> list[Child]:
    kept_secret(site / "secrets/superexec")
    port = str(kept_port(site / "node/port"))
    env = quiet_flower(site / "node/flower", os.environ)
    python, logs = (sys.executable, "-m"), site / "logs"
    children = [
        Child("node", [*python, "fedclient.node", str(site), "--port", port], logs / "node.log", env),
        Child(
            "executor",
            [*python, "fedclient.executor", str(site), "--port", port, "--app", app],
            logs / "executor.log",
            env,
            partial(hanging, site / "secrets/task"),
        ),
    ]
    if page is not None:
        command = [*python, "fedclient.page.web", str(site), "--port", str(page)]
        children.append(Child("page", command, logs / "page.log", env))
    return children
