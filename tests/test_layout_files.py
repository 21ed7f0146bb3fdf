"""LUNA16 and BraTS: each on the exact form in which it is handed round, and with what goes wrong in it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedclient.data.cases import Case, Listing, Mask, read_case, read_case_labels
from fedclient.data.listing import list_cases
from fedclient.data.luna16 import LEFT_LUNG, RIGHT_LUNG, TRACHEA
from fedclient.data.manifest import split_of
from fedclient.data.volume import Volume
from fedclient.data.where import Where
from shared_models.errors import ImageUnreadable, ManifestInvalid
from shared_models.files import write_atomic
from simulations.fixtures import (
    Brain,
    LunaCase,
    Nodule,
    Year,
    brain,
    write_brats,
    write_luna16,
)  # fmt: skip
from simulations.phantoms import nifti

AFFINE = np.array([[2.0, 0, 0, -7], [0, 2, 0, -7], [0, 0, 3, 0], [0, 0, 0, 1]])
SHAPE = (8, 8, 4)
CONTRASTS = ("t1", "t1ce", "t2", "flair")


def grey(seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-1000, 400, SHAPE).astype(np.int16)


def scan(seed: int = 0) -> Volume:
    return Volume(grey(seed)[None].astype(np.float32), AFFINE, "CT")


def listing(folder: Path, layout: str = "auto", structures: Mapping[str, str] | None = None) -> Listing:
    return list_cases(Where(folder, layout=layout, structures=structures or {}), "salt")


def told(found: Listing) -> dict[str, str]:
    assert len({finding.code for finding in found.findings}) == len(found.findings)
    return {finding.code: finding.what for finding in found.findings}


def of(found: Listing, patient: str) -> Case:
    (case,) = [case for case in found.cases if case.patient == patient]
    return case


def labels_of(case: Case, *names: str, channels: tuple[str, ...] = ()) -> NDArray[np.uint8]:
    return read_case_labels(case, read_case(case, channels or [case.channels[0].name]), names)


def refusal(folder: Path, layout: str = "auto") -> ManifestInvalid:
    with pytest.raises(ManifestInvalid) as e:
        listing(folder, layout)
    return e.value


# LUNA16


def luna(root: Path, turned: bool = False) -> Path:
    """Two series; a nodule of `1.1` at (-3, 1, 6) LPS mm, so RAS (3, -1, 6) and voxel (5, 3, 2), and one left out."""
    lungs = np.zeros(SHAPE, np.uint8)
    lungs[1, 2, 0], lungs[6, 2, 0], lungs[4, 2, 3] = LEFT_LUNG, RIGHT_LUNG, TRACHEA
    one = LunaCase("1.1", scan(1), [Nodule((-3.0, 1.0, 6.0), 3.0, False)], [((5.0, 5.0, 0.0), 2.0)], lungs=lungs)
    return write_luna16(root, [LunaCase(**{f: getattr(one, f) for f in one.__slots__} | {"turned": turned}),
                               LunaCase("1.2", scan(2))])  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
def test_luna16_nodules_lie_where_their_millimetres_say_whichever_way_the_scan_was_stored(
    tmp_path: Path, turned: bool
) -> None:
    found = listing(luna(tmp_path, turned))
    assert (found.layout, len(found.cases)) == ("LUNA16, 2 subsets", 2)
    assert [(each.code, each.severity) for each in found.findings] == [("PATIENT_UNKNOWN", "warn")]
    assert (read_case(of(found, "1.1")).voxels == scan(1).voxels).all()
    labels = labels_of(of(found, "1.1"), "nodule")
    assert np.argwhere(labels == 1).tolist() == [[5, 3, 2]]
    assert np.argwhere(labels == 127).tolist() == [[1, 1, 0]]  # LPS (5, 5, 0) is RAS (-5, -5, 0)
    assert not labels_of(of(found, "1.2"), "nodule").any()
    assert of(found, "1.1").split == split_of("1.1", "salt")


def test_luna16_lungs_are_left_right_or_both_as_the_study_has_them(tmp_path: Path) -> None:
    found = listing(luna(tmp_path))
    case = of(found, "1.1")
    assert np.argwhere(labels_of(case, "lung") == 1).tolist() == [[1, 2, 0], [6, 2, 0]]
    sides = labels_of(case, "left-lung", "right-lung")
    assert (sides[1, 2, 0], sides[6, 2, 0], sides[4, 2, 3]) == (1, 2, 0)
    with pytest.raises(ImageUnreadable, match="seg-lungs-LUNA16 lacks this scan") as e:
        labels_of(of(found, "1.2"), "lung")
    assert e.value.code == "LABEL_MISSING"


@pytest.mark.parametrize("folder", ["CSVFILES", "evaluationScript/annotations"])
def test_luna16_tables_are_found_where_copies_of_the_set_have_them(tmp_path: Path, folder: str) -> None:
    root = luna(tmp_path)
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "annotations.csv").rename(root / folder / "annotations.csv")
    assert labels_of(of(listing(root), "1.1"), "nodule")[5, 3, 2] == 1


def test_luna16_without_annotations_teaches_lungs_and_no_nodules(tmp_path: Path) -> None:
    root = luna(tmp_path)
    (root / "annotations.csv").unlink()
    found = listing(root)
    assert "annotations.csv is not there" in told(found)["LABEL_MISSING"]
    assert labels_of(of(found, "1.1"), "lung").any()
    assert of(found, "1.2").label is None
    with pytest.raises(ImageUnreadable, match="nobody knows which nodules"):
        labels_of(of(found, "1.1"), "nodule")


def test_luna16_series_that_are_torn_twice_or_away_are_told_and_the_others_stay(tmp_path: Path) -> None:
    root = luna(tmp_path)
    with (root / "annotations.csv").open("a") as file:
        file.write("9.9,0,0,0,5\n")
    (root / "subset1" / "1.2.raw").unlink()
    for name in ("1.1.mhd", "1.1.raw"):
        shutil.copy(root / "subset0" / name, root / "subset1" / name)
    found = listing(root)
    assert [case.patient for case in found.cases] == ["1.1"]
    assert told(found).keys() == {"DUPLICATE", "FILE_MISSING", "LABEL_ORPHAN", "PATIENT_UNKNOWN"}
    assert "1 series that are not here" in told(found)["LABEL_ORPHAN"]
    assert "1.2" not in str(told(found))


def test_luna16_voxels_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    root = luna(tmp_path / "data")
    (root / "subset0" / "1.1.raw").rename(tmp_path / "x.raw")
    (root / "subset0" / "1.1.raw").symlink_to(tmp_path / "x.raw")
    assert told(listing(root)).keys() == {"PATH_ESCAPE", "PATIENT_UNKNOWN"}


# BraTS


@pytest.fixture(scope="module")
def heads() -> list[Brain]:
    return [brain(n, shape=(24, 24, 6), cavity=True) for n in range(2)]


PARTS = {  # label value of each of the four parts of a fixture's tumour
    "2018": (1, 2, 4), "2019": (1, 2, 4), "2020": (1, 2, 4), "2021": (1, 2, 4), "2023": (1, 2, 3), "2024": (1, 2, 3, 4),
}  # fmt: skip
NAMES = ("necrosis", "oedema", "enhancing", "cavity")


@pytest.mark.parametrize("year", PARTS)
def test_each_year_of_brats_is_known_by_its_names_and_its_parts_by_their_names(
    tmp_path: Path, year: Year, heads: list[Brain]
) -> None:
    write_brats(tmp_path, year, heads)
    found = listing(tmp_path)
    assert (found.layout, found.findings, len(found.cases)) == (f"BraTS {year}, 2 cases", (), 2)
    first = min(found.cases, key=lambda case: case.patient)
    assert [channel.name for channel in first.channels] == list(CONTRASTS)
    image = read_case(first, ("flair", "t1c" if year >= "2023" else "t1ce"))  # a year's own word is understood
    assert (image.voxels == np.stack([heads[0].images["flair"], heads[0].images["t1ce"]])).all()
    names = NAMES[: len(PARTS[year])]
    labels = read_case_labels(first, image, names)
    parts = np.where(heads[0].parts > len(names), 0, heads[0].parts)
    assert (labels == parts).all()
    turned = read_case_labels(first, image, names[::-1])
    assert (turned[parts == 1] == len(names)).all()


def relabelled(root: Path, old: int, new: int) -> None:
    """The first case's `old` value becomes `new`."""
    path = min(root.rglob("*seg.nii.gz"))
    head = brain(0, shape=(24, 24, 6))
    write_atomic(path, nifti(np.where(head.parts == old, new, head.parts).astype(np.uint8), head.affine_ras))


