"""The coordinator's state file: invites, sites and runs, each change once, and damage named."""

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedserver.state import (
    CertificateRow,
    InviteRow,
    Run,
    Site,
    add_invite,
    add_run,
    change_run,
    check_state,
    create_state,
    find_run,
    find_site,
    forget_node,
    list_certificates,
    list_invites,
    list_rosters,
    list_runs,
    list_sites,
    redeem_invite,
    remember_node,
    retired_nodes,
    revoke_site,
)
from shared_models.errors import EnrolmentFailed, StateInvalid

NORTH = Site("north", "active", "ecdsa", "ab" * 32, "cd" * 32, "1f", 1000.0, None)
PAPER = CertificateRow("1f", "north", "pem", 1000.0, 5000.0)


def numbered(sites: Sequence[Site], last: bytes | None) -> bytes:
    """In the place of a signature: how many epochs there were before, and who is active."""
    before = 0 if last is None else int(last.split(b":")[0])
    return f"{before + 1}:{','.join(site.name for site in sites if site.state == 'active')}".encode()


LARGE = 2**64 - 1  # Flower's ids are unsigned


@pytest.fixture
def state(tmp_path: Path) -> Path:
    create_state(tmp_path / "state.db")
    return tmp_path / "state.db"


def invited(state: Path, token: str = "t1", site: str = "north") -> InviteRow:
    row = InviteRow(token, site, 2000.0, None)
    add_invite(state, row)
    return row


def a_run(run_id: str, at: float = 1.0) -> Run:
    return Run(run_id, "lung-ct", "ef" * 32, "queued", None, at, at, "")


def test_the_file_is_ours_alone_and_made_once(state: Path) -> None:
    check_state(state)
    assert state.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StateInvalid, match="is there already"):
        create_state(state)


def test_a_site_is_invited_joins_and_is_revoked(state: Path) -> None:
    row = invited(state)
    assert find_site(state, "north") == Site("north", "invited")
    redeem_invite(state, row, NORTH, PAPER, numbered)
    assert find_site(state, "north") == NORTH
    remember_node(state, "north", LARGE)
    revoke_site(state, "north", 2000.0, "test", numbered)
    found = find_site(state, "north")
    assert found is not None
    assert (found.state, found.flower_node_id) == ("revoked", None)
    assert [site.name for site in list_sites(state)] == ["north"]
    assert find_site(state, "south") is None


def test_a_new_invite_takes_the_place_of_unused_ones_only(state: Path) -> None:
    redeem_invite(state, invited(state, "t1"), NORTH, PAPER, numbered)
    invited(state, "t2")
    invited(state, "t3")
    assert [(row.token_sha256, row.used_at) for row in list_invites(state, "north")] == [("t1", 1000.0), ("t3", None)]
    assert find_site(state, "north") == NORTH, "an invite alone changes nothing for a site that has joined"


def test_revoking_a_site_takes_its_open_invite_back(state: Path) -> None:
    row = invited(state)
    revoke_site(state, "north", 2000.0, "test", numbered)
    with pytest.raises(EnrolmentFailed, match="used a moment ago"):
        redeem_invite(state, row, NORTH, PAPER, numbered)
    with pytest.raises(StateInvalid, match=r"Known: north\."):
        revoke_site(state, "nowhere", 2000.0, "test", numbered)


