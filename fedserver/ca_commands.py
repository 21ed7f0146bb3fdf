"""`fedserver ca`: issuing keys by a root key that is kept away from the coordinator, on a stick."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedserver.operate import HERE, Folder, Passphrase, passphrase
from shared_models.cli import guarded, print_json

ca = typer.Typer(help="Issuing keys, where the authority's root key is kept offline.", no_args_is_help=True)
console = Console(soft_wrap=True, highlight=False)
Stick = Annotated[
    Path, typer.Option("--root", help="Folder of the root key, as `fedserver init --offline-ca` made it.")
]
Days = Annotated[float, typer.Option(help="For which the issuing key is good.")]
RevokeOld = Annotated[
    bool,
    typer.Option(
        "--revoke-old",
        help="The keys at the coordinator may be in other hands: revoke all before. See `ca request --anew`.",
    ),
]


@ca.command()
@guarded
def show(
    out: Annotated[
        Path | None, typer.Option(help="Also write what to give to who verifies releases elsewhere.")
    ] = None,
    federation: Folder = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Says where the root key is, which issuing keys count and until when, and what is revoked."""
    from fedserver.enrol import ca_fingerprint, open_federation
    from shared_models.authority import read_authority
    from shared_models.dates import date_text
    from shared_models.files import write_atomic
    from shared_models.identity import fingerprint_words, read_certificate

    opened = open_federation(federation)
    found = read_authority(opened.authority)
    issuers = [read_certificate(pem) for pem in found.issuers]
    if out is not None:
        write_atomic(out, opened.authority)
    if as_json:
        print_json(
            {
                "offline": found.offline,
                "words": fingerprint_words(ca_fingerprint(opened)),
                "list": found.number,
                "issuers": [{"fingerprint": each.fingerprint, "expires_at": each.expires_at_s} for each in issuers],
                "revoked": len(found.revoked),
            }
        )
        return
    console.print(f"{opened.name}: [bold]{fingerprint_words(ca_fingerprint(opened))}[/]")
    if not found.offline:
        console.print("The root key is at this coordinator. A new federation can keep it elsewhere: `--offline-ca`.")
        return
    console.print(
        f"The root key is kept elsewhere. Its revocation list {found.number} names {len(found.revoked)} keys."
    )
    for each in issuers:
        words = fingerprint_words(each.fingerprint)
        console.print(f"  issuing key until {date_text(each.expires_at_s)}: {words}")


@ca.command()
@guarded
def request(
    out: Annotated[Path, typer.Argument(help="The file to bring to the root key; it holds no secret.")],
    anew: Annotated[
        bool, typer.Option("--anew", help="Before `certify --revoke-old`: keys that wait may be in other hands, too.")
    ] = False,
    federation: Folder = HERE,
) -> None:
    """Makes a new issuing key here and writes what the root key is to certify."""
    from fedserver.enrol import open_federation
    from fedserver.root import request as ask
    from shared_models.files import write_atomic

    write_atomic(out, ask(open_federation(federation), anew))
    console.print(f"{out}: bring it to the root key. There: `fedserver ca certify {out.name} ANSWER --root FOLDER`.")


@ca.command()
@guarded
def certify(
    request: Annotated[Path, typer.Argument(help="What `fedserver ca request` wrote.")],
    answer: Annotated[Path, typer.Argument(help="The file to bring back; it holds no secret.")],
    root: Stick,
    days: Days = 180.0,
    revoke_old: RevokeOld = False,
    passphrase_file: Passphrase = None,
) -> None:
    """Certifies the new issuing key with the root key, on a machine that need not be connected to anything."""
    from fedserver.root import certify as sign
    from fedserver.root import open_root
    from shared_models.files import write_atomic

    unlocked = open_root(root, passphrase(passphrase_file, twice=False))
    write_atomic(answer, sign(unlocked, request.read_bytes(), days, revoke_old))
    console.print(f"{answer}: bring it to the coordinator. There: `fedserver ca install {answer.name}`.")


@ca.command()
@guarded
def install(
    answer: Annotated[Path, typer.Argument(help="What `fedserver ca certify` wrote.")], federation: Folder = HERE
) -> None:
    """Takes up a new issuing key; sites learn of it within a minute, and no connection is cut."""
    from fedserver.enrol import open_federation
    from fedserver.root import install as take
    from fedserver.root import revokes

    content = answer.read_bytes()
    take(open_federation(federation), content)
    _tell(revokes(content))


@ca.command()
@guarded
def renew(
    root: Stick,
    days: Days = 180.0,
    revoke_old: RevokeOld = False,
    passphrase_file: Passphrase = None,
    federation: Folder = HERE,
) -> None:
    """Request, certify and install in one, with the stick at this machine for as long as that takes."""
    from fedserver.enrol import open_federation
    from fedserver.root import certify as sign
    from fedserver.root import install as take
    from fedserver.root import open_root
    from fedserver.root import request as ask

    opened = open_federation(federation)
    unlocked = open_root(root, passphrase(passphrase_file, twice=False))
    take(opened, sign(unlocked, ask(opened, anew=revoke_old), days, revoke_old))
    _tell(revoke_old)
    console.print("Take the stick out again.")


def _tell(revoked: bool) -> None:
    if not revoked:
        console.print("The new issuing key is in use. Sites that are connected stay so.")
        return
    console.print("The keys before are revoked. Restart `fedserver serve`: its processes hold the old ones.")
    console.print("Sites renew their certificates within a minute of hearing it. Releases signed with the old key of")
    console.print("statements are refused from now on: publish again those that are in use (`fedserver release`).")
