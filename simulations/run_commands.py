"""`fedsim explain` and `fedsim candidates`: what the model of a run that is there sees in its sites' cases."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from shared_models.cli import guarded, print_json
from shared_models.errors import StudyInvalid
from simulations.options import Layout

if TYPE_CHECKING:
    from fedclient.training.explaining import Trained
    from simulations.engine import NodeConfig

CACHE = Path.home() / ".cache" / "fedimaging"
console = Console(stderr=True)
RunFolderAt = Annotated[Path, typer.Argument(help="Folder of `fedsim run`, or of one run in it.")]
DataOfSites = Annotated[
    list[Path] | None, typer.Option(help="Data of sites, as for `fedsim run`; without it, what it was trained on.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]


def _model_and_sites(
    run: Path, data: list[Path] | None, layout: str, folder: Path
) -> tuple["Trained", Mapping[str, "NodeConfig"]]:
    """The model of a run, and its sites or those of other data; what the latter prepare lies in `folder`."""
    from simulations.run_folder import run_at

    if not data and layout != "auto":
        raise StudyInvalid("--layout: is of the folders that --data names, and there is none.")
    found = run_at(run)
    from simulations.explaining import model_of  # imports torch
    from simulations.run import machine, nodes_of
    from simulations.site_options import SiteOptions, sites_of

    model = model_of(found)
    if not data:
        return model, {name: {**config, "threads": 1, "device": "auto"} for name, config in nodes_of(found).items()}
    how = machine("local", 0, 1, "auto")
    return model, sites_of(model.study, folder, SiteOptions(data, layout), how, CACHE / "phantom", console.print)


@guarded
def explain(
    run: RunFolderAt,
    data: DataOfSites = None,
    layout: Layout = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for pictures; RUN/explained.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    cases: Annotated[int | None, typer.Option(min=1, help="Of each site, at most: 4; for --check all.")] = None,
    answer: Annotated[str, typer.Option(help="Which of the study's labels or regions; the first.")] = "",
    method: Annotated[
        list[str] | None, typer.Option(help="grad-cam, occlusion or smooth-grad; repeated, each of them.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Last rounds that say how sure an answer is.")] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Ask whether the maps may be believed; exits with 1 if not.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draws what moved a run's answers on its sites' cases; or checks such maps against what is known to be there."""
    from fedclient.explain_command import methods_named, tell

    folder, methods = out or run / "explained", methods_named(method)
    model, nodes = _model_and_sites(run, data, layout, folder)
    from fedclient.training.explaining import Wanted
    from simulations import explaining

    if check:
        which = explaining.Which(split, cases or 10**9)
        checked = explaining.check_explanations(model, nodes, which, answer, methods, folder)
        if as_json:
            print_json([each.plain() for each in checked])
        else:
            print(explaining.in_words(checked))
        raise typer.Exit(0 if all(each.passed for each in checked) else 1)
    wanted, which = Wanted(answer, methods), explaining.Which(split, cases or 4)
    told = explaining.explain_sites(model, nodes, which, wanted, folder, rounds)
    if as_json:
        print_json(told)
        return
    for name, results in told.items():
        tell(results, folder / name)


@guarded
def candidates(
    run: RunFolderAt,
    data: DataOfSites = None,
    layout: Layout = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for tables; RUN/candidates.")] = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Of which patients.")] = "test",
    least: Annotated[float, typer.Option(min=0, max=1, help="Probability below which nothing is listed.")] = 0.001,
    as_json: AsJson = False,
) -> None:
    """Lists what a run of a detection finds as points in LPS mm, in the table that LUNA16's evaluation reads."""
    folder = out or run / "candidates"
    model, nodes = _model_and_sites(run, data, layout, folder)
    from fedclient.site import open_site
    from fedclient.training.candidates import candidates as tables_of

    told = {name: tables_of(model, open_site(config), split, least, folder / name) for name, config in nodes.items()}
    if as_json:
        print_json(told)
        return
    for name, labels in told.items():
        for label, rows in labels.items():
            print(f"{name}: {rows} points  {folder / name / f'{label}.csv'}")
