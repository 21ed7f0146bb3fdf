"""Cases that nobody has labelled: what is learned from them by hand, and that no hidden label is ever looked at."""

import csv
import json
import math
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fedclient.cli
from fedclient.data.manifest import read_manifest
from fedclient.data.truths import read_truth
from fedclient.data.volume import Volume
from fedclient.gate.facts import needs_of
from fedclient.gate.run import check
from fedclient.memory import Sent, keep_final, keep_sent, memory_folder
from fedclient.site import Data, Site, SiteFile, open_site, site_toml
from fedclient.training.learner import ImageLearner, sorted_by_label, to_train_on
from fedclient.training.trainer import fit
from fedclient.training.unlabelled import (
    again,
    agreement,
    consistency,
    follow,
    mixed,
    nothing,
    pseudo_labels,
    worth,
)
from fedclient.training.worklist import greedy
from shared_models import nets
from shared_models.errors import StudyInvalid
from shared_models.files import read_json, write_atomic
from shared_models.metrics import IGNORE
from shared_models.parse import parse
from shared_models.preprocess import Geometry
from shared_models.study import (
    Augment,
    Evaluate,
    Model,
    Preprocess,
    Rounds,
    Study,
    Task,
    Train,
    Unlabelled,
    canonical,
    load_study,
    sha256,
)
from shared_models.tasks.chosen import functions_of
from shared_models.weights import save_arrays
from simulations.hidden import hidden
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, carry_out, federation, jobs, node_configs, simulate
from simulations.sources import pooled
from simulations.vois import RegionPlan, regions
from tests.test_micro import Narrow
from tests.test_trainer import toy_batches

pytestmark = pytest.mark.usefixtures("settings_of_torch")

AUGMENT = Augment(rotate_deg=10, shift=0.1, gamma=0.2, noise=0.05)
STUDY = Study(
    name="few",
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    preprocess=Preprocess(size=(32, 32)),
    augment=AUGMENT,
    train=Train(local_steps=3, batch_size=4, learning_rate=1e-2, deterministic=True),
    unlabelled=Unlabelled(method="mean_teacher", ramp_rounds=4),
    rounds=Rounds(count=1),
    evaluate=Evaluate(every=0),
)
LEARNER = ImageLearner()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites with four patients to train on, one to validate and one to test, of two slices each."""
    plan = PhantomPlan(sites=("north", "south"), train=4, val=1, test=1, slices=2, size=32)
    return phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)


def without_labels(
    data: Path, folder: Path, of: str = "south", splits: tuple[str, ...] = ("train", "val", "test")
) -> Path:
    """The data with the masks of a site's splits left out of the manifest."""
    shutil.copytree(data, folder)
    with (data / "manifest.csv").open(newline="") as file:
        heading, *rows = csv.reader(file)
    site, mask, split = (heading.index(name) for name in ("site", "mask", "split"))
    for row in rows:
        if row[site] == of and row[split] in splits:
            row[mask] = ""
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([heading, *rows])
    return folder


def site_at(data: Path, work: Path, name: str) -> Site:
    nodes = node_configs(work, [data], Machine(workers=0, device="cpu"), None)
    return open_site(nodes[name])


# The table


def test_the_weight_rises_to_its_whole_as_the_paper_has_it():
    table = Unlabelled(method="mean_teacher", ramp_rounds=5)
    assert [table.ramp(r) for r in (1, 4, 5, 9)] == pytest.approx([math.exp(-3.2), math.exp(-0.2), 1, 1])
    assert Unlabelled(method="mean_teacher", ramp_rounds=0).ramp(1) == 1


