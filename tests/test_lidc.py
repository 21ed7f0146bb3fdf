"""LIDC's XML: what four readers drew, hand-computed consensus, and XML that means harm."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedclient.data.lidc import Nodule, Outline, Reads, read_lidc
from fedclient.data.lidc_consensus import Lesion, StoredSeries, lesions, lidc_labels
from fedclient.data.safe_xml import read_xml
from fedclient.data.volume import Volume
from shared_models.errors import ImageUnreadable

DATA = Path(os.environ.get("FEDIMAGING_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
BOXES = DATA / "ct_lesion_dicom" / "philips_brilliance16_harbin_cn" / "annotations_xml"
# A scan of 12 x 10 pixels and 4 slices, stored as scanners do: columns to the left, rows to the back.
STORED_RAS = np.array([[-0.5, 0, 0, 20], [0, -0.5, 0, 30], [0, 0, 2.5, -100], [0, 0, 0, 1]])
SERIES = StoredSeries("1.2.3", ("1.1", "1.2", "1.3", "1.4"), (-100, -97.5, -95, -92.5), 12, 10, STORED_RAS, 2.5)
# The same scan in RAS: first and second axis turned.
IMAGE = Volume(
    np.zeros((1, 12, 10, 4), np.float32),
    np.array([[0.5, 0, 0, 14.5], [0, 0.5, 0, 25.5], [0, 0, 2.5, -100], [0, 0, 0, 1]]),
)
SCORES = "<characteristics><subtlety>4</subtlety><malignancy>{}</malignancy></characteristics>"


def refusal(code: str, call: Callable[..., object], *args: Any) -> str:
    with pytest.raises(ImageUnreadable) as e:
        call(*args)
    assert e.value.code == code, str(e.value)
    return str(e.value)


def square(first: tuple[int, int], last: tuple[int, int]) -> list[tuple[int, int]]:
    """The pixels around a rectangle's edge, in order."""
    (x0, y0), (x1, y1) = first, last
    top, right = [(x, y0) for x in range(x0, x1)], [(x1, y) for y in range(y0, y1)]
    return [*top, *right, *((x, y1) for x in range(x1, x0, -1)), *((x0, y) for y in range(y1, y0, -1))]


def roi(points: list[tuple[int, int]], sop: str = "1.2", z: float = -97.5, inclusion: str = "TRUE") -> str:
    edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
    return (
        f"<roi><imageZposition>{z}</imageZposition><imageSOP_UID>{sop}</imageSOP_UID>"
        f"<inclusion>{inclusion}</inclusion>{edges}</roi>"
    )


def nodule(*rois: str, scores: str = SCORES.format(4)) -> str:
    return f"<unblindedReadNodule><noduleID>N</noduleID>{scores}{''.join(rois)}</unblindedReadNodule>"


def xml(*sessions: str) -> str:
    body = "".join(f"<readingSession>{session}</readingSession>" for session in sessions)
    return (
        '<?xml version="1.0"?><LidcReadMessage uid="1" xmlns="http://www.nih.gov"><ResponseHeader>'
        f"<SeriesInstanceUid> 1.2.3 </SeriesInstanceUid></ResponseHeader>{body}</LidcReadMessage>"
    )


def read(folder: Path, text: str) -> Reads:
    path = folder / "lidc.xml"
    path.write_text(text)
    reads = read_lidc(path)
    assert reads is not None
    return reads


def drawn(found: tuple[Lesion, ...]) -> NDArray[np.uint8]:
    """Labels as stored: [columns, rows, slices]."""
    return lidc_labels(found, SERIES, IMAGE)[::-1, ::-1]


def one_outline(reader: int, x: int, y: int, scores: dict[str, int] | None = None) -> Nodule:
    points = np.array(square((x, y), (x + 2, y + 2)))
    return Nodule(reader, (Outline("1.2", -97.5, points, True),), scores or {})


