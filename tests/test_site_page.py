"""A hospital's page: what it tells, whom it answers, how its log is read on, and that no stream outlives its server."""

import asyncio
import http.client
import json
import os
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fedclient.book import MOST_RUNS, MOST_SENT, Book, newest
from fedclient.consent import list_asked
from fedclient.gpus import Gpu, gpus
from fedclient.ledger import Reservation, open_ledger
from fedclient.limits import Limits
from fedclient.overview import overview
from fedclient.page import view
from fedclient.page.look import SECTIONS, looker
from fedclient.page.web import application, page_app
from fedclient.policy import Policy
from fedclient.site import Data, PrivacyPolicy, SiteFile, open_site, site_toml
from shared_models.figure_text import DASH
from shared_models.files import append_json, write_json
from shared_models.heads import Heads
from shared_models.live.feed import MOST_LISTENERS, Feed, Page
from shared_models.loopback import END_S, is_ours, loopback_app
from shared_models.protect.accounting import Spend
from shared_models.study import Rounds, Study, sha256
from tests.asking import Browser
from tests.edge import running_edge
from tests.hospitals import Hospitals

TOY = Study(name="toy", title="Toys of all kinds", rounds=Rounds(count=2, quorum=2, deadline_s=300, gather_s=0))
HERE = "http://127.0.0.1:8471"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
PATIENT = "PID-0817-DOE"