def test_examples_without_labels_count_a_share_that_rises():
    """8 with labels; of 40 without a tenth, times exp(-5 (3/4)^2) = 0.06 in round 1, and whole in round 4."""
    assert [worth(8, 40, STUDY, r) for r in (1, 4)] == [8, 12]
    assert worth(0, 40, STUDY, 1) == 1, "an update of no weight would be refused"
    assert worth(8, 40, replace(STUDY, unlabelled=Unlabelled()), 4) == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unlabelled": {"method": "none", "weight": 2.0}}, "weight is not read with method"),
        ({"unlabelled": {"method": "pseudo", "decay": 0.5}}, "decay is not read with method"),
        ({"augment": {}}, r"needs \[augment\] or mix"),
        ({"plan": "federated"}, "counts labelled cases alone"),
        ({"train": {"sharpness_rho": 0.1}}, "sharpness_rho must be 0"),
        ({"personal": {"ditto_lambda": 0.1}}, "may only keep layers"),
        ({"train": {"optimizer": "sgd"}, "strategy": {"normalise_steps": True}}, "normalise_steps needs train.local_s"),
        (
            {
                "train": {"local_steps": 3, "precision": "float32"},
                "strategy": {"weighting": "uniform"},
                "evaluate": {"every": 0},
                "protect": {"privacy": {"noise_multiplier": 1.0, "clip_norm": 1.0, "sample_rate": 0.5}},
            },
            "neither clipped nor accounted",
        ),
        ({"task": {"kind": "classification", "labels": ["a"]}, "model": {"name": "resnet18"}, "unlabelled": {
            "method": "mean_teacher", "mix": True}}, "mix is for a segmentation"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_the_reason(changes, words):
    plain = {"name": "few", "augment": {"noise": 0.1}, "unlabelled": {"method": "mean_teacher"}}
    with pytest.raises(StudyInvalid, match=words):
        parse(Study, {**plain, **changes}, "study.toml")


# What is learned


def test_the_teacher_keeps_its_share_of_itself():
    teacher, student = nn.Linear(1, 1), nn.Linear(1, 1)
    for net, value in ((teacher, 1.0), (student, 3.0)):
        nn.init.constant_(net.weight, value)
        nn.init.constant_(net.bias, -value)
    follow(teacher, student, 0.75)
    assert [p.item() for p in teacher.parameters()] == [1.5, -1.5]
    assert [p.item() for p in student.parameters()] == [3.0, -3.0]


def test_disagreement_is_the_mean_square_where_it_is_known():
    chances = torch.tensor([[[0.5, 0.9]]])
    wanted = torch.tensor([[[0.1, 0.0]]])
    assert float(agreement(chances, chances, wanted, torch.tensor([[[1.0, 0.0]]]))) == pytest.approx(0.16)


def test_of_pseudo_labels_only_sure_ones_count_and_the_others_as_nothing():
    """Sure of 0.97 as true and 0.02 as false, logits 0: each costs ln 2; 0.6 costs nothing; the mean is over three."""
    logits = torch.zeros(1, 1, 3)
    wanted = torch.tensor([[[0.97, 0.02, 0.6]]])
    loss = pseudo_labels(0.95, exclusive=False)(logits, logits, wanted, torch.ones(1, 1, 3))
    assert float(loss) == pytest.approx(2 * math.log(2) / 3)


def test_of_a_softmax_the_most_probable_label_is_taken_where_it_is_sure():
    logits = torch.zeros(2, 3)
    wanted = torch.tensor([[0.01, 0.98, 0.01], [0.5, 0.3, 0.2]])
    loss = pseudo_labels(0.95, exclusive=True)(logits, logits, wanted, torch.ones(2, 1))
    assert float(loss) == pytest.approx(math.log(3) / 2)


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    logits = torch.ones(2, 1, 4, 4, requires_grad=True)
    nothing(logits, torch.full((2, 4, 4), IGNORE, dtype=torch.uint8)).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) == 0


@pytest.mark.parametrize("loss", ["bce", "dice_bce", "ce", "dice_ce", "focal", "tversky"])
def test_no_loss_learns_from_a_mask_that_nobody_has_drawn(loss):
    task = Task(loss=loss)
    logits = torch.randn(2, task.outputs, 8, 8, requires_grad=True)
    functions_of(task).loss(logits, torch.full((2, 8, 8), IGNORE, dtype=torch.uint8)).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-7


def grey(count: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((count, 1, 16, 16), np.float32))


def test_what_is_wanted_moves_as_the_image_does():
    """The image taken for its own answer comes out as the image does, wherever that was inside."""
    move = Augment(rotate_deg=30, scale=0.2, shift=0.2)
    views = again(grey(), grey(), move, False, np.random.default_rng(1))
    inside = views.valid > 0
    assert 0.3 < inside.float().mean() < 1
    torch.testing.assert_close(views.images[inside], views.wanted[inside], atol=0.35, rtol=0)  # edges blend with pads
    assert (views.images[inside] - views.wanted[inside]).abs().median() < 1e-6
    assert (views.images - grey()).abs().max() > 0.1


def test_grey_levels_change_for_the_student_and_not_for_what_is_wanted():
    views = again(grey(), grey(), Augment(brightness=0.5, noise=0.1), False, np.random.default_rng(1))
    assert (views.wanted == grey()).all()
    assert (views.images - grey()).abs().max() > 0.05


