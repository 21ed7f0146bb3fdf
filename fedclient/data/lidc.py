"""LIDC-IDRI's XML: what up to four radiologists drew on a CT series, each alone (Armato et al. 2011, II.C).

Nodules of 3 mm and more have an outline on every slice and nine scores; smaller ones, and things that are none, have
a point. `lidc_consensus.py` makes lesions and labels of them.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from fedclient.data.labels import refused
from fedclient.data.safe_xml import read_xml

WHAT = "LIDC XML"
READERS = 4
FILM = "film"
HEAD_BYTES = 1 << 14  # the header of a file has one tenth of them
SCORES = {  # highest; all begin at 1
    "subtlety": 5, "internalStructure": 4, "calcification": 6, "sphericity": 5, "margin": 5, "lobulation": 5,
    "spiculation": 5, "texture": 5, "malignancy": 5,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outline:
    """One closed line on one slice, through the first pixels outside of what it encloses.

    Attributes:
        z_mm: ImagePositionPatient's third number, as the reader's workstation had it.
        points: int64[n, 2]; column and row of the stored image, (0, 0) the top left pixel.
        inclusion: whether what it encloses belongs to the nodule, or is a hole in it.
    """

    sop_uid: str = field(repr=False)
    z_mm: float
    points: NDArray[np.int64]
    inclusion: bool


@dataclass(frozen=True, slots=True)
class Nodule:
    """A nodule of 3 mm or more as one reader drew it.

    Attributes:
        reader: from 0, in the order of the file; reader 0 of another file is somebody else.
        scores: those of SCORES that the reader gave; spiculation and lobulation were used the other way round in
            about 100 of the first 399 cases.
    """

    reader: int
    outlines: tuple[Outline, ...]
    scores: dict[str, int]


@dataclass(frozen=True, slots=True)
class Spot:
    """The middle of a nodule below 3 mm, or of something of 3 mm or more that is no nodule."""

    reader: int
    kind: Literal["small-nodule", "non-nodule"]
    sop_uid: str = field(repr=False)
    z_mm: float
    column: int
    row: int


@dataclass(frozen=True, slots=True)
class Reads:
    """All that the readers of one CT series marked; `readers` counts those who marked nothing too."""

    series_uid: str = field(repr=False)
    readers: int
    nodules: tuple[Nodule, ...]
    spots: tuple[Spot, ...]


def series_of(path: Path) -> str:
    """The UID of the CT series that an XML file is about, by its first bytes; FILM for the reads of a chest film.

    Raises:
        ImageUnreadable: LABEL_UNREADABLE, XML of another kind, or without a series.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as e:
        raise refused("LABEL_UNREADABLE", f"{WHAT}: the file cannot be read ({type(e).__name__}).") from None
    if b"IdriReadMessage" in head:
        return FILM
    named = re.search(rb"<SeriesInstanceU[iI]d>\s*([0-9.]{1,64})\s*<", head)
    if b"LidcReadMessage" not in head or named is None:
        raise refused("LABEL_UNREADABLE", f"{WHAT}: the file is XML of another kind, or names no SeriesInstanceUid.")
    return named[1].decode()


def read_lidc(path: Path) -> Reads | None:
    """The marks in one XML file; None for the reads of a chest film (IdriReadMessage), which lie beside the CT's.

    Raises:
        ImageUnreadable: LABEL_UNREADABLE, no LIDC XML; LABEL_VALUES, a score or a number that cannot be.
    """
    root = read_xml(path, WHAT)
    if root.tag == "IdriReadMessage":
        return None
    if root.tag != "LidcReadMessage":
        raise refused("LABEL_UNREADABLE", f"{WHAT}: the file is XML of another kind. Choose LIDC-IDRI's.")
    series_uid = _text(root, "ResponseHeader/SeriesInstanceUid")
    if not series_uid:
        raise refused("LABEL_UNREADABLE", f"{WHAT}: it names no SeriesInstanceUid. Copy it again from the archive.")
    sessions = root.findall("readingSession")
    nodules: list[Nodule] = []
    spots: list[Spot] = []
    for reader, session in enumerate(sessions):
        for number, element in enumerate(session.findall("unblindedReadNodule"), start=1):
            try:
                mark = _marked(element, reader)
            except ValueError:
                raise refused(
                    "LABEL_VALUES",
                    f"{WHAT}: nodule {number} of reader {reader + 1} has a score or a position that cannot be. "
                    f"Copy it again from the archive.",
                ) from None
            if isinstance(mark, Nodule):
                nodules.append(mark)
            elif mark is not None:
                spots.append(mark)
        for number, element in enumerate(session.findall("nonNodule"), start=1):
            try:
                spots.append(_spot(element, element.find("locus"), reader, "non-nodule"))
            except ValueError:
                raise refused(
                    "LABEL_VALUES",
                    f"{WHAT}: non-nodule {number} of reader {reader + 1} has no position. "
                    f"Copy it again from the archive.",
                ) from None
    return Reads(series_uid, len(sessions), tuple(nodules), tuple(spots))


def _marked(element: Element, reader: int) -> Nodule | Spot | None:
    """A nodule if it is outlined and scored; a spot if it is a point; None if there is nothing."""
    outlines = [_outline(roi) for roi in element.findall("roi")]
    scores, zeros = _scores(element.find("characteristics"))
    drawn = tuple(outline for outline in outlines if len(outline.points) > 1)  # single points in it are stray clicks
    if drawn and not zeros:
        return Nodule(reader, drawn, scores)
    if not outlines:
        return None
    first = outlines[0]
    column, row = np.rint(first.points.mean(axis=0)).astype(int)
    return Spot(reader, "small-nodule", first.sop_uid, first.z_mm, int(column), int(row))


def _outline(roi: Element) -> Outline:
    points = [(int(_text(edge, "xCoord")), int(_text(edge, "yCoord"))) for edge in roi.findall("edgeMap")]
    inclusion = _text(roi, "inclusion").upper()
    if not points or inclusion not in ("TRUE", "FALSE"):
        raise ValueError
    corners = np.array(points, np.int64)
    if len(corners) > 1 and (corners[0] == corners[-1]).all():
        corners = corners[:-1]
    return Outline(_text(roi, "imageSOP_UID"), _mm(roi), corners, inclusion == "TRUE")


def _scores(element: Element | None) -> tuple[dict[str, int], bool]:
    """The scores given, and whether the reader gave none although the file has room for them (all are 0)."""
    stated = {name: text for name in SCORES if element is not None and (text := _text(element, name))}
    scores = {name: int(text) for name, text in stated.items()}
    if any(not 0 <= score <= SCORES[name] for name, score in scores.items()):
        raise ValueError
    given = {name: score for name, score in scores.items() if score}
    return given, bool(scores) and not given


def _spot(element: Element, locus: Element | None, reader: int, kind: Literal["small-nodule", "non-nodule"]) -> Spot:
    if locus is None:
        raise ValueError
    column, row = int(_text(locus, "xCoord")), int(_text(locus, "yCoord"))
    return Spot(reader, kind, _text(element, "imageSOP_UID"), _mm(element), column, row)


def _mm(element: Element) -> float:
    height = float(_text(element, "imageZposition"))
    if not np.isfinite(height):
        raise ValueError
    return height


def _text(element: Element, name: str) -> str:
    return (element.findtext(name) or "").strip()
