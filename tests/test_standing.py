"""News of a release that was retired reaches hospitals as a signed list; and whose releases and lists they take."""

import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from fedclient import doctor, trust
from fedclient.cli import app
from fedclient.release_policy import Releases
from fedclient.serving import worker
from fedclient.site import Data, SiteFile, site_toml
from fedclient.trust import Watch, groups_of, trust_in
from fedserver.publish.making import make_release
from shared_models.errors import ReleaseInvalid
from shared_models.files import write_atomic
from shared_models.identity import Credential, issue_signer, new_authority
from shared_models.release import Release, Trust, open_release
from shared_models.standing import Standing, Standings, read_standings, sign_standings
from tests.marking import model
from tests.releases import recipe

FEDERATION = "test federation"
MADE, DAY = 1.8e9, 86400.0  # when the release was made, as tests/releases.py has it


@dataclass(frozen=True)
class Made:
    """A release of a federation, and who signs for that."""

    folder: Path
    authority: bytes
    signer: Credential

    def opened(self) -> Release:
        return open_release(self.folder, Trust((self.authority,)))

    def listed(self, to: Path, stage: str = "approved", at: float = MADE + DAY, by: Credential | None = None,
               days: float = 30, federation: str = FEDERATION, **more: Any) -> Path:  # fmt: skip
        """A list of its federation; `stage` "" leaves the release out."""
        digest = self.opened().digest
        releases = {digest: Standing("tiny-lung-1", stage, at, more.get("words", ""))} if stage else {}  # type: ignore[arg-type]
        made = Standings("fedstatus/1", federation, at, at + days * DAY, releases)
        to.write_bytes(sign_standings(by or self.signer, made))
        return to


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    what, folder = recipe(), tmp_path_factory.mktemp("standing") / "release"
    make_release(what, folder)
    return Made(folder, what.authority, what.signer)


@pytest.fixture
def site(made: Made, tmp_path: Path) -> Path:
    """A site that has pinned the authority of the release."""
    write_atomic(tmp_path / "site" / "keys" / "ca.pem", made.authority)
    return tmp_path / "site"


@pytest.fixture
def today(monkeypatch) -> None:
    """Commands, too, are after the release was made."""
    monkeypatch.setattr("time.time", lambda: MADE + 4 * DAY)


def configured(site: Path, **table: Any) -> None:
    file = SiteFile("north", "host:1", "f", Data("/d"), releases=Releases(**table))
    write_atomic(site / "site.toml", site_toml(file).encode())


def asked(made: Made, site: Path, given: Path | None = None, now: float = MADE + 2 * DAY) -> list[str]:
    return Watch(site, made.opened(), groups_of(site, ()), given).warnings(now)


def typed(*words: str, code: int = 0) -> str:
    ran = CliRunner().invoke(app, list(words))
    assert ran.exit_code == code, ran.output
    return ran.output


# ---- the list ----


def test_without_a_list_there_is_nothing_to_say_and_with_one_that_has_it_neither(made, site, tmp_path):
    assert asked(made, site) == []
    assert asked(made, site, made.listed(tmp_path / "s")) == []


def test_a_retired_release_is_not_used_and_why_is_told(made, site, tmp_path):
    with pytest.raises(ReleaseInvalid, match=r"retired it on 2027-01-16 \(a site has left\)"):
        asked(made, site, made.listed(tmp_path / "s", "retired", words="a site has left"))


def test_a_list_that_is_not_good_any_more_warns_and_where_one_is_asked_for_refuses(made, site, tmp_path):
    old = made.listed(tmp_path / "s", days=1)
    (warning,) = asked(made, site, old, MADE + 3 * DAY)
    assert "good until 2027-01-17" in warning
    configured(site, status_required=True)
    assert asked(made, site, old, MADE + 1.5 * DAY) == []
    with pytest.raises(ReleaseInvalid, match="status_required"):
        asked(made, site, old, MADE + 3 * DAY)


def test_where_a_list_is_asked_for_none_is_a_refusal(made, site):
    configured(site, status_required=True)
    with pytest.raises(ReleaseInvalid, match="fedserver release-status"):
        asked(made, site)


