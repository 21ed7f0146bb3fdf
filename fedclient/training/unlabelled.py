"""What is learned from cases that nobody has labelled: a loss beside that of the labelled ones, batch by batch.

Two views of each image: the first as `[augment]` has it, the second changed once more, in place and in grey level; what
is wanted of the second is moved along with it. So the network cannot agree with itself by blurring.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional as F

from fedclient.data.augment import Draw, changed, draw
from fedclient.data.dataset import DataSet
from fedclient.training.drift import WHOLE, Part, Pull
from fedclient.training.micro import Room
from fedclient.training.trainer import Watch, autocast, on_device
from shared_models.study import Augment, Study
from shared_models.tasks.functions import TaskFunctions

ENDLESS = 10**9  # steps: more than any round has


@dataclass(frozen=True, slots=True)
class Views:
    """A batch as the second view has it.

    Attributes:
        images: float32[B, C, *size].
        wanted: float32[B, L, *size] or [B, L]: probabilities that the answers to them are to have.
        valid: float32[B, 1, *size] or [B, 1]: where these are known.
    """

    images: Tensor
    wanted: Tensor
    valid: Tensor


def consistency(
    net: nn.Module, cases: DataSet, study: Study, task: TaskFunctions, chance: Generator, weight: float
) -> tuple[Watch, Pull]:
    """What draws the next batch of unlabelled cases, to be called once a step, and its loss times `weight`.

    Both are made anew for each round.

    Args:
        net: as the round begins; the teacher of `mean_teacher` begins with its weights.
        chance: of batches and views; theirs alone until the round ends.
    """
    table = study.unlabelled
    drawing, viewing = chance.spawn(2)
    device = next(net.parameters()).device
    later = device.type == "cuda"
    drawn = cases.batches(study.train.batch_size, drawing, steps=ENDLESS, augment=study.augment, later=later)
    batches = on_device(device, drawn)
    teacher = copy.deepcopy(net).eval().requires_grad_(False) if table.method == "mean_teacher" else None
    loss_of = agreement if table.method == "mean_teacher" else pseudo_labels(table.threshold, study.task.exclusive)

    room, drawn_last = Room(), list[Views]()

    def look(images: Tensor, masks: Tensor) -> None:
        first, _ = next(batches)
        if teacher is not None:
            follow(teacher, net, table.decay)
        with autocast(study.train, device):
            chances = answered(net if teacher is None else teacher, first, task.chances, room)
            drawn_last[:] = [again(first, chances, study.augment, table.mix, viewing)]

    def pull(trained: nn.Module, part: Part = WHOLE) -> Tensor:
        (second,) = drawn_last
        images, wanted, valid = (
            each.tensor_split(part.of)[part.number] for each in (second.images, second.wanted, second.valid)
        )
        if not len(images):  # fewer of them than of the labelled ones
            return torch.zeros((), device=device)
        logits = trained(images).float()
        share = valid.sum() / second.valid.sum().clamp(min=1)  # of the mean over all parts
        return weight * loss_of(logits, task.chances(logits), wanted, valid) * share

    return look, pull


def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Moves the teacher towards the student (Tarvainen & Valpola 2017, equation 1), statistics of norms at once."""
    with torch.no_grad():
        for kept, learned in zip(teacher.parameters(), student.parameters(), strict=True):
            kept.lerp_(learned, 1 - decay)
        for statistic, now in zip(teacher.buffers(), student.buffers(), strict=True):
            statistic.copy_(now)


def answered(net: nn.Module, images: Tensor, chances: Callable[[Tensor], Tensor], room: Room) -> Tensor:
    """Probabilities of a network that is left as it was; no dropout, no gradient."""
    learning = net.training
    net.eval()
    with torch.no_grad():
        found = room.within(
            len(images),
            lambda parts: torch.cat([chances(net(piece).float()) for piece in images.tensor_split(parts)]),
            lambda: None,
        )
    net.train(learning)
    return found


