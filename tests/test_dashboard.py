"""The dashboard: who gets in, what leaves it, how changes travel, and that words of others stay words."""

import asyncio
import hashlib
import html
import http.client
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

import fedserver.cli
from fedserver.checkpoint import RunFolder
from fedserver.dashboard.login import MOST_SESSIONS, SESSION_S, Login, login, token_path
from fedserver.dashboard.look import looker, palette
from fedserver.dashboard.web import FILES, STATIC, application, dashboard_app
from shared_models.database import writing
from shared_models.errors import StateInvalid
from shared_models.files import read_json, write_json
from shared_models.heads import Heads
from shared_models.live import feed as feeds
from shared_models.live import pages as live
from shared_models.live.feed import Feed, Stream
from shared_models.live.pages import ticked
from tests.asking import Browser
from tests.test_submit import STUDY
from tests.watched import LUNGS, SITES, Watched, queued, watched

HERE = "http://127.0.0.1:9472"
HOSTILE = "`<script>alert(1)</script>`\"'><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def here() -> Iterator[Watched]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, watched(Path(folder)) as made:
        made.ended("first", replace(LUNGS, rounds=replace(LUNGS.rounds, count=3)))
        made.online |= {SITES[0]}
        made.begin()
        queued(made.federation, STUDY, "second", "third")
        while "counted" not in json.dumps(progress(made)):
            made.seen(SITES[0])
        yield made


def progress(here: Watched) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        return dict(read_json(here.federation.runs / "now/progress.json"))
    return {}


@pytest.fixture
def visitor(here: Watched) -> Browser:
    return Browser(dashboard_app(here.folder), HERE)


@pytest.fixture
def member(here: Watched, visitor: Browser) -> Browser:
    visitor.post("/login", data={"token": token_path(here.folder).read_text()})
    return visitor


# Who gets in


@pytest.mark.parametrize("path", ["/", "/runs/first", "/runs/none"])
def test_a_stranger_is_sent_to_the_login_and_learns_nothing(visitor, path):
    answer = visitor.get(path)
    assert (answer.status_code, answer.headers["location"], answer.text) == (303, "/login", "")


def test_a_stranger_hears_no_events(visitor):
    assert visitor.get("/events").status_code == 401


def test_the_login_shows_neither_token_nor_anything_of_a_site(here, visitor):
    text = visitor.get("/login").text
    assert token_path(here.folder).read_text() not in text
    assert str(token_path(here.folder)) in text
    assert not any(site in text for site in SITES)


