"""`steward.html`: the findings for the person who can mend them, with small pictures; stays on site, opens offline."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fedclient.data.findings import CATALOGUE, Finding
from fedclient.gate.facts import Seen
from fedclient.gate.run import Checked
from fedclient.gate.waivers import Waiver

MOST_CASES = 60  # shown of one code
MOST_GOOD = 24
WORDS = {"block": "stops training", "warn": "look at it", "note": "for the record"}


@dataclass(frozen=True, slots=True)
class Example:
    """One finding of a case, with its picture."""

    found: Finding
    picture: str
    split: str


@dataclass(frozen=True, slots=True)
class Group:
    """All findings of one code and severity."""

    code: str
    severity: str
    words: str
    title: str
    mend: str
    count: int
    blocks: int
    examples: tuple[Example, ...]

    @property
    def further(self) -> int:
        return self.count - len(self.examples)


def groups(found: Checked) -> list[Group]:
    """Findings by code, the gravest first; of each so many examples as a page holds."""
    seen = {each.case.key: each for each in found.seen}
    by_code: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for each in found.findings:
        by_code[each.code, each.severity].append(each)
    made = []
    for (code, severity), of in by_code.items():
        kind = CATALOGUE[code]
        blocks = sum(each in found.blocking for each in of)
        examples = tuple(_example(each, seen.get(each.case)) for each in of[:MOST_CASES])
        words = "waived" if severity == "block" and not blocks else WORDS[severity]
        made.append(Group(code, severity, words, kind.title, kind.mend, len(of), blocks, examples))
    return made


def render(found: Checked, site: str, waivers: Sequence[Waiver], study: str, at: str) -> str:
    """The page; every value is escaped, and nothing in it is run or fetched."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedclient"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    spoken = {each.case for each in found.findings}
    good = [_plain(each) for each in found.seen if each.case.key not in spoken and each.looked.picture]
    return environment.get_template("steward.html").render(
        facts=found.plain(),
        groups=groups(found),
        good=good[:MOST_GOOD],
        all_good=len(good),
        site=site,
        study=study,
        at=at,
        waivers=waivers,
    )


def _example(found: Finding, seen: Seen | None) -> Example:
    return Example(found, seen.looked.picture if seen else "", seen.case.split if seen else "")


def _plain(seen: Seen) -> dict[str, str]:
    return {"key": seen.case.key, "split": seen.case.split, "picture": seen.looked.picture}
