"""An authority is renewed: a hospital takes the new one by its words, beside the old one, which it drops later."""

import json
import ssl
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedclient.authorities import drop, one_in, pinned, take
from fedclient.cli import app
from fedclient.site import Data, SiteFile, site_toml
from shared_models.errors import StateInvalid
from shared_models.files import read_lines, write_atomic
from shared_models.identity import (
    Credential,
    authorities_in,
    fingerprint_words,
    is_issued_by,
    issue_server,
    issue_signer,
    new_authority,
    new_site_keys,
    save_secret,
    vouched,
)

OLD, NEW = new_authority("lungs"), new_authority("lungs")


def words_of(authority: Credential) -> str:
    (one,) = authorities_in(authority.certificate, "test")
    return fingerprint_words(one.fingerprint)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    write_atomic(folder / "site.toml", site_toml(SiteFile("north", "host:1", "lungs", Data("/d"))).encode())
    save_secret(folder / "keys" / "identity.key", new_site_keys().identity)
    write_atomic(folder / "keys" / "ca.pem", OLD.certificate)
    (tmp_path / "new.pem").write_bytes(NEW.certificate)
    (tmp_path / "old.pem").write_bytes(OLD.certificate)
    return folder


def events(site: Path) -> list[str]:
    log = site / "audit.jsonl"
    return [line["event"] for line in read_lines(log) if line["event"] != "opened"] if log.exists() else []


def test_a_new_authority_is_taken_by_its_words_and_both_vouch_until_the_old_one_is_dropped(site, tmp_path):
    take(site, tmp_path / "new.pem", words_of(NEW).upper())
    both = (site / "keys" / "ca.pem").read_bytes()
    for authority in (OLD, NEW):
        assert vouched(both, issue_signer(authority).certificate) is not None
        assert is_issued_by(der(issue_server(authority, ["localhost"]).certificate), both)
    drop(site, tmp_path / "old.pem")
    left = (site / "keys" / "ca.pem").read_bytes()
    assert left == NEW.certificate
    assert vouched(left, issue_signer(OLD).certificate) is None
    assert events(site) == ["authority-trusted", "authority-dropped"]


def der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode())


def test_other_words_than_those_of_the_certificate_are_refused(site, tmp_path):
    with pytest.raises(StateInvalid, match="other words"):
        take(site, tmp_path / "new.pem", words_of(OLD))
    assert len(pinned(site)) == 1
    assert events(site) == []


def test_an_authority_is_taken_once_and_the_last_one_is_not_dropped(site, tmp_path):
    take(site, tmp_path / "old.pem", words_of(OLD))
    assert len(pinned(site)) == 1
    assert events(site) == []
    with pytest.raises(StateInvalid, match="alone"):
        drop(site, tmp_path / "old.pem")
    with pytest.raises(StateInvalid, match="not in it"):
        drop(site, tmp_path / "new.pem")


@pytest.mark.parametrize("content", [
    b"", b"nothing", OLD.certificate + NEW.certificate, issue_signer(OLD).certificate, OLD.certificate[:-40],
])  # fmt: skip
def test_a_file_that_is_not_one_authority_is_refused(tmp_path, content):
    (tmp_path / "x.pem").write_bytes(content)
    with pytest.raises(StateInvalid):
        one_in(tmp_path / "x.pem")


def test_the_command_shows_words_before_it_changes_anything(site, tmp_path):
    def typed(*words: str) -> str:
        ran = CliRunner().invoke(app, ["trust", *words, "--site", str(site)])
        assert ran.exit_code == 0, ran.output
        return " ".join(ran.output.split())

    assert words_of(NEW) in typed(str(tmp_path / "new.pem"))
    assert [each["words"] for each in json.loads(typed("--json"))] == [words_of(OLD)]
    told = typed(str(tmp_path / "new.pem"), "--words", words_of(NEW))
    assert words_of(OLD) in told
    assert words_of(NEW) in told
    typed(str(tmp_path / "old.pem"), "--drop")
    assert [each["words"] for each in json.loads(typed("--json"))] == [words_of(NEW)]
