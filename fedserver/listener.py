"""A port that faces strangers: uvicorn with TLS 1.3, the peer's certificate, and bounds on time, size and number.

uvicorn 0.49 with httptools sets no bound to the length of a request's head nor to the time it takes, does not show
client certificates, and lets idle strangers use up the connections of those who have one.
"""

import asyncio
import json
import logging
import re
import resource
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shared_models.errors import FederationError
from shared_models.identity import Certificate, read_certificate
from shared_models.transfer import DETAIL_HEADER

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = Sequence[tuple[str, str]]
Note: TypeAlias = Callable[[str, str], None]  # of a refusal: its code, and the name in the peer's certificate or ""

MOST_CONNECTIONS = 256  # beyond it 503, which Flower's client takes as "try again"
MOST_STRANGERS = 32  # connections without a certificate; one more is cut, so that they never crowd out the sites
MOST_OF_ONE = 64  # connections of one certificate's name, so that no site crowds out the others; a node has a few
HANDSHAKE_S = 15.0  # asyncio: 60 s, in which a stranger holds a file handle for nothing
MOST_FILES = 1 << 16
HEAD_S = 15.0
HEAD_BYTES = 32 << 10
STALL_S = 60.0  # longest wait for the next bytes of a body, and for room to send the next
KEEP_ALIVE_S = 75
CERTIFICATE_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED
READ_S = 300.0  # for a body that is held in memory
DRAIN_BYTES = 64 << 20  # of a refused body still read: a client that is cut off while it sends cannot hear why, and
DRAIN_S = 30.0  # Flower's tries again for ever after a broken connection but gives up after a 413

log = logging.getLogger(__name__)


