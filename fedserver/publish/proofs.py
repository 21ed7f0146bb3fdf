"""The coordinator's audit log as a release's evidence: the lines about its run, each proved to be in its tree."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedserver.checkpoint import RunFolder
from fedserver.enrol import Federation, open_log, signer
from fedserver.signed import counted_answers, signed_lines
from fedserver.state import list_rosters
from shared_models.answers import SignedAnswer
from shared_models.audit_files import LOG
from shared_models.errors import StateInvalid
from shared_models.evidence import in_words, verdict_of
from shared_models.files import canonical_json
from shared_models.identity import identity_public_key
from shared_models.parse import plain
from shared_models.provenance import Answers, Extract, Leaf, wanted
from shared_models.roster import SignedRoster, read_signed


def audit_extract(federation: Federation, runs: Mapping[str, int | None]) -> bytes:
    """evidence/audit.json for a release of these runs: run -> the last round that was taken of it, None for all.

    Raises:
        StateInvalid: the log is not whole; then nothing can be proved by it.
    """
    head = open_log(federation).head()
    found = verdict_of(federation.folder, identity_public_key(signer(federation).key))
    if found.bad is not None:
        words = " ".join(in_words(found, "the coordinator's audit log"))
        raise StateInvalid(f"{words} Nothing is released on it; see `fedserver audit verify`.")
    leaves: list[Leaf] = []
    lines = (federation.folder / LOG).read_bytes().split(b"\n")[: head.size]
    for index, line in enumerate(lines):
        if wanted(json.loads(line), runs):
            path = tuple(part.hex() for part in found.tree.inclusion(index, head.size))
            leaves.append(Leaf(index, line.decode(), path))
    extract = Extract(head.log, head.size, head.root, head.time, head.signature, tuple(leaves))
    return canonical_json(plain(extract))


def answers_extract(federation: Federation, runs: Mapping[str, int | None]) -> bytes:
    """evidence/answers.json: what the hospitals signed of all that the log says was counted in these runs.

    Raises:
        StateInvalid: an answer that was counted is not kept any more, or was edited.
    """
    found, counted = list[SignedAnswer](), counted_answers(federation)
    for run, most in runs.items():
        named = {digest for digest, number in counted.get(run, {}).items() if most is None or number <= most}
        folder = RunFolder(federation.runs / run)
        kept = {line.sha256: line for line, _ in (signed_lines(folder) if named else ()) if line.sha256 in named}
        if lost := named - kept.keys():
            raise StateInvalid(
                f"{folder.signed}: lacks {len(lost)} answers that were counted. Restore the run's folder from a backup."
            )
        found += kept.values()
    return canonical_json(plain(Answers(tuple(found))))


def newest_roster(federation: Federation) -> tuple[bytes, SignedRoster]:
    """The newest epoch as it was signed, and parsed."""
    newest, _ = list_rosters(federation.state, 0, 0)
    _, epochs = list_rosters(federation.state, newest, 1)
    if not epochs:
        raise StateInvalid(f"{federation.folder}: no site has ever joined, so there is no roster. Nothing is released.")
    return epochs[0], read_signed(epochs[0], str(federation.state))


def read_card_file(path: Path) -> dict[str, Any]:
    """A data card that a site has handed in."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StateInvalid(
            f"{path}: is no data card ({type(error).__name__}). A site writes one with `fedclient card`."
        ) from None
    if not isinstance(found, dict) or "tables" not in found or "smallest_count" not in found:
        raise StateInvalid(f"{path}: is no data card. A site writes one with `fedclient card`.")
    return found