@pytest.fixture(scope="module")
def north(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A site that has taken part in a run of two rounds."""
    folder = tmp_path_factory.mktemp("played")
    with running_edge(folder / "federation") as edge:
        hospitals = Hospitals(edge, folder / "sites")
        for name in ("north", "south"):
            hospitals.join(name, Policy(approval="inside-policy"), folder / PATIENT)
        hospitals.run(TOY)
        yield hospitals.sites["north"]


@pytest.fixture
def site(north: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(north, tmp_path / "site"))


@pytest.fixture
def page(north: Path) -> Browser:
    return Browser(page_app(north), HERE)


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def line(path: Path, event: str, at: float, **facts: object) -> None:
    append_json(path, {"event": event, "facts": facts, "prev": "", "seq": 0, "sign": "", "time": at})


# What it tells


def test_the_page_tells_of_all_that_a_hospital_asks(page):
    text = words(page.get("/").text)
    for told in (
        "north Test federation, coordinator 127.0.0.1:",
        "No order is under way",
        "2 updates have left this site so far",
        "Connection ◆ stopped",
        "the node does not run; fedclient start starts it",
        "toy ✓ scoring the model done waits for the coordinator's next order 2 of 2",
        "✓ approved by policy",
        "GiB free of",
        "GiB taken of a quota of 100",
        "Privacy ledger No budget is set",
        "Data card None yet",
        "A distribution leaves only of 11 or more patients: with a finding, and without.",
        "tensors 2 (544 B)",
        "toy, round 2",
    ):
        assert told in text, told
    assert page.get("/metrics").text.startswith("# HELP fedclient_")


def test_every_section_stands_on_the_page_where_its_changes_go(north, page):
    text = page.get("/").text
    assert sorted(re.findall(r'data-section="(\w+)"', text)) == sorted(SECTIONS)
    assert all(html.strip() in text for name, html in looker(north).sections().items() if name != "machine")


def test_without_scripts_the_page_says_when_it_was_made_and_asks_again_by_itself(page):
    before = time.time()
    text = page.get("/").text
    (made,) = re.findall(r'id="asof" datetime="([^"]+)"', text)
    assert made >= time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(before - 3))
    assert f"{made[:10]} {made[11:19]} UTC" in text
    assert "not live: this page needs its script" in text
    assert '<noscript><meta http-equiv="refresh" content="30"></noscript>' in text


def test_an_order_under_way_is_told_with_its_round_and_the_title_of_its_study(site):
    line(site / "audit.jsonl", "order", 50.0, run="toy-2", round=2, kind="train", study=sha256(TOY))
    with only_node(site):
        sections = looker(site).sections()
    assert "toy-2 ▶ training round 2 of 2 Toys of all kinds" in words(sections["now"])
    assert 'data-said="toy-2: round 2 of 2, training."' in sections["now"]
    assert "round 2 of 2" in words(sections["summary"])
    stopped = words(looker(site).sections()["now"])
    assert "◆ interrupted: the node does not run" in stopped


@contextmanager
def only_node(folder: Path) -> Iterator[None]:
    """The site as if it were served."""
    from shared_models.supervise import only_one

    child = {"pid": 3, "state": "running", "restarts": 2, "last_exit": -9, "since": 1.0, "last_words": ""}
    write_json(folder / "status.json", {"supervisor": 1, "children": {"node": child}})
    with only_one(folder):
        yield


def test_processes_are_told_with_their_restarts(site):
    with only_node(site):
        text = words(looker(site).sections()["connection"])
    assert "node ✓ running started again 2 times" in text
    assert "node ○ stopped" in words(looker(site).sections()["connection"])


def test_what_a_run_waits_for_here_is_told_by_its_last_event(site):
    path, digest = site / "audit.jsonl", sha256(TOY)
    for run, code in (("asked", "APPROVAL_PENDING"), ("late", "OUTSIDE_HOURS"), ("spoilt", "DATA_NOT_READY")):
        line(path, "order-refused", 60.0, run=run, round=1, kind="train", code=code, study=digest)
    line(path, "order", 70.0, run="broken", round=1, kind="train", study=digest)
    line(path, "order", 80.0, run="now", round=2, kind="train", study=digest)
    book = Book(site)
    facts = overview(site, book)
    asked = {each.sha256: each for each in list_asked(open_site({"site-dir": str(site)}))}
    rows = [(row["run"], row["mark"], row["words"]) for row in view.queue(book, asked, facts)]
    assert rows == [
        ("now", "work", "training"),
        ("broken", "look", "interrupted"),
        ("late", "look", "waits for the hours of the policy"),
        ("asked", "look", "waits for your decision"),
        ("spoilt", "bad", "order refused"),
        ("toy", "good", "scoring the model done"),
    ]


def test_an_order_that_failed_before_it_had_a_reply_is_not_under_way(tmp_path):
    path = tmp_path / "audit.jsonl"
    line(path, "order", 1.0, run="a", round=3, kind="train", study="0" * 64)
    line(path, "sent", 2.0, kind="code", bytes=13, sha256="x", code="OUT_OF_MEMORY")
    book = Book(tmp_path)
    book.look()
    assert book.work is None
    assert (book.refused, book.last_refused) == (1, {**(book.last_refused or {}), "run": "a", "code": "OUT_OF_MEMORY"})
    assert [(run.state, run.code, run.rounds) for run in newest(book)] == [("refused", "OUT_OF_MEMORY", 0)]


def test_a_study_that_waits_for_a_person_stands_first_and_is_counted(site):
    (site / f"studies/{sha256(TOY)}/decision.json").unlink()
    sections = looker(site).sections()
    assert "1 study waits for a decision here" in words(sections["studies"])
    assert "Waits for your decision ◆ 1" in words(sections["summary"])


def test_the_ledger_is_told_as_the_book_has_it(site):
    ledger = open_ledger(site)
    ledger.set_budget("all", 8.0, 1e-5)
    ledger.reserve(Reservation("all", "run-1", "a" * 64, 100, Spend(8.0, 0.1, 100)))
    (account,) = ledger.accounts()
    text = words(looker(site).sections()["ledger"])
    assert f"epsilon {account.spent:.3g} of 8 spent, {8 - account.spent:.3g} left" in text
    assert "At delta 1e-05" in text
    assert "1 reservation is not settled and counts as spent" in text


@pytest.mark.parametrize(("spent", "mark"), [(5.9, "good"), (6.0, "look"), (7.59, "look"), (7.6, "bad"), (9.0, "bad")])
def test_a_budget_that_runs_out_is_marked(spent, mark):
    (account,) = view.ledger([{"data_set": "a", "spent": spent, "budget": 8.0, "delta": 1e-5, "not_settled": 0}])
    assert account["mark"] == mark
    assert account["share"] <= 1


def test_the_data_card_is_told_with_what_it_withholds(site):
    write_json(site / "gate/card.json", {"format": 1, "smallest_count": 11, "cases": 1230, "patients": None, "tables": {
        "split": {"train, labelled": 1200, "test, labelled": None}}})  # fmt: skip
    text = words(looker(site).sections()["card"])
    assert "1,230 cases, fewer than 11 patients" in text
    assert "split test, labelled withheld train, labelled 1,200" in text


def test_limits_and_privacy_of_the_site_file_are_part_of_the_policy():
    file = SiteFile(
        "north", "h:1", "F", Data("/d"), privacy=PrivacyPolicy(required=True, most_epsilon=3.0),
        limits=Limits(memory_gib=16.0, gpu_memory_share=0.5, order_s=600.0),
    )  # fmt: skip
    assert view.policy(file)[-5:] == [
        "Only studies with differential privacy are taken part in.",
        "One study may spend epsilon 3 at most.",
        "A process may take 16 GiB of memory.",
        "Training may take 50% of a GPU's memory.",
        "An order may take 600 s.",
    ]


@pytest.mark.parametrize(("free", "mark"), [(6, "good"), (4, "look"), (0.5, "bad")])
def test_a_disk_that_fills_up_is_marked(site, free, mark):
    gib = 2**30
    disk = {"free": int(free * gib), "total": 100 * gib, "cache": 25 * gib, "quota": 100 * gib}
    found = view.disks({"disk": disk})
    assert found["disk"]["mark"] == mark
    assert found["disk"]["share"] == pytest.approx(1 - free / 100)
    assert found["cache"] == {"used": "25.0", "size": "100", "free": "75.0", "share": 0.25, "mark": "good"}


# The GPU


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Stands in for NVIDIA's tool; what it is asked for is what it is known to answer in this order."""

    def says(*rows: str) -> None:
        made = tmp_path / "bin/nvidia-smi"
        made.parent.mkdir(exist_ok=True)
        asked = "name,driver_version,memory.used,memory.total,utilization.gpu,temperature.gpu"
        told = "\n".join(f"echo '{row}'" for row in rows)
        made.write_text(f'#!/bin/sh\n[ "$1" = "--query-gpu={asked}" ] || exit 6\n{told}\n')
        made.chmod(made.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{made.parent}{os.pathsep}{os.environ['PATH']}")

    return says


def test_gpus_are_told_as_nvidias_tool_tells_them(tool, site):
    tool("NVIDIA H100 80GB HBM3, 550.54.15, 20480, 81920, 97, 61", "NVIDIA A30, 550.54.15, 0, 24576, [N/A], [N/A]")
    gib = 2**30
    assert gpus() == [
        Gpu("NVIDIA H100 80GB HBM3", "550.54.15", 20 * gib, 80 * gib, 0.97, 61.0),
        Gpu("NVIDIA A30", "550.54.15", 0, 24 * gib, None, None),
    ]
    text = words(looker(site).sections()["machine"])
    assert "GPU 0: NVIDIA H100 80GB HBM3 Memory 20.0 GiB taken of 80.0 Busy 97 % Temperature 61 °C" in text
    assert f"GPU 1: NVIDIA A30 Memory 0 GiB taken of 24.0 Busy {DASH} Temperature {DASH}" in text


def test_a_gpu_that_site_toml_asks_for_and_that_is_not_there_is_an_alarm(tool):
    tool()
    assert gpus() == []
    assert view.machine("cuda:0", gpus(), 1.0)["missing"]
    assert not view.machine("auto", gpus(), 1.0)["missing"]


def test_the_tool_is_not_asked_at_every_look(tool, site):
    looks = looker(site)
    tool("first, 1, 0, 1, 0, 0")
    looks.sections()
    tool("second, 1, 0, 1, 0, 0")
    assert "first" in looks.sections()["machine"]
    looks._machine_at -= 6
    assert "second" in looks.sections()["machine"]


def test_the_cache_is_counted_twice_a_minute(site):
    looks = looker(site)
    looks.sections()
    (site / "cache/plan").mkdir(parents=True)
    (site / "cache/plan/0a1b").write_bytes(b"x" * 2**22)
    assert "Cache 0 GiB taken" in words(looks.sections()["machine"])
    looks._cache_at -= 31
    assert "Cache 0.004 GiB taken" in words(looks.sections()["machine"])


# Whom it answers, and what it lets a browser do


@pytest.mark.parametrize("path", ["/", "/events", "/metrics", "/static/live.js"])
def test_every_answer_forbids_what_is_not_its_own(north, path):
    feed = Feed(looker(north).sections)
    feed.pages[None] = Page(listeners=MOST_LISTENERS)  # a stream would have no end
    policy = Browser(application(looker(north), feed), HERE).get(path).headers["content-security-policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "form-action 'none'"):
        assert rule in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_the_page_has_nothing_inline_and_names_nobody_else(page):
    text = page.get("/").text
    assert re.findall(r"<script(?![^>]*src=\"/static/)", text) == []
    assert re.findall(r"\sstyle=|\son\w+=|<style|url\(|@import", text) == []
    assert all(link.startswith(("/", "#")) for link in re.findall(r"(?:src|href|action)=\"([^\"]*)\"", text))


def test_words_of_others_are_text_on_the_page(site):
    write_json(site / "node/refused.json", {"refused": HOSTILE, "at": 1.0})
    line(site / "audit.jsonl", "order", 5.0, run=HOSTILE, round=1, kind=HOSTILE, study=HOSTILE)
    line(site / "audit.jsonl", "sent", 6.0, run=HOSTILE, round=1, kind=HOSTILE, bytes=3, sha256=HOSTILE, code=HOSTILE)
    line(site / "audit.jsonl", "witness-refused", 7.0, peer=HOSTILE, problem=HOSTILE, head={})
    sections = looker(site).sections()
    for name in ("alarms", "queue", "sent"):
        assert "&lt;script&gt;alert(1)" in sections[name], name
    assert not re.search(r"<script|<img", "".join(sections.values()))


def test_neither_the_folder_of_the_images_nor_what_lies_in_it_is_on_the_page(site):
    """Identifiers stand in names of folders and files; the page says neither, in no section."""
    data = site.parent / PATIENT
    (data / "DOE^JOHN").mkdir(parents=True)
    (data / "DOE^JOHN/1.2.3.dcm").write_bytes(b"x")
    file = SiteFile("north", "h:1", "F", Data(str(data), manifest_site="ward-7"))
    (site / "site.toml").write_text(site_toml(file))
    (site / "cache/plan").mkdir(parents=True)
    (site / "cache/plan/DOE-cached").write_bytes(b"x")
    text = Browser(page_app(site), HERE).get("/").text
    for never in (PATIENT, "DOE", "1.2.3", "ward-7", str(site)):
        assert never not in text, never


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1:8471", True), ("127.0.0.1", True), ("localhost:8471", True), ("LOCALHOST:1", True),
        ("[::1]:8471", True), ("[::1]", True), ("evil.example:8471", False), ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8471", False), ("", False), ("127.0.0.1:x", False), ("10.0.0.1:8471", False),
    ],
)  # fmt: skip
def test_a_name_that_was_pointed_to_loopback_is_refused(host, ours, page):
    assert is_ours(host) is ours
    assert page.get("/", headers={"host": host}).status_code == (200 if ours else 421)


@pytest.mark.parametrize("path", ["/events", "/metrics", "/static/live.js"])
def test_another_name_is_refused_for_everything_that_is_served(page, path):
    assert page.get(path, headers={"host": "evil.example:8471"}).status_code == 421


@pytest.mark.parametrize("path", ["/", "/events", "/metrics"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed_by_the_page(page, method, path):
    assert page.request(method, path).status_code == 405


def test_only_its_own_files_are_served(page):
    assert page.get("/static/live.js").headers["content-type"].startswith("text/javascript")
    assert page.get("/static/live.css").headers["content-type"].startswith("text/css")
    for name in ("page.html", "../look.py", "%2e%2e/pages.py", "dashboard.js"):
        assert page.get(f"/static/{name}").status_code == 404


def test_no_page_of_its_own_is_served_by_the_library(page):
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert page.get(path).status_code == 404
    assert loopback_app("x").openapi_url is None


def test_a_folder_that_is_no_site_is_told(tmp_path):
    answer = Browser(page_app(tmp_path), HERE).get("/")
    assert (answer.status_code, "fedclient join" in answer.text) == (503, True)


# Its log, read on


def test_what_is_new_in_the_log_is_told_without_reading_it_again(tmp_path, monkeypatch):
    path, book = tmp_path / "audit.jsonl", Book(tmp_path)
    book.look()
    assert (book.messages, book.work) == (0, None)
    line(path, "order", 1.0, run="a", round=1, kind="train", study="s")
    line(path, "sent", 2.0, run="a", round=1, kind="tensors", bytes=100, sha256="x")
    book.look()
    under_way = [book.work]
    read, take = list[int](), Book._take

    def noted(self: Book, content: bytes) -> None:
        read.append(len(content))
        take(self, content)

    monkeypatch.setattr(Book, "_take", noted)
    line(path, "sent", 3.0, run="a", round=1, kind="facts", bytes=20, sha256="y")
    book.look()
    assert read == [len(path.read_bytes().splitlines(keepends=True)[-1])]
    assert (book.messages, book.size_bytes, book.rounds_done) == (2, 120, 1)
    under_way.append(book.work)
    assert under_way == [{"run": "a", "round": 1, "kind": "train", "since": 1.0}, None]
    assert book.kinds == {"tensors": (1, 100), "facts": (1, 20)}


def test_a_line_that_is_not_whole_yet_is_told_when_it_is(tmp_path):
    path, book = tmp_path / "audit.jsonl", Book(tmp_path)
    line(path, "sent", 3.0, kind="facts", bytes=20)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    book.look()
    assert book.messages == 1
    with path.open("ab") as file:
        file.write(whole[30:])
    book.look()
    assert book.messages == 2


def test_a_log_that_is_another_one_now_is_read_from_its_start(tmp_path):
    path, book = tmp_path / "audit.jsonl", Book(tmp_path)
    for at in (1.0, 2.0, 3.0):
        line(path, "sent", at, kind="facts", bytes=10)
    book.look()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1]))  # cut
    book.look()
    assert book.messages == 1
    path.unlink()
    book.look()
    assert book.messages == 0
    path.write_bytes(b"".join(lines))  # put back
    book.look()
    assert book.messages == 3


