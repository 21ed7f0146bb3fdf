"""Options that several commands of `fedsim` have, with their help."""

from pathlib import Path
from typing import Annotated

import typer

Layout = Annotated[str, typer.Option(help="How data is laid out (brats-2023, pacs, ...); auto finds it.")]
Partition = Annotated[
    str, typer.Option(help="natural, or made-up sites: iid, dirichlet:ALPHA (labels), quantity:ALPHA.")
]
Shift = Annotated[str, typer.Option(help="What sites of the phantom differ in: both, image or label.")]
TestLabels = Annotated[str, typer.Option(help="The phantom's test labels: site or truth.")]
Labelled = Annotated[float, typer.Option(help="Share of each site's training patients whose labels are used.")]
Seeds = Annotated[int, typer.Option(min=1, help="Repetitions, from the study's seed on.")]
RunsAtOnce = Annotated[
    int | None, typer.Option(min=0, help="Runs at once; 0 is this process alone. Default: cores, or 2 a GPU.")
]
ThreadsOfEach = Annotated[int | None, typer.Option(min=1, help="PyTorch threads of each (1).")]
DeviceInTurn = Annotated[str, typer.Option(help="auto (each GPU in turn), cpu or cuda:N.")]
JsonTo = Annotated[Path | None, typer.Option("--json", help="Write the results as JSON; - is standard output.")]
