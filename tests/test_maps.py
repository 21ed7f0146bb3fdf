"""Maps against networks whose answer is known pixel by pixel; what is asked of maps, by hand; pictures of them."""

import io
import json
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import fedclient.cli
from fedclient.data.cache import open_case, write_case
from fedclient.data.cases import Case, Channel
from fedclient.memory import keep_final
from fedclient.overlay import NOT_FOR_DIAGNOSIS, Panel, displayed, drawn
from fedclient.training.device import gpus
from fedclient.training.explaining import Trained, example_of, model_at, read_pictured
from fedclient.training.maps import RegionScore, cam_layer, explain
from fedclient.training.sanity import (
    Sample,
    _localisation,
    _randomisation,
    alike,
    average_precision,
    cascaded,
    centre_prior,
    check_maps,
)
from fedclient.training.uncertainty import augmented, ensemble, entropy_of, spread
from fedclient.worth import Difference
from shared_models import nets
from shared_models.errors import ExplanationFailed, StateInvalid, StudyInvalid
from shared_models.files import canonical_json
from shared_models.study import Augment, Model, Preprocess, Study, Task, canonical, load_study
from shared_models.weights import save_arrays
from simulations.phantoms import nifti

SIZE = (32, 32)
PRESENCE = Study(
    name="presence",
    task=Task(kind="classification", labels=("nodule",), loss="bce"),
    model=Model(name="resnet18"),
    preprocess=Preprocess(size=SIZE),
)
LUNGS = Study(name="lungs", model=Model(features=(4, 4, 4, 4, 4, 4), groups=2), preprocess=Preprocess(size=SIZE))


class Bright(nn.Module):
    """Its logit is the mean of the image; its features are the image."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.features.weight)

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.features(images).mean(dim=(2, 3))
        return answer


class Weighed(nn.Module):
    """Its logit is the sum of the image's pixels, each times its weight."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, images: Tensor) -> Tensor:
        return (images[:, 0] * self.weights).sum(dim=(1, 2))[:, None]


class Itself(nn.Module):
    """A segmentation whose logits are the image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale


def square(at: slice = slice(4, 12)) -> Tensor:
    image = torch.zeros(1, *SIZE)
    image[0, at, at] = 1.0
    return image


def test_grad_cam_of_a_network_that_adds_up_its_features_is_those_features():
    found = explain(Bright(), 3 * square() + 1, PRESENCE, "nodule", "grad-cam", layer="features")
    np.testing.assert_allclose(found.saliency, square()[0], atol=1e-6)
    assert found.layer == "features"
    assert found.chance == pytest.approx(1 / (1 + np.exp(-(1 + 3 * 64 / 1024))))


def test_occlusion_finds_the_only_pixels_that_the_answer_depends_on():
    weights = torch.zeros(SIZE)
    weights[20:24, 20:24] = 1.0
    image = torch.full((1, *SIZE), 0.1)
    image[0, 20:24, 20:24] = 1.0
    saliency = explain(Weighed(weights), image, PRESENCE, "nodule", "occlusion").saliency
    assert saliency[20:24, 20:24].min() > 0.9
    assert saliency[:16, :16].max() < 0.01


def test_smooth_grad_of_a_linear_network_is_the_size_of_its_weights():
    weights = torch.zeros(SIZE)
    weights[3:9, 5:25] = 2.0
    weights[20:28, 5:25] = -1.0
    saliency = explain(Weighed(weights), square(), PRESENCE, "nodule", "smooth-grad").saliency
    np.testing.assert_allclose(saliency, np.abs(weights.numpy()) / 2, atol=1e-5)


def test_the_score_of_a_segmentation_is_the_mean_logit_over_the_region():
    region = torch.zeros(1, 2, 2, dtype=torch.bool)
    region[0, 0] = True
    logits = torch.tensor([[[[1.0, 3.0], [100.0, 100.0]]]])
    assert RegionScore(nn.Identity(), region)(logits).tolist() == [[2.0]]


def test_of_a_segmentation_what_is_predicted_is_explained_and_its_mean_probability_told():
    image = 4 * square() - 2
    found = explain(Itself(), image, LUNGS, "lung", "smooth-grad")
    assert found.region is not None
    np.testing.assert_array_equal(found.region, square()[0].numpy() > 0)
    assert found.chance == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)
    assert (found.saliency[found.region] > 0.99).all()
    assert (found.saliency[~found.region] == 0).all()


def test_where_nothing_is_predicted_there_is_nothing_to_explain():
    with pytest.raises(ExplanationFailed, match="no region to explain"):
        explain(Itself(), square() - 2, LUNGS, "lung", "smooth-grad")


@pytest.mark.parametrize(
    ("answer", "layer", "words"), [("heart", "", "has no 'heart'"), ("lung", "down_9", "no layer")]
)
def test_an_answer_or_a_layer_that_is_not_there_is_refused(answer, layer, words):
    with pytest.raises(ExplanationFailed, match=words):
        explain(nets.network(LUNGS), square(), LUNGS, answer, "grad-cam", layer=layer, region=square()[0].numpy() > 0)


def test_a_network_is_left_as_it_was():
    net = nets.network(LUNGS).train()
    before = nets.arrays_of(net)
    explain(net, square(), LUNGS, "lung", "grad-cam", region=square()[0].numpy() > 0)
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())
    assert all((nets.arrays_of(net)[name] == array).all() for name, array in before.items())


def test_grad_cam_looks_at_the_deepest_layer_that_still_tells_places():
    """Of 64x64 a ResNet's blocks have 16, 8, 4 and 2 cells along an edge."""
    presence = replace(PRESENCE, preprocess=Preprocess(size=(64, 64)))
    assert cam_layer(nets.network(presence).eval(), presence, torch.zeros(1, 1, 64, 64)) == "layer2"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_grad_cam_looks_at_whole_blocks_of_a_resnet_never_at_the_activation_that_they_share(name):
    """Of 96x96 the blocks have 24, 12 and 6 cells; a ResNet-50's third begins at 12, inside of itself."""
    study = replace(PRESENCE, model=Model(name=name, width=8), preprocess=Preprocess(size=(96, 96)))
    net, image = nets.network(study).eval(), torch.rand(1, 96, 96)
    found = explain(net, image, study, "nodule", "grad-cam")
    assert found.layer == "layer2"
    assert found.saliency.shape == (96, 96)
    with pytest.raises(ExplanationFailed, match=r"'layer3\.0\.act' runs more than once"):
        explain(net, image, study, "nodule", "grad-cam", layer="layer3.0.act")


