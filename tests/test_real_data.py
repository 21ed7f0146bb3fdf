"""The same code on images from real hospitals; left out of collection where they are not at hand."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK

from fedclient.data.cases import Case, read_case, read_case_labels
from fedclient.data.dataset import prepare
from fedclient.data.dicom import find_series, read_series
from fedclient.data.images import read_image, read_labels
from fedclient.data.manifest import read_manifest, sites_of
from shared_models.errors import ImageUnreadable
from shared_models.preprocess import preprocess, preprocess_labels, restore
from shared_models.study import Augment, Model, Preprocess, Study, Task
from tests.dicoms import assert_same_grid, assert_same_image, second_opinion

ROOT = Path(os.environ.get("FEDIMAGING_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
CHEST, NODULES = ROOT / "cxr_lung_seg", ROOT / "lung_nodule_ct"
FORMATS, LESIONS = ROOT / "ingest_formats", ROOT / "ct_lesion_dicom"
missing = [folder.name for folder in (CHEST, NODULES, FORMATS, LESIONS) if not folder.is_dir()]
if missing:
    pytest.skip(
        f"no real images: {ROOT} lacks {', '.join(missing)}; set FEDIMAGING_DATA to the folder that has them",
        allow_module_level=True,
    )

XRAY = Study(name="x", modality="xray", preprocess=Preprocess(size=(128, 128), intensity="percentile"))
NODULE = Study(
    name="n",
    task=Task(labels=("nodule",)),
    model=Model(spatial_dims=3),
    preprocess=Preprocess(size=(64, 64, 32), fit="crop_pad", spacing_mm=(0.7, 0.7, 1.25)),
)


def some(folder: Path, site: str, count: int) -> list[Case]:
    """The first few cases of each split."""
    cases = read_manifest(folder, site, "salt")
    return [c for split in ("train", "val", "test") for c in [c for c in cases if c.split == split][:count]]


def test_the_sites_and_splits_are_the_ones_of_the_source() -> None:
    counted = {site: [c.split for c in read_manifest(CHEST, site, "salt")] for site in sites_of(CHEST)}
    assert {site: (s.count("train"), s.count("val"), s.count("test")) for site, s in counted.items()} == {
        "guangzhou_cn": (36, 6, 10),
        "hannover_de": (14, 2, 4),
        "spain": (22, 1, 3),
    }
    assert [len(read_manifest(NODULES, site, "salt")) for site in sites_of(NODULES)] == [171, 130, 61, 87]


@pytest.mark.parametrize("site", ["guangzhou_cn", "hannover_de", "spain"])
def test_chest_films_become_batches_with_lungs_darker_than_what_surrounds_them(site: str, tmp_path: Path) -> None:
    data = prepare(some(CHEST, site, 3), XRAY, tmp_path)
    batch = next(data.batches(len(data), np.random.default_rng(0), epochs=1))
    assert batch.images.shape == (len(data), 1, 128, 128)
    assert np.isfinite(batch.images).all()
    assert 0.1 < (batch.masks == 1).mean() < 0.5
    lung = batch.images[:, 0][batch.masks == 1].mean()
    rest = batch.images[:, 0][(batch.masks == 0) & (batch.images[:, 0] > -1)].mean()
    assert lung < rest


@pytest.mark.parametrize("site", ["ge_lightspeed16", "philips_brilliance16p", "siemens_sensation16"])
def test_nodules_become_batches_with_nodules_denser_than_what_surrounds_them(site: str, tmp_path: Path) -> None:
    data = prepare(some(NODULES, site, 6), NODULE, tmp_path)
    for case in data.by_case():
        assert case.images.shape == (1, 1, 64, 64, 32)
        assert case.masks.any()
    batch = next(data.batches(len(data), np.random.default_rng(0), epochs=1, augment=Augment(rotate_deg=15)))
    nodule = batch.images[:, 0][batch.masks == 1].mean()
    assert nodule > batch.images[:, 0][batch.masks == 0].mean() + 0.2


def test_a_lung_mask_comes_back_onto_its_film() -> None:
    for case in some(CHEST, "spain", 1):
        film = read_case(case)
        truth = read_case_labels(case, film, XRAY.task.labels)
        plan = replace(XRAY.preprocess, size=(256, 256))
        geometry = preprocess(film.voxels, film.spacing_mm, plan).geometry
        small = preprocess_labels(truth, geometry)
        back = restore((small == 1).astype(np.float32)[:, None], geometry)[0] > 0.5
        both = (back & (truth == 1)).sum()
        assert 2 * both / (back.sum() + (truth == 1).sum()) > 0.99


SIEMENS = "dicom/ct_siemens_biograph_jpeg2000"
# Each file of ingest_formats, and folders that are a series: voxels [I, J, K] it reads to, or the code of its refusal.
OUTCOMES: dict[str, tuple[int, int, int] | str] = {
    "dicom/ct_ge_lightspeed_ultra": (512, 512, 3),
    "dicom/ct_ge_lightspeed_ultra/01.dcm": (512, 512, 1),
    "dicom/ct_ge_lightspeed_ultra/02.dcm": (512, 512, 1),
    "dicom/ct_ge_lightspeed_ultra/03.dcm": (512, 512, 1),
    "dicom/ct_ge_hispeed_gantry_tilt/slice.dcm": (512, 512, 1),  # one slice leans on nothing; its provenance says 18.5
    SIEMENS: (512, 512, 4),
    **{f"{SIEMENS}/CT.1.3.12.2.1107.5.1.4.60064.3000002212080811342800001657{n}.dcm": (512, 512, 1)
       for n in (3, 4, 5, 6)},
    "dicom/mr_ge_mr750": (64, 64, 3),
    **{f"dicom/mr_ge_mr750/axial_epi_fmri_interleaved_i_to_s-0000{n}.dcm": (64, 64, 1) for n in (1, 2, 3)},
    "dicom/mr_philips_achieva": (64, 64, 3),
    **{f"dicom/mr_philips_achieva/201_EPI_asc_CLEAR_0001_0{n}.dcm": (64, 64, 1) for n in (1, 4, 7)},
    "dicom/mr_toshiba_galan": "SERIES_MIXED",  # two series
    "dicom/mr_toshiba_galan/10006_DTI_ALL_20d_0001.dcm": (64, 64, 1),
    "dicom/mr_toshiba_galan/6006_DTI_SAG_30d_0001.dcm": (64, 64, 1),
    "dicom/mr_siemens_skyra_mosaic/epi_pe_ap-00001.dcm": "DICOM_MOSAIC",
    "dicom/mr_siemens_skyra_mosaic/epi_pe_ap-00002.dcm": "DICOM_MOSAIC",
    "dicom/mr_uih_umr770": "DICOM_MOSAIC",
    "dicom/mr_uih_umr770/00000001.dcm": "DICOM_MOSAIC",  # UIH's own kind, without a position
    "dicom/mr_uih_umr770/00000002.dcm": "DICOM_MOSAIC",
    **{f"dicom/seg/{name}.dcm": "MODALITY_MISMATCH"  # labels, not images
       for name in ("liver", "partial_overlaps", "sparse-labelmap-noppv", "sparse-labelmap-ppv5")},
    "mha/3DCT_lung_baseline_small.mha": (57, 78, 64),
    "mha/3DCT_lung_baseline_mask.mha": (115, 157, 129),
    "nrrd/breast1_image.nrrd": (45, 120, 21),
    "nrrd/breast1_label.nrrd": (45, 120, 21),
    "nifti/totalseg_example_ct_sm.nii.gz": (122, 101, 30),
    "nifti/totalseg_example_seg.nii.gz": (122, 101, 30),
    "nifti/totalseg_example_mr_sm.nii.gz": (117, 91, 20),
    "nifti/sct_t2_spine.nii.gz": (52, 60, 55),
    "nifti/sct_t2_spine_seg-manual.nii.gz": (52, 60, 55),
    **{f"nifti/msd_hippocampus/{kind}/hippocampus_00{n}.nii.gz": shape for kind in ("images", "labels")
       for n, shape in {1: (35, 51, 35), 3: (34, 52, 35), 4: (36, 52, 38), 6: (35, 52, 34), 7: (34, 47, 40),
                        8: (36, 48, 40)}.items()},
}  # fmt: skip


def test_every_file_of_the_formats_has_its_outcome() -> None:
    files = {
        p.relative_to(FORMATS).as_posix() for p in FORMATS.rglob("*") if p.suffix in (".dcm", ".gz", ".mha", ".nrrd")
    }
    assert len(files) == 45
    assert files <= OUTCOMES.keys()


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_file_of_the_formats_reads_as_a_second_reader_reads_it_or_is_refused_for_its_reason(name: str) -> None:
    path, expected = FORMATS / name, OUTCOMES[name]
    if isinstance(expected, str):
        with pytest.raises(ImageUnreadable) as e:
            read_image(path)
        assert e.value.code == expected
        return
    volume = read_image(path)
    assert volume.voxels.shape == (1, *expected)
    if name.startswith("nifti"):
        theirs: Any = nibabel.load(path)
        assert_same_grid(volume, theirs.get_fdata(), theirs.affine, atol=1e-4)
        return
    files = [path]
    if path.is_dir():
        (series,) = find_series(path).series
        files = list(series.files)
    image = second_opinion(files)
    if name.startswith("dicom/ct_ge"):  # padding of the corners is air here
        below_air = image < -1400
        image = SimpleITK.Cast(image, SimpleITK.sitkFloat32) * SimpleITK.Cast(below_air == 0, SimpleITK.sitkFloat32)
        image = image - 1000 * SimpleITK.Cast(below_air, SimpleITK.sitkFloat32)
    assert_same_image(volume, image)
    if name.startswith("dicom"):
        assert volume.modality == name.split("/")[1][:2].upper()
        assert volume.provenance.manufacturer
        assert volume.provenance.model


def test_a_tilted_slice_says_so() -> None:
    assert read_image(FORMATS / "dicom/ct_ge_hispeed_gantry_tilt/slice.dcm").provenance.gantry_tilt_deg == 18.5


def test_a_mask_on_a_finer_grid_is_not_taken_for_one_of_its_image() -> None:
    scan = read_image(FORMATS / "mha/3DCT_lung_baseline_small.mha")
    with pytest.raises(ImageUnreadable) as e:
        read_labels(FORMATS / "mha/3DCT_lung_baseline_mask.mha", like=scan)
    assert e.value.code == "LABEL_GEOMETRY_MISMATCH"
    breast = read_image(FORMATS / "nrrd/breast1_image.nrrd")
    assert set(np.unique(read_labels(FORMATS / "nrrd/breast1_label.nrrd", like=breast))) == {0, 1}


@pytest.mark.parametrize("site", ["ge_lightspeed_us", "philips_brilliance16_harbin_cn"])
def test_every_slice_of_the_lesion_set_reads_with_its_lungs_where_the_mask_has_them(site: str) -> None:
    slices = sorted((LESIONS / site / "images").glob("*.dcm"))
    assert len(slices) == {"ge_lightspeed_us": 14, "philips_brilliance16_harbin_cn": 8}[site]
    drawn = []
    for path in slices:
        volume = read_image(path)
        assert volume.voxels.shape == (1, 512, 512, 1)
        assert volume.modality == "CT"
        mask = LESIONS / site / "masks_silver" / path.with_suffix(".png").name
        if mask.is_file():
            drawn.append(read_labels(mask, like=volume) > 0)
            assert not drawn[-1].any() or volume.voxels[0][drawn[-1]].mean() < -600
    assert sum(lungs.any() for lungs in drawn) > len(slices) / 2


def test_scattered_slices_of_the_lesion_set_are_no_volume() -> None:
    found = find_series(LESIONS / "ge_lightspeed_us" / "images")
    assert sorted(len(series.files) for series in found.series) == [2, 4, 8]
    for series in found.series:
        if len(series.files) > 2:  # two have but one distance
            with pytest.raises(ImageUnreadable) as e:
                read_series(series.files)
            assert e.value.code == "SERIES_GAP"
