"""What a person is told of a study before the decision: the cases that it would see here, by their labels."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedclient.consent import Asked
from fedclient.explain import explained
from fedclient.gate.run import usable_cases
from fedclient.gate.waivers import waive
from fedclient.site import Site
from shared_models.study import Augment, Model, Preprocess, Study, Task, Unlabelled

STUDY = Study(
    name="tiny",
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    preprocess=Preprocess(size=(32, 32)),
    augment=Augment(noise=0.1),
    unlabelled=Unlabelled(method="mean_teacher"),
)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Three training cases: with a mask, with a class alone, with nothing; and one for test."""
    rows = ["p,1.png,m1.png,mass,train", "q,2.png,,mass,train", "r,3.png,,,train", "s,4.png,m4.png,none,test"]
    for name in ("1.png", "2.png", "3.png", "4.png", "m1.png", "m4.png"):
        (tmp_path / name).touch()
    (tmp_path / "manifest.csv").write_text("\n".join(["patient_id,image,mask,label,split", *rows]))
    return Site("north", tmp_path / "site", tmp_path, (), "cpu", 1, 11, "salt", deployed=True)


def seen(site: Site, study: Study) -> list[str]:
    told: list[str] = explained(site, Asked("a" * 64, study, "{}", 0.0, None, "pending"))["sees"]
    return told[1:]


def test_cases_without_labels_of_the_study_are_counted_as_such_whatever_else_they_are_labelled_with(site):
    assert seen(site, STUDY) == [
        "1 labelled cases for training, 0 for validation after rounds, 1 for the test after the last.",
        "It learns from images without labels as well: 2 more cases for training.",
    ]


def test_a_study_that_looks_at_no_label_counts_each_image_once(site):
    study = replace(STUDY, task=Task(kind="reconstruction", loss="masked_l1"), unlabelled=Unlabelled())
    assert seen(site, study) == ["3 cases for training, 0 for validation after rounds, 1 for the test after the last."]


def test_a_case_that_the_steward_has_left_out_is_not_counted(site):
    first = next(case for case in usable_cases(site) if case.patient == "p")
    waive(site.folder, "LABEL_ODD", first.key, "drawn on the wrong side", exclude=True)
    assert seen(site, STUDY)[0].startswith("0 labelled cases for training")
