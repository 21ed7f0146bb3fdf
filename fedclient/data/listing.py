"""Which cases a site's folder holds: its layout is found by what lies there, and named."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedclient.data.cases import Listing
from fedclient.data.layouts import brats, decathlon, flamby, lidc_idri, luna16, nnunet, pacs, table
from fedclient.data.layouts.peek import Peek, peek
from fedclient.data.manifest import read_sites, sites_of
from fedclient.data.where import Where
from shared_models.errors import ImageUnreadable, ManifestInvalid


def _no_sites(folder: Path) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which data sets are handed round.

    Attributes:
        title: for messages.
        found: whether a folder is laid out so; looks at names and the heads of few files.
        cases: (where, salt of the site) -> what the folder holds.
        sites: the sites that a table of the folder names; `_no_sites` where there is no such table.
        deep: it is found at any depth, so that a folder of such data sets looks like one.
        alone: it is what a folder is if it is nothing else, because others hold its files too.
    """

    title: str
    found: Callable[[Peek], bool]
    cases: Callable[[Where, str], Listing]
    sites: Callable[[Path], tuple[str, ...]] = _no_sites
    deep: bool = False
    alone: bool = False


def _manifest(where: Where, salt: str) -> Listing:
    return Listing("manifest.csv", read_sites(where.folder, where.sites, salt))


LAYOUTS: Mapping[str, Layout] = {
    "manifest": Layout("manifest.csv", lambda seen: seen.has("manifest.csv"), _manifest, sites_of),
    "table": Layout("images and labels.csv", table.found, table.cases, table.sites),
    "luna16": Layout("LUNA16", luna16.found, luna16.cases),
    "lidc-idri": Layout("LIDC-IDRI", lidc_idri.found, lidc_idri.cases, deep=True),
    **{
        f"brats-{year}": Layout(f"BraTS {year}", brats.found(year), brats.cases(year), deep=True)
        for year in brats.PARTS
    },
    "brats": Layout("BraTS of a year that its names do not tell", brats.found(brats.UNTOLD), brats.ask, deep=True),
    "decathlon": Layout("Medical Segmentation Decathlon", decathlon.found, decathlon.cases),
    "nnunet": Layout("nnU-Net raw data", nnunet.found, nnunet.cases),
    **{
        name: Layout(f"{kept.title} of FLamby", flamby.found(name), flamby.cases(name), flamby.sites(name))
        for name, kept in flamby.KEPT.items()
    },
    "pacs": Layout("PACS export of DICOM", pacs.found, pacs.cases, deep=True, alone=True),
}


def list_cases(where: Where, salt: str) -> Listing:
    """The cases of a site, ordered by key.

    Raises:
        ManifestInvalid: no known layout or several, or a table or folder that does not describe the data.
    """
    if where.dealt:
        whole = list_cases(replace(where, dealt={}), salt)
        dealt = tuple(replace(case, split=where.dealt.get(case.key, case.split)) for case in whole.cases)
        return replace(whole, cases=dealt)
    if where.chosen is not None:
        whole = list_cases(replace(where, chosen=None), salt)
        return replace(whole, cases=tuple(case for case in whole.cases if case.key in where.chosen))
    if where.pooled:
        parts = [list_cases(part, salt) for part in where.pooled]
        apart = [
            replace(case, patient=f"{part.name}/{case.patient}")  # each hospital has numbered its own people
            for part, listing in zip(where.pooled, parts, strict=True)
            for case in listing.cases
        ]
        return Listing(
            layout="; ".join(dict.fromkeys(part.layout for part in parts)),
            cases=tuple(sorted(apart, key=lambda case: case.key)),
            findings=tuple(found for part in parts for found in part.findings),
        )
    layout = LAYOUTS[layout_of(where)]
    if where.sites and not layout.sites(where.folder):
        raise ManifestInvalid(
            f"{where.folder}: site {where.sites[0]!r} was chosen, and {layout.title} names no sites. Choose none."
        )
    try:
        listing = layout.cases(where, f"{salt}/{where.name}" if where.name else salt)
    except ImageUnreadable as e:
        raise ManifestInvalid(f"{where.folder}: {e}", e.code) from None
    cases = tuple(replace(case, structures=where.structures) for case in listing.cases)
    return replace(listing, cases=tuple(sorted(cases, key=lambda case: case.key)))


def layout_of(where: Where) -> str:
    """The name of the layout: the one that is named, or the only one that fits what the folder holds.

    Raises:
        ManifestInvalid: an unknown name, or none that fits, or several.
    """
    if where.layout != "auto":
        if where.layout not in LAYOUTS:
            raise _unknown(where.layout)
        if not where.folder.is_dir():
            raise ManifestInvalid(f"{where.folder}: there is no such folder.")
        return where.layout
    fitting = fitting_layouts(where.folder)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ManifestInvalid(
            f"{where.folder}: it is laid out as {' and as '.join(LAYOUTS[name].title for name in fitting)}. "
            f'Say which counts: layout = "{fitting[0]}" under [data] of site.toml, or --layout {fitting[0]}; '
            f"or {', '.join(fitting[1:])}."
        )
    if not where.folder.is_dir():
        raise ManifestInvalid(f"{where.folder}: there is no such folder.")
    below = [fits for name in peek(where.folder).folders if (fits := fitting_layouts(where.folder / name))]
    if below:
        hint = f"{len(below)} folders in it are such data sets ({LAYOUTS[below[0][0]].title}). Name one of them."
    else:
        hint = (
            "Make a manifest.csv with the columns patient_id, image, mask; a row for each image. "
            f"Looked for were: {', '.join(layout.title for layout in LAYOUTS.values())}."
        )
    raise ManifestInvalid(f"{where.folder}: it is no data set in a known layout. {hint}")


def described(folder: Path, layout: str, site: str | None = None) -> str:
    """The layout of a folder in words, for who has just named it; an empty one may be filled later.

    Args:
        site: of those that a table of the folder names.

    Raises:
        ManifestInvalid: a layout that is not known, none that fits or several, a table that is broken or leads out of
            the folder, a site that is not in it, or several of which none was chosen. No image is opened.
    """
    if layout not in ("auto", *LAYOUTS):
        raise _unknown(layout)
    try:
        name = layout_of(Where(folder, layout=layout))
    except ManifestInvalid:
        if any(folder.iterdir()):
            raise
        return "none yet; the folder is empty"
    if LAYOUTS[name].sites is not _no_sites or site is not None:
        list_cases(Where(folder, (site,) if site is not None else (), name), salt="")
    return LAYOUTS[name].title


def _unknown(layout: str) -> ManifestInvalid:
    return ManifestInvalid(f"layout {layout!r} is not known. Known: auto, {', '.join(LAYOUTS)}.")


def fitting_layouts(folder: Path) -> list[str]:
    """The names of the layouts that a folder may have."""
    seen = peek(folder)
    fitting = [name for name, layout in LAYOUTS.items() if not layout.alone and layout.found(seen)]
    return fitting or [name for name, layout in LAYOUTS.items() if layout.alone and layout.found(seen)]


def sites_in(where: Where) -> tuple[str, ...]:
    """The sites that the data set of a folder names, sorted; none if it names none."""
    return LAYOUTS[layout_of(where)].sites(where.folder)
