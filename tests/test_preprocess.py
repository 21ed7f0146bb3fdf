"""Preprocessing: the way there and back, what padding and scaling do, and that labels go where voxels go."""

import json
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom
from torch.nn.functional import interpolate

from shared_models.preprocess import geometry_from, plan_geometry, preprocess, preprocess_labels, restore
from shared_models.study import Preprocess

MM = (1.0, 1.0, 1.0)


def window(
    size: tuple[int, ...],
    fit: Literal["letterbox", "crop_pad"] = "letterbox",
    spacing_mm: tuple[float, ...] | None = None,
    window_hu: tuple[float, float] = (0.0, 1.0),
) -> Preprocess:
    return Preprocess(size=size, fit=fit, intensity="window", window_hu=window_hu, spacing_mm=spacing_mm)


@st.composite
def plans(draw: st.DrawFn) -> Preprocess:
    dims = draw(st.sampled_from([2, 3]))
    size = tuple(draw(st.sampled_from([16, 32, 48])) for _ in range(dims))
    fit: Literal["letterbox", "crop_pad"] = draw(st.sampled_from(["letterbox", "crop_pad"]))
    mm = st.sampled_from([0.5, 0.7, 1.0, 1.25, 2.0])
    spacing = draw(st.none() | st.tuples(*[mm] * dims)) if fit == "crop_pad" else None
    return window(size, fit, spacing)


SHAPES = st.tuples(st.integers(8, 60), st.integers(8, 60), st.integers(1, 12))
SPACINGS = st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 2.5])] * 3)


def smooth(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).random(shape)
    spread = gaussian_filter(noise, (6, 6, 3), mode="nearest")
    return np.asarray((spread - spread.min()) / np.ptp(spread), dtype=np.float32)


@settings(max_examples=60, deadline=None)
@given(plans(), SHAPES, SPACINGS)
def test_an_example_has_the_size_of_the_plan_and_its_way_back_the_image_s_grid(
    plan: Preprocess, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    voxels = smooth(shape)[None]
    examples = preprocess(voxels, spacing_mm, plan)
    count = shape[2] if len(plan.size) == 2 else 1
    assert examples.images.shape == (count, 1, *plan.size)
    assert examples.geometry.examples == count
    assert examples.images.dtype == np.float32
    assert examples.images.min() >= 0
    assert examples.images.max() <= 1 + 1e-6
    back = restore(np.repeat(examples.images, 3, axis=1), examples.geometry)
    assert back.shape == (3, *shape)
    assert back.dtype == np.float32
    labels = preprocess_labels((voxels[0] > 0.5).astype(np.uint8), examples.geometry)
    assert labels.shape == (count, *plan.size)


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), st.sampled_from([(64, 64), (96, 64)]))
def test_restoring_what_was_preprocessed_gives_the_image_back(rows: int, columns: int, size: tuple[int, ...]) -> None:
    image = smooth((rows, columns, 2))
    examples = preprocess(image[None], MM, window(size))
    back = restore(examples.images, examples.geometry)[0]
    assert np.abs(back - image)[2:-2, 2:-2].max() < 0.06


