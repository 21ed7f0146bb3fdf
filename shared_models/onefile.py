"""Many files as one: a ZIP in the one form that its content gives, so that no byte of it is free.

Stored without compression, names in order, one date, no comment, nothing between the parts. Whoever unpacks writes
these headers anew and compares: a polyglot, a second file of the same name, a path that climbs out, or one flipped bit
of a header has no room. APPNOTE.TXT 6.3.10, sections 4.3.7, 4.3.12 and 4.3.16.
"""

import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from shared_models.errors import ReleaseInvalid
from shared_models.files import private_folder, replacing, sync_folder

MOST_BYTES = (1 << 32) - (1 << 26)  # of all files together: offsets have 32 bits, and the headers need room
MOST_DIRECTORY = 1 << 20
BLOCK = 1 << 20
DATE = 0x0021  # 1 January 1980, the first that there is
MEMBER = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,99}/){0,4}[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_LOCAL, _CENTRAL, _END = "<4s5H3L2H", "<4s6H3L5H2L", "<4s4H2LH"
_END_BYTES = struct.calcsize(_END)


@dataclass(frozen=True, slots=True)
class Part:
    """One file inside: `at` is where its header begins, `data_at` where its bytes do."""

    name: str
    size: int
    crc: int
    at: int

    @property
    def data_at(self) -> int:
        return self.at + len(self.local)

    @property
    def local(self) -> bytes:
        name = self.name.encode()
        return struct.pack(_LOCAL, b"PK\3\4", 10, 0, 0, 0, DATE, self.crc, self.size, self.size, len(name), 0) + name

    @property
    def central(self) -> bytes:
        name = self.name.encode()
        fields = (10, 10, 0, 0, 0, DATE, self.crc, self.size, self.size, len(name), 0, 0, 0, 0, 0, self.at)
        return struct.pack(_CENTRAL, b"PK\1\2", *fields) + name


def pack(folder: Path, names: Iterable[str], to: Path) -> None:
    """Writes the named files of `folder` as one, whole or not at all."""
    parts: list[Part] = []
    with replacing(to) as out:
        for name in sorted(names):
            begin = out.tell()
            out.seek(begin + len(Part(name, 0, 0, begin).local))
            with (folder / name).open("rb") as file:
                crc, size = _copy(file, out, None)
            end = out.tell()
            part = Part(name, size, crc, begin)
            out.seek(begin)
            out.write(part.local)
            out.seek(end)
            parts.append(part)
        out.write(_directory(parts, out.tell()))


def _directory(parts: list[Part], at: int) -> bytes:
    central = b"".join(part.central for part in parts)
    count = len(parts)
    return central + struct.pack(_END, b"PK\5\6", 0, 0, count, count, len(central), at, 0)


def unpack(path: Path, scratch: Path) -> Path:
    """Writes the files of `path` into a new folder below `scratch`, all of them or none, and returns it.

    Raises:
        ReleaseInvalid: naming the member, or none where the form itself is not ours.
    """
    private_folder(scratch)
    part = Path(tempfile.mkdtemp(prefix=".unpacked.", dir=scratch))
    try:
        with path.open("rb") as file:
            for member in _read_directory(file, path):
                _take(file, member, part / member.name, path)
        folder = Path(tempfile.mkdtemp(prefix=f"{path.stem}-", dir=scratch))
        part.replace(folder)  # over an empty folder
        sync_folder(scratch)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def _take(file: IO[bytes], member: Part, to: Path, path: Path) -> None:
    file.seek(member.at)
    if file.read(len(member.local)) != member.local:
        raise ReleaseInvalid(f"{path}: the header of {member.name} was changed. Get the file again.", member.name)
    private_folder(to.parent)
    with os.fdopen(os.open(to, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "wb") as out:
        crc, size = _copy(file, out, member.size)
    if (crc, size) != (member.crc, member.size):
        raise ReleaseInvalid(f"{path}: {member.name} in it was changed. Get the file again.", member.name)


def _read_directory(file: IO[bytes], path: Path) -> list[Part]:
    """The parts, if the directory at the end is the one that they give."""
    strange = ReleaseInvalid(f"{path}: is not in the form of a release, or was changed. Get the file again.")
    whole = os.fstat(file.fileno()).st_size
    if not _END_BYTES < whole <= MOST_BYTES + 2 * MOST_DIRECTORY:
        raise strange
    file.seek(whole - _END_BYTES)
    _, _, _, _, count, length, begin, _ = struct.unpack(_END, file.read(_END_BYTES))
    if begin + length + _END_BYTES != whole or length > MOST_DIRECTORY:
        raise strange
    file.seek(begin)
    directory = file.read()
    parts: list[Part] = []
    at, cursor, fixed = 0, 0, struct.calcsize(_CENTRAL)
    for _ in range(count):
        if cursor + fixed > length:
            raise strange
        fields = struct.unpack_from(_CENTRAL, directory, cursor)
        crc, size, characters = fields[7], fields[9], fields[10]
        name = directory[cursor + fixed : cursor + fixed + characters].decode("ascii", "replace")
        if not MEMBER.fullmatch(name):
            raise strange
        parts.append(Part(name, size, crc, at))
        at, cursor = parts[-1].data_at + size, cursor + fixed + characters
    names = [part.name for part in parts]
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    if at != begin or names != sorted(set(names)) or folders & set(names) or directory != _directory(parts, begin):
        raise strange
    return parts


def _copy(file: IO[bytes], out: IO[bytes], size: int | None) -> tuple[int, int]:
    """Copies to the end, or at most `size` bytes; CRC-32 and number of the bytes."""
    crc = done = 0
    while block := file.read(BLOCK if size is None else min(BLOCK, size - done)):
        out.write(block)
        crc, done = zlib.crc32(block, crc), done + len(block)
    return crc, done
