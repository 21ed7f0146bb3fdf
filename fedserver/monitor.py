"""`fedserver monitor`: what sites that use a release have counted, merged, beside what the release was measured on."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shared_models.cli import guarded, print_json
from shared_models.drift import (
    Observed,
    Profile,
    by_chance,
    divergences,
    doubted,
    nearest,
    read_reference,
    total,
)
from shared_models.errors import StateInvalid
from shared_models.parse import parse_json
from shared_models.release import Release, Trust, open_release

console = Console(soft_wrap=True)
SHOWN = 10
MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Monitored:
    """What came of a monitoring round.

    Attributes:
        sites: cases of each.
        apart: of each feature the divergence of all cases together from the release's, and what chance alone gives.
        of_sites: of each site its mean divergence from the profile of the release that it is most like, less chance.
    """

    sites: Mapping[str, int]
    apart: Mapping[str, tuple[float, float]]
    of_sites: Mapping[str, float]


def merged(release: Release, observed: Sequence[Observed]) -> Monitored:
    """All sites' counts together beside all of the release's, and each site's beside the profile nearest to it.

    Raises:
        StateInvalid: no reference, no counts, of another release, or a site twice.
        UpdateRejected: counts on other grids than the study's.
    """
    profiles = read_reference(release.fingerprint, release.study, f"release {release.digest[:12]}")
    if not profiles:
        raise StateInvalid(
            f"release {release.digest[:12]}: tells of no reference. Train with `reference = true` under [evaluate]."
        )
    names = [each.site for each in observed]
    if not observed or len(set(names)) < len(names):
        raise StateInvalid("give one file of each site, from `fedclient drift RELEASE --export FILE`.")
    parts: dict[str, Profile] = {}
    for each in observed:
        if each.release != release.digest:
            raise StateInvalid(f"site {each.site!r}: counted for another release. Ask it for this one's.")
        parts[each.site] = doubted(each.profile, release.study, each.site)
    here, there = total(list(parts.values())), total(profiles)
    apart = divergences(here, there)
    return Monitored(
        {site: part.cases for site, part in sorted(parts.items())},
        {name: (apart[name], by_chance(here.counts[name], there.counts[name])) for name in apart},
        {site: _excess(part, profiles) for site, part in sorted(parts.items())},
    )


def _excess(part: Profile, profiles: Sequence[Profile]) -> float:
    like = profiles[nearest(part, profiles)]
    apart = divergences(part, like)
    return sum(apart[name] - by_chance(part.counts[name], like.counts[name]) for name in apart) / len(apart)


@guarded
def monitor(
    release: Annotated[Path, typer.Argument(help="The release that sites use: its folder, or its .fedrelease file.")],
    files: Annotated[list[Path], typer.Argument(help="Counts of sites, from `fedclient drift RELEASE --export FILE`.")],
    federation: Annotated[
        Path, typer.Option("--federation", envvar="FEDSERVER_FEDERATION", help="Folder of the federation.")
    ] = Path("federation"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Merges what sites have counted under a release, and says how far it is from what the release was measured on."""
    from fedserver.enrol import open_federation

    trust = Trust((open_federation(federation).authority,))
    with tempfile.TemporaryDirectory(prefix="fedserver-") as scratch:
        opened = open_release(release, trust, scratch=Path(scratch))
    found = merged(opened, [_observed(path) for path in files])
    if as_json:
        print_json(_row(found) | {"release": opened.digest})
        return
    told = ", ".join(f"{site} {count}" for site, count in found.sites.items())
    console.print(f"{opened.name} {opened.version}: cases of {told}", highlight=False)
    table = Table("feature", "divergence", "by chance", box=None)
    for name, (value, chance) in sorted(found.apart.items(), key=lambda item: item[1][1] - item[1][0])[:SHOWN]:
        table.add_row(name, f"{value:.3f}", f"{chance:.3f}")
    console.print(table)
    for site, excess in sorted(found.of_sites.items(), key=lambda item: -item[1]):
        console.print(f"{site}: {excess:+.3f} from the site of the release that it is most like", highlight=False)


def _observed(path: Path) -> Observed:
    if path.stat().st_size > MOST_BYTES:
        raise StateInvalid(f"{path}: is larger than the counts of a site can be. Ask for the file again.")
    return parse_json(Observed, path.read_bytes(), str(path), StateInvalid)


def _row(found: Monitored) -> dict[str, Any]:
    apart = {name: {"divergence": value, "by_chance": chance} for name, (value, chance) in found.apart.items()}
    return {"sites": dict(found.sites), "features": apart, "divergence_of_sites": dict(found.of_sites)}
