"""Settings of a comparison: changes to study.toml by name, joined, added, and checked as a study file is."""

import pytest

from shared_models.errors import StudyInvalid
from shared_models.study import Study, load_study
from simulations.settings import SETTINGS, changed, settings_named

STUDY = Study(name="toy")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_named_setting_changes_a_study_that_has_none_of_them(name):
    study = load_study("lung-ct-quick")
    made = changed(study, name, SETTINGS[name])
    assert (made == study) == (name in ("study", "fedavg"))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("ready", ["chest-xray", "lung-nodule", "nodule-malignancy", "nodule-presence"])
def test_every_named_setting_suits_the_ready_studies_that_are_compared(name, ready):
    study = load_study(ready)
    made = changed(study, name, SETTINGS[name])
    assert changed(made, "again", SETTINGS[name]) == made


def test_plain_averaging_is_what_it_says_whatever_the_study_says():
    found, _ = settings_named(["study", "fedavg"], [], [])
    with_momentum = changed(STUDY, "momentum", SETTINGS["fedavgm"])
    assert changed(with_momentum, "study", found["study"]) == with_momentum
    assert changed(with_momentum, "fedavg", found["fedavg"]).strategy.name == "fedavg"


def test_two_settings_are_joined_with_a_plus():
    found, _ = settings_named(["fedprox+ditto"], [], [])
    made = changed(STUDY, "fedprox+ditto", found["fedprox+ditto"])
    assert (made.train.proximal_mu, made.personal.ditto_lambda) == (0.01, 0.1)


def test_two_settings_that_change_one_key_differently_are_not_joined():
    with pytest.raises(StudyInvalid, match="'fedadam\\+fedyogi': two of its parts set `name`"):
        settings_named(["fedadam+fedyogi"], [], [])


def test_settings_are_added_by_assignment_and_by_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[slow.train]\nlearning_rate = 1e-4\n[slow.rounds]\ncount = 3\n")
    sets = ["strong:train.proximal_mu=0.5", "fedbn:train.proximal_mu=0.1", "rounds.count=7"]
    found, whole = settings_named(["slow", "strong", "fedbn"], [file], sets)
    slow, strong, bn = (changed(STUDY, name, found[name]) for name in found)
    assert (slow.train.learning_rate, slow.rounds.count) == (1e-4, 3)
    assert strong.train.proximal_mu == 0.5
    assert (bn.personal.keep, bn.train.proximal_mu) == (("norm",), 0.1)
    assert changed(STUDY, "--set", whole).rounds.count == 7


@pytest.mark.parametrize(
    ("names", "sets", "words"),
    [
        (["fedavgg"], [], "'fedavgg' is not known"),
        (["local"], ["local:train.momentum=0.5"], "is not pooled, local"),
        (["fedavg"], ["train.proximal_mu"], "write KEY=VALUE"),
        (["fedavg"], ["train.proximal_mu=much"], "write KEY=VALUE"),
    ],
)
def test_what_is_no_setting_is_told(names, sets, words):
    with pytest.raises(StudyInvalid, match=words):
        settings_named(names, [], sets)


def test_a_wrong_value_is_told_as_in_a_study_file():
    with pytest.raises(StudyInvalid, match=r"with setting 'x': `train\.proximal_mu` is -1"):
        changed(STUDY, "x", {"train": {"proximal_mu": -1}})
    with pytest.raises(StudyInvalid, match="Did you mean `proximal_mu`"):
        changed(STUDY, "x", {"train": {"proximalmu": 1}})
