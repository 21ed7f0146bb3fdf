"""What the doctors find: planted troubles, each named with its remedy, over a real gateway and real sockets."""

import json
import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

import fedclient.cli
import fedserver.cli
from fedclient import doctor
from fedclient.limits import Limits
from fedclient.policy import Policy
from fedclient.site import Cache, Data, SiteFile, read_site_file, site_toml
from fedserver import doctor as server_doctor
from fedserver.enrol import authority_of, init_federation, invite, open_federation
from shared_models import doctor as shared
from shared_models.doctor import Line, memory_bytes
from shared_models.errors import StateInvalid
from shared_models.files import write_atomic, write_json
from shared_models.identity import (
    Credential,
    issue_server,
    issue_site,
    load_credential,
    new_authority,
    request_certificate,
    save_credential,
)
from shared_models.invite import read_invite
from simulations.phantoms import PhantomPlan, phantom
from tests.edge import Edge, joined_site, running_edge

PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge") / "federation") as edge:
        yield edge


@pytest.fixture(scope="module")
def original(edge: Edge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site that has joined, with a phantom's images that nobody has looked at."""
    data = phantom(
        tmp_path_factory.mktemp("data"), PhantomPlan(sites=1, train=2, val=1, test=1, slices=1, size=16), processes=1
    )
    folder = joined_site(edge, tmp_path_factory.mktemp("site"), "north").keys.parent
    settings(folder, SiteFile("north", edge.address, "Test federation", Data(str(data)), cache=Cache(0.001)))
    return folder


@pytest.fixture
def site(original: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(original, tmp_path / "site")
    return tmp_path / "site"


def settings(folder: Path, file: SiteFile) -> None:
    write_atomic(folder / "site.toml", site_toml(file).encode())


def changed(folder: Path, **changes: object) -> None:
    settings(folder, replace(read_site_file(folder), **changes))  # type: ignore[arg-type]


def found(folder: Path, *checks: str) -> dict[str, Line]:
    """Lines by check: all, or those of a few checks."""
    lines = doctor.examine(folder)
    if checks:
        made = doctor._checks(folder, read_site_file(folder))
        lines = shared.examined({name: made[name] for name in checks})
    return {line.check: line for line in lines}


def test_a_sound_site_has_nothing_to_mend(site, monkeypatch):
    (site / "node").mkdir()
    lines = found(site)
    assert {name for name, line in lines.items() if line.state == "fail"} == set(), lines
    for name in ("settings", "keys", "certificate", "proxy", "dns", "reach", "tls", "admission", "clock", "flower"):
        assert lines[name].state == "ok", lines[name]
    assert "4 not looked at yet" in lines["data"].words
    assert lines["node"] == Line("node", "warn", "does not run.", "`fedclient start` starts it.")


def test_the_command_prints_each_line_and_its_remedy_and_exits_with_1_where_something_fails(site):
    (site / "keys/identity.key").chmod(0o644)
    done = CliRunner().invoke(fedclient.cli.app, ["doctor", "--site", str(site)])
    assert done.exit_code == 1
    assert "fail  keys: " in done.stdout
    assert "chmod 600" in done.stdout
    assert done.stdout.strip().endswith("to mend.")
    told = CliRunner().invoke(fedclient.cli.app, ["doctor", "--site", str(site), "--json"])
    assert told.exit_code == 1
    facts = json.loads(told.stdout)
    assert facts["state"] == "fail"
    assert {"check", "state", "words", "mend"} == set(facts["lines"][0])


def test_a_folder_that_is_no_site_is_one_failing_line_and_the_machine_is_looked_at_all_the_same(tmp_path):
    lines = found(tmp_path)
    assert lines["settings"].state == "fail"
    assert "fedclient join" in lines["settings"].mend
    assert lines["versions"].state in ("ok", "warn")


def test_a_coordinator_that_is_not_there_is_told_with_the_firewall(site):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        changed(site, coordinator=f"127.0.0.1:{taken.getsockname()[1]}")
        lines = found(site, "tls", "clock")
    assert lines["tls"].state == "fail"
    assert "Connection refused" in lines["tls"].words
    assert "firewall" in lines["tls"].mend
    assert lines["clock"].state == "warn"


def test_a_certificate_that_is_of_the_future_is_told(site, edge):
    key, ahead = load_credential(site / "keys/tls.pem").key, datetime.now(UTC) + timedelta(days=3)
    future = issue_site(authority_of(edge.federation), request_certificate("north", key), "north", ahead)
    save_credential(site / "keys/tls.pem", Credential(future, key))
    line = found(site, "certificate")["certificate"]
    assert (line.state, "begins only on" in line.words, "fedclient rejoin INVITE" in line.mend) == ("fail", True, True)


def test_a_name_that_nobody_knows_is_told(site):
    changed(site, coordinator="no-such-host.invalid:8443")
    line = found(site, "dns")["dns"]
    assert line.state == "fail"
    assert "no-such-host.invalid has no address here" in line.words


@contextmanager
def inspecting(folder: Path) -> Iterator[str]:
    """Somebody who reads TLS: a listener with a certificate of an authority of its own; its address."""
    inspector = new_authority("Hospital web filter")
    save_credential(folder / "filter.pem", issue_server(inspector, ["127.0.0.1"]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "filter.pem")
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.1)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                connection, _ = listening.accept()
                context.wrap_socket(connection, server_side=True).close()
            except OSError:  # nobody came, or somebody hung up over the certificate
                continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        stop.set()
        thread.join()
        listening.close()


def test_tls_that_is_read_on_the_way_is_named_with_whose_certificate_is_shown(site, tmp_path):
    with inspecting(tmp_path) as address:
        changed(site, coordinator=address)
        line = found(site, "tls")["tls interception"]
    assert line.state == "fail"
    assert "issued by CN=CA,O=Hospital web filter" in line.words
    assert "exempted from TLS inspection" in line.mend


def test_a_certificate_of_our_authority_for_another_name_is_no_interception(site, edge):
    port = edge.address.partition(":")[2]
    changed(site, coordinator=f"0.0.0.0:{port}")  # Linux dials itself there, and it stands in no certificate
    line = found(site, "tls").get("tls")
    assert line is not None
    assert line.state == "fail"
    assert "is the coordinator's and not good" in line.words


def test_a_site_that_is_shut_out_hears_why(site, edge, tmp_path):
    from fedserver.lifecycle import revoke

    folder = joined_site(edge, tmp_path / "other", "south").keys.parent
    settings(folder, SiteFile("south", edge.address, "Test federation", Data(str(tmp_path))))
    revoke(edge.federation, "south", "a test")
    time.sleep(2.1)  # of the gateway's memory
    line = found(folder, "tls")["admission"]
    assert line.state == "fail"
    assert "was revoked on" in line.words


def test_a_clock_that_is_off_is_told_with_its_difference(site, monkeypatch):
    monkeypatch.setattr(doctor, "clock_gap", lambda address, context: (-601.0, 600.0))
    line = found(site, "clock")["clock"]
    assert (line.state, "600 s behind" in line.words, "timedatectl" in line.mend) == ("fail", True, True)


def test_the_proxy_on_the_way_is_named_and_asked(site, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        changed(site, coordinator="fed.example.org:8443")
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{port}")
        (line,) = doctor._proxy("fed.example.org:8443")
    assert line == Line("proxy", "ok", f"by way of 127.0.0.1:{port}, which answers.")
    with pytest.raises(StateInvalid, match="Check HTTPS_PROXY"):
        list(doctor._proxy("fed.example.org:8443"))
    monkeypatch.setenv("NO_PROXY", "fed.example.org")
    assert "HTTPS_PROXY is set and leaves it out" in next(iter(doctor._proxy("fed.example.org:8443"))).words


def test_a_proxy_that_would_take_loopback_too_is_told(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://10.0.0.1:3128")
    first, second = doctor._proxy("127.0.0.1:8443")
    assert "HTTP_PROXY is set and HTTPS_PROXY is not" in first.words
    assert "NO_PROXY=127.0.0.1,localhost,::1" in second.mend
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    assert len(list(doctor._proxy("127.0.0.1:8443"))) == 1


def test_a_quota_that_does_not_fit_on_the_disk_is_told(site):
    changed(site, cache=Cache(900_000.0))
    line = found(site, "disk")["disk"]
    assert line.state == "warn"
    assert "0 of 900000 GiB are in it" in line.words
    assert shared.disk(site, 0, "nothing").state in ("ok", "warn")


def test_a_limit_beyond_the_machine_is_told(site):
    changed(site, limits=Limits(memory_gib=50_000.0))
    line = found(site, "memory")["memory"]
    assert line.state == "warn"
    assert "Lower memory_gib" in line.mend


def test_memory_is_that_of_the_container_where_that_is_less(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n")
    assert memory_bytes(tmp_path / "meminfo", tmp_path, tmp_path / "own") == (8 << 30, 4 << 30)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1073741824\n")
    assert memory_bytes(tmp_path / "meminfo", tmp_path, tmp_path / "own") == (8 << 30, 4 << 30)
    (tmp_path / "memory.max").write_text(f"{2 << 30}\n")
    assert memory_bytes(tmp_path / "meminfo", tmp_path, tmp_path / "own") == (2 << 30, 1 << 30)
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {1 << 29}\n")
    assert memory_bytes(tmp_path / "meminfo", tmp_path, tmp_path / "own") == (2 << 30, 3 << 29), (
        "files that were read are given up"
    )


def test_memory_is_that_of_the_systemd_unit_or_of_the_least_slice_above_it(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n")
    own, groups = tmp_path / "own", tmp_path / "groups"
    unit = groups / "system.slice/fedclient.service"
    unit.mkdir(parents=True)
    own.write_text("0::/system.slice/fedclient.service\n")

    def limited(group: Path, most_gib: int, used_gib: int) -> None:
        (group / "memory.max").write_text(f"{most_gib << 30}\n")
        (group / "memory.current").write_text(f"{used_gib << 30}\n")

    limited(unit, 4, 1)
    assert memory_bytes(tmp_path / "meminfo", groups, own) == (4 << 30, 3 << 30)
    limited(unit.parent, 3, 1)
    assert memory_bytes(tmp_path / "meminfo", groups, own) == (3 << 30, 2 << 30)
    (unit / "memory.current").write_text(f"{7 << 29}\n")
    assert memory_bytes(tmp_path / "meminfo", groups, own) == (3 << 30, 1 << 29), (
        "the unit has less left than its slice"
    )
    limited(groups, 2, 1)
    for elsewhere in ("0::/\n", "0::/docker/abc\n", "0::/../x\n", "4:memory:/x\n"):
        own.write_text(elsewhere)
        assert memory_bytes(tmp_path / "meminfo", groups, own) == (2 << 30, 1 << 30)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """NVIDIA's tool on the path, with one GPU."""
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'Quadro P400, 470.82.01'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_gpu_that_is_missing_and_one_that_stands_idle_are_told(driver, monkeypatch):
    monkeypatch.setattr("fedclient.training.device.gpus", lambda: 0)
    (line,) = doctor.device("cuda:1", Limits())
    assert (line.state, "site.toml asks for cuda:1" in line.words) == ("fail", True)
    (line,) = doctor.device("auto", Limits())
    assert line.state == "warn"
    assert "Quadro P400 with driver 470.82.01 stands idle" in line.words
    (line,) = doctor.device("cpu", Limits())
    assert line.state == "ok"


def test_a_gpu_that_is_seen_and_cannot_compute_is_a_failure(driver, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine's GPU computes")
    monkeypatch.setattr("fedclient.training.device.gpus", lambda: 1)
    with pytest.raises(StateInvalid, match="cannot compute on it"):
        list(doctor.device("cuda:0", Limits()))


def test_the_data_are_told_as_the_last_check_left_them(site):
    assert "not looked at yet" in found(site, "data")["data"].words
    for words in (["--study", "lung-ct"], []):
        assert CliRunner().invoke(fedclient.cli.app, ["check", "--site", str(site), *words]).exit_code in (0, 1)
        line = found(site, "data")["data"]
        assert line.state in ("ok", "fail")
        assert "not looked at" not in line.words
    changed(site, data=Data("/nowhere"))
    line = found(site, "data")["data"]
    assert (line.state, "the data folder is not there" in line.words) == ("fail", True)


def test_hours_and_studies_that_wait_are_told(site):
    (line,) = doctor._policy(site, Policy(hours=("00:00-00:01", "00:01-00:00")))
    assert "open now" in line.words
    write_json(site / "studies/abc/study.json", {})
    (line,) = doctor._policy(site, Policy())
    assert (line.state, "1 studies wait" in line.words) == ("warn", True)


def test_versions_and_names_of_flower_that_are_others_are_told(monkeypatch, tmp_path):
    assert [line.state for line in shared.flower_names()] == ["ok"]
    monkeypatch.setattr(shared, "NAMES", {"flwr.supercore.constant": ["SQLITE_PRAGMAS", "NO_SUCH"], "flwr.none": ["x"]})
    (line,) = shared.flower_names()
    assert line.state == "fail"
    assert "flwr.supercore.constant.NO_SUCH" in line.words
    monkeypatch.setattr(shared, "_requirements", lambda: [Requirement("numpy<1"), Requirement("gone>1")])
    (line,) = shared.versions()
    assert line.state == "fail"
    assert "missing: gone" in line.words
    assert "(asked for: <1)" in line.words
    (tmp_path / "constraints.txt").write_text("# tried\nnumpy==0.9\nabsent==1\n")
    assert [words.partition(" ")[0] for words in shared._others(tmp_path / "constraints.txt")] == ["numpy"]


def test_a_check_that_breaks_is_a_line_and_stops_no_other():
    def broken() -> Iterator[Line]:
        raise OSError(5, "Input/output error")
        yield

    lines = list(shared.examined({"disk": broken, "memory": lambda: [shared.memory()]}))
    assert (lines[0].check, lines[0].state) == ("disk", "fail")
    assert lines[1].check == "memory"


# The coordinator


def at_the_coordinator(folder: Path) -> dict[str, Line]:
    return {line.check: line for line in server_doctor.examine(folder)}


def test_a_served_coordinator_has_nothing_to_mend(edge):
    lines = at_the_coordinator(edge.federation.folder)
    assert {name for name, line in lines.items() if line.state == "fail"} <= {"port"}, lines
    assert lines["certificates"].state == "ok"
    assert lines["backup"].state == "warn"


def test_a_new_coordinator_is_told_what_is_missing(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = init_federation(tmp_path / "federation", "Test", f"127.0.0.1:{port}", certificate_days=90)
    lines = at_the_coordinator(made.folder)
    assert "nothing serves the federation" in lines["port"].words
    with socket.create_server(("", port)):
        assert at_the_coordinator(made.folder)["port"].state == "fail"
    write_json(made.folder / "backup.json", {"at": time.time() - 8 * 86400})
    line = at_the_coordinator(made.folder)["backup"]
    assert (line.state, line.words) == ("warn", "the last one is 8 days old.")
    write_json(made.folder / "backup.json", {"at": time.time() - 3601})
    assert at_the_coordinator(made.folder)["backup"] == Line("backup", "ok", "the last one is 1 hour old.")


def test_an_address_that_nobody_else_can_dial_is_told_and_changed_as_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    told = CliRunner().invoke(fedserver.cli.app, ["init", "--federation", str(tmp_path / "federation")]).stdout
    settings = tmp_path / "federation/federation.toml"
    for words in ("by which nobody but this machine reaches it", f"set `address` in {settings}", "`fedserver renew`"):
        assert words in told
    assert at_the_coordinator(settings.parent)["address"].state == "warn"
    settings.write_text(settings.read_text().replace("localhost", "192.0.2.7"))
    lines = at_the_coordinator(settings.parent)
    assert (lines["address"].state, lines["address, certificate"].state) == ("ok", "fail")
    assert CliRunner().invoke(fedserver.cli.app, ["renew", "--federation", str(settings.parent)]).exit_code == 0
    assert "address, certificate" not in at_the_coordinator(settings.parent)
    assert read_invite(invite(open_federation(settings.parent), "north")).address == "192.0.2.7:8443"


def test_a_clock_that_was_set_back_is_told():
    assert shared.clock_moved_back(1000.0, "the audit log", 999.0).state == "ok"
    line = shared.clock_moved_back(1000.0, "the audit log", 400.0)
    assert (line.state, "600 s behind" in line.words) == ("fail", True)


def test_the_coordinators_command_says_so_in_json_and_by_its_exit_code(tmp_path):
    made = init_federation(tmp_path / "federation", "Test", "127.0.0.1:1")
    done = CliRunner().invoke(fedserver.cli.app, ["doctor", "--federation", str(made.folder), "--json"])
    facts = json.loads(done.stdout)
    assert done.exit_code == (1 if facts["state"] == "fail" else 0)
    (made.folder / "ca/ca.key").chmod(0o640)
    assert CliRunner().invoke(fedserver.cli.app, ["doctor", "--federation", str(made.folder)]).exit_code == 1
