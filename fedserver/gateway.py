"""The one door of a coordinator: every byte from a hospital passes here, and Flower's SuperLink stays on loopback.

A stranger may fetch the CA certificate and enrol. A site, known by its client certificate, may make Flower's fleet
calls with the node key that it enrolled, fetch published blobs and upload its own, renew its certificate and read the
roster. Nothing else exists.

Statuses are chosen for Flower 1.41's client: it tries again after 502, 503 and 504, ends its process after 401, drops
the message after 403 and gives up after the rest.
"""

import argparse
import asyncio
import base64
import logging
import os
import re
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import httpx
import uvicorn

from fedserver.admission import ORPHANED, Admission, Doubt
from fedserver.enrol import Federation, RegisterNode, enrol, open_federation, open_log
from fedserver.fleet import PUSH_MESSAGES, activated_node, check_object, message_sources
from fedserver.intake import BLOB_PATH, Intake, give_blob, sweep, take_blob, tell_blob
from fedserver.lifecycle import renew
from fedserver.listener import Headers, Refused, Request, application, brace, make_server
from fedserver.server_tls import server_context, trust_issuers
from fedserver.state import Site, list_rosters, remember_node, saw_site
from fedserver.watch import UnregisterNode, watch
from shared_models import logs
from shared_models.archive import quiet_flower
from shared_models.errors import FederationError, UpdateRejected
from shared_models.files import canonical_json
from shared_models.identity import SITE_NAME, node_public_pem
from shared_models.parse import plain
from shared_models.refusals import Refusals
from shared_models.roster import MOST_EPOCHS, History, read_signed

FLEET_CALLS = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
NODE_KEY_HEADER = "flwr-public-key"
FORWARDED = frozenset(
    {
        "accept",
        "content-type",
        NODE_KEY_HEADER,
        "flwr-signature",
        "flwr-timestamp",
        "flwr-package-name",
        "flwr-package-version",
        "flwr-component-name",
    }
)
FLEET_BYTES = 8 << 20
MOST_FLEET_CALLS = 16  # of one site at once; each may hold FLEET_BYTES
ENROL_BYTES = 16 << 10
MOST_REMEMBERED = 4096  # client addresses
ROSTER_PATH = re.compile(r"/roster/([0-9]{1,12})")
SEEN_S = 10.0  # between two notes in the state that a site is there

log = logging.getLogger("fedserver.gateway")  # __name__ is __main__ in its own process


@dataclass(slots=True)
class Allowance:
    """Token buckets by client address: `burst` at once, then `per_s` a second."""

    burst: float
    per_s: float
    clock: Callable[[], float] = time.monotonic
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)

    def spend(self, client: str, cost: float) -> bool:
        """Whether `client` has `cost` left, which is then taken."""
        now = self.clock()
        if len(self._left) > MOST_REMEMBERED:  # all at once, so that it is rare; a limit by address is no limit then
            self._left.clear()
        left = self._now(*self._left.get(client, (self.burst, now)), now)
        self._left[client] = (left - cost if left >= cost else left, now)
        return left >= cost

    def _now(self, left: float, at: float, now: float) -> float:
        return min(self.burst, left + (now - at) * self.per_s)


@dataclass(frozen=True, slots=True)
class Gateway:
    """What a request is answered with.

    Attributes:
        superlink: a client of Flower's SuperLink on loopback.
        enrolments: what strangers may ask for; renewals: what a site may, by its name.
        enrolling: few at a time; one may hold a thread while the SuperLink is away, and blobs need threads too.
        admission: whom the state lets in.
        refusals: for the audit log.
        calls: fleet calls under way, by site.
        seen: when the state was last told of a site, monotonic seconds.
    """

    federation: Federation
    superlink: httpx.AsyncClient
    register_node: RegisterNode
    intake: Intake
    admission: Admission
    enrolments: Allowance
    refusals: Refusals
    enrolling: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    renewals: Allowance = field(default_factory=lambda: Allowance(burst=20, per_s=20 / 86400))
    calls: Counter[str] = field(default_factory=Counter)
    seen: dict[str, float] = field(default_factory=dict)


