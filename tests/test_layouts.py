"""Layouts are found by themselves and named; what fits two, or none, is told with the way to choose."""

import os
from pathlib import Path

import numpy as np
import pytest

from fedclient.data.cases import Mask
from fedclient.data.layouts.flamby import KEPT
from fedclient.data.layouts.peek import FOLDERS, peek
from fedclient.data.listing import LAYOUTS, described, fitting_layouts, list_cases, sites_in
from fedclient.data.where import Where
from shared_models.errors import ManifestInvalid
from shared_models.files import write_atomic
from simulations.fixtures import Example, brain, write_brats, write_flamby, write_nnunet
from simulations.fixtures.datasets import WRITTEN, write_data_set


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of one patient in each layout, called as the layout is."""
    root = tmp_path_factory.mktemp("sets")
    for name in WRITTEN:
        write_data_set(root / name, name, patients=1, slices=2, size=16)
    for name in KEPT:
        write_flamby(root / name, name, 1, 0, size=16)
    (root / "manifest").mkdir()
    (root / "manifest" / "manifest.csv").write_text("patient_id,image,mask\n")
    return root


def refusal(where: Where) -> str:
    with pytest.raises(ManifestInvalid) as e:
        list_cases(where, "salt")
    return str(e.value)


def test_every_layout_is_found_by_what_its_folder_holds_and_by_nothing_else(sets: Path) -> None:
    assert {*WRITTEN, *KEPT, "manifest", "brats"} == LAYOUTS.keys()
    found = {name: fitting_layouts(sets / name) for name in LAYOUTS if name != "brats"}
    assert found == {name: [name] for name in found}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_listing_says_its_layout_in_words_and_tells_nobody(sets: Path, name: str) -> None:
    listing = list_cases(Where(sets / name), "salt")
    assert listing.layout.startswith(LAYOUTS[name].title.split(" of ")[0].split("images and ")[-1])
    assert len(listing.cases) == 1
    assert all(word not in repr(listing) for word in ("north", "LIDC-IDRI-0001", "case_0", "TCIA", str(sets)))
    assert list_cases(Where(sets / name, layout=name), "salt").cases == listing.cases


def test_two_layouts_that_fit_are_both_named_with_the_way_to_choose(sets: Path, tmp_path: Path) -> None:
    for path in (sets / "table").rglob("*"):
        if path.is_file():
            write_atomic(tmp_path / path.relative_to(sets / "table"), path.read_bytes())
    labels = np.ones((4, 4, 2), np.uint8)
    write_nnunet(tmp_path.parent, tmp_path.name, [Example("a", (labels.astype(np.int16),), labels, np.eye(4))], ["x"])
    said = refusal(Where(tmp_path))
    assert "it is laid out as images and labels.csv and as nnU-Net raw data" in said
    assert 'layout = "table" under [data] of site.toml, or --layout table; or nnunet' in said
    assert list_cases(Where(tmp_path, layout="nnunet"), "salt").layout.startswith("nnU-Net")
    assert list_cases(Where(tmp_path, layout="table"), "salt").layout == "labels.csv, 1 images"


def test_a_folder_of_no_layout_is_told_what_could_be_one(sets: Path, tmp_path: Path) -> None:
    assert "Make a manifest.csv" in refusal(Where(tmp_path))
    assert "there is no such folder" in refusal(Where(tmp_path / "gone"))
    assert "there is no such folder" in refusal(Where(tmp_path / "gone", layout="pacs"))
    assert "layout 'dicom' is not known. Known: auto, manifest" in refusal(Where(tmp_path, layout="dicom"))
    (tmp_path / "Task1").mkdir()
    for path in (sets / "decathlon").rglob("*.json"):
        write_atomic(tmp_path / "Task1" / path.name, path.read_bytes())
    assert "1 folders in it are such data sets (Medical Segmentation Decathlon)" in refusal(Where(tmp_path))


def test_who_has_just_named_a_folder_is_told_its_layout_or_what_is_wrong(sets: Path, tmp_path: Path) -> None:
    assert described(sets / "luna16", "auto") == "LUNA16"
    assert described(sets / "luna16", "pacs") == "PACS export of DICOM"
    assert described(tmp_path, "auto") == "none yet; the folder is empty"
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ManifestInvalid, match=r"Make a manifest\.csv"):
        described(tmp_path, "auto")
    with pytest.raises(ManifestInvalid, match="not known"):
        described(tmp_path, "luna")


def test_sites_are_those_of_tables_and_choosing_one_where_there_are_none_is_told(sets: Path) -> None:
    assert sites_in(Where(sets / "pacs")) == ()
    assert "PACS export of DICOM names no sites" in refusal(Where(sets / "pacs", ("north",)))


def test_broken_descriptions_are_refused_and_not_taken_for_other_layouts(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{")
    assert fitting_layouts(tmp_path) == []
    assert "cannot be read as JSON" in refusal(Where(tmp_path, layout="nnunet"))
    (tmp_path / "dataset.json").write_text("[" * 100_000)
    assert "cannot be read as JSON" in refusal(Where(tmp_path, layout="decathlon"))
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "dataset.json").symlink_to("/etc/hostname")
    assert "is a link out of the data folder" in refusal(Where(tmp_path, layout="decathlon"))


def test_a_look_is_bounded_and_follows_no_links_and_opens_no_pipes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for n in range(30):
        (data / f"{n:02d}" / "a" / "b").mkdir(parents=True)
        (data / f"{n:02d}" / "a" / "b" / "1.dcm").write_bytes(b"x")
    os.mkfifo(data / "pipe")
    (data / "link").symlink_to(tmp_path)
    (data / ".hidden").write_text("x")
    seen = peek(data)
    assert len(seen.folders) == 30
    assert len(seen.files) < FOLDERS
    assert seen.files[0] == "00/a/b/1.dcm"
    assert not seen.dicom
    assert peek(tmp_path / "gone").files == ()


def test_sites_that_are_pooled_keep_their_patients_apart_and_their_own_splits(sets: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_brats(tmp_path / name, "2021", [brain(n, shape=(8, 8, 2)) for n in range(3)])
    parts = tuple(Where(tmp_path / name, name=name) for name in ("one", "two"))
    own = [list_cases(part, "salt").cases for part in parts]
    together = list_cases(Where(tmp_path, pooled=(*parts, Where(sets / "table"))), "salt")
    assert together.layout == "BraTS 2021, 3 cases; labels.csv, 1 images"
    assert {case.key for case in own[0]}.isdisjoint(case.key for case in own[1])
    splits = {case.key: case.split for case in together.cases}
    assert {case.key: case.split for of in own for case in of}.items() <= splits.items()
    assert len(together.cases) == 7
    assert isinstance(next(c for c in together.cases if c.row).label, Mask)
