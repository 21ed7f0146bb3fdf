"""What is told of a private model's worth: whose cases are together, and that each setting tried is a private study."""

from pathlib import Path

import pytest

from shared_models.protect.accounting import epsilon
from shared_models.study import load_study
from simulations.bench.private_utility import Setting, Trial, figure, nodules, study_at

NODULES = nodules(Path("nowhere"), 2)


def test_dice_is_a_mean_over_sites_and_auroc_that_of_all_cases_together():
    scores = {"a": 0.5, "b": 0.75, "": 0.7}
    lungs = Trial(load_study("lung-ct-private"), Path("x"), "Dice", Path("x"), (0,), (), ())
    assert figure(lungs, scores) == 0.625
    assert figure(NODULES, scores) == 0.7


def test_a_setting_gets_the_noise_that_its_epsilon_takes_and_trains_what_it_says():
    study = study_at(NODULES.study, 3.0, 1, Setting("sgd", 10.0, 0.1, "head"))
    privacy = study.protect.privacy
    assert privacy is not None
    assert epsilon([privacy.spend(60)], privacy.delta) == pytest.approx(3.0, rel=5e-3)
    assert (study.seed, study.train.learning_rate, privacy.clip_norm, privacy.trained) == (1, 10.0, 0.1, "head")
    assert study_at(NODULES.study, None, 1, Setting("adam", 1e-3)).protect.privacy is None


def test_settings_are_chosen_by_the_seeds_and_patients_of_the_same_data():
    assert (NODULES.data, NODULES.choosing_seeds) == (NODULES.chosen_on, (0, 1))
    assert {s.trained for s in NODULES.with_noise} == {"all", "head"}
