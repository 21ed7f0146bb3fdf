"""Keys, certificates and signatures: who is who in a federation, and how one proves it.

Keys travel between functions as PEM bytes in dataclasses whose `repr` leaves them out.
"""

import hashlib
import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared_models.authority import read_authority, requested_key
from shared_models.errors import EnrolmentFailed, StateInvalid
from shared_models.files import write_atomic
from shared_models.words import WORDS

SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")  # each is a SiteName, too
AUTHORITY_DAYS = 3650
DOCUMENT_SIGNING = x509.ObjectIdentifier("1.3.6.1.5.5.7.3.36")  # RFC 9336; no certificate of a site or server has it
SITE_DAYS = 90.0
SERVER_DAYS = 398.0  # what browsers still take, should one look at a coordinator
CLOCK_SKEW = timedelta(
    minutes=10
)  # a hospital whose clock is a little behind must not find its certificate in the future


@dataclass(frozen=True, slots=True)
class Credential:
    """A certificate and the private key that goes with it, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SiteKeys:
    """The three private keys of a site.

    Attributes:
        tls: P-256, PKCS #8 PEM; the client certificate's.
        node: P-384, OpenSSH PEM without passphrase, the one form that Flower's SuperNode reads.
        identity: Ed25519, PKCS #8 PEM; signs what the site says.
    """

    tls: bytes = field(repr=False)
    node: bytes = field(repr=False)
    identity: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a gateway wants to know of a certificate that TLS has already verified.

    Attributes:
        serial: lower-case hexadecimal.
        fingerprint: SHA-256 of the DER form, hexadecimal.
        key_sha256: of the public key that it certifies, in its DER form.
        since_s, expires_at_s: when it begins, a little before it was signed, and ends; seconds since the epoch.
    """

    name: str
    serial: str
    fingerprint: str
    key_sha256: str
    since_s: float
    expires_at_s: float


