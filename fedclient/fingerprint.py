"""What a site's training cases tell a federated plan: counts on fixed grids, taken one case at a time."""

from collections.abc import Sequence

from fedclient.data.images import IGNORE, read_image, read_labels
from fedclient.data.manifest import Case, Progress, read_sites, usable
from fedclient.site import Site
from shared_models.errors import ImageUnreadable, OrderRefused
from shared_models.plan import Fingerprint, fingerprint_of, released, total
from shared_models.study import Study


def site_fingerprint(site: Site, study: Study, progress: Progress | None = None) -> Fingerprint:
    """The fingerprint of all training cases with a label, on their native grids, as it may leave the site.

    Validation and test patients have no part in it: the plan decides how images are normalised.

    Raises:
        OrderRefused: `NO_CASES`, or `FEW_CASES` where the site's policy wants more of them.
        ImageUnreadable: files that cannot be used, by their rows.
    """
    cases = read_sites(site.data, site.manifest_sites, site.salt)
    labelled = [case for case in cases if case.split == "train" and case.mask is not None]
    if not labelled:
        raise OrderRefused("NO_CASES", f"{site.data}: no case with a label for training. Check manifest.csv.")
    return released(fingerprint_of_cases(labelled, study, progress), site.smallest_count)


def fingerprint_of_cases(cases: Sequence[Case], study: Study, progress: Progress | None = None) -> Fingerprint:
    """The sum of the cases' fingerprints; one image and one mask are in memory at a time."""
    return total(usable(cases, lambda case: _fingerprint(case, study), progress))


def _fingerprint(case: Case, study: Study) -> Fingerprint:
    if case.mask is None:
        raise ImageUnreadable("the manifest names no mask, and the plan is made from labelled voxels")
    volume = read_image(case.image)
    labels = read_labels(case.mask, like=volume)
    count = len(study.task.labels)
    if ((labels > count) & (labels != IGNORE)).any():
        raise ImageUnreadable(f"the mask holds values above {count}, the number of labels, that are not {IGNORE}")
    return fingerprint_of(volume.voxels[0], labels, volume.spacing_mm, study.modality == "ct", count)
