"""A released MONAI bundle: MONAI's own checks pass, its runner runs it, and its masks are those of the release."""

import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle.scripts import run, verify_metadata, verify_net_in_out
from monai.data.meta_tensor import MetaTensor
from monai.transforms.io.array import SaveImage

from fedserver.publish.bundle import FOLDER
from shared_models.bundle_steps import Preprocessed, Restored, Told
from shared_models.files import canonical_json
from shared_models.parity import ARRAYS
from shared_models.parse import plain
from shared_models.release import CALIBRATION
from shared_models.weights import load
from tests.releases import made_release, tiny_study

# What MONAI's schema of 25 July 2024 asks for, said anew: its own lies behind a URL, and tests have no network
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        **{key: {"type": "string"} for key in ("type", "format", "dtype")},
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
TEXTS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors",
         "copyright", "data_source", "data_type", "image_classes", "pred_classes", "intended_use")  # fmt: skip
SCHEMA = {
    "type": "object",
    "required": [*TEXTS[:9], "required_packages_version", "network_data_format"],
    "properties": {
        **{key: {"type": "string"} for key in TEXTS},
        **{key: {"type": "object"} for key in ("changelog", "required_packages_version", "eval_metrics")},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {key: {"additionalProperties": TENSOR} for key in ("inputs", "outputs")},
        },
    },
}
STUDIES = {
    "sigmoid in 2-D": tiny_study(),
    "softmax in 3-D": tiny_study(
        task={"labels": ["left", "right"], "loss": "dice_ce"},
        model={"name": "unet", "spatial_dims": 3, "features": [8, 8, 8, 8, 8, 8], "groups": 4},
        preprocess={"size": [16, 32, 32], "fit": "patches", "spacing_mm": [2.0, 2.0, 3.0]},
    ),
    "two channels, TorchScript": tiny_study(
        modality="mr",
        channels=["t1", "t2"],
        model={"name": "segresnet", "features": [8]},
        preprocess={"size": [32, 32], "intensity": "percentile"},
    ),
    "classification": tiny_study(
        modality="xray",
        task={"kind": "classification", "labels": ["cyst", "solid"], "loss": "ce"},
        model={"name": "resnet18"},
        preprocess={"size": [32, 32], "intensity": "percentile"},
    ),
}
STUDIES["classification, calibrated"] = replace(
    STUDIES["classification"], task=replace(STUDIES["classification"].task, loss="bce")
)
TEMPERATURES = {"cyst": 0.5, "solid": 4.0}


@pytest.fixture(scope="module", params=STUDIES)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    calibrated = {CALIBRATION: canonical_json({"temperature": TEMPERATURES})} if "calib" in request.param else {}
    return made_release(tmp_path_factory.mktemp("made"), STUDIES[request.param], members=calibrated)[0]


