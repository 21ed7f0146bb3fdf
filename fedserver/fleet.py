"""What the gateway reads of Flower's fleet messages: whose they are, and that replies hold what replies hold."""

from collections.abc import Iterable
from typing import Any

from shared_models.errors import UpdateRejected

ACTIVATE_NODE = "/v1/fleet/activate-node"
PUSH_MESSAGES = "/v1/fleet/push-messages"
PUSH_OBJECT = "/v1/fleet/push-object"
OBJECTS = (b"Message", b"RecordDict", b"ConfigRecord", b"MetricRecord")  # tensors travel as blobs, none in a message
MOST_OBJECTS = 64  # of one call; a reply has three
HEAD_BYTES = 64 << 10


def message_sources(path: str, body: bytes) -> set[int]:
    """Node ids that the messages in a fleet call claim to come from; empty for calls that carry no messages.

    Flower 1.41 checks the caller, not this field: any node could answer in another's name.

    Raises:
        UpdateRejected: `body` is not what this call carries, or announces more objects than replies have.
    """
    if path != PUSH_MESSAGES:
        return set()
    from flwr.proto.fleet_pb2 import PushMessagesRequest  # flwr reads its switches when it is first imported
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError as error:
        raise UpdateRejected(
            "MESSAGE_UNREADABLE", f"{path}: not a PushMessagesRequest. Use flwr==1.41.0 at the site."
        ) from error
    if _objects(request.message_object_trees) > MOST_OBJECTS:
        raise UpdateRejected("MESSAGE_OBJECTS", f"{path}: announces more than {MOST_OBJECTS} objects. None was taken.")
    return {int(message.metadata.src_node_id) for message in request.messages_list}


def _objects(trees: Iterable[Any]) -> int:
    """How many objects some trees name, counted no further than needed."""
    count, left = 0, list(trees)
    while left and count <= MOST_OBJECTS:
        left += left.pop().children
        count += 1
    return count


def check_object(path: str, body: bytes) -> None:
    """Lets only those objects pass that a reply is made of.

    An `Array` of Flower 1.41 names its chunks by number, and may name one a thousand times: 3 kB become 1 GB in the
    process that reads the reply, before anything of ours sees it.

    Raises:
        UpdateRejected: `body` is not what this call carries, or an object of another kind.
    """
    if path != PUSH_OBJECT:
        return
    from flwr.proto.message_pb2 import PushObjectRequest
    from google.protobuf.message import DecodeError

    try:
        content = PushObjectRequest.FromString(body).object_content
    except DecodeError as error:
        raise UpdateRejected(
            "MESSAGE_UNREADABLE", f"{path}: not a PushObjectRequest. Use flwr==1.41.0 at the site."
        ) from error
    head, found, _ = content[:HEAD_BYTES].partition(b"\0")
    if not found or head.partition(b" ")[0] not in OBJECTS:
        raise UpdateRejected(
            "TENSOR_IN_MESSAGE", f"{path}: holds something that no reply is made of. It was not taken."
        )


def activated_node(path: str, answer: bytes) -> int | None:
    """The caller's node id, from the answer to a successful activate-node call."""
    if path != ACTIVATE_NODE:
        return None
    from flwr.proto.fleet_pb2 import ActivateNodeResponse

    return int(ActivateNodeResponse.FromString(answer).node_id) or None
