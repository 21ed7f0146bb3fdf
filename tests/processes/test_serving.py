"""A released model among real DICOM peers: DCMTK sends a real series and gets its result; so does Orthanc, twice."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

import highdicom
import httpx
import pydicom
import pytest

from simulations.demo import free_port
from tests.processes.serving import (
    LUNG_CT,
    SEG,
    Served,
    missing,
    orthanc,
    release_in,
    served,
    storescp,
    storescu,
    until,
)
from tests.test_real_data import ROOT as DATA

SERIES = DATA / "ct_lesion_dicom" / "ge_lightspeed_us" / "images"
FILES = [SERIES / name for name in LUNG_CT]
real = pytest.mark.skipif(not SERIES.exists(), reason="the real images are not there: set FEDIMAGING_DATA")
pytestmark = [pytest.mark.process, real]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return release_in(tmp_path_factory.mktemp("release"))


def check_segmentation(path: Path) -> None:
    """It is a SEG of the very slices that were sent."""
    seg = highdicom.seg.segread(path)
    sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in FILES]
    assert seg.SOPClassUID == SEG
    assert seg.StudyInstanceUID == sources[0].StudyInstanceUID
    assert seg.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    referenced = {i.ReferencedSOPInstanceUID for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referenced == {source.SOPInstanceUID for source in sources}
    volume = seg.get_volume(combine_segments=False)
    assert volume.spatial_shape == (6, 512, 512)
    assert volume.spacing == pytest.approx((2.5, 0.703125, 0.703125))


def no_identifiers_in(served: Served) -> None:
    """The log holds nothing that names a patient, a file or an object."""
    log = served.log.read_text()
    header = pydicom.dcmread(FILES[0], stop_before_pixels=True)
    for word in (header.PatientID, header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID, "z-01"):
        assert str(word) not in log


@pytest.mark.skipif(bool(missing("storescu", "storescp")), reason=missing("storescu", "storescp"))
def test_storescu_sends_a_real_series_and_the_segmentation_comes_back(tmp_path, release):
    with storescp(tmp_path / "pacs") as pacs:
        to = f"PACS@127.0.0.1:{pacs}"
        options = ("--allow", "STORESCU@127.0.0.1", "--return-to", to, "--join-s", "0")
        with served(tmp_path / "s", release, *options) as here:
            assert storescu(here.dicom_port, FILES, calling="STRANGER") != 0
            assert storescu(here.dicom_port, FILES, called="ANOTHER") != 0
            assert here.jobs() == []
            assert storescu(here.dicom_port, FILES) == 0
            until(lambda: [job["returned"] for job in here.jobs()] == ["sent"], "the result is returned")
            no_identifiers_in(here)
            assert not list((here.site / "serve").rglob("in/*"))  # what was received is gone
    came = {pydicom.dcmread(path, stop_before_pixels=True).Modality: path for path in (tmp_path / "pacs").iterdir()}
    assert set(came) == {"SEG", "SR", "OT"}
    check_segmentation(came["SEG"])


@pytest.mark.skipif(bool(missing("storescu", "storescp")), reason=missing("storescu", "storescp"))
def test_a_peer_that_pauses_within_a_real_series_gets_the_segmentation_of_the_whole(tmp_path, release):
    with storescp(tmp_path / "pacs") as pacs:
        options = ("--allow", "STORESCU", "--return-to", f"PACS@127.0.0.1:{pacs}")
        with served(tmp_path / "s", release, *options) as here:
            assert storescu(here.dicom_port, FILES[:3]) == 0
            until(lambda: [job["returned"] for job in here.jobs()] == ["sent"], "the first half is answered")
            assert storescu(here.dicom_port, FILES[3:]) == 0
            until(lambda: [job["returned"] for job in here.jobs()] == ["sent"] * 2, "the whole is answered")
            first, second = sorted(here.jobs(), key=lambda job: job["came_s"])
            told = here.get(f"/api/jobs/{first['id']}")
            assert told["partial"] == {
                "code": "SERIES_REPLACED",
                "why": f"job {second['id']} is of the series as it came later.",
            }
            facts = here.site / "serve" / "jobs" / first["id"] / "out" / "image-1" / "result.json"
            assert json.loads(facts.read_text())["partial"] == told["partial"]
            assert second["partial"] is None
            check_segmentation(facts.parents[3] / second["id"] / "out" / "image-1" / "segmentation.dcm")
            assert len(here.get("/dicom-web/instances?Modality=SEG")) == 1


@pytest.mark.skipif(bool(missing("Orthanc")), reason=missing("Orthanc"))
def test_orthanc_sends_by_c_store_and_gets_the_result_by_c_store(tmp_path, release):
    peer = free_port()
    with orthanc(tmp_path / "orthanc", peer) as pacs:
        for file in FILES:
            httpx.post(f"{pacs.url}/instances", content=file.read_bytes(), timeout=60).raise_for_status()
        to = f"PACS@127.0.0.1:{pacs.dicom_port}"
        options = ("--allow", "PACS", "--return-to", to, "--dicom-port", str(peer))
        with served(tmp_path / "s", release, *options) as here:
            (series,) = httpx.get(f"{pacs.url}/series", timeout=60).json()
            sent = httpx.post(f"{pacs.url}/modalities/model/store", content=series, timeout=120)
            assert sent.status_code == 200, sent.text
            until(lambda: [job["returned"] for job in here.jobs()] == ["sent"], "the result is returned")
        (found,) = pacs.instances("SEG")
        kept = tmp_path / "seg.dcm"
        kept.write_bytes(httpx.get(f"{pacs.url}/instances/{found['ID']}/file", timeout=60).content)
    check_segmentation(kept)


@pytest.mark.skipif(bool(missing("Orthanc")), reason=missing("Orthanc"))
def test_orthanc_gets_the_result_by_stow_and_gives_it_by_wado(tmp_path, release):
    with ExitStack() as stack:
        pacs = stack.enter_context(orthanc(tmp_path / "orthanc", free_port()))
        here = stack.enter_context(served(tmp_path / "s", release, "--return-to", f"{pacs.url}/dicom-web"))
        body, boundary = b"", "of-the-test"
        for file in FILES:
            body += f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode() + file.read_bytes() + b"\r\n"
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        stored = httpx.post(
            f"{here.url}/dicom-web/studies", content=body + f"--{boundary}--\r\n".encode(),
            headers={"content-type": kind} | here.shown, timeout=120,
        )  # fmt: skip
        assert stored.status_code == 200, stored.text
        assert len(stored.json()["00081199"]["Value"]) == 6
        until(lambda: [job["returned"] for job in here.jobs()] == ["sent"], "the result is returned")
        (result,) = here.get("/dicom-web/series?Modality=SEG")
        study, series = (result[tag]["Value"][0] for tag in ("0020000D", "0020000E"))
        of_us = wado(here.url + "/dicom-web", study, series, tmp_path / "ours.dcm", here.shown)
        of_orthanc = wado(pacs.url + "/dicom-web", study, series, tmp_path / "theirs.dcm")
    check_segmentation(of_us)
    check_segmentation(of_orthanc)
    pixels = [hashlib.sha256(pydicom.dcmread(path).PixelData).hexdigest() for path in (of_us, of_orthanc)]
    assert pixels[0] == pixels[1]


def wado(url: str, study: str, series: str, to: Path, shown: Mapping[str, str] = MappingProxyType({})) -> Path:
    """The one instance of a series."""
    headers = {"accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'} | dict(shown)
    answer = httpx.get(f"{url}/studies/{study}/series/{series}", headers=headers, timeout=120).raise_for_status()
    content = answer.content
    begin = content.index(b"\r\n\r\n") + 4
    to.write_bytes(content[begin : content.rindex(b"\r\n--")])
    return to
