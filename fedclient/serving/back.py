"""Results on their way back to PACS, where that is switched on: C-STORE or STOW-RS, until they are there."""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from pydicom import Dataset, dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association

from fedclient.data.dicom_header import unbroken
from fedclient.data.result_header import FOUND_BY, found_by
from fedclient.serving.jobs import Job, Jobs
from fedclient.serving.logs import where
from fedclient.serving.settings import Destination
from shared_models.errors import FederationError

FIRST_S, LONGEST_S = 5.0, 600.0
STALL_S = 60.0
DUPLICATE = 0x0111  # status of C-STORE and reason of STOW-RS: it has the object
FAILED, INSTANCE, REASON = "00081198", "00081155", "00081197"  # FailedSOPSequence and two of its elements
FAILED_XML = re.compile(rb"""<[^<>]*\btag=["']00081198["'][^<>]*[^/<>]>\s*<[^/]""")  # as PS3.19 has it, not empty

log = logging.getLogger("fedclient.serving")


class NotTaken(FederationError):
    """The destination did not take a result.

    Attributes:
        taken: the files that it took all the same.
    """

    def __init__(self, message: str, taken: Sequence[Path] = ()) -> None:
        super().__init__(message)
        self.taken = taken


class Back:
    """One thread that returns results, oldest first."""

    def __init__(
        self,
        to: Destination,
        jobs: Callable[[], Jobs],
        ae_title: str,
        send: Callable[[Destination, Sequence[Path], str], None] | None = None,
        first_s: float = FIRST_S,
    ) -> None:
        self.to, self.jobs, self.ae_title, self.first_s = to, jobs, ae_title, first_s
        self.send = send or send_all
        self._change = threading.Condition()
        self._due: dict[str, tuple[float, float]] = {}  # job -> due, wait after
        self._stop = False
        self._thread: threading.Thread | None = None

    def add(self, job: Job) -> None:
        with self._change:
            self._due[job.id] = (time.monotonic(), self.first_s)
            self._change.notify_all()

    def start(self) -> None:
        for job in self.jobs().all():
            if job.returned == "waiting":
                self.add(job)
        self._thread = threading.Thread(target=self._run, name="back", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._change:
            self._stop = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join(5.0)

    def _run(self) -> None:
        while True:
            with self._change:
                if self._stop:
                    return
                now = time.monotonic()
                due = sorted((at, job) for job, (at, _) in self._due.items())
                if not due or due[0][0] > now:
                    self._change.wait(due[0][0] - now if due else None)
                    continue
                _, job_id = due[0]
            try:
                self._one(job_id)
            except OSError as error:  # that it was given up cannot be written: it is tried, or given up, once more
                log.error("job %s: %s, %s", job_id[:8], error.strerror, where(error))
                with self._change:
                    _, wait_s = self._due[job_id]
                    self._due[job_id] = (time.monotonic() + wait_s, wait_s)

    def _one(self, job_id: str) -> None:
        job = self.jobs().find(job_id)
        _, wait_s = self._due[job_id]
        if job is not None and job.returned == "waiting":
            folder = self.jobs().place(job_id)
            files = [each for each in dicom_results(folder, job) if _name(each, folder) not in job.taken]
            try:
                self.send(self.to, files, self.ae_title)
                self.jobs().mark_returned(job_id, "sent")
                log.info("job %s: %d results returned", job_id[:8], len(files))
            except Exception as error:  # of the destination, or of a library over what it said: the next may be taken
                if isinstance(error, NotTaken) and error.taken:
                    self.jobs().mark_taken(job_id, [_name(each, folder) for each in error.taken])
                return_s = self.jobs().return_s
                if self.jobs().clock() - (job.answered_s or job.came_s) < return_s:
                    log.warning("job %s: not returned yet (%s); again in %.0f s", job_id[:8], _words(error), wait_s)
                    with self._change:
                        self._due[job_id] = (time.monotonic() + wait_s, min(2 * wait_s, LONGEST_S))
                    return
                self.jobs().mark_returned(job_id, "failed")
                log.error("job %s: its results could not be returned within %.3g hours", job_id[:8], return_s / 3600)
        with self._change:
            self._due.pop(job_id, None)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, NotTaken) else where(error)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder / "out").as_posix()


def dicom_results(folder: Path, job: Job) -> list[Path]:
    """The DICOM files among the results of a job."""
    images = (job.answer or {}).get("images", [])
    return [folder / "out" / each["file"] for image in images for each in image["files"] if each["kind"] == "dicom"]


def send_all(to: Destination, files: Sequence[Path], ae_title: str) -> None:
    """All of `files`, or NotTaken."""
    if not files:
        return
    (stow if to.kind == "web" else store)(to, files, ae_title)


