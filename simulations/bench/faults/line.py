"""A TCP line between a site and its coordinator that can fall silent, or be cut, as networks do."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BLOCK_BYTES = 1 << 16


class Line:
    """Passes connections to `target`, from a port of its own on loopback, until it is closed.

    While it is silent, connections stay open and no byte passes, in either direction: what a firewall that drops does.
    What was held back passes afterwards, as TCP sends again what was lost.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self._flows = threading.Event()
        self._flows.set()
        self._cut = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """No byte passes until the block ends."""
        self._flows.clear()
        try:
            yield
        finally:
            self._flows.set()

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Connections are reset, and new ones too, until the block ends."""
        self._cut = True
        self._drop()
        try:
            yield
        finally:
            self._cut = False

    def close(self) -> None:
        self._listening.close()
        self._flows.set()
        self._drop()

    def _drop(self) -> None:
        with self._lock:
            ending, self._open = self._open, set()
        for end in ending:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            if self._cut:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=10)
            except OSError:  # the coordinator is away
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._open |= {near, far}
            if self._cut:  # meanwhile
                self._drop()
                continue
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(BLOCK_BYTES):
                self._flows.wait()
                sink.sendall(block)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._open.discard(end)
            end.close()
