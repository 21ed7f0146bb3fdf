"""The dashboard in a real browser: a run in progress shows without a reload, wide, narrow, by keyboard, and offline."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fedserver.dashboard.login import token_path
from tests.processes.browser import LIVE, Browser, chromium, served_page
from tests.processes.serving import missing
from tests.processes.serving import until as wait_until
from tests.test_submit import STUDY
from tests.watched import LUNGS, SITES, Watched, queued, watched

pytestmark = [pytest.mark.process, pytest.mark.skipif(bool(missing("chromium")), reason=missing("chromium"))]
until = partial(wait_until, seconds=120.0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("dashboard")) as made:
        made.ended("lung-ct-1", replace(LUNGS, rounds=replace(LUNGS.rounds, count=4)))
        queued(made.federation, STUDY, "nodules-1", "nodules-2")
        yield made


@contextmanager
def served(here: Watched, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The command that people type, and where it answers."""
    words = ["fedserver.cli", "dashboard", "--federation", str(here.folder)]
    with served_page(words, "/login", log) as running:
        yield running


def signed_in(page: Browser, url: str, here: Watched) -> None:
    """As by the link that the command prints on a terminal."""
    page.open(f"{url}/#token={token_path(here.folder).read_text()}")
    until(lambda: page.value(LIVE) == "on", "the page is live")


def text(page: Browser, section: str) -> str:
    return str(page.value(f"document.querySelector('[data-section={section}]').innerText"))


def test_a_run_in_progress_shows_without_a_reload_on_a_wide_and_a_narrow_screen(here, tmp_path):
    with served(here, tmp_path / "log") as (process, url), chromium(tmp_path) as page:
        signed_in(page, url, here)
        assert page.value("location.href") == f"{url}/", "the token is not left in the address"
        assert "No round is in progress" in text(page, "now")
        page.value("window.before = 'kept'; document.querySelector('#studies .scroll').focus()")

        here.online |= {SITES[0]}
        here.begin("lung-ct-2")
        until(lambda: "waits for north-hospital, south-clinic" in page.value(
            "document.getElementById('said').textContent"), "whom it waits for is said aloud")  # fmt: skip
        assert "last heard of 42 s ago, for " in text(page, "now")
        assert "Curves begin with the first finished round" in text(page, "run")

        here.rests_after = 3
        here.online |= {*SITES}
        until(lambda: "round 4 of 8" in text(page, "now"), "rounds go by")
        until(lambda: page.value("document.querySelectorAll('[data-section=charts] canvas').length") == 2, "are drawn")
        here.rests_after = 10_000
        until(lambda: "finished" in text(page, "run"), "it ends")
        until(lambda: "Test Dice: lung" in text(page, "matrix"), "the final test is there")
        assert page.value("window.before") == "kept", "no reload"
        assert page.value("document.activeElement.closest('#studies') !== null"), "the focus has stayed"
        assert page.value("document.querySelector('.plot').getAttribute('aria-label')").startswith("Training loss")
        assert "lines are whole" in text(page, "audit")

        for width in (1280, 400):
            page.fits(width, tmp_path / f"dashboard-{width}.png")
            assert page.value(
                "[...document.querySelectorAll('canvas')].every((each) => each.clientWidth <= innerWidth)"
            )
        assert page.complaints == []
        assert {address for address in page.requests if not address.startswith(url)} == set()
        assert not any(
            token_path(here.folder).read_text() in address for address in page.requests if "#" not in address
        )
        log = (tmp_path / "log").read_text()
        assert token_path(here.folder).read_text() not in log

        process.send_signal(signal.SIGTERM)
        assert process.wait(10) is not None, "an open page does not keep it from ending"
        until(lambda: page.value(LIVE) == "lost", "the page says so")
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_by_keyboard_alone_one_gets_to_everything_and_sees_where_one_is(here, tmp_path):
    with served(here, tmp_path / "log") as (_, url), chromium(tmp_path) as page:
        page.open(f"{url}/runs/lung-ct-1")
        assert page.value("location.pathname") == "/login"
        assert page.value("document.activeElement.id") == "token"
        page.call("Input.insertText", text=token_path(here.folder).read_text())
        page.press("Enter", 13)
        until(lambda: page.value(LIVE) == "on", "one is in")
        page.call("Page.navigate", url=f"{url}/runs/lung-ct-1")
        until(lambda: page.value(LIVE) == "on", "the run is shown")
        until(lambda: page.value("document.querySelectorAll('canvas').length") >= 2, "its curves are drawn")

        assert page.tab_through() > 20

        page.value("document.querySelector('figure summary').focus()")
        page.press("Enter", 13)
        until(lambda: page.value("document.querySelector('figure details').open"), "the table beside a chart opens")
        assert "round" in page.value("document.querySelector('figure details table').innerText")

        page.value("document.querySelector('form button').focus()")
        page.press("Enter", 13)
        until(lambda: page.value("location.pathname") == "/login", "one has signed out")
        assert page.value("fetch('/').then((answer) => answer.url.endsWith('/login'))")