def test_a_release_that_a_younger_list_does_not_know_is_refused_and_one_younger_than_the_list_is_not(
    made, site, tmp_path
):
    with pytest.raises(ReleaseInvalid, match="is not among those"):
        asked(made, site, made.listed(tmp_path / "s", ""))
    other = made.listed(tmp_path / "t", "", at=MADE - DAY)
    shutil.rmtree(site / "release-status")
    assert any("does not know it yet" in words for words in asked(made, site, other))


def test_a_candidate_is_called_one(made, site, tmp_path):
    (warning,) = asked(made, site, made.listed(tmp_path / "s", "candidate"))
    assert "candidate" in warning


def test_that_a_site_has_left_is_said_of_a_release_that_goes_on_in_use(made, site, tmp_path):
    (warning,) = asked(made, site, made.listed(tmp_path / "s", words="a site whose updates it holds has withdrawn"))
    assert warning.startswith("a site whose updates it holds has withdrawn")


@pytest.mark.parametrize("spoil", [
    lambda c: c.replace(b"approved", b"retired!"), lambda c: c.replace(b'"good_until":18', b'"good_until":19'),
    lambda c: c[:-1], lambda c: b"{}",
])  # fmt: skip
def test_a_list_of_which_a_byte_was_changed_is_refused(made, site, tmp_path, spoil):
    path = made.listed(tmp_path / "s")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ReleaseInvalid):
        asked(made, site, path)


def test_a_list_signed_by_another_authority_or_of_another_federation_says_nothing(made, site, tmp_path):
    stranger = issue_signer(new_authority(FEDERATION))
    with pytest.raises(ReleaseInvalid, match="not signed by the federation"):
        asked(made, site, made.listed(tmp_path / "s", by=stranger))
    with pytest.raises(ReleaseInvalid, match="'another'"):
        asked(made, site, made.listed(tmp_path / "t", federation="another"))


# ---- kept ----


def test_a_list_is_kept_and_an_older_one_does_not_bring_a_release_back(made, site, tmp_path):
    with pytest.raises(ReleaseInvalid):
        asked(made, site, made.listed(tmp_path / "new", "retired", at=MADE + 2 * DAY))
    with pytest.raises(ReleaseInvalid):  # kept
        asked(made, site)
    with pytest.raises(ReleaseInvalid):
        asked(made, site, made.listed(tmp_path / "old", at=MADE + DAY))


def test_a_kept_list_that_is_spoilt_stops_use_until_another_is_handed_in(made, site, tmp_path):
    assert asked(made, site, made.listed(tmp_path / "s")) == []
    (kept,) = (site / "release-status").glob("*.json")
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(ReleaseInvalid, match="release-status"):
        asked(made, site)
    assert asked(made, site, made.listed(tmp_path / "t")) == []
    assert asked(made, site) == []


def test_an_older_list_that_is_handed_in_is_said_to_be_one(made, site, tmp_path):
    assert asked(made, site, made.listed(tmp_path / "new", at=MADE + 2 * DAY)) == []
    (warning,) = asked(made, site, made.listed(tmp_path / "old", at=MADE + DAY), MADE + 3 * DAY)
    assert "older than the list" in warning


def test_a_list_dated_ahead_or_without_a_day_is_not_taken_and_one_of_a_clock_an_hour_off_is(made, site, tmp_path):
    with pytest.raises(ReleaseInvalid, match="dated 2030-01-14, which has not come"):
        asked(made, site, made.listed(tmp_path / "s", at=MADE + 1095 * DAY))
    with pytest.raises(ReleaseInvalid, match="ends before it begins"):
        asked(made, site, made.listed(tmp_path / "t", days=-1))
    assert not (site / "release-status").exists()
    assert asked(made, site, made.listed(tmp_path / "u", at=MADE + 2 * DAY + 3600)) == []


