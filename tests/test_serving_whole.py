"""What is known to be a part of a series is not returned as the whole, and what was accepted is not lost."""

import gc
import io
import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    SegmentationStorage,
)
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode
from pynetdicom.pdu import P_DATA_TF

from fedclient.serving.back import Back, NotTaken, store, stow
from fedclient.serving.intake import Intake
from fedclient.serving.jobs import Job, Jobs, Overloaded
from fedclient.serving.lacking import Lacking
from fedclient.serving.receiver import STALL_S, Receiver, session_of
from fedclient.serving.settings import Destination, Serve, destination
from shared_models.errors import ImageUnreadable
from simulations.fixtures.dicom import write_dicom_series
from simulations.fixtures.sown import person
from tests.test_serving import SEG_FILE, Hands, Told, data_unit, heard, image, put, queue, stowed, until, web, whole

# pynetdicom leaves sockets to the collector
leaves_sockets = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    return write_dicom_series(folder, person(0).volume).paths[:4]


def told(jobs: Jobs) -> list[Any]:
    return [(job.state, job.partial and job.partial[0], job.returned) for job in jobs.all()]


def ended(jobs: Jobs, count: int) -> bool:
    return len(jobs.all()) == count and all(job.state in ("done", "failed") for job in jobs.all())


WITHHELD, WAITS = ("done", "SERIES_INCOMPLETE", "withheld"), ("done", None, "waiting")


# ---- what is a part ----


def test_a_series_whose_connection_broke_off_is_withheld_until_all_of_it_is_sent_again(tmp_path, series):
    worker, back = Told(), list[Job]()
    with queue(tmp_path, worker, done=back.append, join_s=60.0) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for path in series[:3]:
            hands.give(path, "one")
        hands.intake.closed("one", broken=True)
        whole(hands, "one")
        until(lambda: ended(jobs, 1))
        assert (told(jobs), back) == ([WITHHELD], [])
        for path in series:
            hands.give(path, "two")
        whole(hands, "two")
        until(lambda: ended(jobs, 2))
        assert told(jobs) == [("done", "SERIES_REPLACED", "withheld"), WAITS]
        assert [len(each) for each in worker.seen] == [3, 4]
        assert worker.counted == [False, False]


@pytest.mark.parametrize(
    ("steps", "partial"),
    [
        ("0a 1b a! b.", True),  # the other had begun before
        ("0a a! 0b 1b b.", False),  # it came again
        ("0a a! 0b 1b b!", True),
        ("0a a! 0b b! 0c c.", False),
    ],
)
def test_a_connection_that_comes_after_one_that_broke_off_and_ends_in_order_mends_it(tmp_path, series, steps, partial):
    with queue(tmp_path, Told(), done=lambda _: None) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for first, second in steps.split():
            if second in "!.":
                hands.intake.closed(first, broken=second == "!")
            else:
                hands.give(series[int(first)], second)
        whole(hands, "none")
        until(lambda: ended(jobs, 1))
        assert told(jobs) == [WITHHELD if partial else WAITS]


@pytest.mark.parametrize("killed", [True, False])
def test_a_series_that_was_coming_as_the_process_was_killed_is_withheld_and_one_that_had_come_is_not(
    tmp_path, series, killed
):
    with queue(tmp_path, Told(), done=lambda _: None) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        hands.give(series[0], "one")
        if not killed:
            hands.intake.closed("one")
        hands = Hands(jobs, room, tmp_path)  # another process
        whole(hands, "none")
        until(lambda: ended(jobs, 1))
        assert told(jobs) == [WITHHELD if killed else WAITS]
        assert list((tmp_path / "serve" / "lacking").iterdir()) == []


