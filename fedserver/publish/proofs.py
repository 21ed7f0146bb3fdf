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
from shared_models.audit_check import Verdict
from shared_models.audit_files import LOG
from shared_models.errors import StateInvalid
from shared_models.evidence import earlier_verdicts, in_words, verdict_of
from shared_models.files import canonical_json
from shared_models.identity import identity_public_key
from shared_models.parse import parse_json, plain
from shared_models.provenance import ANSWERS, Answers, Earlier, Extract, Leaf, wanted
from shared_models.release import MOST_JSON
from shared_models.roster import Roster, SignedRoster, read_signed


def audit_extract(federation: Federation, runs: Mapping[str, int | None]) -> bytes:
    """evidence/audit.json for a release of these runs: run -> the last round that was taken of it, None for all.

    Raises:
        StateInvalid: a log is not whole, or not sealed by the next one; then nothing can be proved by it.
    """
    head = open_log(federation).head()
    newest = verdict_of(federation.folder, identity_public_key(signer(federation).key))
    logs = {LOG: newest, **earlier_verdicts(federation.folder, newest)}
    for name, found in logs.items():
        if found.bad is not None:
            log = "the coordinator's audit log" if found is newest else f"the coordinator's log before, {name}"
            words = " ".join(in_words(found, log))
            raise StateInvalid(f"{words} Nothing is released on it; see `fedserver audit verify`.")
    sizes = {name: head.size if found is newest else found.tree.size for name, found in logs.items()}
    parts = [_leaves(federation.folder / name, found, sizes[name], runs) for name, found in logs.items()]
    back = max(number for number, part in enumerate(parts) if number == 0 or len(part) > 1)
    for name, found in list(logs.items())[:back]:
        if found.before is None or found.before.root is None:
            raise StateInvalid(
                f"{federation.folder / name}: was begun before logs were sealed, so nothing shows how the one before "
                f"it ended, under which {', '.join(runs)} began. Nothing is released on that; train it again."
            )
    leaves, *earlier = parts[: back + 1]
    extract = Extract(
        head.log, head.size, head.root, head.time, head.signature, leaves if back else leaves[1:], tuple(earlier)
    )
    made = plain(extract)
    if not back:  # as it was before logs had others before them, and hospitals that have not updated read it
        del made["earlier"]
    return canonical_json(made)


def _leaves(path: Path, found: Verdict, size: int, runs: Mapping[str, int | None]) -> tuple[Leaf, ...]:
    """The first line of a log, and those about the runs, in its tree of so many lines."""
    leaves: list[Leaf] = []
    for index, line in enumerate(path.read_bytes().split(b"\n")[:size]):
        if index == 0 or wanted(json.loads(line), runs):
            way = tuple(part.hex() for part in found.tree.inclusion(index, size))
            leaves.append(Leaf(index, line.decode(), way))
    return tuple(leaves)


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


def earlier_rosters(federation: Federation, newest: Roster, answers: bytes) -> bytes | None:
    """evidence/rosters.json: back from `newest` to the last one that has the key of each of the answers; as far as one
    file may go. None where `newest` has them all."""
    listed = parse_json(Answers, answers, ANSWERS).answers
    sought = {(answer.site, answer.key) for answer in listed} - set(newest.sites.items())
    found, size = list[Roster](), 0
    for content in reversed(list_rosters(federation.state, 0, newest.epoch - 1)[1]):
        size += len(content)
        if not sought or size > MOST_JSON:
            break
        found.append(read_signed(content, str(federation.state)).roster)
        sought -= set(found[-1].sites.items())
    return canonical_json(plain(Earlier(tuple(found)))) if found else None


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