@settings(max_examples=40, deadline=None)
@given(plans(), SHAPES, SPACINGS)
def test_labels_land_where_voxels_land(
    plan: Preprocess, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    """An image that is its own mask, thresholded after scaling, is the scaled mask but for a pixel at the edges."""
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 4 : -(shape[0] // 4), shape[1] // 4 : -(shape[1] // 4)] = 1
    examples = preprocess(mask.astype(np.float32)[None], spacing_mm, plan)
    labels = preprocess_labels(mask, examples.geometry)
    differ = labels != (examples.images[:, 0] > 0.5)
    edge = (examples.images[:, 0] > 0.02) & (examples.images[:, 0] < 0.98)
    assert not (differ & ~edge).any()


@settings(max_examples=40, deadline=None)
@given(plans(), SHAPES, SPACINGS)
def test_every_plan_keeps_the_centre_in_the_centre(
    plan: Preprocess, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    geometry = plan_geometry(shape, spacing_mm, plan)
    for start, step, size, count in zip(geometry.start, geometry.step, geometry.size, geometry.shape, strict=False):
        assert abs(start + step * (size - 1) / 2 - (count - 1) / 2) <= 0.5


def test_an_image_of_the_wanted_size_is_not_touched() -> None:
    image = np.random.default_rng(0).random((1, 32, 48, 3), np.float32)
    for plan in (window((32, 48)), window((32, 48), "crop_pad"), window((32, 48), "crop_pad", (1.0, 1.0))):
        examples = preprocess(image, MM, plan)
        assert (examples.images[:, 0] == np.moveaxis(image[0], -1, 0)).all()
        assert (restore(examples.images, examples.geometry) == image).all()


def test_rows_are_the_first_axis_and_planes_are_never_mixed() -> None:
    image = np.zeros((1, 20, 40, 3), np.float32)
    image[0, :10, :, 1] = 1
    examples = preprocess(image, (2.0, 1.0, 7.0), window((32, 32))).images
    assert not examples[[0, 2]].any()
    assert examples[1, 0, :16].min() >= 0.5
    assert examples[1, 0, 17:].max() < 0.1


def test_letterbox_keeps_the_aspect_in_millimetres_and_pads_with_the_lowest_value() -> None:
    tall = np.full((1, 100, 50, 1), 0.8, np.float32)
    tall[0, 0, 0, 0] = 0.3
    pixels = preprocess(tall, MM, window((64, 64))).images[0, 0]
    assert np.flatnonzero(pixels[32] > 0.5).tolist() == list(range(16, 48))
    assert (pixels[:, :16] == 0).all()
    square_in_mm = preprocess(tall, (1.0, 2.0, 1.0), window((64, 64))).images[0, 0]
    assert (square_in_mm[5:] > 0.5).all()


def test_percentile_padding_is_the_lowest_value_of_the_image_not_its_mean() -> None:
    image = 100 + 900 * np.random.default_rng(0).random((1, 40, 20, 1), np.float32)
    plan = Preprocess(size=(48, 48), fit="crop_pad", intensity="percentile")
    pixels = preprocess(image, MM, plan).images[0, 0]
    inside = pixels[4:44, 14:34]
    assert (pixels[:4] == inside.min()).all()
    assert inside.mean() == pytest.approx(0, abs=1e-5)
    assert inside.std() == pytest.approx(1, abs=1e-4)


def test_percentiles_are_clipped_and_each_image_is_its_own_measure() -> None:
    image = np.random.default_rng(0).normal(50, 5, (1, 64, 64, 1)).astype(np.float32)
    image[0, 3, 3] = 1e6
    plan = Preprocess(size=(64, 64), intensity="percentile")
    pixels = preprocess(image, MM, plan).images
    assert pixels.max() < 4
    assert pixels == pytest.approx(preprocess(image * 7 + 300, MM, plan).images, abs=1e-3)
    assert not preprocess(np.full((1, 64, 64, 1), 5, np.float32), MM, plan).images.any()


def test_values_below_the_window_are_air_before_anything_is_scaled() -> None:
    image = np.full((1, 60, 60, 1), 40, np.float32)
    image[0, :30] = -3024
    pixels = preprocess(image, MM, window((32, 32), window_hu=(-1000, 400))).images
    clipped = preprocess(np.maximum(image, -1000), MM, window((32, 32), window_hu=(-1000, 400))).images
    assert (pixels == clipped).all()
    assert pixels.max() == pytest.approx(1040 / 1400)


def test_shrinking_averages_a_fine_pattern_instead_of_picking_from_it() -> None:
    checks = (np.indices((256, 256)).sum(axis=0) % 2).astype(np.float32)[None, :, :, None]
    pixels = preprocess(checks, MM, window((32, 32))).images
    assert np.abs(pixels - 0.5).max() < 0.02


def test_resampling_agrees_with_scipy() -> None:
    image = smooth((40, 50, 1), seed=3)
    pixels = preprocess(image[None], MM, window((80, 96), "crop_pad", (0.5, 0.5))).images[0, 0]
    reference = zoom(image[:, :, 0], 2, order=1, grid_mode=True, mode="nearest")
    assert pixels == pytest.approx(reference[:, 2:-2], abs=1e-5)


@pytest.mark.parametrize("step", [1.3, 2.0, 3.7])
def test_shrinking_is_torch_s_antialiased_interpolation(step: float) -> None:
    """torch 2.13: a triangle as wide as the step, pixels centred on the image's extent, edges left out of the weights;
    ours go on beyond the edge, so the outermost pixels are left out here."""
    image = np.random.default_rng(0).random((1, 74, 74, 2), np.float32)
    count = round(74 / step)
    exact = 74 / count
    pixels = preprocess(image, MM, window((count, count), "crop_pad", (exact, exact))).images[:, 0]
    theirs = interpolate(
        torch.from_numpy(np.moveaxis(image[0], -1, 0).copy())[None], (count, count), mode="bilinear", antialias=True
    )[0].numpy()
    assert pixels[:, 2:-2, 2:-2] == pytest.approx(theirs[:, 2:-2, 2:-2], abs=1e-5)


def test_half_precision_is_what_rounding_afterwards_gives() -> None:
    image = np.random.default_rng(0).normal(-300, 500, (2, 30, 20, 8)).astype(np.float32)
    for plan in (window((16, 16)), window((48, 16, 16), "crop_pad", (0.7, 0.7, 2.0), (-1000.0, 400.0))):
        whole = preprocess(image, MM, plan).images
        half = preprocess(image, MM, plan, np.float16).images
        assert half.dtype == np.float16
        assert (half == whole.astype(np.float16)).all()


def test_an_image_is_not_written_to() -> None:
    image = np.random.default_rng(0).normal(-300, 500, (1, 30, 20, 8)).astype(np.float32)
    before = image.copy()
    for intensity in ("window", "percentile", "zscore"):
        preprocess(image, MM, Preprocess(size=(32, 32), fit="crop_pad", intensity=intensity, nonzero=False))
    assert (image == before).all()


def test_crop_pad_without_spacing_moves_by_whole_voxels() -> None:
    image = np.random.default_rng(0).random((1, 43, 21, 9), np.float32)
    plan = window((32, 32, 16), "crop_pad")
    pixels = preprocess(image, (0.7, 0.7, 2.5), plan).images[0, 0]
    assert (pixels[:, 6:27, 4:13] == image[0, 5:37]).all()
    assert np.count_nonzero(pixels) == np.count_nonzero(image[0, 5:37])


def test_a_spacing_that_differs_by_rounding_only_does_not_blur() -> None:
    geometry = plan_geometry((40, 40, 9), (0.70312, 0.70313, 1), window((32, 32), "crop_pad", (0.703125, 0.703125)))
    assert geometry.step == (1, 1)
    assert geometry.start == (4, 4)


def test_what_was_cropped_away_comes_back_as_zero_and_padding_as_background() -> None:
    labels = np.ones((60, 20, 2), np.uint8)
    geometry = plan_geometry((60, 20, 2), MM, window((32, 32), "crop_pad"))
    small = preprocess_labels(labels, geometry)
    assert small[:, :, 6:26].all()
    assert small.sum() == 2 * 32 * 20
    back = restore(np.ones((2, 1, 32, 32), np.float32), geometry)[0]
    assert (back[14:46] == 1).all()
    assert back.sum() == 32 * 20 * 2


def test_label_values_are_never_invented() -> None:
    labels = np.random.default_rng(0).choice([0, 1, 2, 127], (70, 50, 3)).astype(np.uint8)
    for size in ((32, 32), (128, 96)):
        small = preprocess_labels(labels, plan_geometry((70, 50, 3), MM, window(size)))
        assert set(np.unique(small)) == {0, 1, 2, 127}


def test_a_geometry_survives_json() -> None:
    geometry = plan_geometry((44, 43, 3), (0.7, 0.7, 2.5), window((64, 64, 16), "crop_pad", (1.0, 1.0, 1.0)))
    assert geometry_from(json.loads(json.dumps(geometry.plain()))) == geometry
