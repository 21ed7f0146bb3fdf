"""What has become of a federation's releases since they were made: a signed list that reaches hospitals as a file.

A release says nothing of what happened after it: that it was retired, because a site left or a fault was found. The
coordinator signs a list of all its releases, good for some days; a hospital keeps the newest that it was handed, takes
no older one, and predicts with nothing that the list calls retired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from shared_models.dates import day
from shared_models.errors import ReleaseInvalid, ReleaseRetired
from shared_models.files import canonical_json
from shared_models.identity import Credential, sign, stated
from shared_models.parse import STRICT, Sha256, parse_json, plain, printable
from shared_models.release_facts import Pem, Signature64

PURPOSE = "release-status"
MOST_BYTES = 4 << 20
AHEAD_S = 86400.0  # that the coordinator's clock may be before a hospital's
Stage: TypeAlias = Literal["candidate", "approved", "retired"]
Time = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Standing:
    """Of one release; `since` is seconds since the epoch, `words` what hospitals are told besides."""

    __pydantic_config__ = STRICT
    label: Annotated[str, Field(max_length=128)]
    stage: Stage
    since: Time
    words: Annotated[str, Field(max_length=500)] = ""


@dataclass(frozen=True, slots=True)
class Standings:
    """All releases of a federation by their digests.

    Attributes:
        made_at, good_until: seconds since the epoch.
    """

    __pydantic_config__ = STRICT
    format: Literal["fedstatus/1"]
    federation: Annotated[str, Field(max_length=64)]
    made_at: Time
    good_until: Time
    releases: Annotated[Mapping[Sha256, Standing], Field(max_length=10_000)]


@dataclass(frozen=True, slots=True)
class SignedStandings:
    """The list, the coordinator's signature of it (hexadecimal), and the authority's certificate of that key, PEM."""

    __pydantic_config__ = STRICT
    standings: Standings
    signature: Signature64
    certificate: Pem


def sign_standings(by: Credential, standings: Standings) -> bytes:
    """The file of a list; `by` is what the coordinator signs its statements with."""
    signature = sign(by.key, PURPOSE, canonical_json(plain(standings)))
    return canonical_json(plain(SignedStandings(standings, signature.hex(), by.certificate.decode())))


def read_standings(content: bytes, authorities: Sequence[bytes], where: str) -> Standings:
    """The list of a file, if a coordinator for whom one of `authorities` (PEM) vouches has signed it.

    Raises:
        ReleaseInvalid: it is no list, or not signed so.
    """
    if len(content) > MOST_BYTES:
        raise ReleaseInvalid(f"{where}: is larger than a list of releases can be. Get it again.")
    signed = parse_json(SignedStandings, content, where, ReleaseInvalid)
    facts = canonical_json(plain(signed.standings))
    certificate, signature = signed.certificate.encode(), bytes.fromhex(signed.signature)
    if not any(stated(each, certificate, signature, PURPOSE, facts) for each in authorities):
        raise ReleaseInvalid(
            f"{where}: the list is not signed by the federation that the release is of, or was changed. Ask its "
            "coordinator for the output of `fedserver release-status`."
        )
    return signed.standings


def ahead(standings: Standings, now_s: float) -> str:
    """What is wrong with the times of a list, which would be the newest for as long as it is ahead; "" if nothing."""
    if standings.made_at > now_s + AHEAD_S:
        return (
            f"the list is dated {day(standings.made_at)}, which has not come. Look at the clocks here and at the "
            "coordinator, and get a new list from there."
        )
    if standings.good_until < standings.made_at:
        return "the list ends before it begins. Get a new list from the coordinator."
    return ""


def retired(standings: Standings, digest: str) -> None:
    """Raises ReleaseRetired where a list says that the release with this digest was retired."""
    known = standings.releases.get(digest)
    if known is not None and known.stage == "retired":
        why = f" ({printable(known.words)})" if known.words else ""
        raise ReleaseRetired(
            f"release {known.label}: {standings.federation!r} has retired it on {day(known.since)}{why}. Predict "
            "nothing more with it; ask the coordinator for its successor."
        )


def unretired(kept: Standings, newer: Standings) -> list[str]:
    """Releases that `kept` calls retired and `newer` does not, by their labels: nobody takes a retirement back."""
    return [
        each.label
        for digest, each in kept.releases.items()
        if each.stage == "retired" and (digest not in newer.releases or newer.releases[digest].stage != "retired")
    ]


def warned(standings: Standings, digest: str, made_at: float, now_s: float) -> list[str]:
    """What a list gives cause to say of the release with this digest, made at `made_at`; nothing where it is well.

    Raises:
        ReleaseInvalid: it is retired, or the list is younger than the release and does not know it.
    """
    retired(standings, digest)
    known, warnings = standings.releases.get(digest), list[str]()
    if known is None and standings.made_at > made_at:
        raise ReleaseInvalid(
            f"release {digest[:12]}: is not among those of {standings.federation!r} on {day(standings.made_at)}, "
            "though it was made before. Ask the coordinator by telephone what it is."
        )
    if known is None:
        warnings.append(f"the list of {day(standings.made_at)} is older than the release, and does not know it yet")
    elif known.stage == "candidate":
        warnings.append(f"a candidate on {day(standings.made_at)}: its federation had not approved it")
    if known is not None and known.words:
        warnings.append(f"{printable(known.words)}, as the list of {day(standings.made_at)} says")
    if now_s > standings.good_until:
        warnings.append(
            f"the list of releases was good until {day(standings.good_until)}: whether this one was retired since is "
            "not known. Ask the coordinator for a new list"
        )
    return warnings