def test_an_edge_map_runs_through_the_first_pixels_outside(tmp_path: Path) -> None:
    reads = read(tmp_path, xml(nodule(roi(square((2, 3), (6, 6))))))
    (lesion,) = lesions(reads, SERIES)
    expected = np.zeros((12, 10, 4), np.uint8)
    expected[3:6, 4:6, 1] = 1  # columns 3 to 5, rows 4 and 5: the line itself is not the nodule's
    assert (drawn((lesion,)) == expected).all()
    assert lidc_labels((lesion,), SERIES, IMAGE)[11 - 3, 9 - 4, 1] == 1  # (column 3, row 4) in RAS


def test_consensus_is_what_half_of_the_readers_present_see(tmp_path: Path) -> None:
    a = nodule(roi(square((1, 1), (5, 5))), scores=SCORES.format(5))  # columns 2-4, rows 2-4
    b = nodule(roi(square((2, 1), (6, 5))), scores=SCORES.format(4))  # columns 3-5, rows 2-4
    c = nodule(roi(square((2, 2), (6, 6))), scores=SCORES.format(3))  # columns 3-5, rows 3-5
    reads = read(tmp_path, xml(a, b, c, ""))  # the fourth saw nothing
    assert reads.readers == 4
    (lesion,) = lesions(reads, SERIES)
    # rows 2 3 4 5 of columns 2, 3, 4, 5, counted by hand
    votes = np.array([[1, 1, 1, 0], [2, 3, 3, 1], [2, 3, 3, 1], [1, 2, 2, 1]])
    assert (lesion.votes[1:5, 1:5, 0] == votes).all()
    assert lesion.votes.sum() == votes.sum()
    assert (drawn((lesion,))[2:6, 2:6, 1] == (votes >= 2)).all()
    assert drawn((lesion,)).sum() == (votes >= 2).sum()
    assert (lesion.marked, lesion.present, lesion.malignancy, lesion.verdict) == (3, 4, 4, "malignant")


@pytest.mark.parametrize(
    ("scores", "median", "verdict"),
    [
        ((1, 2, 4, 5), 3, "indeterminate"),
        ((2, 3, 3), 3, "indeterminate"),
        ((1, 2, 3), 2, "benign"),
        ((3, 4), 3.5, "malignant"),
    ],
)
def test_malignancy_is_the_median_and_three_decides_nothing(
    scores: tuple[int, ...], median: float, verdict: str
) -> None:
    nodules = tuple(one_outline(n, 2, 2, {"malignancy": score}) for n, score in enumerate(scores))
    (lesion,) = lesions(Reads("1.2.3", 4, nodules, ()), SERIES)
    assert (lesion.malignancy, lesion.verdict) == (median, verdict)
    values = {"benign": 1, "malignant": 2, "indeterminate": 127, "unrated": 0}
    labels = lidc_labels((lesion,), SERIES, IMAGE, values=values)  # type: ignore[arg-type]
    assert set(np.unique(labels)) == {0, values[verdict]}


def test_a_nodule_that_nobody_scored_is_unrated() -> None:
    (lesion,) = lesions(Reads("1.2.3", 1, (one_outline(0, 2, 2),), ()), SERIES)
    assert (lesion.malignancy, lesion.verdict) == (None, "unrated")


def test_holes_are_cut_out_after_all_else_is_joined(tmp_path: Path) -> None:
    outer, hole = roi(square((0, 0), (8, 8))), roi(square((2, 2), (6, 6)), inclusion="FALSE")
    for order in ((outer, hole), (hole, outer)):
        (lesion,) = lesions(read(tmp_path, xml(nodule(*order))), SERIES)
        expected = np.zeros((12, 10), np.uint8)
        expected[1:8, 1:8] = 1
        expected[3:6, 3:6] = 0
        assert (drawn((lesion,))[:, :, 1] == expected).all()


