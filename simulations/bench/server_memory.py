"""Peak memory of the aggregating process, with a 31 M-parameter model, at 2, 8 and 32 sites.

    python -m simulations.bench.server_memory

The coordinator's own round: replies taken as they arrive, each update a file beside the message, doubted, folded into
one exact sum, stepped and saved. Each number of sites runs in a process of its own; the peak is the kernel's (VmHWM),
above what the process held before the round. Target: at most 3 times the model, flat within 10 %.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from flwr.app import Message

from fedserver.checkpoint import RunFolder, create_run
from fedserver.cohort import Presence
from fedserver.courier import Beside
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from shared_models.envelope import signed
from shared_models.study import Evaluate, Rounds, Study
from shared_models.weights import Arrays, save_arrays
from shared_models.wire import BlobRef, Reply, read_order, write_reply
from simulations.engine import LocalGrid

SITES = (2, 8, 32)
MOST_MODELS, MOST_SPREAD = 3.0, 0.10
MIB = 1 << 20


def model() -> Arrays:
    """31 M parameters in the shapes of a U-Net of 64 to 1024 channels (Ronneberger et al. 2015, figure 1)."""
    widths = [1, 64, 128, 256, 512, 1024]
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for level, (narrow, wide) in enumerate(pairwise(widths)):
        shapes[f"down{level}.0.weight"], shapes[f"down{level}.1.weight"] = (wide, narrow, 3, 3), (wide, wide, 3, 3)
        if level:
            shapes[f"up{level}.0.weight"] = (narrow, wide, 2, 2)
            shapes[f"up{level}.1.weight"], shapes[f"up{level}.2.weight"] = (narrow, wide, 3, 3), (narrow, narrow, 3, 3)
    return {n: draw.standard_normal(s, dtype=np.float32) * np.float32(0.01) for n, s in shapes.items()}


class Answered(LocalGrid):
    """A grid whose sites have sent their update already: every reply names the same file, linked for each site."""

    def __init__(self, update: BlobRef, sites: int) -> None:
        super().__init__(None, {i: {"site": f"s{i}"} for i in range(1, sites + 1)}, workers=1)
        self.update = update
        self.sent: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        listed = list(messages)
        ids = [f"m{len(self.sent) + i}" for i in range(len(listed))]
        for message_id, message in zip(ids, listed, strict=True):
            message.metadata.__dict__["_message_id"] = message_id
            self.sent[message_id] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.reply(self.sent.pop(i)) for i in list(message_ids) if i in self.sent]

    def reply(self, message: Message) -> Message:
        order = read_order(message)
        site = f"s{message.metadata.dst_node_id}"
        facts = Reply("update", site, order.run, order.round, order.attempt, order.study_sha256, order.base_sha256,
                      examples=100, blob=self.update)  # fmt: skip
        return write_reply(signed(facts, order, None), message)


def aggregate(folder: Path, sites: int) -> dict[str, float]:
    """One round over updates that lie in `folder`; MiB before and at the peak."""
    digest, size = (folder / "update.json").read_text().split()
    for i in range(1, sites + 1):
        (folder / "in" / f"s{i}").mkdir(parents=True, exist_ok=True)
        target = folder / "in" / f"s{i}" / digest
        if not target.exists():
            os.link(folder / "update", target)
    run = folder / "runs" / f"run-{sites}"
    presence = Presence({f"s{i}": i for i in range(1, sites + 1)})
    grid = Answered(BlobRef(digest, int(size)), sites)
    courier = Beside(folder / "out", folder / "in", "bench")
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the start
    carry_out(Setting(grid, RunFolder(run), lambda: presence, courier))
    return {"idle_mib": idle, "peak_mib": memory("VmHWM")}


def memory(field: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def prepare(folder: Path, studies: Mapping[int, Study]) -> float:
    """Writes update and run folders for each number of sites; the model's size in MiB."""
    weights = model()
    digest = save_arrays(folder / "update", weights)
    (folder / "update.json").write_text(f"{digest} {(folder / 'update').stat().st_size}")
    for sites, study in studies.items():
        create_run(folder / "runs", f"run-{sites}", study, weights)
    return sum(a.nbytes for a in weights.values()) / MIB


def in_a_process_of_its_own(folder: Path, sites: int) -> dict[str, float]:
    """What `aggregate` finds, with nothing else in the process."""
    command = [sys.executable, "-m", "simulations.bench.server_memory", str(folder), str(sites)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{sites} sites failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(aggregate(Path(sys.argv[1]), int(sys.argv[2]))))
        return
    study = Study(name="memory", rounds=Rounds(count=1, quorum=1), evaluate=Evaluate(every=0))
    with tempfile.TemporaryDirectory() as folder:
        size = prepare(Path(folder), dict.fromkeys(SITES, study))
        above: dict[int, float] = {}
        for sites in SITES:
            found = in_a_process_of_its_own(Path(folder), sites)
            above[sites] = found["peak_mib"] - found["idle_mib"]
            print(f"{sites:3} sites: idle {found['idle_mib']:.0f} MiB, peak {found['peak_mib']:.0f} MiB", flush=True)
    spread = (max(above.values()) - min(above.values())) / min(above.values())
    worst = max(above.values()) / size
    peaks = ", ".join(f"{n} sites {m:.0f} MiB" for n, m in above.items())
    print(f"\nmodel {size:.0f} MiB; above the idle process: {peaks}")
    print(f"{worst:.2f} times the model (at most {MOST_MODELS:g}), spread {100 * spread:.1f} % (at most 10 %)")
    if worst > MOST_MODELS or spread > MOST_SPREAD:
        sys.exit("falls short of its target")


if __name__ == "__main__":
    main()
