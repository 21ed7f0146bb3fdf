"""`fedserver audit verify` and `export`: what an auditor of the coordinator types."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared_models.cli import guarded

console = Console(soft_wrap=True)
Folder = Annotated[Path, typer.Option("--federation", envvar="FEDSERVER_FEDERATION", help="Folder of the federation.")]
audit = typer.Typer(
    help="This coordinator's audit log: who joined, what was ordered, counted, refused.", no_args_is_help=True
)


@audit.command()
@guarded
def verify(
    pack: Annotated[Path | None, typer.Option(help="Evidence of a hospital; both logs are compared.")] = None,
    federation: Folder = Path("federation"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Checks every line of the coordinator's log, and every answer that a hospital has signed; names the first bad one.

    The logs of the keys before are checked too. Exits with 1 if there is a bad line.
    """
    from fedserver.enrol import open_federation, signer
    from fedserver.signed import check_signed
    from fedserver.state import list_sites
    from shared_models.errors import StateInvalid
    from shared_models.evidence import against, earlier_verdicts, read_pack, tell, verdict_of
    from shared_models.identity import identity_public_key

    opened = open_federation(federation)
    mine = verdict_of(federation, identity_public_key(signer(opened).key))
    found = {"coordinator": mine}
    if pack is not None:
        files = read_pack(pack)
        key = files["key.txt"].decode("ascii", "replace").strip()
        sites = [site.name for site in list_sites(opened.state) if site.identity_public_key == key]
        if not sites:
            raise StateInvalid(f"{pack}: is signed with a key that no site of this federation has enrolled.")
        found["coordinator"], found[f"site {sites[0]}"] = against(mine, files, bytes.fromhex(key))
    found |= {f"coordinator, key before ({name})": told for name, told in earlier_verdicts(federation, mine).items()}
    tell(found, as_json)
    answers, runs = check_signed(opened)
    if answers and not as_json:
        print(
            f"{answers} answers in {runs} runs are as the hospitals signed them, and none that was counted is missing."
        )


@audit.command()
@guarded
def export(
    out: Annotated[Path, typer.Option(help="The ZIP file to write.")] = Path("evidence.zip"),
    federation: Folder = Path("federation"),
) -> None:
    """Writes the log, its signed head and the certificates into one file that others can verify."""
    from fedserver.enrol import open_federation, signer
    from shared_models.evidence import export as write
    from shared_models.identity import identity_public_key

    opened = open_federation(federation)
    by = signer(opened)
    certificates = {"ca.pem": opened.authority, "signer.pem": by.certificate}
    write(federation, identity_public_key(by.key), certificates, out)
    console.print(f"{out}: what the coordinator's audit log holds.", highlight=False, markup=False)
