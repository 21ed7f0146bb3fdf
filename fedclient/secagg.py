"""The site's side of a secure sum (sfl-secagg/1, after Bonawitz et al. 2017, figure 4): five steps, each once.

    advertise -> share -> mask -> confirm -> unmask

Each step takes what the last one left and a message of the coordinator, and gives what is left now and an answer; no
clock, no disk, no network. The site doubts everything: identities by the roster that the federation's authority signed,
thresholds by its own rules, and that all sites were told the same by signatures over the context. What is kept between
the steps, and that none is done twice, is `fedclient.sums`'s.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from shared_models.errors import OrderRefused
from shared_models.identity import sign, verify
from shared_models.parse import STRICT
from shared_models.protect.context import LEAST_SITES, Context, least_threshold
from shared_models.protect.masking import (
    about_shares,
    channel_key,
    commitment,
    dealt_digests,
    is_weak,
    pair_mask_key,
    public_key,
    seal,
    self_mask_key,
    unseal,
)
from shared_models.protect.messages import (
    ADVERT,
    SURVIVORS,
    Advert,
    Adverts,
    Confirmation,
    Confirmations,
    Inbox,
    Revealed,
    Sealed,
    Survivors,
    advert_statement,
    survivors_statement,
)
from shared_models.protect.prg import Masks
from shared_models.protect.shamir import SHARE_BYTES, split
from shared_models.roster import Key32, Roster

RandomBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """What a site brings to every secure sum.

    Attributes:
        identity_key: Ed25519, PEM.
        roster: as the federation's authority signed it, verified.
        least_cohort: the site's own rule; an order can ask for more, never for less.
        partners: whom the site trusts to be hospitals, where it names them; nobody else counts towards any rule, so
            that sites which a coordinator has made up fill no cohort, outvote nobody and open no update. None: all do.
    """

    name: str
    identity_key: bytes = field(repr=False)
    roster: Roster
    least_cohort: int = LEAST_SITES
    partners: frozenset[str] | None = None

    def counted(self, sites: Iterable[str]) -> set[str]:
        """Those of `sites` that count here: this one, and its partners."""
        return {site for site in sites if self.partners is None or site == self.name or site in self.partners}

    @property
    def least(self) -> int:
        return max(LEAST_SITES, self.least_cohort)


@dataclass(frozen=True, slots=True)
class Held:
    """What the site has in its hands, whatever the context says: digests of the weights that it received, of the
    layout of its vector, and of the study that it approved."""

    model_sha256: str
    schema_sha256: str
    policy_sha256: str


@dataclass(frozen=True, slots=True)
class Shares:
    """One site's two shares, as another one holds them."""

    __pydantic_config__ = STRICT
    own_mask: str = field(repr=False)
    pair_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Advertised:
    """After the first step. The three secrets are hexadecimal: X25519 keys, and the secret of the own mask."""

    __pydantic_config__ = STRICT
    context: Context
    own: Advert
    channel: str = field(repr=False)
    mask: str = field(repr=False)
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Shared:
    """After the second: who takes part, and the site's own share of its secrets."""

    __pydantic_config__ = STRICT
    context: Context
    adverts: tuple[Advert, ...]
    kept: Shares
    channel: str = field(repr=False)
    mask: str = field(repr=False)
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Masked:
    """After the third: no secret of its own any more, only shares of everybody's; and by which identities the others
    are known to the end, for from here on the sum cannot be made anew on another roster."""

    __pydantic_config__ = STRICT
    context: Context
    shares: Mapping[str, Shares]
    identities: Mapping[str, Key32]


@dataclass(frozen=True, slots=True)
class Confirmed:
    """After the fourth: bound to one set of survivors."""

    __pydantic_config__ = STRICT
    context: Context
    shares: Mapping[str, Shares]
    identities: Mapping[str, Key32]
    survivors: Survivors


def advertise(
    member: Member, context: Context, held: Held, random_bytes: RandomBytes = os.urandom
) -> tuple[Advertised, Advert]:
    """Makes the keys of one sum.

    Raises:
        OrderRefused: the context is not one that this site may add its update under; see `check_context`.
    """
    check_context(member, context, held)
    channel, mask, secret = random_bytes(32), random_bytes(32), random_bytes(32)
    advert = Advert(
        member.name,
        context.id,
        public_key(channel).hex(),
        public_key(mask).hex(),
        commitment(secret, context.digest, member.name).hex(),
    )
    signed = _signed(member, advert)
    return Advertised(context, signed, channel.hex(), mask.hex(), secret.hex()), signed


