"""Calibration from a run to a release: what is carried, what is refused, and that every form of the network has it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedclient.predict.model import load_model
from fedserver.calibration import calibration
from fedserver.checkpoint import create_run, finish_round, read_state
from fedserver.optimizers import optimizer_of
from fedserver.publish.card import Words, calibration_words, card
from fedserver.publish.of_run import Maker, recipe_of
from shared_models.calibration import carried, temperatures_of, tempered
from shared_models.class_counts import class_counts
from shared_models.errors import ReleaseInvalid
from shared_models.files import append_json, canonical_json
from shared_models.identity import issue_signer, new_authority
from shared_models.parity import ARRAYS, FIGURES, answer, made_up_cases, stored_cases
from shared_models.release import CALIBRATION, open_release
from shared_models.update import Total
from shared_models.weights import InMemory, load, schema_of
from tests.releases import facts, made_release, tiny_study

LABELS = ("cyst", "solid")
CLASSES = tiny_study(task={"kind": "classification", "labels": list(LABELS), "loss": "bce"}, model={"name": "resnet18"})
FITTED = {"cyst": {"temperature": 2.0, "ece": 0.2, "ece_after": 0.05, "cases": 40},
          "solid": {"temperature": 0.5, "ece": 0.1, "ece_after": 0.02, "cases": 40}}  # fmt: skip


def one_of(*labels: str):
    return replace(CLASSES, task=replace(CLASSES.task, labels=labels, loss="ce"))


def test_a_temperature_for_each_label_is_carried_and_what_was_not_fitted_is_not():
    assert carried(CLASSES, FITTED) == {"temperature": {"cyst": 2.0, "solid": 0.5}}
    assert carried(CLASSES, {"cyst": {"temperature": None}, "solid": FITTED["solid"]}) == {
        "temperature": {"solid": 0.5}
    }
    assert (
        carried(CLASSES, {"cyst": {"temperature": 20.0}, "solid": {"temperature": 0.05}}) is None
    )  # ends of the search
    assert carried(CLASSES, {}) is None
    assert carried(tiny_study(), FITTED) is None  # a segmentation


def test_of_labels_of_which_one_is_true_two_have_one_temperature_and_more_have_none():
    same = {"cyst": {"temperature": 2.0}, "solid": {"temperature": 2.0}, "fat": {"temperature": 2.0}}
    assert carried(one_of(*LABELS), same) == {"temperature": {"cyst": 2.0, "solid": 2.0}}
    assert carried(one_of(*LABELS), FITTED) is None
    assert carried(one_of(*LABELS, "fat"), same) is None
    assert carried(one_of(*LABELS), {"cyst": {"temperature": 2.0}}) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_temperature_of_two_labels_of_a_softmax_is_carried_though_they_round_into_unlike_bins(seed):
    chance, study = np.random.default_rng(seed), one_of(*LABELS)
    solid = chance.random(400) < 0.4
    logits = 6 * (2.0 * solid - 1 + chance.normal(0, 1.5, 400))
    chances = torch.softmax(torch.tensor(np.stack([-logits, logits], axis=1) / 2, dtype=torch.float32), dim=1).numpy()
    told = {
        label: class_counts(chances[:, n].astype(float), solid == n, chances[:, n] > 0.5)
        for n, label in enumerate(LABELS)
    }
    fitted = calibration(study, told, told)["calibration"]
    assert fitted["cyst"]["temperature"] != fitted["solid"]["temperature"]
    by = temperatures_of(study, carried(study, fitted))
    assert by is not None
    np.testing.assert_allclose(by, fitted["cyst"]["temperature"], rtol=1e-3)


def test_a_softmax_is_not_divided_label_by_label():
    for lone in ({"cyst": 2.0}, {"cyst": 2.0, "solid": 2.5}):
        with pytest.raises(ReleaseInvalid, match="more than one temperature"):
            temperatures_of(one_of(*LABELS), {"temperature": lone})


def test_logits_are_divided_label_by_label():
    by = temperatures_of(CLASSES, {"temperature": {"solid": 0.5}})
    assert by is not None
    assert by.tolist() == [1.0, 0.5]
    assert tempered(np.array([[4.0, 3.0]], np.float32), by).tolist() == [[4.0, 6.0]]


@pytest.mark.parametrize("spoilt", [
    {"temperature": {"cyst": 0.0}}, {"temperature": {"cyst": "2"}}, {"temperature": {"fat": 2.0}}, {"cyst": 2.0},
    {"temperature": 2.0}, {"temperature": {"cyst": 2.0}, "more": 1}, {"temperature": {"cyst": float("inf")}},
])  # fmt: skip
def test_calibration_that_is_not_of_the_study_is_refused(spoilt):
    with pytest.raises(ReleaseInvalid, match=r"calibration\.json"):
        temperatures_of(CLASSES, spoilt)


def test_every_form_of_a_calibrated_release_is_proved_equal_calibration_included(tmp_path):
    members = {CALIBRATION: canonical_json({"temperature": {"cyst": 2.0, "solid": 0.5}})}
    folder, trust = made_release(tmp_path, CLASSES, members=members)
    opened = open_release(folder, trust)
    forms = json.loads((folder / FIGURES).read_text())["forms"]
    assert len(forms) == 4  # ONNX, TorchScript, and the bundle's two
    assert max(form["probability"] for form in forms.values()) < 1e-4
    raw = load(folder / ARRAYS)["case-0/logits"].astype(np.float64)
    by_hand = 1 / (1 + np.exp(-raw / [2.0, 0.5]))
    by = temperatures_of(opened.study, opened.calibration)
    _, stored = stored_cases((folder / ARRAYS).read_bytes(), opened.study, by)
    np.testing.assert_allclose(stored[0].chances, by_hand, atol=1e-6)
    np.testing.assert_array_equal(stored[0].decisions, raw > 0)
    for engine in ("onnxruntime", "torch"):
        model = load_model(opened, threads=1, engine=engine)
        case = made_up_cases(opened.study)[0]
        ours = answer(opened.study, case, model.through(case.inputs), model.temperatures)
        np.testing.assert_allclose(ours.chances, by_hand, atol=1e-4)


def test_the_card_says_by_what_it_is_calibrated_and_what_that_does():
    found = facts(CLASSES) | {"calibration": FITTED}
    told = card(CLASSES, "1", found, Words(), None, {}, "federation")
    assert told["calibration"]["cyst"] == {"temperature": 2.0, "ece_after": 0.05}
    assert calibration_words({"cyst": told["calibration"]["cyst"]}) == (
        "cyst: calibrated by a temperature of 2.000, calibration error then 0.050"
    )


def test_a_run_hands_what_it_has_fitted_to_the_release_of_its_last_round_and_of_no_earlier_one(tmp_path):
    initial = {"w": np.zeros(3, np.float32)}
    run = create_run(tmp_path, "toy", CLASSES, initial)
    for _ in range(2):
        total = Total(schema_of(initial))
        total.add(InMemory({"w": np.ones(3, np.float32)}), 10)
        optimizer = optimizer_of(CLASSES.strategy)
        seat = {"examples": 10, "steps": 1, "seconds": 1.0, "attempt": 1, "device": "", "losses": [], "scores": {}}
        line = {"sites": {"a": seat}, "left_out": {}, "bytes_down": 1, "bytes_up": 1, "seconds": 1.0}
        finish_round(run, read_state(run), total, optimizer, ("a",), line)
    final = {"round": 2, "final": True, "scored_round": 2, "sites": {}, "federation": {}, "left_out": {}}
    append_json(run.metrics, final | {"calibration": FITTED})
    ca = new_authority("f")
    maker = Maker("federation", "f", issue_signer(ca), ca.certificate, ca.certificate)
    last, earlier = (recipe_of(run, "1", maker, Words(), number) for number in (2, 1))
    assert json.loads(last.members[CALIBRATION]) == {"temperature": {"cyst": 2.0, "solid": 0.5}}
    assert last.card["calibration"]["solid"]["temperature"] == 0.5
    assert CALIBRATION not in earlier.members
    assert earlier.card["calibration"] == "not known"
