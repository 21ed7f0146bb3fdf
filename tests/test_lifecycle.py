"""A certificate from its enrolment over renewals to its end, as both sides see it."""

import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fedclient import renewal as renewals
from fedclient import welcome
from fedclient.ask import TurnedAway
from fedclient.ask import ask as put
from fedclient.cli import app as hospital
from fedclient.enrol import Joined, join, rejoin
from fedclient.own_log import log_of
from fedclient.renewal import Keeper, certificate_of, check_keys, expiry_warning, fetch_roster, read_roster, renew
from fedclient.site import secret
from fedclient.welcome import await_welcome, refused_words, shut_out
from fedserver import gateway as gateways
from fedserver.admission import OVERLAP_S, refusal
from fedserver.cli import app as coordinator
from fedserver.doctor import examine
from fedserver.enrol import init_federation, invite, open_federation
from fedserver.lifecycle import renew as answer_renewal
from fedserver.lifecycle import renew_server, revoke, warnings
from fedserver.root import founding
from fedserver.root import request as request_issuing
from fedserver.state import CertificateRow, Site, find_site, list_certificates
from shared_models.dates import span_text
from shared_models.errors import EnrolmentFailed, ProcessFailed, StateInvalid
from shared_models.expiry import due, stage
from shared_models.files import read_lines
from shared_models.identity import (
    Certificate,
    Credential,
    identity_public_key,
    issue_site,
    load_credential,
    load_secret,
    new_authority,
    new_identity_key,
    new_site_keys,
    new_tls_key,
    public_digest,
    read_certificate,
    request_certificate,
    save_credential,
    save_secret,
    sign,
)
from shared_models.invite import (
    RENEWAL,
    SUCCESSION,
    JoinAnswer,
    RenewRequest,
    read_invite,
    read_message,
    statement,
    write_message,
)
from shared_models.roster import FIRST
from shared_models.supervise import kept_secret
from shared_models.transfer import connect, site_context
from tests.edge import Edge, ask, joined_site, node_headers, running_edge

DAY = 86400.0
PULL = "/v1/fleet/pull-messages"


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge") / "federation") as edge:
        yield edge


def name_for(tmp_path: Path) -> str:
    """A site of its own for each test, in one federation."""
    return f"s{abs(hash(tmp_path)) % 10**9}"


@pytest.fixture
def site(edge: Edge, tmp_path: Path) -> Joined:
    return joined_site(edge, tmp_path, name_for(tmp_path))


def home(site: Joined) -> Path:
    return site.keys.parent


def asked_by(site: Joined, key: bytes, identity: bytes | None = None, name: str | None = None) -> bytes:
    request = RenewRequest(name or site.site, request_certificate(name or site.site, key).decode())
    signature = sign(identity or load_secret(site.keys / "identity.key"), RENEWAL, statement(request))
    return write_message(replace(request, signature=signature.hex()))


