"""The app as Flower ships it: the same bytes everywhere, no code in it; Flower quiet, pinned and off the proxy."""

import hashlib
import io
import types
import zipfile
from pathlib import Path

import pytest
from flwr.common.config import get_fab_config, get_metadata_from_config

from shared_models import archive
from shared_models.archive import app_archive, digest, load_app, quiet_flower, replace_default, replace_name
from shared_models.errors import ProcessFailed


def test_the_archive_has_the_same_bytes_wherever_it_is_built() -> None:
    assert app_archive() == app_archive()
    with zipfile.ZipFile(io.BytesIO(app_archive())) as opened:
        for entry in opened.infolist():
            assert (entry.compress_type, entry.create_system) == (zipfile.ZIP_STORED, 3)
            assert entry.date_time == (2024, 10, 1, 0, 0, 0)


def test_the_archive_carries_no_code() -> None:
    with zipfile.ZipFile(io.BytesIO(app_archive())) as opened:
        assert opened.namelist() == ["pyproject.toml", ".info/CONTENT"]


def test_flower_reads_name_version_apps_and_keys_from_the_archive() -> None:
    config = get_fab_config(app_archive())
    assert get_metadata_from_config(config) == ("federation/fedimaging", archive.package_version())
    app = config["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "fedserver.app:app", "clientapp": "fedclient.app:app"}
    assert app["config"] == {"run": ""}


def test_the_contents_list_of_the_archive_tells_the_truth() -> None:
    with zipfile.ZipFile(io.BytesIO(app_archive())) as opened:
        project = opened.read("pyproject.toml")
        line = opened.read(".info/CONTENT").decode()
    assert line == f"pyproject.toml,{hashlib.sha256(project).hexdigest()},{len(project) * 8}"


def test_another_release_has_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = digest(app_archive())
    monkeypatch.setattr(archive, "package_version", lambda: "99.0.0")
    assert digest(app_archive()) != ours


def test_loopback_stays_off_the_proxy_and_other_exceptions_are_kept() -> None:
    env = quiet_flower(Path("home"), {"NO_PROXY": "intranet.example,127.0.0.1"})
    assert env["NO_PROXY"].split(",") == ["intranet.example", "127.0.0.1", "localhost", "::1"]
    assert env["no_proxy"] == env["NO_PROXY"]


def test_flower_is_told_to_keep_quiet() -> None:
    env = quiet_flower(Path("home"), {})
    assert (env["FLWR_TELEMETRY_ENABLED"], env["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["FLWR_HOME"] == "home"


def test_a_private_name_that_is_gone_stops_the_process_with_the_version_to_install() -> None:
    module = types.ModuleType("flwr.somewhere")
    with pytest.raises(ProcessFailed, match=r"flwr\.somewhere\.gone is not there.*flwr==1\.41\.0"):
        replace_name(module, "gone", 1)
    with pytest.raises(ProcessFailed, match=r"flwr==1\.41\.0"):
        archive.flower_module("flwr.never_was")


def test_a_default_is_replaced_only_where_it_is() -> None:
    def pull(*, backoff: float = 1.0) -> float:
        return backoff

    replace_default(pull, "backoff", 0.5)
    assert pull() == 0.5
    with pytest.raises(ProcessFailed, match="cap="):
        replace_default(pull, "cap", 1)


def test_an_app_is_loaded_by_name_or_refused_with_its_name() -> None:
    assert load_app("json:loads")("1") == 1
    with pytest.raises(ProcessFailed, match="'json:nothing'"):
        load_app("json:nothing")
