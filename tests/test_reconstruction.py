"""Masked images: what is hidden and counted, by hand; a study of its own whose weights begin another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedclient.egress import _distribution_of
from fedclient.training.learner import ImageLearner, to_train_on
from shared_models import nets
from shared_models.errors import StudyInvalid, UpdateRejected
from shared_models.files import file_sha256
from shared_models.metrics import counts
from shared_models.parse import parse
from shared_models.pretrained import first_weights
from shared_models.restored_counts import RestoredCounts, restored_counts
from shared_models.scores import doubted_scores, merge, row_of, total
from shared_models.study import Evaluate, Model, Preprocess, Rounds, Study, Task, Train, Transfer, load_study
from shared_models.tasks.functions import CaseAnswer
from shared_models.tasks.reconstruction import absolute_error, functions_of, hidden
from shared_models.weights import save_arrays
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, node_configs, simulate
from tests.test_unlabelled import site_at, without_labels

pytestmark = pytest.mark.usefixtures("settings_of_torch")

TASK = Task(kind="reconstruction", labels=("image",), loss="masked_l1", mask_share=0.5, mask_size=8)
STUDY = Study(
    name="masked",
    task=TASK,
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    preprocess=Preprocess(size=(32, 32)),
    train=Train(local_steps=12, batch_size=4, learning_rate=1e-2, deterministic=True),
    rounds=Rounds(count=1),
    evaluate=Evaluate(every=0),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = PhantomPlan(sites=("north", "south"), train=2, val=1, test=1, slices=2, size=32)
    return phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)


def images(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).random((count, 1, 32, 32), np.float32) + 1


def test_half_of_the_squares_of_an_image_are_hidden_and_the_rest_is_as_it_was():
    seen, truth = hidden(images(), TASK, np.random.default_rng(1))
    where = truth[:, 1:] > 0
    assert (where.reshape(2, 4, 8, 4, 8).sum(axis=(2, 4)) % 64 == 0).all(), "whole squares of 8"
    assert where.mean(axis=(1, 2, 3)).tolist() == [0.5, 0.5]
    assert (truth[:, :1] == images()).all()
    assert (seen[where] == 0).all()
    assert (seen[~where] == images()[~where]).all()
    assert (where[0] != where[1]).any()


def test_squares_at_the_end_of_an_edge_may_be_cut_and_volumes_have_cubes():
    _, truth = hidden(np.ones((1, 2, 20, 8, 12), np.float32), TASK, np.random.default_rng(0))
    assert truth.shape == (1, 3, 20, 8, 12)
    assert set(np.unique(truth[:, 2])) == {0, 1}


def test_of_a_small_grid_of_squares_one_stays_visible_and_the_image_can_be_scored():
    """Four squares, of which 0.8 rounded up are all."""
    task = replace(TASK, mask_share=0.8, mask_size=16)
    _, truth = hidden(images(20), task, np.random.default_rng(0))
    assert (truth[:, 1] > 0).mean(axis=(1, 2)).tolist() == [0.75] * 20
    cases = (CaseAnswer(truth[n : n + 1, :1], truth[n : n + 1]) for n in range(20))
    assert functions_of(task).scores(cases, 0.5, 1)["image"].value == 1.0


@pytest.mark.parametrize(("size", "mask_size"), [((32, 32), 32), ((32, 32), 64), ((32, 16), 32)])
def test_an_image_of_a_single_square_is_refused(size, mask_size):
    with pytest.raises(ValueError, match=rf"task.mask_size is {mask_size}, and preprocess.size .* is one square of it"):
        replace(STUDY, task=replace(TASK, mask_size=mask_size), preprocess=Preprocess(size=size))
    assert replace(STUDY, task=replace(TASK, mask_size=mask_size), preprocess=Preprocess(size=(2 * mask_size, 32)))


def test_the_error_counts_only_where_the_image_was_hidden():
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    where = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    restored = torch.tensor([[[[9.0, 2.5], [2.0, 9.0]]]])
    assert float(absolute_error(restored, torch.cat([image, where], dim=1))) == pytest.approx((0.5 + 1.0) / 2)


def test_what_is_restored_is_told_beside_filling_in_the_mean():
    """Seen 0 and 4, so the mean is 2: off by 0 and 2 at the hidden 2 and 4; the network is off by 0.5 and 0."""
    image, where = np.array([[[[0.0, 2.0], [4.0, 4.0]]]]), np.array([[[[0.0, 1.0], [0.0, 1.0]]]])
    answer = CaseAnswer(np.array([[[[7.0, 2.5], [7.0, 4.0]]]]), np.concatenate([image, where], axis=1))
    found = functions_of(TASK).scores(iter([answer]), 0.5, 11)["image"]
    assert found == RestoredCounts(cases=1, error_micro=250_000, blank_micro=1_000_000)
    assert found.value == pytest.approx(0.75)


def test_counts_of_two_sites_are_those_of_their_cases_together():
    a, b = np.array([0.1, 0.2]), np.array([0.5])
    both = restored_counts(np.concatenate([a, b]), np.concatenate([2 * a, 2 * b]))
    assert merge(restored_counts(a, 2 * a), restored_counts(b, 2 * b)) == both
    assert row_of(both)["restored"] == 0.5
    assert total([]) is None
    assert row_of(RestoredCounts())["restored"] is None


def test_counts_of_another_task_are_refused():
    assert doubted_scores(restored_counts(np.ones(1), np.ones(1)), TASK, "north").cases == 1
    with pytest.raises(UpdateRejected, match="another measure"):
        doubted_scores(counts([0.5], 1), TASK, "north")
    with pytest.raises(ValueError, match="cannot have such errors"):
        RestoredCounts(cases=0, error_micro=1)


def test_two_sums_of_a_case_are_no_distribution():
    assert _distribution_of(restored_counts(np.ones(1), np.ones(1))) == float("inf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ["a", "b"]}, "what is restored, there are 2"),
        ({"loss": "bce"}, "is not for a reconstruction"),
        ({"tolerance_mm": 2.0}, 'tolerance_mm is for kind = "segmentation"'),
    ],
)
def test_what_a_reconstruction_does_not_know_is_refused(changes, words):
    task = {"kind": "reconstruction", "labels": ["image"], "loss": "masked_l1", **changes}
    with pytest.raises(StudyInvalid, match=words):
        parse(Study, {"name": "masked", "task": task}, "study.toml")


def test_patches_are_refused_as_they_are_drawn_around_labels():
    with pytest.raises(StudyInvalid, match="is for a segmentation"):
        parse(
            Study,
            {
                "name": "masked",
                "task": {"kind": "reconstruction", "labels": ["image"], "loss": "masked_l1"},
                "preprocess": {"fit": "patches"},
            },
            "study.toml",
        )


def test_sites_learn_to_restore_without_a_single_label_and_are_reported(data, tmp_path):
    folder = without_labels(data, tmp_path / "bare", "north")
    folder = without_labels(folder, tmp_path / "barer", "south")
    nodes = node_configs(tmp_path, [folder], Machine(device="cpu"), None)
    results = simulate(STUDY, nodes, tmp_path / "out", Machine(device="cpu"), 1, compare=False, say=lambda _: None)
    assert results["measure"] == "share restored"
    assert set(results["seeds"][0]["federated"]) == {"north", "south"}
    site = site_at(folder, tmp_path / "alone", "north")
    assert len(to_train_on(site, STUDY)[0]) == 4
    losses = ImageLearner().learn(site, STUDY, 1, nets.initial_weights(STUDY)).losses
    first, *_, last = losses
    assert first is not None
    assert last is not None
    assert last < first


def test_its_weights_begin_another_study_but_for_the_head(tmp_path):
    file = tmp_path / "round-0001.safetensors"
    trained = nets.initial_weights(replace(STUDY, seed=1))
    save_arrays(file, trained)
    transfer = Transfer(sha256=file_sha256(file), fresh_head=True)
    wanted = replace(STUDY, name="lungs", task=Task(), transfer=transfer)
    weights, words = first_weights(wanted, file)
    head = nets.head_names(nets.network(wanted))
    begun = nets.initial_weights(wanted)
    assert head == {"final_conv.weight", "final_conv.bias"}
    assert all((weights[name] == (begun if name in head else trained)[name]).all() for name in weights)
    assert "missing: final_conv.weight, final_conv.bias" in words


def test_a_network_restores_every_channel():
    of_two = replace(STUDY, channels=("t1", "flair"))
    assert nets.network(of_two)(torch.zeros(1, 2, 32, 32)).shape == (1, 2, 32, 32)


def test_the_ready_study_begins_the_one_of_chest_x_rays():
    masked, lungs = load_study("chest-xray-masked"), load_study("chest-xray")
    assert (masked.model, masked.preprocess) == (lungs.model, lungs.preprocess)
