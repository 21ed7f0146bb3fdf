"""What the gateway does beside answering: turns out whom the state no longer lets in, and keeps its own TLS fresh."""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable

import uvicorn

from fedserver.admission import Admission
from fedserver.enrol import Federation
from fedserver.lifecycle import drop_uploads, renew_server, revoked_sites, warnings
from fedserver.listener import GuardedProtocol
from fedserver.state import forget_node, retired_nodes
from shared_models.errors import FederationError
from shared_models.refusals import Refusals

WATCH_S = 1.0
EXPIRY_S = 60.0  # between two looks at every certificate of the federation
ANSWERED_S = 2.0  # a peer that is not let in hears why before its connection is cut
DAY_S = 86400.0

log = logging.getLogger("fedserver.gateway")

UnregisterNode = Callable[[int], None]


async def watch(
    federation: Federation,
    admission: Admission,
    refusals: Refusals,
    server: uvicorn.Server,
    context: ssl.SSLContext,
    trust_issuers: Callable[[], None],
    unregister_node: UnregisterNode,
) -> None:
    """Looks every second until it is cancelled; a trouble of ours is logged and tried again.

    Args:
        refusals: what was refused since the last look goes into the audit log.
        context: of the server; gets the certificate anew when that was renewed.
        trust_issuers: lets `context` take certificates by a new issuing key.
        unregister_node: shuts a node out at the SuperLink; a FederationError is tried again.
    """
    changed_at, told, looked_at = _changed_at(federation), dict[str, float](), float("-inf")
    listed_at = _listed_at(federation)
    while True:
        await asyncio.sleep(WATCH_S)
        try:
            await turn_out(admission, server)
            if time.monotonic() - looked_at > EXPIRY_S:
                looked_at = time.monotonic()
                await asyncio.to_thread(_look_at_expiry, federation, told)
            if _changed_at(federation) != changed_at:
                changed_at = _changed_at(federation)
                context.load_cert_chain(federation.server_certificate)
                log.info("the coordinator's certificate is a new one; new connections get it")
            if _listed_at(federation) != listed_at:
                listed_at = _listed_at(federation)
                trust_issuers()
                admission.forget()
                log.info("the authority has a new revocation list")
            await asyncio.to_thread(refusals.write)
            await asyncio.to_thread(_tidy, federation, unregister_node)
        except (FederationError, OSError) as error:
            log.error("%s", error)
        except Exception:  # a gap of ours must not end the watch: a site that is revoked would keep its connections
            log.exception("the watch goes on")


async def turn_out(admission: Admission, server: uvicorn.Server) -> None:
    """Cuts the connections, idle or in the middle of a blob, of peers that are not let in any more."""
    now = asyncio.get_running_loop().time()
    open_now = [peer for peer in server.server_state.connections if isinstance(peer, GuardedProtocol)]
    for certificate in {peer.certificate for peer in open_now if peer.certificate is not None}:
        _, why = await admission.ask(certificate)
        for peer in open_now if why is not None else ():
            if peer.certificate == certificate and why is not None and now - peer.since > ANSWERED_S:
                log.warning("cut a connection: site %r %s", certificate.name, why.words)
                peer.transport.abort()


def _tidy(federation: Federation, unregister_node: UnregisterNode) -> None:
    for site in revoked_sites(federation.state):
        drop_uploads(federation, site)
    for node_id in retired_nodes(federation.state):
        unregister_node(node_id)
        forget_node(federation.state, node_id)
        log.info("node %s is unregistered", node_id)


def _look_at_expiry(federation: Federation, told: dict[str, float]) -> None:
    """Renews the coordinator's certificate when that is due, and logs each warning once a day."""
    if renew_server(federation):
        log.info("renewed the coordinator's certificate")
    now = time.monotonic()
    for words in warnings(federation):
        what = words.partition(" certificate ")[0]
        if now - told.get(what, float("-inf")) > DAY_S:
            told[what] = now
            log.warning("%s", words)


def _listed_at(federation: Federation) -> int:
    return federation.listed.stat().st_mtime_ns if federation.listed.exists() else 0


def _changed_at(federation: Federation) -> int:
    return federation.server_certificate.stat().st_mtime_ns
