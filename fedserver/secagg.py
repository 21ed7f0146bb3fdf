"""The coordinator's side of a secure sum (sfl-secagg/1): it adds masked vectors, and learns their sum and no more.

It passes keys and shares on, and is freed of the masks only when enough sites have confirmed that they all mean the
same sum. It holds one accumulator, whatever the number of sites: each vector is added as it arrives, block by block.
What a site sends is doubted by itself, so that one bad answer costs that site's update and no other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import SumAborted, UpdateRejected
from shared_models.identity import verify
from shared_models.parse import STRICT, SiteName
from shared_models.protect.context import Context
from shared_models.protect.masking import (
    commitment,
    is_weak,
    pair_mask_key,
    public_key,
    self_mask_key,
    share_digest,
)
from shared_models.protect.messages import (
    ADVERT,
    SURVIVORS,
    Advert,
    Adverts,
    Confirmation,
    Confirmations,
    Dealt,
    Inbox,
    Revealed,
    Sealed,
    Survivors,
    advert_statement,
    survivors_statement,
)
from shared_models.protect.prg import CHUNK, Masks
from shared_models.protect.ring import Layout, bytes_of, mean_of, read_tail, unpacked
from shared_models.protect.shamir import combine
from shared_models.roster import Roster
from shared_models.weights import Schema

STEPS = ("adverts", "sealed", "vectors", "confirmations", "revealed", "done")
Octets = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SecureTotal:
    """The sum of a round, freed of its masks: what `shared_models.update.Total` is to plain updates.

    Attributes:
        weight: of the sites in the sum.
        counts: sums over the sites, by name; `clipped` and `weight` are among them.
    """

    context: Context
    layout: Layout
    vector: NDArray[np.uint32] = field(repr=False)
    sites: tuple[str, ...]
    counts: Mapping[str, int]

    @property
    def schema(self) -> Schema:
        return self.layout.schema

    @property
    def weight(self) -> int:
        return self.counts["weight"]

    def take_mean(self, name: str) -> NDArray[np.float64]:
        """The weighted mean of one tensor over the sites in the sum."""
        share = self.weight / self.context.whole
        return mean_of(self.vector, self.layout, self.context.encoding, name, share)


@dataclass(frozen=True, slots=True)
class Gathered:
    """A sum whose vectors are all there, but for their sum itself: enough to end it after a restart. No secret is in
    it; the sites of `dealt` have shared their secrets, the vectors of `added` are in the sum."""

    __pydantic_config__ = STRICT
    context: Context
    roster: Roster
    adverts: tuple[Advert, ...]
    dealt: Mapping[SiteName, Mapping[SiteName, Dealt]]
    added: tuple[SiteName, ...]


class SecureSum:
    """One secure sum at the coordinator: `take_...` for each site's answer, `close_...` to go on to the next step.

    Every `take` raises UpdateRejected for an answer that is not what its site must send now; every `close` raises
    SumAborted when too few have answered. After an abort nothing is revealed, and another attempt is another sum.
    """

    def __init__(self, context: Context, roster: Roster, layout: Layout) -> None:
        self.context, self.roster, self.layout = context, roster, layout
        self.step = STEPS[0]
        self._adverts: dict[str, Advert] = {}
        self._sealed: dict[str, Sealed] = {}
        self._added: set[str] = set()
        self._signatures: dict[str, str] = {}
        self._revealed: dict[str, Revealed] = {}
        self._survivors = Survivors(context.id, ())
        self._vector = np.zeros(0, np.uint32)

    def take_advert(self, advert: Advert) -> None:
        self._expect("adverts", advert.site, advert.context, self.context.cohort, self._adverts)
        identity = self.roster.sites.get(advert.site)
        if identity is None:
            raise self._rejected("NOT_ON_ROSTER", advert.site, "is not on the roster")
        if not verify(bytes.fromhex(identity), bytes.fromhex(advert.signature), ADVERT, advert_statement(advert)):
            raise self._rejected("KEYS_FORGED", advert.site, "its keys are not signed by it")
        if any(is_weak(bytes.fromhex(key)) for key in (advert.channel, advert.mask)):
            raise self._rejected("KEYS_WEAK", advert.site, "its keys are weak")
        self._adverts[advert.site] = advert

    def close_adverts(self) -> Adverts:
        self._advance("adverts", len(self._adverts))
        return Adverts(self.context.id, tuple(self._adverts[site] for site in sorted(self._adverts)))

    def take_sealed(self, sealed: Sealed) -> None:
        self._expect("sealed", sealed.site, sealed.context, self._adverts, self._sealed)
        if sealed.boxes.keys() != self._adverts.keys() - {sealed.site}:
            raise self._rejected("SHARES_MISSING", sealed.site, "has not sealed one box for each other site")
        if sealed.dealt.keys() != self._adverts.keys():
            raise self._rejected("SHARES_MISSING", sealed.site, "has not said what shares it has dealt to each site")
        self._sealed[sealed.site] = sealed

    def close_sealed(self) -> dict[str, Inbox]:
        """Site -> the boxes for it, of all sites that have shared their secrets."""
        self._advance("sealed", len(self._sealed))
        self._vector = np.zeros(self.layout.elements, np.uint32)
        return {
            site: Inbox(
                self.context.id,
                {o: s.boxes[site] for o, s in self._sealed.items() if o != site},
                {o: s.dealt[site] for o, s in self._sealed.items() if o != site},
            )
            for site in self._sealed
        }

    def take_vector(self, site: str, size_bytes: int, blocks: Iterable[Octets]) -> None:
        """Adds the masked vector of a site as it is read; blocks may be of any length.

        Raises:
            SumAborted: its end did not come, so that half of it is in the sum.
        """
        self._expect("vectors", site, self.context.id, self._sealed, self._added)
        if size_bytes != bytes_of(self.layout, self.context.ring_bits):
            raise self._rejected("UPDATE_SCHEMA", site, f"its vector has {size_bytes} bytes")
        at, begun = 0, False
        try:
            for elements in _elements(blocks, self.context.ring_bits):
                begun = True
                into = self._vector[at : at + elements.size]
                np.add(into, elements[: into.size], out=into)
                at += elements.size
        except Exception as error:
            if not begun:
                raise
            raise self._spoilt(site) from error
        if at != self._vector.size:
            raise self._spoilt(site)
        self._added.add(site)

    def close_vectors(self) -> Survivors:
        self._advance("vectors", len(self._added))
        self._survivors = Survivors(self.context.id, tuple(sorted(self._added)))
        return self._survivors

    @property
    def survivors(self) -> Survivors:
        """Whose vectors are in the sum, once no more is taken."""
        return self._survivors

    def gathered(self) -> tuple[Gathered, NDArray[np.uint32]]:
        """All that ends the sum in another process, which the sites answer as they would answer this one."""
        adverts = tuple(self._adverts[site] for site in sorted(self._adverts))
        dealt = {site: self._sealed[site].dealt for site in sorted(self._sealed)}
        facts = Gathered(self.context, self.roster, adverts, dealt, self._survivors.sites)
        return facts, self._vector

    @classmethod
    def resumed(cls, facts: Gathered, layout: Layout, vector: NDArray[np.uint32]) -> "SecureSum":
        """The sum that `gathered` was told of, with its survivors to be confirmed next."""
        made = cls(facts.context, facts.roster, layout)
        made.step = "confirmations"
        made._adverts = {advert.site: advert for advert in facts.adverts}
        made._sealed = {site: Sealed(site, facts.context.id, {}, dealt) for site, dealt in facts.dealt.items()}
        made._added = set(facts.added)
        made._survivors = Survivors(facts.context.id, facts.added)
        made._vector = vector
        return made

    def take_confirmation(self, confirmation: Confirmation) -> None:
        site = confirmation.site
        self._expect("confirmations", site, confirmation.context, self._survivors.sites, self._signatures)
        identity, statement = bytes.fromhex(self.roster.sites[site]), survivors_statement(self._survivors)
        if not verify(identity, bytes.fromhex(confirmation.signature), SURVIVORS, statement):
            raise self._rejected("CONFIRMATION_FORGED", site, "has not signed the survivors that it was sent")
        self._signatures[site] = confirmation.signature

    def close_confirmations(self) -> Confirmations:
        self._advance("confirmations", len(self._signatures))
        return self.confirmations

    @property
    def confirmations(self) -> Confirmations:
        """Who has confirmed the survivors, once no more is taken."""
        return Confirmations(self.context.id, dict(sorted(self._signatures.items())))

    def confirmed(self, told: Confirmations) -> None:
        """Goes on, after a restart, with the confirmations that the sites may have been sent already."""
        self._signatures = dict(told.signatures)
        self._advance("confirmations", len(self._signatures))

    def take_revealed(self, revealed: Revealed) -> None:
        self._expect("revealed", revealed.site, revealed.context, self._signatures, self._revealed)
        lost = self._sealed.keys() - self._added
        if revealed.own_masks.keys() != self._added or revealed.pair_keys.keys() != lost:
            raise self._rejected("SHARES_MISSING", revealed.site, "has not sent the shares that the sum needs")
        self._revealed[revealed.site] = revealed

    def finish(self) -> SecureTotal:
        """Takes the masks away and reads the sum.

        Raises:
            SumAborted: too few shares, a site that has lied with its own, or something else left in the sum: it is
                thrown away.
        """
        self._advance("revealed", len(self._revealed))
        Masks(list(self._masks())).apply(self._vector)
        tail = read_tail(self._vector, self.layout, self.context.ring_bits, self.context.canary)
        if tail.sites != len(self._added) or not 0 < tail.counts["weight"] <= self.context.whole:
            raise SumAborted(
                "SUM_MASK_RESIDUE",
                f"{self._where}: masks were left in it, so one of {', '.join(self._survivors.sites)} has sent another "
                f"vector than agreed. Which one, a sum does not show.",
            )
        return SecureTotal(self.context, self.layout, self._vector, self._survivors.sites, tail.counts)

    def _masks(self) -> Iterator[tuple[bytes, int]]:
        """What is still in the sum, with the sign that takes it away."""
        context = self.context
        for site in sorted(self._added):
            shares = {name: revealed.own_masks[site] for name, revealed in self._revealed.items()}
            committed = partial(commitment, context=context.digest, site=site)
            secret = self._combined(site, shares, "own mask", committed, self._adverts[site].commitment)
            yield self_mask_key(secret, context.digest, site), -1
        for lost in sorted(self._sealed.keys() - self._added):
            shares = {name: revealed.pair_keys[lost] for name, revealed in self._revealed.items()}
            private = self._combined(lost, shares, "pair key", public_key, self._adverts[lost].mask)
            for site in sorted(self._added):
                public = bytes.fromhex(self._adverts[site].mask)
                yield pair_mask_key(private, public, context.digest, lost, site), -1 if site < lost else +1

    def _combined(
        self, site: str, shares: Mapping[str, str], kind: str, public: Callable[[bytes], bytes], known: str
    ) -> bytes:
        """The secret of `site` whose `public` side is `known`, from the shares that are as it has dealt them."""
        place = {"own mask": 0, "pair key": 1}[kind] * 64
        said = {name: dealt[place : place + 64] for name, dealt in self._sealed[site].dealt.items()}
        opened = {name: bytes.fromhex(share) for name, share in shares.items()}
        digest = partial(share_digest, context=self.context.digest, source=site, kind=kind)
        forged = sorted(name for name, share in opened.items() if digest(share, destination=name) != said[name])
        sound = sorted(opened.keys() - set(forged))[: self.context.threshold]
        if len(sound) < self.context.threshold:
            raise self._lied("SHARE_FORGED", forged, f"gave out other shares of {site!r} than they had been dealt")
        with suppress(ValueError):
            secret = combine({self.context.place(name): opened[name] for name in sound})
            if public(secret).hex() == known:
                return secret
        raise self._lied("DEAL_FORGED", [site], "dealt shares of another secret than it had committed to")

    def _lied(self, code: str, culprits: Sequence[str], what: str) -> SumAborted:
        self.step = "done"
        named = " and ".join(map(repr, culprits))
        return SumAborted(code, f"{self._where}: {named} {what}.", tuple(culprits))

    @property
    def _where(self) -> str:
        return f"secure sum of round {self.context.round}, attempt {self.context.attempt}"

    def _expect(self, step: str, site: str, context: str, of: Iterable[str], done: Iterable[str]) -> None:
        if step != self.step:
            raise self._rejected("STEP_OUT_OF_ORDER", site, f"answers {step!r} while {self.step!r} is asked")
        if context != self.context.id:
            raise self._rejected("OTHER_CONTEXT", site, "answers another secure sum")
        if site not in of:
            raise self._rejected("NOT_ASKED", site, f"does not take part in {step!r}")
        if site in done:
            raise self._rejected("ANSWERED_TWICE", site, f"has answered {step!r} already")

    def _advance(self, step: str, answered: int) -> None:
        if step != self.step:
            raise SumAborted("STEP_OUT_OF_ORDER", f"{self._where}: is at {self.step!r}, not at {step!r}.")
        needed = self.context.threshold if step in ("confirmations", "revealed") else self.context.fewest
        if answered < needed:
            self.step = "done"
            raise SumAborted(
                "SUM_BELOW_THRESHOLD",
                f"{self._where}: {answered} sites answered {step!r}, {needed} are needed. "
                f"Nothing was revealed; try again when more sites are there.",
            )
        self.step = STEPS[STEPS.index(step) + 1]

    def _rejected(self, code: str, site: str, what: str) -> UpdateRejected:
        return UpdateRejected(code, f"{self._where}, site {site!r}: {what}. It was left out.")

    def _spoilt(self, site: str) -> SumAborted:
        self.step = "done"
        return SumAborted("SUM_SPOILT", f"{self._where}: the vector of {site!r} broke off. Try the round again.")


def _elements(blocks: Iterable[Octets], bits: int) -> Iterator[NDArray[np.uint32]]:
    """Blocks of bytes as elements; an element that two blocks share is put together."""
    width, left = bits // 8, np.zeros(0, np.uint8)
    for block in blocks:
        joined = np.concatenate([left, block]) if left.size else block
        whole = joined.size - joined.size % width
        left = joined[whole:].copy()
        for at in range(0, whole, width * CHUNK):
            yield unpacked(joined[at : min(at + width * CHUNK, whole)], bits)
    if left.size:
        raise ValueError("a vector ends within an element")
