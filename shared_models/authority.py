"""Whom an authority vouches for whose root key is kept offline: issuing keys, and a list of those that are revoked.

A hospital pins the root's certificate. A root that may certify other authorities (path length 1) never signs a site or
a server itself: it signs issuing keys, which live at the coordinator for months, and a revocation list (RFC 5280,
section 5) whose number only rises. An authority is therefore PEM text: the root's certificate alone where its key is
at the coordinator, and otherwise the root's, its list, and the issuing certificates after it. Nothing but the root is
trusted in it; the rest is believed because the root has signed it.
"""

import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding

from shared_models.dates import date_text
from shared_models.errors import StateInvalid

ROOT, LIST = "ca.pem", "authorities.pem"  # in `ca` of a federation and in `keys` of a site
MOST_BYTES = 64 << 10
MOST_ISSUERS = 32
_BLOCK = re.compile(rb"-----BEGIN (CERTIFICATE|X509 CRL)-----.+?-----END \1-----\n?", re.DOTALL)
MEND = "Fetch it again; if it stays, telephone the coordinator."


@dataclass(frozen=True, slots=True)
class Authority:
    """An authority as its root has signed it.

    Attributes:
        root: its certificate, PEM.
        offline: its key is not at the coordinator: it certifies issuing keys alone.
        number: of its revocation list, 0 where it has none.
        until_s: when the list ends, seconds since the epoch.
        issuers: certificates of the keys that certify sites and servers, PEM, the newest last; the root's own where it
            is not offline.
        withdrawn: certificates of issuing keys that the list revokes, PEM.
        revoked: serial numbers on the list, of issuing keys and of the coordinator's keys for statements.
    """

    root: bytes = field(repr=False)
    offline: bool
    number: int
    until_s: float
    issuers: tuple[bytes, ...] = field(repr=False)
    withdrawn: tuple[bytes, ...] = field(default=(), repr=False)
    revoked: frozenset[int] = frozenset()

    @property
    def anchors(self) -> str:
        """What a TLS context is to trust, PEM; the root itself is not among it where it is offline."""
        return b"".join(self.issuers).decode("ascii")

    def check_current(self) -> None:
        """Raises StateInvalid once the list has ended: nobody knows then what was revoked since."""
        if self.until_s < time.time():
            day = date_text(self.until_s)
            raise StateInvalid(
                f"revocation list {self.number} of the federation's authority has ended on {day}, so nobody can tell "
                "which keys count. The coordinator must bring a new one: `fedserver ca renew`; telephone it."
            )


def read_files(folder: Path) -> bytes:
    """The authority as it lies in `ca` of a federation or `keys` of a site."""
    root, path = folder / ROOT, folder / LIST
    if not root.exists():
        raise StateInvalid(f"{root}: is missing. Put it back from a backup, or join again.")
    return root.read_bytes() + (path.read_bytes() if path.exists() else b"")


@lru_cache(maxsize=32)
def read_authority(content: bytes) -> Authority:
    """Parses an authority and verifies what its root has signed.

    Raises:
        StateInvalid: it is damaged, something in it is not signed by the root, or the list is missing.
    """
    blocks = [(found[1], found[0]) for found in _BLOCK.finditer(content)]
    try:
        certificates = [(x509.load_pem_x509_certificate(pem), pem) for kind, pem in blocks if kind == b"CERTIFICATE"]
        lists = [x509.load_pem_x509_crl(pem) for kind, pem in blocks if kind == b"X509 CRL"]
        if not certificates or len(certificates) > MOST_ISSUERS + 1 or len(content) > MOST_BYTES:
            raise ValueError
        (root, pem), *others = certificates
        if path_length(root) != 1:
            return Authority(pem, False, 0, float("inf"), (pem,))
        if len(lists) != 1:
            raise StateInvalid(
                "authority: its root key is kept offline, and its revocation list is missing. Give the file that "
                "`fedserver ca show --out FILE` writes, or fetch it again."
            )
        return _read_offline(root, pem, lists[0], others)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        raise StateInvalid(f"authority: is damaged, or not signed by its root. {MEND}") from error


