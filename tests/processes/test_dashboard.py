"""The dashboard in a real browser: a run in progress shows without a reload, wide, narrow, by keyboard, and offline."""

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest

from fedserver.dashboard.login import token_path
from simulations.demo import free_port
from tests.processes.browser import Browser, chromium
from tests.processes.serving import ROOT, missing
from tests.processes.serving import until as wait_until
from tests.test_submit import STUDY
from tests.watched import LUNGS, SITES, Watched, queued, watched

pytestmark = [pytest.mark.process, pytest.mark.skipif(bool(missing("chromium")), reason=missing("chromium"))]
REACHED = """[...document.querySelectorAll('a[href], button, summary, input, [tabindex="0"]')]
    .filter((each) => each.checkVisibility()).length"""
until = partial(wait_until, seconds=60.0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("dashboard")) as made:
        made.ended("lung-ct-1", replace(LUNGS, rounds=replace(LUNGS.rounds, count=4)))
        queued(made.federation, STUDY, "nodules-1", "nodules-2")
        yield made


@contextmanager
def served(here: Watched, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The command that people type, and where it answers."""
    port = free_port()
    words = [sys.executable, "-m", "fedserver.cli", "dashboard", "--federation", str(here.folder), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/login", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until(answers, "the dashboard answers")
        yield process, url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def signed_in(page: Browser, url: str, here: Watched) -> None:
    """As by the link that the command prints on a terminal."""
    page.open(f"{url}/#token={token_path(here.folder).read_text()}")
    until(lambda: page.value("document.getElementById('live')?.dataset.state") == "on", "the page is live")


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

        here.online |= {*SITES}
        until(lambda: "round 3 of 8" in text(page, "now"), "rounds go by")
        until(lambda: page.value("document.querySelectorAll('[data-section=charts] canvas').length") == 2, "are drawn")
        until(lambda: "finished" in text(page, "run"), "it ends")
        until(lambda: "Test Dice: lung" in text(page, "matrix"), "the final test is there")
        assert page.value("window.before") == "kept", "no reload"
        assert page.value("document.activeElement.closest('#studies') !== null"), "the focus has stayed"
        assert page.value("document.querySelector('.plot').getAttribute('aria-label')").startswith("Training loss")
        assert "lines are whole" in text(page, "audit")

        for width in (1280, 400):
            page.size(width)
            assert page.value("document.documentElement.scrollWidth") <= width
            assert page.value(
                "[...document.querySelectorAll('canvas')].every((each) => each.clientWidth <= innerWidth)"
            )
            page.screenshot(tmp_path / f"dashboard-{width}.png")
            head = (tmp_path / f"dashboard-{width}.png").read_bytes()[:24]
            assert width - 20 <= struct.unpack(">L", head[16:20])[0] <= width  # less a scroll bar
        assert page.complaints == []
        assert {address for address in page.requests if not address.startswith(url)} == set()
        assert not any(
            token_path(here.folder).read_text() in address for address in page.requests if "#" not in address
        )
        log = (tmp_path / "log").read_text()
        assert token_path(here.folder).read_text() not in log

        process.send_signal(signal.SIGTERM)
        assert process.wait(10) is not None, "an open page does not keep it from ending"
        until(lambda: page.value("document.getElementById('live').dataset.state") == "lost", "the page says so")
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_by_keyboard_alone_one_gets_to_everything_and_sees_where_one_is(here, tmp_path):
    with served(here, tmp_path / "log") as (_, url), chromium(tmp_path) as page:
        page.open(f"{url}/runs/lung-ct-1")
        assert page.value("location.pathname") == "/login"
        assert page.value("document.activeElement.id") == "token"
        page.call("Input.insertText", text=token_path(here.folder).read_text())
        page.press("Enter", 13)
        until(lambda: page.value("document.getElementById('live')?.dataset.state") == "on", "one is in")
        page.call("Page.navigate", url=f"{url}/runs/lung-ct-1")
        until(lambda: page.value("document.getElementById('live')?.dataset.state") == "on", "the run is shown")
        until(lambda: page.value("document.querySelectorAll('canvas').length") >= 2, "its curves are drawn")

        page.value("window.been = new Set(); window.blind = []")
        wanted = page.value(REACHED)
        assert wanted > 20
        page.press("Tab", 9)
        assert page.value("document.activeElement.textContent") == "Skip to the content"
        assert page.value("document.activeElement.getBoundingClientRect().left") >= 0, "it comes into view"
        for _ in range(wanted):
            page.value("""been.add(document.activeElement);
                if (parseFloat(getComputedStyle(document.activeElement).outlineWidth) < 2) blind.push(
                    document.activeElement.outerHTML)""")
            page.press("Tab", 9)
        assert page.value("blind") == []
        assert page.value("[...been].filter((each) => each !== document.body).length") == wanted

        page.value("document.querySelector('figure summary').focus()")
        page.press("Enter", 13)
        until(lambda: page.value("document.querySelector('figure details').open"), "the table beside a chart opens")
        assert "round" in page.value("document.querySelector('figure details table').innerText")

        page.value("document.querySelector('form button').focus()")
        page.press("Enter", 13)
        until(lambda: page.value("location.pathname") == "/login", "one has signed out")
        assert page.value("fetch('/').then((answer) => answer.url.endsWith('/login'))")
