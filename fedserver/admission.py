"""Who is let in at the gateway: a peer's certificate beside what the state says of it now, or said a moment ago."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedserver.state import CertificateRow, Site, find_site, list_certificates, used_certificate
from shared_models.expiry import date_text
from shared_models.identity import Certificate

OVERLAP_S = 86400.0  # for which an older certificate still counts once a newer one was seen
CACHE_S = 2.0  # longest that a revoked site still gets in


def refusal(site: Site | None, rows: Sequence[CertificateRow], shown: Certificate, now_s: float) -> str | None:
    """Why a peer that shows a certificate of our CA is not let in, in words for its people; None when it is.

    Args:
        site, rows: of the certificate's name, as the state has them.
    """
    row = next((row for row in rows if row.serial == shown.serial), None)
    if row is not None and row.ended == "revoked":
        return f"this site's certificate was revoked on {date_text(row.ended_at or 0.0)}. Ask the coordinator."
    if shown.expires_at_s <= now_s:  # it was good when the connection was made
        return (
            f"this site's certificate has expired on {date_text(shown.expires_at_s)}. Ask the coordinator for an "
            "invite, then `fedclient rejoin INVITE`."
        )
    if site is None or site.state != "active" or row is None:
        return "is not active in this federation with this certificate. Ask the coordinator for an invite."
    newer = rows[rows.index(row) + 1 :]
    if row.ended or any(r.used_at is not None and r.used_at < now_s - OVERLAP_S for r in newer):
        return "shows a certificate that a newer one has replaced. Use the newest keys."
    return None


@dataclass(frozen=True, slots=True)
class Known:
    """What the state says of a site, with all its certificates, as it was read at `read_at` (monotonic seconds)."""

    site: Site | None
    certificates: tuple[CertificateRow, ...]
    read_at: float


@dataclass(frozen=True, slots=True)
class Admission:
    """The state, and what was read of it in the last seconds, by the name of the site."""

    state: Path
    known: dict[str, Known] = field(default_factory=dict)

    async def ask(self, certificate: Certificate) -> tuple[Site | None, str | None]:
        """The site that a certificate stands for, and why it is not let in, None when it is."""
        known = self.known.get(certificate.name)
        if known is None or time.monotonic() - known.read_at >= CACHE_S:
            known = self.known[certificate.name] = await asyncio.to_thread(self._read, certificate)
        return known.site, refusal(known.site, known.certificates, certificate, time.time())

    def forget(self) -> None:
        """The next question goes to the state."""
        self.known.clear()

    def _read(self, certificate: Certificate) -> Known:
        now, rows = time.monotonic(), tuple(list_certificates(self.state, certificate.name))
        for row in rows:
            if row.serial == certificate.serial and row.used_at is None:
                used_certificate(self.state, row.serial, time.time())
        return Known(find_site(self.state, certificate.name), rows, now)
