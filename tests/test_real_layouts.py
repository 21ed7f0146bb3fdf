"""Layouts of folders from real hospitals; left out of collection where they are not at hand."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedclient.data.cases import read_case, read_case_labels
from fedclient.data.dataset import prepare
from fedclient.data.listing import fitting_layouts, list_cases, sites_in
from fedclient.data.where import Where
from shared_models.study import load_study
from simulations.sources import sites_at

ROOT = Path(os.environ.get("FEDIMAGING_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
CHEST, NODULES, LESIONS = ROOT / "cxr_lung_seg", ROOT / "lung_nodule_ct", ROOT / "ct_lesion_dicom"
FORMATS = ROOT / "ingest_formats"
missing = [folder.name for folder in (CHEST, NODULES, FORMATS, LESIONS) if not folder.is_dir()]
if missing:
    pytest.skip(
        f"no real images: {ROOT} lacks {', '.join(missing)}; set FEDIMAGING_DATA to the folder that has them",
        allow_module_level=True,
    )


@pytest.mark.parametrize(("folder", "sites", "cases"), [(CHEST, 3, None), (NODULES, 4, 171 + 130 + 61 + 87)])
def test_the_sets_with_a_manifest_are_found_as_such(folder: Path, sites: int, cases: int | None) -> None:
    assert fitting_layouts(folder) == ["manifest"]
    names = sites_in(Where(folder))
    assert len(names) == sites
    assert list(sites_at([folder], "auto", None)) == list(names)
    listing = list_cases(Where(folder, names), "salt")
    assert listing.layout == "manifest.csv"
    assert cases is None or len(listing.cases) == cases


@pytest.mark.parametrize("site", ["ge_lightspeed_us", "philips_brilliance16_harbin_cn"])
def test_scattered_slices_of_two_vendors_are_a_pacs_export_without_labels(site: str) -> None:
    listing = list_cases(Where(LESIONS / site), "salt")
    assert listing.layout == f"PACS export, {len(listing.cases)} series"
    assert listing.cases
    files = sorted(path for case in listing.cases for path in case.channels[0].files)
    assert files == sorted((LESIONS / site / "images").glob("*.dcm"))
    assert all(case.label is None for case in listing.cases)
    by_patient = {case.patient: case.split for case in listing.cases}
    assert all(by_patient[case.patient] == case.split for case in listing.cases)
    named = {path.name.split("_z-")[0].upper() for path in files}
    assert len(by_patient) == len(named)
    assert not any(name in repr(listing) for name in (*named, *by_patient, site))


def test_the_slices_of_one_series_and_the_seg_drawn_on_it_find_each_other(tmp_path: Path) -> None:
    shutil.copytree(FORMATS / "dicom" / "ct_ge_lightspeed_ultra", tmp_path / "ct")
    for name in ("liver.dcm", "partial_overlaps.dcm"):
        shutil.copy(FORMATS / "dicom" / "seg" / name, tmp_path / name)
    listing = list_cases(Where(tmp_path, structures={"SCT:10200004": "liver", "Liver": "liver"}), "salt")
    (case,) = listing.cases
    assert case.label is not None
    volume = read_case(case)
    liver = read_case_labels(case, volume, ("liver",)) == 1
    assert 0 < liver.mean() < 0.2
    assert 0 < np.median(volume.voxels[0][liver]) < 200  # soft tissue, in HU


def test_hippocampi_of_the_decathlon_train_the_ready_study_by_the_names_of_their_labels(tmp_path: Path) -> None:
    source = FORMATS / "nifti" / "msd_hippocampus"
    names = sorted(path.name for path in (source / "images").iterdir())
    shutil.copytree(source / "images", tmp_path / "imagesTr")
    shutil.copytree(source / "labels", tmp_path / "labelsTr")
    facts = {
        "name": "Hippocampus",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "numTraining": len(names),
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    listing = list_cases(Where(tmp_path), "salt")
    assert listing.layout == "Medical Segmentation Decathlon, 6 training cases"
    assert [each.code for each in listing.findings] == ["PATIENT_UNKNOWN"]
    data = prepare(listing.cases, load_study("hippocampus"), tmp_path / "cache")
    for case in data.by_case():
        assert case.images.shape == (1, 1, 48, 64, 48)
        assert np.unique(case.masks).tolist() == [0, 1, 2]
