"""A day at a served federation: runs take turns, one pauses and goes on, a backup is made, doctors and pages answer."""

import json
import urllib.request

import pytest

from fedserver.checkpoint import RunFolder, read_progress, read_state
from fedserver.enrol import open_federation
from fedserver.queue import hold_of, pause
from simulations.demo import background, command, free_port
from simulations.phantoms import PhantomPlan, phantom
from tests.processes.deployment import deployed, until
from tests.studies import TINY_NET

STUDY = f"""
name = "day"
{TINY_NET}[train]
local_steps = 2
batch_size = 2
precision = "float32"
[rounds]
count = 10
quorum = 2
"""


def answer(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as response:
        return str(response.read().decode())


@pytest.mark.process
def test_runs_take_turns_pause_and_go_on_while_figures_pages_and_a_backup_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = phantom(tmp_path / "data", PhantomPlan(sites=2, train=3, val=1, test=1, slices=2, size=32))
    study, words = tmp_path / "day.toml", tmp_path / "words"
    study.write_text(STUDY)
    words.write_text("correct horse battery\n")
    logs = tmp_path / "d"
    with deployed(logs, data, ("north", "south")) as here:
        first, second = here.run_folder("first"), here.run_folder("second")
        here.fedserver("run", str(study), "--name", "first", "--no-wait")
        here.fedserver("run", str(study), "--name", "second", "--new", "--no-wait")
        until(lambda: begun(first), 120, "the first has begun", logs)
        assert here.run("second")["queue"] == 1
        pause(open_federation(here.federation), "first", at_once=False)  # as `fedserver pause` does, within the round
        assert hold_of(first) is not None
        until(lambda: here.run("first")["state"] == "paused", 120, "the first has paused", logs)
        rested = read_state(first).round
        assert rested >= 1
        assert "paused by the coordinator after round" in here.run("first")["message"]
        until(lambda: begun(second), 120, "the second has begun", logs)
        here.fedserver("backup", str(tmp_path / "backup.tar"), "--passphrase-file", str(words))
        here.fedserver("resume", "first")
        until(lambda: here.run("second")["state"] == "finished", 180, "the second has finished", logs)
        assert read_state(first).round == rested, "the first has waited for its turn"
        port = free_port()
        with background(logs / "page.log", ["fedclient", "page", "--port", str(port), *site(here)]):
            url = f"http://127.0.0.1:{port}"
            until(lambda: "north" in quiet(url), 60, "the page is served", logs)
            page = answer(url)
            assert "connected" in page or "working" in page
            assert 'fedclient_connection{state="stopped"} 0.0' in answer(f"{url}/metrics")
            with urllib.request.urlopen(f"{url}/events", timeout=60) as stream:
                told = next(line for line in stream if b'"name":"sent"' in line)
            assert b"tensors" in told
        until(lambda: here.run("first")["state"] == "finished", 180, "the first has finished", logs)
        doctor = json.loads(command(logs, ["fedclient", "doctor", "--json", *site(here)]))
        lines = {line["check"]: line for line in doctor["lines"]}
        for check in ("tls", "admission", "clock", "node", "audit", "flower"):
            assert lines[check]["state"] == "ok", lines[check]
        told = json.loads(here.fedserver("doctor", "--json"))
        assert {line["check"] for line in told["lines"] if line["state"] == "fail"} == set()
        assert next(line for line in told["lines"] if line["check"] == "backup")["state"] == "ok"
        shown = [json.loads(text) for text in here.fedserver("logs", "first", "--json", "--last", "0").splitlines()]
        assert {"process", "time", "level", "words"} <= set(shown[0])
        assert {line["process"] for line in shown} == {"run-first"}
        said = command(logs, ["fedclient", "logs", "executor", *site(here)])
        assert "ready; app" in said
        assert str(data) not in said
    again = tmp_path / "again"
    command(logs, ["fedserver", "restore", str(tmp_path / "backup.tar"), "--passphrase-file", str(words),
                   "--federation", str(again)])  # fmt: skip
    assert read_state(RunFolder(again / "runs/first")).round == rested


def begun(run: RunFolder) -> bool:
    progress = read_progress(run)
    return bool(progress) and progress["round"] >= 1


def site(here) -> list[str]:
    return ["--site", str(here.site("north"))]


def quiet(url: str) -> str:
    try:
        return answer(url)
    except OSError:
        return ""
