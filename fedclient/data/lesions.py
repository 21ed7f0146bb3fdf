"""Where the lesions of a case are and how large, from masks, boxes or points, and what a network is to answer for it.

A table of lesions is float32[n, 1 + 2 A]: label (k is the study's labels[k - 1], 127 irrelevant, 0 no row), centre,
and half-extents along A axes; in voxels of the image, in pixels of an example, or in mm along the image's axes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedclient.data.boxes import across_one_slice, box_indices
from fedclient.data.cases import VERDICTS, Boxes, Case, LidcReads, Marks, Mask, read_case_labels
from fedclient.data.images import IGNORE
from fedclient.data.labels import Labels, meanings, numbered, refused
from fedclient.data.luna16 import UNMEASURED_MM, Mark, mark_indices
from fedclient.data.volume import LPS_TO_RAS, Volume
from shared_models.preprocess import Geometry
from shared_models.task_table import Task

Table = NDArray[np.float32]
DEEP = 0.7  # of a lesion's half-extent: a plane farther from its centre shows little of it, and is not asked
EVERYWHERE = ndimage.generate_binary_structure(3, 3)  # voxels that touch, at a corner too, are of one lesion


def lesions_of(case: Case, volume: Volume, task: Task) -> Table:
    """float32[n, 7]: the lesions of a case in voxels of its image, from whatever tells them.

    Raises:
        ImageUnreadable: LABEL_MISSING, LABEL_VALUES, LABEL_GEOMETRY_MISMATCH and what `read_case_labels` raises.
    """
    if case.marks is not None:
        return _of_marks(case.marks, case, volume, task)
    match case.label:
        case Marks() as marks:
            return _of_marks(marks, case, volume, task)
        case Boxes(boxes):
            values = [_value(box.labels, case, task) for box in boxes]
            corners = box_indices(boxes, volume)
            centre, half = corners.mean(axis=1), (corners[:, 1] - corners[:, 0]) / 2
            spacing = np.array(volume.spacing_mm)
            flat = across_one_slice(volume)
            half[:, flat] = np.delete(half * spacing, flat, axis=1).mean(axis=1) / spacing[flat]  # as deep as wide
            return _table(values, centre, half)
        case _:
            return from_mask(read_case_labels(_named(case, task), volume, task.labels))


def from_mask(mask: Labels) -> Table:
    """float32[n, 7]: the connected parts of each label of uint8[I, J, K], and of what is ignored: their middle, and
    half of what they reach along each axis."""
    rows: list[Table] = []
    for value in np.unique(mask[mask > 0]).tolist():
        parts, count = ndimage.label(mask == value, EVERYWHERE)
        centres = np.array(ndimage.center_of_mass(parts > 0, parts, np.arange(1, count + 1)))
        reach = [[s.stop - s.start for s in box] for box in ndimage.find_objects(parts)]
        rows.append(_table([value] * count, centres, np.array(reach) / 2))
    return np.concatenate(rows) if rows else np.zeros((0, 7), np.float32)


def _of_marks(marks: Marks, case: Case, volume: Volume, task: Task) -> Table:
    if marks.nodules is None:
        raise refused("LABEL_MISSING", "annotations.csv is not there, so nobody knows which nodules there are.")
    spacing = np.array(volume.spacing_mm)

    def rows(of: Sequence[Mark], values: Sequence[int]) -> Table:
        radius = np.array([(mark.diameter_mm or UNMEASURED_MM) / 2 for mark in of]).reshape(-1, 1)
        return _table(values, mark_indices(of, volume), radius / spacing)

    values = [_value((mark.label,), case, task) for mark in marks.nodules]
    return np.concatenate([rows(marks.nodules, values), rows(marks.excluded, [IGNORE] * len(marks.excluded))])


def _table(values: Sequence[int], centre: NDArray[Any], half: NDArray[Any]) -> Table:
    of = np.array(values, np.float32).reshape(-1, 1)
    table = np.concatenate([of, np.asarray(centre).reshape(-1, 3), np.asarray(half).reshape(-1, 3)], axis=1)
    return table[of[:, 0] > 0].astype(np.float32)


def _value(names: Sequence[str], case: Case, task: Task) -> int:
    """The label of something that has these names, by the site's words for things.

    Raises:
        ImageUnreadable: LABEL_VALUES, none that the study knows.
    """
    if task.any_lesion:
        return 1
    labels = {label: k for k, label in enumerate(task.labels, start=1)}
    found = [*meanings(names, {**labels, **_here(case, task)}).values()]
    if not found:
        raise refused(
            "LABEL_VALUES",
            f"something is marked under a name that the study does not know ({', '.join(task.labels)}). Map names with "
            f'`structures` under [data] of site.toml, or choose a study whose label is "lesion".',
        )
    return found[0]


def _here(case: Case, task: Task) -> dict[str, int]:
    """The site's words for what the study tells apart; its mapping serves other studies too."""
    known = {*task.labels, "background", "ignore"}
    return numbered({name: to for name, to in case.structures.items() if to in known}, task.labels)


