"""The one door: who is let in, what is found behind it, and its bounds in bytes, time and connections."""

import asyncio
import errno
import hashlib
import http.client
import logging
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedclient.enrol import Joined
from fedserver import gateway as gateways
from fedserver import intake as intakes
from fedserver import listener
from fedserver.fleet import MOST_OBJECTS
from fedserver.gateway import Allowance
from fedserver.intake import Intake, sweep
from fedserver.lifecycle import revoke
from fedserver.room import SPARE_BYTES
from fedserver.state import find_site, remember_node
from shared_models.audit import AuditLog
from shared_models.dates import date_text
from shared_models.files import read_lines, write_atomic
from shared_models.identity import (
    Credential,
    issue_site,
    load_credential,
    new_authority,
    new_site_keys,
    request_certificate,
    save_credential,
)
from shared_models.refusals import MOST_KINDS, Refusals
from shared_models.transfer import site_context
from tests.edge import Answer, Edge, ask, joined_site, node_headers, running_edge, stranger_context

BLOB = random.Random(1).randbytes(699_999) + b"."  # known, so that tests have the same names in every process
DIGEST = hashlib.sha256(BLOB).hexdigest()
PULL, PUSH, ACTIVATE = "/v1/fleet/pull-messages", "/v1/fleet/push-messages", "/v1/fleet/activate-node"
OBJECT = "/v1/fleet/push-object"


@dataclass(frozen=True, slots=True)
class Site:
    joined: Joined
    context: ssl.SSLContext


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge") / "federation") as edge:
        yield edge


@pytest.fixture(scope="module")
def sites(edge: Edge, tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, Site]:
    folder = tmp_path_factory.mktemp("sites")
    both = [joined_site(edge, folder, name) for name in ("north", "south")]
    return Site(both[0], site_context(both[0].keys)), Site(both[1], site_context(both[1].keys))


@pytest.fixture(scope="module")
def north(sites: tuple[Site, Site]) -> Site:
    return sites[0]


@pytest.fixture(scope="module")
def south(sites: tuple[Site, Site]) -> Site:
    return sites[1]


@pytest.fixture(autouse=True)
def clean(edge: Edge) -> None:
    edge.superlink.arrived.clear()
    edge.superlink.answers.clear()
    for path in (edge.blobs / "in").glob("*/*"):
        path.unlink()


