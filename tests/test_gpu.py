"""Training and prediction on a GPU, where there is one, beside those on a CPU."""

import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedclient.data.augment import Change, draw
from fedclient.data.volume import Volume
from fedclient.limits import Limits
from fedclient.predict.case import predict_case
from fedclient.predict.explained import explainer_of
from fedclient.predict.inputs import Source, list_inputs
from fedclient.predict.model import load_model
from fedclient.site import Site, open_site
from fedclient.training.device import free_memory, try_gpu
from fedclient.training.learner import ImageLearner, sorted_by_label
from fedclient.training.micro import Room
from fedclient.training.scoring import score_cases
from fedclient.training.trainer import stepper
from fedclient.work import Learned
from shared_models import nets
from shared_models.release import open_release
from shared_models.scores import row_of
from shared_models.study import Augment, Evaluate, Model, Preprocess, Rounds, Study, Train, Unlabelled
from shared_models.tasks.segmentation import dice_bce
from simulations.fixtures.dicom import write_dicom_series
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, node_configs
from tests.marking import chest_hu
from tests.releases import made_release

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")

GPU = torch.device("cuda")
MOVED = Augment(rotate_deg=20, scale=0.2, shift=0.1, gamma=0.3, brightness=0.1, flip_left_right=True)
STUDY = Study(
    name="on-gpu",
    model=Model(features=(8, 8, 16, 32, 64, 8), groups=4),
    preprocess=Preprocess(size=(64, 64)),
    augment=MOVED,
    train=Train(local_steps=6, batch_size=4, optimizer="sgd", learning_rate=0.05, precision="float32"),
    rounds=Rounds(count=1),
    evaluate=Evaluate(every=0),
)


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Iterator[None]:
    """Without TF32, so that both devices compute the same; what a test changes is put back."""
    deterministic, tf32 = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    memory = resource.getrlimit(resource.RLIMIT_DATA)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_per_process_memory_fraction(1.0)
    resource.setrlimit(resource.RLIMIT_DATA, memory)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = PhantomPlan(sites=("north",), train=6, val=1, test=2, slices=2, size=64)
    return phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)


def site_at(data: Path, work: Path, device: str) -> Site:
    nodes = node_configs(work, [data], Machine(workers=0, device=device), None)
    return open_site(nodes["north"])


def learned(data: Path, work: Path, device: str, study: Study = STUDY) -> Learned:
    return ImageLearner().learn(site_at(data, work, device), study, 1, nets.initial_weights(study))


def test_a_batch_is_changed_by_the_gpu_as_by_the_cpu():
    rng = np.random.default_rng(0)
    images, masks = rng.random((6, 1, 64, 48), np.float32), rng.integers(0, 2, (6, 64, 48)).astype(np.uint8)
    change = Change(np.array([0, 1] * 3), draw(MOVED, 6, 2, rng), rng, True)
    here, mask_here = change(torch.from_numpy(images.copy()), torch.from_numpy(masks.copy()))
    there, mask_there = change(torch.from_numpy(images).to(GPU), torch.from_numpy(masks).to(GPU))
    torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=0)
    assert (mask_there.cpu() == mask_here).float().mean() > 0.999  # of voxels that lie between two


def test_noise_on_the_gpu_is_that_of_its_seed():
    drawn = draw(Augment(noise=0.1), 2, 2, np.random.default_rng(0))
    still = torch.zeros(2, 1, 64, 64, device=GPU)

    def noise(seed: int) -> torch.Tensor:
        none = torch.zeros(2, 64, 64, dtype=torch.uint8, device=GPU)
        return Change(np.zeros(2, np.intp), drawn, np.random.default_rng(seed), True)(still.clone(), none)[0]

    one, again, other = noise(1), noise(1), noise(2)
    assert (one == again).all()
    assert (one != other).any()
    assert one.std(dim=(1, 2, 3)).cpu().numpy() == pytest.approx(drawn.noise, rel=0.05)


