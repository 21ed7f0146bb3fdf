"""Prediction by a real release: both engines alike, a cold start without PyTorch, and the command as people type it."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from fedclient import verify
from fedclient.cli import app
from fedclient.data.volume import Volume
from fedclient.predict.case import predict_case
from fedclient.predict.explained import explainer_of
from fedclient.predict.inputs import list_inputs
from fedclient.predict.model import Model, load_model
from fedclient.predict.run import Failed, predict_all
from shared_models.errors import DeviceFailed, ReleaseInvalid, WeightsInvalid
from shared_models.preprocess import preprocess, restore
from shared_models.release import Release, open_release
from shared_models.runtimes import network_from
from shared_models.study import Evaluate, Study
from shared_models.tasks.decide import chances_of
from tests.dicoms import NAME, write_series
from tests.marking import chest_hu
from tests.releases import made_release

AFFINE = np.diag([0.8, 0.7, 2.5, 1.0])


def nifti(path: Path, values: Any) -> Path:
    image: Any = nibabel.Nifti1Image(values, AFFINE)
    image.set_sform(AFFINE, code="scanner")
    nibabel.save(image, path)
    return path


def authority(release: Release, folder: Path) -> str:
    """The certificate whom the release is from, as a file."""
    signature = json.loads((release.folder / "signature.json").read_bytes())
    (folder / "ca.pem").write_text(signature["authority"])
    return str(folder / "ca.pem")


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    folder, trust = made_release(tmp_path_factory.mktemp("release"))
    return open_release(folder, trust)


def test_both_engines_mark_the_same_voxels(release):
    hu = chest_hu((50, 44, 3))
    engines = [load_model(release, threads=1), load_model(release, threads=1, engine="torch")]
    examples = preprocess(hu, (0.8, 0.7, 2.5), release.study.preprocess)
    chances = np.unique(restore(chances_of(release.study.task, engines[0].through(examples.images)), examples.geometry))
    middle = chances[len(chances) // 4 : 3 * len(chances) // 4]
    widest = int(np.diff(middle).argmax())  # made-up weights say nearly the same everywhere
    study = replace(release.study, evaluate=Evaluate(threshold=float(middle[widest : widest + 2].mean())))
    ours, theirs = (predict_case(replace(m, study=study), Volume(hu, AFFINE, "CT")).mask for m in engines)
    assert 0.01 < ours.mean() < 0.99
    assert np.array_equal(ours, theirs)


class Device(nn.Module):
    """A network on a device that holds `most` examples at once, and raises `error` over more."""

    def __init__(self, net: nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.net, self.most, self.error, self.seen = net, most, error, list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        if len(images) > self.most:
            raise self.error
        answer: Tensor = self.net(images)
        return answer


def on_a_device(release: Release, monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> tuple[Model, Device]:
    """The release in PyTorch on such a device, with as many planes at once as on a GPU."""
    made: list[Device] = []

    def network(study: Study, weights: bytes) -> Device:
        made.append(Device(network_from(study, weights), most, error))
        return made[0]

    monkeypatch.setattr("fedclient.predict.torch_network.network_from", network)
    return replace(load_model(release, threads=1, engine="torch"), planes=16), made[0]


def test_where_memory_of_the_gpu_runs_out_fewer_planes_go_together_and_are_answered_alike(release, monkeypatch):
    images = preprocess(chest_hu((50, 44, 7)), (0.8, 0.7, 2.5), release.study.preprocess).images
    whole = load_model(release, threads=1, engine="torch").through(images)
    model, device = on_a_device(release, monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory."))
    for _ in range(2):
        np.testing.assert_allclose(model.through(images), whole, atol=1e-5)
    assert device.seen == [7, 4, 2, 2, 2, 1, 2, 2, 2, 1], "found once"


def test_a_gpu_without_memory_for_one_plane_is_not_called_an_unreadable_image(release, monkeypatch, tmp_path):
    model, _ = on_a_device(
        release, monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    )
    found = list_inputs([nifti(tmp_path / f"{n}.nii", chest_hu()[0]) for n in "ab"], release.study)
    outcomes = list(predict_all(model, found, tmp_path / "out", ("json",)))
    assert [each.code for each in outcomes if isinstance(each, Failed)] == ["OUT_OF_MEMORY"] * 2
    words = str(outcomes[0])
    assert "Tried to allocate 2 GiB" in words
    assert "--device cpu" in words
    assert "site.toml" not in words, "its limits are of training"


@pytest.mark.parametrize("explained", [False, True])
def test_a_gpu_that_fails_ends_the_run_for_no_other_case_would_fare_better(release, monkeypatch, tmp_path, explained):
    fault = torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure' in ...")
    model, device = on_a_device(release, monkeypatch, 99 if explained else 0, fault)
    explain = replace(explainer_of(release, model, "cpu", ["grad-cam"]), net=Device(device.net, 0, fault))
    found = list_inputs([nifti(tmp_path / f"{n}.nii", chest_hu()[0]) for n in "ab"], release.study)
    with pytest.raises(DeviceFailed, match=r"the GPU failed \(CUDA error: unspecified launch failure\)"):
        list(predict_all(model, found, tmp_path / "out", ("json",), explain=explain))
    assert not (tmp_path / "out/results.csv").exists()


@pytest.mark.parametrize(("engine", "name"), [("onnxruntime", "model.onnx"), ("torch", "model.safetensors")])
def test_a_network_that_is_changed_once_the_release_was_opened_is_not_run(release, tmp_path, engine, name):
    shutil.copytree(release.folder, tmp_path / "moved")
    files = {"onnx": tmp_path / "moved" / "model.onnx", "weights": tmp_path / "moved" / "model.safetensors"}
    moved = replace(release, folder=tmp_path / "moved", **files)
    path = tmp_path / "moved" / name
    content = bytearray(path.read_bytes())
    assert load_model(moved, threads=1, engine=engine).digest == release.digest
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ReleaseInvalid, match=f"{re.escape(name)}: was changed"):
        load_model(moved, threads=1, engine=engine)


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "model.ts", "parity.safetensors"])
def test_what_is_changed_between_the_check_and_the_run_of_verify_is_not_run(release, tmp_path, name):
    shutil.copytree(release.folder, tmp_path / "moved")
    path = tmp_path / "moved" / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ReleaseInvalid, match=f"{re.escape(name)}: was changed"):
        verify._run(replace(release, folder=tmp_path / "moved"))


def test_a_device_that_is_not_there_is_refused(release):
    with pytest.raises(WeightsInvalid, match=r"PyTorch sees \d GPUs"):
        load_model(release, device="cuda:7")


def test_a_cpu_needs_no_pytorch(release, tmp_path):
    path = nifti(tmp_path / "a.nii", chest_hu()[0].astype(np.int16))
    told = (
        "import sys; from fedclient.cli import app\n"
        f"try: app(['predict', {str(release.folder)!r}, {str(path)!r}, '-o', {str(tmp_path / 'out')!r}, "
        f"'--authority', {authority(release, tmp_path)!r}])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip().endswith("0 False"), ran.stdout + ran.stderr


def test_a_temperature_below_zero_is_refused(release):
    spoilt = replace(release, calibration={"temperature": {"lung": -1.0}})
    with pytest.raises(Exception, match="temperature"):
        load_model(spoilt, threads=1)


def test_the_command_exits_with_1_if_any_case_failed_and_names_no_patient(release, tmp_path):
    data, out = tmp_path / NAME, tmp_path / "out"
    data.mkdir()
    write_series(data / "good")
    (data / "bad.nii.gz").write_bytes(b"no image")
    words = ["predict", str(release.folder), str(data), "-o", str(out), "--authority", authority(release, tmp_path)]
    ran = CliRunner().invoke(app, [*words, "--format", "seg,json,csv", "--json", "--threads", "1"])
    assert ran.exit_code == 1, ran.output
    told = json.loads(ran.stdout)
    assert (len(told["predicted"]), len(told["failed"])) == (1, 1)
    assert NAME not in ran.output
    assert not any(NAME in str(path.relative_to(tmp_path)) for path in out.rglob("*"))
    assert {path.name for path in out.glob("series-*/*")} == {"segmentation.dcm", "result.json"}
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    strange = CliRunner().invoke(app, [*words[:4], str(tmp_path / "new"), *words[5:], "--format", "seg,pdf"])
    assert "'pdf': is none of seg" in strange.output
