"""A batch in parts where memory runs out: smaller parts one after the other, with the gradient of the whole batch.

A loss need not be a mean over examples (Dice over a batch, ignored voxels, pairs of patients). So the parts are first
run forward without their gradients, the loss and its slope by the answers are taken of the whole batch, and then each
part is run again and carries its share of that slope back (Gao et al. 2021, section 3.2). The network must treat
examples by themselves, as with GroupNorm and InstanceNorm; with BatchNorm it would learn something else, and memory
that runs out ends the round. What dropout draws for a part is drawn alike both times.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fedclient.device_errors import first_words, is_out_of_memory
from fedclient.training.device import free_memory
from fedclient.training.drift import Part, Pull
from shared_models.errors import OrderRefused
from shared_models.tasks.functions import Loss

log = logging.getLogger("fedclient")
LIMITS = (
    "End other programs, raise memory_gib or gpu_memory_share under [limits] in site.toml, or ask for a study with "
    "smaller patches or batches."
)
Cast: TypeAlias = Callable[[], AbstractContextManager[Any]]


@dataclass(slots=True)
class Room:
    """Into how many parts a batch is cut; grows when memory runs out, and stays so for the round.

    Attributes:
        splits: whether it may be cut; see `splits`.
        remedy: what helps where it cannot be cut any more.
    """

    parts: int = 1
    splits: bool = True
    remedy: str = LIMITS

    def within(self, size: int, attempt: Callable[[int], Tensor], forget: Callable[[], None]) -> Tensor:
        """The answer of `attempt` for as few parts as memory allows.

        Args:
            size: of the batch.
            forget: undoes what an attempt that failed has left.

        Raises:
            OrderRefused: `OUT_OF_MEMORY`: not even one example fits in, or a batch does not that must stay whole.
        """
        while True:
            try:
                return attempt(min(self.parts, size))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = first_words(error)
            # not in the handler: the error holds the frames of the attempt, and they hold its tensors
            forget()
            free_memory()
            if self.parts >= size:
                raise OrderRefused("OUT_OF_MEMORY", f"memory ran out over a single example ({said}). {self.remedy}")
            if not self.splits:
                raise OrderRefused(
                    "OUT_OF_MEMORY",
                    f'memory ran out over a batch of {size}, and with norm = "batch" it cannot be cut into parts: each '
                    f"would be normalised by itself ({said}). {self.remedy} Another norm helps too.",
                )
            self.parts = min(size, 2 * self.parts)
            log.warning("memory ran out; a batch of %d goes on in %d parts, with the same result", size, self.parts)


def splits(net: nn.Module) -> bool:
    """Whether a batch may be cut: not where a norm takes its statistics of the whole of it."""
    return not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())


def gradients(
    net: nn.Module,
    images: Tensor,
    truth: Tensor,
    loss_of: Loss,
    *,
    pulls: Sequence[Pull] = (),
    parts: int = 1,
    cast: Cast,
) -> Tensor:
    """Adds the gradient of the loss of a batch to what the parameters of `net` have; returns the loss.

    Args:
        pulls: added to the loss.
        parts: one after the other; 1 is the batch at once.
    """
    if parts == 1:
        with cast():
            loss = loss_of(net(images).float(), truth)
            for pull in pulls:
                loss = loss + pull(net)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    pieces = images.tensor_split(parts)
    states, answers = [], []
    with torch.no_grad(), cast():
        for piece in pieces:
            states.append(_drawn(images.device))
            answers.append(net(piece).float())
    whole = torch.cat(answers).requires_grad_()
    sizes = [len(answer) for answer in answers]
    with cast():
        loss = loss_of(whole, truth)
    loss.backward()  # type: ignore[no-untyped-call]
    assert whole.grad is not None
    told = loss.detach()
    slopes = torch.split(whole.grad, sizes)
    for number, (piece, state, slope) in enumerate(zip(pieces, states, slopes, strict=True)):
        with _drawing_again(state, images.device), cast():
            answer = net(piece).float()
            pulled = [pull(net, Part(number, parts, len(piece) / len(images))) for pull in pulls]
        pulling = [pull for pull in pulled if pull.requires_grad]
        torch.autograd.backward([answer, *pulling], [slope, *(None for _ in pulling)])
        told = told + sum(pull.detach() for pull in pulled)
    return told


def _drawn(device: torch.device) -> Tensor:
    """Where the generator that dropout draws from stands."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _drawing_again(state: Tensor, device: torch.device) -> Iterator[None]:
    """Sets the generator back for a part that is run once more, and then on again."""
    now = _drawn(device)
    _set(state, device)
    try:
        yield
    finally:
        _set(now, device)


def _set(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
