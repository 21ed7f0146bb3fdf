"""An audit log of 10,000 events: how long it takes to write, to verify, and to prove to the other side.

    python -m simulations.bench.audit

Targets: verified in 5 s; a head with its proof in 5 ms however long the log is; a line in 10 ms, its sync to disk
included. Times are of this machine; the last is nearly all the disk's.
"""

import sys
import tempfile
import time
from pathlib import Path

from shared_models.audit import AuditLog, verify_log
from shared_models.identity import identity_public_key, new_site_keys
from simulations.bench.secagg import told

EVENTS, HEADS = 10_000, 200
MOST_VERIFY_S, MOST_HEAD_S, MOST_LINE_S = 5.0, 5e-3, 10e-3


def main() -> None:
    key = new_site_keys().identity
    with tempfile.TemporaryDirectory() as folder:
        log = AuditLog(Path(folder) / "audit.jsonl", "bench", key)
        began = time.perf_counter()
        for number in range(EVENTS):
            log.add("order", run="lung-ct-1", round=number, kind="train", study="0" * 64)
        wrote_s = (time.perf_counter() - began) / EVENTS
        began = time.perf_counter()
        for number in range(HEADS):
            log.head(log.log, 1 + number * EVENTS // HEADS)
        head_s = (time.perf_counter() - began) / HEADS
        content, head = log.path.read_bytes(), log.path.with_suffix(".head.json").read_bytes()
        began = time.perf_counter()
        found = verify_log(content, identity_public_key(key), head)
        verify_s = time.perf_counter() - began
    print(f"{found.lines} lines, {len(content) / 2**20:.1f} MiB\n")
    short = [
        found.bad is not None or found.lines != EVENTS + 1,
        told("seconds to verify", verify_s, MOST_VERIFY_S),
        told("seconds for a head and its proof", head_s, MOST_HEAD_S),
        told("seconds to write a line", wrote_s, MOST_LINE_S),
    ]
    if any(short):
        sys.exit("falls short of its target")


if __name__ == "__main__":
    main()
