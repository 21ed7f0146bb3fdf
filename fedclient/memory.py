"""What a site remembers of a run between its rounds, and the model that it calls its own; none of it leaves the site.

    states/RUN-<study>/SITE/round-0003.safetensors   after the training of round 3
    states/RUN-<study>/SITE/own-<base>.safetensors   the site's own model on the weights of that digest
    states/RUN-<study>/SITE/final.safetensors, final.json   the run's last weights, and the study as it was trained
    states/RUN-<study>/SITE/sent.json                which of site/blobs an order of the run came with last

The coordinator's order says which round's update it counted last, and the site goes on from what it remembers of that
round. So an order that comes again, an update that came too late and a process that was killed all leave no trace.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedclient.site import Site
from shared_models.errors import OrderRefused
from shared_models.files import canonical_json, write_atomic
from shared_models.parse import STRICT, plain
from shared_models.study import Study, canonical, from_json
from shared_models.weights import Array, Arrays, load, save_arrays

FINAL, FINAL_STUDY = "final.safetensors", "final.json"
SENT = "sent.json"
MOST_UNCOUNTED = 3  # rounds that were trained and not counted, whose update may still be counted late


def memory_folder(site: Site, run: str, study_sha256: str) -> Path:
    """Made of the whole digest: a coordinator finds two studies that share its first 64 bits."""
    folder = site.folder / "states" / f"{run}-{study_sha256}"
    if not folder.exists():
        with suppress(FileNotFoundError):
            folder.with_name(f"{run}-{study_sha256[:16]}").rename(folder)  # of a run that an older version began
    return folder / site.name


def recall(folder: Path, counted: int) -> dict[str, Array]:
    """What is remembered of round `counted`; nothing where no update of the site has been counted yet.

    Raises:
        OrderRefused: the coordinator counted an update of which nothing is left here.
    """
    if counted == 0:
        return {}
    path = _path(folder, counted)
    if not path.exists():
        raise OrderRefused(
            "STATE_LOST",
            f"{path}: is missing, and without it this site cannot go on with the run. Restore the folder from its "
            f"backup, or ask the coordinator for a new run.",
        )
    return load(path, f"what the site remembers of round {counted}")


def remember(folder: Path, round_number: int, counted: int, memory: Arrays) -> None:
    """Keeps `memory` of a round, whole or not at all, and forgets what can no longer be asked for."""
    save_arrays(_path(folder, round_number), memory)
    uncounted = sorted(n for n in map(_number, folder.glob("round-*.safetensors")) if counted < n)
    keep = {counted, round_number, *uncounted[-MOST_UNCOUNTED:]}
    for path in folder.glob("round-*.safetensors"):
        if _number(path) not in keep:
            path.unlink()


def keep_final(folder: Path, study: Study, weights: Arrays) -> None:
    """Keeps what the run came to, so that the site can ask later what it was worth (`fedclient worth`)."""
    write_atomic(folder / FINAL_STUDY, canonical(study))
    save_arrays(folder / FINAL, weights)  # last: where it is there, both are


def final_study(folder: Path) -> Study:
    """The study of a finished run, as it was trained."""
    path = folder / FINAL_STUDY
    return from_json(path.read_bytes(), str(path))


@dataclass(frozen=True, slots=True)
class Sent:
    """Weights that an order of a run came with: for which round, their digest, and the study as it is trained."""

    __pydantic_config__ = STRICT
    round: int
    sha256: str
    study: str


def keep_sent(folder: Path, sent: Sent) -> None:
    """Replaces what is known of the order before: its weights are let go of."""
    write_atomic(folder / SENT, canonical_json(plain(sent)))


def own_path(folder: Path, base_sha256: str) -> Path:
    return folder / f"own-{base_sha256[:16]}.safetensors"


def _path(folder: Path, round_number: int) -> Path:
    return folder / f"round-{round_number:04d}.safetensors"


def _number(path: Path) -> int:
    found = re.fullmatch(r"round-(\d+)\.safetensors", path.name)
    return int(found[1]) if found else -1
