"""Points that a detection finds: where they are in the patient, under which name, and what is left out."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedclient.data.volume import Volume
from fedclient.site import open_site
from fedclient.training import candidates as module
from fedclient.training.candidates import candidates
from fedclient.training.explaining import Trained
from shared_models.errors import StudyInvalid
from shared_models.study import Model, Preprocess, Study, Task
from simulations.fixtures import LunaCase, Nodule, write_luna16
from simulations.run import machine
from simulations.site_options import SiteOptions, sites_of

STUDY = Study(
    name="points",
    modality="ct",
    task=Task(kind="detection", labels=("nodule",), loss="centre"),
    model=Model(name="unet", features=(8, 8, 8, 8, 8, 8)),
    preprocess=Preprocess((32, 32), "crop_pad", intensity="window", window_hu=(-1000.0, 400.0)),
)
CENTRE = (-15.0, -24.0, 20.0)  # LPS mm: voxel (10, 16, 8)


class Fixed(Trained):
    """A run whose network is not asked: `bright` answers in its place."""

    def nets(self, device: torch.device | str = "cpu", most: int | None = None) -> Iterator[nn.Module]:
        yield nn.Identity()


def bright(net: nn.Module, images: np.ndarray, study: Study, device: torch.device) -> Tensor:
    """Heat that is highest where the image is, and extents of three pixels."""
    heat = torch.from_numpy(np.asarray(images, np.float32))[:, :1] * 20 - 15
    return torch.cat([heat, torch.full_like(heat, np.log(3.0)).expand(-1, 2, -1, -1)], dim=1)


def two_series(folder: Path) -> None:
    voxels = np.full((1, 32, 32, 16), -1000, np.float32)
    voxels[0, 10, 16, 8] = 400
    volume = Volume(voxels, np.diag([1.5, 1.5, 2.5, 1.0]), "CT")
    uids = ("1.2.840.1", "1.2.840.2")  # the second is stored with its axes turned
    write_luna16(
        folder, [LunaCase(uid, volume, [Nodule(CENTRE, 9.0, False)], [], turned=uid[-1] == "2") for uid in uids]
    )


def tables(tmp_path: Path, least: float) -> list[list[str]]:
    two_series(tmp_path / "data")
    how = machine("local", 0, 1, "cpu")
    nodes = sites_of(STUDY, tmp_path / "sites", SiteOptions([tmp_path / "data"], "luna16"), how, tmp_path, print)
    (site,) = (open_site(config) for config in nodes.values())
    found: list[list[str]] = []
    for split in ("train", "val", "test"):  # which series is in which follows from the site's salt
        told = candidates(Fixed(STUDY, ()), site, split, least, tmp_path / split)
        heading, *rows = csv.reader((tmp_path / split / "nodule.csv").read_text().splitlines())
        assert heading == ["seriesuid", "coordX", "coordY", "coordZ", "probability"]
        assert told == {"nodule": len(rows)}
        found += rows
    return sorted(found)


def test_a_point_is_told_in_the_patient_under_its_series_whatever_way_the_axes_are_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "logits", bright)
    found = tables(tmp_path, 0.5)
    assert [row[0] for row in found] == ["1.2.840.1", "1.2.840.2"]
    for row in found:
        np.testing.assert_allclose([float(mm) for mm in row[1:4]], CENTRE, atol=1e-3)
        assert float(row[4]) == pytest.approx(1 / (1 + np.exp(-5.0)), rel=1e-5)


def test_what_is_less_probable_than_asked_is_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "logits", bright)
    assert tables(tmp_path, 0.999) == []


def test_a_run_that_detects_nothing_has_no_candidates(tmp_path):
    other = Trained(Study(name="lungs", modality="ct"), ())
    site = open_site(
        {"site": "north", "manifest-site": "", "data": str(tmp_path), "work": str(tmp_path), "device": "cpu"}
    )
    with pytest.raises(StudyInvalid, match="candidates are of a detection; the run's task is a segmentation"):
        candidates(other, site, "test", 0.0, tmp_path)
