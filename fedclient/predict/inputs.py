"""What is to be predicted on: files, folders and series as sources, under names that say nothing of a patient"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from fedclient.data.cases import Case, Channel
from fedclient.data.formats import HEAD_BYTES, Format, format_of, is_dicom, suffix
from fedclient.data.stack import Series
from fedclient.data.where import files_below
from shared_models.errors import ImageUnreadable
from shared_models.study import Study

IMAGES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Source:
    """One image to predict on.

    Attributes:
        name: of its results: a counter where it is one of many, and 12 hex digits of its series or path.
        case: as readers want it.
        given: which of the inputs it came from, from 1; for messages, which hold no path.
        kind: the format of its first file.
    """

    name: str
    case: Case = field(repr=False)
    given: int
    kind: Format

    @property
    def series(self) -> Series | None:
        return self.case.channels[0].series

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for channel in self.case.channels for path in channel.files)


@dataclass(frozen=True, slots=True)
class Unread:
    """What cannot become a source, and why."""

    name: str
    given: int
    code: str
    why: str


@dataclass(slots=True)
class Inputs:
    """What the inputs hold, as it is found.

    Attributes:
        passed: how many files of a folder were passed over, by kind: they are no images.
    """

    passed: Counter[str]
    found: list[Source | Unread]


def list_inputs(paths: Sequence[Path], study: Study) -> Inputs:
    """Sources in the order of `paths`; DICOM files that are named one by one are put together by their series.

    A folder holds any number of series and images at any depth. Where the study sees several channels, the files of a
    case are those of one folder whose names end in a channel's (`x_t1ce.nii.gz`, or `x_0001.nii.gz` by number).
    """
    inputs = Inputs(Counter(), [])
    lone: list[tuple[int, Path]] = []
    for given, path in enumerate(paths, start=1):
        try:
            if path.is_dir():
                _folder(path, given, study, inputs)
            elif not path.is_file():  # a pipe would be waited for without end
                raise ImageUnreadable("there is no such file or folder.", "FILE_MISSING")
            elif format_of(path) == "dicom":
                lone.append((given, path))
            elif _in_files(study):
                raise ImageUnreadable(
                    f"the study sees {', '.join(study.channels)} together: give the folder that holds them all.",
                    "MODALITY_MISMATCH",
                )
            else:
                inputs.found.append(_image(path, path.name, given, study))
        except ImageUnreadable as e:
            inputs.found.append(Unread(_name("input", path), given, e.code, str(e)))
    if lone:
        _series([path for _, path in lone], {path: given for given, path in lone}, 0, study, inputs)
    taken: Counter[str] = Counter()
    for n, each in enumerate(inputs.found):
        taken[each.name] += 1
        if taken[each.name] > 1:  # files of one name in two folders
            inputs.found[n] = replace(each, name=f"{each.name}-{taken[each.name]}")
    return inputs


def source_of(path: Path, study: Study) -> Source:
    """The one image that a file or folder holds.

    Raises:
        ImageUnreadable: none, or more than one.
    """
    found = list_inputs([path], study).found
    for each in found:
        if isinstance(each, Unread):
            raise ImageUnreadable(each.why, each.code)
    sources = [each for each in found if isinstance(each, Source)]
    if len(sources) != 1:
        raise ImageUnreadable(
            f"the folder holds {len(sources)} images; one is wanted. Give each a folder of its own.", "SERIES_MIXED"
        )
    return sources[0]


def _folder(folder: Path, given: int, study: Study, inputs: Inputs) -> None:
    root = folder.resolve()
    ignored: Counter[str] = Counter()
    dicoms: list[Path] = []
    images: list[Path] = []
    for path in files_below(root, ignored):
        if path.name.startswith("."):
            ignored["hidden"] += 1
        elif suffix(path) == ".dcm" or _is_dicom(path):
            dicoms.append(path)
        elif suffix(path) in IMAGES:
            images.append(path)
        else:
            ignored["not an image"] += 1
    before = len(inputs.found)
    if dicoms:
        _series(dicoms, {}, given, study, inputs)
    if _in_files(study):
        _channelled(images, root, given, study, inputs)
    else:
        inputs.found += [_image(path, path.relative_to(root).as_posix(), given, study) for path in images]
    inputs.passed.update(ignored)
    if len(inputs.found) == before:
        raise ImageUnreadable(
            "the folder holds no image. Read are DICOM, NIfTI, MetaImage, NRRD, PNG, JPEG and TIFF.", "FILE_MISSING"
        )


def _series(paths: Sequence[Path], givens: dict[Path, int], given: int, study: Study, inputs: Inputs) -> None:
    from fedclient.data.dicom_folder import series_among  # a second of pydicom, for those who need it

    found = series_among(paths, inputs.passed)
    inputs.passed["object"] += len(found.objects)
    for path, error in found.unreadable.items():
        inputs.found.append(Unread(_name("file", path), givens.get(path, given), error.code, str(error)))
    if not found.series and found.objects and not found.unreadable:
        why = f"DICOM: {len(found.objects)} objects and no image among them. Give the series itself."
        inputs.found.append(Unread("objects", given, "MODALITY_MISMATCH", why))
    for series in found.series:
        name = f"series-{_digest(series.uid or series.files[0].name)}"
        at = givens.get(series.files[0], given)
        if study.in_colour or _in_files(study):
            as_what = "it as PNG or JPEG" if study.in_colour else "them as NIfTI"
            why = f"a DICOM series is one picture, the study sees {', '.join(study.channels)}. Give {as_what}."
            inputs.found.append(Unread(name, at, "MODALITY_MISMATCH", why))
        else:
            inputs.found.append(_source(name, (Channel(_only(study), series.files, series=series),), at, "dicom"))


def _channelled(images: Sequence[Path], root: Path, given: int, study: Study, inputs: Inputs) -> None:
    """A case for each folder and beginning of names."""
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in images:
        stem = path.name[: -len(suffix(path))]
        parts = re.fullmatch(r"(.*?)[_\-.]?([A-Za-z0-9]+)", stem)
        head, tail = (parts[1], parts[2].lower()) if parts else ("", stem.lower())
        number = re.fullmatch(r"\d{4}", tail)
        if number and int(tail) < len(study.channels):
            tail = study.channels[int(tail)]
        groups.setdefault((path.parent, head), {})[tail] = path
    for (folder, head), files in groups.items():
        relative = (folder / head).relative_to(root).as_posix()
        channels = tuple(Channel(name, (path,)) for name, path in files.items())
        inputs.found.append(
            _source(f"image-{_digest(relative)}", channels, given, format_of(next(iter(files.values()))))
        )


def _image(path: Path, told: str, given: int, study: Study) -> Source | Unread:
    try:
        return _source(f"image-{_digest(told)}", (Channel(_only(study), (path,)),), given, format_of(path))
    except ImageUnreadable as e:
        return Unread(f"image-{_digest(told)}", given, e.code, str(e))


def _source(name: str, channels: tuple[Channel, ...], given: int, kind: Format) -> Source:
    return Source(name, Case(name, "", channels, None, "test"), given, kind)


def _only(study: Study) -> str:
    """What the one picture of a case is called where the study asks for it by name."""
    return study.channels[0] if study.channels and not study.in_colour else ""


def _in_files(study: Study) -> bool:
    """Whether a case has a file for each of several channels."""
    return len(study.channels) > 1 and not study.in_colour


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(HEAD_BYTES))
    except OSError:
        return False


def _name(what: str, path: Path) -> str:
    return f"{what}-{_digest(path.name)}"


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