@pytest.mark.parametrize(("year", "value"), [("2023", 4), ("2021", 3), ("2018", 3)])
def test_a_value_that_is_none_of_its_year_is_refused(tmp_path: Path, year: Year, value: int) -> None:
    write_brats(tmp_path, year, [brain(0, shape=(24, 24, 6))])
    relabelled(tmp_path, 3, value)
    with pytest.raises(ImageUnreadable, match=rf"values \[{value}\]") as e:
        labels_of(listing(tmp_path).cases[0], *NAMES[:3])
    assert e.value.code == "LABEL_VALUES"


def test_the_cavity_of_2024_is_never_taken_for_tumour_unless_the_site_says_what_it_is(
    tmp_path: Path, heads: list[Brain]
) -> None:
    write_brats(tmp_path, "2024", heads)
    with pytest.raises(ImageUnreadable, match=r"besides: 4 = cavity\. `structures` under"):
        labels_of(listing(tmp_path).cases[0], *NAMES[:3])
    mapped = listing(tmp_path, structures={"cavity": "ignore"}).cases[0]
    labels = labels_of(mapped, *NAMES[:3])
    assert 127 in labels
    assert 4 not in labels


def gli(root: Path, heads: list[Brain]) -> Path:
    """Cases of 2023 or 2024 in a folder whose name tells neither."""
    made = write_brats(root / "made", "2023", heads)
    next(made.iterdir()).rename(root / "gliomas")
    made.rmdir()
    return root / "gliomas"


