"""The learner of a real site, on a phantom of a few slices: it learns, scores, counts, and refuses what it cannot."""

import csv
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedclient.data.dataset import CaseExamples, DataSet
from fedclient.site import UNIT, Site, open_site
from fedclient.training.evaluate import evaluate
from fedclient.training.learner import ImageLearner, data_set, device_of, sorted_by_label
from fedclient.work import Holding
from shared_models import nets
from shared_models.errors import ManifestInvalid, OrderRefused, WeightsInvalid
from shared_models.metrics import IGNORE, DiceCounts, dice, merge
from shared_models.preprocess import Geometry
from shared_models.study import Augment, Evaluate, Model, Preprocess, Study, Task, Train, load_study
from shared_models.tasks.chosen import functions_of
from shared_models.weights import Arrays, schema_of
from shared_models.wire import Split
from simulations.phantoms import PhantomPlan, phantom

pytestmark = pytest.mark.usefixtures("settings_of_torch")

STUDY = Study(
    name="tiny",
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    preprocess=Preprocess(size=(32, 32)),
    train=Train(local_epochs=2, batch_size=3, learning_rate=1e-2, deterministic=True),
)
LEARNER = ImageLearner()


def scored(site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, DiceCounts]:
    """What the learner tells of a segmentation."""
    return cast(Mapping[str, DiceCounts], LEARNER.score(site, study, weights, split))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites with two patients to train on, one to validate and two to test, of two slices each."""
    plan = PhantomPlan(sites=("north", "south"), train=2, val=1, test=2, slices=2, size=32)
    return phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def north(data: Path, work: Path) -> Site:
    return site_at(data, work, "north")


def site_at(data: Path, work: Path, *names: str, name: str = "") -> Site:
    config = {"site": name or names[0], "data": str(data), "work": str(work), "manifest-site": UNIT.join(names)}
    return open_site({**config, "device": "cpu", "threads": 1})


@pytest.fixture(scope="module")
def weights() -> Arrays:
    return nets.initial_weights(STUDY)


def same(one: Arrays, two: Arrays) -> bool:
    return all(one[n].tobytes() == two[n].tobytes() for n in one)


# Learning


def test_a_site_learns_from_its_own_slices(north, weights):
    before = {name: a.tobytes() for name, a in weights.items()}
    learned = LEARNER.learn(north, STUDY, 1, weights)
    assert schema_of(learned.weights) == schema_of(weights)
    assert not same(learned.weights, weights)
    assert {name: a.tobytes() for name, a in weights.items()} == before
    assert (learned.examples, learned.steps, learned.device) == (
        4,
        4,
        "cpu",
    )  # 2 patients x 2 slices, 2 epochs of 3 + 1
    assert len(learned.losses) == 4
    assert all(loss is not None and 0 < loss < 5 for loss in learned.losses)


def test_the_loss_falls_while_it_learns(north, weights):
    study = replace(STUDY, train=replace(STUDY.train, local_steps=40, batch_size=4))
    losses = LEARNER.learn(north, study, 1, weights).losses
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "study",
    [
        STUDY,
        replace(STUDY, train=replace(STUDY.train, deterministic=False)),
        replace(
            STUDY, augment=Augment(rotate_deg=10, scale=0.1, shift=0.1, gamma=0.1, noise=0.1, flip_left_right=True)
        ),
        replace(STUDY, model=replace(STUDY.model, dropout=0.2)),
    ],
    ids=["deterministic", "as it comes", "augmented", "with dropout"],
)
def test_what_is_learned_is_a_function_of_study_round_site_and_weights(north, study, weights):
    learned = LEARNER.learn(north, study, 3, weights)
    torch.manual_seed(12345)
    torch.rand(7)
    assert same(LEARNER.learn(north, study, 3, weights).weights, learned.weights)
    assert not same(LEARNER.learn(north, study, 4, weights).weights, learned.weights)
    assert not same(LEARNER.learn(north, replace(study, seed=1), 3, weights).weights, learned.weights)
    assert not same(LEARNER.learn(replace(north, name="other"), study, 3, weights).weights, learned.weights)


def test_a_cache_that_is_there_or_not_changes_nothing(north, weights, tmp_path):
    fresh = replace(north, folder=tmp_path)
    assert same(LEARNER.learn(fresh, STUDY, 1, weights).weights, LEARNER.learn(north, STUDY, 1, weights).weights)
    assert list((tmp_path / "cache").rglob("*.safetensors"))


def test_steps_are_counted_in_batches_where_the_study_says_so(north, weights):
    study = replace(STUDY, train=replace(STUDY.train, local_steps=5, batch_size=8))
    learned = LEARNER.learn(north, study, 1, weights)
    assert (learned.steps, learned.examples) == (5, 4)


def test_pooled_training_has_the_cases_of_every_site_named(data, work, weights):
    both = LEARNER.learn(site_at(data, work, "north", "south", name="pooled"), STUDY, 1, weights)
    assert both.examples == 8


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: {n: a for n, a in list(w.items())[1:]}, "is missing"),
        (lambda w: {n: np.full_like(a, np.nan) for n, a in w.items()}, "holds NaN or infinity"),
    ],
)
def test_weights_that_are_not_the_studys_are_not_trained_on(north, weights, spoil, words):
    with pytest.raises(WeightsInvalid, match=words):
        LEARNER.learn(north, STUDY, 1, spoil(weights))
    with pytest.raises(WeightsInvalid, match=words):
        scored(north, STUDY, spoil(weights), "test")


def test_the_settings_of_torch_follow_the_study_and_the_site(north, weights):
    LEARNER.learn(replace(north, threads=2), STUDY, 1, weights)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 2
    LEARNER.learn(north, replace(STUDY, train=replace(STUDY.train, deterministic=False)), 1, weights)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 1


# Scoring


def test_the_score_is_the_dice_of_whole_cases_of_the_split(north, weights):
    trained = LEARNER.learn(north, replace(STUDY, train=replace(STUDY.train, local_steps=20)), 1, weights).weights
    scores = scored(north, STUDY, trained, "test")
    assert list(scores) == ["lung"]
    assert (scores["lung"].cases, scores["lung"].empty) == (2, 0)
    net = nets.network(STUDY).eval()
    nets.load_arrays(net, trained)
    by_hand = []
    for case in data_set(north, STUDY, "test").by_case():
        with torch.no_grad():
            predicted = torch.sigmoid(net(torch.from_numpy(case.images))).numpy()[:, 0] > 0.5
        by_hand.append(dice(predicted, case.masks == 1, case.masks != IGNORE))
    assert scores["lung"].mean == pytest.approx(np.mean(np.array(by_hand, float)), abs=1e-6)
    assert scored(north, STUDY, trained, "test") == scores


def test_each_split_has_its_own_cases_and_sites_add_up(data, work, weights):
    north, south = site_at(data, work, "north"), site_at(data, work, "south")
    both = site_at(data, work, "north", "south", name="pooled")
    assert scored(north, STUDY, weights, "val")["lung"].cases == 1
    for split in ("val", "test"):
        parts = [scored(site, STUDY, weights, split)["lung"] for site in (north, south)]
        assert merge(*parts) == scored(both, STUDY, weights, split)["lung"]


def test_a_site_withholds_the_histogram_of_few_cases(north, weights):
    assert sum(scored(north, STUDY, weights, "test")["lung"].histogram) == 2
    assert scored(replace(north, smallest_count=3), STUDY, weights, "test")["lung"].histogram == ()


def test_two_images_of_one_patient_are_one_patient_to_the_policy(data, work, weights, tmp_path):
    once = Path(shutil.copytree(data, tmp_path / "data"))
    with (once / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    tested = [row for row in rows if row["split"] == "test" and row["site"] == "north"]
    north = replace(site_at(once, tmp_path / "two", "north"), smallest_count=2)
    assert scored(north, STUDY, weights, "test")["lung"].histogram
    assert LEARNER.profile(north, STUDY, weights)
    for row in tested:
        row["patient_id"] = tested[0]["patient_id"]
    with (once / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    north = replace(site_at(once, tmp_path / "one", "north"), smallest_count=2)
    found = scored(north, STUDY, weights, "test")["lung"]
    assert (found.cases, found.histogram) == (2, ())
    assert LEARNER.profile(replace(north, smallest_count=3), STUDY, weights) is None  # 3 cases of 2 patients


def test_the_threshold_is_the_studys(north, weights):
    everything = scored(north, replace(STUDY, evaluate=Evaluate(threshold=1e-6)), weights, "test")["lung"]
    nothing = scored(north, replace(STUDY, evaluate=Evaluate(threshold=1 - 1e-6)), weights, "test")["lung"]
    assert everything.mean > 0.05
    assert nothing.mean == 0


def test_a_split_without_cases_has_no_score(data, tmp_path, weights):
    folder = rewritten(data, tmp_path, lambda row: row if row["split"] == "train" else None)
    scores = scored(site_at(folder, tmp_path, "north"), STUDY, weights, "test")
    assert (scores["lung"].cases, scores["lung"].empty) == (0, 0)


class Drawn:
    """Cases of made-up examples."""

    def __init__(self, *sizes: int) -> None:
        rng = np.random.default_rng(0)
        self.cases = [
            (rng.normal(size=(n, 1, 16, 16)).astype(np.float32), rng.choice([0, 1, 2, IGNORE], (n, 16, 16)))
            for n in sizes
        ]

    def by_case(self) -> Iterator[CaseExamples]:
        for n, (images, masks) in enumerate(self.cases):
            grid = Geometry((16, 16, len(images)), (1.0, 1.0, 1.0), (16, 16), (0.0, 0.0), (1.0, 1.0))
            yield CaseExamples(str(n), images, masks.astype(np.uint8), grid)


def test_a_case_of_many_slices_is_one_volume_however_it_is_cut_and_every_label_has_its_channel():
    study = replace(STUDY, task=Task(labels=("lung", "heart")), preprocess=Preprocess(size=(16, 16)))
    net, drawn = nets.network(study), Drawn(1, 31, 32, 70)
    task, device = functions_of(study.task), torch.device("cpu")
    found = evaluate(net, drawn, study, task, device, smallest_count=1)  # type: ignore[arg-type]
    assert list(found) == ["lung", "heart"]
    for k, label in enumerate(found):
        by_hand: list[float | None] = []
        for images, masks in drawn.cases:
            with torch.no_grad():
                predicted = torch.sigmoid(net.eval()(torch.from_numpy(images))).numpy() > 0.5
            by_hand.append(dice(predicted[:, k], masks == k + 1, masks != IGNORE))
        assert found[label].value == pytest.approx(np.mean(np.array(by_hand, float)), abs=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "task",
    [
        Task(labels=("lung",)),
        Task(kind="classification", labels=("a", "b"), loss="ce"),
        Task(kind="prognosis", labels=("death",), loss="hazard", intervals_days=(1.0, 2.0)),
        Task(kind="detection", loss="centre", labels=("nodule",)),
        Task(kind="reconstruction", loss="masked_l1", mask_size=4),
    ],
    ids=lambda task: task.kind,
)
def test_answers_that_are_not_finite_are_refused_as_such_whatever_is_answered(task, value):
    class Diverged(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            space = images.shape[2:] if study.model.name == "unet" else ()
            return torch.full((len(images), 3, *space), value)

    pixelwise = task.kind in ("segmentation", "detection", "reconstruction")
    model = Model(features=(4, 4, 4, 4, 4, 4), groups=2) if pixelwise else Model(name="resnet18")
    study = Study("s", task=task, model=model, preprocess=Preprocess((32, 32)))
    device = torch.device("cpu")
    with pytest.raises(OrderRefused, match="case 0: the model's answer is not finite") as refused:
        evaluate(Diverged(), Drawn(2), study, functions_of(task), device, 1)  # type: ignore[arg-type]
    assert refused.value.code == "ANSWERS_NONFINITE"


# Holding, and what cannot be done


def rewritten(data: Path, tmp_path: Path, change) -> Path:
    """A copy of the phantom whose manifest has other rows."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in map(change, rows) if row is not None]
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
    return folder


