"""`fedsim`: multi-site studies on one machine, and the demo."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from shared_models.cli import guarded, print_json
from shared_models.files import write_json
from shared_models.study import load_study, ready_studies

app = typer.Typer(
    help="Federated studies on one machine: the real client and server code, any number of simulated sites.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(stderr=True)
CACHE = Path.home() / ".cache" / "fedimaging"


@app.command()
@guarded
def run(
    study: Annotated[str, typer.Argument(help="A ready study (see `fedsim studies`) or the path of a study.toml.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A data set, or a folder of data sets; repeated, a site each. Without it, the phantom."),
    ] = None,
    layout: Annotated[str, typer.Option(help="How data is laid out (brats-2023, pacs, ...); auto finds it.")] = "auto",
    sites: Annotated[
        int | None, typer.Option(min=1, help="How many sites; all of the data, or 3 of the phantom.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, from the study's seed on.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for results; runs in it go on where they were.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for many GPUs or machines.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; 0 is this one alone. Default: the cores.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch threads in each process (1).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    compare: Annotated[bool, typer.Option(help="Train pooled and every site alone beside the federation.")] = True,
    leave_one_out: Annotated[
        bool, typer.Option(help="Also train without each site in turn, and test on the one left out.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Pretrained weights that the study names: .safetensors, or .pth of tensors.")
    ] = None,
    json_to: Annotated[
        Path | None, typer.Option("--json", help="Write the results as JSON; - is standard output.")
    ] = None,
) -> None:
    """Runs a study: federated, pooled and each site alone, every model scored on every site's test patients."""
    from simulations import run as simulation  # imports the data readers
    from simulations.show import results_table, watching

    loaded = load_study(study)
    folder = out or Path("runs") / loaded.name
    how = simulation.machine(engine, workers, threads, device)
    with watching(console, folder, loaded.rounds.count) as say:
        sources = simulation.data_folders(loaded, data or [], sites, CACHE / "phantom", say)
        nodes = simulation.node_configs(folder, sources, how, sites, layout)
        try:
            results = simulation.simulate(loaded, nodes, folder, how, seeds, compare, say, leave_one_out, weights)
        except KeyboardInterrupt:
            say(f"Stopped by hand. The same command goes on from the last finished rounds in {folder}.")
            raise typer.Exit(130) from None
    if json_to is not None and str(json_to) != "-":
        write_json(json_to, results)
    if str(json_to) == "-":
        print_json(results)
    else:
        Console().print(results_table(results))
        print(f"report   {results['report']}\nweights  {results['weights']}\nnumbers  {folder / 'results.json'}")


@app.command()
@guarded
def studies(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Lists the ready studies."""
    listed = {name: load_study(name).title for name in ready_studies()}
    if as_json:
        print_json(listed)
        return
    for name, title in listed.items():
        print(f"{name:16} {title}")


@app.command()
@guarded
def privacy(
    study: Annotated[str | None, typer.Argument(help="A study, for its steps, batches and privacy.")] = None,
    patients: Annotated[
        int | None, typer.Option(min=2, help="Training patients of the site; a private study needs no number.")
    ] = None,
    noise: Annotated[
        list[float] | None, typer.Option(help="Noise multiplier; may be given more than once. Answer: epsilon.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(min=0.01, max=1000, help="Answer: the least noise for it.")] = None,
    delta: Annotated[float | None, typer.Option(help="Default: 1e-5, or a tenth over the patients if less.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Patients in a step on average.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of all rounds together.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What differentially private training of a study would cost a site's patients, before anything runs."""
    from dataclasses import asdict

    from simulations.privacy import NOISES, noise_of, price, work_of

    loaded = load_study(study) if study else None
    work = work_of(loaded, patients, batch, steps, delta)
    planned = loaded.protect.privacy if loaded else None
    noises = noise or ([planned.noise_multiplier] if planned else NOISES)
    prices = [noise_of(work, epsilon)] if epsilon is not None else [price(work, n) for n in noises]
    if as_json:
        print_json({**asdict(work), "prices": [asdict(p) for p in prices]})
        return
    print(
        f"{work.steps} steps, each takes a patient with probability {work.sample_rate:.4g}; one patient more or less; "
        f"delta {work.delta:.3g}\n\n   noise   epsilon   (bound by RDP)"
    )
    for each in prices:
        print(f"{each.noise_multiplier:8.4g}  {each.epsilon:8.3g}   {each.epsilon_rdp:8.3g}")


@app.command()
@guarded
def tables(
    folder: Annotated[Path, typer.Argument(help="Folder with a SITE.csv for each site.")],
    out: Annotated[Path, typer.Argument(help="Folder to write manifest.csv into, for --data of a study of tables.")],
    patient: Annotated[str, typer.Option(help="The column that tells patients apart.")] = "patient_id",
) -> None:
    """Joins a table of patients for each site into one manifest.csv."""
    from simulations.tables import join_tables

    print(join_tables(folder, out, patient))


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """A coordinator and three hospitals as processes on this machine, over mutual TLS, on phantom images."""
    from simulations.demo import demonstrate

    results = demonstrate(out, console)
    if as_json:
        print_json(results)


@app.command()
@guarded
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write the data set into.")],
    sites: Annotated[int, typer.Option(min=1)] = 3,
    patients: Annotated[int, typer.Option(min=3, help="Of each site; manifest.csv splits them 60/10/30.")] = 30,
    slices: Annotated[int, typer.Option(min=1)] = 6,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Pixels along an edge.")] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    layout: Annotated[
        str, typer.Option(help="manifest, or as pacs, lidc-idri, luna16, brats-2021, decathlon, nnunet, table have it.")
    ] = "manifest",
) -> None:
    """Writes made-up patients of several hospitals: lung CT, or brain MR for BraTS, in any layout that is read."""
    from simulations.phantoms import PhantomPlan
    from simulations.phantoms import phantom as write
    from simulations.sources import write_sites

    val, test = max(1, patients // 10), max(1, 3 * patients // 10)
    plan = PhantomPlan(sites, patients - val - test, val, test, slices, size, seed)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("patients", total=None)

        def progress(done: int, of: int) -> None:
            bars.update(bar, completed=done, total=of)

        if layout == "manifest":
            folder = write(out, plan, progress=progress)
        else:
            folder = write_sites(out, layout, plan, progress)
    print(folder)


if __name__ == "__main__":
    app()
