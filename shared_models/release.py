"""Releases: one signed folder, or one file of it, that carries a model and all that is known of it.

    manifest.json      what it is, who made it, and size and SHA-256 of every other file; canonical JSON
    signature.json     the coordinator's signature of the manifest, and the certificates that vouch for it
    approvals.json     signatures of approvers, where the federation asks for them
    model.safetensors, model.onnx, model.ts, bundle/    the same network in four forms
    study.json         the study as it was trained, plan inside: preprocessing and post-processing as data
    parity.safetensors, parity.json    made-up cases and what the network answers on them
    card.json, card.md, card.html      the model card
    evidence/          proofs that the coordinator's audit log holds what the manifest says

A file is opened only after its digest was compared, and nothing of a release is ever executed here.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from shared_models.errors import FederationError, ReleaseInvalid, StateInvalid
from shared_models.files import canonical_json, write_atomic
from shared_models.identity import Credential, sign, stated, verify, vouched
from shared_models.onefile import MEMBER, MOST_BYTES, pack, unpack
from shared_models.parse import parse_json, plain
from shared_models.release_facts import FORMAT as FORMAT
from shared_models.release_facts import MOST_FILES, VERSION, Approvals, Entry, Signed
from shared_models.release_facts import Manifest as Manifest
from shared_models.release_facts import Origin as Origin
from shared_models.release_facts import Parent as Parent
from shared_models.study import Study, from_json

SUFFIX = ".fedrelease"
PURPOSE, APPROVAL = "release", "release-approval"  # of signatures
MANIFEST, SIGNATURE, APPROVALS = "manifest.json", "signature.json", "approvals.json"
STUDY, WEIGHTS, ONNX, TORCHSCRIPT = "study.json", "model.safetensors", "model.onnx", "model.ts"
BUNDLE_STATE, BUNDLE_SCRIPT = "bundle/models/model.pt", "bundle/models/model.ts"
FINGERPRINT, CALIBRATION = "fingerprint.json", "calibration.json"
OUTSIDE = (MANIFEST, SIGNATURE, APPROVALS)  # files that no digest of the manifest covers
MOST_JSON = 16 << 20  # bytes of a file that is read into memory

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom a release must come from.

    Attributes:
        authorities: certificates of certificate authorities, PEM: the one that this site pinned at `join`, or a file.
        research: take releases of `fedsim release` too, which are whole and of nobody who is known.
    """

    authorities: tuple[bytes, ...] = ()
    research: bool = False


@dataclass(frozen=True)
class Release:
    """A release whose every file was compared with its signed digest.

    Attributes:
        digest: SHA-256 of the manifest.
        study: task, model, preprocess (plan already inside), labels.
        weights: model.safetensors.
        onnx: input `image` float32[N, C, *spatial] (`table` float32[N, covariates] where no image is seen), output
            `logits`; N is free, and the edges where the network allows it.
        fingerprint: reference histograms of inputs and of output rates, as shared_models/drift.py has them.
        calibration: temperature of each label's logits.
    """

    folder: Path
    name: str
    version: str
    digest: str
    study: Study
    weights: Path
    onnx: Path
    fingerprint: dict[str, Any] | None
    calibration: dict[str, Any] | None
    manifest: Manifest = field(repr=False)

    def content(self, name: str) -> bytes:
        """A file of the release; its bytes are read once, and are the very ones that were compared.

        Raises:
            ReleaseInvalid: it is missing, or was changed since the release was opened.
        """
        return _content(self.folder, name, self.manifest)


def statement(manifest_sha256: str) -> bytes:
    """What the coordinator, and each approver, signs."""
    return canonical_json({"format": FORMAT, "manifest_sha256": manifest_sha256})


# ---- making ----


