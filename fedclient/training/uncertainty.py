"""How sure an answer is: how far answers to changed copies of an example lie apart, or those of the last rounds.

Each member is one way to ask: the example as it is, mirrored, moved by whole pixels, grainier (test-time augmentation,
Wang et al. 2019), or another round's weights (an ensemble of snapshots, Huang et al. 2017). Moves are undone on the
answer, so that members lie on one grid.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_models.study import Study
from shared_models.tasks.chosen import functions_of

COPIES = 8  # changed copies, beside the example as it is
MOST_SHIFT = 0.03  # of an edge
GRAIN = 0.02  # standard deviation, in shares of the example's range, where the study trains with none
Probabilities: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """What the members say of one example.

    Attributes:
        kind: `test-time augmentation` or `ensemble of N rounds`.
        mean, deviation: float64[L, *size] of a segmentation, or [L]: over the members' probabilities.
        entropy: float64[*size] or [], in nats: of the mean answer. Of sigmoids the mean over the answers.
        disagreement: likewise: the entropy less the members' own mean entropy (mutual information; Depeweg et al.
            2018, section 3): what more training could settle, the rest is in the image.
        members: how many.
    """

    kind: str
    mean: Probabilities
    deviation: Probabilities
    entropy: Probabilities
    disagreement: Probabilities
    members: int


def augmented(net: nn.Module, image: Tensor, study: Study, chance: np.random.Generator, left_right_axis: int) -> Spread:
    """Test-time augmentation of an example float32[C, *size]; mirrored only where the study trains so.

    Args:
        left_right_axis: 0 where rows run between left and right (volumes), 1 where columns do (pictures).
    """
    device, task = next(net.parameters()).device, functions_of(study.task)
    given = image.to(device).float()
    found = [_answer(net, given, task.chances)]
    for _ in range(COPIES):
        changed, undo = _changed(given, study, chance, 1 + left_right_axis)
        found.append(undo(_answer(net, changed, task.chances)))
    return spread("test-time augmentation", found, study.task.exclusive)


def ensemble(nets: Iterable[nn.Module], image: Tensor, study: Study) -> Spread:
    """Of several networks, one in memory at a time where `nets` makes them so."""
    task = functions_of(study.task)
    found = [_answer(net, image.to(next(net.parameters()).device).float(), task.chances) for net in nets]
    return spread(f"ensemble of {len(found)} rounds", found, study.task.exclusive)


def spread(kind: str, members: Sequence[Probabilities], exclusive: bool) -> Spread:
    """Of probabilities [L, *size] or [L], one for each member."""
    together = np.stack(members)
    mean = together.mean(axis=0)
    entropy = entropy_of(mean, exclusive)
    own = np.mean([entropy_of(each, exclusive) for each in members], axis=0)
    disagreement = np.maximum(entropy - own, 0.0)  # of equal members rounding may leave less than nothing
    return Spread(kind, mean, together.std(axis=0), entropy, disagreement, len(members))


def entropy_of(chances: Probabilities, exclusive: bool) -> Probabilities:
    """In nats, of a softmax over axis 0, or the mean over it of as many sigmoids."""
    sure = np.clip(chances, 1e-12, 1.0)
    if exclusive:
        return np.asarray(-(chances * np.log(sure)).sum(axis=0))
    other = np.clip(1 - chances, 1e-12, 1.0)
    return np.asarray(-(chances * np.log(sure) + (1 - chances) * np.log(other)).mean(axis=0))


def _answer(net: nn.Module, image: Tensor, chances: Callable[[Tensor], Tensor]) -> Probabilities:
    net.eval()
    with torch.no_grad():
        return np.asarray(chances(net(image[None]).float())[0].cpu().numpy(), np.float64)


def _changed(
    image: Tensor, study: Study, chance: np.random.Generator, sideways: int
) -> tuple[Tensor, Callable[[Probabilities], Probabilities]]:
    """A changed copy, and what takes its answer back onto the example; [L] stays as it is.

    Args:
        sideways: the axis of `image` that is mirrored.
    """
    size = image.shape[1:]
    steps = [int(chance.integers(-most, most + 1)) for most in (int(MOST_SHIFT * edge) for edge in size)]
    mirror = study.augment.flip_left_right and chance.random() < 0.5
    axes = tuple(range(1, image.ndim))
    grain = study.augment.noise or GRAIN * float(image.max() - image.min())
    moved = torch.roll(image, steps, axes)
    if mirror:
        moved = torch.flip(moved, (sideways,))
    noise = chance.standard_normal(tuple(image.shape), dtype=np.float32) * grain
    moved = moved + torch.from_numpy(noise).to(image)

    def undo(answer: Probabilities) -> Probabilities:
        if answer.ndim == 1:
            return answer
        back = np.flip(answer, sideways) if mirror else answer
        return np.roll(back, [-step for step in steps], axes)

    return moved, undo
