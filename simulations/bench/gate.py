"""The readiness gate against a corpus of seeded faults, and on real images that nobody touched.

    python -m simulations.bench.gate [--data DIR] [--fast]

Each fault is a small data set that is sound but for one thing, checked as `fedclient check` does; it is caught if the
finding with the right code is about the faulty case. With --data (the folder with cxr_lung_seg, lung_nodule_ct,
ct_lesion_dicom and ingest_formats) faults are sown into real images too, and the untouched sets must come through
without a blocking finding but for those that are listed here with their reason. Target: 95 % caught.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedclient.data.findings import CATALOGUE, Finding
from fedclient.data.manifest import sites_of
from fedclient.gate.facts import needs_of
from fedclient.gate.run import Checked, check
from fedclient.site import Site, open_site
from simulations.fixtures.faults import FAULTS
from simulations.fixtures.real_faults import REAL_FAULTS, SETS, RealSet
from simulations.fixtures.sown import Fault, Set

CAUGHT_SHARE = 0.95
FEWEST = 60


@dataclass(frozen=True, slots=True)
class Row:
    """One fault: the codes of the findings about the case that it is in, or about the whole."""

    fault: Fault
    found: tuple[str, ...]
    silent_on_the_rest: bool

    @property
    def caught(self) -> bool:
        return self.fault.code in self.found


def site_of(data: Path, work: Path, name: str = "bench", manifest_site: str = "") -> Site:
    return open_site({"site": name, "manifest-site": manifest_site, "data": str(data), "work": str(work)})


def tried(fault: Fault, folder: Path) -> Row:
    """Makes the data set of a fault, and checks it."""
    made = Set(folder / "data")
    fault.make(made)
    site = site_of(made.finish(), folder / "site")
    found = check(site, needs_of(fault.study))
    about = [f for f in found.findings if fault.whole or f.row == 2]
    rest = [f for f in found.findings if f.severity == "block" and f not in about]
    return Row(fault, tuple(sorted({f.code for f in about})), not rest)


def corpus(faults: Sequence[Fault], work: Path) -> list[Row]:
    """Every fault tried, each in a folder that is gone afterwards."""
    rows = []
    for number, fault in enumerate(faults):
        folder = work / f"{number:03d}"
        rows.append(tried(fault, folder))
        shutil.rmtree(folder)
        row = rows[-1]
        mark = "" if row.caught and row.silent_on_the_rest else "  MISSED" if not row.caught else "  AND OTHER CASES"
        print(f"  {fault.name:44} {fault.code:24} {', '.join(row.found) or '-'}{mark}", flush=True)
    return rows


def blocking(found: Sequence[Finding]) -> Counter[str]:
    return Counter(f.code for f in found if f.severity == "block")


def untouched(name: str, found: Checked, listed: Mapping[str, str]) -> bool:
    """Prints what a set of real images has got; true if nothing blocks beyond what is listed."""
    blocks = blocking(found.findings)
    others = Counter(f.code for f in found.findings if f.severity != "block")
    print(f"  {name}: {len(found.seen)} cases; blocking {dict(blocks) or 'none'}; to look at {dict(others) or 'none'}")
    for code in blocks:
        print(f"    {code}: {listed.get(code, 'NOT LISTED')}")
    return set(blocks) <= set(listed)


def real_sets(data: Path, work: Path) -> bool:
    """The untouched sets, site by site, each looked at twice."""
    held = True
    for real in SETS:
        root = real.manifest(data, work)
        for name in sites_of(root) or ("",):
            held &= real_site(real, root, name, work)
    return held


def real_site(real: RealSet, root: Path, name: str, work: Path) -> bool:
    site = site_of(root, work / f"{real.name}-{name}", manifest_site=name)
    needs = needs_of(real.study)
    began = time.monotonic()
    found = check(site, needs, processes=2)
    first, began = time.monotonic() - began, time.monotonic()
    again = check(site, needs, processes=2)
    second = time.monotonic() - began
    held = untouched(f"{real.name} {name}".strip(), found, real.listed)
    print(f"    first look {first:.1f} s; second {1000 * second:.0f} ms, {again.anew} looked at anew")
    return held and again.anew == 0 and again.findings == found.findings


def main() -> None:
    words = argparse.ArgumentParser(description="The readiness gate against seeded faults and real images.")
    words.add_argument("--data", type=Path, help="folder of the real sets")
    words.add_argument("--fast", action="store_true", help="the phantom's faults only")
    given = words.parse_args()
    if given.data and not given.data.is_dir():
        sys.exit(f"{given.data}: is no folder. Give the one that holds cxr_lung_seg and the others.")
    held = True
    with tempfile.TemporaryDirectory(prefix="gate-") as temporary:
        work = Path(temporary)
        print(f"  {'fault':44} {'expected':24} found")
        rows = corpus(FAULTS, work)
        if given.data and not given.fast:
            print("sown into real images")
            rows += corpus([real.fault(given.data) for real in REAL_FAULTS], work)
            print("untouched real images")
            held = real_sets(given.data, work / "real")
    caught, quiet = sum(row.caught for row in rows), sum(row.silent_on_the_rest for row in rows)
    codes = {row.fault.code for row in rows if row.caught}
    print(
        f"\n{caught} of {len(rows)} faults caught with the right code ({caught / len(rows):.1%}); in {quiet} no other "
        f"case was blocked; {len(codes)} of {len(CATALOGUE)} codes seen"
    )
    if caught < CAUGHT_SHARE * len(rows) or len(rows) < FEWEST or not held:
        sys.exit("falls short of its target")


if __name__ == "__main__":
    main()
