"""A release in MLflow, read back by MLflow itself from a folder; skipped where the extra is not installed."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from fedserver.cli import app
from fedserver.enrol import Federation, init_federation, signer
from fedserver.publish import to_mlflow
from fedserver.publish.making import make_release
from fedserver.registry import Entry, Step, folder_of
from shared_models.errors import FederationError, StateInvalid
from shared_models.files import write_json
from shared_models.parse import plain
from shared_models.release import members_of
from tests.releases import recipe


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> tuple[Federation, Entry]:
    """A federation with a release of its own in the registry."""
    federation = init_federation(tmp_path_factory.mktemp("mlflow") / "federation", "test federation", "127.0.0.1:1")
    ca = federation.ca_certificate.read_bytes()
    what = replace(recipe(), signer=signer(federation), authority=ca, trust=ca)
    origin = replace(what.origin, code_sha256="c" * 64)
    made = federation.folder / "registry" / "made"
    manifest = make_release(replace(what, origin=origin), made / "release")
    entry = Entry(manifest.digest, manifest.name, "1", "tiny-1", 2, {"north": 2, "south": 1},
                  (Step("candidate", 1.8e9, "coordinator"),))  # fmt: skip
    write_json(made / "entry.json", plain(entry))
    made.rename(folder_of(federation, manifest.digest))
    return federation, entry


def test_a_release_is_a_run_with_its_files_figures_and_digests(registered, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs the extra: pip install 'mlflow-skinny>=2.14,<4'")
    from mlflow.tracking import MlflowClient

    federation, entry = registered
    uri = (tmp_path / "tracking").as_uri()
    words = ["release-export-mlflow", entry.label, uri, "--federation", str(federation.folder), "--json"]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("federated releases")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["release.digest"] == entry.digest
    assert run.data.tags["notice"] == "not for diagnosis"
    assert run.data.metrics["dice/lung/all"] == 0.85
    assert run.data.metrics["dice/lung/gap"] == 0.1
    assert run.data.metrics["parity/model.onnx"] < 1e-4
    assert run.data.params["model.name"] == "unet"
    assert run.data.params["preprocess.size"] == "[32, 32]"
    copied = Path(client.download_artifacts(run.info.run_id, "release", str(tmp_path)))
    source = folder_of(federation, entry.digest) / "release"
    assert {name: digest(copied / name) for name in members_of(copied)} == {
        name: digest(source / name) for name in members_of(source)
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_figures_are_those_of_the_card_and_sites_have_the_cards_names(registered):
    federation, entry = registered
    found = dict(to_mlflow.metrics_of(folder_of(federation, entry.digest) / "release"))
    assert found["dice/lung/site_A"] == 0.9
    assert found["dice/lung/site_B"] == 0.8
    assert not any("north" in name for name in found)


def test_without_mlflow_it_is_said_how_to_install_it(registered, monkeypatch):
    federation, entry = registered
    monkeypatch.setitem(__import__("sys").modules, "mlflow.entities", None)
    with pytest.raises(StateInvalid, match="pip install 'mlflow-skinny"):
        to_mlflow.to_mlflow(federation, entry, "file:///nowhere")


def test_a_release_that_waits_for_its_approvers_is_not_exported(registered, monkeypatch):
    federation, entry = registered
    monkeypatch.setattr(to_mlflow, "manifest_of", lambda *_: cast(Any, SimpleNamespace(approvals=1)))
    with pytest.raises(StateInvalid, match="waits for its approvers"):
        to_mlflow.to_mlflow(federation, entry, "file:///nowhere")


class Server:
    """In the place of MLflow: takes everything but files."""

    def __init__(self, tracking_uri: str) -> None:
        self.ended: list[tuple[str, ...]] = []
        self.made: list[str] = []
        servers.append(self)

    def get_experiment_by_name(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id="1")

    def create_run(self, *_: Any, **__: Any) -> SimpleNamespace:
        self.made.append("r")
        return SimpleNamespace(info=SimpleNamespace(run_id="r"))

    def log_batch(self, *_: Any, **__: Any) -> None:
        pass

    def log_artifacts(self, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    def set_terminated(self, *words: str) -> None:
        self.ended.append(words)


servers: list[Server] = []


@pytest.fixture
def mlflow(monkeypatch) -> None:
    servers.clear()
    made = {
        "mlflow": ModuleType("mlflow"),
        "mlflow.entities": SimpleNamespace(Metric=tuple_of, Param=tuple_of, RunTag=tuple_of),
        "mlflow.exceptions": SimpleNamespace(MlflowException=RuntimeError),
        "mlflow.tracking": SimpleNamespace(MlflowClient=Server),
    }
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)


def tuple_of(*words: Any) -> tuple[Any, ...]:
    return words


@pytest.mark.usefixtures("mlflow")
def test_a_run_that_breaks_off_half_way_is_marked_as_failed(registered):
    federation, entry = registered
    with pytest.raises(StateInvalid, match="No space left"):
        to_mlflow.to_mlflow(federation, entry, "http://127.0.0.1:1")
    assert servers[0].ended == [("r", "FAILED")]


@pytest.mark.usefixtures("mlflow")
def test_a_release_that_leaves_out_where_it_comes_from_makes_no_run(registered):
    federation, entry = registered
    with pytest.raises(FederationError, match="leaves out where it comes from"):
        to_mlflow.to_mlflow(federation, replace(entry, run=""), "http://127.0.0.1:1")
    assert servers == []
