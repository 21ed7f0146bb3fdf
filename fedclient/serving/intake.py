"""DICOM objects from strangers into series: quarantined, doubted, put beside others of their series, handed on whole.

Nobody says when a series is complete. It is taken for whole when nothing has come for a while (`quiet_s`), and each
connection that brought of it is closed, has begun with another series since, or has brought nothing for a minute at
least. Objects that come again just as they were, of a series that is answered or going to be, are dropped: a sender
that missed an answer gets no second set of results. Where another object of it comes after that, or one again that
holds something else, for as long as results are kept:

- what was made of it before is marked `SERIES_SPLIT` at once, in REST, on the page and in result.json; it is not
  returned any more, and DICOMweb does not find it. What had gone to PACS already stays there; the log says so;
- when it is quiet again, old and new are predicted on together, if the old files are still there (`join_s`) or were
  sent again; the new job's results are returned, and the old job is marked `SERIES_REPLACED`;
- otherwise the new job fails as `SERIES_SPLIT`, without a prediction, until somebody sends the whole series.

The job is `SERIES_INCOMPLETE`, and its results are not returned, where headers say how many objects the series has
(0020,1209) and fewer are there; where an object of it was turned away for want of room, or cut off in the middle, and
has not come since; and where a connection broke off that brought of it, unless a later one has brought of it and ended
in order. What is sent again is joined as above, and answered whole.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydicom.datadict import tag_for_keyword

from fedclient.data.dicom_folder import OBJECTS
from fedclient.data.dicom_header import load_head, text, unbroken
from fedclient.serving.handed import Before, Handed
from fedclient.serving.jobs import INCOMPLETE, Job, Jobs, Overloaded, Room
from fedclient.serving.lacking import Lacking
from shared_models.errors import ImageUnreadable
from shared_models.files import file_sha256, private_folder

KEYWORDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality")
MOST_FILES = 20_000  # of a series
MOST_SERIES = 256  # under way at once
SPLIT, REPLACED = "SERIES_SPLIT", "SERIES_REPLACED"
COUNT = "NumberOfSeriesRelatedInstances"
LATELY_S, LATELY_QUIET = 60.0, 6  # a connection that is open is waited for; or so many times `quiet_s`, if longer
LEFT_S = 3600.0  # after the last byte of a file in quarantine
DIGITS = 32  # of the digests that name series, objects and what these hold
UID = re.compile(r"[0-9](?:[0-9.]{0,62}[0-9])?")
_TAGS = [tag for keyword in (*KEYWORDS, COUNT) if (tag := tag_for_keyword(keyword)) is not None]

log = logging.getLogger("fedclient.serving")


@dataclass(frozen=True, slots=True)
class Received:
    """What an object says it is; for the answer to who sent it, and for nobody else."""

    sop_class: str = field(repr=False)
    sop_instance: str = field(repr=False)
    study: str = field(repr=False)


@dataclass(slots=True)
class _Open:
    """A series that comes in.

    Attributes:
        left: connections that are open and have begun with another series since.
        digests: of what the objects hold, by their names.
        stated: how many objects the series has, as a header says it; empty where none does.
        broken: a connection ended out of order that brought of it.
        mending: connections that have brought of it since; one that ends in order has brought what was lacking.
    """

    via: str
    last_s: float
    sessions: set[str]
    before: Before
    left: set[str] = field(default_factory=set)
    files: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    stated: str = ""
    broken: bool = False
    mending: set[str] = field(default_factory=set)


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
        self.handed = Handed(folder / "handed", jobs.longest_s)
        self.lacking = Lacking(folder / "lacking", jobs.longest_s)
        self.lately_s = max(LATELY_S, LATELY_QUIET * quiet_s)
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._coming: dict[str, float] = {}  # connection -> when bytes of an object came by it
        for left in self.series.iterdir():
            files = list(left.iterdir())
            if not files:
                left.rmdir()
                continue
            stated = ""
            with suppress(ImageUnreadable), unbroken():
                stated = text(load_head(files[0], _TAGS), COUNT)
            before, broken = self.handed.find(left.name), self.lacking.was_open(left.name)
            self._open[left.name] = _Open(
                "dicom", clock(), set(), before, files=len(files), stated=stated, broken=broken
            )  # fmt: skip

    def new_file(self) -> Path:
        """Where an object may be written to until it is placed."""
        return self.quarantine / f"{secrets.token_hex(16)}.dcm"

    def place(self, file: Path, via: str, session: str, study: str | None = None, size_bytes: int = 0) -> Received:
        """Takes an object out of quarantine and puts it beside its series; one that comes again takes its own place.

        Args:
            study: of which it must be, where the sender has said so.
            size_bytes: to be paid for in `Room`; 0 where its bytes are paid for already.

        Raises:
            ImageUnreadable: no DICOM, broken, no image, without the numbers that say what it belongs to, or one more
                than are taken of a series.
            Overloaded: no room, or another series while as many cases wait as may, or as many come in.
        """
        said = _said(file)
        if study is not None and said["StudyInstanceUID"] != study:
            raise ImageUnreadable("DICOM: of another study than the request is for.", "SERIES_MIXED")
        key, name = _names(said)
        digest = file_sha256(file)[:DIGITS]
        with self._lock:
            try:
                found = self._put(file, key, name, digest, via, session, size_bytes)
            except (ImageUnreadable, Overloaded, OSError):
                self.lacking.refuse(key, name)
                raise
            found.stated = said[COUNT] or found.stated
            self.lacking.came(key, name)
        return Received(said["SOPClassUID"], said["SOPInstanceUID"], said["StudyInstanceUID"])

    def lost(self, file: Path) -> None:
        """Remembers of an object of which a part came, or that is not taken, that its series lacks it; where as much
        came as says what it is."""
        with suppress(ImageUnreadable, OSError):
            key, name = _names(_said(file))
            with self._lock:
                before = self._open[key].before if key in self._open else self.handed.find(key)
                if before.names and name not in before.names:
                    self._mark(before.jobs)
                self.lacking.refuse(key, name)

    def _put(self, file: Path, key: str, name: str, digest: str, via: str, session: str, size_bytes: int) -> _Open:
        """Under the lock."""
        found = self._open.get(key)
        before = self.handed.find(key) if found is None else found.before
        more, other = before.names and name not in before.names, before.digests.get(name, digest) != digest
        if more or other:  # which holds even where there is no room for it
            self._mark(before.jobs)
        if found is None and (self.jobs.full or len(self._open) >= MOST_SERIES):
            raise Overloaded("as many cases wait as this machine takes. Send it again later.")
        if found is not None and found.files >= MOST_FILES:
            raise ImageUnreadable(f"DICOM: more than {MOST_FILES} objects of one series.", "INPUT_TOO_LARGE")
        if size_bytes:
            self.room.take(size_bytes)
        try:
            to = self.series / key / name
            private_folder(to.parent)
            old_bytes = to.stat().st_size if to.exists() else None
            if found is None or session not in found.sessions:
                self.lacking.opened(key)
            file.replace(to)
        except OSError:
            self.room.give(size_bytes)
            raise
        if found is None:
            found = self._open[key] = _Open(via, self.clock(), set(), before)
        if session not in found.sessions and session not in found.left:
            self._leave(session)
        if found.broken and session not in found.sessions:
            found.mending.add(session)
        if old_bytes is None:
            found.files += 1
        else:
            self.room.give(old_bytes)
        found.digests[name] = digest
        found.last_s = self.clock()
        found.sessions.add(session)
        return found

    def _leave(self, session: str) -> None:
        """A connection begins with another series: those that it brought of may be whole."""
        for key, each in self._open.items():
            if session in each.sessions:
                each.left.add(session)
                self._end(key, session, broken=False)

    def coming(self, session: str) -> None:
        """Of an object that is not whole yet, bytes have come by a connection."""
        self._coming[session] = self.clock()

    def closed(self, session: str, broken: bool = False) -> None:
        """A connection has ended, in order or `broken` off; what it brought may be whole."""
        with self._lock:
            self._coming.pop(session, None)
            for key, found in self._open.items():
                found.left.discard(session)
                if session in found.sessions:
                    self._end(key, session, broken)

    def _end(self, key: str, session: str, broken: bool) -> None:
        found = self._open[key]
        found.sessions.remove(session)
        if broken:
            found.broken = True
            found.mending.clear()
        elif session in found.mending:
            found.broken = False
            found.mending.clear()
        if not found.sessions and not found.broken:
            self.lacking.ended(key)

    def hand_on(self) -> int:
        """Makes a job of every series that is whole; how many. What finds no room waits on."""
        with self._lock:
            self._clear()
            now = self.clock()
            whole = [
                key
                for key, each in self._open.items()
                if each.last_s <= now - self.quiet_s
                and all(max(each.last_s, self._coming.get(s, 0.0)) <= now - self.lately_s for s in each.sessions)
            ]
            done = 0
            for key in whole:
                if self._drop_known(key):
                    continue
                try:
                    job = self.jobs.begin(self._open[key].via)
                except Overloaded:
                    break
                self._hand_on(key, job)
                done += 1
            return done

    def _drop_known(self, key: str) -> bool:
        """Drops a series of which nothing came but what the newest job of it has, which is whole and is not lost."""
        found, folder = self._open[key], self.series / key
        for path in folder.iterdir():  # of a process before this one
            if path.name not in found.digests:
                found.digests[path.name] = file_sha256(path)[:DIGITS]
        newest = self.jobs.find(found.before.jobs[-1]) if found.before.jobs else None
        if newest is None or newest.partial is not None or newest.returned == "failed":
            return False
        if newest.state not in ("waiting", "running", "done"):
            return False
        if any(found.before.digests.get(name) != digest for name, digest in found.digests.items()):
            return False
        sizes = [path.stat().st_size for path in folder.iterdir()]
        shutil.rmtree(folder)
        self.room.give(sum(sizes))
        del self._open[key]
        self.lacking.ended(key)
        log.info("job %s: %d objects of it came again and are dropped", newest.id[:8], len(sizes))
        return True

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
            held = {name: digest for name, digest in found.digests.items() if name in names}
            noted = replace(before, jobs=(*known, job.id))
            if fits:
                noted = replace(noted, names=names | before.names, digests={**before.digests, **held})
            self.handed.note(key, noted)
            why = f"{len(lacking)} objects came before and are gone: send the whole series."
            partial = (SPLIT, why) if lacking else self._partial(key, found, folder)
            job = replace(job, partial=partial, again=bool(before.names))
            self.jobs.expect(job)
            into.rmdir()
            folder.rename(into)
            if lacking:
                self.jobs.refuse(job, SPLIT, why)
            else:
                self.jobs.submit(job, admitted=True)
        except OSError:  # a full disk: the series waits on
            if not folder.exists():
                into.rename(folder)
            self.jobs.forget(job.id)
            raise
        del self._open[key]
        self.lacking.ended(key)
        log.info("job %s: a series of %d objects%s", job.id[:8], found.files, ", without the rest" if lacking else "")
        if before.names and not names <= before.names:
            self._mark(known)
        if not lacking:
            for earlier in map(self.jobs.find, known):
                if earlier is not None and earlier.partial is not None:
                    self.jobs.mark_partial(earlier.id, REPLACED, f"job {job.id} is of the series as it came later.")

    def _partial(self, key: str, found: _Open, folder: Path) -> tuple[str, str] | None:
        """Code and words, where the objects in `folder` are known not to be the whole series."""
        if refused := self.lacking.refused(key) - {path.name for path in folder.iterdir()}:
            return INCOMPLETE, f"{len(refused)} objects of it were turned away. Send them, or the whole series, again."
        if found.broken:
            return INCOMPLETE, "the connection broke off that it came by. Send the whole series again."
        return _short(len(list(folder.iterdir())), found.stated)

    def _mark(self, jobs: Sequence[str]) -> None:
        for job in jobs:
            self.jobs.mark_partial(
                job, SPLIT, "more of its series, or another in the place of an object, has come after it."
            )

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


def _short(count: int, stated: str) -> tuple[str, str] | None:
    """Code and words, where a series has fewer objects than it says of itself."""
    if not re.fullmatch(r"\d{1,6}", stated) or count >= int(stated):
        return None
    return INCOMPLETE, f"{count} of the {int(stated)} objects came that the series has by its headers."


def _said(file: Path) -> dict[str, str]:
    """What an object says of itself, by `KEYWORDS` and `COUNT`.

    Raises:
        ImageUnreadable: no DICOM, broken, no image, or without the numbers that say what it belongs to.
    """
    with unbroken():
        data = load_head(file, _TAGS)
        said = {keyword: text(data, keyword) for keyword in (*KEYWORDS, COUNT)}
    for keyword in KEYWORDS[:4]:
        if not UID.fullmatch(said[keyword]):
            raise ImageUnreadable(f"DICOM: {keyword} is missing or no UID.", "DICOM_UNREADABLE")
    if said["Modality"] in OBJECTS:
        raise ImageUnreadable("DICOM: no image; the model looks at images.", "MODALITY_MISMATCH")
    return said


def _names(said: Mapping[str, str]) -> tuple[str, str]:
    """Of the folder of a series, and of the file of an object in it."""
    return _named(said["StudyInstanceUID"], said["SeriesInstanceUID"]), f"{_named(said['SOPInstanceUID'])}.dcm"


def _named(*uids: str) -> str:
    return hashlib.sha256("/".join(uids).encode()).hexdigest()[:DIGITS]
