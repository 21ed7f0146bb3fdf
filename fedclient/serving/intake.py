"""DICOM objects from strangers into series: quarantined, doubted, put beside others of their series, handed on whole.

Nobody says when a series is complete. It is taken for whole when no connection that brought of it is open any more and
nothing has come for a while.
"""

import hashlib
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.datadict import tag_for_keyword

from fedclient.data.dicom_folder import OBJECTS
from fedclient.data.dicom_header import load_head, text, unbroken
from fedclient.serving.jobs import Jobs, Overloaded, Room
from shared_models.errors import ImageUnreadable
from shared_models.files import private_folder

KEYWORDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality")
MOST_FILES = 20_000  # of a series
MOST_SERIES = 256  # under way at once
LEFT_S = 3600.0  # after the last byte of a file in quarantine
UID = re.compile(r"[0-9](?:[0-9.]{0,62}[0-9])?")
_TAGS = [tag for keyword in KEYWORDS if (tag := tag_for_keyword(keyword)) is not None]

log = logging.getLogger("fedclient.serving")


@dataclass(frozen=True, slots=True)
class Received:
    """What an object says it is; for the answer to who sent it, and for nobody else."""

    sop_class: str = field(repr=False)
    sop_instance: str = field(repr=False)
    study: str = field(repr=False)


@dataclass(slots=True)
class _Open:
    """A series that comes in."""

    via: str
    last_s: float
    sessions: set[str]
    files: int = 0


class Intake:
    """The quarantine and the series under way, below `folder`."""

    def __init__(
        self, folder: Path, jobs: Jobs, room: Room, quiet_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.quarantine, self.series = folder / "quarantine", folder / "series"
        self.jobs, self.room, self.quiet_s, self.clock = jobs, room, quiet_s, clock
        shutil.rmtree(self.quarantine, ignore_errors=True)  # of a process that was killed
        private_folder(self.quarantine)
        private_folder(self.series)
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        for left in self.series.iterdir():
            self._open[left.name] = _Open("dicom", clock(), set(), sum(1 for _ in left.iterdir()))

    def new_file(self) -> Path:
        """Where an object may be written to until it is placed."""
        return self.quarantine / f"{secrets.token_hex(16)}.dcm"

    def place(self, file: Path, via: str, session: str, study: str | None = None) -> Received:
        """Takes an object out of quarantine and puts it beside its series; one that comes again takes its own place.

        Its bytes are to be paid for in `Room` already.

        Args:
            study: of which it must be, where the sender has said so.

        Raises:
            ImageUnreadable: no DICOM, broken, no image, or without the numbers that say what it belongs to.
            Overloaded: another series, while as many cases wait as may, or as many come in.
        """
        with unbroken():
            data = load_head(file, _TAGS)
            said = {keyword: text(data, keyword) for keyword in KEYWORDS}
        for keyword in KEYWORDS[:4]:
            if not UID.fullmatch(said[keyword]):
                raise ImageUnreadable(f"DICOM: {keyword} is missing or no UID.", "DICOM_UNREADABLE")
        if study is not None and said["StudyInstanceUID"] != study:
            raise ImageUnreadable("DICOM: of another study than the request is for.", "SERIES_MIXED")
        if said["Modality"] in OBJECTS:
            raise ImageUnreadable("DICOM: no image; the model looks at images.", "MODALITY_MISMATCH")
        key = _named(said["StudyInstanceUID"], said["SeriesInstanceUID"])
        with self._lock:
            found = self._open.get(key)
            if found is None:
                if self.jobs.full or len(self._open) >= MOST_SERIES:
                    raise Overloaded("as many cases wait as this machine takes. Send it again later.")
                found = self._open[key] = _Open(via, self.clock(), set())
                private_folder(self.series / key)
            if found.files >= MOST_FILES:
                raise ImageUnreadable(f"DICOM: more than {MOST_FILES} objects of one series.", "INPUT_TOO_LARGE")
            to = self.series / key / f"{_named(said['SOPInstanceUID'])}.dcm"
            found.files += not to.exists()
            file.replace(to)
            found.last_s = self.clock()
            found.sessions.add(session)
        return Received(said["SOPClassUID"], said["SOPInstanceUID"], said["StudyInstanceUID"])

    def closed(self, session: str) -> None:
        """A connection has ended; what it brought may be whole."""
        with self._lock:
            for found in self._open.values():
                found.sessions.discard(session)

    def hand_on(self) -> int:
        """Makes a job of every series that is whole; how many. What finds no room waits on."""
        with self._lock:
            self._clear()
            before = self.clock() - self.quiet_s
            whole = [key for key, each in self._open.items() if not each.sessions and each.last_s <= before]
            done = 0
            for key in whole:
                try:
                    job = self.jobs.begin(self._open[key].via)
                except Overloaded:
                    break
                into = self.jobs.place(job.id) / "in"
                into.rmdir()
                (self.series / key).rename(into)
                self.jobs.submit(job, admitted=True)
                log.info("job %s: a series of %d objects", job.id[:8], self._open[key].files)
                del self._open[key]
                done += 1
            return done

    def _clear(self) -> None:
        """Deletes what connections that broke off have left in quarantine."""
        for left in self.quarantine.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > LEFT_S:
                    left.unlink()

    @property
    def under_way(self) -> int:
        with self._lock:
            return len(self._open)


def _named(*uids: str) -> str:
    return hashlib.sha256("/".join(uids).encode()).hexdigest()[:32]
