"""Cache and batches: made once, made anew when something changed, drawn alike for the same rng, masks follow images."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import fedclient.data.cache as cache_files
import fedclient.data.dataset as dataset
from fedclient.data.augment import Change, draw
from fedclient.data.cases import Case, Mask, read_case
from fedclient.data.dataset import Batch, CaseExamples, DataSet, prepare
from fedclient.data.manifest import read_manifest
from fedclient.data.volume import Volume
from shared_models.errors import ImageUnreadable, ManifestInvalid, StateInvalid
from shared_models.study import Augment, Model, Preprocess, Study, Task

STUDY = Study(name="t", modality="xray", preprocess=Preprocess(size=(32, 32), intensity="percentile"))
EVERYTHING = Augment(rotate_deg=20, scale=0.2, shift=0.1, gamma=0.3, brightness=0.1, noise=0.1, flip_left_right=True)


def write_case(folder: Path, name: str, seed: int, shape: tuple[int, int] = (40, 30)) -> None:
    """A bright disc on noise, and the disc as its mask."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(shape)
    disc = (rows - rng.integers(12, 28)) ** 2 + (columns - rng.integers(10, 20)) ** 2 < 49
    grey = rng.integers(0, 60, shape) + 150 * disc
    Image.fromarray(grey.astype(np.uint8)).save(folder / f"{name}.png")
    Image.fromarray((255 * disc).astype(np.uint8)).save(folder / f"{name}-mask.png")


def cases_of(folder: Path, count: int = 5) -> tuple[Case, ...]:
    rows = ["patient_id,image,mask,split"]
    for n in range(count):
        write_case(folder, f"p{n}", seed=n)
        rows.append(f"p{n},p{n}.png,p{n}-mask.png,train")
    (folder / "manifest.csv").write_text("\n".join(rows))
    return read_manifest(folder, None, "salt")


@pytest.fixture
def cases(tmp_path: Path) -> tuple[Case, ...]:
    (tmp_path / "data").mkdir()
    return cases_of(tmp_path / "data")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("data")
    return prepare(cases_of(folder), STUDY, folder / "cache")


def mask_of(case: Case) -> Path:
    assert isinstance(case.label, Mask)
    return case.label.file


def image_of(case: Case) -> Path:
    return case.channels[0].files[0]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reads: list[str] = []

    def read(case: Case, channels: Sequence[str]) -> Volume:
        reads.append(image_of(case).name)
        return read_case(case, channels)

    monkeypatch.setattr(cache_files, "read_case", read)
    return reads


def same(one: Iterable[Batch | CaseExamples], two: Iterable[Batch | CaseExamples]) -> bool:
    return all(
        (a.images == b.images).all() and (a.masks == b.masks).all() for a, b in zip(list(one), list(two), strict=True)
    )


def test_each_case_is_preprocessed_once(
    cases: tuple[Case, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    told: list[tuple[int, int]] = []
    first = prepare(cases, STUDY, tmp_path / "cache", lambda *state: told.append(state))
    second = prepare(cases, replace(STUDY, name="other"), tmp_path / "cache")
    assert sorted(reads) == [f"p{n}.png" for n in range(5)]
    assert told == [(n, 5) for n in range(1, 6)]
    assert same(first.by_case(), second.by_case())


def test_the_cache_holds_one_private_file_a_case_and_no_patient(cases: tuple[Case, ...], tmp_path: Path) -> None:
    prepare(cases, STUDY, tmp_path / "cache")
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.name.split("-")[0] for path in files} == {case.key for case in cases}
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in files} == {0o700}
    assert not any(b"p0" in path.read_bytes()[:2000] for path in files)


