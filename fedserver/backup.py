"""A federation folder in one file, and back: consistent while runs go on, every file with its digest, keys encrypted.

The file is a tar archive (0600). `manifest.json` comes last, names every file with its size and SHA-256, and is signed
by the coordinator. Databases are copied by SQLite's own backup. A run's state is copied before its weights, so that
it names only weights that are there; audit logs only grow. Private keys and secrets go into one AES-256-GCM part under
a key that scrypt makes of a passphrase, or not at all.

What is not in it: logs, locks, numbers of processes, and blobs, which are offered and asked for again.
"""

import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import Field

from fedserver.enrol import Federation, ca_fingerprint, open_federation, open_log, signer
from fedserver.passphrase import SALT_BYTES, check_passphrase, stretched
from shared_models.authority import read_files
from shared_models.errors import StateInvalid
from shared_models.files import (
    canonical_json,
    naming,
    private_folder,
    read_json,
    replacing,
    sync_folder,
    write_atomic,
    write_json,
)
from shared_models.identity import sign, stated
from shared_models.parse import STRICT, Sha256, parse_json, plain

VERSION = 1
MANIFEST, SECRETS = "manifest.json", "secrets.enc"
PURPOSE = "backup"
NOTE = "backup.json"  # in the folder: when the last backup was made
SECRET = ("ca/ca.key", "ca/issuing.", "ca/signer.", "tls/", "secrets/")
LEFT_OUT = ("blobs/", "logs/", "superlink/flower/", "superlink/port", "supervisor.lock", "status.json", NOTE)
DATABASES = ("state.db", "superlink/state.db")
FIRST = ("study.json", "state.json", "audit.head.json")  # of their folder: what follows may only be newer
NONCE_BYTES = 12
MOST_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Held:
    """A file of a backup, by its path in the folder."""

    __pydantic_config__ = STRICT
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds.

    Attributes:
        at_s: when it was begun, seconds since the epoch.
        secrets: whether it holds the private keys, encrypted.
        certificate: the coordinator's, of the key that has signed; PEM.
        signature: over all the rest, hexadecimal.
    """

    __pydantic_config__ = STRICT
    version: int
    federation: str
    authority: Sha256
    at_s: float
    secrets: bool
    files: dict[str, Held] = field(repr=False)
    certificate: str = field(default="", repr=False)
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]*$")] = field(default="", repr=False)

    @property
    def statement(self) -> bytes:
        return canonical_json({k: v for k, v in plain(self).items() if k not in ("signature", "certificate")})


def last_backup_s(folder: Path) -> float | None:
    """When the last backup of a folder was made; None before the first."""
    try:
        return float(read_json(folder / NOTE)["at"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


# Out


def backup(federation: Federation, file: Path, passphrase: str | None) -> Manifest:
    """Writes `file`, whole or not at all; a served federation goes on meanwhile.

    Args:
        passphrase: that the private keys are encrypted with; None leaves them out.

    Raises:
        StateInvalid: `file` is there already or lies in the folder or in none, the passphrase is too short, or a
            database cannot be copied.
        OSError: it cannot be written; it names `file`.
    """
    if passphrase is not None:
        check_passphrase(passphrase)
    if file.exists():
        raise StateInvalid(f"{file}: is there already. Choose another name; a backup replaces none.")
    if not file.parent.is_dir():
        raise StateInvalid(f"{file.parent}: is no folder. Make it, or mount the disk that it is on.")
    if file.resolve().is_relative_to(federation.folder.resolve()):
        raise StateInvalid(f"{file}: lies in the folder that it is a backup of. Write it elsewhere, to another disk.")
    at, held = round(time.time(), 3), dict[str, Held]()
    with replacing(file) as out, tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in _names(federation.folder):
            found = _put(archive, federation.folder, name, file.parent)
            if found is not None:
                held[name] = found
        if passphrase is not None:
            sealed = _sealed(federation.folder, passphrase)
            _add(archive, SECRETS, sealed)
            held[SECRETS] = Held(len(sealed), hashlib.sha256(sealed).hexdigest())
        manifest = _signed(federation, Manifest(
            VERSION, federation.name, ca_fingerprint(federation), at, passphrase is not None, held
        ))  # fmt: skip
        _add(archive, MANIFEST, canonical_json(plain(manifest)))
    write_json(federation.folder / NOTE, {"at": at})
    open_log(federation).add("backed-up", files=len(held), secrets=manifest.secrets)
    return manifest


def _signed(federation: Federation, manifest: Manifest) -> Manifest:
    by = signer(federation)
    signature = sign(by.key, PURPOSE, manifest.statement).hex()
    return replace(manifest, certificate=by.certificate.decode(), signature=signature)


def _names(folder: Path) -> Iterator[str]:
    """What is copied as it is: the databases, `FIRST` of all folders, then all the rest.

    So the databases name no run that is not in the copy, and none as further than it is there. The rest is listed when
    the first have been copied, so that weights are among it which a round that ended meanwhile has left, and which a
    state that was copied names; of a run that began meanwhile there is nothing.
    """
    yield from (name for name in DATABASES if (folder / name).exists())
    first = [name for name in _listed(folder) if PurePosixPath(name).name in FIRST]
    yield from first
    begun = {PurePosixPath(name).parent for name in first if name.endswith("/state.json")}
    for name in _listed(folder):
        path = PurePosixPath(name)
        of_run = path.parts[0] == "runs" and len(path.parts) > 2
        if name not in DATABASES and path.name not in FIRST and (not of_run or PurePosixPath(*path.parts[:2]) in begun):
            yield name


def _listed(folder: Path) -> list[str]:
    found: list[str] = []
    for at, folders, files in os.walk(folder, onerror=_told):
        here = Path(at).relative_to(folder)
        folders[:] = [name for name in folders if not _is_left_out(f"{(here / name).as_posix()}/")]
        whole = [Path(at) / name for name in files]
        found += [(here / path.name).as_posix() for path in whole if path.is_file() and not path.is_symlink()]
    return sorted(name for name in found if not _is_left_out(name))


def _told(error: OSError) -> None:
    """Raises what keeps a folder from being read, but that it has gone meanwhile."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _is_left_out(name: str) -> bool:
    """Of a file, or of a folder whose name ends with a slash: what is secret, not needed, or there for a moment."""
    base = PurePosixPath(name).name
    journal = base.endswith((".db-wal", ".db-shm", ".db-journal"))
    spooled = PurePosixPath(name).parts[2:3] == ("spool",)  # of runs/RUN, and not a run of that name
    passing = base.endswith((".part", ".lock")) or base.startswith(".making.") or spooled
    return journal or passing or name.startswith((*SECRET, *LEFT_OUT))