def open_gateway(federation: Federation, superlink: str, register_node: RegisterNode) -> Gateway:
    """A gateway to the SuperLink at `host:port`."""
    context = ssl.create_default_context(cafile=str(federation.ca_certificate))
    client = httpx.AsyncClient(
        base_url=f"https://{superlink}",
        verify=context,
        trust_env=False,  # no proxy on the way to loopback
        timeout=httpx.Timeout(60, connect=5),
        limits=httpx.Limits(max_connections=128, max_keepalive_connections=64, keepalive_expiry=20),
    )
    return Gateway(
        federation=federation,
        superlink=client,
        register_node=register_node,
        intake=Intake(federation.blobs, federation.max_blob_bytes),
        admission=Admission(federation.state, federation.folder / "ca"),
        enrolments=Allowance(burst=120, per_s=2),
        refusals=Refusals(lambda: open_log(federation)),
    )


async def answer(gateway: Gateway, request: Request) -> None:
    """One request, from the strangers' two to the sites' few; paths are compared as sent, so that no trick decodes."""
    match request.method, request.path:
        case "GET", "/enrol/ca":
            _spend(gateway, request, cost=1)
            told = await asyncio.to_thread(lambda: gateway.federation.authority)
            return await request.respond(200, told, [("content-type", "application/x-pem-file")])
        case "POST", "/enrol":
            _spend(gateway, request, cost=10)
            body = await request.body.read(ENROL_BYTES)
            async with gateway.enrolling:
                reply = await asyncio.to_thread(enrol, gateway.federation, body, gateway.register_node)
            gateway.admission.forget()
            log.info("enrolment from %s: %d", request.client, reply.status)
            if reply.status in (400, 403, 409, 410):
                gateway.refusals.note(f"ENROLMENT_{reply.status}")
            return await request.respond(reply.status, reply.content, [("content-type", "application/json")])
    blob = BLOB_PATH.fullmatch(request.path)
    known = request.method == "POST" and request.path in FLEET_CALLS
    known |= blob is not None and request.method in ("GET", "HEAD", "PUT")
    known |= (request.method, request.path) in (("GET", "/health"), ("POST", "/renew"))
    epoch = ROSTER_PATH.fullmatch(request.path) if request.method == "GET" else None
    if not known and epoch is None:
        words = f"{request.method} {request.path[:100]}: is not offered here."
        raise Refused(404, words, code="NOT_OFFERED")
    renewing = request.path == "/renew"
    site = await admit(gateway, request, renewing)
    if renewing:
        return await _renew(gateway, request, site)
    if epoch is not None:
        return await _tell_roster(gateway, request, int(epoch[1]))
    if blob is None and request.method == "POST":
        return await forward(gateway, request, site)
    if blob is None:
        return await request.respond_json(200, {"federation": gateway.federation.name, "site": site.name})
    digest = blob[1]
    if request.method == "GET":
        await give_blob(gateway.intake, request, digest)
    elif request.method == "HEAD":
        await tell_blob(gateway.intake, request, site.name, digest)
    else:
        await take_blob(gateway.intake, request, site.name, digest, lambda: admit(gateway, request))


