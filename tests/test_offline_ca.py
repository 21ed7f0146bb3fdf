"""A root key that is kept offline: what its issuing keys may do, how they change, and what becomes of stolen ones."""

import http.client
import json
import socket
import ssl
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from fedclient.ask import TurnedAway
from fedclient.authorities import is_orphaned, refresh
from fedclient.cli import app as hospital
from fedclient.enrol import Joined, join
from fedclient.policy import Policy
from fedclient.renewal import Keeper, fetch_roster, read_roster, renew
from fedclient.tls import ClientTls
from fedserver import lifecycle
from fedserver.backup import backup, restore
from fedserver.cli import app as coordinator
from fedserver.enrol import Federation, authority_of, init_federation, invite, open_federation, open_log, signer
from fedserver.root import certify, founding, install, open_root, request
from fedserver.state import list_certificates, list_rosters
from shared_models.authority import (
    LIST,
    authority_certificate,
    issuer_certificate,
    new_root,
    newer,
    read_authority,
    read_files,
    revocation_list,
)
from shared_models.errors import EnrolmentFailed, ProcessFailed, ReleaseInvalid, StateInvalid
from shared_models.files import read_lines
from shared_models.identity import (
    Credential,
    fingerprint_words,
    is_issued_by,
    issue_server,
    issue_site,
    load_credential,
    new_tls_key,
    read_certificate,
    request_certificate,
    request_issuer,
    save_credential,
    vouched,
)
from shared_models.invite import Invite, read_invite, write_invite
from shared_models.nets import initial_weights
from shared_models.release import Trust, open_release
from shared_models.roster import read_signed
from shared_models.transfer import connect, site_context, trusting
from tests.edge import Edge, ask, joined_site, running_edge
from tests.hospitals import Hospitals
from tests.releases import tiny_study

WORDS = "correct horse battery"


@dataclass(frozen=True, slots=True)
class Served:
    """A federation whose root key lies in `stick`."""

    edge: Edge
    stick: Path

    @property
    def federation(self) -> Federation:
        return self.edge.federation

    def change(self, revoke: bool = False) -> None:
        install(self.federation, certify(open_root(self.stick, WORDS), request(self.federation), revoke=revoke))
        self.edge.gateway.admission.forget()


@pytest.fixture(scope="module", autouse=True)
def cheap_passphrases(module_monkeypatch: pytest.MonkeyPatch) -> None:
    module_monkeypatch.setattr("fedserver.passphrase.SCRYPT_N", 2**10)


@pytest.fixture(scope="module")
def module_monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    stick = tmp_path / "stick"
    with running_edge(tmp_path / "federation", founding(stick, WORDS)) as edge:
        yield Served(edge, stick)


def home(site: Joined) -> Path:
    return site.keys.parent


def health(served: Served, site: Joined) -> int:
    return ask(served.edge, site_context(site.keys), "GET", "/health").status


