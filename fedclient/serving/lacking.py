"""What is known to lack of series: objects that were turned away, and connections that ended in the middle of one.

serve/lacking/<series>/<object>  empty; it was turned away and has not come since
serve/lacking/<series>/open      empty; a connection brings of it, so that it is cut short if this process is killed
"""

import shutil
import time
from contextlib import suppress
from pathlib import Path

from shared_models.files import private_folder

MOST_REFUSED = 50_000  # objects that are remembered; those of the oldest series are forgotten
OPEN = "open"


class Lacking:
    """A memory in `folder`, and of this process where a full disk takes no more; each series for `keep_s`."""

    def __init__(self, folder: Path, keep_s: float) -> None:
        self.folder, self.keep_s = folder, keep_s
        private_folder(folder)
        self._refused: dict[str, set[str]] = {}
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime):
            if path.stat().st_mtime < time.time() - keep_s:
                shutil.rmtree(path, ignore_errors=True)
            elif names := {each.name for each in path.iterdir()} - {OPEN}:
                self._refused[path.name] = names
        self._count = sum(map(len, self._refused.values()))

    def refused(self, key: str) -> frozenset[str]:
        """What was turned away of a series and has not come."""
        return frozenset(self._refused.get(key, ()))

    def refuse(self, key: str, name: str) -> None:
        names = self._refused.setdefault(key, set())
        if name in names:
            return
        names.add(name)
        self._count += 1
        self._touch(key, name)
        while len(self._refused) > 1 and self._count > MOST_REFUSED:
            oldest = next(iter(self._refused))
            self._count -= len(self._refused.pop(oldest))
            shutil.rmtree(self.folder / oldest, ignore_errors=True)

    def came(self, key: str, name: str) -> None:
        names = self._refused.get(key, set())
        if name in names:
            names.remove(name)
            self._count -= 1
            self._unlink(key, name)
        if not names:
            self._refused.pop(key, None)

    def opened(self, key: str) -> None:
        self._touch(key, OPEN)

    def ended(self, key: str) -> None:
        """No connection brings of it any more, and none broke off; or it was handed on."""
        self._unlink(key, OPEN)

    def was_open(self, key: str) -> bool:
        return (self.folder / key / OPEN).exists()

    def _touch(self, key: str, name: str) -> None:
        with suppress(OSError):
            private_folder(self.folder / key)
            (self.folder / key / name).touch(mode=0o600)

    def _unlink(self, key: str, name: str) -> None:
        with suppress(OSError):
            (self.folder / key / name).unlink(missing_ok=True)
            (self.folder / key).rmdir()  # where nothing else is in it
