"""What the coordinator remembers of sites, their certificates, invites and runs: one SQLite file, `state.db`.

Flower's ids are unsigned 64-bit numbers, larger than SQLite's integers, and are kept as text.
"""

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from shared_models.database import check, create, reading, writing
from shared_models.errors import EnrolmentFailed, StateInvalid
from shared_models.identity import check_site_name

SiteState = Literal["invited", "active", "revoked"]
RunState = Literal["queued", "running", "paused", "finished", "failed", "stopped"]
ACTIVE: tuple[RunState, ...] = ("queued", "running")
UNFINISHED: tuple[RunState, ...] = ("queued", "running", "paused", "failed", "stopped")
Ended = Literal["", "replaced", "revoked"]

SCHEMA_VERSION = 2
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
    seen_at REAL,
    revoked_at REAL,
    revoked_reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE certificates (
    serial TEXT PRIMARY KEY,
    site TEXT NOT NULL REFERENCES sites (name),
    pem TEXT NOT NULL,
    issued_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    used_at REAL,
    ended TEXT NOT NULL DEFAULT '' CHECK (ended IN {get_args(Ended)}),
    ended_at REAL
) STRICT;
CREATE TABLE retired_nodes (flower_node_id TEXT PRIMARY KEY) STRICT;
CREATE TABLE rosters (epoch INTEGER PRIMARY KEY, content BLOB NOT NULL) STRICT;
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
        certificate_serial: hexadecimal, of its newest certificate; the fingerprint is of the same.
        joined_at: seconds since the epoch.
        flower_node_id: Flower's number for the node, known from its first activation.
        seen_at: when the gateway last heard of it, to about ten seconds; since the epoch.
        revoked_at, revoked_reason: when and why it was shut out; cleared when it joins again.
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
    revoked_at: float | None = None
    revoked_reason: str = ""


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """A row of `certificates`; times are seconds since the epoch.

    Attributes:
        used_at: when the gateway first saw it.
        ended, ended_at: why and when it stopped to count before it expires.
    """

    serial: str
    site: str
    pem: str
    issued_at: float
    expires_at: float
    used_at: float | None = None
    ended: Ended = ""
    ended_at: float | None = None


# Signs the next epoch of the roster: all sites as they stand now, and the last signed epoch, None before the first.
Seal = Callable[[Sequence[Site], bytes | None], bytes]


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
    with reading(path) as db:
        return [_site(row) for row in db.execute("SELECT * FROM sites ORDER BY name")]


def find_site(path: Path, name: str) -> Site | None:
    with reading(path) as db:
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
    with reading(path) as db:
        return [InviteRow(*row) for row in db.execute("SELECT * FROM invites WHERE site = ?", (site,))]


def redeem_invite(path: Path, invite: InviteRow, site: Site, certificate: CertificateRow, seal: Seal) -> None:
    """Marks `invite` as used and stores `site`, its first certificate and a new epoch: all of it or nothing.

    Earlier certificates of the site end, and its earlier node is to be unregistered.

    Raises:
        EnrolmentFailed: if the invite was used or replaced meanwhile.
    """
    node_id = None if site.flower_node_id is None else str(site.flower_node_id)
    with writing(path) as db:
        used = db.execute(
            "UPDATE invites SET used_at = ? WHERE token = ? AND used_at IS NULL", (site.joined_at, invite.token_sha256)
        )
        if used.rowcount != 1:
            raise EnrolmentFailed(f"invite of {site.name!r}: was used a moment ago. Ask the coordinator for a new one.")
        _retire_node(db, site.name)
        db.execute("DELETE FROM retired_nodes WHERE flower_node_id = ?", (node_id,))
        _end_certificates(db, site.name, "replaced", certificate.issued_at)
        db.execute(
            "UPDATE sites SET state = ?, node_public_key = ?, identity_public_key = ?, certificate_fingerprint = ?,"
            " certificate_serial = ?, joined_at = ?, flower_node_id = ?, revoked_at = NULL, revoked_reason = ''"
            " WHERE name = ?",
            (
                site.state,
                site.node_public_key,
                site.identity_public_key,
                site.certificate_fingerprint,
                site.certificate_serial,
                site.joined_at,
                node_id,
                site.name,
            ),
        )
        _add_certificate(db, certificate)
        _add_epoch(db, seal)


