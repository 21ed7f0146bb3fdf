"""The connection of one client of the pages, who may be neither slow nor long in saying what he asks for.

uvicorn's own waits without end for the head of a request, and takes in as long a head as is sent: 64 clients who say
nothing would keep all others out, and one who goes on would fill the memory, before anybody was asked for a token. An
application finds `abort` in scope["extensions"]["connection"], to cut a client who does not take what is sent.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 30.0  # from the connection, the answer before or the first byte of a request to the end of its head
MOST_HEAD = 1 << 16  # bytes; what comes in one read is taken in before it is counted


class Heads(HttpToolsProtocol):
    """As uvicorn's, within bounds."""

    head_s = HEAD_S
    _late: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._late is None:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MOST_HEAD:
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"connection": {"abort": self.transport.abort}}
        self._wait()

    def on_headers_complete(self) -> None:
        self._heard()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._wait()

    def _wait(self) -> None:
        """For a head, unless one is waited for already."""
        if self._late is None:
            self._head_bytes = 0
            self._late = self.loop.call_later(self.head_s, self.transport.close)

    def _heard(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = None
