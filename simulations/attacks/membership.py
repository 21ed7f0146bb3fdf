"""Membership inference: was this patient among those a network learned from? Patients are the unit, not slices.

Some tens of networks each learn from a random half of the patients; each in turn is the victim, and the others are what
the attacker trains for comparison (shadow models). Two attacks: the loss alone (Yeom et al. 2018), and the likelihood
ratio of Carlini et al. (2022, algorithm 1, online). What each patient's label is follows from a coin, so that a network
can only remember it: the worst case for privacy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedclient.data.dataset import DataSet
from fedclient.training.chance import Chance
from fedclient.training.private import fit_private, poisson_lots
from fedclient.training.trainer import fit
from shared_models.protect.accounting import epsilon
from shared_models.protect.privacy import Privacy
from shared_models.seeds import rng, seed_of
from shared_models.study import Augment, Study, Train
from simulations.attacks.finding import Finding, Row, judged
from simulations.attacks.people import EXAMPLE, Patient, places_of, stored

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
EXAMPLE_STEPS = 30
EPOCHS = 40
FALSE_POSITIVES = 0.01
LEAST_AUC, LEAST_FOUND = 0.8, 10 * FALSE_POSITIVES  # of the control: ten times what guessing finds
HELP = 4  # how many networks the variance over all patients counts for
UNITS = 32
PLAIN = Train(local_epochs=EPOCHS, batch_size=16, learning_rate=3e-3, precision="float32")


@dataclass(frozen=True, slots=True)
class Reach:
    """How well an attack tells members from others."""

    auc: float
    found: float  # true positives at `FALSE_POSITIVES`


def reach(scores: Floats, members: Bools) -> Reach:
    """Of all pairs of network and patient together; higher scores mean a member."""
    inside, outside = scores[members], np.sort(scores[~members])
    below: NDArray[np.intp] = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    threshold = outside[len(outside) - 1 - int(FALSE_POSITIVES * len(outside))]
    return Reach(float(below.mean() / (2 * len(outside))), float((inside > threshold).mean()))


def likelihood_ratio(confidence: Floats, members: Bools) -> Floats:
    """LiRA's score [networks, patients]: each network is judged by what all the others show of in and out."""

    def others(values: Floats) -> Floats:
        rest: Floats = values.sum(0) - values
        return rest

    ins, outs = members.astype(np.float64), (~members).astype(np.float64)
    mean_in = others(confidence * ins) / np.maximum(others(ins), 1)
    mean_out = others(confidence * outs) / np.maximum(others(outs), 1)
    whole = float(np.where(members, confidence - mean_in, confidence - mean_out).var()) + 1e-9

    def variance(there: Floats, mean: Floats) -> Floats:
        """Of one patient over the other networks; few of them are helped out by all patients together."""
        squares = others(confidence**2 * there) - mean**2 * others(there)
        found: Floats = (np.maximum(squares, 0) + HELP * whole) / (others(there) + HELP)
        return found

    one, other = variance(ins, mean_in), variance(outs, mean_out)
    score: Floats = (confidence - mean_out) ** 2 / (2 * other) - (confidence - mean_in) ** 2 / (2 * one)
    score += np.log(other / one) / 2
    return score


def small_net(inputs: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, UNITS), nn.ReLU(), nn.Linear(UNITS, 1))


def right_class(logits: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, truth.float())


def halves(networks: int, patients: int, study: Study) -> Bools:
    """bool[networks, patients]: who is in; each patient in half of the networks, give or take one."""
    draw = rng(study.seed, "membership")
    ranks = draw.random((networks, patients)).argsort(axis=0)
    taken: Bools = ranks % 2 == 0
    return taken


def confidences(
    people: Sequence[Patient],
    labels: NDArray[np.int64],
    members: Bools,
    study: Study,
    learn: Callable[[nn.Module, DataSet, int], object],
    tick: Callable[[], None] = lambda: None,
) -> Floats:
    """float64[networks, patients]: how sure each network is of each patient's label (logit of its probability)."""
    cases = [stored(n, patient, int(labels[n])) for n, patient in enumerate(people)]
    inputs = int(np.prod(people[0].slices.shape[1:]))
    sure = np.zeros(members.shape)
    for number, taken in enumerate(members):
        net = small_net(inputs, seed_of(study.seed, "membership", number) % 2**31)
        learn(net, DataSet(tuple(case for case, there in zip(cases, taken, strict=True) if there)), number)
        net.eval()
        with torch.no_grad():
            for n, case in enumerate(cases):
                logits = net(torch.from_numpy(case.images).float())
                sure[number, n] = float(logits.double().mean()) * (1 if labels[n] else -1)
        tick()
    return sure


