"""Losses against their closed forms, answers of whole cases, and what a case's table says of its classes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fedclient.data.cases import Case, Shown
from fedclient.data.truths import classes_of, has_truth
from fedclient.site import open_site
from fedclient.training.learner import ImageLearner
from shared_models import nets
from shared_models.class_counts import ClassCounts
from shared_models.errors import ImageUnreadable
from shared_models.study import Evaluate, Model, Personal, Preprocess, Rounds, Study, Task, Train
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.functions import CaseAnswer
from simulations.run import machine, node_configs, simulate

BINARY = Task(kind="classification", labels=("malign",), none="benign", column="diagnosis")
MANY = Task(kind="classification", labels=("effusion", "nodule"))
ONE_OF = Task(kind="classification", labels=("benign", "malign"), loss="ce")


def case(shown: Shown | None = None, structures: dict[str, str] | None = None, **facts: str) -> Case:
    return Case("k", "p", (), shown, "train", 1, structures or {}, facts)


def test_binary_cross_entropy_weighs_positives_by_their_class():
    loss = functions_of(Task(kind="classification", labels=("a", "b"), class_weights=(3.0, 1.0))).loss
    logits, truth = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1, 0]], dtype=torch.uint8)
    assert float(loss(logits, truth)) == pytest.approx((3 * math.log(2) - math.log(1 - 0.75)) / 2)


def test_cross_entropy_weighs_each_example_by_its_class():
    task = Task(kind="classification", labels=("a", "b"), loss="ce", class_weights=(2.0, 5.0))
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    truth = torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8)
    expected = (2 * -math.log(0.75) + 5 * math.log(2)) / 2
    assert float(functions_of(task).loss(logits, truth)) == pytest.approx(expected)


def test_a_case_of_many_planes_is_answered_by_their_mean():
    planes = CaseAnswer(np.array([[0.9], [0.1], [0.8]], np.float32), np.ones((3, 1), np.uint8))
    plane = CaseAnswer(np.array([[0.3]], np.float32), np.zeros((1, 1), np.uint8))
    found = functions_of(BINARY).scores([planes, plane], 0.5, 1)["malign"]
    assert isinstance(found, ClassCounts)
    assert (found.positives, found.negatives, found.true_positives, found.false_positives) == (1, 1, 1, 0)
    assert found.square_micro == pytest.approx((0.4**2 + 0.3**2) * 1e6, abs=2)


def test_of_labels_that_exclude_each_other_the_most_probable_is_called():
    answer = CaseAnswer(np.array([[0.2, 0.45, 0.35]], np.float32), np.array([[0, 0, 1]], np.uint8))
    found = functions_of(Task(kind="classification", labels=("a", "b", "c"), loss="ce")).scores([answer], 0.5, 1)
    counts = [score for score in found.values() if isinstance(score, ClassCounts)]
    assert [(c.true_positives, c.false_positives) for c in counts] == [(0, 0), (0, 1), (0, 0)]


def test_no_case_has_no_counts():
    assert functions_of(MANY).scores([], 0.5, 1) == {"effusion": ClassCounts(), "nodule": ClassCounts()}


@pytest.mark.parametrize(
    ("task", "of", "expected"),
    [
        (BINARY, case(diagnosis="Malign"), [1]),
        (BINARY, case(diagnosis="Benign"), [0]),
        (MANY, case(label="nodule|effusion"), [1, 1]),
        (MANY, case(label="none"), [0, 0]),
        (MANY, case(Shown(("nodule",))), [0, 1]),
        (MANY, case(Shown(()), None), [0, 0]),
        (MANY, case(Shown(("nodule", "hernia"), asked=("nodule", "effusion", "hernia"))), [0, 1]),
        (MANY, case(label="Pleural fluid", structures={"pleural fluid": "effusion"}), [1, 0]),
        (ONE_OF, case(label="malign"), [0, 1]),
    ],
)
def test_classes_come_from_the_table_by_name(task, of, expected):
    assert has_truth(of, task)
    assert classes_of(of, task).tolist() == expected


@pytest.mark.parametrize(
    ("task", "of", "code", "words"),
    [
        (MANY, case(label="nodule|hernia"), "LABEL_VALUES", "hold 1 that the study does not know"),
        (MANY, case(other="nodule"), "LABEL_MISSING", "`label` is not in its table"),
        (MANY, case(Shown(("nodule",), asked=("nodule",))), "LABEL_MISSING", "nobody looked"),
        (ONE_OF, case(label="malign|benign"), "LABEL_VALUES", "exactly one"),
        (ONE_OF, case(label="none"), "LABEL_VALUES", "exactly one"),
    ],
)
def test_what_a_table_does_not_say_is_refused_without_its_words(task, of, code, words):
    with pytest.raises(ImageUnreadable, match=words) as refused:
        classes_of(of, task)
    assert refused.value.code == code
    assert "hernia" not in str(refused.value)


# End to end, on pictures that a table labels


def picture_folder(folder: Path) -> Path:
    """Two sites of 32x32 pictures, bright in the middle where `label` says spot."""
    rng = np.random.default_rng(0)
    rows = ["site,patient_id,image,label,split"]
    for site in ("north", "south"):
        for n in range(16):
            picture = rng.integers(0, 60, (32, 32)).astype(np.uint8)
            if n % 2:
                picture[10:22, 10:22] += 150
            Image.fromarray(picture).save(folder / f"{site}-{n}.png")
            split = "test" if n >= 12 else "val" if n >= 10 else "train"
            rows.append(f"{site},{site}{n},{site}-{n}.png,{'spot' if n % 2 else 'none'},{split}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def small(model: Model, in_channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 5, 2), nn.ReLU(), nn.AdaptiveMaxPool2d(1),
        nn.Flatten(), nn.Linear(8, outputs),
    )  # fmt: skip


def test_a_classification_learns_and_its_results_have_the_shape_of_every_task(tmp_path, monkeypatch):
    monkeypatch.setitem(nets.MAKERS, "resnet18", small)  # 11 M parameters take their time on a busy machine
    study = Study(
        name="spots",
        modality="xray",
        task=Task(kind="classification", labels=("spot",)),
        model=Model(name="resnet18"),
        preprocess=Preprocess(size=(32, 32), intensity="percentile"),
        train=Train(local_steps=20, batch_size=8, learning_rate=5e-3, deterministic=True),
        rounds=Rounds(count=2, gather_s=1),
        evaluate=Evaluate(every=1),
    )
    how = machine("local", 0, 1, "cpu")
    nodes = node_configs(tmp_path / "out", [picture_folder(tmp_path)], how, None)
    found = simulate(study, nodes, tmp_path / "out", how, 1, False, lambda _: None)
    assert found["measure"] == "AUROC"
    seed = found["seeds"][0]
    assert (seed["seed"], seed["local"], seed["pooled"]) == (0, {}, {})
    assert set(seed["federated"]) == {"north", "south"}
    assert min(seed["federated"].values()) > 0.9
    page = Path(found["report"]).read_text()
    assert "balanced accuracy" in page
    assert "ResNet-18 in 2-D that tells apart spot" in page


@pytest.mark.usefixtures("settings_of_torch")
def test_batch_norm_at_the_smallest_size_trains_though_one_example_is_left_for_the_last_batch(tmp_path):
    study = Study(
        name="spots",
        modality="xray",
        task=Task(kind="classification", labels=("spot",)),
        model=Model(name="resnet18", norm="batch"),
        preprocess=Preprocess(size=(32, 32), intensity="percentile"),
        train=Train(batch_size=9, deterministic=True),
        personal=Personal(keep=("norm",)),
    )
    nodes = node_configs(tmp_path, [picture_folder(tmp_path)], machine("local", 0, 1, "cpu"), None)
    learned = ImageLearner().learn(open_site(nodes["north"]), study, 1, nets.initial_weights(study))
    assert (learned.examples, learned.steps) == (10, study.train.steps(10)), "as the coordinator expects"
