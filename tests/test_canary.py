"""Identifiers planted in headers, paths, tables and labels: no byte of them gets out of `fedclient check`.

Searched are all files that a check leaves in the site's folder, what it prints in every form, the page, the card, its
log, and what is raised; the small pictures of the page excepted.
"""

import base64
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import fedclient.cli
from fedclient.gate.ready import ready
from fedclient.site import Data, SiteFile, open_site, site_toml
from shared_models.errors import OrderRefused
from shared_models.files import write_atomic
from shared_models.study import canonical, sha256
from shared_models.wire import Order
from simulations.fixtures.dicom import write_dicom_series
from simulations.fixtures.folders import write_mhd
from simulations.fixtures.sown import LUNG, Set, person
from simulations.phantoms import nifti

NAME, NUMBER, BIRTH, ACCESSION = "Zyxmann", "QX774411", "19470813", "ACC90210"
UID = "1.2.826.0.1.3680043.8.498.77441199"
FOLDER, CELL, SEGMENT = "Krankenakte_Zyxmann", "Zyxmann_Cell", "Zyxmann liver"
CANARIES = (NAME, NUMBER, BIRTH, ACCESSION, UID, FOLDER, CELL, "Krankenakte", "13.08.1947")
HEADERS: dict[str, object] = {
    "PatientName": f"{NAME}^Ottokar", "PatientID": NUMBER, "PatientBirthDate": BIRTH, "AccessionNumber": ACCESSION,
    "SeriesInstanceUID": UID, "InstitutionName": f"Klinik {NAME}", "SeriesDescription": f"CT {NAME} 13.08.1947",
    "PatientComments": f"{NAME} {NUMBER}", "BodyPartExamined": NAME.upper(), "ConvolutionKernel": NAME.upper(),
}  # fmt: skip


def planted(root: Path) -> Path:
    """Sound and broken cases, all of them full of identifiers."""
    made = Set(root / FOLDER)
    faults: tuple[dict[str, Any], ...] = ({}, {"missing": (3,)}, {"tilt_deg": 15.0}, {"duplicate": 1})
    for n, fault in enumerate(faults):
        folder = f"{NAME}_{NUMBER}/{UID}.{n}"
        write_dicom_series(made.root / folder, person(n).volume, patient_id=NUMBER, headers=HEADERS, **fault)
        made.row(folder, split="train" if n else "test", patient=f"{CELL}{n}")
        mask = f"{NAME}_{n}_mask.nii.gz"
        write_atomic(made.root / mask, nifti(person(n).lung * (n + 1), person(n).volume.affine_ras))
        made.rows[-1]["mask"] = mask
    broken = {
        f"{NAME}.nii.gz": b"no image",
        f"{NUMBER}.dcm": b"\0" * 128 + b"DICM" + NAME.encode() * 50,
        f"{NAME}.png": b"\x89PNG\r\n\x1a\n" + NAME.encode() * 9,
        f"{NAME}.npy": b"\x93NUMPY" + NAME.encode(),
        f"{BIRTH}.mhd": f"ObjectType = Image\nNDims = 3\nPatientName = {NAME}\nDimSize = {NAME}\n".encode(),
        f"{NAME}.nrrd": f"NRRD0005\ntype: {NAME}\ndimension: 3\n\n".encode(),
    }
    for name, content in broken.items():
        write_atomic(made.root / name, content)
        made.row(name, patient=CELL + name)
    volume = person(5).volume
    named = write_mhd(made.root / "m" / f"{NUMBER}.mhd", volume.voxels[0].astype(np.int16), volume.affine_ras)
    write_atomic(named, named.read_bytes().replace(b"NDims = 3\n", f"NDims = 3\nPatientName = {NAME}^O\n".encode()))
    made.row(f"m/{NUMBER}.mhd", patient=CELL)
    made.finish()
    return made.root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("canary")
    data = planted(root)
    file = SiteFile("north", "127.0.0.1:9", "Test", Data(str(data), structures={SEGMENT: "lung"}))
    write_atomic(root / "site" / "site.toml", site_toml(file).encode())
    return root


