"""Answers as hospitals signed them: kept and shown, and verified anywhere with nothing but the key beside them."""

import hashlib
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shared_models.envelope import PURPOSE, Envelope
from shared_models.errors import FederationError
from shared_models.identity import verify
from shared_models.parse import STRICT, SiteName, parse_json
from shared_models.roster import Key32, Signature
from shared_models.wire import MOST_ENVELOPE


@dataclass(frozen=True, slots=True)
class SignedAnswer:
    """One answer.

    Attributes:
        envelope: the bytes that were signed.
        key: the identity that the roster had for the site when it came, hexadecimal.
    """

    __pydantic_config__ = STRICT
    site: SiteName
    envelope: Annotated[str, Field(max_length=MOST_ENVELOPE)]
    signature: Signature
    key: Key32

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.envelope.encode()).hexdigest()


def envelope_of(answer: SignedAnswer, where: str, error: type[FederationError]) -> Envelope:
    """What the site has signed.

    Raises:
        error: it has not.
    """
    content = answer.envelope.encode()
    envelope = parse_json(Envelope, content, where, error)
    good = verify(bytes.fromhex(answer.key), bytes.fromhex(answer.signature), PURPOSE, content)
    if not good or envelope.asked.site != answer.site:
        raise error(f"{where}: is not as {answer.site!r} signed it. It was edited; get the original back.")
    return envelope
