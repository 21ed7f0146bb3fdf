"""From nothing to a trained model with the commands of the README's quick start, counted: no more than it promises."""

import re
import shlex
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedserver.checkpoint import read_state
from simulations.demo import await_port, background, command, free_port
from simulations.phantoms import PhantomPlan, phantom
from tests.processes.deployment import Deployment
from tests.studies import TINY_NET

README = (Path(__file__).parents[2] / "README.md").read_text()
HOSPITALS = ("north", "south")
STUDY = f"""
name = "first"
{TINY_NET}[train]
local_steps = 2
batch_size = 2
precision = "float32"
[rounds]
count = 1
quorum = 2
"""


def quick_start(who: str) -> list[list[str]]:
    """The commands of one reader's block of the README, in order, without what follows a #."""
    section = README[README.index("## Quick start") : README.index("## What a run does")]
    block = re.search(rf"\*\*{who}\*\*.*?```\n(.*?)```", section, re.DOTALL)
    assert block is not None, who
    return [shlex.split(line, comments=True) for line in block[1].splitlines() if line.strip()]


def until(block: list[list[str]], name: str) -> list[list[str]]:
    """The commands up to the first one of that name, and no second of a kind."""
    names = [words[1] for words in block]
    return block[: names.index(name) + 1]


def test_a_hospital_types_three_commands_and_a_coordinator_two_and_one_for_each_hospital_and_one_to_run():
    assert [words[1] for words in until(quick_start("A coordinator"), "run")] == ["init", "serve", "invite", "run"]
    hospital = [words[1] for words in until(quick_start("A hospital"), "start")]
    assert [name for name in hospital if name not in ("waive", "card", "doctor")] == ["join", "check", "start"]


@pytest.mark.process
def test_the_commands_of_the_quick_start_end_in_a_trained_model(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = phantom(tmp_path / "data", PhantomPlan(sites=HOSPITALS, train=3, val=1, test=1, slices=2, size=32))
    study, federation = tmp_path / "first.toml", tmp_path / "federation"
    study.write_text(STUDY)
    address = f"127.0.0.1:{free_port()}"
    typed: dict[str, int] = {"coordinator": 0, **dict.fromkeys(HOSPITALS, 0)}
    init, serve, invite, run = until(quick_start("A coordinator"), "run")
    join, check, start = (
        next(words for words in quick_start("A hospital") if words[1] == name) for name in ("join", "check", "start")
    )
    here = ["--federation", str(federation)]

    def at(who: str, words: list[str], of: dict[str, str], *more: str) -> list[str]:
        """A line of the README with this test's names in the place of its examples."""
        typed[who] += 1
        return [of.get(word, word) for word in words] + list(more)

    with ExitStack() as running:
        command(tmp_path, at("coordinator", init, {"fl.example.org:8443": address}, *here))
        words = at("coordinator", serve, {}, "--host", "127.0.0.1", *here)
        running.enter_context(background(tmp_path / "serve.log", words))
        await_port(address)
        for name in HOSPITALS:
            line = command(tmp_path, at("coordinator", invite, {"north-hospital": name}, *here)).strip()
            site = ["--site", str(tmp_path / name)]
            inside = ["--manifest-site", name, "--approve", "inside-policy"]  # the data are one folder of two sites
            command(tmp_path, at(name, join, {"fl1.…": line, "/data/export": str(data)}, *inside, *site))
            looked = at(name, check, {"lung-ct": str(study)}, *site)
            looked = [str(tmp_path / f"{name}.html") if word.endswith(".html") else word for word in looked]
            command(tmp_path, looked)
            running.enter_context(background(tmp_path / f"{name}.log", at(name, start, {}, *site)))
        told = command(tmp_path, at("coordinator", run, {"lung-ct": str(study)}, *here))
    assert "weights" in told
    made = Deployment(tmp_path, HOSPITALS).run_folder("first-1")
    assert read_state(made).round == 1
    assert made.weights(1).exists()
    assert typed == {"coordinator": 2 + len(HOSPITALS) + 1, **dict.fromkeys(HOSPITALS, 3)}
