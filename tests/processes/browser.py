"""Debian's Chromium, without a window, driven by its DevTools protocol; and the pages that it is shown, served."""

import base64
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from simulations.demo import free_port
from tests.processes.serving import ROOT, answers, until

LIVE = "document.getElementById('live')?.dataset.state"
REACHED = """[...document.querySelectorAll('a[href], button, summary, input, [tabindex="0"]')]
    .filter((each) => each.checkVisibility()).length"""


class Browser:
    """One page.

    Attributes:
        requests: every address that it asked for.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._numbers = itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the protocol, and its result."""
        number = next(self._numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self.socket.recv(timeout=120))
            self._hear(said)
            if said.get("id") == number:
                assert "error" not in said, said["error"]
                return dict(said["result"])

    def _hear(self, said: dict[str, Any]) -> None:
        if said.get("method") == "Network.requestWillBeSent":
            self.requests.append(said["params"]["request"]["url"])
        if said.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(said["params"]["exceptionDetails"]["text"])
        if said.get("method") == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
            self.complaints.append(said["params"]["entry"]["text"])

    def value(self, expression: str) -> Any:
        """Of a line of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")
        self.size(width, height)
        self.call("Page.navigate", url=url)
        until(lambda: self.value("document.readyState") == "complete", "the page is there")

    def size(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def choose(self, selector: str, files: Sequence[Path]) -> None:
        """Files in a file input, as a person chooses them."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in files])

    def press(self, key: str, code: int) -> None:
        typed = {"text": "\r"} if key == "Enter" else {}  # without it nothing is sent, opened or pressed
        for kind, more in (("keyDown", typed), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, to: Path) -> None:
        """The whole page, not only what the window shows."""
        size = self.value("({ width: innerWidth, height: document.documentElement.scrollHeight })")
        shown = {"x": 0, "y": 0, "scale": 1, **size}
        content = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=shown)["data"]
        to.write_bytes(base64.b64decode(content))

    def fits(self, width: int, to: Path) -> None:
        """Nothing sticks out of a window of that width; the screenshot shows it."""
        self.size(width)
        assert self.value("document.documentElement.scrollWidth") <= width
        self.screenshot(to)
        drawn = struct.unpack(">L", to.read_bytes()[16:20])[0]
        assert drawn == width

    def tab_through(self) -> int:
        """By keyboard alone one gets to all that can be used, and sees where one is; how much that is."""
        self.value("window.been = new Set(); window.blind = []; document.activeElement.blur(); scrollTo(0, 0)")
        wanted = int(self.value(REACHED))
        self.press("Tab", 9)
        assert self.value("document.activeElement.textContent") == "Skip to the content"
        assert self.value("document.activeElement.getBoundingClientRect().left") >= 0, "it comes into view"
        for _ in range(wanted):
            self.value("""been.add(document.activeElement);
                if (parseFloat(getComputedStyle(document.activeElement).outlineWidth) < 2) blind.push(
                    document.activeElement.outerHTML)""")
            self.press("Tab", 9)
        assert self.value("blind") == []
        assert self.value("[...been].filter((each) => each !== document.body).length") == wanted
        return wanted


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Starts it with a profile of its own, and ends it."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        said = folder / "profile" / "DevToolsActivePort"
        until(lambda: said.exists() and len(said.read_text().splitlines()) == 2, "Chromium listens")
        port = said.read_text().splitlines()[0]
        pages: list[dict[str, Any]] = []
        while not pages:
            listed = httpx.get(f"http://127.0.0.1:{port}/json", timeout=60).json()
            pages = [each for each in listed if each["type"] == "page"]
            time.sleep(0.1)
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=2**28, open_timeout=60) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def served_page(words: Sequence[str], answers_at: str, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A command that serves a page, as people type it (`words` after `python -m`), and where it answers."""
    port = free_port()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *words, "--port", str(port)], stdout=file, stderr=file, env=environment
        )
    url = f"http://127.0.0.1:{port}"

    def up() -> bool:
        assert process.poll() is None, log.read_text()
        return answers(f"{url}{answers_at}")

    try:
        until(up, "the page answers")
        yield process, url
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
