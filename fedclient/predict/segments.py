"""What becomes a segment: an answer as a whole, or each connected part of one whose parts are findings of their own."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedclient.predict.case import Prediction
from fedclient.predict.codes import meaning_of

MOST_PARTS = 32  # segments of one answer; what is left over shares the last


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment.

    Attributes:
        label: of people: `nodule 2`.
        answer: which of the task's answers, from 0.
        first, last: the parts that it holds, from 1; 0 and 0 for all of the answer.
    """

    label: str
    name: str
    answer: int
    first: int
    last: int
    volume_mm3: float
    longest_mm: float | None


def segments_of(prediction: Prediction) -> tuple[Segment, ...]:
    found: list[Segment] = []
    for n, answer in enumerate(prediction.answers):
        volume = answer.volume_mm3 or 0.0
        if not meaning_of(answer.name).single or len(answer.parts) < 2:
            found.append(Segment(answer.name, answer.name, n, 0, 0, volume, answer.longest_mm))
            continue
        own = answer.parts[: MOST_PARTS if len(answer.parts) <= MOST_PARTS else MOST_PARTS - 1]
        for at, part in enumerate(own, start=1):
            label = f"{answer.name} {at}"
            found.append(Segment(label, answer.name, n, at, at, part.volume_mm3, part.longest_mm))
        if rest := answer.parts[len(own) :]:
            size, longest = sum(part.volume_mm3 for part in rest), max(part.longest_mm for part in rest)
            label = f"{answer.name}, {len(rest)} smaller"
            found.append(Segment(label, answer.name, n, len(own) + 1, len(answer.parts), size, longest))
    return tuple(found)


def segment_planes(
    prediction: Prediction, segments: Sequence[Segment], order: Iterable[int]
) -> Iterator[NDArray[np.bool_]]:
    """bool[segments, I, J] of each plane k in `order`."""
    assert prediction.marks is not None
    for k in order:
        marked = prediction.marks[k]
        numbered: dict[int, NDArray[np.int32]] = {}
        planes = []
        for each in segments:
            if not each.first:
                planes.append(marked[each.answer])
                continue
            if each.answer not in numbered:
                numbered[each.answer] = prediction.measures[each.answer].numbered(k, marked[each.answer])
            number = numbered[each.answer]
            planes.append((number >= each.first) & (number <= each.last))
        yield np.stack(planes)
