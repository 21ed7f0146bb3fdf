"""`fedclient worth`: whether a federation was worth it for this hospital, told to this hospital alone."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shared_models.cli import guarded, print_json

console = Console(stderr=True)


@guarded
def worth(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Its name, or the beginning of its digest.")],
    run: Annotated[str, typer.Option(help="Of the study; the last that was finished here.")] = "",
    weights: Annotated[
        Path | None, typer.Option(help="The pretrained weights that the study begins from, where it names some.")
    ] = None,
    site: Annotated[
        Path, typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node: keys, settings, cache.")
    ] = Path("site"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Trains this hospital's own model with as many steps, and compares; nothing leaves. Goes on where it stopped."""
    from fedclient.consent import find_asked
    from fedclient.site import open_site
    from fedclient.was_worth import in_words, judge

    here = open_site({"site-dir": str(site)})
    columns = TextColumn("rounds alone"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=None)

        def told(done: int, of: int) -> None:
            bars.update(bar, completed=done, total=of)

        try:
            found, page = judge(here, find_asked(here, study), run, weights, told)
        except KeyboardInterrupt:
            console.print("Stopped by hand. The same command goes on from the last finished round.")
            raise typer.Exit(130) from None
    if as_json:
        print_json(found)
        return
    print(f"{in_words(found)}\n{page}")
