"""The parts of the service: what is let in, who is answered, the queue, series that become whole, the way back."""

import asyncio
import gc
import json
import os
import shutil
import socket
import ssl
import struct
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import UID, CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, SegmentationStorage
from pynetdicom import AE, build_context
from uvicorn.server import ServerState

from fedclient.data.findings import CATALOGUE
from fedclient.serving.back import Back, NotTaken, store
from fedclient.serving.commands import _say
from fedclient.serving.guard import guarded
from fedclient.serving.handed import Before, Handed
from fedclient.serving.intake import REPLACED, SPLIT, Intake
from fedclient.serving.jobs import INCOMPLETE, Jobs, Overloaded, Room
from fedclient.serving.multipart import BodyRefused, parts_of, time_left
from fedclient.serving.receiver import Receiver, command_bytes, received, server_context
from fedclient.serving.service import Service, listener
from fedclient.serving.settings import Destination, Serve, destination, is_local
from fedclient.serving.warm import Warm, python
from fedclient.serving.web import Parts, application, safe_name
from fedclient.site import Data, SiteFile, site_toml
from shared_models.errors import ImageUnreadable, ProcessFailed, StateInvalid, StudyInvalid
from shared_models.files import write_json
from shared_models.heads import Heads
from shared_models.identity import issue_server, issue_site, new_authority, new_tls_key, request_certificate
from shared_models.parse import parse
from shared_models.supervise import kept_token
from simulations.fixtures.dicom import write_dicom_series
from simulations.fixtures.sown import person
from tests.marking import chest_hu

SEG_FILE = Path(pydicom.__file__).parent / "data" / "test_files" / "liver_1frame.dcm"


class Told:
    """A worker that says what a test wants, when it wants."""

    def __init__(self, say=None) -> None:
        self.say = say or (lambda folder: {"images": [image()], "unread": []})
        self.go = threading.Event()
        self.go.set()
        self.seen: list[list[str]] = []
        self.counted: list[bool] = []

    def ask(self, folder: Path, view: bool, count: bool):
        self.counted.append(count)
        assert self.go.wait(10)
        self.seen.append(sorted(path.name for path in (folder / "in").iterdir()))
        return self.say(folder)


def image(*files: str):
    return {"name": "image-1", "answers": [], "doubts": [], "planes": [], "missing": {}, "seconds": 0.1,
            "files": [{"file": f"image-1/{name}", "kind": "dicom"} for name in files]}  # fmt: skip


@contextmanager
def queue(folder: Path, worker, most=3, keep_s=3600.0, done=None, clock=time.time, started=True, join_s=0.0):
    (folder / "serve").mkdir(parents=True, exist_ok=True)
    room = Room(folder / "serve", 1 << 24)
    jobs = Jobs(folder / "serve" / "jobs", worker, room, most, keep_s, done, clock, join_s)
    if started:
        jobs.start()
    try:
        yield jobs, room
    finally:
        if isinstance(worker, Told):
            worker.go.set()
        jobs.stop()


def put(jobs: Jobs, name="a.dcm"):
    job = jobs.begin("page")
    (jobs.place(job.id) / "in" / name).write_bytes(b"x")
    jobs.submit(job)
    return job.id


def until(done, seconds=20.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- settings ----


def test_by_default_everything_is_for_this_machine_and_nobody_may_send_and_nothing_is_returned():
    serve = Serve()
    assert (serve.host, serve.dicom_host, serve.allow, serve.return_to) == ("127.0.0.1", "127.0.0.1", (), "")
    assert serve.local
    assert serve.token


def test_a_site_file_with_a_serve_table_is_read_and_one_without_it_too():
    file = SiteFile("north", "host:1", "f", Data("/d"), serve=Serve(allow=("PACS@10.0.0.7",), queue=4))
    import tomllib

    assert parse(SiteFile, tomllib.loads(site_toml(file)), "site.toml") == file
    older = {k: v for k, v in tomllib.loads(site_toml(file)).items() if k != "serve"}
    assert parse(SiteFile, older, "site.toml").serve == Serve()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"host": "0.0.0.0"}, "beyond this machine"),
        ({"host": "0.0.0.0", "tls_key": "k", "tls_certificate": "c", "token": False}, "leave token on"),
        ({"return_to": "PACS"}, "AE@host:port"),
        ({"return_to": "PACS@host:0"}, "AE@host:port"),
        ({"return_to": "http://pacs.example.org/dicom-web"}, "insecure_return"),
        ({"return_to": "https://pacs.example.org/dicom-web", "insecure_return": True}, "which this is not"),
        ({"insecure_return": True}, "which this is not"),
        ({"tls_key": "k.pem"}, "come together"),
        ({"tls_ca": "ca.pem"}, "for TLS"),
        ({"allow": ["much too long a title"]}, "allow"),
        ({"allow": ["PACS@pacs.example.org"]}, "IP address from which it sends"),
        ({"allow": ["PACS@10.0.0"]}, "IP address from which it sends"),
        ({"public_origin": "http://ai.example.org"}, "public_origin"),
        ({"public_origin": "https://ai.example.org/model"}, "public_origin"),
        ({"public_origin": "https://ai.example.org:443"}, "public_origin"),
        ({"public_origin": "https://ai.example.org", "token": False}, "leave token on"),
    ],
)
def test_settings_that_would_be_unsafe_or_mean_nothing_are_refused(table, words):
    with pytest.raises(StudyInvalid, match=words):
        parse(Serve, table, "serve")


@pytest.mark.parametrize("more", [
    {"return_to": "https://pacs.example.org/dicom-web"}, {"return_to": "http://localhost:8042/dicom-web"},
    {"return_to": "http://[::1]:8042/dicom-web"}, {"return_to": "PACS@10.0.0.7:104"},
    {"return_to": "http://pacs.example.org/dicom-web", "insecure_return": True},
])  # fmt: skip
def test_results_go_by_https_or_within_this_machine_or_where_somebody_says_that_he_knows(more):
    assert Serve(**more).return_to == more["return_to"]


@pytest.mark.parametrize(("more", "told"), [
    ({"return_to": "PACS@10.1.2.3:104"}, ["C-STORE to 10.1.2.3 is not encrypted"]),
    ({"dicom_host": "0.0.0.0", "allow": ("PACS",)}, ["the DICOM receiver is without TLS"]),
    ({"dicom_host": "0.0.0.0", "allow": ("PACS",), "tls_key": "k", "tls_certificate": "c"}, []),
    ({"dicom_host": "0.0.0.0"}, []), ({"allow": ("PACS",), "return_to": "PACS@127.0.0.1:104"}, []),
    ({"return_to": "https://pacs.example.org/dicom-web"}, []),
])  # fmt: skip
def test_as_it_starts_the_service_warns_of_dicom_that_goes_unencrypted_to_other_machines(capsys, more, told):
    model = {"name": "m", "version": "1", "sha256": "0" * 64, "engine": "onnx", "warnings": []}
    _say(heard(warm=heard(model=model), serve=Serve(**more), port=8484, token=None, receiver=None))
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.removeprefix("warning: ").partition(":")[0].partition(" (")[0] for line in warned] == told


def test_a_destination_is_a_peer_or_a_url():
    assert destination("PACS@10.0.0.7:104") == Destination("dicom", "10.0.0.7", 104, "PACS")
    assert destination("PACS@[::1]:104").host == "::1"
    assert destination("https://pacs/dicom-web/").url == "https://pacs/dicom-web"
    assert is_local("::1")
    assert not is_local("pacs.example.org")


# ---- bodies ----


def taken(folder: Path, body: bytes, kind="multipart/form-data; boundary=x", most=1000, quota=1 << 20, piece=7):
    async def blocks():
        for at in range(0, len(body), piece):
            yield body[at : at + piece]

    folder.mkdir(exist_ok=True)
    room = Room(folder, quota)
    wanted = kind.partition(";")[0] if kind.startswith("multipart/") else "multipart/form-data"
    found = asyncio.run(
        parts_of(blocks(), kind, wanted, most, room, lambda number, name: folder / safe_name(number, name))
    )
    return found, room


TWO = (
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.PNG"\r\n\r\none\r\n--x\r\n'
    b'Content-Disposition: form-data; name="files"; filename="../../b"\r\nContent-Type: image/png\r\n\r\n\r\nt\r\n--x--'
)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_parts_come_to_disk_as_they_were_sent_however_they_are_cut(tmp_path, piece):
    found, room = taken(tmp_path / "in", TWO + b"\r\n", piece=piece)
    assert [(part.path.name, part.path.read_bytes(), part.content_type) for part in found] == [
        ("000001.png", b"one", ""),
        ("000002", b"\r\nt", "image/png"),
    ]
    assert room.used_bytes == 6


