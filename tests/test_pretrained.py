"""Published networks by count and name, weights from a file, and how far they may move."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from fedclient.data.dataset import Batch
from fedclient.training.depth import rates_of
from fedclient.training.trainer import fit
from shared_models import nets
from shared_models.errors import OrderRefused, StudyInvalid
from shared_models.files import file_sha256
from shared_models.model_table import ENCODERS
from shared_models.pretrained import adopt, first_weights
from shared_models.size import size_in_words
from shared_models.study import Model, Preprocess, Study, Task, Train, Transfer
from shared_models.tasks.chosen import functions_of
from shared_models.weights import Arrays, Spec, schema_of

STUDY = Study(
    name="t",
    modality="xray",
    task=Task(kind="classification", labels=("nodule",)),
    model=Model(name="resnet18"),
    preprocess=Preprocess(size=(32, 32), intensity="percentile"),
)
PUBLISHED = {  # parameters with 3 channels and ImageNet's 1000 classes, as torchvision's documentation has them
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "vgg11": 132_863_336,
    "vgg13": 133_047_848, "vgg16": 138_357_544, "vgg19": 143_667_240, "densenet121": 7_978_856,
    "efficientnet-b0": 5_288_548,
}  # fmt: skip


def published(name: str) -> Model:
    """As it was published, but for the kind of its norms."""
    return Model(name=name, norm="none", head="full") if name.startswith("vgg") else Model(name=name)  # type: ignore[arg-type]


def as_published(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return nets.MAKERS[name](published(name), 3, 1000)


def resnet_names(counts: tuple[int, ...], convolutions: int, first_downsamples: bool) -> set[str]:
    """torchvision's names, spelt out; batch statistics left out."""
    names = {"conv1.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"}
    for layer, blocks in enumerate(counts, start=1):
        for block in range(blocks):
            for n in range(1, convolutions + 1):
                at = f"layer{layer}.{block}"
                names |= {f"{at}.conv{n}.weight", f"{at}.bn{n}.weight", f"{at}.bn{n}.bias"}
            if block == 0 and (layer > 1 or first_downsamples):
                names |= {f"{at}.downsample.0.weight", f"{at}.downsample.1.weight", f"{at}.downsample.1.bias"}
    return names


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_are_as_many_as_were_published(name):
    assert sum(p.numel() for p in as_published(name).parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("resnet18", resnet_names((2, 2, 2, 2), 2, False)),
        ("resnet50", resnet_names((3, 4, 6, 3), 3, True)),
        (
            "vgg16",
            {
                f"features.{n}.{of}"
                for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
                for of in ("weight", "bias")
            }
            | {f"classifier.{n}.{of}" for n in (0, 3, 6) for of in ("weight", "bias")},
        ),
    ],
)
def test_tensors_have_torchvisions_names(name, names):
    assert {n for n, _ in as_published(name).named_parameters()} == names
    # and the swap of norms changes neither names nor shapes
    if name == "resnet18":
        assert {n for n, _ in nets.network(STUDY).named_parameters()} == names


def test_a_narrow_resnet_has_the_same_tensors_with_fewer_channels():
    wide, narrow = (nets.network(replace(STUDY, model=Model(name="resnet18", width=w))).state_dict() for w in (64, 8))
    assert wide.keys() == narrow.keys()
    assert [tuple(narrow[n].shape) for n in ("conv1.weight", "layer1.0.conv1.weight", "layer4.1.conv2.weight")] == [
        (8, 1, 7, 7), (8, 8, 3, 3), (64, 64, 3, 3),
    ]  # fmt: skip
    assert narrow["fc.weight"].shape == (1, 64)


def test_a_width_is_of_a_resnet_alone():
    with pytest.raises(ValueError, match='width is not an argument of name = "unet"'):
        Model(width=16)


