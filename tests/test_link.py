"""The SuperLink: its secret, its database, and how one that does not answer is named."""

import asyncio
import sqlite3
from collections.abc import MutableMapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedserver.link import CONTROL_HEADER, Link, Receive, Scope, Send, check_database, guarded, require_file, run_states
from shared_models.errors import ProcessFailed, StateInvalid
from shared_models.identity import new_authority
from shared_models.supervise import kept_port

SECRET = b"s" * 32


def ask(path: str, secret: bytes | None = None) -> int:
    """Status of a request to a guarded application that answers 200 to all."""
    told: list[MutableMapping[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    async def send(event: MutableMapping[str, Any]) -> None:
        told.append(event)

    headers = [(CONTROL_HEADER.encode(), secret.hex().encode())] if secret else []

    async def call() -> None:
        await guarded(app, SECRET)({"type": "http", "path": path, "headers": headers}, receive, send)

    asyncio.run(call())
    return int(told[0]["status"])


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/control/list-nodes", "/v1/anything-new", "/"])
def test_control_calls_and_what_nobody_knows_need_the_secret(path: str) -> None:
    assert ask(path) == 401
    assert ask(path, b"x" * 32) == 401
    assert ask(path, SECRET) == 200


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/v1/runtime/acquire-task", "/health"])
def test_calls_that_flower_authenticates_itself_pass(path: str) -> None:
    assert ask(path) == 200


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/docs/oauth2-redirect"])
def test_documentation_is_not_served_even_with_the_secret(path: str) -> None:
    assert ask(path, SECRET) == 404


def test_a_damaged_database_is_refused_with_what_was_in_it(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    check_database(path)  # not there yet
    path.write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(StateInvalid, match=r"state\.db: is damaged .*backup"):
        check_database(path)


def test_a_damaged_page_is_told_in_one_line_so_that_a_supervisors_last_words_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE nodes (key TEXT)")
        database.executemany("INSERT INTO nodes VALUES (?)", [("x" * 500,)] * 100)
        database.commit()
    with path.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(StateInvalid) as refused:
        check_database(path)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"{path}: is damaged (")


def test_a_database_is_made_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.touch(0o644)
    check_database(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_superlink_that_would_keep_its_state_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="a state in memory is lost with the process"):
        require_file(tmp_path / "state.db")
    (tmp_path / "state.db").touch(0o644)
    require_file(tmp_path / "state.db")
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600


def test_a_superlink_that_does_not_answer_is_named_with_its_log(tmp_path: Path) -> None:
    port = kept_port(tmp_path / "port")
    link = Link(f"127.0.0.1:{port}", new_authority("Test").certificate, SECRET, patience_s=0.0)
    with pytest.raises(ProcessFailed, match=rf"127\.0\.0\.1:{port}: cannot be reached .*logs/link\.log"):
        run_states(link)


def test_a_link_shows_no_secret() -> None:
    assert "ssss" not in repr(Link("127.0.0.1:1", b"ca", SECRET))
