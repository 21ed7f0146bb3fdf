"""How a hospital joins a federation: an invite in, keys and a certificate out."""

import http.client
import json
import shutil
import ssl
import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from shared_models.errors import EnrolmentFailed, StateInvalid
from shared_models.files import sync_folder, write_atomic
from shared_models.identity import (
    Certificate,
    fingerprint_words,
    identity_public_key,
    new_site_keys,
    node_public_key,
    read_certificate,
    request_certificate,
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
from shared_models.transfer import connect

TIMEOUT_S = 45.0  # the coordinator waits up to 20 s for its SuperLink
MOST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Joined:
    """A site that has its keys.

    Attributes:
        address: `host:port` of the coordinator.
        keys: folder with ca.pem, tls.pem, tls.key, node.key, identity.key.
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


def join(invite: str, folder: Path) -> Joined:
    """Makes this site's keys, has the certificate signed and stores them in `folder`/keys, all of them or none.

    The private keys never leave this machine. After a failure the same invite can be tried again unless the message
    says that it is used.

    Raises:
        EnrolmentFailed: what the invite, the coordinator's certificate or its answer lack.
        StateInvalid: `folder` holds keys already.
    """
    asked = read_invite(invite)
    keys = folder / "keys"
    if keys.exists():
        raise StateInvalid(
            f"{keys}: this site has joined already. To join anew, move that folder away and ask for a new invite."
        )
    ca = _fetch_authority(asked)
    context = ssl.create_default_context(cadata=ca.decode("ascii"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = Path(tempfile.mkdtemp(prefix=".keys.", dir=folder))  # before the invite is spent: the disk may be full
    try:
        made = new_site_keys()
        save_secret(part / "tls.key", made.tls)
        save_secret(part / "node.key", made.node)
        save_secret(part / "identity.key", made.identity)
        write_atomic(part / "ca.pem", ca)
        request = JoinRequest(
            site=asked.site,
            token=asked.token,
            request=request_certificate(asked.site, made.tls).decode(),
            node_public_key=node_public_key(made.node).decode(),
            identity_public_key=identity_public_key(made.identity).hex(),
        )
        signed = replace(request, signature=sign(made.identity, PURPOSE, statement(request)).hex())
        where = f"coordinator at {asked.address}"
        answer = read_message(JoinAnswer, _ask(asked, context, "POST", "/enrol", write_message(signed)), where)
        certificate = answer.certificate.encode()
        facts = _check_certificate(certificate, asked.site, part)
        part.rename(keys)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_folder(folder)
    return Joined(
        federation=answer.federation,
        site=asked.site,
        address=asked.address,
        keys=keys,
        authority_words=fingerprint_words(asked.ca),
        certificate_words=fingerprint_words(facts.fingerprint),
        expires_at_s=facts.expires_at_s,
    )


def _fetch_authority(invite: Invite) -> bytes:
    """The coordinator's CA certificate, PEM, over a connection that proves nothing: the invite's fingerprint does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    ca = _ask(invite, context, "GET", "/enrol/ca")
    if read_certificate(ca).fingerprint != invite.ca:
        raise EnrolmentFailed(
            f"coordinator at {invite.address}: is not the one of the invite, its CA has another fingerprint. "
            "Check the address with the coordinator by telephone; somebody may stand in between."
        )
    return ca


def _check_certificate(certificate: bytes, site: str, part: Path) -> Certificate:
    """Stores the certificate in `part` once it is seen to be ours: our name, our key, the CA's signature."""
    facts = read_certificate(certificate)
    write_atomic(part / "tls.pem", certificate)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(part / "tls.pem", part / "tls.key")
    except ssl.SSLError as error:
        raise EnrolmentFailed("coordinator: signed a certificate for another key. Ask for a new invite.") from error
    if facts.name != site:
        raise EnrolmentFailed(f"coordinator: signed a certificate for {facts.name!r}, not {site!r}. Ask for an invite.")
    return facts


def _ask(invite: Invite, context: ssl.SSLContext, method: str, path: str, body: bytes | None = None) -> bytes:
    """The content of a successful answer; raises EnrolmentFailed with what the coordinator says otherwise."""
    where = f"coordinator at {invite.address}"
    try:
        with closing(connect(invite.address, context, TIMEOUT_S)) as connection:
            headers = {"content-type": "application/json"} if body else {}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read(MOST_BYTES)
    except ssl.SSLCertVerificationError as error:
        raise EnrolmentFailed(
            f"{where}: its certificate is not good for this address ({error.verify_message}). "
            "Check the address and this machine's clock."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise EnrolmentFailed(
            f"{where}: cannot be reached ({str(error) or type(error).__name__}). "
            "Check the address, the firewall, HTTPS_PROXY, and that `fedserver serve` runs; then join again."
        ) from error
    if response.status == 200:
        return content
    try:
        told = str(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError):
        told = response.reason
    told = "".join(c for c in told[:500] if c.isprintable())  # from a peer not yet known, and bound for a terminal
    raise EnrolmentFailed(f"{where} (HTTP {response.status}): {told}")
