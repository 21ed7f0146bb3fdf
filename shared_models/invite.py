"""What passes between a coordinator and a hospital that joins or renews: the invite, the requests, the answer."""

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from typing import TypeVar

from shared_models.errors import EnrolmentFailed
from shared_models.files import canonical_json
from shared_models.identity import check_site_name, split_address
from shared_models.parse import STRICT, Line, parse, plain

T = TypeVar("T")
PREFIX = "fl1."
PURPOSE = "enrolment"  # of the identity key's signature over `statement`
RENEWAL = "renewal"  # the same for a RenewRequest
SUCCESSION = "identity"  # of a new identity key's signature over the same
OPTIONAL = ("listed", "identity_public_key", "identity_signature")


@dataclass(frozen=True, slots=True)
class Invite:
    """What a coordinator hands to one hospital, once.

    Attributes:
        address: `host:port` that the hospital dials.
        ca: SHA-256 of the coordinator's CA certificate (DER), hexadecimal.
        token: 128 random bits, hexadecimal; worth one enrolment.
        listed: number of the authority's revocation list, where its root key is kept offline: no older one is taken.
    """

    __pydantic_config__ = STRICT
    address: str
    ca: str
    site: str
    token: str = field(repr=False)
    listed: str = ""


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """What a hospital asks for with an invite.

    Attributes:
        request: signing request for its TLS key, PEM.
        node_public_key: one line in OpenSSH form.
        identity_public_key: 32 bytes, hexadecimal.
        signature: by the identity key over `statement(self)`, hexadecimal.
    """

    __pydantic_config__ = STRICT
    site: str
    token: str = field(repr=False)
    request: str
    node_public_key: str
    identity_public_key: str
    signature: str = ""


@dataclass(frozen=True, slots=True)
class RenewRequest:
    """What a site asks for before its certificate ends, over the connection that the old one still opens.

    Attributes:
        request: signing request for a new TLS key, PEM.
        signature: by the identity key over `statement(self)`, hexadecimal: a stolen TLS key renews nothing.
        identity_public_key: of a new identity key, or "" to keep the one that is; 32 bytes, hexadecimal.
        identity_signature: by that new key over the same statement: the old one hands over, the new one takes.
    """

    __pydantic_config__ = STRICT
    site: str
    request: str
    signature: str = ""
    identity_public_key: str = ""
    identity_signature: str = ""


@dataclass(frozen=True, slots=True)
class JoinAnswer:
    """What a hospital is given that has enrolled or renewed.

    Attributes:
        certificate: PEM, for the key of the request.
    """

    __pydantic_config__ = STRICT
    federation: Line
    site: str
    certificate: str


def write_invite(invite: Invite) -> str:
    """The invite as one word that survives mail and chat."""
    return PREFIX + base64.urlsafe_b64encode(write_message(invite)).rstrip(b"=").decode()


def read_invite(text: str) -> Invite:
    """Parses an invite as a person pasted it, line breaks and all; raises EnrolmentFailed."""
    word = "".join(text.split())
    if not word.startswith(PREFIX):
        raise EnrolmentFailed(f"invite: it begins with {PREFIX!r}. Paste the whole line of `fedserver invite`.")
    body = word.removeprefix(PREFIX)
    try:
        content = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        content = b""
    invite = read_message(Invite, content, "invite")
    if not re.fullmatch(r"[0-9a-f]{64}", invite.ca) or not re.fullmatch(r"[0-9a-f]{32}", invite.token):
        raise EnrolmentFailed(
            "invite: its fingerprint or token is malformed. Paste the whole line of `fedserver invite`, "
            "or ask the coordinator for a new one."
        )
    if not re.fullmatch(r"[0-9]{0,9}", invite.listed):
        raise EnrolmentFailed("invite: the number of its list is malformed. Ask the coordinator for a new one.")
    split_address(invite.address)
    check_site_name(invite.site)
    return invite


def read_message(kind: type[T], content: bytes, where: str) -> T:
    """One of the above from JSON; raises EnrolmentFailed, whose message never repeats the content: it holds a token."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not all(isinstance(p, str) and p.isascii() for p in value.values()):
        raise EnrolmentFailed(
            f"{where}: it is cut short, mistyped or of another version. Use it whole, as it was given, "
            "and the same version of the package on both sides."
        )
    return parse(kind, value, where, EnrolmentFailed)


def write_message(message: Invite | JoinRequest | RenewRequest | JoinAnswer) -> bytes:
    return canonical_json(_given(message))


def _given(message: Invite | JoinRequest | RenewRequest | JoinAnswer) -> dict[str, str]:
    """Without what is empty and newer than the first versions, which refuse words that they do not know."""
    return {key: value for key, value in plain(message).items() if value or key not in OPTIONAL}


def statement(request: JoinRequest | RenewRequest) -> bytes:
    """What a site signs: that this certificate request, and in joining these public keys and this invite, are its."""
    return canonical_json({k: v for k, v in _given(request).items() if k not in ("signature", "identity_signature")})
