"""`fedsim scenarios` and `fedsim scenario`: published benchmarks by name."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared_models.cli import guarded, print_json
from shared_models.files import write_json
from simulations.options import DeviceInTurn, JsonTo, RunsAtOnce, Seeds, ThreadsOfEach

console = Console(stderr=True)


@guarded
def scenarios(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Lists the published benchmarks, and the data that each wants."""
    from simulations.scenarios import SCENARIOS

    if as_json:
        print_json({name: {"title": of.title, "study": of.study, "data": of.wants} for name, of in SCENARIOS.items()})
        return
    for name, of in SCENARIOS.items():
        print(f"{name:18} {of.title}\n{'':18} data: {of.wants}")


@guarded
def scenario(
    name: Annotated[str, typer.Argument(help="Of `fedsim scenarios`.")],
    data: Annotated[list[Path] | None, typer.Option(help="The data, in the layout that the scenario wants.")] = None,
    strategies: Annotated[
        str, typer.Option(help="Settings of `fedsim settings`, separated by commas; the usual ones if left out.")
    ] = "",
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE changes the study, NAME:KEY=VALUE a setting.")
    ] = None,
    seeds: Seeds = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for results; what is done there is not done again.")] = None,
    workers: RunsAtOnce = None,
    threads: ThreadsOfEach = None,
    device: DeviceInTurn = "auto",
    json_to: JsonTo = None,
) -> None:
    """Trains a benchmark pooled, at each site alone and federated; prints its table and the published figures."""
    from shared_models.supervise import only_one
    from simulations import scenarios as of  # imports the data readers
    from simulations.compare_run import machine_of
    from simulations.show import IN_USE, counting

    folder = out or Path("runs") / name
    chosen = [each.strip() for each in strategies.split(",") if each.strip()]
    of.named(name)  # before a folder is made for it
    how = machine_of(workers, threads, device)
    with only_one(folder, IN_USE), counting(console) as (say, rounds):
        try:
            told = of.carry_out(name, data or [], chosen, sets or [], seeds, folder, how, say, rounds)
        except KeyboardInterrupt:
            say(f"Stopped by hand. The same command goes on from the last finished rounds in {folder}.")
            raise typer.Exit(130) from None
    if json_to is not None and str(json_to) != "-":
        write_json(json_to, told)
    if str(json_to) == "-":
        print_json(told)
        return
    print(told["text"])
    print("\n".join(f"{kind:8} {path}" for kind, path in told["files"].items()))