def fleet(edge: Edge, site: Site, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
    return ask(edge, site.context, "POST", path, body, node_headers(site.joined) if headers is None else headers)


def messages(*sources: int) -> bytes:
    sent = [Message(metadata=Metadata(src_node_id=source)) for source in sources]
    return bytes(PushMessagesRequest(messages_list=sent).SerializeToString())


def put(edge: Edge, site: Site, digest: str, body: bytes, span: str | None = None) -> Answer:
    headers = {"content-range": span} if span else {}
    return ask(edge, site.context, "PUT", f"/blobs/{digest}", body, headers)


def uploads(edge: Edge, site: Site) -> list[str]:
    return sorted(path.name for path in (edge.blobs / "in" / site.joined.site).glob("*"))


# Who gets in


def test_a_stranger_sees_the_ca_and_nothing_else(edge: Edge) -> None:
    context = stranger_context(edge)
    ca = ask(edge, context, "GET", "/enrol/ca")
    assert (ca.status, ca.content) == (200, edge.federation.ca_certificate.read_bytes())
    for method, path in [("POST", PULL), ("GET", f"/blobs/{DIGEST}"), ("PUT", f"/blobs/{DIGEST}"), ("GET", "/health")]:
        refused = ask(edge, context, method, path, b"x" if method != "GET" else None)
        assert (refused.status, "site's certificate" in refused.detail) == (403, True)
    assert edge.superlink.arrived == []


def test_a_certificate_of_a_foreign_ca_ends_the_connection(edge: Edge, north: Site, tmp_path: Path) -> None:
    authority = new_authority("Foreign")
    foreign(edge, north, authority, tmp_path, days_ago=0)
    foreign(edge, north, real_authority(edge), tmp_path, days_ago=91)  # expired


def foreign(edge: Edge, north: Site, authority: Credential, folder: Path, days_ago: int) -> None:
    key = load_credential(north.joined.keys / "tls.pem").key
    since = datetime.now(UTC) - timedelta(days=days_ago)
    save_credential(
        folder / "tls.pem", Credential(issue_site(authority, request_certificate("north", key), "north", since), key)
    )
    context = stranger_context(edge)
    context.load_cert_chain(folder / "tls.pem")
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        ask(edge, context, "GET", "/health")


def real_authority(edge: Edge) -> Credential:
    return Credential(edge.federation.ca_certificate.read_bytes(), edge.federation.ca_key.read_bytes())


def test_the_servers_own_certificate_is_no_clients(edge: Edge) -> None:
    context = stranger_context(edge)
    context.load_cert_chain(edge.federation.server_certificate)
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        ask(edge, context, "GET", "/health")


def test_tls_below_1_3_is_not_spoken(edge: Edge) -> None:
    context = stranger_context(edge)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask(edge, context, "GET", "/enrol/ca")


def test_a_certificate_of_ours_for_nobody_in_the_state_is_refused(edge: Edge, north: Site, tmp_path: Path) -> None:
    key = load_credential(north.joined.keys / "tls.pem").key
    for name, why in [("nobody", "is not active"), ("north", "is not active in this federation with this certificate")]:
        certificate = issue_site(real_authority(edge), request_certificate(name, key), name)
        save_credential(tmp_path / "tls.pem", Credential(certificate, key))
        context = stranger_context(edge)
        context.load_cert_chain(tmp_path / "tls.pem")
        refused = ask(edge, context, "GET", "/health")
        assert (refused.status, why in refused.detail) == (403, True)


def test_a_site_is_known_by_its_certificate(edge: Edge, north: Site) -> None:
    health = ask(edge, north.context, "GET", "/health")
    assert (health.status, health.content) == (200, b'{"federation": "Test federation", "site": "north"}')


def test_a_revoked_site_is_out_within_seconds_in_the_middle_of_an_upload_and_hears_why(
    edge: Edge, tmp_path: Path
) -> None:
    joined = joined_site(edge, tmp_path, "west")
    remember_node(edge.federation.state, "west", 2**63 + 9)
    west = Site(joined, site_context(joined.keys))
    assert fleet(edge, west, PULL).status == 200
    host, port = edge.address.split(":")
    with closing(http.client.HTTPSConnection(host, int(port), context=west.context, timeout=30)) as upload:
        upload.putrequest("PUT", f"/blobs/{DIGEST}")
        upload.putheader("content-length", str(len(BLOB)))
        upload.endheaders()
        upload.send(BLOB[:1000])
        gone = revoke(edge.federation, "west", "its contract has ended")
        began = time.monotonic()
        with pytest.raises((ConnectionError, ssl.SSLError, http.client.RemoteDisconnected)):
            upload.getresponse()  # an open connection is cut, it does not wait for its end
    assert time.monotonic() - began < 30
    refused = fleet(edge, west, PULL)
    when = date_text(gone.revoked_at or 0.0)
    assert (refused.status, refused.detail) == (
        403,
        f"site 'west': this site's certificate was revoked on {when}. Ask the coordinator.",
    )
    assert ask(edge, west.context, "GET", f"/blobs/{DIGEST}").status == 403
    assert len(edge.superlink.arrived) == 1
    await_true(lambda: edge.gone == [2**63 + 9] and not uploads(edge, west))


def await_true(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


# Fleet calls


def test_a_fleet_call_reaches_the_superlink_and_its_answer_comes_back(edge: Edge, north: Site) -> None:
    edge.superlink.answers[PULL] = (200, b"answer")
    headers = {**node_headers(north.joined), "flwr-timestamp": "now", "flwr-task-token": "x", "x-other": "y"}
    answer = fleet(edge, north, PULL, b"question", headers)
    assert (answer.status, answer.content, answer.headers["flwr-told"]) == (200, b"answer", "yes")
    (arrived,) = edge.superlink.arrived
    assert (arrived.path, arrived.body, arrived.headers["flwr-timestamp"]) == (PULL, b"question", "now")
    assert arrived.headers["content-type"] == "application/protobuf"
    assert not {"flwr-task-token", "x-other"} & set(arrived.headers)


def test_an_error_of_the_superlink_is_passed_on(edge: Edge, north: Site) -> None:
    edge.superlink.answers[PULL] = (412, b'{"code": 2004}')
    answer = fleet(edge, north, PULL)
    assert (answer.status, answer.content) == (412, b'{"code": 2004}')


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull%2dmessages",
        "/V1/fleet/pull-messages",
        "/docs",
        "/openapi.json",
        "/",
        f"/blobs/{DIGEST}",
        f"/blobs/../ca/{DIGEST}",
        f"/blobs/{DIGEST}%00",
        f"/blobs/{DIGEST.upper()}",
        "/blobs/..%2f..%2fca%2fca.key",
        "https://127.0.0.1/v1/control/start-run",
    ],
)
def test_what_is_not_offered_is_not_found(edge: Edge, north: Site, path: str) -> None:
    refused = fleet(edge, north, path, b"x")
    assert (refused.status, "is not offered here" in refused.detail) == (404, True)
    assert edge.superlink.arrived == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_fleet_calls_are_posts(edge: Edge, north: Site, method: str) -> None:
    assert ask(edge, north.context, method, PULL, headers=node_headers(north.joined)).status == 404


