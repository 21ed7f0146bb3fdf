"""The check of a site's data: every case looked at once, kept, and seen together; a second run looks at what changed.

site/gate/cases/<what the study needs>/<case key>.json    what was seen in a case, 0600, no identifiers
site/gate/needs.json                                      what the last check asked of them
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedclient.data.cases import Case, Listing, state_of
from fedclient.data.findings import CATALOGUE, Finding, finding
from fedclient.data.listing import list_cases
from fedclient.data.manifest import Progress
from fedclient.gate.across import together, torn_patients
from fedclient.gate.facts import Looked, Needs, Seen, takes_part
from fedclient.gate.inspect import quieter
from fedclient.gate.pool import PATIENCE_S, Setting, looks
from fedclient.gate.waivers import Waiver, excluded, read_waivers, sorted_out
from fedclient.site import Site
from shared_models.errors import FederationError, ImageUnreadable, ManifestInvalid, StateInvalid
from shared_models.files import canonical_json, write_atomic
from shared_models.parse import parse_json, plain

ORDER = {"block": 0, "warn": 1, "note": 2}
SMALLEST_COUNT = 11  # CMS and PCORnet; a site may only raise it


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check has found; stays on site.

    Attributes:
        findings: gravest first.
        blocking: those of them that no waiver lets pass.
        used: the waivers without which there would be more.
        left_out: how many cases a waiver takes out.
        anew: how many cases were looked at in this run; the others had not changed.
        states: case key -> state of its files.
    """

    needs: Needs
    layout: str
    seen: tuple[Seen, ...]
    findings: tuple[Finding, ...]
    blocking: tuple[Finding, ...]
    used: tuple[Waiver, ...]
    left_out: int
    anew: int
    states: dict[str, str] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return not self.blocking

    @property
    def readable(self) -> int:
        """Cases that can be read. Without one nothing may be trained on, whatever is waived."""
        return sum(each.looked.facts is not None for each in self.seen)

    def plain(self) -> dict[str, Any]:
        """For `--json`."""
        cases = [each.case for each in self.seen]
        return {
            "cases": len(cases),
            "readable": self.readable,
            "left_out": self.left_out,
            "looked_at": self.anew,
            "ready": self.ready,
            "layout": self.layout,
            "splits": {
                split: {
                    "cases": sum(c.split == split for c in cases),
                    "patients": len({c.patient for c in cases if c.split == split}),
                    "labelled": sum(c.split == split and self.needs.labelled(c) for c in cases),
                }
                for split in ("train", "val", "test")
            },
            "findings": [{**plain(found), "blocks": found in self.blocking} for found in self.findings],
            "codes": dict(Counter(found.code for found in self.findings)),
        }


def check(
    site: Site,
    needs: Needs,
    *,
    processes: int = 0,
    patience_s: float = PATIENCE_S,
    progress: Progress | None = None,
) -> Checked:
    """Every check of the catalogue that a study with these needs wants; whatever is wrong becomes a finding.

    Raises:
        OrderRefused: the site's work may not go on. What was seen by then is kept.
    """
    if last_needs(site) != needs:
        write_atomic(site.folder / "gate" / "needs.json", canonical_json(plain(needs)))
    waivers = read_waivers(site.folder)
    listing = listed(site)
    out = excluded(waivers)
    cases = [case for case in listing.cases if case.key not in out]
    kept, states = _kept(site, needs, cases)
    todo = [case for case in cases if case.key not in kept]
    setting = Setting(site.data.resolve(), needs, site.salt)
    seeing = looks(todo, setting, min(processes, len(todo)), site.go_on, patience_s)
    for done, (case, looked) in enumerate(seeing, start=1):
        kept[case.key] = looked
        if looked.state:  # else its files could not even be listed: it is tried again
            write_atomic(_path(site, needs, case), canonical_json(plain(looked)))
        states[case.key] = looked.state
        if progress is not None:
            progress(done, len(todo))
    seen = tuple(Seen(case, _here(kept[case.key], case, needs)) for case in cases)
    findings = [found for found in listing.findings if found.case not in out]
    if listing.cases or not listing.findings:  # else there is nothing to be seen together
        findings += together(seen, needs)
    findings += [found for each in seen for found in each.looked.findings]
    findings.sort(key=lambda f: (ORDER[f.severity], f.code, f.case))
    blocking, used = sorted_out(findings, waivers if _some_can_be_read(seen) else ())
    return Checked(
        needs, listing.layout, seen, tuple(findings), tuple(blocking), tuple(used), len(listing.cases) - len(cases),
        len(todo), states,
    )  # fmt: skip


