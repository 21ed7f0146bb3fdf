"""An order answered in a deployment: weights fetched, work done once, the delta sent as a blob before the reply.

Finished work stays on disk until the next round (`fedclient.kept`), so that an order that comes again (a reply was
lost, a process was killed) is answered with the same bytes in a second, whatever the training took.

    site/blobs/<sha256>                       weights of the round; of which study, `fedclient.memory` knows
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from fedclient.egress import check_reply, check_tensors, release_tensors
from fedclient.kept import finished, keep, kept_path, reply_of
from fedclient.memory import Sent, keep_sent, memory_folder
from fedclient.site import Site
from fedclient.summing import is_summed, summed
from fedclient.work import Gate, Learner, carry_out, check_asked, check_proof, no_gate, planned_study, study_of
from shared_models.errors import OrderRefused
from shared_models.files import write_atomic
from shared_models.study import canonical
from shared_models.transfer import Blobs, site_context
from shared_models.weights import Arrays, mapped
from shared_models.wire import Order, Reply, dump


def answered(order: Order, site: Site, learner: Learner, timeout_s: float = 3600.0, gate: Gate = no_gate) -> Reply:
    """Carries out an order whose tensors travel as blobs, or answers it from finished work.

    Raises:
        OrderRefused: the order names no weights, names others than its digest says, or the gate refuses it; or the
            reply may not leave.
        TransferFailed: the weights did not come or the delta could not be sent within `timeout_s`.
    """
    check_asked(order, study_of(order), site)  # of finished work and the steps of a sum too: rules may have changed
    blobs = _blobs(site.coordinator, site.folder / "keys", _changed(site.folder / "keys"))
    if is_summed(order):
        reply, sent = summed(order, site, lambda: _fetched(order, site, blobs, timeout_s), learner, gate)
    else:
        kept = kept_path(order, site.folder)
        sent = kept.with_suffix(".safetensors")
        reply = _finished(order, kept) or _worked(order, _fetched(order, site, blobs, timeout_s), site, learner, gate)
    if reply.blob is not None and sent is not None:
        check_reply(reply, order, site)
        site.go_on()  # consent may have ended while the last step was under way
        release_tensors(reply.blob, order, site, "masked vector" if reply.kind == "masked" else "tensors")
        blobs.send(sent, reply.blob.sha256, timeout_s, site.go_on)
    return reply


def _worked(order: Order, weights: Arrays, site: Site, learner: Learner, gate: Gate) -> Reply:
    """The reply of an order that is carried out now, and kept where that took long."""
    kept = kept_path(order, site.folder)
    done = carry_out(order, weights, site, learner, gate)
    if done.reply.kind == "update":
        check_tensors(done.delta, weights, study_of(order))
        return keep(done.reply, done.delta, kept)
    if done.reply.kind == "statistics":  # every image was read for it
        write_atomic(kept, dump(done.reply))
    return done.reply


def _finished(order: Order, kept: Path) -> Reply | None:
    """The reply of work that is done already."""
    if order.kind not in ("statistics", "train"):
        return None
    if order.kind == "statistics":
        reply = reply_of(order, kept)
    else:
        reply = finished(order, kept)
    return None if reply is None else replace(reply, attempt=order.attempt)


def _fetched(order: Order, site: Site, blobs: Blobs, timeout_s: float) -> Arrays:
    if order.kind in ("hello", "statistics"):
        return {}
    if order.blob is None or order.blob.sha256 != order.base_sha256:
        raise OrderRefused("WEIGHTS_MISMATCH", f"round {order.round}: the order's blob is not the weights it names.")
    check_proof(order, site)
    study = planned_study(order, study_of(order))
    folder = site.folder / "blobs"
    for older in folder.iterdir() if folder.exists() else ():  # before the fetch, which needs their room
        if order.blob.sha256 not in older.name:  # a part of this blob is gone on with
            older.unlink()
    path = blobs.fetch(order.blob.sha256, order.blob.size_bytes, folder / order.blob.sha256, timeout_s)
    weights = mapped(path, f"weights of round {order.round}")
    told = Sent(order.round, order.base_sha256, canonical(study).decode())
    keep_sent(memory_folder(site, order.run, order.study_sha256), told)
    return weights


def _changed(keys: Path) -> int:
    """Changes when the certificate is renewed."""
    return (keys / "tls.pem").stat().st_mtime_ns


@lru_cache(maxsize=1)
def _blobs(coordinator: str, keys: Path, changed_ns: int) -> Blobs:
    return Blobs(coordinator, site_context(keys))
