"""`fedclient policy, partners, studies, show, approve, refuse, withdraw, sent` and `audit`: what the person who decides
types."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from shared_models.cli import guarded, print_json
from shared_models.dates import date_text
from shared_models.parse import plain, printable

if TYPE_CHECKING:
    from fedclient.consent import Verdict
    from fedclient.site import Site

console = Console(soft_wrap=True)
Folder = Annotated[
    Path, typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node: keys, settings, cache.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Its name, or the beginning of its digest.")]
Reason = Annotated[str, typer.Option(help="Why; kept here, not told to anybody.")]
UNDECIDED = ("pending", "expired")
HEADINGS = {
    "trains": "What it trains",
    "sees": "What it sees",
    "leaves": "What leaves",
    "costs": "What it costs",
    "changes": "What is new",
    "policy": "Against the policy",
}
audit = typer.Typer(help="This site's audit log: what was decided, ordered, done and sent.", no_args_is_help=True)


def _here(folder: Path) -> "Site":
    from fedclient.site import open_site

    return open_site({"site-dir": str(folder)})


def awaiting(site: Path) -> str:
    """`2 studies`, or nothing where nobody has to decide."""
    from fedclient.consent import undecided

    count = len(undecided(site))
    return f"{count} {'study' if count == 1 else 'studies'}" if count else ""


def waiting_words(site: Path) -> list[str]:
    """A line for each study that waits for a decision here."""
    from fedclient.consent import all_asked

    return [
        f"Study {asked.study.name} waits for a decision here: `fedclient show {asked.sha256[:12]}`, then "
        f"`fedclient approve {asked.sha256[:12]}`, or `refuse`."
        for asked in all_asked(_here(site))[0]
        if asked.state in UNDECIDED
    ]


@guarded
def policy(site: Folder = Path("site"), as_json: AsJson = False) -> None:
    """Says in plain words what this site allows; its keys stand in site.toml."""
    from fedclient.policy import in_words
    from fedclient.site import read_site_file

    allowed = read_site_file(site).policy
    if as_json:
        print_json(plain(allowed))
        return
    for words in in_words(allowed):
        console.print(escape(words), highlight=False)
    console.print(escape(f"Set under [policy] in {site / 'site.toml'}; it counts from the next order on."))


@guarded
def partners(
    confirm: Annotated[
        str, typer.Option(metavar="NAME", help="Take this partner's key of now for its own; with --words.")
    ] = "",
    words: Annotated[str, typer.Option(help="The eight words of its key, as that hospital reads them to you.")] = "",
    site: Folder = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Lists those with whom this site sums, with words of their identity keys to compare by telephone."""
    from fedclient import partners as known
    from fedclient.renewal import read_roster
    from fedclient.site import read_site_file
    from shared_models.errors import StateInvalid
    from shared_models.identity import identity_public_key, load_secret

    file, signed = read_site_file(site), read_roster(site)
    roster = None if signed is None else signed.roster
    if confirm:
        found = {each.name: each for each in known.partners_of(site, file.name, file.policy.partners, roster)}
        if confirm not in found:
            raise StateInvalid(f"partner {confirm!r}: is not named under [policy] partners in {site / 'site.toml'}.")
        known.confirm(site, file.name, found[confirm], words)
    listed = known.partners_of(site, file.name, file.policy.partners, roster)
    own = known.key_words(identity_public_key(load_secret(site / "keys" / "identity.key")).hex())
    if as_json:
        told = [
            {"name": each.name, "counts": each.counts, "changed": each.changed, "seen": each.seen,
             "listed": each.listed, "words": known.key_words(each.listed) if each.listed else None}
            for each in listed
        ]  # fmt: skip
        print_json({"site": file.name, "words": own, "partners": told})
        return
    console.print(escape(f"{file.name} (here): {own}"), highlight=False)
    for each in listed:
        state = "counts" if each.counts else "its key is another one" if each.changed else "not seen here yet"
        console.print(escape(f"{each.name}: {state}{_words(each.listed)}"), highlight=False)
    if not listed:
        console.print("No partners are named: in a secure sum all sites of the roster count.")
    if changed := known.changed_words(listed):
        console.print(escape(changed), highlight=False)


def _words(key: str) -> str:
    from fedclient.partners import key_words

    return f"; {key_words(key)}" if key else ""


@guarded
def studies(site: Folder = Path("site"), as_json: AsJson = False) -> None:
    """Lists the studies that have come to this site, and what was decided on each."""
    from fedclient.consent import all_asked

    listed, unread = all_asked(_here(site))
    if as_json:
        print_json(
            [
                {"study": a.study.name, "sha256": a.sha256, "state": a.state, "asked_at": a.asked_at_s,
                 "decision": plain(a.decision) if a.decision else None}
                for a in listed
            ]
        )  # fmt: skip
        return
    if not listed:
        console.print("No study has come yet.")
    for a in listed:
        words = f"{a.study.name:24} {a.sha256[:12]}  {a.state}"
        if a.decision is not None:
            until = f", until {date_text(a.decision.until_s)}" if a.decision.until_s else ""
            why = f": {a.decision.reason}" if a.decision.reason else ""
            words += f"  by {a.decision.by} on {date_text(a.decision.at_s)}{until}{why}"
        console.print(escape(words), highlight=False)
    for digest in unread:
        console.print(
            f"{digest[:12]}: was taken by another version of the package, and this one does not read it; "
            f"`fedclient withdraw {digest[:12]}` ends it.",
            highlight=False,
        )
    if any(a.state in UNDECIDED for a in listed):
        console.print("Read one with `fedclient show STUDY`; then `fedclient approve STUDY`, or `refuse`.")


