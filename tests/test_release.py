"""Releases: every byte is as signed by whom one trusts; or the file that is not is named, and none is opened."""

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_models.errors import ReleaseInvalid
from shared_models.files import canonical_json
from shared_models.identity import identity_public_key, new_site_keys
from shared_models.onefile import pack, unpack
from shared_models.parse import parse_json
from shared_models.release import (
    APPROVALS,
    MANIFEST,
    SIGNATURE,
    STUDY,
    WEIGHTS,
    Manifest,
    Trust,
    approve,
    members_of,
    open_release,
    seal,
    write_approvals,
    write_file,
)
from shared_models.study import canonical
from tests.releases import authority, made_release, tiny_study


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trust]:
    return made_release(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def one_file(made: tuple[Path, Trust], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    to = tmp_path_factory.mktemp("file") / "tiny.fedrelease"
    write_file(made[0], to)
    return to.read_bytes()


@pytest.fixture
def release(made: tuple[Path, Trust], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made[0], tmp_path / "release"))


def open_manifest(folder: Path) -> Manifest:
    return parse_json(Manifest, (folder / MANIFEST).read_bytes(), MANIFEST)


def sealed_anew(folder: Path, **change: Any) -> Trust:
    """Signs a copy with other words in its manifest, by an authority of its own."""
    ca, signer = authority()
    seal(folder, replace(open_manifest(folder), **change), signer, ca.certificate)
    return Trust((ca.certificate,))


def refused(path: Path, trust: Trust, scratch: Path | None = None) -> ReleaseInvalid:
    with pytest.raises(ReleaseInvalid) as found:
        open_release(path, trust, scratch=scratch)
    return found.value


def test_what_was_made_opens_with_its_study_and_its_files(made):
    folder, trust = made
    opened = open_release(folder, trust)
    assert canonical(opened.study) == canonical(tiny_study())
    assert (opened.name, opened.version) == ("tiny-lung", "1")
    assert opened.weights.name == WEIGHTS
    assert set(opened.manifest.files) == set(members_of(folder)) - {MANIFEST, SIGNATURE}


@given(data=st.data())
def test_one_changed_byte_anywhere_is_refused_and_its_file_is_named(made, data):
    folder, trust = made
    name = data.draw(st.sampled_from([name for name, size in members_of(folder).items() if size]))
    path = folder / name
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(changed)
        found = refused(folder, trust)
    finally:
        path.write_bytes(content)
    assert found.file == name
    assert name in str(found)


@settings(max_examples=50)
@given(data=st.data())
def test_one_changed_byte_anywhere_in_the_single_file_is_refused(made, one_file, tmp_path_factory, data):
    scratch, trust, content = tmp_path_factory.mktemp("one"), made[1], bytearray(one_file)
    at = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(len(content) - 3000, len(content) - 1)))
    content[at] ^= data.draw(st.integers(1, 255))
    (scratch / "changed.fedrelease").write_bytes(content)
    refused(scratch / "changed.fedrelease", trust, scratch / "unpacked")
    shutil.rmtree(scratch)


def test_the_single_file_is_a_zip_that_others_read_and_opens_as_the_folder_does(made, tmp_path):
    folder, trust = made
    write_file(folder, tmp_path / "tiny.fedrelease")
    with zipfile.ZipFile(tmp_path / "tiny.fedrelease") as pack_of_it:
        assert pack_of_it.testzip() is None
        assert {n: len(pack_of_it.read(n)) for n in pack_of_it.namelist()} == members_of(folder)
    opened = open_release(tmp_path / "tiny.fedrelease", trust, scratch=tmp_path / "scratch")
    assert opened.digest == open_release(folder, trust).digest
    assert opened.folder.parent == tmp_path / "scratch"


def test_a_release_without_a_signature_is_refused_as_unsigned(release, made):
    (release / SIGNATURE).unlink()
    found = refused(release, made[1])
    assert found.file == SIGNATURE
    assert "not signed" in str(found)


def test_a_release_of_another_federation_is_refused_as_foreign(made):
    stranger = Trust((authority()[0].certificate,))
    found = refused(made[0], stranger)
    assert found.file == SIGNATURE
    assert "'test federation'" in str(found)
    assert "--authority" in str(found)


def test_a_signature_by_who_is_vouched_for_by_another_authority_is_no_signature(release, made):
    sealed_anew(release)
    assert refused(release, made[1]).file == SIGNATURE


def test_the_signature_of_another_release_names_the_manifest(release, made, tmp_path):
    ca, signer = authority()
    manifest = replace(open_release(release, made[1]).manifest, version="2")
    other = Path(shutil.copytree(release, tmp_path / "other"))
    seal(other, manifest, signer, ca.certificate)
    seal(release, replace(manifest, version="3"), signer, ca.certificate)
    shutil.copy(other / SIGNATURE, release / SIGNATURE)
    assert refused(release, Trust((ca.certificate,))).file == MANIFEST


def test_a_manifest_that_nobody_could_read_is_not_signed(release, made):
    ca, signer = authority()
    with pytest.raises(ReleaseInvalid, match=r"manifest.json: cannot be read .*`version` is 'V 1'"):
        seal(release, replace(open_manifest(release), version="V 1"), signer, ca.certificate)
    assert open_release(release, made[1]).version == "1"


def test_a_missing_file_is_named(release, made):
    (release / "card.md").unlink()
    found = refused(release, made[1])
    assert found.file == "card.md"
    assert "missing" in str(found)