def test_a_series_of_which_objects_were_turned_away_is_withheld_until_the_last_has_come(tmp_path, series):
    worker = Told()
    worker.go.clear()
    with queue(tmp_path, worker, most=1, done=lambda _: None, join_s=60.0) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        others = [put(jobs)]
        until(lambda: jobs.find(others[0]).state == "running")
        others.append(put(jobs))
        for path in series[:2]:
            with pytest.raises(Overloaded):
                hands.give(path, "one")
        worker.go.set()
        until(lambda: ended(jobs, 2))
        for each in others:
            jobs.forget(each)
        hands = Hands(jobs, room, tmp_path)  # another process remembers it
        for path in series[2:]:
            hands.give(path, "one")
        whole(hands, "one")
        until(lambda: ended(jobs, 1))
        assert told(jobs) == [WITHHELD]
        assert jobs.all()[0].partial[1].startswith("2 objects")
        hands.give(series[0], "two")
        whole(hands, "two")
        until(lambda: ended(jobs, 2))
        assert told(jobs)[1] == WITHHELD
        hands.give(series[1], "three")
        whole(hands, "three")
        until(lambda: ended(jobs, 3))
        assert told(jobs)[2] == WAITS
        assert len(worker.seen[-1]) == 4


def test_objects_beyond_the_quota_and_beyond_what_a_series_may_have_are_remembered_as_lacking(
    tmp_path, series, monkeypatch
):
    monkeypatch.setattr("fedclient.serving.intake.MOST_FILES", 2)
    with queue(tmp_path, Told(), done=lambda _: None) as (jobs, room):
        intake = Intake(tmp_path / "serve", jobs, room, 0.0)
        used = room.used_bytes

        def give(path, size_bytes):
            file = intake.new_file()
            shutil.copyfile(path, file)
            intake.place(file, "dicom", "one", size_bytes=size_bytes)

        give(series[0], 100)
        with pytest.raises(Overloaded):
            give(series[1], 1 << 30)
        give(series[2], 100)
        with pytest.raises(ImageUnreadable, match="more than 2"):
            give(series[3], 100)
        assert room.used_bytes == used + 200
        intake.closed("one")
        time.sleep(0.01)
        assert intake.hand_on() == 1
        until(lambda: ended(jobs, 1))
        assert told(jobs) == [WITHHELD]
        assert jobs.all()[0].partial[1].startswith("2 objects")


def test_a_series_of_which_a_stow_body_broke_off_is_withheld(tmp_path, series):
    worker = Told()
    with web(tmp_path, worker) as (ask, jobs, intake):
        body, headers = stowed([path.read_bytes() for path in series[:2]])
        assert ask("POST", "/dicom-web/studies", content=body, headers=headers).status_code == 200
        body, headers = stowed([path.read_bytes() for path in series[2:]])
        assert ask("POST", "/dicom-web/studies", content=body[:-200], headers=headers).status_code == 400
        assert list(intake.quarantine.iterdir()) == []
        assert intake.hand_on() == 1
        until(lambda: ended(jobs, 1))
        assert jobs.all()[0].partial[:2] == (
            "SERIES_INCOMPLETE", "2 objects of it were turned away. Send them, or the whole series, again.",
        )  # fmt: skip


def test_stow_lets_a_series_under_way_finish_while_too_many_cases_wait_and_puts_off_another(tmp_path, series):
    worker = Told()
    worker.go.clear()
    with web(tmp_path, worker) as (ask, jobs, intake):
        body, headers = stowed([series[0].read_bytes()])
        assert ask("POST", "/dicom-web/studies", content=body, headers=headers).status_code == 200
        running = put(jobs)
        until(lambda: jobs.find(running).state == "running")  # it leaves the queue by that
        while not jobs.full:
            put(jobs)
        body, headers = stowed([path.read_bytes() for path in series[1:]])
        assert ask("POST", "/dicom-web/studies", content=body, headers=headers).status_code == 200
        body, headers = stowed([of_series(series[0], "1.2.3", tmp_path).read_bytes()])
        late = ask("POST", "/dicom-web/studies", content=body, headers=headers)
        assert (late.status_code, late.headers["retry-after"]) == (503, "30")
        assert late.json()["00081198"]["Value"] == [{"00081197": {"vr": "US", "Value": [0xA700]}}]
        assert list(intake.quarantine.iterdir()) == []
        worker.go.set()
        until(lambda: all(job.state == "done" for job in jobs.all()))
        assert intake.hand_on() == 1
        until(lambda: all(job.state == "done" for job in jobs.all()))
        assert (len(worker.seen[-1]), jobs.all()[-1].partial) == (4, None)