def revoke_site(path: Path, name: str, at_s: float, reason: str, seal: Seal) -> None:
    """Shuts a site out until it is invited and joins again; raises StateInvalid for a name that is not known.

    One that is shut out already keeps the time and the reason of the first time.
    """
    with writing(path) as db:
        row = db.execute("SELECT state FROM sites WHERE name = ?", (name,)).fetchone()
        if row is None:
            known = ", ".join(row[0] for row in db.execute("SELECT name FROM sites ORDER BY name")) or "none"
            raise StateInvalid(f"site {name!r}: is not of this federation. Known: {known}.")
        db.execute("DELETE FROM invites WHERE site = ? AND used_at IS NULL", (name,))
        if row[0] == "revoked":
            return
        db.execute(
            "UPDATE sites SET state = 'revoked', revoked_at = ?, revoked_reason = ? WHERE name = ?",
            (at_s, reason, name),
        )
        _end_certificates(db, name, "revoked", at_s)
        _retire_node(db, name)
        db.execute("UPDATE sites SET flower_node_id = NULL WHERE name = ?", (name,))
        _add_epoch(db, seal)


def _end_certificates(db: sqlite3.Connection, site: str, why: Ended, at_s: float) -> None:
    db.execute("UPDATE certificates SET ended = ?, ended_at = ? WHERE site = ? AND ended = ''", (why, at_s, site))


def _retire_node(db: sqlite3.Connection, site: str) -> None:
    db.execute(
        "INSERT OR IGNORE INTO retired_nodes SELECT flower_node_id FROM sites"
        " WHERE name = ? AND flower_node_id IS NOT NULL",
        (site,),
    )


def retired_nodes(path: Path) -> list[int]:
    """Flower's numbers of nodes that are to be unregistered at the SuperLink."""
    with reading(path) as db:
        return [int(row[0]) for row in db.execute("SELECT flower_node_id FROM retired_nodes ORDER BY 1")]


def forget_node(path: Path, flower_node_id: int) -> None:
    """Notes that a retired node is unregistered."""
    with writing(path) as db:
        db.execute("DELETE FROM retired_nodes WHERE flower_node_id = ?", (str(flower_node_id),))


# Certificates and the roster


def renew_certificate(
    path: Path, certificate: CertificateRow, fingerprint: str, seal: Seal, signed_by: str, identity: str | None
) -> None:
    """Stores a further certificate of an active site, the newest from now on, and a new epoch.

    Args:
        signed_by: the site's public key that has signed for it, hexadecimal.
        identity: public key that takes the place of the site's; None keeps it.

    Raises:
        EnrolmentFailed: the site was revoked meanwhile, or has joined anew with other keys.
    """
    with writing(path) as db:
        renewed = db.execute(
            "UPDATE sites SET certificate_serial = ?, certificate_fingerprint = ?,"
            " identity_public_key = COALESCE(?, identity_public_key)"
            " WHERE name = ? AND state = 'active' AND identity_public_key = ?",
            (certificate.serial, fingerprint, identity, certificate.site, signed_by),
        )
        if renewed.rowcount != 1:
            raise EnrolmentFailed(f"site {certificate.site!r}: is not active in this federation with these keys.")
        _add_certificate(db, certificate)
        _add_epoch(db, seal)


def used_certificate(path: Path, serial: str, now_s: float) -> None:
    """Notes when a certificate was first seen."""
    with writing(path) as db:
        db.execute("UPDATE certificates SET used_at = ? WHERE serial = ? AND used_at IS NULL", (now_s, serial))


