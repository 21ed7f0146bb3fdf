"""Who may talk to the pages: whoever shows the token, where there is one; and never another site's script.

Sits before everything else, so that a body that is too large or of nobody who is known is not read.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/page.js", "/page.css", "/favicon.ico", "/api/health")  # hold nothing of anybody
HEADERS = (
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
                                 b" connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
)  # fmt: skip
LOCAL = ("localhost", "127.0.0.1", "[::1]")


def guarded(app: Asgi, *, token: str | None, local: bool, most_bytes: int, public_origin: str = "") -> Asgi:
    """`app` behind the checks.

    Args:
        token: asked for, where there is one.
        local: the pages are for this machine: a name that only points here (DNS rebinding) is refused.
        public_origin: under which a proxy shows them too, `https://name`; empty: none does.
    """

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = _refused(scope, headers, token, local, most_bytes, public_origin)
        if refused is not None:
            return await _answer(send, *refused)

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        await app(scope, receive, with_headers)
        return None

    return guard


def _refused(
    scope: Scope, headers: dict[bytes, str], token: str | None, local: bool, most_bytes: int, public_origin: str
) -> tuple[int, str] | None:
    host = headers.get(b"host", "")
    if local and _name(host) not in (*LOCAL, _name(public_origin.removeprefix("https://")) or None):
        known = f"http://localhost and {public_origin} alone" if public_origin else "http://localhost alone"
        return 421, f"this service is for {known}; a proxy's own name is `public_origin` of [serve]."
    if scope["method"] not in ("GET", "HEAD") and not _of_ours(scope, headers, host, public_origin):
        return 403, "another site's page may not do this; behind a proxy, its name is `public_origin` of [serve]."
    if token is not None and scope["path"] not in OPEN:
        shown = headers.get(b"authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(shown, token.encode()):
            return 401, "show the token of this service: Authorization: Bearer TOKEN."
    length = headers.get(b"content-length", "0")
    if not length.isdecimal() or len(length) > 15 or int(length) > most_bytes:
        return 413, f"more than {most_bytes >> 20} MiB at once are not taken."
    return None


def _of_ours(scope: Scope, headers: dict[bytes, str], host: str, public_origin: str) -> bool:
    """Whether what changes something comes of one of our own pages, as browsers say it, or of a program."""
    where, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if where is not None and where != "same-origin":
        return False
    return origin in (None, f"{scope['scheme']}://{host}") or (public_origin != "" and origin == public_origin)


def _name(host: str) -> str:
    """A Host header without its port."""
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


async def _answer(send: Send, status: int, words: str) -> None:
    body = json.dumps({"detail": words}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    headers += [(b"connection", b"close")]  # what is left of a body is not read
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
