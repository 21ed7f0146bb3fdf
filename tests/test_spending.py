"""Orders of private studies at a site: what is spent before anything is read, what is refused, and what may leave."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclient.ledger import open_ledger
from fedclient.site import PrivacyPolicy, Site, SiteFile, open_site, site_toml
from fedclient.work import Answer, Holding, Learned, carry_out
from fedserver.checkpoint import RunFolder, create_run, read_state
from fedserver.report import facts, in_words, write_report
from shared_models import nets
from shared_models.errors import OrderRefused, StudyInvalid, UpdateRejected
from shared_models.files import read_lines
from shared_models.parse import parse
from shared_models.protect.accounting import Spend, epsilon
from shared_models.protect.privacy import Privacy, Protect
from shared_models.scores import Score
from shared_models.study import (
    Evaluate,
    Model,
    Preprocess,
    Rounds,
    Strategy,
    Study,
    Train,
    canonical,
    load_study,
    sha256,
)
from shared_models.update import Expected, Update, admit
from shared_models.weights import Arrays, InMemory, load
from shared_models.wire import Order, Split
from simulations.engine import NodeConfig, run_local
from simulations.phantoms import PhantomPlan, phantom
from tests.crash import WRITES, left_by_kills
from tests.toys import WEIGHTS, ToyLearner

PRIVATE = Study(
    name="toy",
    train=Train(local_steps=10, precision="float32"),
    rounds=Rounds(count=4),
    strategy=Strategy(weighting="uniform"),
    evaluate=Evaluate(every=0),
    protect=Protect(Privacy(noise_multiplier=2.0, sample_rate=0.25)),
)
ROUND = Spend(2.0, 0.25, 10)
DELTA = 1e-5


@dataclass(frozen=True)
class Learner(ToyLearner):
    """Notes what was done, and how far the ledger had come when it was."""

    ledger: Path = Path()
    did: list[int] = field(default_factory=list)

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        self.did.append(open_ledger(self.ledger).head().entries)
        return replace(ToyLearner.learn(self, site, study, round_number, weights), steps=10)

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        raise AssertionError("was scored")


def site_at(folder: Path, **privacy: Any) -> Site:
    policy = PrivacyPolicy(**privacy)
    return Site("north", folder, folder, (), "cpu", 1, 11, "salt", deployed=True, privacy=policy)


def order(study: Study = PRIVATE, kind: Any = "train", round_number: int = 1, **change: Any) -> Order:
    made = Order(kind, "toy-1", round_number, 1, canonical(study).decode(), sha256(study), "b" * 64)
    return replace(made, **change)


def with_budget(folder: Path, most: float) -> Path:
    open_ledger(folder).set_budget("all", most, DELTA)
    return folder


def answered(folder: Path, of: Order | None = None, learner: Learner | None = None, **privacy: Any) -> Answer:
    return carry_out(of or order(), WEIGHTS, site_at(folder, **privacy), learner or Learner(ledger=folder))


def refused(folder: Path, of: Order | None = None, **privacy: Any) -> str:
    learner = Learner(ledger=folder)
    with pytest.raises(OrderRefused) as error:
        answered(folder, of, learner, **privacy)
    assert learner.did == []
    return error.value.code


def spent(folder: Path) -> tuple[Spend, ...]:
    return open_ledger(folder).accounts()[0].spends


# What a study may say


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan": "federated"}, "histograms"),
        ({"strategy": Strategy()}, 'weighting must be "uniform"'),
        ({"train": Train(precision="float32")}, "local_steps must be given"),
        ({"evaluate": Evaluate(every=1)}, "evaluate.every must be 0"),
        ({"train": replace(PRIVATE.train, deterministic=True)}, "deterministic must be false"),
        ({"train": replace(PRIVATE.train, clip_gradient=1.0)}, "clip_gradient must be left out"),
        ({"train": replace(PRIVATE.train, precision="auto")}, "precision"),
        ({"train": replace(PRIVATE.train, moon_mu=1.0)}, "moon_mu"),
        ({"train": replace(PRIVATE.train, sharpness_rho=0.1)}, "sharpness_rho"),
    ],
)
def test_a_study_that_would_break_the_promise_is_refused_with_the_key_to_mend(change, words):
    with pytest.raises(ValueError, match=words):
        replace(PRIVATE, **change)


def test_every_number_of_the_privacy_table_is_part_of_what_a_site_approves():
    privacy = Privacy(noise_multiplier=2.0, sample_rate=0.25)
    others: list[dict[str, Any]] = [
        {"noise_multiplier": 2.1}, {"sample_rate": 0.5}, {"clip_norm": 0.5}, {"examples_per_patient": 1},
        {"delta": 1e-6}, {"trained": "head"},
    ]  # fmt: skip
    tables = [privacy, *(replace(privacy, **change) for change in others)]
    assert len({sha256(replace(PRIVATE, protect=Protect(table))) for table in tables}) == 7


def test_a_wrong_privacy_table_says_what_is_allowed():
    with pytest.raises(StudyInvalid, match=r"protect.privacy.sample_rate` is 1.5; allowed: less than or equal to 1"):
        parse(Study, {"name": "toy", "protect": {"privacy": {"noise_multiplier": 1.0, "sample_rate": 1.5}}}, "s")
    with pytest.raises(StudyInvalid, match=r"`protect.privacy.epsilon` is not a key here"):
        parse(Study, {"name": "toy", "protect": {"privacy": {"epsilon": 1.0}}}, "s")


def test_the_ready_private_study_costs_what_its_file_says():
    study = load_study("lung-ct-private")
    privacy = study.protect.privacy
    assert privacy is not None
    assert study.train.local_steps == 6
    assert 7.5 < epsilon([privacy.spend(6 * study.rounds.count)], privacy.delta) <= 8


# What is spent


@dataclass(frozen=True)
class Ended(Learner):
    """Work that a refusal ends half way."""

    code: str = ""

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        raise OrderRefused(self.code, "ended half way")


@pytest.mark.parametrize(
    ("code", "stays", "unsettled"),
    [
        ("OUTSIDE_HOURS", (), 0),
        ("STUDY_WITHDRAWN", (), 0),
        ("TRAIN_TIMEOUT", (ROUND,), 1),
        ("OUT_OF_MEMORY", (ROUND,), 1),
    ],
)
def test_work_that_the_hospital_ends_costs_nothing_and_what_ends_by_itself_stays_spent(
    tmp_path, code, stays, unsettled
):
    folder = with_budget(tmp_path, 50.0)
    with pytest.raises(OrderRefused, match="ended half way"):
        answered(folder, learner=Ended(ledger=folder, code=code))
    account = open_ledger(folder).accounts()[0]
    assert (account.spends, account.open) == (stays, unsettled)


def test_the_steps_of_a_round_are_spent_before_training_and_settled_after(tmp_path):
    learner = Learner(ledger=with_budget(tmp_path, 50.0))
    answered(tmp_path, learner=learner)
    answered(tmp_path, order(round_number=2), learner)
    assert learner.did == [2, 4]  # budget, reservation; settlement, reservation
    assert spent(tmp_path) == (ROUND, ROUND)
    assert open_ledger(tmp_path).accounts()[0].open == 0


def test_a_study_whose_last_round_would_not_fit_is_refused_in_its_first(tmp_path):
    whole = epsilon([replace(ROUND, steps=40)], DELTA)
    assert refused(with_budget(tmp_path, 0.99 * whole)) == "DP_BUDGET_EXHAUSTED"
    assert spent(tmp_path) == ()
    assert answered(with_budget(tmp_path, 1.01 * whole)).reply.kind == "update"


def test_without_a_budget_nothing_is_trained_privately(tmp_path):
    assert refused(tmp_path) == "DP_BUDGET_MISSING"


def test_work_that_died_stays_spent_and_is_paid_for_again(tmp_path):
    class Dies(Learner):
        def learn(self, *_: object) -> Learned:
            raise MemoryError

    with_budget(tmp_path, 50.0)
    with pytest.raises(MemoryError):
        answered(tmp_path, learner=Dies())
    answered(tmp_path)
    assert spent(tmp_path) == (ROUND, ROUND)
    assert open_ledger(tmp_path).accounts()[0].open == 1


def test_a_round_beyond_the_study_and_a_site_without_patients_are_refused(tmp_path):
    class Empty(Learner):
        def holding(self, site: Site, study: Study) -> Holding:
            return Holding()

    with_budget(tmp_path, 50.0)
    assert refused(tmp_path, order(round_number=5)) == "ROUND_RANGE"
    with pytest.raises(OrderRefused) as error:
        answered(tmp_path, learner=Empty())
    assert error.value.code == "NO_CASES"
    assert spent(tmp_path) == ()


def test_killed_at_any_line_of_a_round_no_training_is_missing_from_the_book(quick_folder):
    epsilon([replace(ROUND, steps=40)], DELTA)  # the forked process finds dp-accounting loaded
    here, seen = quick_folder / "site", set()
    here.mkdir()
    with_budget(here, 100.0)

    def act(tell):
        class Telling(ToyLearner):
            def learn(self, *about: Any) -> Learned:
                tell("trained")
                return ToyLearner.learn(self, *about)

        carry_out(order(), WEIGHTS, site_at(here), Telling())
        tell("answered")

    watched = ("fedclient/spending.py", "fedclient/work.py", "fedclient/ledger.py", "fedclient/chain.py", *WRITES)
    for left in left_by_kills(here, act, watched, quick_folder / "kept"):
        trained, counted = 10 * left.words.count("trained"), sum(s.steps for s in spent(left.folder))
        assert counted >= trained
        seen.add((trained, counted))
    assert left.words == ("trained", "answered")
    assert seen == {(0, 0), (0, 10), (10, 10)}


# What the site's own rules say


def test_a_site_that_requires_privacy_carries_out_nothing_else(tmp_path):
    plain = Study(name="toy")
    for kind in ("hello", "train", "evaluate", "statistics"):
        assert refused(tmp_path, order(plain, kind), required=True) == "DP_REQUIRED"
    assert answered(tmp_path, order(plain)).reply.kind == "update"


def test_one_study_may_not_spend_more_than_the_site_allows_whatever_the_budget_has(tmp_path):
    whole = epsilon([replace(ROUND, steps=40)], DELTA)
    with_budget(tmp_path, 100.0)
    assert refused(tmp_path, most_epsilon=0.99 * whole) == "DP_EPSILON_HIGH"
    answered(tmp_path, most_epsilon=1.01 * whole)
    # asked for the first round again and again, a study does not get past it
    assert refused(tmp_path, most_epsilon=1.01 * whole) == "DP_EPSILON_HIGH"
    assert answered(tmp_path, order(round_number=2), most_epsilon=1.01 * whole).delta


def test_the_rules_stand_in_site_toml_and_are_read_from_there(tmp_path):
    data = {"folder": str(tmp_path)}
    told = {"name": "north", "coordinator": "fl:1", "federation": "f", "data": data}
    file = parse(SiteFile, told | {"privacy": {"required": True, "most_epsilon": 3.0}}, "site.toml")
    (tmp_path / "site.toml").write_text(site_toml(file))
    assert open_site({"site-dir": str(tmp_path)}).privacy == PrivacyPolicy(True, 3.0)
    with pytest.raises(StudyInvalid, match=r"`privacy.most_epsilon` is -1"):
        parse(SiteFile, told | {"privacy": {"most_epsilon": -1.0}}, "site.toml")


# What may leave


def test_an_update_tells_nothing_but_the_noisy_weights_and_numbers_of_the_study(tmp_path):
    reply = answered(with_budget(tmp_path, 50.0)).reply
    assert (reply.examples, reply.losses, reply.seconds, reply.scores) == (0, (), 0.0, {})
    assert reply.steps == 10
    told = answered(tmp_path, order(kind="hello")).reply
    assert (told.train_cases, told.test_cases) == (0, 0)


@pytest.mark.parametrize(("kind", "split"), [("evaluate", "test"), ("train", "val"), ("statistics", None)])
def test_scores_and_histograms_of_a_private_study_stay_at_the_site(tmp_path, kind, split):
    assert refused(with_budget(tmp_path, 50.0), order(kind=kind, evaluate=split)) == "DP_UNNOISED"


# A real run

TINY = replace(
    PRIVATE,
    name="tiny",
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    preprocess=Preprocess(size=(32, 32)),
    train=replace(PRIVATE.train, local_steps=3, batch_size=2),
    rounds=Rounds(count=2, quorum=1, gather_s=0.0, pause_s=0.0),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = PhantomPlan(sites=("north", "south"), train=3, val=1, test=1, slices=2, size=32)
    return phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)


def run_of(folder: Path, data: Path, study: Study = TINY) -> RunFolder:
    run = create_run(folder, "federated", study, nets.initial_weights(study))
    sites: NodeConfig = {"site": "", "data": str(data), "work": str(folder), "device": "cpu", "threads": 1}
    run_local(run.path, {s: {**sites, "site": s, "manifest-site": s} for s in ("north", "south")})
    return run


def ledger_of(folder: Path, site: str) -> Path:
    return folder / "ledgers" / f"federated-{sha256(TINY)[:12]}" / site


def test_a_run_trains_and_its_report_says_what_it_spent_of_each_site(tmp_path, data):
    run = run_of(tmp_path, data)
    found = facts(run)
    assert (read_state(run).round, found["privacy"]["sites"]["north"]["steps"]) == (2, 6)
    claimed = epsilon([Spend(2.0, 0.25, 6)], DELTA)
    assert claimed <= found["privacy"]["sites"]["south"]["epsilon"] < claimed + 1e-3
    assert found["privacy"]["planned"] == found["privacy"]["sites"]["south"]["epsilon"]
    assert sum(s.steps for s in spent(ledger_of(tmp_path, "north"))) == 6
    page = write_report(run).read_text()
    assert "one patient more or less" in page
    assert "taken with probability 0.25" in in_words(TINY)
    line = read_lines(run.metrics)[0]
    assert [(p["examples"], p["losses"], p["scores"]) for p in line["sites"].values()] == [(0, [], {})] * 2


def test_a_site_whose_budget_is_too_small_takes_no_part_in_a_real_run_and_says_why(tmp_path, data):
    folder = ledger_of(tmp_path, "south")
    folder.mkdir(parents=True)
    with_budget(folder, 0.05)
    run = run_of(tmp_path, data)
    lines = read_lines(run.metrics)
    assert [sorted(line["sites"]) for line in lines] == [["north"]] * 2
    assert lines[0]["left_out"]["south"] == {"state": "refused", "reason": "DP_BUDGET_EXHAUSTED"}
    assert spent(folder) == ()


def test_training_of_the_head_alone_leaves_the_rest_of_the_network_as_it_was(tmp_path, data):
    privacy = replace(TINY.protect.privacy, trained="head")  # type: ignore[type-var]
    study = replace(TINY, protect=Protect(privacy), rounds=replace(TINY.rounds, count=1))
    run = run_of(tmp_path, data, study)
    before, after = load(run.weights(0)), load(run.weights(1))
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == set(nets.head_names(nets.network(study)))


def test_an_update_that_tells_how_many_examples_there_were_is_left_out():
    delta = InMemory({"w": np.zeros(2, np.float32)})
    expected = Expected("r", 1, "a" * 64, "b" * 64, delta.schema, private=True)
    update = Update("north", "r", 1, "a" * 64, "b" * 64, delta, 17)
    with pytest.raises(UpdateRejected, match="tells its number of examples"):
        admit(update, expected)
    assert admit(replace(update, examples=0), expected).examples == 0
    with pytest.raises(UpdateRejected):
        admit(replace(update, examples=0), replace(expected, private=False))