def test_half_of_each_mixed_image_is_another_s_and_so_is_what_is_wanted():
    numbered = torch.arange(4.0).view(4, 1, 1, 1) * torch.ones(1, 1, 32, 32)
    images, wanted, valid = mixed(numbered, numbered + 10, torch.ones_like(numbered), np.random.default_rng(0))
    for n in range(4):
        assert set(images[n].unique().tolist()) == {n, (n - 1) % 4}
        assert (images[n] == n).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (wanted == images + 10).all()
    assert (valid == 1).all()


# At a site


def test_a_case_without_a_mask_has_a_truth_that_nothing_looks_at(data, tmp_path):
    folder = without_labels(data, tmp_path / "bare")
    case = read_manifest(folder, "south", "salt")[0]
    geometry = Geometry((4, 4, 2), (1.0, 1.0, 1.0), (8, 8), (0.0, 0.0), (0.5, 0.5))
    truth = read_truth(case, Volume(np.zeros((1, 4, 4, 2), np.float32), np.eye(4)), geometry, STUDY.task)
    assert truth.shape == (2, 8, 8)
    assert (truth == IGNORE).all()


def test_a_site_without_any_label_learns_and_counts_little(data, tmp_path):
    site = site_at(without_labels(data, tmp_path / "bare"), tmp_path / "work", "south")
    weights = nets.initial_weights(STUDY)
    learned = LEARNER.learn(site, STUDY, 4, weights)
    assert learned.examples == 1  # a tenth of 4 patients x 2 slices
    assert learned.steps == 3
    assert any((learned.weights[name] != array).any() for name, array in weights.items())
    assert LEARNER.holding(site, STUDY).train_patients == 4


def test_a_site_without_any_label_moves_little_in_the_first_rounds(data, tmp_path):
    site = site_at(without_labels(data, tmp_path / "bare"), tmp_path / "work", "south")
    weights = nets.initial_weights(STUDY)
    moved = [
        sum(float(np.abs(array - weights[name]).sum()) for name, array in learned.items())
        for learned in (LEARNER.learn(site, STUDY, number, weights).weights for number in (1, 4))
    ]
    assert moved[0] < 0.2 * moved[1]


def test_a_site_whose_labels_are_few_learns_from_the_others_too(data, tmp_path):
    site = replace(site_at(data, tmp_path, "north"), hidden=frozenset(keys(data, tmp_path, "north")[1:]))
    labelled, unlabelled = to_train_on(site, STUDY)
    assert (len(labelled), len(unlabelled)) == (2, 6)
    plain = replace(STUDY, unlabelled=Unlabelled())
    weights = nets.initial_weights(STUDY)
    with_others, alone = (LEARNER.learn(site, study, 4, weights).weights for study in (STUDY, plain))
    assert any((with_others[name] != alone[name]).any() for name in weights)


def keys(data: Path, work: Path, name: str) -> list[str]:
    return [case.key for case in sorted_by_label(site_at(data, work, name), STUDY)[0] if case.split == "train"]


def test_a_hidden_label_is_never_looked_at(data, tmp_path):
    """Masks that are hidden are spoilt, and the weights come out the same, bit for bit."""
    spoilt = without_labels(data, tmp_path / "spoilt", "north", ("train",))
    sites = [site_at(folder, tmp_path / folder.name, "north") for folder in (data, spoilt)]
    hide = frozenset(keys(data, tmp_path / "again", "north"))
    weights = nets.initial_weights(STUDY)
    ours, theirs = (LEARNER.learn(replace(site, hidden=hide), STUDY, 2, weights) for site in sites)
    assert all((ours.weights[name] == theirs.weights[name]).all() for name in weights)


@pytest.mark.parametrize("method", ["mean_teacher", "pseudo"])
def test_a_classification_learns_from_images_without_classes(method, tmp_path):
    plan = RegionPlan(sites=1, train=4, val=2, test=2, size=32)
    folder = regions(tmp_path, plan, processes=1)
    study = Study(
        name="presence",
        task=Task(kind="classification", labels=("nodule",)),
        model=Model(name="resnet18"),
        preprocess=Preprocess(size=(32, 32)),
        augment=AUGMENT,
        train=Train(local_steps=1, batch_size=2),
        unlabelled=Unlabelled(method=method, ramp_rounds=0),
    )
    site = site_at(folder, tmp_path, "north")
    site = replace(site, hidden=frozenset(keys_of(site, study)[2:]))
    learned = LEARNER.learn(site, study, 1, nets.initial_weights(study))
    assert learned.examples == 2  # and a tenth of 2, rounded
    assert learned.losses[0] is not None


