"""The local loop: FedProx's pull, equal seeds and equal weights, a loss that falls."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedclient.data.dataset import Batch
from fedclient.training.drift import proximal
from fedclient.training.trainer import Fitted, autocast, fit, scheduled, slanted, stepper
from shared_models import nets
from shared_models.errors import OrderRefused
from shared_models.nets import arrays_of, network
from shared_models.study import Model, Preprocess, Study, Train
from shared_models.tasks.segmentation import bce, dice_bce
from shared_models.weights import Arrays

CPU = torch.device("cpu")
STUDY = Study(name="t", model=Model(features=(4, 4, 4, 4, 4, 4), groups=2), preprocess=Preprocess(size=(16, 16)))
PLAIN = Train(batch_size=4, learning_rate=1e-2)


pytestmark = pytest.mark.usefixtures("one_thread")


def toy_batches(steps: int = 6, size: int = 4, seed: int = 0, edge: int = 16) -> list[Batch]:
    """A bright disc somewhere on noise, and the disc as its mask."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((edge, edge))
    batches = []
    for _ in range(steps):
        centres = rng.integers(5, edge - 5, (size, 2))
        masks = np.stack([(rows - r) ** 2 + (columns - c) ** 2 < 16 for r, c in centres])
        images = masks[:, None] + rng.normal(0, 0.2, (size, 1, edge, edge))
        batches.append(Batch(images.astype(np.float32), masks.astype(np.uint8)))
    return batches


def trained(batches: Iterable[Batch], train: Train = PLAIN, study: Study = STUDY) -> tuple[Arrays, Fitted]:
    net = network(study)
    torch.manual_seed(0)
    fitted = fit(net, batches, bce, train, CPU)
    return arrays_of(net), fitted


def same(one: Arrays, two: Arrays) -> bool:
    return all(one[n].tobytes() == two[n].tobytes() for n in one)


def distance(one: Arrays, two: Arrays) -> float:
    return float(np.sqrt(sum(((one[n] - two[n]).astype(np.float64) ** 2).sum() for n in one)))


# The pull


@pytest.mark.parametrize("mu", [0.01, 1.0, 7.5])
def test_the_pull_is_half_mu_times_the_squared_distance_and_its_gradient_mu_times_the_difference(mu):
    net = network(STUDY)
    received = [p.detach().double().clone() for p in net.parameters()]
    pull = proximal(net, mu)
    assert pull(net).item() == 0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    moved = [p.detach().double() - r for p, r in zip(net.parameters(), received, strict=True)]
    value = pull(net)
    assert value.item() == pytest.approx(mu / 2 * sum(float((d**2).sum()) for d in moved), rel=1e-5)
    gradients = torch.autograd.grad(value, list(net.parameters()))
    for gradient, d in zip(gradients, moved, strict=True):
        torch.testing.assert_close(gradient.double(), mu * d, rtol=1e-5, atol=1e-5)


