"""`fedclient predict`: a released model on images of this hospital."""

import tempfile
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedclient.explain_command import methods_named
from fedclient.verify import Authority, Status
from shared_models.cli import guarded, print_json
from shared_models.errors import FederationError

if TYPE_CHECKING:  # they import the readers
    from fedclient.predict.run import Done, Explain, Failed

console = Console(soft_wrap=True)
SHOWN = 20  # cases on the screen; all of them are in results.csv


class Device(StrEnum):
    """Where the network is computed."""

    CPU = "cpu"
    CUDA = "cuda"


@guarded
def predict(
    release: Annotated[Path, typer.Argument(help="A release: its folder, or its .fedrelease file.")],
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Images: DICOM folders or files, NIfTI, MetaImage, NRRD, PNG; or folders of any of them."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results; each case gets one of its own.")],
    device: Annotated[Device, typer.Option(help="cpu takes onnxruntime, cuda PyTorch; the masks are the same.")] = (
        Device.CPU
    ),
    threads: Annotated[int, typer.Option(min=0, help="Of the CPU; 0 for as many as there are cores.")] = 0,
    formats: Annotated[
        str, typer.Option("--format", help="Some of seg,sr,sc,nifti,json,csv; seg and sr need DICOM.")
    ] = "seg,sr,sc,nifti,json,csv",
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="How sure it is, by test-time augmentation: several times the time.")
    ] = False,
    explained: Annotated[
        bool, typer.Option("--explain", help="A picture of what moved each answer, in PyTorch: seconds for each.")
    ] = False,
    method: Annotated[
        list[str] | None, typer.Option(help="Of --explain: grad-cam, occlusion or smooth-grad; repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
    authority: Authority = None,
    status: Status = None,
    research: Annotated[
        bool, typer.Option("--research", help="Take a release that no federation has signed; never for patients.")
    ] = False,
    site: Annotated[
        Path, typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node, whose authority is trusted.")
    ] = Path("site"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What a released model marks, measures or tells on images; not for diagnosis. Exits with 1 if any case failed."""
    from fedclient.predict.heap import give_back
    from fedclient.predict.inputs import list_inputs
    from fedclient.predict.model import load_model
    from fedclient.predict.run import check_free, predict_all, predict_table
    from fedclient.trust import Watch, groups_of, trust_in
    from shared_models.release import open_release

    give_back()
    wanted, methods = _formats(formats), methods_named(method)
    if method and not explained:
        raise FederationError("--method: is a choice of --explain. Give both, or neither.")
    check_free(out, overwrite)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedclient-")))
        opened = open_release(release, trust_in(site, authority or (), research), scratch=scratch)
        warnings = Watch(site, opened, groups_of(site, authority or ()), status).warnings()
        model = load_model(opened, device.value, threads)
        explain: Explain | None = None
        if explained:
            from fedclient.predict.explained import explainer_of  # 4 to 12 s of PyTorch

            explain = explainer_of(opened, model, device.value, methods)
        if model.study.table_only and uncertainty:
            raise FederationError("--uncertainty: is of images, and this release answers by tables. Leave it out.")
        if model.study.table_only:
            total, outcomes = None, predict_table(model, inputs, out, wanted, overwrite=overwrite)
        else:
            found = list_inputs(inputs, model.study)
            total = len(found.found)
            outcomes = predict_all(
                model, found, out, wanted, overwrite=overwrite, uncertainty=uncertainty, explain=explain
            )
        done: list[Done | Failed] = []
        to = Console(stderr=True)
        columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=to, transient=True, disable=not to.is_terminal) as bars:
            bar = bars.add_task("", total=total)
            for outcome in outcomes:
                done.append(outcome)
                bars.advance(bar)
    passed = {} if model.study.table_only else dict(found.passed)
    failed = _tell(done, model.stamp, model.engine, passed, out, warnings, as_json)
    if failed:
        raise typer.Exit(1)


def _formats(given: str) -> tuple[str, ...]:
    from fedclient.predict.outputs import FORMATS

    wanted = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if strange := [name for name in wanted if name not in FORMATS]:
        raise FederationError(f"--format {strange[0]!r}: is none of {', '.join(FORMATS)}.")
    if not wanted:
        raise FederationError(f"--format: name some of {', '.join(FORMATS)}.")
    return wanted


def _tell(
    done: "list[Done | Failed]",
    stamp: str,
    engine: str,
    passed: dict[str, int],
    out: Path,
    warnings: list[str],
    as_json: bool,
) -> int:
    """Shows what became of the cases; returns how many failed."""
    from fedclient.predict.run import Done, Failed

    good = [each for each in done if isinstance(each, Done)]
    failed = [each for each in done if isinstance(each, Failed)]
    if as_json:
        print_json(
            {
                "release": stamp,
                "engine": engine,
                "warnings": warnings,
                "out": str(out),
                "predicted": [
                    {"case": d.name, "input": d.given, "doubts": list(d.doubts), "not_written": d.missing,
                     "answers": d.rows} for d in good
                ],
                "failed": [{"case": f.name, "input": f.given, "code": f.code, "why": f.why} for f in failed],
                "passed_over": passed,
            }
        )  # fmt: skip
        return len(failed)
    for each in good[:SHOWN]:
        told = "; ".join(_words(row) for row in each.rows)
        doubtful = f"  [yellow]doubtful: {', '.join(each.doubts)}[/]" if each.doubts else ""
        console.print(f"{each.name}: {escape(told)}{doubtful}", highlight=False)
    if len(good) > SHOWN:
        console.print(f"... and {len(good) - SHOWN} more; results.csv lists them all.")
    for fail in failed:
        console.print(f"[red]{fail.name}[/] (input {fail.given}) {fail.code}: {escape(fail.why)}", highlight=False)
    lacking = {f"{name}: {why}" for each in good for name, why in each.missing.items()}
    for words in sorted(lacking):
        console.print(f"not written, {escape(words)}", highlight=False)
    for words in warnings:
        console.print(f"warning: {words}", highlight=False, markup=False, style="yellow")
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(passed.items()) if count)
    doubtful_count = sum(bool(each.doubts) for each in good)
    besides = f"; passed over: {shown}" if shown else ""
    console.print(
        f"{len(good)} predicted ({doubtful_count} doubtful), {len(failed)} failed{besides}. "
        f"Results: {escape(str(out))}. Model: {escape(stamp)}, {escape(engine)}. Not for diagnosis.",
        highlight=False,
    )
    return len(failed)


def _words(row: dict[str, object]) -> str:
    if row.get("volume_ml"):
        longest = f", longest axial diameter {row['longest_axial_mm']} mm" if row.get("longest_axial_mm") else ""
        return f"{row['answer']} {float(str(row['volume_ml'])):.2f} ml{longest}"
    return f"{row['answer']} {'marked' if row.get('called') else 'not marked'}, probability {row['chance']}"
