"""The run in a folder of `fedsim run`, found before what takes seconds to import."""

from pathlib import Path

from fedserver.checkpoint import RunFolder
from shared_models.errors import StateInvalid


def run_at(path: Path) -> RunFolder:
    """A run folder, or that of the federation in a folder of `fedsim run`: its first seed.

    Raises:
        StateInvalid: neither.
    """
    if (path / "state.json").exists():
        return RunFolder(path)
    found = sorted(path.glob("seed-*/federated/state.json"), key=lambda p: int(p.parts[-3].removeprefix("seed-")))
    if not found:
        raise StateInvalid(f"{path}: holds no run. Give the folder of `fedsim run`, or of one run in it.")
    return RunFolder(found[0].parent)
