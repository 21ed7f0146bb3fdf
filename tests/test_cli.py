"""The three commands: help, one clear message and exit code 1 for what a person can mend, and JSON for machines."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import fedclient.cli
import fedserver.cli
import simulations.cli
from fedclient.ledger import Reservation, open_ledger
from fedclient.site import Data, SiteFile, site_toml
from fedserver.enrol import open_federation
from fedserver.state import change_run, find_run
from shared_models.cli import guarded
from shared_models.errors import EnrolmentFailed, FederationError
from shared_models.files import write_atomic
from shared_models.invite import Invite, write_invite
from shared_models.protect.accounting import Spend, epsilon
from shared_models.supervise import only_one
from simulations.phantoms import PhantomPlan, phantom
from tests.edge import running_edge
from tests.studies import TINY_NET

ROOT = Path(__file__).parents[1]
COMMANDS: dict[str, typer.Typer] = {
    "fedserver": fedserver.cli.app,
    "fedclient": fedclient.cli.app,
    "fedsim": simulations.cli.app,
}
SUBCOMMANDS = {
    "fedserver": [
        "init", "serve", "invite", "revoke", "renew", "run", "stop", "status", "audit", "doctor", "pause", "resume",
        "logs", "backup", "restore", "monitor", "release", "releases", "withdraw", "retrain",
        "release-status", "release-export-mlflow",
    ],
    "fedclient": [
        "join", "rejoin", "renew", "check", "waive", "card", "policy", "studies", "show", "approve", "refuse",
        "withdraw", "sent", "audit", "start", "status", "budget", "ledger", "doctor", "logs", "page", "serve-model",
        "drift", "predict", "verify", "explain", "worklist",
    ],
    "fedsim": ["run", "compare", "settings", "studies", "privacy", "tables", "demo", "phantom", "attack"],
}  # fmt: skip
TINY = f"""
name = "tiny"
{TINY_NET}[rounds]
count = 1
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Nothing is found or left where the tests were started."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("FEDSERVER_FEDERATION", "FEDCLIENT_SITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def call(*words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    command, *rest = map(str, words)
    done = CliRunner().invoke(COMMANDS[command], rest)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def refused(*words: object) -> str:
    """The one message of a command that exits with 1 and prints nothing else."""
    code, out, err = call(*words)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    return err


def parsed(*words: object) -> Any:
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.fixture
def federation() -> Path:
    assert call("fedserver", "init", "--name", "Test", "--address", "127.0.0.1:8443")[0] == 0
    return Path("federation")


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_command_with_a_sentence(command):
    code, out, _ = call(command, "--help")
    assert code == 0
    listed = {line.split()[1]: line for line in out.splitlines() if len(line.split()) > 3 and line.startswith("│ ")}
    for name in SUBCOMMANDS[command]:
        assert name in listed, out
        assert len(listed[name].split()) > 5


@pytest.mark.parametrize(("command", "name"), [(c, n) for c, names in SUBCOMMANDS.items() for n in names])
def test_every_command_has_help(command, name):
    code, out, _ = call(command, name, "--help")
    assert code == 0
    assert "Usage" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bare_command_shows_its_help_and_an_unknown_one_is_no_success(command):
    assert "Usage" in "".join(call(command)[1:])
    assert call(command, "frobnicate")[0] == 2
    assert call(command, SUBCOMMANDS[command][0], "--frobnicate")[0] == 2


def test_every_argument_and_option_has_help_and_it_is_shown():
    def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from commands(inner, f"{path} {name}")
        else:
            yield path, command

    told = {
        f"{path} {each.name}": each.help
        for name, app in COMMANDS.items()
        for path, command in commands(typer.main.get_command(app), name)
        for each in command.params
    }
    assert "fedclient join invite" in told
    assert [parameter for parameter, words in told.items() if not words] == []
    assert "Only of: node, executor, page." in call("fedclient", "logs", "--help")[1]


def test_a_mistyped_command_gets_one_hint():
    assert call("fedclient", "aprove")[2].count("Did you mean") == 1


# One clear message


def test_an_unknown_study_is_told_with_those_that_there_are(federation):
    (Path("broken.toml")).write_text('name = "x"\n[train]\nlerning_rate = 1')
    for words in (("fedsim", "run"), ("fedserver", "run")):
        assert "'lung' is neither a study file nor a ready study. Ready: brats-tumour, brca-prognosis, " in refused(
            *words, "lung"
        )
        assert "no.toml: there is no such file" in refused(*words, "no.toml")
        assert "Did you mean `learning_rate`?" in refused(*words, "broken.toml")
        assert ".: cannot be read (Is a directory)" in refused(*words, ".")


def test_a_missing_folder_is_told_with_the_command_that_makes_it():
    for words in (
        ["status"],
        ["invite", "north"],
        ["revoke", "north", "--reason", "x"],
        ["renew"],
        ["run", "lung-ct-quick"],
        ["serve"],
        ["stop", "x"],
    ):
        assert "fedserver init" in refused("fedserver", *words)
    for name in ("check", "card", "start", "status", "renew"):
        assert "Run `fedclient join INVITE` first" in refused("fedclient", name)
    assert "nowhere: there is no such folder" in refused("fedsim", "run", "lung-ct-quick", "--data", "nowhere")
    assert list(Path().rglob("*.db")) == []


@pytest.mark.parametrize("invite", ["", "x", "fl1.", "fl1.AAAA", "fl2.abc", "fl1.é"])
def test_a_bad_invite_is_told_and_leaves_nothing(invite):
    Path("data").mkdir()
    assert "invite: " in refused("fedclient", "join", invite, "--data", "data")
    assert not Path("site").exists()


def test_joining_with_a_missing_data_folder_is_told_before_the_invite_is_spent(federation):
    line = call("fedserver", "invite", "north")[1].strip()
    assert "nowhere: is no folder" in refused("fedclient", "join", line, "--data", "nowhere")
    odd = os.fsdecode(b"caf\xe9")
    Path(odd).mkdir()
    assert "its name is not UTF-8" in refused("fedclient", "join", line, "--data", odd)
    Path("data").mkdir()
    told = refused("fedclient", "join", line, "--data", "data", "--layout", "brats-2022")
    assert "layout 'brats-2022' is not known. Known: auto, manifest, table, luna16, lidc-idri, brats-2018" in told
    Path("data/notes.txt").touch()
    told = refused("fedclient", "join", line, "--data", "data")
    assert "data: it is no data set in a known layout" in told
    assert "Looked for were: manifest.csv, images and labels.csv, LUNA16" in told
    assert not Path("site").exists()


def test_a_folder_of_no_known_layout_is_told_with_those_that_are_looked_for(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/notes.txt").touch()
    file = SiteFile("north", "127.0.0.1:9", "Test", Data(str(tmp_path / "data")))
    write_atomic(Path("site/site.toml"), site_toml(file).encode())
    told = call("fedclient", "check")[1]
    assert "a folder or table that does not describe the data" in told
    assert "Looked for were: manifest.csv, images and labels.csv, LUNA16" in told
    assert "rows it names" not in told


def test_a_coordinator_that_is_not_there_is_told(federation):
    Path("data").mkdir()
    line = call("fedserver", "init", "--federation", "away", "--address", "127.0.0.1:9")
    line = call("fedserver", "invite", "north", "--federation", "away")
    assert "coordinator at 127.0.0.1:9: cannot be reached" in refused(
        "fedclient", "join", line[1].strip(), "--data", "data"
    )


def test_a_wrong_engine_is_told_before_anything_is_made(monkeypatch):
    for name in ("gpu", "", "Local"):
        assert "allowed are local and ray" in refused("fedsim", "run", "lung-ct-quick", "--engine", name, "--out", "o")
    monkeypatch.setattr("simulations.run.find_spec", lambda name: None)
    assert "Ray is not installed" in refused("fedsim", "run", "lung-ct-quick", "--engine", "ray", "--out", "o")
    assert not Path("o").exists()


def test_an_unknown_run_is_told(federation):
    assert "run 'lung-1': is not known here" in refused("fedserver", "stop", "lung-1")


def test_a_study_that_the_phantom_has_no_images_for_is_told():
    assert "Give --data DIR with a manifest.csv" in refused("fedsim", "run", "chest-xray", "--out", "o")


def test_wrong_names_are_told(federation):
    assert "site name 'North Hospital'" in refused("fedserver", "invite", "North Hospital")
    assert "is not empty" in refused("fedserver", "init")
    assert "federation name" in refused("fedserver", "init", "--federation", "f2", "--name", "[bold]\n")
    assert "expected host:port" in refused("fedserver", "init", "--federation", "f2", "--address", "nowhere")
    assert "between two dots" in refused("fedserver", "init", "--federation", "f2", "--address", "fed..x.org:1")
    assert "a name is lower-case" in refused("fedserver", "run", "lung-ct-quick", "--name", "../x")
    assert not Path("f2").exists()


def test_a_path_that_cannot_be_is_told_and_not_traced(federation):
    Path("file").touch()
    assert "file" in refused("fedserver", "init", "--federation", "file/f")
    assert "file" in refused(
        "fedsim", "phantom", "file/p", "--sites", "1", "--patients", "3", "--slices", "1", "--size", "16"
    )


def test_a_port_that_something_else_listens_on_is_told_before_anything_is_started(federation, monkeypatch):
    monkeypatch.setattr("fedserver.serve.PORT_PATIENCE_S", 0.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        told = refused("fedserver", "serve", "--host", "127.0.0.1", "--port", port)
    assert f"127.0.0.1:{port}: cannot be listened on (Address already in use)" in told
    assert "cannot be listened on" in refused("fedserver", "serve", "--host", "no such host", "--port", port)
    assert not (federation / "logs/gateway.log").exists()


def test_a_data_folder_that_has_gone_since_the_site_joined_is_told(tmp_path):
    write_atomic(
        Path("site/site.toml"), site_toml(SiteFile("north", "x:1", "f", Data(str(tmp_path / "gone")))).encode()
    )
    for name in ("start", "check"):
        assert "gone: the data folder is not there. Mount it, or set `folder` under" in refused("fedclient", name)


def test_a_run_that_is_no_longer_watched_goes_on_and_says_how_it_is_stopped(federation, monkeypatch):
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    Path("tiny.toml").write_text(TINY)
    write_atomic(federation / "status.json", b'{"supervisor": 1, "children": {}}')
    monkeypatch.setattr("fedserver.show.follow", interrupted)
    with only_one(federation):
        code, _, err = call("fedserver", "run", "tiny.toml")
    assert (code, err) == (130, "run tiny-1 goes on; the same command shows it, `fedserver stop tiny-1` stops it\n")
    monkeypatch.setattr("fedserver.show.follow", lambda *_: "unserved")
    with only_one(federation):
        assert "run tiny-1 waits: nothing serves federation any more" in refused("fedserver", "run", "tiny.toml")


def test_a_message_with_brackets_is_printed_as_it_is():
    app = typer.Typer()

    @app.command()
    @guarded
    def fail(words: str) -> None:
        raise FederationError(words)

    for words in ("features [4, 4] of [model]", "[/] [bold]x[/bold] \\[y] \\", "[link=http://x]y"):
        done = CliRunner().invoke(app, [words])
        assert (done.exit_code, done.stderr) == (1, f"error: {words}\n")
    done = CliRunner().invoke(app, ["study 'a\x1b[2K\u202eb'\nno line more"])
    assert done.stderr == "error: study 'a [2K b'\nno line more\n"


def test_an_error_that_nobody_can_mend_is_traced_and_not_hidden():
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @guarded
    def fail() -> None:
        raise ZeroDivisionError

    assert isinstance(CliRunner().invoke(app, []).exception, ZeroDivisionError)


def test_a_full_disk_is_told_and_not_traced_whether_or_not_the_file_is_known():
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @guarded
    def fail() -> None:
        with Path("/dev/full").open("wb") as file:
            file.write(b"x")

    done = CliRunner().invoke(app, [])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: a disk that is written to: No space left on device. Check ")


def test_a_folder_with_brackets_in_its_name_is_printed_as_it_is(tmp_path):
    _, out, _ = call("fedserver", "init", "--federation", "[old] fed[/bold]", "--name", "Test")
    assert "is in [old] fed[/bold]." in out


# JSON


def test_what_a_coordinator_asks_for_as_json_can_be_parsed():
    made = parsed("fedserver", "init", "--name", "Test", "--address", "127.0.0.1:8443", "--json")
    assert (made["name"], made["address"], made["folder"]) == ("Test", "127.0.0.1:8443", "federation")
    assert len(made["words"].split()) == 8
    invited = parsed("fedserver", "invite", "north", "--json")
    assert invited["site"] == "north"
    assert invited["invite"].startswith("fl1.")
    Path("tiny.toml").write_text(TINY)
    assert parsed("fedserver", "run", "tiny.toml", "--json", "--no-wait") == {"run": "tiny-1", "state": "queued"}
    assert parsed("fedserver", "run", "tiny.toml", "--json") == {"run": "tiny-1", "state": "queued"}  # nobody serves
    status = parsed("fedserver", "status", "--json")
    assert [run["id"] for run in status["runs"]] == ["tiny-1"]
    assert [site["name"] for site in status["sites"]] == ["north"]


def test_the_invite_is_one_line_and_nothing_else(federation):
    code, out, err = call("fedserver", "invite", "north")
    assert (code, err) == (0, "")
    assert out.startswith("fl1.")
    assert out.count("\n") == 1


def test_an_invite_for_a_site_that_has_joined_says_what_it_does(tmp_path, data):
    with running_edge(tmp_path / "served") as edge:
        invited = ["fedserver", "invite", "north", "--federation", edge.federation.folder]
        first = call(*invited)[1].strip()
        assert call("fedclient", "join", first, "--data", data, "--manifest-site", "north")[0] == 0
        code, line, told = call(*invited)
        assert (code, line.count("\n")) == (0, 1)
        assert "north has joined already, and stays in with its keys of now" in told
        assert call("fedclient", "rejoin", line.strip())[0] == 0


def test_a_results_folder_that_is_in_use_is_told():
    Path("tiny.toml").write_text(TINY)
    with only_one(Path("deep/out")):
        told = refused("fedsim", "run", "tiny.toml", "--out", "deep/out")
        assert f"out: is in use already by process {os.getpid()}. Wait until that one has ended, or" in told
        for words in (["compare", "tiny.toml"], ["attack", "tiny.toml"], ["scenario", "fed-ixi"]):
            assert "is in use already" in refused("fedsim", *words, "--out", "deep/out")
    assert "is not known" in refused("fedsim", "scenario", "fed-ixy")
    assert {path.name: path.stat().st_mode & 0o777 for path in Path().iterdir() if path.is_dir()} == {"deep": 0o700}


def test_a_queued_run_is_shown_and_stopped_and_goes_on(federation):
    Path("tiny.toml").write_text(TINY)
    code, out, _ = call("fedserver", "run", "tiny.toml")
    assert code == 0
    assert out.startswith("Run tiny-1 of tiny is made, which takes some seconds.\n")
    assert "Nothing serves this federation yet" in out
    assert "tiny-1" in call("fedserver", "status")[1]
    assert call("fedserver", "stop", "tiny-1") == (0, "tiny-1 is stopped.\n", "")
    assert call("fedserver", "run", "tiny.toml", "--no-wait")[0] == 0
    state = open_federation(federation).state
    found = find_run(state, "tiny-1")
    assert found is not None
    assert found.state == "queued"
    change_run(state, "tiny-1", 1.0, "finished")
    assert "is finished already" in refused("fedserver", "stop", "tiny-1")


def test_the_ready_studies_are_listed():
    assert "lung-ct-quick" in call("fedsim", "studies")[1]
    ready = {"brats-tumour", "chest-xray", "ct-nodule", "hippocampus", "lung-ct", "lung-ct-quick", "lung-nodule"}
    ready |= {"brca-prognosis", "lung-ct-private", "lung-ct-private-secure", "lung-ct-secure", "nodule-malignancy"}
    ready |= {"nodule-presence"}
    ready |= {"chest-xray-masked", "ct-lesion", "lung-detect"}
    ready |= {"fed-camelyon16", "fed-isic2019", "fed-ixi", "fed-kits19"}
    assert set(parsed("fedsim", "studies", "--json")) == ready


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = PhantomPlan(sites=("north", "south"), train=2, val=1, test=1, slices=1, size=32)
    return phantom(tmp_path_factory.mktemp("phantom"), plan, processes=1)


def test_a_phantom_is_written_where_it_is_said(tmp_path):
    words = ("fedsim", "phantom", tmp_path / "p", "--sites", 1, "--patients", 3, "--slices", 1, "--size", 16)
    code, out, err = call(*words)
    assert (code, err.splitlines()) == (0, [f"phantom: {done} of 3" for done in range(4)])
    assert (Path(out.strip()) / "manifest.csv").is_file()


def test_a_folder_without_a_run_is_told_before_anything_slow_is_imported():
    words = "[['release', 'none'], ['candidates', 'none'], ['explain', 'none']]"
    code = (
        "import sys; from typer.testing import CliRunner; from simulations.cli import app\n"
        f"print(*(CliRunner().invoke(app, each).stderr for each in {words}), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.count("none: holds no run. Give the folder of `fedsim run`") == 3
    assert done.stdout.endswith("False\n")


def test_a_phantom_of_any_layout_is_found_again_by_check_and_by_run(tmp_path):
    words = ("--sites", 2, "--patients", 3, "--slices", 1, "--size", 16)
    code, out, err = call("fedsim", "phantom", tmp_path / "p", "--layout", "nnunet", *words)
    assert (code, out.strip()) == (0, str(tmp_path / "p"))
    assert err.endswith("phantom: 6 of 6\n")
    file = SiteFile("north", "127.0.0.1:9", "Test", Data(str(tmp_path / "p" / "north"), layout="auto"))
    write_atomic(Path("site") / "site.toml", site_toml(file).encode())
    write_atomic(Path("site/secrets/case-keys"), b"0" * 64)  # of 40 secrets one leaves none of three to train on
    assert parsed("fedclient", "check", "--json")["layout"] == "nnU-Net raw data, 3 training cases"
    assert "Data: nnU-Net raw data, 3 training cases" in call("fedclient", "check")[1]
    assert "is not empty" in refused("fedsim", "phantom", tmp_path / "p", "--layout", "nnunet", *words)
    told = refused("fedsim", "phantom", tmp_path / "q", "--layout", "dicom", *words)
    assert "allowed are manifest, table, luna16" in told
    told = refused(
        "fedsim", "run", "lung-ct", "--data", tmp_path / "p" / "north", "--data", tmp_path / "p", "--sites", 3
    )
    assert "has 2 sites (north, p), 3 were asked for" in told


def test_a_hospital_joins_looks_at_its_data_and_asks_how_it_stands(tmp_path, data):
    with running_edge(tmp_path / "served") as edge:
        line = parsed("fedserver", "invite", "north", "--federation", edge.federation.folder, "--json")["invite"]
        words = ["fedclient", "join", line, "--data", data, "--manifest-site", "north"]
        joined = parsed(*words, "--json")
        assert (joined["site"], joined["address"], joined["settings"]) == ("north", edge.address, "site/site.toml")
        assert joined["data"] == "manifest.csv"
        assert "belongs to a federation already" in refused(*words)
        assert "HTTP 4" in refused(*words, "--site", "second")  # an invite is good for one
    checked = parsed("fedclient", "check", "--json", "--study", "lung-ct-quick")
    assert (checked["cases"], checked["readable"], checked["ready"], checked["looked_at"]) == (4, 4, True, 4)
    assert checked["splits"] == {
        split: {"cases": n, "patients": n, "labelled": n} for split, n in (("train", 2), ("val", 1), ("test", 1))
    }
    assert (
        "4 of 4 cases can be read; 0 were looked at anew" in call("fedclient", "check", "--study", "lung-ct-quick")[1]
    )
    assert parsed("fedclient", "policy", "--json")["approval"] == "ask"
    assert "fewer than 11 cases" in call("fedclient", "card")[1]
    card = parsed("fedclient", "card", "--json")
    assert (card["cases"], card["tables"]) == (None, {})
    status = parsed("fedclient", "status", "--json")
    assert (status["site"], status["finished_work"]) == ("north", [])
    assert "stopped; `fedclient start` starts it" in call("fedclient", "status")[1]


def test_a_join_that_is_cut_off_before_its_keys_have_their_place_is_ended_with_the_same_invite(
    tmp_path, data, monkeypatch
):
    with running_edge(tmp_path / "served") as edge:
        line = parsed("fedserver", "invite", "north", "--federation", edge.federation.folder, "--json")["invite"]
        words = ["fedclient", "join", line, "--data", data, "--manifest-site", "north"]

        def cut_off(path: Path, content: bytes) -> None:
            write_atomic(path, content)
            raise EnrolmentFailed("the power is gone")

        with monkeypatch.context() as cut:
            cut.setattr(fedclient.cli, "write_atomic", cut_off)
            assert "the power is gone" in refused(*words)
        assert "`fedclient rejoin INVITE`" in refused(*words)
        assert parsed("fedclient", "rejoin", line, "--json")["site"] == "north"
    assert parsed("fedclient", "check", "--json", "--study", "lung-ct-quick")["cases"] == 4
    assert parsed("fedclient", "status", "--json")["site"] == "north"


@pytest.mark.parametrize(
    ("table", "words", "told"),
    [
        ("site,patient_id,image,mask\nb,p0,0.nii,\na,p1,0.nii,\n", (), "`fedclient join --manifest-site a`, or "
         'manifest_site = "a" under [data] of site.toml'),
        ("site,patient_id,image,mask\nb,p0,0.nii,\n", ("--manifest-site", "c"), "there is no site 'c'. It holds: b."),
        ("patient_id;image;mask\np0;0.nii;\n", (), "The columns must be separated by commas."),
        ("patient_id,image,mask\n", (), "it has a heading and no rows"),
        ("", (), "row 1 lacks the columns"),
        ("patient_id,image,mask\np0,../0.nii,\n", (), "row 2: `image` must be a path inside the data folder"),
    ],
)  # fmt: skip
def test_a_table_that_describes_no_data_is_told_before_the_invite_is_spent(tmp_path, table, words, told):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.nii").touch()
    (tmp_path / "data" / "manifest.csv").write_text(table)
    line = write_invite(Invite("127.0.0.1:9", "0" * 64, "north", "0" * 32))
    assert told in refused("fedclient", "join", line, "--data", tmp_path / "data", *words)
    assert not Path("site").exists()
    (tmp_path / "data" / "manifest.csv").write_text("site,patient_id,image,mask\nb,p0,0.nii,\na,p1,0.nii,\n")
    assert "127.0.0.1:9: cannot be reached" in refused(
        "fedclient", "join", line, "--data", tmp_path / "data", "--manifest-site", "a"
    )


def test_a_site_with_unreadable_images_is_told_by_rows_and_not_by_names(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "Jane_Doe.nii.gz").write_bytes(b"no image")
    (tmp_path / "data" / "manifest.csv").write_text("patient_id,image,mask\nJane_Doe,Jane_Doe.nii.gz,\n")
    file = SiteFile("north", "127.0.0.1:9", "Test", Data(str(tmp_path / "data")))
    write_atomic(Path("site") / "site.toml", site_toml(file).encode())
    code, told, err = call("fedclient", "check", "--html", "page.html")
    assert (code, err) == (1, "")
    assert "0 of 1 cases can be read" in told
    assert ", row 2: NIfTI: the file is broken" in told
    assert "Not ready" in told
    assert "Jane" not in told + Path("page.html").read_text()
    found = json.loads(call("fedclient", "check", "--json")[1])
    (case,) = {finding["case"] for finding in found["findings"] if finding["blocks"] and finding["case"]}
    words = ("fedclient", "waive", "IMAGE_UNREADABLE", "--case", case)
    assert "needs a reason" in refused(*words)
    assert "left out" in call(*words, "--exclude", "--reason", "sent to the PACS again")[1]
    assert [waiver["case"] for waiver in parsed("fedclient", "waive", "--list", "--json")] == [case]
    assert json.loads(call("fedclient", "check", "--json")[1])["left_out"] == 1
    assert "No finding is waived" in call(*words, "--remove")[1]


def test_a_table_that_leaves_no_case_is_never_ready_and_no_waiver_is_offered_for_it(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.csv").write_text("patient_id;image;mask\np0;a.nii;b.nii\n")
    file = SiteFile("north", "127.0.0.1:9", "Test", Data(str(tmp_path / "data")))
    write_atomic(Path("site") / "site.toml", site_toml(file).encode())
    told = refused("fedclient", "waive", "MANIFEST_INVALID", "--reason", "the table is as it is")
    assert "MANIFEST_INVALID cannot be waived" in told
    assert "separated by commas" in told
    code, told, _ = call("fedclient", "check")
    assert (code, "Not ready" in told, "fedclient waive" in told) == (1, True, False)
    assert "LABEL_EMPTY" in call("fedclient", "waive", "LABEL_EMPTY", "--reason", "empty masks are right here")[1]


def test_a_simulation_tells_its_results_as_json_on_standard_output_and_nothing_else(data):
    Path("tiny.toml").write_text(TINY)
    words = ["fedsim", "run", "tiny.toml", "--data", data, "--out", "out", "--workers", 0, "--device", "cpu", "--json"]
    code, out, _ = call(*words, "-", "--no-compare")
    assert code == 0
    results = json.loads(out)
    assert [seed["seed"] for seed in results["seeds"]] == [0]
    assert set(results["seeds"][0]["federated"]) == {"north", "south"}
    assert Path(results["report"]).is_file()
    assert call(*words, "results.json", "--no-compare")[0] == 0
    assert json.loads(Path("results.json").read_text()) == results


def test_the_price_of_privacy_is_told_before_anything_runs():
    told = parsed("fedsim", "privacy", "--patients", 250, "--batch", 10, "--steps", 1250, "--delta", 1e-4,
                  "--noise", 2, "--json")  # fmt: skip
    assert (told["sample_rate"], told["steps"]) == (0.04, 1250)
    assert told["prices"][0]["epsilon"] == pytest.approx(2.79, rel=0.015)
    Path("tiny.toml").write_text(TINY + "[train]\nlocal_epochs = 3\nbatch_size = 5\n")
    of_study = parsed("fedsim", "privacy", "tiny.toml", "--patients", 20, "--noise", 4, "--noise", 8, "--json")
    assert (of_study["sample_rate"], of_study["steps"]) == (0.25, 12)  # 1 round of 3 epochs of 20 / 5
    assert [p["noise_multiplier"] for p in of_study["prices"]] == [4.0, 8.0]
    least = parsed("fedsim", "privacy", "tiny.toml", "--patients", 20, "--epsilon", 1, "--json")["prices"][0]
    assert 0.99 < least["epsilon"] <= 1.0
    ready = parsed("fedsim", "privacy", "lung-ct-private", "--json")
    assert (ready["sample_rate"], ready["steps"], ready["delta"]) == (0.5, 30, 1e-3)
    assert [(p["noise_multiplier"], 7.5 < p["epsilon"] <= 8) for p in ready["prices"]] == [(1.46, True)]
    assert "of how many patients" in refused("fedsim", "privacy", "tiny.toml")
    assert "name a study, or give --batch" in refused("fedsim", "privacy", "--patients", 20)
    assert "give --steps" in refused("fedsim", "privacy", "--patients", 20, "--batch", 5)
    assert "a batch of 5 of 4 patients" in refused("fedsim", "privacy", "tiny.toml", "--patients", 4)
    assert "must be above 0 and below 0.05" in refused(
        "fedsim", "privacy", "tiny.toml", "--patients", 20, "--delta", 0.05
    )


def test_a_hospital_sets_its_privacy_budget_and_reads_its_ledger(tmp_path):
    assert "is missing" in refused("fedclient", "ledger")
    file = SiteFile("north", "127.0.0.1:9", "Test", Data(str(tmp_path)))
    write_atomic(Path("site") / "site.toml", site_toml(file).encode())
    assert "No privacy budget is set" in call("fedclient", "ledger")[1]
    assert call("fedclient", "budget", "--epsilon", 30)[0] == 0
    number = open_ledger(Path("site")).reserve(Reservation("all", "run-1", "a" * 64, 100, Spend(8.0, 0.1, 100)))
    told = parsed("fedclient", "ledger", "--json")["all"]
    assert told == {"epsilon": epsilon([Spend(8.0, 0.1, 100)], 1e-5), "budget": {"epsilon": 30.0, "delta": 1e-5},
                    "steps": 100, "runs": ["run-1"], "not_settled": 1}  # fmt: skip
    shown = call("fedclient", "ledger")[1]
    assert "of 30 spent at delta 1e-05" in shown
    assert "1 not settled" in shown
    open_ledger(Path("site")).settle(number, 0)
    assert "epsilon 0 of 30 spent" in call("fedclient", "ledger")[1]
    assert "delta" in refused("fedclient", "budget", "--epsilon", 3, "--delta", 0.5)
