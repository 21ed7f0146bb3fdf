"""Server-sent events: what has changed on a page, as long as somebody looks; nothing is kept for who does not listen.

An event carries a section of the page whole; after those of one look comes an event with an id, the number of the
change. Who comes back with the last id gets the sections that have changed since, however long he was away; no list of
past events is kept. An id of an earlier process gets all of them. While nothing changes, a beat tells when was looked
last, so that a page never shows old figures as if they were fresh.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.types import Receive, Scope, Send

from shared_models.errors import FederationError

LOOK_S = 1.0  # from one look to the next
SHARE = 4  # times as long as a look has taken is waited: a fifth of a core at most
BEAT_S = 5.0  # from one sign of life to the next; `QUIET_MS` of live.js is a few of them
STALL_S = 20.0  # longest wait for a listener to take what is sent
MOST_LISTENERS = 16
RETRY_MS = 3000

log = logging.getLogger(__name__)
Look = Callable[[str | None], Mapping[str, str]]


@dataclass(slots=True)
class Page:
    """The sections of one view, each with the number of its last change.

    Attributes:
        looked_s: when the last look that has not failed was over, since the epoch.
        trouble: why the last look failed; "" where it did not.
    """

    sections: dict[str, tuple[int, str]] = field(default_factory=dict)
    looked_at: float = float("-inf")
    looked_s: float = 0.0
    listeners: int = 0
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """A page as it is sent: its sections, when was looked for them, and the id to listen on from."""

    sections: Mapping[str, str]
    looked_s: float
    mark: str


@dataclass(slots=True)
class Feed:
    """What all listeners hear: one look serves all who see the same run.

    Attributes:
        look: makes the sections for a run, None for the likely one; called in a thread, one at a time.
    """

    look: Look
    look_s: float = LOOK_S
    beat_s: float = BEAT_S
    stall_s: float = STALL_S
    boot: str = field(default_factory=lambda: secrets.token_hex(4))
    number: int = 0
    pages: dict[str | None, Page] = field(default_factory=dict)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _wanted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def listeners(self) -> int:
        return sum(page.listeners for page in self.pages.values())

    async def fresh(self, focus: str | None = None) -> Seen:
        """The sections as they are now, or were a moment ago.

        Raises:
            FederationError: state that cannot be read.
        """
        async with self._turn:
            page = self.pages.setdefault(focus, Page())
            if time.monotonic() - page.looked_at > self.look_s / 2:
                await self._look(focus, page)
            seen = Seen({name: html for name, (_, html) in page.sections.items()}, page.looked_s, self.mark())
        self._tidy()
        return seen

    async def run(self) -> None:
        """Looks as long as somebody listens; ends by being cancelled."""
        while True:
            await self._wanted.wait()
            began = time.monotonic()
            for focus, page in list(self.pages.items()):
                if page.listeners:
                    async with self._turn:
                        await self._tried(focus, page)
            self._tidy()
            await asyncio.sleep(max(self.look_s, SHARE * (time.monotonic() - began)))

    async def _tried(self, focus: str | None, page: Page) -> None:
        try:
            await self._look(focus, page)
        except FederationError as error:
            await self._say(page, str(error))
        except Exception as error:  # a gap of ours ends no listener; the type says enough, and names nobody
            log.exception("a look has failed")
            await self._say(page, f"The page could not look ({type(error).__name__}); its log says more.")

    async def _look(self, focus: str | None, page: Page) -> None:
        made = await asyncio.to_thread(self.look, focus)
        page.looked_at, page.looked_s = time.monotonic(), time.time()
        changed = {name: html for name, html in made.items() if page.sections.get(name, (0, None))[1] != html}
        if changed or page.trouble:
            async with self._news:
                self.number += 1
                page.trouble = ""
                page.sections |= {name: (self.number, html) for name, html in changed.items()}
                self._news.notify_all()

    async def _say(self, page: Page, words: str) -> None:
        async with self._news:
            if words != page.trouble:
                self.number += 1
                page.trouble = words
                self._news.notify_all()

    def _tidy(self) -> None:
        """A view that nobody has open is forgotten, but for the first."""
        for focus in [f for f, page in self.pages.items() if not page.listeners and f is not None]:
            del self.pages[focus]
        if not self.listeners:
            self._wanted.clear()

    def mark(self) -> str:
        """The id as of now, for a page that is about to be sent."""
        return f"{self.boot}-{self.number}"

    def heard(self, last_id: str) -> int:
        """The number of the last change that a listener has; 0 for an id that is not of this process."""
        boot, _, number = last_id.rpartition("-")
        known = boot == self.boot and number.isascii() and number.isdecimal() and len(number) < 16
        return int(number) if known and int(number) <= self.number else 0

    async def events(self, focus: str | None, last_id: str, allowed: Callable[[], bool]) -> AsyncIterator[bytes]:
        """The stream of one listener, in frames, until `allowed` says no more."""
        page = self.pages.setdefault(focus, Page())
        page.listeners += 1
        self._wanted.set()
        sent = self.heard(last_id)
        try:
            yield f"retry: {RETRY_MS}\n\n".encode()
            while not page.looked_s and not page.trouble and allowed():  # nothing was looked at yet, so nothing is told
                await self._hear(self.number)
            while allowed():
                upto, told = self.number, page.trouble
                for name, (changed, html) in sorted(page.sections.items(), key=lambda item: item[1][0]):
                    if changed > sent:
                        yield frame("section", {"name": name, "html": html})
                number = f"{self.boot}-{upto}"  # what came before it counts from here
                yield frame("state", {"trouble": told, **_sign(page)}, number)
                sent = upto
                while self.number == sent and allowed():
                    if not await self._hear(sent):
                        yield frame("beat", _sign(page))
        finally:
            page.listeners -= 1

    async def _hear(self, sent: int) -> bool:
        """Waits for news; False where none came for a while."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.beat_s), self._news:
                await self._news.wait_for(lambda: self.number != sent)
                return True
        return False


def _sign(page: Page) -> dict[str, float]:
    """The time now and of the last look, where there was one, by this machine's clock."""
    return {"now": time.time(), **({"looked": page.looked_s} if page.looked_s else {})}


def frame(event: str, content: Mapping[str, object], number: str | None = None) -> bytes:
    """One event; JSON on one line, so that no content can begin a field of its own."""
    numbered = "" if number is None else f"id: {number}\n"
    return f"event: {event}\n{numbered}data: {json.dumps(dict(content), separators=(',', ':'))}\n\n".encode()


@dataclass(slots=True)
class Stream:
    """The answer that sends frames as they come, and cuts off who does not take them."""

    frames: AsyncIterator[bytes]
    stall_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        leaving = asyncio.ensure_future(_left(receive))
        sending = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({leaving, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and sending.result():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                abort = scope.get("extensions", {}).get("connection", {}).get("abort", lambda: None)
                abort()
        except asyncio.CancelledError:  # we end
            with suppress(Exception):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in (leaving, sending):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            await self.frames.aclose()  # type: ignore[attr-defined]

    async def _send(self, send: Send) -> bool:
        """Whether the stream has ended by itself; False where the listener has not taken a frame in time."""
        async for one in self.frames:
            try:
                async with asyncio.timeout(self.stall_s):
                    await send({"type": "http.response.body", "body": one, "more_body": True})
            except (TimeoutError, OSError):
                return False
        return True


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