def _put(archive: tarfile.TarFile, folder: Path, name: str, beside: Path) -> Held | None:
    """Adds one file, a database by a copy in the folder `beside`; None where it has gone meanwhile."""
    if name in DATABASES:
        with tempfile.TemporaryDirectory(prefix=".copy.", dir=beside) as aside:
            copy = Path(aside) / "copy.db"
            _copy_database(folder / name, copy)
            return _stream(archive, copy, name)
    try:
        return _stream(archive, folder / name, name)
    except FileNotFoundError:
        return None


def _copy_database(path: Path, copy: Path) -> None:
    unlocked = f"{copy.resolve().as_uri()}?nolock=1"  # it is ours alone, and a disk in the network may have no locks
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(unlocked, uri=True)) as target:
            source.backup(target)
    except sqlite3.Error as error:
        raise StateInvalid(
            f"{path}: cannot be copied to {copy.parent.parent} ({error}). Make room there, or write the backup to "
            "another disk; nothing of it was left."
        ) from error


def _stream(archive: tarfile.TarFile, path: Path, name: str) -> Held:
    """Copies as many bytes as the file had when it was opened, and digests what was copied; a log may grow meanwhile.

    What grows line by line is cut at its last whole line.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if path.suffix == ".jsonl":
            content = file.read(size)
            content = content[: content.rfind(b"\n") + 1]
            _add(archive, name, content)
            return Held(len(content), hashlib.sha256(content).hexdigest())
        reading = _Digesting(file)
        archive.addfile(_entry(name, size), reading)
        return Held(size, reading.digest.hexdigest())


@dataclass(slots=True)
class _Digesting(io.RawIOBase):
    """A file that is digested as it is read."""

    file: io.BufferedReader
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        return block


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    archive.addfile(_entry(name, len(content)), io.BytesIO(content))


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o600
    return entry


def _sealed(folder: Path, passphrase: str) -> bytes:
    """The private keys and secrets of a folder: salt, nonce, and the encrypted JSON of path -> hexadecimal bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    content = {name: path.read_bytes().hex() for name, path in names.items() if name.startswith(SECRET)}
    salt, nonce = os.urandom(SALT_BYTES), os.urandom(NONCE_BYTES)
    return salt + nonce + AESGCM(stretched(passphrase, salt)).encrypt(nonce, canonical_json(content), PURPOSE.encode())


