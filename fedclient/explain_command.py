"""`fedclient explain` and `worklist`: why a model answers so on images of this hospital, and what to label next."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from shared_models.cli import guarded, print_json
from shared_models.errors import StudyInvalid

if TYPE_CHECKING:  # imports torch
    from fedclient.training.maps import Method

console = Console(soft_wrap=True)
METHODS = ("grad-cam", "occlusion", "smooth-grad")


@guarded
def explain(
    model: Annotated[Path, typer.Argument(help="Weights (.safetensors, with --study), or the folder of a run.")],
    images: Annotated[
        list[str], typer.Argument(help="Images or DICOM folders; files of several channels joined by commas.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for pictures and explanations.json.")],
    study: Annotated[str, typer.Option(help="Of weights alone: a ready study, or a study.toml.")] = "",
    answer: Annotated[str, typer.Option(help="Which of the study's labels or regions; the first.")] = "",
    method: Annotated[
        list[str] | None, typer.Option(help="grad-cam, occlusion or smooth-grad; repeated, a picture each.")
    ] = None,
    plane: Annotated[
        int | None, typer.Option(min=0, help="Of an image that is answered plane by plane; else the one with most.")
    ] = None,
    layer: Annotated[str, typer.Option(help="That Grad-CAM looks at, by its name in the network.")] = "",
    rounds: Annotated[
        int, typer.Option(min=1, help="Last rounds of a run that say how sure an answer is; 1 changes the image.")
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Draws what moved a model's answer on each image, with its probability and how sure it is. Not for diagnosis."""
    from fedclient.training.explaining import Wanted, explain_all, model_at, read_pictured

    made = model_at(model, study)
    pictured = [read_pictured([Path(file) for file in files.split(",")], made.study) for files in images]
    results = explain_all(made, pictured, Wanted(answer, methods_named(method), plane, layer), out, device, rounds)
    if as_json:
        print_json(results)
    else:
        tell(results, out)


@guarded
def worklist(
    study: Annotated[
        str, typer.Argument(help="Its name here, or the beginning of its digest; or the path of a study.toml.")
    ],
    model: Annotated[
        Path | None, typer.Option(help="Weights, or the folder of a run; else the last that the coordinator sent.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="How many cases.")] = 20,
    site: Annotated[
        Path, typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node: keys, settings, cache.")
    ] = Path("site"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Lists the unlabelled cases most worth a label: a model is unsure of them, and they are unlike each other."""
    from fedclient.consent import find_asked
    from fedclient.site import open_site
    from fedclient.training.explaining import model_at
    from fedclient.training.worklist import received, rows_of
    from fedclient.training.worklist import worklist as listed
    from shared_models.study import load_study, sha256

    here = open_site({"site-dir": str(site)})
    if model is not None:
        made, words = model_at(model, study if model.is_file() else ""), f"of {model}"
    else:
        if study.endswith(".toml"):
            named = load_study(study)
            digest = sha256(named)
        else:
            asked = find_asked(here, study)
            named, digest = asked.study, asked.sha256
        found = received(here, named, digest)
        made, words = found.model, found.words
    print(f"By weights {made.sha256[:16]} of study {made.study.name!r}, {words}.", file=sys.stderr)
    wishes = listed(here, made, most)
    if as_json:
        print_json([asdict(wish) for wish in wishes])
    else:
        print(rows_of(wishes, here.data))


def methods_named(names: list[str] | None) -> "tuple[Method, ...]":
    """The methods as they were typed; Grad-CAM if none was.

    Raises:
        StudyInvalid: one that is not there.
    """
    chosen = tuple(dict.fromkeys(names or ["grad-cam"]))
    if strange := sorted(set(chosen) - set(METHODS)):
        raise StudyInvalid(f"--method {strange[0]!r}: allowed are {', '.join(METHODS)}.")
    return cast("tuple[Method, ...]", chosen)


def tell(results: dict[str, Any], out: Path) -> None:
    """For a person: a line for each picture, and what such pictures cannot say."""
    for line in results["explained"]:
        where = f"image {line['image']}, plane {line['plane']}, {line['method']}, {line['answer']}"
        if line["file"] is None:
            console.print(f"{where}: no picture, {line['why']}", highlight=False)
            continue
        console.print(
            f"{where}: probability {line['chance']:.3f}, deviation {line['deviation']:.3f} over {line['members']} "
            f"({line['uncertainty']}) -> {out / line['file']}",
            highlight=False,
        )
    console.print(results["limits"], style="yellow", highlight=False)
