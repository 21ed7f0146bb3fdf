"""The sites of a simulation as the command line asks for them: of the data, of the phantom, or made up from both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared_models.study import Study
from simulations.engine import NodeConfig
from simulations.hidden import hidden
from simulations.partition import partition_named, partitioned
from simulations.run import Machine, Say, data_folders, node_configs

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
        StudyInvalid, ManifestInvalid, ImageUnreadable: see `data_folders`, `sites_at` and `partitioned`.
    """
    split = partition_named(options.partition)
    natural = options.sites if split.kind == "natural" else None
    sources = data_folders(study, options.data, natural, cache, say, options.shift, options.test_labels)
    nodes = node_configs(folder, sources, how, natural, options.layout)
    if split.kind != "natural":
        nodes = partitioned(study, nodes, split, options.sites or MADE_UP, folder, say)
    return hidden(study, nodes, options.labelled, folder, say)
