"""Whom a hospital takes for its coordinator: the root that it pinned, and what the root says of issuing keys since.

Where the coordinator's root key is kept offline, issuing keys come and go. Their list is fetched over a connection that
proves nothing, because the root's signature does: a site that was away while all keys were changed finds its way back.
"""

import ssl
from pathlib import Path

from fedclient.ask import MOST_BYTES, ask
from fedclient.own_log import complain, log_of
from shared_models.authority import LIST, newer, read_authority, read_files
from shared_models.errors import StateInvalid
from shared_models.files import write_atomic
from shared_models.identity import is_issued_by, load_credential


def offered(address: str) -> bytes:
    """The authority (PEM) that `address` shows to strangers, whoever that is; nothing of it is verified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return ask(address, context, "GET", "/enrol/ca", most=MOST_BYTES)


def refresh(site: Path, name: str, address: str) -> bool:
    """Brings the site's list of issuing keys up to the coordinator's; whether there was a new one.

    A root whose key is at the coordinator has no list, and nobody is asked.

    Raises:
        StateInvalid: what is offered is not of the pinned root, or older than what was seen: written down, too.
        EnrolmentFailed: the coordinator cannot be reached.
    """
    known = read_files(site / "keys")
    if not read_authority(known).offline:
        return False
    told = offered(address)
    try:
        if not newer(known, told):
            return False
        found = read_authority(told)
    except StateInvalid as error:
        complain(site, name, "authority-refused", str(error))
        raise
    write_atomic(site / "keys" / LIST, told.removeprefix(found.root))
    log_of(site, name).add("authority", list=found.number, issuers=len(found.issuers), revoked=len(found.revoked))
    return True


def is_orphaned(site: Path) -> bool:
    """Whether the site's certificate is by a key that counts no more: it is then to be renewed."""
    own = load_credential(site / "keys/tls.pem").certificate
    return not is_issued_by(own, read_files(site / "keys"))
