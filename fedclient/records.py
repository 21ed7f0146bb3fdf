"""A site's own audit log, and what it keeps of the coordinator's."""

from fedclient.own_log import log_of
from fedclient.site import Site
from shared_models.audit import HEAD, Head
from shared_models.authority import read_files
from shared_models.errors import OrderRefused
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


def check_own_log(order: Order, site: Site) -> None:
    """Raises OrderRefused, `OWN_LOG_CUT`, where the coordinator keeps more of this site's log than the site has.

    A folder that was put back from a backup as a whole has forgotten what privacy was spent and which sums were made,
    and its own witnesses with it; whom it has told of its log has not.
    """
    seen = order.head
    if seen is not None and log_of(site.folder, site.name).was_cut(seen.seen_log, seen.seen_size, COORDINATOR):
        raise OrderRefused(
            "OWN_LOG_CUT",
            f"{site.folder}: the coordinator has seen a longer log of this site than it has now, so the folder was put "
            f"back from a backup and has forgotten what privacy was spent and what was summed. Bring the newest one "
            f"back. If there is none, lower the budget by what may have been spent (`fedclient budget`), then ask for "
            f"an invite and `fedclient rejoin` it.",
        )


def own_head(order: Order, site: Site) -> Head:
    """The head of this site's log for the reply to `order`, proven from the one that the coordinator keeps."""
    seen = order.head
    log = log_of(site.folder, site.name)
    return log.head(seen.seen_log if seen else None, seen.seen_size if seen else 0, about=COORDINATOR)
