"""What crosses between coordinator and site: it comes back as it went, and what is not ours is refused."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from shared_models.envelope import signed
from shared_models.errors import WeightsInvalid
from shared_models.metrics import counts
from shared_models.study import Study, canonical, sha256
from shared_models.wire import (
    PROTOCOL,
    BlobRef,
    MessageInvalid,
    Order,
    Reply,
    dump,
    pack,
    read_order,
    read_reply,
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