def test_average_precision_is_the_one_worked_by_hand():
    """Ranked 1, 0, 1, 0: precision 1 at the first of two lesion pixels, 2/3 at the second."""
    lesion = np.array([True, False, True, False])
    assert average_precision(np.array([0.9, 0.8, 0.7, 0.1]), lesion) == pytest.approx((1 + 2 / 3) / 2)


def test_a_map_without_relief_finds_as_much_as_chance():
    lesion = np.arange(10) < 3
    assert average_precision(np.zeros(10), lesion) == pytest.approx(0.3)


def test_equal_values_of_a_map_are_told_together():
    """Two of the four first are lesion, at once: precision 2/4, recall 2/2."""
    lesion = np.array([True, True, False, False, False])
    assert average_precision(np.array([1.0, 1.0, 1.0, 1.0, 0.0]), lesion) == pytest.approx(0.5)


def test_who_has_not_looked_finds_most_in_the_middle():
    prior = centre_prior((5, 5))
    assert prior[2, 2] == prior.max() == 1
    assert prior[0, 0] == prior.min() == 0


def test_maps_are_alike_by_the_order_of_their_pixels():
    a = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert alike([a], [a**2]) == pytest.approx(1)
    assert alike([a, a], [-a, a]) == pytest.approx(0)
    assert alike([a], [np.ones_like(a)]) == 0


def test_the_cascade_goes_from_the_head_to_the_image():
    net = nets.network(LUNGS)
    trained = nets.arrays_of(net)
    changed = [
        sum(bool((nets.arrays_of(each)[n] != a).any()) for n, a in trained.items()) for each in cascaded(net, LUNGS)
    ]
    assert changed == sorted(changed)
    first, *_, last = cascaded(net, LUNGS)
    assert (nets.arrays_of(first)["final_conv.weight"] != trained["final_conv.weight"]).any()
    assert (nets.arrays_of(first)["conv_0.conv_0.conv.weight"] == trained["conv_0.conv_0.conv.weight"]).all()
    assert (nets.arrays_of(last)["conv_0.conv_0.conv.weight"] != trained["conv_0.conv_0.conv.weight"]).any()


def test_a_network_that_has_not_learned_fails_the_checks():
    draw = np.random.default_rng(0)
    samples = []
    for n in range(6):
        lesion = np.zeros(SIZE, bool)
        row, column = draw.integers(2, 26, 2)
        lesion[row : row + 4, column : column + 4] = True
        image = draw.normal(size=(1, *SIZE)).astype(np.float32)
        samples.append(Sample(image, lesion, f"patient {n}"))
    found = check_maps(nets.network(LUNGS), LUNGS, samples, "lung", "grad-cam", draws=2)
    assert not found.passed
    assert found.chance == pytest.approx(16 / 1024)
    assert {verdict.name: verdict.passed for verdict in found.verdicts}["randomisation"] is False


