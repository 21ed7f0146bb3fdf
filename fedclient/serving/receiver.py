"""The DICOM receiver: C-ECHO, and C-STORE of images from peers on a list. It decodes no image.

pynetdicom 3.0 has no bound to the length of a message, waits for a TLS handshake in the thread that accepts, and logs
what peers send; here messages are bounded and written to disk as they come, and its log is off.
"""

import logging
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any
from weakref import WeakSet

from pydicom.uid import AllTransferSyntaxes, DeflatedExplicitVRLittleEndian
from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from fedclient.serving.intake import Intake
from fedclient.serving.jobs import Overloaded, Room
from fedclient.serving.settings import Serve, address_of
from shared_models.errors import ImageUnreadable, ProcessFailed

SUCCESS, NOT_AUTHORISED, OUT_OF_RESOURCES, NOT_AN_IMAGE, CANNOT_UNDERSTAND = 0x0000, 0x0124, 0xA700, 0xA900, 0xC000
P_DATA, A_RELEASE = b"\4", b"\5"  # the first byte of a unit that is part of a message, or asks for the end
MOST_PDU = 1 << 20  # of one protocol data unit; peers are told 64 KiB
SAID_PDU = 1 << 16
MOST_COMMAND = 1 << 16  # bytes of the command of a message, which pynetdicom keeps in memory; they have some hundred
MOST_ASSOCIATIONS = 16
SYNTAXES = [uid for uid in AllTransferSyntaxes if uid != DeflatedExplicitVRLittleEndian]  # a small one unpacks to much
MOST_LINKS = 64  # connections, with those on which nobody has asked for an association yet; two threads each
STALL_S = 60.0
SLOWEST = 1 << 16  # bytes a second on the mean over a unit, and over a message, once `STALL_S` are over

log = logging.getLogger("fedclient.serving")


@dataclass(frozen=True, slots=True)
class Allowed:
    """A peer by its AE title, and by its address where one is given."""

    ae_title: str
    address: IPv4Address | IPv6Address | None = None


def allowed(peers: Sequence[str]) -> tuple[Allowed, ...]:
    """From `AE` and `AE@address`."""
    split = (peer.partition("@") for peer in peers)
    return tuple(Allowed(title.strip(), address_of(address)) for title, _, address in split)


def image_contexts() -> list[str]:
    """The storage classes of images, as UIDs; objects that are none cannot even be offered."""
    return [
        str(context.abstract_syntax)
        for context in AllStoragePresentationContexts
        if context.abstract_syntax is not None and "Image Storage" in context.abstract_syntax.name
    ]


