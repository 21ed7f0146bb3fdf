"""What the coordinator remembers of sites, invites and runs: one SQLite file, `state.db`.

Flower's ids are unsigned 64-bit numbers, larger than SQLite's integers, and are kept as text.
"""

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from shared_models.database import check, connected, create, writing
from shared_models.errors import EnrolmentFailed, StateInvalid
from shared_models.identity import check_site_name

SiteState = Literal["invited", "active", "revoked"]
RunState = Literal["queued", "running", "paused", "finished", "failed", "stopped"]

SCHEMA_VERSION = 1
_SCHEMA = f"""
CREATE TABLE sites (
    name TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN {get_args(SiteState)}),
    node_public_key TEXT,
    identity_public_key TEXT,
    certificate_fingerprint TEXT,
    certificate_serial TEXT,
    joined_at REAL,
    flower_node_id TEXT,
    seen_at REAL
) STRICT;
CREATE TABLE invites (
    token TEXT PRIMARY KEY,
    site TEXT NOT NULL REFERENCES sites (name),
    expires_at REAL NOT NULL,
    used_at REAL
) STRICT;
CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    study_name TEXT NOT NULL,
    study_sha256 TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN {get_args(RunState)}),
    flower_run_id TEXT,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    message TEXT NOT NULL
) STRICT;
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass(frozen=True, slots=True)
class Site:
    """A row of `sites`; what a site has only once it has joined is None before.

    Attributes:
        node_public_key: one line in OpenSSH form.
        identity_public_key: 32 bytes of Ed25519, hexadecimal.
        certificate_serial: hexadecimal; the one certificate of this site that the gateway lets in.
        joined_at: seconds since the epoch.
        flower_node_id: Flower's number for the node, known from its first activation.
        seen_at: when the gateway last heard of it, to about ten seconds; since the epoch.
    """

    name: str
    state: SiteState
    node_public_key: str | None = None
    identity_public_key: str | None = None
    certificate_fingerprint: str | None = None
    certificate_serial: str | None = None
    joined_at: float | None = None
    flower_node_id: int | None = None
    seen_at: float | None = None


@dataclass(frozen=True, slots=True)
class InviteRow:
    """A row of `invites`; of the token itself only the SHA-256 is kept. Times are seconds since the epoch."""

    token_sha256: str
    site: str
    expires_at: float
    used_at: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """A row of `runs`; times are seconds since the epoch."""

    id: str
    study_name: str
    study_sha256: str
    state: RunState
    flower_run_id: int | None
    created_at: float
    updated_at: float
    message: str


def create_state(path: Path) -> None:
    """Makes an empty `state.db`; raises StateInvalid if there is one."""
    create(path, _SCHEMA)


def check_state(path: Path) -> None:
    """Raises StateInvalid unless `path` is a sound `state.db` of this version that only we can read."""
    check(path, SCHEMA_VERSION, "`fedserver init`")


# Sites and invites


def list_sites(path: Path) -> list[Site]:
    with connected(path) as db:
        return [_site(row) for row in db.execute("SELECT * FROM sites ORDER BY name")]


def find_site(path: Path, name: str) -> Site | None:
    with connected(path) as db:
        row = db.execute("SELECT * FROM sites WHERE name = ?", (name,)).fetchone()
        return _site(row) if row else None


def add_invite(path: Path, invite: InviteRow) -> None:
    """Stores an invite in the place of the site's unused ones; a site that was not known becomes `invited`."""
    check_site_name(invite.site)
    with writing(path) as db:
        db.execute("INSERT INTO sites (name, state) VALUES (?, 'invited') ON CONFLICT DO NOTHING", (invite.site,))
        db.execute("DELETE FROM invites WHERE site = ? AND used_at IS NULL", (invite.site,))
        row = (invite.token_sha256, invite.site, invite.expires_at, invite.used_at)
        db.execute("INSERT INTO invites VALUES (?, ?, ?, ?)", row)


def list_invites(path: Path, site: str) -> list[InviteRow]:
    with connected(path) as db:
        return [InviteRow(*row) for row in db.execute("SELECT * FROM invites WHERE site = ?", (site,))]