@pytest.mark.parametrize(("via", "expected"), [("dicom", WITHHELD), ("stow", WITHHELD), ("page", WAITS)])
def test_a_series_of_which_a_file_cannot_be_read_is_withheld(tmp_path, via, expected):
    unread = [{"code": "DICOM_UNREADABLE", "why": "broken."}]
    with queue(tmp_path, Told(lambda _: {"images": [image()], "unread": unread}), done=lambda _: None) as (jobs, _):
        job = jobs.begin(via)
        (jobs.place(job.id) / "in" / "a.dcm").write_bytes(b"x")
        jobs.submit(job)
        until(lambda: ended(jobs, 1))
        assert told(jobs) == [expected]


def test_the_memory_of_what_was_turned_away_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("fedclient.serving.lacking.MOST_REFUSED", 3)
    memory = Lacking(tmp_path, keep_s=100.0)
    for key, name in (("a", "1"), ("a", "2"), ("a", "2"), ("b", "1")):
        memory.refuse(key, name)
    assert [len(memory.refused(key)) for key in "abc"] == [2, 1, 0]
    memory.refuse("c", "1")
    assert [len(memory.refused(key)) for key in "abc"] == [0, 1, 1]
    memory.came("b", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert Lacking(tmp_path, keep_s=100.0).refused("c") == {"1"}
    assert Lacking(tmp_path, keep_s=-1.0).refused("c") == frozenset()
    assert list(tmp_path.iterdir()) == []


def association(port: int) -> Association:
    entity = AE(ae_title="PACS")
    entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    return entity.associate("127.0.0.1", port, ae_title="FEDIMAGING")


@leaves_sockets
@pytest.mark.parametrize(
    ("end", "expected"), [("release", WAITS), ("abort", WITHHELD), ("reset", WITHHELD), ("quota", WITHHELD)]
)
def test_a_peer_that_does_not_release_its_association_has_not_sent_the_whole(tmp_path, series, end, expected):
    with queue(tmp_path, Told(), done=lambda _: None) as (jobs, room):
        intake = Intake(tmp_path / "serve", jobs, room, 0.0)
        receiver = Receiver(Serve(allow=("PACS",), dicom_port=0), intake, room)
        receiver.start()
        try:
            link = association(receiver.port)
            for path in series[:2]:
                assert link.send_c_store(pydicom.dcmread(path)).Status == 0
            if end == "quota":
                room.quota_bytes = room.used_bytes + 1
                link.send_c_store(pydicom.dcmread(series[2]))
            elif end == "reset":
                plug: Any = link.dul.socket and link.dul.socket.socket
                plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                plug.close()
            else:
                getattr(link, end)()
            until(lambda: intake.hand_on() == 1)
            until(lambda: ended(jobs, 1))
            assert told(jobs) == [expected]
        finally:
            receiver.stop()
    gc.collect()


def cut(link: Association, path: Path) -> None:
    """Sends half of an object and pulls the cable."""
    data = pydicom.dcmread(path)
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = data.SOPClassUID, data.SOPInstanceUID
    request.DataSet = io.BytesIO(encode(data, False, True) or b"")
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    pieces = [*message.encode_msg(link.accepted_contexts[0].context_id or 0, 1024)]
    assert len(pieces) > 3
    plug: Any = link.dul.socket and link.dul.socket.socket
    for piece in pieces[:-1]:
        unit = P_DATA_TF()
        unit.from_primitive(piece)
        plug.sendall(unit.encode())
    time.sleep(0.3)
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    plug.close()


@leaves_sockets
@pytest.mark.parametrize("answered", [False, True])
def test_an_object_that_is_cut_off_on_a_connection_of_its_own_is_known_to_lack(tmp_path, series, answered):
    with queue(tmp_path, Told(), done=lambda _: None, join_s=60.0) as (jobs, room):
        intake = Intake(tmp_path / "serve", jobs, room, 0.0)
        receiver = Receiver(Serve(allow=("PACS",), dicom_port=0), intake, room)
        receiver.start()
        try:
            for path in series[:2]:
                link = association(receiver.port)
                assert link.send_c_store(pydicom.dcmread(path)).Status == 0
                link.release()
            if answered:
                until(lambda: intake.hand_on() == 1)
                until(lambda: ended(jobs, 1))
                assert told(jobs) == [WAITS]
            cut(association(receiver.port), series[2])
            until(lambda: not [*intake.quarantine.iterdir()])
            if answered:
                assert told(jobs) == [("done", "SERIES_SPLIT", "withheld")]
            else:
                until(lambda: intake.hand_on() == 1)
                until(lambda: ended(jobs, 1))
                assert told(jobs) == [WITHHELD]
                assert jobs.all()[0].partial[1].startswith("1 objects")
        finally:
            receiver.stop()
    gc.collect()


@pytest.mark.parametrize(
    ("later_s", "half", "broken"), [(STALL_S, False, False), (STALL_S, True, True), (5.0, False, True)]
)
def test_who_is_cut_off_for_his_silence_has_sent_the_whole_unless_it_was_in_the_middle_of_an_object(
    tmp_path, series, later_s, half, broken
):
    now = [0.0]
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        receiver = Receiver(Serve(allow=("PACS",)), hands.intake, room, clock=lambda: now[0])
        requestor = SimpleNamespace(ae_title="PACS", address="")
        peer = SimpleNamespace(requestor=requestor, dimse=SimpleNamespace(message=None))
        receiver._counted(heard(assoc=peer, data=data_unit((3, 70))))
        receiver._echoed(heard(assoc=peer))
        hands.give(series[0], session_of(peer))
        if half:
            receiver._counted(heard(assoc=peer, data=data_unit((3, 70))))
        now[0] = later_s
        receiver._closed(heard(assoc=peer))
        whole(hands, "none")
        assert (jobs.all()[0].partial is not None) == broken


def test_a_connection_that_is_gone_before_its_object_is_looked_at_has_broken_off(tmp_path, series):
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        receiver = Receiver(Serve(allow=("PACS",)), hands.intake, room)
        peer = SimpleNamespace(
            requestor=SimpleNamespace(ae_title="PACS", address=""), dimse=SimpleNamespace(message=None)
        )
        receiver._closed(heard(assoc=peer))
        shutil.copyfile(series[0], file := hands.intake.new_file())
        assert receiver._stored(heard(assoc=peer, dataset_path=file)) == 0
        hands.now = 5.0
        assert hands.intake.hand_on() == 1
        assert jobs.all()[0].partial[0] == "SERIES_INCOMPLETE"


@pytest.mark.parametrize("corrected", [1, 4])
def test_a_series_of_which_objects_were_corrected_takes_the_place_of_the_earlier_result(tmp_path, series, corrected):
    worker = Told()
    with queue(tmp_path, worker, done=lambda _: None, join_s=60.0) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for path in series:
            hands.give(path, "one")
        whole(hands, "one")
        until(lambda: ended(jobs, 1))
        assert told(jobs) == [WAITS]
        for path in series[:corrected]:
            data = pydicom.dcmread(path)
            data.PatientID = "CORRECTED"
            data.save_as(tmp_path / "corrected.dcm")
            hands.give(tmp_path / "corrected.dcm", "two")
            assert jobs.all()[0].returned == "withheld"  # from the first on
        whole(hands, "two")
        until(lambda: ended(jobs, 2))
        assert told(jobs) == [("done", "SERIES_REPLACED", "withheld"), WAITS]
        assert [len(each) for each in worker.seen] == [4, 4]


def test_an_object_that_comes_again_and_again_takes_up_the_room_of_one(tmp_path, series):
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        intake = Intake(tmp_path / "serve", jobs, room, 5.0)
        for _ in range(5):
            file = intake.new_file()
            shutil.copyfile(series[0], file)
            intake.place(file, "dicom", "one", size_bytes=file.stat().st_size)
        counted = room.used_bytes
        room.count()
        assert counted == room.used_bytes


# ---- connections that stay open ----


def of_series(path: Path, uid: str, folder: Path) -> Path:
    data = pydicom.dcmread(path)
    data.SeriesInstanceUID = UID(uid)
    data.save_as(folder / "other.dcm")
    return folder / "other.dcm"


def test_a_connection_that_brings_one_series_after_the_other_and_stays_open_holds_none_up(tmp_path, series):
    worker = Told()
    with queue(tmp_path, worker, most=9, done=lambda _: None) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for n in range(4):
            for path in series[:2]:
                hands.give(of_series(path, f"1.2.{n}", tmp_path), "one")
            hands.now += 6.0
            assert hands.intake.hand_on() == (n > 0)
        hands.now += 53.0  # 59 s after the last object of the last one
        assert hands.intake.hand_on() == 0
        hands.now += 1.0
        assert hands.intake.hand_on() == 1
        until(lambda: ended(jobs, 4))
        assert told(jobs) == [WAITS] * 4
        assert [len(each) for each in worker.seen] == [2] * 4


def test_series_that_come_by_turns_are_each_waited_for_and_cut_short_together(tmp_path, series):
    with queue(tmp_path, Told(), done=lambda _: None) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for n in (0, 1, 2):
            for uid in ("1.2.1", "1.2.2"):
                hands.give(of_series(series[n], uid, tmp_path), "one")
        hands.now = 6.0
        assert hands.intake.hand_on() == 0
        hands.intake.closed("one", broken=True)
        assert hands.intake.hand_on() == 2
        until(lambda: ended(jobs, 2))
        assert told(jobs) == [WITHHELD] * 2


def test_a_series_of_which_a_large_object_is_still_coming_is_waited_for(tmp_path, series):
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        receiver = Receiver(Serve(allow=("PACS",)), hands.intake, room)
        peer = SimpleNamespace()
        hands.give(series[0], session_of(peer))
        hands.now = 50.0
        receiver._counted(heard(assoc=peer, data=data_unit((3, 70), (0, 70_000))))
        hands.now = 109.0
        assert hands.intake.hand_on() == 0
        hands.now = 110.0
        assert hands.intake.hand_on() == 1


# ---- what is accepted ----


class Killed(BaseException):
    """The process ends here."""


def killed(*_: Any, **__: Any) -> Any:
    raise Killed


@pytest.mark.parametrize("last_act", ["expect", "submit"])
def test_a_series_that_was_handed_on_as_the_process_was_killed_is_predicted_on_after_the_next_start(
    tmp_path, series, monkeypatch, last_act
):
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for path in series:
            hands.give(path, "one")
        hands.intake.closed("one")
        hands.now = 5.0
        monkeypatch.setattr(jobs, last_act, killed)
        with pytest.raises(Killed):
            hands.intake.hand_on()
    worker = Told()
    with queue(tmp_path, worker) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        hands.now = 5.0
        hands.intake.hand_on()
        until(lambda: ended(jobs, 1))
        assert told(jobs) == [("done", None, "off")]
        assert [len(each) for each in worker.seen] == [4]


def test_a_series_of_a_part_that_was_handed_on_as_the_process_was_killed_is_still_known_as_one(
    tmp_path, series, monkeypatch
):
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        hands.give(series[0], "one")
        hands.intake.closed("one", broken=True)
        hands.now = 5.0
        monkeypatch.setattr(jobs, "submit", killed)
        with pytest.raises(Killed):
            hands.intake.hand_on()
    with queue(tmp_path, Told(), done=lambda _: None) as (jobs, _):
        until(lambda: ended(jobs, 1))
        assert told(jobs) == [WITHHELD]


def test_an_upload_that_never_ended_is_deleted_and_the_log_says_so(tmp_path, caplog):
    with queue(tmp_path, Told(), started=False) as (jobs, _):
        job = jobs.begin("page")
        (jobs.place(job.id) / "in" / "a.dcm").write_bytes(b"x")
    with queue(tmp_path, Told(), started=False) as (again, _):
        assert not again.place(job.id).exists()
    assert f"job {job.id[:8]}: an upload that never ended is deleted" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_case_whose_process_is_killed_as_its_answer_is_written_is_answered_all_the_same(tmp_path, monkeypatch):
    with queue(tmp_path, Told(), done=lambda _: None, started=False) as (jobs, room):
        job = put(jobs)
        monkeypatch.setattr(jobs, "_set", lambda job, then=jobs._set: killed() if job.state == "done" else then(job))
        monkeypatch.setattr(room, "count", killed)  # whichever is first
        jobs.start()
        until(lambda: not jobs._thread.is_alive())
    worker = Told()
    with queue(tmp_path, worker, done=lambda _: None) as (jobs, _):
        until(lambda: ended(jobs, 1))
        assert (told(jobs), worker.seen) == ([WAITS], [["a.dcm"]])
        until(lambda: not (jobs.place(job) / "in").exists())


def test_cases_that_waited_out_an_outage_longer_than_results_are_kept_are_answered_in_the_order_in_which_they_came(
    tmp_path,
):
    now = [1000.0]
    with queue(tmp_path, Told(), most=9, keep_s=100, clock=lambda: now[0], started=False) as (jobs, _):
        for n in range(4):
            now[0] += 1
            put(jobs, f"{n}.dcm")
    now[0] += 1000
    worker = Told()
    with queue(tmp_path, worker, most=9, keep_s=100, clock=lambda: now[0], started=False) as (jobs, _):
        jobs.sweep()
        jobs.start()
        until(lambda: ended(jobs, 4))
        assert worker.seen == [["0.dcm"], ["1.dcm"], ["2.dcm"], ["3.dcm"]]
        now[0] += 99
        jobs.sweep()
        assert len(jobs.all()) == 4  # kept from when they were answered
        now[0] += 2
        jobs.sweep()
        assert jobs.all() == []


def test_an_upload_that_stands_still_is_deleted_in_time_and_the_log_says_so(tmp_path, caplog):
    now = [1000.0]
    with queue(tmp_path, Told(), keep_s=100, clock=lambda: now[0], started=False) as (jobs, _):
        job = jobs.begin("page")
        now[0] += 101
        jobs.sweep()
        assert not jobs.place(job.id).exists()
    assert f"job {job.id[:8]}: an upload that never ended is deleted" in caplog.text


# ---- the way back ----


@contextmanager
def pacs(*classes: UID, status: Callable[[], int] = lambda: 0) -> Iterator[tuple[Destination, list[UID]]]:
    """A peer that takes objects of these classes, and the classes of what has come."""
    came: list[UID] = []

    def stored(event: Any) -> int:
        came.append(event.request.AffectedSOPClassUID)
        return status()

    entity = AE(ae_title="PACS")
    entity.require_called_aet = True
    for each in classes:
        entity.add_supported_context(each)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, stored)])
    assert server is not None
    try:
        yield destination(f"PACS@127.0.0.1:{server.server_address[1]}"), came
    finally:
        server.shutdown()


