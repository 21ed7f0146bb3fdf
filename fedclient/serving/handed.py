"""Which objects of which series were handed on, so that what comes later is not taken for a whole series.

serve/handed/<series>.json  names of its objects, which are hashes of their UIDs, digests of what they held, and
                            the names of the jobs that had them
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from shared_models.files import private_folder, read_json, write_json

MOST_KNOWN = 1000  # series; the oldest are forgotten


@dataclass(frozen=True, slots=True)
class Before:
    """What was handed on of a series; `jobs` in the order in which they were made, `digests` by names of objects."""

    names: frozenset[str] = frozenset()
    jobs: Sequence[str] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


class Handed:
    """A memory in `folder`, of `MOST_KNOWN` series, each for `keep_s` after it was last handed on."""

    def __init__(self, folder: Path, keep_s: float) -> None:
        self.folder, self.keep_s = folder, keep_s
        private_folder(folder)

    def find(self, key: str) -> Before:
        path = self.folder / f"{key}.json"
        try:
            if self._old(path):
                return Before()
            said = read_json(path)
            return Before(frozenset(said["names"]), tuple(said["jobs"]), dict(said.get("digests", {})))
        except (OSError, ValueError, KeyError, TypeError):
            return Before()

    def note(self, key: str, before: Before) -> None:
        """Remembers it, and forgets what is old or too much."""
        facts = {"names": sorted(before.names), "jobs": list(before.jobs), "digests": dict(before.digests)}
        write_json(self.folder / f"{key}.json", facts)
        known = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for n, path in enumerate(known):
            if n >= MOST_KNOWN or self._old(path):
                with suppress(FileNotFoundError):
                    path.unlink()

    def _old(self, path: Path) -> bool:
        return path.stat().st_mtime < time.time() - self.keep_s