def seal(folder: Path, manifest: Manifest, by: Credential, authority: bytes) -> Manifest:
    """Signs what lies in `folder`: writes manifest.json, then signature.json; returns the manifest with its digests.

    Whatever `manifest` says of files and certificates is replaced by what is there. The caller makes the folder under
    another name and renames it once this has returned.

    Raises:
        ReleaseInvalid: a link or a name that no release may hold, or a manifest that nobody could read.
    """
    files = {name: entry_of(folder / name) for name in members_of(folder) if name not in OUTSIDE}
    signed = replace(manifest, files=files, signer_sha256=_sha256(by.certificate), authority_sha256=_sha256(authority))
    _parsed(Manifest, signed.content, folder, MANIFEST)
    signature = sign(by.key, PURPOSE, statement(signed.digest))
    write_atomic(folder / MANIFEST, signed.content)
    proof = Signed(signed.digest, signature.hex(), by.certificate.decode(), authority.decode())
    write_atomic(folder / SIGNATURE, canonical_json(plain(proof)))
    return signed


def approve(manifest_sha256: str, key: bytes) -> str:
    """An approver's signature (hexadecimal) of a release, by an Ed25519 key, PEM."""
    return sign(key, APPROVAL, statement(manifest_sha256)).hex()


def write_file(folder: Path, to: Path) -> None:
    """The folder of a release as one file."""
    pack(folder, members_of(folder), to)


def check_version(version: str) -> None:
    """Raises ReleaseInvalid for what no release can be called; those who type it are told before anything is made."""
    if not VERSION.fullmatch(version):
        raise ReleaseInvalid(
            f"version {version[:80]!r}: allowed are 1 to 32 of a-z, 0-9, dot and hyphen, a letter or figure first. "
            "Choose another --version."
        )


def file_name(manifest: Manifest) -> str:
    return f"{manifest.name}-{manifest.version}"


# ---- opening ----


def open_release(path: Path, trust: Trust, *, scratch: Path | None = None) -> Release:
    """The release at `path`, a folder or one file, once all of it is as somebody trusted has signed it.

    Args:
        scratch: folder into which a release that is one file is unpacked (in a folder named by its digest).

    Raises:
        ReleaseInvalid: naming the file that is missing, changed, strange, or not signed by whom `trust` names.
    """
    if path.is_file():
        if scratch is None:
            raise ReleaseInvalid(f"{path}: is one file, and no folder was given to unpack it into. Name one.")
        return open_release(unpack(path, scratch), trust)
    if not path.is_dir():
        raise ReleaseInvalid(f"{path}: is no release. Give the folder of one, or its {SUFFIX} file.")
    found = members_of(path)
    manifest = _manifest(path, found, trust)
    _compare(path, found, manifest)
    _check_approvals(path, manifest)
    return Release(
        folder=path,
        name=manifest.name,
        version=manifest.version,
        digest=manifest.digest,
        study=_study(path, manifest),
        weights=path / WEIGHTS,
        onnx=path / ONNX,
        fingerprint=_optional(path, FINGERPRINT, manifest),
        calibration=_optional(path, CALIBRATION, manifest),
        manifest=manifest,
    )


