"""How tensors get to the sites and back: inside the message in a simulation, as blobs beside it in a deployment."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedserver.room import check_room
from shared_models.errors import UpdateRejected
from shared_models.files import locked, private_folder
from shared_models.weights import InMemory, Tensors, load, open_tensors
from shared_models.wire import VECTOR, BlobRef, Reply, pack, tensors_of

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message

Octets: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Parcel:
    """The weights of a round, ready for every order of it."""

    blob: BlobRef | None
    tensors: "ArrayRecord | None"


class Courier(Protocol):
    """What a round needs of it."""

    def check_room(self, model_bytes: int, sites: int, round_number: int) -> None:
        """Raises RoundPaused where the updates of a round would fill the disk."""
        ...

    def publish(self, weights: Path, digest: str) -> Parcel: ...

    def collect(self, site: str, reply: Reply, message: "Message") -> Tensors:
        """The delta that `reply` is about; raises UpdateRejected or WeightsInvalid."""
        ...

    def vector(self, site: str, reply: Reply, message: "Message") -> Octets:
        """The bytes of the masked vector that `reply` is about, read as they are used; raises UpdateRejected."""
        ...

    def drop(self, site: str, reply: Reply) -> None:
        """Lets go of what `collect` gave, counted or not."""
        ...

    def retire(self, digest: str) -> None:
        """The weights of `digest` are no longer sent to anybody."""
        ...


@dataclass(frozen=True, slots=True)
class Inline:
    """Tensors travel in the message."""

    def check_room(self, model_bytes: int, sites: int, round_number: int) -> None:
        return None

    def publish(self, weights: Path, digest: str) -> Parcel:
        return Parcel(None, pack(load(weights)))

    def collect(self, site: str, reply: Reply, message: "Message") -> Tensors:
        arrays = tensors_of(message, f"round {reply.round}, site {site!r}")
        if arrays is None:
            raise UpdateRejected(
                "UPDATE_MISSING", f"round {reply.round}, site {site!r}: sent no tensors. Ask it again."
            )
        return InMemory(arrays)

    def vector(self, site: str, reply: Reply, message: "Message") -> Octets:
        held = (tensors_of(message, f"round {reply.round}, site {site!r}") or {}).get(VECTOR)
        if held is None or held.dtype != np.uint8 or held.ndim != 1:
            raise UpdateRejected("UPDATE_MISSING", f"round {reply.round}, site {site!r}: sent no masked vector.")
        return held

    def drop(self, site: str, reply: Reply) -> None:
        return None

    def retire(self, digest: str) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Beside:
    """Tensors travel as files named by their digest; the gateway serves `out` and fills `incoming/SITE`.

    An upload is there whole and under the digest that it has, or not at all: the gateway compares before it keeps it.
    Runs side by side may send the same weights, as two studies with one network and seed do in round 1: these stay in
    `out` until the last run in `held/SHA256/` has retired them.
    """

    out: Path
    incoming: Path
    run: str

    def check_room(self, model_bytes: int, sites: int, round_number: int) -> None:
        self.incoming.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_room(self.incoming, model_bytes, sites, round_number)

    def publish(self, weights: Path, digest: str) -> Parcel:
        self.out.mkdir(parents=True, exist_ok=True, mode=0o700)
        holders = self._holders(digest)
        with locked(holders.parent / ".lock"):
            private_folder(holders)
            (holders / self.run).touch(mode=0o600)
            if not (self.out / digest).exists():
                os.link(weights, self.out / digest)  # no copy; weights of a finished round never change
        return Parcel(BlobRef(digest, weights.stat().st_size), None)

    def collect(self, site: str, reply: Reply, message: "Message") -> Tensors:
        return open_tensors(self._arrived(site, reply), f"round {reply.round}, site {site!r}")

    def vector(self, site: str, reply: Reply, message: "Message") -> Octets:
        path = self._arrived(site, reply)
        if not path.stat().st_size:
            raise UpdateRejected("UPDATE_MISSING", f"round {reply.round}, site {site!r}: its blob is empty.")
        return np.memmap(path, np.uint8, mode="r")

    def _arrived(self, site: str, reply: Reply) -> Path:
        where = f"round {reply.round}, site {site!r}"
        if reply.blob is None:
            raise UpdateRejected("UPDATE_MISSING", f"{where}: names no blob. Ask it again.")
        path = self.incoming / site / reply.blob.sha256
        if not path.is_file():
            raise UpdateRejected("UPDATE_MISSING", f"{where}: its blob has not arrived. Ask it again.")
        return path

    def drop(self, site: str, reply: Reply) -> None:
        if reply.blob is not None:
            (self.incoming / site / reply.blob.sha256).unlink(missing_ok=True)

    def retire(self, digest: str) -> None:
        holders = self._holders(digest)
        with locked(holders.parent / ".lock"):
            (holders / self.run).unlink(missing_ok=True)
            if holders.exists() and any(holders.iterdir()):
                return
            (self.out / digest).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                holders.rmdir()

    def _holders(self, digest: str) -> Path:
        return self.out.with_name("held") / digest
