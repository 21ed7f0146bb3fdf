"""An order answered in a deployment: weights fetched, work done once, the delta sent as a blob before the reply.

Finished work stays on disk until the next round, so that an order that comes again (a reply was lost, a process was
killed) is answered with the same bytes in a second, whatever the training took.

    site/blobs/<sha256>                       weights of the round
    site/runs/RUN/round-0003-<base>.json      the reply, written last
    site/runs/RUN/round-0003-<base>.safetensors   the delta
"""

import shutil
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from fedclient.egress import check_tensors, release_tensors
from fedclient.site import Site
from fedclient.work import Gate, Learner, carry_out, no_gate
from shared_models.errors import OrderRefused
from shared_models.files import write_atomic
from shared_models.parse import parse_json
from shared_models.transfer import Blobs, file_digest, site_context
from shared_models.weights import Arrays, mapped, save_arrays
from shared_models.wire import BlobRef, Order, Reply, dump

FORGOTTEN_S = 14 * 86400.0  # a run that has not asked for so long will not ask again for what it has had


def answered(order: Order, site: Site, learner: Learner, timeout_s: float = 3600.0, gate: Gate = no_gate) -> Reply:
    """Carries out an order whose tensors travel as blobs, or answers it from finished work.

    Raises:
        OrderRefused: the order names no weights, names others than its digest says, or the gate refuses it.
        TransferFailed: the weights did not come or the delta could not be sent within `timeout_s`.
    """
    blobs = _blobs(site.coordinator, site.folder / "keys", _changed(site.folder / "keys"))
    kept = _kept(order, site)
    reply = _finished(order, kept)
    if reply is None:
        weights = _fetched(order, site, blobs, timeout_s)
        done = carry_out(order, weights, site, learner, gate)
        reply = done.reply
        if reply.kind == "update":
            check_tensors(done.delta, weights)
            reply = _keep(reply, done.delta, kept)
        elif reply.kind == "statistics":  # every image was read for it
            write_atomic(kept, dump(reply))
    if reply.blob is not None:
        site.go_on()  # consent may have ended while the last step was under way
        release_tensors(reply.blob, order, site)
        blobs.send(kept.with_suffix(".safetensors"), reply.blob.sha256, timeout_s)
    return reply


def _finished(order: Order, kept: Path) -> Reply | None:
    """The reply of work that is done already, if its delta is as it was written: that file is not synced."""
    if order.kind not in ("statistics", "train") or not kept.exists():
        return None
    reply, delta = parse_json(Reply, kept.read_bytes(), str(kept)), kept.with_suffix(".safetensors")
    if order.kind == "statistics":
        return replace(reply, attempt=order.attempt)
    if reply.blob is None or not delta.exists() or file_digest(delta) != reply.blob.sha256:
        return None
    return replace(reply, attempt=order.attempt)


def _fetched(order: Order, site: Site, blobs: Blobs, timeout_s: float) -> Arrays:
    if order.kind in ("hello", "statistics"):
        return {}
    if order.blob is None or order.blob.sha256 != order.base_sha256:
        raise OrderRefused("WEIGHTS_MISMATCH", f"round {order.round}: the order's blob is not the weights it names.")
    folder = site.folder / "blobs"
    for older in folder.iterdir() if folder.exists() else ():  # before the fetch, which needs their room
        if order.blob.sha256 not in older.name:  # a part of this blob is gone on with
            older.unlink()
    path = blobs.fetch(order.blob.sha256, order.blob.size_bytes, folder / order.blob.sha256, timeout_s)
    return mapped(path, f"weights of round {order.round}")


def _keep(reply: Reply, delta: Arrays, kept: Path) -> Reply:
    """Lets go of the work of earlier rounds, and writes delta, then reply."""
    for older in kept.parent.iterdir() if kept.parent.exists() else ():
        older.unlink()
    for run in kept.parent.parent.iterdir() if kept.parent.parent.exists() else ():
        if run != kept.parent and run.stat().st_mtime < time.time() - FORGOTTEN_S:
            shutil.rmtree(run)
    path = kept.with_suffix(".safetensors")
    digest = save_arrays(path, delta, synced=False)  # 124 MB a round; what a power cut spoils is trained again
    reply = replace(reply, blob=BlobRef(digest, path.stat().st_size))
    write_atomic(kept, dump(reply))
    return reply


def _kept(order: Order, site: Site) -> Path:
    """Where the answer to this very order stands: the same study, round and weights."""
    what = f"round-{order.round:04d}-{order.base_sha256[:16]}-{order.study_sha256[:16]}.json"
    return site.folder / "runs" / order.run / what


def _changed(keys: Path) -> int:
    """Changes when the certificate is renewed."""
    return (keys / "tls.pem").stat().st_mtime_ns


@lru_cache(maxsize=1)
def _blobs(coordinator: str, keys: Path, changed_ns: int) -> Blobs:
    return Blobs(coordinator, site_context(keys))