def test_without_an_example_nothing_is_checked():
    with pytest.raises(ExplanationFailed, match="no example"):
        check_maps(nets.network(LUNGS), LUNGS, [], "lung", "grad-cam")


GAIN = Difference(0.3, 0.2, 0.4, 20)
NONE = Difference(0.01, -0.1, 0.1, 20)


@pytest.mark.parametrize(
    ("likeness", "randomised", "loss", "passed"),
    [(0.1, 0.05, GAIN, True), (0.9, 0.05, GAIN, False), (0.1, 0.05, NONE, False), (0.1, 0.3, GAIN, False)],
)
def test_maps_of_random_weights_must_be_others_and_find_little(likeness, randomised, loss, passed):
    """Found 0.4 and chance 0.04, so a quarter of what is above chance is 0.13."""
    found, chance, after = (np.full(4, value) for value in (0.4, 0.04, randomised))
    assert _randomisation(likeness, found, chance, after, loss).passed is passed


@pytest.mark.parametrize(("chance", "centre", "passed"), [(GAIN, GAIN, True), (GAIN, NONE, False), (NONE, GAIN, False)])
def test_maps_must_find_more_than_chance_and_than_the_middle(chance, centre, passed):
    assert _localisation(np.full(4, 0.4), chance, centre).passed is passed


def test_members_that_agree_leave_no_disagreement_only_what_is_in_the_image():
    found = spread("x", [np.array([0.5, 1.0])] * 3, exclusive=False)
    assert found.entropy == pytest.approx(np.log(2) / 2)
    assert found.disagreement == pytest.approx(0)
    assert found.deviation.tolist() == [0, 0]


def test_members_that_are_sure_of_opposites_disagree_wholly():
    found = spread("x", [np.array([1.0, 0.0]), np.array([0.0, 1.0])], exclusive=True)
    assert found.disagreement == pytest.approx(np.log(2))
    assert found.deviation.tolist() == [0.5, 0.5]


def test_entropy_of_a_softmax_is_the_textbook_s():
    assert entropy_of(np.array([0.25, 0.25, 0.5]), exclusive=True) == pytest.approx(1.5 * np.log(2))


def test_what_moved_an_image_is_undone_on_the_answer():
    """A network that answers each pixel by itself says the same of every moved copy, but for the grain."""
    study = replace(LUNGS, augment=Augment(noise=1e-9, flip_left_right=True))
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, *SIZE)).astype(np.float32))
    found = augmented(Itself(), image, study, np.random.default_rng(1), 0)
    assert found.deviation.max() < 1e-6
    assert found.members == 9