def test_logs_of_earlier_keys_count_for_what_was_sent_and_not_for_what_is_under_way(tmp_path):
    book = Book(tmp_path)
    line(tmp_path / "audit.jsonl", "sent", 1.0, run="a", round=1, kind="tensors", bytes=10)
    line(tmp_path / "audit.jsonl", "order", 2.0, run="a", round=2, kind="train")
    book.look()
    (tmp_path / "audit.jsonl").rename(tmp_path / "audit-0a1b2c3d.jsonl")
    line(tmp_path / "audit.jsonl", "sent", 3.0, run="a", round=3, kind="tensors", bytes=10)
    book.look()
    assert (book.messages, book.rounds_done, book.work) == (2, 2, None)


def test_a_round_counts_once_and_one_of_a_secure_sum_counts_too(tmp_path):
    path, book = tmp_path / "audit.jsonl", Book(tmp_path)
    for at, (run, number, kind) in enumerate(
        [("a", 1, "tensors"), ("a", 1, "tensors"), ("b", 1, "masked vector"), ("b", 1, "facts"), ("a", 2, "tensors")]
    ):
        line(path, "sent", float(at), run=run, round=number, kind=kind, bytes=1)
    book.look()
    assert (book.rounds_done, book.runs["a"].rounds, book.runs["b"].rounds) == (3, 2, 1)