def last_needs(site: Site) -> Needs:
    """What the last check asked of the cases: of which study that was, or of none."""
    try:
        return parse_json(Needs, (site.folder / "gate" / "needs.json").read_bytes(), "needs")
    except (OSError, FederationError):  # never checked, or by another version
        return Needs()


@dataclass(frozen=True, slots=True)
class Standing:
    """How a site's data stand by what was seen before, without opening an image.

    Attributes:
        unseen: cases that are new, or have changed since they were last looked at.
        blocking: codes of findings that no waiver lets pass, with how many there are.
    """

    layout: str
    cases: int
    unseen: int
    blocking: dict[str, int]


def standing(site: Site, needs: Needs) -> Standing:
    """What the last checks have found, of all cases whose files are as they were."""
    waivers = read_waivers(site.folder)
    listing = listed(site)
    out = excluded(waivers)
    cases = [case for case in listing.cases if case.key not in out]
    kept, _ = _kept(site, needs, cases)
    seen = tuple(Seen(case, _here(kept[case.key], case, needs)) for case in cases if case.key in kept)
    findings = [found for found in listing.findings if found.case not in out]
    findings += [found for each in seen for found in each.looked.findings]
    if len(seen) == len(cases) and (listing.cases or not listing.findings):
        findings += together(seen, needs)
    some = len(seen) < len(cases) or _some_can_be_read(seen)
    blocking, _ = sorted_out(findings, waivers if some else ())
    return Standing(listing.layout, len(cases), len(cases) - len(seen), dict(Counter(f.code for f in blocking)))


def listed(site: Site) -> Listing:
    """What the folder holds; a table that does not describe it is one blocking finding, without its names."""
    try:
        return _look(site)
    except (ManifestInvalid, ImageUnreadable) as e:
        code = e.code if e.code in CATALOGUE else "MANIFEST_INVALID"
        return Listing("unknown", (), (finding(code, nameless(str(e), site.data)),))


def check_waivable(site: Site, code: str) -> None:
    """Raises StateInvalid for a finding that leaves no case: no decision makes data of it that can be trained on."""
    listing = listed(site)
    told = [found for found in listing.findings if found.code == code]
    if told and not listing.cases:
        raise StateInvalid(
            f"{code} cannot be waived: it leaves no case to read. It says: {told[0].what} {told[0].mend} "
            f"Then run `fedclient check` again."
        )


def usable_cases(site: Site) -> tuple[Case, ...]:
    """The cases that may take part: those of the listing that no waiver takes out, and of the listing that the gate
    has seen where it has.

    Raises:
        ManifestInvalid: as `list_cases`.
    """
    out = excluded(read_waivers(site.folder)) if site.deployed else frozenset()
    listing = _look(site) if site.once.listing is None else site.once.listing
    return tuple(case for case in listing.cases if case.key not in out)


def _look(site: Site) -> Listing:
    """Lists the cases, and lets what comes after in this order go by that."""
    site.once.listing = list_cases(site.where, site.salt)
    return site.once.listing


def cheap_findings(site: Site) -> list[Finding]:
    """What a listing tells without opening an image: its own findings, and patients of two splits."""
    listing = listed(site)
    return [*listing.findings, *torn_patients(listing.cases)]


def nameless(message: str, data: Path) -> str:
    """A message without the path of the data folder, whose components may name somebody."""
    for folder in (str(data.resolve()), str(data)):
        message = message.replace(folder + "/", "").replace(folder, "the data folder")
    return message


def _some_can_be_read(seen: Sequence[Seen]) -> bool:
    return any(each.looked.facts is not None for each in seen)


def _kept(site: Site, needs: Needs, cases: Sequence[Case]) -> tuple[dict[str, Looked], dict[str, str]]:
    """What was seen before of cases whose files are as they were, and the state of all."""
    found: dict[str, Looked] = {}
    states: dict[str, str] = {}
    for case in cases:
        site.go_on()
        try:
            states[case.key] = state_of(case)
            looked = parse_json(Looked, _path(site, needs, case).read_bytes(), "kept result")
        except (OSError, FederationError):  # new, spoilt, or gone: it is looked at
            continue
        if looked.state == states[case.key]:
            found[case.key] = looked
    return found, states


def _path(site: Site, needs: Needs, case: Case) -> Path:
    return site.folder / "gate" / "cases" / needs.digest / f"{case.key}.json"


def _here(looked: Looked, case: Case, needs: Needs) -> Looked:
    """As it counts now: rows move when a manifest is edited, and a case without labels stops nobody."""
    moved = tuple(
        found if found.row == case.row else finding(found.code, found.what, case=case.key, row=case.row,
                                                    severity=found.severity)
        for found in looked.findings
    )  # fmt: skip
    looked = Looked(looked.state, looked.facts, moved, looked.picture)
    return quieter(looked) if needs.wants_labels and not takes_part(case, needs) else looked
