"""Hostile input: the catalogue of bad files, floods, DICOM changed at random; the service stays up and small.

SERVE_FUZZ_S=600 python -m pytest tests/processes/test_serve_hostile.py -k random    fuzzes for longer
"""

import gc
import os
import re
import socket
import time
import warnings
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, _config

from simulations.fixtures.dicom import write_dicom_series
from simulations.fixtures.faults import FAULTS
from simulations.fixtures.sown import Set, person
from tests.processes.serving import Served, release_in, served, until
from tests.processes.test_serve_page import chest

FUZZ_S = float(os.environ.get("SERVE_FUZZ_S", "20"))
GROWTH_BYTES = 150 << 20  # of either process, above what it had after the first cases
UNREADABLE = {
    "DICOM_UNREADABLE", "DICOM_CODEC_MISSING", "SERIES_GAP", "SERIES_IRREGULAR", "INPUT_TOO_LARGE", "UNSAFE_FORMAT",
}  # fmt: skip
REQUEST = (  # an association for C-ECHO
    b"\1\0\0\0\0\xcd\0\1\0\0" + b"FEDIMAGING      " + b"FUZZ            " + b"\0" * 32
    + b"\x10\0\0\x15" + b"1.2.840.10008.3.1.1.1" + b"\x20\0\0\x2e\1\0\0\0" + b"\x30\0\0\x11"
    + b"1.2.840.10008.1.1" + b"\x40\0\0\x11" + b"1.2.840.10008.1.2"
    + b"\x50\0\0\x08\x51\0\0\4\0\0\x40\0"
)  # fmt: skip
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with served(folder, release_in(folder), "--allow", "FUZZ", "--most-mib", "16") as here:
        yield here


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    return [path.read_bytes() for path in write_dicom_series(folder, person(0).volume).paths]


def is_well(service: Served, folder: Path) -> None:
    """It still answers a sound case."""
    assert service.process.poll() is None
    assert service.upload([chest(folder)])["state"] == "done"


def test_what_cannot_be_read_is_told_by_its_code_and_no_path(service, tmp_path):
    tried = 0
    for n, fault in enumerate(each for each in FAULTS if each.code in UNREADABLE and not each.whole):
        made = Set(tmp_path / str(n))
        fault.make(made)
        image = made.root / made.rows[0]["image"]
        files = [image] if image.is_file() else sorted(path for path in image.rglob("*") if path.is_file())
        if "mask" in fault.name or not image.exists() or sum(path.stat().st_size for path in files) > 8 << 20:
            continue
        told = service.upload(files)
        codes = [each["code"] for each in told["unread"]]  # of a series in which one file is noise the rest is read
        assert codes, fault.name
        assert all(re.fullmatch("[A-Z][A-Z0-9_]+", code) and code != "INTERNAL" for code in codes), fault.name
        assert (told["state"] == "failed") == (told["images"] == []), fault.name
        assert str(tmp_path) not in str(told), fault.name
        tried += 1
    assert tried >= 10
    assert psutil.Process(service.process.pid).is_running()
    is_well(service, tmp_path)


def test_too_much_is_refused_before_it_is_read(service, tmp_path):
    def endless():
        for _ in range(40):
            yield b"\0" * (1 << 20)

    kind = {"content-type": "multipart/form-data; boundary=x"}
    with httpx.Client(timeout=60, headers=service.shown) as client:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as link:
            head = f"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1 << 40}\r\n"
            head += f"Authorization: Bearer {service.token}\r\n\r\n"
            link.sendall(head.encode())
            assert link.recv(64).startswith(b"HTTP/1.1 413")
        try:
            unstated = client.post(f"{service.url}/api/jobs", content=endless(), headers=kind)
            assert unstated.status_code in (400, 413)
        except httpx.WriteError:  # it was cut off while it sent
            pass
        for kind_of in ("text/plain", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 100):
            answer = client.post(f"{service.url}/api/jobs", content=b"--x\r\n", headers={"content-type": kind_of})
            assert answer.status_code == 415
        assert client.get(f"{service.url}/api/jobs/{'0' * 32}").status_code == 404
        assert client.get(f"{service.url}/api/jobs/{'0' * 32}/files/../../../secrets").status_code == 404
    assert list((service.site / "serve" / "jobs").rglob("in/*")) == []
    is_well(service, tmp_path)


