"""What an order would spend of the privacy of this site's patients: asked of the site's rules and of its ledger.

Before an image is opened the round's steps are reserved, and refused unless all rounds that are still to come fit into
the budget too: a study that cannot end is not begun. Work that dies stays spent; trained anew, it is paid for anew,
because its noise is another. Work that the hospital itself ends, by its hours or its word, costs nothing, as nothing of
it leaves. Whatever is told of a refusal is one code; how much was asked and is left stays here.
"""

from dataclasses import dataclass

from fedclient.ledger import Ledger, Reservation, open_ledger
from fedclient.site import Site
from shared_models.errors import OrderRefused
from shared_models.files import private_folder
from shared_models.study import Study
from shared_models.wire import Order

DATA_SET = "all"  # a site has one data folder, and all its patients one budget
# By which the hospital itself ends work under way: no image has a say in that
STOPPED = ("STUDY_REFUSED", "STUDY_WITHDRAWN", "APPROVAL_PENDING", "OUTSIDE_HOURS")
SIMULATED_EPSILON = 1000.0  # a researcher's ledger keeps count and refuses nothing


@dataclass(frozen=True, slots=True)
class Spending:
    """A round's privacy, spent from now on; `settle` says that the work was done."""

    ledger: Ledger
    reservation: int
    steps: int

    def settle(self) -> None:
        self.ledger.settle(self.reservation, self.steps)

    def give_back(self, refused: OrderRefused) -> None:
        """Spends nothing where the hospital itself has ended the work: nothing has left, and nothing of it will.

        What ends by itself, or takes too long, stays spent: its end may tell of the patients.
        """
        if refused.code in STOPPED:
            self.ledger.settle(self.reservation, 0)


def check_order(order: Order, study: Study, site: Site) -> None:
    """Raises OrderRefused, `DP_REQUIRED` or `DP_UNNOISED`, for what would leave without noise and must not."""
    if study.protect.privacy is None:
        if site.privacy.required:
            raise OrderRefused(
                "DP_REQUIRED",
                f"run {order.run}: the study has no [protect.privacy], and site.toml has [privacy] required = true. "
                f"Nothing was read. Ask the coordinator for a study that is differentially private.",
            )
    elif order.kind in ("statistics", "evaluate") or order.evaluate is not None:
        raise OrderRefused(
            "DP_UNNOISED",
            f"round {order.round}: asks for scores or histograms in a differentially private study. They carry no "
            f"noise, so they stay here.",
        )


def check_budget(order: Order, study: Study, site: Site, patients: int) -> None:
    """Raises what `reserved` would, before anything is spent or read."""
    _ledger(order, study, site).check(_asked(order, study, patients), *_limits(order, study, site))


def reserved(order: Order, study: Study, site: Site, patients: int) -> Spending:
    """Reserves what a training order of a private study spends.

    Raises:
        OrderRefused: `DP_BUDGET_MISSING`, `DP_BUDGET_EXHAUSTED`, `DP_DELTA_LARGE`, `DP_EPSILON_HIGH`, `NO_CASES` or
            `LEDGER_ROLLBACK`; nothing was spent.
    """
    asked = _asked(order, study, patients)
    ledger = _ledger(order, study, site)
    return Spending(ledger, ledger.reserve(asked, *_limits(order, study, site)), asked.spend.steps)


def _asked(order: Order, study: Study, patients: int) -> Reservation:
    privacy, steps = study.protect.privacy, study.train.local_steps
    assert privacy is not None, "of a private study"
    assert steps is not None, "check_private has seen to it"
    if not patients:
        raise OrderRefused("NO_CASES", "no case with a label for training. Run `fedclient check`.")
    return Reservation(DATA_SET, order.run, order.study_sha256, patients, privacy.spend(steps))


def _limits(order: Order, study: Study, site: Site) -> tuple[int, float | None]:
    """Steps of the rounds that are still to come, and what the site allows one study."""
    return (study.train.local_steps or 0) * (study.rounds.count - order.round), site.privacy.most_epsilon


def _ledger(order: Order, study: Study, site: Site) -> Ledger:
    """The site's book; in a simulation, one for each run and site in the folder of results."""
    if site.deployed:
        return open_ledger(site.folder)
    folder = site.folder / "ledgers" / f"{order.run}-{order.study_sha256[:12]}" / site.name
    private_folder(folder)
    ledger = open_ledger(folder)
    if not ledger.accounts() and study.protect.privacy is not None:
        ledger.set_budget(DATA_SET, SIMULATED_EPSILON, study.protect.privacy.delta)
    return ledger
