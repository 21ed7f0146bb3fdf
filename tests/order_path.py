"""A coordinator that may say anything to the sites of a secure sum, and hears what they answer: the real order path."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedserver.secagg import SecureSum
from shared_models.protect.context import Context
from shared_models.protect.privacy import Protect
from shared_models.protect.ring import Layout
from shared_models.protect.secure import SecureAggregation, layout_of, wanted
from shared_models.roster import Roster
from shared_models.study import Rounds, Study, canonical, sha256
from shared_models.weights import Arrays, schema_of
from shared_models.wire import VECTOR, Order, Reply, pack, read_reply, tensors_of, write_order
from simulations.engine import LocalGrid, NodeConfig, answer
from simulations.roster import members, roster_of
from tests.toys import WEIGHTS, ToyLearner, nodes, toy_app

FLOATS: Arrays = {name: a for name, a in WEIGHTS.items() if a.dtype.kind == "f"}
SECURE = Protect(secure_aggregation=SecureAggregation(clip=8.0, most_examples=64))
STUDY = Study(name="toy", rounds=Rounds(count=1, quorum=3, deadline_s=1000), protect=SECURE)
BASE = "a" * 64
Told = dict[str, Any]  # an order's field -> the message of a step


@dataclass
class Coordinator:
    """Sites of a simulation that have trained, and the honest messages for them, which a test may change."""

    folder: Path
    study: Study = STUDY
    sites: tuple[str, ...] = ("a", "b", "c", "d", "e")
    learner: ToyLearner = field(default_factory=ToyLearner)
    run: str = "toy"
    base: str = BASE
    round: int = 1

    def __post_init__(self) -> None:
        self.configs: dict[str, NodeConfig] = {
            s: {**config, "sums": str(members(self.folder, self.sites)[s])}
            for s, config in nodes(self.sites, self.folder).items()
        }
        LocalGrid(toy_app(), {})  # Flower's identity of this process
        self.app = toy_app(self.learner)
        self.sum = SecureSum(self.context(), self.roster, self.layout)

    @property
    def roster(self) -> Roster:
        found = roster_of(self.folder)
        assert found is not None
        return found

    @property
    def layout(self) -> Layout:
        return layout_of(self.study, schema_of(FLOATS), True, False)

    def context(self, cohort: Iterable[str] | None = None, attempt: int = 1, **change: Any) -> Context:
        made = wanted(
            self.study, run=self.run, round_number=self.round, attempt=attempt, cohort=tuple(cohort or self.sites),
            roster_sha256=self.roster.sha256, model_sha256=self.base, layout=self.layout,
            study_sha256=sha256(self.study), trained=True,
        )  # fmt: skip
        return replace(made, **change)

    def order(self, kind: Any, **message: Any) -> Order:
        text, digests = canonical(self.study).decode(), (sha256(self.study), self.base)
        return Order(kind, self.run, self.round, 1, text, *digests, **message)

    def ask(self, site: str, kind: str, **message: Any) -> Reply:
        return read_reply(self.message(site, self.order(kind, **message)), site)

    def message(self, site: str, order: Order) -> Message:
        tensors = pack(FLOATS) if order.kind == "train" else None
        return answer(self.app, write_order(order, 1, tensors), self.configs[site])

    def code(self, site: str, kind: str, **message: Any) -> str | None:
        """Of the refusal; None of an order that was carried out."""
        reply = self.ask(site, kind, **message)
        assert (reply.kind == "refusal") == (reply.refusal is not None)
        return reply.refusal

    def train(self) -> None:
        for site in self.sites:
            assert self.ask(site, "train").kind == "ready"

    def upto(self, step: str) -> dict[str, Told]:
        """Brings every site honestly to `step`; the message of that step for each site, by the order's field."""
        self.train()
        told: dict[str, Told] = {s: {"context": self.sum.context} for s in self.sites}
        for now, take, close in self._steps():
            if now == step:
                return told
            for site in self.sites:
                take(site, told[site])
            told = close()
        return told

    def _steps(
        self,
    ) -> list[tuple[str, Callable[[str, dict[str, Any]], None], Callable[[], dict[str, Told]]]]:
        s, sites = self.sum, self.sites

        def mask(site: str, told: Told) -> None:
            vector = (tensors_of(self.message(site, self.order("mask", **told)), site) or {})[VECTOR]
            s.take_vector(site, vector.size, [vector])

        def inboxes() -> dict[str, Told]:
            made = s.close_sealed()
            return {site: {"inbox": made[site]} for site in sites}

        def alike(name: str, make: Callable[[], Any]) -> Callable[[], dict[str, Told]]:
            def close() -> dict[str, Told]:
                made = make()
                return {site: {name: made} for site in sites}

            return close

        def said(kind: str, name: str, take: Callable[[Any], None]) -> Callable[[str, dict[str, Any]], None]:
            return lambda site, told: take(getattr(self.ask(site, kind, **told), name))

        return [
            ("advertise", said("advertise", "advert", s.take_advert), alike("adverts", s.close_adverts)),
            ("share", said("share", "sealed", s.take_sealed), inboxes),
            ("mask", mask, alike("survivors", s.close_vectors)),
            ("confirm", said("confirm", "confirmation", s.take_confirmation),
             alike("confirmations", s.close_confirmations)),
            ("unmask", said("unmask", "revealed", s.take_revealed), dict),
        ]  # fmt: skip
