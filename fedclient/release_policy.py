"""Whose releases a hospital takes, and what it asks of them: `[releases]` of site.toml."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shared_models.parse import STRICT


@dataclass(frozen=True, slots=True)
class Releases:
    """`[releases]`.

    Attributes:
        authorities: files of certificates (PEM) of further federations whose releases are taken, beside the one that
            was joined; paths from the site's folder. A file may hold several certificates of one federation: while
            its authority is renewed, the old one and the new one.
        status_required: nothing is predicted without a list of the federation's releases that is still good.
    """

    __pydantic_config__ = STRICT
    authorities: Annotated[tuple[str, ...], Field(max_length=32)] = ()
    status_required: bool = False
