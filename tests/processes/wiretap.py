"""Every byte that a hospital sends, on its way through the wire, and in clear: TLS 1.3 with the secrets of its clients.

A relay stands before the gateway and keeps what comes from outside. Python's TLS writes the secrets of its connections
to the file that SSLKEYLOGFILE names; with these the records are decrypted as RFC 8446, sections 5.2 and 7.1, have it.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

APPLICATION, HANDSHAKE = 23, 22
Cipher: TypeAlias = AESGCM | ChaCha20Poly1305
SUITES: dict[int, tuple[Callable[[bytes], Cipher], type[hashes.HashAlgorithm], int]] = {
    0x1301: (AESGCM, hashes.SHA256, 16),
    0x1302: (AESGCM, hashes.SHA384, 32),
    0x1303: (ChaCha20Poly1305, hashes.SHA256, 32),
}


@dataclass
class Connection:
    """What went each way, as it was on the wire."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)


@dataclass
class Wiretap:
    """A relay to the port `to` of this machine, and what passed it."""

    to: int
    address: str = ""
    connections: list[Connection] = field(default_factory=list)

    def sent(self, secrets: Path) -> tuple[list[bytes], list[int]]:
        """What clients have sent over each connection, in clear; and the sizes of those without a secret.

        Raises:
            AssertionError: a record that the secrets do not open.
        """
        known = dict[tuple[str, bytes], bytes]()
        for line in secrets.read_text().splitlines():
            if line and not line.startswith("#"):
                label, hello, secret = line.split()
                known[label, bytes.fromhex(hello)] = bytes.fromhex(secret)
        clear, closed = list[bytes](), list[int]()
        for each in self.connections:
            random = bytes(each.up[11:43])  # after the heads of record and handshake, and the version
            begin, then = (
                known.get((f"CLIENT_{kind}", random)) for kind in ("HANDSHAKE_TRAFFIC_SECRET", "TRAFFIC_SECRET_0")
            )
            if begin is None or then is None:
                closed.append(len(each.up))
            else:
                clear.append(opened(bytes(each.up), suite_of(bytes(each.down)), begin, then))
        return clear, closed


def suite_of(down: bytes) -> int:
    """The cipher suite of a ServerHello."""
    session = down[43]
    return int.from_bytes(down[44 + session : 46 + session], "big")


def opened(up: bytes, suite: int, begin: bytes, then: bytes) -> bytes:
    """The application data in the records of a client, whose handshake is under `begin` and the rest under `then`."""
    cipher, digest, size = SUITES[suite]

    def keys(secret: bytes) -> tuple[Cipher, int]:
        def expand(label: bytes, length: int) -> bytes:
            info = length.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\0"
            return HKDFExpand(digest(), length, info).derive(secret)

        return cipher(expand(b"key", size)), int.from_bytes(expand(b"iv", 12), "big")

    (box, iv), number, later = keys(begin), 0, True
    found, at = bytearray(), 0
    while at + 5 <= len(up):
        head = up[at : at + 5]
        body = up[at + 5 : at + 5 + int.from_bytes(head[3:], "big")]
        at += 5 + len(body)
        if head[0] != APPLICATION or len(body) < int.from_bytes(head[3:], "big"):  # a hello; or cut off by the end
            continue
        try:
            inner = box.decrypt((iv ^ number).to_bytes(12, "big"), body, head)
        except InvalidTag:
            assert later, "a record that no secret opens"
            (box, iv), number, later = keys(then), 0, False
            inner = box.decrypt(iv.to_bytes(12, "big"), body, head)
        number += 1
        content = inner.rstrip(b"\0")
        if content[-1] == APPLICATION:
            found += content[:-1]
    return bytes(found)


@contextmanager
def wiretap(to: int) -> Iterator[Wiretap]:
    """Relays from a port of its own until the block ends."""
    tap = Wiretap(to)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        tap.address = f"127.0.0.1:{listening.getsockname()[1]}"

        def accept() -> None:
            while True:
                try:
                    peer, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=relay, args=(tap, peer), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield tap
        finally:
            listening.shutdown(socket.SHUT_RDWR)


def relay(tap: Wiretap, peer: socket.socket) -> None:
    kept = Connection()
    tap.connections.append(kept)
    with closing(peer), suppress(OSError), closing(socket.create_connection(("127.0.0.1", tap.to))) as gateway:
        back = threading.Thread(target=pump, args=(gateway, peer, kept.down), daemon=True)
        back.start()
        pump(peer, gateway, kept.up)
        back.join()


def pump(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    with suppress(OSError):
        while block := source.recv(1 << 16):
            kept += block
            target.sendall(block)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