@pytest.mark.parametrize(
    ("body", "more", "status"),
    [
        (TWO[:60], {}, 400),
        (b"nothing of it", {}, 400),
        (TWO, {"most": 100}, 413),
        (TWO, {"kind": "multipart/form-data"}, 415),
        (TWO, {"kind": "text/plain; boundary=x"}, 415),
        (b"--x\r\nA: " + b"y" * 9000 + b"\r\n\r\n\r\n--x--", {"most": 10_000}, 400),
        (b"--x--\r\n", {}, 400),
    ],
)
def test_a_body_that_is_refused_leaves_nothing_behind(tmp_path, body, more, status):
    with pytest.raises(BodyRefused) as refused:
        taken(tmp_path / "in", body, **more)
    assert refused.value.status == status
    assert list((tmp_path / "in").iterdir()) == []


def test_two_files_of_one_name_are_refused_and_leave_nothing_behind(tmp_path):
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.raw"\r\n\r\nbytes\r\n'
    with pytest.raises(BodyRefused, match="of one name") as refused:
        taken(tmp_path / "in", part + part + b"--x--\r\n")
    assert refused.value.status == 400
    assert list((tmp_path / "in").iterdir()) == []


def test_a_body_beyond_the_quota_is_put_off(tmp_path):
    with pytest.raises(Overloaded, match="quota"):
        taken(tmp_path / "in", TWO, quota=4)
    assert list((tmp_path / "in").iterdir()) == []


def test_a_body_that_trickles_holds_its_place_for_a_minute_and_no_more(tmp_path):
    """A block of 64 KiB is worth a second: after three blocks, a minute each 0.4, its time is over."""
    now = iter([0.0, 24.0, 48.0, 72.0])

    async def blocks():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        while True:
            await asyncio.sleep(0)
            yield b"y"

    room = Room(tmp_path, 1 << 20)
    kind = "multipart/form-data"
    with pytest.raises(BodyRefused) as refused:
        asyncio.run(parts_of(blocks(), f"{kind}; boundary=x", kind, 1000, room, lambda n, _: tmp_path / str(n),
                             lambda: next(now)))  # fmt: skip
    assert refused.value.status == 408
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gone_s", "seen", "left_s"),
    [(0, 0, 60), (59, 0, 1), (61, 0, 0), (61, 1 << 20, 15), (3599, 1 << 40, 1), (3601, 1 << 40, 0)],
)
def test_a_body_has_a_minute_a_second_for_each_64_kib_and_an_hour_at_most(gone_s, seen, left_s):
    assert time_left(gone_s, seen) == left_s


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("scan.nii.gz", "000007.nii.gz"), ("Doe^John.dcm", "000007.dcm"), ("C:\\x\\y.mhd", "y.mhd"),
        ("../y.raw", "y.raw"), ("we ird.mhd", "000007.mhd"), ("a.exe.very-long", "000007"), ("", "000007"),
    ],
)  # fmt: skip
def test_an_uploaded_file_keeps_its_name_only_where_another_file_needs_it(name, kept):
    assert safe_name(7, name) == kept


# ---- the queue ----


def test_cases_are_answered_in_turn_and_what_was_received_is_deleted(tmp_path):
    worker = Told()
    with queue(tmp_path, worker) as (jobs, _):
        ids = [put(jobs, f"{n}.dcm") for n in range(3)]
        until(lambda: all(jobs.find(each).state == "done" for each in ids))
        assert worker.seen == [["0.dcm"], ["1.dcm"], ["2.dcm"]]
        until(lambda: not any((jobs.place(each) / "in").exists() for each in ids))


def test_one_case_more_than_may_wait_is_put_off(tmp_path):
    worker = Told()
    worker.go.clear()
    with queue(tmp_path, worker, most=2) as (jobs, _):
        first = put(jobs)
        until(lambda: jobs.find(first).state == "running")
        put(jobs)
        last = put(jobs)
        assert jobs.full
        assert jobs.ahead(last) == 1
        with pytest.raises(Overloaded):
            jobs.begin("page")


def test_a_case_that_the_worker_dies_of_fails_alone(tmp_path):
    def say(folder):
        if (folder / "in" / "bad.dcm").exists():
            raise ProcessFailed("the predicting process ended over this case.")
        if (folder / "in" / "odd.dcm").exists():
            raise RuntimeError("PATIENT^NAME")
        return {"images": [image()], "unread": []}

    with queue(tmp_path, Told(say)) as (jobs, _):
        bad, odd, good = put(jobs, "bad.dcm"), put(jobs, "odd.dcm"), put(jobs)
        until(lambda: jobs.find(good).state == "done")
        assert jobs.find(bad).error == ("WORKER_FAILED", "the predicting process ended over this case.")
        assert jobs.find(odd).error[0] == "INTERNAL"
        assert "PATIENT" not in str(jobs.find(odd))


@pytest.mark.parametrize("state", ["running", "done"])
def test_a_case_whose_state_cannot_be_written_fails_alone_and_there_may_be_room_for_the_next(
    tmp_path, monkeypatch, state
):
    def full(path, facts):
        if facts["id"] == first and facts["state"] == state:
            raise OSError(28, "No space left on device", str(path))
        write_json(path, facts)

    with queue(tmp_path, Told(), started=False) as (jobs, _):
        first, second = put(jobs), put(jobs)
        monkeypatch.setattr("fedclient.serving.jobs.write_json", full)
        jobs.start()
        until(lambda: jobs.find(second).state == "done")
        assert (jobs.find(first).state, jobs.find(first).error[0]) == ("failed", "DISK_FULL")


def test_a_case_that_is_forgotten_as_it_leaves_the_queue_does_not_come_back(tmp_path):
    worker = Told()
    with queue(tmp_path, worker, started=False) as (jobs, _):
        job = jobs.find(put(jobs))
        assert jobs.forget(job.id)
        jobs._work(job)
        assert jobs.find(job.id) is None
        assert (worker.seen, jobs.place(job.id).exists()) == ([], False)


def test_a_case_under_way_whenever_the_service_ends_is_gone_on_with_and_is_not_blamed(tmp_path):
    def say(folder):
        jobs.stop(0)
        raise ProcessFailed("the predicting process ended over this case.")

    for n in range(3):
        with queue(tmp_path, Told(say)) as (jobs, _):
            job = jobs.all()[0].id if n else put(jobs)
            until(lambda jobs=jobs: not jobs._thread.is_alive())
            assert (jobs.place(job) / "in" / "a.dcm").exists()
            assert (jobs.find(job).state, jobs.find(job).tries) == ("waiting", 0)
    with queue(tmp_path, Told()) as (again, _):
        until(lambda: again.find(job).state == "done")
        assert again.find(job).tries == 1


def test_the_service_ends_when_the_case_that_it_was_at_is_written_down_as_waiting(tmp_path):
    class Hanging(Told):
        def stop(self):
            threading.Timer(0.3, self.go.set).start()

    def say(_):
        raise ProcessFailed("the predicting process ended over this case.")

    worker: Any = Hanging(say)
    worker.go.clear()
    with queue(tmp_path, worker) as (jobs, _):
        job = put(jobs)
        until(lambda: jobs.find(job).state == "running")
        service = Service(tmp_path, Serve(), ())
        service.jobs, service.warm = jobs, worker
        service.stop()
        assert json.loads((jobs.place(job) / "job.json").read_text())["state"] == "waiting"


def test_what_cannot_be_read_fails_by_its_code(tmp_path):
    unread = [{"code": "SERIES_GAP", "why": "slices are missing."}]
    with queue(tmp_path, Told(lambda _: {"images": [], "unread": unread})) as (jobs, _):
        job = put(jobs)
        until(lambda: jobs.find(job).state == "failed")
        assert jobs.find(job).error == ("SERIES_GAP", "slices are missing.")