def again(images: Tensor, chances: Tensor, augment: Augment, mix: bool, chance: Generator) -> Views:
    """The second view: what `augment` allows once more, but for the mirror, and halves of images exchanged."""
    count, dims = len(images), images.ndim - 2
    drawn = draw(replace(augment, flip_left_right=False), count, dims, chance)
    axes = np.zeros(count, np.intp)
    everywhere = torch.ones((count, *images.shape[2:]), dtype=torch.uint8, device=images.device)
    seen, _ = changed(images.clone(), everywhere.clone(), axes, drawn, chance)
    if chances.ndim == 2:  # a class stays what it is, wherever the image is moved
        return Views(seen, chances, torch.ones((count, 1), device=images.device))
    wanted, there = changed(chances.clone(), everywhere, axes, _moves(drawn), chance)
    valid = there[:, None].float()
    if mix and count > 1:
        seen, wanted, valid = mixed(seen, wanted, valid, chance)
    return Views(seen, wanted, valid)


def _moves(drawn: Draw) -> Draw:
    """The part of a draw that moves things; grey levels stay."""
    none = np.zeros_like(drawn.gamma)
    return replace(drawn, gamma=none + 1, brightness=none, noise=none)


def mixed(images: Tensor, wanted: Tensor, valid: Tensor, chance: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Each image with a rectangle, half of its area, of the next one in the batch, and likewise what is wanted of it.

    French et al. 2020, section 3.3: edges in the ratio of r to 1 - r, with r drawn evenly on a logarithmic scale.
    """
    size = images.shape[2:]
    inside = torch.zeros((len(images), 1, *size), dtype=torch.bool, device=images.device)
    for n in range(len(images)):
        share = np.exp(chance.uniform(np.log(0.5), 0))  # of the first edge; the others make it half of the whole
        edges = [share, *[(0.5 / share) ** (1 / (len(size) - 1))] * (len(size) - 1)]
        window: list[slice] = []
        for edge, whole in zip(edges, size, strict=True):
            long = round(float(edge) * whole)
            begin = int(chance.integers(0, whole - long + 1))
            window.append(slice(begin, begin + long))
        inside[n, 0][tuple(window)] = True
    one, two, three = (torch.where(inside, each.roll(1, 0), each) for each in (images, wanted, valid))
    return one, two, three


Agreement: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # logits, chances, wanted, valid -> loss


def agreement(logits: Tensor, chances: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Mean square of the difference of probabilities, where it is known what is wanted."""
    square = (chances - wanted) ** 2 * valid
    return square.sum() / (valid.sum() * chances.shape[1]).clamp(min=1)


def pseudo_labels(threshold: float, exclusive: bool) -> Agreement:
    """Cross-entropy with what is wanted rounded, where it is sure; what is not sure counts as 0 (Sohn et al. 2020)."""

    def softmax(logits: Tensor, chances: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
        most, label = wanted.max(dim=1)
        sure = (most >= threshold) * valid[:, 0]
        return (F.cross_entropy(logits, label, reduction="none") * sure).sum() / valid.sum().clamp(min=1)

    def sigmoid(logits: Tensor, chances: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
        sure = ((wanted >= threshold) | (wanted <= 1 - threshold)) * valid
        losses = F.binary_cross_entropy_with_logits(logits, (wanted > 0.5).float(), reduction="none") * sure
        return losses.sum() / (valid.sum() * logits.shape[1]).clamp(min=1)

    return softmax if exclusive else sigmoid


def nothing(logits: Tensor, truth: Tensor) -> Tensor:
    """The loss of a batch without labels: none, and no gradient."""
    return 0.0 * logits.sum()


def worth(labelled: int, unlabelled: int, study: Study, round_number: int) -> int:
    """Examples that an update counts as: those with labels, and a share of those without; 1 at least."""
    table = study.unlabelled
    if table.method == "none":
        return labelled
    return max(1, labelled + round(unlabelled * table.example_weight * table.ramp(round_number)))
