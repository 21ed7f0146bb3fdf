"""The results of one case in a folder of its own, which is there whole or not at all."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclient.predict.case import Prediction
from shared_models.errors import ImageUnreadable, StateInvalid
from shared_models.files import private_folder, replacing, write_atomic, write_json

if TYPE_CHECKING:  # a second of imports, for DICOM alone
    from pydicom import Dataset

    from fedclient.predict.headers import Headers

LIMITS = "maps show where a score reacts, not why, and not that the answer is right; see `fedclient explain`"
FORMATS = ("seg", "sr", "sc", "nifti", "json", "csv")


@dataclass(frozen=True, slots=True)
class Explanation:
    """One map of one answer.

    Attributes:
        number: of the answer, from 1.
        plane: that is shown; None of a network that sees volumes, whose picture is of the plane with most of the map.
        chance: of the answer in what is explained; `deviation`: over changed copies of it.
        layer: that Grad-CAM looked at.
        why: there is no picture; empty where there is one.
        picture: PNG.
    """

    number: int
    answer: str
    method: str
    plane: int | None
    chance: float | None = None
    deviation: float | None = None
    layer: str = ""
    why: str = ""
    picture: bytes | None = field(repr=False, default=None)

    @property
    def file(self) -> str | None:
        return None if self.picture is None else f"explained-{self.number}-{self.method}.png"


def write_case(
    prediction: Prediction,
    name: str,
    out: Path,
    formats: Sequence[str],
    *,
    overwrite: bool = False,
    explained: Sequence[Explanation] = (),
) -> tuple[list[str], dict[str, str]]:
    """Writes `out/name/`; returns the names of its files, and of what was asked for and cannot be made why not.

    Raises:
        StateInvalid: the folder is there, and `overwrite` is not said.
        ImageUnreadable: a DICOM header that bears none of the results that were asked for; slices in different frames
            of reference.
    """
    folder, part = out / name, out / f".{name}.part"
    if folder.exists() and not overwrite:
        raise StateInvalid(f"{folder}: there are results already. Give another folder with -o, or --overwrite.")
    shutil.rmtree(part, ignore_errors=True)
    private_folder(part)
    try:
        written, missing = _written(prediction, part, formats, explained)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return written, missing


def _written(
    prediction: Prediction, folder: Path, formats: Sequence[str], explained: Sequence[Explanation]
) -> tuple[list[str], dict[str, str]]:
    from fedclient.predict.results import facts, write_map, write_mask

    written: list[str] = []
    missing: dict[str, str] = {}
    refused: dict[str, ImageUnreadable] = {}
    if {"seg", "sr", "sc"} & set(formats):
        _dicom(prediction, folder, formats, written, missing, refused)
        missing.update({name: str(error) for name, error in refused.items()})
    ending = "png" if prediction.grid.picture else "nii.gz"
    if "nifti" in formats:
        if prediction.marks is None:
            missing["nifti"] = f"a {prediction.model.study.task.kind} marks no voxels"
        else:
            write_mask(prediction, folder / f"mask.{ending}")
            written.append(f"mask.{ending}")
            if prediction.uncertainty is not None and prediction.uncertainty.planes is not None:
                write_map(prediction, folder / f"uncertainty.{ending}")
                written.append(f"uncertainty.{ending}")
    for each in explained:
        if each.picture is None or each.file is None:
            missing[f"explanation of {each.answer} by {each.method}"] = each.why
        else:
            write_atomic(folder / each.file, each.picture)
            written.append(each.file)
    if "json" in formats:
        told = facts(prediction) | {"files": [*written, "result.json"], "not_written": missing}
        if explained:
            told["explanations"] = {"limits": LIMITS, "maps": [_map_told(each) for each in explained]}
        write_json(folder / "result.json", told)
        written.append("result.json")
    if refused and not written:
        raise next(iter(refused.values()))
    return written, missing


def _map_told(each: Explanation) -> dict[str, Any]:
    told = {key: value for key, value in asdict(each).items() if key not in ("picture", "number", "why")}
    return told | {"file": each.file}


def _dicom(
    prediction: Prediction,
    folder: Path,
    formats: Sequence[str],
    written: list[str],
    missing: dict[str, str],
    refused: dict[str, ImageUnreadable],
) -> None:
    source = prediction.source
    if source is None or source.series is None:
        missing.update(dict.fromkeys([name for name in ("seg", "sr") if name in formats], "the input is no DICOM"))
        if "sc" in formats:
            from fedclient.predict.overlay import overlay
            from fedclient.predict.results import write_png

            write_png(folder / "overlay.png", overlay(prediction))
            written.append("overlay.png")
        return
    from fedclient.predict.headers import read_headers
    from fedclient.predict.segments import segments_of

    headers = read_headers(source)
    segments = segments_of(prediction) if prediction.marks is not None else ()
    made: Dataset | None = None
    if "seg" in formats and (why := _unsegmented(prediction, headers)):
        missing["seg"] = why
    elif "seg" in formats:
        from fedclient.predict.dicom_seg import segmentation

        with _alone("seg", refused):
            drawn = segmentation(prediction, headers, segments)
            with replacing(folder / "segmentation.dcm") as file:
                drawn.save(file)
            made = drawn.head
            written.append("segmentation.dcm")
    if "sr" in formats:
        from fedclient.predict.dicom_sr import report

        with _alone("sr", refused):
            _save(report(prediction, headers, segments, made), folder / "report.dcm")
            written.append("report.dcm")
    if "sc" in formats:
        from fedclient.predict.dicom_sc import capture
        from fedclient.predict.overlay import overlay

        with _alone("sc", refused):
            _save(capture(prediction, headers, overlay(prediction)), folder / "overlay.dcm")
            written.append("overlay.dcm")


def _unsegmented(prediction: Prediction, headers: "Headers") -> str:
    """Why there can be no segmentation; empty where there can."""
    if prediction.marks is None:
        return f"a {prediction.model.study.task.kind} marks no voxels"
    if not headers.frames_placed:
        return "its frames do not say where they lie, each for itself, as those of enhanced images do; see the mask"
    return "" if headers.in_space else "the image lies in no frame of reference, as radiographs do; see the mask"


@contextmanager
def _alone(name: str, refused: dict[str, ImageUnreadable]) -> Iterator[None]:
    """One format, so that a header that does not bear it costs no other."""
    try:
        yield
    except ImageUnreadable as error:
        refused[name] = error


def _save(data: "Dataset", path: Path) -> None:
    with replacing(path) as file:
        data.save_as(file, enforce_file_format=True)