def test_outlines_nearer_than_a_slice_are_one_lesion_and_others_are_not() -> None:
    # pixels are 0.5 mm: the near ones are 2.5 mm apart, which is the thickness; the far ones 3 mm
    near = Reads("1.2.3", 2, (one_outline(0, 0, 0), one_outline(1, 7, 0)), ())
    far = Reads("1.2.3", 2, (one_outline(0, 0, 0), one_outline(1, 8, 0)), ())
    assert [len(lesions(reads, SERIES)) for reads in (near, far)] == [1, 2]
    apart = replace(one_outline(1, 0, 0), outlines=(Outline("1.3", -95, np.array(square((0, 0), (2, 2))), True),))
    assert len(lesions(Reads("1.2.3", 2, (one_outline(0, 0, 0), apart), ()), SERIES)) == 1  # on the next slice


def test_the_tolerance_shrinks_while_more_outlines_than_readers_hang_together() -> None:
    # four readers mark two nodules 2 mm apart (4 pixels): together at 2.5 mm, apart once 2.5 * 0.9^3 = 1.82 mm
    pair = tuple(one_outline(reader, x, 3) for reader in range(4) for x in (0, 6))
    found = lesions(Reads("1.2.3", 4, pair, ()), SERIES)
    assert [lesion.marked for lesion in found] == [4, 4]
    three = tuple(one_outline(reader, x, 3) for reader in range(2) for x in (0, 6))
    assert len(lesions(Reads("1.2.3", 2, three, ()), SERIES)) == 1  # four outlines may be four readers'


def test_a_reader_who_drew_a_nodule_twice_has_one_vote() -> None:
    same = tuple(one_outline(reader, 2, 2) for reader in (0, 0, 0, 0, 0, 0))
    (lesion,) = lesions(Reads("1.2.3", 4, same, ()), SERIES)
    assert (lesion.marked, int(lesion.votes.max())) == (1, 1)


def test_a_slice_is_found_by_its_uid_first_and_by_its_height_second(tmp_path: Path) -> None:
    wrong_height = roi(square((1, 1), (4, 4)), sop="1.4", z=-100)
    unknown_uid = roi(square((1, 1), (4, 4)), sop="9.9", z=-96.0)
    for text, n in ((wrong_height, 3), (unknown_uid, 2)):
        labels = drawn(lesions(read(tmp_path, xml(nodule(text))), SERIES))
        assert np.flatnonzero(labels.any(axis=(0, 1))).tolist() == [n]
    lost = nodule(roi(square((1, 1), (4, 4)), sop="9.9", z=-80), roi(square((1, 1), (4, 4))))
    assert "1 outlines" in refusal("LABEL_GEOMETRY_MISMATCH", lesions, read(tmp_path, xml(lost)), SERIES)


def test_marks_of_another_series_or_beyond_the_slice_are_refused(tmp_path: Path) -> None:
    reads = read(tmp_path, xml(nodule(roi(square((1, 1), (12, 4))))))
    refusal("LABEL_GEOMETRY_MISMATCH", lesions, reads, SERIES)
    other = replace(SERIES, series_uid="1.2.4")
    message = refusal("LABEL_GEOMETRY_MISMATCH", lesions, read(tmp_path, xml()), other)
    assert "1.2.3" not in message
    assert "1.2.3" not in repr(reads)


def test_small_nodules_non_nodules_and_stray_clicks_are_told_apart(tmp_path: Path) -> None:
    zeros = SCORES.format(0).replace("4", "0")
    small = nodule(roi([(4, 5)]), scores="")
    zeroed = nodule(roi([(6, 7)]), scores=zeros)
    scored = nodule(roi([(8, 8)]))  # scores do not make a point an outline
    stray = nodule(roi(square((1, 1), (4, 4))), roi([(9, 9)], sop="1.3"))
    other = (
        "<nonNodule><nonNoduleID>1</nonNoduleID><imageZposition>-95</imageZposition><imageSOP_UID>1.3</imageSOP_UID>"
        "<locus><xCoord>3</xCoord><yCoord>4</yCoord></locus></nonNodule>"
    )
    reads = read(tmp_path, xml(small + zeroed + scored, stray + other))
    assert [(s.reader, s.kind, s.column, s.row) for s in reads.spots] == [
        (0, "small-nodule", 4, 5),
        (0, "small-nodule", 6, 7),
        (0, "small-nodule", 8, 8),
        (1, "non-nodule", 3, 4),
    ]
    assert [len(n.outlines) for n in reads.nodules] == [1]
    assert reads.nodules[0].scores == {"subtlety": 4, "malignancy": 4}


