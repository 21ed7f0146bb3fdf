"""A network's other forms answer as it does, in every kind of task; a form that does not is never published."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedserver.publish import bundle, exports, making
from shared_models import nets
from shared_models.errors import ReleaseInvalid
from shared_models.parity import (
    ARRAYS,
    TOLERANCE,
    answer,
    compared,
    image_case,
    made_up_cases,
    save_cases,
    stored_cases,
)
from shared_models.preprocess import preprocess, restore
from shared_models.release import MANIFEST, ONNX, TORCHSCRIPT, open_release
from shared_models.runtimes import onnx_runner, state_dict_runner, torch_runner, torchscript_runner
from shared_models.study import Study
from shared_models.weights import load, save_arrays
from tests.releases import made_release, recipe, tiny_study

PROGNOSIS = {"kind": "prognosis", "labels": ["death"], "loss": "hazard", "intervals_days": [100, 200, 300]}
STUDIES = {
    "segmentation in 2-D": tiny_study(),
    "segmentation in 3-D, by a softmax, in patches": tiny_study(
        task={"labels": ["left", "right"], "loss": "dice_ce"},
        model={"name": "unet", "spatial_dims": 3, "features": [8, 8, 8, 8, 8, 8], "groups": 4},
        preprocess={"size": [16, 32, 32], "fit": "patches", "spacing_mm": [2.0, 2.0, 3.0]},
    ),
    "regions of two pictures, of a DynUNet": tiny_study(
        modality="mr",
        channels=["t1", "t2"],
        task={"labels": ["core", "rim"], "regions": [{"name": "whole", "parts": ["core", "rim"]}]},
        model={
            "name": "dynunet",
            "norm": "instance",
            "levels": [{"features": 8, "stride": [s, s], "kernel": [3, 3]} for s in (1, 2, 2)],
        },
        preprocess={"size": [32, 32], "intensity": "percentile"},
    ),
    "segmentation with swapped norms": tiny_study(
        model={"name": "segresnet", "features": [8]}, preprocess={"size": [16, 16], "fit": "crop_pad"}
    ),
    "classification": tiny_study(
        task={"kind": "classification", "labels": ["cyst", "solid"], "loss": "ce"}, model={"name": "resnet18"}
    ),
    "prognosis by image": tiny_study(task=PROGNOSIS, model={"name": "vgg11"}),
    "prognosis by table": tiny_study(
        task=PROGNOSIS | {"covariates": [{"column": "age", "mean": 60, "deviation": 10}, {"column": "stage"}]},
        model={"name": "mlp", "features": [8], "norm": "none"},
        preprocess={},
    ),
}


@pytest.mark.parametrize("name", STUDIES)
def test_every_form_answers_as_the_network_does(tmp_path, name):
    study = STUDIES[name]
    net = nets.network(study).eval()
    free = exports.to_onnx(net, study, tmp_path / ONNX)
    exports.to_torchscript(net, study, tmp_path / TORCHSCRIPT)
    exports.to_state_dict(net, tmp_path / "model.pt")
    cases = made_up_cases(study)
    wanted = [answer(study, case, torch_runner(net)(case.inputs)) for case in cases]
    figures = compared(
        study,
        cases,
        wanted,
        {
            ONNX: onnx_runner(tmp_path / ONNX, threads=1),
            TORCHSCRIPT: torchscript_runner(tmp_path / TORCHSCRIPT),
            "model.pt": state_dict_runner(study, tmp_path / "model.pt"),
        },
    )
    assert all(figure["logits"] <= TOLERANCE and figure["decisions"] == 0 for figure in figures.values())
    assert free == (study.task.kind == "segmentation")


def test_an_onnx_with_free_edges_takes_larger_images_and_any_batch(tmp_path):
    study = STUDIES["segmentation in 2-D"]
    net = nets.network(study).eval()
    assert exports.to_onnx(net, study, tmp_path / ONNX)
    inputs = torch.randn((3, 1, 64, 96), generator=torch.Generator().manual_seed(1)).numpy()
    found = onnx_runner(tmp_path / ONNX, threads=1)(inputs)
    np.testing.assert_allclose(found, torch_runner(net)(inputs), atol=TOLERANCE)


def test_cases_are_scaled_up_and_down_and_have_masks_of_both_kinds():
    study = STUDIES["segmentation in 2-D"]
    coarse, fine = made_up_cases(study)
    assert coarse.geometry is not None
    assert fine.geometry is not None
    assert max(coarse.geometry.step) < 1 < min(fine.geometry.step)
    logits = np.where(coarse.inputs > 0.5, 3.0, -3.0).astype(np.float32)
    share = answer(study, coarse, logits).decisions.mean()
    assert 0.1 < share < 0.9


def test_decisions_are_those_of_the_study_on_the_images_own_grid():
    study = STUDIES["segmentation in 2-D"]
    voxels = np.full((1, 20, 24, 2), -1000.0, np.float32)
    voxels[0, 5:15, 6:18, 1] = 300
    case = image_case("square", voxels, (1.0, 1.0, 2.0), study)
    logits = (case.inputs - 0.5) * 20
    chances = restore(1 / (1 + np.exp(-logits)), preprocess(voxels, (1.0, 1.0, 2.0), study.preprocess).geometry)
    np.testing.assert_array_equal(answer(study, case, logits).decisions[0], chances > 0.5)


def moved(path: Path, by: float) -> None:
    """Another network's file in the place of the right one: its last bias is off."""
    study = tiny_study()
    net = nets.network(study).eval()
    with torch.no_grad():
        list(net.parameters())[-1].add_(by)
    if path.suffix == ".onnx":
        exports._onnx(net, study, path, free=True)
    else:
        exports.to_torchscript(net, study, path)