def plainly(study: Study) -> Callable[[nn.Module, DataSet, int], object]:
    def learn(net: nn.Module, cases: DataSet, number: int) -> object:
        batches = cases.batches(PLAIN.batch_size, rng(study.seed, "membership batches", number), epochs=EPOCHS)
        return fit(net, batches, right_class, PLAIN, torch.device("cpu"))

    return learn


def privately(privacy: Privacy, steps: int, quiet: bool = False) -> Callable[[nn.Module, DataSet, int], object]:
    """DP-SGD by the client's own code at a rate that learns well without noise; `quiet` leaves the noise out."""

    def learn(net: nn.Module, cases: DataSet, number: int) -> object:
        expected = max(1, round(privacy.sample_rate * len(cases.cases)))
        train = Train(local_steps=steps, batch_size=expected, optimizer="sgd", momentum=0.9,
                      learning_rate=2.0 / privacy.clip_norm, precision="float32")  # fmt: skip
        chance = Chance()
        lots = poisson_lots(cases, places_of(cases), privacy, steps, Augment(), chance)
        return fit_private(net, lots, right_class, train, privacy, chance, np.zeros if quiet else None)

    return learn


def standardised(people: Sequence[Patient]) -> list[Patient]:
    """Each pixel by its mean and deviation over all slices: what they have in common tells nobody apart."""
    slices = np.concatenate([patient.slices for patient in people])
    mean, deviation = slices.mean(0), slices.std(0) + 0.05
    return [replace(patient, slices=(patient.slices - mean) / deviation) for patient in people]


def attack(study: Study, people: Sequence[Patient], networks: int, tick: Callable[[], None] = lambda: None) -> Finding:
    """Both attacks on networks trained plainly, with differential privacy, and so but for the noise."""
    draw = rng(study.seed, "membership labels")
    labels, members, known = (
        draw.integers(0, 2, len(people)),
        halves(networks, len(people), study),
        standardised(people),
    )
    own = study.protect.privacy
    privacy = own or EXAMPLE
    steps = study.rounds.count * (study.train.local_steps or 1) if own else EXAMPLE_STEPS
    cost = epsilon([privacy.spend(steps)], privacy.delta)
    named = f"differential privacy, epsilon {cost:.3g}"
    ways = {
        "nothing": plainly(study),
        named: privately(privacy, steps),
        "clipping and sampling alone (not DP)": privately(privacy, steps, quiet=True),
    }
    rows: list[Row] = []
    found: dict[str, dict[str, Reach]] = {}
    for name, learn in ways.items():
        sure = confidences(known, labels, members, study, learn, tick)
        found[name] = {
            "LiRA": reach(likelihood_ratio(sure, members), members),
            "loss threshold": reach(sure, members),
        }
        for attacker, got in found[name].items():
            rows += _rows(name, attacker, got, found["nothing"][attacker], name == named and own is not None, named)
    best, kept = found["nothing"]["LiRA"], found[named]["LiRA"]
    return Finding(
        "membership",
        "Membership inference, by patient",
        f"{networks} networks (a layer of {UNITS} units on slices of {known[0].slices.shape[1]}x"
        f"{known[0].slices.shape[2]}), each on a random half of {len(people)} patients, whose labels are a coin's; "
        f"each in turn is the victim, the others are the attacker's. Differential privacy with noise "
        f"{privacy.noise_multiplier:g}, sample rate {privacy.sample_rate:g}, {steps} steps, delta {privacy.delta:g}.",
        tuple(rows),
        f"At 1 % false positives an attacker finds {kept.found:.0%} of the patients that took part (AUC {kept.auc:.2f}"
        f"); without privacy {best.found:.0%} (AUC {best.auc:.2f})."
        if own
        else f"The study has no differential privacy: of a network that remembers, an attacker finds {best.found:.0%} "
        f"of its patients at 1 % false positives (AUC {best.auc:.2f}); with epsilon {cost:.3g}, {kept.found:.0%}.",
    )


def _rows(name: str, attacker: str, got: Reach, plain: Reach, study: bool, private: str) -> list[Row]:
    area, share = f"{attacker}: AUC", f"{attacker}: TPR at 1 % FPR"
    if name == "nothing" and attacker == "LiRA":
        return [judged(name, area, got.auc, above=LEAST_AUC, control=True),
                judged(name, share, got.found, above=LEAST_FOUND, control=True)]  # fmt: skip
    if name == private and attacker == "LiRA":
        return [judged(name, area, got.auc, below=(1 + plain.auc) / 2 - 0.2, study=study),
                judged(name, share, got.found, below=plain.found / 2, study=study)]  # fmt: skip
    return [Row(name, area, got.auc, study=study), Row(name, share, got.found, study=study)]
