"""The coordinator's three processes under one supervisor: gateway, SuperLink, dispatcher."""

import os
import sys
import threading
from pathlib import Path

from shared_models.archive import LOOPBACK, SERVER_APP, quiet_flower
from shared_models.supervise import Child, kept_port, kept_secret, only_one, supervise


def serve(folder: Path, host: str, port: int, stop: threading.Event, app: str = SERVER_APP) -> None:
    """Serves a federation until `stop`: hospitals at `host:port`, Flower on a free port of loopback.

    Raises:
        ProcessFailed: the folder is being served already.
    """
    folder = folder.resolve()
    with only_one(folder):
        supervise(_children(folder, host, port, app), stop, folder)


def _children(folder: Path, host: str, port: int, app: str) -> list[Child]:
    for name in ("superexec", "control"):
        kept_secret(folder / "secrets" / name)
    inner = kept_port(folder / "superlink/port")
    superlink = f"{LOOPBACK}:{inner}"
    env = quiet_flower(folder / "superlink/flower", os.environ)
    python, logs = (sys.executable, "-m"), folder / "logs"
    return [
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
            [*python, "fedserver.dispatch", str(folder), "--superlink", superlink, "--app", app],
            logs / "dispatch.log",
            env,
        ),
    ]