def test_the_token_opens_a_session_that_scripts_and_other_sites_cannot_use(here, visitor):
    token = token_path(here.folder).read_text()
    answer = visitor.post("/login", data={"token": f" {token}\n"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert token not in cookie
    assert visitor.get("/").status_code == 200
    assert visitor.get("/login").headers["location"] == "/"


@pytest.mark.parametrize("body", [b"token=wrong", b"", b"token=", b"token=%ff%00", b"other=x"])
def test_what_is_not_the_token_opens_nothing(visitor, monkeypatch, body):
    monkeypatch.setattr("fedserver.dashboard.web.WRONG_S", 0.0)
    answer = visitor.post("/login", content=body)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert "That is not the token" in answer.text
    assert visitor.get("/").status_code == 303


def test_a_body_without_end_is_not_read_to_its_end(visitor):
    assert visitor.post("/login", content=b"token=" + b"x" * 5000).status_code == 413


def test_a_body_that_stalls_is_not_waited_for(visitor, monkeypatch):
    monkeypatch.setattr("fedserver.dashboard.web.BODY_S", 0.05)

    async def stalling() -> AsyncIterator[bytes]:
        yield b"token="
        await asyncio.sleep(20)

    answer = visitor.post("/login", content=stalling())
    assert (answer.status_code, answer.headers["connection"]) == (408, "close")


def test_the_token_counts_in_the_form_alone(here, visitor):
    token = token_path(here.folder).read_text()
    cookie = login(here.folder).name
    for headers in ({"authorization": f"Bearer {token}"}, {"cookie": f"{cookie}={token}"}):
        assert visitor.get(f"/?token={token}", headers).status_code == 303


def test_who_signs_out_is_out(member):
    kept = "; ".join(f"{cookie.name}={cookie.value}" for cookie in member.cookies.jar)
    assert member.get("/", headers={"cookie": kept}).status_code == 200
    assert member.post("/logout").headers["location"] == "/login"
    assert len(member.cookies.jar) == 0
    assert member.get("/", headers={"cookie": kept}).status_code == 303


def test_a_session_lasts_twelve_hours_and_there_are_not_many():
    now = [0.0]
    sessions = Login("t" * 43, "name", lambda: now[0])
    first = sessions.begin("t" * 43)
    now[0] = SESSION_S - 1
    assert sessions.knows(first)
    now[0] = SESSION_S
    assert not sessions.knows(first)
    opened = [sessions.begin("t" * 43) for _ in range(MOST_SESSIONS + 1)]
    assert not sessions.knows(opened[0]), "the oldest has gone"
    assert all(sessions.knows(each) for each in opened[1:])
    assert "t" * 43 not in repr(sessions)


def test_the_token_is_the_owners_alone(here):
    path = token_path(here.folder)
    login(here.folder)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(StateInvalid, match="others may read it"):
        login(here.folder)
    path.chmod(0o600)


# What it answers to, and what it lets a browser do


@pytest.mark.parametrize("path", ["/", "/login", "/events", "/static/dashboard.js", "/runs/first"])
def test_another_name_for_this_machine_is_refused_everywhere(member, path):
    assert member.get(path, headers={"host": "evil.example:9472"}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site", "origin": HERE}, {"origin": "http://evil.example"},
     {"origin": "null"}],
)  # fmt: skip
def test_a_page_of_another_site_can_post_nothing(here, visitor, headers):
    token = token_path(here.folder).read_text()
    assert visitor.post("/login", data={"token": token}, headers=headers).status_code == 403
    assert visitor.post("/logout", headers=headers).status_code == 403


@pytest.mark.parametrize("headers", [{"sec-fetch-site": "same-origin", "origin": "null"}, {"origin": HERE}, {}])
def test_its_own_form_can_post_the_token(here, visitor, headers):
    token = token_path(here.folder).read_text()
    assert visitor.post("/login", data={"token": token}, headers=headers).status_code == 303


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/"), ("PUT", "/login"), ("DELETE", "/runs/first"), ("POST", "/events")]
)
def test_nothing_can_be_changed(member, method, path):
    assert member.request(method, path).status_code == 405


@pytest.mark.parametrize("path", ["/", "/login", "/static/dashboard.css", "/static/none", "/events"])
def test_every_answer_forbids_what_is_not_its_own(visitor, path):
    policy = visitor.get(path).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("path", ["/", "/runs/first"])
def test_a_page_has_no_script_or_style_in_it_and_names_nobody_else(member, path):
    text = member.get(path).text
    assert re.findall(r"<script(?![^>]*src=\"/static/)", text) == []
    assert re.findall(r"\sstyle=|\son\w+=|<style", text) == []
    assert all(link.startswith(("/", "#")) for link in re.findall(r"(?:src|href|action)=\"([^\"]*)\"", text))


def test_only_listed_files_are_served(visitor):
    for name in ("../web.py", "%2e%2e/web.py", "page.html"):
        assert visitor.get(f"/static/{name}").status_code == 404
    for name in (*live.SHARED, *FILES, "palette.css"):
        assert visitor.get(f"/static/{name}").status_code == 200
    assert "MIT License" in visitor.get("/static/uPlot.LICENSE").text


