"""What the gateway reads of Flower's fleet messages, so that a node speaks for itself alone and sends no tensors."""

from shared_models.errors import UpdateRejected

ACTIVATE_NODE = "/v1/fleet/activate-node"
PUSH_MESSAGES = "/v1/fleet/push-messages"
PUSH_OBJECT = "/v1/fleet/push-object"
TENSORS = b"Array"  # how objects of the classes Array, ArrayChunk and ArrayRecord begin


def message_sources(path: str, body: bytes) -> set[int]:
    """Node ids that the messages in a fleet call claim to come from; empty for calls that carry no messages.

    Flower 1.41 checks the caller, not this field: any node could answer in another's name.

    Raises:
        UpdateRejected: `body` is not what this call carries.
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
    return {int(message.metadata.src_node_id) for message in request.messages_list}


def carries_tensors(path: str, body: bytes) -> bool:
    """Whether a fleet call uploads a piece of a tensor: an array may name one small chunk a thousand times, and Flower
    1.41 inflates it in the memory of the ServerApp before our code sees the reply. Tensors travel as blobs.

    Raises:
        UpdateRejected: `body` is not what this call carries.
    """
    if path != PUSH_OBJECT:
        return False
    from flwr.proto.message_pb2 import PushObjectRequest
    from google.protobuf.message import DecodeError

    try:
        return bool(PushObjectRequest.FromString(body).object_content.startswith(TENSORS))
    except DecodeError as error:
        raise UpdateRejected(
            "MESSAGE_UNREADABLE", f"{path}: not a PushObjectRequest. Use flwr==1.41.0 at the site."
        ) from error


def activated_node(path: str, answer: bytes) -> int | None:
    """The caller's node id, from the answer to a successful activate-node call."""
    if path != ACTIVATE_NODE:
        return None
    from flwr.proto.fleet_pb2 import ActivateNodeResponse

    return int(ActivateNodeResponse.FromString(answer).node_id) or None
