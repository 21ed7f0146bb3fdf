"""Data sets that a file describes: the Decathlon, nnU-Net, and labels.csv, and what their descriptions get wrong."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclient.data.cases import Boxes, Case, Listing, Mask, Shown, read_case, read_case_labels
from fedclient.data.listing import list_cases, sites_in
from fedclient.data.manifest import split_of
from fedclient.data.where import Where
from shared_models.errors import ImageUnreadable
from shared_models.files import write_atomic
from simulations.fixtures import Example, png, write_decathlon, write_nnunet
from tests.test_layout_files import AFFINE, SHAPE, grey, labels_of, listing, of, refusal, told

# The Decathlon and nnU-Net


def examples(count: int, channels: int = 1) -> list[Example]:
    """Voxel (n, 0, 0) of case n is 1, the one beside it 2."""
    made = []
    for n in range(count):
        labels = np.zeros(SHAPE, np.uint8)
        labels[n, 0, 0], labels[n, 1, 0] = 1, 2
        made.append(Example(f"case_{n:02d}", tuple(grey(10 * n + c) for c in range(channels)), labels, AFFINE))
    return made


LABELS = ("Left Lung", "tumour")
Writer = Callable[..., Path]
JSON_LAYOUTS: list[tuple[str, Writer]] = [("decathlon", write_decathlon), ("nnunet", write_nnunet)]


def edit(folder: Path, **changes: Any) -> None:
    """Changes of dataset.json; None takes a key out."""
    path = folder / "dataset.json"
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))


@pytest.mark.parametrize(("layout", "write"), JSON_LAYOUTS)
def test_channels_and_labels_are_known_by_their_names(tmp_path: Path, layout: str, write: Writer) -> None:
    folder = write(tmp_path, "Task01_Brain", examples(3, 2), LABELS, channels=["FLAIR", "T1gd"])
    found = listing(folder)
    title = {"decathlon": "Medical Segmentation Decathlon", "nnunet": "nnU-Net raw data"}[layout]
    assert (found.layout, [*told(found)]) == (f"{title}, 3 training cases", ["PATIENT_UNKNOWN"])
    assert "dataset.json does not say which patient" in told(found)["PATIENT_UNKNOWN"]
    assert found.findings[0].severity == "warn"
    case = of(found, "case_01")
    assert [channel.name for channel in case.channels] == ["flair", "t1gd"]
    image = read_case(case, ("t1ce", "flair"))  # BraTS's word for T1 with gadolinium
    assert (image.voxels == np.stack([grey(11), grey(10)])).all()
    labels = read_case_labels(case, image, ("tumour", "left-lung"))
    assert (labels[1, 0, 0], labels[1, 1, 0], labels.sum()) == (2, 1, 3)
    assert case.split == split_of("case_01", "salt")
    with pytest.raises(ImageUnreadable, match="the case has flair, t1gd"):
        read_case(case)
    with pytest.raises(ImageUnreadable, match="labels Left Lung, tumour; this study spleen"):
        read_case_labels(case, image, ("spleen",))
    with pytest.raises(ImageUnreadable, match=r"values \[2\].*besides: 2 = tumour"):
        read_case_labels(case, image, ("left-lung",))


@pytest.mark.parametrize(("layout", "write"), JSON_LAYOUTS)
def test_files_that_are_missing_or_lie_outside_are_told_and_the_others_stay(
    tmp_path: Path, layout: str, write: Writer
) -> None:
    folder = write(tmp_path, "Task01_Lung", examples(3), LABELS)
    image = folder / "imagesTr" / ("case_00.nii.gz" if layout == "decathlon" else "case_00_0000.nii.gz")
    image.rename(tmp_path / "outside.nii.gz")
    image.symlink_to(tmp_path / "outside.nii.gz")
    (folder / "labelsTr" / "case_01.nii.gz").unlink()
    found = listing(folder)
    assert "case_02" in [case.patient for case in found.cases]
    assert "is a link out of the data folder" in told(found)["PATH_ESCAPE"]
    if layout == "decathlon":
        assert told(found)["FILE_MISSING"] == "entry 2 of `training`: its label names a file that is not there"
    else:  # it lists no labels, so one that is not there is a case without
        assert of(found, "case_01").label is None


@pytest.mark.parametrize("escape", ["../outside.nii.gz", "{outside}", "./imagesTr/../../outside.nii.gz"])
def test_dataset_json_cannot_name_files_outside_its_folder(tmp_path: Path, escape: str) -> None:
    folder = write_decathlon(tmp_path, "Task01_Lung", examples(2), LABELS)
    outside = tmp_path / "outside.nii.gz"
    shutil.copy(folder / "imagesTr" / "case_00.nii.gz", outside)
    training = json.loads((folder / "dataset.json").read_text())["training"]
    edit(folder, training=[training[0] | {"image": escape.format(outside=outside)}, training[1]])
    found = listing(folder)
    assert len(found.cases) == 1
    assert told(found).keys() == {"PATH_ESCAPE", "PATIENT_UNKNOWN"}
    what = "entry 1 of `training`: its image must be a path inside the data folder, without `..`"
    assert told(found)["PATH_ESCAPE"] == what


def test_the_decathlons_junk_and_its_unlabelled_test_cases_are_known(tmp_path: Path) -> None:
    made = examples(4)
    folder = write_decathlon(tmp_path, "Task01_Lung", made[:3], LABELS, test=made[3:])
    training = json.loads((folder / "dataset.json").read_text())["training"]
    junk = {"image": "./imagesTr/._case_00.nii.gz", "label": "./labelsTr/._case_00.nii.gz"}
    edit(folder, training=[junk, *training, training[0]], numTraining=9)
    found = listing(folder)
    assert (of(found, "case_03").split, of(found, "case_03").label) == ("test", None)
    assert told(found).keys() == {"SERIES_LEFT_OUT", "DUPLICATE", "FILE_MISSING", "PATIENT_UNKNOWN"}
    assert told(found)["FILE_MISSING"] == "dataset.json speaks of 10 cases and lists 5"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": {"background": 0}}, "names nothing but the background"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": [2]}}, "two names (whole, core). Overlapping regions"),
        ({"labels": {"background": 0, "lung": 300}}, "none from 0 to 255"),
        ({"channel_names": {"0": "CT", "2": "PET"}}, "`channel_names` must name the channels"),
        ({"file_ending": "/../x"}, "`file_ending` must be one like"),
        ({"dataset": {"a": {"images": []}}}, "entry 1 of `dataset` names no images"),
    ],
)
def test_a_dataset_json_that_cannot_be_right_is_refused(
    tmp_path: Path, changes: Mapping[str, object], words: str
) -> None:
    folder = write_nnunet(tmp_path, "Dataset001_Lung", examples(2), LABELS)
    edit(folder, **changes)
    assert words in str(refusal(folder))


def test_a_region_of_several_values_and_an_ignore_label_are_understood(tmp_path: Path) -> None:
    folder = write_nnunet(tmp_path, "Dataset001_Lung", examples(2), LABELS)
    edit(folder, labels={"background": 0, "lung": [1], "ignore": 2})
    labels = labels_of(of(listing(folder), "case_01"), "lung")
    assert (labels[1, 0, 0], labels[1, 1, 0]) == (1, 127)
    edit(folder, labels={"background": 0, "lung": [1, 2]}, regions_class_order=[1])
    assert labels_of(of(listing(folder), "case_01"), "lung").sum() == 2


def test_nnunets_fold_gives_training_and_validation_and_labelled_test_images_are_the_test(tmp_path: Path) -> None:
    folder = write_nnunet(tmp_path, "Dataset001_Lung", examples(5), LABELS)
    fold = {"train": ["case_00", "case_01"], "val": ["case_02"]}
    (folder / "splits_final.json").write_text(json.dumps([fold, {"train": ["case_02"], "val": ["case_00"]}]))
    for part, name in (("images", "case_04_0000.nii.gz"), ("labels", "case_04.nii.gz")):
        (folder / f"{part}Ts").mkdir()
        (folder / f"{part}Tr" / name).rename(folder / f"{part}Ts" / name)
    found = listing(folder)
    assert {case.patient: case.split for case in found.cases} == {
        "case_00": "train", "case_01": "train", "case_02": "val", "case_04": "test",
    }  # fmt: skip
    assert "1 cases are not in the first fold" in told(found)["SERIES_LEFT_OUT"]
    (folder / "splits_final.json").unlink()
    assert "test" not in [case.split for case in listing(folder).cases if case.patient != "case_04"]
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_00"], "val": ["case_00"]}]))
    assert refusal(folder).code == "LEAKAGE_PATIENT"


def test_a_case_for_training_and_for_test_stops_the_data_set(tmp_path: Path) -> None:
    made = examples(2)
    folder = write_decathlon(tmp_path, "Task01_Lung", made, LABELS, test=made)
    names = [f"case_{n:02d}" for n in range(2) if split_of(f"case_{n:02d}", "salt") != "test"]
    refused = refusal(folder)
    assert refused.code == "LEAKAGE_PATIENT"
    assert f"{len(names)} of 2 patients" in str(refused)


def test_nnunets_explicit_list_of_files_is_followed(tmp_path: Path) -> None:
    folder = write_nnunet(tmp_path, "Dataset001_Lung", examples(2), LABELS)
    one = {"images": ["imagesTr/case_00_0000.nii.gz"], "label": "labelsTr/case_00.nii.gz"}
    edit(folder, dataset={"first": one, "second": one | {"images": ["imagesTr/gone_0000.nii.gz"]}})
    found = listing(folder)
    assert [case.patient for case in found.cases] == ["first"]
    assert told(found)["FILE_MISSING"].startswith("entry 2 of `dataset`: its image names a file")


# labels.csv


def table(folder: Path, text: str, pictures: int = 3) -> Path:
    for n in range(pictures):
        for kind in ("images", "masks"):
            write_atomic(folder / kind / f"{n}.png", png(np.full((4, 6), n, np.uint8)))
    (folder / "labels.csv").write_text(text)
    return folder


def by_row(found: Listing) -> dict[int, Case]:
    return {case.row: case for case in found.cases}


def test_classes_are_read_by_name_without_a_study(tmp_path: Path) -> None:
    text = "image,label,patient_id,sex,split\nimages/0.png,mass|effusion,p,f,train\nimages/1.png,none,p,f,train\n"
    found = listing(table(tmp_path, text + "images/2.png,,q,m,test\n"))
    assert (found.layout, found.findings) == ("labels.csv, 3 images", ())
    assert {row: (case.label, case.split) for row, case in by_row(found).items()} == {
        2: (Shown(("mass", "effusion")), "train"),
        3: (Shown(()), "train"),
        4: (None, "test"),
    }
    with pytest.raises(ImageUnreadable, match="classes of the whole image") as e:
        labels_of(by_row(found)[2], "mass")
    assert e.value.code == "LABEL_MISSING"


def test_a_column_for_each_class_tells_what_was_looked_for(tmp_path: Path) -> None:
    text = "image,mass,age,effusion,ward\nimages/0.png,1,61,0,1a\nimages/1.png,0,44,,1b\nimages/2.png,,50,,2\n"
    found = listing(table(tmp_path, text))
    assert {row: case.label for row, case in by_row(found).items()} == {
        2: Shown(("mass",), ("mass", "effusion")),
        3: Shown((), ("mass",)),
        4: None,
    }
    assert "no column patient_id" in told(found)["PATIENT_UNKNOWN"]


def test_age_sex_and_other_columns_are_facts_of_their_case(tmp_path: Path) -> None:
    text = (
        "image,label,patient_id,split,age,sex,ward\nimages/0.png,mass,p,train,61,F,1a\nimages/1.png,none,q,test,,M,\n"
    )
    found = by_row(listing(table(tmp_path, text)))
    assert found[2].facts == {"age": "61", "sex": "F", "ward": "1a"}  # by which groups of patients are told apart
    assert found[3].facts == {"sex": "M"}


def test_boxes_of_an_image_stand_in_rows_of_their_own(tmp_path: Path) -> None:
    heading = "image,x_min,y_min,x_max,y_max,label,patient_id\n"
    text = "images/0.png,1,1,3,2,mass,p\nimages/0.png,0,0,2,2,a|b,p\nimages/1.png,,,,,,q\nimages/2.png,5,1,3,2,mass,q\n"
    found = listing(table(tmp_path, heading + text))
    first = by_row(found)[2].label
    assert isinstance(first, Boxes)
    assert [(box.labels, box.x_max) for box in first.boxes] == [(("mass",), 3.0), (("a", "b"), 2.0)]
    assert by_row(found)[4].label == Boxes(())
    assert told(found) == {"LABEL_VALUES": "row 5: `x_max` is not above its minimum"}
    with pytest.raises(ImageUnreadable, match="the case has boxes"):
        labels_of(by_row(found)[2], "mass")


def test_masks_and_sites_and_faulty_rows(tmp_path: Path) -> None:
    text = """site,image,mask,patient_id,split
