"""A site's own model and what it remembers: layers that stay, second models, rounds that come again or are killed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclient.memory import memory_folder, own_path, recall, remember
from fedclient.site import Site, open_site
from fedclient.training.learner import ImageLearner
from fedclient.training.personal import own_weights
from fedclient.work import carry_out
from fedserver.checkpoint import RunFolder, create_run, read_state
from shared_models import nets
from shared_models.control import CONTROL, control_of, with_control, without_control
from shared_models.errors import OrderRefused, ProcessFailed, RoundPaused
from shared_models.files import read_lines
from shared_models.study import Model, Personal, Preprocess, Rounds, Strategy, Study, Train, Transfer, canonical, sha256
from shared_models.weights import Arrays, load
from shared_models.wire import Order
from simulations.engine import NodeConfig, run_local
from simulations.phantoms import PhantomPlan, phantom

pytestmark = pytest.mark.usefixtures("settings_of_torch")

STUDY = Study(
    name="tiny",
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    preprocess=Preprocess(size=(32, 32)),
    train=Train(local_steps=3, batch_size=3, learning_rate=5e-2, optimizer="sgd", momentum=0.0, deterministic=True),
    rounds=Rounds(count=2),
    strategy=Strategy(weighting="uniform"),
)
LEARNER = ImageLearner()
SITES = ("north", "south")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = PhantomPlan(sites=SITES, train=2, val=1, test=1, slices=2, size=32)
    return phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def config(data: Path, work: Path, site: str) -> NodeConfig:
    return {"site": site, "manifest-site": site, "data": str(data), "work": str(work), "device": "cpu", "threads": 1}


@pytest.fixture
def north(data: Path, work: Path) -> Site:
    return open_site(config(data, work, "north"))


@pytest.fixture(scope="module")
def weights() -> Arrays:
    return nets.initial_weights(STUDY)


def personal(**words: Any) -> Study:
    return replace(STUDY, personal=Personal(**words))


def same(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return one.keys() == two.keys() and all(one[n].tobytes() == two[n].tobytes() for n in one)


def moved(one: Arrays, two: Arrays) -> set[str]:
    return {n for n in two if one[n].tobytes() != two[n].tobytes()}


# Layers that stay


def test_norm_layers_and_the_head_are_found_by_what_they_are():
    net = nets.network(STUDY)
    norms = nets.norm_names(net)
    assert norms == {name for name, _ in net.named_parameters() if ".adn.N." in name}
    assert len(norms) == 36
    assert nets.head_names(net) == {"final_conv.weight", "final_conv.bias"}


@pytest.mark.parametrize("keep", [("norm",), ("head",), ("norm", "head")])
def test_what_stays_is_trained_and_remembered_and_never_sent(north, weights, keep):
    study = personal(keep=keep)
    learned, memory = LEARNER.learn_on(north, study, 1, weights, {})
    net = nets.network(STUDY)
    kinds = {"norm": nets.norm_names(net), "head": nets.head_names(net)}
    stay = frozenset[str]().union(*(kinds[kind] for kind in keep))
    assert moved(weights, learned.weights) == set(weights) - stay
    own = own_weights(weights, memory)
    assert own is not None
    assert moved(weights, own) == stay
    plain = LEARNER.learn(north, STUDY, 1, weights).weights
    assert same({**learned.weights, **{n: own[n] for n in stay}}, plain)


def test_the_next_round_begins_with_the_layers_that_stayed(north, weights):
    study = personal(keep=("norm",))
    first, memory = LEARNER.learn_on(north, study, 1, weights, {})
    second, _ = LEARNER.learn_on(north, study, 2, first.weights, memory)
    begun = {**first.weights, **{n.removeprefix("local/"): a for n, a in memory.items()}}
    plain = LEARNER.learn(north, STUDY, 2, begun).weights
    assert all(second.weights[n].tobytes() == plain[n].tobytes() for n in moved(first.weights, second.weights))


def test_batch_norm_stays_with_its_statistics_and_trains(north, data, work):
    study = replace(personal(keep=("norm",)), model=replace(STUDY.model, norm="batch"))
    start = nets.initial_weights(study)
    learned, memory = LEARNER.learn_on(north, study, 1, start, {})
    stay = {n for n in start if ".adn.N." in n}
    assert any(n.endswith("running_mean") for n in stay)
    assert not moved(start, learned.weights) & stay
    assert moved(start, learned.weights) >= {n for n in start if n.endswith(".conv.weight")}
    assert memory["local/conv_0.conv_0.adn.N.num_batches_tracked"] == 3


def test_fedrep_trains_the_head_alone_and_then_all_but_the_head(north, weights):
    study = personal(keep=("head",), head_epochs=2)
    learned, memory = LEARNER.learn_on(north, study, 1, weights, {})
    assert learned.steps == 3
    head = {"final_conv.weight", "final_conv.bias"}
    assert moved(weights, learned.weights) == set(weights) - head
    longer = replace(study, train=replace(STUDY.train, local_steps=6))
    _, again = LEARNER.learn_on(north, longer, 1, weights, {})
    assert same(memory, again), "the head is done before the body begins, whatever the body's steps"


# A second model


def test_ditto_leaves_the_federations_training_as_it_is(north, weights):
    learned, memory = LEARNER.learn_on(north, personal(ditto_lambda=0.1), 1, weights, {})
    assert same(learned.weights, LEARNER.learn(north, STUDY, 1, weights).weights)
    assert {n.partition("/")[0] for n in memory} == {"own"}


def test_ditto_with_hardly_a_pull_is_a_site_alone_and_with_a_strong_one_the_received_weights(north, weights):
    def own(pull: float) -> Arrays:
        found = own_weights(weights, LEARNER.learn_on(north, personal(ditto_lambda=pull), 1, weights, {})[1])
        assert found is not None
        return found

    alone, found = LEARNER.learn(north, STUDY, 1, weights).weights, [own(pull) for pull in (1e-9, 5.0, 15.0)]
    for name in weights:
        np.testing.assert_allclose(found[0][name], alone[name], atol=1e-6)
    way = [sum(float(((a[n] - weights[n]) ** 2).sum()) for n in weights) for a in found]
    assert way[0] > way[1] > way[2]


def test_apfl_mixes_by_its_share_and_learns_the_share_where_it_may(north, weights):
    _, fixed = LEARNER.learn_on(north, personal(apfl_alpha=0.25), 1, weights, {})
    assert fixed["mixture"] == [0.25]
    own = own_weights(weights, fixed)
    assert own is not None
    name = "final_conv.weight"
    np.testing.assert_allclose(own[name], 0.25 * fixed[f"own/{name}"] + 0.75 * weights[name], rtol=1e-6)
    learned, free = LEARNER.learn_on(north, personal(apfl_alpha=0.25, apfl_adaptive=True), 1, weights, {})
    assert 0 < abs(float(free["mixture"][0]) - 0.25) < 0.1
    assert same(learned.weights, LEARNER.learn(north, STUDY, 1, weights).weights)


def test_fine_tuning_goes_on_from_the_sites_own_model(north, weights):
    study = personal(keep=("norm",), fine_tune_steps=2)
    _, memory = LEARNER.learn_on(north, study, 1, weights, {})
    tuned, own = LEARNER.own(north, study, weights, memory, True), LEARNER.own(north, study, weights, memory, False)
    assert tuned is not None
    assert own is not None
    assert moved(own, tuned) == set(weights)
    assert LEARNER.own(north, personal(fine_tune_steps=2), weights, {}, False) is None


@pytest.mark.parametrize("words", [{"ditto_lambda": 1e-9}, {"apfl_alpha": 1.0}])
def test_a_second_model_that_nothing_pulls_keeps_its_moments_and_is_a_site_alone_over_two_rounds(north, weights, words):
    adam = replace(STUDY.train, optimizer="adam", learning_rate=1e-2, moments="kept")
    study, received = replace(personal(**words), train=adam), weights
    memory: Arrays = {}
    for number in (1, 2):
        learned, memory = LEARNER.learn_on(north, study, number, received, memory)
        received = learned.weights  # of one site the mean is its own
    own = {n.removeprefix("own/"): a for n, a in memory.items() if n.startswith("own/")}
    way = sum(float(np.abs(received[n] - weights[n]).sum()) for n in weights)
    assert sum(float(np.abs(own[n] - received[n]).sum()) for n in weights) < 0.01 * way


def test_the_head_of_fedrep_keeps_moments_of_its_own(north, weights):
    adam = replace(STUDY.train, optimizer="adam", moments="kept")
    study = replace(personal(keep=("head",), head_epochs=2), train=adam)
    memory: Arrays = {}
    for number in (1, 2):
        _, memory = LEARNER.learn_on(north, study, number, weights, memory)
    slices = 2 * 2  # patients, slices of each: an epoch of batches of 3 has 2
    assert memory["head-moments/step/final_conv.weight"] == 2 * 2 * -(-slices // 3)
    assert memory["moments/step/conv_0.conv_0.conv.weight"] == 2 * 3
    assert "moments/step/final_conv.weight" not in memory


def test_fedrep_trains_the_head_alone_where_all_the_rest_is_frozen(north, weights):
    study = replace(personal(keep=("head",), head_epochs=1), transfer=Transfer(sha256="0" * 64, head_rounds=1))
    learned, memory = LEARNER.learn_on(north, study, 1, weights, {})
    own = own_weights(weights, memory)
    assert own is not None
    assert moved(weights, own) == nets.head_names(nets.network(study))
    assert not moved(weights, learned.weights)
    assert learned.steps == LEARNER.learn(north, STUDY, 1, weights).steps, "as many as its examples make"
    later, _ = LEARNER.learn_on(north, study, 2, weights, memory)
    assert moved(weights, later.weights) == set(weights) - nets.head_names(nets.network(study))


@pytest.mark.parametrize(
    "words", [{"ditto_lambda": 0.1}, {"apfl_alpha": 0.5, "apfl_adaptive": True}, {"fine_tune_steps": 1}]
)
def test_frozen_blocks_stay_as_they_came_in_a_sites_own_model_too(north, weights, words):
    study = replace(personal(**words), transfer=Transfer(sha256="0" * 64, freeze=1))
    learned, memory = LEARNER.learn_on(north, study, 1, weights, {})
    own: Arrays = {n.removeprefix("own/"): a for n, a in memory.items() if n.startswith("own/")}  # not mixed yet
    own = own or LEARNER.own(north, study, weights, memory, True) or {}
    first = set(nets.blocks(nets.network(study))[0])
    assert first
    assert moved(weights, learned.weights) == moved(weights, own) == set(weights) - first


def test_fine_tuning_has_a_rate_of_its_own_or_that_of_the_last_round(north, weights):
    rated = replace(STUDY, train=replace(STUDY.train, optimizer="sgd", schedule="cosine"))  # SGD's step is as its rate
    by = {}
    for rate in (None, 0.05, 0.5):
        study = replace(rated, personal=Personal(fine_tune_steps=1, fine_tune_rate=rate))
        tuned = LEARNER.own(north, study, weights, {}, True)
        assert tuned is not None
        by[rate] = tuned["final_conv.bias"] - weights["final_conv.bias"]
    assert by[None] == pytest.approx(by[0.05], rel=1e-3)  # a twentieth is what a cosine ends with
    assert by[0.5] == pytest.approx(10 * by[0.05], rel=1e-3)
    with pytest.raises(ValueError, match="fine_tune_rate is for fine-tuning"):
        Personal(fine_tune_rate=0.5)


# Memory


def test_nothing_is_recalled_before_an_update_was_counted_and_a_lost_memory_is_told(tmp_path):
    remember(tmp_path, 1, 0, {"own/a": np.ones(2, np.float32)})
    assert recall(tmp_path, 0) == {}
    assert recall(tmp_path, 1)["own/a"].tolist() == [1, 1]
    with pytest.raises(OrderRefused, match="cannot go on with the run") as refused:
        recall(tmp_path, 2)
    assert refused.value.code == "STATE_LOST"


def test_rounds_before_the_counted_one_are_forgotten_and_few_after_it_kept(tmp_path):
    for number in range(1, 9):
        remember(tmp_path, number, min(number - 1, 2), {"own/a": np.full(1, number, np.float32)})
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"round-000{n}.safetensors" for n in (2, 6, 7, 8)]


def order(study: Study, number: int, counted: int, kind: Any = "train") -> Order:
    text = canonical(study).decode()
    return Order(kind, "toy", number, 1, text, sha256(study), f"{number:064d}", counted=counted,
                 evaluate="test" if kind == "evaluate" else None)  # fmt: skip


def test_an_order_that_comes_again_does_not_advance_a_site_twice(data, tmp_path, weights):
    study = replace(personal(ditto_lambda=0.1), rounds=Rounds(count=3))
    site = open_site(config(data, tmp_path, "north"))
    first = carry_out(order(study, 1, 0), weights, site, LEARNER)
    folder = memory_folder(site, "toy", sha256(study))
    kept = load(folder / "round-0001.safetensors")
    again = carry_out(order(study, 1, 0), weights, site, LEARNER)
    assert same(first.delta, again.delta)
    assert same(load(folder / "round-0001.safetensors"), kept)
    carry_out(order(study, 2, 1), weights, site, LEARNER)
    after = load(folder / "round-0002.safetensors")
    carry_out(order(study, 2, 1), weights, site, LEARNER)
    assert same(load(folder / "round-0002.safetensors"), after)
    carry_out(order(study, 3, 1), weights, site, LEARNER)  # round 2 was not counted
    _, forgot = LEARNER.learn_on(site, study, 3, weights, kept)
    assert same(load(folder / "round-0003.safetensors"), forgot)


def test_a_second_model_that_diverged_is_not_remembered(data, tmp_path, weights):
    study = personal(ditto_lambda=1e30)
    site = open_site(config(data, tmp_path, "north"))
    with pytest.raises(OrderRefused) as refused:
        carry_out(order(study, 1, 0), weights, site, LEARNER)
    assert refused.value.code == "TRAINING_DIVERGED"
    assert not list((tmp_path / "states").rglob("*.safetensors"))


def test_the_final_own_model_is_kept_at_the_site_and_scored_beside_the_received_weights(data, tmp_path, weights):
    study = personal(fine_tune_steps=30)
    site = open_site(config(data, tmp_path, "north"))
    asked = order(study, 2, 2, "evaluate")
    reply = carry_out(asked, weights, site, LEARNER).reply
    kept = load(own_path(memory_folder(site, "toy", sha256(study)), asked.base_sha256))
    assert reply.own_scores == LEARNER.score(site, study, kept, "test")
    assert reply.scores == LEARNER.score(site, study, weights, "test")
    assert reply.own_scores != reply.scores
    assert carry_out(asked, weights, site, LEARNER).reply.own_scores == reply.own_scores


# A run


COMBINED = {
    "FedProx with Ditto": (replace(STUDY.train, proximal_mu=0.1), Personal(ditto_lambda=0.1)),
    "SCAFFOLD with FedBN": (replace(STUDY.train, scaffold=True), Personal(keep=("norm",))),
    "MOON with FedRep, sharpness-aware": (
        replace(STUDY.train, moon_mu=1.0, sharpness_rho=0.05), Personal(keep=("head",), head_epochs=1)
    ),
    "SCAFFOLD with APFL, tuned": (
        replace(STUDY.train, scaffold=True), Personal(apfl_alpha=0.5, apfl_adaptive=True, fine_tune_steps=1)
    ),
    "Adam with its moments kept, FedBN": (
        replace(STUDY.train, optimizer="adam", moments="kept"), Personal(keep=("norm",))
    ),
}  # fmt: skip


class DiesOnce:
    """The client's process dies in round 2, once it has remembered it and before its reply is out."""

    def __init__(self, client: Any) -> None:
        self.client, self.alive = client, True

    def __call__(self, message: Any, context: Any) -> Any:
        reply = self.client(message, context)
        if self.alive and message.metadata.group_id == "2":
            self.alive = False
            raise ProcessFailed("killed")
        return reply