def list_certificates(path: Path, site: str) -> list[CertificateRow]:
    """All certificates that a site has ever had, in the order of their signing, whatever the clock said then."""
    with reading(path) as db:
        rows = db.execute("SELECT * FROM certificates WHERE site = ? ORDER BY rowid", (site,))
        return [CertificateRow(*row) for row in rows]


def list_rosters(path: Path, since: int, most: int) -> tuple[int, list[bytes]]:
    """The newest epoch (0 before the first), and at most `most` signed epochs from `since` on."""
    with reading(path) as db:
        newest = db.execute("SELECT COALESCE(MAX(epoch), 0) FROM rosters").fetchone()[0]
        rows = db.execute("SELECT content FROM rosters WHERE epoch >= ? ORDER BY epoch LIMIT ?", (since, most))
        return int(newest), [bytes(row[0]) for row in rows]


def sign_rosters_anew(path: Path, again: Callable[[bytes], bytes]) -> None:
    """Puts `again` of every signed epoch in its place: the same rosters, signed with another key."""
    with writing(path) as db:
        rows = db.execute("SELECT epoch, content FROM rosters").fetchall()
        db.executemany("UPDATE rosters SET content = ? WHERE epoch = ?", [(again(bytes(c)), e) for e, c in rows])


def _add_certificate(db: sqlite3.Connection, row: CertificateRow) -> None:
    values = (row.serial, row.site, row.pem, row.issued_at, row.expires_at, row.used_at, row.ended, row.ended_at)
    db.execute("INSERT INTO certificates VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)


def _add_epoch(db: sqlite3.Connection, seal: Seal) -> None:
    """Inside the transaction of the change: a change without its epoch, or an epoch without its change, never shows."""
    last = db.execute("SELECT epoch, content FROM rosters ORDER BY epoch DESC LIMIT 1").fetchone()
    sites = [_site(row) for row in db.execute("SELECT * FROM sites ORDER BY name")]
    content = seal(sites, bytes(last[1]) if last else None)
    db.execute("INSERT INTO rosters VALUES (?, ?)", (last[0] + 1 if last else 1, content))


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
    path: Path,
    run_id: str,
    now_s: float,
    state: RunState,
    message: str = "",
    flower_run_id: int | None = None,
    among: Sequence[RunState] = get_args(RunState),
) -> Run:
    """Sets a run's state and message, and Flower's id if one is given, unless its state is none of `among` any more:
    a command and the dispatcher may come to it together.

    Returns:
        The run as it is then.

    Raises:
        StateInvalid: an unknown run.
    """
    with writing(path) as db:
        db.execute(
            "UPDATE runs SET state = ?, message = ?, updated_at = ?, flower_run_id = COALESCE(?, flower_run_id)"
            " WHERE id = ? AND state IN (SELECT value FROM json_each(?))",
            (state, message, now_s, None if flower_run_id is None else str(flower_run_id), run_id, json.dumps(among)),
        )
        row = db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone()
    if row is None:
        raise StateInvalid(f"run {run_id!r}: is not known here. `fedserver status` lists the runs.")
    return _run(row)


def find_run(path: Path, run_id: str) -> Run | None:
    with reading(path) as db:
        row = db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone()
        return _run(row) if row else None


def list_runs(path: Path) -> list[Run]:
    """All runs, the oldest first."""
    with reading(path) as db:
        return [_run(row) for row in db.execute("SELECT * FROM runs ORDER BY created_at, id")]


def _site(row: tuple[str, SiteState, str, str, str, str, float, str | None, float | None, float | None, str]) -> Site:
    return Site(*row[:7], None if row[7] is None else int(row[7]), *row[8:])


def _run(row: tuple[str, str, str, RunState, str | None, float, float, str]) -> Run:
    return Run(*row[:4], None if row[4] is None else int(row[4]), *row[5:])