def test_a_kept_list_dated_ahead_hides_no_retirement(made, site, tmp_path):
    ahead = made.listed(tmp_path / "ahead", at=MADE + 1095 * DAY)
    assert asked(made, site, ahead, MADE + 1096 * DAY) == []  # kept while this machine's clock was as wrong
    with pytest.raises(ReleaseInvalid, match="which has not come"):
        asked(made, site)
    with pytest.raises(ReleaseInvalid, match="retired"):
        asked(made, site, made.listed(tmp_path / "true", "retired"))
    with pytest.raises(ReleaseInvalid, match="retired"):
        asked(made, site)


def test_a_retirement_stands_that_only_an_older_list_has(made, site, tmp_path):
    assert asked(made, site, made.listed(tmp_path / "new", at=MADE + 2 * DAY)) == []
    with pytest.raises(ReleaseInvalid, match="retired"):
        asked(made, site, made.listed(tmp_path / "old", "retired", at=MADE + DAY))


@pytest.mark.parametrize("left_out", [False, True])
def test_a_newer_list_of_a_coordinator_that_was_restored_brings_no_retired_release_back(made, site, tmp_path, left_out):
    with pytest.raises(ReleaseInvalid, match="retired it on"):
        asked(made, site, made.listed(tmp_path / "new", "retired"))
    restored = made.listed(tmp_path / "restored", "" if left_out else "approved", at=MADE + 2 * DAY)
    with pytest.raises(ReleaseInvalid, match=r"no longer calls tiny-lung-1 retired.* backup.*Telephone it"):
        asked(made, site, restored)
    with pytest.raises(ReleaseInvalid, match="retired it on"):  # the older list is the one that is kept
        asked(made, site)
    with pytest.raises(ReleaseInvalid, match="again and again"):
        asked(made, site, made.listed(tmp_path / "mended", "retired", at=MADE + 2 * DAY, words="again and again"))


def test_a_newer_list_that_brings_another_release_back_is_not_kept_either(made, site, tmp_path):
    def both(name: str, at: float, stage: Any) -> Path:
        of_all = {
            made.opened().digest: Standing("tiny-lung-1", "approved", at),
            "e" * 64: Standing("older-1", stage, at),
        }
        listed = Standings("fedstatus/1", FEDERATION, at, at + 30 * DAY, of_all)
        path: Path = tmp_path / name
        path.write_bytes(sign_standings(made.signer, listed))
        return path

    assert asked(made, site, both("new", MADE + DAY, "retired")) == []
    (kept,) = (site / "release-status").glob("*.json")
    with pytest.raises(ReleaseInvalid, match="no longer calls older-1 retired"):
        asked(made, site, both("restored", MADE + 2 * DAY, "approved"))
    assert kept.read_bytes() == (tmp_path / "new").read_bytes()


def test_a_list_that_cannot_be_kept_brings_no_retired_release_back(made, site, tmp_path, monkeypatch):
    with pytest.raises(ReleaseInvalid):
        asked(made, site, made.listed(tmp_path / "new", "retired"))
    monkeypatch.setattr(trust, "locked", Mock(side_effect=OSError(30, "Read-only file system")))
    with pytest.raises(ReleaseInvalid, match="no longer calls tiny-lung-1 retired"):
        asked(made, site, made.listed(tmp_path / "restored", at=MADE + 2 * DAY))


def test_a_list_that_cannot_be_kept_counts_all_the_same_and_that_is_said(made, site, tmp_path):
    (site / "release-status").write_bytes(b"no folder")  # as on a disk that is only read
    (warning,) = asked(made, site, made.listed(tmp_path / "s"))
    assert "could not be kept here" in warning
    with pytest.raises(ReleaseInvalid, match="retired"):
        asked(made, site, made.listed(tmp_path / "t", "retired"))
    with pytest.raises(ReleaseInvalid, match="nowhere"):
        asked(made, site, tmp_path / "nowhere")


def test_where_there_is_no_site_a_list_is_looked_at_and_not_kept(made, tmp_path):
    watch = Watch(tmp_path / "nowhere", made.opened(), ((made.authority,),), made.listed(tmp_path / "s"))
    assert watch.warnings(MADE + 2 * DAY) == []
    assert not (tmp_path / "nowhere").exists()


