"""`fedclient trust`: the authority of a federation is renewed, and hospitals take the new one beside the old one.

keys/ca.pem holds every certificate that this site takes for its federation's authority. The first came with the invite;
another is added by a person who has compared its eight words by telephone, and the old one is dropped when it is done
with. TLS, orders, rosters, releases and lists of releases are all taken by any of them.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedclient.records import log_of
from fedclient.site import read_site_file
from shared_models.cli import guarded, print_json
from shared_models.errors import StateInvalid
from shared_models.expiry import date_text
from shared_models.files import locked, write_atomic
from shared_models.identity import Authority, authorities_in, fingerprint_words

console = Console(soft_wrap=True)


def pinned(site: Path) -> tuple[Authority, ...]:
    """Those whom the site takes for its federation's authority."""
    return authorities_in((site / "keys" / "ca.pem").read_bytes(), str(site / "keys" / "ca.pem"))


def take(site: Path, file: Path, words: str) -> Authority:
    """Adds the authority in a file, whose words somebody has heard from the coordinator.

    Raises:
        StateInvalid: not one authority that is good today, or of other words.
    """
    found = one_in(file)
    if fingerprint_words(found.fingerprint).split() != words.lower().split():
        raise StateInvalid(f"{file}: has other words than those given. Do not trust it; telephone the coordinator.")
    if not found.since_s <= datetime.now(UTC).timestamp() <= found.expires_at_s:
        raise StateInvalid(f"{file}: is good from {date_text(found.since_s)} to {date_text(found.expires_at_s)} alone.")
    return _changed(site, "authority-trusted", found, add=True)


def drop(site: Path, file: Path) -> Authority:
    """Takes an authority out; the last one stays.

    Raises:
        StateInvalid: it is not pinned, or no other one is.
    """
    return _changed(site, "authority-dropped", one_in(file), add=False)


def one_in(file: Path) -> Authority:
    """The one authority in a file; raises StateInvalid where there is none or another number."""
    if not file.is_file():
        raise StateInvalid(f"{file}: is not there. Give the certificate of the authority, a PEM file.")
    found = authorities_in(file.read_bytes(), str(file))
    if len(found) != 1:
        raise StateInvalid(f"{file}: holds {len(found)} certificates. Give one at a time.")
    return found[0]


def _changed(site: Path, event: str, one: Authority, *, add: bool) -> Authority:
    name, path = read_site_file(site).name, site / "keys" / "ca.pem"
    with locked(path.with_suffix(".lock")):
        now = pinned(site)
        others = [each for each in now if each.fingerprint != one.fingerprint]
        if add == (len(others) < len(now)):
            return one if add else _missing(path)
        if not add and not others:
            raise StateInvalid(f"{path}: holds this authority alone. Take its successor first, with --words.")
        log_of(site, name).add(event, fingerprint=one.fingerprint, until=date_text(one.expires_at_s))
        write_atomic(path, b"".join(each.pem for each in [*others, *([one] if add else [])]))
    return one


def _missing(path: Path) -> Authority:
    raise StateInvalid(f"{path}: this authority is not in it. `fedclient trust` lists those that are.")


@guarded
def trust(
    certificate: Annotated[
        Path | None, typer.Argument(help="The new authority's certificate, of the coordinator; else those in use.")
    ] = None,
    words: Annotated[
        str, typer.Option(help="Its eight words, as the coordinator says them over the telephone: then it is taken.")
    ] = "",
    dropped: Annotated[bool, typer.Option("--drop", help="Take it out of those that are trusted.")] = False,
    site: Annotated[Path, typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node.")] = Path("site"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Lists the authorities of this site's federation, takes a new one beside the old, or drops one."""
    if dropped and words:
        raise StateInvalid("--drop and --words: the one takes out, the other takes in. Give one of them.")
    if (dropped or words) and certificate is None:
        raise StateInvalid("give the file of the certificate that is meant.")
    if certificate is not None and words:
        take(site, certificate, words)
    elif certificate is not None and dropped:
        drop(site, certificate)
    elif certificate is not None:
        shown = one_in(certificate)
        if as_json:
            print_json({"words": fingerprint_words(shown.fingerprint), "expires_at": shown.expires_at_s})
            return
        console.print(f"[bold]{fingerprint_words(shown.fingerprint)}[/], until {date_text(shown.expires_at_s)}")
        console.print("Nothing is changed. Hear these words from the coordinator by telephone, then give --words.")
        return
    listed = pinned(site)
    if as_json:
        print_json([{"words": fingerprint_words(a.fingerprint), "expires_at": a.expires_at_s} for a in listed])
        return
    for each in listed:
        console.print(f"[bold]{fingerprint_words(each.fingerprint)}[/], until {date_text(each.expires_at_s)}")
    console.print("Releases are taken at once; a node that runs connects by them after `fedclient start` anew.")
