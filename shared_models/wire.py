"""Flower messages to our types and back; record names live here and nowhere else.

An order or a reply is one `facts` record (protocol version and canonical JSON, parsed and doubted on arrival) and,
where tensors travel inside the message, one `tensors` record. In a deployment tensors travel beside the message as a
blob that the facts name by SHA-256. The record of a reply holds its envelope and the site's signature besides, so that
both are looked at before anything in the facts is (`shared_models.envelope`).
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias, cast

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from pydantic import Field

from shared_models.audit import Head
from shared_models.drift import Profile
from shared_models.errors import FederationError, WeightsInvalid
from shared_models.files import canonical_json
from shared_models.parse import STRICT, Count, RunId, Sha256, SiteName, parse_json, plain
from shared_models.plan import Fingerprint
from shared_models.protect.context import Context
from shared_models.protect.messages import (
    Advert,
    Adverts,
    Confirmation,
    Confirmations,
    Inbox,
    Revealed,
    Sealed,
    Survivors,
)
from shared_models.scores import AnyScore
from shared_models.weights import Array, Arrays

PROTOCOL = 4
MOST_ENVELOPE = 2048  # bytes
MOST_FACTS = 2 << 20  # bytes of a reply; one that scores 32 labels three times over a million cases each has 1.3 MB
MOST_KEYS = 10_000  # in it; such a reply has 2,000, and each that is wrong costs half a kilobyte to find out
NO_NONCE = "0" * 32
Split: TypeAlias = Literal["val", "test"]
PolicyKey = Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]
Finite = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]


class MessageInvalid(FederationError):
    """A message that is not one of ours, or of another version."""


@dataclass(frozen=True, slots=True)
class BlobRef:
    """Tensors that travel beside the message: a safetensors file by its digest."""

    __pydantic_config__ = STRICT
    sha256: Sha256
    size_bytes: Count


Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


@dataclass(frozen=True, slots=True)
class SignedReply:
    """A reply as it travels, nothing of it parsed.

    Attributes:
        facts: canonical JSON of a Reply.
        envelope: canonical JSON of an `envelope.Envelope`.
        signature: of the site's identity key over the envelope, 64 bytes; none in a simulation.
    """

    facts: bytes
    envelope: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Proof:
    """A signature of the coordinator, in hexadecimal, and the certificate (PEM) by which its authority vouches."""

    __pydantic_config__ = STRICT
    certificate: Annotated[str, Field(max_length=4000)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


@dataclass(frozen=True, slots=True)
class Order:
    """What the coordinator asks of one site.

    Attributes:
        study: canonical JSON of the study; its digest is what a site approves.
        base_sha256: of the weights file of the round; the update must name it.
        evaluate: score the received weights on this split of the site's own patients.
        blob: where the weights are when they do not travel inside the message.
        counted: round of this site's last update that the coordinator counted (0: none); what the site remembers of
            that round is what it goes on with.
        plan, plan_sha256: canonical JSON of the plan that the sites' statistics gave, and its digest.
        plan_proof: that the coordinator made the plan for this run (`planned.statement`); none in a simulation.
        study_proof: that the coordinator runs this study (`study.statement`); none in a simulation.
        head: of the coordinator's audit log; none in a simulation.
        nonce: drawn anew for every order, also for one that is given again; the site signs its answer for it.
        context, adverts, inbox, survivors, confirmations: of an `advertise`, `share`, `mask`, `confirm` and `unmask`:
            the steps of a secure sum over what a `train` or `evaluate` has left at the site.
    """

    __pydantic_config__ = STRICT
    kind: Literal["hello", "statistics", "train", "evaluate", "advertise", "share", "mask", "confirm", "unmask"]
    run: RunId
    round: Annotated[int, Field(ge=0, le=10_000)]
    attempt: Annotated[int, Field(ge=1, le=1000)]
    study: Annotated[str, Field(max_length=100_000)]
    study_sha256: Sha256
    base_sha256: Sha256
    evaluate: Split | None = None
    blob: BlobRef | None = None
    plan: Annotated[str, Field(max_length=20_000)] | None = None
    plan_sha256: Sha256 | None = None
    plan_proof: Proof | None = None
    counted: Annotated[int, Field(ge=0, le=10_000)] = 0
    study_proof: Proof | None = None
    head: Head | None = None
    nonce: Nonce = NO_NONCE
    context: Context | None = None
    adverts: Adverts | None = None
    inbox: Inbox | None = None
    survivors: Survivors | None = None
    confirmations: Confirmations | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a site answers; everything that leaves a hospital is in these fields or in the tensors.

    Attributes:
        refusal: code of a refused order; then of all below only `refusal_keys`, `accused` and `head` may be there.
        refusal_keys: names of the keys of the site's policy that the study breaks.
        accused: the site whose shares in a secure sum were refused.
        examples: examples behind the update, each counted once.
        losses: mean training loss of ten equal stretches of the local steps; None where it was not finite.
        scores: label (or region) -> counts of how the received weights do on split `scored`.
        own_scores: the same of the site's own model, where the study gives it one.
        validation: counts of the last weights on the site's validation patients, by which scores are calibrated.
        variance: of the site's mean local step, summed over the weights, where the study weighs by it.
        train_cases, test_cases: how many cases the site holds for each.
        plan_sha256: of the plan that the work followed.
        fingerprint: what the site's training cases add to the plan.
        profile: what cases kept out of training and the answers on them are like, where the study asks for it.
        head: of the site's audit log; none in a simulation.
        advert, sealed, confirmation, revealed: what a site says in the steps of a secure sum; its vector is a blob. Of
            an update that is to be summed securely a site says `ready`, and nothing else.
    """

    __pydantic_config__ = STRICT
    kind: Literal[
        "hello", "statistics", "update", "evaluation", "refusal",
        "ready", "advert", "sealed", "masked", "confirmation", "revealed",
    ]  # fmt: skip
    site: SiteName
    run: RunId
    round: Annotated[int, Field(ge=0, le=10_000)]
    attempt: Annotated[int, Field(ge=1, le=1000)]
    study_sha256: Sha256
    base_sha256: Sha256
    refusal: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{2,40}$")] | None = None
    refusal_keys: Annotated[tuple[PolicyKey, ...], Field(max_length=16, fail_fast=True)] = ()
    accused: SiteName | None = None
    examples: Annotated[int, Field(ge=-(2**53), le=2**53)] = 0
    steps: Count = 0
    seconds: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    losses: Annotated[tuple[Finite | None, ...], Field(max_length=1000, fail_fast=True)] = ()
    scored: Split | None = None
    scores: Mapping[Annotated[str, Field(max_length=64)], AnyScore] = field(default_factory=dict)
    own_scores: Mapping[Annotated[str, Field(max_length=64)], AnyScore] = field(default_factory=dict)
    validation: Mapping[Annotated[str, Field(max_length=64)], AnyScore] = field(default_factory=dict)
    variance: Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)] | None = None
    train_cases: Count = 0
    test_cases: Count = 0
    device: Annotated[str, Field(pattern=r"^[a-z0-9:]{0,16}$")] = ""
    blob: BlobRef | None = None
    plan_sha256: Sha256 | None = None
    fingerprint: Fingerprint | None = None
    profile: Profile | None = None
    head: Head | None = None
    advert: Advert | None = None
    sealed: Sealed | None = None
    confirmation: Confirmation | None = None
    revealed: Revealed | None = None


