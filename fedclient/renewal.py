"""A site keeps its certificate and the roster fresh while it runs; no process is restarted and no order lost for it.

The new certificate replaces the old one in `keys/tls.pem`. Node and executor read that file again before their next
connection; the coordinator closes the open ones after the answer under way, and lets both certificates in meanwhile.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedclient.ask import MOST_BYTES, TurnedAway, ask
from fedclient.authorities import is_orphaned, refresh
from fedclient.enrol import ROSTER, store_certificate
from fedclient.own_log import complain
from fedclient.partners import counted
from fedclient.site import read_site_file
from fedclient.welcome import note_refusal
from shared_models.authority import read_files
from shared_models.dates import date_text
from shared_models.errors import EnrolmentFailed, FederationError, StateInvalid
from shared_models.expiry import due, early, warning
from shared_models.files import locked, write_atomic
from shared_models.identity import (
    Certificate,
    identity_public_key,
    load_credential,
    load_secret,
    new_identity_key,
    new_tls_key,
    read_certificate,
    request_certificate,
    request_key,
    save_secret,
    sign,
)
from shared_models.invite import RENEWAL, SUCCESSION, JoinAnswer, RenewRequest, read_message, statement, write_message
from shared_models.parse import parse_json
from shared_models.roster import MOST_EPOCHS, History, SignedRoster, follow, read_signed, write_signed
from shared_models.transfer import site_context

LONGEST_PAUSE_S = 60.0
DAY_S = 86400.0
MOST_HISTORY_BYTES = MOST_EPOCHS * MOST_BYTES
SUCCESSOR = "identity.next"  # in `keys`: of a key that the coordinator may know already
LOCK = ".renewal.lock"  # in the site's folder
ROSTER_LOCK = ".roster.lock"  # likewise; taken within the other
SITE_KEYS = ("keys/tls.pem", "keys/node.key", "keys/identity.key")
MADE_LATER = ("keys/tls.next", f"keys/{SUCCESSOR}", "secrets/superexec", "secrets/case-keys", "secrets/task")
MEND = "This node renews it while it runs; by hand: `fedclient renew`."
MEND_INVITE = "Ask the coordinator for an invite, then `fedclient rejoin INVITE`."

log = logging.getLogger("fedclient.renewal")


def check_keys(site: Path) -> None:
    """Raises StateInvalid unless every key of the folder is there, ours, and readable by nobody else."""
    for name in SITE_KEYS:
        load_secret(site / name)
    for name in MADE_LATER:
        if (site / name).exists():
            load_secret(site / name)


def certificate_of(site: Path) -> Certificate:
    """The facts of the certificate that a site shows."""
    return read_certificate(load_credential(site / "keys/tls.pem").certificate)


def expiry_warning(site: Path, now_s: float) -> str | None:
    """A sentence when the site's certificate ends soon, has ended or begins only later."""
    shown = certificate_of(site)
    counts = shown.since_s <= now_s < shown.expires_at_s
    return warning("This site's", shown, now_s, MEND if counts else MEND_INVITE)


def renew(site: Path, name: str, address: str, identity: bool = False) -> Certificate:
    """Gets a certificate for a new TLS key by showing the old one; name and node key stay.

    A key whose answer was lost is kept and asked for again, so that nothing is certified in vain. Renewals of a running
    node and of `fedclient renew` wait for each other.

    Args:
        identity: get a new identity key too, which the old one hands over to; a new audit log begins with it.

    Raises:
        EnrolmentFailed: the certificate has expired, the coordinator refuses or cannot be reached, or it gives one that
            begins only later: nobody would let it in, and the old one still counts.
    """
    with locked(site / LOCK):
        return _renew(site, name, address, identity)


def _renew(site: Path, name: str, address: str, identity: bool) -> Certificate:
    keys = site / "keys"
    _settle_identity(site, name, address)
    context = site_context(keys)
    pending = keys / "tls.next"
    if pending.exists() and _public(name, load_secret(pending)) == certificate_of(site).key_sha256:
        pending.unlink()  # the last renewal was stored, and its process killed before this
    if not pending.exists():
        save_secret(pending, new_tls_key())
    key = load_secret(pending)
    request = RenewRequest(name, request_certificate(name, key).decode())
    if identity:
        save_secret(keys / SUCCESSOR, new_identity_key())
        request = replace(request, identity_public_key=identity_public_key(load_secret(keys / SUCCESSOR)).hex())
        taken = sign(load_secret(keys / SUCCESSOR), SUCCESSION, statement(request))
        request = replace(request, identity_signature=taken.hex())
    signature = sign(load_secret(keys / "identity.key"), RENEWAL, statement(request))
    body = write_message(replace(request, signature=signature.hex()))
    try:
        content = ask(address, context, "POST", "/renew", body)
    except TurnedAway as refused:
        if refused.status == 400:  # this key will never do
            pending.unlink()
        raise
    answer = read_message(JoinAnswer, content, f"coordinator at {address}")
    given = read_certificate(answer.certificate.encode())
    if early(given, time.time()):
        raise EnrolmentFailed(
            f"coordinator at {address}: gave a certificate that begins only on {date_text(given.since_s)}, and it was "
            "not taken. Its clock is ahead, or this one is behind: set both by NTP (`timedatectl set-ntp true`)."
        )
    facts = store_certificate(keys / "tls.pem", answer.certificate.encode(), key, name)
    pending.unlink()
    if identity:
        (keys / SUCCESSOR).replace(keys / "identity.key")
    return facts


