"""Cases that wait for the model, are answered, and are forgotten: folders on disk, one worker, a queue with an end.

    serve/jobs/<id>/in/         what was received; gone once it is predicted on, of a series some time after that
    serve/jobs/<id>/out/        results
    serve/jobs/<id>/job.json    where it stands; written last

A process that is killed goes on with what was waiting.
"""

import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from fedclient.serving.logs import where
from shared_models.errors import FederationError
from shared_models.files import private_folder, read_json, write_json

State = Literal["receiving", "waiting", "running", "done", "failed"]
MOST_TRIES = 2  # of a case during which the worker, or this process, died
SWEEP_S = 60.0
INCOMPLETE = "SERIES_INCOMPLETE"
MOST_KEPT = 5000  # jobs that are done; each takes some ten KB of memory

log = logging.getLogger("fedclient.serving")


class Overloaded(FederationError):
    """There is no room for another case now."""


class Worker(Protocol):
    """Whoever predicts on a folder: `fedclient.serving.warm.Warm` in the service."""

    def ask(self, folder: Path, view: bool, count: bool) -> Mapping[str, Any]:
        """What came of the files in `folder`/in, with results in `folder`/out; where a `view` is wanted, pictures too.
        Drift hears of the case where it is to `count`.

        Raises:
            FederationError: the worker died, or took too long.
        """
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """One case, or what came together in one upload.

    Attributes:
        via: `page`, `dicom` or `stow`.
        came_s: seconds since the epoch.
        answer: what the worker said.
        error: code and words for whoever sent it, which name no file and no patient.
        returned: to PACS: `off`, `waiting`, `sent`, `failed`, or `withheld` because it is partial.
        partial: code and words, where it is of a part of its series: `SERIES_SPLIT`, `SERIES_INCOMPLETE`, or
            `SERIES_REPLACED` once a later job has the whole, or corrected objects of it. It is not returned, and no
            DICOMweb search finds it.
        taken: those of its results, as its answer names them, that PACS took as it refused others.
        again: objects of its series were handed on before.
        answered_s: when it was done or failed, in seconds since the epoch; it is kept from then on, and waits for PACS.
        given_up_s: when its results had waited for PACS long enough; they are kept from then on.
    """

    id: str
    via: str
    came_s: float
    state: State = "receiving"
    tries: int = 0
    answer: Mapping[str, Any] | None = None
    error: tuple[str, str] | None = None
    returned: Literal["off", "waiting", "sent", "failed", "withheld"] = "off"
    partial: tuple[str, str] | None = None
    taken: tuple[str, ...] = ()
    again: bool = False
    answered_s: float = 0.0
    given_up_s: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether drift counts it: a case of its own, whole, and for the first time."""
        return self.partial is None and not self.again and self.tries <= 1


class Room:
    """How many bytes the files of the service take up, against their quota."""

    def __init__(self, folder: Path, quota_bytes: int) -> None:
        self.folder, self.quota_bytes = folder, quota_bytes
        self._lock = threading.Lock()
        self.used_bytes = 0
        self.count()

    def count(self) -> None:
        """Looks at what is there."""
        found = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with suppress(FileNotFoundError):
                    found += Path(folder, name).stat().st_size
        with self._lock:
            self.used_bytes = found

    def take(self, size_bytes: int) -> None:
        """Raises Overloaded where so many bytes more do not fit into the quota, or onto the disk."""
        with self._lock:
            if self.used_bytes + size_bytes > self.quota_bytes:
                raise Overloaded("the quota for received files is used up. Try again later.")
            if shutil.disk_usage(self.folder).free < size_bytes + 2**28:
                raise Overloaded("the disk is nearly full. Try again later.")
            self.used_bytes += size_bytes

    def give(self, size_bytes: int) -> None:
        with self._lock:
            self.used_bytes = max(0, self.used_bytes - size_bytes)


class Jobs:
    """The queue and its one thread.

    Args:
        done: called with each job that is done and is to be returned.
        join_s: the files of a series are kept so long after it came.
        return_s: results are returned within so long, or given up.
    """

    def __init__(
        self,
        folder: Path,
        worker: Worker,
        room: Room,
        most: int,
        keep_s: float,
        done: Callable[[Job], None] | None = None,
        clock: Callable[[], float] = time.time,
        join_s: float = 0.0,
        return_s: float = 72 * 3600.0,
    ) -> None:
        self.folder, self.worker, self.room, self.most, self.keep_s = folder, worker, room, most, keep_s
        self.done, self.clock, self.join_s, self.return_s = done, clock, join_s, return_s
        private_folder(folder)
        self._known: dict[str, Job] = {}
        self._queue: deque[str] = deque()
        self._change = threading.Condition()
        self._stop = False
        self._thread: threading.Thread | None = None
        self._recover()

    # ---- what others ask ----

    @property
    def full(self) -> bool:
        with self._change:
            return len(self._queue) >= self.most

    @property
    def waiting(self) -> int:
        with self._change:
            return len(self._queue)

    @property
    def longest_s(self) -> float:
        """How long after its answer a job may be there."""
        return self.keep_s + (self.return_s if self.done is not None else 0.0)

    def ahead(self, job_id: str) -> int:
        """How many cases come before a waiting job."""
        with self._change:
            return self._queue.index(job_id) if job_id in self._queue else 0

    def find(self, job_id: str) -> Job | None:
        with self._change:
            return self._known.get(job_id)

    def all(self) -> list[Job]:
        with self._change:
            return sorted(self._known.values(), key=lambda job: job.came_s)

    def place(self, job_id: str) -> Path:
        return self.folder / job_id

    def begin(self, via: str) -> Job:
        """A job whose files are still to come, into `place(id)`/in.

        Raises:
            Overloaded: as many wait as may.
        """
        if self.full:
            raise Overloaded("as many cases wait as this machine takes. Try again in a minute.")
        job = Job(secrets.token_hex(16), via, self.clock())
        private_folder(self.place(job.id) / "in")
        with self._change:
            self._known[job.id] = job
        return job

    def expect(self, job: Job) -> None:
        """Writes down a job whose files come into `place(id)`/in by one rename: from then on the job is not lost."""
        with self._change:
            self._set(job)

    def submit(self, job: Job, admitted: bool = False) -> None:
        """Puts a job, whose files are there, into the queue.

        Args:
            admitted: it was let in already, and whoever sent it has gone.

        Raises:
            Overloaded: others were faster.
        """
        with self._change:
            if len(self._queue) >= self.most and not admitted:
                raise Overloaded("as many cases wait as this machine takes. Try again in a minute.")
            self._set(replace(job, state="waiting"))
            self._queue.append(job.id)
            self._change.notify_all()

    def forget(self, job_id: str) -> bool:
        """Deletes a job with all its files; False where it is being worked on or unknown."""
        with self._change:
            job = self._known.get(job_id)
            if job is None or job.state == "running":
                return False
            del self._known[job_id]
            with suppress(ValueError):
                self._queue.remove(job_id)
        shutil.rmtree(self.place(job_id), ignore_errors=True)
        self.room.count()
        return True

    def refuse(self, job: Job, code: str, why: str) -> None:
        """Ends a job, whose files are of a part of a series, without a prediction."""
        with self._change:
            self._set(replace(job, state="failed", error=(code, why), partial=(code, why), answered_s=self.clock()))
        shutil.rmtree(self.place(job.id) / "in", ignore_errors=True)
        self.room.count()

    def mark_partial(self, job_id: str, code: str, why: str) -> None:
        """Says of a job, in whatever state, that it is of a part of its series; what has not been returned is not."""
        with self._change:
            job = self._known.get(job_id)
            if job is None or job.partial == (code, why):
                return
            if (job.returned == "sent" or job.taken) and job.partial is None:
                _warn_of_part(job)
            job = replace(job, partial=(code, why))
            if job.returned == "waiting":
                job = replace(job, returned="withheld")
            self._set(job)
            self._mark_results(job)

    def mark_returned(self, job_id: str, returned: Literal["sent", "failed"]) -> None:
        """What came of a job that was sent; it may have turned out partial meanwhile."""
        with self._change:
            job = self._known.get(job_id)
            if job is None or (returned == "failed" and job.returned == "withheld"):
                return
            if returned == "sent" and job.partial is not None and not job.taken:
                _warn_of_part(job)
            self._set(replace(job, returned=returned, given_up_s=self.clock() if returned == "failed" else 0.0))

    def mark_taken(self, job_id: str, files: Sequence[str]) -> None:
        with self._change:
            if job_id in self._known:
                job = self._known[job_id]
                if files and job.partial is not None and not job.taken:
                    _warn_of_part(job)
                self._set(replace(job, taken=(*job.taken, *files)))

    # ---- the thread ----

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def stop(self, wait_s: float = 5.0) -> None:
        with self._change:
            self._stop = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join(wait_s)

    def _run(self) -> None:
        swept = 0.0
        while True:
            with self._change:
                if not self._queue and not self._stop:
                    self._change.wait(SWEEP_S / 4)
                if self._stop:
                    return
                job = self._known[self._queue.popleft()] if self._queue else None
            if job is not None:
                try:
                    self._work(job)
                except OSError as error:  # a full disk, or one that is only read: there may be room for the next one
                    log.error("job %s: %s, %s", job.id[:8], error.strerror, where(error))
                    self._unwritten(job.id)
            if time.monotonic() - swept > SWEEP_S:
                try:
                    self.sweep()
                except OSError as error:
                    log.error("nothing is swept: %s, %s", error.strerror, where(error))
                swept = time.monotonic()

    def _unwritten(self, job_id: str) -> None:
        """Ends a job whose state cannot be written; in memory alone, so that the next start tries it again."""
        words = "its state could not be written here: the disk is full or faulty. Send the case again."
        with self._change:
            if job_id in self._known:
                job = replace(self._known[job_id], state="failed", error=("DISK_FULL", words), answered_s=self.clock())
                self._known[job_id] = job

    def _work(self, job: Job) -> None:
        """One case, whatever it does to the worker.

        Raises:
            OSError: where it stands cannot be written.
        """
        with self._change:
            if job.id not in self._known:  # forgotten since it left the queue
                return
            job = replace(self._known[job.id], state="running", tries=job.tries + 1)
            self._set(job)
        folder = self.place(job.id)
        try:
            answer = self.worker.ask(folder, job.via == "page", job.counts)
            job = _answered(job, answer)
            unread = answer.get("unread")
            if unread and job.state == "done" and job.via != "page" and job.partial is None:
                words = (
                    f"{len(unread)} of its parts could not be read ({unread[0]['code']}). Send the whole series again."
                )
                job = replace(job, partial=(INCOMPLETE, words))
        except FederationError as error:
            job = replace(job, state="failed", error=("WORKER_FAILED", str(error)))
        except Exception as error:  # a fault of ours must not end the service; its words might quote a file
            log.error("a case failed in the service itself: %s", where(error))
            job = replace(job, state="failed", error=("INTERNAL", "a fault of the service; its log says where."))
        if self._stop and job.state == "failed":  # the service ends, and has taken the worker from this case
            with self._change:
                if job.id in self._known:
                    self._set(replace(self._known[job.id], state="waiting", tries=job.tries - 1))
            return
        with self._change:
            meanwhile = self._known.get(job.id, job).partial  # more may have come
            job = replace(job, partial=meanwhile or job.partial, answered_s=self.clock())
            if job.state == "done" and self.done is not None:
                job = replace(job, returned="waiting" if job.partial is None else "withheld")
            self._set(job)
            self._mark_results(job)
        if self._over_with(job):  # only now that the answer is written
            shutil.rmtree(folder / "in", ignore_errors=True)
        self.room.count()
        log.info("job %s: %s%s", job.id[:8], job.state, f", {job.error[0]}" if job.error else "")
        if job.returned == "waiting" and self.done is not None:
            self.done(job)

    def sweep(self) -> None:
        """Deletes what has been kept long enough since it was answered, or given up for PACS, uploads that never ended,
        and what is too much: of the oldest first those that failed. What waits is kept until it is answered; what waits
        for PACS, until it is there or given up."""
        before = self.clock() - self.keep_s
        ended = [job for job in self.all() if job.state in ("done", "failed") and job.returned != "waiting"]
        ended.sort(key=lambda job: (job.state != "failed", job.came_s))
        for job in ended[: max(0, len(ended) - MOST_KEPT)]:
            self.forget(job.id)
        for job in self.all():
            if job.state in ("waiting", "running") or job.returned == "waiting":
                continue
            if (max(job.answered_s, job.given_up_s) or job.came_s) < before:
                if job.state == "receiving":
                    log.warning("job %s: an upload that never ended is deleted", job.id[:8])
                self.forget(job.id)
            elif job.state != "receiving" and self._over_with(job) and (self.place(job.id) / "in").exists():
                shutil.rmtree(self.place(job.id) / "in", ignore_errors=True)
                self.room.count()

    def _over_with(self, job: Job) -> bool:
        """Whether the files of a case that is answered are of no more use."""
        return job.via == "page" or self.clock() - job.came_s >= self.join_s

    def _mark_results(self, job: Job) -> None:
        """Writes into each result.json that it is of a part, where it is."""
        if job.partial is None:
            return
        told = {"code": job.partial[0], "why": job.partial[1]}
        for path in (self.place(job.id) / "out").glob("*/result.json"):
            try:
                write_json(path, read_json(path) | {"partial": told})
            except OSError as error:
                log.error("job %s: result.json does not say that it is partial: %s", job.id[:8], error.strerror)

    def _set(self, job: Job) -> None:
        """Under the lock."""
        write_json(self.place(job.id) / "job.json", asdict(job))
        self._known[job.id] = job

    def _recover(self) -> None:
        """Goes on with what a process before this one left, in the order in which it came: uploads that never ended are
        deleted."""
        found = []
        for folder in self.folder.iterdir():
            job = _read(folder / "job.json")
            if job is not None and job.state == "receiving" and _holds_any(folder / "in"):  # they came by one rename
                job = replace(job, state="waiting")
            if job is None or job.state == "receiving" or not re.fullmatch("[0-9a-f]{32}", folder.name):
                if _holds_any(folder / "in"):
                    log.warning("job %s: an upload that never ended is deleted", folder.name[:8])
                shutil.rmtree(folder, ignore_errors=True)
                continue
            found.append(job)
        for job in sorted(found, key=lambda job: job.came_s):
            if job.state == "running" and job.tries >= MOST_TRIES:
                words = "this case has ended the service before, and is not tried again."
                job = replace(job, state="failed", error=("WORKER_FAILED", words), answered_s=self.clock())
                shutil.rmtree(self.place(job.id) / "in", ignore_errors=True)
            if job.state in ("waiting", "running"):
                job = replace(job, state="waiting")
                self._queue.append(job.id)
            if job.returned == "waiting" and self.done is None:
                log.warning("job %s: its results are returned no more: nothing is returned to now", job.id[:8])
                job = replace(job, returned="failed", given_up_s=self.clock())
            self._set(job)
        self.room.count()


def _warn_of_part(job: Job) -> None:
    log.warning("job %s: its results were returned, and are not of the whole series as it is now", job.id[:8])


def _answered(job: Job, answer: Mapping[str, Any]) -> Job:
    if answer.get("images"):
        return replace(job, state="done", answer=answer)
    unread = answer.get("unread") or [{"code": "FILE_MISSING", "why": "nothing that can be read was sent."}]
    return replace(job, state="failed", answer=answer, error=(unread[0]["code"], unread[0]["why"]))


def _holds_any(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _read(path: Path) -> Job | None:
    try:
        facts = read_json(path)
        for key in ("error", "partial"):
            if facts.get(key) is not None:
                facts[key] = tuple(facts[key])
        facts["taken"] = tuple(facts.get("taken", ()))
        return Job(**facts)
    except (OSError, ValueError, TypeError, KeyError):
        return None
