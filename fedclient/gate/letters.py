"""Whether letters stand in a picture: many small shapes of one height side by side, sharp and as bright as can be.

Conservative on purpose: a lone side marker, a ruler or a wire is no text. It does not read what stands there, and what
it misses (one or two letters, text as grey as what lies around it, handwriting) nobody is told of.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedclient.data.volume import Volume

PLANES = 7  # of a volume that are looked at, spread over it
LARGEST_EDGE = 2048  # of a plane, in pixels; larger ones are made smaller, the brightest of each box kept
LEVEL = 0.75  # of the way from the darkest to the brightest pixel, above which a letter lies
DARKER = 0.4  # of that way: how much darker what lies around a letter is
SMALLEST, LARGEST = 5, 72  # pixels, of the height of a letter
MANY, UNLIKE = 6, 3  # letters in a line, and how many of them must differ in their number of pixels: no ruler is text
SAME = 0.15  # of the height, or a pixel: by which tops and bottoms of a line's letters differ
APART = 1.8  # heights, from a letter to the next, with a space between them
MOST_SHAPES = 4000  # more are noise or grains


class Shape(NamedTuple):
    """One bright shape: the box that it fills, and how many pixels of it."""

    rows: slice
    columns: slice
    pixels: int


def letters(volume: Volume) -> int:
    """The most letters in one line of text of the planes looked at; 0 where no line is long enough to be one."""
    return max((_longest(plane) for plane in _planes(volume)), default=0)


def _planes(volume: Volume) -> Iterator[NDArray[np.float32]]:
    """Rows and columns as somebody would read them, or the other way round, which is looked at as well."""
    voxels, along = volume.voxels[0], 2
    if volume.voxel_of_pixel is not None:
        along = int(np.abs(volume.voxel_of_pixel[:3, 2]).argmax())
    count = voxels.shape[along]
    for at in sorted({round(n) for n in np.linspace(0, count - 1, min(PLANES, count))}):
        yield voxels.take(at, along)


def _longest(plane: NDArray[np.float32]) -> int:
    step = -(-max(plane.shape) // LARGEST_EDGE)
    if step > 1:
        rows, columns = (n // step * step for n in plane.shape)
        plane = plane[:rows, :columns].reshape(rows // step, step, columns // step, step).max(axis=(1, 3))
    low, high = float(plane.min()), float(plane.max())
    if high <= low or min(plane.shape) < 2 * SMALLEST:
        return 0
    grey = (plane - low) / np.float32(high - low)
    shapes: NDArray[np.int32]
    shapes, count = ndimage.label(grey > LEVEL, np.ones((3, 3)))
    if not MANY <= count <= MOST_SHAPES:
        return 0
    pixels = np.bincount(shapes.ravel()).tolist()[1:]
    found = zip(ndimage.find_objects(shapes), pixels, strict=True)
    boxes = [Shape(box[0], box[1], size) for box, size in found if _letter_like(box) and _stands_out(grey, box)]
    return max(_in_line(boxes, axis) for axis in (0, 1))


def _letter_like(box: tuple[slice, slice]) -> bool:
    high, wide = (side.stop - side.start for side in box)
    return bool(SMALLEST <= max(high, wide) <= LARGEST)


def _stands_out(grey: NDArray[np.float32], box: tuple[slice, slice]) -> bool:
    """Whether the frame of three pixels around a shape is mostly much darker than it."""
    rows, columns = (slice(max(0, side.start - 3), side.stop + 3) for side in box)
    around: NDArray[np.float32] = grey[rows, columns]
    inside = tuple(
        slice(side.start - whole.start, side.stop - whole.start)
        for side, whole in zip(box, (rows, columns), strict=True)
    )
    bright = float(around[inside].max())
    frame = np.ones(around.shape, bool)
    frame[inside] = False
    return bool(frame.any()) and float(np.percentile(around[frame], 75)) < bright - DARKER


def _in_line(boxes: list[Shape], across: int) -> int:
    """The most shapes of one height on one line; `across` is the axis along which letters are high."""
    lines: list[list[Shape]] = []
    for box in sorted(boxes, key=lambda each: (each.columns if across == 0 else each.rows).start):
        side, at = (box.rows, box.columns) if across == 0 else (box.columns, box.rows)
        high = side.stop - side.start
        if high < SMALLEST or at.stop - at.start > 1.5 * high:
            continue
        for line in lines:
            first, last = (line[0].rows, line[-1].columns) if across == 0 else (line[0].columns, line[-1].rows)
            most = max(1.0, SAME * (first.stop - first.start))
            same = abs(side.start - first.start) <= most and abs(side.stop - first.stop) <= most
            if same and -1 <= at.start - last.stop <= APART * high:
                line.append(box)
                break
        else:
            lines.append([box])
    longest = max((len(line) for line in lines if len({box.pixels for box in line}) >= UNLIKE), default=0)
    return longest if longest >= MANY else 0