def settle_identity(site: Path, name: str, address: str) -> None:
    """Takes up a new identity key whose answer was lost, if the roster has it, and lets go of one that it has not."""
    with locked(site / LOCK):  # of a renewal under way the roster does not know yet
        _settle_identity(site, name, address)


def _settle_identity(site: Path, name: str, address: str) -> None:
    keys = site / "keys"
    if not (keys / SUCCESSOR).exists():
        return
    key = load_secret(keys / SUCCESSOR)
    if fetch_roster(site, address).roster.sites.get(name) == identity_public_key(key).hex():
        (keys / SUCCESSOR).replace(keys / "identity.key")
    else:
        (keys / SUCCESSOR).unlink()


def _public(name: str, key: bytes) -> str:
    return request_key(request_certificate(name, key), name)


def read_roster(site: Path) -> SignedRoster | None:
    """The newest roster that this site has seen; its signature was checked when it came."""
    path = site / ROSTER
    return read_signed(path.read_bytes(), str(path)) if path.exists() else None


def fetch_roster(site: Path, address: str) -> SignedRoster:
    """Brings the site's roster up to the coordinator's, epoch by epoch, and keeps it.

    Raises:
        StateInvalid: what came is not signed, or not what follows from what was seen: see `follow`.
        EnrolmentFailed: the coordinator refuses or cannot be reached.
    """
    context, authority = site_context(site / "keys"), read_files(site / "keys")
    while True:
        known = read_roster(site)
        since = 0 if known is None else known.roster.epoch
        content = ask(address, context, "GET", f"/roster/{since}", most=MOST_HISTORY_BYTES)
        history = parse_json(History, content, f"roster of the coordinator at {address}", StateInvalid)
        with locked(site / ROSTER_LOCK):
            if read_roster(site) != known:  # an answer to another process was quicker: what came is of the past
                continue
            try:
                newest = follow(known, history, authority)
            except StateInvalid as error:
                complain(site, certificate_of(site).name, "roster-refused", str(error))
                raise
            if known is None or newest.roster.epoch > known.roster.epoch:
                write_atomic(site / ROSTER, write_signed(newest))
        if newest.roster.epoch >= history.newest or (known is not None and newest.roster.epoch == known.roster.epoch):
            return newest


@dataclass(slots=True)
class Keeper:
    """What a running node looks after beside its work.

    Attributes:
        said: what was logged, and when (seconds since the epoch), so that it is said once a day.
    """

    site: Path
    name: str
    address: str
    clock: Callable[[], float] = time.time
    said: dict[str, float] = field(default_factory=dict)

    def run(self, stop: threading.Event) -> None:
        """Looks at once, then every minute, more often at a short certificate, until `stop`."""
        while True:
            self.look()
            if stop.wait(self.pause_s()):
                return

    def look(self) -> None:
        """Fetches the list of issuing keys, renews the certificate if that is due and fetches the roster, and
        looks whether a partner's key is another one.

        A trouble is logged and tried again.
        """
        try:
            self._hear_authority()
            settle_identity(self.site, self.name, self.address)
            if due(certificate_of(self.site), self.clock()) or is_orphaned(self.site):
                facts = renew(self.site, self.name, self.address)
                log.info("renewed this site's certificate; the new one is good until %s", date_text(facts.expires_at_s))
            words = expiry_warning(self.site, self.clock())
            if words is not None:
                self._say("expiry", words)
            signed, named = fetch_roster(self.site, self.address), read_site_file(self.site).policy.partners
            if named:
                counted(self.site, self.name, named, signed.roster)
        except TurnedAway as refused:
            if refused.status == 403:
                note_refusal(self.site, refused.words)
            self._say("refused", str(refused))
        except (FederationError, OSError) as error:
            self._say(type(error).__name__, str(error))

    def _hear_authority(self) -> None:
        """Fetches the list as a stranger does; whoever holds all places for strangers stops nothing but this."""
        try:
            if refresh(self.site, self.name, self.address):
                log.info("the federation's authority has a new revocation list")
        except EnrolmentFailed as error:
            self._say("authority", str(error))

    def pause_s(self) -> float:
        try:
            left_s = certificate_of(self.site).expires_at_s - self.clock()
        except (FederationError, OSError):
            return LONGEST_PAUSE_S
        return min(LONGEST_PAUSE_S, max(1.0, left_s / 20))

    def _say(self, what: str, words: str) -> None:
        now = self.clock()
        if now - self.said.get(what, float("-inf")) > DAY_S:
            self.said[what] = now
            log.warning("%s", words)
