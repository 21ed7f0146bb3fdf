"""What sites and coordinator say to each other in a secure sum; bytes are hexadecimal, and all of it is doubted.

advert        site -> all     public keys of this sum, signed by the site's identity
sealed        site -> site    shares of its two secrets, sealed for each other site, and their digests
inbox         -> site         what the others have sealed for it, and say that it is
(vector)      site ->         the masked vector, as raw bytes beside the message
survivors     -> site         whose vectors are there
confirmation  site -> all     its signature under just that
confirmations -> site         those of the others
revealed      site ->         shares of the survivors' own masks, and of the keys of those who were lost
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from shared_models.files import canonical_json
from shared_models.parse import STRICT, Sha256, SiteName, plain
from shared_models.protect.prg import framed
from shared_models.protect.ring import MOST_SITES
from shared_models.roster import Key32, Signature

Share = Annotated[str, Field(pattern=r"^[0-9a-f]{66}$")]
Box = Annotated[str, Field(pattern=r"^[0-9a-f]{188}$")]  # nonce 12, two shares of 33, tag 16
Dealt = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]  # digests of a share of each of the two secrets
Sites = Annotated[tuple[SiteName, ...], Field(max_length=MOST_SITES)]
ADVERT, SURVIVORS = "secure sum advert", "secure sum survivors"  # purposes of an identity's signatures


@dataclass(frozen=True, slots=True)
class Advert:
    """The keys that a site has made for one sum.

    Attributes:
        context: id of the context that it was told; another one cannot be mistaken for it.
        channel, mask: X25519 public keys, for sealing shares and for pair masks.
        commitment: to the secret of its own mask.
        signature: by its identity, over all of the above.
    """

    __pydantic_config__ = STRICT
    site: SiteName
    context: Sha256
    channel: Key32
    mask: Key32
    commitment: Sha256
    signature: Signature = "0" * 128


@dataclass(frozen=True, slots=True)
class Adverts:
    """The adverts of the sites that take part, as the coordinator passes them on."""

    __pydantic_config__ = STRICT
    context: Sha256
    adverts: Annotated[tuple[Advert, ...], Field(max_length=MOST_SITES)]


@dataclass(frozen=True, slots=True)
class Sealed:
    """One site's shares, by the site that each box is for.

    Attributes:
        dealt: digests of the shares, by the site that has them, itself among them. Whoever gives out another share than
            it was dealt, or was dealt no shares of one secret, is known by them.
    """

    __pydantic_config__ = STRICT
    site: SiteName
    context: Sha256
    boxes: Mapping[SiteName, Box]
    dealt: Mapping[SiteName, Dealt] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Inbox:
    """The boxes for one site, and the digests of what is in them, by the site that each is from."""

    __pydantic_config__ = STRICT
    context: Sha256
    boxes: Mapping[SiteName, Box]
    dealt: Mapping[SiteName, Dealt] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Survivors:
    """The sites whose masked vectors the coordinator holds, sorted."""

    __pydantic_config__ = STRICT
    context: Sha256
    sites: Sites


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A site's word that it was told of these survivors and of no others."""

    __pydantic_config__ = STRICT
    site: SiteName
    context: Sha256
    signature: Signature


@dataclass(frozen=True, slots=True)
class Confirmations:
    """Who has confirmed, with the signature."""

    __pydantic_config__ = STRICT
    context: Sha256
    signatures: Mapping[SiteName, Signature]


@dataclass(frozen=True, slots=True)
class Revealed:
    """The shares that a site gives out, once: of no site both."""

    __pydantic_config__ = STRICT
    site: SiteName
    context: Sha256
    own_masks: Mapping[SiteName, Share]
    pair_keys: Mapping[SiteName, Share]


def write(message: object) -> bytes:
    """Canonical JSON of one of the above."""
    return canonical_json(plain(message))


def advert_statement(advert: Advert) -> bytes:
    """What the identity of a site signs under its keys."""
    parts = (advert.context, advert.site, advert.channel, advert.mask, advert.commitment)
    return framed(b"sfl-secagg/1 advert", *(part.encode() for part in parts))


def survivors_statement(survivors: Survivors) -> bytes:
    """What the identity of a site signs in the consistency round (Bonawitz et al. 2017, figure 4, round 3)."""
    return framed(b"sfl-secagg/1 survivors", survivors.context.encode(), *(site.encode() for site in survivors.sites))
