"""The life of a site's certificate after enrolment: renewed, replaced, expired, revoked; and the coordinator's own."""

import shutil
import time
from pathlib import Path

from fedserver.enrol import Federation, Reply, authority_of, certificate_row, open_log, refused, sealer
from fedserver.state import (
    CertificateRow,
    Site,
    find_site,
    list_certificates,
    list_sites,
    renew_certificate,
    revoke_site,
)
from shared_models.dates import date_text
from shared_models.errors import EnrolmentFailed, StateInvalid
from shared_models.expiry import due, early, warning
from shared_models.identity import (
    is_issued_by,
    issue_server,
    issue_site,
    load_credential,
    read_certificate,
    request_key,
    save_credential,
    split_address,
    verify,
)
from shared_models.invite import RENEWAL, SUCCESSION, JoinAnswer, RenewRequest, read_message, statement, write_message
from shared_models.parse import printable

MOST_REASON = 500
HEARD_S = 600.0  # a node fetches the authority's list every minute; one that was off, before it connects
RENEW_ISSUER = "Bring the root key, and `fedserver ca renew --root FOLDER`: after that nobody gets in or is renewed."


def revoke(federation: Federation, site: str, reason: str, now_s: float | None = None) -> Site:
    """Shuts `site` out: its certificates count no more, its node is to go, the roster has a new epoch.

    A gateway that runs notices within seconds (`fedserver/watch.py`); one that does not run lets nobody in.

    Raises:
        StateInvalid: a site that is not known, or a reason that is none.
    """
    words = printable(reason).strip()
    if not words or len(words) > MOST_REASON:
        raise StateInvalid(f"reason: 1 to {MOST_REASON} characters, for those who ask later. Give one with --reason.")
    at = time.time() if now_s is None else now_s
    revoke_site(federation.state, site, at, words, sealer(federation))
    open_log(federation).add("revoked", site=site, reason=words)
    found = find_site(federation.state, site)
    assert found is not None
    return found


def revoked_words(site: Site) -> str:
    """`was revoked on 2026-11-26 02:40 UTC`"""
    return f"was revoked on {date_text(site.revoked_at or 0.0)}"


def revoked_sites(path: Path) -> dict[str, str]:
    """Sites that are shut out, each with words for `status`; `path` is of state.db."""
    return {site.name: revoked_words(site) for site in list_sites(path) if site.state == "revoked"}


def drop_uploads(federation: Federation, site: str) -> None:
    """Removes what a site has uploaded and nobody has taken away."""
    shutil.rmtree(federation.blobs / "in" / site, ignore_errors=True)


def renew(federation: Federation, site: Site, body: bytes, now_s: float | None = None) -> Reply:
    """Answers a RenewRequest of a site that has shown its certificate: a further one for its new key.

    The same key again gets the same certificate again: the first answer was lost. Statuses: 200, 400, 403.
    """
    now = time.time() if now_s is None else now_s
    try:
        asked = read_message(RenewRequest, body, "renewal request")
        signature = _signature(asked)
        if asked.site != site.name:
            return refused(403, f"renewal of {asked.site!r}: was asked for by {site.name!r}.")
        if not verify(bytes.fromhex(site.identity_public_key or ""), signature, RENEWAL, statement(asked)):
            return refused(
                403, f"renewal of {site.name!r}: is not signed by this site's identity key. Use the keys of one join."
            )
        identity = _successor(federation, site, asked) if asked.identity_public_key else None
        rows = list_certificates(federation.state, site.name)
        key = request_key(asked.request.encode(), site.name)
        known = [row for row in rows if row.ended == "" and _is_good_for(key, row, now)]
        if known and known[-1] is not rows[-1]:
            return refused(400, f"renewal of {site.name!r}: its key was certified before. Make a new key.")
        if known and identity is None and not due(read_certificate(known[-1].pem.encode()), now):
            certificate = known[-1].pem
        elif known:
            return refused(400, f"renewal of {site.name!r}: asks for the key that it has. Make a new key.")
        else:
            pem = issue_site(
                authority_of(federation), asked.request.encode(), site.name, days=federation.certificate_days
            )
            certificate = pem.decode()
            fingerprint = read_certificate(pem).fingerprint
            row, signed_by = certificate_row(pem, now), site.identity_public_key or ""
            renew_certificate(federation.state, row, fingerprint, sealer(federation), signed_by, identity)
            facts = {"certificate": fingerprint} | ({"identity": identity} if identity else {})
            open_log(federation).add("renewed", site=site.name, **facts)
    except EnrolmentFailed as error:
        return refused(400, str(error))
    return Reply(200, write_message(JoinAnswer(federation.name, site.name, certificate)))


