"""One case: opened as training would, looked at from all sides, and told in facts and findings without a name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedclient.data.bags import is_bag, read_bag
from fedclient.data.cases import Case, Mask, files_of, read_case, read_case_labels, state_of
from fedclient.data.findings import CATALOGUE, Finding, finding
from fedclient.data.formats import format_of
from fedclient.data.identifiers import NOTHING, Said, identifying_path, said_in
from fedclient.data.images import is_picture, read_labels
from fedclient.data.lesions import lesions_of
from fedclient.data.nifti import SHEAR, twofold
from fedclient.data.objects import is_object
from fedclient.data.pictures import is_coloured
from fedclient.data.truths import classes_of, covariates_of, follow_up, has_truth
from fedclient.data.volume import Volume, check_resampled
from fedclient.gate.facts import Drawn, Facts, Looked, Needs, takes_part
from fedclient.gate.letters import letters
from fedclient.gate.pixels import bands, clipped, mask_seal, pixel_seal, projections, sample, sealed, small_picture
from fedclient.gate.plausible import exchanged, misplaced
from shared_models.errors import ImageUnreadable, StudyInvalid
from shared_models.study import COLOURS, Task

MODALITIES = {
    "ct": {"CT"},
    "mr": {"MR"},
    "xray": {"CR", "DX", "RG", "MG", "RF", "XA", "PX", "IO"},
}
CHEST_LABELS = {"lung", "left-lung", "right-lung", "nodule", "trachea"}
FAR_FROM_CHEST = frozenset((
    "HEAD", "BRAIN", "SKULL", "ORBIT", "EAR", "IAC", "SELLA", "JAW", "MAXILLA", "PELVIS", "HIP", "KNEE", "LEG",
    "FEMUR", "FOOT", "ANKLE", "TOE", "HAND", "WRIST", "FINGER", "ELBOW", "HUMERUS", "ARM", "PROSTATE", "BLADDER",
    "UTERUS", "OVARY", "RECTUM", "SACRUM",
))  # fmt: skip
HU_BOUNDS = (-4096.0, 65535.0)
SMALLEST_MM, LARGEST_MM = 0.02, 50.0


def look_at(case: Case, root: Path, needs: Needs, secret: str) -> Looked:
    """Every check that looks at one case alone; whatever a file does to its reader becomes a finding.

    Args:
        root: the data folder.
    """
    state, said = "", NOTHING
    try:
        state = state_of(case)
        if needs.table_only or not case.channels:
            return _row(case, needs, secret, state)
        if needs.tile_features is not None or is_bag(case):
            return _bag(case, root, needs, secret, state)
        said = said_in(_members(case.channels[0].files))
        return _looked(case, root, needs, secret, state, said)
    except ImageUnreadable as e:
        found = _refused(e, case)
    except MemoryError:
        found = finding("INPUT_TOO_LARGE", "there is not enough memory to read it.", case=case.key, row=case.row)
    except Exception as e:  # a gap in a reader's doubt; its words may hold a name
        what = f"its reader failed on it ({type(e).__name__})."
        found = finding("IMAGE_UNREADABLE", what, case=case.key, row=case.row)
    return Looked(state, None, (found, *_of_headers(case, said), *_of_paths(case, root, said)))


def _looked(case: Case, root: Path, needs: Needs, secret: str, state: str, said: Said) -> Looked:
    first = case.channels[0].files
    volume = read_case(case, needs.channels or tuple(c.name for c in case.channels if len(case.channels) > 1))
    if needs.patches:
        check_resampled(volume, needs.spacing_mm)
    picture = first[0].is_file() and is_picture(first[0])
    ct = volume.modality == "CT" or (volume.modality is None and needs.modality == "ct" and not picture)
    found = [*_of_headers(case, said), *_of_paths(case, root, said)]
    found += _of_geometry(case, volume, needs, picture)
    found += _of_kind(case, volume, needs, picture)
    if not any(each.code == "PHI_PIXEL" for each in found) and (count := letters(volume)):
        what = f"{count} small bright shapes of one height stand in a line, as letters do: a name, a date or a time?"
        found.append(finding("PHI_PIXEL", what, case=case.key, row=case.row, severity="warn"))
    levels = np.percentile(sample(volume.voxels[0]), (1, 99)).tolist()
    found += _of_levels(case, volume, needs, ct)
    labels: NDArray[np.uint8] | None = None
    drawn: dict[str, Drawn] = {}
    shown: tuple[str, ...] = ()
    try:
        if needs.task is None:
            labels, drawn = _labels(case, volume, needs)
            found += _of_labels(case, drawn, needs)
        elif has_truth(case, needs.task):
            shown = _shown(case, volume, needs.task)
        else:
            found.append(_without_labels(case, needs))
    except ImageUnreadable as e:
        code = "LABEL_UNREADABLE" if e.code in ("IMAGE_UNREADABLE", "DICOM_UNREADABLE") else e.code
        found.append(_refused(ImageUnreadable(str(e), code), case))
    grey = clipped(volume, ct)
    if labels is not None:
        found += _of_places(case, volume, grey, labels, needs, picture)
    axial, coronal = projections(grey)
    spacing = tuple(round(mm, 4) for mm in volume.spacing_mm)
    from_head = volume.provenance
    facts = Facts(
        modality=volume.modality,
        manufacturer=from_head.manufacturer,
        body_part=from_head.body_part,
        slice_thickness_mm=from_head.slice_thickness_mm,
        tube_kv=from_head.tube_kv,
        lossy=from_head.lossy,
        picture=picture,
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        axes=(volume.voxels.shape[1], volume.voxels.shape[2], volume.voxels.shape[3]),
        level_1=round(levels[0], 2),
        level_99=round(levels[1], 2),
        pixels=pixel_seal(volume, secret),
        bands=bands(grey, secret),
        axial=axial,
        coronal=coronal,
        person=sealed(secret, "person", said.patient.encode()) if said.patient else "",
        drawn=drawn,
        shown=shown,
        mask=mask_seal(labels, secret) if labels is not None else "",
    )
    turned = picture or (volume.voxels.shape[3] == 1 and volume.left_right_axis == 1)
    return Looked(state, facts, tuple(found), small_picture(grey, labels, turned))


def _row(case: Case, needs: Needs, secret: str, state: str) -> Looked:
    """A case of which the study sees the table alone; two patients may well have the same row."""
    found: list[Finding] = []
    shown: tuple[str, ...] = ()
    if not needs.table_only:
        if needs.modality:
            what = "it has no image, and the study trains on images."
            found.append(finding("FILE_MISSING", what, case=case.key, row=case.row))
    elif needs.task is not None and has_truth(case, needs.task):
        covariates_of(case, needs.task)
        shown = _shown(case, None, needs.task)
    else:
        found.append(_without_labels(case, needs))
    facts = Facts(
        modality=None, manufacturer=None, body_part=None, slice_thickness_mm=None, tube_kv=None, lossy=False,
        picture=True, spacing_mm=(1.0, 1.0, 1.0), axes=(1, 1, 1), level_1=0.0, level_99=0.0,
        pixels=sealed(secret, "row", case.key.encode()), bands=(), axial=(), coronal=(), shown=shown,
    )  # fmt: skip
    return Looked(state, facts, tuple(found))


def _bag(case: Case, root: Path, needs: Needs, secret: str, state: str) -> Looked:
    """A bag of feature vectors: read as training reads it; nobody can see a patient in it, nor a name."""
    found = list(_of_paths(case, root, NOTHING))
    shown: tuple[str, ...] = ()
    bag = read_bag(case, needs.tile_features)
    if needs.modality and needs.tile_features is None:
        raise ImageUnreadable("it is a bag of features, and the study trains on images.", "MODALITY_MISMATCH")
    if needs.task is not None and has_truth(case, needs.task):
        shown = _shown(case, None, needs.task)
    elif needs.wants_labels:
        found.append(_without_labels(case, needs))
    levels = [round(float(level), 2) for level in np.percentile(bag.astype(np.float32), (1, 99))]
    facts = Facts(
        modality=None, manufacturer=None, body_part=None, slice_thickness_mm=None, tube_kv=None, lossy=False,
        picture=True, spacing_mm=(1.0, 1.0, 1.0), axes=(bag.shape[0], bag.shape[1], 1),
        level_1=levels[0], level_99=levels[1],
        pixels=sealed(secret, "bag", bag.tobytes()), bands=(), axial=(), coronal=(), shown=shown,
    )  # fmt: skip
    return Looked(state, facts, tuple(found))


def _shown(case: Case, volume: Volume | None, task: Task) -> tuple[str, ...]:
    """Which labels of the study a case shows, read as training reads them.

    Raises:
        ImageUnreadable: as `classes_of`, `follow_up` and `lesions_of`.
    """
    if task.kind == "classification":
        return tuple(label for label, there in zip(task.labels, classes_of(case, task), strict=True) if there)
    if task.kind == "prognosis":
        return task.labels if follow_up(case, task)[1] else ()
    assert volume is not None
    kinds = set(lesions_of(case, volume, task)[:, 0].tolist())
    return tuple(label for value, label in enumerate(task.labels, start=1) if value in kinds)


def _without_labels(case: Case, needs: Needs) -> Finding:
    part = takes_part(case, needs)
    what = "it has no labels; its image is learned from." if part else "it has no labels and takes no part."
    return finding("LABEL_MISSING", what, case=case.key, row=case.row, severity="note" if part else None)


def oddities(case: Case, volume: Volume, needs: Needs, picture: bool) -> Iterator[Finding]:
    """What is odd about an image for a study, by header, grid and grey values; labels and identifiers left aside.

    Args:
        volume: may hold some of the planes, on the grid of all.
    """
    ct = volume.modality == "CT" or (volume.modality is None and needs.modality == "ct" and not picture)
    yield from _of_geometry(case, volume, needs, picture)
    yield from _of_kind(case, volume, needs, picture)
    yield from _of_levels(case, volume, needs, ct)


def _members(files: tuple[Path, ...]) -> list[Path]:
    """The files themselves, where a case names the folder of its series."""
    if len(files) == 1 and files[0].is_dir():
        return sorted(path for path in files[0].rglob("*") if path.is_file()) or list(files)
    return list(files)


def _refused(error: ImageUnreadable, case: Case) -> Finding:
    code = error.code if error.code in CATALOGUE else "IMAGE_UNREADABLE"
    return finding(code, str(error), case=case.key, row=case.row)


def _of_headers(case: Case, said: Said) -> Iterator[Finding]:
    if said.tags:
        yield finding("PHI_TAG", f"the header fills in {', '.join(said.tags)}.", case=case.key, row=case.row)
    if said.burnt:
        sure = said.burnt_for_sure or "overlay" not in said.burnt
        what = f"{said.burnt}: names may be readable in the picture."
        yield finding("PHI_PIXEL", what, case=case.key, row=case.row, severity="block" if sure else "warn")


def _of_paths(case: Case, root: Path, said: Said) -> Iterator[Finding]:
    for path in files_of(case):
        inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        if what := identifying_path(inside.as_posix(), said.words):
            yield finding("PHI_PATH", f"the path of a file holds {what}.", case=case.key, row=case.row)
            return


def _of_geometry(case: Case, volume: Volume, needs: Needs, picture: bool) -> Iterator[Finding]:
    directions = volume.affine_ras[:3, :3] / np.array(volume.spacing_mm)
    across = np.abs(directions.T @ directions - np.eye(3)).max()
    if across > SHEAR:
        angle = 90 - np.degrees(np.arcsin(min(1.0, float(across))))
        what = f"two axes of the grid stand at {angle:.1f} degrees: it is sheared, and would be read as straight."
        yield finding("GEOMETRY_INVALID", what, case=case.key, row=case.row)
    if picture:
        return
    drawn = [case.label.file] if isinstance(case.label, Mask) else []
    for path in dict.fromkeys([*(channel.files[0] for channel in case.channels), *drawn]):
        if path.is_file() and format_of(path) == "nifti" and (how := twofold(path)):
            what = f"its header says two things: {how}."
            yield finding("ORIENTATION_ODD", what, case=case.key, row=case.row)
            break
    spacing = volume.spacing_mm
    if not (min(spacing) >= SMALLEST_MM and max(spacing) <= LARGEST_MM):
        shown = " x ".join(f"{mm:.4g}" for mm in spacing)
        what = f"voxels of {shown} mm. Is the unit right, or a slice distance made up?"
        yield finding("GEOMETRY_RANGE", what, case=case.key, row=case.row)
    elif needs.spacing_mm is not None:
        far = max(max(a / b, b / a) for a, b in zip(spacing, needs.spacing_mm, strict=False))
        if far > 5:
            what = f"its voxel size is {far:.1f} times off the study's."
            yield finding("GEOMETRY_RANGE", what, case=case.key, row=case.row)


def _of_kind(case: Case, volume: Volume, needs: Needs, picture: bool) -> Iterator[Finding]:
    wanted = MODALITIES.get(needs.modality)
    flat = sum(n > 1 for n in volume.voxels.shape[1:]) <= 2
    if wanted and volume.modality is not None and volume.modality not in wanted:
        what = f"the image is {volume.modality}, the study trains on {needs.modality}."
        yield finding("MODALITY_MISMATCH", what, case=case.key, row=case.row)
    elif needs.modality in ("xray", "photo") and not flat:
        flats = {"xray": "radiographs", "photo": "pictures"}[needs.modality]
        what = f"a volume of {volume.voxels.shape[1:]} voxels, and the study trains on {flats}."
        yield finding("MODALITY_MISMATCH", what, case=case.key, row=case.row)
    elif picture and not set(needs.channels) & set(COLOURS) and is_coloured(case.channels[0].files[0]):
        what = "the picture is in colour, and is read as grey."
        yield finding("MODALITY_MISMATCH", what, case=case.key, row=case.row, severity="warn")
    part = set((volume.provenance.body_part or "").split())
    if part and CHEST_LABELS & set(needs.answers) and part <= FAR_FROM_CHEST:
        what = f"the header says {volume.provenance.body_part}, and the study labels what is in the chest."
        yield finding("BODY_PART_MISMATCH", what, case=case.key, row=case.row)
    if volume.provenance.lossy and not picture:
        what = "its pixels went through a lossy compression."
        yield finding("LOSSY", what, case=case.key, row=case.row)


def _of_levels(case: Case, volume: Volume, needs: Needs, ct: bool) -> Iterator[Finding]:
    for number, channel in enumerate(volume.voxels, start=1):
        low, high = float(channel.min()), float(channel.max())
        if not np.isfinite((low, high)).all():
            yield finding("INTENSITY_INVALID", "some voxels are not finite.", case=case.key, row=case.row)
        elif low == high:
            which = f"channel {number}" if len(volume.voxels) > 1 else "the image"
            what = f"all voxels of {which} have one value: it is blank."
            yield finding("INTENSITY_INVALID", what, case=case.key, row=case.row)
        elif ct:
            yield from _of_hu(case, channel, low, high)
        elif volume.modality is None and needs.modality == "ct" and low >= 0 and high <= 255:
            what = f"grey values from {low:g} to {high:g} are no Hounsfield units; the study is CT."
            yield finding("INTENSITY_ODD", what, case=case.key, row=case.row)


def _of_hu(case: Case, channel: NDArray[np.float32], low: float, high: float) -> Iterator[Finding]:
    """Air is at -1000 and water at 0; stored numbers whose intercept was forgotten are 1000 or so above that."""
    values = sample(channel)
    if low < HU_BOUNDS[0] or high > HU_BOUNDS[1]:
        what = f"values from {low:.0f} to {high:.0f}, and Hounsfield units lie in {HU_BOUNDS[0]:.0f} ... 65535."
        yield finding("INTENSITY_INVALID", what, case=case.key, row=case.row)
    elif low >= -200 and ((values < 200).mean() > 0.05) and (((values > 850) & (values < 1300)).mean() > 0.05):
        what = (
            "no voxel is as dark as air, and many lie about 1000 as water does in stored numbers: the slope and "
            "intercept of the scanner were not applied."
        )
        yield finding("INTENSITY_INVALID", what, case=case.key, row=case.row)
    elif low >= 0 and high <= 255:
        what = f"values from {low:g} to {high:g}: a windowed picture, not Hounsfield units."
        yield finding("INTENSITY_ODD", what, case=case.key, row=case.row)
    elif (values > 3100).mean() > 0.02:
        what = "more than 2 % of the voxels are denser than bone can be."
        yield finding("INTENSITY_ODD", what, case=case.key, row=case.row)
    elif np.percentile(values, 99.9) < -600:
        what = "hardly a voxel is denser than air: is it an image of a patient?"
        yield finding("INTENSITY_ODD", what, case=case.key, row=case.row)


def _labels(case: Case, volume: Volume, needs: Needs) -> tuple[NDArray[np.uint8] | None, dict[str, Drawn]]:
    """The label map, and what is drawn of each of the study's labels.

    Raises:
        ImageUnreadable: as `read_case_labels`.
    """
    if case.label is None:
        return None, {}
    if not needs.labels:  # only what can be told without knowing what its numbers mean, or its structures
        if isinstance(case.label, Mask) and not is_object(case.label.file):
            return read_labels(case.label.file, volume), {}
        return None, {}
    try:
        labels = read_case_labels(case, volume, needs.labels)
    except StudyInvalid as e:
        raise ImageUnreadable(str(e), "LABEL_VALUES") from None
    grey = volume.voxels[0]
    drawn = {}
    for value, label in enumerate(needs.labels, start=1):
        inside = labels == value
        count = int(inside.sum())
        level = round(float(np.median(grey[inside])), 2) if count else 0.0
        drawn[label] = Drawn(count, round(count / labels.size, 6), level)
    return labels, drawn


def _of_labels(case: Case, drawn: dict[str, Drawn], needs: Needs) -> Iterator[Finding]:
    if case.label is None:
        if needs.labels:
            yield _without_labels(case, needs)
        return
    if not drawn:
        return
    total = sum(each.voxels for each in drawn.values())
    if total == 0:
        yield finding("LABEL_EMPTY", "nothing is drawn in its labels.", case=case.key, row=case.row)
    elif sum(each.share for each in drawn.values()) > 0.9:
        what = "its labels cover more than nine tenths of the image: is it inverted?"
        yield finding("LABEL_ODD", what, case=case.key, row=case.row)
    for label, each in drawn.items():
        if 0 < each.voxels <= 2:
            what = f"label {label!r} is {each.voxels} voxel large: a stray click?"
            yield finding("LABEL_ODD", what, case=case.key, row=case.row)


def _of_places(
    case: Case, volume: Volume, grey: NDArray[np.float32], labels: NDArray[np.uint8], needs: Needs, picture: bool
) -> Iterator[Finding]:
    flat = picture or volume.left_right_axis == 1
    for value, label in enumerate(needs.labels, start=1):
        if way := misplaced(grey, labels, value, flat):
            what = f"label {label!r} lies on the edges of the image only if it is mirrored {way}: is its header right?"
            yield finding("LABEL_ODD", what, case=case.key, row=case.row)
            break
    for name in exchanged(volume, labels, needs.labels):
        what = f"left-{name} lies to the right of right-{name}: are they exchanged, or is the image mirrored?"
        yield finding("LABEL_ODD", what, case=case.key, row=case.row)


def quieter(looked: Looked) -> Looked:
    """The findings of a case that takes no part, because it has no labels: nothing in it can stop training."""
    milder = [replace(f, severity="warn") if f.severity == "block" else f for f in looked.findings]
    return replace(looked, findings=tuple(milder))