def _read_offline(
    root: x509.Certificate,
    pem: bytes,
    listed: x509.CertificateRevocationList,
    others: list[tuple[x509.Certificate, bytes]],
) -> Authority:
    key = root.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not listed.is_signature_valid(key):
        raise InvalidSignature
    number = listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    if listed.issuer != root.subject or listed.next_update_utc is None:
        raise ValueError
    revoked = frozenset(entry.serial_number for entry in listed)
    others = [each for each in others if each[0] != root]
    for issuer, _ in others:
        issuer.verify_directly_issued_by(root)
        if path_length(issuer) != 0:  # no issuing key makes another authority
            raise ValueError
    counted = tuple(text for issuer, text in others if issuer.serial_number not in revoked)
    if not counted:  # and a TLS context without anchors would trust those of the system
        raise ValueError
    return Authority(
        root=pem,
        offline=True,
        number=number,
        until_s=listed.next_update_utc.timestamp(),
        issuers=counted,
        withdrawn=tuple(text for issuer, text in others if issuer.serial_number in revoked),
        revoked=revoked,
    )


def newer(known: bytes, offered: bytes) -> bool:
    """Whether `offered` is to take the place of `known`, an authority of the same root.

    The root signs its list and each issuing key, but not how many come along: whoever stands in between can leave one
    out. So a list of the same number counts as newer where it brings an issuing key that was not seen.

    Raises:
        StateInvalid: it has another root, an older list, or another list of the same number.
    """
    mine, theirs = read_authority(known), read_authority(offered)
    if theirs.root != mine.root:
        raise StateInvalid("authority: is not the one that was pinned at `join`. Telephone the coordinator.")
    if theirs.number < mine.number:
        raise StateInvalid(
            f"authority: revocation list {theirs.number} is stale, list {mine.number} was seen here before. The "
            "coordinator was rolled back, or somebody stands in between: telephone it."
        )
    if theirs.number == mine.number and (theirs.revoked, theirs.until_s) != (mine.revoked, mine.until_s):
        raise StateInvalid(f"authority: two revocation lists are number {mine.number}. Telephone the coordinator.")
    return theirs.number > mine.number or bool(set(theirs.issuers) - set(mine.issuers))


# What a root signs


def new_root(name: str, days: float) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    """A root (P-384) that certifies issuing keys and no further authority, PEM, and its key."""
    key = ec.generate_private_key(ec.SECP384R1())
    now = datetime.now(UTC)
    return authority_certificate(x509.Name(_named(name, "root")), key.public_key(), days, now, 1, None, key), key


def requested_key(request: bytes) -> CertificatePublicKeyTypes | None:
    """The key that a signing request (PEM) is for; None where it is damaged, or not signed by that key."""
    try:
        asked = x509.load_pem_x509_csr(request)
        return asked.public_key() if asked.is_signature_valid else None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None


def issuer_certificate(
    root: bytes, key: ec.EllipticCurvePrivateKey, request: bytes, days: float, now: datetime | None = None
) -> bytes:
    """A certificate (PEM) for the issuing key of `request`: it signs leaves only, and ends with the root at the latest.

    Raises:
        StateInvalid: the request is damaged, not signed by the key that it carries, or that is on no elliptic curve.
    """
    by, at = x509.load_pem_x509_certificate(root), now or datetime.now(UTC)
    public = requested_key(request)
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise StateInvalid(
            "request for an issuing key: is damaged, or not signed by its own key. Make it with `fedserver ca request`."
        )
    days = min(days, (by.not_valid_after_utc - at) / timedelta(days=1))
    whose = str(by.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)[0].value)
    subject = x509.Name(_named(whose, f"issuing {x509.random_serial_number():x}"[:24]))
    return authority_certificate(subject, public, days, at, 0, by, key)


def revocation_list(
    root: bytes,
    key: ec.EllipticCurvePrivateKey,
    number: int,
    revoked: frozenset[int],
    until: datetime,
    now: datetime | None = None,
) -> bytes:
    """The root's signed list (PEM) of certificates that count no more."""
    by, at = x509.load_pem_x509_certificate(root), now or datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder(by.subject, at - timedelta(minutes=10), until)
    for serial in sorted(revoked):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at)
        builder = builder.add_revoked_certificate(entry.build())
    builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    return builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)


def authority_certificate(
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    days: float,
    at: datetime,
    length: int,
    by: x509.Certificate | None,
    key: ec.EllipticCurvePrivateKey,
) -> bytes:
    """A certificate (PEM) of an authority, signed by `key`, which is that of `by` or its own."""
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if by is None else by.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - timedelta(minutes=10))
        .not_valid_after(at + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=length), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
        .public_bytes(Encoding.PEM)
    )


def path_length(certificate: x509.Certificate) -> int | None:
    """How many authorities may follow it; None for one that is no authority, or of any number."""
    found = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    return found.path_length if found.ca else None


def _named(whose: str, what: str) -> list[x509.NameAttribute[str]]:
    oid = x509.NameOID
    return [x509.NameAttribute(oid.ORGANIZATION_NAME, whose), x509.NameAttribute(oid.COMMON_NAME, what)]
