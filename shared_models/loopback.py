"""Pages for this machine alone: on loopback, read-only, under no other name than its own, nothing from elsewhere.

A page of another site that a browser has open can make it ask a port of loopback under a name that its owner has
pointed there (DNS rebinding); such a request carries that name, and is refused.
"""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared_models import logs
from shared_models.archive import LOOPBACK
from shared_models.errors import FederationError, ProcessFailed
from shared_models.heads import Heads

NAMES = ("127.0.0.1", "localhost", "[::1]")
PLAIN = (  # of pages without scripts
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
MOST_CONNECTIONS = 64  # beyond it 503
KEEP_ALIVE_S = 20
END_S = 1  # for answers under way, among them streams without an end, once we are told to go


def loopback_app(title: str, policy: str = PLAIN, posts: Collection[str] = (), **more: Any) -> FastAPI:
    """An application without routes that answers this machine's own names.

    Args:
        policy: the Content-Security-Policy of all answers.
        posts: paths that may be POSTed to, by pages of its own; everything else can only be read.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None, **more)
    app.add_middleware(Guard, policy=policy, posts=frozenset(posts))
    return app


class Guard:
    """Asked before anything is read or answered; no answer goes out without `HEADERS`."""

    def __init__(self, app: ASGIApp, policy: str, posts: frozenset[str]) -> None:
        self.app = app
        self.headers = {**HEADERS, "content-security-policy": policy}
        self.posts = posts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        refused = self._refused(scope, Headers(scope=scope))
        await (refused or self.app)(scope, receive, with_headers)
        return None

    def _refused(self, scope: Scope, headers: Headers) -> PlainTextResponse | None:
        host = headers.get("host", "")
        if not is_ours(host):
            return PlainTextResponse("This page is only for this machine: http://127.0.0.1.\n", 421)
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST" or scope["path"] not in self.posts:
            return PlainTextResponse("Nothing can be changed here.\n", 405)
        from_here, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if from_here is None:  # an old browser, or none; forms of a page without referrer have the origin `null`
            from_here = "same-origin" if origin in (None, f"{scope['scheme']}://{host}") else "cross-site"
        if from_here != "same-origin":
            return PlainTextResponse("Another site's page may not do this.\n", 403)
        return None


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
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    uvicorn.run(
        app, host=LOOPBACK, port=port, loop="asyncio", http=Heads, ws="none", log_level="warning", access_log=False,
        server_header=False, proxy_headers=False, limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=END_S,
    )  # fmt: skip


def _is_news(record: logging.LogRecord) -> bool:
    """That streams were cut as we end is as it should be."""
    return "timeout graceful shutdown exceeded" not in record.getMessage()


def page_main(module: str, words: str, made: Callable[[Path], FastAPI]) -> None:
    """What `python -m MODULE FOLDER --port PORT` does: serves the page of a folder as a supervised process."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=words)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    logs.start()
    try:
        serve_loopback(made(arguments.folder), arguments.port)
    except FederationError as error:
        sys.exit(f"{module}: {error}")