def check_context(member: Member, context: Context, held: Held) -> None:
    """Raises OrderRefused unless a sum under `context` keeps this site's update from everybody, as its rules want."""
    where, n = f"secure sum of round {context.round}", len(context.cohort)
    if list(context.cohort) != sorted(set(context.cohort)) or member.name not in context.cohort:
        raise OrderRefused("COHORT_INVALID", f"{where}: its cohort is not a sorted list of sites with this one in it.")
    least = member.least
    if n < least or context.least_cohort < least:
        raise OrderRefused(
            "COHORT_SMALL",
            f"{where}: may be made of {min(n, context.least_cohort)} sites, this site wants at least {least}. "
            f"Wait for more sites.",
        )
    _check_partners(member, context, context.cohort, least)
    if not 2 * n < 3 * context.threshold <= 3 * n:
        raise OrderRefused(
            "THRESHOLD_SMALL",
            f"{where}: a threshold of {context.threshold} for {n} sites; above two thirds and up to all is allowed.",
        )
    _check_strangers(member, context, context.cohort)
    _check_roster(context, member)
    if strangers := [site for site in context.cohort if site not in member.roster.sites]:
        raise OrderRefused("NOT_ON_ROSTER", f"{where}: {strangers[0]!r} is not on the roster of the federation.")
    if context.model_sha256 != held.model_sha256:
        raise OrderRefused("MODEL_MISMATCH", f"{where}: is about other weights than this site was sent.")
    if context.schema_sha256 != held.schema_sha256:
        raise OrderRefused("SCHEMA_MISMATCH", f"{where}: is about another network than the study's.")
    if context.policy_sha256 != held.policy_sha256:
        raise OrderRefused("POLICY_MISMATCH", f"{where}: is about another study than the one approved here.")
    if problem := context.encoding.problem:
        raise OrderRefused("ENCODING_UNSAFE", f"{where}: {problem}.")


def share(
    state: Advertised, member: Member, message: Adverts, random_bytes: RandomBytes = os.urandom
) -> tuple[Shared, Sealed]:
    """Shares out the secrets among the sites whose adverts have come.

    Raises:
        OrderRefused: an advert that its site has not signed for this very context, twice, of no member, or too few.
    """
    context, where = state.context, f"secure sum of round {state.context.round}"
    _same(context, message.context)
    _check_roster(context, member)
    adverts = {advert.site: advert for advert in message.adverts}
    if len(adverts) < len(message.adverts):
        raise OrderRefused("KEYS_DOUBLED", f"{where}: a site has two sets of keys.")
    for site, advert in adverts.items():
        if site not in context.cohort or site not in member.roster.sites:
            raise OrderRefused("NOT_ON_ROSTER", f"{where}: keys of {site!r}, which is not in the cohort.")
        if advert.context != context.id:
            raise OrderRefused("CONTEXT_SPLIT", f"{where}: {site!r} was told another context than this site.")
        identity = bytes.fromhex(member.roster.sites[site])
        if not verify(identity, bytes.fromhex(advert.signature), ADVERT, advert_statement(advert)):
            raise OrderRefused("KEYS_FORGED", f"{where}: the keys of {site!r} are not signed by it.")
        if any(is_weak(bytes.fromhex(key)) for key in (advert.channel, advert.mask)):
            raise OrderRefused("KEYS_WEAK", f"{where}: the keys of {site!r} would give all sites one secret.")
    if adverts.get(member.name) != state.own:
        raise OrderRefused("KEYS_FORGED", f"{where}: this site's own keys are not among those passed on.")
    if len(adverts) < context.fewest:
        raise OrderRefused("COHORT_SMALL", f"{where}: {len(adverts)} sites take part, {context.fewest} are needed.")
    _check_partners(member, context, adverts, member.least)
    _check_strangers(member, context, adverts)
    places = [context.place(site) for site in sorted(adverts)]
    own_mask = split(bytes.fromhex(state.secret), context.threshold, places, random_bytes)
    pair_key = split(bytes.fromhex(state.mask), context.threshold, places, random_bytes)
    boxes = {}
    dealt = {
        site: dealt_digests(own_mask[at], pair_key[at], context.digest, member.name, site)
        for site, at in zip(sorted(adverts), places, strict=True)
    }
    for site in sorted(adverts.keys() - {member.name}):
        place = context.place(site)
        key = _channel(state, member.name, adverts[site])
        about = about_shares(context.digest, member.name, site)
        boxes[site] = seal(key, own_mask[place] + pair_key[place], about, random_bytes).hex()
    here = context.place(member.name)
    kept = Shares(own_mask[here].hex(), pair_key[here].hex())
    listed = tuple(adverts[site] for site in sorted(adverts))
    shared = Shared(context, listed, kept, state.channel, state.mask, state.secret)
    return shared, Sealed(member.name, context.id, boxes, dealt)