@leaves_sockets
def test_a_pacs_that_takes_no_segmentations_gets_the_other_results_and_the_log_says_so_once(series, caplog):
    with pacs(CTImageStorage) as (to, came):
        for _ in range(2):
            store(to, [SEG_FILE, series[0]], "US")
    assert came == [CTImageStorage] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{to}: takes no objects of Segmentation Storage; results of this class are not sent there"
    ]
    with pacs(MRImageStorage) as (to, came), pytest.raises(NotTaken, match="no objects of the classes"):
        store(to, [SEG_FILE, series[0]], "US")
    assert came == []
    gc.collect()


def test_results_that_wait_for_a_pacs_to_which_nothing_is_returned_any_more_are_given_up_and_deleted_in_time(tmp_path):
    now = [1000.0]
    with queue(tmp_path, Told(), keep_s=100, clock=lambda: now[0], done=lambda _: None) as (jobs, _):
        put(jobs)
        until(lambda: told(jobs) == [WAITS])
    now[0] += 101
    with queue(tmp_path, Told(), keep_s=100, clock=lambda: now[0], started=False) as (jobs, _):
        assert told(jobs) == [("done", None, "failed")]
        jobs.sweep()
        assert len(jobs.all()) == 1
        now[0] += 101
        jobs.sweep()
        assert jobs.all() == []


