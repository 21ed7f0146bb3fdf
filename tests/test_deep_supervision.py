"""Deep supervision: lower levels of a network answer while it trains, and no other time."""

import copy

import pytest
import torch

from fedclient.training.depth import rates_of
from shared_models import nets
from shared_models.errors import StudyInvalid
from shared_models.model_table import Level
from shared_models.parse import parse
from shared_models.study import Model, Preprocess, Study, Task, Transfer
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.detection import centre_loss
from shared_models.tasks.segmentation import dice_bce

LEVELS = (Level(8, (1, 1), (3, 3)), *(Level(8, (2, 2), (3, 3)) for _ in range(3)))
LUNG, NODULE = Task(loss="dice_bce"), Task("detection", ("nodule",), "centre")


def study(supervised: int, task: Task = LUNG) -> Study:
    model = Model("dynunet", features=Model().features, levels=LEVELS, supervised=supervised)
    return Study("deep", task=task, model=model, preprocess=Preprocess((16, 16)))


def test_lower_levels_answer_in_training_alone():
    net, images = nets.network(study(2)), torch.rand(2, 1, 16, 16)
    assert net.train()(images).shape == (2, 3, 1, 16, 16)
    assert net.eval()(images).shape == (2, 1, 16, 16)


def test_each_level_counts_half_of_the_one_above():
    logits, masks = torch.randn(2, 3, 1, 8, 8), torch.randint(0, 2, (2, 8, 8), dtype=torch.uint8)
    one, two, three = (dice_bce(level, masks) for level in logits.unbind(1))
    loss = functions_of(LUNG).loss
    torch.testing.assert_close(loss(logits, masks), (one + two / 2 + three / 4) / 1.75)
    torch.testing.assert_close(loss(logits[:, 0], masks), one)


def test_lesions_are_learnt_at_lower_levels_too():
    logits, lesions = torch.randn(2, 2, 3, 8, 8), torch.tensor([[[1.0, 4, 4, 2, 2]]] * 2)
    one, two = (centre_loss(level, lesions, 1) for level in logits.unbind(1))
    torch.testing.assert_close(functions_of(NODULE).loss(logits, lesions), (one + two / 2) / 1.5)


def test_a_network_can_be_copied_between_steps():
    net = nets.network(study(1)).train()
    net(torch.rand(1, 1, 16, 16)).sum().backward()
    copied = copy.deepcopy(net).eval()
    assert torch.equal(copied(torch.ones(1, 1, 16, 16)), net.eval()(torch.ones(1, 1, 16, 16)))


def test_the_head_is_that_of_the_answer():
    assert all(name.startswith("output_block.") for name in nets.head_names(nets.network(study(2))))


def test_rounds_of_the_head_alone_train_the_layer_that_answers():
    net = nets.network(study(2))
    rates = rates_of(net, Transfer("0" * 64, head_rounds=1, rate_decay=0.5), 1)
    assert rates is not None
    trained = {name for name, rate in rates.items() if rate}
    assert nets.head_names(net) <= trained
    assert all(rates[name] == 1 for name in trained)
    assert {name.partition(".")[0] for name in trained} == {"output_block", "deep_supervision_heads"}


def test_weights_go_in_as_they_came_out():
    here, there = nets.network(study(2)), nets.network(study(2, NODULE))
    assert any(name.startswith("deep_supervision_heads.") for name in nets.arrays_of(here))
    again = nets.network(study(2))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    nets.load_arrays(again, nets.arrays_of(here))
    assert nets.schema(again) == nets.schema(here) != nets.schema(there)
    torch.testing.assert_close(again.eval()(torch.ones(1, 1, 16, 16)), here.eval()(torch.ones(1, 1, 16, 16)))


def test_all_levels_of_an_untrained_detector_find_hardly_anything():
    heat = nets.network(study(2, NODULE)).train()(torch.rand(1, 1, 16, 16))[:, :, 0].sigmoid()
    assert heat.mean(dim=(0, 2, 3)).max() < 0.1


def test_more_levels_than_there_are_are_refused_and_so_is_another_network():
    table = {"name": "dynunet", "levels": [{"features": 8, "stride": [s, s], "kernel": [3, 3]} for s in (1, 2, 2, 2)]}
    with pytest.raises(StudyInvalid, match="supervised = 3: 4 levels have 2"):
        parse(Model, {**table, "supervised": 3}, "here")
    with pytest.raises(StudyInvalid, match='supervised is not an argument of name = "unet"'):
        parse(Model, {"supervised": 1}, "here")
