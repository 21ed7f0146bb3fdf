"""A federation in one file and back: a run goes on bit for bit, keys stay encrypted, what was touched is refused."""

import hashlib
import io
import json
import resource
import shutil
import sqlite3
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedserver.cli
from fedserver import backup as backups
from fedserver.backup import backup, last_backup_s, read_manifest, restore
from fedserver.checkpoint import RunFolder, read_state
from fedserver.cohort import Presence
from fedserver.courier import Inline
from fedserver.enrol import Federation, enrol, init_federation, invite, open_federation
from fedserver.lifecycle import revoke
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from fedserver.state import find_run, list_sites
from fedserver.submit import submit
from shared_models.dates import date_text
from shared_models.errors import StateInvalid
from shared_models.files import read_json, read_lines
from shared_models.identity import new_site_keys
from shared_models.invite import write_message
from shared_models.study import Evaluate, Model, Preprocess, Rounds, Study
from shared_models.weights import load
from simulations.engine import LocalGrid
from tests.test_enrol import request_for
from tests.toys import Clock, ToyLearner, nodes, toy_app

WORDS = "correct horse battery"
STUDY = Study(
    name="toy",
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    preprocess=Preprocess(size=(32, 32)),
    rounds=Rounds(count=3, quorum=2, deadline_s=300, gather_s=0),
    evaluate=Evaluate(every=0),
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """The cost of scrypt is the owner's wish, not the tests'."""
    monkeypatch.setattr("fedserver.passphrase.SCRYPT_N", 2**10)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    made = init_federation(tmp_path / "federation", "Test", "127.0.0.1:8443")
    invite(made, "north")
    return made


def digests(folder: Path) -> dict[str, str]:
    """What a folder holds besides what a backup leaves out."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in files}
    passing = ("logs/", "blobs/", "backup.json", "audit", "state.db")
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in named.items() if not n.startswith(passing)}


def test_what_comes_back_is_what_was_there(federation, tmp_path):
    submit(federation, STUDY, None, False)
    made = backup(federation, tmp_path / "b.tar", WORDS)
    assert (tmp_path / "b.tar").stat().st_mode & 0o777 == 0o600
    assert last_backup_s(federation.folder) == made.at_s
    restore(tmp_path / "b.tar", tmp_path / "again", WORDS)
    again = open_federation(tmp_path / "again")
    assert digests(again.folder) == digests(federation.folder)
    assert all(path.stat().st_mode & 0o077 == 0 for path in again.folder.rglob("*"))
    assert [site.name for site in list_sites(again.state)] == ["north"]
    found = find_run(again.state, "toy-1")
    assert found is not None
    assert found.state == "queued"
    happened = [line["event"] for line in read_lines(again.folder / "audit.jsonl")]
    assert happened == ["opened", "founded", "invited", "run-queued", "restored"]


def test_a_run_that_is_called_spool_is_in_the_backup_and_what_runs_have_spooled_is_not(federation, tmp_path):
    for name in ("spool/state.json", "toy-1/spool/update.safetensors"):
        (federation.folder / "runs" / name).parent.mkdir(parents=True)
        (federation.folder / "runs" / name).write_text("{}")
    backup(federation, tmp_path / "b.tar", WORDS)
    restore(tmp_path / "b.tar", tmp_path / "again", WORDS)
    found = [p.relative_to(tmp_path / "again").as_posix() for p in (tmp_path / "again" / "runs").rglob("*.*")]
    assert found == ["runs/spool/state.json"]


class Stopped(Exception):
    """The machine went away here."""


def played(run: RunFolder, until_round: int | None = None) -> RunFolder:
    """Carries a run on, to its end or until the machine goes away after a round."""

    def look() -> dict[str, str]:
        if until_round is not None and read_state(run).round >= until_round:
            raise Stopped
        return {}

    configs = dict(enumerate(nodes(("north", "south"), run.path).values(), start=1))
    here, clock = Presence({"north": 1, "south": 2}), Clock()
    grid = LocalGrid(toy_app(ToyLearner({"north": 0.25, "south": 1.5}, {"north": 7})), configs)
    setting = Setting(grid, run, lambda: here, Inline(), clock, clock.sleep, revoked=look)
    if until_round is None:
        carry_out(setting)
    else:
        with pytest.raises(Stopped):
            carry_out(setting)
    return run


def test_a_run_goes_on_from_a_restored_backup_to_the_weights_of_one_that_was_never_interrupted(federation, tmp_path):
    played(submit(federation, STUDY, "whole", False).folder)
    played(submit(federation, STUDY, "cut", True).folder, until_round=2)
    backup(federation, tmp_path / "b.tar", WORDS)
    shutil.rmtree(federation.folder)
    restore(tmp_path / "b.tar", tmp_path / "again", WORDS)
    again = open_federation(tmp_path / "again")
    going_on = submit(again, STUDY, "cut", False).folder
    assert (going_on.id, read_state(going_on).round) == ("cut", 2)
    ended = played(going_on)
    assert read_state(ended).round == 3
    one, two = load(RunFolder(again.runs / "whole").weights(3)), load(ended.weights(3))
    assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in two.items()}
    assert len(read_lines(ended.metrics)) == 3


def test_a_backup_that_is_made_while_everything_is_written_is_whole(federation, tmp_path):
    """A log that grows, and a database with a transaction every millisecond."""
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            invite(federation, f"site-{number}")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(3):
            backup(federation, tmp_path / f"{number}.tar", WORDS)
    finally:
        stop.set()
        thread.join()
    for number in range(3):
        restore(tmp_path / f"{number}.tar", tmp_path / f"again-{number}", WORDS)
        again = open_federation(tmp_path / f"again-{number}")
        assert len(read_lines(again.folder / "audit.jsonl")) >= 3


def test_a_round_that_ends_while_a_backup_begins_is_in_it_with_its_weights(federation, tmp_path, monkeypatch):
    run = submit(federation, STUDY, "cut", False).folder
    copy = backups._put

    def put(archive: tarfile.TarFile, folder: Path, name: str, beside: Path) -> object:
        if name == "runs/cut/state.json" and read_state(run).round == 0:
            played(run, until_round=1)
        return copy(archive, folder, name, beside)

    monkeypatch.setattr(backups, "_put", put)
    backup(federation, tmp_path / "b.tar", WORDS)
    restore(tmp_path / "b.tar", tmp_path / "again", WORDS)
    assert read_state(RunFolder(tmp_path / "again/runs/cut")).round == 1


def test_a_run_that_begins_while_a_backup_is_made_is_in_it_nowhere(federation, tmp_path, monkeypatch):
    submit(federation, STUDY, "first", False)
    copy, seen = backups._put, list[str]()

    def put(archive: tarfile.TarFile, folder: Path, name: str, beside: Path) -> object:
        if name == "runs/first/study.json":
            played(submit(federation, STUDY, "second", True).folder, until_round=1)
        seen.append(name)
        return copy(archive, folder, name, beside)

    monkeypatch.setattr(backups, "_put", put)
    backup(federation, tmp_path / "b.tar", WORDS)
    restore(tmp_path / "b.tar", tmp_path / "again", WORDS)
    again = open_federation(tmp_path / "again")
    assert (federation.runs / "second/round-0001.safetensors").exists()
    assert (again.runs / "first/round-0000.safetensors").exists()
    assert not (again.runs / "second").exists()
    assert find_run(again.state, "second") is None
    assert seen.count("state.db") == 1
    assert read_state(submit(again, STUDY, "second", False).folder).round == 0


def test_folders_that_come_and_go_end_no_backup(federation, tmp_path):
    stop, passing = threading.Event(), [federation.runs / "a/spool", federation.blobs / "in/north"]
    (federation.runs / "a").mkdir()

    def churn() -> None:
        while not stop.is_set():
            for folder in passing:
                folder.mkdir()
                (folder / "0.safetensors").write_bytes(b"x")
                shutil.rmtree(folder)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        made = [backup(federation, tmp_path / f"{number}.tar", None) for number in range(15)]
    finally:
        stop.set()
        thread.join()
    assert not [name for each in made for name in each.files if name.endswith(".safetensors")]
    assert all("state.db" in each.files for each in made)


def test_flowers_database_is_copied_with_what_stands_only_in_its_log(federation, tmp_path):
    database = sqlite3.connect(federation.superlink / "state.db")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("CREATE TABLE t (x)")
    database.execute("INSERT INTO t VALUES (7)")
    database.commit()  # and not checkpointed: it stands in state.db-wal
    backup(federation, tmp_path / "b.tar", WORDS)
    database.close()
    restore(tmp_path / "b.tar", tmp_path / "again", WORDS)
    with sqlite3.connect(tmp_path / "again/superlink/state.db") as again:
        assert again.execute("SELECT x FROM t").fetchall() == [(7,)]


def test_no_private_key_stands_readable_in_the_file(federation, tmp_path):
    backup(federation, tmp_path / "b.tar", WORDS)
    backup(federation, tmp_path / "without.tar", None)
    keys = [path.read_bytes() for path in (federation.ca_key, federation.signer, federation.server_certificate)]
    lines = {line for key in keys for line in key.partition(b"-----BEGIN CERTIFICATE")[0].splitlines()[1:-1]}
    secrets = {path.read_bytes() for path in federation.secrets.iterdir()}
    secrets |= {secret.hex().encode() for secret in secrets}
    for name in ("b.tar", "without.tar"):
        content = (tmp_path / name).read_bytes()
        assert not any(secret in content for secret in lines | secrets)
    assert read_manifest(tmp_path / "without.tar").secrets is False
    with pytest.raises(StateInvalid, match="was made without the private keys"):
        restore(tmp_path / "without.tar", tmp_path / "again", WORDS)
    assert not (tmp_path / "again").exists()


def test_a_wrong_passphrase_and_a_short_one_are_told(federation, tmp_path):
    with pytest.raises(StateInvalid, match="12 or more"):
        backup(federation, tmp_path / "b.tar", "short")
    backup(federation, tmp_path / "b.tar", WORDS)
    with pytest.raises(StateInvalid, match="is not the one that the keys were encrypted with"):
        restore(tmp_path / "b.tar", tmp_path / "again", WORDS + "!")
    with pytest.raises(StateInvalid, match="Give the passphrase"):
        restore(tmp_path / "b.tar", tmp_path / "again", None)
    assert not (tmp_path / "again").exists()


def repacked(source: Path, target: Path, change: Callable[[str, bytes], Iterator[tuple[str, bytes]]]) -> Path:
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for entry in old:
            content = old.extractfile(entry)
            assert content is not None
            for name, data in change(entry.name, content.read()):
                made = tarfile.TarInfo(name)
                made.size = len(data)
                new.addfile(made, io.BytesIO(data))
    return target


def edit(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    yield name, data.replace(b"Test", b"Tess") if name == "federation.toml" else data


def drop(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    if name != "audit.jsonl":
        yield name, data


def climb(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    if name == "manifest.json":
        yield "../outside", b"x"
    yield name, data


def relabel(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    yield name, data.replace(b'"federation":"Test"', b'"federation":"Tess"') if name == "manifest.json" else data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit, "federation.toml is not as it was backed up"),
        (drop, "audit.jsonl is missing"),
        (climb, "holds '../outside', which its manifest does not"),
        (relabel, "is not signed by the coordinator"),
    ],
)
def test_a_backup_that_was_touched_is_refused_and_leaves_nothing(federation, tmp_path, change, words):
    backup(federation, tmp_path / "b.tar", WORDS)
    other = repacked(tmp_path / "b.tar", tmp_path / "other.tar", change)
    with pytest.raises(StateInvalid, match=words):
        restore(other, tmp_path / "again", WORDS)
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "outside").exists()
    assert not list(tmp_path.glob(".again*"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
def test_a_backup_that_was_cut_is_refused(federation, tmp_path, share):
    backup(federation, tmp_path / "b.tar", WORDS)
    content = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: int(share * len(content))])
    with pytest.raises(StateInvalid):
        restore(tmp_path / "cut.tar", tmp_path / "again", WORDS)


def test_what_is_restored_says_whom_it_lets_in_as_sites_revoked_since_are_among_them(federation, tmp_path):
    (tmp_path / "words").write_text(f"{WORDS}\n")
    for site in ("north", "south"):
        request = write_message(request_for(invite(federation, site), new_site_keys()))
        assert enrol(federation, request, lambda *_: None).status == 200
    made = backup(federation, tmp_path / "b.tar", WORDS)
    revoke(federation, "north", "its keys were stolen")
    words = ["restore", str(tmp_path / "b.tar"), "--passphrase-file", str(tmp_path / "words"), "--federation"]
    done = CliRunner().invoke(fedserver.cli.app, [*words, str(tmp_path / "again")])
    assert done.exit_code == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert f"It lets in: north, south. Sites that were revoked or withdrawn after {date_text(made.at_s)} are" in told
    assert "`fedserver revoke` each before you serve it" in told
    assert [site.state for site in list_sites(tmp_path / "again/state.db")] == ["active", "active"]
    done = CliRunner().invoke(fedserver.cli.app, [*words, str(tmp_path / "third"), "--json"])
    assert json.loads(done.stdout)["let_in"] == ["north", "south"]


def test_nothing_is_overwritten_and_a_backup_never_lies_in_what_it_is_of(federation, tmp_path):
    (tmp_path / "b.tar").write_text("mine")
    with pytest.raises(StateInvalid, match="is there already"):
        backup(federation, tmp_path / "b.tar", WORDS)
    with pytest.raises(StateInvalid, match="lies in the folder"):
        backup(federation, federation.folder / "b.tar", WORDS)
    backup(federation, tmp_path / "c.tar", WORDS)
    with pytest.raises(StateInvalid, match="is not empty"):
        restore(tmp_path / "c.tar", federation.folder, WORDS)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As a disk that fills up: what would grow a file beyond `size` bytes fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "told"), [(40_000, "state.db: cannot be copied to "), (200_000, "b.tar: File too ")])
def test_a_disk_that_is_too_small_for_a_backup_is_told_and_holds_nothing_of_it(federation, tmp_path, size, told):
    (tmp_path / "words").write_text(f"{WORDS}\n")
    (tmp_path / "disk").mkdir()
    (federation.runs / "large").write_bytes(bytes(400_000))
    words = ["backup", str(tmp_path / "disk/b.tar"), "--passphrase-file", str(tmp_path / "words")]
    with no_file_above(size):
        done = CliRunner().invoke(fedserver.cli.app, [*words, "--federation", str(federation.folder)])
    assert (done.exit_code, told in done.stderr, str(tmp_path / "disk") in done.stderr) == (1, True, True), done.output
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_disk_that_is_too_small_for_what_is_restored_is_told_and_holds_nothing_of_it(federation, tmp_path):
    (tmp_path / "words").write_text(f"{WORDS}\n")
    (tmp_path / "disk").mkdir()
    (federation.runs / "large").write_bytes(bytes(400_000))
    backup(federation, tmp_path / "b.tar", WORDS)
    words = ["restore", str(tmp_path / "b.tar"), "--passphrase-file", str(tmp_path / "words")]
    with no_file_above(200_000):
        done = CliRunner().invoke(fedserver.cli.app, [*words, "--federation", str(tmp_path / "disk/again")])
    assert (done.exit_code, "runs/large: File too large" in done.stderr) == (1, True), done.output
    assert list((tmp_path / "disk").iterdir()) == []


def test_databases_are_copied_beside_the_backup_and_nowhere_else(federation, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    backup(federation, tmp_path / "b.tar", WORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "federation"]
    with pytest.raises(StateInvalid, match=r"is no folder\. Make it, or mount the disk"):
        backup(federation, tmp_path / "unmounted/b.tar", WORDS)


def test_the_commands_take_the_passphrase_from_a_file_and_never_from_the_command_line(federation, tmp_path):
    (tmp_path / "words").write_text(f"{WORDS}\n")
    here = ["--federation", str(federation.folder)]
    file = str(tmp_path / "b.tar")
    asked = CliRunner().invoke(fedserver.cli.app, ["backup", file, *here])
    assert asked.exit_code == 2
    assert "--passphrase-file" in asked.stderr
    words = ["--passphrase-file", str(tmp_path / "words")]
    done = CliRunner().invoke(fedserver.cli.app, ["backup", file, *words, *here])
    assert (done.exit_code, "without the passphrase they are lost" in done.stdout) == (0, True)
    again = ["--federation", str(tmp_path / "again")]
    done = CliRunner().invoke(fedserver.cli.app, ["restore", file, *words, *again])
    assert done.exit_code == 0, done.stderr
    assert "Compare the authority's words" in done.stdout
    assert read_json(federation.folder / "backup.json")["at"] > 0
