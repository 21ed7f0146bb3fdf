"""Where a site's data lies, and how it is laid out there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Where:
    """A site's data.

    Attributes:
        sites: the rows of a manifest that are this site's; none named are all of a manifest of one site.
        layout: by name (`brats-2021`), or `auto` to find it by what the folder holds.
        structures: what the site calls things -> a label of the study, `background` or `ignore`.
    """

    folder: Path
    sites: tuple[str, ...] = ()
    layout: str = "auto"
    structures: Mapping[str, str] = field(default_factory=dict)
