"""Studies that read the same of this site's data, where one of them has secure sums: the other may tell what they hide.

Where one site more takes part in one than in the other, the difference of two sums is nearly that site's update; and
what a site tells bare in one study can be taken off the sums of another. No rule inside a sum prevents that: a person
decides, who can ask who takes part in both. What a study may change to be none of these is what an update says of the
data, and a coordinator chooses nearly all of that: it writes name, seed, network, labels and settings, and it sends the
weights that training begins with, under which networks of other shapes, or asked for something else, answer alike. So
only this tells two studies apart: that they read nothing in common. Images are images here, whatever modality, channels
and preprocessing a study names, because a file that does not state its modality is taken for what the study says.
Differentially private updates are no such case: their noise is another each time, and the ledger counts both.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedclient.sums import summed_studies
from shared_models.study import Study

if TYPE_CHECKING:
    from fedclient.consent import Asked
    from fedclient.site import Site


@dataclass(frozen=True, slots=True)
class Alike:
    """Another study at this site, and what it reads here that the one in question reads too."""

    asked: "Asked"
    reads: tuple[str, ...]
    summed: bool  # the other one; else its updates are told bare
    both: bool  # have secure sums

    @property
    def name(self) -> str:
        return f"{self.asked.study.name} ({self.asked.sha256[:12]})"

    @property
    def why(self) -> str:
        """What the person who decides is told."""
        same = f"It reads the same here as {self.name}: {', '.join(self.reads)}"
        if self.both:
            return (
                f"{same}. Whatever network, labels and settings the two have, if one site more takes part in one than "
                f"in the other, the difference of their sums can be nearly that site's update."
            )
        bare, hidden = ("this study", self.name) if self.summed else (self.name, "this study")
        return (
            f"{same}. The coordinator sees this site's updates to {bare} by themselves, and can take them off the sums "
            f"of {hidden}: the fewer sites are left in those, the less they hide."
        )


def alike(site: "Site", study: Study, others: Iterable["Asked"]) -> list[Alike]:
    """Those of `others` that this site takes part in, or has sent updates for, and that may tell what a sum hides."""
    summed = summed_studies(site.sums)
    known = [a for a in others if a.state == "approved" or a.sha256 in summed or _told_bare(a)]
    return [
        Alike(a, common, _has_sums(a.study), _has_sums(a.study) and _has_sums(study))
        for a in known
        if (_has_sums(study) or _has_sums(a.study))
        and study.protect.privacy is None
        and a.study.protect.privacy is None
        and (common := tuple(sorted(_read(study) & _read(a.study))))
    ]


def _has_sums(study: Study) -> bool:
    return study.protect.secure_aggregation is not None


def _told_bare(asked: "Asked") -> bool:
    """Whether updates may be out by themselves: of a study without sums that was approved once."""
    decision = asked.decision
    return decision is not None and decision.verdict != "refused" and not _has_sums(asked.study)


def _read(study: Study) -> frozenset[str]:
    """What of a site's data a study reads, in words; names are compared without regard to case."""
    task = study.task
    columns = [covariate.column for covariate in task.covariates]
    if task.kind == "prognosis":
        columns += [task.time_column, task.event_column]
    if task.kind == "classification":
        columns.append(task.column)
    found = {f"the column {column.casefold()!r}" for column in columns}
    if task.kind == "classification":
        found |= {f"the label {label.casefold()!r}" for label in task.labels}
    if not study.table_only:
        found.add("bags of features" if study.of_bags else "images")
    return frozenset(found)
