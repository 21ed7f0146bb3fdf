"""An audit log of 10,000 events: how long it takes to write, to verify, and to prove to the other side.

    python -m simulations.bench.audit

Targets: verified in 3 times what its signatures alone cost; a line written in 3 times what the same line costs that is
only synced to disk; a head with its proof in 5 ms, however long the log is.
"""

import sys
import tempfile
import time
from pathlib import Path

from shared_models.audit import AuditLog, Seen
from shared_models.audit_check import verify_log
from shared_models.files import append_json
from shared_models.identity import identity_public_key, new_site_keys, sign, verify
from simulations.bench.secagg import told

EVENTS, HEADS, BARE = 10_000, 200, 1000
MOST_VERIFY, MOST_LINE, MOST_HEAD_S = 3.0, 3.0, 5e-3


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
            log.head(Seen(log.log, 1 + number * EVENTS // HEADS))
        head_s = (time.perf_counter() - began) / HEADS
        content, head = log.path.read_bytes(), log.path.with_suffix(".head.json").read_bytes()
        began = time.perf_counter()
        found = verify_log(content, identity_public_key(key), head)
        verify_s = time.perf_counter() - began
        signature, public = sign(key, "bench", content[:300]), identity_public_key(key)
        began = time.perf_counter()
        for _ in range(BARE):
            verify(public, signature, "bench", content[:300])
        bare_verify_s = (time.perf_counter() - began) / BARE * EVENTS
        line = {"facts": content[:300].decode()}
        began = time.perf_counter()
        for _ in range(BARE):
            append_json(Path(folder) / "bare.jsonl", line)
        bare_line_s = (time.perf_counter() - began) / BARE
    size = f"{found.lines} lines, {len(content) / 2**20:.1f} MiB"
    print(f"{size}; verified in {verify_s:.1f} s, a line in {wrote_s * 1e3:.1f} ms\n")
    short = [
        found.bad is not None or found.lines != EVENTS + 1,
        told("verification over its signatures alone", verify_s / bare_verify_s, MOST_VERIFY),
        told("a line over one that is only synced", wrote_s / bare_line_s, MOST_LINE),
        told("seconds for a head and its proof", head_s, MOST_HEAD_S),
    ]
    if any(short):
        sys.exit("falls short of its target")


if __name__ == "__main__":
    main()