def test_a_process_goes_on_with_what_waited_when_the_last_one_was_killed(tmp_path):
    with queue(tmp_path, Told(), started=False) as (jobs, _):
        waiting = put(jobs)
        begun = jobs.begin("page").id
        twice = put(jobs)
        facts = json.loads((jobs.place(twice) / "job.json").read_text())
        write_json(jobs.place(twice) / "job.json", facts | {"state": "running", "tries": 2})
    with queue(tmp_path, Told()) as (jobs, _):
        until(lambda: jobs.find(waiting).state == "done")
        assert jobs.find(begun) is None
        assert jobs.find(twice).error[0] == "WORKER_FAILED"  # it ended the service twice


def test_results_are_deleted_when_their_time_is_over_or_when_asked(tmp_path):
    now = [1000.0]
    with queue(tmp_path, Told(), keep_s=100, clock=lambda: now[0]) as (jobs, room):
        old, new = put(jobs), put(jobs)
        until(lambda: jobs.find(new).state == "done")
        assert jobs.forget(new)
        assert not jobs.place(new).exists()
        now[0] += 101
        jobs.sweep()
        assert jobs.find(old) is None
        assert room.used_bytes == 0
        assert not jobs.forget(old)


def test_results_that_pacs_has_not_taken_outlast_their_time(tmp_path):
    now = [1000.0]
    with queue(tmp_path, Told(), keep_s=100, clock=lambda: now[0], done=lambda _: None) as (jobs, _):
        job = put(jobs)
        until(lambda: jobs.find(job).returned == "waiting")
        now[0] += 101
        jobs.sweep()
        assert jobs.find(job).returned == "waiting"
        jobs.mark_returned(job, "failed")
        now[0] += 99
        jobs.sweep()
        assert jobs.find(job).returned == "failed"  # kept from when it was given up
        now[0] += 2
        jobs.sweep()
        assert jobs.find(job) is None


def test_of_more_jobs_than_are_kept_those_that_failed_go_first_and_what_pacs_waits_for_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("fedclient.serving.jobs.MOST_KEPT", 2)
    now = [1000.0]
    with queue(tmp_path, Told(), clock=lambda: now[0], started=False, most=9) as (jobs, _):
        ids = []
        for state, returned in (
            ("done", "waiting"),
            ("done", "off"),
            ("failed", "off"),
            ("done", "off"),
            ("done", "off"),
        ):
            now[0] += 1
            ids.append(put(jobs))
            jobs._set(replace(jobs.find(ids[-1]), state=state, returned=returned))
        jobs.sweep()
        kept = [n for n, job in enumerate(ids) if jobs.find(job) is not None]
        assert kept == [0, 3, 4]
        assert not jobs.place(ids[2]).exists()


# ---- series ----


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    return write_dicom_series(folder, person(0).volume).paths[:4]


class Hands:
    """An intake whose clock a test moves."""

    def __init__(self, jobs: Jobs, room: Room, folder: Path) -> None:
        self.now = 0.0
        self.intake = Intake(folder / "serve", jobs, room, quiet_s=5.0, clock=lambda: self.now)

    def give(self, path: Path, session: str):
        file = self.intake.new_file()
        shutil.copyfile(path, file)
        return self.intake.place(file, "dicom", session)


def test_a_series_is_whole_when_its_connections_are_closed_and_it_has_been_quiet(tmp_path, series):
    worker = Told()
    with queue(tmp_path, worker) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for path in series[:3]:
            hands.give(path, "one")
        hands.give(series[3], "two")
        hands.give(series[3], "two")  # again
        hands.now = 59
        assert hands.intake.hand_on() == 0
        hands.intake.closed("one")
        assert hands.intake.hand_on() == 0
        hands.intake.closed("two")
        hands.now = 4.0  # of a clock that has only just moved since the last object
        assert hands.intake.hand_on() == 0
        hands.now = 5.0
        assert hands.intake.hand_on() == 1
        until(lambda: worker.seen)
        assert len(worker.seen[0]) == 4
        assert hands.intake.under_way == 0


def whole(hands: Hands, session: str) -> None:
    """Closes a connection and lets the quiet time pass."""
    hands.intake.closed(session)
    hands.now += 5.0
    assert hands.intake.hand_on() == 1


def with_facts(folder):
    """A worker's answer with a result.json."""
    write_json(folder / "out" / "image-1" / "result.json", {"notice": "n"})
    return {"images": [image("seg.dcm")], "unread": []}


def test_what_was_withheld_is_told_by_codes_that_no_finding_or_doubt_has():
    assert not {SPLIT, REPLACED, INCOMPLETE} & CATALOGUE.keys()


def test_a_series_split_by_silence_is_predicted_on_again_as_a_whole(tmp_path, series):
    worker = Told(with_facts)
    back: list[Any] = []
    with queue(tmp_path, worker, done=back.append, join_s=60.0) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for path in series[:2]:
            hands.give(path, "one")
        whole(hands, "one")
        until(lambda: [job.state for job in jobs.all()] == ["done"])
        (first,) = jobs.all()
        assert (first.partial, first.returned) == (None, "waiting")

        hands.give(series[2], "two")
        marked = jobs.find(first.id)
        assert (marked.partial[0], marked.returned) == ("SERIES_SPLIT", "withheld")
        facts = json.loads((jobs.place(first.id) / "out" / "image-1" / "result.json").read_text())
        assert facts == {"notice": "n", "partial": {"code": "SERIES_SPLIT", "why": marked.partial[1]}}
        hands.give(series[3], "two")
        whole(hands, "two")
        until(lambda: len(worker.seen) == 2 and jobs.all()[1].state == "done")
        second = jobs.all()[1]
        assert len(worker.seen[1]) == 4
        assert set(worker.seen[0]) < set(worker.seen[1])
        assert (second.partial, second.returned) == (None, "waiting")
        assert jobs.find(first.id).partial == ("SERIES_REPLACED", f"job {second.id} is of the series as it came later.")
        until(lambda: [job.id for job in back] == [first.id, second.id])
        assert worker.counted == [True, False]


def test_the_rest_of_a_series_whose_files_are_gone_is_refused_until_the_whole_comes(tmp_path, series):
    worker = Told()
    with queue(tmp_path, worker) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        hands.give(series[0], "one")
        whole(hands, "one")
        until(lambda: jobs.all()[0].state == "done")
        hands = Hands(jobs, room, tmp_path)  # another process remembers it too
        hands.give(series[1], "two")
        whole(hands, "two")
        late = jobs.all()[1]
        assert (late.state, late.error[0], late.partial[0], late.returned) == (
            "failed", "SERIES_SPLIT", "SERIES_SPLIT", "off",
        )  # fmt: skip
        assert not (jobs.place(late.id) / "in").exists()
        assert jobs.all()[0].partial[0] == "SERIES_SPLIT"
        for path in series[:3]:
            hands.give(path, "three")
        whole(hands, "three")
        until(lambda: jobs.all()[2].state == "done")
        assert [job.partial and job.partial[0] for job in jobs.all()] == ["SERIES_REPLACED", "SERIES_REPLACED", None]
        assert [len(each) for each in worker.seen] == [1, 3]


def test_a_part_that_comes_while_the_first_is_predicted_on_keeps_it_from_being_returned(tmp_path, series):
    worker = Told()
    back: list[Any] = []
    worker.go.clear()
    with queue(tmp_path, worker, done=back.append, join_s=60.0) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        hands.give(series[0], "one")
        whole(hands, "one")
        until(lambda: jobs.all()[0].state == "running")
        hands.give(series[1], "two")
        worker.go.set()
        until(lambda: jobs.all()[0].state == "done")
        assert (jobs.all()[0].partial[0], jobs.all()[0].returned, back) == ("SERIES_SPLIT", "withheld", [])
    with queue(tmp_path, Told(), started=False) as (again, _):
        assert again.all()[0].partial[0] == "SERIES_SPLIT"


def test_objects_that_come_again_neither_mark_a_result_nor_are_answered_once_more(tmp_path, series):
    worker = Told()
    back: list[Any] = []
    with queue(tmp_path, worker, done=back.append, join_s=60.0) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for path in series:
            hands.give(path, "one")
        whole(hands, "one")
        until(lambda: back)
        used = room.used_bytes
        hands = Hands(jobs, room, tmp_path)  # another process
        shutil.copyfile(series[3], file := hands.intake.new_file())  # of a peer that heard no answer
        hands.intake.place(file, "dicom", "two", size_bytes=series[3].stat().st_size)
        hands.intake.closed("two")
        hands.now += 5.0
        assert hands.intake.hand_on() == 0
        assert ([job.partial for job in jobs.all()], hands.intake.under_way, len(worker.seen)) == ([None], 0, 1)
        assert list((tmp_path / "serve" / "series").iterdir()) == []
        assert room.used_bytes == used
        hands.give(pydicom_with_new_uid(series[3], tmp_path), "three")
        assert jobs.all()[0].partial[0] == "SERIES_SPLIT"