def told(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(fedclient.cli.app, list(words))
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.stdout + done.stderr


def written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of the site's folder but its settings, which hold the path of its data folder; names count too."""
    for path in (folder / "site").rglob("*"):
        if path.is_file() and path.name != "site.toml":
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def assert_silent(what: str, content: bytes) -> None:
    low = content.lower()
    for canary in CANARIES:
        for hidden in (canary.lower().encode(), canary.lower().encode("utf-16-le"), base64.b64encode(canary.encode())):
            assert hidden not in low, f"{what} holds {canary}"
            assert hidden not in content, f"{what} holds {canary}"


@pytest.mark.parametrize("words", [[], ["--json"], ["--study", "lung-ct"], ["--study", "lung-ct", "--json"]])
def test_a_check_says_what_is_wrong_and_not_with_whom(
    folder: Path, words: list[str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    code, said = told("check", "--site", str(folder / "site"), "--processes", "1", *words)
    assert code == 1
    for expected in ("SERIES_GAP", "SERIES_TILT", "UNSAFE_FORMAT", "PHI_TAG", "PHI_PATH"):
        assert expected in said
    assert_silent("the screen", said.encode())
    assert_silent("the log", caplog.text.encode())
    assert_silent("the process's own output", "".join(capfd.readouterr()).encode())
    for name, content in written(folder):
        assert_silent(name, content + name.encode())
    assert any(name.startswith("site/gate/cases/") for name, _ in written(folder))


def test_the_page_and_the_card_name_nobody(folder: Path) -> None:
    site, page = str(folder / "site"), folder / "page.html"
    assert told("check", "--site", site, "--html", str(page))[0] == 1
    assert_silent("the page", page.read_bytes())
    assert b"data:image/png;base64," in page.read_bytes()
    for words in ([], ["--json"], ["--study", "lung-ct", "--json"]):
        code, said = told("card", "--site", site, *words)
        assert code == 0
        assert_silent("the card", said.encode())
    assert (folder / "site/gate/card.json").read_bytes() == said.encode()


def test_a_refused_order_names_nobody(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = canonical(LUNG).decode()
    order = Order("train", "lung-1", 1, 1, study, sha256(LUNG), "b" * 64)
    with pytest.raises(OrderRefused) as refused:
        ready(order, open_site({"site-dir": str(folder / "site")}), LUNG, processes=0)
    assert refused.value.code == "DATA_NOT_READY"
    assert_silent("what is raised", (str(refused.value) + repr(refused.value) + caplog.text).encode())
    for name, content in written(folder):
        assert_silent(name, content)


@pytest.mark.parametrize(
    "table",
    [
        f"patient_id,image,mask,split\n{CELL},{NAME}.nii.gz,,{NAME}\n",
        f"patient_id,image,mask\n{CELL},../{NAME}.nii.gz,\n",
        f"patient_id,image,mask\n{CELL},/{NAME}/{NUMBER},\n",
        f"patient_id,image,mask\n{CELL},{NAME},gone,{NUMBER},{BIRTH}\n",
        f"{NAME},{NUMBER},{BIRTH}\n{CELL},{NAME},x\n",
        f"patient_id,image,mask,split\n{CELL},{NAME}.nii.gz,,train\n{CELL},{NAME}.npy,,test\n",
        f"patient_id,image,mask\n{CELL},{NAME}_0_mask.nii.gz,\n{CELL},{NAME}_0_mask.nii.gz,\n",
    ],
)
def test_a_table_that_is_wrong_is_told_without_its_cells(folder: Path, table: str) -> None:
    manifest = folder / FOLDER / "manifest.csv"
    before = manifest.read_bytes()
    manifest.write_text(table)
    try:
        code, said = told("check", "--site", str(folder / "site"))
    finally:
        manifest.write_bytes(before)
    assert code == 1
    assert "stops training" in said
    assert_silent("the screen", said.encode())
