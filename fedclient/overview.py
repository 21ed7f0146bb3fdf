"""How a site stands: what `fedclient status`, its page and its figures tell; read from the site's own files alone."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedclient import egress
from fedclient.consent import undecided
from fedclient.data.quota import cache_bytes
from fedclient.ledger import open_ledger
from fedclient.node import NodeFiles
from fedclient.renewal import certificate_of, check_keys, expiry_warning, read_roster
from fedclient.site import SiteFile, read_site_file
from fedclient.welcome import refused_words
from shared_models.alarms import alarm_words, events, last_refused
from shared_models.errors import FederationError
from shared_models.files import read_json
from shared_models.supervise import read_status, troubles

QUIET_S = 60.0  # a node asks at least every two seconds while it has no work


def overview(folder: Path) -> dict[str, Any]:
    """Facts of the site in `folder`; `fedclient status --json` prints them.

    Raises:
        StateInvalid: no site folder, or keys that others may read.
    """
    file, running = read_site_file(folder), read_status(folder)
    check_keys(folder)
    now, roster = time.time(), read_roster(folder)
    warned = [words for words in (refused_words(folder), expiry_warning(folder, now)) if words]
    sent, alarms, spent = egress.sent(folder), alarm_words(folder / "audit.jsonl"), list[dict[str, Any]]()
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
        "work": work_under_way(folder),
        "finished_work": sorted(str(p.relative_to(folder / "runs")) for p in (folder / "runs").glob("*/*.json")),
        "rounds_done": sum(line["kind"] == "tensors" for line in sent),
        "studies_waiting": len(undecided(folder)),
        "open_now": file.policy.is_open(now),
        "certificate_expires_at": certificate_of(folder).expires_at_s,
        "warnings": [*warned, *troubles(running)],
        "alarms": alarms,
        "last_refused": last_refused(folder / "audit.jsonl"),
        "roster_epoch": None if roster is None else roster.roster.epoch,
        "sent": {"messages": len(sent), "bytes": sum(int(line["bytes"]) for line in sent)},
        "disk": disk_facts(folder, file),
        "ledger": spent,
    }


def connection(folder: Path, running: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Whether the coordinator was heard of lately: its state, words for a person, and when (null: never)."""
    contact = NodeFiles(folder).contact
    at = contact.stat().st_mtime if contact.exists() else None
    why = refused_words(folder)
    if running.get("supervisor") is None:
        state, words = "stopped", "the node does not run; `fedclient start` starts it"
    elif why is not None:
        state, words = "refused", why
    elif NodeFiles(folder).order.exists():
        state, words = "working", "connected, and at work on an order"
    elif at is not None and now - at < QUIET_S:
        state, words = "connected", "connected, and waiting for orders"
    else:
        since = "never" if at is None else f"not for {now - at:.0f} s"
        state, words = "away", f"the coordinator was heard of {since}; `fedclient doctor` looks for the cause"
    return {"state": state, "words": words, "heard_at": at}


def work_under_way(folder: Path) -> dict[str, Any] | None:
    """The order that was taken last and not answered yet: run, round, kind, since; None where there is none."""
    last = None
    for line in events(folder / "audit.jsonl", ("order", "sent", "order-refused")):
        about = (line["facts"].get("run"), line["facts"].get("round"))
        if line["event"] == "order":
            kind = line["facts"].get("kind")
            last = {"run": about[0], "round": about[1], "kind": kind, "since": line["time"]}
        elif last is not None and about == (last["run"], last["round"]) and line["facts"].get("kind") != "tensors":
            last = None
    return last


def disk_facts(folder: Path, file: SiteFile) -> dict[str, Any]:
    usage = shutil.disk_usage(folder)
    quota = int(file.cache.quota_gib * 2**30)
    return {"free": usage.free, "total": usage.total, "cache": cache_bytes(folder / "cache"), "quota": quota}


def ledger_facts(folder: Path) -> list[dict[str, Any]]:
    """Privacy by data set; nothing where no budget was ever set."""
    if not (folder / "ledger.db").exists():
        return []
    return [
        {
            "data_set": account.data_set,
            "spent": account.spent if account.budget else None,
            "budget": account.budget.epsilon if account.budget else None,
            "not_settled": account.open,
        }
        for account in open_ledger(folder).accounts()
    ]


def card(folder: Path) -> dict[str, Any] | None:
    """The data card as `fedclient card` last made it; None before."""
    path = folder / "gate" / "card.json"
    return dict(read_json(path)) if path.exists() else None
