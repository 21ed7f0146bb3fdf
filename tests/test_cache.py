"""The cache on disk: a closed list of facts, several processes at once, and a quota that spares the run in use."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import nibabel
import numpy as np
import pytest
from safetensors import safe_open

from fedclient.data import making, quota
from fedclient.data.cache import plan_digest
from fedclient.data.cases import Case
from fedclient.data.dataset import prepare
from fedclient.data.manifest import read_manifest
from fedclient.data.quota import GIB, Room, expect, make_room
from fedclient.data.volume import Volume
from shared_models.errors import OrderRefused, ProcessFailed
from shared_models.study import Study
from simulations.fixtures.dicom import write_dicom_series
from tests.test_dataset import STUDY, cases_of

LARGER = replace(STUDY, preprocess=replace(STUDY.preprocess, size=(48, 48)))
EACH = 32 * 32 * 3  # bytes of one of STUDY's cases: float16 and uint8
DAY_S = 86400.0


@pytest.fixture
def cases(tmp_path: Path) -> tuple[Case, ...]:
    (tmp_path / "data").mkdir()
    return cases_of(tmp_path / "data", 6)


def files_of(cache: Path, study: Study) -> list[Path]:
    return sorted((cache / plan_digest(study)).glob("*.safetensors"))


def aged(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * DAY_S,) * 2)


# What a file holds


def test_another_reader_of_the_format_finds_the_same(cases, tmp_path):
    data = prepare(cases, STUDY, tmp_path / "cache")
    for stored, path in zip(data.cases, files_of(tmp_path / "cache", STUDY), strict=True):
        with safe_open(path, "numpy") as file:
            assert (file.get_tensor("images") == stored.images).all()
            assert (file.get_tensor("masks") == stored.masks).all()


def test_a_file_tells_how_the_image_was_taken_and_nothing_that_a_person_typed(tmp_path):
    voxels = np.random.default_rng(0).integers(-900, 400, (1, 20, 24, 4)).astype(np.float32)
    affine = np.diag([0.7, 0.7, 2.5, 1.0])
    said = {
        "Manufacturer": "GE MEDICAL SYSTEMS",
        "KVP": "120",
        "InstitutionName": "CANARY",
        "ConvolutionKernel": "LUNG",
    }
    folder = tmp_path / "data" / "CANARY^Jane"
    write_dicom_series(folder, Volume(voxels, affine), patient_id="CANARY-7", headers=said)
    mask: Any = nibabel.Nifti1Image((voxels[0] > 0).astype(np.uint8), affine)
    mask.set_sform(affine, code="scanner")
    nibabel.save(mask, tmp_path / "data" / "CANARY.nii")
    row = "patient_id,image,mask,split\nCANARY-7,CANARY^Jane,CANARY.nii,train\n"
    (tmp_path / "data" / "manifest.csv").write_text(row)
    ct = replace(STUDY, modality="ct")
    stored = prepare(read_manifest(tmp_path / "data", None, "salt"), ct, tmp_path / "cache").cases[0]
    known = stored.facts.provenance
    assert (stored.facts.modality, known.manufacturer, known.kernel, known.tube_kv, known.slices) == (
        "CT", "GE MEDICAL SYSTEMS", "LUNG", 120.0, 4,
    )  # fmt: skip
    (path,) = files_of(tmp_path / "cache", ct)
    with safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["case"]).keys() == {
            "geometry", "left_right_axis", "labelled", "modality", "provenance",
        }  # fmt: skip
    assert b"CANARY" not in path.read_bytes()
    assert "CANARY" not in str(path.relative_to(tmp_path))


# Several processes


def test_processes_that_share_the_work_make_the_same_files_and_tell_how_far_they_are(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "FEWEST", 3)
    told: list[tuple[int, int]] = []
    shared = prepare(cases, STUDY, tmp_path / "shared", lambda *state: told.append(state), processes=2)
    alone = prepare(cases, STUDY, tmp_path / "alone")
    assert told == [(n, 6) for n in range(1, 7)]
    pairs = zip(files_of(tmp_path / "shared", STUDY), files_of(tmp_path / "alone", STUDY), strict=True)
    assert all(a.name == b.name and a.read_bytes() == b.read_bytes() for a, b in pairs)
    assert len(shared) == len(alone) == 6


def test_a_process_that_dies_is_told_as_such(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "FEWEST", 3)
    monkeypatch.setattr(making, "_follow", os._exit)
    with pytest.raises(ProcessFailed, match="ended early"):
        prepare(cases, STUDY, tmp_path / "cache", processes=2)


def test_two_processes_that_build_one_cache_with_room_for_one_plan_both_end_with_whole_files(cases, tmp_path):
    script = (
        "import sys, pathlib\n"
        "from fedclient.data.dataset import prepare\n"
        "from fedclient.data.manifest import read_manifest\n"
        "from shared_models.study import Preprocess, Study\n"
        "folder, edge = pathlib.Path(sys.argv[1]), int(sys.argv[2])\n"
        "plan = Preprocess(size=(edge, edge), intensity='percentile')\n"
        "study = Study(name='t', modality='xray', preprocess=plan)\n"
        "cases = read_manifest(folder / 'data', None, 'salt')\n"
        "for _ in range(5): print(len(prepare(cases, study, folder / 'cache', quota_bytes=55_000)))\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), which], stdout=subprocess.PIPE, text=True)
        for which in ("48", "32")
    ]
    assert [process.communicate(timeout=60)[0].split() for process in both] == [["6"] * 5, ["6"] * 5]


# The quota


def test_the_least_recently_used_files_of_other_plans_go_first_and_only_as_many_as_needed(cases, tmp_path):
    cache = tmp_path / "cache"
    prepare(cases, LARGER, cache)
    other = files_of(cache, LARGER)
    for days, path in enumerate(other):
        aged(path, days)
    size = other[0].stat().st_size
    prepare(cases[:2], STUDY, cache, quota_bytes=6 * size)
    assert files_of(cache, LARGER) == other[:5]  # the room of one large file is enough for two small ones
    assert len(files_of(cache, STUDY)) == 2


def test_nothing_of_the_plan_in_use_goes_for_its_other_splits(cases, tmp_path):
    cache = tmp_path / "cache"
    prepare(cases[:3], STUDY, cache)
    with pytest.raises(OrderRefused, match=r"`\[cache\] quota_gib` allows") as refused:
        prepare(cases[3:], STUDY, cache, quota_bytes=4 * EACH)
    assert refused.value.code == "CACHE_FULL"
    assert {path.name.split("-")[0] for path in files_of(cache, STUDY)} >= {case.key for case in cases[:3]}


def test_cases_of_the_plan_that_are_long_gone_make_room_and_so_does_what_a_killed_process_left(cases, tmp_path):
    cache = tmp_path / "cache"
    prepare(cases, STUDY, cache)
    gone, *rest = files_of(cache, STUDY)
    aged(gone, 8)
    torn = gone.with_name(".torn.part")
    torn.write_bytes(bytes(1000))
    aged(torn, 2)
    room = Room(cache, plan_digest(STUDY), sum(path.stat().st_size for path in rest) + 10)
    make_room(room, 10)
    assert files_of(cache, STUDY) == rest
    assert not torn.exists()


def test_what_is_used_is_not_what_goes(cases, tmp_path):
    cache = tmp_path / "cache"
    prepare(cases, STUDY, cache)
    for path in files_of(cache, STUDY):
        aged(path, 30)
    prepare(cases[:3], STUDY, cache)
    make_room(Room(cache, plan_digest(STUDY), 4 * EACH), 0)
    assert {path.name.split("-")[0] for path in files_of(cache, STUDY)} == {case.key for case in cases[:3]}


def test_a_cache_is_filled_to_its_quota_and_not_beyond_without_a_look_at_its_files_for_each_new_one(
    quick_folder, monkeypatch
):
    looked = Mock(wraps=quota._files)
    monkeypatch.setattr(quota, "_files", looked)
    room, size = Room(quick_folder, "plan", 20_000), 20
    (quick_folder / "plan").mkdir()
    for number in range(1000):  # as many as fit
        make_room(room, size)
        (quick_folder / "plan" / f"{number}.safetensors").write_bytes(bytes(size))
    assert looked.call_count < 1000 / 3
    with pytest.raises(OrderRefused, match="the next case needs"):
        make_room(room, size)


def test_a_run_that_cannot_fit_says_so_with_numbers_after_its_first_cases(tmp_path):
    room = Room(tmp_path, "plan", 10 * GIB)
    expect(room, [GIB // 4] * 7, 400)  # too early to say
    expect(room, [GIB // 4] * 8, 50)  # 12.5: may fit, if the others are smaller
    with pytest.raises(OrderRefused, match=r"400 cases need about 100 GiB, judging by the first 8; .* allows 10 GiB"):
        expect(room, [GIB // 4] * 8, 400)


def test_a_disk_that_is_too_small_is_said_as_well(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=5 * GIB)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(OrderRefused, match=r"50 cases need about 50 GiB, .* the disk has room for 4.75 GiB"):
        expect(Room(tmp_path, "plan", 100 * GIB), [GIB] * 8, 50)