def test_a_year_that_no_name_tells_must_be_said(tmp_path: Path, heads: list[Brain]) -> None:
    root = gli(tmp_path, heads)
    said = str(refusal(root))
    for words in ("no name in it tells the year", 'layout = "brats-2023" under [data] of site.toml', "--layout brats-"):
        assert words in said
    assert listing(root, "brats-2023").layout == "BraTS 2023, 2 cases"
    assert listing(root, "brats-2024").layout == "BraTS 2024, 2 cases"
    for case in sorted(path for path in root.iterdir() if path.is_dir()):
        for file in list(case.iterdir()):
            file.rename(file.with_name(file.name.replace(case.name, f"PAT{case.name[10:15]}")))
        case.rename(root / f"PAT{case.name[10:15]}")
    assert "no name in it tells the year" in str(refusal(root))
    assert len(listing(root, "brats-2023").cases) == 2


def test_a_year_that_names_contradict_is_refused(tmp_path: Path, heads: list[Brain]) -> None:
    write_brats(tmp_path, "2020", heads)
    refused = refusal(tmp_path, "brats-2023")
    assert "2 of 2 case folders are named as those of another year than 2023" in str(refused)
    assert refused.code == "LABEL_VALUES"


def test_follow_ups_of_a_patient_have_one_split_and_a_case_without_a_contrast_is_left_out(
    tmp_path: Path, heads: list[Brain]
) -> None:
    root = gli(tmp_path, heads)
    first = root / "BraTS-GLI-00000-000"
    shutil.copytree(first, root / "BraTS-GLI-00000-101")
    for file in (root / "BraTS-GLI-00000-101").iterdir():
        file.rename(file.with_name(file.name.replace("-000-", "-101-")))
    (root / "BraTS-GLI-00001-000" / "BraTS-GLI-00001-000-t2f.nii.gz").unlink()
    found = listing(root, "brats-2024")
    assert [case.patient for case in found.cases] == ["BRATS-GLI-00000"] * 2
    assert len({case.split for case in found.cases}) == 1
    assert len({case.key for case in found.cases}) == 2
    assert told(found) == {"FILE_MISSING": "case folder 3 by name lacks flair, and was left out"}
    (first / "BraTS-GLI-00000-000-seg.nii.gz").unlink()
    assert sorted(case.label is None for case in listing(root, "brats-2024").cases) == [False, True]


