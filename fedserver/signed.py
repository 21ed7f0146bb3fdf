"""What each hospital has signed, in the run's folder: a line of `signed.jsonl` for each answer that was counted.

It is kept as it came, so that years later anybody can tell with the hospital's public key alone which answer to which
order was its, and the digest of the tensors that it sent: `round-closed` of the audit log names each by its envelope.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from fedserver.checkpoint import RunFolder
from shared_models.envelope import PURPOSE, Asked, Envelope, read_envelope
from shared_models.errors import StateInvalid, UpdateRejected
from shared_models.files import append_json, read_lines
from shared_models.identity import verify
from shared_models.parse import STRICT, SiteName, parse, plain
from shared_models.roster import Key32, Signature
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
