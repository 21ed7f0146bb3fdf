"""What a picture and its labels look like: letters in a line, masks on the edges of their image, left on the left."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fedclient.data.volume import FRONTAL_RAS, Volume
from fedclient.gate.letters import letters
from fedclient.gate.pixels import clipped
from fedclient.gate.plausible import exchanged, misplaced
from simulations.fixtures.people import chest
from simulations.fixtures.sown import film

SIZES = [12, 16, 24, 36]


def written(text: str, size: int, grey: NDArray[np.float32]) -> NDArray[np.float32]:
    page = Image.new("L", (grey.shape[1], grey.shape[0]), 0)
    ImageDraw.Draw(page).text((6, 6), text, fill=255, font=ImageFont.load_default(size))
    ink = np.asarray(page, dtype=np.float32) / 255
    return np.asarray(grey * (1 - ink) + 255 * ink, np.float32)


def picture(grey: NDArray[np.float32]) -> Volume:
    return Volume(grey[None, :, :, None].astype(np.float32), FRONTAL_RAS.copy())


def page() -> NDArray[np.float32]:
    """A film of 400 x 400 with a scanner's noise."""
    grey = np.kron(film(0)[0], np.ones((5, 5))).astype(np.float32)
    return np.clip(0.8 * grey + np.random.default_rng(0).normal(0, 4, grey.shape), 0, 255).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_line_of_letters_is_found_at_any_size_and_on_its_side(size: int, turned: bool) -> None:
    grey = written("DOE JANE 29-02-60", size, page())
    assert letters(picture(grey.T if turned else grey)) >= 6


@pytest.mark.parametrize("text", ["", "R", "L", "AP", "KV59"])
def test_a_side_marker_is_no_text(text: str) -> None:
    assert letters(picture(written(text, 24, page()))) == 0


def test_letters_are_found_in_a_few_planes_of_a_volume_too() -> None:
    planes = np.stack([page()] * 9, axis=2)
    assert letters(Volume(planes[None], np.eye(4))) == 0
    for k in range(9):
        planes[:, :, k] = written("MRN 4711 0815", 16, planes[:, :, k])
    assert letters(Volume(planes[None], np.eye(4))) >= 6


def test_noise_rulers_and_blank_planes_are_no_text() -> None:
    rng = np.random.default_rng(1)
    ruler = np.zeros((200, 200), np.float32)
    ruler[::10, :12] = 255  # ticks, as high as a pixel
    for grey in (rng.normal(0, 1, (200, 200)), rng.random((200, 200)) > 0.97, ruler, np.zeros((200, 200))):
        assert letters(picture(np.asarray(grey, np.float32))) == 0


def test_a_mirrored_mask_is_told_by_the_edges_it_misses_and_the_true_one_is_not() -> None:
    for number in range(4):
        who = chest(number)
        grey = clipped(who.volume, ct=True)
        assert misplaced(grey, who.lung, 1, picture=False) == ""
        assert misplaced(grey, np.ascontiguousarray(who.lung[::-1]), 1, picture=False) == "left to right"


def test_a_mask_on_no_edges_at_all_or_of_few_voxels_says_nothing() -> None:
    rng = np.random.default_rng(2)
    grey = rng.random((40, 40, 4)).astype(np.float32)
    mask = np.zeros(grey.shape, np.uint8)
    mask[5:15, 20:30, 1:3] = 1
    assert misplaced(grey, mask, 1, picture=False) == ""
    mask[...] = 0
    mask[3:5, 3:5, 1] = 1
    grey[...] = mask[::-1]
    assert misplaced(grey, mask, 1, picture=False) == ""


def test_left_and_right_that_are_exchanged_are_told_by_where_they_lie_in_the_patient() -> None:
    labels = np.zeros((20, 10, 4), np.uint8)
    labels[2:6], labels[12:16] = 1, 2  # I runs to the patient's right
    volume = Volume(np.zeros((1, *labels.shape), np.float32), np.diag([1.0, 1.0, 2.0, 1.0]))
    names = ("left-lung", "right-lung")
    assert list(exchanged(volume, labels, names)) == []
    assert list(exchanged(volume, labels, names[::-1])) == ["lung"]
    assert list(exchanged(volume, labels, ("left-lung", "nodule"))) == []
    mirrored = Volume(volume.voxels, np.diag([-1.0, 1.0, 2.0, 1.0]))
    assert list(exchanged(mirrored, labels, names)) == ["lung"]
    shown = np.zeros((10, 20, 1), np.uint8)
    shown[:, 2:6], shown[:, 12:16] = 2, 1  # columns of a film run to the patient's left
    frontal = Volume(np.zeros((1, *shown.shape), np.float32), FRONTAL_RAS.copy())
    assert list(exchanged(frontal, shown, names)) == []