@pytest.mark.parametrize(
    ("name", "digest"),
    [("uPlot.iife.min.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
     ("uPlot.min.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04")],
)  # fmt: skip
def test_the_vendored_library_is_that_of_npm(name, digest):
    """Of uplot 1.6.32, whose archive has the integrity sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXI..."""
    assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == digest


def test_its_own_scripts_and_styles_name_nobody_else():
    for path in (*(live.STATIC / name for name in live.SHARED), *(STATIC / name for name in FILES[:3])):
        assert "://" not in path.read_text()
    assert "://" not in palette()


# What it tells


def test_the_page_tells_of_the_round_whom_it_waits_for_and_of_all_else(member):
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", member.get("/").text)).split())
    for words in (
        "Round in progress now ▶ training round 1 of 8",
        "Answered 1; 2 needed",
        "Waits for north-hospital last heard of 42 s ago",
        "waits for its turn, 1. in the queue",
        "waits for its turn, 2. in the queue",
        "old-partner ✕ revoked",
        "west-hospital ○ invited",
        "lines are whole, in order and signed",
        "✓ reply counted east-university now round 1",
        "None yet: fedserver release RUN makes one",
    ):
        assert words in text, words


def test_another_run_is_shown_where_it_is_asked_for(member):
    text = member.get("/runs/first").text
    assert "Run first" in text
    assert "Test Dice: lung" in text
    assert 'data-run="first"' in text
    assert member.get("/runs/none").status_code == 404
    assert member.get("/runs/..%2f..").status_code == 404


def test_words_of_sites_and_studies_are_text_wherever_they_stand(here):
    """What no real path lets in is put where it would stand."""
    told = here.federation.runs / "third/progress.json"
    hostile = {"state": HOSTILE, "reason": HOSTILE, "attempt": 1, "since": 1.0}
    with writing(here.federation.state) as db:
        db.execute("INSERT INTO sites (name, state) VALUES (?, 'invited')", (HOSTILE,))
        db.execute("UPDATE sites SET revoked_reason = ? WHERE name = 'old-partner'", (HOSTILE,))
        db.execute("UPDATE runs SET message = ?, study_name = ? WHERE id = 'second'", (HOSTILE, HOSTILE))
        db.execute("UPDATE runs SET state = 'running' WHERE id = 'third'")
    first = here.federation.runs / "first/metrics.jsonl"
    lines = first.read_bytes()
    first.write_bytes(lines.replace(b"south-clinic", json.dumps(HOSTILE)[1:-1].encode()))
    try:
        write_json(told, progress(here) | {"phase": HOSTILE, "sites": {HOSTILE: hostile}})
        made = looker(here.folder)
        sections = made.sections("first")
    finally:
        told.unlink()
        first.write_bytes(lines)
        with writing(here.federation.state) as db:
            db.execute("DELETE FROM sites WHERE name = ?", (HOSTILE,))
            db.execute("UPDATE runs SET message = '', study_name = 'tiny' WHERE id = 'second'")
            db.execute("UPDATE runs SET state = 'queued' WHERE id = 'third'")
    for name in ("now", "sites", "studies", "charts", "matrix", "cost"):
        assert "alert(1)" in sections[name], name
    assert "&lt;script&gt;alert(1)" in sections["sites"]
    for text in sections.values():
        assert "<script" not in text
        assert "<img" not in text
        charts = re.findall(r'data-chart="([^"]*)"', text)
        assert all(json.loads(html.unescape(chart))["rounds"] for chart in charts)


def test_a_command_in_words_is_shown_as_one_and_nothing_else_of_them_is_obeyed():
    assert ticked("a `fedserver resume x` <b>`<i>`") == (
        "a <code>fedserver resume x</code> &lt;b&gt;<code>&lt;i&gt;</code>"
    )


def test_a_damaged_run_hides_nothing_else(here):
    study = here.federation.runs / "second/study.json"
    kept = study.read_bytes()
    study.write_text("{")
    try:
        sections = looker(here.folder).sections("second")
    finally:
        study.write_bytes(kept)
    assert "study.json: is no JSON." in sections["run"]
    assert "Answered" in sections["now"]


def test_an_empty_federation_says_what_to_do_first(tmp_path):
    CliRunner().invoke(fedserver.cli.app, ["init", "--federation", str(tmp_path / "f"), "--address", "localhost:1"])
    text = "".join(looker(tmp_path / "f").sections(None).values())
    for words in ("No round is in progress", "fedserver invite SITE", "fedserver run STUDY", "No run yet"):
        assert words in text


# Events


def events(frames: list[bytes]) -> list[dict[str, str]]:
    """As a browser reads them (WHATWG HTML, section 9.2.6)."""
    read: list[dict[str, str]] = []
    for block in b"".join(frames).decode().split("\n\n")[:-1]:
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            fields[name] = f"{fields[name]}\n" if name in fields else ""
            fields[name] += value.removeprefix(" ")
        read.append(fields)
    return read


def names(frames: list[bytes]) -> list[str]:
    return [json.loads(each["data"])["name"] for each in events(frames) if each.get("event") == "section"]


class Changing:
    """A federation of two sections that a test changes."""

    def __init__(self) -> None:
        self.sections = {"a": "<p>a</p>", "b": "<p>b</p>"}

    def __call__(self, focus: str | None) -> dict[str, str]:
        if self.sections.get("a") is None:
            raise StateInvalid("state.db: is missing. Put it back.")
        return {**self.sections, "focus": str(focus)}


async def heard(feed: Feed, last_id: str = "", frames: int = 5, focus: str | None = None) -> list[bytes]:
    """The first so many frames of a stream."""
    taken: list[bytes] = []
    async with aclosing(feed.events(focus, last_id, lambda: True)) as stream:  # type: ignore[type-var]
        async for each in stream:
            taken.append(each)
            if len(taken) == frames:
                break
    return taken


def played(story: Any, **change: Any) -> Any:
    """Runs a story with a feed that looks often."""

    async def told() -> Any:
        changing = Changing()
        feed = Feed(changing, look_s=0.01, **change)
        looking = asyncio.create_task(feed.run())
        try:
            async with asyncio.timeout(20):
                return await story(feed, changing)
        finally:
            looking.cancel()

    return asyncio.run(told())


def test_a_listener_gets_every_section_and_then_an_id():
    async def story(feed: Feed, _: Changing) -> None:
        frames = await heard(feed, frames=6)
        assert frames[0] == b"retry: 3000\n\n"
        told = events(frames)
        assert sorted(names(frames)) == ["a", "b", "focus"]
        assert [each.get("id") for each in told if each.get("event") == "section"] == [None] * 3
        states = [each for each in told if each.get("event") == "state"]
        assert states[-1]["id"] == feed.mark()
        assert json.loads(states[-1]["data"])["trouble"] == ""

    played(story)


def test_a_page_that_nobody_has_looked_at_yet_tells_of_no_look():
    async def story(feed: Feed, _: Changing) -> None:
        stream = feed.events("lung-1", "", lambda: True)
        frames = [await anext(stream) for _ in range(5)]
        states = [json.loads(each["data"]) for each in events(frames) if each.get("event") == "state"]
        assert states
        assert all(state["looked"] > 0 for state in states), "not as of 1970"

    played(story)


def test_no_content_begins_a_field_of_its_own():
    content = "x\n\nevent: state\nid: 9\ndata: {}\r\rretry: 1"
    (told,) = events([feeds.frame("section", {"html": content})])
    assert json.loads(told["data"])["html"] == content
    assert set(told) == {"event", "data"}


def test_who_comes_back_gets_what_has_changed_meanwhile_and_no_more():
    async def story(feed: Feed, changing: Changing) -> None:
        await feed.fresh(None)
        mark = feed.mark()
        changing.sections["b"] = "<p>new</p>"
        await asyncio.sleep(0.02)
        await feed.fresh(None)
        frames = await heard(feed, mark, 3)
        assert names(frames) == ["b"]
        assert "<p>new</p>" in frames[1].decode()
        assert names(await heard(feed, feed.mark(), 2)) == []

    played(story)


@pytest.mark.parametrize(
    "last_id", ["", "other-7", "-", "x", "{boot}-99", "{boot}--1", "{boot}-1e3", "{boot}-" + "9" * 30]
)
def test_an_id_that_is_none_of_ours_gets_everything(last_id):
    async def story(feed: Feed, _: Changing) -> None:
        await feed.fresh(None)
        assert sorted(names(await heard(feed, last_id.format(boot=feed.boot), 4))) == ["a", "b", "focus"]

    played(story)


def test_a_change_is_heard_while_one_listens():
    async def story(feed: Feed, changing: Changing) -> None:
        await feed.fresh(None)
        listening = asyncio.create_task(heard(feed, feed.mark(), 4))
        await asyncio.sleep(0.05)
        changing.sections["a"] = "<p>changed</p>"
        frames = await listening
        assert names(frames) == ["a"]

    played(story)


def test_two_listeners_of_two_runs_hear_each_his_own():
    async def story(feed: Feed, _: Changing) -> None:
        one, two = await asyncio.gather(heard(feed, frames=6, focus="one"), heard(feed, frames=6, focus="two"))
        assert '"name":"focus","html":"one"' in b"".join(one).decode()
        assert '"name":"focus","html":"two"' in b"".join(two).decode()
        await feed.fresh(None)
        assert set(feed.pages) == {None}, "a run that nobody looks at is forgotten"

    played(story)


def test_a_quiet_stream_has_a_heartbeat_that_tells_when_was_looked_last():
    async def story(feed: Feed, _: Changing) -> None:
        await feed.fresh(None)
        beats = events(await heard(feed, feed.mark(), 4))[2:]
        assert [beat["event"] for beat in beats] == ["beat", "beat"]
        assert all("id" not in beat for beat in beats), "it is no change"
        told = [json.loads(beat["data"]) for beat in beats]
        assert all(0 <= each["now"] - each["looked"] < 1 for each in told)
        assert told[0]["now"] < told[1]["now"] <= time.time()

    played(story, beat_s=0.05)


def test_nobody_looks_while_nobody_listens():
    async def story(feed: Feed, _: Changing) -> None:
        looks: list[str | None] = []
        look = feed.look

        def noted(focus: str | None) -> Mapping[str, str]:
            looks.append(focus)
            return look(focus)

        feed.look = noted
        await asyncio.sleep(0.1)
        assert looks == []
        await heard(feed, frames=6)
        await asyncio.sleep(0.05)
        before = len(looks)
        await asyncio.sleep(0.1)
        assert len(looks) == before > 0

    played(story)


def test_a_look_that_fails_is_told_and_so_is_its_mending():
    async def story(feed: Feed, changing: Changing) -> None:
        await feed.fresh(None)
        kept = changing.sections.pop("a")
        changing.sections["a"] = None  # type: ignore[assignment]
        frames = await heard(feed, feed.mark(), 3)
        assert json.loads(events(frames)[-1]["data"])["trouble"] == "state.db: is missing. Put it back."
        changing.sections["a"] = kept
        frames = await heard(feed, feed.mark(), 3)
        assert json.loads(events(frames)[-1]["data"])["trouble"] == ""

    played(story)


def test_a_look_that_fails_for_one_run_is_no_trouble_of_another_and_is_not_ended_by_its_looks():
    def look(focus: str | None) -> dict[str, str]:
        if focus == "spoilt":
            raise StateInvalid("the run is spoilt")
        return {"a": str(time.monotonic())}

    async def story(feed: Feed, _: Changing) -> None:
        feed.look = look
        spoilt, sound = await asyncio.gather(heard(feed, frames=8, focus="spoilt"), heard(feed, frames=30))
        states = [json.loads(each["data"])["trouble"] for each in events(spoilt) if each.get("event") == "state"]
        first = states.index("the run is spoilt")
        assert set(states[first:]) == {"the run is spoilt"}
        assert b"spoilt" not in b"".join(sound)

    played(story)


def test_a_stream_ends_with_the_session():
    async def story(feed: Feed, _: Changing) -> None:
        allowed = [True]
        frames = []
        async for each in feed.events(None, "", lambda: allowed[0]):
            frames.append(each)
            allowed[0] = len(frames) < 5
        assert feed.listeners == 0

    played(story, beat_s=0.05)


async def sent(stream: Stream, send: Any, receive: Any) -> list[str]:
    cut: list[str] = []
    scope = {"type": "http", "extensions": {"connection": {"abort": lambda: cut.append("cut")}}}
    await stream(scope, receive, send)
    return cut


async def never() -> Any:
    await asyncio.Event().wait()


def test_a_listener_who_takes_nothing_is_cut():
    async def story(feed: Feed, _: Changing) -> None:
        taken: list[Any] = []

        async def send(message: Any) -> None:
            taken.append(message)
            if len(taken) > 3:
                await never()

        stream = Stream(feed.events(None, "", lambda: True), stall_s=0.05)
        assert await sent(stream, send, never) == ["cut"]
        assert feed.listeners == 0, "his place is free"

    played(story)


def test_on_a_real_connection_who_takes_nothing_is_hung_up_on(here):
    """What he has not taken would otherwise stay in memory for as long as he keeps the connection."""
    looks, sessions = looker(here.folder), login(here.folder)
    feed = Feed(lambda focus: {"a": "x" * 20_000_000}, stall_s=0.2)
    app = application(looks, sessions, feed)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http=Heads, loop="asyncio", log_level="warning")
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    cookie = f"{sessions.name}={sessions.begin(sessions.token)}"
    with closing(http.client.HTTPConnection("127.0.0.1", listening.getsockname()[1], timeout=30)) as client:
        client.request("GET", "/events", headers={"cookie": cookie})
        assert client.getresponse().status == 200
        waited = time.monotonic() + 20
        while not feed.listeners and time.monotonic() < waited:
            time.sleep(0.01)
        while feed.listeners and time.monotonic() < waited:
            time.sleep(0.01)
        assert feed.listeners == 0
        while server.server_state.connections and time.monotonic() < waited:
            time.sleep(0.01)
        assert not server.server_state.connections, "the connection is gone with what lay in it"
    server.should_exit = True
    thread.join(10)


