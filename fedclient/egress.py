"""The one door out of a hospital: what leaves is of agreed kinds, and written down before it goes.

Facts of a reply are on a list for each kind of reply; tensors have the names, shapes and dtypes of the weights that
came; labels are the study's. What leaves is an event `sent` of the site's audit log: kind, bytes, digest, run, round.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from math import inf
from pathlib import Path
from typing import Any

from fedclient.own_log import lines_of, log_of
from fedclient.records import hear, own_head
from fedclient.site import Site, read_site_file
from fedclient.work import study_of
from shared_models.class_counts import ClassCounts, least_of
from shared_models.detection_counts import DetectionCounts
from shared_models.envelope import signed
from shared_models.errors import FederationError, OrderRefused
from shared_models.identity import load_secret
from shared_models.plan import released
from shared_models.protect.stages import on_the_wire
from shared_models.restored_counts import RestoredCounts
from shared_models.scores import Score
from shared_models.study import Study
from shared_models.survival_counts import SurvivalCounts
from shared_models.weights import Arrays, difference, schema_of
from shared_models.wire import BlobRef, Order, Reply, SignedReply, dump

ALWAYS = {"kind", "site", "run", "round", "attempt", "study_sha256", "base_sha256", "plan_sha256", "head"}
MAY_LEAVE: dict[str, set[str]] = {
    "hello": {"train_cases", "test_cases"},
    "statistics": {"fingerprint", "seconds"},
    "update": {
        "examples",
        "steps",
        "seconds",
        "losses",
        "device",
        "variance",
        "scored",
        "scores",
        "own_scores",
        "blob",
    },
    "evaluation": {"scored", "scores", "own_scores", "validation", "profile", "seconds"},
    "refusal": {"refusal", "refusal_keys", "accused"},
    "ready": set(),
    "advert": {"advert"},
    "sealed": {"sealed"},
    "masked": {"blob"},
    "confirmation": {"confirmation"},
    "revealed": {"revealed"},
}
KINDS = {"hello": "counts", "statistics": "histograms", "update": "facts", "evaluation": "scores", "refusal": "code"}
KINDS |= {"ready": "word", "advert": "keys of a sum", "sealed": "shares for other sites", "masked": "facts"}
KINDS |= {"confirmation": "signature", "revealed": "shares of a sum"}
UNMASKED = ("hello", "statistics", "update", "evaluation")  # kinds that tell something of one site by itself

log = logging.getLogger("fedclient")


def release(reply: Reply, order: Order, site: Site) -> Reply:
    """`reply` with the head of this site's audit log, once it has passed the list and is written down.

    Raises:
        OrderRefused: `EGRESS`: the reply holds what no reply of its kind may, or is no answer to `order`; `FEW_CASES`.
    """
    hear(order, site)
    check_reply(reply, order, site)
    reply = replace(reply, head=own_head(order, site))
    content = dump(reply)
    _note(site.folder, site.name, KINDS[reply.kind], content, order, code=reply.refusal)
    return reply


def leave(reply: Reply, order: Order, site: Site) -> SignedReply:
    """A released reply under the signature of this hospital, good as the answer to just this order."""
    return signed(release(reply, order, site), order, load_secret(site.folder / "keys" / "identity.key"))


def release_tensors(blob: BlobRef, order: Order, site: Site, kind: str = "tensors") -> None:
    """Writes down that a delta leaves, or a masked vector; that a delta is the weights' shape was checked when it was
    made (`check_tensors`)."""
    log_of(site.folder, site.name).add(
        "sent", kind=kind, bytes=blob.size_bytes, sha256=blob.sha256, run=order.run, round=order.round,
        study=order.study_sha256,
    )  # fmt: skip


def release_code(folder: Path, code: str) -> None:
    """Writes down that a bare error code leaves: the work failed before there was a reply.

    A site that cannot write says so in its other log; the code goes all the same, for it tells nothing of a patient.
    """
    if not (folder / "keys" / "identity.key").exists():
        return
    try:
        _note(folder, read_site_file(folder).name, "code", code.encode(), None, code=code)
    except (OSError, FederationError) as error:
        log.warning("the code %s leaves and could not be written down: %s", code, error)


def check_tensors(sent: Arrays, weights: Arrays, study: Study) -> None:
    """Raises OrderRefused unless what is sent has the names, shapes and dtypes of the weights that came, or those to
    which the study compresses them."""
    if problem := difference(on_the_wire(study.protect, schema_of(weights)), schema_of(sent)):
        raise OrderRefused("EGRESS", f"a delta is not of the weights' shape and stays here: {problem}.")


def check_reply(reply: Reply, order: Order, site: Site) -> None:
    """Raises OrderRefused, `EGRESS`, where the reply holds what no reply of its kind may, or is no answer to `order`.

    Also asked before a delta leaves, which comes before its reply.
    """

    def refuse(what: str) -> None:
        raise OrderRefused("EGRESS", f"run {order.run}, round {order.round}: {what}, so the reply stays here.")

    answers = (reply.site, reply.run, reply.round, reply.study_sha256, reply.base_sha256)
    if answers != (site.name, order.run, order.round, order.study_sha256, order.base_sha256):
        refuse("a reply to another order")
    allowed = ALWAYS | MAY_LEAVE[reply.kind]
    for name in _filled(reply):
        if name not in allowed:
            refuse(f"{name!r} is not on the list of what a reply of kind {reply.kind!r} may hold")
    told = [name for name in _filled(reply) if name in MAY_LEAVE[reply.kind]]
    if reply.kind in UNMASKED and told and study_of(order).protect.secure_aggregation is not None:
        refuse(f"{told[0]!r} would tell of this site alone in a study whose updates are summed securely")
    scores = [*reply.scores.items(), *reply.own_scores.items(), *reply.validation.items()]
    if scores and (strange := {label for label, _ in scores} - set(study_of(order).task.answers)):
        refuse(f"scores of {len(strange)} labels that the study does not have")
    if any(_distribution_of(score) < site.smallest_count for _, score in scores):
        refuse(f"a distribution of fewer than {site.smallest_count} cases on a side")
    if reply.profile is not None and reply.profile.cases < site.smallest_count:
        refuse(f"a profile of fewer than {site.smallest_count} cases")
    if reply.fingerprint is not None:  # perhaps counted before the policy wanted more of them
        released(reply.fingerprint, site.smallest_count)


def _distribution_of(score: Score) -> float:
    """Of how many cases `score` tells a distribution, on the side that has fewest; infinity where it tells none."""
    told: list[tuple[int, tuple[tuple[int, ...], ...]]]
    if isinstance(score, ClassCounts):
        curve = (score.cell_cases, score.cell_positives, score.cell_micro)
        told = [(least_of(score.positives, score.negatives), (score.positive, score.negative, *curve))]
    elif isinstance(score, SurvivalCounts):
        of = least_of(score.events, score.told_cases - score.events)
        told = [(of, (score.predicted_micro, score.at_risk, score.came))]
    elif isinstance(score, DetectionCounts):
        told = [(least_of(score.told_scans, score.told_lesions), (score.hits, score.false))]
    elif isinstance(score, RestoredCounts):
        told = []
    else:
        told = [(score.cases, (score.histogram,))]
        if score.surface is not None:
            told.append((score.surface.cases, (score.surface.distance,)))
    return min((cases for cases, counts in told if any(counts)), default=inf)


def _filled(reply: Reply) -> Iterator[str]:
    """Names of the fields that say more than their default."""
    empty = Reply("hello", reply.site, reply.run, reply.round, reply.attempt, reply.study_sha256, reply.base_sha256)
    return (f.name for f in fields(Reply) if getattr(reply, f.name) != getattr(empty, f.name))


def _note(folder: Path, name: str, kind: str, content: bytes, order: Order | None, code: str | None) -> None:
    about: dict[str, Any] = {"run": order.run, "round": order.round, "study": order.study_sha256} if order else {}
    if code is not None:
        about["code"] = code
    digest = hashlib.sha256(content).hexdigest()
    log_of(folder, name).add("sent", kind=kind, bytes=len(content), sha256=digest, **about)


def sent(folder: Path) -> list[dict[str, Any]]:
    """What has left the site, in order: time, kind, bytes, digest, run and round."""
    return [{"time": line["time"], **line["facts"]} for line in lines_of(folder) if line["event"] == "sent"]