@pytest.mark.parametrize(("form", "writer"), [(ONNX, "to_onnx"), (TORCHSCRIPT, "to_torchscript")])
def test_nothing_is_published_when_a_form_answers_otherwise(tmp_path, monkeypatch, form, writer):
    right = getattr(exports, writer)

    def wrong(net: torch.nn.Module, study: Study, to: Path) -> object:
        found = right(net, study, to)
        moved(to, 3e-4)
        return found

    monkeypatch.setattr(making, writer, wrong)
    with pytest.raises(ReleaseInvalid, match=r"off by 0\.0003") as found:
        making.make_release(recipe(), tmp_path / "release")
    assert found.value.file == form
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_published_when_the_bundles_weights_are_others(tmp_path, monkeypatch):
    right = exports.to_state_dict

    def wrong(net: torch.nn.Module, to: Path) -> None:
        with torch.no_grad():
            list(net.parameters())[-1].add_(1e-3)
        right(net, to)
        with torch.no_grad():
            list(net.parameters())[-1].sub_(1e-3)

    monkeypatch.setattr(bundle, "to_state_dict", wrong)
    with pytest.raises(ReleaseInvalid) as found:
        making.make_release(recipe(), tmp_path / "release")
    assert found.value.file == bundle.STATE


def test_a_form_that_answers_in_another_shape_or_not_with_numbers_is_named():
    study = STUDIES["segmentation in 2-D"]
    cases = made_up_cases(study)
    wanted = [answer(study, case, torch_runner(nets.network(study).eval())(case.inputs)) for case in cases]
    for spoilt in (lambda x: x[:, :, :16], lambda x: x * np.float32(np.nan)):
        with pytest.raises(ReleaseInvalid, match=r"model\.onnx"):
            compared(study, cases, wanted, {ONNX: spoilt})


def test_stored_cases_tell_when_the_package_preprocesses_otherwise(tmp_path):
    study = STUDIES["segmentation in 2-D"]
    cases = made_up_cases(study)
    answers = [answer(study, case, torch_runner(nets.network(study).eval())(case.inputs)) for case in cases]
    save_cases(tmp_path, cases, answers)
    again, stored = stored_cases((tmp_path / ARRAYS).read_bytes(), study)
    np.testing.assert_array_equal(again[1].inputs, cases[1].inputs)
    np.testing.assert_array_equal(stored[1].decisions, answers[1].decisions)
    arrays = load(tmp_path / ARRAYS)
    save_arrays(tmp_path / ARRAYS, arrays | {"case-1/inputs": arrays["case-1/inputs"] + np.float32(1e-3)})
    with pytest.raises(ReleaseInvalid, match="preprocesses case-1 otherwise"):
        stored_cases((tmp_path / ARRAYS).read_bytes(), study)


def test_a_network_that_sees_a_table_is_released_without_a_bundle_and_the_manifest_says_why(tmp_path):
    study = STUDIES["prognosis by table"]
    folder, trust = made_release(tmp_path, study)
    exported = open_release(folder, trust).manifest.exports
    assert exported["monai"].startswith("none: the network sees a table")
    assert not (folder / "bundle").exists()
    table = np.zeros((5, 2), np.float32)
    assert onnx_runner(folder / ONNX, threads=1)(table).shape == (5, 3)
    assert (folder / MANIFEST).exists()
