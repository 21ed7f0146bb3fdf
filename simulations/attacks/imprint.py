"""The analytic leak of an imprint layer (Fowl et al. 2022), and the site's refusal of the altered network.

A coordinator that may change the network puts a layer before it whose units fire above rising thresholds of a picture's
mean brightness. What is sent for two neighbouring units differs by the pictures between their thresholds alone, and is
those pictures, exactly; a secure sum changes nothing in that. So no site may train a network that is not the study's:
the real client is sent such weights here, as an order of a run, and has to refuse them by name before it trains.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedclient.data.dataset import Batch
from fedclient.secagg import Held, Member, check_context
from fedclient.training.trainer import fit
from shared_models import nets
from shared_models.errors import OrderRefused
from shared_models.identity import identity_public_key, new_site_keys
from shared_models.protect.context import Context, least_threshold
from shared_models.protect.ring import Layout, encoding
from shared_models.roster import Roster
from shared_models.seeds import rng
from shared_models.study import Study, Train, canonical, sha256
from shared_models.weights import Arrays, schema_of
from shared_models.wire import Order, pack, read_reply, write_order
from simulations.attacks.finding import Finding, Picture, Row, Strip, judged, psnr
from simulations.attacks.inversion import CLASSES, EDGE, STEP, batch_of, cross_entropy, victim
from simulations.attacks.people import Patient, as_sent
from simulations.attacks.sums import mean_of, secure_sum
from simulations.engine import NodeConfig, answer, identify

UNITS = 256
RECOVERED_DB = 30.0
BATCH = 8  # pictures of each site
NOWHERE = "0" * 64
STEPS = 2  # of the training that the client is asked for
TRAINED, SUMMED = "trained", "added up"


class Imprinted(nn.Module):
    """`net` behind an imprint layer: `UNITS` units over all pixels, whose sum is laid upon the picture, faintly."""

    def __init__(self, net: nn.Module, thresholds: NDArray[np.float64]) -> None:
        super().__init__()
        pixels = EDGE * EDGE
        self.imprint = nn.Linear(pixels, len(thresholds))
        self.back = nn.Linear(len(thresholds), 1, bias=False)  # the same way back for each unit
        self.net = net
        with torch.no_grad():
            self.imprint.weight.fill_(1 / pixels)
            self.imprint.bias.copy_(-torch.from_numpy(thresholds).float())
            self.back.weight.fill_(1e-3)

    def forward(self, images: Tensor) -> Tensor:
        fired = torch.relu(self.imprint(images.flatten(1)))
        faint: Tensor = self.net(images + self.back(fired)[:, :, None, None])
        return faint


def recovered(delta: Arrays) -> NDArray[np.float32]:
    """float32[N, rows, columns]: the pictures between neighbouring thresholds (Fowl et al. 2022, equation 3)."""
    weight = np.diff(np.asarray(delta["imprint.weight"], np.float64), axis=0, append=0.0)
    bias = np.diff(np.asarray(delta["imprint.bias"], np.float64), append=0.0)
    there = np.abs(bias) > 1e-6 * np.abs(bias).max()
    pictures = weight[there] / bias[there, None]
    clear: NDArray[np.float32] = np.clip(pictures, 0, 1).reshape(-1, EDGE, EDGE).astype(np.float32)
    return clear


def found_of(originals: Sequence[Picture], guesses: NDArray[np.float32]) -> list[tuple[float, Picture]]:
    """For each original the closest guess, with its PSNR in dB."""
    closest = [max(guesses, key=lambda guess, o=o: psnr(o, guess)) for o in originals]  # type: ignore[misc]
    return [(psnr(o, guess), guess) for o, guess in zip(originals, closest, strict=True)]


def attack(
    study: Study, nodes: Mapping[str, NodeConfig], people: Sequence[Patient], tick: Callable[[], None] = lambda: None
) -> Finding:
    """Reads pictures off a plain update and off a secure sum of three sites, then asks the real client for the like."""
    draw = rng(study.seed, "imprint")
    slices = [picture for patient in people for picture in patient.slices]
    chosen = [slices[n] for n in draw.choice(len(slices), min(3 * BATCH, len(slices)), replace=False)]
    others = np.array([picture.mean() for picture in slices], np.float64)  # how bright such pictures are, in general
    thresholds = np.quantile(others, np.linspace(0, 1, UNITS, endpoint=False)) - 1e-6
    net = Imprinted(victim(study.seed), thresholds)
    parts = [part.tolist() for part in np.array_split(np.arange(len(chosen)), 3)]
    deltas = {f"site-{n}": _step(net, [chosen[i] for i in part]) for n, part in enumerate(parts)}
    tick()
    alone = found_of([chosen[i] for i in parts[0]], recovered(deltas["site-0"]))
    largest = max(float(np.abs(array).max()) for delta in deltas.values() for array in delta.values())
    together = found_of(
        chosen, recovered(mean_of(secure_sum(deltas, clip=1.01 * largest, table=study.protect.secure_aggregation)))
    )
    tick()
    answers = [*admission(study, nodes), *in_a_secure_sum(study)]
    figure = f"slices above {RECOVERED_DB:g} dB, of {len(alone)}"
    rows = [
        judged("nothing", figure, _count(alone), above=len(alone) / 2 - 0.5, control=True),
        Row("secure sum of 3 sites", f"slices above {RECOVERED_DB:g} dB, of {len(together)}", _count(together)),
        *(
            Row(f"{'nothing: asked' if own else 'admission'}: {what}", "answered by", found, must, found == must,
                control=own, study=not own)
            for what, must, found, own in answers
        ),
    ]  # fmt: skip
    held = all(found == must for _, must, found, own in answers if not own)
    best = max(range(len(alone)), key=lambda n: alone[n][0])
    return Finding(
        "imprint",
        "Analytic leak through an imprint layer",
        f"A coordinator that lies: it puts {UNITS} units before a LeNet ({EDGE}x{EDGE}, {CLASSES} classes); one step "
        f"of plain SGD on {len(parts[0])} slices (Fowl et al. 2022). Then the same layer before the study's own "
        f"network, sent to the real client as an order.",
        tuple(rows),
        "Nothing: the client trains no network but the study's, and says so by a code."
        if held
        else "Pictures: the client took a network that is not the study's.",
        (Strip("Read off one update, where nobody checks the network",
               {"original": chosen[parts[0][best]], f"{alone[best][0]:.0f} dB": alone[best][1]}),),
    )  # fmt: skip


def _count(found: Sequence[tuple[float, Picture]]) -> float:
    return float(sum(decibels > RECOVERED_DB for decibels, _ in found))


def _step(net: nn.Module, pictures: Sequence[Picture]) -> dict[str, NDArray[Any]]:
    """One step of a client that checks nothing."""
    before = nets.arrays_of(net)
    batch: Batch = batch_of(pictures, [n % CLASSES for n in range(len(pictures))])
    train = Train(**{f: getattr(STEP, f) for f in ("local_steps", "optimizer", "momentum", "precision")},
                  batch_size=len(pictures), learning_rate=1e4)  # fmt: skip
    frozen = sorted(name for name, _ in net.named_parameters() if name.startswith("imprint"))
    fit(net, [batch], cross_entropy, train, torch.device("cpu"), only=frozen)
    after = nets.arrays_of(net)
    nets.load_arrays(net, before)
    return {name: after[name] - before[name] for name in before if name.startswith("imprint")}


# The defence


def admission(study: Study, nodes: Mapping[str, NodeConfig]) -> list[tuple[str, str, str, bool]]:
    """What was tried, what the real client must answer and what it answers, and whether it is the control.

    The control is the study's own network: of a client that trains nothing at all a refusal says nothing.
    """
    study = as_sent(study)
    study = replace(study, train=replace(study.train, local_steps=STEPS))
    own = nets.initial_weights(study)
    extra = {"imprint.weight": np.zeros((UNITS, 16), np.float32), "imprint.bias": np.zeros(UNITS, np.float32)}
    name = next(n for n in own if own[n].ndim > 1)
    wider = np.concatenate([own[name], np.zeros_like(own[name])])
    text = canonical(study).decode()
    other = text.replace(f'"{study.model.norm}"', '"instance"' if study.model.norm != "instance" else '"group"', 1)
    tried: list[tuple[str, str, Arrays, str, bool]] = [
        ("the study's own weights", TRAINED, own, text, True),
        ("weights with a layer more", "WEIGHTS_MISMATCH", {**own, **extra}, text, False),
        ("weights with a wider layer", "WEIGHTS_MISMATCH", {**own, name: wider}, text, False),
        ("another network in the study, under its digest", "STUDY_MISMATCH", own, other, False),
    ]
    return [(what, must, asked(study, nodes, weights, told), ours) for what, must, weights, told, ours in tried]


def asked(study: Study, nodes: Mapping[str, NodeConfig], weights: Arrays, text: str) -> str:
    """The code by which the installed client refuses to train on `weights`, or `TRAINED`."""
    from fedclient.app import app  # the one that a hospital runs

    identify()
    site, config = next(iter(nodes.items()))
    base = hashlib.sha256(b"imprint").hexdigest()
    order = Order("train", "imprint", 1, 1, text, sha256(study), base)
    with TemporaryDirectory() as folder:
        told = {**config, "site": site, "work": str(Path(folder))}
        reply = read_reply(answer(app, write_order(order, 1, pack(weights)), told), "imprint")
    return reply.refusal or TRAINED


def in_a_secure_sum(study: Study) -> list[tuple[str, str, str, bool]]:
    """As `admission`, of a site that is asked for the keys of a sum over the study's network, and over another one."""
    sites = ("site-0", "site-1", "site-2")
    keys = {site: new_site_keys().identity for site in sites}
    roster = Roster("imprint", 1, {site: identity_public_key(key).hex() for site, key in keys.items()})
    own = schema_of({n: a for n, a in nets.initial_weights(study).items() if a.dtype.kind == "f"})
    altered = Layout({**own, **schema_of({"imprint.bias": np.zeros(UNITS, np.float32)})})
    how, member = encoding(1.0), Member("site-0", keys["site-0"], roster)

    def summed(layout: Layout) -> str:
        context = Context(
            run="imprint", round=1, attempt=1, cohort=sites, threshold=least_threshold(3), least_cohort=3,
            roster_sha256=roster.sha256, model_sha256=NOWHERE, schema_sha256=layout.sha256, policy_sha256=NOWHERE,
            whole=3, clip=how.clip, scale=how.scale,
        )  # fmt: skip
        try:
            check_context(member, context, Held(NOWHERE, Layout(own).sha256, NOWHERE))
        except OrderRefused as refused:
            return refused.code
        return SUMMED

    return [
        ("a secure sum over the study's own network", SUMMED, summed(Layout(own)), True),
        ("a secure sum over another network", "SCHEMA_MISMATCH", summed(altered), False),
    ]
