"""Finished work of a site, on disk until the next round: an order that comes again is answered with the same bytes.

site/runs/RUN/round-0003-<base>-<study>.json         the reply, written last
site/runs/RUN/round-0003-<base>-<study>.safetensors  the delta
site/runs/RUN/sum-<context>-mask-<asked>.json        an answer in a secure sum, and beside it a masked vector
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

from shared_models.files import file_sha256, write_atomic
from shared_models.parse import parse_json
from shared_models.weights import Arrays, save_arrays
from shared_models.wire import BlobRef, Order, Reply, dump

FORGOTTEN_S = 14 * 86400.0  # a run that has not asked for so long will not ask again for what it has had


def kept_path(order: Order, folder: Path) -> Path:
    """Where the answer to this very order stands: the same study, round and weights."""
    run, number = folder / "runs" / order.run, f"round-{order.round:04d}"
    kept = run / f"{number}-{order.base_sha256}-{order.study_sha256}.json"
    old = run / f"{number}-{order.base_sha256[:16]}-{order.study_sha256[:16]}.json"  # an earlier version's name
    return old if old.exists() and not kept.exists() else kept


def keep(reply: Reply, delta: Arrays, kept: Path) -> Reply:
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


def finished(order: Order, kept: Path) -> Reply | None:
    """The reply of work that is done already, if its delta is as it was written: that file is not synced."""
    reply, delta = reply_of(order, kept), kept.with_suffix(".safetensors")
    if reply is None or reply.blob is None or not delta.exists() or file_sha256(delta) != reply.blob.sha256:
        return None
    return reply


def reply_of(order: Order, kept: Path) -> Reply | None:
    """The reply that is kept, if it is about the run, round, study and weights of `order`."""
    reply = parse_json(Reply, kept.read_bytes(), str(kept)) if kept.exists() else None
    about = (order.run, order.round, order.study_sha256, order.base_sha256)
    if reply is None or (reply.run, reply.round, reply.study_sha256, reply.base_sha256) != about:
        return None
    return reply
