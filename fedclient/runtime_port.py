"""The port on loopback at which a node gives work to its executor; who else asks there is refused and written down."""

import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from fedclient.own_log import log_of
from shared_models.archive import LOOPBACK, flower_module
from shared_models.errors import FederationError, ProcessFailed
from shared_models.refusals import Refusals

WRITE_S = 1.0
Asgi: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]


def serve_executor(state_factory: Any, secret: bytes, port: int, site: Path, name: str) -> None:
    """Serves Flower's Runtime API on loopback, in a thread; it takes whoever knows the secret of the site."""
    import uvicorn

    refusals = Refusals(partial(log_of, site, name))
    app = flower_module("flwr.supernode.main").create_app(state_factory=state_factory, superexec_auth_secret=secret)
    server = uvicorn.Server(
        uvicorn.Config(
            watched(app, refusals),
            LOOPBACK,
            port,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=75,
            ws="none",
        )
    )
    thread = threading.Thread(target=server.run, name="runtime-api", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise ProcessFailed(f"{LOOPBACK}:{port}: is taken by another program. Delete node/port, then start again.")
        time.sleep(0.02)
    threading.Thread(target=write_on, args=(refusals,), name="refusals", daemon=True).start()


def watched(app: Asgi, refusals: Refusals) -> Asgi:
    """`app`, whose refusals are noted; a process of another user on this machine has no secret and no token."""

    async def asked(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] in (401, 403):
                refusals.note("RUNTIME_PORT")
            await send(message)

        await app(scope, receive, sent)

    return asked


def write_on(refusals: Refusals) -> None:
    """Writes down what was refused, every second, for as long as the process lives."""
    while True:
        time.sleep(WRITE_S)
        with suppress(FederationError, OSError):  # a full disk; it is tried again
            refusals.write()
