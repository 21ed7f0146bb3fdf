"""`fedserver dashboard, doctor, pause, resume, logs, backup, restore`: what keeps a coordinator going day to day."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared_models.cli import guarded, print_json

console = Console(soft_wrap=True)
Folder = Annotated[Path, typer.Option("--federation", envvar="FEDSERVER_FEDERATION", help="Folder of the federation.")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, as `fedserver status` shows it.")]
Passphrase = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line is the passphrase; left out, it is asked for.")
]
HERE = Path("federation")
DASHBOARD_PORT = 9472


@guarded
def doctor(federation: Folder = HERE, as_json: AsJson = False) -> None:
    """Looks at ports, certificates, disk, backup, clock, versions; says how each is mended; exits with 1 on a fail."""
    from fedserver.doctor import examine
    from shared_models.doctor import tell

    if tell(examine(federation), console, as_json) == "fail":
        raise typer.Exit(1)


@guarded
def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = DASHBOARD_PORT,
    federation: Folder = HERE,
) -> None:
    """Serves a read-only page on this machine alone, behind a token: rounds, sites, curves, cost, audit log, releases.

    From another machine: `ssh -L PORT:127.0.0.1:PORT COORDINATOR`, then the same link there.
    """
    from fedserver.dashboard.login import token_path
    from fedserver.dashboard.web import dashboard_app
    from shared_models.loopback import serve_loopback
    from shared_models.supervise import kept_token

    app, where = dashboard_app(federation), token_path(federation)
    link = f"http://127.0.0.1:{port}/"
    if sys.stdout.isatty():
        console.print(f"open: {link}#token={kept_token(where)}", highlight=False, markup=False)
    else:  # what is kept as a log holds no token
        console.print(f"dashboard: {link}, token: {where}", highlight=False, markup=False)
    console.print("It shows and changes nothing; Ctrl-C ends it.")
    serve_loopback(app, port)


@guarded
def pause(
    run_id: RunName,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the round under way; its work is lost.")] = False,
    federation: Folder = HERE,
) -> None:
    """Lets a run rest once its round is finished; the next one in the queue begins. `fedserver resume` goes on."""
    from fedserver.enrol import open_federation
    from fedserver.queue import pause as hold

    console.print(f"{run_id} {hold(open_federation(federation), run_id, now)}.", highlight=False)


@guarded
def resume(run_id: RunName, federation: Folder = HERE) -> None:
    """Queues a run that was paused or stopped, or has failed; it goes on after its last finished round."""
    from fedserver.enrol import open_federation
    from fedserver.queue import resume as go_on

    console.print(f"{run_id} {go_on(open_federation(federation), run_id)}.", highlight=False)


@guarded
def logs(
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Only what the process of this run said.")
    ] = None,
    process: Annotated[str | None, typer.Option(help="Only of: gateway, link, dispatch, metrics, dashboard.")] = None,
    last: Annotated[int, typer.Option(min=0, help="Only the last so many lines; 0 shows all.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C.")] = False,
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Shows what the coordinator's processes have said, in order of time."""
    from fedserver.enrol import open_federation
    from fedserver.state import find_run
    from shared_models import logs as books
    from shared_models.errors import StateInvalid

    if run_id is not None and process is not None:
        raise typer.BadParameter("give a run or --process, not both.")
    opened = open_federation(federation)
    folder = opened.logs
    if run_id is not None and not (folder / f"run-{run_id}.log").exists():
        found = find_run(opened.state, run_id)
        if found is None:
            raise StateInvalid(f"run {run_id!r}: is not known here. `fedserver status` lists the runs.")
        raise StateInvalid(
            f"run {run_id!r}: is {found.state} and has no log in {folder}: it has not begun yet, or its log was the "
            f"oldest of more than {books.MOST_RUN_LOGS} and is gone."
        )
    books.show(folder, f"run-{run_id}" if run_id is not None else process, last, follow, as_json)


@guarded
def backup(
    file: Annotated[Path, typer.Argument(help="The file to write; on another disk.")],
    passphrase_file: Passphrase = None,
    no_secrets: Annotated[
        bool, typer.Option("--no-secrets", help="Leave the private keys out; keep ca/, tls/ and secrets/ yourself.")
    ] = False,
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Copies the whole federation into one file while it is served; keys are encrypted with a passphrase."""
    from fedserver.backup import backup as copy
    from fedserver.enrol import open_federation

    opened = open_federation(federation)
    made = copy(opened, file, None if no_secrets else passphrase(passphrase_file, twice=True))
    if as_json:
        print_json({"file": str(file), "at": made.at_s, "files": len(made.files), "secrets": made.secrets})
        return
    console.print(f"{len(made.files)} files are in {file}.", highlight=False, markup=False)
    if made.secrets:
        console.print("It holds the private keys, encrypted: without the passphrase they are lost.")
    else:
        console.print("It holds no private key: keep ca/, tls/ and secrets/ elsewhere, or nobody can restore from it.")


@guarded
def restore(
    file: Annotated[Path, typer.Argument(help="What `fedserver backup` wrote.")],
    passphrase_file: Passphrase = None,
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Makes the folder of a federation from a backup; `fedserver serve` then goes on with its runs."""
    from fedserver.backup import restore as unpack
    from fedserver.state import list_sites
    from shared_models.dates import date_text
    from shared_models.identity import fingerprint_words

    made = unpack(file, federation, passphrase(passphrase_file, twice=False))
    active = [site.name for site in list_sites(federation / "state.db") if site.state == "active"]
    if as_json:
        print_json({"federation": made.federation, "folder": str(federation), "at": made.at_s, "let_in": active})
        return
    when = date_text(made.at_s)
    console.print(f"{made.federation} is in {federation}, as it was on {when}.", highlight=False, markup=False)
    console.print(f"Compare the authority's words: [bold]{fingerprint_words(made.authority)}[/]")
    console.print("What happened since is not in it: sites will note that the audit log was cut, and runs go on from")
    console.print("the last round in it.")
    if active:
        console.print(
            f"[bold yellow]It lets in: {', '.join(active)}.[/] Sites that were revoked or withdrawn after {when} are "
            "among them again: `fedserver revoke` each before you serve it. Those that have joined or renewed their "
            "certificate since are not known: `fedserver invite` each, then `fedclient rejoin` there.",
            highlight=False,
        )
    console.print("Serve it in one place only. Next: `fedserver doctor`, `fedserver serve`.")


def passphrase(file: Path | None, twice: bool) -> str:
    """From a file, or asked for: a command line and an environment are seen by others."""
    if file is not None:
        return (file.read_text(encoding="utf-8").splitlines() or [""])[0]
    if not sys.stdin.isatty():
        raise typer.BadParameter("nobody can be asked here; give --passphrase-file.")
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=twice))
