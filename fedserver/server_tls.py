"""The gateway's side of TLS: 1.3 alone, each connection with its certificate, and each failed handshake noted."""

import ssl

from fedserver.enrol import Federation
from fedserver.listener import watched_handshake
from shared_models.authority import read_authority
from shared_models.identity import load_secret
from shared_models.refusals import Refusals


def server_context(federation: Federation, refusals: Refusals | None = None) -> ssl.SSLContext:
    """TLS 1.3 with our certificate; a client's is asked for, and if it shows one, our CA must have signed it.

    Args:
        refusals: is told of handshakes that fail, which nothing else would see.
    """
    load_secret(federation.server_certificate)  # for its check of owner and mode
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(federation.server_certificate)
    trust_issuers(federation, context)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # no resumption: each connection shows its certificate
    if refusals is not None:
        context.sslobject_class = watched_handshake(refusals.note)
    return context


def trust_issuers(federation: Federation, context: ssl.SSLContext) -> None:
    """Lets clients in whose certificates are by an issuing key; adds those that are new to a context in use.

    One whose key was revoked since is let in to renew, and refused everything else: see `admit`.
    """
    found = read_authority(federation.authority)
    context.load_verify_locations(cadata=b"".join((*found.issuers, *found.withdrawn)).decode("ascii"))
    if found.offline:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
