"""Attacks on a federation of real processes: each is refused, each stands in an audit log by its name, and runs go on.

What nobody could try from outside (a study, an app or a log that was changed) is tried where it is doubted:
`tests/test_attack_list.py` says where each attack of the list is.
"""

import http.client
import re
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedclient.enrol import Joined, join
from fedserver.enrol import Federation, invite, open_federation
from fedserver.state import find_site
from shared_models.files import read_lines, write_atomic
from shared_models.identity import (
    Credential,
    issue_site,
    load_credential,
    new_authority,
    request_certificate,
    save_credential,
)
from shared_models.transfer import connect, site_context, trusting
from tests.edge import node_headers
from tests.processes.test_flower_processes import ROOT, Deployment, deployment, wait

__all__ = ["deployment"]
pytestmark = pytest.mark.process
PULL, PUSH, OBJECT = "/v1/fleet/pull-messages", "/v1/fleet/push-messages", "/v1/fleet/push-object"
FOREVER = 10.0


@dataclass(frozen=True, slots=True)
class Attacker:
    """Whoever can dial the gateway, and has what the test gives."""

    federation: Federation
    sites: dict[str, Path]

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.federation.address.split(":")
        return host, int(port)

    def stranger(self) -> ssl.SSLContext:
        return trusting(self.federation.authority)

    def site(self, name: str) -> ssl.SSLContext:
        return site_context(self.sites[name] / "keys")

    def headers(self, name: str) -> dict[str, str]:
        return node_headers(joined(self.sites[name], name))

    def ask(
        self, context: ssl.SSLContext, path: str, body: bytes = b"x", headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        with closing(connect(self.federation.address, context, 30)) as connection:
            connection.request("POST", path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")

    def refused(self, code: str, site: str | None = None) -> bool:
        """Whether the coordinator's audit log holds such a refusal."""
        lines = [line["facts"] for line in read_lines(self.federation.audit) if line["event"] == "refused"]
        return any(facts["code"] == code and facts.get("site") == site for facts in lines)

    def audited(self, code: str, site: str | None = None) -> None:
        wait(f"line of {code}", lambda: self.refused(code, site), FOREVER)


def joined(site: Path, name: str) -> Joined:
    return Joined("Toy", name, "", site / "keys", "", "", 0.0)


@pytest.fixture
def attacker(deployment: Deployment) -> Attacker:
    return Attacker(open_federation(deployment.folder), deployment.sites)


@pytest.fixture(scope="module", autouse=True)
def runs_go_on(deployment: Deployment) -> Iterator[None]:
    """After all attacks a run is carried out, each update counted once, by processes that nothing has restarted."""
    pids = [deployment.pid(deployment.folder, child) for child in ("gateway", "link")]
    yield
    deployment.queue("after", rounds=2)
    deployment.finish("after")
    deployment.all_rounds_once("after", 2)
    assert [deployment.pid(deployment.folder, child) for child in ("gateway", "link")] == pids


def test_no_certificate_a_foreign_one_and_an_expired_one(attacker: Attacker, tmp_path: Path) -> None:
    status, words = attacker.ask(attacker.stranger(), PULL)
    assert (status, "site's certificate" in words) == (403, True)
    attacker.audited("NO_CERTIFICATE")
    key = load_credential(attacker.sites["north"] / "keys/tls.pem").key
    asked = request_certificate("north", key)
    real = Credential(attacker.federation.ca_certificate.read_bytes(), attacker.federation.ca_key.read_bytes())
    for authority, days, code in (
        (new_authority("Foreign"), 90.0, "CERTIFICATE_NOT_OURS"),
        (real, -1e-4, "CERTIFICATE_EXPIRED"),
    ):
        save_credential(tmp_path / "t.pem", Credential(issue_site(authority, asked, "north", days=days), key))
        context = attacker.stranger()
        context.load_cert_chain(tmp_path / "t.pem")
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            attacker.ask(context, PULL)
        attacker.audited(code)
    old = attacker.stranger()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        attacker.ask(old, PULL)
    attacker.audited("TLS_HANDSHAKE")


def test_another_sites_key_a_replayed_call_and_a_forged_source(attacker: Attacker) -> None:
    north, south = attacker.headers("north"), attacker.site("south")
    replayed = {**north, "flwr-signature": "x", "flwr-timestamp": "2026-01-01T00:00:00+00:00"}
    for headers in (north, replayed):
        status, words = attacker.ask(south, PULL, b"x", headers)
        assert (status, "not enrolled" in words) == (403, True)
    attacker.audited("NODE_KEY", "south")
    victim = find_site(attacker.federation.state, "north")
    assert victim is not None
    assert victim.flower_node_id is not None
    forged = PushMessagesRequest(messages_list=[Message(metadata=Metadata(src_node_id=victim.flower_node_id))])
    status, words = attacker.ask(south, PUSH, forged.SerializeToString(), attacker.headers("south"))
    assert (status, "in the name of another node" in words) == (403, True)
    attacker.audited("FORGED_SOURCE", "south")


def test_control_runtime_and_register_calls_from_outside(attacker: Attacker) -> None:
    for path in (
        "/v1/control/start-run", "/v1/control/list-nodes", "/v1/runtime/acquire-task", "/v1/fleet/register-node",
        "/v1/fleet/unregister-node", "/v1/fleet/../control/start-run", "/docs",
    ):  # fmt: skip
        for context in (attacker.stranger(), attacker.site("south")):
            status, words = attacker.ask(context, path, b"x", attacker.headers("south"))
            assert (status, "is not offered here" in words) == (404, True)
    attacker.audited("NOT_OFFERED")
    attacker.audited("NOT_OFFERED", "south")


def test_a_body_of_400_mb_and_a_chunk_that_is_named_a_thousand_times(
    attacker: Attacker, deployment: Deployment
) -> None:
    before = memory(deployment)
    for context, headers in ((attacker.stranger(), {}), (attacker.site("south"), attacker.headers("south"))):
        with (
            suppress(ConnectionError, ssl.SSLError),
            closing(connect(attacker.federation.address, context, 30)) as sent,
        ):
            sent.putrequest("POST", PULL)
            for name, value in {**headers, "content-length": str(400 << 20)}.items():
                sent.putheader(name, value)
            sent.endheaders()
            for _ in range(400):
                sent.send(bytes(1 << 20))
            response = sent.getresponse()
            assert response.status in (403, 413)
            response.read()
    attacker.audited("BODY_TOO_LARGE", "south")
    array = Array("float32", (256, 1024), "numpy.ndarray", bytes(1 << 20))
    content = RecordDict({"tensors": ArrayRecord({"a": array})})
    objects = {name: thing.deflate() for name, thing in get_all_nested_objects(content).items()}
    bombs = [
        body.replace(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [' + b"0, " * 999 + b"0]")
        for body in objects.values()
    ]
    kinds = set()
    for body in bombs:
        pushed = PushObjectRequest(object_id="0" * 64, object_content=body).SerializeToString()
        status, words = attacker.ask(attacker.site("south"), OBJECT, pushed, attacker.headers("south"))
        kinds |= {(body.partition(b" ")[0], status == 400 and "no reply is made of" in words)}
    assert {(b"Array", True), (b"ArrayChunk", True), (b"ArrayRecord", True)} <= kinds
    attacker.audited("TENSOR_IN_MESSAGE", "south")
    assert memory(deployment) < 1.5 * before


def test_400_idle_connections(attacker: Attacker, deployment: Deployment) -> None:
    before = memory(deployment)
    with ExitStack() as idle:
        for number in range(400):  # half of them never say a word of TLS
            raw = idle.enter_context(closing(socket.create_connection(attacker.address, timeout=10)))
            if number % 2:
                with suppress(OSError):
                    idle.enter_context(closing(attacker.stranger().wrap_socket(raw, server_hostname="127.0.0.1")))
        mine = attacker.site("south")
        for _ in range(100):
            raw = idle.enter_context(closing(socket.create_connection(attacker.address, timeout=10)))
            with suppress(OSError):
                idle.enter_context(closing(mine.wrap_socket(raw, server_hostname="127.0.0.1")))
        assert memory(deployment) < 1.5 * before
        with closing(connect(attacker.federation.address, attacker.site("north"), 10)) as site:
            site.request("GET", "/health")
            assert b"north" in site.getresponse().read()
        attacker.audited("TOO_MANY_STRANGERS")
        attacker.audited("TOO_MANY_CONNECTIONS", "south")
    wait("end of them", lambda: memory(deployment) < 1.5 * before, 30)


def memory(deployment: Deployment) -> int:
    """Of the two processes that bytes from outside get to."""
    return sum(
        psutil.Process(deployment.pid(deployment.folder, child)).memory_info().rss for child in ("gateway", "link")
    )


def test_another_user_of_the_hospitals_machine_at_the_port_of_its_node(attacker: Attacker) -> None:
    site = attacker.sites["north"]
    port = int((site / "node/port").read_text())
    for path in ("acquire-task", "pull-messages"):
        call = urllib.request.Request(f"http://127.0.0.1:{port}/v1/runtime/{path}", data=b"", method="POST")
        call.add_header("content-type", "application/protobuf")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(call, timeout=10)
        with refused.value as answer:
            assert answer.code in (401, 403)
    wait("line", lambda: "RUNTIME_PORT" in {code(line) for line in read_lines(site / "audit.jsonl")}, FOREVER)


def test_a_clock_that_is_ten_minutes_off(attacker: Attacker, tmp_path: Path) -> None:
    west = tmp_path / "west"
    join(invite(attacker.federation, "west"), west)
    write_atomic(west / "site.toml", f'coordinator = "{attacker.federation.address}"\n'.encode())
    late = "import time; real = time.time; time.time = lambda: real() + 600; from fedclient.node import main; main()"
    with (tmp_path / "node.log").open("wb") as output:
        node = subprocess.Popen(
            [sys.executable, "-c", late, str(west), "--port", "9"], cwd=ROOT, stdout=output, stderr=output
        )
    try:
        until = time.monotonic() + 60
        while (
            not (west / "audit.jsonl").exists()
            or "CLOCK" not in {code(x) for x in read_lines(west / "audit.jsonl")}
            or "clock" not in (tmp_path / "node.log").read_text()  # which comes after the line of the audit log
        ):
            assert node.poll() is None, "it waits for the clock, and is not started anew again and again"
            assert time.monotonic() < until
            time.sleep(0.2)
    finally:
        node.kill()
        node.wait()
    said = (tmp_path / "node.log").read_text()
    assert re.search(r"this machine's clock: is (599|600|601) s ahead of the coordinator's", said)
    assert "Set both by NTP" in said
    assert "Traceback" not in said


def code(line: dict[str, object]) -> object:
    facts = line["facts"]
    assert isinstance(facts, dict)
    return facts.get("code")