def redeem_invite(path: Path, invite: InviteRow, site: Site) -> None:
    """Marks `invite` as used and stores `site`, both or neither.

    Raises:
        EnrolmentFailed: if the invite was used or replaced meanwhile.
    """
    with writing(path) as db:
        used = db.execute(
            "UPDATE invites SET used_at = ? WHERE token = ? AND used_at IS NULL", (site.joined_at, invite.token_sha256)
        )
        if used.rowcount != 1:
            raise EnrolmentFailed(f"invite of {site.name!r}: was used a moment ago. Ask the coordinator for a new one.")
        db.execute(
            "UPDATE sites SET state = ?, node_public_key = ?, identity_public_key = ?, certificate_fingerprint = ?,"
            " certificate_serial = ?, joined_at = ?, flower_node_id = ? WHERE name = ?",
            (
                site.state,
                site.node_public_key,
                site.identity_public_key,
                site.certificate_fingerprint,
                site.certificate_serial,
                site.joined_at,
                None if site.flower_node_id is None else str(site.flower_node_id),
                site.name,
            ),
        )


def revoke_site(path: Path, name: str) -> None:
    """Shuts a site out until it is invited and joins again; raises StateInvalid for a name that is not known."""
    with writing(path) as db:
        if db.execute("UPDATE sites SET state = 'revoked' WHERE name = ?", (name,)).rowcount != 1:
            known = ", ".join(row[0] for row in db.execute("SELECT name FROM sites ORDER BY name")) or "none"
            raise StateInvalid(f"site {name!r}: is not of this federation. Known: {known}.")
        db.execute("DELETE FROM invites WHERE site = ? AND used_at IS NULL", (name,))


def remember_node(path: Path, name: str, flower_node_id: int) -> None:
    """Stores the number by which Flower knows a site's node."""
    with writing(path) as db:
        db.execute("UPDATE sites SET flower_node_id = ? WHERE name = ?", (str(flower_node_id), name))


def saw_site(path: Path, name: str, now_s: float) -> None:
    """Stores that a site was heard of."""
    with writing(path) as db:
        db.execute("UPDATE sites SET seen_at = ? WHERE name = ?", (now_s, name))


# Runs


def add_run(path: Path, run: Run) -> None:
    with writing(path) as db:
        flower_run_id = None if run.flower_run_id is None else str(run.flower_run_id)
        row = (run.id, run.study_name, run.study_sha256, run.state, flower_run_id)
        try:
            db.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, run.created_at, run.updated_at, run.message),
            )
        except sqlite3.IntegrityError as error:
            raise StateInvalid(f"run {run.id!r}: cannot be added ({error}). Choose another id.") from error


def change_run(
    path: Path, run_id: str, now_s: float, state: RunState, message: str = "", flower_run_id: int | None = None
) -> Run:
    """Sets a run's state and message, and Flower's id if one is given; raises StateInvalid for an unknown run."""
    with writing(path) as db:
        db.execute(
            "UPDATE runs SET state = ?, message = ?, updated_at = ?, flower_run_id = COALESCE(?, flower_run_id)"
            " WHERE id = ?",
            (state, message, now_s, None if flower_run_id is None else str(flower_run_id), run_id),
        )
        row = db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone()
    if row is None:
        raise StateInvalid(f"run {run_id!r}: is not known here. `fedserver status` lists the runs.")
    return _run(row)


def find_run(path: Path, run_id: str) -> Run | None:
    with connected(path) as db:
        row = db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone()
        return _run(row) if row else None


def list_runs(path: Path) -> list[Run]:
    """All runs, the oldest first."""
    with connected(path) as db:
        return [_run(row) for row in db.execute("SELECT * FROM runs ORDER BY created_at, id")]


def _site(row: tuple[str, SiteState, str, str, str, str, float, str | None, float | None]) -> Site:
    return Site(*row[:7], None if row[7] is None else int(row[7]), row[8])


def _run(row: tuple[str, str, str, RunState, str | None, float, float, str]) -> Run:
    return Run(*row[:4], None if row[4] is None else int(row[4]), *row[5:])
