"""Pages for this machine alone: on loopback, read-only, under no other name than its own, nothing from elsewhere.

A page of another site that a browser has open can make it ask a port of loopback under a name that its owner has
pointed there (DNS rebinding); such a request carries that name, and is refused.
"""

import os
import socket
from collections.abc import Awaitable, Callable

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from shared_models.archive import LOOPBACK
from shared_models.errors import ProcessFailed

NAMES = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

Next = Callable[[Request], Awaitable[Response]]


def loopback_app(title: str) -> FastAPI:
    """An application without routes that answers GET and HEAD for this machine's own names."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Next) -> Response:
        if not is_ours(request.headers.get("host", "")):
            return PlainTextResponse("This page is only for this machine: http://127.0.0.1.\n", status_code=421)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("Nothing can be changed here.\n", status_code=405)
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    return app


def is_ours(host: str) -> bool:
    """Whether a Host header names this machine as loopback does; the port is the listener's own matter."""
    name, colon, port = host.lower().rpartition(":")
    return host.lower() in NAMES or (bool(colon) and port.isdecimal() and name in NAMES)


def serve_loopback(app: FastAPI, port: int) -> None:
    """Serves until SIGTERM.

    Raises:
        ProcessFailed: something else listens at the port.
    """
    os.umask(0o077)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise ProcessFailed(
                f"{LOOPBACK}:{port}: cannot be listened on ({error.strerror}). Choose another port."
            ) from error
    uvicorn.run(app, host=LOOPBACK, port=port, log_level="warning", access_log=False, server_header=False, ws="none")