@pytest.mark.parametrize("change", ["content", "failed", "not returned", "forgotten"])
def test_objects_that_come_again_are_predicted_on_where_they_differ_or_what_was_made_of_them_is_lost(
    tmp_path, series, change
):
    worker = Told()
    with queue(tmp_path, worker, done=lambda _: None, join_s=60.0) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for path in series:
            hands.give(path, "one")
        whole(hands, "one")
        until(lambda: jobs.all()[0].state == "done")
        (first,) = jobs.all()
        sent = [*series]
        if change == "content":
            data = pydicom.dcmread(series[3])
            data.PixelData = bytes(len(data.PixelData))
            data.save_as(tmp_path / "again.dcm")
            sent = [tmp_path / "again.dcm"]
        elif change == "failed":
            jobs._set(replace(first, state="failed"))
        elif change == "not returned":
            jobs.mark_returned(first.id, "failed")
        else:
            jobs.forget(first.id)
        for path in sent:
            hands.give(path, "two")
        whole(hands, "two")
        until(lambda: len(worker.seen) == 2)
        assert len(worker.seen[1]) == 4


def test_a_late_part_for_which_there_is_no_room_marks_the_result_all_the_same(tmp_path, series):
    worker = Told()
    with queue(tmp_path, worker, most=1, join_s=60.0) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        hands.give(series[0], "one")
        whole(hands, "one")
        until(lambda: jobs.all()[0].state == "done")
        worker.go.clear()
        running = put(jobs)
        until(lambda: jobs.find(running).state == "running")
        put(jobs)
        with pytest.raises(Overloaded):
            hands.give(series[1], "two")
        assert jobs.all()[0].partial[0] == "SERIES_SPLIT"


def pydicom_with_new_uid(path: Path, folder: Path) -> Path:
    data = pydicom.dcmread(path)
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    data.save_as(folder / "new.dcm")
    return folder / "new.dcm"


def test_drift_counts_a_case_that_is_whole_and_comes_for_the_first_time_and_no_other(tmp_path):
    worker = Told()
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"again": True},
        {"partial": ("SERIES_INCOMPLETE", "few.")},
        {"tries": 1},
    )
    with queue(tmp_path, worker, most=9) as (jobs, _):
        for change in changes:
            job = jobs.begin("page")
            (jobs.place(job.id) / "in" / "a.dcm").write_bytes(b"x")
            jobs.submit(replace(job, **change))
            until(lambda job=job: jobs.find(job.id).state == "done")
    assert worker.counted == [True, False, False, False]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("said", "code", "returned"), [(3, "SERIES_INCOMPLETE", "withheld"), (2, None, "waiting")])
def test_a_series_with_fewer_objects_than_its_headers_say_is_not_returned(
    tmp_path, series, said, code, returned, again
):
    with queue(tmp_path, Told(), done=lambda job: None) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for n, path in enumerate(series[:2]):
            data = pydicom.dcmread(path)
            data.NumberOfSeriesRelatedInstances = said
            data.save_as(tmp_path / f"{n}.dcm")
            hands.give(tmp_path / f"{n}.dcm", "one")
        hands.intake.closed("one")
        if again:  # another process
            hands = Hands(jobs, room, tmp_path)
        whole(hands, "one")
        until(lambda: jobs.all()[0].state == "done")
        assert (jobs.all()[0].partial and jobs.all()[0].partial[0], jobs.all()[0].returned) == (code, returned)


def test_files_of_a_series_are_deleted_when_nothing_is_joined_to_them_any_more(tmp_path, series):
    now = [1000.0]
    with queue(tmp_path, Told(), clock=lambda: now[0], join_s=60.0) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        hands.give(series[0], "one")
        whole(hands, "one")
        until(lambda: jobs.all()[0].state == "done")
        kept = jobs.place(jobs.all()[0].id) / "in"
        jobs.sweep()
        assert len(list(kept.iterdir())) == 1
        now[0] += 60.0
        jobs.sweep()
        assert not kept.exists()