# And back


def restore(file: Path, folder: Path, passphrase: str | None) -> Manifest:
    """Makes `folder` of a backup, whole or not at all.

    Raises:
        StateInvalid: `folder` holds anything, or the backup is damaged, not whole, not signed by the coordinator that
            its own authority vouches for, or holds no keys; a wrong passphrase.
        OSError: it cannot be written; it names a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StateInvalid(f"{folder}: is not empty. Restore into a folder of its own.")
    manifest = read_manifest(file)
    if not manifest.secrets:
        raise StateInvalid(
            f"{file}: was made without the private keys. Put ca/, tls/ and secrets/ of the folder back from where you "
            "keep them: unpack the backup (tar), and copy them in."
        )
    if passphrase is None:
        raise StateInvalid(f"{file}: its keys are encrypted. Give the passphrase (--passphrase-file, or when asked).")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in _checked(file, manifest):
            if name == SECRETS:
                _unseal(content.read(), passphrase, part)
            else:
                _write(part / name, content)
        _check_signature(file, manifest, part / "ca")
        for inner in ("superlink", "blobs/out", "blobs/in", "runs", "logs"):
            private_folder(part / inner)
        open_log(open_federation(part)).add("restored", backup_of=manifest.at_s)
        part.chmod(0o700)
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return manifest


def read_manifest(file: Path) -> Manifest:
    """What a backup says that it holds; its signature is checked once the authority is read from it.

    Raises:
        StateInvalid: no backup, or one of another version.
    """
    try:
        with tarfile.open(file, "r:") as archive:
            entry = archive.getmember(MANIFEST)
            if not entry.isfile() or entry.size > MOST_MANIFEST_BYTES:
                raise StateInvalid(f"{file}: its manifest is none. Use another backup.")
            content = archive.extractfile(entry)
            assert content is not None
            found = parse_json(Manifest, content.read(), f"{file}: manifest", StateInvalid)
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise StateInvalid(
            f"{file}: is no backup of a federation, or its end is missing ({type(error).__name__}). Use another one."
        ) from None
    if found.version != VERSION:
        raise StateInvalid(f"{file}: has layout {found.version}, this package reads {VERSION}.")
    return found


def _checked(file: Path, manifest: Manifest) -> Iterator[tuple[str, io.BufferedIOBase]]:
    """Every file of the archive, each only once its digest is that of the manifest; none besides, and all of them."""
    left = dict(manifest.files)
    with tarfile.open(file, "r:") as archive:
        for entry in archive:
            if entry.name == MANIFEST:
                continue
            wanted = left.pop(entry.name, None)
            if wanted is None or not entry.isfile() or not _is_safe(entry.name):
                raise StateInvalid(f"{file}: holds {entry.name[:100]!r}, which its manifest does not. Do not use it.")
            content = archive.extractfile(entry)
            assert content is not None
            digest = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
            if (entry.size, digest) != (wanted.size, wanted.sha256):
                raise StateInvalid(f"{file}: {entry.name} is not as it was backed up. Use another backup.")
            content.seek(0)
            yield entry.name, content  # type: ignore[misc]
    if left:
        raise StateInvalid(f"{file}: {sorted(left)[0]} is missing ({len(left)} files in all). Use another backup.")


def _is_safe(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)


def _write(path: Path, content: io.BufferedIOBase) -> None:
    private_folder(path.parent)
    with naming(path), os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _unseal(sealed: bytes, passphrase: str, folder: Path) -> None:
    salt, nonce, encrypted = sealed[:SALT_BYTES], sealed[SALT_BYTES:][:NONCE_BYTES], sealed[SALT_BYTES + NONCE_BYTES :]
    try:
        content = AESGCM(stretched(passphrase, salt)).decrypt(nonce, encrypted, PURPOSE.encode())
    except InvalidTag:
        raise StateInvalid("passphrase: is not the one that the keys were encrypted with. Try another.") from None
    for name, text in json.loads(content).items():
        if not name.startswith(SECRET) or not _is_safe(name):
            raise StateInvalid(f"backup: its keys hold {name[:100]!r}, which is none. Do not use it.")
        write_atomic(folder / name, bytes.fromhex(text))


def _check_signature(file: Path, manifest: Manifest, authority: Path) -> None:
    ca = read_files(authority)
    signature = bytes.fromhex(manifest.signature)
    if not stated(ca, manifest.certificate.encode(), signature, PURPOSE, manifest.statement):
        raise StateInvalid(f"{file}: is not signed by the coordinator that its authority vouches for. Do not use it.")
