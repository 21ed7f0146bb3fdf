"""A site's own audit log, and what it keeps of the coordinator's."""

from functools import lru_cache
from pathlib import Path

from fedclient.site import Site
from shared_models.audit import HEAD, AuditLog, Head
from shared_models.identity import load_secret, verify, vouched
from shared_models.wire import Order

COORDINATOR = "coordinator"


def log_of(folder: Path, name: str) -> AuditLog:
    """The audit log of the site in `folder`; its lines are signed with the site's identity key."""
    key = folder / "keys" / "identity.key"
    return _opened(folder / "audit.jsonl", f"site {name}", load_secret(key))


@lru_cache(maxsize=8)
def _opened(path: Path, party: str, key: bytes) -> AuditLog:
    return AuditLog(path, party, key)


def hear(order: Order, site: Site) -> str | None:
    """Keeps the head of the coordinator's log that came with an order, or says (and writes down) what is wrong."""
    log = log_of(site.folder, site.name)
    if order.head is None:
        if COORDINATOR in log.kept:
            log.add("witness-missing", peer=COORDINATOR, run=order.run, round=order.round)
        return None
    certificate, signature = order.head.certificate.encode(), bytes.fromhex(order.head.signature)
    authority = (site.folder / "keys" / "ca.pem").read_bytes()
    key = vouched(authority, certificate)
    if key is None or not verify(key, signature, HEAD, order.head.statement):
        log.add("witness-unsigned", peer=COORDINATOR, run=order.run, round=order.round)
        return "HEAD_SIGNATURE"
    return log.witness(COORDINATOR, order.head, key.hex())


def own_head(order: Order, site: Site) -> Head:
    """The head of this site's log for the reply to `order`, proven from the one that the coordinator keeps."""
    seen = order.head
    log = log_of(site.folder, site.name)
    return log.head(seen.seen_log if seen else None, seen.seen_size if seen else 0, about=COORDINATOR)