north,images/0.png,masks/1.png,p,train
north,images/0.png,masks/1.png,p,train
north,images/1.png,masks/gone.png,p,train
north,images/2.png,../x.png,p,train
south,images/2.png,,q,later
south,images/1.png,,q,test
"""
    folder = table(tmp_path, text)
    assert sites_in(Where(folder)) == ("north", "south")
    assert "holds the sites north, south" in str(refusal(folder))
    north = list_cases(Where(folder, ("north",)), "salt")
    assert [finding.code for finding in north.findings] == ["DUPLICATE", "FILE_MISSING", "PATH_ESCAPE"]
    assert [finding.row for finding in north.findings] == [2, 4, 5]
    south = list_cases(Where(folder, ("south",)), "salt")
    assert [(case.row, case.split, case.label) for case in south.cases] == [(7, "test", None)]
    assert told(south) == {"MANIFEST_INVALID": "row 6: `split` is none of train, val, test"}
    rows = text.splitlines()
    rows[2:5] = ["north,images/1.png,masks/1.png,q,train"]
    both = list_cases(Where(table(tmp_path, "\n".join(rows) + "\n"), ("north",)), "salt")
    assert both.findings == ()
    label = by_row(both)[2].label
    assert isinstance(label, Mask)
    assert (labels_of(by_row(both)[2], "lung") == 1).all()


def test_a_patient_in_two_splits_stops_the_table(tmp_path: Path) -> None:
    text = "image,label,patient_id,split\nimages/0.png,a,Doe,train\nimages/1.png,a,Doe,test\n"
    refused = refusal(table(tmp_path, text))
    assert refused.code == "LEAKAGE_PATIENT"
    assert "Doe" not in str(refused)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,finding\nimages/0.png,mass\n", "no column `mask`, `label` or `x_min`"),
        ("picture,label\nimages/0.png,mass\n", "lacks the columns image"),
        ("image,label\n", "no rows"),
    ],
)
def test_a_table_that_says_nothing_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in str(refusal(table(tmp_path, text)))