def plain_loop(net: nn.Module, batches: list[Batch], optimizer: torch.optim.Optimizer, mu: float = 0.0) -> None:
    """What a textbook writes."""
    received = [p.detach().clone() for p in net.parameters()]
    for images, masks, _ in batches:
        loss: Tensor = bce(net(torch.from_numpy(images)), torch.from_numpy(masks))
        if mu:
            pairs = zip(net.parameters(), received, strict=True)
            loss = loss + 0.5 * mu * torch.stack([((p - r) ** 2).sum() for p, r in pairs]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_training_is_the_textbooks_loop_bit_for_bit_with_and_without_the_pull(mu):
    net, batches = network(STUDY), toy_batches()
    plain_loop(net, batches, torch.optim.Adam(net.parameters(), PLAIN.learning_rate), mu)
    weights, fitted = trained(batches, replace(PLAIN, proximal_mu=mu))
    assert same(weights, arrays_of(net))
    assert fitted.steps == len(batches)


def test_a_stronger_pull_ends_nearer_to_what_was_received():
    start, batches = arrays_of(network(STUDY)), toy_batches(12)
    far = [distance(trained(batches, replace(PLAIN, proximal_mu=mu))[0], start) for mu in (0.0, 1.0, 100.0)]
    assert far[0] > far[1] > far[2] > 0


# Equal seeds, equal weights


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_equal_batches_give_equal_weights_and_another_order_gives_others(optimizer):
    train, batches = replace(PLAIN, optimizer=optimizer, weight_decay=1e-3), toy_batches()
    weights, fitted = trained(batches, train)
    again, fitted_again = trained(iter(batches), train)
    assert same(weights, again)
    assert fitted == fitted_again
    assert not same(weights, trained(batches[::-1], train)[0])


def test_dropout_is_drawn_from_the_seed_that_torch_was_given():
    study = replace(STUDY, model=replace(STUDY.model, dropout=0.3))
    weights, _ = trained(toy_batches(), study=study)
    assert same(weights, trained(toy_batches(), study=study)[0])
    net = network(study)
    torch.manual_seed(1)
    fit(net, toy_batches(), bce, PLAIN, CPU)
    assert not same(weights, arrays_of(net))


def test_no_optimizer_remembers_an_earlier_round():
    net, batches = network(STUDY), toy_batches()
    fit(net, batches, bce, PLAIN, CPU)
    halfway = arrays_of(net)
    fit(net, batches, bce, PLAIN, CPU)
    fresh = network(STUDY)
    fresh.load_state_dict({n: torch.from_numpy(a) for n, a in halfway.items()})
    fit(fresh, batches, bce, PLAIN, CPU)
    assert same(arrays_of(net), arrays_of(fresh))


def test_the_optimizers_take_their_numbers_from_the_study():
    batches = toy_batches(1)
    one, two = (
        trained(batches, Train(optimizer="sgd", learning_rate=rate))[0] for rate in (1e-3, 2e-3)
    )  # fmt: skip
    start = arrays_of(network(STUDY))
    assert distance(two, start) == pytest.approx(2 * distance(one, start), rel=1e-2)
    net = network(STUDY)
    plain_loop(net, batches, torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.5))
    assert same(trained(batches, replace(PLAIN, optimizer="adamw", weight_decay=0.5))[0], arrays_of(net))


def test_the_learning_rate_of_a_cosine_falls_from_the_studys_to_a_twentieth():
    """Loshchilov & Hutter 2017, equation 5: low + (high - low) (1 + cos(pi t / T)) / 2."""
    cosine = replace(PLAIN, schedule="cosine", learning_rate=0.2)
    rates = [scheduled(cosine, r, 9).learning_rate for r in range(1, 10)]
    np.testing.assert_allclose(rates, 0.01 + 0.19 * (1 + np.cos(np.pi * np.arange(9) / 8)) / 2, rtol=1e-12)
    assert rates == sorted(rates, reverse=True)
    assert scheduled(cosine, 1, 1) == cosine
    assert [scheduled(PLAIN, r, 9) for r in range(1, 10)] == [PLAIN] * 9
    assert replace(scheduled(cosine, 5, 9), learning_rate=0.2) == cosine


# What it tells


@pytest.mark.parametrize("loss", [bce, dice_bce])
def test_the_loss_falls_on_a_toy_phantom(loss):
    net = network(STUDY)
    fitted = fit(net, toy_batches(40), loss, PLAIN, CPU)
    assert fitted.steps == 40
    assert len(fitted.losses) == 10
    first, last = fitted.losses[0], fitted.losses[-1]
    assert first is not None
    assert last is not None
    assert last < 0.7 * first


def test_a_clipped_gradient_is_no_longer_than_the_study_says(monkeypatch):
    norms: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            gradients = [p.grad.norm() for group in self.param_groups for p in group["params"]]
            norms.append(torch.stack(gradients).norm().item())
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    trained(toy_batches(), Train(optimizer="sgd", learning_rate=1e-2))
    free = list(norms)
    norms.clear()
    trained(toy_batches(), Train(optimizer="sgd", learning_rate=1e-2, clip_gradient=min(free) / 2))
    assert max(norms) <= min(free) / 2 * 1.001


@pytest.mark.parametrize(("steps", "told"), [(0, 0), (1, 1), (3, 3), (12, 10)])
def test_losses_are_told_in_ten_parts_at_most(steps, told):
    _, fitted = trained(toy_batches(steps))
    assert fitted.steps == steps
    assert len(fitted.losses) == told


