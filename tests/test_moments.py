"""Moments that an optimizer carries from round to round: two rounds are as one, and the first is as any."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedclient.training.moments import Moments
from fedclient.training.trainer import fit
from shared_models.errors import StudyInvalid
from shared_models.nets import arrays_of, load_arrays, network
from shared_models.strategy import remembers
from shared_models.study import Strategy, Study, Train, load_study
from shared_models.tasks.segmentation import bce
from shared_models.weights import Arrays, load, save_arrays
from tests.test_trainer import CPU, STUDY, same, toy_batches

ALL = [
    Train(optimizer="adam", learning_rate=1e-2, moments="kept"),
    Train(optimizer="adamw", learning_rate=1e-2, weight_decay=0.1, moments="kept"),
    Train(optimizer="sgd", learning_rate=1e-2, momentum=0.9, moments="kept"),
]
BATCHES = toy_batches(steps=6)


pytestmark = pytest.mark.usefixtures("one_thread")


def rounds(train: Train, lengths: tuple[int, ...], carried: bool, kept: Any = None) -> tuple[Arrays, Arrays]:
    """Weights after rounds of so many steps on the same batches in a row, and what the optimizer left."""
    net, at = network(STUDY), 0
    before: Arrays = {}
    for length in lengths:
        again = network(STUDY)  # as each round has it, from the weights alone
        load_arrays(again, arrays_of(net))
        moments = Moments(before) if carried else None
        fit(again, BATCHES[at : at + length], bce, train, CPU, moments=moments)
        before = moments.left() if moments is not None else {}
        if kept is not None:  # by way of a file, as a site has it
            save_arrays(kept, before)
            before = load(kept)
        net, at = again, at + length
    return arrays_of(net), before


@pytest.mark.parametrize("train", ALL, ids=lambda train: train.optimizer)
def test_two_rounds_with_moments_are_one_round_bit_for_bit(tmp_path, train):
    whole, left = rounds(train, (6,), carried=True)
    parts, of_parts = rounds(train, (2, 4), carried=True, kept=tmp_path / "moments.safetensors")
    assert same(whole, parts)
    assert left.keys() == of_parts.keys()
    assert same(left, of_parts)
    assert not same(whole, rounds(train, (2, 4), carried=False)[0]), "an optimizer that begins anew goes another way"
    assert same(whole, rounds(train, (6,), carried=False)[0]), "the first round is as any"


def test_moments_are_named_by_parameter_and_count_the_steps():
    _, left = rounds(ALL[0], (2, 4), carried=True)
    names = {name for name, _ in network(STUDY).named_parameters()}
    assert left.keys() == {f"{slot}/{name}" for slot in ("step", "exp_avg", "exp_avg_sq") for name in names}
    assert {float(left[f"step/{name}"][0]) for name in names} == {6.0}


def test_a_frozen_parameter_keeps_its_moments_and_a_freed_one_begins_without():
    net = nn.Linear(2, 1)
    frozen = Moments({"exp_avg/weight": np.ones((1, 2), np.float32)})
    net.weight.requires_grad = False
    optimizer = torch.optim.Adam([net.bias], 0.1)
    frozen.take_up(optimizer, dict(net.named_parameters()))
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    left = frozen.left()
    assert left["exp_avg/weight"].tolist() == [[1.0, 1.0]]
    assert left["step/bias"].tolist() == [1.0]
    free = Moments(left)
    net.weight.requires_grad = True
    both = torch.optim.Adam(net.parameters(), 0.1)
    free.take_up(both, dict(net.named_parameters()))
    assert float(both.state[net.bias]["step"]) == 1.0


def test_an_optimizer_without_moments_has_none_to_keep():
    with pytest.raises(ValueError, match=r'train\.moments = "kept" with train\.optimizer = "sgd" and momentum = 0'):
        replace(STUDY, train=replace(ALL[2], momentum=0.0))


def test_a_study_with_moments_needs_memory_and_none_that_hides_its_steps():
    kept = replace(STUDY, train=ALL[0])
    assert remembers(kept)
    assert not remembers(STUDY)
    private = load_study("lung-ct-private")
    with pytest.raises((ValueError, StudyInvalid), match=r'train\.moments must be "restart"'):
        replace(private, train=replace(private.train, moments="kept"))


def test_moments_of_another_round_and_fednova_are_refused_as_nobody_knows_how_far_its_steps_go():
    """The 1-norm of `a_i` (Wang et al. 2020, section 4.1) is that of a momentum that begins with the round."""
    fednova = Strategy(normalise_steps=True)
    Study(name="x", train=Train(optimizer="sgd", momentum=0.9), strategy=fednova)
    with pytest.raises(ValueError, match=r'normalise_steps needs .* moments = "restart"'):
        Study(name="x", train=Train(optimizer="sgd", momentum=0.9, moments="kept"), strategy=fednova)
