"""FLamby's data sets in its layout: sites and splits by its tables, colours, bags of features, and a round on each."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedclient.data.bags import MOST_TILES, padded_bags, read_bag
from fedclient.data.cases import Case, Channel, Mask, Shown, read_case, read_case_labels
from fedclient.data.layouts.flamby import KEPT
from fedclient.data.listing import list_cases, sites_in
from fedclient.data.pictures import read_colours, read_picture
from fedclient.data.where import Where
from fedclient.gate.facts import needs_of
from fedclient.gate.inspect import look_at
from shared_models.errors import ImageUnreadable, ManifestInvalid, StudyInvalid
from shared_models.mil import AttentionMil
from shared_models.parse import parse
from shared_models.study import Model, Preprocess, Study, Task, load_study
from shared_models.tasks.chosen import functions_of
from simulations.fixtures import write_flamby

COLOUR = Study(
    name="skin",
    modality="photo",
    channels=("red", "green", "blue"),
    task=Task(kind="classification", labels=("a", "b"), loss="focal"),
    model=Model(name="resnet18"),
    preprocess=Preprocess(size=(32, 32), intensity="zscore"),
)
BAGS = Study(
    name="bags",
    modality="photo",
    task=Task(kind="classification", labels=("tumour",), none="normal"),
    model=Model(name="attention-mil", features=(8, 4, 4), norm="none"),
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flamby")
    for name in KEPT:
        write_flamby(root / name, name)
    return root


# Layouts


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("fed-ixi", ("guys", "hh", "iop")),
        ("fed-kits19", tuple(f"site-{n}" for n in range(6))),
        ("fed-isic2019", ("bcn", "msk", "rosendahl", "vidir-modern", "vidir-molemax", "vienna-dias")),
        ("fed-camelyon16", ("rumc", "umcu")),
    ],
)
def test_sites_and_splits_are_those_of_the_table(sets, name, sites):
    assert sites_in(Where(sets / name)) == sites
    for site in sites:
        listing = list_cases(Where(sets / name, sites=(site,)), "salt")
        assert Counter(case.split for case in listing.cases) == {"train": 2, "test": 1}
        untold = [("PATIENT_UNKNOWN", "warn")] if name == "fed-isic2019" else []
        assert [(each.code, each.severity) for each in listing.findings] == untold
    together = list_cases(Where(sets / name, sites=sites), "salt").cases
    assert len({case.key for case in together}) == 3 * len(sites)


def test_one_site_of_several_must_be_chosen(sets):
    with pytest.raises(ManifestInvalid, match="holds the sites guys, hh, iop"):
        list_cases(Where(sets / "fed-ixi"), "salt")


def test_masks_and_classes_are_called_by_the_studies_labels(sets):
    def first(name: str, site: str) -> Case:
        return list_cases(Where(sets / name, sites=(site,)), "salt").cases[0]

    ixi, kits = first("fed-ixi", "hh"), first("fed-kits19", "site-0")
    assert isinstance(ixi.label, Mask)
    volume = read_case(ixi)
    brain = read_case_labels(ixi, volume, load_study("fed-ixi").task.labels)
    np.testing.assert_array_equal(brain, volume.voxels[0] > 0)
    kidneys = read_case_labels(kits, read_case(kits), load_study("fed-kits19").task.labels)
    assert set(np.unique(kidneys)) == {0, 1, 2}
    shown = [case.label for case in list_cases(Where(sets / "fed-isic2019", sites=("bcn",)), "salt").cases]
    assert {label.names for label in shown if isinstance(label, Shown)} == {("mel",), ("nv",), ("bcc",)}
    slides = {
        case.patient: case.label for case in list_cases(Where(sets / "fed-camelyon16", sites=("rumc",)), "s").cases
    }
    assert slides["tumor_001.tif"] == Shown(("tumour",))
    assert slides["normal_000.tif"] == Shown(())


def test_cases_that_are_not_there_are_told_and_left_out_and_none_at_all_is_refused(tmp_path):
    folder = write_flamby(tmp_path, "fed-camelyon16", 2, 1)
    bags = sorted(folder.glob("*.npy"))
    bags[0].unlink()
    listing = list_cases(Where(folder, sites=("rumc", "umcu")), "salt")
    assert len(listing.cases) == 5
    assert sum(f.what == "metadata.csv names 3 cases, 2 are there" for f in listing.findings) <= 1
    assert [f.code for f in listing.findings] == ["FILE_MISSING"]
    for bag in bags[1:]:
        bag.unlink()
    with pytest.raises(ManifestInvalid, match=r"none of the \d cases of metadata.csv is there; the first should be"):
        list_cases(Where(folder, layout="fed-camelyon16", sites=("rumc", "umcu")), "salt")


def test_a_table_that_says_nonsense_is_refused_by_its_row(tmp_path):
    folder = write_flamby(tmp_path, "fed-isic2019", 1, 1)
    table = folder / "train_test_split"
    table.write_text(table.read_text().replace(",train,", ",tarin,", 1))
    with pytest.raises(ManifestInvalid, match="row 2: `fold` is neither train nor test"):
        list_cases(Where(folder, sites=("bcn",)), "salt")


# Colours


def picture(path: Path, mode: str = "RGB") -> Path:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 1], pixels[3, 5] = (200, 100, 50), (1, 2, 3)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_colours_are_read_as_the_channels_that_the_study_names(tmp_path):
    path = picture(tmp_path / "a.png")
    volume = read_colours(path, ("blue", "red"))
    assert volume.voxels.shape == (2, 4, 6, 1)
    assert volume.voxels[:, 0, 1, 0].tolist() == [50, 200]
    assert volume.voxels[:, 3, 5, 0].tolist() == [3, 1]
    case = Case("k", "p", (Channel(files=(path,)),), None, "train")
    np.testing.assert_array_equal(read_case(case, ("blue", "red")).voxels, volume.voxels)
    assert read_case(case).voxels.shape == (1, 4, 6, 1), "nobody asked for colours"


def test_a_grey_picture_is_alike_in_all_colours_and_one_of_16_bits_is_refused(tmp_path):
    volume = read_colours(picture(tmp_path / "a.png", "L"), ("red", "green", "blue"))
    np.testing.assert_array_equal(volume.voxels[0], volume.voxels[2])
    np.testing.assert_array_equal(volume.voxels[:1], read_picture(tmp_path / "a.png").voxels)
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(ImageUnreadable, match="more than 8 bits"):
        read_colours(tmp_path / "b.png", ("red",))


def test_a_case_of_named_channels_is_no_picture_in_colour(tmp_path):
    path = picture(tmp_path / "a.png")
    case = Case("k", "p", (Channel("t1", (path,)),), None, "train")
    with pytest.raises(ImageUnreadable, match="the study wants the channels red, the case has t1"):
        read_case(case, ("red",))


def test_the_gate_minds_colour_only_where_it_would_be_lost(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    case = Case("k", "p", (Channel(files=(tmp_path / "a.png",)),), Shown(("a",)), "train")
    grey = Study(name="x", modality="xray", task=COLOUR.task, model=COLOUR.model, preprocess=COLOUR.preprocess)
    found = {study.name: look_at(case, tmp_path, needs_of(study), "s").findings for study in (grey, COLOUR)}
    assert "the picture is in colour, and is read as grey." in {f.what for f in found["x"]}
    assert not {f.what for f in found["skin"] if f.code == "MODALITY_MISMATCH"}


# Bags


def bag_case(path: Path, bag: np.ndarray) -> Case:
    np.save(path, bag)
    return Case("k", "p", (Channel(files=(path,)),), Shown(("tumour",)), "train")


def test_a_bag_keeps_its_tiles_and_leaves_out_rows_that_are_none(tmp_path):
    bag = np.arange(12, dtype=np.float32).reshape(3, 4)
    bag[1] = 0
    found = read_bag(bag_case(tmp_path / "a.npy", bag), 4)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, bag[[0, 2]])


def test_of_a_bag_that_is_too_large_tiles_are_taken_evenly(tmp_path):
    bag = np.repeat(np.arange(1, 2 * MOST_TILES + 1, dtype=np.float32)[:, None], 2, axis=1) % 1000 + 1
    found = read_bag(bag_case(tmp_path / "a.npy", bag))
    assert len(found) == MOST_TILES
    assert (found[0, 0], found[-1, 0]) == (bag[0, 0], bag[-1, 0])


@pytest.mark.parametrize(
    ("bag", "code"),
    [
        (np.ones((3, 5), np.float32), "MODALITY_MISMATCH"),
        (np.ones((3, 4, 1), np.float32), "MODALITY_MISMATCH"),
        (np.ones((3, 4), np.int64), "MODALITY_MISMATCH"),
        (np.ones((0, 4), np.float32), "MODALITY_MISMATCH"),
        (np.full((3, 4), np.nan, np.float32), "INTENSITY_INVALID"),
        (np.full((3, 4), 1e6, np.float32), "INTENSITY_INVALID"),
        (np.zeros((3, 4), np.float32), "INTENSITY_INVALID"),
    ],
)
def test_a_bag_that_cannot_be_used_is_refused_by_its_code(tmp_path, bag, code):
    with pytest.raises(ImageUnreadable) as e:
        read_bag(bag_case(tmp_path / "a.npy", bag), 4)
    assert e.value.code == code


def test_a_file_of_objects_is_refused_before_anything_of_it_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    np.save(tmp_path / "a.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "c.npy").write_bytes(b"")
    for name in "abc":
        case = Case("k", "p", (Channel(files=(tmp_path / f"{name}.npy",)),), None, "train")
        with pytest.raises(ImageUnreadable):
            read_bag(case)
    assert not (tmp_path / "sprung").exists()


def test_bags_of_unlike_length_are_filled_up_and_the_answer_does_not_see_it():
    torch.manual_seed(0)
    net = AttentionMil(4, 3, 2, 2).eval()
    rng = np.random.default_rng(0)
    bags = [rng.normal(0, 1, (1, n, 4)).astype(np.float16) for n in (3, 7)]
    together = padded_bags(bags)
    assert together.shape == (2, 1, 7, 4)
    with torch.inference_mode():
        answers = net(torch.from_numpy(together).float())
        alone = torch.cat([net(torch.from_numpy(bag[None]).float()) for bag in bags])
        turned = net(torch.from_numpy(np.ascontiguousarray(together[:, :, ::-1])).float())
    torch.testing.assert_close(answers, alone)
    torch.testing.assert_close(answers, turned)


def test_attention_is_the_gated_one_of_its_paper():
    """With one feature and hand-set weights: shares are a softmax of w tanh(v h) sigmoid(u h)."""
    net = AttentionMil(1, 1, 1, 1).eval()
    with torch.no_grad():
        for layer, weight in ((net.embed, 1.0), (net.value, 0.5), (net.gate, 2.0), (net.score, 3.0)):
            layer.weight.fill_(weight)
            layer.bias.zero_()
    seen = []
    net.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tiles = torch.tensor([1.0, 2.0])
    with torch.inference_mode():
        net(tiles.reshape(1, 1, 2, 1))
    scores = 3 * torch.tanh(0.5 * tiles) * torch.sigmoid(2 * tiles)
    expected = float((torch.softmax(scores, 0) * tiles).sum())
    assert float(seen[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": {"kind": "prognosis", "labels": ["death"], "loss": "hazard", "intervals_days": [1.0, 2.0]}},
         'it needs task.kind = "classification"'),
        ({"model": {"name": "attention-mil", "features": [8], "norm": "none"}}, "must be 3 numbers"),
        ({"model": {"name": "attention-mil", "features": [8, 4, 4]}}, 'has no norm; say norm = "none"'),
        ({"channels": ["red"]}, "augment and channels are for images"),
    ],
)  # fmt: skip
def test_a_study_of_bags_says_what_it_cannot_have(change, words):
    bags = {"name": "b", "modality": "photo", "task": {"kind": "classification", "labels": ["t"]},
            "model": {"name": "attention-mil", "features": [8, 4, 4], "norm": "none"}}  # fmt: skip
    assert parse(Study, bags, "b").of_bags
    with pytest.raises(StudyInvalid, match=words):
        parse(Study, bags | change, "b")


def test_the_gate_reads_a_bag_as_training_does(tmp_path):
    case = bag_case(tmp_path / "a.npy", np.ones((3, 8), np.float32))
    looked = look_at(case, tmp_path, needs_of(BAGS), "s")
    assert looked.facts is not None
    assert looked.facts.shown == ("tumour",)
    assert not [f for f in looked.findings if f.severity == "block"]
    narrow = bag_case(tmp_path / "b.npy", np.ones((3, 4), np.float32))
    assert "MODALITY_MISMATCH" in {f.code for f in look_at(narrow, tmp_path, needs_of(BAGS), "s").findings}
    assert "MODALITY_MISMATCH" in {f.code for f in look_at(case, tmp_path, needs_of(COLOUR), "s").findings}


# The loss of Fed-ISIC2019


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 2.0])
def test_the_focal_loss_of_who_is_wholly_sure_moves_nothing(gamma):
    """1 - p is 0 there, and the derivative of its square root infinite."""
    task = Task(kind="classification", labels=("a", "b"), loss="focal", focal_gamma=gamma)
    logits = torch.tensor([[200.0, -5.0], [0.0, 0.5]], requires_grad=True)
    loss = functions_of(task).loss(logits, torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8))
    loss.backward()
    grad = logits.grad
    assert loss.isfinite()
    assert grad is not None
    assert grad[0].tolist() == [0.0, 0.0]
    assert grad[1].isfinite().all()
    assert grad[1, 1] < 0


def test_the_weighted_focal_loss_is_that_of_hand():
    """Probabilities 3/4 and 1/2 of the right class: -w (1 - p)^2 ln p, mean of the two."""
    task = Task(kind="classification", labels=("a", "b"), loss="focal", class_weights=(2.0, 5.0))
    logits, truth = torch.tensor([[np.log(3.0), 0.0], [0.0, 0.0]]), torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8)
    expected = (2 * 0.25**2 * -np.log(0.75) + 5 * 0.5**2 * np.log(2)) / 2
    assert float(functions_of(task).loss(logits, truth)) == pytest.approx(expected, rel=1e-6)
    plain = Task(kind="classification", labels=("a", "b"), loss="focal", focal_gamma=0.0)
    ce = Task(kind="classification", labels=("a", "b"), loss="ce")
    assert float(functions_of(plain).loss(logits, truth)) == pytest.approx(float(functions_of(ce).loss(logits, truth)))
    assert task.exclusive