def test_the_told_losses_are_the_means_of_their_stretches():
    batches = toy_batches(20)
    seen: list[float] = []

    def noted(logits: Tensor, masks: Tensor) -> Tensor:
        loss = bce(logits, masks)
        seen.append(loss.item())
        return loss

    told = fit(network(STUDY), batches, noted, PLAIN, CPU).losses
    np.testing.assert_allclose(np.array(told, float), np.array(seen).reshape(10, 2).mean(axis=1), rtol=1e-6)


def test_a_loss_that_is_not_finite_is_told_as_none():
    spoilt = toy_batches(4)
    spoilt[2].images[0, 0, 0, 0] = np.nan
    _, fitted = trained(spoilt)
    assert [loss is None for loss in fitted.losses] == [False, False, True, True]


def test_the_network_is_in_training_mode_while_it_is_trained_whatever_it_was():
    net = network(replace(STUDY, model=replace(STUDY.model, dropout=0.5))).eval()
    modes: list[bool] = []
    net.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    fit(net, toy_batches(2), bce, PLAIN, CPU)
    assert modes == [True, True]


def test_on_a_cpu_every_precision_is_float32():
    for precision in ("auto", "float32"):
        with autocast(replace(PLAIN, precision=precision), CPU):
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_a_gpu_that_only_emulates_bf16_computes_in_float32(monkeypatch):
    """As one of before 2020 does: PyTorch calls bf16 supported there, and it is slower than float32."""
    turing, hopper = SimpleNamespace(major=7), SimpleNamespace(major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: (turing, hopper)[device.index])
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: nullcontext(dtype))
    for number, wanted in enumerate((None, torch.bfloat16)):
        with autocast(PLAIN, torch.device("cuda", number)) as dtype:
            assert dtype == wanted


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (Model(), None),
        (Model(spatial_dims=3), "MaxPool3d"),
        (Model(name="residual-unet", features=(8, 16, 16), norm="instance", spatial_dims=3), None),
        (Model(name="resnet18"), None),
        (Model(name="vgg11"), None),
        (Model(name="vgg11", head="full"), "AdaptiveAvgPool2d"),
        (Model(name="densenet121", spatial_dims=3), "MaxPool3d"),
    ],
)
def test_a_deterministic_study_is_refused_where_a_gpu_cannot_carry_it_out(model, part):
    net, equal_bits = nets.MAKERS[model.name](model, 1, 2), replace(PLAIN, deterministic=True)
    stepper(net, bce, equal_bits, CPU)
    stepper(net, bce, PLAIN, torch.device("cuda:0"))
    if part is None:
        stepper(net, bce, equal_bits, torch.device("cuda:0"))
    else:
        with pytest.raises(OrderRefused, match=f"{part} of this network has no deterministic gradient on a GPU"):
            stepper(net, bce, equal_bits, torch.device("cuda:0"))


def test_the_batches_that_are_given_are_left_as_they_are():
    batches = toy_batches()
    before = [(b.images.tobytes(), b.masks.tobytes()) for b in batches]
    trained(batches)
    assert [(b.images.tobytes(), b.masks.tobytes()) for b in batches] == before


def test_a_slanted_triangle_peaks_after_a_tenth_of_the_steps_and_ends_at_a_32nd():
    """Howard & Ruder 2018, equation 3: (1 + p (ratio - 1)) / ratio with a ratio of 32, p rising, then falling."""
    shares = [slanted(20)(n) for n in range(1, 21)]
    assert shares[:2] == [(1 + 31 / 2) / 32, 1.0]
    assert shares[1:] == sorted(shares[1:], reverse=True)
    assert shares[10] == pytest.approx((1 + 31 * 0.5) / 32)
    assert shares[-1] == 1 / 32
    assert slanted(1)(1) == 1.0


def test_each_step_is_as_long_as_its_share_of_the_rate():
    train, batch = replace(PLAIN, optimizer="sgd", momentum=0.0), toy_batches(1)
    net = network(STUDY)
    start = arrays_of(net)
    fit(net, batch, bce, train, CPU)
    whole = distance(arrays_of(net), start)
    net = network(STUDY)
    fit(net, batch, bce, train, CPU, course=lambda step: 0.25)
    assert distance(arrays_of(net), start) == pytest.approx(0.25 * whole, rel=1e-3)
