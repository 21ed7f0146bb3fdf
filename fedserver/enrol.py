"""How a federation is founded, and how a hospital gets in: invite, enrolment, certificate."""

import hashlib
import hmac
import json
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedserver.state import (
    CertificateRow,
    InviteRow,
    Seal,
    Site,
    add_invite,
    check_state,
    create_state,
    find_site,
    list_certificates,
    list_invites,
    list_sites,
    redeem_invite,
)
from shared_models.audit import AuditLog
from shared_models.audit_files import every_event
from shared_models.authority import LIST, read_authority, read_files
from shared_models.errors import EnrolmentFailed, FederationError, StateInvalid
from shared_models.files import canonical_json, write_atomic
from shared_models.identity import (
    SITE_DAYS,
    SITE_NAME,
    Credential,
    check_site_name,
    issue_server,
    issue_signer,
    issue_site,
    load_credential,
    load_secret,
    new_authority,
    node_public_pem,
    read_certificate,
    request_key,
    save_credential,
    save_secret,
    split_address,
    verify,
)
from shared_models.invite import (
    PURPOSE,
    Invite,
    JoinAnswer,
    JoinRequest,
    read_message,
    statement,
    write_invite,
    write_message,
)
from shared_models.parse import read_toml
from shared_models.roster import FIRST, Roster, read_signed, sign_roster, write_signed
from shared_models.supervise import kept_secret

INVITE_S = 72 * 3600
MAX_BLOB_BYTES = 2 << 30
MOST_DAYS = 398.0  # of a site's certificate
LOGGING = threading.Lock()
FEDERATION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")

# Lets a node into the SuperLink: public key in OpenSSH form and site -> Flower's node id, if it tells. It raises a
# FederationError when it cannot; a key that is registered already is no error.
RegisterNode = Callable[[bytes, str], int | None]


@dataclass(frozen=True, slots=True)
class Federation:
    """A coordinator's folder.

    Attributes:
        address: `host:port` that the hospitals dial.
        max_blob_bytes: largest file that a site may upload.
        certificate_days: for which a site's certificate is good; its node renews it when a third of that is left.
        approvals, approvers: how many of whom must approve a release before a hospital opens it: name -> Ed25519 key.
    """

    folder: Path
    name: str
    address: str
    max_blob_bytes: int
    certificate_days: float
    approvals: int = 0
    approvers: Mapping[str, str] = field(default_factory=dict)

    @property
    def ca_certificate(self) -> Path:
        return self.folder / "ca" / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.folder / "ca" / "ca.key"

    @property
    def issuing(self) -> Path:
        """The key that certifies sites and servers, and its certificate, where the root key is kept offline."""
        return self.folder / "ca" / "issuing.pem"

    @property
    def listed(self) -> Path:
        """The root's revocation list and the issuing certificates, likewise."""
        return self.folder / "ca" / LIST

    @property
    def authority(self) -> bytes:
        """What hospitals are told of the authority, PEM: see `read_authority`."""
        return read_files(self.folder / "ca")

    @property
    def offline(self) -> bool:
        """Whether the root key is kept elsewhere."""
        return read_authority(self.authority).offline

    @property
    def signer(self) -> Path:
        """The coordinator's key for statements and, after it, the authority's certificate of it."""
        return self.folder / "ca" / "signer.pem"

    @property
    def server_certificate(self) -> Path:
        """The gateway's key and certificate, good for the public name and for loopback; renewed while it runs."""
        return self.folder / "tls" / "server.pem"

    @property
    def loopback_certificate(self) -> Path:
        """The SuperLink's key and certificate, good for loopback alone and for as long as the authority."""
        return self.folder / "tls" / "loopback.pem"

    @property
    def secrets(self) -> Path:
        return self.folder / "secrets"

    @property
    def state(self) -> Path:
        return self.folder / "state.db"

    @property
    def superlink(self) -> Path:
        return self.folder / "superlink"

    @property
    def blobs(self) -> Path:
        return self.folder / "blobs"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def audit(self) -> Path:
        return self.folder / "audit.jsonl"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"


@dataclass(frozen=True, slots=True)
class Reply:
    """What an enrolling hospital is told: an HTTP status and a JSON text."""

    status: int
    content: bytes


# Makes the authority of a federation that is being made, in its `ca`, and returns what its root signs with.
Found = Callable[[Federation], Credential]


