"""A first look into a folder, bounded however large it is: some names, and the heads of a few files."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fedclient.data.formats import HEAD_BYTES, is_dicom, suffix

DEPTH = 8
FOLDERS = 400  # looked into, in all
FOLDERS_EACH = 14  # of one folder: LUNA16 has ten subsets and a few more
HEADS = 48  # files opened to tell one kind
NO_DICOM = frozenset(
    (".csv", ".json", ".txt", ".md", ".xml", ".gz", ".nii", ".nii.gz", ".png", ".raw", ".mhd", ".toml")
)


@dataclass(frozen=True)
class Peek:
    """What a folder shows.

    Attributes:
        files: paths below it, with `/`; the first ones, folder by folder.
        folders: names of those that lie directly in it; links and hidden ones are left out of both.
    """

    folder: Path
    files: tuple[str, ...] = field(repr=False)
    folders: tuple[str, ...] = field(repr=False)

    def has(self, name: str) -> bool:
        """Whether a file lies directly in the folder, be it by a link."""
        return (self.folder / name).exists()

    @cached_property
    def dicom(self) -> bool:
        """Whether one of its files is DICOM."""
        maybe = [name for name in self.files if suffix(Path(name)) not in NO_DICOM]
        return any(is_dicom(self._head(name)) for name in maybe[:HEADS])

    @cached_property
    def lidc(self) -> bool:
        """Whether one of its files is LIDC-IDRI's XML."""
        maybe = [name for name in self.files if name.lower().endswith(".xml")]
        heads = [self._head(name) for name in maybe[:HEADS]]
        return any(b"LidcReadMessage" in head or b"IdriReadMessage" in head for head in heads)

    def _head(self, name: str) -> bytes:
        path = self.folder / name
        try:
            with path.open("rb") as file:
                return file.read(HEAD_BYTES)
        except OSError:
            return b""


def peek(folder: Path) -> Peek:
    """The names that a folder shows; one that is not there shows none."""
    files: list[str] = []
    top: list[str] = []
    waiting = [(folder, "", 0)]
    for _ in range(FOLDERS):
        if not waiting:
            break
        here, prefix, depth = waiting.pop()
        names, folders = _listed(here)
        files += [prefix + name for name in names]
        if here == folder:
            top = folders
        if depth < DEPTH:
            waiting += [(here / name, f"{prefix}{name}/", depth + 1) for name in reversed(folders[:FOLDERS_EACH])]
    return Peek(folder, tuple(files), tuple(top))


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """Names of its regular files and of its folders, sorted."""
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not entry.name.startswith(".") and not entry.is_symlink()]
            files = [entry.name for entry in seen if entry.is_file()]
            folders = [entry.name for entry in seen if entry.is_dir()]
    except OSError:
        return [], []
    return sorted(files), sorted(folders)
