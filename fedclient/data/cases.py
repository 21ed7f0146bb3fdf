"""A case: which files hold a patient's image and labels, and what is read from them for a study."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Literal, cast

import numpy as np

from fedclient.data.boxes import Box
from fedclient.data.findings import Finding
from fedclient.data.images import IGNORE, is_picture, read_image, read_labels
from fedclient.data.labels import Labels, Mapped, Structure, choose, meanings, numbered, refused, renumber
from fedclient.data.luna16 import LEFT_LUNG, RIGHT_LUNG, TRACHEA, Mark, lungs, spheres
from fedclient.data.nifti import read_nifti
from fedclient.data.objects import is_object, object_kind
from fedclient.data.pictures import read_colours
from fedclient.data.stack import Series
from fedclient.data.volume import ON_GRID, Volume, voxels_apart
from shared_models.errors import ImageUnreadable
from shared_models.files import canonical_json
from shared_models.study import COLOURS

Split = Literal["train", "val", "test"]
ALL = "all"  # in place of a split: every case of a site, for a model that has seen none of them
DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)([^\r\n]+)", re.MULTILINE | re.IGNORECASE)
CONTRASTS = {  # of brain MR: one picture under the names that challenges have for it -> BraTS's oldest
    "t1n": "t1", "t1w": "t1", "t1c": "t1ce", "t1gd": "t1ce", "t1wce": "t1ce", "t2w": "t2", "t2f": "flair",
}  # fmt: skip
VERDICTS = ("benign", "indeterminate", "malignant", "unrated")  # of LIDC's readers on a nodule, together


@dataclass(frozen=True, slots=True)
class Channel:
    """The files of one picture of a case.

    Attributes:
        name: as a study may ask for it (`t1ce`); empty where a case has one and nobody names it.
        files: one file or folder, or the slices of a series.
        part: which volume of a 4-D NIfTI.
        series: where it was found as DICOM.
    """

    name: str = ""
    files: tuple[Path, ...] = field(repr=False, default=())
    part: int | None = None
    series: Series | None = field(repr=False, default=None)


@dataclass(frozen=True, slots=True)
class Mask:
    """Labels as numbers on a grid: the study's own, or those that a data set gives names to (`{2: "tumour"}`)."""

    file: Path = field(repr=False)
    names: Mapping[int, str] | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """DICOM SEG or RTSTRUCT objects that were drawn on the series of the case."""

    files: tuple[Path, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class LidcReads:
    """LIDC-IDRI's XML of the series of the case."""

    file: Path = field(repr=False)


@dataclass(frozen=True, slots=True)
class Marks:
    """LUNA16: nodules and what counts neither way as points in the patient; and, for other studies, lungs as a mask.

    Attributes:
        nodules: None where nobody says which there are.
    """

    nodules: tuple[Mark, ...] | None = ()
    excluded: tuple[Mark, ...] = ()
    lungs: Path | None = field(repr=False, default=None)


@dataclass(frozen=True, slots=True)
class Shown:
    """What an image as a whole shows.

    Attributes:
        names: the classes that it shows, as the table has them.
        asked: the classes that somebody looked for; None where the table lists what an image shows, and all else it
            shows not.
    """

    names: tuple[str, ...]
    asked: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Boxes:
    """Rectangles around what was found; none is an image where somebody looked and found nothing."""

    boxes: tuple[Box, ...]


Label = Mask | Drawn | LidcReads | Marks | Shown | Boxes


@dataclass(frozen=True, slots=True)
class Case:
    """One image of one patient; only `key`, `split` and `row` may appear in logs.

    Attributes:
        key: 16 hex digits, an HMAC under the site's secret: says nothing to who has not the secret.
        label: None where there is none.
        row: in the manifest, as a spreadsheet counts; 0 for a case that came from elsewhere.
        structures: what the site calls things -> a label of the study, `background` or `ignore`.
        facts: other columns of the case's row in a table: classes, follow-up, covariates.
        marks: lesions that a table of their own tells, whatever `label` is.
    """

    key: str
    patient: str = field(repr=False)
    channels: tuple[Channel, ...]
    label: Label | None
    split: Split
    row: int = 0
    structures: Mapping[str, str] = field(repr=False, default_factory=dict)
    facts: Mapping[str, str] = field(repr=False, default_factory=dict)
    marks: Marks | None = None

    @property
    def where(self) -> str:
        """How a message to the data steward names it."""
        return f"row {self.row} (case {self.key})" if self.row else f"case {self.key}"


@dataclass(frozen=True, slots=True)
class Listing:
    """What a folder holds: its layout in words, its cases ordered by key, and what of it could not be used."""

    layout: str
    cases: tuple[Case, ...]
    findings: tuple[Finding, ...] = ()


def read_case(case: Case, channels: Sequence[str] = ()) -> Volume:
    """The image of a case: float32[C, I, J, K], the channels that the study names, in its order; or the colours of its
    one picture.

    Raises:
        ImageUnreadable: see `read_image`; MODALITY_MISMATCH, channels that the case has not;
            CHANNELS_APART, channels on different grids.
    """
    if (picture := _coloured(case, channels)) is not None:
        return read_colours(picture, channels)
    volumes = [_read(channel) for channel in _chosen(case, channels)]
    first = volumes[0]
    for other in volumes[1:]:
        same_shape = other.voxels.shape == first.voxels.shape
        if not same_shape or voxels_apart(first.voxels.shape[1:], other.affine_ras, first.affine_ras) > ON_GRID:
            raise ImageUnreadable(
                "the channels of the case lie on different grids. Register and resample them to one.", "CHANNELS_APART"
            )
    if len(volumes) == 1:
        return first
    return replace(first, voxels=np.concatenate([volume.voxels for volume in volumes]))


def read_case_labels(case: Case, volume: Volume, labels: Sequence[str]) -> Labels:
    """uint8[I, J, K] on the grid of `volume`: 0 background, k the study's labels[k - 1], 127 ignore.

    Raises:
        ImageUnreadable: LABEL_MISSING, LABEL_UNREADABLE, LABEL_VALUES, LABEL_GEOMETRY_MISMATCH, LABEL_EMPTY.
    """
    known = {*labels, "background", "ignore"}  # a site's mapping serves all its studies
    here = {name: label for name, label in case.structures.items() if label in known}
    wanted = numbered({label: label for label in labels} | here, labels)
    match case.label:
        case None:
            raise ImageUnreadable("the case has no labels, and a segmentation learns from them.", "LABEL_MISSING")
        case Mask(file, names):
            return _of_mask(file, names, volume, wanted, labels)
        case Drawn(files):
            return _of_objects(files, volume, wanted, labels)
        case LidcReads(file):
            return _of_reads(file, case.channels[0].series, volume, wanted)
        case Marks() as marks:
            return _of_marks(marks, volume, wanted)
        case Shown() | Boxes():
            what = "classes of the whole image" if isinstance(case.label, Shown) else "boxes"
            raise refused(
                "LABEL_MISSING",
                f"the case has {what}, and a segmentation learns from outlines. Add masks, or choose a study of "
                f"another task.",
            )


def files_of(case: Case) -> Iterator[Path]:
    """Every file and folder that reading the case opens, but for files that these name in turn."""
    for channel in case.channels:
        yield from channel.files
    match case.label:
        case Mask(file) | LidcReads(file):
            yield file
        case Drawn(files):
            yield from files
        case Marks(lungs=Path() as lungs):
            yield lungs


def state_of(case: Case) -> str:
    """12 hex digits that change when a file of the case does, or another file takes its place: by size, time and name,
    of all files behind a header too. A whole folder may move; names count from where the first image lies.

    Raises:
        ImageUnreadable: a file is gone or locked.
    """
    files = [*files_of(case)]
    try:
        states = [[_name(path, files[0].parent), _state(path)] for path in files]
    except OSError as e:
        raise ImageUnreadable(f"a file of it is gone or locked ({type(e).__name__})") from None
    channels = [[channel.name, channel.part, len(channel.files)] for channel in case.channels]
    label = repr(case.label if case.marks is None else (case.label, case.marks))
    told = [states, label, dict(case.structures), channels, dict(case.facts)]
    return sha256(canonical_json(told)).hexdigest()[:12]


def _name(path: Path, anchor: Path) -> str:
    return path.name if path.parent == anchor else os.path.relpath(path, anchor)


def _state(path: Path) -> list[list[int]]:
    if path.is_dir():
        walked = os.walk(path, onerror=_raised)
        below = sorted(Path(folder, name) for folder, _, names in walked for name in names)
    elif path.suffix.lower() in (".mhd", ".nhdr"):  # the voxels lie beside it, mostly under the same name
        beside = {each for each in path.parent.glob(f"{escape(path.stem)}.*") if each.is_file()}
        below = sorted(beside | set(_named_in(path)))
    else:
        below = [path]
    return [[stat.st_size, stat.st_mtime_ns] for stat in (each.stat() for each in below)]


def _raised(error: OSError) -> None:
    raise error


def _named_in(header: Path) -> list[Path]:
    """The file of voxels that a header names, whatever it is called; none that is not there."""
    with header.open("rb") as file:
        named = DATA_FILE.search(file.read(1 << 16))
    path = header.parent / named[1].decode("latin-1").strip() if named else header
    return [path] if "\0" not in str(path) and path.is_file() else []


def _coloured(case: Case, channels: Sequence[str]) -> Path | None:
    """The picture of a case that has one, where colours are asked for."""
    if not channels or not set(channels) <= set(COLOURS) or len(case.channels) != 1:
        return None
    only = case.channels[0]
    return only.files[0] if not only.name and len(only.files) == 1 and is_picture(only.files[0]) else None


def _read(channel: Channel) -> Volume:
    if channel.series is not None or len(channel.files) > 1:
        from fedclient.data.dicom import read_series  # half a second of codecs, for those who need them

        return read_series(channel.files)
    if channel.part is not None:
        return read_nifti(channel.files[0], channel.part)
    return read_image(channel.files[0])


def _chosen(case: Case, names: Sequence[str]) -> list[Channel]:
    if not names and len(case.channels) == 1:
        return list(case.channels)
    there = {_contrast(channel.name): channel for channel in case.channels}
    there |= {channel.name.casefold(): channel for channel in case.channels}
    wanted = [there.get(name.casefold()) or there.get(_contrast(name)) for name in names]
    found = [channel for channel in wanted if channel is not None]
    if not names or len(found) < len(names):
        asked = f"the channels {', '.join(names)}" if names else "one channel"
        listed = [channel.name for channel in case.channels]
        has = ", ".join(listed) if all(listed) else f"{len(listed)} without names"
        raise ImageUnreadable(
            f"the study wants {asked}, the case has {has}. Name the wanted ones in `channels` of the study.",
            code="MODALITY_MISMATCH",
        )
    return found


def _contrast(name: str) -> str:
    return CONTRASTS.get(name.casefold(), name.casefold())


def _of_mask(
    file: Path, names: Mapping[int, str] | None, volume: Volume, wanted: Mapping[str, int], labels: Sequence[str]
) -> Labels:
    if is_object(file):
        return _of_objects((file,), volume, wanted, labels)
    white = len(labels) == 1 if names is None else names.keys() - {IGNORE} == {1}
    stored = read_labels(file, like=volume, one_label=white)
    if names is None:
        allowed = {n: n for n in range(1, len(labels) + 1)}
    else:
        known = meanings(set(names.values()), {"background": 0, "ignore": IGNORE, **wanted})
        allowed = {n: known[name] for n, name in names.items() if name in known}
        if not set(allowed.values()) - {0, IGNORE}:
            raise refused(
                "LABEL_VALUES",
                f"the data set labels {', '.join(names.values())}; this study {', '.join(labels)}. Choose another "
                f"study, or map names with `structures` under [data] of site.toml.",
            )
    others = {n: name for n, name in (names or {}).items() if n not in allowed}
    try:
        return renumber(stored, allowed, others)
    except ImageUnreadable as e:
        means = dict(enumerate(labels, start=1)) if names is None else {n: names[n] for n in allowed}
        means = {0: "background"} | means | ({IGNORE: "ignore"} if IGNORE not in {*means, *others} else {})
        told = f" The data set has besides: {_listed(others)}. `structures` under [data] of site.toml can map them."
        told *= bool(others)
        if 255 in stored and not white and is_picture(file):
            told += " White (255) is no label where there are several. Number them in the picture as told here."
        raise refused("LABEL_VALUES", f"{e} This study allows: {_listed(means)}.{told}") from None


def _listed(names: Mapping[int, str]) -> str:
    return ", ".join(f"{n} = {name}" for n, name in names.items())


def _of_objects(files: Sequence[Path], volume: Volume, wanted: Mapped, labels: Sequence[str]) -> Labels:
    """SEG and RTSTRUCT, one on the other where there are several; the study's structures that they have."""
    from fedclient.data.rtstruct import read_regions, read_rtstruct
    from fedclient.data.seg import read_seg, read_segments

    painted = np.zeros(volume.voxels.shape[1:], np.uint8)
    drawn, before = list[Structure](), list[Labels]()
    for file in files:
        regions = object_kind(file) == "RTSTRUCT"
        found = (read_rtstruct if regions else read_seg)(file, volume, wanted, empty_ok=True)
        if ((painted > 0) & (found > 0) & (painted != found)).any():
            raise refused("LABEL_VALUES", "two label objects of the series say different things. Keep the valid one.")
        if any(_unlike(found, other) for other in before):
            raise refused(
                "LABEL_VALUES",
                "two label objects of the series outline one structure, and not alike, as two versions of it do. Keep "
                "the valid one.",
            )
        np.maximum(painted, found, out=painted)
        before.append(found)
        if not found.any():
            drawn += (read_regions if regions else read_segments)(file)[1]
    if not painted.any() and not any(numbers for _, numbers in choose(drawn, wanted, empty_ok=True)):
        raise refused(
            "LABEL_MISSING",
            f"none of the {len(drawn)} structures that were drawn is one of the study ({', '.join(labels)}). Map their "
            f"names with `structures` under [data] of site.toml.",
        )
    return painted


def _unlike(one: Labels, other: Labels) -> bool:
    """Whether two label maps overlap in a label without being the same in it; apart, they are two lesions."""
    shared = np.unique(one[(one > 0) & (one == other)])
    return any(not np.array_equal(one == value, other == value) for value in shared)


def _of_reads(file: Path, series: Series | None, volume: Volume, wanted: Mapping[str, int]) -> Labels:
    """Where half of LIDC's readers agree; nodules by their malignancy if the study labels that, else all alike."""
    from fedclient.data.lidc import read_lidc
    from fedclient.data.lidc_consensus import Verdict, lesions, lidc_labels, stored_series

    reads = read_lidc(file)
    if reads is None or series is None:
        raise refused("LABEL_UNREADABLE", "LIDC XML: it holds no reads of a CT series. Choose the one that does.")
    verdicts = cast(tuple[Verdict, ...], VERDICTS)
    values = {verdict: wanted.get(verdict, wanted.get("nodule", 127)) for verdict in verdicts}
    if set(values.values()) == {127}:
        raise refused("LABEL_VALUES", "LIDC labels are nodule, or benign and malignant; this study has other labels.")
    stored = stored_series(series, volume)
    return lidc_labels(lesions(reads, stored), stored, volume, values=values)


def _of_marks(marks: Marks, volume: Volume, wanted: Mapping[str, int]) -> Labels:
    """Balls where the study labels nodules; else its lungs."""
    if "nodule" in wanted:
        if marks.nodules is None:
            raise refused("LABEL_MISSING", "annotations.csv is not there, so nobody knows which nodules there are.")
        return spheres(marks.nodules, volume, value=wanted["nodule"], excluded=marks.excluded)
    if marks.lungs is None:
        raise refused("LABEL_MISSING", "there are no labels but nodules here: seg-lungs-LUNA16 lacks this scan.")
    lung = wanted.get("lung", 0)
    values = {
        LEFT_LUNG: wanted.get("left-lung", lung),
        RIGHT_LUNG: wanted.get("right-lung", lung),
        TRACHEA: wanted.get("trachea", 0),
    }
    if not any(values.values()):
        raise refused("LABEL_VALUES", "LUNA16 labels are nodule, or lung, left-lung, right-lung and trachea.")
    return lungs(read_labels(marks.lungs, like=volume), values)