def check_site_name(name: str) -> str:
    """`name` as it came, or raises EnrolmentFailed."""
    if not SITE_NAME.fullmatch(name):
        raise EnrolmentFailed(
            f"site name {name!r}: 1 to 32 of lower-case letters, digits and '-' are allowed, no '-' first. "
            "Choose such a name, for example 'hospital-north'."
        )
    return name


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`, or raises EnrolmentFailed."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):(\d{1,5})", address)
    if found is None or not 0 < int(found[3]) < 65536:
        raise EnrolmentFailed(
            f"address {address!r}: expected host:port as the hospitals dial it, "
            "for example 'federation.example.org:8443' or '[2001:db8::1]:8443'."
        )
    host = found[1] or found[2]
    try:
        host.encode("idna")  # as every dialling does
    except UnicodeError as error:
        raise EnrolmentFailed(
            f"address {address!r}: a host's name has 1 to 63 characters between two dots. Look for a slip."
        ) from error
    return host, int(found[3])


# Certificates


def new_authority(name: str) -> Credential:
    """A certificate authority (P-384, ten years) that signs leaves only."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, name), x509.NameAttribute(NameOID.COMMON_NAME, "CA")]
    )
    certificate = (
        _leaf(subject, subject, key.public_key(), AUTHORITY_DAYS, datetime.now(UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return Credential(certificate.public_bytes(serialization.Encoding.PEM), _pkcs8(key))


def issue_server(authority: Credential, hosts: Sequence[str], days: float | None = SERVER_DAYS) -> Credential:
    """A server certificate for `hosts` (names or addresses) and for loopback under its usual names.

    It never outlives the authority; without `days` it lives as long.
    """
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    key = ec.generate_private_key(ec.SECP256R1())
    days = _days_left(issuer) if days is None else min(days, _days_left(issuer))
    names = dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
    builder = _leaf(subject, issuer.subject, key.public_key(), days, datetime.now(UTC)).add_extension(
        x509.SubjectAlternativeName([_alternative_name(name) for name in names]), critical=False
    )
    certificate = _sign_leaf(builder, ExtendedKeyUsageOID.SERVER_AUTH, authority)
    return Credential(certificate, _pkcs8(key))


def issue_signer(authority: Credential) -> Credential:
    """The coordinator's key for what it states (Ed25519), vouched for by the authority for as long as that lives."""
    key = new_identity_key()
    return Credential(certify_signer(authority, request_signer(key)), key)


def new_authority_key() -> bytes:
    """P-384, PKCS #8 PEM."""
    return _pkcs8(ec.generate_private_key(ec.SECP384R1()))


def request_issuer(key: bytes) -> bytes:
    """A PEM signing request for an issuing key; the root names it."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuing")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(_ec_key(key), hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM)


def public_digest(certificate: bytes) -> str:
    """SHA-256 of a certificate (PEM) in its DER form, hexadecimal."""
    return read_certificate(certificate).fingerprint


def new_identity_key() -> bytes:
    """Ed25519, PKCS #8 PEM: of a site, or of a coordinator's statements."""
    return _pkcs8(ed25519.Ed25519PrivateKey.generate())


def request_signer(key: bytes) -> bytes:
    """A PEM signing request for a coordinator's key for statements."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(_identity(key), None)
    return request.public_bytes(serialization.Encoding.PEM)


def certify_signer(authority: Credential, request: bytes) -> bytes:
    """The certificate (PEM) for the key of `request`; raises EnrolmentFailed unless that has signed it."""
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    key = requested_key(request)
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise EnrolmentFailed(
            "request for a key of statements: is damaged, or not signed by its own key. Make it anew."
        )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
    builder = _leaf(subject, issuer.subject, key, _days_left(issuer), datetime.now(UTC))
    return _sign_leaf(builder, DOCUMENT_SIGNING, authority)


def vouched(authority: bytes, certificate: bytes) -> bytes | None:
    """The key (32 bytes) of a coordinator whom `authority` (PEM: see `read_authority`) vouches for now, or None.

    A revocation list that has ended still tells whom it revokes: what was signed is read for years.
    """
    try:
        by = read_authority(authority)
        issuer, signer = x509.load_pem_x509_certificate(by.root), x509.load_pem_x509_certificate(certificate)
        signer.verify_directly_issued_by(issuer)
        uses = signer.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        key = signer.public_key()
    except (StateInvalid, ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return None
    if signer.serial_number in by.revoked:
        return None
    valid = signer.not_valid_before_utc <= datetime.now(UTC) <= signer.not_valid_after_utc
    if not valid or DOCUMENT_SIGNING not in uses or not isinstance(key, ed25519.Ed25519PublicKey):
        return None
    return key.public_bytes_raw()


def stated(authority: bytes, certificate: bytes, signature: bytes, purpose: str, content: bytes) -> bool:
    """Whether a coordinator whom `authority` (a CA certificate, PEM) vouches for signed `content` for `purpose`."""
    key = vouched(authority, certificate)
    return key is not None and verify(key, signature, purpose, content)


def request_certificate(site: str, tls_key: bytes) -> bytes:
    """A PEM signing request with CN = `site`; its signature proves that the asker holds the key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(_ec_key(tls_key), hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def issue_site(
    authority: Credential, request: bytes, site: str, now: datetime | None = None, days: float = SITE_DAYS
) -> bytes:
    """A client certificate (PEM) for the key of `request`; raises EnrolmentFailed for a request not of `site`.

    It never outlives the key that signs it.

    Of the request only the key is taken over; whatever extensions it asks for are left out.
    """
    key = _requested_key(request, site)
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    builder = _leaf(subject, issuer.subject, key, min(days, _days_left(issuer)), now or datetime.now(UTC))
    return _sign_leaf(builder, ExtendedKeyUsageOID.CLIENT_AUTH, authority)


def request_key(request: bytes, site: str) -> str:
    """SHA-256 of the public key of a signing request; raises EnrolmentFailed for a request not of `site`."""
    return _key_digest(_requested_key(request, site))


def _requested_key(request: bytes, site: str) -> ec.EllipticCurvePublicKey:
    try:
        asked = x509.load_pem_x509_csr(request)
        key = asked.public_key()
        proven = asked.is_signature_valid
        names = [str(name.value) for name in asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentFailed(
            f"signing request of {site!r} cannot be read ({error}). Run `fedclient join` again."
        ) from error
    if not proven:
        raise EnrolmentFailed(
            f"signing request of {site!r}: its signature is not by the key it carries. Run `fedclient join` again."
        )
    if names != [site]:
        raise EnrolmentFailed(
            f"signing request for {names}: the invite is for {site!r}. Ask the coordinator for an invite to your name."
        )
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        raise EnrolmentFailed(f"signing request of {site!r}: its key must be P-256 or P-384. Update the package.")
    return key


def _key_digest(key: CertificatePublicKeyTypes) -> str:
    return hashlib.sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).hexdigest()


def read_certificate(certificate: bytes) -> Certificate:
    """The facts of a PEM or DER certificate; raises EnrolmentFailed if it is none."""
    try:
        pem = certificate.startswith(b"-----")
        loaded = (x509.load_pem_x509_certificate if pem else x509.load_der_x509_certificate)(certificate)
        names = loaded.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return Certificate(
            name=str(names[0].value) if len(names) == 1 else "",
            serial=f"{loaded.serial_number:x}",
            fingerprint=hashlib.sha256(loaded.public_bytes(serialization.Encoding.DER)).hexdigest(),
            key_sha256=_key_digest(loaded.public_key()),
            since_s=loaded.not_valid_before_utc.timestamp(),
            expires_at_s=loaded.not_valid_after_utc.timestamp(),
        )
    except ValueError as error:
        raise EnrolmentFailed(f"not a certificate ({error}). Ask the coordinator for a new invite.") from error


def is_for(certificate: bytes, host: str) -> bool:
    """Whether a server's certificate (PEM) is for a name or address, as `issue_server` was given it."""
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return _alternative_name(host) in names.value


def is_issued_by(certificate: bytes, authority: bytes) -> bool:
    """Whether a key of `authority` (PEM) that counts signed `certificate` (PEM or DER); times are not looked at."""
    try:
        pem = certificate.startswith(b"-----")
        shown = (x509.load_pem_x509_certificate if pem else x509.load_der_x509_certificate)(certificate)
        issuers = read_authority(authority).issuers
    except (StateInvalid, ValueError):
        return False
    return any(_is_issued(shown, issuer) for issuer in issuers)


def _is_issued(shown: x509.Certificate, issuer: bytes) -> bool:
    try:
        shown.verify_directly_issued_by(x509.load_pem_x509_certificate(issuer))
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def whose(certificate: bytes) -> str:
    """Who a certificate (DER) says that it is, and who issued it, in words for a person: nothing of it is verified."""
    try:
        shown = x509.load_der_x509_certificate(certificate)
    except ValueError:
        return "something that is no certificate"
    subject, issuer = ("".join(c for c in name.rfc4514_string()[:200] if c.isprintable())
                       for name in (shown.subject, shown.issuer))  # fmt: skip
    return f"{subject or 'nobody'}, issued by {issuer or 'nobody'}"


def fingerprint_words(fingerprint: str) -> str:
    """The first 64 bits of a hexadecimal digest as eight words, to be compared over a telephone."""
    return " ".join(WORDS[byte] for byte in bytes.fromhex(fingerprint)[:8])


def _leaf(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
    days: float,
    now: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _days_left(issuer: x509.Certificate) -> float:
    return (issuer.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def _sign_leaf(builder: x509.CertificateBuilder, purpose: x509.ObjectIdentifier, authority: Credential) -> bytes:
    key = _ec_key(authority.key)
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(by, critical=False)
        .sign(key, hashes.SHA384())
        .public_bytes(serialization.Encoding.PEM)
    )


def _usage(certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


# Keys and signatures


def new_tls_key() -> bytes:
    """P-256, PKCS #8 PEM."""
    return _pkcs8(ec.generate_private_key(ec.SECP256R1()))


def new_site_keys() -> SiteKeys:
    node = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return SiteKeys(new_tls_key(), node, _pkcs8(ed25519.Ed25519PrivateKey.generate()))


def node_public_key(node_key: bytes) -> bytes:
    """The public half of a node key, one line in OpenSSH form."""
    key = serialization.load_ssh_private_key(node_key, None)
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def node_public_pem(public_key: bytes) -> bytes:
    """A node's OpenSSH public key in the PEM form that Flower compares; raises EnrolmentFailed unless it is P-384."""
    try:
        key = serialization.load_ssh_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentFailed(f"node key cannot be read ({error}). Run `fedclient join` again.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EnrolmentFailed("node key: Flower needs a NIST curve, and P-384 is ours. Run `fedclient join` again.")
    if key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) != public_key:
        raise EnrolmentFailed("node key: has text around it, so that one key could pass for two. Send the key alone.")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def identity_public_key(identity_key: bytes) -> bytes:
    """The 32 bytes that others verify this identity's signatures with."""
    return _identity(identity_key).public_key().public_bytes_raw()


def sign(identity_key: bytes, purpose: str, content: bytes) -> bytes:
    """A detached Ed25519 signature (64 bytes) over `content`, good for `purpose` alone."""
    return _identity(identity_key).sign(_bound(purpose, content))


def verify(public_key: bytes, signature: bytes, purpose: str, content: bytes) -> bool:
    """Whether `signature` over `content` was made for `purpose` by the holder of `public_key` (32 bytes)."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _bound(purpose, content))
    except (InvalidSignature, ValueError):
        return False
    return True


def save_secret(path: Path, content: bytes) -> None:
    """Writes a key, whole and readable by its owner alone."""
    write_atomic(path, content)


def save_credential(path: Path, credential: Credential) -> None:
    """Key and certificate in one file, so that they are replaced together."""
    save_secret(path, credential.key + credential.certificate)


def load_credential(path: Path) -> Credential:
    """What `save_credential` wrote; raises StateInvalid as `load_secret` does."""
    key, mark, certificate = load_secret(path).partition(b"-----BEGIN CERTIFICATE-----")
    return Credential(mark + certificate, key)


def load_secret(path: Path) -> bytes:
    """The bytes of a key file; raises StateInvalid unless it is ours and nobody else may read it."""
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read()
    except OSError as error:
        raise StateInvalid(f"{path}: key cannot be read ({error.strerror}). Put it back, or enrol again.") from error
    if facts.st_uid != os.geteuid():
        raise StateInvalid(
            f"{path}: belongs to user id {facts.st_uid}, not to us. Mend it with `chown` or run as them."
        )
    if stat.S_IMODE(facts.st_mode) & 0o077:
        raise StateInvalid(
            f"{path}: others may read it (mode {stat.S_IMODE(facts.st_mode):o}). Mend it with `chmod 600 {path}`; "
            "if others had access, enrol again with new keys."
        )
    return content


def _bound(purpose: str, content: bytes) -> bytes:
    """The purpose is part of what is signed, so that one kind of statement never passes for another."""
    return b"fedimaging/1 " + purpose.encode() + b"\0" + content


def _pkcs8(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _ec_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateInvalid("a TLS key is not on an elliptic curve. Put the right file back, or enrol again.")
    return key


def _identity(pem: bytes) -> ed25519.Ed25519PrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise StateInvalid("an identity key is not Ed25519. Put the right file back, or enrol again.")
    return key
