"""What a site adds to a federated monitoring round: the counts of its latest cases under a release, and no more.

    site/drift/<digest>.exported.json    how many cases were counted when counts last left

Two exports a case apart would show that case by their difference. So nothing leaves until as many cases have come since
the last one as `policy.smallest_count` says, or none at all: then the same counts leave again.
"""

import hashlib
from pathlib import Path

from fedclient.drift import log_path, noted
from fedclient.own_log import log_of
from fedclient.site import read_site_file
from shared_models.betting import WINDOW
from shared_models.drift import Observed, profile_of, released
from shared_models.errors import OrderRefused
from shared_models.files import canonical_json, locked, read_json, write_atomic, write_json
from shared_models.parse import plain
from shared_models.release import Release


def exported(folder: Path, release: Release, to: Path) -> int:
    """Writes the profile of the last `WINDOW` cases to a file for the coordinator, and into this site's log that it
    leaves; how many cases it is of.

    Raises:
        OrderRefused: `FEW_CASES`: fewer than `policy.smallest_count`, in all or since the last export.
        StateInvalid: no site folder, or a log of another version.
    """
    site = read_site_file(folder)
    mark = exported_path(folder, release.digest)
    with locked(mark.with_suffix(".lock")):
        cases = noted(folder, release.study, release.digest)
        profile = released(profile_of(release.study, cases[-WINDOW:]), site.policy.smallest_count)
        new = len(cases) - (int(read_json(mark)["cases"]) if mark.exists() else 0)
        if 0 < new < site.policy.smallest_count and mark.exists():
            raise OrderRefused(
                "FEW_CASES",
                f"{new} cases since the last export, which it would show by the difference; "
                f"{site.policy.smallest_count} are needed. Export again when they have come.",
            )
        content = canonical_json(plain(Observed(site.name, release.digest, profile)))
        log_of(folder, site.name).add(
            "sent",
            kind="histograms",
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            release=release.digest,
        )
        write_json(mark, {"cases": len(cases)})
        write_atomic(to, content)
    return profile.cases


def exported_path(folder: Path, digest: str) -> Path:
    return log_path(folder, digest).with_suffix(".exported.json")


def forget(folder: Path, digest: str) -> None:
    """Deletes what was counted of a release; the next case is the first."""
    exported_path(folder, digest).unlink(missing_ok=True)
    log_path(folder, digest).unlink(missing_ok=True)