class Refused(FederationError):
    """A request that is answered with an error; never leaves the listener.

    Attributes:
        status: of HTTP.
        headers: of the answer, besides the usual.
        code: what the audit log calls it; "" for what is no sign of harm.
    """

    def __init__(self, status: int, message: str, headers: Headers = (), code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.code = code


class Gone(Exception):
    """The client hung up, or must be hung up on; nobody is left to be answered."""


@dataclass(slots=True)
class Body:
    """A request's body as it comes; `done` once all of it has been read."""

    receive: Receive
    size_bytes: int
    done: bool = False

    async def blocks(self) -> AsyncIterator[bytes]:
        """Pieces of up to 256 KiB; raises Refused when the next is too long in coming."""
        while not self.done:
            try:
                async with asyncio.timeout(STALL_S):
                    message = await self.receive()
            except TimeoutError as error:
                raise Refused(408, f"no byte came for {STALL_S:.0f} s. Try again.") from error
            if message["type"] != "http.request":
                raise Gone
            self.done = not message.get("more_body", False)
            yield message.get("body", b"")

    async def read(self, limit_bytes: int) -> bytes:
        """All of it; raises Refused (413) when that is more than `limit_bytes`, whatever was announced."""
        blocks, size = list[bytes](), self.size_bytes
        if size <= limit_bytes:
            size = 0
            try:
                async with asyncio.timeout(READ_S):
                    async for block in self.blocks():
                        blocks.append(block)
                        size += len(block)
                        if size > limit_bytes:
                            break
            except TimeoutError as error:
                words = f"the body was not here within {READ_S:.0f} s. Try again."
                raise Refused(408, words, code="BODY_TOO_LATE") from error
        if size > limit_bytes:
            words = f"body of {size} bytes or more: at most {limit_bytes} are taken here."
            raise Refused(413, words, code="BODY_TOO_LARGE")
        return b"".join(blocks)

    async def drain(self) -> bool:
        """Reads and forgets what is left, within bounds; whether there is nothing left."""
        if self.size_bytes > DRAIN_BYTES:
            return self.done
        try:
            async with asyncio.timeout(DRAIN_S):
                async for _ in self.blocks():
                    pass
        except (TimeoutError, Refused):
            return False
        return self.done


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request.

    Attributes:
        path: as sent, nothing decoded, with its query if it has one.
        headers: by lower-case name; of one sent twice, the values joined by a comma.
        certificate: of the peer, verified against our CA; None for a stranger.
        client: the peer's address.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    certificate: Certificate | None
    client: str
    body: Body
    _send: Send = field(repr=False)
    _lost: Callable[[], bool] = field(repr=False)

    async def respond(self, status: int, content: bytes = b"", headers: Headers = (), size: int | None = None) -> None:
        """Sends an answer whole, or its head alone when `size` announces more content than is given."""
        announced = len(content) if size is None else size
        pairs = [(b"content-length", str(announced).encode())]
        pairs += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        if self.certificate is None and (b"connection", b"close") not in pairs:
            pairs.append((b"connection", b"close"))  # a stranger asks once; there are few places for strangers
        await self._put({"type": "http.response.start", "status": status, "headers": pairs})
        if self.method == "HEAD" or announced == len(content):
            await self._put({"type": "http.response.body", "body": content})

    async def respond_json(self, status: int, content: Mapping[str, object], headers: Headers = ()) -> None:
        await self.respond(status, json.dumps(content).encode(), [("content-type", "application/json"), *headers])

    async def send_block(self, block: bytes, more: bool) -> None:
        await self._put({"type": "http.response.body", "body": block, "more_body": more})

    async def _put(self, message: MutableMapping[str, Any]) -> None:
        if self._lost():  # uvicorn lets one send on, into nothing
            raise Gone
        try:
            async with asyncio.timeout(STALL_S):
                await self._send(message)
        except TimeoutError as error:
            raise Gone from error


def as_count(text: str) -> int | None:
    """A header's value as a count of bytes, in the one way to write it; None for anything else."""
    return int(text) if re.fullmatch(r"0|[1-9][0-9]{0,14}", text) else None


def application(handle: Callable[[Request], Awaitable[None]], note: Note) -> Asgi:
    """`handle` as uvicorn wants it: a Refused becomes its answer and is noted, another trouble of ours a 503."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = _read_head(scope, receive, send)
        try:
            try:
                if as_count(request.headers.get("content-length", "0")) is None:  # the parser below takes more of them
                    raise Refused(400, "content-length: is no plain number.", code="NO_LENGTH")
                if "transfer-encoding" in request.headers:
                    raise Refused(411, "a body needs a content-length here.", code="NO_LENGTH")
                await handle(request)
            except Refused as refused:
                if refused.code:
                    note(refused.code, request.certificate.name if request.certificate else "")
                await _refuse(request, refused)
            except FederationError as error:
                log.error("%s %r: %s", request.method, request.path[:100], error)
                await _refuse(request, Refused(503, "the coordinator has a trouble of its own. Try again."))
        except Gone:
            return

    return app


async def _refuse(request: Request, refused: Refused) -> None:
    unsized = "transfer-encoding" in request.headers or as_count(request.headers.get("content-length", "0")) is None
    headers = [*refused.headers]
    if request.method == "HEAD":
        headers.append((DETAIL_HEADER, str(refused)))
    if unsized or not await request.body.drain():
        headers.append(("connection", "close"))
    await request.respond_json(refused.status, {"detail": str(refused)}, headers)


def _read_head(scope: Scope, receive: Receive, send: Send) -> Request:
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    length = headers.get("content-length", "0")
    query = scope["query_string"]
    return Request(
        method=scope["method"],
        path=scope["raw_path"].decode("latin-1") + (f"?{query.decode('latin-1')}" if query else ""),
        headers=headers,
        certificate=scope["extensions"]["tls"]["peer"],
        client=scope["client"][0] if scope["client"] else "",
        body=Body(receive, as_count(length) or 0),
        _send=send,
        _lost=scope["extensions"]["tls"]["lost"],
    )


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with what its settings do not offer: see the top of the file."""

    note: Note = staticmethod(lambda code, name: None)
    certificate: Certificate | None = None
    since = 0.0  # of the connection, by the loop's clock
    lost = False
    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        tls = transport.get_extra_info("ssl_object")
        der = tls.getpeercert(True) if tls is not None else None
        self.certificate = read_certificate(der) if der else None
        name = self.certificate.name if self.certificate else None
        like = sum(isinstance(other, GuardedProtocol) and other.is_of(name) for other in self.connections)
        if like > (MOST_STRANGERS if name is None else MOST_OF_ONE):
            self._refused("TOO_MANY_STRANGERS" if name is None else "TOO_MANY_CONNECTIONS")
            transport.abort()
            return
        self._expect_head()

    def is_of(self, name: str | None) -> bool:
        """Whether the peer's certificate has this name; None is a stranger's."""
        return (self.certificate.name if self.certificate else None) == name

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self._refused("HEAD_TOO_LONG")
            self.send_400_response("Request head too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"tls": {"peer": self.certificate, "lost": lambda: self.lost}}
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head = False
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_S, self._give_up)

    def _give_up(self) -> None:
        self._refused("HEAD_TOO_LATE")
        self.transport.abort()

    def _refused(self, code: str) -> None:
        self.note(code, self.certificate.name if self.certificate else "")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def brace() -> None:
    """Makes this process hard to starve: as many file handles as it may have, and short handshakes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    asyncio.constants.SSL_HANDSHAKE_TIMEOUT = HANDSHAKE_S  # type: ignore[attr-defined]  # uvicorn hands none over


def watched_handshake(note: Note) -> type[ssl.SSLObject]:
    """TLS that notes each handshake which fails: asyncio drops such a connection without a word to anybody."""

    class Handshake(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLCertVerificationError as error:
                expired = error.verify_code == CERTIFICATE_EXPIRED
                note("CERTIFICATE_EXPIRED" if expired else "CERTIFICATE_NOT_OURS", "")
                raise
            except ssl.SSLError:
                note("TLS_HANDSHAKE", "")
                raise

    return Handshake


def make_server(
    app: Asgi, context: ssl.SSLContext, certificate: str, host: str, port: int, note: Note
) -> uvicorn.Server:
    """A uvicorn that serves `app` on `host`:`port` with `context`, which holds `certificate` and its key already."""
    noting = type("NotingProtocol", (GuardedProtocol,), {"note": staticmethod(note)})
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=noting,
        loop="asyncio",  # measured: uvloop is no faster here, most of the time is OpenSSL's
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_level="error",  # strangers' malformed requests are no news
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=3,
        ssl_certfile=certificate,
    )
    config.load()
    config.ssl = context  # uvicorn's own would take any TLS from 1.2 on
    return uvicorn.Server(config)