def test_of_many_who_redeem_one_invite_at_once_one_succeeds(state: Path) -> None:
    row = invited(state)
    outcomes: list[str] = []

    def redeem() -> None:
        try:
            redeem_invite(state, row, NORTH, PAPER, numbered)
            outcomes.append("in")
        except EnrolmentFailed:
            outcomes.append("out")

    threads = [threading.Thread(target=redeem) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in"] + ["out"] * 7


def test_a_site_name_that_is_a_path_is_refused(state: Path) -> None:
    with pytest.raises(EnrolmentFailed, match="site name"):
        invited(state, site="../north")


def test_runs_are_kept_with_their_latest_state(state: Path) -> None:
    add_run(state, a_run("r2", at=2.0))
    add_run(state, a_run("r1", at=1.0))
    change_run(state, "r1", 5.0, "running", flower_run_id=LARGE)
    changed = change_run(state, "r1", 6.0, "paused", "waits for north")
    assert changed == Run("r1", "lung-ct", "ef" * 32, "paused", LARGE, 1.0, 6.0, "waits for north")
    assert [run.id for run in list_runs(state)] == ["r1", "r2"]
    assert find_run(state, "r1") == changed
    assert find_run(state, "r9") is None


def test_a_run_is_added_once_and_an_unknown_one_is_not_changed(state: Path) -> None:
    add_run(state, a_run("r1"))
    with pytest.raises(StateInvalid, match="Choose another id"):
        add_run(state, a_run("r1"))
    with pytest.raises(StateInvalid, match="is not known here"):
        change_run(state, "r9", 1.0, "failed")


def test_a_missing_exposed_foreign_or_damaged_file_is_named(state: Path, tmp_path: Path) -> None:
    with pytest.raises(StateInvalid, match="is missing"):
        check_state(tmp_path / "none.db")
    with pytest.raises(StateInvalid, match=r"state\.db"):
        find_site(tmp_path / "none" / "state.db", "north")
    state.chmod(0o644)
    with pytest.raises(StateInvalid, match="chmod 600"):
        check_state(state)
    state.chmod(0o600)
    with sqlite3.connect(state) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StateInvalid, match="layout 99"):
        check_state(state)
    state.write_bytes(b"not a database, but as long as one would be" * 200)
    with pytest.raises(StateInvalid, match="not a database"):
        check_state(state)


def test_a_page_that_was_overwritten_is_found(state: Path) -> None:
    for k in range(4):
        add_run(state, replace(a_run(f"r{k}"), message="x" * 20_000))
    content = bytearray(state.read_bytes())
    content[8192:8300] = b"\xff" * 108
    state.write_bytes(content)
    with pytest.raises(StateInvalid, match=r"state\.db"):
        check_state(state)


def test_the_node_of_a_site_that_is_revoked_or_joins_anew_is_to_be_unregistered_once(state: Path) -> None:
    redeem_invite(state, invited(state), replace(NORTH, flower_node_id=LARGE), PAPER, numbered)
    again, paper = replace(NORTH, flower_node_id=LARGE + 1), replace(PAPER, serial="20", issued_at=1500.0)
    redeem_invite(state, invited(state, "t2"), again, paper, numbered)
    assert retired_nodes(state) == [LARGE]
    redeem_invite(state, invited(state, "t3"), again, replace(paper, serial="21"), numbered)
    assert retired_nodes(state) == [LARGE], "the same node goes on"
    revoke_site(state, "north", 2000.0, "why", numbered)
    revoke_site(state, "north", 3000.0, "another", numbered)
    assert retired_nodes(state) == [LARGE, LARGE + 1]
    forget_node(state, LARGE)
    assert retired_nodes(state) == [LARGE + 1]
    found = find_site(state, "north")
    assert found is not None
    assert (found.revoked_at, found.revoked_reason) == (2000.0, "why")
    ended = [(row.serial, row.ended, row.ended_at) for row in list_certificates(state, "north")]
    assert ended == [("1f", "replaced", 1500.0), ("20", "replaced", 1500.0), ("21", "revoked", 2000.0)]
    assert list_rosters(state, 1, 10) == (4, [b"1:north", b"2:north", b"3:north", b"4:"])


def test_a_change_whose_epoch_cannot_be_signed_is_not_made(state: Path) -> None:
    redeem_invite(state, invited(state), NORTH, PAPER, numbered)

    def broken(sites: Sequence[Site], last: bytes | None) -> bytes:
        raise StateInvalid("no key")

    with pytest.raises(StateInvalid, match="no key"):
        revoke_site(state, "north", 2000.0, "why", broken)
    found = find_site(state, "north")
    assert found is not None
    assert found.state == "active"