@pytest.fixture
def bundle(release: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to run; what its runner puts into this process is taken out again."""
    path, modules, here = list(sys.path), set(sys.modules), Path.cwd()
    yield Path(shutil.copytree(release / FOLDER, tmp_path / "bundle"))
    os.chdir(here)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] == "scripts":
            del sys.modules[name]
    importlib.invalidate_caches()


def test_its_metadata_is_what_monais_schema_asks_for(bundle, tmp_path):
    schema = tmp_path / "schema.json"  # found there, it is not fetched
    schema.write_text(json.dumps(SCHEMA))
    digest = hashlib.sha256(schema.read_bytes()).hexdigest()
    meta_file = str(bundle / "configs/metadata.json")
    verify_metadata(meta_file=meta_file, filepath=str(schema), hash_val=digest, hash_type="sha256")


def test_its_network_takes_and_gives_what_the_metadata_says(bundle):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs/metadata.json"),
        config_file=str(bundle / "configs/inference.json"),
        bundle_root=str(bundle),
        device="cpu",
    )


@pytest.mark.filterwarnings("ignore")  # of MONAI, about its own readers and about configurations being code
def test_monais_runner_gives_the_masks_of_the_release(release, bundle, tmp_path):
    arrays = load(release / ARRAYS)
    names = sorted({key.partition("/")[0] for key in arrays})
    assert len(names) > 1
    for name in names:
        given(tmp_path / "in", f"1.2.{name}", arrays[f"{name}/voxels"], arrays[f"{name}/spacing_mm"], release)
    run(
        config_file=str(bundle / "configs/inference.json"),
        meta_file=str(bundle / "configs/metadata.json"),
        bundle_root=str(bundle),
        dataset_dir=str(tmp_path / "in"),
        output_dir=str(tmp_path / "out"),
        device="$torch.device('cpu')",
    )
    for name in names:
        if (tmp_path / "out" / f"1.2.{name}.json").exists():
            told = json.loads((tmp_path / "out" / f"1.2.{name}.json").read_text())
            logits = arrays[f"{name}/logits"].astype(np.float64)
            chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            if (release / CALIBRATION).exists():
                chances = 1 / (1 + np.exp(-logits / [TEMPERATURES["cyst"], TEMPERATURES["solid"]]))
            np.testing.assert_allclose(list(told.values()), chances.mean(axis=0), atol=1e-4)
            continue
        image: Any = nibabel.load(tmp_path / "out" / f"1.2.{name}_mask.nii.gz")
        found = np.asarray(image.dataobj)
        for value, mask in enumerate(arrays[f"{name}/decisions"][0], start=1):
            np.testing.assert_array_equal(found == value, mask.astype(bool))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("1.3.6.1.4.1.14519.5.2.1.6279.6001.100.nii.gz", "1.3.6.1.4.1.14519.5.2.1.6279.6001.100"),
        ("1.3.6.1.4.1.14519.5.2.1.6279.6001.332", "1.3.6.1.4.1.14519.5.2.1.6279.6001.332"),  # DICOM without a suffix
        ("/in/patient.07.NRRD", "patient.07"),
        ("scan.png", "scan"),
        (".nii", ".nii"),
    ],
)
def test_an_answer_has_the_whole_name_of_its_image_but_for_the_suffix(source, name, tmp_path):
    Told(str(tmp_path / "told"), ["cyst"])({"pred": torch.tensor([[0.25]]), "source": source})
    assert [path.name for path in (tmp_path / "told").iterdir()] == [f"{name}.json"]
    SaveImage(output_dir=tmp_path / "masks", output_postfix="mask", separate_folder=False)(
        Restored()(example(source))["pred"]
    )
    assert [path.name for path in (tmp_path / "masks").iterdir()] == [f"{name}_mask.nii.gz"]


@pytest.mark.parametrize(
    ("second", "why"),
    [("/in/p1/ct.png", "has another suffix"), ("/in/p2/ct.nii.gz", "lies in another folder")],
)
def test_two_images_of_one_name_do_not_overwrite_each_others_answers(second, why, tmp_path):
    told, restored, first = Told(str(tmp_path), ["cyst"]), Restored(), "/in/p1/ct.nii.gz"
    told({"pred": torch.tensor([[0.25]]), "source": first})
    restored(example(first))
    with pytest.raises(ValueError, match=f"{second}: an earlier image of the same name {why}"):
        told({"pred": torch.tensor([[0.75]]), "source": second})
    with pytest.raises(ValueError, match=why):
        restored(example(second))
    assert json.loads((tmp_path / "ct.json").read_text()) == {"cyst": 0.25}
    told({"pred": torch.tensor([[0.5]]), "source": first})
    restored(example(first))
    assert json.loads((tmp_path / "ct.json").read_text()) == {"cyst": 0.5}, "the same image again"


@pytest.mark.parametrize("by_folder", [False, True])
def test_an_image_is_known_by_the_folder_that_it_came_from(by_folder, tmp_path):
    seen, restored = Preprocessed(plain(tiny_study().preprocess), by_folder), Restored()
    of = [tmp_path / folder / "ct.nii.gz" for folder in ("p1/t", "p2/t")]
    pictures = [MetaTensor(torch.zeros(1, 32, 32, 1), meta={"filename_or_obj": str(path)}) for path in of]
    first, second = (seen({"image": picture}) for picture in pictures)
    for data in (first, first):
        restored({**data, "pred": data["image"]})
    with pytest.raises(ValueError, match="lies in another folder"):
        restored({**second, "pred": second["image"]})


def example(source: str) -> dict[str, Any]:
    """What a network says of two planes of 4 x 4 voxels of 1 mm."""
    place = torch.tensor([4, 4, 2, 1, 1, 1, 4, 4, 0, 0, 1, 1], dtype=torch.float64)
    return {"pred": torch.ones(2, 1, 4, 4), "place": place, "affine": torch.eye(4), "source": source}


def given(folder: Path, name: str, voxels: np.ndarray, spacing: np.ndarray, release: Path) -> None:
    """Writes a case as a hospital would lay it: one file, or a folder of one for each channel."""
    channels = json.loads((release / "study.json").read_text())["channels"]
    for n, channel in enumerate(channels or [name]):
        to = folder / name / f"{channel}.nii.gz" if channels else folder / f"{name}.nii.gz"
        to.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels[n], np.diag([*spacing, 1.0])), to)