def test_a_line_that_is_none_hides_no_other(tmp_path):
    path, book = tmp_path / "audit.jsonl", Book(tmp_path)
    path.write_bytes(b'{"event":"sent"}\n{"event":"sent","facts":{"kind":1},"time":"x"}\nx"event":"sent"\n')
    line(path, "sent", 3.0, kind="facts", bytes=20)
    book.look()
    assert book.messages == 1


def test_a_long_log_takes_no_more_memory_than_a_short_one(tmp_path):
    path, book = tmp_path / "audit.jsonl", Book(tmp_path)
    row = '{"event":"sent","facts":{"bytes":1,"kind":"facts","round":1,"run":"run-%d"},"time":1.0}\n'
    path.write_text("".join(row % n for n in range(2000)))
    book.look()
    assert (book.messages, len(book.latest), len(book.runs)) == (2000, MOST_SENT, MOST_RUNS)
    assert book.latest[-1]["number"] == 2000


def test_a_look_writes_nothing(site):
    looks = looker(site)
    open_ledger(site).set_budget("all", 8.0, 1e-5)
    looks.sections()

    def files() -> dict[Path, tuple[int, int]]:
        listed = [path for path in site.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in listed}

    before = files()
    looks.sections()
    assert files() == before


# The stream


@contextmanager
def served(folder: Path, **change: Any) -> Iterator[tuple[uvicorn.Server, int, Feed]]:
    """The page on a real port, as `serve_loopback` sets it up."""
    feed = Feed(looker(folder).sections, look_s=0.05, **change)
    config = uvicorn.Config(
        application(looker(folder), feed), host="127.0.0.1", port=0, http=Heads, loop="asyncio", log_level="error",
        timeout_graceful_shutdown=END_S,
    )  # fmt: skip
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    try:
        yield server, listening.getsockname()[1], feed
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def listener(port: int) -> Iterator[http.client.HTTPResponse]:
    """A stream, as soon as its answer has begun."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as client:
        client.request("GET", "/events")
        answer = client.getresponse()
        yield answer
        answer.close()


def hear(stream: http.client.HTTPResponse, until: str) -> str:
    """All up to a line with these words."""
    text = line = ""
    while until not in line:
        line = stream.readline().decode()
        assert line, f"ended without {until!r}: {text}"
        text += line
    return text


def eventually(done: Any) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_changes_in_the_log_is_heard(site):
    with served(site) as (_, port, _), listener(port) as stream:
        assert stream.getheader("content-type") == "text/event-stream; charset=utf-8"
        told = hear(stream, '"name":"sent"') + hear(stream, "event: state")
        assert {json.loads(data)["name"] for data in re.findall(r"data: (.*\"html\".*)", told)} == set(SECTIONS)
        line(site / "audit.jsonl", "order", 50.0, run="toy-2", round=2, kind="train", study=sha256(TOY))
        assert "toy-2: round 2 of 2" in hear(stream, '"name":"now"')


def test_streams_that_are_left_take_neither_place_nor_thread_and_there_are_not_many(site):
    with served(site) as (_, port, feed):
        with listener(port) as stream:
            hear(stream, '"name":"sent"')
        eventually(lambda: feed.listeners == 0)
        before = threading.active_count()
        for _ in range(3):
            with ExitStack() as opened:
                for _ in range(MOST_LISTENERS):
                    hear(opened.enter_context(listener(port)), "retry")
                assert feed.listeners == MOST_LISTENERS
                with listener(port) as late:
                    assert (late.status, late.getheader("retry-after")) == (503, "30")
            eventually(lambda: feed.listeners == 0)
        assert threading.active_count() <= before


def test_an_open_stream_does_not_keep_the_server_from_ending(site):
    with served(site) as (server, port, _), listener(port) as stream:
        hear(stream, '"name":"sent"')
        began = time.monotonic()
        server.should_exit = True
        while stream.readline():
            pass
        assert time.monotonic() - began < END_S + 5


def test_a_site_that_cannot_be_read_is_told_to_who_listens(site):
    with served(site) as (_, port, _), listener(port) as stream:
        hear(stream, '"name":"sent"')
        (site / "site.toml").unlink()
        assert "fedclient join" in hear(stream, "is missing")


def test_the_site_file_may_change_while_the_page_is_open(site):
    file = SiteFile("north", "h:1", "F", Data("/d"), policy=replace(Policy(), most_rounds=7))
    looks = looker(site)
    assert "at most 1000 rounds" in looks.sections()["policy"]
    (site / "site.toml").write_text(site_toml(file))
    assert "at most 7 rounds" in looks.sections()["policy"]
