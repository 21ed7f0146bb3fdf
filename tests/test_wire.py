"""What crosses between coordinator and site: it comes back as it went, and what is not ours is refused."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pydantic import TypeAdapter, ValidationError

from shared_models.class_counts import BINS, MICRO, ClassCounts
from shared_models.drift import Profile
from shared_models.envelope import asked_of, opened, signed
from shared_models.errors import WeightsInvalid
from shared_models.metrics import counts
from shared_models.study import Study, canonical, sha256
from shared_models.wire import (
    MOST_FACTS,
    MOST_KEYS,
    PROTOCOL,
    BlobRef,
    MessageInvalid,
    Order,
    Reply,
    SignedReply,
    dump,
    pack,
    read_facts,
    read_order,
    read_reply,
    read_signed,
    tensors_of,
    unpack,
    write_order,
    write_reply,
)
from simulations.engine import identify

STUDY = Study(name="toy")
ORDER = Order("train", "toy-1", 3, 1, canonical(STUDY).decode(), sha256(STUDY), "b" * 64, "val", BlobRef("c" * 64, 124))
REPLY = Reply(
    "update", "north", "toy-1", 3, 1, sha256(STUDY), "b" * 64, examples=10, losses=(0.5, None), scored="val",
    scores={"lung": counts([0.5, None, 1.0])}, device="cuda:0",
)  # fmt: skip
any_array = st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.uint8]).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0))
)


@pytest.fixture(autouse=True)
def _identity():
    identify()


def message(facts: object, protocol: object = PROTOCOL) -> Message:
    record = ConfigRecord({"protocol": protocol, "json": facts})  # type: ignore[dict-item]
    return Message(RecordDict({"facts": record}), 1, "train")


def test_an_order_and_a_reply_come_back_as_they_went():
    sent = write_order(ORDER, 1)
    assert read_order(sent) == ORDER
    assert read_reply(write_reply(signed(REPLY, ORDER, None), sent), "north") == REPLY


@given(st.dictionaries(st.text(min_size=1, max_size=8), any_array, max_size=3))
def test_tensors_come_back_as_they_went(tensors):
    back = unpack(pack(tensors), "here")
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()


def test_a_message_without_tensors_has_none():
    assert tensors_of(write_order(ORDER, 1), "here") is None


@pytest.mark.parametrize(
    ("declared", "content"),
    [
        (((3, 3), "float32"), np.zeros((3, 3))),
        (((2, 2), "float32"), np.zeros(7, np.float32)),
        (((3,), "float32"), np.asfortranarray(np.zeros((3, 3), np.float32))),
    ],
)
def test_an_array_that_is_not_what_its_record_declares_is_refused(declared, content):
    honest = FlowerArray(content)
    (shape, dtype) = declared
    record = ArrayRecord({"w": FlowerArray(dtype=dtype, shape=shape, stype=honest.stype, data=honest.data)})
    with pytest.raises(WeightsInvalid, match="not the array that its record declares"):
        unpack(record, "site 'north'")


def test_an_array_that_claims_to_be_huge_is_refused_before_memory_is_taken():
    honest = FlowerArray(np.zeros(4, np.float32))
    head = honest.data.replace(b"'shape': (4,)", b"'shape': (4000000000000,)".ljust(13))[: len(honest.data)]
    record = ArrayRecord({"w": FlowerArray(dtype="float32", shape=(4000000000000,), stype=honest.stype, data=head)})
    with pytest.raises(WeightsInvalid):
        unpack(record, "site 'north'")


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04K\x01.", b"\x93NUMPY\x01\x00\xff\xff{", b"\x93NUMPY\x03\x00\x06\x00\x00\x00{}"]
)
def test_bytes_that_are_no_array_are_refused(data):
    record = ArrayRecord({"w": FlowerArray(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)})
    with pytest.raises(WeightsInvalid, match="is not a NumPy array"):
        unpack(record, "site 'north'")


@pytest.mark.parametrize("protocol", [PROTOCOL + 1, "1", b"1"])
def test_another_protocol_version_is_refused_and_says_both(protocol):
    with pytest.raises(MessageInvalid, match=f"this side speaks {PROTOCOL}"):
        read_order(message(dump(ORDER), protocol))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"site": "../north"}, "site"),
        ({"round": -1}, "round"),
        ({"round": 10**9}, "round"),
        ({"examples": 2**60}, "examples"),
        ({"study_sha256": "b"}, "study_sha256"),
        ({"refusal": "because of patient Smith"}, "refusal"),
        ({"device": "a file name.dcm"}, "device"),
        ({"kind": "order"}, "kind"),
    ],
)
def test_facts_outside_their_range_are_refused_by_name(change, key):
    with pytest.raises(MessageInvalid, match=f"`{key}`"):
        read_reply(message(dump(replace(REPLY, **change))), "site 'north'")


def test_a_message_of_somebody_else_is_refused():
    with pytest.raises(MessageInvalid, match="not a message of this system"):
        read_order(Message(RecordDict({"config": ConfigRecord({"lr": 0.1})}), 1, "train"))
    with pytest.raises(MessageInvalid):
        read_order(message(b"{"))
    with pytest.raises(MessageInvalid, match="not a key here"):
        read_order(message(dump(ORDER)[:-1] + b',"code":"import os"}'))


def largest() -> Reply:
    """An evaluation of a site with a million cases: 32 labels, scored three times over, and 256 features."""
    bins, cells = (999,) * BINS, (999 * BINS // 15,) * 15
    cases, curve = 1000 * BINS, (2 * cells[0],) * 15
    each = ClassCounts(
        "auroc", cases, cases, cases, cases, 2 * cases**2, cases**2, MICRO * cases, bins, bins, curve, cells,
        (MICRO * cells[0],) * 15,
    )  # fmt: skip
    scores = {f"{n:02}".ljust(64, "x"): each for n in range(32)}
    profile = Profile(2**20, {f"{n:03}".ljust(80, "x"): (2**12,) * 256 for n in range(256)})
    told = replace(REPLY, kind="evaluation", scores=scores, own_scores=scores, validation=scores, profile=profile)
    return replace(told, losses=(-123456.78901234567,) * 1000, refusal_keys=("x" * 40,) * 16)


def test_the_largest_reply_of_an_honest_site_is_read_and_one_beyond_what_any_has_is_not_looked_into():
    sent, told = write_order(ORDER, 1), signed(largest(), ORDER, None)
    assert len(told.facts) > MOST_FACTS / 2
    found = read_signed(write_reply(told, sent), "north")
    assert opened(found, asked_of(ORDER, "north"), None, "north") == largest()
    for facts in (b" " * MOST_FACTS + told.facts, b"{" + b'"":0,' * MOST_KEYS + told.facts[1:]):
        with pytest.raises(MessageInvalid, match=r"bytes and [0-9]+ keys; none has more"):
            read_signed(write_reply(replace(told, facts=facts), sent), "north")


@pytest.mark.parametrize(
    "facts",
    [
        '{"refusal_keys":[%s]}',
        '{"losses":[%s]}',
        '{"scores":{"lung":{"measure":"auroc","positive":[%s]}}}',
        '{"fingerprint":{"shape":[[%s]]}}',
        '{"profile":{"counts":{"a":[%s]}}}',
    ],
)
def test_a_reply_that_is_wrong_in_very_many_places_is_refused_by_the_first_few(facts):
    content = (facts % ",".join(["[]"] * (MOST_FACTS // 30))).encode()
    with pytest.raises(ValidationError) as found:
        TypeAdapter(Reply).validate_json(content, strict=True)
    assert found.value.error_count() < 40
    with pytest.raises(MessageInvalid):
        read_facts(SignedReply(content, b"", b""), "north")


def test_every_sequence_in_a_reply_is_given_up_at_its_first_fault():
    def sequences(schema: Any) -> Iterator[Any]:
        if isinstance(schema, dict) and schema.get("type") in ("tuple", "list"):
            yield schema
        for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
            yield from sequences(part)

    found = [part for part in sequences(TypeAdapter(Reply).core_schema) if "variadic_item_index" in part]
    assert len(found) > 10
    assert all(part.get("fail_fast") for part in found)
