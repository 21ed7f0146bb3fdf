"""Whose releases a hospital takes, and what it asks of them: `[releases]` of site.toml."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shared_models.parse import STRICT


@dataclass(frozen=True, slots=True)
class Releases:
    """`[releases]`.

    Attributes:
        authorities: files (PEM) of the authorities of further federations whose releases are taken, beside the one
            that was joined; paths from the site's folder.
        predecessors: of earlier authorities of the federation that was joined: it was founded anew, and releases that
            the old one vouches for are still used.
        status_required: nothing is predicted without a list of the federation's releases that is still good.
    """

    __pydantic_config__ = STRICT
    authorities: Annotated[tuple[str, ...], Field(max_length=32)] = ()
    predecessors: Annotated[tuple[str, ...], Field(max_length=32)] = ()
    status_required: bool = False
