"""The coordinator's own audit log, and what it keeps of the sites'."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedserver.state import find_site
from shared_models.audit import HEAD, AuditLog
from shared_models.identity import verify
from shared_models.wire import Order, Reply


@dataclass(frozen=True, slots=True)
class Records:
    """What a run writes down and exchanges with its sites.

    Attributes:
        state: where the sites' identity keys are.
        seen: which head of our log each site keeps, as its last reply said.
    """

    log: AuditLog
    state: Path
    seen: dict[str, tuple[str | None, int]] = field(default_factory=dict)

    def add(self, event: str, **facts: Any) -> None:
        self.log.add(event, **facts)

    def ordered(self, site: str, order: Order) -> Order:
        """`order` with the head of our log, proven from the one that the site keeps; it is written down."""
        self.log.add(
            "order", site=site, run=order.run, round=order.round, kind=order.kind, attempt=order.attempt,
            study=order.study_sha256, weights=order.base_sha256,
        )  # fmt: skip
        return replace(order, head=self.log.head(*self.seen.get(site, (None, 0)), about=site))

    def heard(self, site: str, reply: Reply) -> str | None:
        """Keeps the head that came with a reply, or says (and writes down) what is wrong with it."""
        if reply.head is None:
            return None
        known = find_site(self.state, site)
        key = known.identity_public_key if known is not None else None
        if not key or not verify(bytes.fromhex(key), bytes.fromhex(reply.head.signature), HEAD, reply.head.statement):
            self.log.add("witness-unsigned", peer=site, run=reply.run, round=reply.round)
            return "HEAD_SIGNATURE"
        self.seen[site] = reply.head.seen_log, reply.head.seen_size
        return self.log.witness(site, reply.head, key)
