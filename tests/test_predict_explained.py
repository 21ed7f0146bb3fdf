"""Explanations beside predictions: of the plane and the answers that matter, by the very network, and named."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from fedclient.cli import app
from fedclient.overlay import NOT_FOR_DIAGNOSIS, drawn
from fedclient.predict.case import predict_case
from fedclient.predict.explained import Explainer, explainer_of
from fedclient.predict.inputs import Source, list_inputs
from fedclient.predict.model import load_model
from fedclient.training import explaining
from shared_models.errors import ExplanationFailed
from shared_models.files import canonical_json
from shared_models.release import CALIBRATION, Release, open_release
from shared_models.runtimes import torch_runner
from shared_models.study import Model, Study, Task
from shared_models.task_table import Covariate
from simulations.fixtures.dicom import write_dicom_series
from tests.marking import DARK_HU, LUNG, chest_hu, model
from tests.releases import made_release, tiny_study
from tests.test_predict import volume

CPU = torch.device("cpu")


class Dark(nn.Module):
    """Marks what is darker than -650 HU, as tests/marking.py does."""

    def __init__(self, layer: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d) -> None:
        super().__init__()
        self.features = layer(1, 1, 1, bias=False)
        self.bias = nn.Parameter(torch.tensor([10.0]))
        nn.init.constant_(self.features.weight, -40.0)

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.features(images) + self.bias
        return answer


class Levels(nn.Module):
    """Two classes: how bright an example is, and how dark."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3)) - 0.5 + 0 * self.features(images).mean(dim=(1, 2, 3))
        return 8 * torch.stack([mean, -mean], dim=1)


def only(path: Path, study: Study = LUNG) -> Source:
    (found,) = list_inputs([path], study).found
    assert isinstance(found, Source)
    return found


@pytest.fixture
def captions(monkeypatch) -> list[list[str]]:
    """The lines that stand on each picture."""
    told: list[list[str]] = []

    def noted(image, panels, lines, region=None):
        told.append(list(lines))
        return drawn(image, panels, lines, region)

    monkeypatch.setattr(explaining, "drawn", noted)
    return told


def test_of_a_long_series_the_plane_with_most_of_the_answer_is_explained(tmp_path, captions):
    hu = np.full((1, 40, 36, 37), 40, np.float32)
    hu[0, 5:9, 5:9, 3] = hu[0, 8:30, 8:30, 30] = -850
    write_dicom_series(tmp_path, volume(hu))
    found = predict_case(model(), only(tmp_path))
    assert found.places == (30,)
    (map_,) = Explainer(model(), Dark(), CPU, ("occlusion",))(found)
    assert (map_.answer, map_.plane, map_.file) == ("lung", 30, "explained-1-occlusion.png")
    assert map_.chance == pytest.approx(1.0, abs=1e-3)
    assert map_.picture is not None
    assert any("dark 1.0, sha256 dddddddddddddddd" in line for line in captions[0])
    assert any(line.startswith("lung: probability") for line in captions[0])
    assert any("occlusion" in line for line in captions[0])


def test_of_a_network_that_sees_volumes_the_whole_is_explained(tmp_path, captions):
    study = replace(LUNG, model=Model(spatial_dims=3), preprocess=replace(LUNG.preprocess, size=(32, 32, 16)))
    hu = np.full((1, 32, 32, 16), 40, np.float32)
    hu[0, 8:24, 8:24, 4:10] = -850
    write_dicom_series(tmp_path, volume(hu))
    net = Dark(nn.Conv3d)
    asked = model(study, torch_runner(net.eval()))
    (map_,) = Explainer(asked, net, CPU, ("smooth-grad",))(predict_case(asked, only(tmp_path, study)))
    assert (map_.answer, map_.plane) == ("lung", None)
    assert map_.picture is not None
    assert len(captions) == 1


def test_where_nothing_is_marked_nothing_is_explained(tmp_path):
    write_dicom_series(tmp_path, volume(np.full((1, 40, 36, 4), 40, np.float32)))
    assert Explainer(model(), Dark(), CPU, ("grad-cam",))(predict_case(model(), only(tmp_path))) == []