async def admit(gateway: Gateway, request: Request, renewing: bool = False) -> Site:
    """The site that the peer's certificate stands for, as the state has it now or had it a moment ago; or Refused.

    To renew, a certificate will do whose issuing key was revoked since: the state knows it byte by byte, and a renewal
    is signed by the site's identity key besides.
    """
    certificate = request.certificate
    if certificate is None:
        raise Refused(403, "this needs a site's certificate. Join with an invite first.", code="NO_CERTIFICATE")
    site, why = await gateway.admission.ask(certificate)
    if site is None or (why is not None and not (renewing and why == ORPHANED)):
        why = why or Doubt("NOT_ENROLLED", "is not known here.")
        raise _forbidden(certificate.name, why.code, why.words, [("connection", "close")])
    now = time.monotonic()
    if now - gateway.seen.get(site.name, float("-inf")) >= SEEN_S:
        gateway.seen[site.name] = now
        await asyncio.to_thread(saw_site, gateway.federation.state, site.name, time.time())
    return site


async def _renew(gateway: Gateway, request: Request, site: Site) -> None:
    if not gateway.renewals.spend(site.name, 1):
        raise Refused(429, f"site {site.name!r}: renews too often. Try again in an hour.", [("retry-after", "3600")])
    body = await request.body.read(ENROL_BYTES)
    async with gateway.enrolling:
        reply = await asyncio.to_thread(renew, gateway.federation, site, body)
    gateway.admission.forget()
    log.info("renewal by site %s: %d", site.name, reply.status)
    if reply.status in (400, 403):
        gateway.refusals.note("RENEWAL", site.name)
    await request.respond(reply.status, reply.content, [("content-type", "application/json")])


async def _tell_roster(gateway: Gateway, request: Request, since: int) -> None:
    """The signed epochs from `since` on; from 0 on, the newest alone."""
    newest, found = await asyncio.to_thread(list_rosters, gateway.federation.state, since, MOST_EPOCHS)
    if since == 0 and newest:
        newest, found = await asyncio.to_thread(list_rosters, gateway.federation.state, newest, 1)
    history = History(newest, tuple(read_signed(content, "roster") for content in found))
    await request.respond(200, canonical_json(plain(history)), [("content-type", "application/json")])


async def forward(gateway: Gateway, request: Request, site: Site) -> None:
    """Hands a fleet call to the SuperLink and its answer back, once it is seen to be this site's own."""
    if gateway.calls[site.name] >= MOST_FLEET_CALLS:
        raise Refused(503, f"site {site.name!r}: {MOST_FLEET_CALLS} calls are under way. Try again.")
    gateway.calls[site.name] += 1
    try:
        if request.headers.get(NODE_KEY_HEADER) != _node_header(site):
            raise _forbidden(
                site.name, "NODE_KEY", "shows a node key that it has not enrolled. Use the node.key of its `keys`."
            )
        body = await request.body.read(FLEET_BYTES)
        _check_content(request.path, body, site)
        response = await _ask_superlink(gateway, request, body)
        if response.status_code == 200:
            await _learn_node(gateway, request.path, response.content, site)
    finally:
        gateway.calls[site.name] -= 1
    headers = [(name, value) for name, value in response.headers.items() if _is_answered(name)]
    if request.certificate is not None and request.certificate.serial != site.certificate_serial:
        headers.append(("connection", "close"))  # the next one will show the renewed certificate
    await request.respond(response.status_code, response.content, headers)


async def _ask_superlink(gateway: Gateway, request: Request, body: bytes) -> httpx.Response:
    headers = {name: value for name, value in request.headers.items() if name in FORWARDED}
    try:
        return await gateway.superlink.post(request.path, content=body, headers=headers)
    except httpx.TransportError as error:
        log.warning("SuperLink: %s", type(error).__name__)
        raise Refused(503, "the SuperLink cannot be reached. Try again.", [("retry-after", "1")]) from error


def _check_content(path: str, body: bytes, site: Site) -> None:
    try:
        sources = message_sources(path, body)
        check_object(path, body)
    except UpdateRejected as error:
        raise Refused(400, str(error), code=error.code) from error
    if sources - {site.flower_node_id}:
        words = "sends messages in the name of another node. They were not passed on."
        raise _forbidden(site.name, "FORGED_SOURCE", words)


