"""Secure sums whose sites and coordinator are killed at each of the steps: a sum is exact, or there is none."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial

from fedclient.consent import decide
from fedclient.site import open_site
from fedserver.checkpoint import RunFolder
from shared_models.protect.privacy import Protect
from shared_models.protect.secure import SecureAggregation
from shared_models.study import Study, sha256
from simulations.bench.faults.fleet import COORDINATOR, Fleet, await_finished, await_that, study, told
from simulations.bench.faults.kills import check, sound

STEPS = ("Advertised", "Shared", "Masked", "Confirmed", "Revealed")
VICTIM = "s1"


def killed_in_a_sum(here: Fleet) -> str:
    """The executor of a site, then the run's process, killed at each step: two times five rounds."""
    here.honest(0.3)
    bounds = SecureAggregation(clip=8.0, most_examples=128, step_s=25.0)
    made = replace(study("f24", 2 * len(STEPS), quorum=3, deadline_s=300.0), protect=Protect(secure_aggregation=bounds))
    run, seen = here.begin("f24", made), list[str]()
    _accepted(here, made)
    for number, (victim, step) in enumerate(((v, s) for v in ("site", "coordinator") for s in STEPS), start=1):
        at = await_that(f"{step} in round {number}", partial(_reached, here, number, step), 300)
        here.killed(VICTIM, "executor") if victim == "site" else here.killed(COORDINATOR, "run")
        seen.append(f"{victim} at {at}")
        await_finished(run, number, 300)
    here.finish("f24", 180)
    for number in range(1, 2 * len(STEPS) + 1):
        check(sorted(_summed(run, number)) == list(here.sites), f"round {number}: the sum is of {_summed(run, number)}")
    sound(run)
    return f"{len(seen)} kills ({', '.join(seen)}): each round's sum is of all three sites, and exact"


def _accepted(here: Fleet, made: Study) -> None:
    """A person at each site approves it: after studies of the same images without secure sums no policy does."""
    digest = sha256(made)
    for name in here.sites:
        folder = here.folder(name)
        await_that(f"the study has come to {name}", (folder / "studies" / digest / "study.json").exists)
        decide(open_site({"site-dir": str(folder)}), digest, "approved", also_alike=True)


def _summed(run: RunFolder, number: int) -> list[str]:
    return list(told(run, number)["together"]["sites"])


def _reached(here: Fleet, number: int, step: str) -> str:
    """The step of the victim's sum of a round, once it is at least `step`; "" before."""
    path = here.folder(VICTIM) / "sums.db"
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            row = db.execute("SELECT step FROM sums WHERE round = ? ORDER BY rowid DESC LIMIT 1", (number,)).fetchone()
    except sqlite3.OperationalError:  # there is none yet
        return ""
    return str(row[0]) if row and STEPS.index(row[0]) >= STEPS.index(step) else ""


SCENARIOS: dict[str, Callable[[Fleet], str]] = {"F24": killed_in_a_sum}
