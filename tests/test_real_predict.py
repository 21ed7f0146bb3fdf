"""Prediction on series from real hospitals, and what DICOM's validator says of it; left out where they are not at hand.

The marks are those of a formula (what is darker than -650 HU), so that they can be told without a network.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from highdicom.sr import srread
from pydicom import dcmread

from fedclient.predict.case import predict_case
from fedclient.predict.outputs import write_case
from tests.marking import DARK_HU, model

ROOT = Path(os.environ.get("FEDIMAGING_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
LESIONS, FORMATS, CHEST = ROOT / "ct_lesion_dicom", ROOT / "ingest_formats", ROOT / "cxr_lung_seg"
missing = [folder.name for folder in (LESIONS, FORMATS, CHEST) if not folder.is_dir()]
if missing:
    pytest.skip(
        f"no real images: {ROOT} lacks {', '.join(missing)}; set FEDIMAGING_DATA to the folder that has them",
        allow_module_level=True,
    )
RUNS = {  # slices that follow one another: GE, explicit; Philips, implicit, without most of patient and study
    "ge_lightspeed_us": [f"LIDC-IDRI-0001_z-{z}0.dcm" for z in ("0110.0", "0112.5", "0115.0", "0117.5", "0120.0")],
    "philips_brilliance16_harbin_cn": [f"Lung_Dx-A0001_z-{z}.00.dcm" for z in ("0204", "0209", "0214", "0219")],
}


@pytest.fixture(scope="module", params=RUNS, ids=lambda site: site.split("_")[0])
def results(request, tmp_path_factory) -> tuple[Path, Path]:
    """The folder of a series, and that of its results."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    (folder / "ct").mkdir()
    for name in RUNS[request.param]:
        shutil.copy(LESIONS / request.param / "images" / name, folder / "ct")
    found = predict_case(model(), folder / "ct")
    assert found.doubts == ()
    files, missing = write_case(found, "case", folder, ("seg", "sr", "sc", "nifti", "json"))
    assert not missing
    assert len(files) == 5
    return folder / "ct", folder / "case"


def test_a_segmentation_of_a_real_series_has_its_geometry_and_every_voxel(results):
    series, case = results
    seg = hd.seg.segread(case / "segmentation.dcm")
    source = hd.get_volume_from_series([dcmread(path) for path in series.iterdir()])
    found = seg.get_volume(combine_segments=True)
    assert np.allclose(found.affine, source.affine, atol=1e-3)
    assert found.frame_of_reference_uid == source.frame_of_reference_uid
    inside = (slice(None), slice(224, 288), slice(224, 288))  # what the network of 64 x 64 sees
    assert np.array_equal(found.array[inside] > 0, source.array[inside] < DARK_HU)
    seen = np.zeros(found.array.shape, bool)
    seen[inside] = True
    assert not found.array[~seen].any()


def content(path: Path) -> Any:
    """What a report says, as highdicom parses it by its template."""
    return srread(path).content


def test_a_report_of_a_real_series_measures_what_the_segmentation_holds(results):
    _, case = results
    seg = hd.seg.segread(case / "segmentation.dcm")
    (group,) = content(case / "report.dcm").get_volumetric_roi_measurement_groups()
    told = {measurement.name.meaning: measurement.value for measurement in group.get_measurements()}
    geometry = seg.get_volume_geometry()
    assert geometry is not None
    voxels = int(seg.get_volume(combine_segments=True).array.sum())
    assert told["Volume"] == pytest.approx(voxels * geometry.voxel_volume, rel=1e-5)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (Debian: dicom3tools)")
@pytest.mark.parametrize("name", ["segmentation.dcm", "report.dcm", "overlay.dcm"])
def test_dicom_s_validator_finds_no_error_in_results_of_a_real_series(results, name):
    told = subprocess.run(["dciodvfy", str(results[1] / name)], capture_output=True, text=True, check=False)
    lines = (told.stdout + told.stderr).splitlines()
    assert lines
    assert not [line for line in lines if line.startswith("Error")]


@pytest.mark.parametrize("folder", ["mr_ge_mr750", "mr_philips_achieva"])
def test_real_mr_given_to_a_ct_model_is_flagged(folder):
    found = predict_case(model(), FORMATS / "dicom" / folder)
    assert "MODALITY_MISMATCH" in {doubt.code for doubt in found.doubts}


def test_a_real_chest_film_given_to_a_ct_model_is_flagged():
    film = next(path for path in sorted(CHEST.rglob("*.png")) if "mask" not in str(path))
    found = predict_case(model(), film)
    assert "MODALITY_MISMATCH" in {doubt.code for doubt in found.doubts}