def test_the_node_key_of_another_site_or_none_is_refused(edge: Edge, north: Site, south: Site) -> None:
    for headers in (node_headers(south.joined), {}):
        refused = fleet(edge, north, PULL, b"x", headers)
        assert (refused.status, "not enrolled" in refused.detail) == (403, True)
    assert edge.superlink.arrived == []


def test_two_node_keys_in_one_call_are_refused(edge: Edge, north: Site, south: Site) -> None:
    host, port = edge.address.split(":")
    with closing(http.client.HTTPSConnection(host, int(port), context=north.context, timeout=10)) as connection:
        connection.putrequest("POST", PULL)
        for site in (north, south):
            connection.putheader("flwr-public-key", node_headers(site.joined)["flwr-public-key"])
        connection.putheader("content-length", "0")
        connection.endheaders()
        assert connection.getresponse().status == 403
    assert edge.superlink.arrived == []


def test_a_node_answers_for_itself_alone(edge: Edge, north: Site, south: Site) -> None:
    assert fleet(edge, north, PUSH, messages(7)).status == 403, "a node that was never activated has no number"
    for site, number in ((north, 2**63 + 7), (south, 8)):
        edge.superlink.answers[ACTIVATE] = (200, ActivateNodeResponse(node_id=number).SerializeToString())
        assert fleet(edge, site, ACTIVATE).status == 200
    kept = find_site(edge.federation.state, "north")
    assert kept is not None
    assert kept.flower_node_id == 2**63 + 7
    edge.superlink.arrived.clear()
    assert fleet(edge, north, PUSH, messages(2**63 + 7)).status == 200
    assert fleet(edge, north, PUSH, messages()).status == 200
    for forged in (messages(8), messages(2**63 + 7, 8), messages(0)):
        refused = fleet(edge, north, PUSH, forged)
        assert (refused.status, "in the name of another node" in refused.detail) == (403, True)
    unreadable = fleet(edge, north, PUSH, b"\xff\xff\xff")
    assert (unreadable.status, "not a PushMessagesRequest" in unreadable.detail) == (400, True)
    assert len(edge.superlink.arrived) == 2


def test_a_reply_holds_few_objects_and_none_of_tensors(edge: Edge, north: Site) -> None:
    edge.superlink.answers[ACTIVATE] = (200, ActivateNodeResponse(node_id=7).SerializeToString())
    assert fleet(edge, north, ACTIVATE).status == 200
    edge.superlink.arrived.clear()
    deep = ObjectTree()
    under = deep
    for _ in range(MOST_OBJECTS):
        under = under.children.add()
    wide = ObjectTree(children=[ObjectTree() for _ in range(10_000)])
    for tree in (deep, wide):
        body = PushMessagesRequest(
            messages_list=[Message(metadata=Metadata(src_node_id=7))], message_object_trees=[tree]
        )
        refused = fleet(edge, north, PUSH, body.SerializeToString())
        assert (refused.status, "more than 64 objects" in refused.detail) == (400, True)
    for content in (b"Array a 3\0abc", b"ArrayChunk  1\0x", b"Context  1\0x", b"", b"x" * 100_000, b"ConfigRecord"):
        refused = fleet(edge, north, OBJECT, PushObjectRequest(object_content=content).SerializeToString())
        assert (refused.status, "no reply is made of" in refused.detail) == (400, True)
    assert fleet(edge, north, OBJECT, b"\xff\xff").status == 400
    assert edge.superlink.arrived == []
    reply = RecordDict({"facts": ConfigRecord({"json": b"{}"})})
    for thing in get_all_nested_objects(reply).values():
        sent = PushObjectRequest(object_content=thing.deflate()).SerializeToString()
        assert fleet(edge, north, OBJECT, sent).status == 200