def test_a_site_learns_on_the_gpu_what_it_learns_on_the_cpu(data, tmp_path):
    there, here = (learned(data, tmp_path, device) for device in ("cuda", "cpu"))
    assert there.device == "cuda"
    assert there.losses == pytest.approx(here.losses, rel=1e-3)
    for name, array in here.weights.items():
        np.testing.assert_allclose(there.weights[name], array, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_hospitals_node_trains_and_scores_on_its_gpu_within_its_limits(data, tmp_path, device):
    site = replace(site_at(data, tmp_path, device), deployed=True, limits=Limits(memory_gib=64.0, gpu_memory_share=0.5))
    begun = nets.initial_weights(STUDY)
    assert ImageLearner().learn(site, STUDY, 1, begun).device == "cuda"
    assert torch.cuda.get_per_process_memory_fraction(0) == 0.5
    scores, _, _ = score_cases(site, STUDY, begun, "test")
    assert row_of(scores["lung"])["dice"] is not None


def test_a_deterministic_study_trains_to_the_same_bits_twice(data, tmp_path):
    study = replace(STUDY, augment=replace(MOVED, noise=0.1), train=replace(STUDY.train, deterministic=True))
    one, two = (learned(data, tmp_path, "cuda", study).weights for _ in range(2))
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_half_precision_trains_too_and_sends_whole_numbers(data, tmp_path):
    study = replace(
        STUDY, train=replace(STUDY.train, precision="auto", local_steps=40, optimizer="adam", learning_rate=5e-3)
    )
    found = learned(data, tmp_path, "cuda", study)
    first, last = found.losses[0], found.losses[-1]
    assert first is not None
    assert last is not None
    assert last < 0.8 * first
    assert {array.dtype for array in found.weights.values()} == {np.dtype(np.float32)}


def test_memory_of_the_gpu_that_runs_out_is_met_by_parts_of_the_batch():
    free_memory()
    net = nets.network(STUDY).to(GPU)
    images, masks = torch.rand(64, 1, 256, 256, device=GPU), torch.ones(64, 256, 256, dtype=torch.uint8, device=GPU)
    torch.cuda.reset_peak_memory_stats()
    whole = stepper(net, dice_bce, STUDY.train, GPU)(images, masks)
    peak = torch.cuda.max_memory_allocated()
    free_memory()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / try_gpu(0).total_bytes)
    rooms: list[Room] = []
    again = nets.network(STUDY).to(GPU)
    made = Room.__init__

    def seen(self: Room, **given: Any) -> None:
        made(self, **given)
        rooms.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Room, "__init__", seen)
        parts = stepper(again, dice_bce, STUDY.train, GPU)(images, masks)
    assert rooms[0].parts > 1
    assert float(parts) == pytest.approx(float(whole), rel=1e-4)
    for one, two in zip(net.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_a_teacher_of_unlabelled_cases_works_on_the_gpu(data, tmp_path):
    study = replace(STUDY, unlabelled=Unlabelled(method="mean_teacher", ramp_rounds=0, mix=True))
    site = site_at(data, tmp_path, "cuda")
    labelled, _ = sorted_by_label(site, study)
    hidden = frozenset([case.key for case in labelled if case.split == "train"][2:])
    weights = nets.initial_weights(study)
    with_them = ImageLearner().learn(replace(site, hidden=hidden), study, 1, weights).weights
    alone = (
        ImageLearner().learn(replace(site, hidden=hidden), replace(study, unlabelled=Unlabelled()), 1, weights).weights
    )
    assert any((with_them[name] != alone[name]).any() for name in weights)


def test_a_release_marks_the_same_voxels_on_the_gpu(tmp_path):
    folder, trust = made_release(tmp_path)
    release = open_release(folder, trust)
    volume = Volume(chest_hu((50, 44, 3)), np.diag([0.8, 0.7, 2.5, 1.0]), "CT")
    here, there = (load_model(release, device=device, threads=1) for device in ("cpu", "cuda"))
    ours, theirs = (predict_case(model, volume).mask for model in (here, there))
    assert (ours == theirs).mean() > 0.9999


def test_a_map_of_a_release_is_drawn_on_a_gpu(tmp_path):
    opened = open_release(*made_release(tmp_path))
    model = load_model(opened, device="cuda")
    model = replace(model, study=replace(model.study, evaluate=Evaluate(threshold=1e-6)))  # all of it is marked
    write_dicom_series(tmp_path / "series", Volume(chest_hu(), np.diag([0.8, 0.7, 2.5, 1.0]), "CT"))
    (source,) = list_inputs([tmp_path / "series"], model.study).found
    assert isinstance(source, Source)
    (found,) = explainer_of(opened, model, "cuda", ("grad-cam",))(predict_case(model, source))
    assert (found.answer, found.file) == ("lung", "explained-1-grad-cam.png")