def test_of_classes_those_that_are_called_are_explained_with_their_calibrated_probability(tmp_path):
    study = Study(name="classes", task=Task(kind="classification", labels=("bright", "dim"), loss="bce"),
                  model=Model("resnet18"), preprocess=replace(LUNG.preprocess, size=(32, 32)))  # fmt: skip
    hu = np.full((1, 32, 32, 3), -650, np.float32)
    hu[..., 1] = 400  # of three planes one is bright
    write_dicom_series(tmp_path, volume(hu))
    net = Levels().eval()
    by = np.array([1.0, 2.0], np.float32)
    asked = model(study, torch_runner(net), temperatures=by)
    found = predict_case(asked, only(tmp_path, study))
    assert found.places[0] == 1
    assert [each.called for each in found.answers] == [False, True]
    (map_,) = Explainer(asked, net, CPU, ("smooth-grad",))(found)
    assert (map_.number, map_.answer, map_.plane) == (2, "dim", found.places[1])
    assert map_.chance == pytest.approx(1 / (1 + np.exp(-2 / 2)), abs=1e-5)  # logit of 8 x 0.25 over a temperature of 2


def test_a_method_that_draws_nothing_says_why(tmp_path):
    write_dicom_series(tmp_path, volume(chest_hu()))
    deaf = Dark()
    nn.init.constant_(deaf.bias, -100.0)  # as a GPU might that answers otherwise
    (told,) = Explainer(model(), deaf, CPU, ("grad-cam",))(predict_case(model(), only(tmp_path)))
    assert (told.picture, told.file) == (None, None)
    assert "nothing is predicted of 'lung'" in told.why


def test_a_network_that_sees_a_table_or_foretells_has_no_maps(tmp_path):
    task = Task(kind="prognosis", labels=("death",), loss="hazard", intervals_days=(100.0, 200.0),
                covariates=(Covariate("age", 50.0, 10.0),))  # fmt: skip
    table = model(Study(name="t", task=task, model=Model("mlp", features=(), norm="none")))
    with pytest.raises(ExplanationFailed, match="table"):
        explainer_of(Release.__new__(Release), table, "cpu", ("grad-cam",))


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> tuple[Path, Path]:
    """A release of a classification, and the file of its authority."""
    study = tiny_study(task={"kind": "classification", "labels": ["cyst", "solid"], "loss": "bce"},
                       model={"name": "resnet18"}, preprocess={"size": [64, 64]})  # fmt: skip
    folder = tmp_path_factory.mktemp("classes")
    calibrated = {CALIBRATION: canonical_json({"temperature": {"cyst": 3.0, "solid": 3.0}})}
    made, trust = made_release(folder, study, members=calibrated)
    (folder / "ca.pem").write_bytes(trust.authorities[0])
    assert load_model(open_release(made, trust), threads=1).temperatures is not None
    return made, folder / "ca.pem"


def test_the_command_draws_a_picture_for_each_method_and_says_in_json_what_is_on_it(classes, tmp_path):
    release, ca = classes
    image = nibabel.Nifti1Image(chest_hu()[0].astype(np.int16), np.diag([0.8, 0.7, 2.5, 1.0]))
    image.set_sform(image.affine, code="scanner")
    nibabel.save(image, tmp_path / "a.nii")
    words = ["predict", str(release), str(tmp_path / "a.nii"), "-o", str(tmp_path / "out"), "--authority", str(ca)]
    methods = ["--explain", "--method", "grad-cam", "--method", "occlusion", "--threads", "1"]
    ran = CliRunner().invoke(app, [*words, *methods, "--format", "json", "--json"])
    assert ran.exit_code == 0, ran.output
    (result,) = (tmp_path / "out").glob("image-*/result.json")
    told = json.loads(result.read_text())
    maps = told["explanations"]["maps"]
    assert {each["method"] for each in maps} == {"grad-cam", "occlusion"}
    for each in maps:
        assert each["file"] in told["files"]
        with Image.open(result.parent / each["file"]) as picture:
            assert picture.info["Title"] == NOT_FOR_DIAGNOSIS
        answer = next(a for a in told["answers"] if a["name"] == each["answer"])
        assert 0 < each["chance"] < 1
        assert answer["called"] or answer["chance"] == max(a["chance"] for a in told["answers"])
    wrong = CliRunner().invoke(app, [*words[:4], str(tmp_path / "new"), *words[5:], "--method", "grad-cam"])
    assert wrong.exit_code == 1
    assert "--explain" in wrong.output


def test_dark_is_what_the_formula_of_the_tests_marks():
    hu = chest_hu()
    seen = torch.from_numpy(np.clip((hu[:, :, :, 0] + 1000) / 1400, 0, 1))
    assert np.array_equal((Dark()(seen[None])[0, 0] > 0).numpy(), hu[0, :, :, 0] < DARK_HU)