def of_kind(root: Path, kind: str, head: Brain) -> Path:
    """Two examinations of one patient, named as of that kind of tumour; seg has the parts 1, 2, 3 and 4."""
    for examination in ("000", "001"):
        case = root / f"BraTS-{kind}-00000-{examination}"
        case.mkdir(parents=True)
        for name, contrast in zip(("t1n", "t1c", "t2w", "t2f"), CONTRASTS, strict=True):
            write_atomic(case / f"{case.name}-{name}.nii.gz", nifti(head.images[contrast], head.affine_ras))
        write_atomic(case / f"{case.name}-seg.nii.gz", nifti(head.parts.astype(np.uint8), head.affine_ras))
    return root


OTHERS = {  # folder of a release, kind -> what the values 1, 2, 3 and 4 are
    ("BraTS2023-MET", "MET"): ("necrosis", "oedema", "enhancing"),
    ("BraTS2024-SSA", "SSA"): ("necrosis", "oedema", "enhancing"),
    ("anything", "MEN"): ("necrosis", "oedema", "enhancing"),  # of 2023 alone
    ("ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData", "PED"): ("non-enhancing", "oedema", "enhancing"),
    ("BraTS2024", "PED"): ("enhancing", "non-enhancing", "cyst", "oedema"),
    ("BraTS-PEDs2024_Training", "ped"): ("enhancing", "non-enhancing", "cyst", "oedema"),
}


@pytest.mark.parametrize(("release", "kind"), OTHERS)
def test_brats_of_other_tumours_has_their_own_values_and_one_split_for_a_patients_examinations(
    tmp_path: Path, release: str, kind: str, heads: list[Brain]
) -> None:
    found = listing(of_kind(tmp_path / release, kind, heads[0]))
    assert [case.patient for case in found.cases] == [f"BRATS-{kind.upper()}-00000"] * 2
    for case in found.cases:
        assert isinstance(case.label, Mask)
        assert case.label.names == dict(enumerate(OTHERS[release, kind], start=1))


def test_what_children_have_and_adults_have_not_is_refused_until_the_site_says_what_it_is(
    tmp_path: Path, heads: list[Brain]
) -> None:
    root = of_kind(tmp_path / "BraTS2024", "PED", heads[0])
    with pytest.raises(ImageUnreadable, match=r"besides: 2 = non-enhancing, 3 = cyst\. `structures` under"):
        labels_of(listing(root).cases[0], *NAMES[:3])
    mapped = listing(root, structures={"non-enhancing": "necrosis", "cyst": "ignore"}).cases[0]
    drawn = heads[0].parts
    pairs = np.unique(np.stack([drawn.ravel(), labels_of(mapped, *NAMES[:3]).ravel()], axis=1), axis=0)
    assert pairs.tolist() == [[0, 0], [1, 3], [2, 1], [3, 127], [4, 2]]


@pytest.mark.parametrize("layout", ["auto", "brats-2024"])
@pytest.mark.parametrize("kind", ["MEN-RT", "GoAT"])
def test_brats_of_a_kind_whose_values_nobody_knows_is_refused(
    tmp_path: Path, kind: str, layout: str, heads: list[Brain]
) -> None:
    refused = refusal(of_kind(tmp_path / "BraTS2024", kind, heads[0]), layout)
    assert "2 of 2 case folders are named as of a kind of BraTS" in str(refused)
    assert refused.code == "LABEL_VALUES"