@pytest.mark.parametrize(("waited_s", "expected"), [(72 * 3600 - 60, "waiting"), (72 * 3600, "failed")])
def test_results_are_given_up_three_days_after_they_were_written_however_often_the_service_has_started(
    tmp_path, waited_s, expected
):
    now, tries = [1000.0], []

    def sending(*_: Any) -> None:
        tries.append(1)
        raise NotTaken("busy")

    with queue(tmp_path, Told(), clock=lambda: now[0], done=lambda _: None) as (jobs, _):
        put(jobs)
        until(lambda: told(jobs) == [WAITS])
    now[0] += waited_s
    with queue(tmp_path, Told(), clock=lambda: now[0], done=lambda _: None) as (jobs, _):
        back = Back(destination("PACS@h:1"), lambda: jobs, "US", sending, first_s=0.01)
        back.start()
        until(lambda: len(tries) == 2 or jobs.all()[0].returned == "failed")
        back.stop()
        assert jobs.all()[0].returned == expected


@contextmanager
def web_pacs(status: int, content_type: str, body: str) -> Iterator[Destination]:
    """A DICOMweb service that answers so whatever it gets."""

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield destination(f"http://127.0.0.1:{server.server_port}/dicom-web")
        finally:
            server.shutdown()


def failed(*reasons: int) -> str:
    """A STOW-RS answer by which the segmentation was not stored, and then other objects."""
    uids = [pydicom.dcmread(SEG_FILE).SOPInstanceUID, "1.2.3"]
    items = [
        {"00081155": {"vr": "UI", "Value": [uid]}, "00081197": {"vr": "US", "Value": [reason]}}
        for uid, reason in zip(uids, reasons, strict=False)
    ]
    return json.dumps({"00081198": {"vr": "SQ", "Value": items}})


