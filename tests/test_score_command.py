"""A release scored at a hospital: the figures are those that a round would count, and nothing leaves."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedclient.cli
from fedclient.site import Data, SiteFile, open_site, site_toml
from fedclient.training.learner import ImageLearner
from fedserver.publish.making import make_release
from shared_models.files import private_folder, write_atomic
from shared_models.nets import initial_weights
from shared_models.standing import Stage, Standing, Standings, sign_standings
from simulations.phantoms import PhantomPlan, phantom
from tests.releases import made_release, recipe, tiny_study


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = PhantomPlan(sites=3, train=1, val=1, test=2, slices=2, size=32)
    data = phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)
    folder = tmp_path_factory.mktemp("hospital") / "site"
    private_folder(folder / "secrets")
    file = SiteFile("north", "localhost:1", "test", Data(str(data), manifest_site="north"))
    write_atomic(folder / "site.toml", site_toml(file).encode())
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A release, and the certificate of the authority that vouches for it."""
    folder = tmp_path_factory.mktemp("release")
    release, trust = made_release(folder)
    (folder / "ca.pem").write_bytes(trust.authorities[0])
    return release, folder / "ca.pem"


def score(hospital: Path, released: tuple[Path, Path], *words: str) -> tuple[int, str]:
    release, authority = map(str, released)
    words = ("score", release, "--site", str(hospital), "--authority", authority, *words)
    done = CliRunner().invoke(fedclient.cli.app, list(words))
    return done.exit_code, done.output


def test_a_release_is_scored_on_the_sites_own_test_patients_as_a_round_would(hospital, released):
    code, out = score(hospital, released, "--json")
    assert code == 0, out
    told = json.loads(out)
    study = tiny_study()
    due = ImageLearner().score(open_site({"site-dir": str(hospital)}), study, initial_weights(study), "test")
    assert (told["split"], told["scores"]["lung"]["cases"]) == ("test", due["lung"].cases)
    assert told["scores"]["lung"]["dice"] == pytest.approx(due["lung"].value, abs=1e-6)
    assert not (hospital / "audit.jsonl").exists()  # where all that leaves is written down


def test_a_person_reads_one_line_for_each_label(hospital, released):
    code, out = score(hospital, released, "--split", "val")
    assert code == 0, out
    assert "lung: Dice 0." in out
    assert "Nothing of this has left the site" in out


def test_a_release_that_was_retired_is_not_scored_and_what_else_the_list_says_is_told(tmp_path, hospital):
    what, release = recipe(), tmp_path / "release"
    digest = make_release(what, release).digest
    (tmp_path / "ca.pem").write_bytes(what.authority)
    given = release, tmp_path / "ca.pem"
    now = time.time()

    def listed(stage: Stage, until_s: float) -> str:
        standings = Standings(
            "fedstatus/1", "test federation", now - 9, until_s, {digest: Standing("tiny-1", stage, now)}
        )
        (tmp_path / stage).write_bytes(sign_standings(what.signer, standings))
        return str(tmp_path / stage)

    code, out = score(hospital, given, "--json", "--status", listed("approved", now - 5))
    assert code == 0, out
    assert "was good until" in json.loads(out)["warnings"][0]
    code, out = score(hospital, given, "--status", listed("retired", now + 9))
    assert code == 1
    assert "has retired it" in out
