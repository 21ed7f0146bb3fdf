"""`fedclient check`, `waive` and `card`: what a data steward types."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedclient.data.findings import CATALOGUE
from shared_models.cli import guarded, print_json
from shared_models.files import write_atomic
from shared_models.parse import plain

if TYPE_CHECKING:  # they import the image readers
    from fedclient.gate.run import Checked
    from fedclient.site import Site

console = Console(soft_wrap=True)
Folder = Annotated[
    Path, typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node: keys, settings, cache.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
StudyName = Annotated[str, typer.Option(help="Check what this study needs too: a ready study, or a study.toml.")]
Processes = Annotated[int, typer.Option(min=0, help="Processes that read; 0 for as many as there are cores.")]
COLOURS = {"block": "red", "warn": "yellow", "note": "dim"}
SHOWN = 3  # cases of one code on the screen


@guarded
def check(
    study: StudyName = "",
    html: Annotated[Path | None, typer.Option(help="Write a page with small pictures here; it stays on site.")] = None,
    processes: Processes = 0,
    site: Folder = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Looks at every image and label, says what is wrong and how it is mended; exits with 1 if that stops training."""
    here, found = _checked(site, study, processes)
    if html is not None:
        from fedclient.gate.page import render
        from fedclient.gate.waivers import now, read_waivers

        page = render(found, here.name, read_waivers(here.folder), study, now())
        write_atomic(html, page.encode())
    if as_json:
        print_json(found.plain())
    else:
        _show(found, html)
    if not found.ready:
        raise typer.Exit(1)


@guarded
def waive(
    code: Annotated[str, typer.Argument(help="Code of the finding, as `fedclient check` shows it.")] = "",
    case: Annotated[str, typer.Option(help="Key of one case; left out, all cases with the finding.")] = "",
    reason: Annotated[str, typer.Option(help="Why; for those who audit it later. Stays on site.")] = "",
    exclude: Annotated[bool, typer.Option("--exclude", help="The case takes no part.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take the decision back.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Show the decisions that hold.")] = False,
    site: Folder = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Lets a finding pass, or leaves a case out, by name and with a reason; every use of it is logged."""
    from fedclient.gate import waivers
    from fedclient.gate.run import check_waivable
    from fedclient.site import open_site

    here = open_site({"site-dir": str(site)})
    if code and remove:
        waivers.withdraw(site, code, case)
    elif code:
        if not case:
            check_waivable(here, code)
        waivers.waive(site, code, case, reason, exclude)
    elif not listing:
        raise typer.BadParameter("give the code of a finding, or --list.")
    held = waivers.read_waivers(site)
    if as_json:
        print_json([plain(each) for each in held])
        return
    for each in held:
        what = "left out" if each.exclude else "may pass"
        console.print(
            f"{each.at}  [bold]{each.code}[/] {each.case or 'all cases'}: {what}. {escape(each.reason)}",
            highlight=False,
        )
    if not held:
        console.print("No finding is waived, no case is left out.")


@guarded
def card(
    study: StudyName = "",
    processes: Processes = 0,
    site: Folder = Path("site"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Exactly the bytes that the coordinator may see, and nothing else.")
    ] = False,
) -> None:
    """Counts of this site's data that may leave it; what is too small to be told is withheld."""
    from fedclient.gate.card import card_bytes, card_digest, card_of

    here, found = _checked(site, study, processes)
    made = card_of(found, here.smallest_count)
    write_atomic(here.folder / "gate" / "card.json", card_bytes(made))
    if as_json:
        sys.stdout.buffer.write(card_bytes(made))
        return
    few = f"fewer than {made['smallest_count']}"
    console.print(f"{made['cases'] or few} cases, {made['patients'] or few} patients")
    for name, cells in made["tables"].items():
        told = "   ".join(f"{cell}: {'withheld' if count is None else count}" for cell, count in cells.items())
        console.print(f"  [bold]{name:16}[/] {told}", highlight=False)
    console.print(f"SHA-256 {card_digest(made)}")


def _checked(folder: Path, study: str, processes: int) -> "tuple[Site, Checked]":
    from fedclient.gate.facts import needs_of
    from fedclient.gate.run import check as run_check
    from fedclient.site import check_data, open_site
    from shared_models.study import load_study

    here = open_site({"site-dir": str(folder)})
    check_data(folder, str(here.data))
    needs = needs_of(load_study(study) if study else None)
    to = Console(stderr=True)
    columns = (TextColumn("looking at cases"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=to, transient=True, disable=not to.is_terminal) as bars:
        bar = bars.add_task("", total=None)
        found = run_check(
            here,
            needs,
            processes=processes or len(os.sched_getaffinity(0)),
            progress=lambda done, of: bars.update(bar, completed=done, total=of),
        )
    return here, found


def _show(found: "Checked", html: Path | None) -> None:
    facts = found.plain()
    console.print(f"Data: {escape(facts['layout'])}", highlight=False)
    for split, part in facts["splits"].items():
        console.print(
            f"{split:6} {part['cases']:5} cases  {part['patients']:5} patients  {part['labelled']:5} labelled"
        )
    kept = facts["cases"] - facts["looked_at"]
    console.print(
        f"{facts['readable']} of {facts['cases']} cases can be read; {facts['looked_at']} were looked at anew, {kept} "
        f"had not changed."
    )
    if found.left_out:
        console.print(f"{found.left_out} cases are left out by `fedclient waive`.")
    shown: Counter[tuple[str, str]] = Counter()
    total = Counter((each.code, each.severity) for each in found.findings)
    for each in found.findings:
        kind = (each.code, each.severity)
        shown[kind] += 1
        if shown[kind] == 1:
            stands = "stops training" if each in found.blocking else "waived" if each.severity == "block" else "look"
            words = f"{CATALOGUE[each.code].title} ({total[kind]}, {stands}). {each.mend}"
            console.print(f"\n[bold {COLOURS[each.severity]}]{each.code}[/]  {escape(words)}", highlight=False)
        if shown[kind] <= SHOWN:
            where = f"case {each.case}{f', row {each.row}' if each.row else ''}: " if each.case else ""
            console.print(f"  {where}{escape(each.what)}", highlight=False)
        elif shown[kind] == SHOWN + 1:
            console.print(f"  ... and {total[kind] - SHOWN} more; --html or --json list them all.")
    if html is not None:
        console.print(f"\nPage: {escape(str(html))}")
    if found.ready:
        console.print("\n[bold green]Ready[/]: nothing stands against training.")
    else:
        decide = (
            "Mend them, or decide with `fedclient waive CODE --reason ...` (--case KEY --exclude leaves one case out)."
        )
        mend = decide if found.readable else "Mend them: no case can be read, so that there is nothing to waive."
        console.print(f"\n[bold red]Not ready[/]: {len(found.blocking)} findings stop training. {mend}")
