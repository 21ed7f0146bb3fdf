"""Blobs fetched and sent over mutual TLS: resumed, checked, bounded, refused."""

import hashlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedclient.enrol import Joined
from shared_models import transfer
from shared_models.errors import EnrolmentFailed, OrderRefused, StateInvalid, TransferFailed
from shared_models.files import file_sha256
from shared_models.identity import Credential, issue_site, load_credential, request_certificate, save_credential
from shared_models.transfer import Blobs, site_context
from tests.edge import Edge, joined_site, running_edge, site_blobs

BLOB = os.urandom(2_999_999) + b"."  # its last byte is known, so that a test can change it
DIGEST = hashlib.sha256(BLOB).hexdigest()


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge") / "federation") as edge:
        yield edge


@pytest.fixture(scope="module")
def north(edge: Edge, tmp_path_factory: pytest.TempPathFactory) -> Joined:
    return joined_site(edge, tmp_path_factory.mktemp("sites"), "north")


@pytest.fixture
def published(edge: Edge) -> Iterator[str]:
    (edge.blobs / "out" / DIGEST).write_bytes(BLOB)
    yield DIGEST
    (edge.blobs / "out" / DIGEST).unlink()


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    until = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


@contextmanager
def cut_after(address: str, size_bytes: int, times: int = 1) -> Iterator[str]:
    """A relay to `address` that hangs up after so many bytes, in either direction, the first `times` connections."""
    host, port = address.split(":")
    listening = socket.create_server(("127.0.0.1", 0))
    cuts = iter([size_bytes] * times)

    def pump(source: socket.socket, sink: socket.socket, left: list[int]) -> None:
        try:
            while chunk := source.recv(65536):
                left[0] -= len(chunk)
                if left[0] < 0:
                    break
                sink.sendall(chunk)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                near, _ = listening.accept()
            except OSError:
                return
            far = socket.create_connection((host, int(port)))
            left = [next(cuts, 1 << 40)]
            threads = [threading.Thread(target=pump, args=(a, b, left)) for a, b in ((near, far), (far, near))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            near.close()
            far.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)


def upload_of(edge: Edge, site: Joined) -> Path:
    return edge.blobs / "in" / site.site


def test_a_blob_comes_whole_and_for_its_owner_alone(edge: Edge, north: Joined, published: str, tmp_path: Path) -> None:
    got = site_blobs(north).fetch(published, len(BLOB), tmp_path / "cache" / "weights")
    assert got.read_bytes() == BLOB
    assert got.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in got.parent.iterdir()] == ["weights"]


