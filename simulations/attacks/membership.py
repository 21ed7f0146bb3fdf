"""Membership inference: was this patient among those a network learned from? Patients are the unit, not slices.

Some tens of networks each learn from a random half of the patients; each in turn is the victim, and the others are what
the attacker trains for comparison (shadow models). Two attacks: the loss alone (Yeom et al. 2018), and the likelihood
ratio of Carlini et al. (2022, algorithm 1, online).

The worst case for privacy: what each patient's label is follows from a coin, so that a network can only remember it,
and slices are whitened, so that no patient is remembered by way of another who looks alike. Carlini et al. find members
at 1 % false positives many times as often as guessing does (their figure 1); here the control has to be above ten times
with its whole interval, or what protection changes would say nothing.
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
RESAMPLES, TAIL = 1000, 2.5  # of an interval, by patient; per cent on either side of it
FLAT = 1e-3  # a direction in which slices vary by so little of the most is left out
HELP = 4  # how many networks the variance over all patients counts for
UNITS = 32
PLAIN = Train(local_epochs=EPOCHS, batch_size=16, learning_rate=3e-3, precision="float32")


@dataclass(frozen=True, slots=True)
class Reach:
    """How well an attack tells members from others."""

    auc: float
    found: float  # true positives at `FALSE_POSITIVES`
    between: tuple[float, float] = (0.0, 1.0)  # 95 % interval of `found`, of patients drawn anew


def reach(scores: Floats, members: Bools) -> Reach:
    """Of all pairs of network and patient together; higher scores mean a member."""
    inside, outside = scores[members], np.sort(scores[~members])
    below: NDArray[np.intp] = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return Reach(float(below.mean() / (2 * len(outside))), _found(scores, members))


def reach_between(scores: Floats, members: Bools, study: Study) -> Reach:
    """`reach`, and its bounds where patients are drawn anew, each with all its networks (percentile bootstrap)."""
    draw, patients = rng(study.seed, "membership interval"), scores.shape[1]
    drawn = (draw.integers(0, patients, patients) for _ in range(RESAMPLES))
    found = [_found(scores[:, of], members[:, of]) for of in drawn]
    low, high = np.percentile(found, [TAIL, 100 - TAIL])
    return replace(reach(scores, members), between=(float(low), float(high)))


def _found(scores: Floats, members: Bools) -> float:
    """Share of members above the score that `FALSE_POSITIVES` of the others exceed."""
    outside = np.sort(scores[~members])
    return float((scores[members] > outside[len(outside) - 1 - int(FALSE_POSITIVES * len(outside))]).mean())


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
    tick: Callable[[], None],
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


def whitened(people: Sequence[Patient]) -> list[Patient]:
    """Slices as coordinates [N, 1, D] that are uncorrelated and of deviation 1 over all slices: what they have in
    common tells nobody apart (principal components, those in which they hardly differ left out)."""
    flat = [patient.slices.reshape(len(patient.slices), -1).astype(np.float64) for patient in people]
    every = np.concatenate(flat)
    mean = every.mean(0)
    _, sizes, axes = np.linalg.svd(every - mean, full_matrices=False)
    kept = sizes > FLAT * sizes[0]
    scale = np.sqrt(len(every)) / sizes[kept]
    return [
        replace(patient, slices=(((part - mean) @ axes[kept].T) * scale).astype(np.float32)[:, None])
        for patient, part in zip(people, flat, strict=True)
    ]


def attack(study: Study, people: Sequence[Patient], networks: int, tick: Callable[[], None] = lambda: None) -> Finding:
    """Both attacks on networks trained plainly, with differential privacy, and so but for the noise."""
    draw = rng(study.seed, "membership labels")
    labels, members, known = (
        draw.integers(0, 2, len(people)),
        halves(networks, len(people), study),
        whitened(people),
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
            "LiRA": reach_between(likelihood_ratio(sure, members), members, study),
            "loss threshold": reach_between(sure, members, study),
        }
        for attacker, got in found[name].items():
            rows += _rows(name, attacker, got, found["nothing"][attacker], name == named and own is not None, named)
    best, kept = found["nothing"]["LiRA"], found[named]["LiRA"]
    return Finding(
        "membership",
        "Membership inference, by patient",
        f"{networks} networks (a layer of {UNITS} units on {known[0].slices.shape[2]} whitened coordinates of slices "
        f"of {people[0].slices.shape[1]}x{people[0].slices.shape[2]}), each on a random half of {len(people)} "
        f"patients, whose labels are a coin's; "
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
    """Area under the curve and members found; of the loss threshold, which finds hardly any so surely, the area counts.

    What a protection must come to follows from what the attack finds without it, and is judged where it finds enough.
    """
    area, share = f"{attacker}: AUC", f"{attacker}: TPR at 1 % FPR"
    (least, most), lira = got.between, attacker == "LiRA"
    control = name == "nothing"
    rows = [Row(name, area, got.auc, study=study), Row(name, share, got.found, control=control, study=study)]
    if control:
        rows[0] = judged(name, area, got.auc, above=LEAST_AUC, control=True)
        if lira:
            rows.append(judged(name, f"{share}, at least (95 %)", least, above=LEAST_FOUND, control=True))
    elif name == private:
        rows[0] = judged(name, area, got.auc, below=(1 + plain.auc) / 2 - 0.2, study=study)
        if lira:
            rows.append(judged(name, f"{share}, at most (95 %)", most, below=plain.between[0] / 2, study=study))
        if plain.auc <= LEAST_AUC or (lira and plain.between[0] <= LEAST_FOUND):
            rows = [replace(row, holds=None) for row in rows]
    return rows
