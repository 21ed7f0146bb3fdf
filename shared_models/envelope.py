"""What a site signs of each reply: which order it answers, and digests of all that it says.

An envelope is doubted before a byte of the reply is parsed, and before its tensors are opened: whose signature it is,
then whether it is of the very order that is waited for, then whether the facts are those that were signed. Tensors are
named by the digest under which the gateway has taken them in, and are not hashed a second time.

Of a reply that fails nothing is known but that somebody sent it, so it is no word of the site: see `AnswerForged`.
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from shared_models.errors import AnswerForged, UpdateRejected
from shared_models.files import canonical_json
from shared_models.identity import sign, verify
from shared_models.parse import STRICT, RunId, Sha256, SiteName, parse_json, plain
from shared_models.wire import BlobRef, MessageInvalid, Nonce, Order, Reply, SignedReply, dump, read_facts

PURPOSE = "answer"  # of the signature
OrderKind: TypeAlias = Literal[
    "hello", "statistics", "train", "evaluate", "advertise", "share", "mask", "confirm", "unmask"
]


@dataclass(frozen=True, slots=True)
class Asked:
    """One order to one site, as both ends name it; `nonce` makes it the only one of its kind."""

    __pydantic_config__ = STRICT
    kind: OrderKind
    site: SiteName
    run: RunId
    study_sha256: Sha256
    base_sha256: Sha256
    round: Annotated[int, Field(ge=0, le=10_000)]
    attempt: Annotated[int, Field(ge=1, le=1000)]
    nonce: Nonce


@dataclass(frozen=True, slots=True)
class Envelope:
    """What is signed.

    Attributes:
        facts: of the reply's JSON.
        tensors: of the blob beside it, where there is one.
    """

    __pydantic_config__ = STRICT
    asked: Asked
    facts: BlobRef
    tensors: BlobRef | None = None


CODES = {  # of what is compared, in this order: a reply to another run is of another round besides
    "study_sha256": "OTHER_STUDY",
    "run": "OTHER_RUN",
    "round": "STALE_ROUND",
    "base_sha256": "OTHER_WEIGHTS",
    "kind": "OTHER_KIND",
    "attempt": "OTHER_ATTEMPT",
    "nonce": "REPLAYED",
}


def asked_of(order: Order, site: str) -> Asked:
    digests = (order.study_sha256, order.base_sha256)
    return Asked(order.kind, site, order.run, *digests, order.round, order.attempt, order.nonce)


def signed(reply: Reply, order: Order, key: bytes | None) -> SignedReply:
    """`reply` as the answer to `order`, under the identity key of its site (PEM); None in a simulation."""
    facts = dump(reply)
    envelope = canonical_json(plain(Envelope(asked_of(order, reply.site), _named(facts), reply.blob)))
    return SignedReply(facts, envelope, b"" if key is None else sign(key, PURPOSE, envelope))


def opened(told: SignedReply, asked: Asked, key: bytes | None, where: str) -> Reply:
    """The reply in `told`, once it is seen to be this site's answer to just this order.

    Args:
        key: the site's identity as the roster has it, 32 bytes; None in a simulation, where nobody has one.

    Raises:
        AnswerForged: it is not, in the order in which its codes stand there; nothing in the reply was looked at.
        MessageInvalid: the site has signed something that is no reply.
        UpdateRejected: `CONTENT_CHANGED`: the site has signed other tensors than its reply names.
    """
    envelope = read_envelope(told.envelope, where)
    if envelope.asked.site != asked.site:
        raise AnswerForged("OTHER_SITE", f"{where}: the envelope is of {envelope.asked.site!r}. It was left out.")
    good = told.signature == b"" if key is None else verify(key, told.signature, PURPOSE, told.envelope)
    if not good:
        raise AnswerForged(
            "BAD_SIGNATURE",
            f"{where}: its reply is not signed by the key that the roster has for it. If the site lost its keys, "
            f"invite it anew; else somebody answers in its name, and `fedserver revoke` shuts the certificate out.",
        )
    for name, code in CODES.items():
        if getattr(envelope.asked, name) != getattr(asked, name):
            raise AnswerForged(code, f"{where}: answers another order: its {name} is not that of this one.")
    if envelope.facts != _named(told.facts):
        raise AnswerForged("CONTENT_CHANGED", f"{where}: its reply is not the one that it signed. It was left out.")
    reply = read_facts(told, where)
    if reply.blob != envelope.tensors:
        raise UpdateRejected("CONTENT_CHANGED", f"{where}: signed other tensors than it names. It was left out.")
    return reply


def read_envelope(content: bytes, where: str) -> Envelope:
    """Raises AnswerForged, `ENVELOPE_INVALID`, of bytes that are none; no signature is looked at."""
    try:
        return parse_json(Envelope, content, where, MessageInvalid)
    except MessageInvalid:
        raise AnswerForged("ENVELOPE_INVALID", f"{where}: its envelope cannot be read. It was left out.") from None


def _named(content: bytes) -> BlobRef:
    return BlobRef(hashlib.sha256(content).hexdigest(), len(content))
