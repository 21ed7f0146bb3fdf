"""DICOM objects from strangers into series: quarantined, doubted, put beside others of their series, handed on whole.

Nobody says when a series is complete. It is taken for whole when no connection that brought of it is open any more and
nothing has come for a while (`quiet_s`). Where an object of it comes after that, for as long as results are kept:

- what was made of it before is marked `SERIES_SPLIT` at once, in REST, on the page and in result.json; it is not
  returned any more, and DICOMweb does not find it. What had gone to PACS already stays there; the log says so;
- when it is quiet again, old and new are predicted on together, if the old files are still there (`join_s`) or were
  sent again; the new job's results are returned, and the old job is marked `SERIES_REPLACED`;
- otherwise the new job fails as `SERIES_SPLIT`, without a prediction, until somebody sends the whole series.

Where headers say how many objects the series has (0020,1209) and fewer are there, the job is `SERIES_INCOMPLETE`, and
its results are not returned.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydicom.datadict import tag_for_keyword

from fedclient.data.dicom_folder import OBJECTS
from fedclient.data.dicom_header import load_head, text, unbroken
from fedclient.serving.handed import Before, Handed
from fedclient.serving.jobs import Job, Jobs, Overloaded, Room
from shared_models.errors import ImageUnreadable
from shared_models.files import private_folder

KEYWORDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality")
MOST_FILES = 20_000  # of a series
MOST_SERIES = 256  # under way at once
SPLIT, INCOMPLETE, REPLACED = "SERIES_SPLIT", "SERIES_INCOMPLETE", "SERIES_REPLACED"
COUNT = "NumberOfSeriesRelatedInstances"
LEFT_S = 3600.0  # after the last byte of a file in quarantine
UID = re.compile(r"[0-9](?:[0-9.]{0,62}[0-9])?")
_TAGS = [tag for keyword in KEYWORDS if (tag := tag_for_keyword(keyword)) is not None]
_COUNT_TAG = [tag for tag in (tag_for_keyword(COUNT),) if tag is not None]

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
    before: Before
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
        self.handed = Handed(folder / "handed", jobs.keep_s)
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        for left in self.series.iterdir():
            files = sum(1 for _ in left.iterdir())
            self._open[left.name] = _Open("dicom", clock(), set(), self.handed.find(left.name), files)

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
        to = self.series / key / f"{_named(said['SOPInstanceUID'])}.dcm"
        with self._lock:
            found = self._open.get(key)
            before = self.handed.find(key) if found is None else found.before
            if before.names and to.name not in before.names:  # which holds even where there is no room for it
                self._mark(before.jobs)
            if found is None:
                if self.jobs.full or len(self._open) >= MOST_SERIES:
                    raise Overloaded("as many cases wait as this machine takes. Send it again later.")
                found = self._open[key] = _Open(via, self.clock(), set(), before)
                private_folder(self.series / key)
            if found.files >= MOST_FILES:
                raise ImageUnreadable(f"DICOM: more than {MOST_FILES} objects of one series.", "INPUT_TOO_LARGE")
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
                self._hand_on(key, job)
                done += 1
            return done

    def _hand_on(self, key: str, job: Job) -> None:
        """Submits a series with what was handed on of it before, or refuses it where that is gone."""
        found, folder, into = self._open[key], self.series / key, self.jobs.place(job.id) / "in"
        before = found.before
        try:
            names = frozenset(path.name for path in folder.iterdir())
            fits = len(names | before.names) <= MOST_FILES
            lacking = before.names - names
            if fits:
                lacking = self._join(folder, lacking, before.jobs)
            known = [each for each in before.jobs if self.jobs.find(each) is not None]
            self.handed.note(key, Before(names | before.names if fits else before.names, (*known, job.id)))
            into.rmdir()
            folder.rename(into)
            if lacking:
                self.jobs.refuse(job, SPLIT, f"{len(lacking)} objects came before and are gone: send the whole series.")
            else:
                self.jobs.submit(replace(job, partial=_short(into), again=bool(before.names)), admitted=True)
        except OSError:  # a full disk: the series waits on
            if not folder.exists():
                into.rename(folder)
            self.jobs.forget(job.id)
            raise
        del self._open[key]
        log.info("job %s: a series of %d objects%s", job.id[:8], found.files, ", without the rest" if lacking else "")
        if before.names and not names <= before.names:
            self._mark(known)
        if not lacking:
            partial = [each.id for each in map(self.jobs.find, known) if each is not None and each.partial is not None]
            for earlier in partial:
                self.jobs.mark_partial(earlier, REPLACED, f"job {job.id} is of more of the series.")

    def _mark(self, jobs: Sequence[str]) -> None:
        for job in jobs:
            self.jobs.mark_partial(job, SPLIT, "more of its series has come after it.")

    def _join(self, folder: Path, wanted: frozenset[str], jobs: Sequence[str]) -> frozenset[str]:
        """Puts files of earlier jobs beside those in `folder`; the names of those that are gone."""
        lacking = set(wanted)
        for name in wanted:
            for job in reversed(jobs):
                with suppress(FileNotFoundError):
                    os.link(self.jobs.place(job) / "in" / name, folder / name)
                    lacking.discard(name)
                    break
        return frozenset(lacking)

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


def _short(folder: Path) -> tuple[str, str] | None:
    """Code and words, where a series has fewer objects than it says of itself."""
    names = [path.name for path in folder.iterdir()]
    said = ""
    with suppress(ImageUnreadable), unbroken():
        said = text(load_head(folder / names[0], _COUNT_TAG), COUNT)
    if not re.fullmatch(r"\d{1,6}", said) or len(names) >= int(said):
        return None
    return INCOMPLETE, f"{len(names)} of the {int(said)} objects came that the series has by its headers."


def _named(*uids: str) -> str:
    return hashlib.sha256("/".join(uids).encode()).hexdigest()[:32]
