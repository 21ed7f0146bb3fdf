"""`fedclient worth`: the site's own model trained as a simulation would, resumed, compared, and told to nobody else."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedclient import egress, was_worth
from fedclient.alone import plain_study, train_alone
from fedclient.cli import app
from fedclient.client import client_app
from fedclient.consent import Decision, decide, find_asked
from fedclient.memory import memory_folder
from fedclient.policy import Policy
from fedclient.site import Site, open_site
from fedclient.training.learner import ImageLearner
from fedclient.was_worth import Left, alone_folder, in_words, left_of, page_of, usable_models
from fedclient.work import Learned
from fedclient.worth_page import worth_page
from fedserver.checkpoint import RunFolder, read_state
from shared_models.errors import OrderRefused, StateInvalid
from shared_models.files import read_json
from shared_models.nets import initial_weights
from shared_models.study import Model, Personal, Preprocess, Rounds, Study, Task, Train, sha256
from shared_models.weights import Arrays, load
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, carry_out, jobs, node_configs
from tests.edge import Edge, running_edge
from tests.hospitals import Hospitals

STUDY = Study(
    name="tiny",
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    preprocess=Preprocess(size=(32, 32)),
    train=Train(local_steps=2, batch_size=4, learning_rate=1e-2, deterministic=True),
    rounds=Rounds(count=3, quorum=2, gather_s=0.0),
    personal=Personal(ditto_lambda=0.1),
)
PLAN = PhantomPlan(train=2, val=1, test=6, slices=2, size=32)


@pytest.fixture(autouse=True, scope="module")
def _settings_of_torch() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge") / "federation") as running:
        yield running


@pytest.fixture(scope="module")
def hospitals(edge: Edge, tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    """Two hospitals after a run of the study."""
    root = tmp_path_factory.mktemp("hospitals")
    made = Hospitals(edge, root / "sites")
    for name in ("hill-clinic", "valley-clinic"):
        data = phantom(root / "data" / name, replace(PLAN, sites=(name,)), processes=1)
        made.join(name, Policy(approval="inside-policy"), data)
    made.run(STUDY, "tiny-1", client_app(ImageLearner()), initial_weights(STUDY))
    return made


def asked_for(hospitals: Hospitals, site: str, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["worth", *arguments, "--site", str(hospitals.sites[site])])
    return result.exit_code, result.output


def test_a_hospital_is_told_what_it_gained_and_nothing_of_it_leaves(hospitals, edge):
    here = hospitals.site("hill-clinic")
    sent, books = egress.sent(here.folder), (here.folder / "audit.jsonl").read_bytes()
    requests = sorted(p.name for p in edge.federation.blobs.rglob("*"))
    code, told = asked_for(hospitals, "hill-clinic", "tiny", "--json")
    assert code == 0, told
    found = json.loads(told)
    assert set(found["models"]) == {"local", "federated", "personalised"}
    assert found["run"] == "tiny-1"
    assert found["models"]["federated"]["patients"] == 6
    verdicts = {kind: of.get("verdict") for kind, of in found["models"].items()}
    assert verdicts["local"] is None
    assert {verdicts["federated"], verdicts["personalised"]} <= {"gains", "harmed", "no clear difference"}
    assert egress.sent(here.folder) == sent
    assert (here.folder / "audit.jsonl").read_bytes() == books
    assert sorted(p.name for p in edge.federation.blobs.rglob("*")) == requests

    folder = here.folder / "worth" / sha256(STUDY)[:16]
    page = (folder / "worth.html").read_text()
    assert "hill-clinic: was the federation worth it?" in page
    assert "mean of all sites" not in page
    for path in (folder / "worth.html", folder / "worth.json"):
        assert "valley" not in path.read_text()
        assert not any(case in path.read_text() for case in patients(here))
    assert folder.stat().st_mode & 0o077 == 0


def patients(site: Site) -> list[str]:
    """Names and keys of the patients and files of a site."""
    from fedclient.gate.run import usable_cases

    cases = usable_cases(site)
    return [word for case in cases for word in (case.key, case.patient, case.channels[0].files[0].name)]


def test_the_figures_are_those_of_the_models_on_the_sites_own_test_patients(hospitals):
    here = hospitals.site("hill-clinic")
    assert asked_for(hospitals, "hill-clinic", "tiny")[0] == 0
    found = read_json(here.folder / "worth" / sha256(STUDY)[:16] / "worth.json")
    left = left_of(here, find_asked(here, "tiny"))
    run = RunFolder(hospitals.edge.federation.runs / "tiny-1")
    coordinators = load(run.weights(read_state(run).round))
    assert all(left.federated[name].tobytes() == array.tobytes() for name, array in coordinators.items())
    assert left.personalised is not None
    for kind, weights in (("federated", coordinators), ("personalised", left.personalised)):
        score = ImageLearner().score(here, STUDY, weights, "test")["lung"]
        assert found["models"][kind]["dice"] == pytest.approx(score.value, abs=1e-6)
    gain = found["models"]["federated"]["dice"] - found["models"]["local"]["dice"]
    assert found["models"]["federated"]["value"] == pytest.approx(gain, abs=2e-6)


def test_a_model_without_the_layers_that_stay_here_is_not_judged():
    def judged(personal: Personal, personalised: Arrays | None) -> list[str]:
        return [*usable_models(Left("run", replace(STUDY, personal=personal), {}, personalised), STUDY, {})]

    assert judged(Personal(keep=("head",)), {}) == ["local", "personalised"]
    assert judged(Personal(ditto_lambda=0.1), {}) == ["local", "federated", "personalised"]
    assert judged(Personal(), None) == ["local", "federated"]


def test_the_sites_own_model_is_the_one_that_a_simulation_trains(tmp_path):
    plan = replace(PLAN, sites=("a", "b"), test=1)
    nodes = node_configs(tmp_path, [phantom(tmp_path / "data", plan, processes=1)], Machine(device="cpu"), None)
    alone = next(job for job in jobs(STUDY, nodes, compare=True) if job.name == "local-a")
    run = carry_out(alone, tmp_path, Machine(device="cpu"))
    first, told = initial_weights(STUDY), list[tuple[int, int]]()
    mine = train_alone(
        open_site(nodes["a"]),
        plain_study(STUDY),
        first,
        tmp_path / "alone",
        ImageLearner(),
        lambda *at: told.append(at),
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for name, array in load(run.weights(3)).items():  # which has added up differences: Adam makes much of a last digit
        np.testing.assert_allclose(mine[name], array, atol=1e-4, err_msg=name)
    assert max(np.abs(mine[name] - array).max() for name, array in first.items()) > 1e-2


@dataclass(frozen=True)
class Tired(ImageLearner):
    """Does not come back from one of its rounds."""

    stops_at: int = 2

    def learn_on(
        self, site: Site, study: Study, round_number: int, weights: Arrays, memory: Arrays
    ) -> tuple[Learned, Arrays]:
        if round_number == self.stops_at:
            raise KeyboardInterrupt
        return ImageLearner.learn_on(self, site, study, round_number, weights, memory)


def test_training_alone_goes_on_where_it_was_interrupted_to_the_same_weights(hospitals, tmp_path):
    here, batch = hospitals.site("valley-clinic"), replace(STUDY.model, norm="batch")
    study = plain_study(replace(STUDY, model=batch, personal=Personal(keep=("norm",))))
    assert study.personal.keep == ("norm",), "its norm layers are remembered from round to round"
    first, rounds = initial_weights(study), list[tuple[int, int]]()
    with pytest.raises(KeyboardInterrupt):
        train_alone(here, study, first, tmp_path / "broken", Tired(), lambda *_: None)
    resumed = train_alone(here, study, first, tmp_path / "broken", Tired(stops_at=1), lambda *at: rounds.append(at))
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    whole = train_alone(here, study, first, tmp_path / "whole", ImageLearner(), lambda *_: None)
    assert all(resumed[name].tobytes() == whole[name].tobytes() for name in whole)
    names = sorted(path.name for path in (tmp_path / "broken").iterdir())
    assert names == ["memory-0003.safetensors", "round-0003.safetensors"]


def test_what_is_lost_of_a_training_is_told(hospitals, tmp_path):
    here, study = hospitals.site("valley-clinic"), plain_study(STUDY)
    first = initial_weights(study)
    with pytest.raises(KeyboardInterrupt):
        train_alone(here, study, first, tmp_path / "alone", Tired(), lambda *_: None)
    (tmp_path / "alone" / "memory-0001.safetensors").unlink()
    with pytest.raises(OrderRefused, match=r"is missing\. Remove .*alone, and the training begins anew"):
        train_alone(here, study, first, tmp_path / "alone", ImageLearner(), lambda *_: None)


def test_a_study_of_which_nothing_is_here_is_told_so(hospitals, tmp_path):
    code, told = asked_for(hospitals, "valley-clinic", "other-study")
    assert code == 1
    assert "study 'other-study': is no study here. Known: tiny" in " ".join(told.split())
    here = hospitals.site("valley-clinic")
    asked = find_asked(here, "tiny")
    with pytest.raises(StateInvalid, match=r"run 'tiny-9': has left nothing here\. Known: tiny-1"):
        left_of(here, asked, "tiny-9")
    with pytest.raises(StateInvalid, match="no run of it was finished with this site"):
        left_of(replace(here, folder=tmp_path), asked)
    for verdict in ("withdrawn", "refused"):
        decide(here, asked.sha256, verdict)
        assert left_of(here, find_asked(here, "tiny")).run == "tiny-1", "who has left may ask what it was worth"
    never = replace(asked, decision=Decision("refused", "steward", 0.0), state="refused")
    with pytest.raises(StateInvalid, match="this site has not taken part in it"):
        left_of(here, never)


def test_a_simulation_keeps_no_copy_of_the_last_weights(tmp_path):
    """Its run folders have them."""
    plan = replace(PLAN, sites=("a", "b"), test=1)
    nodes = node_configs(tmp_path, [phantom(tmp_path / "data", plan, processes=1)], Machine(device="cpu"), None)
    study = replace(STUDY, rounds=replace(STUDY.rounds, count=1))
    job = jobs(study, nodes, compare=False)[0]
    run = carry_out(job, tmp_path, Machine(device="cpu"))
    folder = memory_folder(open_site(nodes["a"]), run.id, sha256(study))
    assert list(folder.glob("own-*.safetensors"))
    assert not list(folder.glob("final*"))


def test_a_harmed_hospital_and_a_harmed_group_are_flagged_in_words_and_on_the_page():
    harmed = {"value": -0.05, "low": -0.08, "high": -0.02, "patients": 20, "verdict": "harmed", "worst_tenth": 0.5}
    own = {"measure": "dice", "dice": 0.9, "here": {"low": 0.85, "high": 0.95}, "worst_tenth": 0.6}
    found = {
        "study": "tiny", "run": "tiny-1", "measure": "dice", "label": "lung", "answer": "No: worse off.",
        "models": {"local": own, "federated": {**own, "dice": 0.85, **harmed}},
        "groups": [{"kind": "federated", "group": "sex F", **harmed}],
    }  # fmt: skip
    page = worth_page(page_of("hill-clinic", STUDY, found))
    assert page.count('class="flag"') == 3, "the answer, the model and the group"
    assert "Keep your own model." in page
    assert "Harmed groups of patients: sex F by the federation's." in in_words(found)


def test_a_site_that_labels_a_part_is_judged_by_what_it_can_tell(hospitals, monkeypatch):
    study = replace(STUDY, task=Task(labels=("lung", "nodule")), personal=Personal())
    left = Left("tiny-1", study, initial_weights(study), None)
    monkeypatch.setattr(was_worth, "left_of", lambda *_: left)  # as if a run of that study were finished
    here = replace(hospitals.site("valley-clinic"), labelled=("nodule",))
    found, page = was_worth.judge(here, find_asked(here, "tiny"), "", None, lambda *_: None)
    assert found["label"] == "nodule"
    assert {of["cases"] + of["empty"] for of in found["models"].values()} == {6}
    assert "Figures are Dice of nodule on this hospital" in page.read_text()


def test_of_another_plan_the_hospital_s_own_model_is_another(tmp_path):
    """Two runs of a federated plan may be planned apart; one's own model would be scored on the other's images."""
    again, planned = replace(STUDY, preprocess=STUDY.preprocess), replace(STUDY.preprocess, window_hu=(-1000.0, 200.0))
    assert alone_folder(tmp_path, again) == alone_folder(tmp_path, STUDY)
    assert alone_folder(tmp_path, replace(STUDY, preprocess=planned)) != alone_folder(tmp_path, STUDY)
