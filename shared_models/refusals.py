"""What a port has refused, for the audit log: the first of a kind at once, and a flood of it as a count.

Strangers decide how often they try. A line for each would let them fill the disk and slow the chain down.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shared_models.audit import AuditLog
from shared_models.identity import SITE_NAME

FIRST_PAUSE_S = 60.0  # from the first line of a kind to the next; doubled while it goes on
LONGEST_PAUSE_S = 3600.0
MOST_KINDS = 512  # that are told apart; what comes beyond is counted without its name


@dataclass(slots=True)
class Count:
    """Refusals of one kind that no line tells of yet, and when the next line may come (monotonic seconds)."""

    untold: int = 0
    next_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S


@dataclass(slots=True)
class Refusals:
    """Counts what any thread notes, until somebody writes it down.

    Attributes:
        log: opens the audit log; its key may be another one after a while.
    """

    log: Callable[[], AuditLog]
    clock: Callable[[], float] = time.monotonic
    counts: dict[tuple[str, str], Count] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, code: str, name: str = "") -> None:
        """Counts one refusal; `name` is the one of the peer's certificate, "" of a stranger."""
        site = name if SITE_NAME.fullmatch(name) else ""
        with self.lock:
            known = (code, site) in self.counts or len(self.counts) < MOST_KINDS
            self.counts.setdefault((code, site if known else ""), Count()).untold += 1

    def write(self, all_of_it: bool = False) -> None:
        """Writes a line for each kind whose turn has come, or for all that is not told yet; what cannot be written is
        kept."""
        now, due = self.clock(), list[tuple[str, str, int]]()
        with self.lock:
            for (code, site), count in list(self.counts.items()):
                if count.untold and (all_of_it or now >= count.next_at):
                    due.append((code, site, count.untold))
                    count.untold, count.next_at = 0, now + count.pause_s
                    count.pause_s = min(2 * count.pause_s, LONGEST_PAUSE_S)
                elif now >= count.next_at + count.pause_s:  # it has ended
                    del self.counts[code, site]
        written = 0
        try:
            for code, site, times in due:
                self.log().add("refused", code=code, times=times, **({"site": site} if site else {}))
                written += 1
        finally:
            with self.lock:  # what a full disk keeps out is told once there is room
                for code, site, times in due[written:]:
                    count = self.counts.setdefault((code, site), Count())
                    count.untold, count.next_at = count.untold + times, now
