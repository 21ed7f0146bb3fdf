"""A site's round put together: which pulls, corrections and second models a study asks for, and what is remembered."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedclient.data.dataset import Batch
from fedclient.training.drift import Pull, contrast, corrected, next_control
from fedclient.training.moments import Moments
from fedclient.training.personal import (
    CONTROL_OF_SITE,
    LOCAL,
    MIXTURE,
    MOMENTS,
    MOMENTS_OF_OWN,
    OWN,
    PREVIOUS,
    ditto,
    filed,
    mixing,
    moving,
    part,
)
from fedclient.training.trainer import Fitted, Watch, fit
from shared_models import nets
from shared_models.control import control_of, without_control
from shared_models.control import filed as filed_control
from shared_models.study import Study, Train
from shared_models.tasks.functions import Loss
from shared_models.weights import Array, Arrays


@dataclass(frozen=True, slots=True)
class Start:
    """What a round begins from.

    Attributes:
        train: with the learning rate of the round.
        net: on the device, with the received weights, and the site's own in the layers that stay.
        tensors: as they were received: weights, and SCAFFOLD's control variate where there is one.
        memory: what the site remembers of its last counted round.
        stay: names of the tensors that do not leave the site.
        rates: share of the learning rate by parameter, where not all learn alike.
    """

    study: Study
    train: Train
    device: torch.device
    net: nn.Module
    tensors: Arrays
    memory: Arrays
    stay: frozenset[str]
    rates: Mapping[str, float] | None = None

    @property
    def shared(self) -> list[str]:
        """Names of the parameters that are trained together with the other sites."""
        return [name for name, _ in self.net.named_parameters() if name not in self.stay]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a round gave: tensors for the coordinator, named as they were received, and what the site keeps."""

    tensors: Arrays
    memory: Arrays
    fitted: Fitted
    variance: float | None


def train_round(
    start: Start,
    batches: Iterable[Batch],
    loss_of: Loss,
    further: Sequence[Pull],
    watches: Sequence[Watch],
) -> Trained:
    """Trains `start.net` in place on every batch, once, in all the ways that the study combines.

    Args:
        further: pulls beside those of the study's drift.
        watches: called for each batch before it is trained on.
    """
    study, train, net, device, memory = start.study, start.train, start.net, start.device, start.memory
    received, control, own = without_control(start.tensors), control_of(start.tensors), _second(start)
    share = torch.tensor(_share(start), dtype=torch.float64)
    beside: list[Watch] = [*watches]
    moments, of_own = (
        Moments(part(memory, prefix)) if train.moments == "kept" else None for prefix in (MOMENTS, MOMENTS_OF_OWN)
    )
    if own is not None and study.personal.ditto_lambda:
        pull = study.personal.ditto_lambda
        beside.append(ditto(own, net.parameters(), pull, loss_of, train, device, start.rates, of_own))
    elif own is not None:
        adaptive = study.personal.apfl_adaptive
        beside.append(mixing(net, own, share, adaptive, loss_of, train, device, start.rates, of_own))
    watch, variance = moving(net, start.shared) if study.strategy.weighting == "inverse_variance" else (None, None)
    if watch is not None:
        beside.append(watch)
    correct = only = None
    if train.scaffold:
        correct = corrected(start.shared, control, part(memory, CONTROL_OF_SITE), study.train.learning_rate)
    if study.personal.head_epochs:
        only = sorted({n for n, _ in net.named_parameters()} - nets.head_names(net))
    pulls = [*_pulls(start), *further]  # MOON's first: it looks at what the network has just seen
    if only is not None and start.rates is not None and not any(start.rates[name] for name in only):
        fitted = Fitted(sum(1 for _ in batches), ())  # the head is trained already, and steps are told by the batches
    else:
        fitted = fit(
            net, batches, loss_of, train, device, pulls=pulls, correct=correct, only=only, beside=beside,
            rates=start.rates, moments=moments,
        )  # fmt: skip
    trained = nets.arrays_of(net)
    sent: dict[str, Array] = {name: received[name] if name in start.stay else trained[name] for name in received}
    kept = filed({name: trained[name] for name in start.stay}, LOCAL)
    if train.moon_mu:
        kept |= filed(trained, PREVIOUS)
    if moments is not None:
        kept |= filed(moments.left(), MOMENTS)
    if own is not None:
        kept |= filed(nets.arrays_of(own), OWN)
        kept |= {} if of_own is None else filed(of_own.left(), MOMENTS_OF_OWN)
    if study.personal.apfl_alpha is not None:
        kept[MIXTURE] = np.array([float(share)])
    if train.scaffold:
        grown, made = _controls(start, trained, fitted.steps)
        sent |= filed_control(grown)
        kept |= filed(made, CONTROL_OF_SITE)
    return Trained(sent, kept, fitted, None if variance is None else variance())


def _controls(start: Start, trained: Arrays, steps: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """SCAFFOLD's `c` with the change of `c_i` added, as an update tells it, and `c_i` itself."""
    control, before = control_of(start.tensors), part(start.memory, CONTROL_OF_SITE)
    scale = start.study.train.learning_rate / start.train.learning_rate
    made = next_control(control, before, start.tensors, trained, start.shared, steps, scale)
    grown = {n: c + made[n] - before.get(n, np.zeros_like(c)) if n in made else c for n, c in control.items()}
    return grown, made


def _share(start: Start) -> float:
    """APFL's share: remembered, or the study's."""
    return float(start.memory[MIXTURE][0]) if MIXTURE in start.memory else start.study.personal.apfl_alpha or 0.0


def _second(start: Start) -> nn.Module | None:
    """The network of the site's own model, where it has one beside the federation's: remembered, or as received."""
    if not start.study.personal.ditto_lambda and start.study.personal.apfl_alpha is None:
        return None
    own = nets.network(start.study)
    nets.load_arrays(own, part(start.memory, OWN) or without_control(start.tensors))
    return own.to(start.device)


def _pulls(start: Start) -> list[Pull]:
    """MOON's contrast, from the second round on; FedProx's pull is `fit`'s own."""
    previous = part(start.memory, PREVIOUS)
    if not start.train.moon_mu or not previous:
        return []
    last, model = nets.network(start.study), start.study.model
    nets.load_arrays(last, previous)
    last.to(start.device)
    layers = nets.feature_layer(start.net, model), nets.feature_layer(last, model)
    return [contrast(start.net, layers[0], last, layers[1], start.train.moon_mu, start.train.moon_temperature)]
