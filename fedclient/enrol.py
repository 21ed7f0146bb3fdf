"""How a hospital joins a federation, or joins it again with new keys: an invite in, keys and a certificate out."""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedclient.ask import TurnedAway, ask
from fedclient.authorities import offered
from shared_models.authority import LIST, ROOT, read_authority
from shared_models.errors import EnrolmentFailed, StateInvalid
from shared_models.files import sync_folder, write_atomic
from shared_models.identity import (
    Certificate,
    Credential,
    SiteKeys,
    fingerprint_words,
    identity_public_key,
    load_secret,
    new_site_keys,
    node_public_key,
    read_certificate,
    request_certificate,
    request_key,
    save_credential,
    save_secret,
    sign,
)
from shared_models.invite import (
    PURPOSE,
    Invite,
    JoinAnswer,
    JoinRequest,
    read_invite,
    read_message,
    statement,
    write_message,
)
from shared_models.transfer import trusting

ROSTER = "roster.json"  # in the site's folder: the newest epoch that it has seen
MAKING = ".keys."  # in the site's folder: keys that are being made
UNANSWERED = ".unanswered."  # in the site's folder: keys that have asked with an invite, by the digest of its token
NEVER = (400, 403, 409, 410)  # an invite and keys that were refused like this are refused for ever


@dataclass(frozen=True, slots=True)
class Joined:
    """A site that has its keys.

    Attributes:
        address: `host:port` of the coordinator.
        keys: folder with ca.pem, tls.pem (key and certificate), node.key, identity.key; and authorities.pem where the
            root's key is kept offline.
        authority_words: eight words for the coordinator's CA, to be compared with `fedserver init`'s over a telephone.
        certificate_words: the same for this site's certificate, to be compared with `fedserver status`'s.
        expires_at_s: when the certificate ends, seconds since the epoch.
    """

    federation: str
    site: str
    address: str
    keys: Path
    authority_words: str
    certificate_words: str
    expires_at_s: float


def join(invite: str, folder: Path, settle: Callable[[Joined], None] | None = None) -> Joined:
    """Makes this site's keys, has the certificate signed and stores them in `folder`/keys, all of them or none.

    The private keys never leave this machine. After a failure the same invite can be tried again unless the message
    says that it is used; keys whose answer was lost are kept for that.

    Args:
        settle: writes the site's settings, before the keys get their place: who is killed in between can `rejoin`.

    Raises:
        EnrolmentFailed: what the invite, the coordinator's certificate or its answer lack.
        StateInvalid: `folder` holds keys already.
    """
    keys = folder / "keys"
    if keys.exists():
        raise StateInvalid(
            f"{keys}: this site has joined already. To join anew, ask for a new invite, then `fedclient rejoin INVITE`."
        )
    return _enrol(read_invite(invite), folder, keys, settle)


def rejoin(invite: str, folder: Path, site: str, address: str) -> Joined:
    """Joins again as `site` at `address` with new keys: its certificate was revoked or has expired, or a key was lost.

    The old keys are put aside in `folder`/keys.TIME. A node that runs takes up the new ones by itself.

    Raises:
        EnrolmentFailed: as `join`, or the invite is another site's or another coordinator's.
    """
    asked = read_invite(invite)
    if (asked.site, asked.address) != (site, address):
        raise EnrolmentFailed(
            f"invite: is for {asked.site!r} at {asked.address}, and {folder} is {site!r} at {address}. "
            "Join in another folder with --site."
        )
    return _enrol(asked, folder, folder / "keys")


