"""`fedclient serve-model` as a process of its own, and the peers that talk to it: DCMTK, Orthanc."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from simulations.demo import free_port
from tests.releases import made_release

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300.0  # on a machine that is busy with other tests
SEG, SR, SC = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.7"
LUNG_CT = (
    "LIDC-IDRI-0001_z-0110.00.dcm", "LIDC-IDRI-0001_z-0112.50.dcm", "LIDC-IDRI-0001_z-0115.00.dcm",
    "LIDC-IDRI-0001_z-0117.50.dcm", "LIDC-IDRI-0001_z-0120.00.dcm", "LIDC-IDRI-0001_z-0122.50.dcm",
)  # fmt: skip  # six slices of a real series, 2.5 mm apart


@dataclass(frozen=True)
class Served:
    """A service that runs."""

    site: Path
    process: subprocess.Popen[bytes]
    log: Path
    port: int
    dicom_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return (self.site / "secrets" / "serve-token").read_text()

    @property
    def shown(self) -> dict[str, str]:
        """The header that lets one in."""
        return {"authorization": f"Bearer {self.token}"}

    @property
    def link(self) -> str:
        return f"{self.url}/#token={self.token}"

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, headers=self.shown, timeout=60).raise_for_status().json()

    def upload(self, files: Sequence[Path]) -> dict[str, Any]:
        """Sends files as the page does, and waits for what comes of them."""
        parts = [("files", (path.name, path.read_bytes())) for path in files]
        answer = httpx.post(f"{self.url}/api/jobs", files=parts, headers=self.shown, timeout=120)
        assert answer.status_code == 202, answer.text
        return self.ended(answer.json()["id"])

    def ended(self, job: str) -> dict[str, Any]:
        until(lambda: self.get(f"/api/jobs/{job}")["state"] in ("done", "failed"), "the job ends")
        return dict(self.get(f"/api/jobs/{job}"))

    def jobs(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in (self.site / "serve" / "jobs").glob("*/job.json")]

    def worker(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child


def release_in(folder: Path, **change: Any) -> tuple[Path, Path]:
    """A tiny release, and the file of the authority that it comes from."""
    made, trust = made_release(folder, **change)
    (folder / "authority.pem").write_bytes(trust.authorities[0])
    return made, folder / "authority.pem"


@contextmanager
def served(folder: Path, release: tuple[Path, Path], *options: str) -> Iterator[Served]:
    """Starts the command that people type, on free ports, and ends it by SIGTERM."""
    site, log, port, dicom_port = folder / "site", folder / "serve.log", free_port(), free_port()
    words = ["serve-model", str(release[0]), "--authority", str(release[1]), "--site", str(site), "--port", str(port)]
    words += ["--dicom-port", str(dicom_port), "--quiet-s", "0.5", "--threads", "1", *options]
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedclient.cli", *words], stdout=file, stderr=file, env=environment, cwd=folder
        )
    try:
        until(lambda: process.poll() is not None or "results go" in log.read_text(), "the service starts")
        assert process.poll() is None, log.read_text()
        yield Served(site, process, log, port, dicom_port)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(done: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> None:
    """Waits until `done()`, and fails with `what` after so long."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Whether somebody answers there, and well."""
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def missing(*tools: str) -> str:
    """Why a test that needs Debian's tools is skipped; empty where they are there."""
    packages = {"storescu": "dcmtk", "storescp": "dcmtk", "Orthanc": "orthanc orthanc-dicomweb", "chromium": "chromium"}
    lacking = sorted({packages[tool] for tool in tools if shutil.which(tool) is None})
    return f"needs packages of Debian: apt-get install {' '.join(lacking)}" if lacking else ""


def storescu(port: int, files: Sequence[Path], calling: str = "STORESCU", called: str = "FEDIMAGING") -> int:
    """DCMTK sends files; its exit code."""
    words = ["storescu", "-aet", calling, "-aec", called, "127.0.0.1", str(port), *map(str, files)]
    return subprocess.run(words, capture_output=True, timeout=120, check=False).returncode


@contextmanager
def storescp(folder: Path) -> Iterator[int]:
    """DCMTK receives files into `folder`; its port."""
    folder.mkdir(parents=True)
    port = free_port()
    process = subprocess.Popen(
        ["storescp", "-aet", "PACS", "--output-directory", str(folder), str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield port
    finally:
        process.terminate()
        process.wait(10)


@dataclass(frozen=True)
class Orthanc:
    """Orthanc that runs, with its DICOMweb plugin."""

    url: str
    dicom_port: int

    def instances(self, modality: str) -> list[dict[str, Any]]:
        """Instances of series of a modality, with their tags."""
        query = {"Level": "Instance", "Query": {"Modality": modality}, "Expand": True}
        return list(httpx.post(f"{self.url}/tools/find", json=query, timeout=60).raise_for_status().json())


@contextmanager
def orthanc(folder: Path, peer_port: int) -> Iterator[Orthanc]:
    """Starts Orthanc as Debian has it; `peer_port` is of the DICOM peer that it may send to."""
    folder.mkdir(parents=True)
    http, dicom = free_port(), free_port()
    settings = {
        "Name": "PACS", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
        "HttpPort": http, "DicomPort": dicom, "DicomAet": "PACS", "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False, "Plugins": ["/usr/share/orthanc/plugins"],
        "DicomModalities": {"model": ["FEDIMAGING", "127.0.0.1", peer_port]},
        "DicomAlwaysAllowStore": True, "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{http}"

    try:
        until(lambda: answers(f"{url}/dicom-web/studies"), "Orthanc answers")
        yield Orthanc(url, dicom)
    finally:
        process.terminate()
        process.wait(30)
