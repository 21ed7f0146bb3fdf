"""The coordinator's own audit log, what it keeps of the sites' logs, and by which keys it knows what sites sign."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedserver.state import list_rosters
from shared_models.audit import HEAD, UNSEEN, AuditLog, Seen
from shared_models.audit_files import closings, every_event
from shared_models.errors import UpdateRejected
from shared_models.identity import verify
from shared_models.roster import Roster, checked, read_signed
from shared_models.wire import Order, Reply


@dataclass(frozen=True, slots=True)
class Records:
    """What a run writes down and exchanges with its sites.

    Attributes:
        state: where the signed rosters are.
        authority: whom the coordinator's signature of a roster follows from, PEM: see `read_authority`.
        seen: which head of our log each site keeps, as its last reply said.
    """

    log: AuditLog
    state: Path
    authority: Callable[[], bytes]
    seen: dict[str, Seen] = field(default_factory=dict)
    _newest: dict[int, Roster] = field(default_factory=dict, repr=False)

    def add(self, event: str, **facts: Any) -> None:
        self.log.add(event, **facts)

    def closed(self, run: str, number: int) -> Mapping[str, Any] | None:
        """What the log, or one of an earlier key, says last of how a round of a run was closed; None where nothing."""
        return closings(every_event(self.log.path.parent, ("round-closed",))).get((run, number))

    def roster(self) -> Roster | None:
        """The newest epoch, its signature verified once; None before a site has joined.

        Raises:
            StateInvalid: the authority vouches for no such signature.
        """
        epoch, _ = list_rosters(self.state, 0, 0)
        if epoch and epoch not in self._newest:
            _, found = list_rosters(self.state, epoch, 1)
            roster = checked(read_signed(found[0], str(self.state)), self.authority())
            self._newest.clear()
            self._newest[epoch] = roster
        return self._newest.get(epoch)

    def key_of(self, site: str) -> bytes:
        """The identity (32 bytes) that the newest roster has for a site.

        Raises:
            UpdateRejected: `NOT_ON_ROSTER`: it has none, so that what comes in its name counts for nothing.
        """
        roster = self.roster()
        if roster is None or site not in roster.sites:
            raise UpdateRejected("NOT_ON_ROSTER", f"site {site!r}: is not on the newest roster. It was left out.")
        return bytes.fromhex(roster.sites[site])

    def ordered(self, site: str, order: Order) -> Order:
        """`order` with the head of our log, proven from the one that the site keeps; it is written down."""
        self.log.add(
            "order", site=site, run=order.run, round=order.round, kind=order.kind, attempt=order.attempt,
            study=order.study_sha256, weights=order.base_sha256, nonce=order.nonce,
        )  # fmt: skip
        return replace(order, head=self.log.head(self.seen.get(site, UNSEEN), about=site))

    def heard(self, site: str, reply: Reply, key: bytes) -> None:
        """Keeps the head that came with a reply that the site has signed by `key` (32 bytes).

        What the head shows of the site's log (cut, forked, put in the place of another) is written down, raises an
        alarm, and is no reason to do without the work: a site that was restored from a backup refuses orders itself.

        Raises:
            UpdateRejected: `HEAD_MISSING` or `HEAD_SIGNATURE`: the released client sends a signed head with every
                reply, the first one too, so the site keeps its log from us; written down, and an alarm.
        """
        if reply.head is None:
            self.log.add("witness-missing", peer=site, run=reply.run, round=reply.round)
            raise UpdateRejected(
                "HEAD_MISSING", f"site {site!r}: sends no head of its audit log. Install the released client there."
            )
        if not verify(key, bytes.fromhex(reply.head.signature), HEAD, reply.head.statement):
            self.log.add("witness-unsigned", peer=site, run=reply.run, round=reply.round)
            raise UpdateRejected(
                "HEAD_SIGNATURE", f"site {site!r}: the head of its audit log is not signed by its key. Ask it why."
            )
        self.seen[site] = reply.head.seen
        self.log.witness(site, reply.head, key.hex())
