"""A site's own audit log, and what it keeps of the coordinator's."""

from fedclient.own_log import log_of
from fedclient.site import Site
from shared_models.audit import HEAD, UNSEEN, Head
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
    """Raises OrderRefused, `OWN_LOG_CUT`, where the coordinator has seen lines of this site's log that are not in it.

    A folder that was put back from a backup as a whole has forgotten what privacy was spent and which sums were made,
    and its own witnesses with it; whom it has told of its log has not.
    """
    if order.head is not None and log_of(site.folder, site.name).was_cut(order.head.seen, COORDINATOR):
        raise OrderRefused(
            "OWN_LOG_CUT",
            f"{site.folder}: the coordinator has seen lines of this site's log that it does not have now, so the "
            f"folder was put back from a backup and has forgotten what privacy was spent and what was summed. Bring "
            f"the newest one back. If there is none, lower the budget by what may have been spent (`fedclient "
            f"budget`), then ask for an invite and `fedclient rejoin` it.",
        )


def own_head(order: Order, site: Site) -> Head:
    """The head of this site's log for the reply to `order`, proven from the one that the coordinator keeps."""
    seen = UNSEEN if order.head is None else order.head.seen
    return log_of(site.folder, site.name).head(seen, about=COORDINATOR)
