"""A first look at a site's data: every file read once, counted, nothing told to anybody else."""

from typing import Any

from fedclient.data.cases import Case, Mask, read_case
from fedclient.data.images import read_labels
from fedclient.data.listing import list_cases
from fedclient.data.manifest import Progress
from fedclient.site import Site
from shared_models.errors import ImageUnreadable, ManifestInvalid


def look(site: Site, study: str | None, progress: Progress) -> dict[str, Any]:
    """Counts by split, after reading every image and mask; with a study, prepares its cache as well.

    Raises:
        ManifestInvalid, ImageUnreadable: with the rows that have to be mended; the first ten of them.
    """
    listing = list_cases(site.where, site.salt)
    cases = listing.cases
    bad: list[str] = []
    for done, case in enumerate(cases, start=1):
        if complaint := _complaint(case):
            bad.append(complaint)
        progress(done, len(cases))
    if bad:
        more = f"\n... and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ImageUnreadable(f"{len(bad)} of {len(cases)} cases cannot be used:\n" + "\n".join(bad[:10]) + more)
    if not cases:
        raise ManifestInvalid(f"{site.data}: {listing.layout}; there is no case that can be used.")
    if study is not None:
        from fedclient.data.dataset import prepare
        from shared_models.study import load_study

        prepare(
            [c for c in cases if c.label is not None],
            load_study(study),
            site.folder / "cache",
            progress,
            quota_bytes=site.quota_bytes,
            processes=site.processes,
        )
    return {
        "layout": listing.layout,
        "findings": [f"{found.code}: {found.what}" for found in listing.findings],
        "cases": len(cases),
        "readable": len(cases),
        "splits": {
            split: {
                "cases": sum(c.split == split for c in cases),
                "patients": len({c.patient for c in cases if c.split == split}),
                "labelled": sum(c.split == split and c.label is not None for c in cases),
            }
            for split in ("train", "val", "test")
        },
    }


def _complaint(case: Case) -> str | None:
    """What is wrong with a case, by its row; no name of a file or patient."""
    try:
        image = read_case(case, [channel.name for channel in case.channels])
        if isinstance(case.label, Mask):
            read_labels(case.label.file, image)
    except ImageUnreadable as e:
        return f"{case.where}: {e}"
    return None