def test_a_large_body_is_refused_and_the_client_hears_why(edge: Edge, north: Site) -> None:
    refused = fleet(edge, north, PULL, bytes(9 << 20))
    assert (refused.status, "at most 8388608" in refused.detail) == (413, True)
    assert fleet(edge, north, PULL, bytes(8 << 20)).status == 200
    assert len(edge.superlink.arrived) == 1


def test_a_body_without_a_length_is_refused(edge: Edge, north: Site) -> None:
    host, port = edge.address.split(":")
    with closing(http.client.HTTPSConnection(host, int(port), context=north.context, timeout=10)) as connection:
        connection.putrequest("POST", PULL)
        for name, value in {**node_headers(north.joined), "transfer-encoding": "chunked"}.items():
            connection.putheader(name, value)
        connection.endheaders()  # and no body: the answer comes before it, and the connection ends with it
        assert connection.getresponse().status == 411


@pytest.mark.parametrize("length", ["00000000000000000000000009000000", "+9000000", "9e6", "0x1", " ", "5, 9000000"])
def test_a_length_that_is_written_otherwise_gets_nobody_past_the_limit(edge: Edge, north: Site, length: str) -> None:
    host, port = edge.address.split(":")
    with closing(http.client.HTTPSConnection(host, int(port), context=north.context, timeout=10)) as connection:
        connection.putrequest("POST", PULL)
        for name, value in {**node_headers(north.joined), "content-length": length}.items():
            connection.putheader(name, value)
        connection.endheaders()
        with suppress(ConnectionError, ssl.SSLError):
            connection.send(bytes(9_000_000))
        with suppress(ConnectionError, ssl.SSLError, http.client.HTTPException):
            response = connection.getresponse()
            assert response.status == 400
            response.read()
    assert edge.superlink.arrived == []