class ByRow(nn.Module):
    """A segmentation that answers by the row alone, as what lies from head to feet in a film."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.linspace(-3, 3, SIZE[0])[:, None])

    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros_like(images) + self.rows


def test_copies_of_a_film_are_mirrored_across_its_columns_and_do_not_stand_on_their_head():
    study = replace(LUNGS, augment=Augment(flip_left_right=True))
    film, volume = (augmented(ByRow(), torch.ones(1, *SIZE), study, np.random.default_rng(1), axis) for axis in (1, 0))
    assert film.deviation.max() == 0  # which no column has a say in
    assert volume.deviation.max() > 0.1  # rows of a volume run between left and right


def test_rounds_are_members_of_an_ensemble():
    low, high = Itself(), Itself()
    nn.init.constant_(high.scale, 2.0)
    found = ensemble([low, high], torch.ones(1, 2, 2), LUNGS)
    sigmoids = [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2))]
    np.testing.assert_allclose(found.mean, np.full((1, 2, 2), np.mean(sigmoids)), atol=1e-6)
    assert found.kind == "ensemble of 2 rounds"


def test_the_plane_with_most_of_the_answer_is_explained():
    images = np.full((3, 1, *SIZE), -5, np.float32)
    images[1, 0, :8] = 5
    image, plane = example_of(Itself(), images, LUNGS, "lung", None, torch.device("cpu"))
    assert plane == 1
    assert (image.numpy() == images[1]).all()


def test_of_patches_the_one_around_the_surest_place_is_explained():
    study = replace(LUNGS, preprocess=Preprocess(size=SIZE, fit="patches"))
    images = np.full((1, 1, 96, 64), -5, np.float32)
    images[0, 0, 80, 5] = 5
    image, _ = example_of(Itself(), images, study, "lung", None, torch.device("cpu"))
    assert image.shape == (1, *SIZE)
    assert image[0, 80 - 64, 5] == 5


def test_planes_of_volumes_are_displayed_with_the_front_above_and_the_right_on_the_left():
    plane = np.zeros((3, 2))
    plane[2, 1] = 1  # farthest to the patient's right, farthest to the front
    assert displayed(plane, 0)[0, 0] == 1
    assert displayed(plane, 0).shape == (2, 3)
    assert (displayed(plane, 1) == plane).all()


def test_a_picture_says_that_it_is_not_for_diagnosis():
    made = drawn(np.zeros((8, 8)), [Panel("Grad-CAM", np.eye(8), "share")], ["lung: probability 0.9"], np.eye(8) > 0)
    picture = Image.open(io.BytesIO(made))
    assert picture.format == "PNG"
    assert picture.info["Title"] == NOT_FOR_DIAGNOSIS


@pytest.fixture
def image(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 400, (40, 40, 2)).astype(np.int16)
    path = tmp_path / "Doe_Jane.nii.gz"
    path.write_bytes(nifti(voxels, np.diag([-1.0, -1.0, 1.0, 1.0])))
    return path


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two rounds."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "study.json").write_bytes(canonical(LUNGS))
    for number in (0, 1):
        save_arrays(folder / f"round-{number:04d}.safetensors", nets.initial_weights(replace(LUNGS, seed=number)))
    return folder


def test_a_hospital_draws_maps_that_name_no_file_and_are_its_owner_s_alone(tmp_path, image, run):
    out = tmp_path / "out"
    words = ["explain", str(run), str(image), "-o", str(out), "--method", "grad-cam", "--rounds", "2", "--json"]
    done = CliRunner().invoke(fedclient.cli.app, words)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    (line,) = told["explained"]
    assert line["uncertainty"] == "ensemble of 2 rounds"
    assert told["model_sha256"] == Trained(LUNGS, (run / "round-0001.safetensors",)).sha256
    assert b"Doe" not in (out / "explanations.json").read_bytes()
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == ([line["file"]] if line["file"] else [])
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in out.iterdir())


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "cuda:", "cuda:-1"])
def test_a_device_that_is_not_there_is_told_in_words(device, tmp_path, image, run):
    words = ["explain", str(run), str(image), "-o", str(tmp_path / "out"), "--device", device]
    done = CliRunner().invoke(fedclient.cli.app, words)
    assert done.exit_code == 1
    assert f"--device {device}: PyTorch sees {gpus()} GPUs here. Give cpu or cuda:N." in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_a_picture_in_colour_is_explained_as_it_is_trained_on(tmp_path):
    study = replace(PRESENCE, modality="photo", channels=("red", "green", "blue"),
                    preprocess=Preprocess(size=SIZE, intensity="percentile"))  # fmt: skip
    picture = tmp_path / "spot.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)).save(picture)
    case = Case("0" * 16, "", (Channel("", (picture,)),), None, "train", facts={"label": "nodule"})
    write_case(tmp_path / "cached", case, study, lambda size: None)
    trained = open_case(tmp_path / "cached", case.key)
    assert trained is not None
    pictured = read_pictured([picture], study)
    np.testing.assert_allclose(pictured.images, trained.images, atol=2e-3)
    assert np.abs(pictured.images[0, 0] - pictured.images[0, 2]).max() > 1
    with pytest.raises(StudyInvalid, match=r"3 files for one image; .* as one picture in colour"):
        read_pictured([picture] * 3, study)


def test_weights_alone_need_a_study_and_a_run_has_its_own(run):
    weights = run / "round-0001.safetensors"
    with pytest.raises(StudyInvalid, match="Name the study with --study"):
        model_at(weights)
    planned = run.parent / "fed.toml"
    planned.write_text('name = "fed"\nplan = "federated"\n')
    with pytest.raises(StudyInvalid, match="comes from its plan, and weights alone do not hold it"):
        model_at(weights, str(planned))
    with pytest.raises(StudyInvalid, match="Leave --study out"):
        model_at(run, "lung-ct")
    with pytest.raises(StateInvalid, match="neither a weights file nor the folder of a run"):
        model_at(run.parent)
    assert model_at(run).files[0] == weights
    assert canonical_json(model_at(run).study.name) == b'"lungs"'


def test_what_a_finished_run_has_left_at_a_site_is_a_model(tmp_path):
    keep_final(tmp_path, LUNGS, nets.initial_weights(LUNGS))
    assert model_at(tmp_path) == Trained(LUNGS, (tmp_path / "final.safetensors",))


@pytest.mark.parametrize(
    "study",
    [
        Study("bags", task=Task(kind="classification"), model=Model("attention-mil", features=(8, 4, 4), norm="none")),
        load_study("brca-prognosis"),
    ],
    ids=["bags", "table"],
)
def test_where_a_network_sees_no_image_nobody_is_told_to_export_one(tmp_path, study):
    np.save(tmp_path / "tiles.npy", np.ones((3, 8), np.float32))
    with pytest.raises(ExplanationFailed, match="and no image, so there is no map of one to draw"):
        read_pictured([tmp_path / "tiles.npy"], study)
