"""`fedclient verify`: is a release whole, whose is it, what does its evidence show; nothing in it is run unasked."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedclient.own_log import lines_of
from fedclient.trust import Watch, groups_of, trust_in
from shared_models.calibration import temperatures_of
from shared_models.cli import guarded, print_json
from shared_models.release import Release, open_release

console = Console(soft_wrap=True)
Authority = Annotated[
    list[Path] | None,
    typer.Option(help="Certificate of a federation's authority (ca.pem), repeated; default: those that --site trusts."),
]
Status = Annotated[
    Path | None, typer.Option(help="A newer list of the federation's releases, of `fedserver release-status`; kept.")
]
Research = Annotated[bool, typer.Option("--research", help="Take releases of `fedsim release` too: of nobody known.")]


@guarded
def verify(
    release: Annotated[Path, typer.Argument(help="Folder of a release, or its .fedrelease file.")],
    authority: Authority = None,
    status: Status = None,
    research: Research = False,
    run: Annotated[
        bool, typer.Option("--run", help="Also run all forms of the network on the made-up cases of the release.")
    ] = False,
    site: Annotated[Path, typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node.")] = Path("site"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Checks a release offline: every byte, the signature, the approvals, the evidence; names what is wrong.

    Exits with 1 too where hospitals' signatures in it are under keys that nothing ties to them.
    """
    from fedclient.renewal import read_roster
    from shared_models.provenance import against_kept, against_roster, check_provenance, untied

    trust = trust_in(site, authority or (), research)
    with tempfile.TemporaryDirectory(prefix="fedclient-verify-") as scratch:
        opened = open_release(release, trust, scratch=Path(scratch))
        shown = [*check_provenance(opened, trust.authorities), *against_kept(opened, kept_heads(site))]
        watch = Watch(site, opened, groups_of(site, authority or ()), status)
        shown += against_roster(opened, trust.authorities, read_roster(site))
        doubts = untied(opened)
        warnings = [*watch.warnings(), *doubts]
        shown += [watch.said()] if opened.manifest.origin.kind == "federation" else []
        figures = _run(opened) if run else None
    facts = facts_of(opened)
    if as_json:
        print_json({**facts, "shown": shown, "warnings": warnings, "parity": figures})
        raise typer.Exit(1 if doubts else 0)
    console.print(f"[bold]{opened.name}[/] version {opened.version}: {facts['words']}", highlight=False)
    for words in shown:
        console.print(f"  {words}", highlight=False, markup=False)
    for words in warnings:
        console.print(f"  warning: {words}", highlight=False, markup=False, style="yellow")
    for name, figure in (figures or {}).items():
        console.print(f"  {name} answers as the network does, within {figure['logits']:.2g}", highlight=False)
    console.print(f"digest {opened.digest}", highlight=False)
    raise typer.Exit(1 if doubts else 0)


def kept_heads(site: Path) -> list[dict[str, Any]]:
    """Heads of other parties' logs that this site has written into its own."""
    return [line["facts"] for line in lines_of(site) if line["event"] == "witnessed"]


def facts_of(opened: Release) -> dict[str, Any]:
    """What is told of a release that was opened."""
    manifest, origin = opened.manifest, opened.manifest.origin
    whose = (
        f"signed by the coordinator of {origin.federation!r}"
        if origin.kind == "federation"
        else "a RESEARCH release, whole and of nobody who is known; never for patients"
    )
    return {
        "name": opened.name,
        "version": opened.version,
        "digest": opened.digest,
        "kind": origin.kind,
        "federation": origin.federation,
        "run": origin.run,
        "round": origin.round,
        "sites": dict(origin.sites),
        "files": len(manifest.files),
        "approvals": manifest.approvals,
        "words": f"all {len(manifest.files)} files are as they were signed; {whose}",
    }


def _run(opened: Release) -> dict[str, dict[str, float]]:
    """Every form of the network on the stored cases, against what was stored; of bytes that were compared once read."""
    from shared_models.parity import ARRAYS, compared, stored_cases  # imports torch
    from shared_models.release import BUNDLE_SCRIPT, BUNDLE_STATE, ONNX, TORCHSCRIPT, WEIGHTS
    from shared_models.runtimes import (
        network_from,
        onnx_runner,
        state_dict_runner,
        torch_runner,
        torchscript_runner,
    )

    by = temperatures_of(opened.study, opened.calibration)
    cases, wanted = stored_cases(opened.content(ARRAYS), opened.study, by)
    forms = {
        WEIGHTS: torch_runner(network_from(opened.study, opened.content(WEIGHTS))),
        ONNX: onnx_runner(opened.content(ONNX)),
        TORCHSCRIPT: torchscript_runner(opened.content(TORCHSCRIPT)),
    }
    if BUNDLE_STATE in opened.manifest.files:  # its tensors; its configuration can run code, and is not run
        forms[BUNDLE_STATE] = state_dict_runner(opened.study, opened.content(BUNDLE_STATE))
        forms[BUNDLE_SCRIPT] = torchscript_runner(opened.content(BUNDLE_SCRIPT))
    return compared(opened.study, cases, wanted, forms, by)
