"""Bags of feature vectors in `.npy` files: one row for each tile of a slide, as a network before this one saw it."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cases import Case
from shared_models.errors import ImageUnreadable

SUFFIX = ".npy"
MOST_TILES = 10_000  # of a bag, evenly taken from a larger one (Ogier du Terrail et al. 2022, appendix on Camelyon16)
LARGEST_FLOAT16 = 65504.0


def is_bag(case: Case) -> bool:
    """Whether a case is a bag, and no image."""
    return len(case.channels) == 1 and len(case.channels[0].files) == 1 and _path(case).suffix.lower() == SUFFIX


def read_bag(case: Case, width: int | None = None) -> NDArray[np.float16]:
    """float16[tiles, width], at most `MOST_TILES` of them; rows of zeros, which stand for no tile, are left out.

    Args:
        width: that the study's network wants; None takes any.

    Raises:
        ImageUnreadable: IMAGE_UNREADABLE, UNSAFE_FORMAT, MODALITY_MISMATCH, INTENSITY_INVALID.
    """
    if not is_bag(case):
        raise ImageUnreadable("the case is no bag of features (.npy). Choose a study of images.", "MODALITY_MISMATCH")
    stored = _stored(_path(case))
    if stored.ndim != 2 or not len(stored) or stored.dtype.kind != "f":
        raise ImageUnreadable(
            f"the bag is {stored.dtype}{list(stored.shape)}; wanted are real numbers [tiles, width]. Export it so.",
            code="MODALITY_MISMATCH",
        )
    if width is not None and stored.shape[1] != width:
        raise ImageUnreadable(
            f"its tiles have {stored.shape[1]} features, the study wants {width}: another network made them. Make them "
            f"with the one that the study names, or choose another study.",
            code="MODALITY_MISMATCH",
        )
    places = np.linspace(0, len(stored) - 1, min(len(stored), MOST_TILES)).astype(np.intp)
    bag = np.asarray(stored[places], dtype=np.float32)
    if not np.isfinite(bag).all() or np.abs(bag).max() > LARGEST_FLOAT16:
        raise ImageUnreadable("some features are not finite, or above 65504. Make them anew.", "INTENSITY_INVALID")
    small = bag.astype(np.float16)
    kept = small[small.any(axis=1)]
    if not len(kept):
        raise ImageUnreadable("all features of the bag are 0: it is blank.", "INTENSITY_INVALID")
    return kept


def padded_bags(bags: list[NDArray[np.float16]]) -> NDArray[np.float16]:
    """[B, 1, tiles, width] from [1, tiles of each, width]: shorter ones are filled up with zeros."""
    longest = max(bag.shape[1] for bag in bags)
    together = np.zeros((len(bags), 1, longest, bags[0].shape[2]), np.float16)
    for to, bag in zip(together, bags, strict=True):
        to[:, : bag.shape[1]] = bag
    return together


def _path(case: Case) -> Path:
    return case.channels[0].files[0]


def _stored(path: Path) -> NDArray[Any]:
    """The array, mapped from its file; a file of objects, which could run code, is refused unread."""
    try:
        found: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (OSError, EOFError) as e:
        raise ImageUnreadable(f"the bag cannot be opened ({type(e).__name__}). Copy it again.") from None
    except ValueError:  # numpy's words quote the header
        raise ImageUnreadable(
            "the file is no plain .npy array: its content may run as code. Save it with allow_pickle=False.",
            code="UNSAFE_FORMAT",
        ) from None
    return found
