"""LIDC-IDRI: CT series as DICOM in any of the archive's folder trees, and the readers' XML beside them or apart.

Nothing is known by its folder: the archive has renamed them twice. XML and series find each other by the UID in both.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from fedclient.data.cases import LidcReads, Listing
from fedclient.data.findings import Finding, finding
from fedclient.data.layouts.peek import Peek
from fedclient.data.layouts.series import cases_of, chosen, gather
from fedclient.data.lidc import FILM, series_of
from fedclient.data.stack import TOLERANCE_MM, Series, Slice, along_normal
from fedclient.data.where import Where, files_below
from shared_models.errors import ImageUnreadable


def found(seen: Peek) -> bool:
    return seen.lidc and seen.dicom


def cases(where: Where, salt: str) -> Listing:
    """A case for each CT series, with the reads that name it.

    Raises:
        ImageUnreadable: PATH_ESCAPE, for a link out of the folder.
    """
    held = gather(where.folder)
    series = [_one_a_place(each) for each in held.series]
    reads, of_reads = _reads(where.folder.resolve())
    kept, of_series = chosen(series, [n for n, each in enumerate(series) if each.uid in reads])
    scans = [n for n in kept if series[n].modality == "CT"]
    if len(scans) < len(kept):
        of_series.append(finding("SERIES_LEFT_OUT", f"{len(kept) - len(scans)} series that are no CT (chest films)"))
    if away := len(reads.keys() - {series[n].uid for n in scans}):
        what = f"{away} XML files are of CT series that are not here"
        of_reads.append(finding("LABEL_ORPHAN", what, severity="note"))
    labels = {n: LidcReads(reads[series[n].uid]) for n in scans if series[n].uid in reads}
    listed, of_patients = cases_of(series, scans, labels, salt)
    findings = (*held.findings, *of_series, *of_reads, *of_patients)
    return Listing(f"LIDC-IDRI, {len(listed)} CT series", listed, findings)


def _reads(root: Path) -> tuple[dict[str, Path], list[Finding]]:
    """The XML file of each series; a series of which two files say different things has none."""
    named: defaultdict[str, dict[bytes, Path]] = defaultdict(dict)
    findings: list[Finding] = []
    for path in files_below(root, Counter()):
        if path.suffix.lower() != ".xml" or path.name.startswith("."):
            continue
        try:
            uid = series_of(path)
        except ImageUnreadable as e:
            findings.append(finding("LABEL_UNREADABLE", f"an XML file was left out: {e}", severity="warn"))
            continue
        if uid != FILM:
            named[uid].setdefault(sha256(path.read_bytes()).digest(), path)
    torn = sum(len(files) > 1 for files in named.values())
    if torn:
        what = f"the readers' XML of {torn} series is there in two versions, so that their nodules are not known"
        findings.append(finding("LABEL_VALUES", what))
    return {uid: next(iter(files.values())) for uid, files in named.items() if len(files) == 1}, findings


def _one_a_place(series: Series) -> Series:
    """Of slices in one place, which some of the archive's series hold twice, the one of the lower instance number."""
    planes = [each.where for each in series.slices if each.where is not None]
    if len(planes) < len(series.slices):
        return series
    kept: list[tuple[float, Slice]] = []
    pairs = zip(along_normal(planes).tolist(), series.slices, strict=True)
    for height, each in sorted(pairs, key=lambda pair: (pair[0], pair[1].instance_number or 0)):
        if kept and height - kept[-1][0] < TOLERANCE_MM:
            if (each.instance_number or 0) < (kept[-1][1].instance_number or 0):
                kept[-1] = (kept[-1][0], each)
            continue
        kept.append((height, each))
    return replace(series, slices=tuple(each for _, each in kept))