def keys_of(site: Site, study: Study) -> list[str]:
    return [case.key for case in sorted_by_label(site, study)[0] if case.split == "train"]


@pytest.mark.parametrize("method", ["mean_teacher", "pseudo"])
def test_where_memory_runs_out_as_much_is_learned_of_unlabelled_cases_in_parts(method, data, tmp_path):
    """One batch of them a step, and one step of the teacher, whatever part of it fits in at once."""
    site = replace(site_at(data, tmp_path, "north"), hidden=frozenset(keys(data, tmp_path, "north")[1:]))
    study = replace(STUDY, unlabelled=Unlabelled(method=method, ramp_rounds=0, mix=True))
    _, unlabelled = to_train_on(site, study)
    train = replace(study.train, optimizer="sgd", learning_rate=0.5)

    def after(most: int) -> dict[str, np.ndarray]:
        net = Narrow(nets.network(study), most)
        chance, task = np.random.default_rng(0), functions_of(study.task)
        look, pull = consistency(net, unlabelled, study, task, chance, 10.0)
        fit(net, toy_batches(3, edge=32), task.loss, train, torch.device("cpu"), pulls=[pull], beside=[look])
        return dict(nets.arrays_of(net.net))

    whole, parts, start = after(4), after(1), nets.initial_weights(study)
    far = max(float(np.abs(whole[n] - start[n]).max()) for n in whole)
    assert max(float(np.abs(whole[n] - parts[n]).max()) for n in whole) < 1e-4 * far


def test_the_gate_lets_unlabelled_cases_in_where_a_study_learns_from_them(data, tmp_path):
    site = site_at(without_labels(data, tmp_path / "bare"), tmp_path / "work", "south")
    plain = needs_of(replace(STUDY, unlabelled=Unlabelled()))
    codes = Counter(found.code for found in check(site, plain).blocking)
    assert codes["DATASET_TOO_SMALL"] == 1
    found = check(site, needs_of(STUDY))
    assert "DATASET_TOO_SMALL" not in {each.code for each in found.blocking}
    missing = [each for each in found.findings if each.code == "LABEL_MISSING"]
    assert Counter(each.severity for each in missing) == {"note": 4, "warn": 2}


def test_what_a_layout_has_for_test_without_labels_is_not_trained_on(data, tmp_path):
    site = site_at(without_labels(data, tmp_path / "bare"), tmp_path / "work", "south")
    labelled, unlabelled = sorted_by_label(site, STUDY)
    assert labelled == []
    assert {case.split for case in unlabelled} == {"train"}


# In a simulation


def test_labels_of_the_same_patients_are_hidden_however_many_and_whoever_asks(data, tmp_path):
    nodes = node_configs(tmp_path, [data], Machine(device="cpu"), None)
    found = {}
    for share in (0.3, 0.5):
        told = hidden(STUDY, nodes, share, tmp_path / str(share), lambda _: None)
        found[share] = set(read_json(Path(str(told["north"]["hidden"])))["hidden"])
    assert {share: len(of) for share, of in found.items()} == {0.3: 4, 0.5: 4}  # of 4 at a site 2 keep theirs
    assert found[0.3] == found[0.5]
    fewer = set(read_json(Path(str(hidden(STUDY, nodes, 0.1, tmp_path, lambda _: None)["south"]["hidden"])))["hidden"])
    assert len(fewer) == 6
    assert found[0.3] < fewer
    whole = open_site({**pooled([*told.values()]), "site": "pooled"})
    assert len(keys_of(whole, STUDY)) == 4


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(share, data, tmp_path):
    with pytest.raises(StudyInvalid, match="above 0 and at most 1"):
        hidden(STUDY, node_configs(tmp_path, [data], Machine(device="cpu"), None), share, tmp_path, lambda _: None)


def test_other_hidden_labels_are_another_run(data, tmp_path):
    nodes = node_configs(tmp_path, [data], Machine(device="cpu"), None)
    study = replace(STUDY, train=replace(STUDY.train, local_steps=1))
    carry_out(federation("federated", study, nodes), tmp_path, Machine(device="cpu"))
    fewer = hidden(study, nodes, 0.5, tmp_path, lambda _: None)
    with pytest.raises(Exception, match="another study or other data"):
        carry_out(federation("federated", study, fewer), tmp_path, Machine(device="cpu"))


