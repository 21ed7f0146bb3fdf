"""Weights that begin another study: what their training has spent of a patient's privacy, and what nothing bounds."""

import shutil
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from fedclient.consent import Asked
from fedclient.explain import explained
from fedclient.ledger import open_ledger
from fedserver.enrol import Federation, init_federation
from fedserver.privacy import Before, spent
from fedserver.publish.lineage import BEGAN, earlier, run_with
from fedserver.report import facts, write_report
from fedserver.submit import Submitted, submit
from shared_models import nets
from shared_models.files import file_sha256
from shared_models.protect.accounting import Spend, epsilon
from shared_models.protect.privacy import Privacy, Protect
from shared_models.study import Transfer, canonical, sha256
from shared_models.weights import save_arrays
from simulations.phantoms import PhantomPlan, phantom
from tests.test_spending import DELTA, PRIVATE, TINY, answered, order, run_of, site_at, with_budget
from tests.test_spending import spent as spends_of

BARE = replace(PRIVATE, name="bare", protect=Protect())
OTHER = replace(PRIVATE, name="other", protect=Protect(Privacy(noise_multiplier=3.0, sample_rate=0.5)))


def counted(**updates: int) -> list[dict[str, Any]]:
    """Rounds of a report in which each site had so many updates."""
    return [{"sites": {site: {"updates": [{}] * count} for site, count in updates.items()}}]


def figure(*spends: Spend) -> float:
    return ceil(1000 * epsilon(spends, DELTA)) / 1000


def told(*before: Before, **updates: int) -> dict[str, Any]:
    found = spent(PRIVATE, counted(**updates), before)
    assert found is not None
    return found


def test_what_earlier_private_runs_have_spent_of_a_site_is_added_to_its_figure():
    found = told(Before("first", 2, OTHER, counted(north=2, east=1)), north=1, south=1)
    mine, before = Spend(2.0, 0.25, 10), Spend(3.0, 0.5, 20)
    assert found["sites"] == {
        "east": {"steps": 0, "epsilon": figure(replace(before, steps=10))},
        "north": {"steps": 10, "epsilon": figure(mine, before)},
        "south": {"steps": 10, "epsilon": figure(mine)},
    }
    assert found["bounded"] is True
    assert found["words"].startswith("It began with weights that go back to round 2 of run first: what was spent there")
    assert f"epsilon at most {found['sites']['north']['epsilon']:.3g} at delta" in found["words"]


def test_a_run_from_its_seed_says_nothing_of_others():
    found = told(north=1)
    assert (found["bounded"], found["words"].startswith("Training is differentially private")) == (True, True)


def test_weights_of_a_run_without_privacy_are_made_private_by_nothing_that_follows():
    found = told(Before("first", 2, OTHER, counted(north=1)), Before("plain", 5, BARE, counted(north=5)), north=1)
    assert found["bounded"] is False
    assert found["words"].startswith(
        "NOT PRIVATE AS A WHOLE: it began with weights that go back to round 2 of run first and to round 5 of run "
        "plain, which was not differentially private. Nothing bounds"
    )


def test_of_a_file_from_elsewhere_it_is_said_that_nobody_knows():
    found = told(Before(), north=1)
    assert found["bounded"] is None
    assert (
        "a file of which it is not known here what it was trained on. If that was patients, nothing" in found["words"]
    )
    assert told(Before(), Before("plain", 5, BARE), north=1)["bounded"] is False


# A federation


@pytest.fixture
def federation(quick_folder: Path) -> Federation:
    return init_federation(quick_folder / "federation", "Test", "127.0.0.1:8443")


def queued(federation: Federation, weights: Path) -> Submitted:
    study = replace(TINY, name="next", transfer=Transfer(file_sha256(weights)))
    return submit(federation, study, None, False, weights)


def test_a_private_study_that_begins_with_weights_of_a_private_run_reports_what_both_have_spent(
    federation, tmp_path_factory
):
    plan = PhantomPlan(sites=("north", "south"), train=3, val=1, test=1, slices=2, size=32)
    first = run_of(federation.runs, phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1))
    assert run_with(federation.runs, file_sha256(first.weights(1))) == ("federated", 1)
    (federation.runs / "damaged").mkdir()
    (federation.runs / "damaged/metrics.jsonl").write_text('{"round": 1}\n{"rou\n')
    assert run_with(federation.runs, file_sha256(first.weights(1))) == ("federated", 1)
    shutil.rmtree(federation.runs / "damaged")
    made = queued(federation, first.weights(1))
    assert "round 1 of run federated; the report adds up what both" in made.told[-1]
    assert [(each.run and each.run.id, each.round) for each in earlier(made.folder)] == [("federated", 1)]
    made.folder.metrics.write_bytes(first.metrics.read_bytes())  # its own two rounds, of the same sites
    found = facts(made.folder)["privacy"]
    assert found["sites"]["north"] == {"steps": 6, "epsilon": figure(Spend(2.0, 0.25, 6 + 3))}  # of round 1 alone
    assert "go back to round 1 of run federated" in write_report(made.folder).read_text()
    assert "go back to" not in write_report(first).read_text()


def test_weights_from_elsewhere_or_of_a_run_that_is_gone_are_a_file_that_nobody_knows(federation, tmp_path):
    weights = tmp_path / "from-elsewhere.safetensors"
    save_arrays(weights, nets.initial_weights(TINY))
    made = queued(federation, weights)
    assert "not known here what the first weights were trained on" in made.told[-1]
    assert [each.run for each in earlier(made.folder)] == [None]
    assert facts(made.folder)["privacy"]["bounded"] is None
    (made.folder.path / BEGAN).write_text('{"run": "gone", "round": 3, "sha256": ""}')
    assert [each.run for each in earlier(made.folder)] == [None]
    (made.folder.path / BEGAN).write_text(f'{{"run": "{made.id}", "round": 3, "sha256": ""}}')
    assert [each.run for each in earlier(made.folder)] == [None]


# A hospital


def test_the_book_of_a_site_adds_up_a_study_and_the_one_that_begins_with_its_weights(tmp_path):
    with_budget(tmp_path, 50.0)
    answered(tmp_path)
    answered(tmp_path, order(replace(PRIVATE, transfer=Transfer("a" * 64))))
    assert spends_of(tmp_path) == (Spend(2.0, 0.25, 10),) * 2
    assert open_ledger(tmp_path).accounts()[0].spent == epsilon([Spend(2.0, 0.25, 20)], DELTA)


def test_a_hospital_reads_that_a_study_begins_with_weights_from_a_file_and_what_no_noise_undoes(tmp_path):
    study = replace(PRIVATE, transfer=Transfer("a" * 64))
    asked = Asked(sha256(study), study, canonical(study).decode(), 0.0, None, "pending")
    words = explained(site_at(tmp_path), asked)
    assert any("weights from a file at the coordinator (SHA-256 aaaaaaaaaaaa)" in line for line in words["trains"])
    assert any("is not made private by that" in line for line in words["costs"])
