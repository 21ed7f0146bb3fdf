"""`fedserver releases`, `release` and its kin: from a run to what hospitals install, and a site that leaves."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shared_models.cli import guarded, print_json
from shared_models.dates import day
from shared_models.errors import StateInvalid

console = Console(soft_wrap=True)
Folder = Annotated[Path, typer.Option("--federation", envvar="FEDSERVER_FEDERATION", help="Folder of the federation.")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
Which = Annotated[str, typer.Argument(help="NAME-VERSION, or the beginning of its digest; see `fedserver releases`.")]
HERE = Path("federation")


@guarded
def releases(federation: Folder = HERE, as_json: AsJson = False) -> None:
    """Lists the releases: stage, run, sites, approvals, digest."""
    from fedserver.enrol import open_federation
    from fedserver.registry import as_rows, folder_of, list_releases, manifest_of
    from shared_models.release import read_approvals

    opened = open_federation(federation)
    entries = list_releases(opened)
    if as_json:
        print_json(as_rows(entries))
        return
    if not entries:
        console.print("No release yet. `fedserver release RUN` makes one of a finished run.")
        return
    table = Table("release", "stage", "run", "round", "sites", "approvals", "made", "digest")
    for entry in entries:
        given = len(read_approvals(folder_of(opened, entry.digest) / "release"))
        made = day(entry.history[0].at)
        needed = manifest_of(opened, entry).approvals
        table.add_row(entry.label, entry.stage, entry.run, str(entry.round), str(len(entry.sites)),
                      f"{given} of {needed}", made, entry.digest[:12])  # fmt: skip
    console.print(table)


@guarded
def release(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, as `fedserver status` shows it.")],
    version: Annotated[str | None, typer.Option(help="Of the release; default: the next number.")] = None,
    single_file: Annotated[bool, typer.Option("--single-file", help="One file in the place of a folder.")] = False,
    out: Annotated[Path, typer.Option(help="Folder to write it to, as NAME-VERSION.")] = Path(),
    words: Annotated[
        Path | None, typer.Option(help="TOML for the model card: intended_use, limits, populations, licence, ...")
    ] = None,
    data_card: Annotated[
        list[str] | None, typer.Option(help="SITE=FILE: a data card that a site has handed in; repeated.")
    ] = None,
    round_number: Annotated[int | None, typer.Option("--round", min=1, help="An earlier round than the last.")] = None,
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Makes a signed release of a run, or writes one that is there: all forms proved equal, card and evidence in it."""
    from fedserver.checkpoint import RunFolder
    from fedserver.enrol import open_federation
    from fedserver.holding import left_since
    from fedserver.publish.card import read_words
    from fedserver.publish.proofs import read_card_file
    from fedserver.registry import export_release, folder_of, list_releases, manifest_of, register

    opened = open_federation(federation)
    run = RunFolder(opened.runs / run_id)
    cards = {site: read_card_file(Path(path)) for site, path in _pairs(data_card or [])}
    known = [e for e in list_releases(opened) if version is not None and (e.run, e.version) == (run_id, version)]
    if known and (words or cards or round_number):
        raise StateInvalid(f"release {known[-1].label}: is there already and never changes. Choose another --version.")
    if known and known[-1].stage == "retired":
        raise StateInvalid(
            f"release {known[-1].label}: is retired ({known[-1].history[-1].words}), and not handed out any more. It "
            f"stays in {folder_of(opened, known[-1].digest)} for those who ask about it."
        )
    with Console(stderr=True).status("exporting the network, and comparing what each form of it answers"):
        entry = known[-1] if known else register(opened, run, version, read_words(words), round_number, cards)
        path = export_release(opened, entry, out, single_file)
    needed, left = manifest_of(opened, entry).approvals, sorted(left_since(opened, [entry])[entry.digest])
    if as_json:
        print_json(
            {"release": entry.label, "digest": entry.digest, "stage": entry.stage, "path": str(path), "left": left}
        )
        return
    console.print(f"[bold]{entry.label}[/], {entry.stage}: {path}", highlight=False)
    console.print(f"digest {entry.digest}", highlight=False)
    if entry.stage == "candidate":
        who = f"{needed} approvers" if needed else "you"
        console.print(f"It is a candidate until {who} say so: `fedserver release-approve {entry.label}`.")
    console.print("A hospital checks it with `fedclient verify`.")
    if left:
        console.print(
            f"[yellow]It holds what was sent by {', '.join(left)}, who withdrew.[/] The list of `fedserver "
            f"release-status` tells hospitals so, without a name. To train without: `fedserver retrain {run_id} "
            f"{' '.join(f'--without {site}' for site in left)}`.", highlight=False,
        )  # fmt: skip


