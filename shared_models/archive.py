"""Flower as both sides use it: the thin app, the switches that keep it quiet, private names replaced with care.

The app's archive (a FAB: a zip with `pyproject.toml` and `.info/CONTENT`) carries no code. Coordinator and hospital
build it from the package that each has installed; equal digests mean equal releases, and anything else is refused.
"""

import hashlib
import io
import logging
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from shared_models import logs
from shared_models.errors import ProcessFailed

PACKAGE = "fedimaging"
PUBLISHER = "federation"
SERVER_APP = "fedserver.app:app"
CLIENT_APP = "fedclient.app:app"
RUN_KEY = "run"  # the one declared key of the run configuration: which run of ours a Flower run carries out
LOOPBACK = "127.0.0.1"
RETRY_DELAY_S = 2  # longest pause between two tries of a Flower client; Flower: 20 s
PULL_BACKOFF_S = 0.02  # first pause when a message is there and its content not yet; Flower: 1 s, met in most rounds
PULL_S = 60.0  # then the content is given up, as its sender died; messages are small; Flower: 2 h


def package_version() -> str:
    """Version of the installed package, or of the source tree that this file stands in."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        source = Path(__file__).resolve().parents[1] / "pyproject.toml"
        if not source.exists():
            raise ProcessFailed(
                f"{PACKAGE}: is neither installed nor run from its source tree. Install the package, then start again."
            ) from None
        return str(tomllib.loads(source.read_text())["project"]["version"])


def app_archive() -> bytes:
    """The thin app as a FAB: stored, not deflated, so that no two versions of zlib give it two digests."""
    project = (
        f'[project]\nname = "{PACKAGE}"\nversion = "{package_version()}"\n'
        f'description = "A request to run the installed package; carries no code"\n\n'
        f'[tool.flwr.app]\npublisher = "{PUBLISHER}"\n\n'
        f'[tool.flwr.app.components]\nserverapp = "{SERVER_APP}"\nclientapp = "{CLIENT_APP}"\n\n'
        f'[tool.flwr.app.config]\n{RUN_KEY} = ""\n'
    ).encode()
    content = f"pyproject.toml,{hashlib.sha256(project).hexdigest()},{len(project) * 8}".encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("pyproject.toml", project), (".info/CONTENT", content)):
            entry = zipfile.ZipInfo(name, date_time=(2024, 10, 1, 0, 0, 0))
            entry.create_system = 3  # Python writes 0 on Windows and 3 elsewhere
            entry.external_attr = 0o600 << 16
            archive.writestr(entry, data)
    return file.getvalue()


def digest(archive: bytes) -> str:
    return hashlib.sha256(archive).hexdigest()


def quiet_flower(home: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Switches for a Flower process; to be set before flwr is imported, which reads some of them only then.

    No telemetry, update check, run-time installs, gRPC ports, tracing; its files under `home`; and loopback calls stay
    off the proxy that HTTPS_PROXY names (with HTTP_PROXY alone, Flower 1.41 sends its own loopback API there too).
    """
    direct = [host for host in environment.get("NO_PROXY", environment.get("no_proxy", "")).split(",") if host]
    direct += [host for host in (LOOPBACK, "localhost", "::1") if host not in direct]
    off = ("FLWR_TELEMETRY_ENABLED", "FLWR_ENABLE_EVENT_LOG", "FLWR_OIDC_ENABLED", "FLWR_TRACING_ENABLED")
    grpc = ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API")
    return {
        **dict.fromkeys(off + grpc, "0"),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home),
        "NO_PROXY": ",".join(direct),
        "no_proxy": ",".join(direct),
    }


def flower_module(name: str) -> ModuleType:
    """Imports a module of Flower by its full name: some packages hold a function of the same name as the module."""
    try:
        return import_module(name)
    except ImportError as error:
        raise _changed(name) from error


def replace_name(module: ModuleType, name: str, value: object) -> object:
    """Puts `value` in place of a private name of Flower and returns what was there.

    Raises:
        ProcessFailed: the name is not there: another Flower than the one this was written for.
    """
    if not hasattr(module, name):
        raise _changed(f"{module.__name__}.{name}")
    old: object = getattr(module, name)
    setattr(module, name, value)
    return old


def replace_default(function: object, name: str, value: object) -> None:
    """Changes the default of a keyword-only argument of a Flower function, for all who call it."""
    defaults = getattr(function, "__kwdefaults__", None) or {}
    if name not in defaults:
        raise _changed(f"{getattr(function, '__qualname__', function)}({name}=)")
    defaults[name] = value


def patch_client(pull_s: float = PULL_S) -> None:
    """Shortens the pauses of Flower's clients in this process.

    Args:
        pull_s: longest wait for the content of a message that is there.
    """
    replace_name(flower_module("flwr.supercore.retry.http_retry"), "MAX_RETRY_DELAY", RETRY_DELAY_S)
    pulls = flower_module("flwr.supercore.inflatable.inflatable_utils")
    for function in (pulls.pull_objects, pulls.pull_and_inflate_object_from_tree):
        replace_default(function, "initial_backoff", PULL_BACKOFF_S)
        replace_default(function, "backoff_cap", 1.0)
        replace_default(function, "max_time", pull_s)


def start_log(hidden: Sequence[str] = ()) -> None:
    """Logs to stderr, once: Flower has a console handler of its own besides the root's. For `hidden`, see logs.py."""
    logs.start(hidden)
    for name in ("httpx", "alembic", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    flower = flower_module("flwr.supercore.logger")
    flower.FLOWER_LOGGER.setLevel(logging.INFO)
    flower.FLOWER_LOGGER.removeHandler(flower.console_handler)


def load_app(name: str) -> Any:
    """The object that `module:name` says, from the installed packages."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ProcessFailed(f"app {name!r}: cannot be loaded ({error}). Install the package again.") from error


def _changed(name: str) -> ProcessFailed:
    return ProcessFailed(
        f"flwr: {name} is not there, so this is not the Flower that the package was made for. "
        f"Install the version that pyproject.toml names (pip install 'flwr==1.41.0')."
    )
