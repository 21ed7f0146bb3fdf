"""Pages that change while one looks: the templates, script and style of both ends, and the route of their events."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from shared_models.dates import date_text
from shared_models.figure_text import DASH, duration_text, size_text
from shared_models.live.feed import MOST_LISTENERS, Feed, Stream

STATIC = Path(__file__).parent / "static"
SHARED = ("live.js", "live.css")
TYPES = {".js": "text/javascript", ".css": "text/css"}
ICONS = {"good": "✓", "work": "▶", "look": "◆", "bad": "✕", "quiet": "○", "": "·"}  # colour is not the only signal


def policy(forms: str = "'none'") -> str:
    """The Content-Security-Policy of such pages: scripts, styles and requests of their own, nothing inline."""
    return (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        f"form-action {forms}; base-uri 'none'; frame-ancestors 'none'"
    )


def environment(package: str) -> Environment:
    """Jinja's, with the templates of `package` beside the shared ones."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("shared_models.live")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "size": size_text,
        "duration": lambda seconds: DASH if seconds is None else duration_text(seconds),
        "day": date_text,
        "iso": lambda at: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        "clock": lambda at: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at)),
        "ticked": ticked,
        "compact": lambda value: Markup.escape(json.dumps(value, separators=(",", ":"))),  # for an attribute
    }
    made.filters |= filters
    made.globals |= {"icons": ICONS, "DASH": DASH}
    return made


def ticked(words: str) -> Markup:
    """Words in which `so` becomes code; everything in them is escaped first."""
    return Markup(re.sub(r"`([^`]{1,200})`", r"<code>\1</code>", str(Markup.escape(words))))  # noqa: S704


def serve_files(app: Starlette, own: Mapping[str, Path]) -> None:
    """Under /static, the shared files and those of `own`, by name; nothing else of the disk."""
    files = {**own, **{name: STATIC / name for name in SHARED}}

    async def file(request: Request) -> Response:
        path = files.get(request.path_params["name"])
        if path is None:
            return PlainTextResponse("There is no such file.\n", 404)
        return FileResponse(path, media_type=TYPES.get(path.suffix, "text/plain"))

    async def icon(_: Request) -> Response:
        return Response(status_code=204)

    app.router.routes += [Route("/static/{name}", file), Route("/favicon.ico", icon)]


def listening(feed: Feed) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """The life of an application whose feed looks as long as somebody listens, and no longer than it is served."""

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        looking = asyncio.create_task(feed.run())
        try:
            yield
        finally:
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking

    return life


async def _nobody(_: Request) -> None:
    """Refuses nobody."""


@dataclass(frozen=True, slots=True)
class Events:
    """The stream of what changes, for one listener each time that it is asked; no route of FastAPI's, because its
    answers do not notice a listener who takes nothing.

    Attributes:
        refused: the answer to who may not listen, or asks for what is not there; None to all others.
        allowed: whether one who listens still may.
    """

    feed: Feed
    refused: Callable[[Request], Awaitable[Response | None]] = _nobody
    allowed: Callable[[Request], bool] = lambda _: True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (await self._answer(Request(scope)))(scope, receive, send)

    async def _answer(self, request: Request) -> ASGIApp:
        if (told := await self.refused(request)) is not None:
            return told
        if request.method != "GET":
            return PlainTextResponse("A stream can only be listened to.\n", 405)
        if self.feed.listeners >= MOST_LISTENERS:
            return PlainTextResponse("Too many pages listen already.\n", 503, {"retry-after": "30"})
        last_id = request.headers.get("last-event-id") or request.query_params.get("after", "")
        frames = self.feed.events(focus_of(request), last_id, lambda: self.allowed(request))
        return Stream(frames, self.feed.stall_s)


def focus_of(request: Request) -> str | None:
    """Which view of the pages is listened to."""
    return request.query_params.get("run") or None