def init_federation(
    folder: Path, name: str, address: str, certificate_days: float = SITE_DAYS, found: Found | None = None
) -> Federation:
    """Makes a federation in `folder`, whole or not at all.

    Args:
        found: makes an authority whose root key is kept elsewhere (`fedserver/root.py`); None keeps it here.

    Raises:
        StateInvalid: if `folder` holds anything, `name` is not one that fits into a certificate, or
            `certificate_days` is not above 0 and at most 398.
        EnrolmentFailed: if `address` is not `host:port`.
    """
    host, _ = split_address(address)
    if not FEDERATION_NAME.fullmatch(name):
        raise StateInvalid(
            f"federation name {name!r}: 1 to 64 of letters, digits, blanks, '.', '_' and '-' are allowed. "
            "Choose such a name."
        )
    if not 0 < certificate_days <= MOST_DAYS:
        raise StateInvalid(f"certificate days {certificate_days:g}: allowed: above 0, at most {MOST_DAYS:g}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StateInvalid(f"{folder}: is not empty. Choose another folder, or open the federation that is there.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made = Federation(part, name, address, MAX_BLOB_BYTES, float(certificate_days))
        for inner in (made.superlink, made.blobs / "out", made.blobs / "in", made.runs, made.logs):
            inner.mkdir(parents=True, mode=0o700)
            inner.parent.chmod(0o700)
        root = (found or _found)(made)
        save_credential(made.server_certificate, issue_server(authority_of(made), [host]))
        save_credential(made.loopback_certificate, issue_server(root, [], days=None))
        for secret in ("superexec", "control"):  # shown to the SuperLink by its executor and by our commands
            kept_secret(made.secrets / secret)
        create_state(made.state)
        write_atomic(part / "federation.toml", _toml(made))
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    opened = open_federation(folder)
    open_log(opened).add("founded", name=name, address=address, authority=ca_fingerprint(opened))
    return opened


def _found(made: Federation) -> Credential:
    authority = new_authority(made.name)
    write_atomic(made.ca_certificate, authority.certificate)
    save_secret(made.ca_key, authority.key)
    save_credential(made.signer, issue_signer(authority))
    return authority


def open_federation(folder: Path) -> Federation:
    """Opens what `init_federation` made; raises StateInvalid if something in it is missing, damaged or exposed."""
    path = folder / "federation.toml"
    if not path.is_file():
        raise StateInvalid(f"{folder}: holds no federation. Make one with `fedserver init`, or check the path.")
    table = read_toml(path)
    approvals, approvers = _approvers(table.pop("release", {}), path)
    kinds: dict[str, type] = {"name": str, "address": str, "max_blob_bytes": int, "certificate_days": float}
    wrong = sorted(set(table) ^ set(kinds)) or [key for key, kind in kinds.items() if type(table[key]) is not kind]
    if wrong:
        raise StateInvalid(f"{path}: {', '.join(wrong)}: expected exactly {', '.join(kinds)}. Mend it.")
    made = Federation(folder, *(table[key] for key in kinds))
    federation = replace(made, approvals=approvals, approvers=approvers)
    if federation.max_blob_bytes <= 0:
        raise StateInvalid(f"{path}: max_blob_bytes is {federation.max_blob_bytes}; allowed: above 0. Mend it.")
    if not 0 < federation.certificate_days <= MOST_DAYS:
        raise StateInvalid(
            f"{path}: certificate_days is {federation.certificate_days:g}; allowed: above 0, at most {MOST_DAYS:g}. "
            "Mend it."
        )
    by = federation.issuing if federation.offline else federation.ca_key
    keys = (by, federation.signer, federation.server_certificate, federation.loopback_certificate)
    waiting = [path for path in (folder / "ca").glob("*.next")]  # for an answer of the root
    for key in (*keys, *waiting, federation.secrets / "superexec", federation.secrets / "control"):
        load_secret(key)
    check_state(federation.state)
    return federation


def _approvers(table: Any, path: Path) -> tuple[int, dict[str, str]]:
    """`[release]`: approvals = 2, and [release.approvers] with a line NAME = "KEY" of `fedserver release-key`."""
    if not isinstance(table, dict) or set(table) - {"approvals", "approvers"}:
        raise StateInvalid(f"{path}: [release]: expected approvals and [release.approvers]. Mend it.")
    count, keys = table.get("approvals", 0), table.get("approvers", {})
    if not isinstance(keys, dict) or type(count) is not int or not 0 <= count <= len(keys):
        raise StateInvalid(
            f"{path}: [release]: approvals is {count!r}; allowed: 0 to the number of approvers. Mend it."
        )
    for name, key in keys.items():
        if not SITE_NAME.fullmatch(name) or not isinstance(key, str) or not re.fullmatch(r"[0-9a-f]{64}", key):
            raise StateInvalid(f"{path}: [release.approvers]: {name!r} has no key. `fedserver release-key` makes one.")
    if len(set(keys.values())) < len(keys):
        raise StateInvalid(f"{path}: [release.approvers]: two names have one key. Each approver makes a key.")
    return count, keys


def ca_fingerprint(federation: Federation) -> str:
    """SHA-256 of the CA certificate, hexadecimal."""
    return read_certificate(federation.ca_certificate.read_bytes()).fingerprint


def signer(federation: Federation) -> Credential:
    """What the coordinator signs statements with."""
    return load_credential(federation.signer)


def authority_of(federation: Federation) -> Credential:
    """What certificates are signed with; raises StateInvalid once its revocation list has ended."""
    if not federation.offline:
        return Credential(federation.ca_certificate.read_bytes(), load_secret(federation.ca_key))
    read_authority(federation.authority).check_current()
    return load_credential(federation.issuing)


def sealer(federation: Federation) -> Seal:
    """Signs the next epoch of the roster: the active sites, and the digest of the epoch before."""
    by = signer(federation)

    def seal(sites: Sequence[Site], last: bytes | None) -> bytes:
        before = read_signed(last, str(federation.state)).roster if last is not None else None
        active = [site for site in sites if site.state == "active"]
        roster = Roster(
            federation=federation.name,
            epoch=before.epoch + 1 if before else 1,
            sites={site.name: site.identity_public_key or "" for site in active},
            previous_sha256=before.sha256 if before else FIRST,
            certificates={site.name: site.certificate_fingerprint or "" for site in active},
        )
        return write_signed(sign_roster(by, roster))

    return seal


def open_log(federation: Federation) -> AuditLog:
    """The coordinator's audit log; its lines are signed with the key of its statements, also once that is renewed."""

    def now() -> tuple[bytes, str]:
        by = signer(federation)
        return by.key, by.certificate.decode()

    key, certificate = now()
    return AuditLog(federation.audit, f"coordinator {federation.name}", key, certificate, renewed=now)


def invite(federation: Federation, site: str, now_s: float | None = None) -> str:
    """An invite for `site`, one word, good for one enrolment within 72 hours; an unused earlier one dies.

    A site that has joined, or was revoked, may be invited anew: its old certificate counts until it has joined again.
    """
    check_site_name(site)
    token = secrets.token_hex(16)
    expires_at = (time.time() if now_s is None else now_s) + INVITE_S
    add_invite(federation.state, InviteRow(_sha256(token), site, expires_at, None))
    open_log(federation).add("invited", site=site, expires_at=round(expires_at, 3))
    listed = str(read_authority(federation.authority).number or "")
    return write_invite(Invite(federation.address, ca_fingerprint(federation), site, token, listed))


def enrol(federation: Federation, request: bytes, register_node: RegisterNode, now_s: float | None = None) -> Reply:
    """Answers a JoinRequest: the site is active, its node registered and its certificate signed, or nothing changes.

    The same keys and invite again get the same certificate again: the first answer was lost. Statuses: 200, 400
    unreadable or not proven, 403 token not known, 409 used by others, 410 expired, 503 SuperLink away.
    """
    now = time.time() if now_s is None else now_s
    try:
        asked = read_message(JoinRequest, request, "join request")
        check_site_name(asked.site)
    except EnrolmentFailed as error:
        return refused(400, str(error))
    invited = _invite_of(federation, asked)
    if invited is None:
        return refused(
            403, f"invite of {asked.site!r}: not known here, or replaced by a newer one. Ask the coordinator for one."
        )
    if invited.used_at is not None:
        why = f"invite of {asked.site!r}: was used already. Ask the coordinator for a new one."
        return _certificate_again(federation, asked, invited) or refused(409, why)
    if invited.expires_at <= now:
        return refused(410, f"invite of {asked.site!r}: has expired. Ask the coordinator for a new one.")
    try:
        site, certificate = _examine(federation, asked, now)
    except EnrolmentFailed as error:
        return refused(400, str(error))
    try:
        # First, because a node that is registered and of no active site cannot pass the gateway, and does no harm.
        node_id = register_node(asked.node_public_key.encode(), site.name)
        joined = replace(site, flower_node_id=node_id)
        redeem_invite(federation.state, invited, joined, certificate_row(certificate, now), sealer(federation))
    except EnrolmentFailed as error:  # perhaps by these very keys: who lost patience asked again meanwhile
        invited = _invite_of(federation, asked)
        again = _certificate_again(federation, asked, invited) if invited else None
        return again or refused(409, str(error))
    except FederationError as error:
        return refused(503, f"{error} The invite is still good: join again when the coordinator has mended this.")
    _log_enrolled(federation, site)
    return Reply(200, write_message(JoinAnswer(federation.name, site.name, certificate.decode())))


def _invite_of(federation: Federation, asked: JoinRequest) -> InviteRow | None:
    sent = _sha256(asked.token)
    known = [row for row in list_invites(federation.state, asked.site) if hmac.compare_digest(row.token_sha256, sent)]
    return known[0] if known else None


def _log_enrolled(federation: Federation, site: Site) -> None:
    """One line for each certificate, whichever of several requests for it comes to write it."""
    with LOGGING:
        lines = every_event(federation.folder, ("enrolled",))
        if not any(line["facts"].get("certificate") == site.certificate_fingerprint for line in lines):
            facts = {"certificate": site.certificate_fingerprint, "identity": site.identity_public_key}
            open_log(federation).add("enrolled", site=site.name, **facts)


def _certificate_again(federation: Federation, asked: JoinRequest, invite: InviteRow) -> Reply | None:
    """The certificate that these very keys have got for `invite`; None for any other keys, and once it is over.

    It is of use to who holds the keys alone, so that it may be given to whoever repeats the request. What was killed
    before it could answer may have been killed before it wrote its line in the log.
    """
    site, rows = find_site(federation.state, asked.site), list_certificates(federation.state, asked.site)
    if site is None or site.state != "active" or site.joined_at != invite.used_at:
        return None
    if (site.node_public_key, site.identity_public_key) != (asked.node_public_key, asked.identity_public_key):
        return None
    try:
        _proven(asked)
        key = request_key(asked.request.encode(), asked.site)
    except EnrolmentFailed:
        return None
    if key != read_certificate(rows[-1].pem.encode()).key_sha256:
        return None
    _log_enrolled(federation, site)
    return Reply(200, write_message(JoinAnswer(federation.name, asked.site, rows[-1].pem)))


def _proven(asked: JoinRequest) -> bytes:
    """The identity key that has signed a request; raises EnrolmentFailed unless it has."""
    node_public_pem(asked.node_public_key.encode())
    try:
        identity, signature = bytes.fromhex(asked.identity_public_key), bytes.fromhex(asked.signature)
    except ValueError as error:
        raise EnrolmentFailed(
            f"join request of {asked.site!r}: identity key or signature is not hexadecimal. Run `fedclient join` again."
        ) from error
    if not verify(identity, signature, PURPOSE, statement(asked)):
        raise EnrolmentFailed(
            f"join request of {asked.site!r}: the identity key has not signed these keys and this invite. "
            "Run `fedclient join` again."
        )
    return identity


def _examine(federation: Federation, asked: JoinRequest, now: float) -> tuple[Site, bytes]:
    """The site as it will be stored, and its certificate; raises EnrolmentFailed where a proof is missing."""
    identity = _proven(asked)
    for other in list_sites(federation.state):
        if other.name != asked.site and (
            other.node_public_key == asked.node_public_key or other.identity_public_key == identity.hex()
        ):
            raise EnrolmentFailed(f"join request of {asked.site!r}: its keys are another site's. Make new ones.")
    before = find_site(federation.state, asked.site)
    revoked = {before.node_public_key, before.identity_public_key} if before and before.state == "revoked" else set()
    if revoked & {asked.node_public_key, identity.hex()}:
        raise EnrolmentFailed(f"join request of {asked.site!r}: its keys were revoked. Make new ones.")
    certificate = issue_site(
        authority_of(federation), asked.request.encode(), asked.site, days=federation.certificate_days
    )
    facts = read_certificate(certificate)
    site = Site(asked.site, "active", asked.node_public_key, identity.hex(), facts.fingerprint, facts.serial, now)
    return site, certificate


def certificate_row(certificate: bytes, now: float) -> CertificateRow:
    """A certificate that was signed just now (PEM), as the state keeps it."""
    facts = read_certificate(certificate)
    return CertificateRow(facts.serial, facts.name, certificate.decode(), now, facts.expires_at_s)


def refused(status: int, message: str) -> Reply:
    return Reply(status, canonical_json({"detail": message}))


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _toml(federation: Federation) -> bytes:
    lines: dict[str, Any] = {
        "name": federation.name,
        "address": federation.address,
        "max_blob_bytes": federation.max_blob_bytes,
        "certificate_days": federation.certificate_days,
    }
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()).encode()
