"""What each hospital has signed, in the run's folder: a line of `signed.jsonl` for each answer that was counted.

It is kept as it came, so that years later anybody can tell with the hospital's public key alone which answer to which
order was its, and the digest of the tensors that it sent: `round-closed` of the audit log names each by its envelope.
"""

from collections.abc import Iterator

from fedserver.checkpoint import RunFolder
from fedserver.enrol import Federation
from fedserver.state import list_rosters
from shared_models.answers import SignedAnswer, envelope_of
from shared_models.audit_files import closings, every_event
from shared_models.envelope import Asked, Envelope
from shared_models.errors import StateInvalid
from shared_models.files import append_json, read_lines
from shared_models.parse import parse, plain
from shared_models.roster import checked, read_signed
from shared_models.wire import SignedReply


def keep(folder: RunFolder, asked: Asked, told: SignedReply, key: bytes) -> str:
    """Writes the line of an answer whose envelope was verified; the SHA-256 of that envelope."""
    line = SignedAnswer(asked.site, told.envelope.decode(), told.signature.hex(), key.hex())
    append_json(folder.signed, plain(line))
    return line.sha256


def signed_lines(folder: RunFolder) -> Iterator[tuple[SignedAnswer, Envelope]]:
    """Every answer that was kept, in order, its signature verified.

    Raises:
        StateInvalid: a line that is none, or that its key has not signed.
    """
    for number, found in enumerate(read_lines(folder.signed), start=1):
        where = f"{folder.signed}, line {number}"
        line = parse(SignedAnswer, found, where, StateInvalid)
        yield line, envelope_of(line, where, StateInvalid)


def counted_answers(federation: Federation) -> dict[str, dict[str, int]]:
    """Run -> SHA-256 of each envelope that the audit log, of earlier keys too, says was counted, and in which round."""
    found: dict[str, dict[str, int]] = {}
    for (run, number), facts in closings(every_event(federation.folder, ("round-closed",))).items():
        found.setdefault(run, {}).update(dict.fromkeys(facts.get("signed", {}).values(), number))
    return found


def check_signed(federation: Federation) -> tuple[int, int]:
    """How many answers are kept, in how many runs: each as one of the roster's keys has signed it, and all there.

    Raises:
        StateInvalid: naming the run whose record was edited, or lacks an answer that the log says was counted.
    """
    keys, named = _keys_of(federation), counted_answers(federation)
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
        if lost := named.get(folder.id, {}).keys() - found:
            raise StateInvalid(
                f"{folder.signed}: lacks {len(lost)} answers that the audit log says were counted. It was cut; restore "
                f"the run's folder from its newest backup, and where this is that one, carry the run on: its last "
                f"rounds are done again."
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