class Receiver:
    """A DICOM peer that takes images of those who are allowed."""

    def __init__(
        self,
        serve: Serve,
        intake: Intake,
        room: Room,
        context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.serve, self.intake, self.room, self.context, self.clock = serve, intake, room, context, clock
        self.peers = allowed(serve.allow)
        self.most_bytes = int(serve.most_mib * 2**20)
        self._server: ThreadedAssociationServer | None = None
        self._lock = threading.Lock()
        self._bytes: dict[int, int] = {}  # of an association's message under way
        self._command_bytes: dict[int, int] = {}  # of a command that has not ended
        self._begun: dict[int, float] = {}  # when it began
        self._heard: dict[int, float] = {}  # when an association sent its last unit
        self._in_order: dict[int, bool] = {}  # of an association that ends: whether it was released, and not cut off
        self._here: set[int] = set()  # connections
        self._links: WeakSet[Any] = WeakSet()
        self._held: WeakSet[threading.Thread] = WeakSet()  # of each connection
        self._refused: WeakSet[threading.Thread] = WeakSet()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Listens, in threads of its own.

        Raises:
            ProcessFailed: the port is taken, or may not be used.
        """
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)  # it logs UIDs and what headers hold
        _config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False
        _config.STORE_RECV_CHUNKED_DATASET = True
        tempfile.tempdir = str(self.intake.quarantine)  # where it writes what comes
        entity = AE(ae_title=self.serve.ae_title)
        entity.require_called_aet = True
        entity.require_calling_aet = sorted({peer.ae_title for peer in self.peers})
        entity.maximum_pdu_size = SAID_PDU
        entity.maximum_associations = MOST_ASSOCIATIONS
        entity.network_timeout = entity.dimse_timeout = STALL_S
        entity.acse_timeout = STALL_S / 2
        entity.add_supported_context(Verification)
        for uid in image_contexts():
            entity.add_supported_context(uid, SYNTAXES)
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, self._bounded),
            (evt.EVT_DATA_RECV, self._counted),
            (evt.EVT_C_STORE, self._stored),
            (evt.EVT_C_ECHO, self._echoed),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        try:
            self._server = entity.start_server(
                (self.serve.dicom_host, self.serve.dicom_port), block=False, ssl_context=self.context,
                evt_handlers=handlers,
            )  # fmt: skip
        except OSError as error:
            raise ProcessFailed(
                f"DICOM receiver: port {self.serve.dicom_port} of {self.serve.dicom_host} cannot be used "
                f"({error.strerror}). Choose another with --dicom-port."
            ) from None

    def stop(self) -> None:
        tempfile.tempdir = None
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        with self._lock:
            for link in self._links:
                link.close()  # of peers that never said anything

    def _permitted(self, association: Any) -> bool:
        title, address = str(association.requestor.ae_title).strip(), address_of(str(association.requestor.address))
        if any(peer.ae_title == title and peer.address in (None, address) for peer in self.peers):
            return True
        with self._lock:
            told = association in self._refused
            self._refused.add(association)
        if not told:
            log.warning("a DICOM peer was refused: `allow` names its AE title, and not its address %s", address)
        return False

    def _bounded(self, event: evt.Event) -> None:
        """No peer may make this process hold a unit of gigabytes, or a thread wait for ever."""
        outer = event.assoc.dul.socket
        if outer is None or outer.socket is None:
            return
        link = outer.socket
        link.settimeout(STALL_S)
        with self._lock:
            self._here.add(id(event.assoc))
            self._links.add(link)
            crowded = sum(each.is_alive() for each in self._held) >= MOST_LINKS
            self._held.add(event.assoc)
        if crowded:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

        def recv(size: int) -> bytearray:
            if size > MOST_PDU:
                raise OSError("a unit longer than any that is agreed on")
            return received(link, size)

        outer.recv = recv  # type: ignore[assignment,method-assign]

    def _counted(self, event: evt.Event) -> None:
        """Cuts an association whose message grows over what is taken, for which there is no room, or which is slow.

        What comes is paid for before it is whole: pynetdicom writes it into quarantine meanwhile.
        """
        key, size_bytes = id(event.assoc), len(event.data)
        with self._lock:
            self._heard[key] = self.clock()
            if event.data[:1] == A_RELEASE:
                self._in_order.setdefault(key, True)
            begun = self._begun.setdefault(key, self.clock()) if event.data[:1] == P_DATA else self.clock()
            self._command_bytes[key], longest = command_bytes(event.data, self._command_bytes.get(key, 0))
            held = self._bytes.get(key, 0) + size_bytes
        slow = self.clock() - begun > STALL_S + held / SLOWEST
        try:
            self.room.take(size_bytes)
        except Overloaded:
            log.warning("a DICOM peer sent more than there is room for and was cut off")
            self._cut(event.assoc)
            return
        with self._lock:
            self._bytes[key] = held
        if held > MOST_COMMAND:  # of an object, then
            self.intake.coming(session_of(event.assoc))
        if longest > MOST_COMMAND:
            log.warning("a DICOM peer sent a command without an end and was cut off")
        elif held > self.most_bytes:
            log.warning("a DICOM peer sent an object of more than %d MiB and was cut off", self.most_bytes >> 20)
        elif slow:
            log.warning("a DICOM peer sent less than %d KiB a second and was cut off", SLOWEST >> 10)
        else:
            return
        self._cut(event.assoc)

    def _cut(self, association: Any) -> None:
        with self._lock:
            self._in_order.setdefault(id(association), False)
        association.abort()

    def _ended(self, association: Any) -> None:
        """A message is over; what it took up in quarantine is given back."""
        with self._lock:
            held = self._bytes.pop(id(association), 0)
            self._begun.pop(id(association), None)
        self.room.give(held)

    def _echoed(self, event: evt.Event) -> int:
        self._ended(event.assoc)
        return SUCCESS if self._permitted(event.assoc) else NOT_AUTHORISED

    def _stored(self, event: evt.Event) -> int:
        """What a peer hears of one object."""
        path, session = Path(event.dataset_path), session_of(event.assoc)
        self._ended(event.assoc)
        try:
            if not self._permitted(event.assoc):
                return NOT_AUTHORISED
            self.intake.place(path, "dicom", session, size_bytes=path.stat().st_size)
            with self._lock:
                here = id(event.assoc) in self._here
            if not here:  # it broke off before its last object was looked at
                self.intake.closed(session, broken=True)
        except Overloaded:
            return OUT_OF_RESOURCES
        except ImageUnreadable as error:
            log.warning("a DICOM object was refused: %s", error.code)
            return NOT_AN_IMAGE if error.code == "MODALITY_MISMATCH" else CANNOT_UNDERSTAND
        except OSError:
            return OUT_OF_RESOURCES
        finally:
            with suppress(FileNotFoundError):
                path.unlink()
        return SUCCESS

    def _closed(self, event: evt.Event) -> None:
        """A connection is over: released, or broken off. One that is cut off because it was kept open without a word,
        between two messages, has broken nothing off."""
        key = id(event.assoc)
        with self._lock:
            self._here.discard(key)
            heard = self._heard.pop(key, self.clock())
            silent = key not in self._begun and self.clock() - heard >= STALL_S - 1
            in_order = self._in_order.pop(key, silent)
            self._command_bytes.pop(key, None)
        self._ended(event.assoc)
        half = getattr(event.assoc.dimse.message, "_data_set_file", None)  # of a message that never ended
        if half is not None:
            half.close()
            if self._permitted(event.assoc):
                self.intake.lost(Path(half.name))
            Path(half.name).unlink(missing_ok=True)
        self.intake.closed(session_of(event.assoc), broken=not in_order)


def received(link: socket.socket, size: int) -> bytearray:
    """`size` bytes of a connection, fewer where it ends.

    Raises:
        TimeoutError: it sent nothing for `STALL_S`, or less than `SLOWEST` on the mean.
    """
    found, until = bytearray(), time.monotonic() + STALL_S + size / SLOWEST
    try:
        while len(found) < size:
            link.settimeout(max(1e-3, min(STALL_S, until - time.monotonic())))
            block = link.recv(min(1 << 16, size - len(found)))
            if not block:
                break
            found += block
            if time.monotonic() > until:
                raise TimeoutError
    finally:
        link.settimeout(STALL_S)
    return found


def command_bytes(unit: bytes, before: int) -> tuple[int, int]:
    """How long the command that has not ended is after this protocol data unit, and the longest on the way.

    Of the values in a unit of data (PS3.8 section 9.3.5) those are of a command whose control header has bit 0, and the
    last of one has bit 1.
    """
    longest, at = before, 6
    while unit[:1] == P_DATA and at + 6 <= len(unit):
        (length,) = struct.unpack_from(">L", unit, at)
        if unit[at + 5] & 1:
            before += length
            longest = max(longest, before)
            before = 0 if unit[at + 5] & 2 else before
        at += 4 + max(length, 2)
    return before, longest


def session_of(association: Any) -> str:
    return f"dicom-{id(association)}"


class LaterHandshake(ssl.SSLContext):
    """Shakes hands in the thread of the connection, not in the one that accepts: who says nothing keeps nobody out."""

    def wrap_socket(self, sock: Any, *args: Any, **words: Any) -> ssl.SSLSocket:
        sock.settimeout(STALL_S)
        return super().wrap_socket(sock, *args, **(words | {"do_handshake_on_connect": False}))


def server_context(serve: Serve, mutual: bool = True) -> ssl.SSLContext | None:
    """TLS from 1.2 on; for peers, with client certificates where a CA is named. None where no key is."""
    if not serve.tls_key:
        return None
    context = (LaterHandshake if mutual else ssl.SSLContext)(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(serve.tls_certificate, serve.tls_key)
    if serve.tls_ca and mutual:
        context.load_verify_locations(serve.tls_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
