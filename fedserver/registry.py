"""The coordinator's releases: each under the digest of its manifest, with its stage and who has said what of it.

    registry/DIGEST/release/     the release as hospitals get it
    registry/DIGEST/entry.json   stage and history

A release is a candidate when it is made, approved once everybody needed has approved it, and retired when it should no
longer be used. Nothing is ever removed: what was used once can be asked about later.
"""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fedserver.checkpoint import RunFolder
from fedserver.enrol import Federation, open_log, signer
from fedserver.publish.card import Words
from fedserver.publish.lineage import ancestors
from fedserver.publish.proofs import answers_extract, audit_extract, earlier_rosters, newest_roster
from shared_models.errors import ReleaseInvalid, StateInvalid
from shared_models.files import locked, read_json, sync_folder, write_json
from shared_models.identity import identity_public_key
from shared_models.parse import STRICT, parse, parse_json, plain, printable
from shared_models.provenance import ANSWERS, AUDIT, ROSTER, ROSTERS, check_provenance
from shared_models.release import (
    SUFFIX,
    Manifest,
    Parent,
    Trust,
    approve,
    check_version,
    file_name,
    open_release,
    read_approvals,
    write_approvals,
    write_file,
)
from shared_models.standing import Stage

COORDINATOR = "coordinator"  # who says what no approver says


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was said of a release.

    Attributes:
        at: seconds since the epoch.
        words: why; `told`: what of it hospitals are told.
    """

    __pydantic_config__ = STRICT
    stage: Stage
    at: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    by: Annotated[str, Field(max_length=64)]
    words: Annotated[str, Field(max_length=500)] = ""
    told: Annotated[str, Field(max_length=500)] = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """entry.json: what the registry knows of a release beside the release itself.

    Attributes:
        sites: who was counted, and in how many rounds.
    """

    __pydantic_config__ = STRICT
    digest: str
    name: str
    version: str
    run: str
    round: int
    sites: Mapping[str, int]
    history: tuple[Step, ...]

    @property
    def stage(self) -> Stage:
        return self.history[-1].stage

    @property
    def label(self) -> str:
        return f"{self.name}-{self.version}"


def folder_of(federation: Federation, digest: str) -> Path:
    return federation.folder / "registry" / digest


def list_releases(federation: Federation) -> list[Entry]:
    """All of them, the oldest first."""
    paths = sorted((federation.folder / "registry").glob("[0-9a-f]*/entry.json"))
    entries = [parse_json(Entry, path.read_bytes(), str(path), StateInvalid) for path in paths]
    return sorted(entries, key=lambda entry: (entry.history[0].at, entry.digest))


def find_release(federation: Federation, which: str) -> Entry:
    """By NAME-VERSION, or by the beginning of its digest; raises StateInvalid where none or several fit."""
    entries = list_releases(federation)
    fit = [e for e in entries if e.label == which] or [
        e for e in entries if len(which) >= 6 and e.digest.startswith(which)
    ]
    if len(fit) != 1:
        known = ", ".join(entry.label for entry in entries) or "none yet"
        how = "is not known here" if not fit else "fits several"
        raise StateInvalid(f"release {which!r}: {how}. Known: {known}.")
    return fit[0]


def trust_of(federation: Federation) -> Trust:
    return Trust((federation.authority,))


def register(
    federation: Federation,
    run: RunFolder,
    version: str | None = None,
    words: Words | None = None,
    round_number: int | None = None,
    data_cards: Mapping[str, Mapping[str, Any]] | None = None,
) -> Entry:
    """Makes a release of a run and keeps it as a candidate; one at a time.

    Raises:
        ReleaseInvalid: an export does not answer as the network does, the evidence contradicts the manifest, or a
            version that none can be called.
        StateInvalid: a run without weights to release, a version that is taken, or a log that is not whole.
    """
    with _alone(federation):
        for part in (federation.folder / "registry").glob(".making.*"):  # of a process that was killed
            shutil.rmtree(part, ignore_errors=True)
        return _register(federation, run, version, words or Words(), round_number, data_cards)


def _register(
    federation: Federation,
    run: RunFolder,
    version: str | None,
    words: Words,
    round_number: int | None,
    data_cards: Mapping[str, Mapping[str, Any]] | None,
) -> Entry:
    from fedserver.publish.making import make_release  # imports torch
    from fedserver.publish.of_run import Maker, recipe_of

    if version is not None:
        check_version(version)
    known, log = list_releases(federation), open_log(federation)
    roster, signed = newest_roster(federation)
    approvals, approvers = approval_rules(federation)
    lineage = ancestors(run) | ({} if round_number is None else {run.id: round_number})
    answers = answers_extract(federation, lineage)
    before = earlier_rosters(federation, signed.roster, answers)
    maker = Maker(
        kind="federation",
        name=federation.name,
        signer=signer(federation),
        authority=federation.ca_certificate.read_bytes(),
        trust=federation.authority,
        evidence={
            AUDIT: audit_extract(federation, lineage),
            ANSWERS: answers,
            ROSTER: roster,
            **({} if before is None else {ROSTERS: before}),
        },
        roster=(signed.roster.epoch, signed.roster.sha256),
        approvals=approvals,
        approvers=approvers,
    )
    recipe = recipe_of(run, version or "0", maker, words, round_number, data_cards, _parents(federation, run))
    label = version or _next_version(known, recipe.study.name)
    if any(entry.name == recipe.study.name and entry.version == label for entry in known):
        raise StateInvalid(f"release {recipe.study.name}-{label}: is there already. Choose another --version.")
    recipe = replace(recipe, version=label, card={**recipe.card, "version": label})
    part = Path(tempfile.mkdtemp(prefix=".making.", dir=federation.folder / "registry"))
    try:
        manifest = make_release(recipe, part / "release")
        if not approvals:
            check_provenance(open_release(part / "release", trust_of(federation)), (maker.trust,))
        step = Step("candidate", round(time.time(), 3), COORDINATOR)
        entry = Entry(
            manifest.digest, manifest.name, manifest.version, manifest.origin.run, manifest.origin.round,
            dict(manifest.origin.sites), (step,),
        )  # fmt: skip
        write_json(part / "entry.json", plain(_readable(entry)))
        part.replace(folder_of(federation, manifest.digest))
        sync_folder(federation.folder / "registry")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    log.add("release-made", run=run.id, release=entry.label, digest=entry.digest)
    return entry


def _next_version(known: Sequence[Entry], name: str) -> str:
    taken = {entry.version for entry in known if entry.name == name}
    number = 1
    while str(number) in taken:
        number += 1
    return str(number)


def _parents(federation: Federation, run: RunFolder) -> list[Parent]:
    """Releases whose weights this run began from."""
    begun = {"" if not run.weights(0).exists() else _study_weights(run)}
    return [
        Parent("release", entry.label, entry.digest)
        for entry in list_releases(federation)
        if manifest_of(federation, entry).files["model.safetensors"].sha256 in begun
    ]


def _study_weights(run: RunFolder) -> str:
    return str(read_json(run.path / "study.json")["transfer"]["sha256"])


def manifest_of(federation: Federation, entry: Entry) -> Manifest:
    """The manifest of a release in the registry, which the digest that it is kept under vouches for."""
    path = folder_of(federation, entry.digest) / "release" / "manifest.json"
    manifest = parse_json(Manifest, path.read_bytes(), str(path), StateInvalid)
    if manifest.digest != entry.digest:
        raise StateInvalid(f"{path}: was changed. Restore the registry from a backup.")
    return manifest


def approve_release(federation: Federation, which: str, by: str = COORDINATOR, key: bytes | None = None) -> Entry:
    """An approver's signature of a release; with the last one needed, it is approved.

    Args:
        by: name of the approver in federation.toml; "coordinator" where the release asks for no approvers.
        key: the approver's Ed25519 key, PEM.

    Raises:
        StateInvalid: who is no approver, whose key is another's, or a release that is retired.
    """
    with _alone(federation):
        return _approve(federation, which, by, key)


def _approve(federation: Federation, which: str, by: str, key: bytes | None) -> Entry:
    entry = find_release(federation, which)
    if entry.stage == "retired":
        raise StateInvalid(f"release {entry.label}: is retired ({entry.history[-1].words}). Make a new one.")
    manifest, folder = manifest_of(federation, entry), folder_of(federation, entry.digest) / "release"
    given = read_approvals(folder)
    if manifest.approvals or by != COORDINATOR:
        if key is None or manifest.approvers.get(by) != identity_public_key(key).hex():
            names = ", ".join(sorted(manifest.approvers)) or "no approvers"
            leave = "" if manifest.approvals else ", or neither: it is approved by the coordinator alone"
            raise StateInvalid(
                f"release {entry.label}: needs {manifest.approvals} of {names}; {by[:80]!r} with this key is none of "
                f"them. Give --as NAME and --key FILE of an approver{leave}."
            )
        given[by] = approve(entry.digest, key)
        write_approvals(folder, given)
    done = len(given) >= manifest.approvals
    if done:
        open_release(folder, trust_of(federation))  # every byte once more, before anybody is told to use it
    return _said(federation, entry, "approved" if done else entry.stage, by, "release-approved")


def retire_release(federation: Federation, which: str, reason: str, told: str | None = None) -> Entry:
    """Says of a release that it should no longer be used.

    Args:
        told: to hospitals, by the list of releases; the reason itself where nothing is said.
    """
    words = printable(reason).strip()
    if not words or len(words) > 500:
        raise StateInvalid("reason: 1 to 500 characters, for those who ask later. Give one with --reason.")
    with _alone(federation):
        entry, public = find_release(federation, which), words if told is None else told
        return _said(federation, entry, "retired", COORDINATOR, "release-retired", words, public)


def _alone(federation: Federation) -> AbstractContextManager[None]:
    """One process at a time changes the registry: two approvals at once are two, and none undoes a retirement."""
    return locked(federation.folder / "registry" / ".lock")


def _said(
    federation: Federation, entry: Entry, stage: Stage, by: str, event: str, words: str = "", told: str = ""
) -> Entry:
    done = _readable(replace(entry, history=(*entry.history, Step(stage, round(time.time(), 3), by, words, told))))
    open_log(federation).add(event, release=entry.label, digest=entry.digest, by=by, stage=stage, words=words)
    write_json(folder_of(federation, entry.digest) / "entry.json", plain(done))
    return done


def _readable(entry: Entry) -> Entry:
    """The entry as it will be read; StateInvalid where it could not be, and the registry with it."""
    return parse(Entry, plain(entry), f"entry of release {entry.label}", StateInvalid)


def export_release(federation: Federation, entry: Entry, out: Path, single_file: bool) -> Path:
    """Copies a release out of the registry, whole or not at all: `out`/NAME-VERSION, or one file of it.

    Raises:
        ReleaseInvalid: something is there already, or the registry's copy is not as it was signed.
    """
    source = folder_of(federation, entry.digest) / "release"
    manifest = manifest_of(federation, entry)
    if len(read_approvals(source)) >= manifest.approvals:
        open_release(source, trust_of(federation))
    to = out / (file_name(manifest) + (SUFFIX if single_file else ""))
    return copy_out(source, to, single_file)


def copy_out(source: Path, to: Path, single_file: bool) -> Path:
    if to.exists():
        raise ReleaseInvalid(f"{to}: is there already. Move it away, or choose another folder with --out.")
    if single_file:
        write_file(source, to)
        return to
    to.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        shutil.copytree(source, part, dirs_exist_ok=True)
        part.replace(to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return to


def approval_rules(federation: Federation) -> tuple[int, dict[str, str]]:
    """How many of which approvers must sign, as `[release]` of federation.toml says."""
    return federation.approvals, dict(federation.approvers)


def as_rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    return [{**plain(entry), "stage": entry.stage, "label": entry.label} for entry in entries]
