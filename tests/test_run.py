"""A study on one machine: which runs it takes, what each is trained by, and both models of a site in every table."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared_models.errors import StudyInvalid
from shared_models.files import read_json
from shared_models.study import Model, Personal, Preprocess, Rounds, Strategy, Study, Train, load_study
from simulations.engine import NodeConfig
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, gpu_share, jobs, left_out_jobs, machine, node_configs, simulate
from simulations.show import results_table
from tests.toys import nodes

pytestmark = pytest.mark.usefixtures("settings_of_torch")

STUDY = Study(
    name="tiny",
    model=Model(features=(4, 4, 4, 4, 4, 4), norm="batch"),
    preprocess=Preprocess(size=(32, 32)),
    train=Train(local_steps=4, batch_size=4, learning_rate=2e-2, deterministic=True, proximal_mu=0.01),
    rounds=Rounds(count=2),
    personal=Personal(keep=("norm",)),
)


def sites(count: int) -> dict[str, NodeConfig]:
    return {s: {**c, "manifest-site": s} for s, c in nodes([f"s{n}" for n in range(count)], Path("/nowhere")).items()}


def test_models_of_one_site_are_trained_plainly_and_the_federation_as_the_study_says():
    strategy = Strategy(name="fedadam", robust="krum", malicious=1, weighting="uniform")
    study = replace(STUDY, strategy=strategy, rounds=replace(STUDY.rounds, quorum=5))
    federated, pooled, *alone = jobs(study, sites(6), compare=True)
    assert federated.study == study
    assert len(alone) == 6
    for job in (pooled, *alone):
        assert job.study.strategy == Strategy()
        assert (job.study.train.proximal_mu, job.study.rounds.quorum) == (0.0, 1)
        assert job.study.personal == Personal(keep=("norm",)), "batch norm is no other way"


def test_of_a_private_study_the_models_of_one_site_are_private_too_at_the_same_epsilon():
    private = load_study("lung-ct-private")
    federated, pooled, *alone = jobs(private, sites(3), compare=True)
    assert {job.study.protect for job in (federated, pooled, *alone)} == {private.protect}
    assert (pooled.study.train.batch_size, len(alone)) == (3 * private.train.batch_size, 3)


def test_a_site_is_left_out_of_each_run_in_turn():
    runs = {job.name: sorted(job.nodes) for job in left_out_jobs(STUDY, sites(3))}
    assert runs == {"without-s0": ["s1", "s2"], "without-s1": ["s0", "s2"], "without-s2": ["s0", "s1"]}


def test_one_site_cannot_be_left_out():
    with pytest.raises(StudyInvalid, match="--leave-one-out needs at least 2 sites, there is 1"):
        left_out_jobs(STUDY, sites(1))


@pytest.mark.parametrize(("rule", "needed"), [("krum", 5), ("bulyan", 7), ("trimmed_mean", 3)])
def test_too_few_sites_for_a_robust_rule_are_told_before_anything_is_trained(rule: Any, needed: int):
    strategy = Strategy(robust=rule, malicious=1, weighting="uniform")
    study = replace(STUDY, strategy=strategy, rounds=replace(STUDY.rounds, quorum=needed))
    assert jobs(study, sites(needed), compare=False)
    words = f'robust = "{rule}" with malicious = 1 needs {needed} sites, there are {needed - 1}'
    with pytest.raises(StudyInvalid, match=words):
        jobs(study, sites(needed - 1), compare=False)


def test_both_models_of_a_site_and_the_federation_without_it_are_in_every_table(tmp_path):
    plan = PhantomPlan(sites=("north", "south"), train=2, val=1, test=1, slices=2, size=32)
    how = Machine(device="cpu")
    where = node_configs(tmp_path / "out", [phantom(tmp_path / "data", plan, processes=1)], how, None)
    results = simulate(STUDY, where, tmp_path / "out", how, 1, True, lambda _: None, leave_one_out=True)
    seed = results["seeds"][0]
    for key in ("federated", "personalised", "left_out", "pooled"):
        assert set(seed[key]) == {"north", "south"}, key
    assert seed["personalised"] != seed["federated"]
    assert results["summary"]["personalised_mean"] == pytest.approx(sum(seed["personalised"].values()) / 2, abs=1e-6)
    run = tmp_path / "out" / "seed-0" / "federated"
    report = read_json(run / "report.json")
    for site, row in report["test"]["lung"]["personalised"].items():
        assert row["dice"] == pytest.approx(seed["personalised"][site], abs=1e-6)
    assert report["comparison"]["sites"]["north"]["personalised"]["mean"] == seed["personalised"]["north"]
    assert "its own model" in (run / "report.html").read_text()
    assert "keeps its norm layers" in report["study"]["trained"]
    assert [str(cell) for cell in results_table(results).columns[0].cells][-2:] == [
        "each site's own",
        "the others alone",
    ]


def test_ray_deals_the_gpus_out_to_as_many_orders_as_are_carried_out_at_once(monkeypatch):
    monkeypatch.setattr("fedclient.training.device.gpus", lambda: 2)
    shares = {workers: gpu_share(Machine("ray", workers=workers, threads=1, device="auto")) for workers in (0, 1, 2, 8)}
    assert shares == {0: 1.0, 1: 1.0, 2: 1.0, 8: 0.25}
    assert gpu_share(Machine("ray", workers=8, threads=1, device="cpu")) == 0.0
    with pytest.raises(StudyInvalid, match="--device cuda:1: Ray deals out the GPUs itself"):
        machine("ray", 2, 1, "cuda:1")