def _manifest(path: Path, found: Mapping[str, int], trust: Trust) -> Manifest:
    """The manifest, if its signature is of somebody trusted; of changed bytes it is said in which file they are."""
    if MANIFEST not in found:
        raise ReleaseInvalid(f"{path}: is no release, it has no {MANIFEST}. Check the path.", MANIFEST)
    if SIGNATURE not in found:
        raise ReleaseInvalid(
            f"{path / SIGNATURE}: is missing, the release is not signed. Ask its federation for a signed one.",
            SIGNATURE,
        )
    content = _read(path, MANIFEST)
    signed = _parsed(Signed, _read(path, SIGNATURE), path, SIGNATURE)
    claimed = statement(signed.manifest_sha256)
    certificate, signature = signed.signer.encode(), bytes.fromhex(signed.signature)
    by = [ca for ca in trust.authorities if vouched(ca, certificate) is not None]
    research = trust.research and vouched(signed.authority.encode(), certificate) is not None
    if not by and not research:
        raise ReleaseInvalid(_foreign(path, content, trust), SIGNATURE)
    authority = by[0] if by else signed.authority.encode()
    if not stated(authority, certificate, signature, PURPOSE, claimed):
        raise ReleaseInvalid(f"{path / SIGNATURE}: is not as it was made. Get the release again.", SIGNATURE)
    if _sha256(content) != signed.manifest_sha256:
        raise ReleaseInvalid(f"{path / MANIFEST}: was changed after it was signed. Get the release again.", MANIFEST)
    manifest = _parsed(Manifest, content, path, MANIFEST)
    if (_sha256(certificate), _sha256(signed.authority.encode())) != (
        manifest.signer_sha256,
        manifest.authority_sha256,
    ):
        raise ReleaseInvalid(f"{path / SIGNATURE}: its certificates were changed. Get the release again.", SIGNATURE)
    if not by and manifest.origin.kind != "simulation":
        raise ReleaseInvalid(_foreign(path, content, trust), SIGNATURE)
    return manifest


def _foreign(path: Path, manifest: bytes, trust: Trust) -> str:
    """Why a release of nobody who is trusted is refused; what its manifest says of itself is only that."""
    try:
        origin = parse_json(Manifest, manifest, MANIFEST, ReleaseInvalid).origin
    except FederationError:
        return f"{path / SIGNATURE}: is of nobody who is trusted here, or was changed. Get the release again."
    if origin.kind == "simulation":
        return (
            f"{path}: calls itself a research release of run {origin.run!r}, which no federation has signed. Take it "
            "with --research if you know where it comes from; never for patients."
        )
    whom = "no authority is trusted here yet" if not trust.authorities else "that is not the one trusted here"
    return (
        f"{path / SIGNATURE}: the release calls itself one of {origin.federation!r}, {whom}; or the file was changed. "
        "If you trust that federation, give the certificate of its authority with --authority FILE."
    )


def _compare(path: Path, found: Mapping[str, int], manifest: Manifest) -> None:
    """Raises ReleaseInvalid for the first file that is missing, strange, or not as the manifest has it."""
    needed = {STUDY, WEIGHTS, ONNX} - manifest.files.keys()
    for name in sorted({*manifest.files, *needed} - found.keys()):
        raise ReleaseInvalid(f"{path / name}: is missing. Get the release again.", name)
    for name in sorted(found.keys() - manifest.files.keys() - set(OUTSIDE)):
        raise ReleaseInvalid(f"{path / name}: is no part of the release. Take it out.", name)
    if manifest.files.keys() & set(OUTSIDE):
        raise ReleaseInvalid(f"{path / MANIFEST}: lists itself or its signatures. Get the release again.", MANIFEST)
    for name, entry in sorted(manifest.files.items()):
        if found[name] != entry.bytes or entry_of(path / name) != entry:
            raise ReleaseInvalid(f"{path / name}: was changed after it was signed. Get the release again.", name)


def read_approvals(folder: Path) -> dict[str, str]:
    """Approver -> signature, hexadecimal; unchecked."""
    if not (folder / APPROVALS).exists():
        return {}
    content = _read(folder, APPROVALS)
    return dict(_parsed(Approvals, content, folder, APPROVALS).signatures)


def write_approvals(folder: Path, signatures: Mapping[str, str]) -> None:
    write_atomic(folder / APPROVALS, canonical_json(plain(Approvals(signatures))))


def _check_approvals(path: Path, manifest: Manifest) -> None:
    given = read_approvals(path)
    for name, signature in given.items():
        key = manifest.approvers.get(name)
        approved = statement(manifest.digest)
        if key is None or not verify(bytes.fromhex(key), bytes.fromhex(signature), APPROVAL, approved):
            raise ReleaseInvalid(
                f"{path / APPROVALS}: {name!r} is no approver, or has not signed this. Get the release again.",
                APPROVALS,
            )
    if len(given) < manifest.approvals:
        raise ReleaseInvalid(
            f"{path}: {len(given)} of {manifest.approvals} approvals needed are there. Wait for the others: "
            f"{', '.join(sorted(manifest.approvers.keys() - given.keys()))}.",
            APPROVALS,
        )


