"""The root key of a federation that is kept away from its coordinator, and the issuing keys that it certifies.

The root lies in a folder of its own, on a stick: `root.key`, an encrypted PKCS #8 file, and `authority.pem`, which is
all that it has ever certified and revoked. The coordinator holds an issuing key that certifies sites and servers for
some months, and a key for its statements. Neither can certify another authority, and the root revokes both.

A request goes from the coordinator to the root, an answer comes back; neither is secret, both are checked.
"""

import os
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedserver.enrol import Federation, Found, ca_fingerprint, open_log, signer
from fedserver.lifecycle import renew_server
from fedserver.passphrase import SALT_BYTES, check_passphrase, stretched
from fedserver.state import sign_rosters_anew
from shared_models.authority import (
    Authority,
    issuer_certificate,
    new_root,
    newer,
    read_authority,
    revocation_list,
)
from shared_models.errors import StateInvalid
from shared_models.files import canonical_json, private_folder, write_atomic
from shared_models.identity import (
    AUTHORITY_DAYS,
    Credential,
    certify_signer,
    load_credential,
    load_secret,
    new_authority_key,
    new_identity_key,
    public_digest,
    request_issuer,
    request_signer,
    save_credential,
    save_secret,
    vouched,
)
from shared_models.parse import STRICT, Sha256, parse_json, plain
from shared_models.roster import read_signed, sign_roster, write_signed

ISSUER_DAYS = 180.0
MOST_ISSUER_DAYS = 398.0
KEY, KEPT = "root.key", "authority.pem"
_SALT = re.compile(rb"scrypt-salt: ([0-9a-f]{32})\n")


@dataclass(frozen=True, slots=True)
class IssuerRequest:
    """What a coordinator asks its root for.

    Attributes:
        authority: SHA-256 of the root's certificate.
        issuer: signing request for a new issuing key, PEM.
        signer: the same for a new key of statements, certified where the old keys are revoked.
    """

    __pydantic_config__ = STRICT
    federation: str
    authority: Sha256
    issuer: str
    signer: str


@dataclass(frozen=True, slots=True)
class IssuerAnswer:
    """What the root gives: the authority as it is from now on, and the certificate of a new key of statements or ""."""

    __pydantic_config__ = STRICT
    authority: str
    signer: str


@dataclass(frozen=True, slots=True)
class Root:
    """An unlocked root.

    Attributes:
        authority: what it has certified and revoked so far, PEM.
    """

    folder: Path
    authority: bytes = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False)


# The stick


def make_root(folder: Path, name: str, passphrase: str) -> Root:
    """A new root in `folder`, its key encrypted with `passphrase`; it has certified nothing yet.

    Raises:
        StateInvalid: the folder holds a root, or the passphrase is too short.
    """
    check_passphrase(passphrase)
    if (folder / KEY).exists():
        raise StateInvalid(f"{folder / KEY}: is there already. A root serves one federation; choose another folder.")
    certificate, key = new_root(name, AUTHORITY_DAYS)
    private_folder(folder)
    salt = os.urandom(SALT_BYTES)
    # The library's own stretching is 2,048 rounds of PBKDF2, so the password of the file is a stretched one
    lock = serialization.BestAvailableEncryption(stretched(passphrase, salt).hex().encode())
    locked = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    save_secret(folder / KEY, b"scrypt-salt: " + salt.hex().encode() + b"\n" + locked)
    write_atomic(folder / KEPT, certificate)
    return Root(folder, certificate, key)


