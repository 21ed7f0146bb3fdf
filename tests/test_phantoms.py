"""The phantom: anatomy in Hounsfield units, exact labels, honest geometry, and a cache that survives interruptions."""

import csv
import hashlib
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from shared_models.errors import StudyInvalid
from shared_models.files import canonical_json
from simulations import anatomy, scanner
from simulations.anatomy import Body, Grid, Nodule
from simulations.phantoms import (
    GENERATOR,
    PhantomPlan,
    draw_patient,
    folder_name,
    malignancy,
    phantom,
    site_names,
    site_of,
)
from simulations.scanner import SITES, annotate, section, site_named

TINY = PhantomPlan(sites=2, train=1, val=1, test=1, slices=2, size=32, seed=4, nodules=2)
NORTH, EAST = SITES["north"], SITES["east"]


def drawn(seed: int = 0, nodules: float = 0) -> Body:
    return draw_patient(np.random.default_rng(seed), NORTH, replace(TINY, nodules=nodules))[0]


def plain(body: Body) -> Body:
    """The same body as the reference chest: neither bent nor scaled, without vessels."""
    empty = np.zeros((0, 7), np.float32)
    return replace(body, waves=body.waves[:0], scale=(1.0, 1.0, 1.0), vessels=empty, bronchi=empty)


def square(body: Body, half_mm: float, pixel_mm: float, x: float = 0, y: float = 0) -> Grid:
    line = np.arange(-half_mm, half_mm + pixel_mm / 2, pixel_mm, dtype=np.float32)
    body_x, body_y = np.meshgrid(line + np.float32(x), line + np.float32(y))
    return anatomy.grid(body, body_x, body_y, pixel_mm)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def loaded(path: Path) -> tuple[Any, Any]:
    image: Any = nibabel.load(path)
    return np.asarray(image.dataobj), image.affine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom(tmp_path_factory.mktemp("tiny"), TINY, processes=1)


def test_the_same_plan_gives_the_same_bytes_however_many_processes_draw_it(tiny: Path, tmp_path: Path) -> None:
    assert contents(phantom(tmp_path, TINY, processes=2)) == contents(tiny)


def test_another_seed_gives_other_patients(tiny: Path, tmp_path: Path) -> None:
    other = phantom(tmp_path, replace(TINY, seed=5, sites=("north",), val=0, test=0), processes=1)
    image = "north/images/north-0001.nii.gz"
    assert (other / image).read_bytes() != (tiny / image).read_bytes()


def test_a_patient_does_not_depend_on_the_other_sites_and_patients_of_the_plan(tiny: Path, tmp_path: Path) -> None:
    alone = phantom(tmp_path, replace(TINY, sites=("south",), val=0, test=0), processes=1)
    image = "south/images/south-0001.nii.gz"
    assert (alone / image).read_bytes() == (tiny / image).read_bytes()


@pytest.mark.parametrize(
    ("tissue", "x", "y", "z", "low", "high"),
    [
        ("air around the body", 0, -165, 0, -1000, -1000),
        ("trachea", 0, -7, 40, -1000, -980),
        ("right lung, front", -80, -40, 10, -930, -820),
        ("left lung, back", 80, 40, 10, -900, -780),
        ("heart", 20, -30, -60, 30, 60),
        ("aorta, descending", 25, 25, -20, 35, 50),
        ("liver", -66, -20, -80, 50, 65),
        ("marrow of a vertebra", 0, 34, 4, 80, 300),
        ("fat of the mediastinum", 0, -55, 15, -105, -80),
        ("muscle beside the spine", 26, 86, -20, 40, 60),
    ],
)
def test_tissues_have_the_hounsfield_units_of_their_kind(
    tissue: str, x: float, y: float, z: float, low: float, high: float
) -> None:
    body = plain(drawn())
    hu = section(body, square(body, 1, 1, x, y), z, NORTH).hu
    assert low <= hu[1, 1] <= high, tissue