def await_true(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


# Renewal


def test_a_renewed_site_keeps_its_keys_and_both_certificates_are_let_in(edge: Edge, site: Joined) -> None:
    old, before = site_context(site.keys), load_credential(site.keys / "tls.pem")
    others = {name: (site.keys / name).read_bytes() for name in ("node.key", "identity.key", "ca.pem")}
    facts = renew(home(site), site.site, site.address)
    after = load_credential(site.keys / "tls.pem")
    assert after.key != before.key
    assert facts.serial == certificate_of(home(site)).serial != read_certificate(before.certificate).serial
    assert {name: (site.keys / name).read_bytes() for name in others} == others
    assert sorted(path.name for path in site.keys.iterdir()) == ["ca.pem", "identity.key", "node.key", "tls.pem"]
    assert (site.keys / "tls.pem").stat().st_mode & 0o777 == 0o600
    stored = find_site(edge.federation.state, site.site)
    assert stored is not None
    assert (stored.certificate_serial, stored.certificate_fingerprint) == (facts.serial, facts.fingerprint)
    headers = node_headers(site)
    late = ask(edge, old, "POST", PULL, b"", headers)
    fresh = ask(edge, site_context(site.keys), "POST", PULL, b"", headers)
    assert (late.status, late.headers.get("connection")) == (200, "close"), "so that the new one is shown next"
    assert (fresh.status, fresh.headers.get("connection")) == (200, None)


def test_a_renewal_whose_answer_was_lost_gives_the_same_certificate_again(edge: Edge, site: Joined) -> None:
    stored = find_site(edge.federation.state, site.site)
    assert stored is not None
    body = asked_by(site, new_tls_key())
    first, again = (answer_renewal(edge.federation, stored, body) for _ in range(2))
    assert (first.status, first.content) == (200, again.content)
    assert len(list_certificates(edge.federation.state, site.site)) == 2
    renewed = read_message(JoinAnswer, first.content, "answer")
    assert read_certificate(renewed.certificate.encode()).name == site.site
    assert (
        answer_renewal(edge.federation, stored, asked_by(site, load_credential(site.keys / "tls.pem").key)).status
        == 400
    )


def test_a_new_identity_key_takes_over_from_the_old_one_and_its_epoch_is_on_the_roster(
    edge: Edge, site: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = load_secret(site.keys / "identity.key")
    epoch = fetch_roster(home(site), site.address).roster.epoch
    first = log_of(home(site), site.site)
    first.add("tried")
    renew(home(site), site.site, site.address, identity=True)
    new = load_secret(site.keys / "identity.key")
    assert new != old
    roster = fetch_roster(home(site), site.address).roster
    assert (roster.epoch, roster.sites[site.site]) == (epoch + 1, identity_public_key(new).hex())
    opened = read_lines(log_of(home(site), site.site).path) if log_of(home(site), site.site).add("tried again") else []
    assert (opened[0]["event"], opened[0]["facts"]["before"]) == ("opened", first.log)
    assert answer_renewal(edge.federation, state_of(edge, site), asked_by(site, new_tls_key(), old)).status == 403
    assert answer_renewal(edge.federation, state_of(edge, site), asked_by(site, new_tls_key(), new)).status == 200

    def lost(*words: object, **named: object) -> bytes:
        answer = put(*words, **named)  # type: ignore[arg-type]
        if words[3] == "/renew":
            raise EnrolmentFailed("the answer was lost")
        return answer

    monkeypatch.setattr(renewals, "ask", lost)
    with pytest.raises(EnrolmentFailed, match="was lost"):
        renew(home(site), site.site, site.address, identity=True)
    monkeypatch.undo()
    assert load_secret(site.keys / "identity.key") == new, "nobody here knows yet whether it counts"
    Keeper(home(site), site.site, site.address).look()
    assert (
        fetch_roster(home(site), site.address).roster.sites[site.site]
        == identity_public_key(load_secret(site.keys / "identity.key")).hex()
    )
    assert not (site.keys / "identity.next").exists()
    save_secret(site.keys / "identity.next", new_site_keys().identity)  # of a renewal that never got there
    renew(home(site), site.site, site.address)
    assert not (site.keys / "identity.next").exists()


def test_a_running_node_lets_a_renewal_by_hand_end_before_it_looks(
    edge: Edge, site: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[threading.Thread] = []

    def slow(*words: object, **named: object) -> bytes:
        if words[3] == "/renew":  # the coordinator does not know the new key yet
            looks.append(threading.Thread(target=Keeper(home(site), site.site, site.address).look))
            looks[-1].start()
            looks[-1].join(0.5)
        return put(*words, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(renewals, "ask", slow)
    old = load_secret(site.keys / "identity.key")
    renew(home(site), site.site, site.address, identity=True)
    looks[0].join(20)
    new = load_secret(site.keys / "identity.key")
    assert new != old
    assert fetch_roster(home(site), site.address).roster.sites[site.site] == identity_public_key(new).hex()


def test_an_identity_key_is_handed_over_by_both_and_is_nobody_elses(edge: Edge, site: Joined, tmp_path: Path) -> None:
    other = joined_site(edge, tmp_path / "other", name_for(tmp_path / "other"))
    mine, theirs, fresh = (load_secret(site.keys / "identity.key"), load_secret(other.keys / "identity.key"),
                           new_site_keys().identity)  # fmt: skip
    for key, signer, by, status in (
        (fresh, theirs, mine, 400), (fresh, fresh, fresh, 403), (theirs, theirs, mine, 400), (mine, mine, mine, 400),
        (fresh, fresh, mine, 200),
    ):  # fmt: skip
        request = RenewRequest(
            site.site, request_certificate(site.site, new_tls_key()).decode(),
            identity_public_key=identity_public_key(key).hex(),
        )  # fmt: skip
        taken, given = sign(signer, SUCCESSION, statement(request)), sign(by, RENEWAL, statement(request))
        body = write_message(replace(request, signature=given.hex(), identity_signature=taken.hex()))
        assert answer_renewal(edge.federation, state_of(edge, site), body).status == status
    assert state_of(edge, site).identity_public_key == identity_public_key(fresh).hex()


def state_of(edge: Edge, site: Joined) -> Site:
    found = find_site(edge.federation.state, site.site)
    assert found is not None
    return found


def test_a_renewal_needs_the_identity_key_and_is_for_oneself(edge: Edge, site: Joined) -> None:
    stored = find_site(edge.federation.state, site.site)
    assert stored is not None
    key, stranger = new_tls_key(), new_site_keys().identity
    for body, status, why in [
        (asked_by(site, key, identity=stranger), 403, b"not signed by this site's identity"),
        (asked_by(site, key, name="another"), 403, b"was asked for by"),
        (asked_by(site, key).replace(b'"signature":"', b'"signature":"xy'), 400, b"not hexadecimal"),
        (b"{}", 400, b"is missing"),
    ]:
        reply = answer_renewal(edge.federation, stored, body)
        assert (reply.status, why in reply.content) == (status, True), reply.content
    assert len(list_certificates(edge.federation.state, site.site)) == 1


def test_a_renewal_under_way_gets_nothing_once_the_site_has_joined_anew_under_other_keys(
    edge: Edge, site: Joined
) -> None:
    """As of who has the keys that the site lost: let in a moment before the site came back."""
    let_in, request = find_site(edge.federation.state, site.site), asked_by(site, new_tls_key())
    assert let_in is not None
    rejoin(invite(edge.federation, site.site), home(site), site.site, site.address)
    back = find_site(edge.federation.state, site.site)
    reply = answer_renewal(edge.federation, let_in, request)
    assert reply.status == 400
    assert "not active in this federation with these keys" in reply.content.decode()
    assert find_site(edge.federation.state, site.site) == back


def test_a_key_left_by_a_process_that_was_killed_is_used_or_thrown_away(edge: Edge, site: Joined) -> None:
    save = site.keys / "tls.next"
    save.write_bytes(new_tls_key())
    save.chmod(0o600)
    waiting = load_secret(save)
    renew(home(site), site.site, site.address)
    assert load_credential(site.keys / "tls.pem").key == waiting, "killed before it asked: the same key is asked for"
    save.write_bytes(waiting)
    save.chmod(0o600)
    renew(home(site), site.site, site.address)
    assert load_credential(site.keys / "tls.pem").key != waiting, "killed after it stored: a new one"


def test_a_running_node_renews_when_a_third_is_left_and_fetches_the_roster(
    edge: Edge, site: Joined, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, now = certificate_of(home(site)), time.time()
    keeper = Keeper(home(site), site.site, site.address, clock=lambda: now + 59 * DAY)
    keeper.look()
    assert certificate_of(home(site)).serial == first.serial
    keeper = Keeper(home(site), site.site, site.address, clock=lambda: now + 61 * DAY)
    keeper.look()
    assert certificate_of(home(site)).serial != first.serial
    assert "renewed this site's certificate" in caplog.text
    known = read_roster(home(site))
    assert known is not None
    assert known.roster.certificates[site.site] == certificate_of(home(site)).fingerprint
    stop = threading.Event()
    stop.set()
    keeper.run(stop)  # returns


# Expiry


def lasting(days: float, left_s: float, now: float) -> Certificate:
    since = now + left_s - days * DAY - 600.0  # a certificate begins ten minutes before it is signed
    return Certificate("north", "1f", "ab", "cd", since, now + left_s)


def test_warnings_come_at_thirty_seven_and_one_days_and_renewal_at_a_third() -> None:
    now = 1_700_000_000.0
    for left_days, found in [(31, 0), (29, 1), (8, 1), (6, 2), (1.1, 2), (0.9, 3), (0, 4), (-1, 4)]:
        assert stage(lasting(90, left_days * DAY, now), now) == found, left_days
    assert [due(lasting(90, d * DAY, now), now) for d in (30.1, 29.9)] == [False, True]
    assert stage(lasting(6, 2.1 * DAY, now), now) == 0, "a short one is no reason to warn from its first day"
    assert [span_text(s) for s in (29.9 * DAY, 86400, 86399, 61, 1, 0.5)] == [
        "29 days", "1 day", "23 hours", "1 minute", "1 second", "less than a second"
    ]  # fmt: skip


def test_both_sides_warn_of_a_certificate_that_ends_and_say_how_to_mend_it(edge: Edge, site: Joined) -> None:
    now = time.time()
    assert expiry_warning(home(site), now) is None
    soon, over = expiry_warning(home(site), now + 84 * DAY), expiry_warning(home(site), now + 91 * DAY)
    assert soon is not None
    assert over is not None
    assert all(words in soon for words in ("ends in 5 days", "fedclient renew"))
    assert all(words in over for words in ("has expired on", "fedclient rejoin INVITE"))
    theirs = [w for w in warnings(edge.federation, now + 91 * DAY) if w.startswith(site.site)]
    assert len(theirs) == 1
    assert f"`fedserver invite {site.site}`" in theirs[0]
    assert any("coordinator's certificate ends" in w for w in warnings(edge.federation, now + 391 * DAY))


def test_an_expired_site_is_told_before_it_connects_and_comes_back_with_an_invite(
    edge: Edge, site: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Credential(edge.federation.ca_certificate.read_bytes(), edge.federation.ca_key.read_bytes())
    key, long_ago = load_credential(site.keys / "tls.pem").key, datetime.now(UTC) - timedelta(days=91)
    expired = issue_site(authority, request_certificate(site.site, key), site.site, long_ago)
    save_credential(site.keys / "tls.pem", Credential(expired, key))
    monkeypatch.setattr(welcome, "HOLD_S", 0.0)
    with pytest.raises(ProcessFailed, match=r"has expired on .*fedclient rejoin INVITE"):
        await_welcome(home(site), site.address)
    assert "has expired" in str(refused_words(home(site)))
    with pytest.raises(EnrolmentFailed, match="has expired"):
        renew(home(site), site.site, site.address)
    node_key = (site.keys / "node.key").read_bytes()
    rejoin(invite(edge.federation, site.site), home(site), site.site, site.address)
    await_welcome(home(site), site.address)
    assert refused_words(home(site)) is None
    assert (site.keys / "node.key").read_bytes() != node_key
    assert len(list(home(site).glob("keys.*"))) == 1, "the old keys are put aside"


class Ahead(datetime):
    """A clock that runs 270 days ahead."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "Ahead":
        return cls.fromtimestamp(time.time() + 270 * DAY, tz)


def test_a_coordinator_whose_clock_ran_ahead_for_a_moment_does_not_keep_the_certificate_of_that_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = init_federation(tmp_path / "federation", "Test", "localhost:8443")
    with monkeypatch.context() as ahead:
        ahead.setattr("shared_models.identity.datetime", Ahead)
        assert renew_server(federation, now_s=time.time() + 270 * DAY)
    told = warnings(federation)
    assert len(told) == 1
    assert told[0].startswith("The coordinator's certificate begins only on ")
    found = next(line for line in examine(federation.folder) if line.check == "certificates")
    assert (found.state, "`fedserver renew`" in found.mend) == ("fail", True)
    assert renew_server(federation)
    assert warnings(federation) == []
    assert not renew_server(federation)


def test_a_site_does_not_take_a_certificate_of_a_coordinators_clock_that_is_ahead(
    edge: Edge, site: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, now = certificate_of(home(site)), time.time()
    with monkeypatch.context() as ahead:
        ahead.setattr("shared_models.identity.datetime", Ahead)
        with pytest.raises(EnrolmentFailed, match=r"begins only on .* Its clock is ahead, or this one is behind"):
            renew(home(site), site.site, site.address)
    assert certificate_of(home(site)) == before, "it still counts"
    told = [words for words in warnings(edge.federation) if words.startswith(site.site)]
    assert len(told) == 1
    assert "begins only on" in told[0]
    assert f"`fedserver invite {site.site}`" in told[0]
    assert renew(home(site), site.site, site.address).since_s < now
    assert not [words for words in warnings(edge.federation) if words.startswith(site.site)]
    mine = str(expiry_warning(home(site), before.since_s - DAY))
    assert all(words in mine for words in ("begins only on", "this one is behind", "fedclient rejoin INVITE"))


PEM = issue_site(new_authority("Test"), request_certificate("north", new_tls_key()), "north").decode()


def row(serial: str, used_at: float | None = None, ended: str = "") -> CertificateRow:
    return CertificateRow(serial, "north", PEM, 0.0, 9e9, used_at, ended, 1000.0)  # type: ignore[arg-type]


def test_an_older_certificate_counts_until_a_newer_one_was_seen_for_a_day() -> None:
    active, shown = Site("north", "active"), Certificate("north", "a", public_digest(PEM.encode()), "", 0.0, 9e9)
    now = 10 * DAY
    assert refusal(active, [row("a")], shown, now) is None
    assert refusal(active, [row("a"), row("b")], shown, now) is None, "its answer may have been lost"
    assert refusal(active, [row("a"), row("b", now - OVERLAP_S + 1)], shown, now) is None
    assert "newer one" in str(refusal(active, [row("a"), row("b", now - OVERLAP_S - 1)], shown, now))
    assert "newer one" in str(refusal(active, [row("a", ended="replaced")], shown, now))
    assert refusal(active, [row("a"), row("b", 0.0, "replaced")], shown, now) is None, "one that counts no more"
    assert "was revoked on 1970-01-01 00:16 UTC. Ask the coordinator." in str(
        refusal(active, [row("a", ended="revoked"), row("b")], shown, now)
    )
    assert "has expired on" in str(refusal(active, [row("a")], replace(shown, expires_at_s=now), now))
    assert "not active" in str(refusal(Site("north", "invited"), [row("a")], shown, now))
    assert "not active" in str(refusal(active, [row("b")], shown, now))
    forged = replace(shown, fingerprint="f" * 64)
    assert "not active" in str(refusal(active, [row("a")], forged, now)), "of the same number, by a stolen issuing key"


# Revocation


def test_a_revoked_site_hears_it_waits_and_comes_back_under_new_keys_only(
    edge: Edge, site: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = load_credential(site.keys / "tls.pem")
    revoke(edge.federation, site.site, "its contract\nhas ended")
    await_true(lambda: "was revoked on" in str(shut_out(home(site), site.address)))
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        monkeypatch.setattr(welcome, "HOLD_S", 0.0)
        if len(waited) == 3:
            (site.keys / "tls.pem").touch()

    with pytest.raises(ProcessFailed, match="Ask the coordinator"):
        await_welcome(home(site), site.address, sleep)
    assert waited == [1.0, 1.0, 1.0], "until it got another certificate"
    with pytest.raises(TurnedAway, match="was revoked on"):
        renew(home(site), site.site, site.address)
    Keeper(home(site), site.site, site.address).look()
    assert "was revoked on" in str(refused_words(home(site)))
    rejoin(invite(edge.federation, site.site), home(site), site.site, site.address)
    assert shut_out(home(site), site.address) is None
    save_credential(site.keys / "old.pem", old)
    context = ssl.create_default_context(cafile=str(site.keys / "ca.pem"))
    context.load_cert_chain(site.keys / "old.pem")
    assert "was revoked on" in ask(edge, context, "GET", "/health").detail, "the old certificate stays what it is"


def test_a_reason_is_asked_for_and_an_unknown_site_is_named(edge: Edge) -> None:
    with pytest.raises(StateInvalid, match="Give one with --reason"):
        revoke(edge.federation, "north", " \n")
    with pytest.raises(StateInvalid, match="'nowhere': is not of this federation"):
        revoke(edge.federation, "nowhere", "x")


def test_an_invite_to_another_name_or_place_does_not_touch_the_keys(edge: Edge, site: Joined) -> None:
    before = (site.keys / "tls.pem").read_bytes()
    with pytest.raises(EnrolmentFailed, match="Join in another folder"):
        rejoin(invite(edge.federation, "elsewhere"), home(site), site.site, site.address)
    assert (site.keys / "tls.pem").read_bytes() == before


# The roster


def test_each_change_makes_an_epoch_that_sites_follow_and_a_rollback_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "MOST_EPOCHS", 3)
    with running_edge(tmp_path / "federation") as edge:
        north, _ = (joined_site(edge, tmp_path, name) for name in ("north", "south"))
        known = fetch_roster(home(north), north.address).roster
        assert (known.epoch, sorted(known.sites)) == (2, ["north", "south"])
        renew(home(north), "north", north.address)
        revoke(edge.federation, "south", "test")
        for number in range(4):  # more epochs than one answer holds
            renew_by_hand(edge, north, number)
        newest = fetch_roster(home(north), north.address).roster
        assert (newest.epoch, sorted(newest.sites)) == (8, ["north"])
        assert newest.previous_sha256 != FIRST
        kept = (home(north) / "roster.json").read_bytes()
        rolled_back(edge, 7)
        with pytest.raises(StateInvalid, match="at epoch 7, this site has seen 8"):
            fetch_roster(home(north), north.address)
        assert (home(north) / "roster.json").read_bytes() == kept


def test_an_answer_that_comes_late_does_not_put_the_roster_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_edge(tmp_path / "federation") as edge:
        north, _ = (joined_site(edge, tmp_path, name) for name in ("north", "south"))
        asked: list[int] = []

        def slow(*given: Any, **named: Any) -> Any:
            content = put(*given, **named)
            asked.append(1)
            if len(asked) == 1:  # while this answer is on its way, another process of the site hears the next epoch
                revoke(edge.federation, "south", "test")
                assert fetch_roster(home(north), north.address).roster.epoch == 3
            return content

        monkeypatch.setattr(renewals, "ask", slow)
        assert fetch_roster(home(north), north.address).roster.epoch == 3
        known = read_roster(home(north))
        assert known is not None
        assert known.roster.epoch == 3


def renew_by_hand(edge: Edge, site: Joined, number: int) -> None:
    stored = find_site(edge.federation.state, site.site)
    assert stored is not None
    assert answer_renewal(edge.federation, stored, asked_by(site, new_tls_key())).status == 200, number


def rolled_back(edge: Edge, newest: int) -> None:
    from shared_models.database import writing

    with writing(edge.federation.state) as db:
        db.execute("DELETE FROM rosters WHERE epoch > ?", (newest,))


# The coordinator's own certificate, keys and secrets


def test_the_coordinators_certificate_is_renewed_while_it_serves_and_sites_notice_nothing(
    edge: Edge, site: Joined
) -> None:
    def shown() -> str:
        with closing(connect(edge.address, site_context(site.keys), 10)) as connection:
            connection.connect()
            der = connection.sock.getpeercert(True)
            assert der
            return read_certificate(der).serial

    before = shown()
    assert not renew_server(edge.federation)
    assert renew_server(edge.federation, now_s=time.time() + 270 * DAY)
    await_true(lambda: shown() != before)
    assert ask(edge, site_context(site.keys), "GET", "/health").status == 200


def test_every_file_with_a_key_or_secret_is_its_owners_alone_or_nothing_starts(
    edge: Edge, site: Joined, tmp_path: Path
) -> None:
    kept_secret(home(site) / "secrets/superexec")
    secret(home(site) / "secrets/case-keys")
    save_secret(site.keys / "tls.next", new_tls_key())
    save_secret(site.keys / "identity.next", new_identity_key())
    mine = hidden(home(site))
    assert {path.name for path in mine} == {
        "tls.pem", "node.key", "identity.key", "tls.next", "identity.next", "superexec", "case-keys"
    }  # fmt: skip
    only_private(mine, lambda: check_keys(home(site)))
    theirs = hidden(edge.federation.folder)
    assert {path.name for path in theirs} == {
        "ca.key", "signer.pem", "server.pem", "loopback.pem", "superexec", "control"
    }  # fmt: skip
    only_private(theirs, lambda: open_federation(edge.federation.folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedserver.passphrase.SCRYPT_N", 2**10)
        offline = init_federation(tmp_path / "f", "F", "a:1", found=founding(tmp_path / "stick", "correct horse"))
    request_issuing(offline)
    kept = hidden(offline.folder)
    assert {path.name for path in kept} == {
        "issuing.pem", "issuing.next", "signer.pem", "signer.next", "server.pem", "loopback.pem", "superexec", "control"
    }  # fmt: skip
    only_private(kept, lambda: open_federation(offline.folder))
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "stick").iterdir()} == {0o600}


def hidden(folder: Path) -> list[Path]:
    """Every file of a folder that holds a private key or a shared secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if b"PRIVATE KEY" in path.read_bytes() or path.parent.name == "secrets"]


def only_private(paths: list[Path], start: Callable[[], object]) -> None:
    start()
    for path in paths:
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o640)
        with pytest.raises(StateInvalid, match=rf"{path.name}: others may read it .*chmod 600"):
            start()
        path.chmod(0o600)
    start()


def test_no_key_or_token_is_logged_or_shown_in_an_enrolment_renewal_and_revocation(
    edge: Edge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    word = invite(edge.federation, name_for(tmp_path))
    site = join(word, tmp_path / "site")
    secrets = bodies(site)
    renew(home(site), site.site, site.address)
    secrets |= bodies(site) | {word, read_invite(word).token}
    revoke(edge.federation, site.site, "test")
    with pytest.raises(EnrolmentFailed):
        join(word, tmp_path / "again")
    with pytest.raises(TurnedAway):
        await_true(lambda: renew(home(site), site.site, site.address) is None)
    shown = caplog.text + repr((site, edge.gateway, load_credential(site.keys / "tls.pem"), read_invite(word)))
    assert len(secrets) >= 8
    assert "renewal by site" in shown
    assert not [secret for secret in secrets if secret in shown]


def bodies(site: Joined) -> set[str]:
    """The lines of a site's private keys."""
    private = [
        (site.keys / n).read_text().partition("-----BEGIN CERT")[0] for n in ("tls.pem", "node.key", "identity.key")
    ]
    private[0] = "\n".join(private[0].splitlines()[:3])
    return {line for text in private for line in text.splitlines() if len(line) > 40 and not line.startswith("---")}


# Commands


def call(app: typer.Typer, *words: object, stdin: str = "") -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


def test_the_commands_of_a_certificates_life_say_what_they_did(edge: Edge, tmp_path: Path) -> None:
    name, here, there = name_for(tmp_path), ("--federation", edge.federation.folder), ("--site", tmp_path / "site")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/0.nii").touch()
    (tmp_path / "data/manifest.csv").write_text("patient_id,image,mask,split\np0,0.nii,,train\n")
    word = call(coordinator, "invite", name, *here)
    call(hospital, "join", "-", "--data", tmp_path / "data", *there, stdin=word)
    assert "the new certificate is good until" in call(hospital, "renew", *there)
    assert "certificate good until" in call(hospital, "status", *there)
    assert "was revoked on" in call(coordinator, "revoke", name, "--reason", "a contract [2026] ended", *here)
    told = next(s for s in json.loads(call(coordinator, "status", "--json", *here))["sites"] if s["name"] == name)
    assert (told["state"], told["revoked_reason"]) == ("revoked", "a contract [2026] ended")
    assert told["reason"].endswith("UTC: a contract [2026] ended")
    assert "good until" in call(coordinator, "renew", *here)
    word = call(coordinator, "invite", name, *here)
    assert "again, with new keys" in call(hospital, "rejoin", "-", *there, stdin=word)
    status = json.loads(call(hospital, "status", "--json", *there))
    assert status["certificate_expires_at"] == pytest.approx(time.time() + 90 * DAY, abs=120)
    assert status["warnings"] == []


def test_the_life_of_certificates_is_the_coordinators_choice_within_bounds(tmp_path: Path) -> None:
    federation, there = tmp_path / "federation", ("--federation", tmp_path / "federation")
    call(coordinator, "init", "--address", "localhost:8443", "--certificate-days", "7", *there)
    assert open_federation(federation).certificate_days == 7.0
    for days in ("0", "399"):
        words = ["init", "--address", "localhost:8443", "--certificate-days", days, "--federation", str(tmp_path / "x")]
        refused = CliRunner().invoke(coordinator, words)
        assert refused.exit_code == 1
        assert "at most 398" in refused.stderr
    toml = federation / "federation.toml"
    toml.write_text(toml.read_text().replace("7.0", "399.0"))
    with pytest.raises(StateInvalid, match="certificate_days is 399; allowed: above 0"):
        open_federation(federation)