def _is_good_for(key_sha256: str, row: CertificateRow, now: float) -> bool:
    """Whether it certifies this key; one that was signed while the clock was ahead is as good as none."""
    facts = read_certificate(row.pem.encode())
    return facts.key_sha256 == key_sha256 and not early(facts, now)


def _successor(federation: Federation, site: Site, asked: RenewRequest) -> str:
    """The new identity key that a site's old one hands over to; raises EnrolmentFailed unless it takes over itself."""
    new, known = bytes.fromhex(asked.identity_public_key), list_sites(federation.state)
    if not verify(new, bytes.fromhex(asked.identity_signature), SUCCESSION, statement(asked)):
        raise EnrolmentFailed(f"renewal of {site.name!r}: its new identity key has not signed it. Run it again.")
    if any(new.hex() == other.identity_public_key for other in known):
        raise EnrolmentFailed(f"renewal of {site.name!r}: its new identity key is known already. Make a new one.")
    return new.hex()


def _signature(asked: RenewRequest) -> bytes:
    try:
        bytes.fromhex(asked.identity_public_key + asked.identity_signature)
        return bytes.fromhex(asked.signature)
    except ValueError as error:
        raise EnrolmentFailed(
            f"renewal of {asked.site!r}: signature is not hexadecimal. Update the package."
        ) from error


def renew_server(federation: Federation, always: bool = False, now_s: float | None = None) -> bool:
    """Gives the gateway a new key and certificate where the old one ends soon, or begins only later, or `always`; True
    if it did.

    Hospitals notice nothing: they trust the authority, not this certificate.
    """
    now = time.time() if now_s is None else now_s
    own = load_credential(federation.server_certificate).certificate
    facts = read_certificate(own)
    if not (always or due(facts, now) or early(facts, now) or _outdated(federation, own, now)):
        return False
    host, _ = split_address(federation.address)
    save_credential(federation.server_certificate, issue_server(authority_of(federation), [host]))
    return True


def _outdated(federation: Federation, own: bytes, now: float) -> bool:
    """Whether sites have had the time to hear of an issuing key that is newer than the one of this certificate."""
    if not federation.offline or now - federation.listed.stat().st_mtime < HEARD_S:
        return False
    return not is_issued_by(own, authority_of(federation).certificate)


def warnings(federation: Federation, now_s: float | None = None) -> list[str]:
    """A sentence for each certificate that ends soon, has ended or begins only later."""
    now = time.time() if now_s is None else now_s
    own = read_certificate(load_credential(federation.server_certificate).certificate)
    ca = read_certificate(federation.ca_certificate.read_bytes())
    by = [read_certificate(load_credential(federation.issuing).certificate)] if federation.offline else []
    found = [
        *(warning("The issuing key's", each, now, RENEW_ISSUER) for each in by),
        warning("The coordinator's", own, now, "`fedserver serve` renews it; `fedserver renew` does so at once."),
        warning("The authority's", ca, now, "Found a new federation and invite the sites to it."),
    ]
    for site in list_sites(federation.state):
        rows = list_certificates(federation.state, site.name) if site.state == "active" else []
        if rows:
            newest = read_certificate(rows[-1].pem.encode())
            mend = f"Its node renews it while it runs; once it has expired, `fedserver invite {site.name}`."
            if newest.expires_at_s <= now or early(newest, now):
                mend = f"`fedserver invite {site.name}`; there: `fedclient rejoin INVITE`."
            found.append(warning(f"{site.name}: its", newest, now, mend))
    return [words for words in found if words is not None]
