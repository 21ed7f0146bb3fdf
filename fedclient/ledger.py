"""What privacy this site has spent: its own book, per data set, over all studies and years.

Work is reserved before a patient's image is touched and settled when it is done; what was reserved and never settled,
because a process died, counts as spent. The book, `site/ledger.db`, only grows: each entry carries the digest of the
one before it. How far it had come stands in `site/secrets/ledger.head` too, and may stand with the coordinator as a
receipt, so that a book that was cut or put back from a backup is refused.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedclient.chain import SCHEMA, Chain, Head
from shared_models.database import check, create, writing
from shared_models.errors import OrderRefused, StateInvalid
from shared_models.files import canonical_json
from shared_models.parse import STRICT, RunId, Sha256, parse, parse_json, plain
from shared_models.protect.accounting import Spend, epsilon, epsilon_beside, steps_within

VERSION = 1
_SCHEMA = f"{SCHEMA}PRAGMA user_version = {VERSION};"
DataSet = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,47}$")]


@dataclass(frozen=True, slots=True)
class Budget:
    """What the site allows on one data set from now on: the last one counts.

    Attributes:
        epsilon, delta: for one patient more or less, over everything that was ever trained on the data set.
    """

    __pydantic_config__ = STRICT
    data_set: DataSet
    epsilon: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, le=0.01, allow_inf_nan=False)]
    at_s: float = 0.0
    kind: Literal["budget"] = "budget"


@dataclass(frozen=True, slots=True)
class Reservation:
    """Work that is about to begin, and is spent from now on."""

    __pydantic_config__ = STRICT
    data_set: DataSet
    run: RunId
    study_sha256: Sha256
    patients: Annotated[int, Field(ge=1, lt=2**31)]
    spend: Spend
    at_s: float = 0.0
    kind: Literal["reservation"] = "reservation"


@dataclass(frozen=True, slots=True)
class Settlement:
    """Work that has ended: how many of the reserved steps were taken."""

    __pydantic_config__ = STRICT
    reservation: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=0, le=10**9)]
    at_s: float = 0.0
    kind: Literal["settlement"] = "settlement"


Entry = Annotated[Budget | Reservation | Settlement, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class _Line:
    """An entry as an adapter reads it: a union needs a place to stand in."""

    __pydantic_config__ = STRICT
    entry: Entry


@dataclass(frozen=True, slots=True)
class Account:
    """One data set's side of the ledger.

    Attributes:
        open: reservations that were never settled: work in progress, or of a process that died.
    """

    data_set: str
    budget: Budget | None
    spends: tuple[Spend, ...]
    runs: tuple[str, ...]
    open: int

    @property
    def spent(self) -> float:
        """Epsilon of all that was reserved, at the delta of the budget."""
        return 0.0 if self.budget is None else epsilon(self.spends, self.budget.delta)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger of the site in `folder`, read and found whole; `open_ledger` makes it."""

    folder: Path

    def set_budget(self, data_set: str, most_epsilon: float, delta: float) -> None:
        """Writes down what the site allows; a decision of people, whichever way it goes."""
        told = {"data_set": data_set, "epsilon": most_epsilon, "delta": delta, "at_s": time.time()}
        budget = parse(Budget, told, "budget")
        while not self._append(budget, self.head()):
            pass

    def reserve(self, asked: Reservation, more_steps: int = 0, most_epsilon: float | None = None) -> int:
        """Spends the privacy of work that is about to begin, and returns its number for `settle`.

        Args:
            more_steps: that are to follow; they are not spent yet, and must fit into the budget too.
            most_epsilon: that all work for this study may come to.

        Raises:
            OrderRefused: `DP_BUDGET_MISSING`, `DP_DELTA_LARGE`, `DP_EPSILON_HIGH` or `DP_BUDGET_EXHAUSTED`; nothing was
                spent.
        """
        reservation = parse(Reservation, plain(replace(asked, at_s=time.time())), "reservation")
        while True:
            head = self.check(reservation, more_steps, most_epsilon)
            if self._append(reservation, head):
                return head.entries + 1

    def check(self, asked: Reservation, more_steps: int = 0, most_epsilon: float | None = None) -> Head:
        """Raises what `reserve` would, and spends nothing; how far the ledger had come."""
        entries, head = self._read()
        account = _account(entries, asked.data_set)
        _allow(account, asked, more_steps)
        if most_epsilon is not None and account.budget is not None:
            before = _account(entries, asked.data_set, asked.study_sha256).spends
            _allow_study(before, _with(asked.spend, more_steps), most_epsilon, account.budget)
        return head

    def settle(self, reservation: int, steps: int) -> None:
        """Gives back the steps that were reserved and not taken; once for each reservation."""
        while True:
            entries, head = self._read()
            reserved = entries[reservation - 1] if 0 < reservation <= len(entries) else None
            if not isinstance(reserved, Reservation) or not 0 <= steps <= reserved.spend.steps:
                raise ValueError(f"{steps} steps of reservation {reservation}: there is none with so many")
            if any(isinstance(e, Settlement) and e.reservation == reservation for e in entries):
                raise ValueError(f"reservation {reservation} was settled before")
            if self._append(Settlement(reservation, steps, time.time()), head):
                return

    def accounts(self) -> list[Account]:
        """Every data set that has a budget or was trained on, by name."""
        entries, _ = self._read()
        names = {e.data_set for e in entries if not isinstance(e, Settlement)}
        return [_account(entries, name) for name in sorted(names)]

    def head(self) -> Head:
        return self._read()[1]

    def check_receipt(self, receipt: Head) -> None:
        """Raises OrderRefused, `LEDGER_ROLLBACK`, unless the ledger still begins with what `receipt` was given for."""
        self._chain.check_receipt(receipt)

    @property
    def _chain(self) -> Chain:
        until = "Until then nothing is trained with differential privacy here."
        return Chain(self.folder / "ledger.db", self.folder / "secrets" / "ledger.head", "LEDGER_ROLLBACK", until)

    def _read(self) -> tuple[list[Budget | Reservation | Settlement], Head]:
        """All entries, once their chain holds and reaches at least as far as it had come before."""
        rows, head = self._chain.read()
        where = self._chain.path
        listed = enumerate(rows, start=1)
        return [parse_json(_Line, row, f"{where}, entry {n}", StateInvalid).entry for n, row in listed], head

    def _append(self, entry: Budget | Reservation | Settlement, after: Head) -> bool:
        """Adds an entry behind `after`, synced, then moves the witness on; False when another process was first."""
        chain = self._chain
        with writing(chain.path) as db:
            if db.execute("SELECT count(*) FROM entries").fetchone()[0] != after.entries:
                return False
            head = chain.add(db, canonical_json(plain(_Line(entry))).decode())
        chain.seen(head)
        return True