def test_a_site_tells_how_many_cases_it_holds(data, work, north):
    assert LEARNER.holding(north, STUDY) == Holding(2, 2, 2)
    assert LEARNER.holding(site_at(data, work, "north", "south", name="pooled"), STUDY) == Holding(4, 4, 4)


def test_a_site_without_labels_to_learn_from_holds_nothing_and_says_so(data, tmp_path, weights):
    folder = rewritten(data, tmp_path, lambda row: {**row, "mask": ""})
    site = site_at(folder, tmp_path, "north")
    assert LEARNER.holding(site, STUDY) == Holding(0, 0)
    with pytest.raises(OrderRefused, match=r"no case with a label for training. Run `fedclient check`") as refused:
        LEARNER.learn(site, STUDY, 1, weights)
    assert refused.value.code == "NO_CASES"


def test_a_site_with_test_cases_alone_refuses_to_train(data, tmp_path, weights):
    folder = rewritten(data, tmp_path, lambda row: row if row["split"] == "test" else None)
    with pytest.raises(OrderRefused) as refused:
        LEARNER.learn(site_at(folder, tmp_path, "south"), STUDY, 1, weights)
    assert refused.value.code == "NO_CASES"


def test_a_site_that_the_manifest_does_not_list_is_told_so(data, work, weights):
    with pytest.raises(ManifestInvalid, match=r"no site 'west'. It holds: north, south"):
        LEARNER.learn(site_at(data, work, "west"), STUDY, 1, weights)


