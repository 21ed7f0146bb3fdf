"""`fedclient doctor, status, logs, page`: what whoever runs a hospital's node types from day to day."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared_models.cli import guarded, print_json

console = Console(soft_wrap=True)
Folder = Annotated[
    Path, typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node: keys, settings, cache.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
PAGE_PORT = 8471


@guarded
def doctor(site: Folder = Path("site"), as_json: AsJson = False) -> None:
    """Looks at network, machine, data and settings; says how each trouble is mended; exits with 1 on a fail."""
    from fedclient.doctor import examine
    from shared_models.doctor import tell

    if tell(examine(site), console, as_json) == "fail":
        raise typer.Exit(1)


@guarded
def status(site: Folder = Path("site"), as_json: AsJson = False) -> None:
    """What this node is doing: its connection and processes, and the last work done."""
    from fedclient.approval import awaiting
    from fedclient.overview import overview
    from shared_models.dates import date_text

    facts = overview(site)
    if as_json:
        print_json(facts)
        return
    running = facts["processes"]
    alive = "running" if running.get("supervisor") else "stopped; `fedclient start` starts it"
    console.print(f"[bold]{facts['site']}[/], coordinator {facts['coordinator']}: {alive}")
    if running.get("supervisor"):
        print(f"  {facts['connection']['words']}")
    for name, child in running.get("children", {}).items():
        now = child["state"] if running.get("supervisor") else "stopped"  # a killed supervisor wrote no last word
        console.print(f"  {name}: {now}, restarts {child['restarts']}")
    if work := facts["work"]:
        since = date_text(work["since"])
        print(f"  at work on {work['kind']} of run {work['run']}, round {work['round']}, since {since}")
    print(f"  certificate good until {date_text(facts['certificate_expires_at'])}")
    for words in [*facts["alarms"], *facts["warnings"]]:
        print(f"  {words}")
    if last := facts["last_refused"]:
        where = f", run {last['run']} round {last['round']}" if last["run"] else ""
        print(f"  last refused order: {last['code']}{where}, {date_text(last['time'])}; `fedclient logs` says why")
    for path in facts["finished_work"]:
        told = re.sub(r"[0-9a-f]{64}", lambda digest: digest[0][:12], path)
        console.print(f"  finished {told}", highlight=False)
    if waiting := awaiting(site):
        console.print(f"  waiting for a decision here: {waiting}; see `fedclient studies`")


@guarded
def logs(
    process: Annotated[str | None, typer.Argument(help="Only of: node, executor, page.")] = None,
    last: Annotated[int, typer.Option(min=0, help="Only the last so many lines; 0 shows all.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C.")] = False,
    site: Folder = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Shows what this node's processes have said, in order of time; no line names a patient or a file of the data."""
    from fedclient.site import read_site_file
    from shared_models import logs as books

    read_site_file(site)
    books.show(site / "logs", process, last, follow, as_json)


@guarded
def page(
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = PAGE_PORT,
    site: Folder = Path("site"),
) -> None:
    """Serves a read-only page on this machine alone: how the site stands, and figures for Prometheus under /metrics."""
    from fedclient.page.web import page_app
    from fedclient.site import read_site_file
    from shared_models.loopback import serve_loopback

    file = read_site_file(site)
    console.print(f"[bold]{file.name}[/]: http://127.0.0.1:{port}/ until Ctrl-C.")
    serve_loopback(page_app(site), port)
