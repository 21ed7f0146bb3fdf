"""What a site's training cases tell a federated plan: counts on fixed grids, taken one case at a time."""

from collections.abc import Sequence

from fedclient.data.cases import Case, read_case, read_case_labels
from fedclient.data.manifest import Progress, usable
from fedclient.data.truths import has_truth
from fedclient.gate.run import usable_cases
from fedclient.policy import least_cases
from fedclient.site import Site
from shared_models.errors import OrderRefused
from shared_models.plan import Fingerprint, fingerprint_of, released, total
from shared_models.study import Study


def site_fingerprint(site: Site, study: Study, progress: Progress | None = None) -> Fingerprint:
    """The fingerprint of all training cases with a label, on their native grids, as it may leave the site.

    Validation and test patients have no part in it: the plan decides how images are normalised.

    Raises:
        OrderRefused: `NO_CASES`, or `FEW_CASES` where the site's policy wants more patients.
        ImageUnreadable: files that cannot be used, by their rows.
    """
    cases = usable_cases(site)
    labelled = [case for case in cases if case.split == "train" and has_truth(case, study.task)]
    if not labelled:
        raise OrderRefused("NO_CASES", f"{site.data}: no case with a label for training. Run `fedclient check`.")

    def tell(done: int, of: int) -> None:
        site.go_on()  # consent may have ended, or the hours
        if progress is not None:
            progress(done, of)

    least = least_cases(site.smallest_count, (case.patient for case in labelled))
    return released(fingerprint_of_cases(labelled, study, tell), least)


def fingerprint_of_cases(cases: Sequence[Case], study: Study, progress: Progress | None) -> Fingerprint:
    """The sum of the cases' fingerprints; one image and one mask are in memory at a time."""
    return total(usable(cases, lambda case: _fingerprint(case, study), progress))


def _fingerprint(case: Case, study: Study) -> Fingerprint:
    volume = read_case(case, study.channels)
    labels = read_case_labels(case, volume, study.task.labels)
    ct = study.modality == "ct"
    return fingerprint_of(volume.voxels, labels, volume.spacing_mm, ct, len(study.task.labels))