def test_contrast_agent_lights_up_the_aorta_and_not_the_lungs() -> None:
    body = plain(drawn())
    aorta, lung = square(body, 1, 1, 25, 25), square(body, 1, 1, 90, 0)
    assert section(body, aorta, -20, EAST).hu[1, 1] - section(body, aorta, -20, NORTH).hu[1, 1] == pytest.approx(250)
    assert section(body, lung, -20, EAST).hu[1, 1] == section(body, lung, -20, NORTH).hu[1, 1]


def test_vessels_run_inside_the_lungs_and_grow_thin() -> None:
    body = drawn()
    points = body.vessels[:, 3:6]
    for z in np.arange(-60, 70, 10):
        near = points[np.abs(points[:, 2] - z) < 1]
        at = anatomy.grid(body, near[None, :, 0], near[None, :, 1], 1.0)
        assert anatomy.cut(body, at, float(z)).lung_mm.max() < 25  # the roots lie in the hila
    assert body.vessels[:, 6].max() > 3 * body.vessels[:, 6].min()


def test_a_smooth_nodule_has_the_volume_of_its_ball_and_counts_as_lung() -> None:
    ball = Nodule((70.0, 0.0, 10.0), 14.0, "solid", False, 0.0, 0.0, 0.0)
    body = replace(plain(drawn()), nodules=(ball,))
    around = square(body, 9, 0.5, 70, 0)
    sections = [section(body, around, z, NORTH) for z in np.arange(1.25, 19, 0.5)]
    volume_mm3 = sum(int(s.nodule.sum()) for s in sections) * 0.5**3
    assert volume_mm3 == pytest.approx(math.pi / 6 * 14**3, rel=0.01)
    for style in ("tight", "loose", "smoothed", "vessels-excluded"):
        assert all(annotate(style, s, s.hu, 0.5)[s.nodule].all() for s in sections)
    assert sections[len(sections) // 2].hu[18, 18] == pytest.approx(35)


def test_nodules_lie_wholly_inside_the_lungs_and_apart() -> None:
    body = drawn(seed=2, nodules=9)
    assert len(body.nodules) > 3
    for nodule in body.nodules:
        x, y, z = nodule.centre_mm
        around = square(body, nodule.diameter_mm, 0.5, x, y)
        for dz in np.linspace(-0.7, 0.7, 7) * nodule.diameter_mm:
            distance = anatomy.nodule_mm(nodule, around.body_x, around.body_y, z + float(dz))
            if distance is not None:
                assert (anatomy.cut(body, around, z + float(dz)).lung_mm[distance < 0] < 0).all()
        others = (n for n in body.nodules if n is not nodule)
        assert all(math.dist(n.centre_mm, nodule.centre_mm) > (n.diameter_mm + nodule.diameter_mm) / 2 for n in others)


def test_cancer_is_likelier_in_large_spiculated_and_high_nodules_and_not_in_calcified_ones() -> None:
    body, low, high = drawn(), (60.0, 0.0, -40.0), (60.0, 0.0, 40.0)
    chances = [
        malignancy(body, low, 6, "solid", 0, 1),
        malignancy(body, low, 20, "solid", 0, 1),
        malignancy(body, low, 20, "solid", 0.3, 1),
        malignancy(body, high, 20, "part-solid", 0.3, 1),
    ]
    assert chances == sorted(chances)
    assert malignancy(body, high, 25, "calcified", 0, 1) < chances[0]


def test_the_centre_of_a_nodule_is_where_the_affine_says(tmp_path: Path) -> None:
    plan = PhantomPlan(sites=("north",), train=3, val=0, test=0, slices=4, size=160, seed=1, nodules=4)
    folder = phantom(tmp_path, plan, processes=1)
    cases = {row["patient_id"]: row for row in rows(folder / "manifest.csv")}
    seen = 0
    for row in rows(folder / "nodules.csv"):
        hu, affine = loaded(folder / cases[row["patient_id"]]["image"])
        truth, _ = loaded(folder / cases[row["patient_id"]]["truth"])
        ras = np.array([-float(row["x_mm"]), -float(row["y_mm"]), float(row["z_mm"]), 1])
        i, j, k = np.rint(np.linalg.solve(affine, ras)[:3]).astype(int)
        assert truth[i, j, k] == 1
        assert abs(affine[2, 3] + k * affine[2, 2] - ras[2]) < 0.31 * float(row["diameter_mm"])
        if row["type"] in ("solid", "calcified") and float(row["diameter_mm"]) > 8:
            assert hu[i, j, k] > -150
            seen += 1
    assert seen >= 2


def test_images_lie_in_ras_with_the_true_distance_of_slices(tiny: Path) -> None:
    for row in rows(tiny / "manifest.csv"):
        hu, affine = loaded(tiny / row["image"])
        assert hu.dtype == np.int16
        assert hu.shape == (32, 32, 2)
        assert affine[0, 0] == affine[1, 1] == pytest.approx(-SITES[row["site"]].fov_mm / 32)
        assert 0.85 * 165 < affine[2, 2] < 1.17 * 165  # two planes: the span of the lungs
        for labels in ("mask", "truth"):
            voxels, same = loaded(tiny / row[labels])
            assert voxels.dtype == np.uint8
            assert set(np.unique(voxels)) == {0, 1}
            assert voxels.any(axis=(0, 1)).all()  # lung in every slice
            np.testing.assert_array_equal(same, affine)


def test_lungs_are_dark_and_the_circle_of_reconstruction_is_padded(tiny: Path) -> None:
    for row in rows(tiny / "manifest.csv"):
        (hu, _), (truth, _) = loaded(tiny / row["image"]), loaded(tiny / row["truth"])
        assert -900 < np.median(hu[truth == 1]) < -650
        assert (hu[0, 0] == SITES[row["site"]].padding_hu).all()


def test_splits_hold_the_planned_patients_and_share_none(tiny: Path) -> None:
    found = rows(tiny / "manifest.csv")
    assert list(found[0])[:9] == ["site", "patient_id", "image", "mask", "truth", "split", "sex", "age", "nodules"]
    assert sorted((r["site"], r["split"]) for r in found) == sorted(
        (site, split) for site in ("north", "south") for split in ("train", "val", "test")
    )
    assert len({r["patient_id"] for r in found}) == len(found)
    counts = [r["patient_id"] for r in rows(tiny / "nodules.csv")]
    assert all(int(r["nodules"]) == counts.count(r["patient_id"]) for r in found)


def test_loose_labels_hold_the_truth_and_the_truth_holds_tight_ones() -> None:
    body = drawn(nodules=3)
    around = square(body, 180, 3)
    for z in (-60.0, 0.0, 60.0):
        plane = section(body, around, z, NORTH)
        truth = plane.lung_mm < 0
        tight, loose, smoothed, bare = (
            annotate(style, plane, plane.hu, 3) for style in ("tight", "loose", "smoothed", "vessels-excluded")
        )
        assert (tight <= truth).all()
        assert (truth <= loose).all()
        assert (bare <= truth).all()
        assert tight.sum() < 0.98 * truth.sum() < 0.98**2 * loose.sum()
        assert 0.8 * truth.sum() < bare.sum() < 0.995 * truth.sum()
        assert (smoothed != truth).sum() < 0.04 * truth.sum()


def test_noise_has_unit_variance_and_neither_mean_nor_trend() -> None:
    field = scanner.noise(128, 3.0, 0.3, np.random.default_rng(0))
    assert field.dtype == np.float32
    assert field.std() == pytest.approx(1, abs=0.05)
    assert abs(field.mean()) < 1e-4
    assert np.abs(field.mean(axis=0)).max() < 0.2


def test_further_sites_are_drawn_from_the_seed() -> None:
    assert site_names(PhantomPlan(sites=6)) == ("north", "south", "east", "west", "site-05", "site-06")
    assert site_named("site-05", 1) == site_named("site-05", 1)
    assert site_named("site-05", 1) != replace(site_named("site-06", 1), name="site-05")
    assert site_named("site-05", 1) != site_named("site-05", 2)
    assert site_named("west", 1) is site_named("west", 2)


def test_a_number_of_sites_and_their_names_are_the_same_plan() -> None:
    assert folder_name(replace(TINY, sites=2)) == folder_name(replace(TINY, sites=("north", "south")))
    assert folder_name(replace(TINY, sites=2)) != folder_name(replace(TINY, sites=3))


def test_an_image_shift_leaves_all_labels_exact_and_unlike_images(tmp_path: Path) -> None:
    plan = PhantomPlan(sites=("north", "south"), train=1, val=0, test=0, slices=1, size=32, shift="image")
    folder = phantom(tmp_path, plan, processes=1)
    for row in csv.DictReader((folder / "manifest.csv").read_text().splitlines()):
        mask, truth = (nibabel.load(folder / row[key]).get_fdata() for key in ("mask", "truth"))  # type: ignore
        assert (mask == truth).all()
        assert mask.any()
    assert replace(site_of("south", plan), style="loose") == SITES["south"]


def test_a_label_shift_leaves_one_scanner_and_each_readers_style(tmp_path: Path) -> None:
    plan = PhantomPlan(sites=4, shift="label")
    made = [site_of(name, plan) for name in site_names(plan)]
    assert [site.style for site in made] == ["tight", "loose", "vessels-excluded", "smoothed"]
    assert {replace(site, name="north", style="tight") for site in made} == {SITES["north"]}


def test_test_patients_may_be_scored_against_the_truth(tmp_path: Path) -> None:
    plan = PhantomPlan(sites=("south",), train=1, val=0, test=1, slices=1, size=32, test_labels="truth")
    folder = phantom(tmp_path, plan, processes=1)
    rows = {row["split"]: row for row in csv.DictReader((folder / "manifest.csv").read_text().splitlines())}
    assert rows["test"]["mask"] == rows["test"]["truth"]
    assert rows["train"]["mask"] != rows["train"]["truth"]


def test_plans_without_a_shift_are_called_as_before_there_were_shifts() -> None:
    named = asdict(replace(TINY, sites=site_names(TINY)))
    before = {key: value for key, value in named.items() if key not in ("shift", "test_labels")}
    digest = hashlib.sha256(canonical_json({"generator": GENERATOR, "plan": before})).hexdigest()
    assert folder_name(TINY) == f"phantom-{digest[:12]}"
    assert folder_name(replace(TINY, shift="label")) != folder_name(replace(TINY, shift="image")) != folder_name(TINY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shift": "none"},
        {"sites": 0},
        {"sites": ("a", "a")},
        {"sites": ("../a",)},
        {"train": -1},
        {"slices": 0},
        {"size": 8},
    ],
)
def test_a_plan_that_cannot_be_drawn_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(StudyInvalid, match="phantom plan"):
        replace(TINY, **wrong)


