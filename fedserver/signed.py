"""What each hospital has signed, in the run's folder: a line of `signed.jsonl` for each answer that was counted.

It is kept as it came, so that years later anybody can tell with the hospital's public key alone which answer to which
order was its, and the digest of the tensors that it sent: `round-closed` of the audit log names each by its envelope.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from fedserver.checkpoint import RunFolder
from fedserver.enrol import Federation
from fedserver.state import list_rosters
from shared_models.alarms import events
from shared_models.envelope import PURPOSE, Asked, Envelope, read_envelope
from shared_models.errors import StateInvalid, UpdateRejected
from shared_models.files import append_json, read_lines
from shared_models.identity import verify
from shared_models.parse import STRICT, SiteName, parse, plain
from shared_models.roster import Key32, Signature, checked, read_signed
from shared_models.wire import SignedReply


@dataclass(frozen=True, slots=True)
class Signed:
    """One line.

    Attributes:
        envelope: the bytes that were signed.
        key: the identity that the roster had for the site, hexadecimal.
    """

    __pydantic_config__ = STRICT
    site: SiteName
    envelope: str
    signature: Signature
    key: Key32

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.envelope.encode()).hexdigest()


def keep(folder: RunFolder, asked: Asked, told: SignedReply, key: bytes) -> str:
    """Writes the line of an answer whose envelope was verified; the SHA-256 of that envelope."""
    line = Signed(asked.site, told.envelope.decode(), told.signature.hex(), key.hex())
    append_json(folder.signed, plain(line))
    return line.sha256


def signed_lines(folder: RunFolder) -> Iterator[tuple[Signed, Envelope]]:
    """Every answer that was kept, in order, its signature verified.

    Raises:
        StateInvalid: a line that is none, or that its key has not signed.
    """
    for number, found in enumerate(read_lines(folder.signed), start=1):
        where = f"{folder.signed}, line {number}"
        line = parse(Signed, found, where, StateInvalid)
        content = line.envelope.encode()
        try:
            envelope = read_envelope(content, where)
        except UpdateRejected as error:
            raise StateInvalid(str(error)) from None
        good = verify(bytes.fromhex(line.key), bytes.fromhex(line.signature), PURPOSE, content)
        if not good or envelope.asked.site != line.site:
            raise StateInvalid(f"{where}: is not as {line.site!r} signed it. It was edited; restore it from a backup.")
        yield line, envelope


def check_signed(federation: Federation) -> tuple[int, int]:
    """How many answers are kept, in how many runs: each as one of the roster's keys has signed it, and all there.

    Raises:
        StateInvalid: naming the run whose record was edited, or lacks an answer that the log says was counted.
    """
    keys = _keys_of(federation)
    named: dict[str, set[str]] = {}
    for closed in events(federation.audit, ("round-closed",)):
        named.setdefault(closed["facts"]["run"], set()).update(closed["facts"].get("signed", {}).values())
    count, runs = 0, 0
    for path in sorted(federation.runs.glob("*/state.json")):
        folder, found = RunFolder(path.parent), set[str]()
        for line, envelope in signed_lines(folder):
            if line.key not in keys.get(line.site, ()) or envelope.asked.run != folder.id:
                raise StateInvalid(
                    f"{folder.signed}: has an answer of {line.site!r} under a key that no roster ever had for it, or "
                    f"to another run. It was edited; restore it from a backup."
                )
            found.add(line.sha256)
        if lost := named.get(folder.id, set()) - found:
            raise StateInvalid(
                f"{folder.signed}: lacks {len(lost)} answers that the audit log says were counted. It was cut; restore "
                f"it from a backup."
            )
        count, runs = count + len(found), runs + bool(found)
    return count, runs


def _keys_of(federation: Federation) -> dict[str, set[str]]:
    """Site -> the identities that it ever had, by the signed epochs of the roster."""
    keys: dict[str, set[str]] = {}
    newest, _ = list_rosters(federation.state, 0, 0)
    for content in list_rosters(federation.state, 0, newest)[1]:
        for site, key in checked(read_signed(content, str(federation.state)), federation.authority).sites.items():
            keys.setdefault(site, set()).add(key)
    return keys