def _enrol(asked: Invite, folder: Path, keys: Path, settle: Callable[[Joined], None] | None = None) -> Joined:
    ca = _fetch_authority(asked)
    context, root = trusting(ca), read_authority(ca).root
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    unanswered = folder / f"{UNANSWERED}{hashlib.sha256(asked.token.encode()).hexdigest()[:16]}"
    again = unanswered.exists()  # the same keys get the answer that was lost
    part = unanswered if again else Path(tempfile.mkdtemp(prefix=MAKING, dir=folder))
    try:
        new = new_site_keys()
        for name, key in (("tls.next", new.tls), ("node.key", new.node), ("identity.key", new.identity)):
            if not (part / name).exists():
                save_secret(part / name, key)
        made = SiteKeys(*(load_secret(part / name) for name in ("tls.next", "node.key", "identity.key")))
        write_atomic(part / ROOT, root)
        if ca != root:
            write_atomic(part / LIST, ca.removeprefix(root))
        request = JoinRequest(
            site=asked.site,
            token=asked.token,
            request=request_certificate(asked.site, made.tls).decode(),
            node_public_key=node_public_key(made.node).decode(),
            identity_public_key=identity_public_key(made.identity).hex(),
        )
        signed = replace(request, signature=sign(made.identity, PURPOSE, statement(request)).hex())
        part = part.rename(unanswered)  # before the invite is spent: whoever is killed meanwhile can do nothing more
        sync_folder(folder)
        content = ask(asked.address, context, "POST", "/enrol", write_message(signed))
        answer = read_message(JoinAnswer, content, f"coordinator at {asked.address}")
        if not (part / "tls.next").exists():
            raise StateInvalid(f"{keys}: another join with this invite was quicker. See `fedclient doctor`.")
        facts = store_certificate(part / "tls.pem", answer.certificate.encode(), made.tls, asked.site)
        if keys.exists():
            for left in ("session.json", "order.pb"):  # of the old node, which the coordinator lets go
                (folder / "node" / left).unlink(missing_ok=True)
            if (keys / ROOT).read_bytes() != root:  # founded anew, with a history of its own
                (folder / ROSTER).unlink(missing_ok=True)
            keys.rename(folder / f"keys.{time.time_ns()}")
        joined = Joined(
            federation=answer.federation,
            site=asked.site,
            address=asked.address,
            keys=keys,
            authority_words=fingerprint_words(asked.ca),
            certificate_words=fingerprint_words(facts.fingerprint),
            expires_at_s=facts.expires_at_s,
        )
        if settle is not None:
            settle(joined)
        part.rename(keys)
    except BaseException as error:
        if part != unanswered or (isinstance(error, TurnedAway) and error.status in NEVER):
            shutil.rmtree(part, ignore_errors=True)
        raise
    (keys / "tls.next").unlink()
    for path in (*folder.glob(f"{MAKING}*"), *folder.glob(f"{UNANSWERED}*")):
        shutil.rmtree(path, ignore_errors=True)
    sync_folder(folder)
    return joined


def _fetch_authority(invite: Invite) -> bytes:
    """The coordinator's authority, PEM, over a connection that proves nothing: the invite's fingerprint does."""
    ca = offered(invite.address)
    if read_certificate(ca).fingerprint != invite.ca:
        raise EnrolmentFailed(
            f"coordinator at {invite.address}: is not the one of the invite, its CA has another fingerprint. "
            "Check the address with the coordinator by telephone; somebody may stand in between."
        )
    found = read_authority(ca)
    if found.number < int(invite.listed or 0):
        raise EnrolmentFailed(
            f"coordinator at {invite.address}: shows revocation list {found.number}, which is stale: the invite names "
            f"{invite.listed}. Telephone the coordinator; somebody may stand in between with a stolen key."
        )
    return ca


def store_certificate(path: Path, certificate: bytes, key: bytes, site: str) -> Certificate:
    """Writes key and certificate (PEM) once it is seen to be ours: our name, our key; or raises EnrolmentFailed."""
    facts = read_certificate(certificate)
    if facts.key_sha256 != request_key(request_certificate(site, key), site):
        raise EnrolmentFailed("coordinator: signed a certificate for another key. Ask for a new invite.")
    if facts.name != site:
        raise EnrolmentFailed(f"coordinator: signed a certificate for {facts.name!r}, not {site!r}. Ask for an invite.")
    save_credential(path, Credential(certificate, key))
    return facts