def mask(state: Shared, member: Member, inbox: Inbox) -> tuple[Masked, Masks]:
    """Opens the others' shares; the masks are for this site's vector, and for nothing else ever.

    Raises:
        OrderRefused: a box that does not open or holds other shares than its site says (`SHARE_FORGED`, which accuses
            it), one of a site that has sent no keys, or too few of them.
    """
    context, where = state.context, f"secure sum of round {state.context.round}"
    _same(context, inbox.context)
    _check_roster(context, member)
    adverts = {advert.site: advert for advert in state.adverts}
    if strangers := inbox.boxes.keys() - (adverts.keys() - {member.name}):
        raise OrderRefused("NOT_ON_ROSTER", f"{where}: shares of {min(strangers)!r}, which has sent no keys.")
    if len(inbox.boxes) + 1 < context.fewest:
        raise OrderRefused(
            "COHORT_SMALL", f"{where}: {len(inbox.boxes) + 1} sites have shared, {context.fewest} are needed."
        )
    _check_partners(member, context, (member.name, *inbox.boxes), member.least)
    shares = {member.name: state.kept}
    keys = [(self_mask_key(bytes.fromhex(state.secret), context.digest, member.name), +1)]
    for site in sorted(inbox.boxes):
        about = about_shares(context.digest, site, member.name)
        try:
            opened = unseal(_channel(state, member.name, adverts[site]), bytes.fromhex(inbox.boxes[site]), about)
        except ValueError:
            words = f"{where}: the shares from {site!r} were changed on their way."
            raise OrderRefused("SHARE_FORGED", words, accused=site) from None
        own_mask, pair_key = opened[:SHARE_BYTES], opened[SHARE_BYTES:]
        if dealt_digests(own_mask, pair_key, context.digest, site, member.name) != inbox.dealt.get(site):
            words = f"{where}: the shares from {site!r} are not those that it says it has dealt."
            raise OrderRefused("SHARE_FORGED", words, accused=site)
        shares[site] = Shares(own_mask.hex(), pair_key.hex())
        pair = pair_mask_key(
            bytes.fromhex(state.mask), bytes.fromhex(adverts[site].mask), context.digest, member.name, site
        )
        keys.append((pair, +1 if member.name < site else -1))
    return Masked(context, shares, {site: member.roster.sites[site] for site in shares}), Masks(keys)


def confirm(state: Masked, member: Member, survivors: Survivors) -> tuple[Confirmed, Confirmation]:
    """Signs one set of survivors.

    Raises:
        OrderRefused: too few, one that has not shared its secrets, or without this site.
    """
    context, where = state.context, f"secure sum of round {state.context.round}"
    _same(context, survivors.context)
    sites = set(survivors.sites)
    if list(survivors.sites) != sorted(sites) or not sites <= state.shares.keys() or member.name not in sites:
        raise OrderRefused(
            "SURVIVORS_INVALID", f"{where}: the survivors are not of those who took part with this site."
        )
    if len(sites) < context.fewest:
        raise OrderRefused(
            "SURVIVORS_FEW", f"{where}: {len(sites)} sites are left, {context.fewest} are needed. Nothing is revealed."
        )
    _check_partners(member, context, sites, max(member.least, _most(member, context)))
    confirmed = Confirmed(context, state.shares, state.identities, survivors)
    return confirmed, confirmation(confirmed, member)


def confirmation(state: Confirmed, member: Member) -> Confirmation:
    """The site's signature under the survivors that it has agreed to: Ed25519, the same each time."""
    signature = sign(member.identity_key, SURVIVORS, survivors_statement(state.survivors))
    return Confirmation(member.name, state.context.id, signature.hex())