def test_another_sites_page_and_another_name_of_this_machine_are_refused(service):
    with httpx.Client(timeout=60, headers=service.shown) as client:
        foreign = client.post(f"{service.url}/api/jobs", content=b"", headers={"origin": "https://evil.example"})
        assert foreign.status_code == 403
        renamed = client.get(f"{service.url}/api/health", headers={"host": f"evil.example:{service.port}"})
        assert renamed.status_code == 421
        policy = client.get(service.url).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def changed(content: bytes, rng: np.random.Generator, keep: int = 0) -> bytes:
    """Some bytes of `content` after `keep` flipped, cut off, doubled, or blown up."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        # headers are where parsers decide
        at = int(rng.integers(keep, min(len(data), keep + 1500) if rng.uniform() < 0.8 else len(data)))
        match int(rng.integers(0, 5)):
            case 0:
                data[at] = int(rng.integers(0, 256))
            case 1:
                data[at : at + 4] = b"\xff\xff\xff\xff"
            case 2:
                data[at : at + 2] = b"\0\0"
            case 3:
                data[at:at] = data[at : at + int(rng.integers(1, 64))]
            case _:
                if rng.uniform() < 0.3:
                    del data[at + 1 :]
    return bytes(data)


def stow(client: httpx.Client, service: Served, objects: list[bytes]) -> int:
    body = (
        b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n" + each + b"\r\n" for each in objects) + b"--b--\r\n"
    )
    headers = {"content-type": 'multipart/related; type="application/dicom"; boundary=b'}
    return client.post(f"{service.url}/dicom-web/studies", content=body, headers=headers).status_code


def c_store(service: Served, objects: list[bytes], folder: Path) -> None:
    """Objects as they are, however broken, in one association."""
    entity = AE(ae_title="FUZZ")
    entity.network_timeout = entity.dimse_timeout = entity.acse_timeout = 20
    entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    link = entity.associate("127.0.0.1", service.dicom_port, ae_title="FEDIMAGING")
    for n, content in enumerate(objects):
        path = folder / f"{n}.dcm"
        path.write_bytes(content)
        if link.is_established:
            link.send_c_store(path)
    if link.is_established:
        link.release()
    left = link.dul.socket.socket if link.dul.socket is not None else None
    if left is not None:  # of an association that was refused or aborted
        left.close()


def raw(service: Served, content: bytes) -> None:
    """Bytes to the DICOM port that are no association, or only nearly one."""
    with socket.create_connection(("127.0.0.1", service.dicom_port), timeout=10) as link:
        link.settimeout(0.2)
        link.sendall(content)
        with suppress(OSError):
            link.recv(4096)


def test_dicom_changed_at_random_neither_ends_the_service_nor_makes_it_grow(service, slices, tmp_path, monkeypatch):
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)
    rng = np.random.default_rng(int(os.environ.get("SERVE_FUZZ_SEED", "0")))
    meta = slices[0].index(b"\x08\0\x05\0") if b"\x08\0\x05\0" in slices[0][:600] else 400
    is_well(service, tmp_path)
    processes = [psutil.Process(service.process.pid), service.worker()]
    before = [each.memory_info().rss for each in processes]
    open_before, sent = processes[0].num_fds(), 0
    end = time.monotonic() + FUZZ_S
    with httpx.Client(timeout=120, headers=service.shown) as client:
        while time.monotonic() < end:
            odd = [changed(each, rng) for each in slices]
            assert stow(client, service, odd) in (200, 202, 400, 409, 413, 503)
            c_store(service, [changed(each, rng, keep=meta) for each in slices[:2]], tmp_path)
            raw(service, changed(REQUEST, rng))
            raw(service, b"\1\0\xff\xff\xff\xff" + bytes(rng.integers(0, 256, 200, dtype=np.uint8)))
            parts = [("files", (f"{n}.dcm", each)) for n, each in enumerate(odd)]
            answer = client.post(f"{service.url}/api/jobs", files=parts)
            assert answer.status_code in (202, 503)
            if answer.status_code == 202:
                service.ended(answer.json()["id"])
            sent += 2 * len(odd) + 4
            assert service.process.poll() is None
    until(lambda: all(job["state"] in ("done", "failed") for job in service.jobs()), "all cases end")
    is_well(service, tmp_path)
    growth = processes[0].memory_info().rss - before[0]
    assert growth < GROWTH_BYTES, f"{growth >> 20} MiB after {sent} objects"
    if processes[1].is_running():
        assert processes[1].memory_info().rss - before[1] < GROWTH_BYTES
    until(lambda: processes[0].num_fds() < open_before + 40, "connections that broke are let go")  # half a minute
    with warnings.catch_warnings():  # pynetdicom, as a client, forgets sockets of associations that were refused
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    assert "PHANTOM-0001" not in service.log.read_text()
    restarts = service.get("/api/health")["restarts"]
    print(f"{sent} objects in {FUZZ_S:.0f} s, growth {growth >> 20} MiB, {restarts} restarts")


def test_a_worker_that_is_killed_costs_its_case_and_no_more(service, tmp_path):
    is_well(service, tmp_path)
    service.worker().kill()
    until(lambda: service.upload([chest(tmp_path)])["state"] == "done", "another worker answers")
    assert service.get("/api/health")["restarts"] >= 1
