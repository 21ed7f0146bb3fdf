"""What a site adds to a federated monitoring round: the counts of its latest cases under a release, and no more."""

import hashlib
from pathlib import Path

from fedclient.drift import noted
from fedclient.own_log import log_of
from fedclient.site import read_site_file
from shared_models.betting import WINDOW
from shared_models.drift import Observed, profile_of, released
from shared_models.files import canonical_json, write_atomic
from shared_models.parse import plain
from shared_models.release import Release


def exported(folder: Path, release: Release, to: Path) -> int:
    """Writes the profile of the last `WINDOW` cases to a file for the coordinator, and into this site's log that it
    leaves; how many cases it is of.

    Raises:
        OrderRefused: `FEW_CASES`: fewer than `policy.smallest_count`.
        StateInvalid: no site folder, or a log of another version.
    """
    site = read_site_file(folder)
    latest = noted(folder, release.study, release.digest)[-WINDOW:]
    profile = released(profile_of(release.study, latest), site.policy.smallest_count)
    content = canonical_json(plain(Observed(site.name, release.digest, profile)))
    log_of(folder, site.name).add(
        "sent",
        kind="histograms",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        release=release.digest,
    )
    write_atomic(to, content)
    return profile.cases
