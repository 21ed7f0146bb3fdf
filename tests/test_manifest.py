"""Manifests: what makes a case, what is refused, and that splits stay put."""

import os
import string
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclient.data import manifest
from fedclient.data.cases import Mask
from fedclient.data.manifest import read_manifest, sites_of, split_of
from shared_models.errors import ManifestInvalid

NAMES = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=12)


def folder_with(tmp_path: Path, text: str | bytes, files: Sequence[str] = ("a.png", "b.png", "c.png", "m.png")) -> Path:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "manifest.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return tmp_path


def complaint(folder: Path, site: str | None = None) -> str:
    with pytest.raises(ManifestInvalid) as e:
        read_manifest(folder, site, "salt")
    assert "secret-patient" not in str(e.value)
    assert ".png" not in str(e.value)
    return str(e.value)


def test_rows_become_cases_and_other_columns_are_ignored(tmp_path: Path) -> None:
    text = "\ufeffsite, patient_id,image,mask,split,age\n,,,,,\nx,P1,a.png,m.png,test,70\nx,P2,./b.png,,train,\n"
    cases = {c.patient: c for c in read_manifest(folder_with(tmp_path, text), None, "salt")}
    assert (cases["P1"].split, cases["P1"].row, cases["P1"].label) == ("test", 3, Mask(tmp_path / "m.png"))
    assert (cases["P2"].split, cases["P2"].row, cases["P2"].label) == ("train", 4, None)


def test_a_name_composed_and_decomposed_is_one_patient_of_one_split(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "patient_id,image,mask\nM\u00fcller,a.png,\nMu\u0308ller,b.png,\n")
    marks = "patient_id,image,x_mm,y_mm,z_mm,diameter_mm\nMu\u0308ller,a.png,1,2,3,4\n"
    (folder / "nodules.csv").write_text(marks, encoding="utf-8")
    one, two = read_manifest(folder, None, "salt")
    assert (one.patient, one.split) == (two.patient, two.split)
    assert sorted(len(case.marks.nodules or ()) for case in (one, two) if case.marks) == [0, 1]
    text = "patient_id,image,mask,split\nM\u00fcller,a.png,,train\nMu\u0308ller,b.png,,test\n"
    assert "1 of 1 patients are in more than one split" in complaint(folder_with(tmp_path, text))


def test_neither_key_nor_repr_tells_the_patient_and_both_need_the_salt(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "patient_id,image,mask\nDOE-JOHN,a.png,m.png\nDOE-JOHN,b.png,m.png\n")
    one, two = read_manifest(folder, None, "salt")
    assert one.key < two.key
    assert len(one.key) == 16
    assert "DOE" not in repr(one)
    assert "a.png" not in repr(one) + repr(two)
    assert {c.key for c in read_manifest(folder, None, "pepper")}.isdisjoint({one.key, two.key})


def test_one_of_several_sites_is_chosen_by_name(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "site,patient_id,image,mask\nnorth,1,a.png,m.png\nsouth,2,b.png,m.png\n")
    assert sites_of(folder) == ("north", "south")
    assert [c.patient for c in read_manifest(folder, "south", "salt")] == ["2"]
    assert "north, south" in complaint(folder)
    assert "no site 'west'" in complaint(folder, "west")


def test_a_manifest_without_sites_is_one_site(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "patient_id,image,mask\n1,a.png,m.png\n")
    assert sites_of(folder) == ()
    assert len(read_manifest(folder, None, "salt")) == 1
    assert "no column `site`" in complaint(folder, "north")


@settings(max_examples=30, deadline=None)
@given(st.sets(NAMES, min_size=2, max_size=30), st.data())
def test_a_patient_keeps_split_and_key_when_cases_are_added_or_reordered(
    tmp_path_factory: pytest.TempPathFactory, patients: set[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("data")
    everyone = data.draw(st.permutations(sorted(patients)))
    some = everyone[: data.draw(st.integers(1, len(everyone)))]

    def read(names: Sequence[str]) -> dict[str, tuple[str, str]]:
        rows = "".join(f"{name},{name}.png,\n" for name in names)
        files = [f"{name}.png" for name in names]
        folder_with(folder, "patient_id,image,mask\n" + rows, files)
        return {c.patient: (c.key, c.split) for c in read_manifest(folder, None, "salt")}

    before = read(some)
    after = read(sorted(everyone))
    assert {name: after[name] for name in before} == before


def test_splits_have_shares_of_70_10_and_20_percent() -> None:
    drawn = [split_of(f"patient {n}", "salt") for n in range(5000)]
    assert [drawn.count(s) / 5000 for s in ("train", "val", "test")] == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    assert drawn != [split_of(f"patient {n}", "pepper") for n in range(5000)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("secret-patient,a.png,m.png,holdout", "`split` is none of train, val, test"),
        ("secret-patient,a.png,m.png,", "`split` is empty"),
        (",a.png,m.png,train", "`patient_id` is empty"),
        ("secret-patient,,m.png,train", "`image` is empty"),
        ("secret-patient,gone.png,m.png,train", "`image` names a file that is not there"),
        ("secret-patient,a.png,gone.png,train", "`mask` names a file that is not there"),
        ("secret-patient,.,m.png,train", "`image` is neither a file nor the folder of a series"),
        ("secret-patient,b.png,m.png,train", "the same image as in row 2"),
        ("secret-patient,./b.png,m.png,train", "the same image as in row 2"),
        ("secret-patient,a.png,m.png", "has 3 fields, the heading 4"),
        ("secret-patient,a.png,m.png,train,x", "has 5 fields, the heading 4"),
    ],
)
def test_a_row_that_makes_no_case_is_named_by_its_number(tmp_path: Path, row: str, words: str) -> None:
    folder = folder_with(tmp_path, f"patient_id,image,mask,split\nok,b.png,m.png,val\n\n{row}\n")
    said = complaint(folder)
    assert words in said
    assert "row 4" in said


@pytest.mark.parametrize("column", ["image", "mask"])
@pytest.mark.parametrize(
    "name", ["../outside.png", "{outside}", "x/../../outside.png", "link.png", "linked/outside.png"]
)
def test_nothing_outside_the_data_folder_is_read(tmp_path: Path, column: str, name: str) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"")
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.png").symlink_to(outside)
    (data / "linked").symlink_to(tmp_path)
    row = {"image": "a.png", "mask": "m.png", column: name.format(outside=outside)}
    said = complaint(folder_with(data, f"patient_id,image,mask\nP,{row['image']},{row['mask']}\n"))
    assert f"row 2: `{column}`" in said
    assert "inside the data folder" in said or "out of the data folder" in said


