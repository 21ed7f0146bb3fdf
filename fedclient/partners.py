"""With whom a site sums: the identity keys of the partners that its policy names, as they were when first seen.

The coordinator signs the roster, so it can give a partner's name a key of its own. The first key of each partner is
kept, and one with another key counts as a stranger until a person here has asked that hospital and said so. Whoever
wants to trust no first sight either compares the words of `fedclient partners` by telephone once.

site/partners.json   name -> Ed25519 public key, hexadecimal
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedclient.own_log import complain, log_of
from shared_models.errors import StateInvalid
from shared_models.files import locked, read_json, write_json
from shared_models.identity import fingerprint_words
from shared_models.roster import Roster

FILE, LOCK = "partners.json", ".partners.lock"


@dataclass(frozen=True, slots=True)
class Partner:
    """One that the policy names; keys are Ed25519, hexadecimal, "" where there is none.

    Attributes:
        seen: its key as first seen here, or confirmed since.
        listed: its key on the newest roster.
    """

    name: str
    seen: str
    listed: str

    @property
    def counts(self) -> bool:
        return self.listed != "" and self.listed == self.seen

    @property
    def changed(self) -> bool:
        return "" not in (self.seen, self.listed) and self.listed != self.seen


def partners_of(folder: Path, site: str, named: Iterable[str], roster: Roster | None) -> list[Partner]:
    """Those that the policy of the site in `folder` has named but itself, by name; nothing is kept of what is seen."""
    path = folder / FILE
    seen: Mapping[str, str] = read_json(path) if path.exists() else {}
    listed: Mapping[str, str] = {} if roster is None else roster.sites
    return [Partner(name, seen.get(name, ""), listed.get(name, "")) for name in sorted({*named} - {site})]


def counted(folder: Path, site: str, named: Iterable[str], roster: Roster) -> frozenset[str]:
    """The named partners whose key on the roster is the one first seen; of a new one it is kept now.

    The site's audit log has both: `partner-seen`, and `partner-changed` once for each change.
    """
    with locked(folder / LOCK):
        found = partners_of(folder, site, named, roster)
        for new in found:
            if new.listed and not new.seen:
                _keep(folder, site, "partner-seen", new)
        found = partners_of(folder, site, named, roster)
        if words := changed_words(found):
            listed = ", ".join(f"{each.name} {each.listed}" for each in found if each.changed)
            complain(folder, site, "partner-changed", f"{words} Listed: {listed}.")
    return frozenset(partner.name for partner in found if partner.counts)


def confirm(folder: Path, site: str, partner: Partner, words: str) -> None:
    """Takes the partner's key of now for its own.

    Raises:
        StateInvalid: it is on no roster, or `words` are not those of its key.
    """
    if not partner.listed:
        raise StateInvalid(f"partner {partner.name!r}: is not on the newest roster that this site has seen.")
    if words.split() != key_words(partner.listed).split():
        raise StateInvalid(
            f"partner {partner.name!r}: these are not the words of its key on the roster. Mind the spelling; if they "
            f"are what that hospital's own `fedclient partners` says, the roster has a key of somebody else under its "
            f"name. Sum with it no more, and tell it and the others."
        )
    with locked(folder / LOCK):
        _keep(folder, site, "partner-confirmed", partner)


def _keep(folder: Path, site: str, event: str, partner: Partner) -> None:
    path = folder / FILE
    seen = read_json(path) if path.exists() else {}
    log_of(folder, site).add(event, partner=partner.name, identity=partner.listed)
    write_json(path, {**seen, partner.name: partner.listed})


def changed_words(found: Iterable[Partner]) -> str:
    """What a person must do about partners with another key, or nothing."""
    names = [partner.name for partner in found if partner.changed]
    if not names:
        return ""
    return (
        f"{', '.join(names)}: has another identity key than when this site first saw it, and counts as a stranger in "
        f"secure sums. Ask that hospital, by a telephone number that is not from the coordinator, for the words that "
        f"its own `fedclient partners` says; then `fedclient partners --confirm {names[0]} --words WORDS`."
    )


def key_words(key: str) -> str:
    """Eight words for an identity key, to be compared over a telephone."""
    return fingerprint_words(hashlib.sha256(bytes.fromhex(key)).hexdigest())
