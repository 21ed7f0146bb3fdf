"""What is left of a site that leaves: in runs, in their plans and first weights, in releases, and in what is gone."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedserver import holding, registry
from fedserver.checkpoint import RunFolder, State, create_run
from fedserver.cli import app
from fedserver.cohort import Presence
from fedserver.courier import Inline
from fedserver.enrol import Federation, init_federation, invite, open_log
from fedserver.lifecycle import revoked_sites
from fedserver.publish.lineage import BEGAN, RETRAINED, planners
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from fedserver.state import Run, add_run
from fedserver.withdrawal import begin_from, retrain, withdraw
from shared_models.audit import AuditLog
from shared_models.audit_files import LOG
from shared_models.errors import StateInvalid
from shared_models.files import canonical_json, read_lines, write_atomic, write_json
from shared_models.identity import new_site_keys
from shared_models.parse import plain
from shared_models.release import Manifest, Origin, Parent
from shared_models.release_facts import Entry as File
from shared_models.standing import read_standings
from shared_models.study import Evaluate, Rounds, Study, Transfer, canonical, sha256
from shared_models.weights import NO_WEIGHTS
from tests.toys import WEIGHTS, Clock, ScriptedGrid, nodes, toy_app

STUDY = Study(name="toy", rounds=Rounds(count=3))
PLAN = "b" * 64


@pytest.fixture
def federation(quick_folder: Path) -> Federation:
    """Three sites, and `lung`, in which east was counted in round 3 alone."""
    made = init_federation(quick_folder / "federation", "Test", "127.0.0.1:8443")
    for site in ("east", "north", "west"):
        invite(made, site)
    a_run(made, "lung", [["north"], ["north"], ["east", "north"]])
    return made


def a_run(
    federation: Federation, name: str, rounds: Sequence[Sequence[str]], began: tuple[str, int] | None = None,
    plan: str | None = None,
) -> RunFolder:  # fmt: skip
    """The folder of a finished run, in whose rounds these sites were counted; round 2 of `lung` ended with `lung-2`."""
    run, study = RunFolder(federation.runs / name), replace(STUDY, name=name)
    if began is not None:
        study = replace(study, transfer=Transfer(digest_of(*began)))
        write_json(run.path / BEGAN, {"run": began[0], "round": began[1], "sha256": digest_of(*began)})
    write_atomic(run.path / "study.json", canonical(study))
    lines = [
        {"round": number, "sites": {site: {} for site in sites}, "weights_sha256": digest_of(name, number)}
        for number, sites in enumerate(rounds, start=1)
    ]
    write_atomic(run.metrics, b"".join(canonical_json(line) + b"\n" for line in lines))
    write_json(run.path / "state.json", plain(State(name, sha256(study), len(rounds), NO_WEIGHTS, (), plan)))
    add_run(federation.state, Run(name, study.name, sha256(study), "finished", None, 1.0, 1.0, ""))
    return run


def digest_of(run: str, number: int) -> str:
    return f"{run}-{number}".encode().hex().ljust(64, "0")


def a_release(federation: Federation, run: str, sites: dict[str, int], *parents: Parent) -> registry.Entry:
    """An entry of the registry, and the manifest alone of what it is of."""
    origin = Origin("federation", "Test", run, 1, 1.0, "a" * 64, "a" * 64, sites, parents=parents)
    files = {"model.safetensors": File(1, "c" * 64)}
    manifest = Manifest(
        "fedrelease/1", run, "1", run, origin, {}, 1e-3, None, "a" * 64, "a" * 64, files
    )  # fmt: skip
    step = registry.Step("candidate", 1.0, "coordinator")
    entry = registry.Entry(manifest.digest, run, "1", run, 3, sites, (step,))
    folder = registry.folder_of(federation, manifest.digest)
    write_atomic(folder / "release" / "manifest.json", manifest.content)
    write_json(folder / "entry.json", plain(entry))
    return entry


def told(federation: Federation) -> dict[str, str]:
    """What hospitals read of each release in the list of today."""
    listed = read_standings(holding.status_list(federation, 30), (federation.authority,), "list")
    return {standing.label: standing.words for standing in listed.releases.values()}


def typed(*words: str, federation: Federation) -> str:
    done = CliRunner().invoke(app, [*words, "--federation", str(federation.folder)])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_runs_that_began_with_weights_of_a_site_are_named_and_those_that_began_before_it_are_not(federation):
    a_run(federation, "before", [["north"]], began=("lung", 2))
    a_run(federation, "next", [["north"]], began=("lung", 3))
    a_run(federation, "third", [["north"], ["east"]], began=("next", 1))
    gone = withdraw(federation, "east", "its board", retire=False)
    assert gone.runs == {"lung": 3, "next": 0, "third": 0}
    assert (gone.begun, gone.unread) == ({"next": "lung", "third": "lung"}, ())
    said = typed("withdraw", "east", "--reason", "its board", federation=federation)
    assert "run lung, from round 3 on: `fedserver retrain lung --without east`" in said
    assert "run third, by the weights of lung that it began with: submit its study anew" in said


@pytest.mark.parametrize("rounds", [[["north"]], [["north"], ["east", "north"]]])
def test_a_run_whose_first_weights_hold_a_site_is_trained_again_only_from_others(federation, rounds):
    a_run(federation, "next", rounds, began=("lung", 3))
    a_run(federation, "third", rounds, began=("next", 1))
    for run in ("next", "third"):
        with pytest.raises(StateInvalid, match=r"what east sent in run lung\. First `fedserver retrain lung --without"):
            retrain(federation, run, ["east"])


def test_a_run_is_not_trained_again_on_weights_of_which_nobody_can_read_whom_they_hold(federation):
    run = a_run(federation, "next", [["north"], ["east", "north"]], began=("lung", 2))
    assert begin_from(run, ["east"], {})[0] == 1
    shutil.rmtree(federation.runs / "lung")
    with pytest.raises(StateInvalid, match=r"go back to lung, and whom that holds cannot be read"):
        begin_from(run, ["east"], {})


def test_a_plan_that_came_from_counts_of_a_site_is_named_in_each_run_that_goes_on_with_it(federation):
    a_run(federation, "planned", [["north"], ["east", "north"]], plan=PLAN)
    open_log(federation).add("plan-made", run="planned", plan=PLAN, sites=["north", "west"])
    shorter = a_run(federation, "planned-without", [["north"], ["north"]], plan=PLAN)
    write_json(shorter.path / RETRAINED, {"run": "planned", "round": 1, "without": ["east"], "weights_sha256": PLAN})
    a_run(federation, "next", [["north"]], began=("planned", 1))
    made = a_release(federation, "planned", {"east": 1, "north": 2})
    gone = withdraw(federation, "west", "its board", retire=False)
    assert gone.runs == {"planned": 0, "planned-without": 0, "next": 0}
    assert (gone.begun, gone.releases) == ({"next": "planned"}, (made,))
    assert begin_from(shorter, ["west"], planners(federation.folder))[0] == 0
    said = typed("withdraw", "west", "--reason", "its board", federation=federation)
    assert "run planned, by the plan that its counts made: `fedserver retrain planned" in said
    assert "release planned-1 (candidate): by its plan, or what it goes back to" in said


def test_a_plan_of_which_nobody_wrote_down_whose_it_is_may_be_of_anybody(federation):
    run = a_run(federation, "planned", [["north"]], plan=PLAN)
    assert withdraw(federation, "west", "its board", retire=False).unread == ("planned",)
    AuditLog(federation.folder / "audit-0123abcd.jsonl", "coordinator", new_site_keys().identity).add(
        "plan-made", run="planned", plan=PLAN, sites=["north"]
    )  # the log of an earlier key
    assert withdraw(federation, "west", "its board", retire=False).unread == ()
    with pytest.raises(StateInvalid, match="never counted"):
        begin_from(run, ["west"], planners(federation.folder))


@pytest.mark.parametrize("sent", ["in time", "late"])
def test_a_round_that_is_under_way_is_named_as_long_as_it_may_count_what_the_site_had_sent(federation, tmp_path, sent):
    """North answers at once, or east too late for round 1; then it leaves, while round 2 waits for another one."""
    site, other = ("north", "east") if sent == "in time" else ("east", "west")
    rounds_of = Rounds(count=2, quorum=1, deadline_s=100, pause_s=50, gather_s=0, late="next")
    study = Study(name="toy", rounds=rounds_of, evaluate=Evaluate(every=0))
    run, clock = create_run(federation.runs, "toy", study, WEIGHTS), Clock()
    add_run(federation.state, Run("toy", "toy", sha256(study), "running", None, 1.0, 1.0, ""))
    numbers = {name: number for number, name in enumerate(("east", "north", "west"), start=1)}
    delays = {"east": 130.0} if sent == "late" else {"east": 60.0}
    said = list[str]()

    def revoked() -> dict[str, str]:
        if clock.now > 1140 and not said:
            said.append(typed("withdraw", site, "--reason", "its board", federation=federation))
        return revoked_sites(federation.state)

    grid = ScriptedGrid(
        toy_app(), {numbers[s]: c for s, c in nodes(numbers, tmp_path).items()}, clock, delays | {other: 80.0}
    )
    here = Presence(numbers)
    carry_out(Setting(grid, run, lambda: here, Inline(), clock, clock.sleep, poll_s=0.5, reask_s=1e4, revoked=revoked))
    assert "Round 2 of run toy is under way" in said[0]
    assert "run toy, from round 2" not in said[0]
    label = site if sent == "in time" else f"{site} (round 1)"
    assert label in read_lines(run.metrics)[1]["sites"]
    again = typed("withdraw", site, "--reason", "its board", federation=federation)
    assert f"run toy, from round {1 if sent == 'in time' else 2} on: `fedserver retrain toy --without {site}`" in again
    assert "under way" not in again


def test_a_run_that_waits_with_a_secure_sum_is_named_though_nobody_carries_it_out(federation):
    run = a_run(federation, "kept", [["north"]])
    add_run(federation.state, Run("waits", "kept", "a" * 64, "paused", None, 2.0, 2.0, ""))
    run.path.rename(federation.runs / "waits")
    write_json(federation.runs / "waits" / "progress.json", {"phase": "paused", "round": 2, "sites": {}})
    assert withdraw(federation, "west", "its board", retire=False).under_way == {}
    (federation.runs / "waits" / "sum").mkdir()
    assert withdraw(federation, "west", "its board", retire=False).under_way == {"waits": 2}


def test_nothing_is_under_way_of_a_site_that_nobody_asks(federation):
    invite(federation, "south")
    assert "nothing: it was never counted" in typed("withdraw", "south", "--reason", "none", federation=federation)


def test_a_release_that_is_made_after_a_site_has_left_is_marked_though_the_site_is_invited_again(federation):
    withdraw(federation, "east", "its board", retire=False)
    invite(federation, "east")
    a_release(federation, "lung", {"east": 1, "north": 3})
    a_run(federation, "other", [["north"]])
    a_release(federation, "other", {"north": 1})
    assert told(federation) == {"lung-1": holding.SITE_LEFT, "other-1": ""}


@pytest.mark.parametrize("lost", ["state.json", "metrics.jsonl", "study.json", ""])
def test_a_run_that_is_gone_hides_nothing_else_and_is_named(federation, lost):
    a_run(federation, "next", [["north"]], began=("lung", 3))
    a_run(federation, "other", [["east"]])
    of_lung = a_release(federation, "lung", {"east": 1, "north": 3})
    of_next = a_release(federation, "next", {"north": 1}, Parent("release", "lung-1", of_lung.digest))
    path = federation.runs / "lung" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    gone = withdraw(federation, "east", "its board", retire=True)
    assert {entry.digest: entry.stage for entry in gone.releases} == {
        of_lung.digest: "retired", of_next.digest: "retired"
    }  # fmt: skip
    assert (gone.runs, gone.unread) == ({"other": 1}, ("lung",))
    written: list[dict[str, Any]] = [
        line for line in read_lines(federation.folder / LOG) if line["event"] == "withdrawn"
    ]
    assert [line["facts"]["unread"] for line in written] == [["lung"]]
    said = typed("withdraw", "east", "--reason", "its board", federation=federation)
    assert "it cannot be read whom they hold: lung. Restore them from a backup" in said


def test_a_release_whose_own_run_is_gone_holds_what_the_run_before_it_held_up_to_the_round_it_began_with(federation):
    a_release(federation, "early", {"north": 1}, Parent("run", "lung", digest_of("lung", 2)))
    late = a_release(federation, "late", {"north": 1}, Parent("run", "lung", digest_of("lung", 3)))
    gone = withdraw(federation, "east", "its board", retire=False)
    assert gone.releases == (late,)
    assert gone.unread == ("early", "late")


def test_a_release_whose_manifest_is_gone_is_named_by_its_entry(federation):
    made = a_release(federation, "lung", {"east": 1, "north": 3})
    (registry.folder_of(federation, made.digest) / "release" / "manifest.json").unlink()
    gone = withdraw(federation, "east", "its board", retire=True)
    assert [entry.stage for entry in gone.releases] == ["retired"]
    assert gone.unread == ("lung-1",)
