"""Studies whose secure sums could be compared: each hides a site by itself, and the two together may not.

A study that differs in a digit of its learning rate is another study, with sums of its own, and trains nearly alike.
Where one site more takes part in one than in the other, the difference of two sums is nearly that site's update. No
rule inside a sum prevents that: a person decides, who can ask who takes part in both. Updates can be subtracted in the
tensors that both have, so that one label more, which changes the last layer alone, makes no other network; and what a
federated plan comes to is not known when it is asked for. Networks of other widths are told apart by their shapes: that
one was made from the other on purpose, by weights that it begins with, is not seen here. Differentially private updates
are no such case: their noise is another each time, and the ledger counts both.
"""

from collections.abc import Iterable
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from fedclient.sums import summed_studies
from shared_models.study import Study
from shared_models.weights import Schema

if TYPE_CHECKING:
    from fedclient.consent import Asked
    from fedclient.site import Site

LEAST_SHARE = 0.1  # of the smaller network's weights that two studies have in common


def alike(site: "Site", study: Study, others: Iterable["Asked"]) -> list["Asked"]:
    """Those of `others` that this site takes part in, or has summed for, and whose sums could be compared."""
    if not _comparable(study):
        return []
    summed = summed_studies(site.sums)
    known = [a for a in others if _comparable(a.study) and (a.state == "approved" or a.sha256 in summed)]
    return [a for a in known if _overlap(a.study, study)]


def _comparable(study: Study) -> bool:
    return study.protect.secure_aggregation is not None and study.protect.privacy is None


def _overlap(one: Study, other: Study) -> bool:
    """Whether their updates have much in common: tensors of the same name, shape and dtype.

    The histograms that federated plans follow from are the same in every such study, and the network that such a plan
    comes to can be any.
    """
    if "federated" in (one.plan, other.plan):
        return True
    ours, theirs = _schema(one), _schema(other)
    shared = _weights({name: spec for name, spec in ours.items() if theirs.get(name) == spec})
    return shared >= LEAST_SHARE * min(_weights(ours), _weights(theirs))


@lru_cache(maxsize=64)
def _schema(study: Study) -> Schema:
    from shared_models.nets import network, schema  # imports torch

    return schema(network(study))


def _weights(schema: Schema) -> int:
    return sum(prod(spec.shape) for spec in schema.values())