def test_a_series_that_cannot_be_handed_on_for_a_full_disk_waits_on_whole(tmp_path, series, monkeypatch):
    worker = Told()
    with queue(tmp_path, worker) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        for path in series:
            hands.give(path, "one")
        hands.intake.closed("one")
        hands.now = 5.0
        with monkeypatch.context() as full:
            full.setattr(jobs, "submit", Mock(side_effect=OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                hands.intake.hand_on()
        assert jobs.all() == []
        assert hands.intake.hand_on() == 1
        until(lambda: worker.seen)
        assert len(worker.seen[0]) == 4


def test_the_memory_of_series_has_an_end_in_number_and_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("fedclient.serving.handed.MOST_KNOWN", 2)
    memory = Handed(tmp_path / "handed", keep_s=100.0)
    for n in range(3):
        memory.note(str(n), Before(frozenset({"a"}), ("job",)))
        os.utime(tmp_path / "handed" / f"{n}.json", (time.time() - 50 + n,) * 2)
    memory.note("3", Before(frozenset({"b"}), ("job",)))
    assert [memory.find(str(n)).names for n in range(4)] == [set(), set(), {"a"}, {"b"}]
    os.utime(tmp_path / "handed" / "2.json", (time.time() - 101,) * 2)
    assert memory.find("2") == Before()


def test_what_is_no_image_or_no_dicom_does_not_get_out_of_quarantine(tmp_path, series):
    with queue(tmp_path, Told()) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        with pytest.raises(ImageUnreadable) as seg:
            hands.give(SEG_FILE, "one")
        assert seg.value.code == "MODALITY_MISMATCH"
        (tmp_path / "text").write_bytes(b"no dicom" * 100)
        with pytest.raises(ImageUnreadable):
            hands.give(tmp_path / "text", "one")
        nameless = pydicom.dcmread(series[0])
        nameless.SeriesInstanceUID = "../../etc"
        nameless.save_as(tmp_path / "nameless.dcm")
        with pytest.raises(ImageUnreadable, match="SeriesInstanceUID"):
            hands.give(tmp_path / "nameless.dcm", "one")
        assert list((tmp_path / "serve" / "series").iterdir()) == []


def test_a_new_series_is_put_off_while_too_many_wait_and_one_under_way_is_finished(tmp_path, series):
    with queue(tmp_path, Told(), most=1, started=False) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        hands.give(series[0], "one")
        put(jobs)
        hands.give(series[1], "one")
        other = pydicom.dcmread(series[2])
        other.SeriesInstanceUID = "1.2.3"
        other.save_as(tmp_path / "other.dcm")
        with pytest.raises(Overloaded):
            hands.give(tmp_path / "other.dcm", "one")


def test_a_flood_of_series_is_put_off(tmp_path, series, monkeypatch):
    monkeypatch.setattr("fedclient.serving.intake.MOST_SERIES", 1)
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        hands = Hands(jobs, room, tmp_path)
        hands.give(series[0], "one")
        other = pydicom.dcmread(series[1])
        other.SeriesInstanceUID = "1.2.3"
        other.save_as(tmp_path / "other.dcm")
        with pytest.raises(Overloaded):
            hands.give(tmp_path / "other.dcm", "one")
        hands.give(series[1], "one")
        assert hands.intake.under_way == 1


# ---- the receiver ----


def test_the_receiver_takes_images_of_peers_on_the_list_and_nothing_else(tmp_path, series):
    worker = Told()
    serve = Serve(dicom_port=0, allow=("PACS@127.0.0.1", "FAR@10.9.8.7"), most_mib=0.5, quiet_s=0)
    with queue(tmp_path, worker) as (jobs, room):
        intake = Intake(tmp_path / "serve", jobs, room, serve.quiet_s)
        receiver = Receiver(serve, intake, room)
        receiver.start()
        try:
            assert send(receiver.port, "PACS", series) == [0, 0, 0, 0]
            assert send(receiver.port, "STRANGER", series) is None
            assert send(receiver.port, "PACS", series, called="ANOTHER") is None
            assert send(receiver.port, "FAR", series[:1]) == [0x0124]  # the right name from the wrong place
            assert send(receiver.port, "PACS", [SEG_FILE], context=SegmentationStorage) is None
            assert send(receiver.port, "PACS", series, syntax=DeflatedExplicitVRLittleEndian) is None
            large = pydicom.dcmread(series[0])
            large.add_new(0x00091010, "OB", b"\0" * (1 << 20))
            large.save_as(tmp_path / "large.dcm")
            assert send(receiver.port, "PACS", [tmp_path / "large.dcm"]) == [None]  # cut off
            until(lambda: intake.under_way == 0 or (intake.hand_on() >= 0 and intake.under_way == 0))
        finally:
            receiver.stop()
        until(lambda: worker.seen)
        assert len(worker.seen[0]) == 4
        until(lambda: list(intake.quarantine.iterdir()) == [])


@pytest.mark.parametrize(
    ("named", "address", "may"),
    [
        ("PACS@10.0.0.7", "10.0.0.7", True),
        ("PACS@10.0.0.7", "::ffff:10.0.0.7", True),  # as a socket for both kinds of addresses tells it
        ("PACS@[2001:DB8:0::7]", "2001:db8::7", True),
        ("PACS", "10.0.0.8", True),
        ("PACS@10.0.0.7", "10.0.0.8", False),
        ("PACS@2001:db8::7", "10.0.0.7", False),
        ("PACS@10.0.0.7", "", False),
        ("FAR@10.0.0.7", "10.0.0.7", False),
    ],
)
def test_a_peer_is_known_by_its_address_however_that_is_written_and_its_refusal_is_told_once(
    tmp_path, caplog, named, address, may
):
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        receiver = Receiver(Serve(allow=(named,)), Intake(tmp_path / "serve", jobs, room, 0.0), room)
        peer = Mock(requestor=SimpleNamespace(ae_title="PACS", address=address))
        assert [receiver._permitted(peer) for _ in range(2)] == [may, may]
    assert caplog.text.count("a DICOM peer was refused") == (0 if may else 1)


def send(port, calling, files, called="FEDIMAGING", context=CTImageStorage, tls=None, syntax=ExplicitVRLittleEndian):
    """Status of each file; None where there is no association, or no answer."""
    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 20
    entity.add_requested_context(context, syntax)
    link = entity.associate("127.0.0.1", port, ae_title=called, tls_args=tls and (tls, "localhost"))
    if not link.is_established:
        return None
    status = [link.send_c_store(pydicom.dcmread(path)).get("Status") for path in files]
    link.release()
    return status


def keys(folder: Path) -> dict[str, Any]:
    """Files of an authority, and of a machine's certificate and key."""
    authority = new_authority("hospital")
    server = issue_server(authority, ["127.0.0.1", "localhost"])
    files = {"tls_ca": authority.certificate, "tls_certificate": server.certificate, "tls_key": server.key}
    key = new_tls_key()
    files |= {"peer_key": key, "peer": issue_site(authority, request_certificate("pacs", key), "pacs")}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: str(folder / name) for name in files if name.startswith("tls")}


def data_unit(*values: tuple[int, int]) -> bytes:
    """A P-DATA-TF of values of (control header, bytes)."""
    items = b"".join(struct.pack(">LBB", 2 + size, 1, control) + bytes(size) for control, size in values)
    return struct.pack(">BBL", 4, 0, len(items)) + items


@pytest.mark.parametrize(
    ("units", "lengths"),
    [
        ([data_unit((3, 70))], (0, 72)),  # a command in one piece
        ([data_unit((1, 70)), data_unit((1, 70), (3, 10))], (0, 156)),
        ([data_unit((3, 70), (0, 900), (2, 900))], (0, 72)),  # and its data set
        ([data_unit((1, 40_000)), data_unit((1, 40_000))], (80_004, 80_004)),
        ([b"\1" + data_unit((1, 70))[1:], b"", b"\4\0\0\0\0\1\0"], (0, 0)),
    ],
)
def test_the_command_of_a_message_is_measured_to_its_last_piece(units, lengths):
    before = longest = 0
    for unit in units:
        before, here = command_bytes(unit, before)
        longest = max(longest, here)
    assert (before, longest) == lengths


def heard(**facts: Any) -> Any:
    return SimpleNamespace(**facts)


def test_a_command_without_an_end_is_cut_off_and_echoes_without_number_are_not(tmp_path):
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        receiver = Receiver(Serve(allow=("A",)), Intake(tmp_path / "serve", jobs, room, 0.0), room)
        cut: list[str] = []
        peers = {name: SimpleNamespace(abort=partial(cut.append, name)) for name in ("echoes", "endless")}
        for _ in range(1000):
            receiver._counted(heard(assoc=peers["echoes"], data=data_unit((3, 70))))
        assert cut == []
        for _ in range(3):
            receiver._counted(heard(assoc=peers["endless"], data=data_unit((1, 30_000))))
        assert cut == ["endless"]


def test_what_is_on_its_way_counts_towards_the_quota_and_is_given_back_with_its_connection(tmp_path):
    worker = Told()
    with queue(tmp_path, worker, started=False) as (jobs, _):
        room = Room(tmp_path / "serve", 100_000)
        receiver = Receiver(Serve(allow=("A",)), Intake(tmp_path / "serve", jobs, room, 0.0), room)
        cut: list[str] = []
        dimse = SimpleNamespace(message=None)
        one, other = (SimpleNamespace(abort=partial(cut.append, n), dimse=dimse) for n in ("one", "other"))
        receiver._counted(heard(assoc=one, data=data_unit((2, 60_000))))
        assert (cut, room.used_bytes) == ([], 60_012)
        receiver._counted(heard(assoc=other, data=data_unit((2, 60_000))))
        assert (cut, room.used_bytes) == (["other"], 60_012)
        receiver._closed(heard(assoc=other))
        receiver._closed(heard(assoc=one))
        assert room.used_bytes == 0


def test_a_message_that_trickles_is_cut_off_and_one_after_a_pause_is_not(tmp_path):
    now = [0.0]
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        intake = Intake(tmp_path / "serve", jobs, room, 0.0)
        receiver = Receiver(Serve(allow=("A",)), intake, room, clock=lambda: now[0])
        cut: list[str] = []
        requestor = SimpleNamespace(ae_title="A", address="")
        slow, calm = (SimpleNamespace(abort=partial(cut.append, n), requestor=requestor) for n in ("slow", "calm"))
        for second in (0, 50, 100):
            now[0] = second
            receiver._counted(heard(assoc=slow, data=data_unit((0, 10))))
            receiver._counted(heard(assoc=calm, data=data_unit((3, 70))))
            assert receiver._echoed(heard(assoc=calm)) == 0
        assert cut == ["slow"]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # pynetdicom leaves sockets to the collector
def test_of_connections_that_say_nothing_no_more_are_held_than_there_is_room_for(tmp_path, series, monkeypatch):
    monkeypatch.setattr("fedclient.serving.receiver.MOST_LINKS", 3)
    monkeypatch.setattr("fedclient.serving.receiver.STALL_S", 3.0)  # half of it for the request of an association
    with queue(tmp_path, Told(), started=False) as (jobs, room):
        receiver = Receiver(Serve(dicom_port=0, allow=("PACS",)), Intake(tmp_path / "serve", jobs, room, 60), room)
        receiver.start()
        links = [socket.create_connection(("127.0.0.1", receiver.port), timeout=10) for _ in range(4)]
        try:
            assert links[3].recv(1) == b""  # hung up on
            links[0].close()
            links[3].close()
            until(lambda: send(receiver.port, "PACS", series[:1]) == [0])
        finally:
            for link in links:
                link.close()
            receiver.stop()
        gc.collect()


@pytest.mark.parametrize("alive", [True, False])
def test_a_unit_that_trickles_or_stops_is_given_up(monkeypatch, alive):
    monkeypatch.setattr("fedclient.serving.receiver.STALL_S", 0.2)
    here, there = socket.socketpair()
    done = threading.Event()

    def trickle() -> None:
        while alive and not done.wait(0.02):
            there.send(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(TimeoutError):
            received(here, 6554)  # a tenth of a second's worth
    finally:
        done.set()
        thread.join()
        here.close()
        there.close()


def test_a_unit_comes_whole_or_as_far_as_its_connection_goes():
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"abcdef")
        assert received(here, 4) == b"abcd"
        there.shutdown(socket.SHUT_WR)
        assert received(here, 9) == b"ef"


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # pynetdicom leaves sockets to the collector
def test_over_tls_a_peer_shows_a_certificate_and_one_that_says_nothing_keeps_nobody_out(tmp_path, series):
    files = keys(tmp_path)
    serve = Serve(dicom_port=0, allow=("PACS",), **files)
    with queue(tmp_path, Told()) as (jobs, room):
        receiver = Receiver(serve, Intake(tmp_path / "serve", jobs, room, 60.0), room, server_context(serve))
        receiver.start()
        silent = socket.create_connection(("127.0.0.1", receiver.port), timeout=10)
        try:
            context = ssl.create_default_context(cafile=files["tls_ca"])
            assert send(receiver.port, "PACS", series[:1], tls=context) is None
            context.load_cert_chain(tmp_path / "peer", tmp_path / "peer_key")
            assert send(receiver.port, "PACS", series[:1], tls=context) == [0]
        finally:
            silent.close()
            receiver.stop()
    gc.collect()  # here, where nobody minds what it says


async def deaf(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers nobody."""


def test_pages_over_tls_take_no_version_before_1_2(tmp_path):
    serve = Serve(host="0.0.0.0", port=0, **keys(tmp_path))
    assert not serve.local
    config = listener(guarded(deaf, token="x", local=False, most_bytes=1), serve)
    assert config.ssl is not None
    assert config.ssl.minimum_version == ssl.TLSVersion.TLSv1_2
    assert config.ssl.verify_mode == ssl.CERT_NONE  # people show the token
    assert listener(guarded(deaf, token=None, local=True, most_bytes=1), Serve()).ssl is None


@contextmanager
def pages(head_s: float):
    """The address of pages that answer 204, in a loop of their own, with so long a patience."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    class Hasty(Heads):
        pass

    Hasty.head_s = head_s
    config = listener(app, Serve())
    assert config.http is Heads
    loop = asyncio.new_event_loop()
    state = ServerState()
    make = partial(Hasty, config, state, {}, loop)
    server = loop.run_until_complete(loop.create_server(make, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for each in [*state.connections]:
            each.transport.abort()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: loc", REQUEST + b"\r\n", REQUEST + b"GET /"])
def test_who_does_not_finish_what_he_asks_for_is_hung_up_on(said):
    with pages(head_s=0.2) as address, socket.create_connection(address, timeout=10) as link:
        link.sendall(said)
        heard = b""
        while block := link.recv(4096):  # to the end, not to the time limit
            heard += block
    assert heard.count(b"204 No Content") == said.count(REQUEST)


def test_who_asks_at_too_great_length_is_hung_up_on_before_he_has_ended():
    sent = 0
    with pages(head_s=60.0) as address, socket.create_connection(address, timeout=10) as link:
        link.sendall(b"GET / HTTP/1.1\r\nX: ")
        with suppress(ConnectionError):
            for _ in range(256):
                link.sendall(b"x" * (1 << 18))
                sent += 1 << 18
    assert sent < 1 << 26


def test_a_connection_is_kept_for_further_requests():
    with pages(head_s=60.0) as address, socket.create_connection(address, timeout=10) as link:
        for _ in range(3):
            link.sendall(REQUEST)
            assert link.recv(4096).startswith(b"HTTP/1.1 204")


# ---- the way back ----


def test_results_are_sent_again_until_they_are_taken(tmp_path):
    tries = []

    def sending(to, files, ae_title):
        tries.append([path.name for path in files])
        if len(tries) < 3:
            raise NotTaken("busy")

    back = Back(destination("PACS@h:1"), lambda: jobs, "US", sending, first_s=0.01)
    with queue(tmp_path, Told(lambda _: {"images": [image("seg.dcm", "sr.dcm")], "unread": []}), done=back.add) as (
        jobs,
        _,
    ):
        back.start()
        job = put(jobs)
        until(lambda: jobs.find(job).returned == "sent")
        back.stop()
    assert tries == [["seg.dcm", "sr.dcm"]] * 3


@pytest.mark.parametrize("error", [RuntimeError("PATIENT^NAME"), httpx.InvalidURL("no port"), OSError(28, "full")])
def test_whatever_keeps_a_result_from_being_returned_the_next_one_goes(tmp_path, caplog, error):
    tries = []

    def sending(to, files, ae_title):
        tries.append(files)
        if len(tries) == 1:
            raise error

    back = Back(destination("PACS@h:1"), lambda: jobs, "US", sending, first_s=0.01)
    with queue(tmp_path, Told(), done=back.add) as (jobs, _):
        back.start()
        ids = [put(jobs), put(jobs)]
        until(lambda: all(jobs.find(each).returned == "sent" for each in ids))
        back.stop()
    assert len(tries) == 3
    assert "PATIENT" not in caplog.text


def test_a_peer_that_hangs_up_between_two_objects_has_not_taken_them(monkeypatch):
    class Association:
        is_established, is_rejected, rejected_contexts = True, False, ()
        accepted_contexts = (build_context(SegmentationStorage, ExplicitVRLittleEndian),)
        sent = 0

        def send_c_store(self, data):
            self.sent += 1
            if self.sent == 2:
                raise RuntimeError("The association with a peer SCP must be established")
            return status

        def release(self):
            pass

    status = pydicom.Dataset()
    status.add_new(0x00000900, "US", 0)
    monkeypatch.setattr("fedclient.serving.back.AE.associate", lambda *_, **__: Association())
    with pytest.raises(NotTaken, match="broke off"):
        store(destination("PACS@127.0.0.1:104"), [SEG_FILE, SEG_FILE], "US")


# ---- the process ----

CHILD = """
import json, sys, time
print(json.dumps({"model": {"name": "m"}}), flush=True)
for line in sys.stdin:
    what = json.loads(line)["folder"]
    if what == "die": sys.exit(1)
    if what == "sleep": time.sleep(60)
    print(json.dumps({"images": [], "rss_bytes": 10**12 if what == "grow" else 10}), flush=True)
"""


def test_a_process_that_dies_hangs_or_grows_is_replaced(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    warm = Warm([*python("x")[:1], str(tmp_path / "child.py")], time_limit_s=2.0)
    assert warm.start() == {"name": "m"}
    for what, words in (("die", "ended over this case"), ("sleep", "took too long")):
        with pytest.raises(ProcessFailed, match=words):
            warm.ask(Path(what), False)
        assert warm.ask(Path("well"), False) == {"images": [], "rss_bytes": 10}
    assert warm.ask(Path("grow"), False)["rss_bytes"] == 10**12
    assert warm.restarts == 2  # the one that has grown is replaced when there is another case
    assert warm.ask(Path("well"), False)["rss_bytes"] == 10
    assert warm.restarts == 3
    warm.stop()


WITH_A_GPU = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from fedclient.device_errors import predicting
from fedclient.serving import worker
from tests.marking import dark, model

site = Path(sys.argv[1])
broken = not (site / "broke").exists()  # only the first process meets the fault, and never gets over it
(site / "broke").touch()

def through(images):
    with predicting():
        if broken:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\\nSearch for ...")
        return dark(images)

print('{"model": {"name": "m"}}', flush=True)
worker.serve(model(through=through), site, SimpleNamespace(warnings=list), sys.stdin, sys.stdout)
"""


def test_a_process_whose_gpu_has_failed_says_so_of_one_case_and_another_takes_its_place(tmp_path):
    (tmp_path / "in").mkdir()
    image: Any = nibabel.Nifti1Image(chest_hu()[0].astype(np.int16), None)
    image.set_sform(np.eye(4), code="scanner")
    nibabel.save(image, tmp_path / "in/a.nii")
    warm = Warm([sys.executable, "-c", WITH_A_GPU, str(tmp_path)], time_limit_s=60.0)
    said = warm.ask(tmp_path, False, count=False)
    assert (said["images"], said["unread"][0]["code"]) == ([], "DEVICE_FAILED")
    assert "the GPU failed (CUDA error: unspecified launch failure)" in said["unread"][0]["why"]
    said = warm.ask(tmp_path, False, count=False)
    assert ([each["name"] for each in said["images"]], said["unread"]) == (["image-1"], [])
    assert warm.restarts == 1
    warm.stop()


# ---- the web ----


@contextmanager
def web(folder: Path, worker, most_bytes=1 << 20, token=None, local=True, public_origin=""):
    with queue(folder, worker) as (jobs, room):
        intake = Intake(folder / "serve", jobs, room, 0.0)
        warm = Warm(["true"], 1.0)
        warm.model = {"name": "m", "version": "1"}
        app = application(Parts(jobs, intake, room, warm, most_bytes, token, local, False, public_origin))

        def ask(method, path, host="localhost", **more):
            async def go():
                transport = httpx.ASGITransport(app=app)
                async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
                    return await client.request(method, path, **more)

            return asyncio.run(go())

        yield ask, jobs, intake


def test_a_file_is_uploaded_asked_after_fetched_and_deleted(tmp_path):
    def say(folder):
        (folder / "out" / "image-1").mkdir(parents=True)
        (folder / "out" / "image-1" / "seg.dcm").write_bytes(b"result")
        (folder / "out" / "image-1" / "private").write_bytes(b"not told of")
        return {"images": [image("seg.dcm")], "unread": []}

    with web(tmp_path, Told(say)) as (ask, _jobs, _):
        answer = ask("POST", "/api/jobs", files=[("files", ("x.dcm", b"content"))])
        assert answer.status_code == 202
        job = answer.json()["id"]
        until(lambda: ask("GET", f"/api/jobs/{job}").json()["state"] == "done")
        assert ask("GET", f"/api/jobs/{job}").json()["notice"] == "not for diagnosis"
        assert ask("GET", f"/api/jobs/{job}/files/image-1/seg.dcm").content == b"result"
        for other in ("image-1/private", "../job.json", "image-1/../../job.json", "%2e%2e/job.json"):
            assert ask("GET", f"/api/jobs/{job}/files/{other}").status_code == 404
        assert ask("DELETE", f"/api/jobs/{job}").status_code == 204
        assert ask("GET", f"/api/jobs/{job}").status_code == 404


def test_overload_is_answered_503_and_says_when_to_come_again(tmp_path):
    worker = Told()
    worker.go.clear()
    with web(tmp_path, worker) as (ask, jobs, _):
        running = put(jobs)
        until(lambda: jobs.find(running).state == "running")
        for _ in range(3):
            put(jobs)
        answer = ask("POST", "/api/jobs", files=[("files", ("x.dcm", b"content"))])
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "30"
        assert len(jobs.all()) == 4


def test_the_interface_is_described_in_openapi(tmp_path):
    with web(tmp_path, Told()) as (ask, _, _):
        described = ask("GET", "/api/openapi.json").json()
    assert {"/api/jobs", "/api/jobs/{job_id}", "/api/health", "/dicom-web/studies"} <= described["paths"].keys()
    upload = described["paths"]["/api/jobs"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert upload["properties"]["files"]["items"] == {"type": "string", "format": "binary"}


def test_beyond_this_machine_everything_but_the_page_itself_asks_for_the_token(tmp_path):
    with web(tmp_path, Told(), token="s3cret" * 6, local=False) as (ask, _, _):
        shown = {"authorization": "Bearer " + "s3cret" * 6}
        for path in ("/", "/page.js", "/page.css", "/api/health"):
            assert ask("GET", path, host="model.example").status_code == 200
        for path in ("/api/openapi.json", "/dicom-web/instances", f"/api/jobs/{'0' * 32}"):
            assert ask("GET", path, host="model.example").status_code == 401
            assert ask("GET", path, host="model.example", headers={"authorization": "Bearer x"}).status_code == 401
            assert ask("GET", path, host="model.example", headers=shown).status_code in (200, 404)


def test_on_this_machine_too_nobody_reads_without_the_token(tmp_path):
    with web(tmp_path, Told(), token="s3cret" * 6) as (ask, _, _):
        for path in ("/api/openapi.json", "/dicom-web/instances", f"/api/jobs/{'0' * 32}"):
            assert ask("GET", path).status_code == 401
        shown = {"authorization": "Bearer " + "s3cret" * 6}
        assert ask("GET", "/dicom-web/instances", headers=shown).status_code == 200


def test_the_token_is_made_once_and_for_its_owner_alone(tmp_path):
    path = tmp_path / "secrets" / "serve-token"
    token = kept_token(path)
    assert len(token) >= 43  # 32 bytes
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept_token(path) == token
    path.write_text("short")
    with pytest.raises(StateInvalid, match="Delete it"):
        kept_token(path)
    path.chmod(0o644)
    with pytest.raises(StateInvalid, match="others may read it"):
        kept_token(path)


@pytest.mark.parametrize(
    ("token", "terminal", "told"),
    [("t" * 43, True, "open: http://127.0.0.1:8484/#token=" + "t" * 43), ("t" * 43, False, "secrets/serve-token"),
     (None, True, "token: off")],
)  # fmt: skip
def test_a_ready_link_is_told_to_a_terminal_and_no_token_to_a_log(monkeypatch, capsys, token, terminal, told):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    model = {"name": "m", "version": "1", "sha256": "0" * 64, "engine": "onnx", "warnings": ["stale"]}
    _say(heard(warm=heard(model=model), serve=Serve(), port=8484, token=token, site=Path("site"), receiver=None))
    out = capsys.readouterr().out
    assert told in out
    assert "page and REST: http://127.0.0.1:8484/ " in out
    assert ("ttt" in out) == (token is not None and terminal)


def test_on_this_machine_no_other_name_and_no_other_sites_script_gets_in(tmp_path):
    with web(tmp_path, Told()) as (ask, _, _):
        assert ask("GET", "/api/health", host="127.0.0.1:8484").status_code == 200
        assert ask("GET", "/api/health", host="rebound.example").status_code == 421
        own = {"origin": "http://localhost"}
        files = [("files", ("x.dcm", b"content"))]
        assert ask("POST", "/api/jobs", files=files, headers=own).status_code == 202
        assert ask("POST", "/api/jobs", files=files, headers={"origin": "http://evil"}).status_code == 403
        assert ask("POST", "/api/jobs", content=b"", headers={"content-length": "9" * 12}).status_code == 413


PROXY = "https://ai.example.org"


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("localhost:8484", {"origin": PROXY}, 202),  # a proxy that asks by its own name for us
        ("localhost:8484", {"origin": PROXY, "sec-fetch-site": "same-origin"}, 202),
        ("ai.example.org", {"origin": PROXY, "sec-fetch-site": "same-origin"}, 202),  # and one that keeps the name
        ("ai.example.org", {}, 202),
        ("localhost:8484", {"origin": "http://localhost:8484", "sec-fetch-site": "same-origin"}, 202),
        ("ai.example.org", {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, 403),
        ("ai.example.org", {"origin": "https://evil.example"}, 403),
        ("ai.example.org", {"origin": "https://other.example.org", "sec-fetch-site": "same-site"}, 403),
        ("localhost:8484", {"origin": "https://ai.example.org.evil.example"}, 403),
        ("localhost:8484", {"origin": "null"}, 403),
        ("localhost:8484", {"sec-fetch-site": "cross-site"}, 403),
        ("rebound.example", {"origin": "http://rebound.example", "sec-fetch-site": "same-origin"}, 421),
        ("rebound.example", {"origin": PROXY}, 421),
    ],
)
def test_behind_a_proxy_its_own_pages_may_send_and_no_others(tmp_path, host, headers, status):
    with web(tmp_path, Told(), public_origin=PROXY) as (ask, _, _):
        files = [("files", ("x.dcm", b"content"))]
        assert ask("POST", "/api/jobs", host=host, files=files, headers=headers).status_code == status


def test_without_a_proxy_nobody_gets_in_by_an_empty_name_or_another_origin(tmp_path):
    with web(tmp_path, Told()) as (ask, _, _):
        assert ask("GET", "/api/health", headers={"host": ""}).status_code == 421
        files = [("files", ("x.dcm", b"content"))]
        for headers in ({"origin": ""}, {"origin": PROXY, "sec-fetch-site": "same-origin"}):
            assert ask("POST", "/api/jobs", files=files, headers=headers).status_code == 403


def test_the_page_asks_nobody_else_for_anything():
    folder = Path(__file__).parents[1] / "fedclient" / "serving" / "page"
    for path in folder.iterdir():
        assert "http://" not in path.read_text(), path.name
        assert "https://" not in path.read_text(), path.name
    assert "Not for diagnosis" in (folder / "page.html").read_text()


def test_the_guard_lets_through_what_is_no_request():
    heard = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append(scope["type"])

    async def ask() -> None:
        nothing: Any = None
        await guarded(app, token=None, local=True, most_bytes=1)({"type": "lifespan"}, nothing, nothing)

    asyncio.run(ask())
    assert heard == ["lifespan"]


def stowed(objects):
    body = b"".join(b"--x\r\nContent-Type: application/dicom\r\n\r\n" + each + b"\r\n" for each in objects)
    return body + b"--x--\r\n", {"content-type": 'multipart/related; type="application/dicom"; boundary=x'}


def test_stow_says_of_each_object_whether_it_was_taken(tmp_path, series):
    worker = Told()
    with web(tmp_path, worker) as (ask, _jobs, intake):
        body, headers = stowed([path.read_bytes() for path in series])
        whole = ask("POST", "/dicom-web/studies", content=body, headers=headers)
        assert whole.status_code == 200
        assert len(whole.json()["00081199"]["Value"]) == 4
        assert intake.hand_on() == 1
        until(lambda: worker.seen)
        body, headers = stowed([series[0].read_bytes(), b"no dicom at all"])
        half = ask("POST", "/dicom-web/studies", content=body, headers=headers)
        assert half.status_code == 202
        assert half.json()["00081198"]["Value"] == [{"00081197": {"vr": "US", "Value": [0xC000]}}]
        body, headers = stowed([SEG_FILE.read_bytes()])
        none = ask("POST", "/dicom-web/studies", content=body, headers=headers)
        assert none.status_code == 409
        assert none.json()["00081198"]["Value"] == [{"00081197": {"vr": "US", "Value": [0xA900]}}]
        body, headers = stowed([series[0].read_bytes()])
        assert ask("POST", "/dicom-web/studies/1.2.3", content=body, headers=headers).status_code == 409


def test_while_images_that_came_are_put_in_their_places_others_are_answered(tmp_path, series, monkeypatch):
    answered = threading.Event()
    with queue(tmp_path, Told()) as (jobs, room):
        intake = Intake(tmp_path / "serve", jobs, room, 0.0)
        place = intake.place

        def waiting(*args):
            assert answered.wait(10)
            return place(*args)

        monkeypatch.setattr(intake, "place", waiting)
        warm = Warm(["true"], 1.0)
        warm.model = {"name": "m", "version": "1"}
        app = application(Parts(jobs, intake, room, warm, 1 << 20, None, True, False))

        async def go():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
                body, headers = stowed([series[0].read_bytes()])
                sent = asyncio.create_task(client.post("/dicom-web/studies", content=body, headers=headers))
                await asyncio.sleep(0.2)
                assert (await client.get("/api/health")).status_code == 200
                answered.set()
                assert (await sent).status_code == 200

        asyncio.run(go())


def test_a_partial_result_is_told_as_such_and_no_dicomweb_search_finds_it(tmp_path):
    def say(folder):
        (folder / "out" / "image-1").mkdir(parents=True)
        shutil.copyfile(SEG_FILE, folder / "out" / "image-1" / "seg.dcm")
        return {"images": [image("seg.dcm")], "unread": []}

    with web(tmp_path, Told(say)) as (ask, jobs, _):
        job = put(jobs)
        until(lambda: jobs.find(job).state == "done")
        assert len(ask("GET", "/dicom-web/instances").json()) == 1
        assert ask("GET", "/api/health").json()["partial"] == 0
        assert ask("GET", "/api/health").json()["not_returned"] == 0
        jobs.mark_returned(job, "failed")
        assert ask("GET", "/api/health").json()["not_returned"] == 1
        jobs.mark_partial(job, "SERIES_SPLIT", "more came.")
        assert ask("GET", "/dicom-web/instances").json() == []
        assert ask("GET", f"/api/jobs/{job}").json()["partial"] == {"code": "SERIES_SPLIT", "why": "more came."}
        assert ask("GET", "/api/health").json()["partial"] == 1
        jobs.mark_partial(job, "SERIES_REPLACED", "another is of more.")
        assert ask("GET", "/api/health").json()["partial"] == 0


@pytest.mark.parametrize("end", ["all", "some", "none"])
def test_what_turns_out_partial_while_it_is_sent_is_told_where_any_of_it_arrived(end, tmp_path, caplog):
    def send(to, files, title):
        jobs.mark_partial(job, "SERIES_SPLIT", "more came.")
        if end != "all":
            out = jobs.place(job) / "out"
            raise NotTaken("PACS: full", [out / "image-1" / "seg.dcm"] if end == "some" else [])

    back = Back(destination("PACS@h:1"), lambda: jobs, "US", send)
    with queue(tmp_path, Told(), done=lambda job: None) as (jobs, _):
        job = put(jobs)
        until(lambda: jobs.find(job).returned == "waiting")
        jobs.return_s = 0.0  # given up at once
        back.add(jobs.find(job))
        back._one(job)
    assert jobs.find(job).returned == ("sent" if end == "all" else "withheld")
    assert ("not of the whole series" in caplog.text) == (end != "none")


def test_what_turns_out_partial_while_it_waits_is_not_sent(tmp_path):
    sent = []
    back = Back(destination("PACS@h:1"), lambda: jobs, "US", lambda to, files, title: sent.append(len(files)))
    with queue(tmp_path, Told(), done=back.add) as (jobs, _):
        job = put(jobs)
        until(lambda: jobs.find(job).returned == "waiting")
        jobs.mark_partial(job, "SERIES_SPLIT", "more came.")
        other = put(jobs)
        until(lambda: jobs.find(other).returned == "waiting")
        back.start()
        until(lambda: jobs.find(other).returned == "sent")
        back.stop()
    assert sent == [0]
    assert jobs.find(job).returned == "withheld"


def test_results_are_found_and_retrieved_by_their_uids(tmp_path):
    def say(folder):
        (folder / "out" / "image-1").mkdir(parents=True)
        shutil.copyfile(SEG_FILE, folder / "out" / "image-1" / "seg.dcm")
        return {"images": [image("seg.dcm")], "unread": []}

    header = pydicom.dcmread(SEG_FILE, stop_before_pixels=True)
    study, series_uid, instance = header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID
    with web(tmp_path, Told(say)) as (ask, jobs, _):
        job = put(jobs)
        until(lambda: jobs.find(job).state == "done")
        (found,) = ask("GET", "/dicom-web/instances").json()
        assert found["00080018"] == {"vr": "UI", "Value": [instance]}
        assert len(ask("GET", f"/dicom-web/studies/{study}/series?Modality=SEG").json()) == 1
        assert ask("GET", "/dicom-web/series?Modality=CT").json() == []
        assert ask("GET", "/dicom-web/studies?limit=0").json() == []
        assert ask("GET", f"/dicom-web/studies/1.2.3/series?StudyInstanceUID={study}").json() == []
        assert ask("GET", f"/dicom-web/series?StudyInstanceUID={study}").json() != []
        assert ask("GET", "/dicom-web/series?StudyInstanceUID=1.2.3").json() == []
        assert ask("GET", "/dicom-web/studies?PatientName=x").status_code == 400
        path = f"/dicom-web/studies/{study}/series/{series_uid}/instances/{instance}"
        retrieved = ask("GET", path)
        assert SEG_FILE.read_bytes() in retrieved.content
        assert retrieved.headers["content-type"].startswith('multipart/related; type="application/dicom"')
        (told,) = ask("GET", path + "/metadata").json()
        assert told["0020000E"]["Value"] == [series_uid]
        assert "7FE00010" not in told
        assert ask("GET", "/dicom-web/studies/1.2.3").status_code == 404


def test_searching_and_telling_of_results_keeps_no_header_and_one_that_has_gone_is_passed_over(tmp_path):
    def say(folder):
        (folder / "out" / "image-1").mkdir(parents=True)
        shutil.copyfile(SEG_FILE, folder / "out" / "image-1" / "seg.dcm")
        return {"images": [image("seg.dcm")], "unread": []}

    def headers() -> int:
        gc.collect()
        return sum(issubclass(type(each), pydicom.Dataset) for each in gc.get_objects())

    with web(tmp_path, Told(say)) as (ask, jobs, _):
        job = put(jobs)
        until(lambda: jobs.find(job).state == "done")
        before = headers()
        (found,) = ask("GET", "/dicom-web/studies").json()
        study = found["0020000D"]["Value"][0]
        assert len(ask("GET", f"/dicom-web/studies/{study}/metadata").json()) == 1
        assert headers() == before
        (jobs.place(job) / "out" / "image-1" / "seg.dcm").unlink()
        assert ask("GET", "/dicom-web/studies").json() == []
        assert ask("GET", f"/dicom-web/studies/{study}/metadata").json() == []