NONE_FAILED = json.dumps({"00081198": {"vr": "SQ"}, "00081199": {"vr": "SQ", "Value": [{}]}})
XML = '<NativeDicomModel><DicomAttribute tag="00081198" vr="SQ" keyword="FailedSOPSequence"{}</NativeDicomModel>'


@pytest.mark.parametrize(
    ("status", "kind", "body", "taken"),
    [
        (200, "json", failed(0x0110), False),
        (202, "json", failed(0x0110), False),
        (409, "json", failed(0x0110), False),
        (409, "json", failed(0x0111), True),  # it is there already
        (202, "json", failed(0x0111), True),
        (202, "json", failed(0x0111, 0x0110), True),  # the other is none of ours
        (409, "json", "", False),
        (200, "json", NONE_FAILED, True),
        (202, "json", NONE_FAILED, True),  # with warnings
        (200, "json", "", True),
        (202, "json", "", False),
        (200, "xml", XML.format('><Item number="1"/></DicomAttribute>'), False),
        (200, "xml", XML.format("/>"), True),
        (200, "xml", XML.format("></DicomAttribute>"), True),
        (500, "json", NONE_FAILED, False),
    ],
)
def test_results_are_taken_by_a_dicomweb_service_where_it_says_of_none_that_it_was_not_stored(
    status, kind, body, taken
):
    with web_pacs(status, f"application/dicom+{kind}", body) as to:
        if taken:
            stow(to, [SEG_FILE], "US")
        else:
            with pytest.raises(NotTaken):
                stow(to, [SEG_FILE], "US")


