"""`fedclient`: a hospital's node, from the invite to training."""

import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedclient.approval import approve, audit, partners, policy, refuse, sent, show, studies, waiting_words, withdraw
from fedclient.explain_command import explain, worklist
from fedclient.gate.commands import card, check, waive
from fedclient.operate import doctor, logs, page, status
from fedclient.predict.commands import predict
from fedclient.score_command import score
from fedclient.serving.commands import drift, serve_model
from fedclient.verify import verify
from fedclient.worth_command import worth
from shared_models.cli import guarded, print_json
from shared_models.errors import EnrolmentFailed, FederationError
from shared_models.files import write_atomic
from shared_models.parse import printable

app = typer.Typer(
    help="A hospital's node: it trains on images that never leave, and runs only what is installed here.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(soft_wrap=True)
Folder = Annotated[
    Path, typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node: keys, settings, cache.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]


class Approval(StrEnum):
    """What `fedclient join --approve` takes, as [policy] of site.toml has it."""

    ASK = "ask"
    INSIDE_POLICY = "inside-policy"


@app.command()
@guarded
def join(
    invite: Annotated[str, typer.Argument(help="The line that the coordinator sent: fl1.…; - reads it from stdin.")],
    data: Annotated[Path, typer.Option(help="Folder of images in a known layout, or with manifest.csv; only read.")],
    layout: Annotated[str, typer.Option(help="How it is laid out (pacs, brats-2023, ...); auto finds it.")] = "auto",
    manifest_site: Annotated[
        str | None, typer.Option(help="Which site of a table that lists several; as `manifest_site` in site.toml.")
    ] = None,
    approve: Annotated[
        Approval, typer.Option(help="Ask a person here for each study, or take part in all inside the policy.")
    ] = Approval.ASK,
    site: Folder = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Makes this site's keys here, gets its certificate, and writes site.toml."""
    from fedclient.data.listing import described
    from fedclient.enrol import Joined
    from fedclient.enrol import join as enrol
    from fedclient.policy import Policy
    from fedclient.site import Data, SiteFile, site_toml

    if (site / "site.toml").exists():
        if not (site / "keys").exists():
            raise EnrolmentFailed(
                f"{site}: has settings and no keys: its join was cut off, or they are lost. End it with that invite, "
                f"or a new one: `fedclient rejoin INVITE`."
            )
        raise EnrolmentFailed(
            f"{site}: belongs to a federation already. To change its data, edit [data] of "
            f"{site / 'site.toml'}; to join another federation, use another folder with --site."
        )
    if not data.is_dir():
        raise EnrolmentFailed(f"{data}: is no folder. Point --data to the folder that holds the images.")
    if not _is_text(str(data.resolve())):  # before the invite is spent: site.toml is UTF-8
        raise EnrolmentFailed(f"{str(data)!r}: its name is not UTF-8. Rename the folder.")
    laid_out = described(data.resolve(), layout, manifest_site)  # before the invite is spent, too
    held = Data(str(data.resolve()), manifest_site, layout)
    allowed = Policy(approval=approve.value)

    def settle(joined: Joined) -> None:
        file = SiteFile(joined.site, joined.address, joined.federation, held, policy=allowed)
        write_atomic(site / "site.toml", site_toml(file).encode())

    joined = enrol(_line(invite), site, settle)
    if as_json:
        print_json({**asdict(joined), "keys": str(joined.keys), "settings": str(site / "site.toml"), "data": laid_out})
        return
    console.print(f"[bold]{joined.site}[/] has joined [bold]{escape(joined.federation)}[/] at {joined.address}.")
    console.print(f"Coordinator, to be compared by telephone: [bold]{joined.authority_words}[/]")
    console.print(f"This site's certificate:                 [bold]{joined.certificate_words}[/]")
    console.print(f"Data: {escape(laid_out)}")
    console.print(f"Settings: {escape(str(site / 'site.toml'))}. Next: `fedclient check`, then `fedclient start`.")
    if approve is Approval.ASK:
        console.print("A study waits until somebody here approves it: `fedclient studies`, `show`, `approve`.")


@app.command()
@guarded
def rejoin(
    invite: Annotated[str, typer.Argument(help="A new line of the coordinator: fl1.…; - reads it from stdin.")],
    site: Folder = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Joins again with new keys after a revocation, an expired certificate or a lost key; settings and data stay."""
    from fedclient.enrol import rejoin as enrol
    from fedclient.site import read_site_file

    file = read_site_file(site)
    joined = enrol(_line(invite), site, file.name, file.coordinator)
    if as_json:
        print_json({**asdict(joined), "keys": str(joined.keys)})
        return
    console.print(f"[bold]{joined.site}[/] has joined [bold]{escape(joined.federation)}[/] again, with new keys.")
    console.print(f"Coordinator, to be compared by telephone: [bold]{joined.authority_words}[/]")
    console.print(f"This site's certificate:                 [bold]{joined.certificate_words}[/]")
    console.print("A node that runs takes them up within a minute; otherwise `fedclient start`.")


@app.command()
@guarded
def renew(
    identity: Annotated[
        bool, typer.Option("--identity", help="Also a new key of what this site signs; best between two runs.")
    ] = False,
    site: Folder = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Renews this site's certificate now; a node that runs does so by itself when a third of its life is left."""
    from fedclient.authorities import refresh
    from fedclient.renewal import check_keys
    from fedclient.renewal import renew as ask_anew
    from fedclient.site import read_site_file
    from shared_models.dates import date_text
    from shared_models.identity import fingerprint_words

    file = read_site_file(site)
    check_keys(site)
    refresh(site, file.name, file.coordinator)
    facts = ask_anew(site, file.name, file.coordinator, identity)
    if as_json:
        print_json({"site": file.name, "expires_at": facts.expires_at_s, "serial": facts.serial})
        return
    console.print(f"[bold]{file.name}[/]: the new certificate is good until {date_text(facts.expires_at_s)}.")
    console.print(
        f"Its words: [bold]{fingerprint_words(facts.fingerprint)}[/]. A node that runs takes it up by itself."
    )
    if identity:
        console.print(
            "What this site signs is signed with a new key: its audit log begins anew, and names the old one. "
            "Hospitals that name it as a partner sum with it again once they have its words: `fedclient partners`."
        )


app.command()(check)
app.command()(waive)
app.command()(card)
app.command()(explain)
app.command()(worklist)
app.command()(worth)
for command in (
    policy, partners, studies, show, approve, refuse, withdraw, sent, verify, predict, serve_model, drift, score,
):  # fmt: skip
    app.command()(command)
app.add_typer(audit, name="audit")


@app.command()
@guarded
def start(
    page: Annotated[
        int | None, typer.Option("--page", min=1, max=65535, help="Port on loopback of a page, and of /metrics.")
    ] = None,
    site: Folder = Path("site"),
) -> None:
    """Connects to the coordinator and works until Ctrl-C; restarts whatever dies."""
    from fedclient.renewal import check_keys
    from fedclient.site import check_data, read_site_file
    from fedclient.start import start as supervise
    from shared_models.supervise import stop_on_signals

    file = read_site_file(site)
    kept = escape(str(site / "logs"))
    check_data(site, file.data.folder)
    check_keys(site)
    words = f"[bold]{file.name}[/]: node of {file.federation}, coordinator {file.coordinator}. Logs: {kept}"
    stop = stop_on_signals()

    def begun() -> None:
        console.print(words)
        try:
            told = waiting_words(site)
        except FederationError as error:  # a damaged decision stops its study, and not the node
            told = [str(error)]
        for each in told:
            print(printable(each), flush=True)

    supervise(site, stop, page=page, begun=begun, say=lambda it: print(it, flush=True))


for operation in (doctor, status, logs, page):
    app.command()(operation)


@app.command()
@guarded
def budget(
    epsilon: Annotated[float, typer.Option(min=0.01, max=1000, help="For one patient, over all studies and years.")],
    delta: Annotated[float, typer.Option(help="Well below one over the number of patients.")] = 1e-5,
    data_set: Annotated[str, typer.Option(help="Which patients; a site with one data folder has `all`.")] = "all",
    site: Folder = Path("site"),
) -> None:
    """Sets how much privacy may ever be spent on this site's patients; without it nothing is trained with DP."""
    from fedclient.ledger import open_ledger
    from fedclient.site import read_site_file

    read_site_file(site)
    open_ledger(site).set_budget(data_set, epsilon, delta)
    console.print(
        f"{data_set}: epsilon {epsilon:g} at delta {delta:g} from now on. `fedclient ledger` says what is spent."
    )


@app.command()
@guarded
def ledger(site: Folder = Path("site"), as_json: AsJson = False) -> None:
    """What privacy of this site's patients has been spent, by which runs, and what is left."""
    from fedclient.ledger import open_ledger
    from fedclient.site import read_site_file

    read_site_file(site)
    accounts = open_ledger(site).accounts()
    if as_json:
        print_json(
            {
                a.data_set: {
                    "epsilon": a.spent if a.budget else None,
                    "budget": {"epsilon": a.budget.epsilon, "delta": a.budget.delta} if a.budget else None,
                    "steps": sum(spend.steps for spend in a.spends),
                    "runs": list(a.runs),
                    "not_settled": a.open,
                }
                for a in accounts
            }
        )
        return
    if not accounts:
        console.print("No privacy budget is set, so nothing is trained with differential privacy: `fedclient budget`.")
    for a in accounts:
        if a.budget is not None:
            left = max(0.0, a.budget.epsilon - a.spent)
            console.print(
                f"[bold]{a.data_set}[/]: epsilon {a.spent:.3g} of {a.budget.epsilon:g} spent at delta "
                f"{a.budget.delta:g}, {left:.3g} left; {sum(s.steps for s in a.spends)} steps, runs: "
                f"{', '.join(a.runs) or 'none'}"
            )
        if a.open:
            console.print(f"  {a.open} not settled: work in progress, or of a process that died; it counts as spent")


def _line(invite: str) -> str:
    """The invite as it was given, or from stdin: a command line is seen by every user of the machine."""
    return sys.stdin.read() if invite == "-" else invite


def _is_text(name: str) -> bool:
    """Whether Python read the name of a file as text; bytes that are not UTF-8 it carries along as they are."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


if __name__ == "__main__":
    app()
