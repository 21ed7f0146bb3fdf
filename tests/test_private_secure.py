"""Differential privacy and secure sums in one study: the run goes through, and neither protection undoes the other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedclient.ledger import open_ledger
from fedserver.report import facts
from shared_models.files import read_lines
from shared_models.protect.accounting import epsilon
from shared_models.protect.secure import SecureAggregation
from shared_models.study import Model, load_study
from shared_models.weights import load
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, carry_out, federation, node_configs

READY = load_study("lung-ct-private-secure")
STUDY = replace(
    READY,
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    train=replace(READY.train, local_steps=2, batch_size=2),
    rounds=replace(READY.rounds, count=2),
    protect=replace(READY.protect, secure_aggregation=SecureAggregation(clip=8.0)),  # small lots, so much noise
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    data = phantom(
        tmp_path_factory.mktemp("phantom"), PhantomPlan(sites=3, train=4, val=1, test=1, slices=2, size=32), processes=1
    )
    work = tmp_path_factory.mktemp("work")
    nodes = node_configs(work, [data], Machine(device="cpu"), None)
    return carry_out(federation("federated", STUDY, nodes), work, Machine(device="cpu")), work


def test_a_study_with_both_protections_runs_and_its_sums_hold_the_mean_update_and_no_count(run):
    folder, _ = run
    lines = [line for line in read_lines(folder.metrics) if not line.get("final")]
    assert [len(line["together"]["sites"]) for line in lines] == [3, 3]
    for line in lines:
        together = line["together"]
        assert (line["sites"], together["examples"], together["losses"], together["scores"]) == ({}, None, [], {})


def test_each_sites_ledger_has_spent_what_the_report_tells_and_the_coordinator_saw_no_update(run):
    folder, work = run
    privacy = STUDY.protect.privacy
    assert privacy is not None
    due = epsilon([privacy.spend(4)], privacy.delta)
    books = [path.parent for path in Path(work).rglob("ledger.db")]
    assert len(books) == 3
    for book in books:
        [account] = open_ledger(book).accounts()
        assert account.spent == pytest.approx(due)
        assert account.open == 0
    told = facts(folder)
    assert [site["steps"] for site in told["privacy"]["sites"].values()] == [4, 4, 4]
    assert told["privacy"]["sites"].popitem()[1]["epsilon"] == pytest.approx(due, abs=1e-3)
    assert told["secure"]["fewest_sites"] == 3


def test_the_mean_update_carries_the_noise_of_all_sites(run):
    """A step adds noise of deviation rate * noise * clip / batch; the first counts twice, by its momentum too."""
    folder, _ = run
    first, second = (load(folder.weights(n)) for n in (1, 2))
    moved = np.concatenate([(second[n] - first[n]).ravel() for n in first])
    privacy, train = STUDY.protect.privacy, STUDY.train
    assert privacy is not None
    step = train.learning_rate * privacy.noise_multiplier * privacy.clip_norm / train.batch_size
    two_steps = np.hypot(1 + train.momentum, 1.0) * step
    assert moved.std() == pytest.approx(two_steps / np.sqrt(3), rel=0.1)