def test_what_a_dicomweb_service_took_is_known_where_it_refused_another(series):
    with web_pacs(202, "application/dicom+json", failed(0x0110)) as to, pytest.raises(NotTaken) as refused:
        stow(to, [SEG_FILE, series[0]], "US")
    assert refused.value.taken == [series[0]]


@leaves_sockets
def test_one_result_that_pacs_refuses_keeps_no_other_from_it_and_none_is_sent_twice(tmp_path, series):
    files = {"seg.dcm": SEG_FILE, "a.dcm": series[0], "b.dcm": series[1]}

    def say(folder: Path) -> dict[str, Any]:
        (folder / "out" / "image-1").mkdir(parents=True)
        for name, path in files.items():
            shutil.copyfile(path, folder / "out" / "image-1" / name)
        return {"images": [image(*files)], "unread": []}

    statuses = iter([0xA900, 0, 0x0111, 0xA700, 0])
    with pacs(CTImageStorage, SegmentationStorage, status=lambda: next(statuses)) as (to, came):
        back = Back(to, lambda: jobs, "US", first_s=0.01)
        with queue(tmp_path, Told(say), done=back.add) as (jobs, _):
            back.start()
            job = put(jobs)
            until(lambda: jobs.find(job).returned == "sent")
            back.stop()
    assert came == [SegmentationStorage, CTImageStorage, CTImageStorage, SegmentationStorage, SegmentationStorage]
    with queue(tmp_path, Told(), started=False) as (jobs, _):
        assert jobs.find(job).taken == ("image-1/a.dcm", "image-1/b.dcm")
    gc.collect()


