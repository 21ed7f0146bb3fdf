"""The identities of a simulated federation: keys and a signed roster, made by the simulation as hospitals make theirs.

RUN/members/roster.json             the signed roster, the same for all
RUN/members/SITE/keys/identity.key  and, beside it, what the site keeps of its secure sums
"""

from collections.abc import Iterable
from pathlib import Path

from fedclient.enrol import ROSTER
from shared_models.files import write_atomic
from shared_models.identity import (
    identity_public_key,
    issue_signer,
    load_secret,
    new_authority,
    new_site_keys,
    save_secret,
)
from shared_models.roster import Roster, read_signed, sign_roster, write_signed


def members(run: Path, sites: Iterable[str]) -> dict[str, Path]:
    """Site -> folder of what it brings to secure sums; made on first use, kept with the run."""
    folder, listed = run / "members", sorted(sites)
    for site in listed:
        if not (folder / site / "keys" / "identity.key").exists():
            save_secret(folder / site / "keys" / "identity.key", new_site_keys().identity)
    if not (folder / ROSTER).exists():
        keys = {s: identity_public_key(load_secret(folder / s / "keys" / "identity.key")).hex() for s in listed}
        signed = write_signed(sign_roster(issue_signer(new_authority("simulation")), Roster("simulation", 1, keys)))
        for site in listed:
            write_atomic(folder / site / ROSTER, signed)
        write_atomic(folder / ROSTER, signed)
    return {site: folder / site for site in listed}


def roster_of(run: Path) -> Roster | None:
    """The roster of a simulated run; None where it has none."""
    path = run / "members" / ROSTER
    return read_signed(path.read_bytes(), str(path)).roster if path.exists() else None
