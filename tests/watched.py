"""A federation for the dashboard: runs that have ended, a queue, and one under way whose sites a test lets come."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedclient.policy import Policy
from fedclient.site import Site
from fedclient.work import Learned
from fedserver.cohort import Presence
from fedserver.enrol import Federation, invite
from fedserver.lifecycle import revoke
from fedserver.state import Run, RunState, add_run, change_run, saw_site
from fedserver.submit import submit
from shared_models.metrics import counts
from shared_models.scores import Score
from shared_models.study import Evaluate, Rounds, Study, sha256
from shared_models.weights import Arrays
from shared_models.wire import Split
from tests.edge import running_edge
from tests.hospitals import Hospitals
from tests.toys import ToyLearner, toy_app

SITES = ("east-university", "north-hospital", "south-clinic")
LUNGS = Study(
    name="lung-ct", title="Lungs on CT", rounds=Rounds(count=8, quorum=2, deadline_s=600, gather_s=0),
    evaluate=Evaluate(every=1),
)  # fmt: skip


@dataclass(frozen=True)
class Improves(ToyLearner):
    """Losses fall and scores rise from round to round, each site's a little otherwise."""

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        learned = super().learn(site, study, round_number, weights)
        shift = SITES.index(site.name) / 10
        losses = tuple(float((0.9 + shift) * np.exp(-0.35 * round_number) + 0.05 * step) for step in (1, 0))
        return Learned(learned.weights, 20 + 10 * SITES.index(site.name), 6, losses, device="cpu")

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        done, shift = float(weights["body.bias"][0]) - 0.5, 0.03 * SITES.index(site.name)
        value = 0.96 - shift - 0.5 * float(np.exp(-0.5 * done))
        return {label: counts([value] * 12, site.smallest_count) for label in study.task.labels}


class _Over(Exception):
    """The test has seen enough."""


@dataclass
class Watched:
    """The federation, and the run `now` that is carried out in a thread as soon as `begin` is called.

    Attributes:
        online: sites whose node is there; the others are away.
    """

    hospitals: Hospitals
    online: set[str] = field(default_factory=set)
    _thread: threading.Thread | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def federation(self) -> Federation:
        return self.hospitals.edge.federation

    @property
    def folder(self) -> Path:
        return self.federation.folder

    def seen(self, *sites: str) -> None:
        for site in sites:
            saw_site(self.federation.state, site, time.time())

    def ended(self, name: str, study: Study = LUNGS) -> None:
        """A run from its begin to its end."""
        self._row(name, study, "finished")
        self.hospitals.run(study, name, toy_app(Improves()))

    def begin(self, name: str = "now", study: Study = LUNGS) -> None:
        self._row(name, study, "running")
        numbers = {site: i for i, site in enumerate(SITES, start=1)}

        def presence() -> Presence:
            if self._over.is_set():
                raise _Over
            here = {site: number for site, number in numbers.items() if site in self.online}
            return Presence(here, {site: "last heard of 42 s ago" for site in SITES if site not in here})

        def carry_out() -> None:
            change: dict[str, Any] = {
                "presence": presence,
                "clock": time.monotonic,
                "sleep": time.sleep,
                "poll_s": 0.05,
            }
            with suppress(_Over):
                self.hospitals.run(study, name, toy_app(Improves()), presence_s=0.1, **change)
                change_run(self.federation.state, name, time.time(), "finished")

        self._thread = threading.Thread(target=carry_out, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The run is over where it stands."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(60)

    def _row(self, name: str, study: Study, state: RunState) -> None:
        now = time.time()
        add_run(self.federation.state, Run(name, study.name, sha256(study), state, None, now, now, ""))


@contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    """Three sites that have joined, one that is invited, one that was shut out."""
    with running_edge(folder / "federation") as edge:
        hospitals = Hospitals(edge, folder / "sites")
        for name in (*SITES, "old-partner"):
            hospitals.join(name, Policy(approval="inside-policy"))
        hospitals.sites.pop("old-partner")
        invite(edge.federation, "west-hospital")
        revoke(edge.federation, "old-partner", "its agreement has ended")
        made = Watched(hospitals)
        try:
            yield made
        finally:
            made.end()


def queued(federation: Federation, study: Study, *names: str) -> None:
    for name in names:
        submit(federation, study, name, True)