def store(to: Destination, files: Sequence[Path], ae_title: str) -> None:
    """C-STORE of what the destination wants: objects of a class that it does not negotiate are left out.

    Raises:
        NotTaken: no association, one that broke off, no class that is wanted, or a status that is no success of any
            object; the others are sent all the same.
    """
    entity = AE(ae_title=ae_title)
    entity.network_timeout = entity.dimse_timeout = entity.acse_timeout = entity.connection_timeout = STALL_S
    datasets = [(path, dcmread(path)) for path in files]
    for sop_class, syntax in sorted({(d.SOPClassUID, each) for _, d in datasets for each in _encodings(d)}):
        entity.add_requested_context(sop_class, syntax)
    association = entity.associate(to.host, to.port, ae_title=to.ae_title)
    if association.rejected_contexts and not association.accepted_contexts:
        raise NotTaken(f"{to}: takes no objects of the classes of the results, or not as they are encoded")
    if association.is_rejected:
        raise NotTaken(f"{to}: it refused the association. Does it know the AE title {ae_title}?")
    if not association.is_established:
        raise NotTaken(f"{to}: no association. Is it up, and are host and port right?")
    try:
        taken = {(each.abstract_syntax, each.transfer_syntax[0]) for each in association.accepted_contexts}
        wanted = [(path, d) for path, d in datasets if any((d.SOPClassUID, each) in taken for each in _encodings(d))]
        if not wanted:
            raise NotTaken(f"{to}: takes no objects of the classes of the results, or not as they are encoded")
        all_kinds, sent_kinds = ({d.SOPClassUID.name for _, d in each} for each in (datasets, wanted))
        for name in sorted(all_kinds - sent_kinds):
            _not_wanted(str(to), name)
        _send(association, wanted, str(to))
    finally:
        association.release()


def _encodings(data: Dataset) -> Sequence[UID]:
    """In which a result may be sent; pynetdicom writes it in the second where the first is not taken."""
    syntax = data.file_meta.TransferSyntaxUID
    return (syntax, ImplicitVRLittleEndian) if syntax == ExplicitVRLittleEndian else (syntax,)


def _send(association: Association, wanted: Sequence[tuple[Path, Dataset]], to: str) -> None:
    """Raises NotTaken, at the end, where one is not taken."""
    taken: list[Path] = []
    why = ""
    for path, data in wanted:
        try:
            status = association.send_c_store(data)
        except ValueError:
            why = "a result cannot be encoded as was agreed"
            continue
        except RuntimeError:  # it hung up between two objects
            why = "the association broke off"
            break
        if "Status" not in status:
            why = "it has not answered"
            break
        if status.Status in (0, DUPLICATE) or status.Status & 0xF000 == 0xB000:
            taken.append(path)
        else:
            why = f"status 0x{status.Status:04X}"
    if why:
        raise NotTaken(f"{to}: {len(wanted) - len(taken)} of {len(wanted)} results not taken: {why}", taken)


@cache
def _not_wanted(to: str, name: str) -> None:
    """Logs it once."""
    log.warning("%s: takes no objects of %s; results of this class are not sent there", to, name)


def stow(to: Destination, files: Sequence[Path], ae_title: str) -> None:
    """STOW-RS (PS3.18 section 10.5), with the hospital's own CAs and proxies as the environment has them.

    Raises:
        NotTaken: an answer that is no success, or names objects that were not stored.
    """
    boundary = "fedimaging-results"
    parts = [
        f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode() + path.read_bytes() + b"\r\n"
        for path in files
    ]
    headers = {
        "content-type": f'multipart/related; type="application/dicom"; boundary={boundary}',
        "accept": "application/dicom+json",
    }
    with httpx.Client(timeout=STALL_S) as client:
        answer = client.post(
            f"{to.url}/studies", content=b"".join(parts) + f"--{boundary}--\r\n".encode(), headers=headers
        )
    refused = _refused(answer)
    if answer.status_code not in (200, 202, 409) or (answer.status_code == 202 and refused is None):
        raise NotTaken(f"{to.url}: HTTP status {answer.status_code}")
    with unbroken():
        names = {found_by(path)[FOUND_BY.index("SOPInstanceUID")]: path for path in files}
    there = {uid for uid, reason in refused or () if reason == DUPLICATE}
    lacking = {uid for uid, reason in refused or () if reason != DUPLICATE}
    if answer.status_code == 409 or not lacking <= names.keys():
        lacking = names.keys() - there
    if lacking:
        taken = [path for uid, path in names.items() if uid not in lacking]
        raise NotTaken(f"{to.url}: {len(lacking)} of {len(files)} results were not stored", taken)


def _refused(answer: httpx.Response) -> list[tuple[str, int]] | None:
    """UID and reason of each object that was not stored (PS3.18 section 10.5.3), not known where XML says so; None: an
    answer that says nothing."""
    if b"<NativeDicomModel" in answer.content:
        return [("", 0)] if FAILED_XML.search(answer.content) else []
    try:
        items = answer.json().get(FAILED, {}).get("Value", ())
        return [(_value(each, INSTANCE, ""), _value(each, REASON, 0)) for each in items]
    except (ValueError, TypeError, AttributeError):
        return None


def _value(item: Mapping[str, Any], tag: str, otherwise: Any) -> Any:
    return (item.get(tag, {}).get("Value") or [otherwise])[0]
