"""What a secure sum is about, and who may take part in it.

The digest of a context goes into every key, signature and sealed share: two sites that were told different things
(another model, another cohort, another clip) have nothing in common, and no sum is made twice under one context.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field

from shared_models.files import canonical_json
from shared_models.parse import STRICT, RunId, Sha256, SiteName, plain
from shared_models.protect.prg import derive, framed
from shared_models.protect.ring import MOST_SITES, Encoding

LEAST_SITES = 3  # of two, each knows the other's update from the sum
PositiveFloat = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that the sites of one secure sum must agree on.

    Attributes:
        attempt: of the round, from 1; every try anew is another context.
        cohort: the sites that may take part, sorted.
        threshold: how many must stay to the end; above two thirds of the cohort (Bonawitz et al. 2017, section 6.2,
            against a coordinator that lies).
        least_cohort: fewest vectors that may be added up.
        model_sha256: of the weights that the updates start from.
        schema_sha256: of what stands where in a vector (`ring.Layout`).
        whole: sum of the cohort's weights; a site's share of the mean is its weight over this.
        policy_sha256: of the study, whose protection this is.
    """

    __pydantic_config__ = STRICT
    run: RunId
    round: Annotated[int, Field(ge=0, le=10_000)]
    attempt: Annotated[int, Field(ge=1, le=1000)]
    cohort: Annotated[tuple[SiteName, ...], Field(max_length=MOST_SITES)]
    threshold: Annotated[int, Field(ge=1, le=MOST_SITES)]
    least_cohort: Annotated[int, Field(ge=1, le=MOST_SITES)]
    roster_sha256: Sha256
    model_sha256: Sha256
    schema_sha256: Sha256
    policy_sha256: Sha256
    whole: Annotated[int, Field(ge=1, lt=2**48)]
    clip: PositiveFloat
    scale: PositiveFloat
    ring_bits: Literal[24, 32] = 32
    protocol: Literal["sfl-secagg/1"] = "sfl-secagg/1"

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.clip, self.scale, self.ring_bits)

    @property
    def digest(self) -> bytes:
        """K: 32 bytes that everything in this sum is bound to."""
        return _digest(self)

    @property
    def id(self) -> str:
        return self.digest.hex()

    @property
    def canary(self) -> int:
        """What each site adds in the last element, 16 bits."""
        return int.from_bytes(derive(self.digest, b"sfl-secagg/1 canary")[:2], "big")

    @property
    def fewest(self) -> int:
        """With fewer sites than this the sum is not made."""
        return max(self.threshold, self.least_cohort)

    def place(self, site: str) -> int:
        """Where a site's shares are taken: 1, 2, ... by its place in the cohort."""
        return self.cohort.index(site) + 1


@lru_cache(maxsize=64)
def _digest(context: Context) -> bytes:
    return hashlib.sha256(framed(b"sfl-secagg/1 context", canonical_json(plain(context)))).digest()


def least_threshold(sites: int) -> int:
    """The smallest threshold above two thirds: 3 of 3, 4 of 5, 7 of 10, 34 of 50."""
    return 2 * sites // 3 + 1