def unmask(state: Confirmed, member: Member, confirmations: Confirmations) -> Revealed:
    """Gives out the shares of the survivors' own masks and of the lost sites' keys: what the sum needs, and no more.

    Raises:
        OrderRefused: fewer than the threshold have confirmed the same survivors, or one has not signed just these.
    """
    context, where = state.context, f"secure sum of round {state.context.round}"
    _same(context, confirmations.context)
    for site, signature in confirmations.signatures.items():
        if site not in state.survivors.sites:
            raise OrderRefused("CONFIRMATION_FORGED", f"{where}: {site!r} is no survivor and has confirmed.")
        identity, statement = bytes.fromhex(state.identities[site]), survivors_statement(state.survivors)
        if not verify(identity, bytes.fromhex(signature), SURVIVORS, statement):
            raise OrderRefused("SURVIVORS_SPLIT", f"{where}: {site!r} has confirmed other survivors than this site.")
    if len(confirmations.signatures) < context.threshold:
        raise OrderRefused(
            "CONFIRMATIONS_FEW",
            f"{where}: {len(confirmations.signatures)} sites have confirmed, {context.threshold} are needed.",
        )
    _check_partners(member, context, confirmations.signatures, _most(member, context))
    survivors = set(state.survivors.sites)
    own_masks = {site: kept.own_mask for site, kept in state.shares.items() if site in survivors}
    pair_keys = {site: kept.pair_key for site, kept in state.shares.items() if site not in survivors}
    return Revealed(member.name, context.id, own_masks, pair_keys)


def _most(member: Member, context: Context) -> int:
    """How many of the cohort's partners must mean the same sum: above two thirds, so that two sums have one in both."""
    return least_threshold(len(member.counted(context.cohort)))


def _check_partners(member: Member, context: Context, sites: Iterable[str], needed: int) -> None:
    """Raises OrderRefused, `PARTNERS_FEW`, unless so many of `sites` are those that this site has named."""
    there = member.counted(sites)
    if member.partners is not None and len(there) < needed:
        raise OrderRefused(
            "PARTNERS_FEW",
            f"secure sum of round {context.round}: {len(there)} of its sites are partners of this one or itself, "
            f"{needed} are needed. They are named under [policy] partners in site.toml; `fedclient partners` says "
            f"which of them count.",
        )


def _check_strangers(member: Member, context: Context, sites: Iterable[str]) -> None:
    """Raises OrderRefused, `STRANGERS_MANY`, unless the threshold is out of reach of those who may collude.

    They are everybody whom this site has not named, and of its partners as many as `least_threshold` does without. With
    c of them among n sites no two sums come of one update while 2 * threshold > n + c (Bonawitz et al. 2017, section
    6.2, against a coordinator that lies), whatever rules the partners have; so neither do c alone hold enough shares.
    """
    listed = set(sites)
    partners = member.counted(listed)
    if 2 * (len(listed) - context.threshold) >= least_threshold(len(partners)):
        raise OrderRefused(
            "STRANGERS_MANY",
            f"secure sum of round {context.round}: {len(listed) - len(partners)} of its {len(listed)} sites are no "
            f"partners of this one, and could open its update with a threshold of {context.threshold}. Name those that "
            f"are hospitals under [policy] partners in site.toml, or ask for a study with a larger "
            f"protect.secure_aggregation.threshold.",
        )


def _signed(member: Member, advert: Advert) -> Advert:
    signature = sign(member.identity_key, ADVERT, advert_statement(advert))
    return Advert(advert.site, advert.context, advert.channel, advert.mask, advert.commitment, signature.hex())


def _channel(state: Advertised | Shared, name: str, other: Advert) -> bytes:
    return channel_key(
        bytes.fromhex(state.channel), bytes.fromhex(other.channel), state.context.digest, name, other.site
    )


def _check_roster(context: Context, member: Member) -> None:
    """Nothing is masked for a sum on another roster than the newest that this site has seen."""
    if context.roster_sha256 != member.roster.sha256:
        raise OrderRefused(
            "ROSTER_MISMATCH",
            f"secure sum of round {context.round}: is about another roster than epoch {member.roster.epoch}.",
        )


def _same(context: Context, told: str) -> None:
    if told != context.id:
        raise OrderRefused("CONTEXT_SPLIT", f"secure sum of round {context.round}: a message is about another context.")
