"""A learner without images and a grid with a script, for tests of everything around training."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedclient.client import client_app
from fedclient.site import Site
from fedclient.work import Holding, Learned, Learner
from fedserver.checkpoint import RunFolder, create_run
from shared_models.metrics import counts
from shared_models.scores import Score
from shared_models.study import Study
from shared_models.weights import Arrays
from shared_models.wire import Split
from simulations.engine import LocalGrid, NodeConfig

WEIGHTS: Arrays = {
    "body.weight": np.zeros((3, 4), np.float32),
    "body.bias": np.full(4, 0.5, np.float32),
    "steps": np.array([7], np.int64),
}


@dataclass(frozen=True)
class ToyLearner:
    """Moves every weight by the site's number; spoils what a test asks it to spoil."""

    moves: Mapping[str, float] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)
    spoil: Mapping[str, Callable[[dict[str, np.ndarray]], None]] = field(default_factory=dict)

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        move = self.moves.get(site.name, 1.0)
        trained = {n: (a + move if a.dtype.kind == "f" else a + 2).astype(a.dtype) for n, a in weights.items()}
        if site.name in self.spoil:
            self.spoil[site.name](trained)
        return Learned(trained, self.examples.get(site.name, 10), steps=3, losses=(1.0, 0.5), device="cpu")

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        return {label: counts([0.5, 0.75], site.smallest_count) for label in study.task.labels}

    def holding(self, site: Site, study: Study) -> Holding:
        return Holding(8, 2, 8)


def nodes(sites: Iterable[str], folder: Path) -> dict[str, NodeConfig]:
    return {s: {"site": s, "data": str(folder), "work": str(folder)} for s in sites}


def new_run(folder: Path, study: Study, weights: Arrays = WEIGHTS) -> RunFolder:
    return create_run(folder, "toy", study, weights)


class Clock:
    """Seconds that pass only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.05)


class ScriptedGrid(LocalGrid):
    """Replies that come after a delay, never, or as Flower's errors.

    `delays` gives seconds for each (site, attempt) or site; `errors` gives Flower's error code for (site, attempt).
    """

    def __init__(
        self,
        app: ClientApp,
        configs: Mapping[int, NodeConfig],
        clock: Clock,
        delays: Mapping[str, float] | None = None,
        errors: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        super().__init__(app, configs)
        self.clock, self.delays, self.errors = clock, delays or {}, errors or {}
        self.sent: dict[str, tuple[float, str, Message]] = {}
        self.asked: dict[str, int] = {}
        self.configs = configs

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        listed = list(messages)
        ids = list(super().push_messages(listed))
        for message_id, message in zip(ids, listed, strict=True):
            site = str(self.configs[message.metadata.dst_node_id]["site"])
            self.sent[message_id] = (self.clock(), site, message)
            self.asked[site] = self.asked.get(site, 0) + 1
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies: list[Message] = []
        for message_id in list(message_ids):
            at, site, message = self.sent[message_id]
            if self.clock() - at < self.delays.get(site, 0.0):
                continue
            code = self.errors.get((site, self.asked[site]))
            if code is not None and message_id in self._queue:
                del self._queue[message_id]
                replies.append(Message(Error(code=code, reason="gone"), reply_to=message))
                continue
            replies += super().pull_messages([message_id])
        return replies


class Rubbish(ScriptedGrid):
    """North's replies cannot even be parsed. Flower 1.41 has handed over all that a call asks for before it parses any
    of it: once that raises, it says of each, also in later calls, that it is gone."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gone: set[str] = set()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        lost = [self.sent[i][2] for i in ids if i in self.gone]
        found = list(super().pull_messages([i for i in ids if i not in self.gone]))
        claimed = {message.metadata.reply_to_message_id for message in found}
        self.gone |= claimed
        if any(self.sent[i][1] == "north" for i in claimed):
            raise ValueError("no such record")
        return [Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "gone"), reply_to=order) for order in lost] + found


def toy_app(learner: Learner | None = None) -> ClientApp:
    return client_app(learner or ToyLearner())