def test_a_federation_with_a_site_without_any_label_is_reported(data, tmp_path):
    folder = without_labels(data, tmp_path / "bare")
    nodes = node_configs(tmp_path, [folder], Machine(device="cpu"), None)
    assert [job.name for job in jobs(STUDY, nodes, compare=True)] == ["federated", "pooled", "local-north"]
    results = simulate(STUDY, nodes, tmp_path / "out", Machine(device="cpu"), 1, compare=False, say=lambda _: None)
    assert results["seeds"][0]["federated"]["south"] is None
    assert results["seeds"][0]["details"]["federated"]["south"]["cases"] == 0
    assert Path(results["report"]).exists()


# The worklist


def test_the_list_goes_by_uncertainty_and_by_distance_to_what_is_there():
    """On a line: 0 is labelled; 10 and 11 are as unsure as each other, 4 half as much, 1 hardly.

    First 11 (farthest); then 4 with 0.5 x 4, not 10 with 1 x 1; then 10; 1 last.
    """
    features = np.array([[10.0], [11.0], [4.0], [1.0]])
    order, distances = greedy(np.array([1.0, 1.0, 0.5, 0.1]), features, np.array([[0.0]]), 4)
    assert order == [1, 2, 0, 3]
    assert distances[0] / distances[2] == pytest.approx(11)


def test_where_nothing_is_labelled_the_list_begins_with_the_unsurest():
    order, _ = greedy(np.array([0.2, 0.9, 0.3]), np.array([[0.0], [1.0], [2.0]]), np.zeros((0, 1)), 2)
    assert order[0] == 1
    assert len(order) == 2


def test_the_list_of_many_cases_needs_no_memory_for_each_pair_of_them():
    """Of 600 with 64 features the differences of all pairs would be 200 MB."""
    features = np.random.default_rng(0).normal(size=(600, 64))
    tracemalloc.start()
    try:
        order, distances = greedy(np.ones(600), features, features[:1], 3)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2e6
    apart = np.linalg.norm(features[:, None] - features[None], axis=2)
    first = int(apart[:, 0].argmax())
    assert order[0] == first
    whole = np.concatenate([apart, apart[:, :1]], axis=1)
    assert distances[0] == pytest.approx(apart[first, 0] / whole[whole > 0].mean())


def test_a_hospital_lists_its_unlabelled_training_cases_by_the_weights_it_was_sent(data, tmp_path):
    folder = without_labels(data, tmp_path / "bare", "south", ("train",))
    site = tmp_path / "site"
    (site / "secrets").mkdir(parents=True)
    write_atomic(site / "secrets" / "case-keys", b"ab" * 32)
    file = SiteFile("south", "localhost:1", "test", Data(str(folder), "south"))
    (site / "site.toml").write_text(site_toml(file))
    study = tmp_path / "few.toml"
    study.write_text(
        'name = "few"\n[model]\nfeatures = [4, 4, 4, 4, 4, 4]\ngroups = 2\n[preprocess]\nsize = [32, 32]\n'
    )
    words = ["worklist", str(study), "--site", str(site)]
    here, few = open_site({"site-dir": str(site)}), load_study(str(study))
    digest = save_arrays(site / "part", nets.initial_weights(few))
    (site / "blobs").mkdir()
    (site / "part").rename(site / "blobs" / digest)
    other = replace(few, name="other")  # whose weights have the same names and shapes
    keep_sent(memory_folder(here, "other-1", sha256(other)), Sent(1, digest, canonical(other).decode()))
    none = CliRunner().invoke(fedclient.cli.app, words)
    assert none.exit_code == 1
    assert f"no weights of study 'few' ({sha256(few)[:12]}) are here" in none.stderr
    keep_sent(memory_folder(here, "few-1", sha256(few)), Sent(3, digest, canonical(few).decode()))
    done = CliRunner().invoke(fedclient.cli.app, [*words, "--most", "3", "--json"])
    assert done.exit_code == 0, done.output
    assert f"By weights {digest[:16]} of study 'few', sent for round 3 of run few-1 on 20" in done.stderr
    listed = json.loads(done.stdout)
    cases = {case.key: case for case in read_manifest(folder, "south", "ab" * 32)}
    assert len(listed) == 3
    assert all(cases[wish["key"]].split == "train" and cases[wish["key"]].row == wish["row"] for wish in listed)
    assert all(0 < wish["entropy"] <= math.log(2) for wish in listed)
    (site / "blobs" / digest).unlink()  # as those of another study take their place
    assert CliRunner().invoke(fedclient.cli.app, words).exit_code == 1
    keep_final(memory_folder(here, "few-1", sha256(few)), few, nets.initial_weights(few))
    assert "of the end of run few-1 on 20" in CliRunner().invoke(fedclient.cli.app, words).stderr
