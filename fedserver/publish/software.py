"""Which code made a release: a digest of our own files, and every installed package with its version."""

import hashlib
import platform
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from shared_models.archive import PACKAGE, package_version
from shared_models.files import canonical_json

PACKAGES = ("shared_models", "fedclient", "fedserver")


def code_sha256() -> str:
    """One digest of every file of Python, study and page of the installed packages, by name."""
    listed: list[list[str]] = []
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".toml", ".html") and "__pycache__" not in path.parts:
                name = f"{package}/{path.relative_to(root).as_posix()}"
                listed.append([name, hashlib.sha256(path.read_bytes()).hexdigest()])
    return hashlib.sha256(canonical_json(listed)).hexdigest()


def environment() -> bytes:
    """Canonical JSON: Python, platform, and each installed package with its version."""
    found = {dist.metadata["Name"]: dist.version for dist in distributions() if dist.metadata["Name"]}
    facts = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    return canonical_json({**facts, "packages": dict(sorted(found.items()))})


def package() -> str:
    return f"{PACKAGE} {package_version()}"
