"""A worker process of the simulation engine: orders in on standard input, replies out on standard output."""

import os
import signal
import sys

from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from simulations.engine import answer, identify, read_config, read_frame, write_frame


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the engine ends its workers
    source, to = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to the error stream, not between the frames
    identify()
    from fedclient.app import app

    write_frame(to, b"ready")
    while (config := read_frame(source)) is not None and (frame := read_frame(source)) is not None:
        message = message_from_proto(ProtoMessage.FromString(frame))
        write_frame(to, message_to_proto(answer(app, message, read_config(config))).SerializeToString())


if __name__ == "__main__":
    main()
