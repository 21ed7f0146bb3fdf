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
    tree = README.partition("\n## Files\n")[2].partition("\n## ")[0]
    folders = ("shared_models", "fedclient", "fedserver", "simulations", "tests", "deploy")
    there = {
        p.relative_to(ROOT).as_posix()
        for folder in folders
        for p in (ROOT / folder).rglob("*")
        if p.is_file() and p.name != "__init__.py" and "__pycache__" not in p.parts
    }
    named = set(re.findall(rf"^((?:{'|'.join(folders)})/\S+)", tree, re.MULTILINE))
    assert named - there == set(), "named and not there"
    assert there - named == set(), "there and not named"
    assert [name for name in there if name.endswith("README.md")] == [], "there is one README"


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
