"""`fedserver`: a coordinator, from the empty folder to the finished run."""

import socket
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fedserver.audit_commands import audit
from fedserver.ca_commands import ca
from fedserver.monitor import monitor
from fedserver.operate import Passphrase, backup, dashboard, doctor, logs, passphrase, pause, restore, resume
from fedserver.release_commands import (
    release,
    release_approve,
    release_export_mlflow,
    release_key,
    release_retire,
    release_status,
    releases,
    retrain,
    withdraw,
)
from shared_models.cli import guarded, print_json
from shared_models.errors import ProcessFailed, StateInvalid
from shared_models.files import read_json

app = typer.Typer(
    help="A coordinator: it invites hospitals, runs studies over them, and never sees an image.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(soft_wrap=True)
Folder = Annotated[Path, typer.Option("--federation", envvar="FEDSERVER_FEDERATION", help="Folder of the federation.")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
HERE = Path("federation")


@app.command()
@guarded
def init(
    name: Annotated[str, typer.Option(help="What the federation is called.")] = "federation",
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT that the hospitals dial; this machine's name at 8443.")
    ] = None,
    certificate_days: Annotated[
        float, typer.Option(help="For which a site's certificate is good; its node renews it when a third is left.")
    ] = 90.0,
    offline_ca: Annotated[
        Path | None,
        typer.Option(help="Folder, on a stick, for the authority's root key, encrypted; the coordinator keeps none."),
    ] = None,
    passphrase_file: Passphrase = None,
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Makes a federation: its certificate authority, server certificate, secrets and state."""
    from fedserver.doctor import dialled
    from fedserver.enrol import ca_fingerprint, init_federation
    from fedserver.root import founding
    from shared_models.identity import fingerprint_words

    if offline_ca is None and passphrase_file is not None:
        raise typer.BadParameter("--passphrase-file is for --offline-ca.")
    found = founding(offline_ca, passphrase(passphrase_file, twice=True)) if offline_ca is not None else None
    where = address or f"{socket.gethostname()}:8443"
    made = init_federation(federation, name, where, certificate_days, found)
    words = fingerprint_words(ca_fingerprint(made))
    if as_json:
        print_json({"name": made.name, "address": made.address, "folder": str(made.folder), "words": words})
        return
    console.print(f"[bold]{made.name}[/] is in {escape(str(made.folder))}. Hospitals dial {made.address}.")
    dial = dialled(made)
    if dial.state != "ok":
        console.print(f"[yellow]{escape(dial.words)}[/] {escape(dial.mend)}", highlight=False)
    console.print(f"This coordinator, to be compared by telephone: [bold]{words}[/]")
    if offline_ca is not None:
        console.print(f"The root key is in {escape(str(offline_ca))}, encrypted: take it away, with a copy elsewhere.")
        console.print("It is needed every half year, for `fedserver ca renew`; `fedserver status` says when.")
    console.print("Next: `fedserver serve`, and `fedserver invite SITE` for each hospital.")


@app.command()
@guarded
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on for hospitals.")] = "0.0.0.0",  # noqa: S104 they dial it
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on; the one of the federation's address.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, max=64, help="Runs that are carried out side by side.")] = 1,
    metrics: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port on loopback where Prometheus may ask for figures.")
    ] = None,
    dashboard: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port on loopback of the dashboard, as `fedserver dashboard`.")
    ] = None,
    federation: Folder = HERE,
) -> None:
    """Serves hospitals and carries out queued runs until Ctrl-C; restarts whatever dies."""
    from fedserver.enrol import open_federation
    from fedserver.serve import serve as supervise
    from shared_models.supervise import stop_on_signals

    opened = open_federation(federation)
    listening, logs = port or int(opened.address.rpartition(":")[2]), escape(str(opened.logs))
    words = f"[bold]{opened.name}[/] listens on {host}:{listening} (mutual TLS). Logs: {logs}"
    stop = stop_on_signals()
    supervise(
        federation,
        host,
        listening,
        stop,
        at_once=at_once,
        metrics=metrics,
        dashboard=dashboard,
        begun=lambda: console.print(words),
        say=lambda it: print(it, flush=True),
    )


@app.command()
@guarded
def invite(
    site: Annotated[str, typer.Argument(help="Name of the hospital: lower-case letters, digits, -.")],
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Prints one line for one hospital: good for one enrolment within 72 hours."""
    from fedserver.enrol import invite as make
    from fedserver.enrol import open_federation
    from fedserver.state import find_site

    opened = open_federation(federation)
    line, before = make(opened, site), find_site(opened.state, site)
    if before is not None and before.state == "active" and not as_json:
        words = (
            f"{site} has joined already, and stays in with its keys of now until somebody joins with this invite, who "
            f"then takes its place: `fedclient rejoin INVITE` there."
        )
        Console(stderr=True, soft_wrap=True).print(words, highlight=False, markup=False)
    if as_json:
        print_json({"site": site, "invite": line})
    else:
        print(line)


@app.command()
@guarded
def revoke(
    site: Annotated[str, typer.Argument(help="Name of the hospital, as `fedserver status` shows it.")],
    reason: Annotated[str, typer.Option(help="Why, for those who ask later; it stays with the coordinator.")],
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Shuts a hospital out within seconds, in the middle of a round too; a new invite lets it join again."""
    from fedserver.enrol import open_federation
    from fedserver.lifecycle import revoke as shut_out
    from fedserver.lifecycle import revoked_words

    opened = open_federation(federation)
    gone = shut_out(opened, site, reason)
    if as_json:
        print_json({"site": gone.name, "state": gone.state, "at": gone.revoked_at, "reason": gone.revoked_reason})
        return
    console.print(f"{gone.name} {revoked_words(gone)}: {escape(gone.revoked_reason)}")
    console.print(f"What it has contributed stays in the models. To let it back in: `fedserver invite {gone.name}`.")


@app.command()
@guarded
def renew(federation: Folder = HERE) -> None:
    """Gives the coordinator a new key and certificate now; hospitals trust the authority and notice nothing."""
    from fedserver.enrol import open_federation
    from fedserver.lifecycle import renew_server
    from shared_models.dates import date_text
    from shared_models.identity import load_credential, read_certificate

    opened = open_federation(federation)
    renew_server(opened, always=True)
    ends = read_certificate(load_credential(opened.server_certificate).certificate).expires_at_s
    console.print(f"The coordinator's certificate is good until {date_text(ends)}; a running gateway takes it up.")


@app.command()
@guarded
def run(
    study: Annotated[str, typer.Argument(help="A ready study or the path of a study.toml.")],
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the study's, numbered.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Begin anew even if this study has an unfinished run.")] = False,
    wait: Annotated[bool, typer.Option(help="Show progress until the run ends.")] = True,
    weights: Annotated[
        Path | None, typer.Option(help="Pretrained weights that the study names: .safetensors, or .pth of tensors.")
    ] = None,
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Carries out a study with the enrolled hospitals; goes on with an unfinished run of the same study."""
    from fedserver.enrol import open_federation
    from fedserver.show import follow, run_table
    from fedserver.submit import submit, watched
    from shared_models.study import load_study
    from shared_models.supervise import read_status

    opened = open_federation(federation)
    loaded, say = load_study(study), partial(console.print, markup=False)
    submitted = submit(opened, loaded, name, new, weights, (lambda _: None) if as_json else say)
    for words in submitted.told if not as_json else ():
        console.print(words, markup=False)
    served = read_status(federation).get("supervisor") is not None
    if not served and not as_json:
        console.print("The run is queued. Nothing serves this federation yet: start `fedserver serve`.")
    if not wait or not served:
        if as_json:
            print_json({"run": submitted.id, "state": "queued"})
        return
    try:
        ended = follow(submitted.folder, watched(opened, submitted.id), as_json)
    except KeyboardInterrupt:
        goes_on = f"run {submitted.id} goes on; the same command shows it, `fedserver stop {submitted.id}` stops it"
        Console(stderr=True, soft_wrap=True).print(goes_on, highlight=False, markup=False)
        raise typer.Exit(130) from None
    if ended == "unserved":
        raise ProcessFailed(
            f"run {submitted.id} waits: nothing serves {federation} any more. Start `fedserver serve`; the run then "
            "goes on from its last finished round, and the same command shows it."
        )
    if ended != "finished":
        raise ProcessFailed(_why(opened.state, submitted.id, ended))
    if not as_json:
        found = read_json(submitted.folder.path / "report.json")
        console.print(run_table(found))
        if found["privacy"]:
            console.print(found["privacy"]["words"], soft_wrap=True)
        report, weights = submitted.folder.path / "report.html", submitted.folder.weights(submitted.rounds)
        console.print(f"report   {report}\nweights  {weights}", markup=False)


def _why(state: Path, run_id: str, ended: str) -> str:
    from fedserver.state import find_run

    found = find_run(state, run_id)
    words = found.message if found is not None and found.message else "see the logs"
    return f"run {run_id} is {ended}: {words} The same command goes on from the last finished round."


@app.command()
@guarded
def stop(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, as `fedserver status` shows it.")],
    federation: Folder = HERE,
) -> None:
    """Stops a run at once; what it has finished stays, and `fedserver resume` goes on with it."""
    from fedserver.enrol import open_federation, open_log
    from fedserver.state import UNFINISHED, change_run, find_run

    opened = open_federation(federation)
    found = find_run(opened.state, run_id)
    if found is None:
        raise StateInvalid(f"run {run_id!r}: is not known here. `fedserver status` lists the runs.")
    if found.state != "finished":
        open_log(opened).add("run-stopped", run=run_id)
        found = change_run(opened.state, run_id, time.time(), "stopped", "stopped by the coordinator", among=UNFINISHED)
    if found.state == "finished":
        raise StateInvalid(f"run {run_id!r}: is finished already. There is nothing to stop.")
    console.print(f"{run_id} is stopped.")


@app.command()
@guarded
def status(
    federation: Folder = HERE,
    as_json: AsJson = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the layout of --json as JSON Schema.")] = False,
) -> None:
    """Shows the sites, the runs, and for each run whom it waits for and why."""
    from fedserver.enrol import open_federation
    from fedserver.overview import overview
    from fedserver.overview import schema as layout
    from fedserver.show import status_table

    if schema:
        print_json(layout())
        return
    facts: dict[str, Any] = overview(open_federation(federation))
    if as_json:
        print_json(facts)
    else:
        console.print(status_table(facts))


for command in (
    releases,
    release,
    release_approve,
    release_retire,
    release_status,
    release_export_mlflow,
    release_key,
    withdraw,
    retrain,
    monitor,
    dashboard,
    doctor,
    pause,
    resume,
    logs,
    backup,
    restore,
):
    app.command()(command)
app.add_typer(audit, name="audit")
app.add_typer(ca, name="ca")

if __name__ == "__main__":
    app()