def _study(path: Path, manifest: Manifest) -> Study:
    try:
        return from_json(_small(path, STUDY, manifest), STUDY)
    except ReleaseInvalid:
        raise
    except FederationError as error:
        raise ReleaseInvalid(
            f"{path / STUDY}: {error} Update the package; it may be newer than yours.", STUDY
        ) from None


def _optional(path: Path, name: str, manifest: Manifest) -> dict[str, Any] | None:
    if name not in manifest.files:
        return None
    value = parse_json(dict[str, Any], _small(path, name, manifest), str(path / name), ReleaseInvalid)
    return value


def _parsed(kind: type[T], content: bytes, path: Path, name: str) -> T:
    """`content` as the dataclass `kind`, if it is the one way in which its value is written."""
    try:
        parsed = parse_json(kind, content, name, StateInvalid)
    except StateInvalid as error:
        raise ReleaseInvalid(f"{path / name}: cannot be read ({error}). Get the release again.", name) from None
    if canonical_json(plain(parsed)) != content:
        raise ReleaseInvalid(f"{path / name}: is not written as it was signed. Get the release again.", name)
    return parsed


def _read(folder: Path, name: str) -> bytes:
    with (folder / name).open("rb") as file:
        content = file.read(MOST_JSON + 1)
    if len(content) > MOST_JSON:
        raise _too_large(folder, name)
    return content


def _small(folder: Path, name: str, manifest: Manifest) -> bytes:
    if manifest.files[name].bytes > MOST_JSON:
        raise _too_large(folder, name)
    return _content(folder, name, manifest)


def _too_large(folder: Path, name: str) -> ReleaseInvalid:
    return ReleaseInvalid(f"{folder / name}: is larger than {MOST_JSON >> 20} MiB. Get the release again.", name)


def _content(folder: Path, name: str, manifest: Manifest) -> bytes:
    entry = manifest.files.get(name)
    if entry is None or not (folder / name).is_file():
        raise ReleaseInvalid(f"{folder / name}: is missing. Get the release again.", name)
    with (folder / name).open("rb") as file:
        content = file.read(entry.bytes + 1)
    if Entry(len(content), _sha256(content)) != entry:
        raise ReleaseInvalid(f"{folder / name}: was changed after it was signed. Get the release again.", name)
    return content


def entry_of(path: Path) -> Entry:
    """Size and digest of a file, read once."""
    with path.open("rb") as file:
        return Entry(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def members_of(folder: Path) -> dict[str, int]:
    """Name and size of every file below a folder.

    Raises:
        ReleaseInvalid: a link, a device, a name that no release has, or more than any release holds.
    """
    found: dict[str, int] = {}
    for name, facts in _walk(folder, ""):
        if not stat.S_ISREG(facts.st_mode):
            raise ReleaseInvalid(f"{folder / name}: is a link or no plain file. Take it out.", name)
        if not MEMBER.fullmatch(name):
            raise ReleaseInvalid(f"{folder}: holds a file called {name!r}, which no release has. Take it out.", name)
        found[name] = facts.st_size
        if len(found) > MOST_FILES or sum(found.values()) > MOST_BYTES:
            raise ReleaseInvalid(f"{folder}: holds more than a release may. Check the path.", name)
    return dict(sorted(found.items()))


def _walk(folder: Path, above: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            facts = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(facts.st_mode) and above.count("/") < 5:
                yield from _walk(folder / entry.name, f"{above}{entry.name}/")
            else:
                yield f"{above}{entry.name}", facts


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