def test_a_link_inside_the_data_folder_is_followed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "patient_id,image,mask\nP,link.png,m.png\n")
    (folder / "link.png").symlink_to(folder / "a.png")
    assert read_manifest(folder, None, "salt")[0].channels[0].files == (folder / "a.png",)


def test_a_ring_of_links_and_a_pipe_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "ring.png").symlink_to(tmp_path / "ring.png")
    os.mkfifo(tmp_path / "pipe.png")
    said = complaint(folder_with(tmp_path, "patient_id,image,mask\nP,ring.png,m.png\nP,pipe.png,m.png\n"))
    assert "row 2: `image` names a file that is not there" in said
    assert "row 3: `image` is neither a file" in said


def test_a_patient_in_two_splits_is_counted_and_not_named(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        "patient_id,image,mask,split\nsecret-patient,a.png,,train\nsecret-patient,b.png,,test\nother,c.png,,test\n",
    )
    assert "1 of 2 patients" in complaint(folder)


def test_the_first_five_of_many_complaints_are_shown(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "patient_id,image,mask\n" + "secret-patient,gone.png,\n" * 8)
    said = complaint(folder)
    assert said.count("a file that is not there") == 5
    assert "3 more" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "row 1 lacks the columns patient_id, image, mask"),
        ("patient_id;image;mask\n1;a.png;m.png\n", "separated by commas"),
        ("patient_id,image\n1,a.png\n", "lacks the columns mask"),
        ("patient_id,image,image,mask\n1,a.png,a.png,m.png\n", "columns image twice"),
        ("patient_id,image,mask\n", "no rows"),
        ("site,patient_id,image,mask\nx,1,a.png,m.png\n,1,b.png,m.png\n", "row 3: `site` is empty"),
        (b"patient_id,image,mask\nM\xfcller,a.png,m.png\n", "byte 23 is not UTF-8"),
        ("patient_id,image,mask\n" + "x" * 200_000 + ",a.png,m.png\n", "not CSV"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    assert words in complaint(folder_with(tmp_path, text))


@pytest.mark.parametrize(
    "rest", ['secret-patient,b.png,,"12 mm\nP3,c.png,,', 'P2,b.png,,"unsure\nP3,c.png,,see note"', 'P2,b.png,,"12" mm']
)
def test_a_stray_quote_swallows_no_row(tmp_path: Path, rest: str) -> None:
    said = complaint(folder_with(tmp_path, f"patient_id,image,mask,comment\nP1,a.png,,ok\n{rest}\n"))
    assert "row 3 is not CSV" in said
    assert 'Take a stray `"` or line break out' in said


def test_quoted_commas_and_quotes_are_read_as_they_are_meant(tmp_path: Path) -> None:
    text = 'patient_id,image,mask,comment\r\n"P1","a.png",,"left, 3"" wide"\r\nP2,b.png,,3" wide\r\n'
    cases = {c.patient: c for c in read_manifest(folder_with(tmp_path, text), None, "salt")}
    assert [cases[p].facts for p in ("P1", "P2")] == [{"comment": 'left, 3" wide'}, {"comment": '3" wide'}]


def test_a_manifest_beyond_all_bounds_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.csv").write_text("patient_id,image,mask\n" + "p,a.png,m.png\n" * 10)
    monkeypatch.setattr(manifest, "MAX_BYTES", 100)
    with pytest.raises(ManifestInvalid, match="more than 100 bytes"):
        read_manifest(tmp_path, None, "salt")


def test_a_missing_or_linked_manifest_is_refused(tmp_path: Path) -> None:
    assert "no such file" in complaint(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "manifest.csv").write_text("patient_id,image,mask\n")
    (data / "manifest.csv").symlink_to(tmp_path / "manifest.csv")
    assert "link out of the data folder" in complaint(data)
