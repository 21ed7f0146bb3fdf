"""How tensors get to the coordinator: what is published is the same file, and what a site names must be its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedserver.courier import Beside, Inline
from shared_models.envelope import signed
from shared_models.errors import UpdateRejected, WeightsInvalid
from shared_models.files import file_sha256
from shared_models.study import Study, canonical, sha256
from shared_models.weights import Arrays, one, save_arrays
from shared_models.wire import (
    PROTOCOL,
    BlobRef,
    MessageInvalid,
    Order,
    Reply,
    dump,
    pack,
    read_reply,
    write_order,
    write_reply,
)
from simulations.engine import identify
from tests.toys import WEIGHTS

STUDY = Study(name="toy")
REPLY = Reply("update", "north", "toy-1", 3, 1, sha256(STUDY), "b" * 64, examples=10)
DELTA: Arrays = {name: np.ones_like(a) for name, a in WEIGHTS.items()}


@pytest.fixture(autouse=True)
def _identity():
    identify()


@pytest.fixture
def beside(tmp_path: Path) -> Beside:
    return Beside(tmp_path / "out", tmp_path / "in", "toy-1")


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "runs" / "round-0003.safetensors"
    return path, save_arrays(path, WEIGHTS)


ORDER = Order("train", "toy-1", 3, 1, canonical(STUDY).decode(), sha256(STUDY), "b" * 64)
SIGNED = signed(REPLY, ORDER, None)


def order() -> Message:
    return write_order(ORDER, 1)


MESSAGE_OF = {
    "with tensors": lambda: write_reply(SIGNED, order(), pack(DELTA)),
    "bare": lambda: write_reply(SIGNED, order()),
}


def upload(beside: Beside, site: str, arrays: Arrays = DELTA) -> BlobRef:
    """A file as the gateway leaves it: whole, under its digest, in the folder of the site that sent it."""
    part = beside.incoming / site / "part"
    digest = save_arrays(part, arrays)
    part.replace(beside.incoming / site / digest)
    return BlobRef(digest, (beside.incoming / site / digest).stat().st_size)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# Out


def test_what_is_published_is_the_same_file_under_its_digest(beside, weights):
    path, digest = weights
    parcel = beside.publish(path, digest)
    assert parcel.blob == BlobRef(digest, path.stat().st_size)
    assert parcel.tensors is None
    assert (beside.out / digest).samefile(path)  # no copy
    assert file_sha256(beside.out / digest) == digest
    assert names(beside.out) == [digest]
    assert beside.out.stat().st_mode & 0o777 == 0o700


def test_weights_may_be_published_twice_and_after_a_kill_in_between(beside, weights):
    path, digest = weights
    beside.publish(path, digest)
    (beside.out / digest).unlink()  # killed before it was there
    assert beside.publish(path, digest) == beside.publish(path, digest)
    assert file_sha256(beside.out / digest) == digest
    assert names(beside.out) == [digest]


def test_retired_weights_are_not_given_out_any_more_and_stay_in_their_run(beside, weights):
    path, digest = weights
    beside.publish(path, digest)
    beside.retire(digest)
    beside.retire(digest)
    assert names(beside.out) == []
    assert file_sha256(path) == digest


def test_weights_that_two_runs_send_are_given_out_until_both_have_retired_them(beside, weights, tmp_path):
    path, digest = weights
    other, same = replace(beside, run="toy-2"), tmp_path / "runs" / "other.safetensors"
    save_arrays(same, WEIGHTS)
    beside.publish(path, digest)
    other.publish(same, digest)
    beside.retire(digest)
    assert names(beside.out) == [digest]
    other.retire(digest)
    assert names(beside.out) == []
    assert names(tmp_path / "held") == [".lock"]


# In


def test_a_delta_is_read_from_what_its_site_has_sent(beside):
    reply = replace(REPLY, blob=upload(beside, "north"))
    tensors = beside.collect("north", reply, MESSAGE_OF["bare"]())
    assert {name: one(tensors, name).tobytes() for name in tensors.schema} == {n: a.tobytes() for n, a in DELTA.items()}


def test_tensors_inside_a_message_are_no_update_where_blobs_are_asked_for(beside):
    with pytest.raises(UpdateRejected, match="round 3, site 'north': names no blob") as refused:
        beside.collect("north", REPLY, MESSAGE_OF["with tensors"]())
    assert refused.value.code == "UPDATE_MISSING"


def test_a_blob_that_has_not_arrived_is_missed(beside):
    with pytest.raises(UpdateRejected, match="round 3, site 'north': its blob has not arrived") as refused:
        beside.collect("north", replace(REPLY, blob=BlobRef("a" * 64, 10)), MESSAGE_OF["bare"]())
    assert refused.value.code == "UPDATE_MISSING"


def test_a_blob_of_another_site_is_not_taken_for_ones_own(beside):
    theirs = upload(beside, "south")
    with pytest.raises(UpdateRejected, match="its blob has not arrived"):
        beside.collect("north", replace(REPLY, blob=theirs), MESSAGE_OF["bare"]())
    beside.drop("north", replace(REPLY, blob=theirs))
    assert names(beside.incoming) == [theirs.sha256]


def test_the_coordinators_own_weights_and_a_part_are_no_upload(beside, weights):
    path, digest = weights
    beside.publish(path, digest)
    (beside.incoming / "north").mkdir(parents=True)
    (beside.incoming / "north" / f"{'c' * 64}.part").write_bytes(b"on its way")
    (beside.incoming / "north" / ("d" * 64)).mkdir()
    for named in (digest, "c" * 64, "d" * 64):
        with pytest.raises(UpdateRejected, match="has not arrived"):
            beside.collect("north", replace(REPLY, blob=BlobRef(named, 10)), MESSAGE_OF["bare"]())


@pytest.mark.parametrize("named", ["../../out/" + "a" * 53, "a" * 63, "A" * 64, "a" * 64 + "\n", ""])
def test_a_digest_that_is_a_path_does_not_get_past_the_reply(named):
    text = dump(replace(REPLY, blob=BlobRef("a" * 64, 1))).replace(b"a" * 64, named.replace("\n", "\\n").encode())
    message = Message(RecordDict({"facts": ConfigRecord({"protocol": PROTOCOL, "json": text})}), 1, "train")
    with pytest.raises(MessageInvalid, match=r"`blob\.sha256`"):
        read_reply(message, "site 'north'")


@pytest.mark.parametrize(
    "spoil",
    [lambda c: c[:-1], lambda c: c + b"\0", lambda c: b"", lambda c: b"\xff" * 8 + c[8:], lambda c: b"\x80\x04K\x01."],
)
def test_a_blob_that_is_no_sound_file_of_tensors_is_refused(beside, spoil):
    blob = upload(beside, "north")
    path = beside.incoming / "north" / blob.sha256
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(WeightsInvalid, match="round 3, site 'north': not a sound safetensors file"):
        beside.collect("north", replace(REPLY, blob=blob), MESSAGE_OF["bare"]())


def test_what_was_taken_is_dropped_once_and_alone(beside):
    blob, other = upload(beside, "north"), upload(beside, "north", {"x": np.ones(3, np.float32)})
    beside.drop("north", replace(REPLY, blob=blob))
    beside.drop("north", replace(REPLY, blob=blob))
    beside.drop("north", REPLY)
    assert names(beside.incoming) == [other.sha256]


# Inside the message


def test_inline_tensors_travel_in_the_message_both_ways(weights):
    inline, (path, digest) = Inline(), weights
    parcel = inline.publish(path, digest)
    assert parcel.blob is None
    assert parcel.tensors is not None
    assert list(parcel.tensors) == sorted(WEIGHTS)
    tensors = inline.collect("north", REPLY, MESSAGE_OF["with tensors"]())
    assert {name: one(tensors, name).tobytes() for name in tensors.schema} == {n: a.tobytes() for n, a in DELTA.items()}
    inline.drop("north", REPLY)
    inline.retire(digest)
    assert path.exists()


def test_an_inline_reply_without_tensors_is_missed():
    with pytest.raises(UpdateRejected, match="round 3, site 'north': sent no tensors") as refused:
        Inline().collect("north", REPLY, MESSAGE_OF["bare"]())
    assert refused.value.code == "UPDATE_MISSING"
