"""From an invite to a certificate: once, for the right site and keys, and again when an answer was lost."""

import base64
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedclient import enrol as joining
from fedclient.ask import ask as put
from fedclient.enrol import join
from fedserver import admission
from fedserver import enrol as coordinator
from fedserver.enrol import INVITE_S, Federation, Reply, enrol, init_federation, invite, open_federation
from fedserver.lifecycle import revoke
from fedserver.state import find_site, list_certificates, redeem_invite, used_certificate
from shared_models.errors import EnrolmentFailed, ProcessFailed, StateInvalid
from shared_models.files import read_lines
from shared_models.identity import (
    Certificate,
    SiteKeys,
    fingerprint_words,
    identity_public_key,
    new_site_keys,
    node_public_key,
    read_certificate,
    request_certificate,
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
    write_invite,
    write_message,
)
from shared_models.transfer import site_context
from tests.edge import ask, joined_site, running_edge, stranger_context

KEYS = new_site_keys()
OTHER = new_site_keys()


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return init_federation(tmp_path / "federation", "Test federation", "localhost:8443")


def accept(public_key: bytes, site: str) -> None:
    return None


def request_for(word: str, keys: SiteKeys = KEYS) -> JoinRequest:
    asked = read_invite(word)
    request = JoinRequest(
        site=asked.site,
        token=asked.token,
        request=request_certificate(asked.site, keys.tls).decode(),
        node_public_key=node_public_key(keys.node).decode(),
        identity_public_key=identity_public_key(keys.identity).hex(),
    )
    return signed(request, keys)


def signed(request: JoinRequest, keys: SiteKeys = KEYS) -> JoinRequest:
    return replace(request, signature=sign(keys.identity, PURPOSE, statement(request)).hex())


def refusal(federation: Federation, request: JoinRequest | bytes) -> tuple[int, str]:
    content = request if isinstance(request, bytes) else write_message(request)
    reply = enrol(federation, content, accept)
    return reply.status, str(json.loads(reply.content).get("detail"))


# Founding


