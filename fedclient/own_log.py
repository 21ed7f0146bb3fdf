"""The audit log of a site, opened: any process of the site adds to it, and none needs Flower for that."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from shared_models.alarms import events
from shared_models.audit import AuditLog
from shared_models.audit_files import logs_of
from shared_models.files import read_lines
from shared_models.identity import load_secret


def log_of(folder: Path, name: str) -> AuditLog:
    """The audit log of the site in `folder`; its lines are signed with the site's identity key."""
    return _opened(folder / "audit.jsonl", f"site {name}", _key_of(folder))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the site's log, and before them those of the logs that earlier identity keys have signed."""
    return [line for path in logs_of(folder) for line in read_lines(path)]


def complain(folder: Path, name: str, event: str, why: str) -> None:
    """Writes down what was refused, once until it is something else: a node looks again every minute."""
    last = None
    for line in events(folder / "audit.jsonl", (event,)):
        last = line["facts"].get("why")
    if last != why:
        log_of(folder, name).add(event, why=why)


@lru_cache(maxsize=8)
def _opened(path: Path, party: str, key: bytes) -> AuditLog:
    return AuditLog(path, party, key, renewed=lambda: (_key_of(path.parent), ""))


def _key_of(folder: Path) -> bytes:
    return load_secret(folder / "keys" / "identity.key")