@contextmanager
def posing(folder: Path, shown: Credential, *chain: bytes) -> Iterator[str]:
    """A server that shows `shown` and sends `chain` along; its address."""
    path = folder / "posing.pem"
    save_credential(path, Credential(shown.certificate + b"".join(chain), shown.key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    peer, _ = listening.accept()
                    with peer, context.wrap_socket(peer, server_side=True) as tls:
                        tls.recv(1)
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def handshake(address: str, context: ssl.SSLContext) -> str | None:
    with closing(connect(address, context, 10)) as connection:
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)
        return connection.sock.version()


# What lies where


def test_the_coordinator_never_holds_the_root_key_and_a_site_gets_in_by_an_issuing_key(
    served: Served, tmp_path: Path
) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    folder = served.federation.folder
    assert not served.federation.ca_key.exists()
    assert sorted(path.name for path in (folder / "ca").iterdir()) == [
        "authorities.pem", "ca.pem", "issuing.pem", "signer.pem"
    ]  # fmt: skip
    own = x509.load_pem_x509_certificate(load_credential(site.keys / "tls.pem").certificate)
    issuer = x509.load_pem_x509_certificate(load_credential(served.federation.issuing).certificate)
    pinned = x509.load_pem_x509_certificate((site.keys / "ca.pem").read_bytes())
    own.verify_directly_issued_by(issuer)
    issuer.verify_directly_issued_by(pinned)
    assert issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert 179 <= (issuer.not_valid_after_utc - datetime.now(UTC)).days <= 180
    assert health(served, site) == 200
    assert handshake(site.address, site_context(site.keys)) == "TLSv1.3"


def test_the_root_key_is_encrypted_and_another_passphrase_does_not_open_it(served: Served) -> None:
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in (served.stick / "root.key").read_bytes()
    assert (served.stick / "root.key").stat().st_mode & 0o077 == 0
    with pytest.raises(StateInvalid, match="the passphrase is not the one"):
        open_root(served.stick, "another horse battery")
    with pytest.raises(StateInvalid, match="12 or more"):
        founding(served.stick / "x", "short")(served.federation)
    with pytest.raises(StateInvalid, match="Insert the stick"):
        open_root(served.stick / "gone", WORDS)


def test_a_root_serves_one_federation_and_a_failure_leaves_nothing(served: Served, tmp_path: Path) -> None:
    with pytest.raises(StateInvalid, match="serves one federation"):
        init_federation(tmp_path / "b", "B", "127.0.0.1:1", found=founding(served.stick, WORDS))
    assert not (tmp_path / "b").exists()
    init_federation(tmp_path / "c", "C", "127.0.0.1:1", found=founding(tmp_path / "other", WORDS))
    with pytest.raises(StateInvalid, match="names another authority"):
        certify(open_root(tmp_path / "other", WORDS), request(served.federation))


def test_no_private_key_stands_readable_in_a_backup_and_all_come_back(served: Served, tmp_path: Path) -> None:
    request(served.federation)  # one that waits for its answer, too
    backup(served.federation, tmp_path / "b.tar", WORDS)
    with tarfile.open(tmp_path / "b.tar") as archive:
        names = archive.getnames()
        held = [archive.extractfile(name) for name in names]
        assert not [file for file in held if file is not None and b"PRIVATE KEY" in file.read()]
    assert "ca/authorities.pem" in names
    restore(tmp_path / "b.tar", tmp_path / "again", WORDS)
    again = open_federation(tmp_path / "again")
    assert authority_of(again).key == authority_of(served.federation).key
    assert again.authority == served.federation.authority


# What an issuing key may do


def test_an_issuing_key_makes_no_other_authority(served: Served, tmp_path: Path) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    issuing = authority_of(served.federation)
    key = serialization.load_pem_private_key(issuing.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    by = x509.load_pem_x509_certificate(issuing.certificate)
    own = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mine")])
    made = authority_certificate(name, own.public_key(), 10, datetime.now(UTC), 0, by, key)
    shown = issue_server(Credential(made, pem(own)), ["127.0.0.1"])
    with posing(tmp_path, shown, made, issuing.certificate) as address, pytest.raises(ssl.SSLCertVerificationError):
        handshake(address, site_context(site.keys))
    with posing(tmp_path, issue_server(issuing, ["127.0.0.1"])) as address:
        assert handshake(address, site_context(site.keys)) == "TLSv1.3", "the same by the issuing key itself"
    with pytest.raises(StateInvalid, match="damaged, or not signed by its root"):
        read_authority(served.federation.authority + made)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def test_an_issuing_key_states_nothing_and_the_root_without_its_list_vouches_for_nobody(served: Served) -> None:
    authority, own = served.federation.authority, signer(served.federation)
    assert vouched(authority, own.certificate) is not None
    assert vouched(authority, load_credential(served.federation.issuing).certificate) is None
    assert vouched(served.federation.ca_certificate.read_bytes(), own.certificate) is None


def test_whoever_stole_the_issuing_key_cannot_pose_as_a_site_by_its_number(served: Served, tmp_path: Path) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    refused = ask(served.edge, posing_as(served, site, tmp_path), "GET", "/health")
    assert (refused.status, "not active in this federation with this certificate" in refused.detail) == (403, True)
    assert health(served, site) == 200


def posing_as(served: Served, site: Joined, folder: Path) -> ssl.SSLContext:
    """Shows a certificate with the name and number of the site's own for another key, by the stolen issuing key."""
    real = x509.load_pem_x509_certificate(load_credential(site.keys / "tls.pem").certificate)
    issuing = authority_of(served.federation)
    by, key = x509.load_pem_x509_certificate(issuing.certificate), serialization.load_pem_private_key(issuing.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    thief = new_tls_key()
    public = serialization.load_pem_private_key(thief, None).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    forged = x509.CertificateBuilder().subject_name(real.subject).issuer_name(by.subject).public_key(public)
    forged = forged.serial_number(real.serial_number).not_valid_before(real.not_valid_before_utc)
    forged = forged.not_valid_after(real.not_valid_after_utc)
    for extension in real.extensions:
        if not isinstance(extension.value, x509.SubjectKeyIdentifier):
            forged = forged.add_extension(extension.value, extension.critical)
    pem_of_forged = forged.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
    save_credential(folder / "forged.pem", Credential(pem_of_forged, thief))
    context = trusting(served.federation.authority)
    context.load_cert_chain(folder / "forged.pem")
    return context


def test_a_forged_certificate_counts_for_no_first_use_of_the_one_with_its_number(
    served: Served, tmp_path: Path
) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    old = site_context(site.keys)
    renew(home(site), "north", site.address)
    served.edge.gateway.admission.forget()
    assert ask(served.edge, posing_as(served, site, tmp_path), "GET", "/health").status == 403
    assert used(served, "north") == [True, False], "or the one in use would be retired a day later"
    served.edge.gateway.admission.forget()
    assert ask(served.edge, old, "GET", "/health").status == 200
    assert used(served, "north") == [True, False]
    served.edge.gateway.admission.forget()
    assert health(served, site) == 200
    assert used(served, "north") == [True, True]


def used(served: Served, site: str) -> list[bool]:
    return [row.used_at is not None for row in list_certificates(served.federation.state, site)]


# Rotation


def test_issuing_keys_change_under_connected_sites_and_nothing_is_cut(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    north = joined_site(served.edge, tmp_path, "north")
    tls, before = ClientTls(north.keys), load_credential(served.federation.server_certificate).certificate
    host, port = served.edge.address.split(":")
    with closing(http.client.HTTPSConnection(host, int(port), context=tls.context, timeout=10)) as held:
        held.request("GET", "/health")
        assert held.getresponse().read()
        served.change()
        served.edge.gateway.admission.forget()
        held.request("GET", "/health")
        assert held.getresponse().read() == b'{"federation": "Test federation", "site": "north"}'
    assert health(served, north) == 200, "the certificate by the old key counts on"
    await_log(served, "authority")
    south = joined_site(served.edge, tmp_path, "south")
    assert eventually(lambda: health(served, south) == 200), "the gateway takes the new key without a restart"
    assert not lifecycle.renew_server(served.federation), "sites have had no time to hear of it"
    Keeper(home(north), "north", north.address).look()
    assert read_authority((north.keys / "ca.pem").read_bytes() + (north.keys / LIST).read_bytes()).number == 2
    assert not is_orphaned(home(north))
    monkeypatch.setattr(lifecycle, "HEARD_S", 0.0)
    assert lifecycle.renew_server(served.federation)
    shown = load_credential(served.federation.server_certificate).certificate
    assert shown != before
    assert is_issued_by(shown, authority_of(served.federation).certificate)
    tls.refresh()
    assert eventually(lambda: shows(served, tls.context, shown)), "a node that runs goes on with its context"
    facts = renew(home(north), "north", north.address)
    assert is_issued_by(
        load_credential(north.keys / "tls.pem").certificate, authority_of(served.federation).certificate
    )
    assert facts.name == "north"
    assert [
        line["facts"]["list"] for line in read_lines(home(north) / "audit.jsonl") if line["event"] == "authority"
    ] == [2]


def shows(served: Served, context: ssl.SSLContext, certificate: bytes) -> bool:
    with closing(connect(served.edge.address, context, 10)) as connection:
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)
        seen = connection.sock.getpeercert(binary_form=True)
    return seen == ssl.PEM_cert_to_DER_cert(certificate.decode())


def eventually(what: object, seconds: float = 15) -> bool:
    import time

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if what():  # type: ignore[operator]
                return True
        except (OSError, http.client.HTTPException, TurnedAway):
            pass
        time.sleep(0.05)
    return False


def await_log(served: Served, event: str) -> None:
    assert eventually(lambda: any(line["event"] == event for line in read_lines(served.federation.audit)))


def test_strangers_who_hold_all_places_stop_no_renewal_and_no_roster(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    before = load_credential(site.keys / "tls.pem").certificate

    def full(address: str) -> bytes:
        raise EnrolmentFailed(f"coordinator at {address}: cannot be reached (Connection reset by peer).")

    monkeypatch.setattr("fedclient.authorities.offered", full)
    keeper = Keeper(home(site), "north", site.address, lambda: read_certificate(before).expires_at_s - 86400)
    for _ in range(2):
        keeper.look()
    assert load_credential(site.keys / "tls.pem").certificate != before
    assert read_roster(home(site)) is not None
    assert sum("Connection reset by peer" in line for line in caplog.messages) == 1, "once a day"


# Stolen keys


def test_a_stolen_issuing_key_is_refused_once_a_site_has_heard_and_the_site_finds_its_way_back(
    served: Served, tmp_path: Path
) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    fetch_roster(home(site), site.address)
    stolen, old_signer = authority_of(served.federation), signer(served.federation)
    thief = issue_server(stolen, ["127.0.0.1"])
    with posing(tmp_path, thief, stolen.certificate) as address:
        assert handshake(address, site_context(site.keys)) == "TLSv1.3", "nobody can tell yet"
        old = ClientTls(site.keys)
        served.change(revoke=True)
        assert eventually(lambda: shows_new(served)), "the gateway shows a certificate by the new key"
        with pytest.raises(EnrolmentFailed, match="its certificate is not good"):
            renew(home(site), "north", site.address)
        assert refresh(home(site), "north", site.address)
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(address, site_context(site.keys))
    with pytest.raises(ProcessFailed, match=r"an issuing key .* counts no more"):
        old.refresh()
    assert is_orphaned(home(site))
    refused = ask(served.edge, site_context(site.keys), "GET", "/health")
    assert (refused.status, "an issuing key that was revoked" in refused.detail) == (403, True)
    Keeper(home(site), "north", site.address).look()
    assert health(served, site) == 200
    assert not is_orphaned(home(site))
    assert vouched(served.federation.authority, old_signer.certificate) is None
    assert vouched(served.federation.authority, signer(served.federation).certificate) is not None
    followed = read_roster(home(site))
    assert followed is not None
    assert followed.roster.epoch == 2, "its renewal, after epochs that are signed anew"
    assert followed.certificate == signer(served.federation).certificate.decode()


def test_a_running_node_starts_anew_though_the_revoked_keys_certificate_does_not_come_along(
    served: Served, tmp_path: Path
) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    tls, old = ClientTls(site.keys), load_credential(served.federation.issuing).certificate
    served.change(revoke=True)
    assert old in served.federation.authority
    (site.keys / LIST).write_bytes(served.federation.listed.read_bytes().replace(old, b""))
    with pytest.raises(ProcessFailed, match=r"an issuing key .* counts no more"):
        tls.refresh()


def test_a_running_node_goes_on_after_an_issuing_key_that_has_ended_is_left_out(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    tls, old = ClientTls(site.keys), load_credential(served.federation.issuing).certificate
    served.change()
    (site.keys / LIST).write_bytes(served.federation.listed.read_bytes().replace(old, b""))
    after = read_certificate(old).expires_at_s + 1
    monkeypatch.setattr("fedclient.tls.time", SimpleNamespace(time=lambda: after))
    tls.refresh()
    assert old not in tls.authority


@pytest.mark.parametrize("at", ["save_credential", "sign_rosters_anew", "renew_server", "open_log", "_forget_request"])
def test_an_install_that_was_killed_is_finished_by_the_same_answer(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    joined_site(served.edge, tmp_path, "north")
    answer = certify(open_root(served.stick, WORDS), request(served.federation), revoke=True)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"fedserver.root.{at}", killed)
        with pytest.raises(KeyboardInterrupt):
            install(served.federation, answer)
    (tmp_path / "answer").write_bytes(answer)
    told = call("install", str(tmp_path / "answer"), "--federation", str(served.federation.folder))
    assert "The keys before are revoked. Restart" in told
    authority, now = served.federation.authority, signer(served.federation).certificate
    assert vouched(authority, now) is not None
    rosters = [read_signed(content, "roster") for content in list_rosters(served.federation.state, 0, 9)[1]]
    assert [each.certificate.encode() for each in rosters] == [now]
    newest = authority_of(served.federation).certificate
    assert is_issued_by(load_credential(served.federation.server_certificate).certificate, newest)
    assert not list((served.federation.folder / "ca").glob("*.next"))
    with pytest.raises(StateInvalid, match="list 2 is in use already"):
        install(served.federation, answer)


def shows_new(served: Served) -> bool:
    shown = load_credential(served.federation.server_certificate).certificate
    return shows(served, trusting(served.federation.authority), shown)


def test_a_coordinator_that_was_rolled_back_is_refused_and_written_down(served: Served, tmp_path: Path) -> None:
    site, before = joined_site(served.edge, tmp_path, "north"), served.federation.authority
    served.change()
    assert refresh(home(site), "north", site.address)
    served.federation.listed.write_bytes(before.removeprefix(read_authority(before).root))
    for _ in range(3):
        with pytest.raises(StateInvalid, match="revocation list 1 is stale, list 2 was seen here before"):
            refresh(home(site), "north", site.address)
    lines = [line["facts"] for line in read_lines(home(site) / "audit.jsonl") if line["event"] == "authority-refused"]
    assert ["is stale" in line["why"] for line in lines] == [True], "once"
    with pytest.raises(StateInvalid, match="list 1 is in use already"):
        install(served.federation, json.dumps({"authority": before.decode(), "signer": ""}).encode())


def test_an_issuing_key_that_somebody_in_between_left_out_is_taken_up_from_the_same_list(
    served: Served, tmp_path: Path
) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    first = read_authority(served.federation.authority).issuers[0]
    served.change()
    whole = served.federation.authority
    served.federation.listed.write_bytes(before_newest(whole))
    assert refresh(home(site), "north", site.address)
    assert read_authority(read_files(site.keys)).issuers == (first,), "nothing shows that one is missing"
    served.federation.listed.write_bytes(whole.removeprefix(read_authority(whole).root))
    assert refresh(home(site), "north", site.address)
    assert read_files(site.keys) == whole
    assert not refresh(home(site), "north", site.address)
    answer = json.dumps({"authority": whole.decode(), "signer": ""}).encode()
    served.federation.listed.write_bytes(before_newest(whole))
    with pytest.raises(StateInvalid, match="list 2 is in use already"):
        install(served.federation, answer)


def before_newest(authority: bytes) -> bytes:
    """An authority without its root's certificate, as after `ca.pem`, and without its newest issuing key."""
    found = read_authority(authority)
    return authority.removeprefix(found.root).removesuffix(found.issuers[-1])


def test_an_invite_of_today_is_not_answered_by_a_list_of_yesterday(served: Served, tmp_path: Path) -> None:
    before = served.federation.authority
    served.change()
    word = invite(served.federation, "north")
    assert read_invite(word).listed == "2"
    served.federation.listed.write_bytes(before.removeprefix(read_authority(before).root))
    with pytest.raises(EnrolmentFailed, match="list 1, which is stale: the invite names 2"):
        join(word, tmp_path / "north")
    with pytest.raises(EnrolmentFailed, match="number of its list"):
        read_invite(write_invite(Invite("a:1", "0" * 64, "north", "0" * 32, "x")))


def test_a_list_that_has_ended_is_named_by_both_sides(served: Served, tmp_path: Path) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    unlocked, now = open_root(served.stick, WORDS), datetime.now(UTC)
    certificate = read_authority(unlocked.authority).root
    ended = revocation_list(
        certificate, unlocked.key, 9, frozenset(), now - timedelta(seconds=1), now - timedelta(days=1)
    )
    issuer = load_credential(served.federation.issuing).certificate
    assert newer(served.federation.authority, certificate + ended + issuer)
    for path in (site.keys / LIST, served.federation.listed):
        path.write_bytes(ended + issuer)
    with pytest.raises(EnrolmentFailed, match=r"revocation list 9 .* has ended on .*`fedserver ca renew`"):
        site_context(site.keys)
    with pytest.raises(StateInvalid, match="revocation list 9"):
        authority_of(served.federation)
    assert vouched(certificate + ended + issuer, signer(served.federation).certificate) is not None, "for old releases"


def test_the_gateway_lets_nobody_in_once_its_list_has_ended(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = joined_site(served.edge, tmp_path, "north")
    context = site_context(site.keys)
    after = read_authority(served.federation.authority).until_s + 1
    with monkeypatch.context() as patch:
        patch.setattr("shared_models.authority.time", SimpleNamespace(time=lambda: after))
        served.edge.gateway.admission.forget()
        for method, path in (("GET", "/health"), ("POST", "/renew")):
            refused = ask(served.edge, context, method, path)
            assert (refused.status, "revocation list 1" in refused.detail) == (403, True)
    served.edge.gateway.admission.forget()
    assert ask(served.edge, context, "GET", "/health").status == 200


def test_a_list_lasts_as_long_as_the_longest_of_the_keys_that_count(served: Served) -> None:
    def days(revoke: bool) -> float:
        answer = certify(open_root(served.stick, WORDS), request(served.federation, revoke), 10, revoke)
        found = install(served.federation, answer)
        return (found.until_s - datetime.now(UTC).timestamp()) / 86400

    assert days(False) == pytest.approx(180, abs=0.1), "the key before counts on"
    assert days(True) == pytest.approx(10, abs=0.1)


def test_lists_that_the_root_has_not_signed_are_refused(served: Served, tmp_path: Path) -> None:
    init_federation(tmp_path / "c", "C", "127.0.0.1:1", found=founding(tmp_path / "other", WORDS))
    mine, theirs = served.federation.authority, open_federation(tmp_path / "c").authority
    root_of_mine = read_authority(mine).root
    foreign = theirs.removeprefix(read_authority(theirs).root)
    for wrong in (root_of_mine + foreign, mine + foreign, mine[:-60], root_of_mine, b"", mine.replace(b"M", b"N", 40)):
        with pytest.raises(StateInvalid):
            read_authority(wrong)
    with pytest.raises(StateInvalid, match="is not the one that was pinned"):
        newer(mine, theirs)
    unlocked, now = open_root(served.stick, WORDS), datetime.now(UTC)
    other = issuer_certificate(root_of_mine, unlocked.key, request_issuer(pem_of_new()), 5)
    twin = revocation_list(root_of_mine, unlocked.key, 1, frozenset({7}), now + timedelta(days=3))
    with pytest.raises(StateInvalid, match="two revocation lists are number 1"):
        newer(mine, root_of_mine + twin + other)


def pem_of_new() -> bytes:
    return pem(ec.generate_private_key(ec.SECP384R1()))


# What is released


def test_a_run_is_released_and_the_release_names_the_root_and_opens_by_the_list_alone(
    served: Served, tmp_path: Path
) -> None:
    hospitals, federation = Hospitals(served.edge, tmp_path / "sites"), served.federation
    for name in ("north", "south"):
        hospitals.join(name, Policy(approval="inside-policy"))
    study = tiny_study(rounds={"count": 1, "quorum": 2, "deadline_s": 300, "gather_s": 0, "pause_s": 300})
    hospitals.run(study, "lung", weights=initial_weights(study))
    words = ["release", "lung", "--out", str(tmp_path), "--federation", str(federation.folder)]
    done = CliRunner().invoke(coordinator, words)
    assert done.exit_code == 0, done.output
    made, root = tmp_path / "tiny-lung-1", federation.ca_certificate.read_bytes()
    assert json.loads((made / "signature.json").read_bytes())["authority"].encode() == root
    assert open_release(made, Trust((federation.authority,))).manifest.origin.sites == {"north": 1, "south": 1}
    with pytest.raises(ReleaseInvalid, match="not the one trusted here"):
        open_release(made, Trust((root,)))
    checked = CliRunner().invoke(hospital, ["verify", str(made), "--site", str(hospitals.sites["north"])])
    assert checked.exit_code == 0, checked.output


# What people see


def test_the_coordinator_is_warned_before_the_issuing_key_ends_and_certificates_end_with_it(served: Served) -> None:
    assert lifecycle.warnings(served.federation) == []
    soon = datetime.now(UTC) + timedelta(days=160)
    told = lifecycle.warnings(served.federation, soon.timestamp())
    assert any(
        "The issuing key's certificate ends in 19 days. Bring the root key, and `fedserver ca renew" in t for t in told
    )
    install(served.federation, certify(open_root(served.stick, WORDS), request(served.federation), days=10))
    key = new_tls_key()
    site = issue_site(authority_of(served.federation), request_certificate("north", key), "north")
    assert read_certificate(site).expires_at_s < datetime.now(UTC).timestamp() + 10 * 86400
    with pytest.raises(StateInvalid, match="at most 398"):
        certify(open_root(served.stick, WORDS), request(served.federation), days=400)


def test_the_stick_may_stay_at_another_machine(served: Served, tmp_path: Path) -> None:
    words, asked, answer = tmp_path / "words", tmp_path / "asked", tmp_path / "answer"
    words.write_text(WORDS + "\n")
    at = ["--federation", str(served.federation.folder)]
    by = ["--root", str(served.stick), "--passphrase-file", str(words)]
    assert "bring it to the root key" in call("request", str(asked), *at)
    assert request(served.federation) != asked.read_bytes()  # a new signature, over the same keys
    assert b"PRIVATE" not in asked.read_bytes()
    assert "bring it to the coordinator" in call("certify", str(asked), str(answer), *by, "--days", "90")
    assert "stay so" in call("install", str(answer), *at)
    assert "certifies another key" in call("install", str(other_answer(served, asked)), *at, code=1)
    assert "The keys before are revoked. Restart" in call("renew", *by, "--revoke-old", *at)
    shown = json.loads(call("show", "--json", *at, "--out", str(tmp_path / "trust.pem")))
    assert (shown["offline"], shown["list"], len(shown["issuers"]), shown["revoked"]) == (True, 4, 1, 4)
    assert (tmp_path / "trust.pem").read_bytes() == served.federation.authority
    authority = read_certificate(served.federation.ca_certificate.read_bytes())
    assert fingerprint_words(authority.fingerprint) in call("show", *at)
    events = [line["facts"] for line in read_lines(served.federation.audit) if line["event"] == "authority"]
    assert events[-1]["revoked"] == 4
    open_log(served.federation)


@pytest.mark.parametrize("part", ["issuer", "signer"])
@pytest.mark.parametrize("spoilt", [lambda pem: "", lambda pem: pem[:200], lambda pem: pem.replace("M", "N", 40)])
def test_a_damaged_request_is_named_and_certifies_nothing(
    served: Served, tmp_path: Path, part: str, spoilt: Callable[[str], str]
) -> None:
    words, asked = tmp_path / "words", json.loads(request(served.federation))
    words.write_text(WORDS + "\n")
    (tmp_path / "asked").write_text(json.dumps(asked | {part: spoilt(asked[part])}))
    before = open_root(served.stick, WORDS).authority
    by = ["--root", str(served.stick), "--passphrase-file", str(words), "--revoke-old"]
    told = call("certify", str(tmp_path / "asked"), str(tmp_path / "answer"), *by, code=1)
    assert "is damaged, or not signed by its own key" in told
    assert open_root(served.stick, WORDS).authority == before


@pytest.mark.parametrize("by_hand", [False, True])
def test_keys_that_waited_when_the_coordinators_were_stolen_are_not_certified(
    served: Served, tmp_path: Path, by_hand: bool
) -> None:
    ca, words = served.federation.folder / "ca", tmp_path / "words"
    words.write_text(WORDS + "\n")
    at, by = ["--federation", str(served.federation.folder)], ["--root", str(served.stick)]
    by += ["--passphrase-file", str(words), "--revoke-old"]
    asked, answer = str(tmp_path / "asked"), str(tmp_path / "answer")
    call("request", asked, *at)
    stolen = {(ca / name).read_bytes() for name in ("issuing.next", "signer.next")}
    if by_hand:
        call("request", asked, "--anew", *at)
        call("certify", asked, answer, *by)
        call("install", answer, *at)
    else:
        call("renew", *by, *at)
    in_use = {load_credential(path).key for path in (served.federation.issuing, served.federation.signer)}
    assert len(stolen | in_use) == 4


def other_answer(served: Served, asked: Path) -> Path:
    """An answer to a request whose keys are not at the coordinator any more."""
    request(served.federation)
    path = asked.with_name("late")
    path.write_bytes(certify(open_root(served.stick, WORDS), asked.read_bytes()))
    return path


def call(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(coordinator, ["ca", *words])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def test_a_federation_whose_root_is_at_the_coordinator_is_as_it_was(tmp_path: Path) -> None:
    plain = init_federation(tmp_path / "f", "F", "127.0.0.1:1")
    assert not plain.offline
    assert read_invite(invite(plain, "north")).listed == ""
    assert plain.authority == plain.ca_certificate.read_bytes()
    with pytest.raises(StateInvalid, match="its root key is kept here"):
        install(plain, json.dumps({"authority": "", "signer": ""}).encode())
    assert "can keep it elsewhere" in call("show", "--federation", str(plain.folder))


def test_an_issuing_key_that_has_ended_vouches_for_nobody_though_it_is_on_the_list(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    certificate, key = new_root("T", 10)
    old, own = ec.generate_private_key(ec.SECP384R1()), pem_of_new()
    ended = issuer_certificate(certificate, key, request_issuer(pem(old)), 5, now - timedelta(days=6))
    current = issuer_certificate(certificate, key, request_issuer(own), 5)
    authority = (
        certificate + revocation_list(certificate, key, 1, frozenset(), now + timedelta(days=5)) + ended + current
    )
    leaf = x509.load_pem_x509_certificate(issue_server(Credential(current, own), ["127.0.0.1"]).certificate)
    forged = x509.CertificateBuilder().subject_name(leaf.subject).public_key(old.public_key())
    forged = forged.issuer_name(x509.load_pem_x509_certificate(ended).subject).serial_number(5)
    forged = forged.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    for extension in leaf.extensions:
        if not isinstance(extension.value, x509.SubjectKeyIdentifier | x509.AuthorityKeyIdentifier):
            forged = forged.add_extension(extension.value, extension.critical)
    shown = Credential(forged.sign(old, hashes.SHA384()).public_bytes(serialization.Encoding.PEM), pem(old))
    with posing(tmp_path, shown, ended) as address, pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(address, trusting(authority))
    with posing(tmp_path, issue_server(Credential(current, own), ["127.0.0.1"])) as address:
        assert handshake(address, trusting(authority)) == "TLSv1.3"