# ---- commands ----


@pytest.mark.usefixtures("today")
def test_the_doctor_tells_of_a_list_that_is_not_good_any_more_and_of_one_that_is_asked_for(made, site, tmp_path):
    asks = Releases(status_required=True)
    assert [line.state for line in doctor._releases(site, Releases())] == []
    assert [line.state for line in doctor._releases(site, asks)] == ["fail"]
    asked(made, site, made.listed(tmp_path / "s", days=30_000))
    assert [line.state for line in doctor._releases(site, asks)] == ["ok"]
    (kept,) = (site / "release-status").glob("*.json")
    kept.write_bytes(made.listed(tmp_path / "u", at=MADE + 1095 * DAY).read_bytes())
    assert [line.state for line in doctor._releases(site, asks)] == ["fail"]
    kept.write_bytes(made.listed(tmp_path / "v", days=30_000).read_bytes())
    past = made.listed(tmp_path / "t", at=1.0e9)
    (site / "release-status").joinpath(f"{'0' * 16}.json").write_bytes(past.read_bytes())
    assert [line.state for line in doctor._releases(site, asks)] == ["warn", "ok"]


@pytest.mark.usefixtures("today")
def test_verify_keeps_the_list_and_predict_then_refuses(made, site, tmp_path):
    (tmp_path / "a.nii").write_bytes(b"never read")
    words = [str(made.folder), "--site", str(site)]
    told = Watch(site, made.opened(), groups_of(site, ()), made.listed(tmp_path / "good", days=30_000))
    assert told.warnings() == []
    assert "approved by the list of 2027-01-16" in told.said()
    made.listed(tmp_path / "bad", "retired", at=MADE + 2 * DAY, words="a fault was found")
    # the evidence of a release for tests is none, so that verify ends before it: the list is handed to predict
    predicted = ["predict", *words, str(tmp_path / "a.nii"), "-o", str(tmp_path / "out")]
    assert "a fault was found" in typed(*predicted, "--status", str(tmp_path / "bad"), code=1)
    assert "a fault was found" in typed(*predicted, code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("today")
def test_a_service_that_runs_stops_answering_once_a_list_retires_its_release(made, site, tmp_path):
    watch = Watch(site, made.opened(), ((made.authority,),))
    orders = [json.dumps({"folder": str(tmp_path / "case")}) + "\n"] * 2

    def sent():
        yield orders[0]
        replace(watch, given=made.listed(tmp_path / "good", days=30_000)).warnings()
        yield orders[0]
        with pytest.raises(ReleaseInvalid):
            replace(watch, given=made.listed(tmp_path / "bad", "retired", at=MADE + 3 * DAY)).warnings()
        yield orders[1]

    (tmp_path / "case" / "in").mkdir(parents=True)
    answers = io.StringIO()
    worker.serve(model(), site, watch, sent(), answers)
    codes = [json.loads(line)["unread"][0]["code"] for line in answers.getvalue().splitlines()]
    assert codes == ["FILE_MISSING", "FILE_MISSING", "RELEASE_RETIRED"]


@pytest.mark.usefixtures("today")
def test_a_service_whose_list_has_run_out_says_so_once_and_one_that_asks_for_a_list_does_not_call_it_retired(
    made, site, tmp_path, caplog
):
    watch = Watch(site, made.opened(), ((made.authority,),), made.listed(tmp_path / "old", days=1)).later()
    (tmp_path / "case" / "in").mkdir(parents=True)
    order = json.dumps({"folder": str(tmp_path / "case")}) + "\n"

    def sent():
        yield from (order, order)
        configured(site, status_required=True)
        yield order

    answers = io.StringIO()
    worker.serve(model(), site, watch, sent(), answers)
    codes = [json.loads(line)["unread"][0]["code"] for line in answers.getvalue().splitlines()]
    assert codes == ["FILE_MISSING", "FILE_MISSING", "RELEASE_NOT_CLEARED"]
    assert caplog.text.count("was good until 2027-01-17: whether") == 1


@pytest.mark.usefixtures("today")
def test_a_list_that_could_not_be_kept_counts_for_all_cases_of_a_service(made, site, tmp_path):
    configured(site, status_required=True)
    given = made.listed(tmp_path / "s")
    kept = Watch(site, made.opened(), groups_of(site, ()), given).later()
    assert kept.given is None
    assert kept.warnings() == []
    shutil.rmtree(site / "release-status")
    (site / "release-status").write_bytes(b"no folder")  # as on a disk that is only read
    (warning,) = Watch(site, made.opened(), groups_of(site, ()), given).later().warnings()
    assert "could not be kept here" in warning


@pytest.mark.usefixtures("today")
def test_a_predicting_process_is_replaced_though_the_list_that_was_handed_in_has_gone(
    made, site, tmp_path, monkeypatch
):
    given, started = made.listed(tmp_path / "stick.json", days=30_000), Mock()
    monkeypatch.setattr("fedclient.serving.service.Service", started)
    typed("serve-model", str(made.folder), "--site", str(site), "--status", str(given))
    command = started.call_args.args[2]
    given.unlink()
    again = Path(command[command.index("--status") + 1])
    assert Watch(site, made.opened(), groups_of(site, ()), again).warnings() == []
    assert "is not there" in typed("serve-model", str(made.folder), "--site", str(site), "--status", str(given), code=1)


# ---- whom a site trusts ----


def founded_anew(made: Made, site: Path) -> Credential:
    """The federation has another authority now, which this site has joined; the old one is its predecessor."""
    new = new_authority(FEDERATION)
    write_atomic(site / "keys" / "ca.pem", new.certificate)
    (site / "before.pem").write_bytes(made.authority)
    configured(site, predecessors=("before.pem",))
    return new


def test_a_release_that_the_predecessor_vouches_for_is_taken_and_one_of_a_stranger_is_not(made, site):
    founded_anew(made, site)
    assert asked(made, site) == []
    write_atomic(site / "before.pem", new_authority(FEDERATION).certificate)
    with pytest.raises(ReleaseInvalid, match="not the one trusted here"):
        open_release(made.folder, trust_in(site, (), False))


def test_a_list_signed_under_the_new_authority_is_of_a_release_signed_under_the_old_one(made, site, tmp_path):
    new = founded_anew(made, site)
    with pytest.raises(ReleaseInvalid, match="retired"):
        asked(made, site, made.listed(tmp_path / "s", "retired", by=issue_signer(new)))


def test_another_federation_that_is_trusted_too_has_no_say_over_the_releases_of_the_first(made, site, tmp_path):
    other = new_authority("other")
    (site / "other.pem").write_bytes(other.certificate)
    configured(site, authorities=("other.pem",))
    assert groups_of(site, ()) == ((made.authority,), (other.certificate,))
    with pytest.raises(ReleaseInvalid, match="not signed by the federation"):
        asked(made, site, made.listed(tmp_path / "s", "retired", by=issue_signer(other)))


def test_releases_of_a_further_federation_in_site_toml_are_taken_and_a_file_that_is_gone_is_named(made, site):
    write_atomic(site / "keys" / "ca.pem", new_authority("mine").certificate)
    with pytest.raises(ReleaseInvalid):
        open_release(made.folder, trust_in(site, (), False))
    (site / "theirs.pem").write_bytes(made.authority)
    configured(site, authorities=("theirs.pem",))
    assert open_release(made.folder, trust_in(site, (), False)).digest == made.opened().digest
    (site / "theirs.pem").unlink()
    with pytest.raises(ReleaseInvalid, match=r"theirs\.pem: is not there"):
        trust_in(site, (), False)


def test_a_list_comes_back_as_it_was_signed(made, tmp_path):
    path = made.listed(tmp_path / "s", words="ü")
    found = read_standings(path.read_bytes(), (made.authority,), "s")
    assert (found.federation, found.good_until - found.made_at) == (FEDERATION, 30 * DAY)
