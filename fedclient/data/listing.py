"""Which cases a site's folder holds: its layout is found by what lies there, and named."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedclient.data.cases import Listing
from fedclient.data.manifest import read_sites
from fedclient.data.where import Where
from shared_models.errors import ManifestInvalid


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which data sets are handed round.

    Attributes:
        title: for messages.
        found: whether a folder is laid out so; looks at names and the heads of few files.
        cases: (where, salt of the site) -> what the folder holds.
    """

    title: str
    found: Callable[[Path], bool]
    cases: Callable[[Where, str], Listing]


def _manifest(where: Where, salt: str) -> Listing:
    return Listing("manifest.csv", read_sites(where.folder, where.sites, salt))


LAYOUTS: Mapping[str, Layout] = {
    "manifest": Layout("manifest.csv", lambda folder: (folder / "manifest.csv").exists(), _manifest),
}


def list_cases(where: Where, salt: str) -> Listing:
    """The cases of a site, ordered by key.

    Raises:
        ManifestInvalid: no known layout or several, or a table that does not describe the data.
    """
    name = layout_of(where)
    listing = LAYOUTS[name].cases(where, salt)
    cases = tuple(replace(case, structures=where.structures) for case in listing.cases)
    return replace(listing, cases=tuple(sorted(cases, key=lambda case: case.key)))


def layout_of(where: Where) -> str:
    """The name of the layout: the one that is named, or the first that fits what the folder holds."""
    if where.layout != "auto":
        if where.layout not in LAYOUTS:
            raise ManifestInvalid(f"layout {where.layout!r} is not known. Known: auto, {', '.join(LAYOUTS)}.")
        return where.layout
    found = next((name for name, layout in LAYOUTS.items() if layout.found(where.folder)), None)
    if found is None:
        raise ManifestInvalid(
            f"{where.folder}: holds no data set in a known layout. Make a manifest.csv with the columns patient_id, "
            f"image, mask; a row for each image. Known layouts: {', '.join(LAYOUTS)}."
        )
    return found