def test_a_changed_file_is_read_again_and_its_old_cache_file_goes(
    cases: tuple[Case, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    prepare(cases, STUDY, cache)
    prepare(cases, replace(STUDY, preprocess=replace(STUDY.preprocess, size=(48, 48))), cache)
    reads = count_reads(monkeypatch)
    mask = mask_of(cases[2])
    os.utime(mask, ns=(mask.stat().st_atime_ns, mask.stat().st_mtime_ns + 1))
    prepare(cases, STUDY, cache)
    assert reads == [image_of(cases[2]).name]
    assert len(list(cache.rglob(f"{cases[2].key}-*"))) == 1
    assert len(list(cache.rglob("*.safetensors"))) == 9


def test_another_plan_has_its_own_files(
    cases: tuple[Case, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(cases, STUDY, tmp_path / "cache")
    reads = count_reads(monkeypatch)
    larger = replace(STUDY, preprocess=replace(STUDY.preprocess, size=(48, 48)))
    assert prepare(cases, larger, tmp_path / "cache").cases[0].images.shape == (1, 1, 48, 48)
    assert len(reads) == 5
    prepare(cases, STUDY, tmp_path / "cache")
    assert len(reads) == 5


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_torn_cache_file_is_made_anew(cases: tuple[Case, ...], tmp_path: Path, keep: int) -> None:
    whole = prepare(cases, STUDY, tmp_path / "cache")
    path = next((tmp_path / "cache").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:keep])
    assert same(prepare(cases, STUDY, tmp_path / "cache").by_case(), whole.by_case())


def test_two_processes_prepare_the_same_cases_at_once(cases: tuple[Case, ...], tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from fedclient.data.dataset import prepare\n"
        "from fedclient.data.manifest import read_manifest\n"
        "from shared_models.study import Preprocess, Study\n"
        "study = Study(name='t', modality='xray', preprocess=Preprocess(size=(32, 32), intensity='percentile'))\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "print(len(prepare(read_manifest(folder / 'data', None, 'salt'), study, folder / 'cache')))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == ["5", "5"]
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 5


def test_a_large_data_set_stays_on_disk_and_gives_the_same(
    cases: tuple[Case, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = prepare(cases, STUDY, tmp_path / "cache")
    monkeypatch.setattr(dataset, "MEMORY_BYTES", 0)
    mapped = prepare(cases, STUDY, tmp_path / "cache")
    assert isinstance(mapped.cases[0].images, np.memmap)
    assert not isinstance(held.cases[0].images, np.memmap)
    draws = [d.batches(2, np.random.default_rng(3), epochs=2, augment=EVERYTHING) for d in (held, mapped)]
    assert same(*draws)
    assert not isinstance(next(mapped.by_case()).masks, np.memmap)


def test_unusable_cases_are_told_by_row_all_in_one_message(cases: tuple[Case, ...], tmp_path: Path) -> None:
    by_row = {case.row: case for case in cases}
    image_of(by_row[2]).write_bytes(b"no picture")
    Image.new("L", (7, 7)).save(mask_of(by_row[4]))
    Image.fromarray(np.full((40, 30), 2, np.uint8)).save(mask_of(by_row[5]))
    image_of(by_row[6]).unlink()
    with pytest.raises(ImageUnreadable) as e:
        prepare(cases, STUDY, tmp_path / "cache")
    said = str(e.value)
    assert "4 of 5 cases" in said
    for words in ("row 2 ", "row 4 ", "row 5 ", "row 6 ", "gone", "values [2]", "1 = lung"):
        assert words in said
    assert "p0" not in said
    assert str(tmp_path) not in said


def test_a_case_without_labels_is_ignored_voxel_by_voxel(cases: tuple[Case, ...], tmp_path: Path) -> None:
    bare = replace(cases[0], label=None, row=9)
    found = {case.key: case.masks for case in prepare([bare, *cases[1:]], STUDY, tmp_path / "cache").cases}
    assert {key for key, masks in found.items() if (masks == 127).all()} == {bare.key}
    assert len(found) == len(cases)


def test_a_full_disk_is_told_as_such(cases: tuple[Case, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(cache_files, "replacing", full)
    with pytest.raises(StateInvalid, match="No space left"):
        prepare(cases, STUDY, tmp_path / "cache")


def test_a_mask_of_another_study_is_refused_from_the_cache_as_well(cases: tuple[Case, ...], tmp_path: Path) -> None:
    two = replace(STUDY, task=Task(labels=("lung", "heart")))
    Image.fromarray(np.full((40, 30), 2, np.uint8)).save(mask_of(cases[0]))
    prepare(cases[:1], two, tmp_path / "cache")
    with pytest.raises(ImageUnreadable, match="values"):
        prepare(cases, STUDY, tmp_path / "cache")


def test_ignored_pixels_reach_the_batch_as_127(cases: tuple[Case, ...], tmp_path: Path) -> None:
    mask = np.zeros((40, 30), np.uint8)
    mask[:20], mask[20:30] = 255, 127
    Image.fromarray(mask).save(mask_of(cases[0]))
    batch = next(prepare(cases[:1], STUDY, tmp_path / "cache").by_case())
    assert set(np.unique(batch.masks)) == {0, 1, 127}


def test_pictures_have_no_pixel_size_to_resample_to(cases: tuple[Case, ...], tmp_path: Path) -> None:
    plan = Preprocess(size=(32, 32), fit="crop_pad", intensity="percentile", spacing_mm=(1.0, 1.0))
    with pytest.raises(ImageUnreadable, match="no pixel size"):
        prepare(cases, replace(STUDY, preprocess=plan), tmp_path / "cache")


def test_a_volume_plan_takes_pictures_as_one_plane(cases: tuple[Case, ...], tmp_path: Path) -> None:
    study = Study(
        name="t",
        modality="xray",
        model=Model(spatial_dims=3),
        preprocess=Preprocess(size=(32, 32, 16), fit="crop_pad", intensity="percentile"),
    )
    batch = next(prepare(cases, study, tmp_path / "cache").batches(2, np.random.default_rng(0), steps=1))
    assert batch.images.shape == (2, 1, 32, 32, 16)
    assert batch.masks.shape == (2, 32, 32, 16)


def test_an_epoch_shows_every_example_once_and_keeps_the_short_batch(data: DataSet) -> None:
    batches = list(data.batches(2, np.random.default_rng(0), epochs=2))
    assert [len(b.images) for b in batches] == [2, 2, 1, 2, 2, 1]
    seen = [image.astype(np.float32).tobytes() for b in batches for image in b.images]
    assert sorted(seen[:5]) == sorted(seen[5:]) == sorted(c.images.tobytes() for c in data.by_case())
    assert seen[:5] != seen[5:]
    assert batches[0].images.dtype == np.float16
    assert batches[0].masks.dtype == np.uint8


def test_a_last_batch_of_too_few_is_filled_up_with_the_first_of_its_epoch(data: DataSet) -> None:
    short, filled = (list(data.batches(2, np.random.default_rng(0), epochs=2, fewest=n)) for n in (1, 2))
    assert [len(b.images) for b in filled] == [2] * 6
    for epoch in (slice(0, 3), slice(3, 6)):
        of, full = (np.concatenate([b.images for b in batches[epoch]]) for batches in (short, filled))
        np.testing.assert_array_equal(full, np.concatenate([of, of[:1]]))


def test_steps_are_full_batches_from_a_reshuffled_stream(data: DataSet) -> None:
    batches = list(data.batches(4, np.random.default_rng(0), steps=5))
    assert [len(b.images) for b in batches] == [4] * 5
    seen = [image.tobytes() for b in batches for image in b.images]
    assert all(len(set(seen[begin : begin + 5])) == 5 for begin in range(0, 20, 5))
    assert len(next(data.batches(12, np.random.default_rng(0), steps=1)).images) == 12


@pytest.mark.parametrize("how", [{"epochs": 2}, {"steps": 4}])
def test_the_same_rng_gives_the_same_batches_in_a_thread_too(data: DataSet, how: dict[str, int]) -> None:
    def drawn(seed: int, ahead: bool) -> Iterable[Batch]:
        epochs, steps = how.get("epochs"), how.get("steps")
        return data.batches(2, np.random.default_rng(seed), epochs=epochs, steps=steps, augment=EVERYTHING, ahead=ahead)

    assert same(drawn(1, ahead=False), drawn(1, ahead=True))
    assert not same(drawn(1, ahead=False), drawn(2, ahead=False))


def test_batches_do_not_write_into_the_data_set(data: DataSet) -> None:
    before = [case.images.copy() for case in data.by_case()]
    list(data.batches(2, np.random.default_rng(0), epochs=1, augment=EVERYTHING))
    assert all((case.images == image).all() for case, image in zip(data.by_case(), before, strict=True))


def test_an_iterator_left_early_leaves_no_thread(data: DataSet) -> None:
    batches = data.batches(2, np.random.default_rng(0), steps=100, ahead=True)
    next(batches)
    batches.close()  # type: ignore[attr-defined]  # a generator
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_an_error_in_the_thread_reaches_the_caller(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "stack", lambda arrays: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(data.batches(2, np.random.default_rng(0), steps=1, ahead=True))


def test_nothing_to_train_on_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid, match="no case to train on"):
        prepare([], STUDY, tmp_path / "cache").batches(2, np.random.default_rng(0), steps=1)


def test_epochs_and_steps_exclude_each_other(data: DataSet) -> None:
    for epochs, steps in ((None, None), (1, 1)):
        with pytest.raises(TypeError, match="one of the two"):
            data.batches(2, np.random.default_rng(0), epochs=epochs, steps=steps)


SPATIAL = st.builds(
    Augment,
    rotate_deg=st.sampled_from([0, 15, 90, 180]),
    scale=st.sampled_from([0, 0.3]),
    shift=st.sampled_from([0, 0.2]),
    flip_left_right=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(SPATIAL, st.sampled_from([(48, 48), (32, 64), (32, 48, 16)]), st.integers(0, 2**32 - 1), st.integers(0, 1))
def test_masks_follow_their_images_under_augmentation(
    augment: Augment, size: tuple[int, ...], seed: int, axis: int
) -> None:
    """An image that is its own mask stays so, but for the pixels that the edge runs through."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((3, *size), np.uint8)
    masks[:, size[0] // 4 : -5, size[1] // 3 : -8] = 1
    images = masks[:, None].astype(np.float32)
    drawn = draw(augment, 3, len(size), rng)
    moved, moved_masks = Change(np.full(3, axis), drawn, rng, True).of_arrays(images, masks)
    assert moved.dtype == np.float32
    assert moved_masks.dtype == np.uint8
    differ = (moved[:, 0] > 0.5) != moved_masks
    edge = (moved[:, 0] > 0.01) & (moved[:, 0] < 0.99)
    assert not (differ & ~edge).any()


def test_a_quarter_turn_and_a_shift_are_what_they_say() -> None:
    image = np.random.default_rng(0).random((1, 1, 32, 32), np.float32)
    mask = (image[:, 0] > 0.5).astype(np.uint8)
    still = draw(Augment(), 1, 2, np.random.default_rng(0))
    turned = replace(still, angle_rad=np.array([np.pi / 2]))
    moved, moved_mask = Change(np.zeros(1, np.intp), turned, chance(), True).of_arrays(image.copy(), mask.copy())
    assert moved[0, 0] == pytest.approx(np.rot90(image[0, 0], -1), abs=1e-4)
    assert (moved_mask[0] == np.rot90(mask[0], -1)).all()
    shifted = replace(still, shift=np.array([[0.25, 0.0]]))
    moved, _ = Change(np.zeros(1, np.intp), shifted, chance(), True).of_arrays(image.copy(), mask.copy())
    assert moved[0, 0, :24] == pytest.approx(image[0, 0, 8:], abs=1e-4)
    assert moved[0, 0, 24:] == pytest.approx(image.min(), abs=1e-4)


def chance() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_rotation_of_an_oblong_image_keeps_circles_round() -> None:
    rows, columns = np.indices((64, 128))
    disc = ((rows - 32) ** 2 + (columns - 64) ** 2 < 400).astype(np.float32)[None, None]
    still = draw(Augment(), 1, 2, np.random.default_rng(0))
    turned = replace(still, angle_rad=np.array([0.7]))
    nowhere = np.zeros((1, 64, 128), np.uint8)
    moved, _ = Change(np.zeros(1, np.intp), turned, chance(), True).of_arrays(disc.copy(), nowhere)
    assert np.abs(moved - disc).mean() < 0.01


@pytest.mark.parametrize("axis", [0, 1])
def test_a_flip_mirrors_the_axis_between_left_and_right(axis: int) -> None:
    images = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    masks = (images[:, 0] > 0.5).astype(np.uint8)
    drawn = draw(Augment(flip_left_right=True), 4, 2, np.random.default_rng(0))
    assert drawn.flip.any()
    assert not drawn.flip.all()
    moved, moved_masks = Change(np.full(4, axis), drawn, chance(), True).of_arrays(images.copy(), masks.copy())
    for b, flipped in enumerate(drawn.flip):
        assert (moved[b, 0] == (np.flip(images[b, 0], axis) if flipped else images[b, 0])).all()
        assert (moved_masks[b] == (np.flip(masks[b], axis) if flipped else masks[b])).all()


def test_intensity_changes_stay_within_what_was_drawn() -> None:
    images = np.random.default_rng(0).normal(size=(6, 2, 16, 16)).astype(np.float32)
    images[:, 1] *= 100  # a channel in other units
    masks = np.zeros((6, 16, 16), np.uint8)
    axes = np.zeros(6, np.intp)

    def change(augment: Augment) -> NDArray[np.float32]:
        rng = np.random.default_rng(5)
        return Change(axes, draw(augment, 6, 2, rng), rng, True).of_arrays(images.copy(), masks)[0]

    added = change(Augment(brightness=0.2)) - images
    assert np.abs(added).max() <= 0.2 + 1e-5
    assert np.ptp(added, axis=(1, 2, 3)).max() < 1e-4
    bent = change(Augment(gamma=0.4))
    assert bent.min(axis=(2, 3)) == pytest.approx(images.min(axis=(2, 3)), rel=1e-5)
    assert bent.max(axis=(2, 3)) == pytest.approx(images.max(axis=(2, 3)), rel=1e-5)
    assert not np.allclose(bent, images)
    assert 0 < (change(Augment(noise=0.1)) - images)[:, 0].std() < 0.1


def test_switching_one_change_off_leaves_the_others_as_drawn() -> None:
    one = draw(EVERYTHING, 4, 2, np.random.default_rng(0))
    two = draw(replace(EVERYTHING, noise=0, flip_left_right=False), 4, 2, np.random.default_rng(0))
    assert (one.angle_rad == two.angle_rad).all()
    assert (one.shift == two.shift).all()
    assert not two.flip.any()


def test_the_data_set_is_opened_without_torch() -> None:
    script = "import sys, fedclient.data.dataset, shared_models.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