def test_a_listener_who_has_left_frees_his_place():
    async def story(feed: Feed, _: Changing) -> None:
        async def send(_: Any) -> None:
            return None

        async def receive() -> Any:
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        await sent(Stream(feed.events(None, "", lambda: True), 5.0), send, receive)
        assert feed.listeners == 0

    played(story)


def test_one_listener_too_many_is_told_to_come_back(here):
    looks, sessions = looker(here.folder), login(here.folder)
    feed = Feed(looks.sections)
    client = Browser(application(looks, sessions, feed), HERE)
    client.post("/login", data={"token": sessions.token})
    feed.pages[None] = feeds.Page(listeners=feeds.MOST_LISTENERS)
    answer = client.get("/events")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")


@pytest.mark.parametrize("path", ["/", "/runs/first", "/events?run=first"])
def test_state_that_cannot_be_read_is_told_wherever_it_is_asked(here, path):
    looks, sessions = looker(here.folder), login(here.folder)
    gone = replace(looks, federation=replace(looks.federation, folder=here.folder / "gone"))
    client = Browser(application(gone, sessions), HERE)
    client.post("/login", data={"token": sessions.token})
    answer = client.get(path)
    assert (answer.status_code, "gone" in answer.text) == (503, True)


def test_events_of_a_run_that_is_not_there_are_refused(member):
    assert member.get("/events?run=none").status_code == 404