@guarded
def show(study: StudyName, site: Folder = Path("site"), as_json: AsJson = False) -> None:
    """Says in plain words what a study would see, what would leave, what it costs, and what is new in it."""
    from fedclient.consent import find_asked
    from fedclient.explain import explained

    here = _here(site)
    asked = find_asked(here, study)
    told: dict[str, Any] = explained(here, asked)
    if as_json:
        print_json({"study": asked.study.name, "sha256": asked.sha256, "state": asked.state, **told})
        return
    console.print(f"[bold]{asked.study.name}[/] {asked.sha256[:12]}: {asked.state}", highlight=False)
    for heading, lines in told.items():
        console.print(f"[bold]{HEADINGS[heading]}[/]")
        for line in lines:
            console.print(escape(f"  {printable(line)}"), highlight=False)


@guarded
def approve(
    study: StudyName,
    days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="How long it holds; else as the policy says.")
    ] = None,
    also_alike: Annotated[
        bool,
        typer.Option("--also-alike", help="Although another study reads the same here, and sums hide less for it."),
    ] = False,
    reason: Reason = "",
    site: Folder = Path("site"),
) -> None:
    """Lets this site take part in a study, as it is now: any change of it asks anew."""
    _decide(site, study, "approved", reason, days, also_alike)


@guarded
def refuse(study: StudyName, reason: Reason = "", site: Folder = Path("site")) -> None:
    """Keeps this site out of a study, or withdraws it; the coordinator hears that, the other sites do not."""
    _decide(site, study, "refused", reason)


@guarded
def withdraw(study: StudyName, reason: Reason = "", site: Folder = Path("site")) -> None:
    """Ends this site's part in a study at once: work under way stops at its next step, and nothing more is sent."""
    _decide(site, study, "withdrawn", reason)


def _decide(
    site: Path, study: str, verdict: "Verdict", reason: str, days: int | None = None, also_alike: bool = False
) -> None:
    from fedclient.consent import decide, find_digest

    here = _here(site)
    digest, name = find_digest(here, study)
    decision = decide(here, digest, verdict, reason, days, also_alike)
    until = f" until {date_text(decision.until_s)}" if decision.until_s else ""
    console.print(f"{name} ({digest[:12]}) is {decision.verdict}{until}.", highlight=False)


@guarded
def sent(
    last: Annotated[int, typer.Option(min=0, help="Only the last so many; 0 shows all.")] = 50,
    site: Folder = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Lists what has left this site: when, what, how many bytes, its digest, for which run and round."""
    from fedclient import egress
    from fedclient.site import read_site_file

    read_site_file(site)
    lines = egress.sent(site)
    shown = lines[-last:] if last else lines
    if as_json:
        print_json(shown)
        return
    for line in shown:
        what = f"{line['kind']} {line['code']}" if line.get("code") else line["kind"]
        run = f"{line['run']} round {line['round']}" if "run" in line else ""
        console.print(f"{date_text(line['time'])}  {what:28} {line['bytes']:>12,} B  {line['sha256'][:12]}  {run}",
                      highlight=False)  # fmt: skip
    total = sum(int(line["bytes"]) for line in lines)
    console.print(f"{len(lines)} in all, {total:,} bytes.", highlight=False)


@audit.command()
@guarded
def verify(
    pack: Annotated[Path | None, typer.Option(help="Evidence of the coordinator; both logs are compared.")] = None,
    site: Folder = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Checks every line of this site's logs, of earlier keys too, and names the first bad one; if any, exits with 1."""
    from fedclient.site import read_site_file
    from shared_models.authority import read_files
    from shared_models.errors import StateInvalid
    from shared_models.evidence import against, earlier_verdicts, read_pack, tell, verdict_of
    from shared_models.identity import identity_public_key, load_secret, vouched

    name = f"site {read_site_file(site).name}"
    mine = verdict_of(site, identity_public_key(load_secret(site / "keys" / "identity.key")))
    found = {name: mine}
    if pack is not None:
        files = read_pack(pack)
        key = vouched(read_files(site / "keys"), files.get("signer.pem", b""))
        if key is None:
            raise StateInvalid(f"{pack}: its key is not vouched for by the authority that this site pinned at `join`.")
        found[name], found["coordinator"] = against(mine, files, key)
    found |= {f"{name}, key before ({file})": told for file, told in earlier_verdicts(site, mine).items()}
    tell(found, as_json)


@audit.command()
@guarded
def export(
    out: Annotated[Path, typer.Option(help="The ZIP file to write.")] = Path("evidence.zip"),
    site: Folder = Path("site"),
) -> None:
    """Writes the log, its signed head and the certificates into one file that others can verify."""
    from fedclient.site import read_site_file
    from shared_models.authority import read_files
    from shared_models.evidence import export as write
    from shared_models.identity import identity_public_key, load_secret

    read_site_file(site)
    key = identity_public_key(load_secret(site / "keys" / "identity.key"))
    certificates = {
        "ca.pem": read_files(site / "keys"),
        "tls.pem": (site / "keys" / "tls.pem").read_bytes(),
    }
    write(site, key, certificates, out)
    console.print(f"{out}: what this site's audit log holds, for whom you choose to give it to.", highlight=False)
