"""`fedsim`: multi-site studies on one machine, and the demo."""

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from shared_models.cli import guarded, print_json
from shared_models.errors import StudyInvalid
from shared_models.files import write_json
from shared_models.study import load_study, ready_studies
from simulations.options import (
    DeviceInTurn,
    JsonTo,
    Labelled,
    Layout,
    Partition,
    RunsAtOnce,
    Seeds,
    Shift,
    TestLabels,
    ThreadsOfEach,
)
from simulations.run_commands import CACHE, candidates, explain
from simulations.scenario_command import scenario, scenarios

app = typer.Typer(
    help="Federated studies on one machine: the real client and server code, any number of simulated sites.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(stderr=True)
for command in (scenarios, scenario, explain, candidates):
    app.command()(command)


@app.command()
@guarded
def run(
    study: Annotated[str, typer.Argument(help="A ready study (see `fedsim studies`) or the path of a study.toml.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A data set, or a folder of data sets; repeated, a site each. Without it, the phantom."),
    ] = None,
    layout: Layout = "auto",
    sites: Annotated[
        int | None, typer.Option(min=1, help="How many sites; all of the data, or 3 of the phantom.")
    ] = None,
    partition: Partition = "natural",
    shift: Shift = "both",
    test_labels: TestLabels = "site",
    labelled: Labelled = 1.0,
    seeds: Seeds = 1,
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
    json_to: JsonTo = None,
) -> None:
    """Runs a study: federated, pooled and each site alone, every model scored on every site's test patients."""
    from shared_models.supervise import only_one
    from simulations import run as simulation  # imports the data readers
    from simulations.show import IN_USE, results_table, watching
    from simulations.site_options import SiteOptions, sites_of

    loaded = load_study(study)
    folder = out or Path("runs") / loaded.name
    how = simulation.machine(engine, workers, threads, device)
    with only_one(folder, IN_USE), watching(console, folder, loaded.rounds.count) as say:
        options = SiteOptions(data or [], layout, sites, partition, shift, test_labels, labelled)
        nodes = sites_of(loaded, folder, options, how, CACHE / "phantom", say)
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
def compare(
    studies: Annotated[list[str], typer.Argument(help="Ready studies, or paths of study.toml files.")],
    strategies: Annotated[
        str, typer.Option(help="Named settings, separated by commas; a+b is both. `fedsim settings` lists them.")
    ] = "study",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE changes the study, NAME:KEY=VALUE a setting: mu:train.proximal_mu=0.1"),
    ] = None,
    settings: Annotated[
        list[Path] | None, typer.Option(help="TOML with a table for each setting, as the tables of study.toml.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="As for `fedsim run`; STUDY=DIR is for one of the studies.")
    ] = None,
    layout: Layout = "auto",
    sites: Annotated[int | None, typer.Option(min=2, help="How many sites.")] = None,
    partition: Partition = "natural",
    shift: Shift = "both",
    test_labels: TestLabels = "site",
    labelled: Labelled = 1.0,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, from each study's seed on.")] = 1,
    folds: Annotated[
        int,
        typer.Option(min=1, help="Cross-validation: patients are dealt out anew, and each seed tests in another fold."),
    ] = 1,
    leave_one_out: Annotated[
        bool, typer.Option(help="Train each setting without each site in turn too, and test on all patients there.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for results; what is done there is not done again.")] = Path(
        "runs/compare"
    ),
    workers: RunsAtOnce = None,
    threads: ThreadsOfEach = None,
    device: DeviceInTurn = "auto",
    json_to: JsonTo = None,
) -> None:
    """Compares settings of a study over seeds: tables, figures, and whether it was worth it for each site."""
    from shared_models.supervise import only_one
    from simulations import compare_run  # imports the data readers
    from simulations.show import IN_USE, counting
    from simulations.site_options import SiteOptions

    asked = compare_run.Request(
        studies=studies,
        strategies=[name.strip() for name in strategies.split(",") if name.strip()],
        sets=sets or [],
        files=settings or [],
        data=data or [],
        options=SiteOptions([], layout, sites, partition, shift, test_labels, labelled),
        seeds=seeds,
        leave_one_out=leave_one_out,
        folds=folds,
        out=out,
    )
    how = compare_run.machine_of(workers, threads, device)
    with only_one(out, IN_USE), counting(console) as (say, rounds):
        try:
            results = compare_run.carry_out_request(asked, how, CACHE / "phantom", say, rounds)
        except KeyboardInterrupt:
            say(f"Stopped by hand. The same command goes on from the last finished rounds in {out}.")
            raise typer.Exit(130) from None
    if json_to is not None and str(json_to) != "-":
        write_json(json_to, results)
    if str(json_to) == "-":
        print_json(results)
        return
    print(compare_run.told(results))


@app.command()
@guarded
def settings(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Lists the named settings of `fedsim compare`, and what each changes in study.toml."""
    from json import dumps

    from simulations.settings import SETTINGS

    if as_json:
        print_json(dict(SETTINGS))
        return
    for name, changes in SETTINGS.items():
        print(f"{name:18} {dumps(changes) if changes else 'as the study says'}")


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
def attack(
    study: Annotated[str, typer.Argument(help="A ready study or the path of a study.toml; its images are attacked.")],
    data: Annotated[list[Path] | None, typer.Option(help="As for `fedsim run`. Without it, the phantom.")] = None,
    layout: Layout = "auto",
    sites: Annotated[int | None, typer.Option(min=3, help="How many sites; all of the data, or 3.")] = None,
    attacks: Annotated[
        str, typer.Option(help="inversion, imprint, membership, claim, curious, separated by commas; or all.")
    ] = "all",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer networks, patients and canaries: a first look.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, report.json and pictures.")] = None,
    json_to: Annotated[
        Path | None, typer.Option("--json", help="Write the figures as JSON too; - is standard output.")
    ] = None,
) -> None:
    """Attacks a study as a curious or lying coordinator would, without protection and with it; says what is got.

    Exits with 1 where an attack fails that nothing protects from, so that nothing is shown, or where one gets more
    than a protection allows.
    """
    from shared_models.supervise import only_one
    from simulations import run as simulation  # imports the data readers
    from simulations.attacks import report
    from simulations.attacks.run import FULL, QUICK, carry_out, chosen
    from simulations.show import IN_USE
    from simulations.site_options import SiteOptions, sites_of

    loaded, names = load_study(study), chosen(attacks)
    folder = out or Path("runs") / f"{loaded.name}-attacks"
    how = simulation.machine("local", 0, 1, "cpu")
    shown = Progress(console=console, transient=True, disable=not console.is_terminal)
    with only_one(folder, IN_USE), shown as bars:
        running = {name: bars.add_task(name, total=None) for name in names}
        nodes = sites_of(
            loaded, folder, SiteOptions(data or [], layout, sites), how, CACHE / "phantom", bars.console.print
        )
        findings = carry_out(
            loaded, nodes, folder, names, QUICK if quick else FULL,
            lambda name, done, of: bars.update(running[name], completed=done, total=of),
        )  # fmt: skip
    written = report.write_all(loaded, findings, folder)
    if json_to is not None and str(json_to) != "-":
        write_json(json_to, report.numbers(loaded, findings))
    if str(json_to) == "-":
        print_json(report.numbers(loaded, findings))
    else:
        Console().print(report.table(loaded, findings))
        for finding in findings:
            Console().print(f"[bold]{finding.title}.[/] {escape(finding.verdict)}", highlight=False)
        print("\n".join(f"{kind:24} {path}" for kind, path in written.items()))
    if any(finding.missed for finding in findings):
        raise typer.Exit(1)


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
    sites: Annotated[int, typer.Option(min=1, help="How many hospitals.")] = 3,
    patients: Annotated[int, typer.Option(min=3, help="Of each site; manifest.csv splits them 60/10/30.")] = 30,
    slices: Annotated[int, typer.Option(min=1, help="Of each image.")] = 6,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Pixels along an edge.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Another one makes other patients.")] = 0,
    shift: Annotated[str, typer.Option(help="What sites differ in: both, image or label.")] = "both",
    test_labels: Annotated[
        str, typer.Option(help="What manifest.csv gives test patients for a mask: the site's, or the truth.")
    ] = "site",
    layout: Annotated[
        str,
        typer.Option(
            help="manifest, table, luna16, lidc-idri, brats-2018 to 2021, -2023, -2024, decathlon, nnunet or pacs."
        ),
    ] = "manifest",
) -> None:
    """Writes made-up patients of several hospitals: lung CT, or brain MR for BraTS, in any layout that is read."""
    from simulations.phantoms import PhantomPlan, Shift, TestLabels, in_lines
    from simulations.phantoms import phantom as write
    from simulations.sources import write_sites

    val, test = max(1, patients // 10), max(1, 3 * patients // 10)
    if layout != "manifest" and (shift, test_labels) != ("both", "site"):
        raise StudyInvalid("--shift and --test-labels are for --layout manifest.")
    plan = PhantomPlan(
        sites, patients - val - test, val, test, slices, size, seed,
        shift=cast(Shift, shift), test_labels=cast(TestLabels, test_labels),
    )  # fmt: skip
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("patients", total=None)
        lines = in_lines(lambda news: console.print(news, highlight=False))

        def progress(done: int, of: int) -> None:
            if console.is_terminal:
                bars.update(bar, completed=done, total=of)
            else:
                lines(done, of)

        if layout == "manifest":
            folder = write(out, plan, progress=progress)
        else:
            folder = write_sites(out, layout, plan, progress)
    print(folder)


@app.command()
@guarded
def release(
    run_dir: Annotated[Path, typer.Argument(help="Folder of `fedsim run` (its --out), or a run folder in it.")],
    out: Annotated[Path, typer.Option(help="Folder to write it to, as NAME-VERSION.")] = Path(),
    version: Annotated[str, typer.Option(help="Of the release.")] = "1",
    single_file: Annotated[bool, typer.Option("--single-file", help="One file in the place of a folder.")] = False,
    words: Annotated[
        Path | None, typer.Option(help="TOML for the model card: intended_use, limits, populations, licence, ...")
    ] = None,
) -> None:
    """Makes a research release of a run: ONNX, TorchScript, MONAI bundle, card; marked as of no federation."""
    from fedserver.publish.card import read_words
    from simulations.run_folder import run_at

    run, said = run_at(run_dir), read_words(words)
    from simulations.release import research_release  # imports torch

    path, manifest = research_release(run, out, version, said, single_file)
    print(f"{path}\ndigest {manifest.digest}")
    console.print("A research release: no federation stands behind it. `fedclient verify --research` opens it.")


if __name__ == "__main__":
    app()
