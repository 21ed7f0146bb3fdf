"""Whose releases this site takes, and whether one was retired since it was made; all of it offline.

site/keys/ca.pem                  the authority that was pinned at `join`
site/release-status/<name>.json   the newest list of each federation's releases that was handed in
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fedclient.release_policy import Releases
from fedclient.site import read_site_file
from shared_models.authority import ROOT, read_files
from shared_models.dates import day
from shared_models.errors import ReleaseInvalid
from shared_models.files import locked, write_atomic
from shared_models.identity import vouched
from shared_models.parse import parse_json
from shared_models.release import SIGNATURE, Release, Trust
from shared_models.release_facts import Signed
from shared_models.standing import Standings, ahead, read_standings, retired, unretired, warned


def policy_of(site: Path) -> Releases:
    """`[releases]` of site.toml, or its defaults where there is no site."""
    return read_site_file(site).releases if (site / "site.toml").exists() else Releases()


def groups_of(site: Path, given: Sequence[Path]) -> tuple[tuple[bytes, ...], ...]:
    """Whom this site trusts, as PEM, each federation's authorities together: those of files, else the pinned one with
    its predecessors and those of site.toml.

    Raises:
        ReleaseInvalid: a file that is not there.
    """
    if given:
        return tuple((_read(path),) for path in given)
    policy, keys = policy_of(site), site / "keys"
    own: tuple[bytes, ...] = (read_files(keys),) if (keys / ROOT).exists() else ()
    own += tuple(_read(site / name) for name in policy.predecessors)
    further = tuple((_read(site / name),) for name in policy.authorities)
    return ((own,) if own else ()) + further


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ReleaseInvalid(f"{path}: is not there. Give the certificate of a federation's authority, a PEM file.")
    return path.read_bytes()


def trust_in(site: Path, given: Sequence[Path], research: bool) -> Trust:
    """All whom this site trusts.

    Raises:
        ReleaseInvalid: there is nobody, and research releases are not asked for; or a file that is not there.
    """
    found = tuple(each for group in groups_of(site, given) for each in group)
    if not found and not research:
        raise ReleaseInvalid(
            f"{site / 'keys' / ROOT}: is missing, so nothing says whom to trust. Give the folder of this site with "
            "--site, or the certificate of a federation's authority with --authority FILE."
        )
    return Trust(found, research)


def kept_lists(site: Path) -> list[Standings]:
    """The lists of releases that this site keeps, as those vouch for them whom it trusts.

    Raises:
        ReleaseInvalid: one for which none of them does.
    """
    trusted = [each for group in groups_of(site, ()) for each in group]
    paths = sorted((site / "release-status").glob("*.json"))
    return [read_standings(path.read_bytes(), trusted, str(path)) for path in paths]


@dataclass(frozen=True, slots=True)
class Watch:
    """What this site knows of the standing of one release, asked anew before each use.

    Attributes:
        groups: as `groups_of` has them; a list counts where the federation of the release has signed it.
        given: a list that was handed in with the command; it is kept where it is newer than the kept one.
    """

    site: Path
    release: Release
    groups: tuple[tuple[bytes, ...], ...]
    given: Path | None = None

    def warnings(self, now_s: float | None = None) -> list[str]:
        """What there is to say before the release is used; nothing where all is well, or nobody has handed in a list.

        Raises:
            ReleaseInvalid: it is retired or unknown; a list of another federation, one dated ahead of this machine's
                clock, or one that takes back a retirement; none that is good, where site.toml asks for one.
        """
        origin = self.release.manifest.origin
        required = policy_of(self.site).status_required
        now_s = time.time() if now_s is None else now_s
        if origin.kind == "simulation":
            if self.given is not None:
                raise ReleaseInvalid(f"{self.given}: a research release stands on no list. Leave --status out.")
            return []
        standings, told = self._newest(now_s)
        if standings is None:
            if required:
                raise ReleaseInvalid(
                    "site.toml asks for a list of releases (`[releases] status_required`), and none was handed in. Get "
                    "the output of `fedserver release-status` from the coordinator, and give it with --status FILE."
                )
            return []
        told += warned(standings, self.release.digest, origin.made_at, now_s)
        if required and now_s > standings.good_until:
            raise ReleaseInvalid(
                f"the list of releases was good until {day(standings.good_until)}, and site.toml asks for one that is "
                "(`[releases] status_required`). Get a new one from the coordinator, and give it with --status FILE."
            )
        return told

    def later(self) -> "Watch":
        """For uses after this one: without the list that was handed in, unless it could not be kept."""
        if self.given is None:
            return self
        newest, _ = self._newest(time.time())
        try:
            kept = self._kept(self._kept_at(), self._authorities())
        except (OSError, ReleaseInvalid):
            kept = None
        return replace(self, given=None) if kept == newest else self

    def said(self) -> str:
        """For who verifies: what the newest list says of the release, or that there is none."""
        standings, _ = self._newest(time.time())
        if standings is None:
            return "no list of the federation's releases was handed in: whether it was retired since is not known"
        known = standings.releases.get(self.release.digest)
        stage = "unknown to" if known is None else f"{known.stage} by"
        return f"{stage} the list of {day(standings.made_at)}, which is good until {day(standings.good_until)}"

    def _newest(self, now_s: float) -> tuple[Standings | None, list[str]]:
        authorities, kept_at = self._authorities(), self._kept_at()
        if self.given is None:
            kept = self._kept(kept_at, authorities)
            if kept is not None and (words := ahead(kept, now_s)):
                raise ReleaseInvalid(f"{kept_at}: {words}")
            return kept, []
        content = self.given.read_bytes() if self.given.is_file() else b""
        handed = read_standings(content, authorities, str(self.given))
        if handed.federation != self.release.manifest.origin.federation:
            raise ReleaseInvalid(
                f"{self.given}: is the list of {handed.federation!r}, the release is of "
                f"{self.release.manifest.origin.federation!r}. Give the list of that federation."
            )
        if words := ahead(handed, now_s):
            raise ReleaseInvalid(f"{self.given}: {words}")
        if not (self.site / "keys").is_dir():
            return handed, []
        try:
            with locked(kept_at.with_suffix(".lock")):
                kept = self._sound(kept_at, authorities)
                early = kept is not None and bool(ahead(kept, now_s))  # nothing could ever be newer
                if kept is not None and kept.made_at > handed.made_at and not early:
                    retired(handed, self.release.digest)  # whatever the newer one says: nothing comes back from that
                    return kept, [f"{self.given}: is older than the list of {day(kept.made_at)} that is kept here"]
                self._none_comes_back(kept, handed)
                if handed != kept:
                    write_atomic(kept_at, content)
        except OSError as error:  # a folder that is only read
            with suppress(OSError):
                self._none_comes_back(self._sound(kept_at, authorities), handed)
            return handed, [f"{self.given}: could not be kept here ({error.strerror}), and counts for this time alone"]
        return handed, []

    def _kept(self, path: Path, authorities: Sequence[bytes]) -> Standings | None:
        return read_standings(path.read_bytes(), authorities, str(path)) if path.exists() else None

    def _sound(self, path: Path, authorities: Sequence[bytes]) -> Standings | None:
        """The kept list; none where its authority was dropped since, or it is spoilt: another takes its place."""
        try:
            return self._kept(path, authorities)
        except ReleaseInvalid:
            return None

    def _none_comes_back(self, kept: Standings | None, handed: Standings) -> None:
        """Refuses a newer list that takes a retirement back, as that of a coordinator does which was restored."""
        if kept is not None and (back := unretired(kept, handed)):
            raise ReleaseInvalid(
                f"{self.given}: the newer list no longer calls {', '.join(back[:5])} retired, as that of "
                f"{day(kept.made_at)} does, which is kept: the coordinator was put back from a backup. Telephone it: "
                f"it has to retire {'it' if len(back) == 1 else 'them'} again, and then to make another list. Only "
                f"where it says that it cannot, delete {self._kept_at()}."
            )

    def _authorities(self) -> tuple[bytes, ...]:
        """Of the federation of which one vouches for the release."""
        content = (self.release.folder / SIGNATURE).read_bytes()
        certificate = parse_json(Signed, content, SIGNATURE, ReleaseInvalid).signer.encode()
        for group in self.groups:
            if any(vouched(each, certificate) is not None for each in group):
                return group
        raise ReleaseInvalid(f"{SIGNATURE}: was changed since the release was opened. Get it again.", SIGNATURE)

    def _kept_at(self) -> Path:
        name = hashlib.sha256(self.release.manifest.origin.federation.encode()).hexdigest()[:16]
        return self.site / "release-status" / f"{name}.json"