# The command


@pytest.mark.parametrize("terminal", [True, False])
def test_a_ready_link_is_told_to_a_terminal_and_no_token_to_a_log(here, monkeypatch, capsys, terminal):
    monkeypatch.setattr("shared_models.loopback.serve_loopback", lambda app, port: None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    fedserver.cli.app(["dashboard", "--federation", str(here.folder), "--port", "9472"], standalone_mode=False)
    told, token = capsys.readouterr().out, token_path(here.folder).read_text()
    assert (f"{HERE}/#token={token}" in told) is terminal
    assert (token in told) is terminal
    assert (str(token_path(here.folder)) in told.replace("\n", "")) is not terminal


def test_the_dashboard_of_no_federation_says_how_to_make_one(tmp_path):
    found = CliRunner().invoke(fedserver.cli.app, ["dashboard", "--federation", str(tmp_path)])
    assert found.exit_code == 1
    assert "fedserver init" in found.stderr


def test_a_look_writes_nothing_and_waits_for_no_writer(here):
    """A transaction is open meanwhile; no file of the federation but SQLite's own index of its log is touched."""
    looks = looker(here.folder)
    looks.sections("first")

    def files() -> dict[Path, tuple[int, int]]:
        listed = [path for path in here.folder.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
        kept = [path for path in listed if RunFolder(here.federation.runs / "now").path not in path.parents]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in kept}

    with writing(here.federation.state) as db:
        db.execute("UPDATE runs SET message = 'not yet' WHERE id = 'third'")
        before = files()
        text = looks.sections("first")["studies"]
        assert files() == before
        db.execute("UPDATE runs SET message = '' WHERE id = 'third'")
    assert "not yet" not in text
    assert LUNGS.name in text
