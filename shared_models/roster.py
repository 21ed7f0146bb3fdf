"""Who is in a federation: signed by its coordinator, numbered by epochs, each chained to the one before it.

Every enrolment, renewal and revocation makes an epoch. A site keeps the newest that it has seen; a coordinator can then
neither go back to an older one nor show two sites two histories without the digests telling.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from shared_models.errors import StateInvalid
from shared_models.files import canonical_json
from shared_models.identity import Credential, sign, stated
from shared_models.parse import STRICT, Sha256, SiteName, parse_json, plain

PURPOSE = "roster"
FIRST = "0" * 64  # what the first epoch names as the one before it
MOST_EPOCHS = 32  # in one answer of the coordinator
Key32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


@dataclass(frozen=True, slots=True)
class Roster:
    """The sites of a federation with their identities and certificates: nobody else vouches for a key.

    Attributes:
        epoch: rises by one with every change; an older roster is not taken back.
        sites: name -> Ed25519 public key, hexadecimal.
        previous_sha256: of the roster before this one, `FIRST` in epoch 1.
        certificates: name -> SHA-256 of the site's newest certificate.
    """

    __pydantic_config__ = STRICT
    federation: Annotated[str, Field(max_length=64)]
    epoch: Annotated[int, Field(ge=1, lt=2**53)]
    sites: Mapping[SiteName, Key32]
    previous_sha256: Sha256 = FIRST
    certificates: Mapping[SiteName, Sha256] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(canonical_json(plain(self))).hexdigest()


@dataclass(frozen=True, slots=True)
class SignedRoster:
    """A roster, the coordinator's signature of it (hexadecimal), and the authority's certificate of that key, PEM."""

    __pydantic_config__ = STRICT
    roster: Roster
    signature: Signature
    certificate: Annotated[str, Field(max_length=8192)]


@dataclass(frozen=True, slots=True)
class History:
    """Signed epochs as a coordinator hands them out, the oldest first; `newest` is the last that there is."""

    __pydantic_config__ = STRICT
    newest: Annotated[int, Field(ge=0, lt=2**53)]
    epochs: Annotated[tuple[SignedRoster, ...], Field(max_length=MOST_EPOCHS)]


def sign_roster(by: Credential, roster: Roster) -> SignedRoster:
    """`by` is what the coordinator signs its statements with."""
    signature = sign(by.key, PURPOSE, canonical_json(plain(roster)))
    return SignedRoster(roster, signature.hex(), by.certificate.decode())


def write_signed(signed: SignedRoster) -> bytes:
    return canonical_json(plain(signed))


def read_signed(content: bytes, where: str) -> SignedRoster:
    """Parses what `write_signed` wrote; the signature is not looked at."""
    return parse_json(SignedRoster, content, where, StateInvalid)


def checked(signed: SignedRoster, authority: bytes) -> Roster:
    """The roster, if a coordinator for whom `authority` (CA, PEM) vouches has signed it; or StateInvalid."""
    content = canonical_json(plain(signed.roster))
    if not stated(authority, signed.certificate.encode(), bytes.fromhex(signed.signature), PURPOSE, content):
        raise StateInvalid("roster: is not signed by the federation's authority. Fetch it again; tell the coordinator.")
    return signed.roster


def follow(known: SignedRoster | None, history: History, authority: bytes) -> SignedRoster:
    """The newest roster of `history`, once every step from `known` to it is seen to be signed and chained.

    `history` begins with the epoch of `known`, or anywhere when nothing is known yet.

    Raises:
        StateInvalid: a signature or digest is wrong, or the coordinator is behind what was seen before.
    """
    if known is not None and history.newest < known.roster.epoch:
        raise StateInvalid(
            f"roster: the coordinator is at epoch {history.newest}, this site has seen {known.roster.epoch}. It was "
            "rolled back, or restored from an old backup: the newer epochs are gone. Ask the coordinator by telephone."
        )
    if not history.epochs:
        raise StateInvalid("roster: the coordinator sent none. Update the package on both sides.")
    rosters = [checked(signed, authority) for signed in history.epochs]
    if known is not None and (rosters[0].epoch, rosters[0].sha256) != (known.roster.epoch, known.roster.sha256):
        raise StateInvalid(_forked(known.roster.epoch))
    _check_chain(rosters)
    return history.epochs[-1]


def _check_chain(rosters: Sequence[Roster]) -> None:
    for before, after in pairwise(rosters):
        if after.epoch != before.epoch + 1 or after.previous_sha256 != before.sha256:
            raise StateInvalid(_forked(after.epoch))


def _forked(epoch: int) -> str:
    return (
        f"roster: epoch {epoch} of the coordinator does not follow from the one that this site has seen: two histories "
        "are told. Ask the coordinator by telephone."
    )