def _pairs(given: list[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for text in given:
        site, mark, path = text.partition("=")
        if not (site and mark and path):
            raise StateInvalid(f"--data-card {text!r}: expected SITE=FILE.")
        found.append((site, path))
    return found


@guarded
def release_approve(
    which: Which,
    name: Annotated[str, typer.Option("--as", help="Name of the approver in federation.toml.")] = "coordinator",
    key: Annotated[Path | None, typer.Option(help="The approver's key, of `fedserver release-key`.")] = None,
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Approves a release; with the last approval that federation.toml asks for, hospitals can open it."""
    from fedserver.enrol import open_federation
    from fedserver.registry import approve_release
    from shared_models.identity import load_secret

    entry = approve_release(open_federation(federation), which, name, load_secret(key) if key else None)
    if as_json:
        print_json({"release": entry.label, "digest": entry.digest, "stage": entry.stage})
        return
    console.print(f"[bold]{entry.label}[/] is {entry.stage}. Write it anew: "
                  f"`fedserver release {entry.run} --version {entry.version}`.", highlight=False)  # fmt: skip


@guarded
def release_retire(
    which: Which,
    reason: Annotated[str, typer.Option(help="Why; hospitals read it in the list of `fedserver release-status`.")],
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Says of a release that it should no longer be used; it stays in the registry."""
    from fedserver.enrol import open_federation
    from fedserver.registry import retire_release

    entry = retire_release(open_federation(federation), which, reason)
    if as_json:
        print_json({"release": entry.label, "digest": entry.digest, "stage": entry.stage})
        return
    console.print(f"[bold]{entry.label}[/] is retired. Hospitals that have it hear of it by the next list: "
                  f"`fedserver release-status FILE`.", highlight=False)  # fmt: skip


@guarded
def release_status(
    to: Annotated[Path, typer.Argument(help="File to write the list to, for all hospitals that have a release.")],
    days: Annotated[
        float, typer.Option(min=0.01, max=3650, help="For which it is good; hospitals are warned after them.")
    ] = 30.0,
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Writes a signed list of all releases, the retired ones among them; hospitals give it to `fedclient verify`."""
    from fedserver.enrol import open_federation
    from fedserver.holding import status_list
    from fedserver.registry import list_releases
    from shared_models.files import write_atomic

    opened = open_federation(federation)
    write_atomic(to, status_list(opened, days))
    retired = [entry.label for entry in list_releases(opened) if entry.stage == "retired"]
    if as_json:
        print_json({"file": str(to), "days": days, "retired": retired})
        return
    console.print(f"{to}: good for {days:g} days; retired: {', '.join(retired) or 'none'}.", highlight=False)
    console.print("A hospital keeps it with `fedclient verify RELEASE --status FILE`.", highlight=False)


@guarded
def release_export_mlflow(
    which: Which,
    uri: Annotated[str, typer.Argument(help="Of MLflow's tracking server, or a folder as file:///PATH.")],
    experiment: Annotated[str, typer.Option(help="That the run is written to.")] = "federated releases",
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Copies a release with its figures and digests to MLflow, as a run; needs the extra `mlflow`."""
    from fedserver.enrol import open_federation
    from fedserver.publish.to_mlflow import to_mlflow
    from fedserver.registry import find_release

    opened = open_federation(federation)
    entry = find_release(opened, which)
    run = to_mlflow(opened, entry, uri, experiment)
    if as_json:
        print_json({"release": entry.label, "digest": entry.digest, "run": run, "experiment": experiment})
        return
    console.print(f"[bold]{entry.label}[/] is run {run} of {experiment!r} at {uri}.", highlight=False)


@guarded
def release_key(
    to: Annotated[Path, typer.Argument(help="File to write the key to; it stays with the approver.")],
    as_json: AsJson = False,
) -> None:
    """Makes the key of an approver, and prints its line for federation.toml."""
    from shared_models.identity import identity_public_key, new_site_keys, save_secret

    if to.exists():
        raise StateInvalid(f"{to}: is there already. Choose another file.")
    made = new_site_keys().identity
    save_secret(to, made)
    public = identity_public_key(made).hex()
    if as_json:
        print_json({"key": str(to), "public_key": public})
        return
    console.print(f"{to}: keep it to yourself. In federation.toml, with your name:", highlight=False, markup=False)
    console.print(f'[release]\napprovals = 1\n\n[release.approvers]\nNAME = "{public}"', highlight=False, markup=False)


@guarded
def withdraw(
    site: Annotated[str, typer.Argument(help="Name of the hospital, as `fedserver status` shows it.")],
    reason: Annotated[str, typer.Option(help="Why, for those who ask later; it stays with the coordinator.")],
    retire: Annotated[bool, typer.Option("--retire", help="Retire the releases that hold what it sent.")] = False,
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Lets a hospital leave: it is shut out, and every release and run that holds what it sent is named."""
    from fedserver.enrol import open_federation
    from fedserver.registry import as_rows
    from fedserver.withdrawal import withdraw as leave

    gone = leave(open_federation(federation), site, reason, retire)
    if as_json:
        print_json(
            {"site": site, "releases": as_rows(gone.releases), "runs": dict(gone.runs), "begun": dict(gone.begun),
             "unread": list(gone.unread), "under_way": dict(gone.under_way)}
        )  # fmt: skip
        return
    console.print(f"[bold]{site}[/] has left: it is shut out, and what it sent stands in these.")
    for entry in gone.releases:
        rounds = f"{entry.sites[site]} rounds" if site in entry.sites else "by its plan, or what it goes back to"
        console.print(f"  release {entry.label} ({entry.stage}): {rounds}", highlight=False)
    for run, first in gone.runs.items():
        if run in gone.begun:
            since = f"by the weights of {gone.begun[run]} that it began with"
            mend = f"submit its study anew with the weights of {gone.begun[run]} trained without it"
        else:
            since = f"from round {first} on" if first else "by the plan that its counts made"
            mend = f"`fedserver retrain {run} --without {site}`"
        console.print(f"  run {run}, {since}: {mend}", highlight=False)
    for run, number in gone.under_way.items():
        console.print(
            f"[yellow]Round {number} of run {run} is under way[/], and what {site} had sent by now may be in its sum. "
            "Type this again once it has closed.", highlight=False,
        )  # fmt: skip
    if gone.unread:
        console.print(
            f"[yellow]Of these it cannot be read whom they hold: {', '.join(gone.unread)}.[/] Restore them from a "
            f"backup and type this again.", highlight=False,
        )  # fmt: skip
    if gone.releases and retire:
        console.print("Hospitals that have them hear of it by the next list: `fedserver release-status FILE`.")
    if not gone.releases and not gone.runs and not gone.unread and not gone.under_way:
        console.print("  nothing: it was never counted.")


@guarded
def retrain(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, as `fedserver status` shows it.")],
    without: Annotated[list[str], typer.Option(help="Site that is not in it; repeated for several.")],
    name: Annotated[str | None, typer.Option(help="Name of the new run; default: the old one's with -without.")] = None,
    federation: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Trains a run again without a site, from the last round before it was counted, or from the start."""
    from fedserver.enrol import open_federation
    from fedserver.withdrawal import retrain as again

    made = again(open_federation(federation), run_id, without, name)
    if as_json:
        facts: dict[str, Any] = {"run": made.id, "from_round": made.round, "why": made.why}
        print_json(facts)
        return
    console.print(f"[bold]{made.id}[/] is queued: {made.why}.", highlight=False)
    console.print("`fedserver serve` carries it out, `fedserver status` shows it; then `fedserver release` it.")
