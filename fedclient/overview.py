"""How a site stands: what `fedclient status`, its page and its figures tell; read from the site's own files alone."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedclient.book import Book
from fedclient.consent import undecided
from fedclient.data.quota import cache_bytes
from fedclient.ledger import open_ledger
from fedclient.node import NodeFiles
from fedclient.partners import changed_words, partners_of
from fedclient.renewal import certificate_of, check_keys, expiry_warning, read_roster
from fedclient.site import SiteFile, read_site_file
from fedclient.welcome import refused_words
from shared_models.alarms import alarms_in
from shared_models.errors import FederationError
from shared_models.files import read_json
from shared_models.supervise import read_status, troubles

QUIET_S = 60.0  # a node asks at least every two seconds while it has no work


def overview(folder: Path, book: Book | None = None, counted: Callable[[Path], int] = cache_bytes) -> dict[str, Any]:
    """Facts of the site in `folder`; `fedclient status --json` prints them.

    Args:
        book: of this site, where it is looked at again and again.
        counted: the bytes of its cache, likewise: there may be a hundred thousand files in it.

    Raises:
        StateInvalid: no site folder, or keys that others may read.
    """
    file, running = read_site_file(folder), read_status(folder)
    check_keys(folder)
    now, roster = time.time(), read_roster(folder)
    partners = partners_of(folder, file.name, file.policy.partners, None if roster is None else roster.roster)
    changed = changed_words(partners)
    warned = [words for words in (refused_words(folder), expiry_warning(folder, now), changed) if words]
    book = book or Book(folder)
    book.look()
    alarms, spent = alarms_in(book.alarms), list[dict[str, Any]]()
    try:
        spent = ledger_facts(folder)
    except FederationError as error:  # a book that was cut or put back
        alarms.append(str(error))
    return {
        "site": file.name,
        "federation": file.federation,
        "coordinator": file.coordinator,
        "processes": running,
        "connection": connection(folder, running, now),
        "work": book.work,
        "finished_work": sorted(str(p.relative_to(folder / "runs")) for p in (folder / "runs").glob("*/*.json")),
        "rounds_done": book.rounds_done,
        "studies_waiting": len(undecided(folder)),
        "open_now": file.policy.is_open(now),
        "certificate_expires_at": certificate_of(folder).expires_at_s,
        "warnings": [*warned, *troubles(running)],
        "alarms": alarms,
        "last_refused": book.last_refused,
        "roster_epoch": None if roster is None else roster.roster.epoch,
        "sent": {"messages": book.messages, "bytes": book.size_bytes},
        "disk": disk_facts(folder, file, counted),
        "ledger": spent,
    }


def connection(folder: Path, running: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Whether the coordinator was heard of lately: its state, words for a person, and when (null: never)."""
    contact = NodeFiles(folder).contact
    at = contact.stat().st_mtime if contact.exists() else None
    why = refused_words(folder)
    lately = at is not None and abs(now - at) < QUIET_S
    if at is None:
        since = "never"
    else:
        since = f"not for {now - at:.0f} s" if now >= at else "not since this machine's clock was set back"
    if running.get("supervisor") is None:
        state, words = "stopped", "the node does not run; `fedclient start` starts it"
    elif why is not None:
        state, words = "refused", why
    elif NodeFiles(folder).order.exists():  # until it is answered
        told = f"the coordinator, which is spoken to again with the answer, was heard of {since}"
        state, words = "working", "connected, and at work on an order" if lately else f"at work on an order; {told}"
    elif lately:
        state, words = "connected", "connected, and waiting for orders"
    else:
        state, words = "away", f"the coordinator was heard of {since}; `fedclient doctor` looks for the cause"
    return {"state": state, "words": words, "heard_at": at}


def disk_facts(folder: Path, file: SiteFile, counted: Callable[[Path], int] = cache_bytes) -> dict[str, Any]:
    usage = shutil.disk_usage(folder)
    quota = int(file.cache.quota_gib * 2**30)
    return {"free": usage.free, "total": usage.total, "cache": counted(folder / "cache"), "quota": quota}


def ledger_facts(folder: Path) -> list[dict[str, Any]]:
    """Privacy by data set; nothing where no budget was ever set."""
    if not (folder / "ledger.db").exists():
        return []
    return [
        {
            "data_set": account.data_set,
            "spent": account.spent if account.budget else None,
            "budget": account.budget.epsilon if account.budget else None,
            "delta": account.budget.delta if account.budget else None,
            "not_settled": account.open,
        }
        for account in open_ledger(folder).accounts()
    ]


def card(folder: Path) -> dict[str, Any] | None:
    """The data card as `fedclient card` last made it; None before."""
    path = folder / "gate" / "card.json"
    return dict(read_json(path)) if path.exists() else None
