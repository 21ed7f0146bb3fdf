"""The plan of four real scanners; left out of collection where their images are not at hand."""

import os
from pathlib import Path

import pytest

from fedclient.data.manifest import sites_of
from fedclient.fingerprint import site_fingerprint
from shared_models.plan import Constraints
from shared_models.study import Study, Task
from simulations.bench.plan import MEMORY_BYTES, compared, pooled, site_of

ROOT = Path(os.environ.get("FEDIMAGING_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
NODULES = ROOT / "lung_nodule_ct"
if not NODULES.is_dir():
    pytest.skip(
        f"no real images: {ROOT} lacks lung_nodule_ct; set FEDIMAGING_DATA to the folder that has it",
        allow_module_level=True,
    )


def test_four_scanners_plan_as_if_their_nodules_were_in_one_place() -> None:
    sites = [site_of(name, NODULES) for name in sites_of(NODULES)]
    study = Study(name="n", task=Task(labels=("nodule",)))
    parts = {site.name: site_fingerprint(site, study) for site in sites}
    assert [part.cases for part in parts.values()] == [112, 95, 40, 69]
    raw = pooled(sites, "nodule")
    for dims in (2, 3):
        rows = compared(parts, raw, Constraints(MEMORY_BYTES, 2 if dims == 2 else 3, "ct"))
        assert [row for row in rows if not row.holds] == []