@pytest.mark.parametrize("norm", ["group", "instance"])
@pytest.mark.parametrize("name", ENCODERS)
def test_no_batch_norm_is_left_in_any_encoder(name, norm):
    model = Model(name=name, norm=norm)
    with torch.device("meta"):
        net = nets.MAKERS[name](model, 1, 1)
        nets._without_batch_norm(net, model)
    assert not [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert not list(net.buffers())


# From a file


def torchvision_file(folder: Path, kind: str = "pth", outputs: int = 1000) -> Path:
    """A ResNet-18 as torchvision saves it, batch statistics and all."""
    net = nets.MAKERS["resnet18"](STUDY.model, 3, outputs)
    held = {n: torch.full_like(t, 0.5) if t.is_floating_point() else t for n, t in net.state_dict().items()}
    file = folder / f"resnet18.{kind}"
    if kind == "pth":
        torch.save(held, file)
    else:
        save_file({n: t.numpy() for n, t in held.items()}, file)
    return file


def pinned(file: Path, **more: float) -> Study:
    return replace(STUDY, transfer=Transfer(sha256=file_sha256(file), **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_in_torchvisions_layout_loads_with_nothing_missing(tmp_path, kind):
    file = torchvision_file(tmp_path, kind)
    weights, words = first_weights(pinned(file), file)
    assert "60 of 62 tensors loaded; missing: none; of another shape: fc.weight, fc.bias" in words
    assert "not in this network: none" in words
    initial = nets.initial_weights(STUDY)
    assert (weights["layer4.1.conv2.weight"] == 0.5).all()
    assert (weights["fc.weight"] == initial["fc.weight"]).all()
    assert (weights["conv1.weight"] == 1.5).all()  # three channels summed into one
    assert schema_of(weights) == schema_of(initial)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_of_another_precision_and_of_several_gpus_loads_as_float32(tmp_path, kind, dtype):
    """Whose names begin with `module.`, as DataParallel has them."""
    net = nets.MAKERS["resnet18"](STUDY.model, 1, 1).to(dtype)
    file = tmp_path / f"weights.{kind}"
    (torch.save if kind == "pth" else save_torch)({f"module.{n}": p.data for n, p in net.named_parameters()}, file)
    weights, words = first_weights(pinned(file), file)
    assert words.startswith("pretrained weights: 62 of 62 tensors loaded")
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(weights["fc.weight"], net.fc.weight.detach().float().numpy())  # type: ignore[union-attr, operator]


def test_one_picture_in_any_number_of_channels_is_answered_alike():
    rng = np.random.default_rng(0)
    rgb = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    picture = torch.rand(1, 1, 8, 8)
    expected = torch.conv2d(picture.expand(1, 3, 8, 8), torch.from_numpy(rgb))
    for channels in (1, 2, 4):
        fitted = adopt({"w": rgb}, {"w": np.zeros((4, channels, 3, 3), np.float32)})
        answer = torch.conv2d(picture.expand(1, channels, 8, 8), torch.from_numpy(np.array(fitted.weights["w"])))
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)


def test_densenets_layers_are_found_under_torchvisions_names():
    net = nets.MAKERS["densenet121"](Model(name="densenet121"), 1, 2)
    initial: Arrays = {n: p.detach().numpy() for n, p in net.named_parameters()}
    theirs = {n.replace(".layers.", ".").replace("class_layers.out.", "classifier."): a for n, a in initial.items()}
    assert any("denselayer1.norm1" in name for name in theirs)
    found = adopt(theirs, initial)
    assert (found.missing, found.mismatched, found.strange) == ((), (), ())


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "Give its path with --weights"),
        (lambda folder: folder / "nowhere.pth", "there is no such file"),
        (lambda folder: torchvision_file(folder, outputs=7), "the study wants"),
    ],
)
def test_another_file_than_the_study_pins_is_refused(tmp_path, make, words):
    study = replace(STUDY, transfer=Transfer(sha256="0" * 64))
    with pytest.raises(StudyInvalid, match=words):
        first_weights(study, make(tmp_path))
    with pytest.raises(StudyInvalid, match=r"starts from its seed"):
        first_weights(STUDY, tmp_path / "any.pth")