def open_root(folder: Path, passphrase: str) -> Root:
    """Unlocks a root; raises StateInvalid for a folder that holds none, or a wrong passphrase."""
    path = folder / KEY
    if not path.is_file() or not (folder / KEPT).is_file():
        raise StateInvalid(f"{folder}: holds no root key ({KEY} and {KEPT}). Insert the stick, or check the path.")
    content = path.read_bytes()  # a stick with a FAT file system knows no modes; the key in it is encrypted
    found = _SALT.match(content)
    try:
        password = stretched(passphrase, bytes.fromhex(found[1].decode()) if found else b"").hex().encode()
        key = serialization.load_pem_private_key(content[found.end() if found else 0 :], password)
    except (ValueError, TypeError):
        raise StateInvalid(f"{path}: the passphrase is not the one that it was made with. Try another.") from None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Root(folder, (folder / KEPT).read_bytes(), key)


def certify(root: Root, content: bytes, days: float = ISSUER_DAYS, revoke: bool = False) -> bytes:
    """Answers an IssuerRequest: a further issuing key, and with `revoke` an end to all keys before it.

    The list lasts as long as the longest of the keys that count: a key for fewer days shortens no other.

    Raises:
        StateInvalid: the request is damaged or another federation's, or `days` is not above 0 and at most 398.
    """
    if not 0 < days <= MOST_ISSUER_DAYS:
        raise StateInvalid(f"days {days:g}: allowed: above 0, at most {MOST_ISSUER_DAYS:g}.")
    asked = parse_json(IssuerRequest, content, "request for an issuing key", StateInvalid)
    certificate = _first(root.authority)
    if asked.authority != public_digest(certificate):
        raise StateInvalid(
            f"request of {asked.federation!r}: names another authority than the root in {root.folder}. Use its own."
        )
    first = root.authority == certificate
    before = None if first else read_authority(root.authority)
    now = datetime.now(UTC)
    issuer = issuer_certificate(certificate, root.key, asked.issuer.encode(), days, now)
    own = Credential(certificate, _pem(root.key))
    statements = certify_signer(own, asked.signer.encode()) if first or revoke else b""
    known, gone = _kept(before, now), frozenset[int]() if before is None else before.revoked
    if revoke and before is not None:
        gone |= {_serial(pem) for pem in (*before.issuers, *_signers(root))}
    counted = [issuer, *(pem for pem in known if _serial(pem) not in gone)]
    until = max(x509.load_pem_x509_certificate(pem).not_valid_after_utc for pem in counted)
    number = 1 if before is None else before.number + 1
    listed = revocation_list(certificate, root.key, number, gone, until, now)
    authority = b"".join((certificate, listed, *known, issuer))
    read_authority(authority)
    if statements:  # remembered, for the day when it is revoked
        write_atomic(root.folder / "signers.pem", b"".join((*_signers(root), statements)))
    write_atomic(root.folder / KEPT, authority)
    return canonical_json(plain(IssuerAnswer(authority.decode(), statements.decode())))


def _kept(before: Authority | None, now: datetime) -> tuple[bytes, ...]:
    """Earlier issuing keys whose certificates may still be met."""
    known = () if before is None else (*before.withdrawn, *before.issuers)
    return tuple(pem for pem in known if x509.load_pem_x509_certificate(pem).not_valid_after_utc > now)


def _signers(root: Root) -> list[bytes]:
    path = root.folder / "signers.pem"
    found = x509.load_pem_x509_certificates(path.read_bytes()) if path.exists() else []
    return [certificate.public_bytes(serialization.Encoding.PEM) for certificate in found]


def _serial(certificate: bytes) -> int:
    return x509.load_pem_x509_certificate(certificate).serial_number


def _first(authority: bytes) -> bytes:
    """The root's own certificate, which comes first."""
    return x509.load_pem_x509_certificates(authority)[0].public_bytes(serialization.Encoding.PEM)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


# The coordinator


def founding(folder: Path, passphrase: str) -> Found:
    """For `init_federation`: makes the root in `folder`, and of it what the coordinator needs."""

    def found(made: Federation) -> Credential:
        root = make_root(folder, made.name, passphrase)
        write_atomic(made.ca_certificate, root.authority)
        _take(made, certify(root, request(made), ISSUER_DAYS))
        _forget_request(made)
        return Credential(root.authority, _pem(root.key))

    return found


