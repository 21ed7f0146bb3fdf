"""A PACS export: DICOM in folders of any nesting and any names, labels as SEG and RTSTRUCT objects among it."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fedclient.data.cases import Drawn, Listing
from fedclient.data.findings import Finding, finding
from fedclient.data.layouts.peek import Peek
from fedclient.data.layouts.series import cases_of, chosen, gather
from fedclient.data.objects import Referenced, object_kind, read_references
from fedclient.data.stack import Series
from fedclient.data.where import Where
from shared_models.errors import ImageUnreadable


def found(seen: Peek) -> bool:
    return seen.dicom


def cases(where: Where, salt: str) -> Listing:
    """A case for each series that may be learnt from; only headers are read, and no name or DICOMDIR is believed.

    Raises:
        ImageUnreadable: PATH_ESCAPE, for a link out of the folder.
    """
    held = gather(where.folder)
    drawn, of_objects = _drawn(held.objects, held.series)
    kept, of_series = chosen(held.series, drawn.keys())
    listed, of_patients = cases_of(held.series, kept, {n: Drawn(tuple(files)) for n, files in drawn.items()}, salt)
    findings = (*held.findings, *of_series, *of_objects, *of_patients)
    return Listing(f"PACS export, {len(listed)} series", listed, findings)


def _drawn(objects: Sequence[Path], series: Sequence[Series]) -> tuple[dict[int, list[Path]], list[Finding]]:
    """Index of a series -> the SEG and RTSTRUCT objects that were drawn on it, each once."""
    drawn: defaultdict[int, list[Path]] = defaultdict(list)
    findings: list[Finding] = []
    seen: set[str] = set()
    other = lost = 0
    for path in objects:
        try:
            if not object_kind(path):
                other += 1
                continue
            uid, meant = read_references(path)
        except ImageUnreadable as e:
            findings.append(finding("LABEL_UNREADABLE", f"a label object was left out: {e}"))
            continue
        if uid in seen:
            continue
        seen.add(uid)
        n = _meant(meant, series)
        if n is None:
            lost += 1
        else:
            drawn[n].append(path)
    if other:
        findings.append(finding("SERIES_LEFT_OUT", f"{other} objects that are no images (reports, presentations)"))
    if lost:
        findings.append(finding("LABEL_ORPHAN", f"{lost} SEG or RTSTRUCT objects name a series that is not here"))
    return dict(drawn), findings


def _meant(meant: Referenced, series: Sequence[Series]) -> int | None:
    """The series that an object names; of several stacks in it, or where it names none, the one with its slices."""
    named = [n for n, each in enumerate(series) if each.uid == meant.series_uid or not meant.series_uid]
    if meant.slice_uids:
        shared = {n: sum(one.sop_uid in meant.slice_uids for one in series[n].slices) for n in named}
        named = sorted((n for n in named if shared[n]), key=lambda n: -shared[n])[:1]
    return named[0] if len(named) == 1 else None
