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
from pathlib import Path

import httpx
import uvicorn

from fedserver.admission import Admission
from fedserver.enrol import Federation, RegisterNode, enrol, open_federation
from fedserver.fleet import PUSH_MESSAGES, activated_node, carries_tensors, message_sources
from fedserver.intake import BLOB_PATH, Intake, give_blob, sweep, take_blob, tell_blob
from fedserver.lifecycle import renew
from fedserver.listener import Headers, Refused, Request, application, make_server
from fedserver.state import Site, list_rosters, remember_node, saw_site
from fedserver.watch import UnregisterNode, watch
from shared_models import logs
from shared_models.archive import quiet_flower
from shared_models.errors import FederationError, UpdateRejected
from shared_models.files import canonical_json
from shared_models.identity import load_secret, node_public_pem
from shared_models.parse import plain
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
        calls: fleet calls under way, by site.
        seen: when the state was last told of a site, monotonic seconds.
    """

    federation: Federation
    superlink: httpx.AsyncClient
    register_node: RegisterNode
    intake: Intake
    ca: bytes
    admission: Admission
    enrolments: Allowance
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
        ca=federation.ca_certificate.read_bytes(),
        admission=Admission(federation.state),
        enrolments=Allowance(burst=120, per_s=2),
    )


async def answer(gateway: Gateway, request: Request) -> None:
    """One request, from the strangers' two to the sites' few; paths are compared as sent, so that no trick decodes."""
    match request.method, request.path:
        case "GET", "/enrol/ca":
            _spend(gateway, request, cost=1)
            return await request.respond(200, gateway.ca, [("content-type", "application/x-pem-file")])
        case "POST", "/enrol":
            _spend(gateway, request, cost=10)
            body = await request.body.read(ENROL_BYTES)
            async with gateway.enrolling:
                reply = await asyncio.to_thread(enrol, gateway.federation, body, gateway.register_node)
            gateway.admission.forget()
            log.info("enrolment from %s: %d", request.client, reply.status)
            return await request.respond(reply.status, reply.content, [("content-type", "application/json")])
    blob = BLOB_PATH.fullmatch(request.path)
    known = request.method == "POST" and request.path in FLEET_CALLS
    known |= blob is not None and request.method in ("GET", "HEAD", "PUT")
    known |= (request.method, request.path) in (("GET", "/health"), ("POST", "/renew"))
    epoch = ROSTER_PATH.fullmatch(request.path) if request.method == "GET" else None
    if not known and epoch is None:
        raise Refused(404, f"{request.method} {request.path[:100]}: is not offered here.")
    site = await admit(gateway, request)
    if request.path == "/renew":
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


async def admit(gateway: Gateway, request: Request) -> Site:
    """The site that the peer's certificate stands for, as the state has it now or had it a moment ago; or Refused."""
    certificate = request.certificate
    if certificate is None:
        raise Refused(403, "this needs a site's certificate. Join with an invite first.")
    site, why = await gateway.admission.ask(certificate)
    if why is not None or site is None:
        raise _forbidden(certificate.name, why or "is not known here.", [("connection", "close")])
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
            raise _forbidden(site.name, "shows a node key that it has not enrolled. Use the node.key of its `keys`.")
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
        sources, tensors = message_sources(path, body), carries_tensors(path, body)
    except UpdateRejected as error:
        raise Refused(400, str(error)) from error
    if tensors:
        log.warning("refused: site %s sends tensors inside a message", site.name)
        raise Refused(413, f"site {site.name!r}: tensors travel as blobs, never inside a message. Nothing was kept.")
    if sources - {site.flower_node_id}:
        raise _forbidden(site.name, "sends messages in the name of another node. They were not passed on.")


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
        raise Refused(429, "too many requests from this address. Try again in a minute.", [("retry-after", "60")])


def _forbidden(site: str, why: str, headers: Headers = ()) -> Refused:
    log.warning("refused: site %s %s", site, why)
    return Refused(403, f"site {site!r}: {why}", headers)


# The process


def server_context(federation: Federation) -> ssl.SSLContext:
    """TLS 1.3 with our certificate; a client's is asked for, and if it shows one, our CA must have signed it."""
    load_secret(federation.server_certificate)  # for its check of owner and mode
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(federation.server_certificate)
    context.load_verify_locations(federation.ca_certificate)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # no resumption: each connection shows its certificate
    return context


def gateway_server(gateway: Gateway, context: ssl.SSLContext, host: str, port: int) -> uvicorn.Server:
    async def handle(request: Request) -> None:
        await answer(gateway, request)

    certificate = str(gateway.federation.server_certificate)
    return make_server(application(handle), context, certificate, host, port)


async def serve(gateway: Gateway, host: str, port: int, unregister_node: UnregisterNode) -> None:
    """Serves until SIGTERM."""
    message_sources(PUSH_MESSAGES, b"")  # imports flwr, which takes a second, before anybody waits
    for path in sweep(gateway.intake):
        log.warning("removed a torn upload: %s", path)
    context = server_context(gateway.federation)
    server = gateway_server(gateway, context, host, port)
    watching = asyncio.create_task(watch(gateway.federation, gateway.admission, server, context, unregister_node))
    try:
        await server.serve()
    finally:
        watching.cancel()
        await gateway.superlink.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fedserver.gateway", description="The coordinator's public door.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--superlink", required=True, metavar="127.0.0.1:PORT")
    arguments = parser.parse_args()
    os.umask(0o077)
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