def test_a_file_that_was_added_is_named(release, made):
    (release / "evidence").mkdir(exist_ok=True)
    (release / "evidence" / "more.txt").write_text("trust me")
    assert refused(release, made[1]).file == "evidence/more.txt"


def test_a_link_is_refused_even_to_the_same_bytes(release, made, tmp_path):
    shutil.move(release / WEIGHTS, tmp_path / "elsewhere")
    (release / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    found = refused(release, made[1])
    assert found.file == WEIGHTS
    assert "link" in str(found)


def test_a_folder_that_is_a_link_is_refused(release, made, tmp_path):
    shutil.move(release / "bundle", tmp_path / "bundle")
    (release / "bundle").symlink_to(tmp_path / "bundle")
    assert refused(release, made[1]).file == "bundle"


def test_a_pipe_in_the_folder_does_not_hold_the_reader_up(release, made):
    os.mkfifo(release / "pipe")
    assert refused(release, made[1]).file == "pipe"


def test_the_manifest_has_one_form(release, made):
    content = json.loads((release / MANIFEST).read_bytes())
    (release / MANIFEST).write_text(json.dumps(content, indent=1))
    assert refused(release, made[1]).file == MANIFEST


def test_a_study_that_this_package_does_not_know_is_named(release):
    study = json.loads((release / STUDY).read_bytes()) | {"from_the_future": 1}
    (release / STUDY).write_bytes(canonical_json(study))
    assert refused(release, sealed_anew(release)).file == STUDY


# One file


def zipped(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a//b", ".hidden", "a\\b", "x" * 200])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    bad = zipped(tmp_path / "bad.fedrelease", {name: b"x"})
    with pytest.raises(ReleaseInvalid):
        unpack(bad, tmp_path / "scratch")
    assert not (tmp_path / "outside").exists()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_name_that_is_a_file_and_a_folder_is_refused_as_no_release(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name in ("a", "b/c"):
        (tmp_path / "in" / name).write_bytes(b"x")
    pack(tmp_path / "in", ["a", "b/c"], tmp_path / "good")
    (tmp_path / "bad").write_bytes((tmp_path / "good").read_bytes().replace(b"b/c", b"a/c"))
    with pytest.raises(ReleaseInvalid, match="not in the form"):
        unpack(tmp_path / "bad", tmp_path / "scratch")


def test_a_compressed_file_is_refused_so_that_none_grows_as_it_is_unpacked(tmp_path):
    bomb = zipped(tmp_path / "bomb.fedrelease", {"a": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ReleaseInvalid):
        unpack(bomb, tmp_path / "scratch")


def test_anything_before_between_or_after_the_parts_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"content")
    pack(tmp_path / "in", ["a"], tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    assert (unpack(tmp_path / "good", tmp_path / "scratch") / "a").read_bytes() == b"content"
    for spoilt in (b"#!/bin/sh\n" + good, good + b"\n", good[:-22] + b"PK" + good[-22:], good[:-1], b""):
        (tmp_path / "bad").write_bytes(spoilt)
        with pytest.raises(ReleaseInvalid):
            unpack(tmp_path / "bad", tmp_path / "scratch")


def test_an_interrupted_unpacking_leaves_nothing(made, tmp_path, monkeypatch):
    write_file(made[0], tmp_path / "tiny.fedrelease")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared_models.onefile._copy", full)
    with pytest.raises(OSError, match="No space"):
        unpack(tmp_path / "tiny.fedrelease", tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


# Approvals


@pytest.fixture
def wanting(release: Path) -> tuple[Trust, dict[str, bytes]]:
    """The release, now one that two of three must approve, and their keys."""
    keys = {name: new_site_keys().identity for name in ("north", "south", "east")}
    public = {name: identity_public_key(key).hex() for name, key in keys.items()}
    return sealed_anew(release, approvals=2, approvers=public), keys


def test_a_release_opens_once_enough_approvers_have_signed_it(release, wanting):
    trust, keys = wanting
    digest = open_manifest(release).digest
    assert "0 of 2" in str(refused(release, trust))
    write_approvals(release, {"north": approve(digest, keys["north"])})
    assert "1 of 2" in str(refused(release, trust))
    write_approvals(release, {name: approve(digest, keys[name]) for name in ("north", "east")})
    assert open_release(release, trust).digest == digest


def test_an_approval_by_another_key_or_of_another_release_counts_for_nothing(release, wanting):
    trust, keys = wanting
    digest = open_manifest(release).digest
    for false in (
        {"north": approve(digest, keys["south"]), "south": approve(digest, keys["south"])},
        {"north": approve("0" * 64, keys["north"]), "south": approve(digest, keys["south"])},
        {"north": approve(digest, keys["north"]), "stranger": approve(digest, new_site_keys().identity)},
    ):
        write_approvals(release, false)
        assert refused(release, trust).file == APPROVALS


# Research


def test_a_research_release_opens_only_for_who_asks_for_research(release, made):
    sealed_anew(release, origin=replace(open_manifest(release).origin, kind="simulation"))
    assert "--research" in str(refused(release, made[1]))
    assert open_release(release, Trust(research=True)).manifest.origin.kind == "simulation"


def test_asking_for_research_opens_no_release_of_a_federation_that_is_not_trusted(made):
    assert refused(made[0], Trust(research=True)).file == SIGNATURE
