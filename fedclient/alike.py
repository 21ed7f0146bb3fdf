"""Studies whose secure sums could be compared: each hides a site by itself, and the two together may not.

A study that differs in a digit of its learning rate is another study, with sums of its own, and trains nearly alike.
Where one site more takes part in one than in the other, the difference of two sums is nearly that site's update. No
rule inside a sum prevents that: a person decides, who can ask who takes part in both. Updates can be subtracted where
they have the same tensors, whatever else a coordinator has changed. Differentially private updates are no such case:
their noise is another each time, and the ledger counts both.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from fedclient.sums import summed_studies
from shared_models.study import Study
from shared_models.weights import schema_sha256

if TYPE_CHECKING:
    from fedclient.consent import Asked
    from fedclient.site import Site


def alike(site: "Site", study: Study, others: Iterable["Asked"]) -> list["Asked"]:
    """Those of `others` that this site takes part in, or has summed for, and whose sums could be compared."""
    if not _comparable(study):
        return []
    summed = summed_studies(site.sums)
    known = [a for a in others if _comparable(a.study) and (a.state == "approved" or a.sha256 in summed)]
    return [a for a in known if _tensors(a.study) == _tensors(study)]


def _comparable(study: Study) -> bool:
    return study.protect.secure_aggregation is not None and study.protect.privacy is None


@lru_cache(maxsize=64)
def _tensors(study: Study) -> str:
    """Digest of names, shapes and dtypes of the weights; of all plans that follow from the sites' histograms the same,
    for these are the same in every such study."""
    if study.plan == "federated":
        return study.plan
    from shared_models.nets import network, schema  # imports torch

    return schema_sha256(schema(network(study)))
