"""Corrections of local training against closed forms: SCAFFOLD on a quadratic, MOON's contrast, flat optima, APFL."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedclient.data.dataset import Batch
from fedclient.training.drift import contrast, corrected, next_control
from fedclient.training.personal import mixing, moving
from fedclient.training.trainer import fit, stepper
from shared_models import nets
from shared_models.study import Model, Preprocess, Study, Task, Train, load_study
from shared_models.weights import Array

CPU = torch.device("cpu")
PLAIN = Train(optimizer="sgd", momentum=0.0, learning_rate=0.1)
NOTHING = torch.zeros(1, 1)


class Point(nn.Module):
    """Two weights; what it answers is the weights themselves."""

    def __init__(self, at: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(at))

    def forward(self, images: Tensor) -> Tensor:
        return self.w


def quadratic(curvature: tuple[float, float], optimum: tuple[float, float]) -> Any:
    """A site's loss: 1/2 (w - optimum)' diag(curvature) (w - optimum)."""
    c, o = torch.tensor(curvature), torch.tensor(optimum)
    return lambda w, _: 0.5 * (c * (w - o) ** 2).sum()


def batches(steps: int) -> list[Batch]:
    return [Batch(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.uint8))] * steps


# Two sites whose curvatures differ: where local steps are many, the mean of where they end is not the optimum
SITES = (quadratic((1.0, 0.2), (1.0, 0.0)), quadratic((0.1, 1.0), (0.0, 1.0)))
OPTIMUM = np.array([(1.0 * 1.0 + 0.1 * 0.0) / 1.1, (0.2 * 0.0 + 1.0 * 1.0) / 1.2])


def federated(scaffold: bool, rounds: int = 30, steps: int = 10) -> Array:
    """Weights after full rounds of plain gradient steps, combined by their mean."""
    w, c, own = np.zeros(2, np.float32), np.zeros(2, np.float32), [np.zeros(2, np.float32)] * 2
    for _ in range(rounds):
        ends, made = [], []
        for n, loss in enumerate(SITES):
            net = Point((float(w[0]), float(w[1])))
            correct = corrected(["w"], {"w": c}, {"w": own[n]}, 0.1) if scaffold else None
            fit(net, batches(steps), loss, PLAIN, CPU, correct=correct)
            ends.append(net.w.detach().numpy().copy())
            made.append(next_control({"w": c}, {"w": own[n]}, {"w": w}, {"w": ends[n]}, ["w"], steps, 1.0)["w"])
        if scaffold:
            c, own = c + np.mean([m - o for m, o in zip(made, own, strict=True)], axis=0, dtype=np.float32), made
        w = np.mean(ends, axis=0)
    return w


def test_scaffold_reaches_the_optimum_where_fedavg_drifts_beside_it():
    drifted = federated(scaffold=False)
    assert np.abs(drifted - OPTIMUM).max() > 0.02
    np.testing.assert_allclose(federated(scaffold=True), OPTIMUM, atol=1e-4)


def test_a_control_variate_is_the_mean_gradient_of_the_sites_steps():
    """Karimireddy et al. 2020, section 4: option II is the mean of the gradients along the way."""
    seen: list[Array] = []

    def noted(w: Tensor, masks: Tensor) -> Tensor:
        loss: Tensor = SITES[0](w, masks)
        seen.append(torch.autograd.grad(loss, w, retain_graph=True)[0].numpy().copy())
        return loss

    net, c, own = Point((0.3, -0.2)), np.array([0.02, 0.01], np.float32), np.array([-0.01, 0.03], np.float32)
    received = {"w": net.w.detach().numpy().copy()}
    fit(net, batches(4), noted, PLAIN, CPU, correct=corrected(["w"], {"w": c}, {"w": own}, 0.1))
    made = next_control({"w": c}, {"w": own}, received, {"w": net.w.detach().numpy()}, ["w"], 4, 1.0)
    np.testing.assert_allclose(made["w"], 0.1 * np.mean(seen, axis=0), rtol=1e-4)


def test_a_correction_comes_after_the_gradient_is_clipped():
    net = Point((100.0, 0.0))
    shift = {"w": np.array([0.05, 0.0], np.float32)}
    step = stepper(net, SITES[0], Train(optimizer="sgd", momentum=0.0, learning_rate=0.1, clip_gradient=1.0), CPU,
                   correct=corrected(["w"], shift, {}, 0.1))  # fmt: skip
    step(NOTHING, NOTHING)
    np.testing.assert_allclose(net.w.detach().numpy(), [100 - 0.1 * (1.0 + 0.5), 0.0], rtol=1e-6)


# Sharpness


def test_a_sharpness_aware_step_takes_the_gradient_at_the_worst_point_near():
    """Foret et al. 2021, equation 2: for 1/2 w^2 at w = 1 the worst point is 1 + rho."""
    net = Point((1.0, 0.0))
    train = Train(optimizer="sgd", momentum=0.0, learning_rate=0.1, sharpness_rho=0.5)
    loss = stepper(net, quadratic((1.0, 1.0), (0.0, 0.0)), train, CPU)(NOTHING, NOTHING)
    np.testing.assert_allclose(net.w.detach().numpy(), [1 - 0.1 * 1.5, 0.0], rtol=1e-6)
    assert float(loss) == pytest.approx(0.5)


# MOON


class Features(nn.Module):
    """One layer of features float32[B, 2, 1], then a head."""

    def __init__(self, weights: tuple[tuple[float, float], tuple[float, float]]) -> None:
        super().__init__()
        self.body, self.head = nn.Conv1d(2, 2, 1, bias=False), nn.Flatten()
        with torch.no_grad():
            self.body.weight.copy_(torch.tensor(weights)[:, :, None])

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(images))
        return found


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_contrast_is_the_one_of_the_paper(temperature):
    images = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
    net, last = Features(((1.0, 0.0), (0.0, 1.0))), Features(((0.6, -0.8), (0.8, 0.6)))
    pull = contrast(net, net.body, last, last.body, 2.0, temperature)
    with torch.no_grad():
        net.body.weight.copy_(torch.tensor(((0.8, 0.0), (0.6, 1.0)))[:, :, None])
    net(images)
    near, far = np.array([0.8, 1.0]), np.array([0.96, 0.6])  # cosines of first and second image
    terms = np.exp(np.array([near, far]) / temperature)
    wanted = -2.0 * np.log(terms[0] / terms.sum(axis=0)).mean()
    assert pull(net).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "efficientnet-b0"])
def test_the_features_of_an_encoder_are_those_that_its_head_sees(name):
    model = Model(name=name, width=8) if name == "resnet18" else Model(name=name)
    study = Study(name="x", task=Task(kind="classification", loss="bce"), model=model, train=Train(moon_mu=1.0))
    net, seen = nets.network(study).eval(), dict[str, Tensor]()
    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    head.register_forward_pre_hook(lambda _, given: seen.__setitem__("head", given[0]))
    layer = nets.feature_layer(net, study.model)
    layer.register_forward_hook(lambda _, __, out: seen.__setitem__("layer", out.flatten(2).mean(2)))
    with torch.no_grad():
        net(torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, 64, 64)).astype(np.float32)))
    torch.testing.assert_close(seen["layer"], seen["head"], rtol=1e-5, atol=1e-6)


def test_the_contrast_of_a_segmentation_is_of_the_bottom_of_its_network():
    study = Study(name="x", model=Model(name="segresnet", features=(8,)), preprocess=Preprocess(size=(64, 64)))
    net, last = nets.network(study), nets.network(replace(study, seed=1))
    layers = nets.feature_layer(net, study.model), nets.feature_layer(last, study.model)
    pull = contrast(net, layers[0], last, layers[1], 1.0, 0.5)
    made: list[Tensor] = []
    layers[0].register_forward_hook(lambda _, __, out: made.append(out))
    net(torch.ones(1, 1, 64, 64))
    pull(net).backward()
    assert made[0].shape == (1, 64, 8, 8), "8 channels doubled three times, 64 pixels halved three times"
    assert next(net.parameters()).grad is not None


@pytest.mark.parametrize("model", [Model("residual-unet", features=(8, 16)), Model("mlp", features=(), norm="none")])
def test_a_network_whose_features_nobody_knows_is_refused_before_anything_is_trained(model):
    task = Task() if model.name != "mlp" else load_study("brca-prognosis").task
    with pytest.raises(ValueError, match="no feature layer is known"):
        Study(name="x", task=task, model=model, train=Train(moon_mu=1.0))


def test_the_contrast_draws_features_to_those_of_the_received_weights():
    images = np.array([[[1.0], [0.0]], [[0.0], [1.0]]], np.float32)
    net, last = Features(((1.0, 0.0), (0.0, 1.0))), Features(((0.0, -1.0), (1.0, 0.0)))
    pull = contrast(net, net.body, last, last.body, 1.0, 0.5)
    with torch.no_grad():
        net.body.weight.copy_(torch.tensor(((0.6, -0.8), (0.8, 0.6)))[:, :, None])
    before = away(net)
    fit(net, [Batch(images, np.zeros((2, 1), np.uint8))] * 50, lambda out, _: 0 * out.sum(), PLAIN, CPU, pulls=[pull])
    assert away(net) < 0.5 * before


def away(net: Features) -> float:
    return float((net.body.weight.detach()[:, :, 0] - torch.eye(2)).norm())


# APFL and the variance of steps


def test_a_step_of_apfl_is_the_one_done_by_hand():
    """Deng et al. 2020, Algorithm 1 and equation 10, for 1/2 |w|^2 in two numbers."""
    net, own, share = Point((1.0, 0.0)), Point((3.0, 2.0)), torch.tensor(0.25, dtype=torch.float64)
    step = mixing(net, own, share, True, quadratic((1.0, 1.0), (0.0, 0.0)), PLAIN, CPU)
    step(NOTHING, NOTHING)
    mixed = np.array([0.25 * 3 + 0.75 * 1, 0.25 * 2])
    np.testing.assert_allclose(own.w.detach().numpy(), np.array([3, 2]) - 0.1 * 0.25 * mixed, rtol=1e-6)
    assert float(share) == pytest.approx(max(0.0, 0.25 - 0.1 * (np.array([2, 2]) @ mixed)))
    np.testing.assert_array_equal(net.w.detach().numpy(), [1, 0])


def test_the_variance_of_the_mean_step_is_that_of_its_steps():
    net, steps = Point(), np.random.default_rng(0).normal(0, 1, (6, 2)).astype(np.float32)
    watch, variance = moving(net, ["w"])
    for step in steps:
        watch(NOTHING, NOTHING)
        with torch.no_grad():
            net.w.add_(torch.from_numpy(step))
    assert variance() == pytest.approx(float(steps.var(axis=0, ddof=1).sum()) / 6, rel=1e-4)


def test_fewer_than_two_steps_have_no_variance():
    watch, variance = moving(Point(), ["w"])
    watch(NOTHING, NOTHING)
    assert variance() is None
