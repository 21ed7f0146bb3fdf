"""`fedclient score`: how good a release is for this hospital's own labelled patients; nothing of it leaves.

For a release of a differentially private run it is the one way to know: no site has told a score of it.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fedclient.trust import Watch, groups_of, trust_in
from fedclient.verify import Authority, Research, Status
from shared_models.cli import guarded, print_json
from shared_models.errors import StateInvalid
from shared_models.release import open_release
from shared_models.scores import NAMES, row_of, value_in
from shared_models.study import Study
from shared_models.wire import Split

console = Console(soft_wrap=True)


@guarded
def score(
    release: Annotated[Path, typer.Argument(help="Folder of a release, or its .fedrelease file.")],
    split: Annotated[
        Split, typer.Option(help="Which patients: those kept for the test, or for validation; neither trains.")
    ] = "test",
    authority: Authority = None,
    status: Status = None,
    research: Research = False,
    site: Annotated[Path, typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node.")] = Path("site"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Scores a release on this site's own patients, as a round of its study would; stays here."""
    with tempfile.TemporaryDirectory(prefix="fedclient-score-") as scratch:
        opened = open_release(release, trust_in(site, authority or (), research), scratch=Path(scratch))
        warnings = Watch(site, opened, groups_of(site, authority or ()), status).warnings()
        rows = scored(site, opened.study, opened.weights, split)
    if as_json:
        print_json({"release": opened.name, "version": opened.version, "split": split, "scores": rows,
                    "warnings": warnings})  # fmt: skip
        return
    console.print(f"[bold]{opened.name}[/] version {opened.version}, {split} patients of this site", highlight=False)
    for words in warnings:
        console.print(f"[yellow]warning[/] {escape(words)}", highlight=False)
    for label, row in rows.items():
        value = value_in(row)
        words = "no figure" if value is None else f"{NAMES[row['measure']]} {value:.3f}"
        console.print(f"  {label}: {words}, {row['cases']} cases", highlight=False)
    console.print("Nothing of this has left the site.")


def scored(site: Path, study: Study, weights: Path, split: Split) -> dict[str, dict[str, Any]]:
    """Label -> row of scores of the weights in a file.

    Raises:
        StateInvalid: the site has no labelled patient of that split.
    """
    from fedclient.site import open_site
    from fedclient.training.learner import ImageLearner  # imports torch
    from shared_models.weights import load

    here = open_site({"site-dir": str(site)})
    found = ImageLearner().score(here, study, load(weights, "model.safetensors of the release"), split)
    rows = {label: row_of(of) for label, of in found.items()}
    if not any(row["cases"] for row in rows.values()):
        raise StateInvalid(f"{here.data}: no labelled {split} patient for {study.name!r}. Run `fedclient check`.")
    return rows