def request(federation: Federation, anew: bool = False) -> bytes:
    """Makes the keys that are to be certified, keeps them here, and asks; asked again, it asks for the same.

    Args:
        anew: asks for others than before: whoever took the coordinator's keys has those that wait, too.
    """
    ca = federation.folder / "ca"
    for name, make in (("issuing.next", new_authority_key), ("signer.next", new_identity_key)):
        if anew or not (ca / name).exists():
            save_secret(ca / name, make())
    return canonical_json(
        plain(
            IssuerRequest(
                federation.name,
                ca_fingerprint(federation),
                request_issuer(load_secret(ca / "issuing.next")).decode(),
                request_signer(load_secret(ca / "signer.next")).decode(),
            )
        )
    )


def install(federation: Federation, content: bytes) -> Authority:
    """Takes up what the root has answered; sites that are connected stay connected. What was killed is done again.

    Where the root has revoked the keys before, the server's certificate is a new one at once and every epoch of the
    roster is signed anew; processes that hold the old key must be started again.

    Raises:
        StateInvalid: the answer is not of this federation's root, not newer, or not for the keys that were asked for.
    """
    answer = parse_json(IssuerAnswer, content, "answer of the root", StateInvalid)
    if not federation.offline:
        raise StateInvalid(f"{federation.folder}: its root key is kept here, there is nothing to bring from elsewhere.")
    before = read_authority(federation.authority)
    offered, ca = answer.authority.encode(), federation.folder / "ca"
    begun = offered == federation.authority and (ca / "issuing.next").exists()
    if not begun and (not newer(federation.authority, offered) or read_authority(offered).number == before.number):
        raise StateInvalid(f"answer of the root: list {before.number} is in use already. Make a new request.")
    made = _take(federation, content)
    if answer.signer:  # then the keys before are revoked
        by = signer(federation)
        sign_rosters_anew(
            federation.state,
            lambda content: write_signed(sign_roster(by, read_signed(content, str(federation.state)).roster)),
        )
        renew_server(federation, always=True)
    issuers = [public_digest(pem) for pem in made.issuers]
    open_log(federation).add("authority", list=made.number, issuers=issuers, revoked=len(made.revoked))
    _forget_request(federation)
    return made


def revokes(content: bytes) -> bool:
    """Whether an answer of the root ends the keys before; raises StateInvalid for one that is damaged."""
    return bool(parse_json(IssuerAnswer, content, "answer of the root", StateInvalid).signer)


def _forget_request(federation: Federation) -> None:
    for name in ("signer.next", "issuing.next"):  # as long as the last is there, `install` can be done again
        (federation.folder / "ca" / name).unlink(missing_ok=True)


def _take(federation: Federation, content: bytes) -> Authority:
    answer, ca = parse_json(IssuerAnswer, content, "answer of the root", StateInvalid), federation.folder / "ca"
    authority = answer.authority.encode()
    made = read_authority(authority)
    key = load_secret(ca / "issuing.next")
    newest = [pem for pem in made.issuers if _certifies(pem, key)]
    if not made.offline or not newest:
        raise StateInvalid("answer of the root: certifies another key than the one that was asked for. Ask again.")
    statements = answer.signer.encode()
    if statements and vouched(authority, statements) is None:
        raise StateInvalid("answer of the root: its key for statements is not vouched for. Ask again.")
    write_atomic(federation.listed, authority.removeprefix(made.root))
    save_credential(federation.issuing, Credential(newest[-1], key))
    if statements and not (federation.signer.exists() and load_credential(federation.signer).certificate == statements):
        save_credential(federation.signer, Credential(statements, load_secret(ca / "signer.next")))
    return made


def _certifies(certificate: bytes, key: bytes) -> bool:
    private = serialization.load_pem_private_key(key, None)
    return x509.load_pem_x509_certificate(certificate).public_key() == private.public_key()
