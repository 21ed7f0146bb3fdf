"""Whose updates and counts a release holds, and what hospitals are told of a release once such a site has left."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from fedserver.checkpoint import RunFolder
from fedserver.enrol import Federation, open_log, signer
from fedserver.publish.lineage import UNREADABLE, held, planners, round_with
from fedserver.registry import Entry, list_releases, manifest_of
from shared_models.audit_files import every_event
from shared_models.release import Parent
from shared_models.standing import Standing, Standings, sign_standings
from shared_models.weights import NO_WEIGHTS

SITE_LEFT = "a site whose updates it holds has withdrawn"


@dataclass(frozen=True, slots=True)
class Content:
    """Whose updates and counts the weights of a release hold; `unread` are runs and releases that could not be read."""

    sites: frozenset[str]
    unread: frozenset[str]


def contents(federation: Federation, entries: Sequence[Entry] | None = None) -> dict[str, Content]:
    """Digest -> who was counted on the way to a release, in what it goes back to as well; of all where none is named.

    Where a run is gone, its release still says who was counted in it, and what it goes back to.
    """
    known, planned_by = list_releases(federation), planners(federation.folder)
    by_digest = {entry.digest: entry for entry in known}
    steps, found = dict[str, tuple[Content, list[str]]](), dict[str, Content]()
    for entry in known if entries is None else entries:
        todo, seen = [entry.digest], set[str]()
        while todo:
            if (digest := todo.pop()) in by_digest and digest not in seen:
                seen.add(digest)
                if digest not in steps:
                    steps[digest] = _steps(federation, by_digest[digest], planned_by)
                todo += steps[digest][1]
        within = [steps[digest][0] for digest in seen]
        found[entry.digest] = Content(
            frozenset().union(*(one.sites for one in within)), frozenset().union(*(one.unread for one in within))
        )
    return found


def _steps(federation: Federation, entry: Entry, planned_by: Mapping[str, Sequence[str]]) -> tuple[Content, list[str]]:
    """What a release holds by its own run, and digests of the releases that it goes back to."""
    sites, unread, parents = set(entry.sites), set[str](), tuple[Parent, ...]()

    def added(run: RunFolder, number: int) -> bool:
        try:
            found = held(run, planned_by, number)
        except UNREADABLE:
            unread.add(run.id)
            return False
        sites.update(found.sites)
        unread.update(found.unread, [run.id] if found.planned is None else [])
        return True

    try:
        parents = manifest_of(federation, entry).origin.parents
    except UNREADABLE:
        unread.add(entry.label)
    if not added(RunFolder(federation.runs / entry.run), entry.round):
        for parent in parents:
            if parent.kind == "run" and parent.sha256 != NO_WEIGHTS:
                run = RunFolder(federation.runs / parent.name)
                added(run, _round(run, parent.sha256))
    return Content(frozenset(sites), frozenset(unread)), [p.sha256 for p in parents if p.kind == "release"]


def _round(run: RunFolder, weights_sha256: str) -> int:
    """The round that a run ended with these weights; 0 for its first ones, and where it cannot be read."""
    with suppress(*UNREADABLE):
        return round_with(run, weights_sha256) or 0
    return 0


def left_since(federation: Federation, entries: Sequence[Entry]) -> dict[str, frozenset[str]]:
    """Digest -> sites that have withdrawn and that a release holds something of, however late it was made.

    A site that has joined again has taken nothing back. What a withdrawal found then stays found.
    """
    lines = [line["facts"] for line in every_event(federation.folder, ("withdrawn",))]
    gone = frozenset(str(facts["site"]) for facts in lines)
    named = [(digest, str(facts["site"])) for facts in lines for digest in facts["releases"]]
    return {
        digest: (content.sites & gone) | {site for other, site in named if other == digest}
        for digest, content in contents(federation, entries).items()
    }


def status_list(federation: Federation, days: float) -> bytes:
    """A signed list of all releases and what has become of them, good for so many days, for hospitals to keep.

    Of a release whose site has withdrawn that is said too, and neither who nor why.
    """
    now = round(time.time(), 3)
    known = list_releases(federation)
    left = {digest for digest, sites in left_since(federation, known).items() if sites}
    releases = {
        entry.digest: Standing(
            entry.label,
            entry.stage,
            entry.history[-1].at,
            entry.history[-1].told if entry.stage == "retired" else SITE_LEFT if entry.digest in left else "",
        )
        for entry in known
    }
    made = Standings("fedstatus/1", federation.name, now, round(now + days * 86400, 3), releases)
    content = sign_standings(signer(federation), made)
    digest = hashlib.sha256(content).hexdigest()
    open_log(federation).add("release-status", sha256=digest, releases=len(releases), days=days)
    return content
