"""Where a site's data lies, how it is laid out there, and which paths lead out of it."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import TYPE_CHECKING

from shared_models.errors import ImageUnreadable, ManifestInvalid

if TYPE_CHECKING:
    from fedclient.data.cases import Split  # reads images: not where a site is only named


@dataclass(frozen=True, slots=True)
class Where:
    """A site's data.

    Attributes:
        sites: the rows of a manifest or table that are this site's; none named are all of a table of one site.
        layout: by name (`brats-2021`), or `auto` to find it by what the folder holds.
        structures: what the site calls things -> a label of the study, `background` or `ignore`.
        name: of one of several simulated sites, so that their patients of the same name stay apart; else empty.
        pooled: the sites that a simulation puts together; then the rest says nothing.
        chosen: keys of the cases that are a made-up site of a simulation; None are all.
        dealt: key of a case -> its split, where a simulation deals patients out anew; the others keep theirs.
    """

    folder: Path
    sites: tuple[str, ...] = ()
    layout: str = "auto"
    structures: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    pooled: tuple["Where", ...] = ()
    chosen: frozenset[str] | None = None
    dealt: Mapping[str, "Split"] = field(default_factory=dict)


def inside(root: Path, named: str) -> Path:
    """The file or folder that a table names, links followed, if it lies below `root`, which is resolved.

    Raises:
        ManifestInvalid: PATH_ESCAPE, or FILE_MISSING; the message begins with a verb and says nothing of the path.
    """
    path = Path(named)
    if path.is_absolute() or ".." in path.parts or "\0" in named:
        raise ManifestInvalid("must be a path inside the data folder, without `..`", "PATH_ESCAPE")
    try:
        found = (root / path).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a ring of links
        raise ManifestInvalid("names a file that is not there", "FILE_MISSING") from None
    if not found.is_relative_to(root):
        raise ManifestInvalid("is a link out of the data folder", "PATH_ESCAPE")
    if not found.is_file() and (found == root or not found.is_dir()):
        raise ManifestInvalid("is neither a file nor the folder of a series", "FILE_MISSING")
    return found


def files_below(root: Path, ignored: Counter[str]) -> Iterator[Path]:
    """Every regular file below a resolved folder, sorted; counted in `ignored` are links (`link`), because what they
    lead to comes by itself or is outside, and pipes and devices (`no file`).

    Raises:
        ImageUnreadable: PATH_ESCAPE, for a link out of the folder; FILE_MISSING, for a folder that may not be read.
    """
    for folder, folders, names in os.walk(root, onerror=_not_read):
        folders.sort()
        inner = {*folders}
        for name in sorted(names + folders):
            path = Path(folder, name)
            try:
                kind = path.lstat().st_mode
            except OSError as e:
                _not_read(e)
                continue
            if S_ISLNK(kind):
                if not path.resolve().is_relative_to(root):
                    raise ImageUnreadable(
                        "the folder holds a link that leads out of it. Put the files themselves there.",
                        code="PATH_ESCAPE",
                    )
                ignored["link"] += 1
            elif S_ISREG(kind):
                yield path
            elif name not in inner:
                ignored["no file"] += 1


def _not_read(error: OSError) -> None:
    """What went meanwhile is passed over; what cannot be read would be missed without a word.

    Raises:
        ImageUnreadable: FILE_MISSING.
    """
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise ImageUnreadable(
            f"a folder below it cannot be read ({type(error).__name__}). Mend its rights.", code="FILE_MISSING"
        ) from None
