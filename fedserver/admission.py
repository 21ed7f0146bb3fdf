"""Who is let in at the gateway: a peer's certificate beside what the state says of it now, or said a moment ago."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedserver.state import CertificateRow, Site, find_site, list_certificates, used_certificate
from shared_models.authority import read_authority, read_files
from shared_models.dates import date_text
from shared_models.errors import StateInvalid
from shared_models.identity import Certificate, is_issued_by, read_certificate

OVERLAP_S = 86400.0  # for which an older certificate still counts once a newer one was seen
MOST_KNOWN = 1024
CACHE_S = 2.0  # longest that a revoked site still gets in


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a peer that shows a certificate of our authority is not let in.

    Attributes:
        code: for the audit log.
        words: for its people.
    """

    code: str
    words: str


ORPHANED = Doubt(
    "ISSUER_REVOKED",
    "shows a certificate by an issuing key that was revoked. A node that runs renews it; by hand: `fedclient renew`.",
)


def refusal(
    site: Site | None,
    rows: Sequence[CertificateRow],
    shown: Certificate,
    now_s: float,
    orphaned: frozenset[str] = frozenset(),
) -> Doubt | None:
    """Why a peer that shows a certificate of our authority is not let in; None when it is.

    A certificate is known by all of it, not by its number: whoever has stolen an issuing key chooses the number.

    Args:
        site, rows: of the certificate's name, as the state has them.
        orphaned: numbers of certificates by an issuing key that counts no more.
    """
    row = next((row for row in rows if _is(row, shown)), None)
    if row is not None and row.ended == "revoked":
        when = date_text(row.ended_at or 0.0)
        return Doubt("REVOKED", f"this site's certificate was revoked on {when}. Ask the coordinator.")
    if shown.expires_at_s <= now_s:  # it was good when the connection was made
        return Doubt(
            "EXPIRED",
            f"this site's certificate has expired on {date_text(shown.expires_at_s)}. Ask the coordinator for an "
            "invite, then `fedclient rejoin INVITE`.",
        )
    if site is None or site.state != "active" or row is None:
        words = "is not active in this federation with this certificate. Ask the coordinator for an invite."
        return Doubt("NOT_ENROLLED", words)
    seen = [r.used_at for r in rows[rows.index(row) + 1 :] if not r.ended and r.used_at is not None]
    if row.ended or any(at < now_s - OVERLAP_S for at in seen):
        return Doubt("REPLACED", "shows a certificate that a newer one has replaced. Use the newest keys.")
    return ORPHANED if row.serial in orphaned else None


def _is(row: CertificateRow, shown: Certificate) -> bool:
    return row.serial == shown.serial and read_certificate(row.pem.encode()).fingerprint == shown.fingerprint


@dataclass(frozen=True, slots=True)
class Known:
    """What the state says of a site, with all its certificates, as it was read at `read_at` (monotonic seconds).

    Attributes:
        ended: why nobody can tell which issuing keys count, or "".
    """

    site: Site | None
    certificates: tuple[CertificateRow, ...]
    read_at: float
    orphaned: frozenset[str] = frozenset()
    ended: str = ""


@dataclass(frozen=True, slots=True)
class Admission:
    """The state, and what was read of it in the last seconds, by the name of the site; `ca` holds the authority."""

    state: Path
    ca: Path
    known: dict[str, Known] = field(default_factory=dict)

    async def ask(self, certificate: Certificate) -> tuple[Site | None, Doubt | None]:
        """The site that a certificate stands for, and why it is not let in, None when it is."""
        if len(self.known) > MOST_KNOWN:  # whoever has stolen an issuing key chooses names
            self.known.clear()
        known = self.known.get(certificate.name)
        if known is None or time.monotonic() - known.read_at >= CACHE_S:
            known = self.known[certificate.name] = await asyncio.to_thread(self._read, certificate)
        why = refusal(known.site, known.certificates, certificate, time.time(), known.orphaned)
        if known.ended and why in (None, ORPHANED):
            why = Doubt("LIST_ENDED", known.ended)
        return known.site, why

    def forget(self) -> None:
        """The next question goes to the state."""
        self.known.clear()

    def _read(self, certificate: Certificate) -> Known:
        now, rows = time.monotonic(), tuple(list_certificates(self.state, certificate.name))
        for row in rows:
            if row.used_at is None and _is(row, certificate):
                used_certificate(self.state, row.serial, time.time())
        authority, ended = read_files(self.ca), ""
        try:
            read_authority(authority).check_current()
        except StateInvalid as error:
            ended = str(error)
        counted = [row for row in rows if row.ended == "" and row.expires_at > time.time()]
        orphaned = frozenset(row.serial for row in counted if not is_issued_by(row.pem.encode(), authority))
        return Known(find_site(self.state, certificate.name), rows, now, orphaned, ended)
