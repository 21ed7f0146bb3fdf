"""The README is true in what a test can see: every file of the tree, every command and option that it types."""

import re
import shlex
from pathlib import Path

from typer.main import get_command

import fedclient.cli
import fedserver.cli
import simulations.cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = {"fedserver": fedserver.cli.app, "fedclient": fedclient.cli.app, "fedsim": simulations.cli.app}


def test_the_tree_names_every_file_and_no_other():
    packages = ("shared_models", "fedclient", "fedserver", "simulations", "tests")
    there = {
        p.relative_to(ROOT).as_posix()
        for package in packages
        for p in (ROOT / package).rglob("*")
        if p.suffix in (".py", ".toml", ".html") and p.name != "__init__.py"
    }
    named = set(re.findall(r"^((?:shared_models|fedclient|fedserver|simulations|tests)/\S+)", README, re.MULTILINE))
    assert named - there == set(), "named and not there"
    assert there - named == set(), "there and not named"


def test_every_command_and_option_in_it_exists():
    typed = re.findall(r"^(fed(?:server|client|sim) [^#\n]+)", README, re.MULTILINE)
    assert len(typed) >= 9
    for line in typed:
        words = shlex.split(line)
        group = get_command(COMMANDS[words[0]])
        assert words[1] in group.commands, line  # type: ignore[attr-defined]
        command = group.commands[words[1]]  # type: ignore[attr-defined]
        command = getattr(command, "commands", {}).get(words[2] if words[2:] else "", command)
        known = {o for p in command.params for o in p.opts}
        assert {w for w in words if w.startswith("--")} <= known, line
