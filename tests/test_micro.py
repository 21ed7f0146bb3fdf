"""Memory that runs out: a batch in parts has the gradient of the whole, and who cannot hold one example says so."""

import logging
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedclient.device_errors import is_out_of_memory
from fedclient.limits import Limits
from fedclient.training.device import GIB, limit
from fedclient.training.micro import Room, gradients
from fedclient.training.trainer import autocast, fit
from fedclient.training.windows import logits
from shared_models.errors import OrderRefused
from shared_models.nets import arrays_of, network
from shared_models.study import Model, Personal, Preprocess, Train
from shared_models.tasks.segmentation import bce, dice_bce
from tests.test_trainer import CPU, PLAIN, STUDY, toy_batches


class Narrow(nn.Module):
    """A network on a device that holds `most` examples at once."""

    def __init__(self, net: nn.Module, most: int, error: Exception | None = None) -> None:
        super().__init__()
        self.net, self.most, self.error, self.seen = net, most, error, list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        if len(images) > self.most:
            raise self.error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        answer = self.net(images)
        assert isinstance(answer, Tensor)
        return answer


def after(most: int, train: Train = PLAIN, study=STUDY, size: int = 6, loss=dice_bce, edge: int = 16):
    """Weights and losses after some steps on a device that holds `most` examples."""
    torch.manual_seed(0)
    net = Narrow(network(study), most)
    fitted = fit(net, toy_batches(2, size, edge=edge), loss, train, CPU)
    return arrays_of(net.net), fitted, net.seen


def far(one, two) -> float:
    return max(float(np.abs(one[n] - two[n]).max()) for n in one)


@pytest.mark.parametrize(("norm", "loss"), [("group", dice_bce), ("instance", bce)])
def test_a_batch_in_parts_trains_to_the_weights_of_the_whole_batch(norm, loss, caplog):
    study = replace(STUDY, model=replace(STUDY.model, norm=norm), preprocess=Preprocess(size=(32, 32)))
    train = replace(PLAIN, optimizer="sgd", learning_rate=0.1)  # Adam makes a whole step of any rounding near 0
    with caplog.at_level(logging.WARNING, "fedclient"):
        whole, told, _ = after(100, train, study, loss=loss, edge=32)
        parts, told_in_parts, seen = after(2, train, study, loss=loss, edge=32)
    assert far(whole, arrays_of(network(study))) > 1e-3, "it has trained"
    assert far(whole, parts) < 1e-5
    assert told_in_parts.losses == pytest.approx(told.losses, rel=1e-5)
    assert seen[:3] == [6, 3, 2], "six at once, two halves, then four parts"
    assert caplog.messages == [
        "memory ran out; a batch of 6 goes on in 2 parts, with the same result",
        "memory ran out; a batch of 6 goes on in 4 parts, with the same result",
    ], "said once, and remembered for the batches that follow"


def test_the_mean_of_a_loss_that_is_no_mean_over_examples_would_be_another_gradient():
    """Why the parts' own losses are not simply averaged: Dice over unequal parts, with ignored voxels."""
    (batch,) = toy_batches(1, 4)
    images, masks = torch.from_numpy(batch.images), torch.from_numpy(batch.masks)
    masks[0], masks[1, :8] = 127, 127  # nothing to learn from in one, half in another
    net = network(STUDY)

    def grown(parts: int) -> Tensor:
        net.zero_grad()
        gradients(net, images, masks, bce, parts=parts, cast=lambda: autocast(PLAIN, CPU))
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    whole = grown(1)
    net.zero_grad()
    for piece, mask in zip(images.split(1), masks.split(1), strict=True):
        (bce(net(piece).float(), mask) / 4).backward()
    averaged = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert (whole - grown(4)).abs().max() < 1e-6 < 1e-4 < (whole - averaged).abs().max()


def test_pulls_and_sharpness_are_the_same_in_parts():
    train = replace(PLAIN, optimizer="sgd", learning_rate=0.1, proximal_mu=0.5, sharpness_rho=0.05)
    assert far(after(100, train)[0], after(1, train)[0]) < 1e-5


def test_what_dropout_leaves_out_of_a_part_is_the_same_in_both_passes():
    study = replace(STUDY, model=Model(features=(4, 4, 4, 4, 4, 4), groups=2, dropout=0.5))
    (batch,) = toy_batches(1, 4)
    images, masks = torch.from_numpy(batch.images), torch.from_numpy(batch.masks)
    net = network(study).train()
    torch.manual_seed(3)
    loss = gradients(net, images, masks, bce, parts=2, cast=lambda: autocast(PLAIN, CPU))
    torch.manual_seed(3)
    answers = torch.cat([net(piece) for piece in images.split(2)])
    assert float(loss) == pytest.approx(float(bce(answers.float(), masks).detach()), rel=1e-6)
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    bce(answers.float(), masks).backward()
    wanted = [p.grad for p in net.parameters() if p.grad is not None]
    assert max(float((g - w).abs().max()) for g, w in zip(grads, wanted, strict=True)) < 1e-6


def test_whole_images_are_scored_in_parts_with_the_same_answer(caplog):
    net = network(STUDY).eval()
    images = np.random.default_rng(0).normal(size=(7, 1, 16, 16)).astype(np.float32)
    with torch.inference_mode():
        whole = logits(net, images, STUDY, CPU)
        narrow = Narrow(net, 2)
        assert torch.allclose(logits(narrow, images, STUDY, CPU), whole, atol=1e-6)
    assert narrow.seen == [7, 4, 2, 2, 2, 1]


def test_a_single_example_that_does_not_fit_is_refused_with_the_keys_to_raise():
    with pytest.raises(OrderRefused, match=r"CUDA out of memory.*\[limits\] in site\.toml") as refused:
        after(0)
    assert refused.value.code == "OUT_OF_MEMORY"


def test_a_batch_with_batch_norm_is_not_cut_for_its_parts_would_be_normalised_by_themselves(caplog):
    model, size = replace(STUDY.model, norm="batch"), Preprocess(size=(32, 32))
    batch = replace(STUDY, model=model, preprocess=size, personal=Personal(keep=("norm",)))
    assert after(6, study=batch, edge=32)[1].steps == 2, "as long as memory lasts"
    with pytest.raises(OrderRefused, match=r'over a batch of 6, and with norm = "batch" it cannot be cut') as refused:
        after(5, study=batch, edge=32)
    assert refused.value.code == "OUT_OF_MEMORY"
    assert not caplog.messages, "nobody is told that it goes on"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: 8 GB"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in ..."), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_a_want_of_memory_is_answered_by_smaller_parts(error, is_memory):
    assert is_out_of_memory(error) is is_memory
    if not is_memory:
        with pytest.raises(type(error), match=str(error)):
            Room().within(4, lambda _: (_ for _ in ()).throw(error), lambda: None)


def test_the_limit_of_memory_makes_an_allocation_fail_as_lack_of_memory_does():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        limit(Limits(memory_gib=0.001), CPU)
        with pytest.raises(RuntimeError) as failed:
            torch.empty(2**28, dtype=torch.float64).fill_(1)  # 2 GiB
        assert is_out_of_memory(failed.value)
        limit(Limits(), CPU)
        assert torch.ones(2**22).sum() == 2**22, "without a limit the next order is not bound by the last one's"
        limit(Limits(memory_gib=64.0), CPU)
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 64 * GIB
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
