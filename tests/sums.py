"""A federation for secure sums in memory: sites and a coordinator that hand each other messages as they travel."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedclient import secagg
from fedclient.secagg import Advertised, Confirmed, Held, Masked, Member, RandomBytes, Shared
from fedclient.sums import masked
from fedserver.secagg import SecureSum, SecureTotal
from shared_models.identity import identity_public_key
from shared_models.parse import parse_json
from shared_models.protect.context import Context, least_threshold
from shared_models.protect.messages import write
from shared_models.protect.prg import derive
from shared_models.protect.ring import Layout, bytes_of, encoding
from shared_models.roster import Roster
from shared_models.weights import Arrays, InMemory, schema_of

MODEL: Arrays = {"conv.weight": np.zeros((3, 5), np.float32), "conv.bias": np.zeros(3, np.float32)}
HELD_MODEL, POLICY = "a" * 64, "b" * 64


@cache
def identity(site: str) -> bytes:
    """A site's Ed25519 key (PEM), the same in all tests."""
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(site.encode()).digest())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def fixed_bytes(*words: object) -> RandomBytes:
    """Bytes that are a function of `words` and of how many were asked for before, for known answers."""
    drawn = 0

    def draw(size: int) -> bytes:
        nonlocal drawn
        drawn += 1
        seed = hashlib.sha256(repr((words, drawn)).encode()).digest()
        return b"".join(derive(seed, bytes([i])) for i in range(-(-size // 32)))[:size]

    return draw


@dataclass
class Party:
    """One simulated site: its member, its delta, and the state of its sum."""

    member: Member
    delta: Arrays
    weight: int
    counts: Mapping[str, int]
    state: object = None
    random_bytes: RandomBytes = os.urandom


@dataclass
class Federation:
    """`sites` sites, whose messages `tamper` may change by the name of their step: (sender or receiver, message)."""

    context: Context
    roster: Roster
    layout: Layout
    parties: dict[str, Party]
    tamper: dict[str, Callable[[str, Any], Any]] = field(default_factory=dict)
    lost_at: Mapping[str, float] = field(default_factory=dict)  # site -> first step that it does not answer
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    server: SecureSum = field(init=False)

    def __post_init__(self) -> None:
        self.server = SecureSum(self.context, self.roster, self.layout)

    def alive(self, step: float, sites: Iterable[str]) -> list[str]:
        return [site for site in sites if self.lost_at.get(site, 99) > step]

    def changed(self, step: str, site: str, message: Any) -> Any:
        """`message` as it arrives: by way of its bytes, and through whoever tampers with it."""
        if step in self.tamper:
            message = self.tamper[step](site, message)
        return parse_json(type(message), write(message), step)

    def run(self) -> SecureTotal:
        """The whole protocol; raises what a site or the coordinator refuses."""
        server, context = self.server, self.context
        for site in self.alive(1, self.parties):
            party = self.parties[site]
            told = self.tamper["context"](site, context) if "context" in self.tamper else context
            held = Held(told.model_sha256, self.layout.sha256, POLICY)
            party.state, advert = secagg.advertise(party.member, told, held, party.random_bytes)
            if (
                advert.context != context.id
            ):  # a coordinator that tells sites different things passes it on all the same
                server._adverts[site] = advert
            else:
                server.take_advert(self.changed("advert", site, advert))
        adverts = server.close_adverts()
        for site in self.alive(2, server._adverts):
            party = self.parties[site]
            assert isinstance(party.state, Advertised)
            told_adverts = self.changed("adverts", site, adverts)
            party.state, sealed = secagg.share(party.state, party.member, told_adverts, party.random_bytes)
            server.take_sealed(self.changed("sealed", site, sealed))
        inboxes = server.close_sealed()
        for site in self.alive(3, inboxes):
            party = self.parties[site]
            assert isinstance(party.state, Shared)
            inbox = self.changed("inbox", site, inboxes[site])
            party.state, masks = secagg.mask(party.state, party.member, inbox)
            blocks = masked(InMemory(party.delta), party.weight, party.counts, self.layout, context, masks)
            vector = np.concatenate([block.copy() for block in blocks])
            self.vectors[site] = vector = self.tamper["vector"](site, vector) if "vector" in self.tamper else vector
            if self.lost_at.get(site, 99) > 3.5:  # masked, and lost before the vector was there
                server.take_vector(site, bytes_of(self.layout, context.ring_bits), [vector[:7], vector[7:]])
        survivors = server.close_vectors()
        for site in self.alive(4, survivors.sites):
            party = self.parties[site]
            assert isinstance(party.state, Masked)
            told_survivors = self.changed("survivors", site, survivors)
            party.state, confirmation = secagg.confirm(party.state, party.member, told_survivors)
            if told_survivors == survivors:
                server.take_confirmation(self.changed("confirmation", site, confirmation))
            else:
                server._signatures[site] = confirmation.signature
        confirmations = server.close_confirmations()
        for site in self.alive(5, confirmations.signatures):
            party = self.parties[site]
            assert isinstance(party.state, Confirmed)
            told_confirmations = self.changed("confirmations", site, confirmations)
            revealed = secagg.unmask(party.state, party.member, told_confirmations)
            server.take_revealed(self.changed("revealed", site, revealed))
        return server.finish()


def names(sites: int) -> list[str]:
    return [f"site-{i:02}" for i in range(sites)]


def federation(
    sites: int = 5,
    bits: int = 32,
    clip: float = 1.0,
    model: Arrays = MODEL,
    seed: int = 0,
    fixed: bool = False,
    **changes: Any,
) -> Federation:
    """Sites with random deltas of deviation 0.1, weights 10, 11, ... and a count of cases of 100, 101, ..."""
    listed = names(sites)
    roster = Roster("test", 1, {s: identity_public_key(identity(s)).hex() for s in listed})
    layout = Layout(schema_of(model), ("cases",))
    how, draw = encoding(clip, bits), np.random.default_rng(seed)
    parties = {}
    for i, site in enumerate(listed):
        delta = {n: (draw.standard_normal(a.shape) * 0.1).astype(np.float32) for n, a in model.items()}
        random_bytes = {"random_bytes": fixed_bytes(seed, site)} if fixed else {}
        parties[site] = Party(Member(site, identity(site), roster), delta, 10 + i, {"cases": 100 + i}, **random_bytes)
    context = Context(
        run="run", round=1, attempt=1, cohort=tuple(listed), threshold=least_threshold(sites), least_cohort=3,
        roster_sha256=roster.sha256, model_sha256=HELD_MODEL, schema_sha256=layout.sha256, policy_sha256=POLICY,
        whole=sum(p.weight for p in parties.values()), clip=how.clip, scale=how.scale,
        ring_bits=32 if bits == 32 else 24,
    )  # fmt: skip
    return Federation(replace(context, **changes), roster, layout, parties)


def plain_mean(made: Federation, sites: Iterable[str]) -> dict[str, np.ndarray]:
    """The weighted mean of the clipped deltas of `sites`, in float64."""
    parties = [made.parties[site] for site in sites]
    whole, clip = sum(p.weight for p in parties), made.context.clip
    return {
        name: np.sum([np.clip(p.delta[name].astype(np.float64), -clip, clip) * p.weight for p in parties], axis=0)
        / whole
        for name in made.layout.schema
    }