STEPS = {"advertise": "advert", "share": "sealed", "mask": "masked", "confirm": "confirmation", "unmask": "revealed"}
KIND_OF_MESSAGE = {"hello": "query", "statistics": "query", "train": "train", "evaluate": "evaluate"}
KIND_OF_MESSAGE |= dict.fromkeys(STEPS, "train")
VECTOR = "vector"  # a masked vector, where it travels inside the message


def pack(arrays: Arrays) -> ArrayRecord:
    """Tensors as a Flower record; built once a round and shared by all its messages."""
    return ArrayRecord({name: FlowerArray(np.asarray(a, order="C")) for name, a in arrays.items()})


def unpack(record: ArrayRecord, where: str) -> dict[str, Array]:
    """Tensors of a record without a copy, read-only.

    Raises:
        WeightsInvalid: bytes that are not the declared array (Flower 1.41 does not compare the two).
    """
    return {name: _read_npy(name, item, where) for name, item in record.items()}


def _read_npy(name: str, item: FlowerArray, where: str) -> Array:
    stream = io.BytesIO(item.data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError:
        raise WeightsInvalid(f"{where}: {name!r} is not a NumPy array. Use the released client.") from None
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if (
        dtype.hasobject
        or fortran
        or (tuple(item.shape), item.dtype) != (shape, str(dtype))
        or len(item.data) - stream.tell() != size
    ):
        raise WeightsInvalid(f"{where}: {name!r} is not the array that its record declares. Use the released client.")
    return np.frombuffer(item.data, dtype, offset=stream.tell()).reshape(shape)


def write_order(order: Order, node_id: int, tensors: ArrayRecord | None = None, ttl_s: float | None = None) -> Message:
    """A message for one node; Flower forgets it after `ttl_s` (12 h by default), answered or not."""
    kind, group = KIND_OF_MESSAGE[order.kind], str(order.round)
    return Message(_content({"json": dump(order)}, tensors), node_id, kind, group_id=group, ttl=ttl_s)


def read_order(message: Message) -> Order:
    return parse_json(Order, _facts(message, "order"), "order", MessageInvalid)


def write_reply(signed: SignedReply, to: Message, tensors: ArrayRecord | None = None) -> Message:
    told = {"json": signed.facts, "envelope": signed.envelope, "signature": signed.signature}
    return Message(_content(told, tensors), reply_to=to)


def read_signed(message: Message, where: str) -> SignedReply:
    """A reply without a look into it.

    Raises:
        MessageInvalid: no reply of this system, or of another version of it.
    """
    facts = _facts(message, where)
    record = cast(ConfigRecord, message.content["facts"])
    envelope, signature = record.get("envelope"), record.get("signature")
    if not isinstance(envelope, bytes) or not isinstance(signature, bytes):
        raise MessageInvalid(f"{where}: its reply has no envelope. Site and coordinator must run released versions.")
    keys = facts.count(b":")  # or more, where a colon stands in a string
    if len(facts) > MOST_FACTS or keys > MOST_KEYS:
        raise MessageInvalid(
            f"{where}: its reply has {len(facts)} bytes and {keys} keys; none has more than {MOST_FACTS} and "
            f"{MOST_KEYS}. Use the released client."
        )
    if len(envelope) > MOST_ENVELOPE or len(signature) > 64:
        raise MessageInvalid(f"{where}: its reply has an envelope of {len(envelope)} bytes. Use the released client.")
    return SignedReply(facts, envelope, signature)


def read_facts(signed: SignedReply, where: str) -> Reply:
    return parse_json(Reply, signed.facts, where, MessageInvalid)


def read_reply(message: Message, where: str) -> Reply:
    """The facts of a reply whose envelope nobody doubts: a round asks `envelope.opened` first."""
    return parse_json(Reply, _facts(message, where), where, MessageInvalid)


def tensors_of(message: Message, where: str) -> dict[str, Array] | None:
    """Tensors inside a message, or None when it holds none."""
    record = message.content.get("tensors")
    return None if record is None else unpack(cast(ArrayRecord, record), where)


def dump(facts: Order | Reply) -> bytes:
    """Canonical JSON of the facts of a message."""
    return canonical_json(plain(facts))


def _content(told: Mapping[str, bytes], tensors: ArrayRecord | None) -> RecordDict:
    content = RecordDict({"facts": ConfigRecord({"protocol": PROTOCOL, **told})})
    if tensors is not None:
        content["tensors"] = ArrayRecord(dict(tensors))
    return content


def _facts(message: Message, where: str) -> bytes:
    record = message.content.get("facts")
    if not isinstance(record, ConfigRecord) or not isinstance(record.get("json"), bytes):
        raise MessageInvalid(f"{where}: not a message of this system. Site and coordinator must run released versions.")
    if record.get("protocol") != PROTOCOL:
        raise MessageInvalid(
            f"{where}: protocol {record.get('protocol')!r}, this side speaks {PROTOCOL}. Install one version on both."
        )
    return cast(bytes, record["json"])
