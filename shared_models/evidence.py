"""Evidence of an audit log for others: the log, its signed head and the certificates of its keys, in one file."""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from shared_models.audit_check import Verdict, as_it_ended, compare, made_up, verify_log
from shared_models.audit_files import LAST, LOG, away
from shared_models.cli import print_json
from shared_models.errors import StateInvalid
from shared_models.files import write_atomic
from shared_models.merkle import Tree

MOST_BYTES = 1 << 30
README = """What this is: the audit log of one party of a federation, to be verified by others.

audit.jsonl      one event a line, canonical JSON (RFC 8259; keys sorted, no blanks, UTF-8). `prev` is the SHA-256 of
                 the line before (64 zeros in the first). `sign` is an Ed25519 signature (RFC 8032), hexadecimal, over
                 the bytes "fedimaging/1 audit-line", a zero byte, and the line without `sign`.
audit.head.json  the last signed tree head: `root` is the Merkle tree hash (RFC 6962, section 2.1) over the lines
                 without their line ends. `signature` is over "fedimaging/1 audit-head", a zero byte, and the canonical
                 JSON of log, size, root and time. `log` is the SHA-256 of the first line.
key.txt          the Ed25519 public key that all of it is signed with, 32 bytes, hexadecimal.
audit-*.jsonl    logs of the keys before: the first line of each log names its key, and the log that it goes on from by
                 `before`, the SHA-256 of that one's first line, with the size and root that its tree ended with.
*.pem            certificates: of the authority, and of the key where the authority vouches for it.

Verify it with `fedserver audit verify --pack FILE` (of a hospital) or `fedclient audit verify --pack FILE` (of the
coordinator): that checks every line, and that this log and the one of who verifies agree on all tree heads that each
kept of the other (`witnessed` lines).
"""


def verdict_of(folder: Path, key: bytes) -> Verdict:
    """What is found in the log of a federation or site folder, of the key that it is written with now."""
    path, head = folder / LOG, folder / LAST
    if not path.exists():
        raise StateInvalid(f"{path}: is missing. Nothing has been written yet, or it was removed; see your backup.")
    last = head.read_bytes() if head.exists() else None  # before the log, which goes on growing
    return verify_log(path.read_bytes(), key, last)


def earlier_verdicts(folder: Path, newest: Verdict) -> dict[str, Verdict]:
    """What is found in the logs of the keys before, by the names of their files, the newest first.

    Each is known by the first line of the one after it: by its own first line, which names its key, and its end.
    """
    found, before = dict[str, Verdict](), newest.before
    while before is not None:
        path, head = (away(folder / name, before.log) for name in (LOG, LAST))
        if not path.exists():
            found[path.name] = Verdict(0, (1, "and all others are missing: the log is gone"), Tree())
            break
        content, last = path.read_bytes(), head.read_bytes() if head.exists() else None
        whole = content[: content.rfind(b"\n") + 1]  # a line that was torn when it was put away is cut off by nobody
        found[path.name] = as_it_ended(verify_log(whole, None, last), before)
        before = found[path.name].before
    return found


def export(folder: Path, key: bytes, certificates: Mapping[str, bytes], out: Path) -> None:
    """Writes the evidence of the log in `folder` as a ZIP file."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("README.txt", README)
        pack.writestr("key.txt", key.hex() + "\n")
        for path in sorted([*folder.glob("audit*.jsonl"), *folder.glob("audit*.head.json")]):
            pack.write(path, path.name)
        for name, content in certificates.items():
            pack.writestr(name, content)
    write_atomic(out, made.getvalue())


def read_pack(path: Path) -> dict[str, bytes]:
    """The files of a pack by their names; raises StateInvalid where it is none."""
    try:
        with zipfile.ZipFile(path) as pack:
            if sum(entry.file_size for entry in pack.infolist()) > MOST_BYTES:
                raise StateInvalid(f"{path}: unpacks to more than {MOST_BYTES >> 20} MiB. Ask for the right file.")
            files = {entry.filename: pack.read(entry) for entry in pack.infolist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise StateInvalid(f"{path}: is no evidence pack ({error}). Make one with `audit export`.") from error
    if missing := {LOG, "key.txt"} - files.keys():
        raise StateInvalid(f"{path}: lacks {', '.join(sorted(missing))}. Make one with `audit export`.")
    return files


def against(mine: Verdict, files: Mapping[str, bytes], key: bytes) -> tuple[Verdict, Verdict]:
    """Both logs, each also held against the heads of it that the other has kept, where it has signed them."""
    theirs = verify_log(files[LOG], key, files.get(LAST))
    return _held(mine, theirs), _held(theirs, mine)


def _held(one: Verdict, other: Verdict) -> Verdict:
    return one if one.bad else replace(one, bad=compare(one, other) or made_up(one, other))


def in_words(verdict: Verdict, name: str) -> list[str]:
    """What a person is told of a log."""
    if verdict.bad is not None:
        return [f"{name}: line {verdict.bad[0]} {verdict.bad[1]}."]
    root = verdict.tree.root().hex()
    words = [
        f"{name}: {verdict.lines} lines are whole, in order and signed. Root {root[:16]} over {verdict.lines} lines."
    ]
    peers = {kept.peer: kept for kept in verdict.heads}
    words += [f"  keeps the head of {peer}'s log over {kept.size} lines" for peer, kept in sorted(peers.items())]
    return words + [f"  noted {what}" for what in verdict.refused]


def tell(found: Mapping[str, Verdict], as_json: bool) -> None:
    """Prints what was found of each log; raises typer.Exit(1) where one is bad."""
    if as_json:
        print_json({name: _facts(verdict) for name, verdict in found.items()})
    else:
        for name, verdict in found.items():
            for words in in_words(verdict, name):
                print(words)
    if any(verdict.bad for verdict in found.values()):
        raise typer.Exit(1)


def _facts(verdict: Verdict) -> dict[str, Any]:
    line, wrong = verdict.bad or (None, None)
    return {"lines": verdict.lines, "bad_line": line, "wrong": wrong, "noted": list(verdict.refused)}
