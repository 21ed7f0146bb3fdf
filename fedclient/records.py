"""A site's own audit log, and what it keeps of the coordinator's."""

from fedclient.own_log import log_of
from fedclient.site import Site
from shared_models.audit import HEAD, Head
from shared_models.authority import read_files
from shared_models.identity import verify, vouched
from shared_models.wire import Order

COORDINATOR = "coordinator"


def hear(order: Order, site: Site) -> str | None:
    """Keeps the head of the coordinator's log that came with an order, or says (and writes down) what is wrong."""
    log = log_of(site.folder, site.name)
    if order.head is None:
        if COORDINATOR in log.kept:
            log.add("witness-missing", peer=COORDINATOR, run=order.run, round=order.round)
        return None
    certificate, signature = order.head.certificate.encode(), bytes.fromhex(order.head.signature)
    key = vouched(read_files(site.folder / "keys"), certificate)
    if key is None or not verify(key, signature, HEAD, order.head.statement):
        log.add("witness-unsigned", peer=COORDINATOR, run=order.run, round=order.round)
        return "HEAD_SIGNATURE"
    return log.witness(COORDINATOR, order.head, key.hex())


def own_head(order: Order, site: Site) -> Head:
    """The head of this site's log for the reply to `order`, proven from the one that the coordinator keeps."""
    seen = order.head
    log = log_of(site.folder, site.name)
    return log.head(seen.seen_log if seen else None, seen.seen_size if seen else 0, about=COORDINATOR)