def test_a_federation_is_founded_for_its_owner_alone_and_opened_again(tmp_path: Path) -> None:
    made = init_federation(tmp_path / "federation", "Lung network", "fed.example.org:8443")
    assert open_federation(tmp_path / "federation") == made
    assert (made.name, made.address, made.max_blob_bytes) == ("Lung network", "fed.example.org:8443", 2 << 30)
    for path in [made.folder, *made.folder.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert [path.name for path in tmp_path.iterdir()] == ["federation"]


def test_a_folder_in_use_a_bad_name_or_address_founds_nothing(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(StateInvalid, match="is not empty"):
        init_federation(tmp_path / "full", "x", "h:1")
    with pytest.raises(StateInvalid, match="federation name"):
        init_federation(tmp_path / "new", 'x"\n', "h:1")
    with pytest.raises(EnrolmentFailed, match="host:port"):
        init_federation(tmp_path / "new", "x", "h")
    assert not (tmp_path / "new").exists()


def test_a_federation_that_lacks_or_exposes_something_is_not_opened(federation: Federation) -> None:
    federation.ca_key.chmod(0o644)
    with pytest.raises(StateInvalid, match="chmod 600"):
        open_federation(federation.folder)
    federation.ca_key.chmod(0o600)
    toml = federation.folder / "federation.toml"
    toml.write_text(toml.read_text() + "extra = 1\n")
    with pytest.raises(StateInvalid, match="extra: expected exactly"):
        open_federation(federation.folder)
    toml.write_text(toml.read_text().replace("extra = 1\n", "").replace(str(2 << 30), "0"))
    with pytest.raises(StateInvalid, match="allowed: above 0"):
        open_federation(federation.folder)
    shutil.rmtree(federation.folder)
    with pytest.raises(StateInvalid, match="fedserver init"):
        open_federation(federation.folder)


# Enrolment, as the coordinator sees it


def test_a_site_enrols_once_and_is_active(federation: Federation) -> None:
    word = invite(federation, "north")
    registered: list[tuple[bytes, str]] = []

    def register(public_key: bytes, site: str) -> int:
        registered.append((public_key, site))
        return 7

    reply = enrol(federation, write_message(request_for(word)), register)
    assert reply.status == 200
    answer = read_message(JoinAnswer, reply.content, "answer")
    facts = read_certificate(answer.certificate.encode())
    assert (answer.site, answer.federation, facts.name) == ("north", "Test federation", "north")
    site = find_site(federation.state, "north")
    assert site is not None
    assert (site.state, site.certificate_serial, site.flower_node_id) == ("active", facts.serial, 7)
    assert site.identity_public_key == identity_public_key(KEYS.identity).hex()
    assert registered == [(node_public_key(KEYS.node), "north")]
    assert refusal(federation, request_for(word, OTHER)) == (
        409,
        "invite of 'north': was used already. Ask the coordinator for a new one.",
    )


def test_a_request_whose_answer_was_lost_gets_the_same_certificate_again_and_nobody_else_does(
    federation: Federation,
) -> None:
    good = request_for(invite(federation, "north"))
    lock = federation.folder / "audit.lock"
    lock.unlink()
    lock.mkdir()  # nothing can be written in the log, as on a full disk
    with pytest.raises(OSError, match="Is a directory"):
        enrol(federation, write_message(good), accept)
    lock.rmdir()
    first, again = (enrol(federation, write_message(good), accept) for _ in range(2))
    assert (first.status, first.content) == (200, again.content)
    (row,), site = list_certificates(federation.state, "north"), find_site(federation.state, "north")
    assert read_message(JoinAnswer, first.content, "answer").certificate == row.pem
    assert site is not None
    told = [line["facts"]["certificate"] for line in read_lines(federation.audit) if line["event"] == "enrolled"]
    assert told == [site.certificate_fingerprint], "once, though its first writer failed"
    for asked in (
        signed(replace(request_for(invite(federation, "south"), OTHER), site="north", token=good.token), OTHER),
        signed(replace(good, request=request_certificate("north", OTHER.tls).decode())),
        signed(replace(good, node_public_key=node_public_key(OTHER.node).decode())),
        signed(replace(good, identity_public_key=identity_public_key(OTHER.identity).hex()), OTHER),
        replace(good, signature="00" * 64),
    ):
        status, why = refusal(federation, asked)
        assert (status, "was used already" in why) == (409, True)
    revoke(federation, "north", "test")
    assert refusal(federation, good)[0] == 409


def test_the_same_request_twice_at_once_is_answered_twice_and_logged_once(federation: Federation) -> None:
    content = write_message(request_for(invite(federation, "north")))
    quicker: list[Reply] = []

    def overtaken(public_key: bytes, site: str) -> None:
        quicker.append(enrol(federation, content, accept))

    slower = enrol(federation, content, overtaken)
    assert (slower.status, [slower]) == (200, quicker)
    assert [line["event"] for line in read_lines(federation.audit)].count("enrolled") == 1


def test_who_comes_second_with_other_keys_is_refused(federation: Federation) -> None:
    word = invite(federation, "north")

    def overtaken(public_key: bytes, site: str) -> None:
        assert enrol(federation, write_message(request_for(word)), accept).status == 200

    late = enrol(federation, write_message(request_for(word, OTHER)), overtaken)
    assert (late.status, b"was used a moment ago" in late.content) == (409, True)


def test_only_the_digest_of_a_token_is_kept(federation: Federation) -> None:
    token = read_invite(invite(federation, "north")).token
    for path in federation.folder.rglob("*"):
        assert path.is_dir() or token.encode() not in path.read_bytes()
    assert token not in repr(read_invite(invite(federation, "north")))


def test_an_expired_invite_is_refused(federation: Federation) -> None:
    word = invite(federation, "north", now_s=1000.0)
    content = write_message(request_for(word))
    late = enrol(federation, content, accept, now_s=1000.0 + INVITE_S)
    assert late.status == 410
    assert b"has expired" in late.content
    assert enrol(federation, content, accept, now_s=999.0 + INVITE_S).status == 200


def test_a_forged_or_replaced_token_is_refused(federation: Federation) -> None:
    old = invite(federation, "north")
    invite(federation, "north")
    asked = read_invite(old)
    forged = write_invite(replace(asked, token="0" * 32))
    for word in (old, forged):
        status, why = refusal(federation, request_for(word))
        assert status == 403
        assert "not known here" in why


def test_an_invite_is_good_for_its_own_site_alone(federation: Federation) -> None:
    asked = read_invite(invite(federation, "north"))
    invite(federation, "south")
    stolen = write_invite(replace(asked, site="south"))
    assert refusal(federation, request_for(stolen))[0] == 403


def test_a_request_without_its_proofs_is_refused_and_the_invite_stays_good(federation: Federation) -> None:
    word = invite(federation, "north")
    good = request_for(word)
    south = request_certificate("south", KEYS.tls).decode()
    bad_ones: list[tuple[JoinRequest | bytes, str]] = [
        (replace(good, node_public_key=node_public_key(OTHER.node).decode()), "has not signed"),
        (replace(good, request=request_certificate("north", OTHER.tls).decode()), "has not signed"),
        (replace(good, identity_public_key=identity_public_key(OTHER.identity).hex()), "has not signed"),
        (signed(replace(good, request=south)), "the invite is for 'north'"),
        (signed(replace(good, request="nonsense")), "cannot be read"),
        (signed(replace(good, node_public_key="nonsense")), "node key cannot be read"),
        (replace(good, signature="xyz"), "not hexadecimal"),
        (replace(good, site="../north"), "site name"),
        (b"not json", "cut short"),
        (b'{"site": 1}', "cut short"),
        (b"[" * 10_000, "cut short"),
        (b'{"site": "north"}', "is missing"),
        (write_message(good).replace(b"north", rb"\ud800"), "cut short"),
    ]
    for bad, why in bad_ones:
        status, told = refusal(federation, bad)
        assert (status, why in told) == (400, True), told
    site = find_site(federation.state, "north")
    assert site is not None
    assert site.state == "invited"
    assert enrol(federation, write_message(good), accept).status == 200


def test_the_keys_of_another_site_are_refused(federation: Federation) -> None:
    assert enrol(federation, write_message(request_for(invite(federation, "north"))), accept).status == 200
    status, why = refusal(federation, request_for(invite(federation, "south")))
    assert status == 400
    assert "another site's" in why


def test_a_superlink_that_is_away_leaves_the_invite_good(federation: Federation) -> None:
    content = write_message(request_for(invite(federation, "north")))

    def away(public_key: bytes, site: str) -> None:
        raise ProcessFailed("SuperLink: cannot be reached. Start it.")

    reply = enrol(federation, content, away)
    assert reply.status == 503
    assert b"still good" in reply.content
    site = find_site(federation.state, "north")
    assert site is not None
    assert site.state == "invited"
    assert enrol(federation, content, accept).status == 200


def test_a_revoked_site_comes_back_with_a_new_invite_only(federation: Federation) -> None:
    assert enrol(federation, write_message(request_for(invite(federation, "north"))), accept).status == 200
    pending = invite(federation, "north")
    revoke(federation, "north", "test")
    assert refusal(federation, request_for(pending, OTHER))[0] == 403
    again = request_for(invite(federation, "north"), OTHER)
    assert enrol(federation, write_message(again), accept).status == 200


def test_a_site_that_joined_while_the_clock_was_ahead_and_rejoined_is_let_in_for_good(federation: Federation) -> None:
    """As it must: its first certificate is of the future, and TLS takes it no more."""
    day, now = 86400.0, time.time()

    def joined(keys: SiteKeys, at: float) -> Certificate:
        reply = enrol(federation, write_message(request_for(invite(federation, "north", at), keys)), accept, at)
        facts = read_certificate(read_message(JoinAnswer, reply.content, "answer").certificate.encode())
        used_certificate(federation.state, facts.serial, at)
        return facts

    ahead, right = joined(KEYS, now + 3 * day), joined(OTHER, now)
    rows, site = list_certificates(federation.state, "north"), find_site(federation.state, "north")
    assert [row.serial for row in rows] == [ahead.serial, right.serial]
    assert [admission.refusal(site, rows, right, now + days * day) for days in (0, 5, 50)] == [None] * 3
    assert "newer one" in str(admission.refusal(site, rows, ahead, now + 5 * day))


# Joining, as the hospital does it


def test_a_hospital_joins_over_the_network(tmp_path: Path) -> None:
    with running_edge(tmp_path / "federation") as edge:
        site = joined_site(edge, tmp_path, "north")
        kept = find_site(edge.federation.state, "north")
        word = invite(edge.federation, "north")
        with pytest.raises(StateInvalid, match="has joined already"):
            join(word, tmp_path / "north")
        join(word, tmp_path / "again")
        with pytest.raises(EnrolmentFailed, match="was used already"):
            join(word, tmp_path / "third")
    assert (site.federation, site.site, site.address) == ("Test federation", "north", edge.address)
    assert sorted(path.name for path in site.keys.iterdir()) == [
        "ca.pem", "identity.key", "node.key", "tls.pem"
    ]  # fmt: skip
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in site.keys.iterdir())
    assert kept is not None
    assert kept.certificate_fingerprint is not None
    assert site.certificate_words == fingerprint_words(kept.certificate_fingerprint)
    assert edge.nodes == ["north", "north"]
    assert not list((tmp_path / "third").iterdir()), "a failed join leaves nothing behind"


def test_a_coordinator_whose_name_would_change_what_is_compared_by_telephone_is_not_joined() -> None:
    answer = {"federation": "Lungs\x1b[2B\x1b[2K", "site": "north", "certificate": "x"}
    with pytest.raises(EnrolmentFailed, match="visible characters on one line"):
        read_message(JoinAnswer, json.dumps(answer).encode(), "coordinator at localhost:1")


def test_a_coordinator_with_another_ca_is_not_joined_and_the_invite_stays_good(tmp_path: Path) -> None:
    with running_edge(tmp_path / "federation") as edge:
        word = invite(edge.federation, "north")
        asked = read_invite(word)
        with pytest.raises(EnrolmentFailed, match="another fingerprint"):
            join(write_invite(replace(asked, ca="0" * 64)), tmp_path / "north")
        assert not (tmp_path / "north").exists()
        join(word, tmp_path / "north")


def test_a_join_that_fails_at_the_coordinator_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_edge(tmp_path / "federation") as edge:
        word = invite(edge.federation, "north")

        def disk_full(path: Path, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(joining, "save_secret", disk_full)
            with pytest.raises(OSError, match="No space"):
                join(word, tmp_path / "north")
        assert not list((tmp_path / "north").iterdir())
        join(word, tmp_path / "north")


def test_a_join_whose_answer_was_lost_is_run_again_with_the_same_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_edge(tmp_path / "federation") as edge:
        word, home = invite(edge.federation, "north"), tmp_path / "north"

        def lost(*words: object) -> bytes:
            put(*words)  # type: ignore[arg-type]
            raise EnrolmentFailed("the answer was lost")

        with monkeypatch.context() as broken:
            broken.setattr(joining, "ask", lost)
            with pytest.raises(EnrolmentFailed, match="was lost"):
                join(word, home)
        assert not (home / "keys").exists()
        with pytest.raises(EnrolmentFailed, match="was used already"):
            join(word, tmp_path / "elsewhere")
        site = join(word, home)
        kept = find_site(edge.federation.state, "north")
        assert ask(edge, site_context(site.keys), "GET", "/health").status == 200
    assert kept is not None
    assert kept.node_public_key == node_public_key((site.keys / "node.key").read_bytes()).decode()
    assert edge.nodes == ["north"]
    assert [path.name for path in home.iterdir()] == ["keys"]
    assert sorted(path.name for path in site.keys.iterdir()) == ["ca.pem", "identity.key", "node.key", "tls.pem"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_join_that_is_stopped_while_the_coordinator_thinks_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: signal.Signals
) -> None:
    with running_edge(tmp_path / "federation") as edge:
        word, home = invite(edge.federation, "north"), tmp_path / "north"
        asked, asked_again = threading.Event(), threading.Event()

        def slow(*words: object) -> None:
            if not asked.is_set():
                asked.set()
                assert asked_again.wait(30)
            else:
                asked_again.set()
                time.sleep(0.5)
            redeem_invite(*words)  # type: ignore[arg-type]

        monkeypatch.setattr(coordinator, "redeem_invite", slow)
        heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also where `&` has begun us
        code = f"from fedclient.enrol import join; from pathlib import Path; join({word!r}, Path({str(home)!r}))"
        first = subprocess.Popen([sys.executable, "-c", f"{heard}; {code}"], stderr=subprocess.DEVNULL)
        assert asked.wait(30)
        first.send_signal(stop)
        first.wait(30)
        site = join(word, home)
        assert ask(edge, site_context(site.keys), "GET", "/health").status == 200
    assert [path.name for path in home.iterdir()] == ["keys"]
    assert sorted(path.name for path in site.keys.iterdir()) == ["ca.pem", "identity.key", "node.key", "tls.pem"]


def test_of_two_joins_at_once_the_slower_leaves_the_keys_of_the_quicker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_edge(tmp_path / "federation") as edge:
        word, home = invite(edge.federation, "north"), tmp_path / "north"

        def overtaken(*words: object) -> bytes:
            monkeypatch.setattr(joining, "ask", put)
            join(word, home)
            return put(*words)  # type: ignore[arg-type]

        monkeypatch.setattr(joining, "ask", overtaken)
        with pytest.raises(StateInvalid, match="another join with this invite was quicker"):
            join(word, home)
        assert ask(edge, site_context(home / "keys"), "GET", "/health").status == 200
    assert [path.name for path in home.iterdir()] == ["keys"]


def test_an_unreachable_coordinator_is_named(tmp_path: Path) -> None:
    word = write_invite(Invite("127.0.0.1:9", "0" * 64, "north", "0" * 32))
    with pytest.raises(EnrolmentFailed, match=r"127\.0\.0\.1:9: cannot be reached"):
        join(word, tmp_path / "north")


def test_an_invite_that_was_cut_or_mistyped_is_explained(federation: Federation, tmp_path: Path) -> None:
    word = invite(federation, "north")
    assert read_invite(f"  {word[:40]}\n{word[40:]}\n") == read_invite(word)
    body = json.loads(base64.urlsafe_b64decode(word[4:] + "=="))
    changed = {key: base64.urlsafe_b64encode(json.dumps({**body, key: "?"}).encode()).decode() for key in body}
    for bad, why in [
        (word[4:], "begins with 'fl1.'"),
        (word[:-7], "cut short"),
        (f"fl1.{changed['ca']}", "malformed"),
        (f"fl1.{changed['token']}", "malformed"),
        (f"fl1.{changed['address']}", "host:port"),
        (f"fl1.{changed['site']}", "site name"),
        ("fl1." + base64.urlsafe_b64encode(b'{"address": "h:1"}').decode(), "is missing"),
    ]:
        with pytest.raises(EnrolmentFailed, match=why):
            join(bad, tmp_path / "north")


def test_enrolment_over_the_network_tells_its_status(tmp_path: Path) -> None:
    with running_edge(tmp_path / "federation") as edge:
        forged = request_for(write_invite(replace(read_invite(invite(edge.federation, "north")), token="0" * 32)))
        reply = ask(edge, stranger_context(edge), "POST", "/enrol", write_message(forged))
        assert (reply.status, "not known here" in reply.detail) == (403, True)
        large = ask(edge, stranger_context(edge), "POST", "/enrol", b"x" * 20_000)
        assert (large.status, "at most 16384" in large.detail) == (413, True)
        edge.gateway.enrolments.burst = 15.0
        edge.gateway.enrolments.per_s = 0.0
        limited = [ask(edge, stranger_context(edge), "POST", "/enrol", b"{}").status for _ in range(3)]
        assert limited == [400, 429, 429]