def open_ledger(folder: Path) -> Ledger:
    """The ledger of the site in `folder`, made on first use.

    Raises:
        OrderRefused: `LEDGER_ROLLBACK`, when it is not the one that it was.
        StateInvalid: a file that is damaged, exposed or of another version.
    """
    ledger = Ledger(folder)
    chain = ledger._chain
    if not chain.witness.exists() and not chain.path.exists():
        create(chain.path, _SCHEMA)
    if not chain.path.exists():
        raise OrderRefused("LEDGER_ROLLBACK", f"{chain.path}: is missing. Restore it from a backup.")
    chain.begin()
    check(chain.path, VERSION, "`fedclient join`")
    ledger.head()
    return ledger


def _account(
    entries: Sequence[Budget | Reservation | Settlement], data_set: str, study_sha256: str | None = None
) -> Account:
    """One data set's side, or what of it one study has spent."""
    settled = {e.reservation: e.steps for e in entries if isinstance(e, Settlement)}
    budgets = [e for e in entries if isinstance(e, Budget) and e.data_set == data_set]
    reserved = {n: e for n, e in enumerate(entries, start=1) if isinstance(e, Reservation) and e.data_set == data_set}
    mine = {n: e for n, e in reserved.items() if study_sha256 in (None, e.study_sha256)}
    taken = [(e.spend, settled.get(number, e.spend.steps)) for number, e in mine.items()]
    return Account(
        data_set,
        budgets[-1] if budgets else None,
        tuple(Spend(s.noise_multiplier, s.sample_rate, steps) for s, steps in taken if steps),
        tuple(dict.fromkeys(e.run for e in mine.values())),
        sum(number not in settled for number in mine),
    )


def _allow(account: Account, asked: Reservation, more_steps: int) -> None:
    """Raises OrderRefused unless the budget bears what is asked for, and as many steps again as are to follow."""
    where, budget = f"data set {account.data_set!r}", account.budget
    spend = _with(asked.spend, more_steps)
    if budget is None:
        raise OrderRefused(
            "DP_BUDGET_MISSING", f"{where}: has no privacy budget. Decide on one: `fedclient budget --epsilon E`."
        )
    if budget.delta * asked.patients >= 1:
        raise OrderRefused(
            "DP_DELTA_LARGE",
            f"{where}: delta {budget.delta:g} for {asked.patients} patients allows to publish one of them. Set one "
            f"well below {1 / asked.patients:.1g} with `fedclient budget`.",
        )
    after = epsilon_beside(budget.epsilon, [*account.spends, spend], budget.delta)
    if after > budget.epsilon:
        fits = steps_within(budget.epsilon, account.spends, spend, budget.delta)
        raise OrderRefused(
            "DP_BUDGET_EXHAUSTED",
            f"{where}: epsilon {account.spent:.3g} of {budget.epsilon:g} is spent, "
            f"{budget.epsilon - account.spent:.3g} is left. Asked are {spend.steps} steps with noise "
            f"{spend.noise_multiplier:g} and sample rate {spend.sample_rate:g}, which would make it {after:.3g}; "
            f"at least {fits} such steps would fit. Nothing was spent or trained. More noise or fewer steps are the "
            f"coordinator's to choose, the budget is yours.",
        )


def _allow_study(before: Sequence[Spend], asked: Spend, most: float, budget: Budget) -> None:
    """Raises OrderRefused where a study would spend more than the site allows to one."""
    after = epsilon_beside(most, [*before, asked], budget.delta)
    if after > most:
        raise OrderRefused(
            "DP_EPSILON_HIGH",
            f"data set {budget.data_set!r}: the study would spend epsilon {after:.3g} at delta {budget.delta:g} in all "
            f"its rounds, those that were lost among them; site.toml allows one study {most:g} ([privacy] "
            f"most_epsilon). Nothing was spent or trained.",
        )


def _with(spend: Spend, more_steps: int) -> Spend:
    return replace(spend, steps=spend.steps + more_steps)
