"""The DICOM series of a folder that a study may learn from, and what of the folder was left out and why."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from fedclient.data.cases import Case, Channel, Label
from fedclient.data.dicom_folder import Found, find_series
from fedclient.data.findings import Finding, finding
from fedclient.data.manifest import case_key, split_of
from fedclient.data.provenance import MEASURED
from fedclient.data.stack import Series
from fedclient.data.where import files_below
from shared_models.errors import ImageUnreadable

LEARNED = frozenset(("CT", "MR", "PT", "NM", "CR", "DX", "MG", "RG", "PX", "IO"))  # modalities
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
NOTES = {  # why files were passed over -> what they are
    "localiser": "files of localisers",
    "link": "links within the folder, passed over",
}
WHY = {  # of the codes of `Found.unreadable`
    "DICOM_UNREADABLE": "are broken or cut short",
    "INPUT_TOO_LARGE": "of DICOM say more of themselves than is read to know what they are",
}

KEPT = 16  # folders whose series stay in memory


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a folder holds as DICOM; `objects` are files that are no images."""

    series: tuple[Series, ...] = field(repr=False)
    objects: tuple[Path, ...] = field(repr=False)
    findings: tuple[Finding, ...]


_KEPT: dict[Path, tuple[bytes, Gathered]] = {}


def gather(folder: Path) -> Gathered:
    """All series of a folder, each slice once however often it was exported.

    Headers are read again when a file came, went or changed: a round lists the cases three times, and a look at sizes
    and times takes a twentieth of the time that headers take.

    Raises:
        ImageUnreadable: PATH_ESCAPE, for a link out of the folder; a file that went while this looked.
    """
    root = folder.resolve()
    state = _state(root)
    if root not in _KEPT or _KEPT[root][0] != state:
        if len(_KEPT) >= KEPT:
            _KEPT.clear()
        _KEPT[root] = state, _gathered(root)
    return _KEPT[root][1]


def _state(root: Path) -> bytes:
    """32 bytes that change when a file below a folder does."""
    ignored: Counter[str] = Counter()
    digest = sha256()
    try:
        for path in files_below(root, ignored):
            stat = path.stat()
            digest.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode("utf-8", "surrogateescape"))
    except OSError as e:
        raise ImageUnreadable(f"a file went while the folder was looked through ({type(e).__name__})") from None
    digest.update(str(ignored.total()).encode())
    return digest.digest()


def _gathered(root: Path) -> Gathered:
    held = find_series(root)
    findings = [
        finding("SERIES_LEFT_OUT", f"{count} {NOTES[why]}") for why, count in held.ignored.items() if why in NOTES
    ]
    refused = Counter(error.code for error in held.unreadable.values())
    findings += [finding(code, f"{count} files {WHY[code]}") for code, count in sorted(refused.items())]
    series, copies = _once(held)
    if copies:
        findings.append(finding("DUPLICATE", f"{copies} files are copies of others", severity="note"))
    if several := [n for n in Counter(each.uid for each in series if each.siblings).values() if n > 1]:
        what = f"{len(several)} DICOM series hold {sum(several)} images, by patient, kind, orientation or acquisition"
        findings.append(finding("SERIES_SEVERAL", f"{what}; each is a case of its own"))
    return Gathered(tuple(series), held.objects, tuple(findings))


def chosen(series: Sequence[Series], labelled: Collection[int]) -> tuple[list[int], list[Finding]]:
    """Indices of the series to learn from, and how many of the others were left out and why.

    A derived series (a reformat, a projection) is left out where its study holds an original one of its modality,
    unless somebody drew on it.
    """
    originals = {(each.study_uid, each.modality) for each in series if not _derived(each) and _placed(each)}
    reasons: Counter[str] = Counter()
    kept: list[int] = []
    for n, each in enumerate(series):
        if each.sop_class.startswith(SECONDARY_CAPTURE):
            reasons["secondary captures"] += 1
        elif each.modality not in LEARNED:
            reasons["series of a modality that no study learns from"] += 1
        elif not _placed(each):
            reasons["series without a place in the patient (dose reports, screens)"] += 1
        elif _derived(each) and n not in labelled and (each.study_uid, each.modality) in originals:
            reasons["series derived from others of their study (reformats, projections)"] += 1
        else:
            kept.append(n)
    return kept, [finding("SERIES_LEFT_OUT", f"{count} {why}") for why, count in sorted(reasons.items())]


def cases_of(
    series: Sequence[Series], kept: Sequence[int], labels: Mapping[int, Label], salt: str
) -> tuple[tuple[Case, ...], list[Finding]]:
    """A case for each series of a patient who is named; all of a patient's have one split."""
    named = [n for n in kept if series[n].patient]
    findings = []
    if len(named) < len(kept):
        findings.append(finding("PATIENT_UNKNOWN", f"{len(kept) - len(named)} series without PatientID, left out"))
    return tuple(_case(series[n], labels.get(n), salt) for n in named), findings


def _case(series: Series, label: Label | None, salt: str) -> Case:
    name = f"{series.uid} {min(each.sop_uid for each in series.slices)}"  # a series may hold several stacks
    return Case(
        key=case_key(salt, series.patient, name),
        patient=series.patient,
        channels=(Channel(files=series.files, series=series),),
        label=label,
        split=split_of(series.patient, salt),
    )


def _derived(series: Series) -> bool:
    return series.image_type[0] == "DERIVED"


def _placed(series: Series) -> bool:
    """Whether its slices have a place in the patient, where its modality has places at all."""
    return series.modality not in MEASURED or series.frames > 1 or all(each.where for each in series.slices)


def _once(held: Found) -> tuple[list[Series], int]:
    """The series without slices of an instance UID that was seen before, and how many those were."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    series: list[Series] = []
    copies = 0
    for each in held.series:
        fresh = []
        for one in each.slices:
            if one.sop_uid and one.sop_uid in seen[each.uid]:
                copies += 1
                continue
            seen[each.uid].add(one.sop_uid)
            fresh.append(one)
        if fresh:
            series.append(replace(each, slices=tuple(fresh)))
    return series, copies