def test_an_interrupted_data_set_is_finished_and_whole_patients_are_kept(tiny: Path, tmp_path: Path) -> None:
    def power_cut(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phantom(tmp_path, TINY, processes=1, progress=power_cut)
    folder = tmp_path / folder_name(TINY)
    assert not (folder / "manifest.csv").exists()
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("*.nii.gz")}
    (folder / "north/images/north-0003.nii.gz").write_bytes(b"torn")  # a patient without a record

    heard: list[tuple[int, int]] = []
    assert phantom(tmp_path, TINY, processes=1, progress=lambda done, total: heard.append((done, total))) == folder
    assert heard == [(2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert contents(folder) == contents(tiny)


def test_a_whole_data_set_is_used_as_it_is(tiny: Path) -> None:
    heard: list[int] = []
    assert phantom(tiny.parent, TINY, progress=lambda done, total: heard.append(done)) == tiny
    assert not heard


def test_two_processes_at_once_do_each_other_no_harm_and_load_no_torch(tiny: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from simulations.phantoms import PhantomPlan, phantom\n"
        f"phantom(Path(sys.argv[1]), {TINY!r}, processes=1); assert 'torch' not in sys.modules"
    )
    both = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert contents(tmp_path / folder_name(TINY)) == contents(tiny)
