"""A plug-in of pytest (`-p simulations.bench.faults.told`) that writes down how each test ended, as lines of JSON."""

import json
import os
from pathlib import Path
from typing import Any

INTO = "FAULTS_TOLD"  # environment: the file


def pytest_runtest_logreport(report: Any) -> None:
    """Called by pytest for the set-up, the call and the taking down of each test."""
    if report.when != "call" and report.outcome == "passed":
        return
    why = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
    line = {"test": report.nodeid, "outcome": report.outcome, "why": why}
    with Path(os.environ[INTO]).open("a") as file:
        file.write(json.dumps(line) + "\n")
