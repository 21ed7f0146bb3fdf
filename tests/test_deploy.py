"""What a hospital's IT installs: units that systemd takes, containers without rights, wheels with digests."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import fedclient.cli
import fedserver.cli

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
EVERY_UNIT = sorted(DEPLOY.glob("systemd/*.service"))
UNITS = [unit for unit in EVERY_UNIT if unit.stem in ("fedclient", "fedserver")]  # programs of ours


def options(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here (Debian's systemd)")
@pytest.mark.parametrize("unit", EVERY_UNIT, ids=lambda path: path.name)
def test_systemd_finds_no_fault_in_the_unit(unit, tmp_path):
    """With a program that is there in the place of ours: where it is installed differs from machine to machine."""
    text = unit.read_text().replace("Documentation=file:/opt/fedimaging/", "#")
    for command in options(unit)["ExecStart"]:
        text = text.replace(command.split()[0].removeprefix("-"), "/bin/true")
    (tmp_path / unit.name).write_text(text)
    words = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / unit.name)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    about = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line or "Unknown" in line]
    assert (done.returncode, about) == (0, [])


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_has_a_user_of_its_own_and_writes_into_its_state_alone(unit):
    found = options(unit)
    name = unit.stem
    assert found["User"] == [name]
    assert found["StateDirectory"] == [name]
    for key, value in {
        "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes",
        "CapabilityBoundingSet": "", "RestrictSUIDSGID": "yes", "UMask": "0077", "Restart": "on-failure",
    }.items():  # fmt: skip
        assert found[key] == [value], key


def test_images_are_read_only_for_the_node_and_its_gpu_is_let_in():
    unit = options(DEPLOY / "systemd/fedclient.service")
    assert unit["ReadOnlyPaths"] == ["-/srv/images"]
    assert "char-nvidia rw" in unit["DeviceAllow"]
    (after,) = unit["After"]
    assert "fedclient-gpu.service" in after.split()  # devices that are made later are not let in
    assert "PrivateDevices" not in unit
    assert "MemoryDenyWriteExecute" not in unit


def typed(words: list[str]) -> None:
    """Raises unless this is a command of ours with options that it has."""
    app = {"fedclient": fedclient.cli.app, "fedserver": fedserver.cli.app}[Path(words[0]).name]
    command = get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, words


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_what_a_unit_starts_is_a_command_that_there_is(unit):
    typed(options(unit)["ExecStart"][0].split())


@pytest.fixture
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


def test_no_container_has_rights_that_it_does_not_need(compose):
    assert set(compose["services"]) == {"hospital", "hospital-gpu", "coordinator"}
    for name, service in compose["services"].items():
        assert service["user"] == "10001:10001"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert "docker.sock" not in str(service)
        assert service["profiles"] == [name]
        typed(service["command"])


def test_a_hospitals_container_reads_images_only_and_listens_nowhere(compose):
    for name in ("hospital", "hospital-gpu"):
        service = compose["services"][name]
        (images,) = (mount for mount in service["volumes"] if mount.endswith(":/data:ro"))
        assert images.startswith("${DATA:-")
        assert "ports" not in service
        assert "network_mode" not in service
    assert compose["services"]["coordinator"]["ports"] == ["${PORT:-8443}:8443"]


@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not here")
def test_docker_reads_the_compose_file_as_we_do(compose):
    words = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "--profile", "*", "config", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if "is not a docker command" in done.stderr or "unknown shorthand flag" in done.stderr:
        pytest.skip("docker has no compose plugin here (Debian's docker-compose-v2)")
    assert done.returncode == 0, done.stderr


def test_the_image_runs_as_nobody_in_particular_and_installs_wheels_by_their_digests():
    text = (DEPLOY / "Dockerfile").read_text()
    last = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert "--require-hashes" in text
    assert not re.search(r"^ADD |curl|wget|sudo", text, re.MULTILINE)
    for name in ("FEDSERVER_FEDERATION=/state/federation", "FEDCLIENT_SITE=/state/site"):
        assert name in last


def test_every_command_of_the_guide_is_one_that_there_is():
    text = (ROOT / "README.md").read_text().partition("\n## Installing it for good\n")[2].partition("\n## ")[0]
    there = "fedclient|fedserver"
    found = re.findall(rf"(?<![-/a-z])((?:{there}) (?!{there}|env)[a-z]+(?: [^\n#`|<&]*)?)", text)
    assert len(found) >= 10
    for words in found:
        head = [word.rstrip(",.;:") for word in words.split()]
        typed([head[0], head[1], *(word for word in head[2:] if re.fullmatch(r"--[a-z-]+", word))])


def wheel(folder: Path, name: str, needs: str = "") -> Path:
    """A wheel of one module, made by hand."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "VALUE = 7\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in files) + f"{info}/RECORD,,\n"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in files.items():
            archive.writestr(inner, text)
    return path


def install(folder: Path, target: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(folder), "--require-hashes"]
    words += ["--requirement", str(folder / "requirements.txt"), "--target", str(target), "--no-compile"]
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_a_folder_of_wheels_is_installed_by_its_digests_and_not_once_a_byte_was_changed(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    first = wheel(folder, "some_module", "Requires-Dist: other-module>=1\n")
    wheel(folder, "other_module")
    made = subprocess.run([str(DEPLOY / "digests.sh"), str(folder)], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    assert f"some-module==1.0 --hash=sha256:{digest}\n" in made
    assert made.count("\n") == 2
    (folder / "requirements.txt").write_text(made)
    done = install(folder, tmp_path / "there")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there/some_module.py").read_text() == "VALUE = 7\n"
    wheel(folder, "other_module", "Summary: changed on its way\n")
    done = install(folder, tmp_path / "again")
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


@pytest.mark.parametrize("script", ["wheels.sh", "digests.sh"])
def test_the_scripts_are_sound_and_may_be_run(script):
    assert os.access(DEPLOY / script, os.X_OK)
    subprocess.run(["bash", "-n", str(DEPLOY / script)], check=True)