@pytest.mark.parametrize(
    ("held", "words"),
    [(Evil(), "no file of tensors alone"), ([1, 2], "no state_dict"), ({"x": torch.zeros(2)}, "holds no tensor of")],
)
def test_a_file_of_something_else_is_refused_and_not_run(tmp_path, held, words, capsys):
    file = tmp_path / "file.pth"
    torch.save(held, file)
    with pytest.raises(StudyInvalid, match=words):
        first_weights(pinned(file), file)
    renamed = file.rename(tmp_path / "file.safetensors")
    with pytest.raises(StudyInvalid, match=r"file\.safetensors: is no file of tensors alone"):
        first_weights(pinned(renamed), renamed)
    assert capsys.readouterr().out == ""


# How far weights may move


def test_blocks_run_from_the_image_to_the_head():
    listed = nets.blocks(nets.network(STUDY))
    assert len(listed) == 10  # stem, eight residual blocks, head
    assert listed[0] == ("conv1.weight", "bn1.weight", "bn1.bias")
    assert listed[-1] == ("fc.weight", "fc.bias")
    assert [names[0].rpartition(".conv1")[0] for names in listed[1:3]] == ["layer1.0", "layer1.1"]


def test_rates_fall_with_depth_and_are_nothing_where_frozen():
    net = nets.network(STUDY)
    transfer = Transfer(sha256="0" * 64, freeze=1, rate_decay=0.5, head_rounds=2)
    later, first = rates_of(net, transfer, 3), rates_of(net, transfer, 2)
    assert later is not None
    assert first is not None
    assert (later["conv1.weight"], later["layer4.1.conv1.weight"], later["fc.bias"]) == (0.0, 0.5, 1.0)
    assert later["layer1.0.conv1.weight"] == 0.5**8
    assert {name for name, rate in first.items() if rate} == {"fc.weight", "fc.bias"}
    assert rates_of(net, Transfer(), 1) is None
    with pytest.raises(OrderRefused, match="has 10 blocks"):
        rates_of(net, replace(transfer, freeze=10), 3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_what_is_frozen_stays_bit_for_bit(optimizer):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(2, 1)
    )
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    batch = Batch(np.ones((4, 1, 8, 8), np.float32), np.array([[1], [0], [1], [1]], np.uint8))
    rates = {n: 1.0 if n.startswith("3") else 0.0 for n in before}
    train = Train(optimizer=optimizer, weight_decay=0.1, proximal_mu=0.1)
    fit(net, [batch, batch], functions_of(STUDY.task).loss, train, torch.device("cpu"), rates=rates)
    moved = {n for n, p in net.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert moved == {"3.weight", "3.bias"}


def test_the_first_step_of_adam_is_the_rate_of_each_block():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    batch = Batch(np.ones((2, 2), np.float32), np.array([[1], [1]], np.uint8))
    rates = {n: 0.25 if n.startswith("0") else 1.0 for n in before}
    fit(net, [batch], functions_of(STUDY.task).loss, Train(learning_rate=1e-3), torch.device("cpu"), rates=rates)
    steps = {n: float((p.detach() - before[n]).abs().max()) for n, p in net.named_parameters()}
    assert steps["0.weight"] == pytest.approx(0.25e-3, rel=1e-3)
    assert steps["1.bias"] == pytest.approx(1e-3, rel=1e-3)


# What an update weighs


def test_the_size_of_an_update_is_said_with_a_warning_where_the_head_is_the_bulk():
    def schema(name: str) -> dict[str, Spec]:
        return {n: Spec(tuple(p.shape), np.dtype(np.float32)) for n, p in as_published(name).named_parameters()}

    assert size_in_words(schema("resnet18")) == "11.7 M parameters; each site receives and sends 46.8 MB a round"
    words = size_in_words(schema("vgg16"))
    assert words.startswith("138 M parameters; each site receives and sends 553 MB a round. Warning: 89% of that")
    assert "'classifier.0.weight'" in words
    linear = {"0.weight": Spec((3, 4), np.dtype(np.float32))}
    assert size_in_words(linear) == "12 parameters; each site receives and sends 48 B a round"