def test_a_body_in_memory_is_bounded_in_bytes_and_time_whatever_it_announces(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = 0

    async def receive() -> dict[str, object]:
        nonlocal sent
        sent += 1
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    with pytest.raises(listener.Refused, match="at most 4500") as refused:
        asyncio.run(listener.Body(receive, size_bytes=10).read(4500))
    assert (refused.value.status, sent) == (413, 5)

    async def drip() -> dict[str, object]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    monkeypatch.setattr(listener, "READ_S", 0.1)
    with pytest.raises(listener.Refused, match="not here within"):
        asyncio.run(listener.Body(drip, size_bytes=10**6).read(10**6))


def test_a_stranger_gets_one_answer_a_connection_and_a_site_many(edge: Edge, north: Site) -> None:
    assert ask(edge, stranger_context(edge), "GET", "/enrol/ca").headers["connection"] == "close"
    assert "connection" not in ask(edge, north.context, "GET", "/health").headers


def test_a_superlink_that_is_away_is_a_503(edge: Edge, north: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setattr(edge.gateway.superlink, "base_url", f"https://127.0.0.1:{port}")
    refused = fleet(edge, north, PULL)
    assert (refused.status, "cannot be reached" in refused.detail) == (503, True)


def test_too_many_calls_of_one_site_are_a_503(edge: Edge, north: Site, south: Site) -> None:
    edge.gateway.calls["north"] = gateways.MOST_FLEET_CALLS
    try:
        assert fleet(edge, north, PULL).status == 503
        assert fleet(edge, south, PULL).status == 200
    finally:
        edge.gateway.calls["north"] = 0


def test_a_trouble_of_ours_is_a_503_without_its_words(
    edge: Edge, north: Site, caplog: pytest.LogCaptureFixture
) -> None:
    edge.gateway.admission.forget()
    state = edge.federation.state
    state.rename(state.with_name("away.db"))
    try:
        with caplog.at_level(logging.ERROR):
            refused = ask(edge, north.context, "GET", "/health")
    finally:
        state.with_name("away.db").rename(state)
    assert (refused.status, "state.db" in refused.detail) == (503, False)
    assert "state.db" in caplog.text


# Blobs


def test_a_published_blob_comes_whole_or_in_part(edge: Edge, north: Site) -> None:
    (edge.blobs / "out" / DIGEST).write_bytes(BLOB)
    path = f"/blobs/{DIGEST}"
    whole = ask(edge, north.context, "GET", path)
    assert (whole.status, whole.content == BLOB) == (200, True)
    for asked, first, last in [
        ("bytes=100-", 100, len(BLOB) - 1),
        ("bytes=5-9", 5, 9),
        ("bytes=0-9999999", 0, 699_999),
    ]:
        part = ask(edge, north.context, "GET", path, headers={"range": asked})
        assert (part.status, part.content == BLOB[first : last + 1]) == (206, True)
        assert part.headers["content-range"] == f"bytes {first}-{last}/{len(BLOB)}"
    for asked in ("bytes=700000-", "bytes=9-5", "bytes=-5", "bytes=0-1,3-4", "lines=1-2"):
        assert ask(edge, north.context, "GET", path, headers={"range": asked}).status == 416
    head = ask(edge, north.context, "HEAD", path)
    assert (head.status, head.headers["content-length"], head.headers["upload-offset"]) == (200, str(len(BLOB)), "0")
    (edge.blobs / "out" / DIGEST).unlink()
    assert ask(edge, north.context, "GET", path).status == 404


def test_a_site_cannot_read_what_another_has_sent(edge: Edge, north: Site, south: Site) -> None:
    assert put(edge, north, DIGEST, BLOB).status == 201
    assert ask(edge, south.context, "GET", f"/blobs/{DIGEST}").status == 404
    assert ask(edge, north.context, "GET", f"/blobs/{DIGEST}").status == 404
    told = {
        name: ask(edge, site.context, "HEAD", f"/blobs/{DIGEST}").headers["upload-offset"]
        for name, site in (("north", north), ("south", south))
    }
    assert told == {"north": str(len(BLOB)), "south": "0"}


def test_an_upload_goes_on_where_it_broke(edge: Edge, north: Site) -> None:
    host, port = edge.address.split(":")
    with closing(http.client.HTTPSConnection(host, int(port), context=north.context, timeout=10)) as connection:
        connection.putrequest("PUT", f"/blobs/{DIGEST}")
        connection.putheader("content-length", str(len(BLOB)))
        connection.endheaders()
        connection.send(BLOB[:300_000])
    until = time.monotonic() + 5
    while (held := offset(edge, north)) < 300_000 and time.monotonic() < until:
        time.sleep(0.01)
    assert held == 300_000
    wrong = put(edge, north, DIGEST, BLOB)
    assert (wrong.status, wrong.headers["upload-offset"]) == (409, "300000")
    rest = put(edge, north, DIGEST, BLOB[300_000:], f"bytes 300000-{len(BLOB) - 1}/{len(BLOB)}")
    assert rest.status == 201
    assert (edge.blobs / "in" / "north" / DIGEST).read_bytes() == BLOB
    assert put(edge, north, DIGEST, BLOB).status == 200, "once more, as after a lost answer"


def offset(edge: Edge, site: Site) -> int:
    return int(ask(edge, site.context, "HEAD", f"/blobs/{DIGEST}").headers["upload-offset"])


def test_an_upload_that_is_not_its_digest_is_thrown_away(edge: Edge, north: Site) -> None:
    refused = put(edge, north, DIGEST, BLOB[:-1] + b"x")
    assert (refused.status, "another digest" in refused.detail) == (422, True)
    assert uploads(edge, north) == []


def test_a_part_that_is_long_enough_and_was_never_checked_does_not_count(edge: Edge, north: Site) -> None:
    write_atomic(edge.blobs / "in" / "north" / f"{DIGEST}.part", BLOB[:-1] + b"x")
    assert put(edge, north, DIGEST, BLOB).status == 201
    assert (edge.blobs / "in" / "north" / DIGEST).read_bytes() == BLOB


@pytest.mark.parametrize("span", ["bytes 0-9/20", "bytes 5-1/2", "bytes */10", "octets 0-9/10", "bytes 0-99/100"])
def test_a_range_that_is_not_the_body_is_refused(edge: Edge, north: Site, span: str) -> None:
    assert put(edge, north, DIGEST, b"0123456789", span).status == 400
    assert put(edge, north, DIGEST, b"").status == 411
    assert uploads(edge, north) == []


def test_an_upload_above_the_limit_is_refused_before_and_while_it_comes(edge: Edge, north: Site) -> None:
    most = edge.federation.max_blob_bytes
    refused = put(edge, north, DIGEST, b"x", f"bytes {most}-{most}/{most + 1}")
    assert (refused.status, "max_blob_bytes" in refused.detail) == (413, True)
    head = ask(edge, north.context, "HEAD", f"/blobs/{DIGEST}", headers={"upload-length": str(most + 1)})
    assert (head.status, "max_blob_bytes" in head.headers["x-detail"]) == (413, True)
    assert uploads(edge, north) == []


def test_a_site_has_room_for_four_uploads_and_old_parts_give_way(edge: Edge, north: Site, south: Site) -> None:
    blobs = {hashlib.sha256(bytes([k])).hexdigest(): bytes([k]) for k in range(6)}
    for digest in [*blobs][:4]:
        assert put(edge, north, digest, blobs[digest]).status == 201
    fifth = [*blobs][4]
    refused = put(edge, north, fifth, blobs[fifth])
    assert (refused.status, "not taken away" in refused.detail) == (507, True)
    assert put(edge, south, fifth, blobs[fifth]).status == 201
    first = edge.blobs / "in" / "north" / next(iter(blobs))
    first.rename(first.with_name("0" * 64 + ".part"))
    assert put(edge, north, fifth, blobs[fifth]).status == 201
    assert uploads(edge, north) == sorted([*blobs][1:5])
    lost = edge.blobs / "in" / "north" / [*blobs][1]
    os.utime(lost, (time.time() - intakes.ABANDONED_S - 1,) * 2)  # of a run that was killed: nobody will claim it
    first_again = next(iter(blobs))
    assert put(edge, north, first_again, blobs[first_again]).status == 201
    assert uploads(edge, north) == sorted([first_again, *[*blobs][2:5]])


def test_a_disk_that_is_nearly_full_takes_nothing(edge: Edge, north: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intakes, "SPARE_BYTES", 1 << 60)
    refused = put(edge, north, DIGEST, BLOB)
    assert (refused.status, "nearly full" in refused.detail) == (507, True)


def at_once(edge: Edge, monkeypatch: pytest.MonkeyPatch, *of: tuple[Site, str]) -> list[int]:
    """The answers to uploads of `BLOB` under these digests, all of which have begun before the first one ends."""
    host, port = edge.address.split(":")
    looked: list[str] = []
    look = intakes._held

    def held(intake: Intake, site: str, digest: str, announced: int | None) -> int:
        try:
            return look(intake, site, digest, announced)
        finally:
            looked.append(digest)

    with ExitStack() as stack, monkeypatch.context() as patched:
        patched.setattr(intakes, "_held", held)
        connections = []
        for site, digest in of:
            connection = http.client.HTTPSConnection(host, int(port), context=site.context, timeout=10)
            connections.append(stack.enter_context(closing(connection)))
            connection.putrequest("PUT", f"/blobs/{digest}")
            connection.putheader("content-length", str(len(BLOB)))
            connection.endheaders()
            connection.send(BLOB[:1000])
        await_true(lambda: len(looked) == len(of))
        answers = []
        for connection in connections:
            with suppress(OSError):  # of one that was refused and hung up on
                connection.send(BLOB[1000:])
            answers.append(connection.getresponse().status)
    return answers


def test_uploads_that_begin_together_get_no_more_room_than_one_after_the_other(
    edge: Edge, north: Site, south: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = at_once(edge, monkeypatch, *((north, f"{k:064x}") for k in range(7)))
    assert Counter(answers) == {422: 4, 507: 3}, "four were let in, and had another digest"
    await_true(lambda: not edge.gateway.intake.promised)
    free = SPARE_BYTES + len(BLOB) + 10
    monkeypatch.setattr("fedserver.intake.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert Counter(at_once(edge, monkeypatch, (north, "a" * 64), (south, "b" * 64))) == {422: 1, 507: 1}


def test_the_same_upload_on_two_connections_is_taken_from_one(edge: Edge, north: Site) -> None:
    host, port = edge.address.split(":")
    with closing(http.client.HTTPSConnection(host, int(port), context=north.context, timeout=10)) as first:
        first.putrequest("PUT", f"/blobs/{DIGEST}")
        first.putheader("content-length", str(len(BLOB)))
        first.endheaders()
        first.send(BLOB[:1000])
        until = time.monotonic() + 5
        while not edge.gateway.intake.busy and time.monotonic() < until:
            time.sleep(0.01)
        second = put(edge, north, DIGEST, BLOB)
        assert (second.status, "another connection" in second.detail) == (503, True)
        head = ask(edge, north.context, "HEAD", f"/blobs/{DIGEST}", headers={"upload-length": str(len(BLOB))})
        assert (head.status, "another connection" in head.headers["x-detail"]) == (503, True)
        first.send(BLOB[1000:])
        assert first.getresponse().status == 201


def test_uploads_that_a_power_cut_tore_are_swept_away(tmp_path: Path) -> None:
    whole, torn, part = (tmp_path / "in" / "north" / name for name in (DIGEST, "0" * 64, "1" * 64 + ".part"))
    for path in (whole, torn, part):
        write_atomic(path, BLOB)
    assert sweep(Intake(tmp_path, 1 << 30)) == [torn]
    assert [path.exists() for path in (whole, torn, part)] == [True, False, True]


# Bounds


def test_a_request_head_without_end_is_cut(edge: Edge) -> None:
    host, port = edge.address.split(":")
    with stranger_context(edge).wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as raw:
        raw.settimeout(10)
        raw.sendall(b"GET /enrol/ca HTTP/1.1\r\nx: ")
        with suppress(ConnectionError, ssl.SSLError):  # it may be cut while we still send
            for _ in range(10):
                raw.sendall(b"x" * 16_000)
                time.sleep(0.01)
            assert raw.recv(100).startswith(b"HTTP/1.1 400 ")
            assert raw.recv(1000).endswith(b"Request head too long.") or raw.recv(1) == b""
    assert ask(edge, stranger_context(edge), "GET", "/enrol/ca").status == 200


def test_a_request_head_that_does_not_come_is_not_waited_for(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEAD_S", 0.2)
    host, port = edge.address.split(":")
    with stranger_context(edge).wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as raw:
        raw.settimeout(5)
        with suppress(ConnectionError):
            assert raw.recv(1) == b""


def test_a_body_that_stops_coming_is_not_waited_for(edge: Edge, north: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "STALL_S", 0.2)
    host, port = edge.address.split(":")
    with closing(http.client.HTTPSConnection(host, int(port), context=north.context, timeout=10)) as connection:
        connection.putrequest("PUT", f"/blobs/{DIGEST}")
        connection.putheader("content-length", "1000")
        connection.endheaders()
        connection.send(b"x")
        assert connection.getresponse().status == 408


def test_strangers_do_not_crowd_out_the_sites(edge: Edge, north: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MOST_STRANGERS", 3)
    host, port = edge.address.split(":")
    context = stranger_context(edge)
    idle = [context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) for _ in range(3)]
    try:
        with pytest.raises((ConnectionError, ssl.SSLError, http.client.HTTPException)):
            ask(edge, context, "GET", "/enrol/ca")
        assert ask(edge, north.context, "GET", "/health").status == 200
    finally:
        for one in idle:
            one.close()


def test_one_site_does_not_crowd_out_another(
    edge: Edge, north: Site, south: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "MOST_OF_ONE", 3)
    host, port = edge.address.split(":")
    with ExitStack() as idle:
        for _ in range(3):
            raw = idle.enter_context(closing(socket.create_connection((host, int(port)))))
            idle.enter_context(closing(south.context.wrap_socket(raw, server_hostname=host)))
        with pytest.raises((ConnectionError, ssl.SSLError, http.client.HTTPException)):
            ask(edge, south.context, "GET", "/health")
        assert ask(edge, north.context, "GET", "/health").status == 200


def test_what_is_refused_stands_in_the_audit_log_and_a_flood_of_it_as_a_count(tmp_path: Path) -> None:
    now, log = [0.0], AuditLog(tmp_path / "audit.jsonl", "Test", new_site_keys().identity)
    refusals = Refusals(lambda: log, clock=lambda: now[0])

    def told(at_s: float, times: int) -> list[dict[str, object]]:
        """What is written once `times` more strangers were refused, and another look is taken at `at_s`."""
        now[0], before = at_s, len(read_lines(log.path))
        for _ in range(times):
            refusals.note("NO_CERTIFICATE")
        refusals.write()
        return [line["facts"] for line in read_lines(log.path)[max(before, 1) :]]

    assert told(0, 1) == [{"code": "NO_CERTIFICATE", "times": 1}], "the first at once"
    assert told(1, 1000) == [], "and then as a count"
    assert told(61, 0) == [{"code": "NO_CERTIFICATE", "times": 1000}]
    assert told(62 + 60, 5) == [], "the pause has doubled"
    assert told(62 + 120, 0) == [{"code": "NO_CERTIFICATE", "times": 5}]
    assert told(10_000, 0) == []
    assert told(20_000, 0) == []
    assert refusals.counts == {}, "an attack that has ended is forgotten"
    refusals.note("NODE_KEY", "south")
    refusals.note("NODE_KEY", "x\n{" * 99)
    refusals.write(all_of_it=True)
    lines = [line["facts"] for line in read_lines(log.path)[-2:]]
    assert lines == [{"code": "NODE_KEY", "times": 1, "site": "south"}, {"code": "NODE_KEY", "times": 1}]
    for number in range(2 * MOST_KINDS):
        refusals.note("NOT_ENROLLED", f"s{number}")
    assert len(refusals.counts) <= MOST_KINDS + 1


def test_refusals_that_a_full_disk_keeps_from_the_log_are_told_once_there_is_room(tmp_path: Path) -> None:
    log, full = AuditLog(tmp_path / "audit.jsonl", "Test", new_site_keys().identity), [True]

    def opened() -> AuditLog:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return log

    refusals = Refusals(opened, clock=lambda: 0.0)
    for _ in range(5000):
        refusals.note("NO_CERTIFICATE")
        refusals.note("NODE_KEY", "south")
    with pytest.raises(OSError, match="No space"):
        refusals.write()
    full.clear()
    refusals.write()
    told = [line["facts"] for line in read_lines(log.path)[1:]]
    assert told == [{"code": "NO_CERTIFICATE", "times": 5000}, {"code": "NODE_KEY", "times": 5000, "site": "south"}]


def test_an_allowance_is_spent_and_comes_back() -> None:
    now = [0.0]
    allowance = Allowance(burst=3, per_s=1, clock=lambda: now[0])
    assert [allowance.spend("a", 2), allowance.spend("a", 2), allowance.spend("b", 3)] == [True, False, True]
    now[0] = 1.0
    assert [allowance.spend("a", 2), allowance.spend("b", 2)] == [True, False]
    for k in range(2 * gateways.MOST_REMEMBERED):
        allowance.spend(str(k), 1)
    assert len(allowance._left) <= gateways.MOST_REMEMBERED + 1


# The process


def test_the_process_serves_until_it_is_told_to_end(tmp_path: Path, edge: Edge) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fedserver.gateway", str(edge.federation.folder), "--host", "127.0.0.1"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--superlink", f"127.0.0.1:{edge.superlink.port}"], stdout=log, stderr=log
        )
    context = stranger_context(edge)
    try:
        until = time.monotonic() + 20
        while True:
            try:
                with closing(http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=5)) as asked:
                    asked.request("GET", "/enrol/ca")
                    assert asked.getresponse().status == 200
                break
            except ConnectionRefusedError:
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) in (0, -signal.SIGTERM), (tmp_path / "log").read_text()


def test_the_process_names_a_folder_that_is_no_federation(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedserver.gateway", str(tmp_path), "--host", "127.0.0.1", "--port", "1"]
    ended = subprocess.run([*command, "--superlink", "127.0.0.1:1"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "holds no federation" in ended.stderr
