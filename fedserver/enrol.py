"""How a federation is founded, and how a hospital gets in: invite, enrolment, certificate."""

import hashlib
import hmac
import json
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedserver.state import (
    InviteRow,
    Site,
    add_invite,
    check_state,
    create_state,
    list_invites,
    list_sites,
    redeem_invite,
)
from shared_models.audit import AuditLog
from shared_models.errors import EnrolmentFailed, FederationError, StateInvalid
from shared_models.files import canonical_json, write_atomic
from shared_models.identity import (
    Credential,
    check_site_name,
    issue_server,
    issue_signer,
    issue_site,
    load_secret,
    new_authority,
    node_public_pem,
    read_certificate,
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
from shared_models.supervise import kept_secret

INVITE_S = 72 * 3600
MAX_BLOB_BYTES = 2 << 30
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
    """

    folder: Path
    name: str
    address: str
    max_blob_bytes: int

    @property
    def ca_certificate(self) -> Path:
        return self.folder / "ca" / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.folder / "ca" / "ca.key"

    @property
    def signer(self) -> Path:
        """The coordinator's key for statements and, after it, the authority's certificate of it."""
        return self.folder / "ca" / "signer.pem"

    @property
    def server_certificate(self) -> Path:
        """The gateway's and the SuperLink's; it is good for the public name and for loopback."""
        return self.folder / "tls" / "server.pem"

    @property
    def server_key(self) -> Path:
        return self.folder / "tls" / "server.key"

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
    def logs(self) -> Path:
        return self.folder / "logs"


@dataclass(frozen=True, slots=True)
class Reply:
    """What an enrolling hospital is told: an HTTP status and a JSON text."""

    status: int
    content: bytes


def init_federation(folder: Path, name: str, address: str) -> Federation:
    """Makes a federation in `folder`, whole or not at all.

    Raises:
        StateInvalid: if `folder` holds anything, or `name` is not one that fits into a certificate.
        EnrolmentFailed: if `address` is not `host:port`.
    """
    host, _ = split_address(address)
    if not FEDERATION_NAME.fullmatch(name):
        raise StateInvalid(
            f"federation name {name!r}: 1 to 64 of letters, digits, blanks, '.', '_' and '-' are allowed. "
            "Choose such a name."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StateInvalid(f"{folder}: is not empty. Choose another folder, or open the federation that is there.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made = Federation(part, name, address, MAX_BLOB_BYTES)
        for inner in (made.superlink, made.blobs / "out", made.blobs / "in", made.runs, made.logs):
            inner.mkdir(parents=True, mode=0o700)
            inner.parent.chmod(0o700)
        authority = new_authority(name)
        server = issue_server(authority, [host])
        write_atomic(made.ca_certificate, authority.certificate)
        save_secret(made.ca_key, authority.key)
        write_atomic(made.server_certificate, server.certificate)
        save_secret(made.server_key, server.key)
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


def open_federation(folder: Path) -> Federation:
    """Opens what `init_federation` made; raises StateInvalid if something in it is missing, damaged or exposed."""
    path = folder / "federation.toml"
    if not path.is_file():
        raise StateInvalid(f"{folder}: holds no federation. Make one with `fedserver init`, or check the path.")
    table = read_toml(path)
    kinds: dict[str, type] = {"name": str, "address": str, "max_blob_bytes": int}
    wrong = sorted(set(table) ^ set(kinds)) or [key for key, kind in kinds.items() if type(table[key]) is not kind]
    if wrong:
        raise StateInvalid(f"{path}: {', '.join(wrong)}: expected exactly name, address and max_blob_bytes. Mend it.")
    federation = Federation(folder, table["name"], table["address"], table["max_blob_bytes"])
    if federation.max_blob_bytes <= 0:
        raise StateInvalid(f"{path}: max_blob_bytes is {federation.max_blob_bytes}; allowed: above 0. Mend it.")
    for key in (federation.ca_key, federation.server_key):
        load_secret(key)
    check_state(federation.state)
    return federation


def ca_fingerprint(federation: Federation) -> str:
    """SHA-256 of the CA certificate, hexadecimal."""
    return read_certificate(federation.ca_certificate.read_bytes()).fingerprint


def signer(federation: Federation) -> Credential:
    """What the coordinator signs statements with; made when it is first needed."""
    mark = b"-----BEGIN CERTIFICATE-----"
    if not federation.signer.exists():
        authority = Credential(federation.ca_certificate.read_bytes(), load_secret(federation.ca_key))
        made = issue_signer(authority)
        save_secret(federation.signer, made.key + made.certificate)
    key, _, certificate = load_secret(federation.signer).partition(mark)
    return Credential(mark + certificate, key)


def open_log(federation: Federation) -> AuditLog:
    """The coordinator's audit log; its lines are signed with the key of its statements."""
    by = signer(federation)
    path, party = federation.folder / "audit.jsonl", f"coordinator {federation.name}"
    return AuditLog(path, party, by.key, by.certificate.decode())


def invite(federation: Federation, site: str, now_s: float | None = None) -> str:
    """An invite for `site`, one word, good for one enrolment within 72 hours; an unused earlier one dies.

    A site that has joined, or was revoked, may be invited anew: its old certificate counts until it has joined again.
    """
    check_site_name(site)
    token = secrets.token_hex(16)
    expires_at = (time.time() if now_s is None else now_s) + INVITE_S
    add_invite(federation.state, InviteRow(_sha256(token), site, expires_at, None))
    open_log(federation).add("invited", site=site, expires_at=round(expires_at, 3))
    return write_invite(Invite(federation.address, ca_fingerprint(federation), site, token))


def enrol(federation: Federation, request: bytes, register_node: RegisterNode, now_s: float | None = None) -> Reply:
    """Answers a JoinRequest: the site is active, its node registered and its certificate signed, or nothing changes.

    Statuses: 200, 400 unreadable or not proven, 403 token not known, 409 used, 410 expired, 503 SuperLink away.
    """
    now = time.time() if now_s is None else now_s
    try:
        asked = read_message(JoinRequest, request, "join request")
        check_site_name(asked.site)
    except EnrolmentFailed as error:
        return _refused(400, str(error))
    sent = _sha256(asked.token)
    known = [row for row in list_invites(federation.state, asked.site) if hmac.compare_digest(row.token_sha256, sent)]
    if not known:
        return _refused(
            403, f"invite of {asked.site!r}: not known here, or replaced by a newer one. Ask the coordinator for one."
        )
    if known[0].used_at is not None:
        return _refused(409, f"invite of {asked.site!r}: was used already. Ask the coordinator for a new one.")
    if known[0].expires_at <= now:
        return _refused(410, f"invite of {asked.site!r}: has expired. Ask the coordinator for a new one.")
    try:
        site, certificate = _examine(federation, asked, now)
    except EnrolmentFailed as error:
        return _refused(400, str(error))
    try:
        # First, because a node that is registered and of no active site cannot pass the gateway, and does no harm.
        node_id = register_node(asked.node_public_key.encode(), site.name)
        redeem_invite(federation.state, known[0], replace(site, flower_node_id=node_id))
    except EnrolmentFailed as error:
        return _refused(409, str(error))
    except FederationError as error:
        return _refused(503, f"{error} The invite is still good: join again when the coordinator has mended this.")
    open_log(federation).add(
        "enrolled", site=site.name, certificate=site.certificate_fingerprint, identity=site.identity_public_key
    )
    return Reply(200, write_message(JoinAnswer(federation.name, site.name, certificate.decode())))


def _examine(federation: Federation, asked: JoinRequest, now: float) -> tuple[Site, bytes]:
    """The site as it will be stored, and its certificate; raises EnrolmentFailed where a proof is missing."""
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
    for other in list_sites(federation.state):
        if other.name != asked.site and (
            other.node_public_key == asked.node_public_key or other.identity_public_key == identity.hex()
        ):
            raise EnrolmentFailed(f"join request of {asked.site!r}: its keys are another site's. Make new ones.")
    authority = Credential(federation.ca_certificate.read_bytes(), load_secret(federation.ca_key))
    certificate = issue_site(authority, asked.request.encode(), asked.site)
    facts = read_certificate(certificate)
    site = Site(asked.site, "active", asked.node_public_key, identity.hex(), facts.fingerprint, facts.serial, now)
    return site, certificate


def _refused(status: int, message: str) -> Reply:
    return Reply(status, canonical_json({"detail": message}))


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _toml(federation: Federation) -> bytes:
    lines: dict[str, Any] = {
        "name": federation.name,
        "address": federation.address,
        "max_blob_bytes": federation.max_blob_bytes,
    }
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()).encode()