def test_a_blob_that_is_there_is_not_fetched_again(north: Joined, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(BLOB)
    nowhere = Blobs("127.0.0.1:9", site_context(north.keys))
    assert nowhere.fetch(DIGEST, len(BLOB), tmp_path / "weights").read_bytes() == BLOB


def test_a_broken_download_goes_on_where_it_broke(
    edge: Edge, north: Joined, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[int] = []
    start = transfer.digest_start

    def watched(path: Path, size_bytes: int) -> "hashlib._Hash":
        resumed.append(size_bytes)
        return start(path, size_bytes)

    monkeypatch.setattr(transfer, "digest_start", watched)
    with cut_after(edge.address, 1_500_000) as relay:
        blobs = Blobs(relay, site_context(north.keys))
        assert blobs.fetch(published, len(BLOB), tmp_path / "weights").read_bytes() == BLOB
    assert len(resumed) == 1
    assert 0 < resumed[0] < len(BLOB)


def test_a_damaged_part_is_thrown_away(edge: Edge, north: Joined, published: str, tmp_path: Path) -> None:
    part = tmp_path / f".weights.{published[:16]}.part"
    for content in (b"wrong" * 1000, os.urandom(len(BLOB)), os.urandom(len(BLOB) + 1)):
        part.write_bytes(content)
        got = site_blobs(north).fetch(published, len(BLOB), tmp_path / "weights")
        assert got.read_bytes() == BLOB
        assert not part.exists()
        got.unlink()


def test_a_blob_of_another_size_or_content_is_not_kept(edge: Edge, north: Joined, tmp_path: Path) -> None:
    wrong = hashlib.sha256(b"other").hexdigest()
    (edge.blobs / "out" / wrong).write_bytes(BLOB)
    with pytest.raises(TransferFailed, match="the order says 5"):
        site_blobs(north).fetch(wrong, 5, tmp_path / "weights")
    with pytest.raises(TransferFailed, match="another digest"):
        site_blobs(north).fetch(wrong, len(BLOB), tmp_path / "weights")
    assert not list(tmp_path.iterdir())


def test_a_blob_that_is_not_published_fails_at_once(edge: Edge, north: Joined, tmp_path: Path) -> None:
    with pytest.raises(TransferFailed, match=r"HTTP 404: .* not published"):
        site_blobs(north).fetch("0" * 64, 5, tmp_path / "weights", timeout_s=60)


def test_a_file_is_uploaded_whole(edge: Edge, north: Joined, tmp_path: Path) -> None:
    path = tmp_path / "delta"
    path.write_bytes(BLOB)
    site_blobs(north).send(path, DIGEST)
    site_blobs(north).send(path, DIGEST)  # again, as after a lost answer
    kept = upload_of(edge, north) / DIGEST
    assert kept.read_bytes() == BLOB
    assert kept.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in kept.parent.iterdir()] == [DIGEST]
    kept.unlink()


def test_an_upload_ends_where_it_may_not_go_on(edge: Edge, north: Joined, tmp_path: Path) -> None:
    path, asked = tmp_path / "delta", list[int]()
    path.write_bytes(BLOB)

    def go_on() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise OrderRefused("STUDY_WITHDRAWN", "withdrawn")

    with pytest.raises(OrderRefused, match="withdrawn"):
        site_blobs(north).send(path, DIGEST, 60.0, go_on)
    assert len(asked) == 3, "before the try, before the first block, before the second"
    assert not (upload_of(edge, north) / DIGEST).exists()
    site_blobs(north).send(path, DIGEST, 60.0)
    (upload_of(edge, north) / DIGEST).unlink()


def test_a_broken_upload_goes_on_where_it_broke(edge: Edge, north: Joined, tmp_path: Path) -> None:
    path = tmp_path / "delta"
    path.write_bytes(BLOB)
    with cut_after(edge.address, 1_500_000) as relay:
        with pytest.raises(TransferFailed, match="could not be sent within 0 s"):
            Blobs(relay, site_context(north.keys)).send(path, DIGEST, timeout_s=0.15)
        part = upload_of(edge, north) / f"{DIGEST}.part"
        assert wait_for(lambda: part.exists() and 0 < part.stat().st_size < len(BLOB))
        Blobs(relay, site_context(north.keys)).send(path, DIGEST)
    assert (upload_of(edge, north) / DIGEST).read_bytes() == BLOB
    (upload_of(edge, north) / DIGEST).unlink()


def test_an_upload_that_is_retried_by_itself_arrives(edge: Edge, north: Joined, tmp_path: Path) -> None:
    path = tmp_path / "delta"
    path.write_bytes(BLOB)
    with cut_after(edge.address, 900_000, times=2) as relay:
        Blobs(relay, site_context(north.keys)).send(path, DIGEST, timeout_s=20)
    assert (upload_of(edge, north) / DIGEST).read_bytes() == BLOB
    (upload_of(edge, north) / DIGEST).unlink()


def test_a_damaged_part_at_the_coordinator_is_sent_anew(edge: Edge, north: Joined, tmp_path: Path) -> None:
    path = tmp_path / "delta"
    path.write_bytes(BLOB)
    for content in (b"wrong" * 1000, os.urandom(len(BLOB))):
        (upload_of(edge, north)).mkdir(exist_ok=True)
        (upload_of(edge, north) / f"{DIGEST}.part").write_bytes(content)
        site_blobs(north).send(path, DIGEST)
        assert (upload_of(edge, north) / DIGEST).read_bytes() == BLOB
        (upload_of(edge, north) / DIGEST).unlink()


def test_a_file_that_is_not_what_its_digest_says_is_not_sent_for_ever(
    edge: Edge, north: Joined, tmp_path: Path
) -> None:
    path = tmp_path / "delta"
    path.write_bytes(BLOB[:-1] + b"x")
    with pytest.raises(TransferFailed, match="is not the file of that digest"):
        site_blobs(north).send(path, DIGEST, timeout_s=60)
    assert not list(upload_of(edge, north).iterdir())


def test_a_file_that_is_too_large_is_refused_before_it_is_sent(edge: Edge, north: Joined, tmp_path: Path) -> None:
    path = tmp_path / "delta"
    with path.open("wb") as file:
        file.truncate(edge.federation.max_blob_bytes + 1)  # a hole, no bytes on disk
    with pytest.raises(TransferFailed, match=r"HTTP 413: .*max_blob_bytes"):
        site_blobs(north).send(path, "1" * 64)


def test_a_coordinator_that_is_away_is_waited_for_until_the_time_is_up(north: Joined, tmp_path: Path) -> None:
    away = Blobs("127.0.0.1:9", site_context(north.keys))
    with pytest.raises(TransferFailed, match=r"within 1 s; last: .*refused"):
        away.fetch(DIGEST, len(BLOB), tmp_path / "weights", timeout_s=0.6)


def test_a_server_with_another_ca_is_not_talked_to(north: Joined, tmp_path: Path) -> None:
    with running_edge(tmp_path / "other") as other:
        blobs = Blobs(other.address, site_context(north.keys))
        with pytest.raises(TransferFailed, match="not the federation's"):
            blobs.fetch(DIGEST, len(BLOB), tmp_path / "weights", timeout_s=60)


def test_a_certificate_that_has_expired_is_not_tried(edge: Edge, north: Joined, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    shutil.copytree(north.keys, keys)
    authority = Credential(edge.federation.ca_certificate.read_bytes(), edge.federation.ca_key.read_bytes())
    long_ago = datetime.now(UTC) - timedelta(days=91)
    key = load_credential(keys / "tls.pem").key
    save_credential(
        keys / "tls.pem", Credential(issue_site(authority, request_certificate("north", key), "north", long_ago), key)
    )
    with pytest.raises(EnrolmentFailed, match=r"tls\.pem: this site's certificate has expired.*fedclient rejoin"):
        site_context(keys)


def test_a_key_that_others_may_read_is_not_used(edge: Edge, tmp_path: Path) -> None:
    site = joined_site(edge, tmp_path, "east")
    (site.keys / "tls.pem").chmod(0o644)
    with pytest.raises(StateInvalid, match="chmod 600"):
        site_context(site.keys)


def test_the_way_leads_through_a_proxy_where_one_is_named(
    edge: Edge, north: Joined, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    asked: list[bytes] = []
    with connect_proxy(asked) as port:
        monkeypatch.setenv("https_proxy", f"http://user:p%40ss@127.0.0.1:{port}")
        got = site_blobs(north).fetch(published, len(BLOB), tmp_path / "weights")
    assert got.read_bytes() == BLOB
    assert asked[0].startswith(f"CONNECT {edge.address} HTTP/1".encode())
    assert b"Proxy-Authorization: Basic dXNlcjpwQHNz" in asked[0]


@contextmanager
def connect_proxy(asked: list[bytes]) -> Iterator[int]:
    """An HTTP proxy that understands CONNECT and serves one connection."""
    listening = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while chunk := source.recv(65536):
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve() -> None:
        near, _ = listening.accept()
        head = b""
        while b"\r\n\r\n" not in head:
            head += near.recv(4096)
        asked.append(head)
        host, port = head.split()[1].decode().split(":")
        far = socket.create_connection((host, int(port)))
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        back = threading.Thread(target=pump, args=(far, near))
        back.start()
        pump(near, far)
        back.join()
        near.close()
        far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield listening.getsockname()[1]
    thread.join(5)
    listening.close()


def test_the_context_is_not_in_the_repr(north: Joined) -> None:
    assert "SSLContext" not in repr(site_blobs(north))


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(BLOB)
    assert file_sha256(tmp_path / "x") == DIGEST
