"""A hospital's page in a real browser: work shows without a reload, wide, narrow, by keyboard; old figures are told."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedclient.cli
from fedclient.gate.card import card_bytes, card_of
from fedclient.gate.facts import needs_of
from fedclient.gate.run import check
from fedclient.ledger import Reservation, open_ledger
from fedclient.node import NodeFiles
from fedclient.policy import Policy
from fedclient.site import Site
from fedclient.work import Learned
from fedserver.cohort import Presence
from shared_models.files import write_atomic
from shared_models.protect.accounting import Spend
from shared_models.study import Evaluate, Rounds, Study
from shared_models.supervise import Child, only_one, supervise
from shared_models.weights import Arrays
from simulations.bench.gate import site_of
from simulations.fixtures.sown import LUNG, Set
from tests.edge import running_edge
from tests.hospitals import Hospitals
from tests.processes.browser import LIVE, Browser, chromium, served_page
from tests.processes.serving import missing
from tests.processes.serving import until as wait_until
from tests.toys import ToyLearner, toy_app

pytestmark = [pytest.mark.process, pytest.mark.skipif(bool(missing("chromium")), reason=missing("chromium"))]
until = partial(wait_until, seconds=120.0)
STUDY = Study(
    name="lung-ct", title="Lungs on CT", rounds=Rounds(count=4, quorum=2, deadline_s=6000, gather_s=0),
    evaluate=Evaluate(every=1),
)  # fmt: skip
PATIENT = "PID-0817-DOE"
FASTER = 20  # than time goes the coordinator waits, who asks again after 15 s


@dataclass(frozen=True)
class Slow(ToyLearner):
    """Trains as long as the test wants it to."""

    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        if site.name == "north":
            NodeFiles(site.folder).order.touch()  # as the node does
            assert self.go_on.acquire(timeout=300)
            NodeFiles(site.folder).order.unlink()
        return super().learn(site, study, round_number, weights)


@dataclass
class AtWork:
    """A hospital whose node is supervised, and whose coordinator has a run for it."""

    hospitals: Hospitals
    learner: Slow = field(default_factory=Slow)

    @property
    def site(self) -> Path:
        return self.hospitals.sites["north"]

    def heard(self) -> None:
        """The node has asked and was answered."""
        contact = NodeFiles(self.site).contact
        contact.parent.mkdir(exist_ok=True)
        contact.touch()

    def run(self) -> None:
        presence = Presence({"north": 1, "south": 2})
        pace: dict[str, Any] = {
            "clock": lambda: FASTER * time.monotonic(),
            "sleep": lambda pause: time.sleep(pause / FASTER),
        }
        self.hospitals.run(STUDY, "lung-ct-1", toy_app(self.learner), presence=lambda: presence, **pace)


@contextmanager
def node(folder: Path) -> Iterator[None]:
    """The supervisor of the site, with stand-ins for its processes."""
    waits, stop = [sys.executable, "-c", "import time; time.sleep(600)"], threading.Event()
    with only_one(folder):
        children = [Child(name, waits, folder / "logs" / f"{name}.log") for name in ("node", "executor")]
        thread = threading.Thread(target=supervise, args=(children, stop, folder))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(30)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AtWork]:
    folder = tmp_path_factory.mktemp("site-page")
    images = Set(folder / PATIENT / "data")
    for n in range(30):
        images.film(n % 9, split="train" if n < 18 else "test")
    data = images.finish()
    with running_edge(folder / "federation") as edge:
        hospitals = Hospitals(edge, folder / "sites")
        site = hospitals.join("north", Policy(hours=("00:00-23:59", "23:59-00:00")), data)
        hospitals.join("south", Policy(approval="inside-policy"))
        write_atomic(site / "gate/card.json", card_bytes(card_of(check(site_of(data, folder), needs_of(LUNG)), 11)))
        open_ledger(site).set_budget("all", 8.0, 1e-5)
        open_ledger(site).reserve(Reservation("all", "earlier", "a" * 64, 100, Spend(8.0, 0.1, 100)))
        (site / "cache/plan").mkdir(parents=True)
        (site / "cache/plan/0a1b").write_bytes(b"x" * 4_000_000)
        with node(site):
            yield AtWork(hospitals)


@dataclass(frozen=True)
class Shown:
    """The page of a site, in a browser, and the process that serves it."""

    page: Browser
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def live(self) -> Browser:
        self.page.open(f"{self.url}/")
        until(lambda: self.page.value(LIVE) == "on", "the page is live")
        return self.page


@pytest.fixture(scope="module")
def shown(here: AtWork, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("browser")
    words = ["fedclient.cli", "page", "--site", str(here.site)]
    with served_page(words, "/", folder / "log") as (process, url), chromium(folder) as page:
        yield Shown(page, url, process, folder / "log")


def text(page: Browser, section: str) -> str:
    return str(page.value(f"document.querySelector('[data-section={section}]').innerText"))


def shows(page: Browser, section: str, words: str) -> None:
    until(lambda: words in text(page, section), f"{section} shows {words!r}, not {text(page, section)!r}")


def test_a_study_that_comes_and_a_round_under_way_show_without_a_reload(here, shown, tmp_path):
    page = shown.live()
    here.heard()
    shows(page, "connection", "connected, and waiting for orders")
    page.value("""window.before = 'kept'; document.querySelector('#card details').open = true;
        document.querySelector('#card .scroll').focus();
        getSelection().selectAllChildren(document.querySelector('#policy li'))""")
    chosen = page.value("getSelection().toString()")

    running = threading.Thread(target=here.run, daemon=True)
    running.start()
    shows(page, "studies", "waits for your decision")
    shows(page, "queue", "waits for your decision")
    assert CliRunner().invoke(fedclient.cli.app, ["approve", "lung-ct", "--site", str(here.site)]).exit_code == 0
    shows(page, "studies", "approved")
    here.heard()
    shows(page, "now", "round 1 of 4")
    assert "training" in text(page, "now")
    assert "Lungs on CT" in text(page, "now")
    here.learner.go_on.release(2)
    shows(page, "now", "round 3 of 4")
    shows(page, "sent", "lung-ct-1, round 2")
    assert "round 3 of 4, training" in page.value("document.getElementById('said').textContent")
    shows(page, "connection", "connected, and at work on an order")
    page.value("row = document.querySelector('#sent tbody tr')")
    first = page.value("row.innerText.split('\\t').slice(1).join()")

    for width in (1280, 400):
        page.fits(width, tmp_path / f"site-{width}.png")
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.fits(1280, tmp_path / "site-1280-dark.png")
    page.value("scrollTo(0, 250)")
    here.learner.go_on.release(2)
    shows(page, "now", "No order is under way")
    shows(page, "queue", "scoring the model done")
    running.join(60)
    assert "4 updates have left" in text(page, "now")
    assert page.value("row.isConnected && row !== row.parentNode.firstElementChild"), "later rows came before it"
    assert page.value("row.innerText.split('\\t').slice(1).join()") == first
    assert page.value("scrollY") == 250
    assert page.value("window.before") == "kept", "no reload"
    assert page.value("document.querySelector('#card details').open")
    assert page.value("document.activeElement === document.querySelector('#card .scroll')")
    assert page.value("getSelection().toString()") == chosen != ""

    assert page.complaints == []
    assert {address for address in page.requests if not address.startswith(shown.url)} == set()
    whole = page.value("document.documentElement.outerHTML")
    for never in (PATIENT, "case-keys", *(path.name for path in (here.site.parents[1] / PATIENT).rglob("*.png"))):
        assert never not in whole


def test_by_keyboard_alone_one_gets_to_everything_and_sees_where_one_is(shown):
    page = shown.live()
    assert page.tab_through() > 12
    page.value("document.querySelector('#card summary').focus()")
    page.press("Enter", 13)
    until(lambda: page.value("document.querySelector('#card details').open"), "the counts of the card open")


def test_without_scripts_it_says_when_it_was_made_and_asks_again_by_itself(shown):
    asks = "document.querySelector('meta[http-equiv=refresh]')?.content ?? 'never'"
    assert shown.live().value(asks) == "never", "with scripts nothing is loaded anew"
    shown.page.call("Emulation.setScriptExecutionDisabled", value=True)
    shown.page.open(f"{shown.url}/")
    assert shown.page.value(asks) == "30"
    assert "this page needs its script" in shown.page.value("document.getElementById('live').innerText")
    made = shown.page.value("document.getElementById('asof').innerText")
    assert abs(datetime.strptime(made, "%Y-%m-%d %H:%M:%S %Z").replace(tzinfo=UTC).timestamp() - time.time()) < 60
    assert "lung-ct" in shown.page.value("document.getElementById('studies').innerText")
    shown.page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_process_that_hangs_or_has_ended_is_told_and_what_stands_there_is_said_to_be_old(shown):
    page = shown.live()
    shown.process.send_signal(signal.SIGSTOP)
    page.value("real = Date.now; Date.now = () => real() + 25000; 0")  # the wait, without waiting
    until(lambda: page.value(LIVE) == "lost", "no sign of life is noticed")
    assert "does not answer" in page.value("document.getElementById('lost').innerText")
    assert "What stands here is as of" in page.value("document.getElementById('lost').innerText")
    assert float(page.value("getComputedStyle(document.querySelector('#sent')).opacity")) < 1
    shown.process.send_signal(signal.SIGCONT)
    until(lambda: page.value(LIVE) == "on", "its return is noticed")
    assert page.value("document.getElementById('lost').hidden")
    assert page.value("getComputedStyle(document.querySelector('#sent')).opacity") == "1"

    shown.process.send_signal(signal.SIGTERM)
    assert shown.process.wait(10) is not None, "an open page does not keep it from ending"
    until(lambda: page.value(LIVE) == "lost", "its end is noticed")
    assert "Traceback" not in shown.log.read_text()
