"""Room on the coordinator's disk: uploads leave some of it, and a round that would fill it is not begun."""

import shutil
from pathlib import Path

from shared_models.errors import RoundPaused

SPARE_BYTES = 256 << 20  # left for databases and logs
BESIDE = 4  # models beside one for each site: the next weights, what a server optimizer keeps, what is being written


def check_room(folder: Path, model_bytes: int, sites: int, round_number: int) -> None:
    """Raises RoundPaused unless the disk of `folder` holds the updates of a round, and what is made of them."""
    free, wanted = shutil.disk_usage(folder).free, model_bytes * (sites + BESIDE) + SPARE_BYTES
    if free < wanted:
        raise RoundPaused(
            f"round {round_number}: {free / 2**20:.0f} MiB are free on the coordinator's disk, a round of {sites} "
            f"sites with this model wants {wanted / 2**20:.0f} MiB. Make room, then run the study again."
        )
