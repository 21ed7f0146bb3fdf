"""Gradient inversion: a picture made anew from what one local step did to the weights (Geiping et al. 2020).

The attacker knows the weights before and after, the learning rate, and which class each picture has, and looks for
pictures whose gradient points the same way: cosine distance and total variation, by Adam on the signs of the gradient
(their equation 4 and section 5.3). The victim is the network that is easiest to invert (LeNet with sigmoids, Zhu et al.
2019), one step on one picture: what is safe there is safer in a U-Net after many steps on many pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedclient.data.dataset import Batch
from fedclient.training.chance import Chance
from fedclient.training.private import fit_private
from fedclient.training.trainer import fit
from shared_models import nets
from shared_models.protect.privacy import Privacy
from shared_models.seeds import rng, seed_of
from shared_models.study import Study, Train
from shared_models.weights import Arrays
from simulations.attacks.finding import Finding, Picture, Row, Strip, judged, psnr
from simulations.attacks.people import EXAMPLE, Patient, secured
from simulations.attacks.sums import mean_of, secure_sum

EDGE, CLASSES = 32, 4
CONTROL_DB, PROTECTED_DB = 30.0, 15.0
TOTAL_VARIATION = 1e-4
RATE = 1.0  # of the step that is attacked
STEP = Train(local_steps=1, batch_size=1, optimizer="sgd", momentum=0.0, learning_rate=RATE, precision="float32")
COHORT = 5
PRIVATE, SECURE = "differential privacy", "secure sum"
CLIPPED = "clipping alone (not DP)"
Tick = Callable[[], None]


def victim(seed: int, classes: int = CLASSES) -> nn.Module:
    """LeNet with sigmoids (Zhu et al. 2019, section 4.1): float32[B, 1, 32, 32] to logits float32[B, classes]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, (after, stride) in zip((1, 12, 12), ((12, 2), (12, 2), (12, 1)), strict=True):
            layers += [nn.Conv2d(before, after, 5, stride, 2), nn.Sigmoid()]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * (EDGE // 4) ** 2, classes))
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return net


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    return F.cross_entropy(logits, truth[:, 0].long())


def batch_of(pictures: Sequence[NDArray[np.float32]], labels: Sequence[int]) -> Batch:
    return Batch(np.stack(pictures)[:, None].astype(np.float32), np.array(labels, np.uint8)[:, None])


def delta_of(
    net: nn.Module, batch: Batch, privacy: Privacy | None = None, quiet: bool = False
) -> dict[str, NDArray[np.float32]]:
    """What a site sends after one local step by the client's own loop; `net` is left as it was.

    Args:
        quiet: of private training, clips and leaves the noise out.
    """
    before = nets.arrays_of(net)
    train = replace(STEP, batch_size=len(batch.images))
    if privacy is None:
        fit(net, [batch], cross_entropy, train, torch.device("cpu"))
    else:
        fit_private(
            net, [[batch]], cross_entropy, replace(train, batch_size=1), privacy, Chance(), np.zeros if quiet else None
        )
    after = nets.arrays_of(net)
    nets.load_arrays(net, before)
    return {name: after[name] - before[name] for name in before}


def inverted(
    net: nn.Module, delta: Arrays, labels: Sequence[int], iterations: int, seed: int, tick: Tick
) -> NDArray[np.float32]:
    """float32[B, rows, columns]: pictures whose step would give `delta`; the best of the whole search."""
    named = list(net.named_parameters())
    target = torch.cat([torch.from_numpy(-np.asarray(delta[name], np.float32)).reshape(-1) for name, _ in named])
    target = target / target.norm().clamp(min=1e-20)
    truth, parameters = torch.tensor(labels, dtype=torch.uint8)[:, None], [p for _, p in named]
    start = torch.randn(len(labels), 1, EDGE, EDGE, generator=torch.Generator().manual_seed(seed))
    guess = (0.5 + 0.1 * start).requires_grad_(True)
    optimizer = torch.optim.Adam([guess], lr=0.1)
    drops = [iterations * part // 8 for part in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1)
    best, least = guess.detach().clone(), float("inf")
    for _ in range(iterations):
        gradients = torch.autograd.grad(cross_entropy(net(guess), truth), parameters, create_graph=True)
        found = torch.cat([g.reshape(-1) for g in gradients])
        distance = 1 - found @ target / found.norm().clamp(min=1e-20)
        if distance.item() < least:
            best, least = guess.detach().clone(), distance.item()
        rough = (guess[..., 1:, :] - guess[..., :-1, :]).abs().mean() + (guess[..., 1:] - guess[..., :-1]).abs().mean()
        (towards,) = torch.autograd.grad(distance + TOTAL_VARIATION * rough, guess)
        guess.grad = towards.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            guess.clamp_(0, 1)
        tick()
    return best[:, 0].numpy()


def attack(study: Study, people: Sequence[Patient], iterations: int, tick: Tick = lambda: None) -> Finding:
    """Inverts one step on one picture: as it is, under differential privacy, and under a secure sum of five sites."""
    draw = rng(study.seed, "inversion")
    chosen = draw.choice(len(people), min(COHORT, len(people)), replace=False)
    pictures: list[Picture] = [people[n].slices[len(people[n].slices) // 2] for n in chosen]
    labels = [n % CLASSES for n in range(len(pictures))]
    net = victim(seed_of(study.seed, "victim") % 2**31)
    original, mine = pictures[0], labels[:1]
    privacy = study.protect.privacy or EXAMPLE

    def one(delta: Arrays, classes: Sequence[int]) -> tuple[float, Picture]:
        found = inverted(net, delta, classes, iterations, study.seed, tick)
        closest = max(found, key=lambda picture: psnr(original, picture))
        return psnr(original, closest), closest

    plain = [delta_of(net, batch_of([p], [n])) for p, n in zip(pictures, labels, strict=True)]
    sites = {f"site-{n}": delta for n, delta in enumerate(plain)}
    transcript = secure_sum(sites, clip=_largest(plain), table=study.protect.secure_aggregation)
    got = {
        "nothing": one(plain[0], mine),
        PRIVATE: one(delta_of(net, batch_of(pictures[:1], mine), privacy), mine),
        CLIPPED: one(delta_of(net, batch_of(pictures[:1], mine), privacy, quiet=True), mine),
        f"{SECURE}, the masked vector": one(transcript.read_as_plain("site-0"), mine),
        f"{SECURE}, the sum as one picture": one(mean_of(transcript), mine),
        f"{SECURE}, the sum as five pictures": one(mean_of(transcript), labels),
    }
    middle = np.mean([p.slices.mean(0) for p in people], axis=0).astype(np.float32)
    guessed = psnr(original, middle)
    figure = "PSNR, dB"
    rows = [Row("(the mean picture of all patients)", figure, guessed)]
    for name, (decibels, _) in got.items():
        own = (study.protect.privacy is not None and name == PRIVATE) or (secured(study) and name.startswith(SECURE))
        if name == "nothing":
            rows.append(judged(name, figure, decibels, above=CONTROL_DB, control=True))
        elif name == CLIPPED:
            rows.append(Row(name, figure, decibels))
        else:
            rows.append(judged(name, figure, decibels, below=PROTECTED_DB, study=own))
    strip = Strip("One slice, and what the attacker makes of the update", {"original": original} | {
        f"{name}: {decibels:.1f} dB": picture for name, (decibels, picture) in got.items()
    })  # fmt: skip
    words = f"clip {privacy.clip_norm:g}, noise {privacy.noise_multiplier:g}"
    return Finding(
        "inversion",
        "Gradient inversion",
        f"One local step of plain SGD on one slice of one patient ({EDGE}x{EDGE}), by the client's own loop, in a "
        f"LeNet with sigmoids; the attacker knows the weights, the learning rate and the class (Geiping et al. 2020, "
        f"{iterations} iterations). Differential privacy with {words}; the secure sum is of {len(pictures)} sites, "
        f"by the real protocol.",
        tuple(rows),
        _verdict(study, got, guessed),
        (strip,),
    )


def _largest(deltas: Sequence[Arrays]) -> float:
    """A clip that cuts nothing off, so that the sum has all that there is to find."""
    return max(float(np.abs(array).max()) for delta in deltas for array in delta.values()) * 1.01


def _verdict(study: Study, got: dict[str, tuple[float, Picture]], guessed: float) -> str:
    if study.protect.privacy is not None:
        than = "no better" if got[PRIVATE][0] <= guessed else "better"
        return (
            f"From a differentially private update the attacker gets {got[PRIVATE][0]:.1f} dB, {than} "
            f"than a picture that is made up ({guessed:.1f} dB is the mean of all patients)."
        )
    if secured(study):
        best = max(decibels for name, (decibels, _) in got.items() if name.startswith(SECURE))
        return (
            f"From a secure sum of {COHORT} sites the attacker gets {best:.1f} dB at best; {guessed:.1f} dB is the "
            f"mean of all patients, and plain updates of a single step give {got['nothing'][0]:.1f} dB."
        )
    return (
        f"The study sends plain updates: whoever reads one of a single step has the picture at "
        f"{got['nothing'][0]:.1f} dB. A secure sum or differential privacy takes that away."
    )