def test_reads_of_a_chest_film_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "film.xml"
    path.write_text('<IdriReadMessage xmlns="http://www.nih.gov/idri"/>')
    assert read_lidc(path) is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("<html/>", "LABEL_UNREADABLE"),
        ("no XML", "LABEL_UNREADABLE"),
        ("", "LABEL_UNREADABLE"),
        (xml(nodule(roi(square((1, 1), (4, 4)))))[:300], "LABEL_UNREADABLE"),
        (xml().replace("1.2.3", ""), "LABEL_UNREADABLE"),
        (xml(nodule(roi(square((1, 1), (4, 4))), scores=SCORES.format(6))), "LABEL_VALUES"),
        (xml(nodule(roi(square((1, 1), (4, 4))), scores=SCORES.format("five"))), "LABEL_VALUES"),
        (xml(nodule(roi(square((1, 1), (4, 4)), inclusion="PERHAPS"))), "LABEL_VALUES"),
        (xml(nodule(roi([]))), "LABEL_VALUES"),
        (xml(nodule(roi([(1, 1)]).replace("<xCoord>1", "<xCoord>1.5"))), "LABEL_VALUES"),
        (xml(nodule(roi([(1, 1)]).replace("-97.5", "nan"))), "LABEL_VALUES"),
        (xml("<nonNodule/>"), "LABEL_VALUES"),
    ],
)
def test_broken_marks_are_refused_by_reader_and_number(tmp_path: Path, text: str, code: str) -> None:
    path = tmp_path / "DOE.xml"
    path.write_text(text)
    message = refusal(code, read_lidc, path)
    assert "DOE" not in message
    if code == "LABEL_VALUES":
        assert "reader 1" in message


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
HOSTILE = {
    "billion laughs": f'<!DOCTYPE l [<!ENTITY l0 "lol">{LAUGHS}]><LidcReadMessage>&l9;</LidcReadMessage>',
    "quadratic": f'<!DOCTYPE l [<!ENTITY a "{"a" * 50_000}">]><LidcReadMessage>{"&a;" * 5000}</LidcReadMessage>',
    "external entity": '<!DOCTYPE l [<!ENTITY x SYSTEM "{file}">]><LidcReadMessage>&x;</LidcReadMessage>',
    "external type": '<!DOCTYPE LidcReadMessage SYSTEM "{file}"><LidcReadMessage/>',
    "parameter entity": '<!DOCTYPE l [<!ENTITY % x SYSTEM "{file}"> %x;]><LidcReadMessage/>',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_document_type_is_refused_before_anything_in_it_is_looked_at(
    tmp_path: Path, attack: str, encoding: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("JANE DOE")
    path = tmp_path / "hostile.xml"
    path.write_bytes(HOSTILE[attack].replace("{file}", secret.as_uri()).encode(encoding))
    message = refusal("LABEL_UNREADABLE", read_lidc, path)
    assert "document type" in message
    assert "DOE" not in message


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.xml"
    path.write_text("<a>" * 200_000 + "</a>" * 200_000)
    assert "nest" in refusal("LABEL_UNREADABLE", read_xml, path, "LIDC XML")


@pytest.mark.skipif(
    not BOXES.is_dir(), reason=f"no real annotations: {DATA} lacks ct_lesion_dicom; set FEDIMAGING_DATA to its folder"
)
def test_real_xml_of_another_kind_is_no_reads_of_lidc() -> None:
    paths = sorted(BOXES.glob("*.xml"))
    assert len(paths) == 6
    for path in paths:
        refusal("LABEL_UNREADABLE", read_lidc, path)