@pytest.mark.parametrize(("device", "there"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cuda:99999999999", 8)])
def test_a_gpu_that_is_not_there_is_missed_by_name(north, weights, monkeypatch, device, there):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    site = replace(north, device=device)
    for call in (lambda: LEARNER.learn(site, STUDY, 1, weights), lambda: scored(site, STUDY, weights, "val")):
        with pytest.raises(OrderRefused, match=f"asks for {device}, PyTorch sees {there} GPU") as refused:
            call()
        assert refused.value.code == "DEVICE_MISSING"


def test_the_device_is_the_gpu_if_there_is_one_and_nothing_else_is_asked_for(north, monkeypatch):
    for there, auto in ((0, "cpu"), (2, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there > 0)
        assert device_of(replace(north, device="auto")) == torch.device(auto)
        assert device_of(replace(north, device="cpu")).type == "cpu"
    assert device_of(replace(north, device="cuda")) == torch.device("cuda:0")  # a bound on memory asks for the number
    assert device_of(replace(north, device="cuda:1")) == torch.device("cuda:1")


def test_a_gpu_that_the_driver_shows_and_that_cannot_be_used_leaves_the_training_to_the_cpu(north, monkeypatch):
    """As with a driver that is too old for this PyTorch, or one that waits for the machine to be started anew."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(replace(north, device="auto")) == torch.device("cpu")
    with pytest.raises(OrderRefused, match="asks for cuda, PyTorch sees 0 GPUs"):
        device_of(replace(north, device="cuda"))


def test_a_data_set_counts_slices(north):
    cases = data_set(north, STUDY, "train")
    assert isinstance(cases, DataSet)
    assert len(cases) == 4


# What the hospital lets go on


class Night:
    """Lets so many steps go on."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OrderRefused("OUTSIDE_HOURS", "the night is over")


def test_scoring_ends_between_two_cases_once_it_may_not_go_on():
    study, drawn, night = replace(STUDY, preprocess=Preprocess(size=(16, 16))), Drawn(1, 1, 1), Night(2)
    task, device = functions_of(study.task), torch.device("cpu")
    with pytest.raises(OrderRefused, match="the night is over"):
        evaluate(nets.network(study), drawn, study, task, device, 1, night)  # type: ignore[arg-type]


def test_a_site_whose_labels_the_study_does_not_have_refuses_it(north, weights):
    site = replace(north, labelled=("Lung",))  # the study says `lung`: all would be background
    for call in (lambda: LEARNER.learn(site, STUDY, 1, weights), lambda: LEARNER.holding(site, STUDY)):
        with pytest.raises(
            OrderRefused, match=r"masks here have Lung, .* labels lung: none could be learned"
        ) as refused:
            call()
        assert refused.value.code == "LABELS_UNKNOWN"
    assert LEARNER.holding(replace(north, labelled=("lung", "liver")), STUDY) == LEARNER.holding(north, STUDY)


def test_a_detection_is_refused_where_nobody_has_marked_all_that_it_looks_for(north):
    ready = load_study("lung-detect")
    study = replace(ready, task=replace(ready.task, labels=("nodule", "node")))
    with pytest.raises(OrderRefused, match=r"masks here have nodule, and not node: .* learn that there is none"):
        sorted_by_label(replace(north, labelled=("nodule",)), study)
    for all_of_them in ((), ("nodule", "node", "rib")):
        sorted_by_label(replace(north, labelled=all_of_them), study)
