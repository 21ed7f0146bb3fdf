"""Regions of the lungs with a nodule or without, and explanations of a run over them: what is there is known."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

import simulations.cli
from fedclient.data.images import read_image
from fedclient.site import open_site
from fedclient.training.learner import sorted_by_label
from fedserver.checkpoint import create_run
from shared_models import nets
from shared_models.errors import StateInvalid, StudyInvalid
from shared_models.study import Model, Preprocess, Study, load_study
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, check_cases, data_folders, node_configs
from simulations.run_folder import run_at
from simulations.vois import RegionPlan, regions
from tests.studies import TINY_NET

PLAN = RegionPlan(sites=1, train=4, val=2, test=2, size=48)
TINY = f"""name = "tiny"
{TINY_NET}[train]
local_steps = 1
batch_size = 2
[rounds]
count = 1
quorum = 1
"""
LUNGS = Study(name="lungs", model=Model(features=(4, 4, 4, 4, 4, 4), groups=2), preprocess=Preprocess(size=(32, 32)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return regions(tmp_path_factory.mktemp("regions"), PLAN, processes=1)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def voxels(path: Path) -> np.ndarray:
    stored: np.ndarray = read_image(path).voxels[0]
    return stored


def test_every_second_region_holds_a_nodule_of_the_wanted_size_and_its_mask_says_where(folder):
    listed = rows(folder)
    assert [row["label"] for row in listed] == ["nodule", "none"] * 4
    for row in listed:
        image, lesion = voxels(folder / row["image"]), voxels(folder / row["mask"])
        assert image.shape == lesion.shape == (48, 48, 1)
        assert lesion.any() == (row["label"] == "nodule")
        if row["label"] == "nodule":
            assert PLAN.between_mm[0] <= float(row["diameter_mm"]) <= PLAN.between_mm[1]
            assert image[lesion > 0].mean() > -750, "denser than the lung around it"


def test_a_nodule_lies_anywhere_in_its_region(folder):
    ill = [row for row in rows(folder) if row["label"] == "nodule"]
    middles = np.array([np.argwhere(voxels(folder / row["mask"])).mean(axis=0)[:2] for row in ill])
    assert np.ptp(middles, axis=0).max() > 8


def test_the_same_plan_is_the_same_bytes_and_is_written_once(folder, tmp_path):
    again = regions(tmp_path, PLAN, processes=1)
    assert again.name == folder.name
    for row in rows(folder):
        assert (again / row["image"]).read_bytes() == (folder / row["image"]).read_bytes()
    before = (folder / "manifest.csv").stat().st_mtime_ns
    regions(folder.parent, PLAN, processes=1)
    assert (folder / "manifest.csv").stat().st_mtime_ns == before


def test_a_plan_that_cannot_be_drawn_is_refused():
    with pytest.raises(StudyInvalid, match="cannot be drawn"):
        RegionPlan(size=200)


def test_the_ready_study_reads_them(folder, tmp_path):
    study = load_study("nodule-presence")
    nodes = node_configs(tmp_path, [folder], Machine(device="cpu"), None)
    check_cases(study, "north", nodes["north"])
    labelled, _ = sorted_by_label(open_site(nodes["north"]), study)
    assert len(labelled) == 8
    with pytest.raises(StudyInvalid, match="--shift and --test-labels are for the phantom of lungs"):
        data_folders(study, [], None, tmp_path, lambda _: None, shift="image")


# `fedsim explain`


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `fedsim run`, in which nothing has been learned yet."""
    folder = tmp_path_factory.mktemp("out")
    return create_run(folder / "seed-0", "federated", LUNGS, nets.initial_weights(LUNGS)).path.parents[1]


@pytest.fixture(scope="module")
def lungs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = PhantomPlan(sites=("north",), train=1, val=1, test=2, slices=2, size=32)
    return phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)


def test_a_run_is_found_in_the_folder_of_its_simulation(run, tmp_path):
    assert run_at(run).path == run_at(run / "seed-0" / "federated").path == run / "seed-0" / "federated"
    with pytest.raises(StateInvalid, match="holds no run"):
        run_at(tmp_path)


def test_maps_of_a_network_that_has_learned_nothing_fail_the_check_and_so_does_the_command(run, lungs, tmp_path):
    words = ["explain", str(run), "--data", str(lungs), "--check", "-o", str(tmp_path)]
    done = CliRunner().invoke(simulations.cli.app, words)
    assert done.exit_code == 1, done.output
    assert "grad-cam on 2 examples: FAILED" in done.stdout
    assert "Known limits of such maps" in done.stdout
    (found,) = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert found["passed"] is False
    assert [verdict["name"] for verdict in found["verdicts"]] == ["randomisation", "repeatability", "localisation"]


def test_a_run_s_cases_are_drawn_site_by_site(run, lungs, tmp_path):
    words = ["explain", str(run), "--data", str(lungs), "--cases", "1", "-o", str(tmp_path), "--json"]
    done = CliRunner().invoke(simulations.cli.app, words)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told.keys() == {"north"}
    (line,) = told["north"]["explained"]
    assert line["uncertainty"] == "test-time augmentation"
    assert line["file"] is None or (tmp_path / "north" / line["file"]).exists()


def test_without_data_the_cases_are_those_that_the_run_was_trained_on(lungs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    shutil.copytree(lungs, tmp_path / "data")
    explained = ["explain", "out", "--cases", "1", "-o", str(tmp_path / "pictures"), "--json"]

    def typed(*words: str) -> Result:
        return CliRunner().invoke(simulations.cli.app, [*words])

    done = typed("run", "tiny.toml", "--data", "data", "--out", "out", "--no-compare", "--device", "cpu")
    assert done.exit_code == 0, done.output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    explained[1] = "../out"
    done = typed(*explained)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout).keys() == {"north"}
    assert "--layout: is of the folders that --data names" in typed(*explained, "--layout", "manifest").stderr
    (tmp_path / "data").rename(tmp_path / "moved")
    assert "the data of site north has gone. Say with --data where" in typed(*explained).stderr
    (tmp_path / "out/seed-0/federated/nodes.json").unlink()
    assert "does not say where its sites' data is. Say it with --data" in typed(*explained).stderr
    done = typed(*explained, "--data", str(tmp_path / "moved"))
    assert done.exit_code == 0, done.output


def test_a_method_that_is_not_there_is_refused(run):
    done = CliRunner().invoke(simulations.cli.app, ["explain", str(run), "--method", "guided"])
    assert done.exit_code == 1
    assert "allowed are grad-cam, occlusion, smooth-grad" in done.stderr
