"""A gateway in a thread of this process, and in the place of the SuperLink a server that writes down what arrives."""

import asyncio
import base64
import http.client
import http.server
import json
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fedclient.enrol import Joined, join
from fedserver.enrol import Federation, Found, init_federation, invite
from fedserver.gateway import Gateway, gateway_server, open_gateway
from fedserver.server_tls import server_context, trust_issuers
from fedserver.watch import watch
from shared_models.identity import node_public_key, node_public_pem
from shared_models.transfer import Blobs, site_context, trusting


@dataclass(frozen=True, slots=True)
class Arrived:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class StandIn:
    """What the stand-in SuperLink got, and what it answers by path (200 and nothing unless told)."""

    port: int
    arrived: list[Arrived] = field(default_factory=list)
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Edge:
    """A federation being served.

    Attributes:
        nodes: sites whose node key was registered, in this order.
        gone: Flower's numbers of nodes that were unregistered.
    """

    federation: Federation
    gateway: Gateway
    superlink: StandIn
    nodes: list[str]
    gone: list[int]

    @property
    def address(self) -> str:
        return self.federation.address

    @property
    def blobs(self) -> Path:
        return self.federation.blobs


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def detail(self) -> str:
        return str(json.loads(self.content)["detail"])


def serve_standin(federation: Federation) -> tuple[http.server.ThreadingHTTPServer, StandIn]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            standin.arrived.append(Arrived(self.command, self.path, headers, body))
            status, content = standin.answers.get(self.path, (200, b""))
            self.send_response(status)
            self.send_header("content-type", "application/protobuf")
            self.send_header("content-length", str(len(content)))
            self.send_header("flwr-told", "yes")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(federation.loopback_certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    standin = StandIn(server.server_address[1])
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server, standin


@contextmanager
def running_edge(folder: Path, found: Found | None = None) -> Iterator[Edge]:
    """A new federation in `folder`, served on a free port until the block ends."""
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    federation = init_federation(folder, "Test federation", address, found=found)
    standin_server, standin = serve_standin(federation)
    nodes: list[str] = []

    def register_node(public_key: bytes, site: str) -> None:
        node_public_pem(public_key)
        nodes.append(site)

    gateway = open_gateway(federation, f"127.0.0.1:{standin.port}", register_node)
    gateway.enrolments.burst = gateway.enrolments.per_s = 10_000
    context, gone = server_context(federation, gateway.refusals), list[int]()
    server = gateway_server(gateway, context, "127.0.0.1", 0)

    async def serve() -> None:
        trust = partial(trust_issuers, federation, context)
        looking = watch(federation, gateway.admission, gateway.refusals, server, context, trust, gone.append)
        watching = asyncio.create_task(looking)
        await server.serve(sockets=[listening])
        watching.cancel()
        await gateway.superlink.aclose()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        yield Edge(federation, gateway, standin, nodes, gone)
    finally:
        server.should_exit = True
        thread.join(10)
        standin_server.shutdown()
        standin_server.server_close()


def joined_site(edge: Edge, folder: Path, name: str) -> Joined:
    return join(invite(edge.federation, name), folder / name)


def site_blobs(site: Joined) -> Blobs:
    return Blobs(site.address, site_context(site.keys))


def node_headers(site: Joined) -> dict[str, str]:
    """The headers of a SuperNode, as far as the gateway reads them."""
    pem = node_public_pem(node_public_key((site.keys / "node.key").read_bytes()))
    return {"flwr-public-key": base64.b64encode(pem).decode(), "content-type": "application/protobuf"}


def stranger_context(edge: Edge) -> ssl.SSLContext:
    return trusting(edge.federation.authority)


def ask(
    edge: Edge,
    context: ssl.SSLContext,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request on a connection of its own; `path` goes out as it is."""
    host, port = edge.address.split(":")
    with closing(http.client.HTTPSConnection(host, int(port), context=context, timeout=10)) as connection:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        content = response.read()
        return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, content)