@pytest.mark.parametrize("name", COMBINED)
def test_combined_ways_train_score_both_models_and_resume_bit_for_bit(data, work, tmp_path, name):
    from fedclient.app import app

    train, own = COMBINED[name]
    study = replace(STUDY, train=train, personal=own, rounds=replace(STUDY.rounds, quorum=2, deadline_s=30, pause_s=0))
    runs = {kind: begun(tmp_path / kind, work, study) for kind in ("whole", "cut")}
    configs = {kind: {site: config(data, tmp_path / kind / "work", site) for site in SITES} for kind in runs}
    run_local(runs["whole"].path, configs["whole"], app)
    with pytest.raises(RoundPaused):
        run_local(runs["cut"].path, configs["cut"], DiesOnce(app))  # type: ignore[arg-type]
    assert read_state(runs["cut"]).round == 1
    run_local(runs["cut"].path, configs["cut"], app)
    assert runs["cut"].weights(2).read_bytes() == runs["whole"].weights(2).read_bytes()
    kept = [sorted((tmp_path / kind / "work/states").rglob("round-0002.safetensors")) for kind in runs]
    assert [p.read_bytes() for p in kept[0]] == [p.read_bytes() for p in kept[1]]
    assert len(kept[0]) == 2
    final = read_lines(runs["whole"].metrics)[-1]
    assert {s: set(part) for s, part in final["sites"].items()} == {s: {"scores", "personalised"} for s in SITES}
    if train.scaffold:
        check_control(runs["whole"], [load(p) for p in kept[0]])


def begun(folder: Path, work: Path, study: Study) -> RunFolder:
    """A run whose sites have the cache of `work` and remember nothing."""
    (folder / "work").mkdir(parents=True)
    (folder / "work" / "cache").symlink_to(work / "cache")
    return create_run(folder, "toy", study, nets.initial_weights(study))


def check_control(run: RunFolder, memories: list[Arrays]) -> None:
    """Karimireddy et al. 2020: the server's c is the mean of the sites' c_i; for layers that stay there is none."""
    control = control_of(load(run.weights(2)))
    for name, c in control.items():
        own = [m.get(f"control/{name}", np.zeros_like(c)) for m in memories]
        np.testing.assert_allclose(c, np.mean(own, axis=0), atol=2e-7)
    assert any(np.abs(c).max() > 1e-4 for c in control.values())


def test_a_control_variate_travels_beside_the_weights_and_is_told_apart(weights):
    both = with_control(weights)
    assert same(without_control(both), weights)
    assert {n for n in both if n.startswith(CONTROL)} == {CONTROL + n for n in weights}
    assert not any(a.any() for a in control_of(both).values())