async def _learn_node(gateway: Gateway, path: str, content: bytes, site: Site) -> None:
    """Keeps the node id that the SuperLink gives a site with its first activation."""
    node_id = activated_node(path, content)
    if node_id is not None and node_id != site.flower_node_id:
        await asyncio.to_thread(remember_node, gateway.federation.state, site.name, node_id)
        gateway.admission.forget()


def _is_answered(name: str) -> bool:
    return name == "content-type" or name.startswith("flwr-")


def _node_header(site: Site) -> str:
    """A site's node key as Flower's SuperNode shows it."""
    return base64.b64encode(node_public_pem((site.node_public_key or "").encode())).decode()


def _spend(gateway: Gateway, request: Request, cost: float) -> None:
    if not gateway.enrolments.spend(request.client, cost):
        words = "too many requests from this address. Try again in a minute."
        raise Refused(429, words, [("retry-after", "60")], "TOO_MANY_REQUESTS")


def _forbidden(site: str, code: str, why: str, headers: Headers = ()) -> Refused:
    log.warning("refused: site %s %s", _quoted(site), why)
    return Refused(403, f"site {site!r}: {why}", headers, code)


def _quoted(name: str) -> str:
    """A name out of a certificate, which whoever holds an issuing key chooses, as it may stand in a log."""
    return name if SITE_NAME.fullmatch(name) else repr(name[:40])


# The process


def gateway_server(gateway: Gateway, context: ssl.SSLContext, host: str, port: int) -> uvicorn.Server:
    async def handle(request: Request) -> None:
        await answer(gateway, request)

    certificate = str(gateway.federation.server_certificate)
    noted = gateway.refusals.note
    return make_server(application(handle, noted), context, certificate, host, port, noted)


async def serve(gateway: Gateway, host: str, port: int, unregister_node: UnregisterNode) -> None:
    """Serves until SIGTERM."""
    message_sources(PUSH_MESSAGES, b"")  # imports flwr, which takes a second, before anybody waits
    for path in sweep(gateway.intake):
        log.warning("removed a torn upload: %s", path)
    context = server_context(gateway.federation, gateway.refusals)
    server = gateway_server(gateway, context, host, port)
    trust = partial(trust_issuers, gateway.federation, context)
    watching = asyncio.create_task(
        watch(gateway.federation, gateway.admission, gateway.refusals, server, context, trust, unregister_node)
    )
    try:
        await server.serve()
    finally:
        watching.cancel()
        gateway.refusals.write(all_of_it=True)
        await gateway.superlink.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fedserver.gateway", description="The coordinator's public door.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--superlink", required=True, metavar="127.0.0.1:PORT")
    arguments = parser.parse_args()
    os.umask(0o077)
    brace()
    logs.start()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each call otherwise
    try:
        federation = open_federation(arguments.folder)
        os.environ.update(quiet_flower(federation.superlink / "flower", os.environ))
        gateway = open_gateway(federation, arguments.superlink, _registrar(arguments))
        asyncio.run(serve(gateway, arguments.host, arguments.port, _unregistrar(arguments)))
    except FederationError as error:
        sys.exit(f"fedserver.gateway: {error}")


def _registrar(arguments: argparse.Namespace) -> RegisterNode:
    """Registers a node with the SuperLink on loopback."""
    from fedserver.link import open_link, register_node  # imports nothing of Flower before it is called

    def register(public_key: bytes, site: str) -> int:
        link = open_link(arguments.folder, arguments.superlink)
        return register_node(link, node_public_pem(public_key), site)

    return register


def _unregistrar(arguments: argparse.Namespace) -> UnregisterNode:
    """Unregisters a node at the SuperLink on loopback."""
    from fedserver.link import open_link, unregister_node

    def unregister(node_id: int) -> None:
        unregister_node(replace(open_link(arguments.folder, arguments.superlink), patience_s=1.0), node_id)

    return unregister


if __name__ == "__main__":
    main()
