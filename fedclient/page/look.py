"""A look at a site's folder: the sections of its page as HTML, each by its name. It reads, and writes nothing."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fedclient.book import Book
from fedclient.consent import list_asked
from fedclient.data.quota import cache_bytes
from fedclient.gpus import gpus
from fedclient.overview import overview
from fedclient.page import view
from fedclient.site import SiteFile, open_site, read_site_file
from shared_models.live import pages

SECTIONS = (
    "alarms", "summary", "now", "connection", "queue", "studies", "machine", "card", "policy", "ledger", "sent",
)  # fmt: skip
CACHE_S = 30.0  # from one count of the cache to the next: it may have many files
MACHINE_S = 5.0  # from one question to NVIDIA's tool to the next: it takes a moment, and its figures waver


@dataclass(slots=True)
class Looker:
    """Looks at one site again and again; one look at a time."""

    folder: Path
    book: Book
    pages: Environment = field(default_factory=lambda: pages.environment("fedclient.page"))
    _machine: dict[str, Any] = field(default_factory=dict)
    _machine_at: float = float("-inf")
    _cache: int = 0
    _cache_at: float = float("-inf")

    def sections(self, _: str | None = None, now_s: float | None = None) -> dict[str, str]:
        """All sections.

        Raises:
            FederationError: state that cannot be read.
        """
        now = time.time() if now_s is None else now_s
        file, facts = read_site_file(self.folder), overview(self.folder, self.book, self._counted)
        listed = list_asked(open_site({"site-dir": str(self.folder)}))
        asked = {each.sha256: each for each in listed}
        at_work, studies = view.round_now(facts, self.book, asked), view.studies(listed)
        waiting = sum(study["waits"] for study in studies)
        disks, ledger = view.disks(facts), view.ledger(facts["ledger"])
        values: dict[str, Any] = {
            "facts": facts,
            "now_s": now,
            "work": at_work,
            "summary": view.summary(facts, at_work, waiting, self.book, disks, ledger),
            "connection": view.connection(facts),
            "queue": view.queue(self.book, asked, facts),
            "studies": studies,
            "waiting": waiting,
            "machine": self._seen(file),
            "disks": disks,
            "card": view.data_card(self.folder),
            "policy": view.policy(file),
            "ledger": ledger,
            "sent": view.sent(self.book),
        }
        return {name: self.pages.get_template(f"{name}.html").render(values) for name in SECTIONS}

    def _counted(self, cache: Path) -> int:
        if time.monotonic() - self._cache_at > CACHE_S:
            self._cache, self._cache_at = cache_bytes(cache), time.monotonic()
        return self._cache

    def _seen(self, file: SiteFile) -> dict[str, Any]:
        if time.monotonic() - self._machine_at > MACHINE_S:
            self._machine = view.machine(file.compute.device, gpus(), file.limits.gpu_memory_share)
            self._machine_at = time.monotonic()
        return self._machine


def looker(folder: Path) -> Looker:
    """For the site in `folder`."""
    return Looker(folder, Book(folder))