@leaves_sockets
@pytest.mark.parametrize("only", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_pacs_that_takes_one_encoding_alone_gets_results_in_it(tmp_path, only, monkeypatch):
    monkeypatch.setattr("pynetdicom._config.STORE_RECV_CHUNKED_DATASET", False)  # which a receiver has set
    came: list[Path] = []

    def stored(event: Any) -> int:
        came.append(tmp_path / "came.dcm")
        came[-1].write_bytes(event.encoded_dataset())
        return 0

    entity = AE(ae_title="PACS")
    entity.add_supported_context(SegmentationStorage, only)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, stored)])
    assert server is not None
    try:
        store(destination(f"PACS@127.0.0.1:{server.server_address[1]}"), [SEG_FILE], "US")
    finally:
        server.shutdown()
    sent, here = pydicom.dcmread(came[0]), pydicom.dcmread(SEG_FILE)
    assert sent.file_meta.TransferSyntaxUID == only
    assert sent.SegmentSequence == here.SegmentSequence
    assert sent.PixelData == here.PixelData
    gc.collect()


@leaves_sockets
def test_who_does_not_know_the_sender_is_told_apart_from_who_is_not_there():
    with pacs(SegmentationStorage) as (to, _), pytest.raises(NotTaken, match="Does it know the AE title US"):
        store(destination(str(to).replace("PACS", "ANOTHER")), [SEG_FILE], "US")
    with pytest.raises(NotTaken, match="Is it up"):
        store(to, [SEG_FILE], "US")
    gc.collect()