def _named(case: Case, task: Task) -> Case:
    """The case with the names of its data set mapped to `lesion`, where the study finds whatever is marked; but for
    those that the site maps itself."""
    names: Sequence[str] = ()
    if task.any_lesion and isinstance(case.label, Mask) and case.label.names is not None:
        names = [*case.label.names.values()]
    elif task.any_lesion and isinstance(case.label, LidcReads):
        names = ("nodule", *VERDICTS)
    told = meanings(names, {"background": 0, "ignore": IGNORE, **_here(case, task)})
    marked = [name for name in names if name not in told]
    return replace(case, structures={**case.structures, **dict.fromkeys(marked, task.labels[0])})


def in_mm(table: Table, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    """A table in voxels, in mm along the image's axes from its first voxel."""
    scaled: NDArray[np.float64] = table.astype(np.float64) * np.array([1.0, *spacing_mm, *spacing_mm])
    return scaled


def centres_lps_mm(places_mm: NDArray[Any], affine_ras: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64[n, 3]: places in mm along the image's axes, in the patient (x to the left, y to the back, z to the
    head), as LUNA16's tables have them."""
    spacing = np.linalg.norm(affine_ras[:3, :3], axis=0)
    index = np.concatenate([np.asarray(places_mm, np.float64) / spacing, np.ones((len(places_mm), 1))], axis=1)
    lps = LPS_TO_RAS @ affine_ras @ index.T
    places: NDArray[np.float64] = lps.T[:, :3]
    return places


def of_examples(table: Table, geometry: Geometry) -> Table:
    """float32[N, M, 1 + 2 D]: a table in voxels as the truth of each example of its image, in its pixels.

    A plane shows the cut through each lesion that it meets. What lies near the end of a lesion is irrelevant there
    (127) but for the plane that is nearest to its centre.
    """
    dims = len(geometry.size)
    step, start = np.array(geometry.step), np.array(geometry.start)
    if dims == 3:
        rows = [np.concatenate([table[:, :1], (table[:, 1:4] - start) / step, table[:, 4:] / step], axis=1)]
    else:
        rows = [_cut(table, k, geometry) for k in range(geometry.shape[2])]
    return padded(rows, dims)


def _cut(table: Table, plane: int, geometry: Geometry) -> NDArray[Any]:
    step, start = np.array(geometry.step), np.array(geometry.start)
    away = np.abs(table[:, 3] - plane)
    nearest = np.rint(table[:, 3].clip(0, geometry.shape[2] - 1)) == plane
    share = away / np.maximum(table[:, 6], 1e-6)
    met = (share < 1) | (nearest & (away <= 0.5))
    wide = np.sqrt(np.clip(1 - np.minimum(share, DEEP) ** 2, 0, None))[:, None]
    kind = np.where(nearest | (share <= DEEP), table[:, 0], IGNORE)[:, None]
    cut = np.concatenate([kind, (table[:, 1:3] - start) / step, table[:, 4:6] / step * wide], axis=1)
    return np.asarray(cut[met])


def padded(rows: Sequence[NDArray[Any]], dims: int) -> Table:
    """float32[B, M, 1 + 2 D]: tables of one length, rows of 0 where one has fewer."""
    most = max([1, *(len(of) for of in rows)])
    whole = np.zeros((len(rows), most, 1 + 2 * dims), np.float32)
    for n, of in enumerate(rows):
        whole[n, : len(of)] = of
    return whole


def places(truth: Table, size: Sequence[int], labels: int) -> list[NDArray[np.int64]]:
    """For each label the flat indices in [N, *size] of the pixels that lesions of examples have their centres in."""
    dims = len(size)
    example, row = np.nonzero((truth[:, :, 0] >= 1) & (truth[:, :, 0] <= labels))
    centre = np.rint(truth[example, row, 1 : 1 + dims]).astype(np.int64)
    kept = ((centre >= 0) & (centre < np.array(size))).all(axis=1)
    at = np.ravel_multi_index((example[kept], *centre[kept].T), (len(truth), *size))
    kind = truth[example, row, 0][kept]
    return [np.sort(at[kind == k]).astype(np.int64) for k in range(1, labels + 1)]


def in_window(truth: Table, begins: Sequence[int], size: Sequence[int]) -> Table:
    """The lesions float32[m, 1 + 2 D] of one example that reach into a window of it, in the window's pixels."""
    dims = len(size)
    moved = truth.copy()
    moved[:, 1 : 1 + dims] -= np.array(begins)
    centre, half = moved[:, 1 : 1 + dims], moved[:, 1 + dims :]
    reach = ((centre + half > -0.5) & (centre - half < np.array(size) - 0.5)).all(axis=1)
    return moved[reach & (moved[:, 0] > 0)]
