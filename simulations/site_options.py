"""The sites of a simulation as the command line asks for them: of the data, of the phantom, or made up from both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedclient.data.listing import list_cases
from fedclient.gate.across import torn_patients
from fedclient.site import open_site
from shared_models.errors import ManifestInvalid
from shared_models.study import Study
from simulations.engine import NodeConfig
from simulations.hidden import hidden
from simulations.partition import partition_named, partitioned
from simulations.run import Machine, Say, data_folders, node_configs
from simulations.sources import pooled

MADE_UP = 5  # sites of a partition, where nobody says how many


@dataclass(frozen=True, slots=True)
class SiteOptions:
    """As they were typed.

    Attributes:
        sites: how many: of those of the data, or to make up.
        partition: see `partition_named`.
        shift, test_labels: of the phantom, see `PhantomPlan`.
        labelled: share of each site's training patients whose labels are used.
    """

    data: Sequence[Path] = ()
    layout: str = "auto"
    sites: int | None = None
    partition: str = "natural"
    shift: str = "both"
    test_labels: str = "site"
    labelled: float = 1.0


def sites_of(
    study: Study, folder: Path, options: SiteOptions, how: Machine, cache: Path, say: Say
) -> Mapping[str, NodeConfig]:
    """Site -> what its simulated node is told; nodes and partitions keep what they have in `folder`.

    Raises:
        StudyInvalid, ManifestInvalid, ImageUnreadable: see `data_folders`, `sites_at`, `check_people`, `partitioned`.
    """
    split, folder = partition_named(options.partition), folder.resolve()  # a run remembers where its sites were
    natural, given = options.sites if split.kind == "natural" else None, [path.resolve() for path in options.data]
    sources = data_folders(study, given, natural, cache, say, options.shift, options.test_labels)
    nodes = node_configs(folder, sources, how, natural, options.layout)
    check_people(nodes)
    if split.kind != "natural":
        nodes = partitioned(study, nodes, split, options.sites or MADE_UP, folder, say)
    return hidden(study, nodes, options.labelled, folder, say)


def check_people(nodes: Mapping[str, NodeConfig]) -> None:
    """Refuses a table in which one site tests on a patient whom another trains on; each site alone would not see it.

    Patients of unlike folders are different people, whatever they are called there.

    Raises:
        ManifestInvalid: with `LEAKAGE_PATIENT`.
    """
    if len(nodes) < 2 or len({config["data"] for config in nodes.values()}) > 1:
        return
    whole = open_site({**pooled([*nodes.values()]), "site": "pooled"})
    cases = list_cases(whole.where, whole.salt).cases
    torn = {found.case for found in torn_patients(cases)}
    if torn:
        raise ManifestInvalid(
            f"{whole.data}: {len({case.patient for case in cases if case.key in torn})} patients are at several sites, "
            f"in more than one split, so that training would see test patients. Give all rows of a patient the same "
            f"`split`; if they are different people, give them different names.",
            code="LEAKAGE_PATIENT",
        )
