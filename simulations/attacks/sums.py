"""A secure sum of given updates by the real code of sites and coordinator, and every byte that the coordinator sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedclient import secagg
from fedclient.secagg import Held, Member
from fedclient.sums import masked
from fedserver.secagg import SecureSum, SecureTotal
from shared_models.identity import identity_public_key, new_site_keys
from shared_models.protect.context import Context
from shared_models.protect.messages import Revealed, write
from shared_models.protect.prg import Masks
from shared_models.protect.ring import Layout, bytes_of, encoding, signed, unpacked
from shared_models.protect.secure import SecureAggregation, threshold_of
from shared_models.roster import Roster
from shared_models.weights import Arrays, InMemory, schema_of

NOWHERE = "0" * 64  # digests of a study and weights that play no part here


@dataclass(frozen=True, slots=True)
class Transcript:
    """All that the coordinator receives of one secure sum.

    Attributes:
        vectors: site -> uint8[bytes], as it came.
        messages: everything else, in order, as it travels.
    """

    context: Context
    layout: Layout
    vectors: Mapping[str, NDArray[np.uint8]]
    messages: Sequence[bytes]
    revealed: Sequence[Revealed]
    total: SecureTotal = field(repr=False)

    def elements(self, site: str) -> NDArray[np.uint32]:
        """The tensors of one site's vector, as elements of the ring."""
        return unpacked(self.vectors[site], self.context.ring_bits)[: self.layout.tail]

    def read_as_plain(self, site: str) -> dict[str, NDArray[np.float64]]:
        """What a site's tensors would be if its vector were not masked."""
        return read_elements(self.elements(site), self.context, self.layout)

    def without_masks(self, delta: Arrays) -> dict[str, NDArray[np.float64]]:
        """What would be read if a site that sends `delta` left its masks out."""
        told = dict.fromkeys(self.layout.counts, 0)
        blocks = masked(InMemory(delta), 1, told, self.layout, self.context, Masks([]))
        sent = np.concatenate([block.copy() for block in blocks])
        return read_elements(unpacked(sent, self.context.ring_bits)[: self.layout.tail], self.context, self.layout)


def read_elements(elements: NDArray[np.uint32], context: Context, layout: Layout) -> dict[str, NDArray[np.float64]]:
    """Elements of the ring as tensors, each a site's share of the mean."""
    whole = signed(elements, context.ring_bits).astype(np.float64) / context.scale
    return {n: whole[a:b].reshape(layout.schema[n].shape) for n, (a, b) in layout.places.items()}


def secure_sum(
    deltas: Mapping[str, Arrays],
    clip: float,
    counts: Mapping[str, Mapping[str, int]] | None = None,
    table: SecureAggregation | None = None,
) -> Transcript:
    """Carries out the whole protocol for `deltas`, by site; all weigh the same.

    Args:
        table: of the study, whose ring and threshold are those of the sum; left out, the defaults.
    """
    sites = tuple(sorted(deltas))
    told = counts or {site: {} for site in sites}
    keys = {site: new_site_keys().identity for site in sites}
    roster = Roster("attack", 1, {site: identity_public_key(key).hex() for site, key in keys.items()})
    layout = Layout(schema_of(deltas[sites[0]]), tuple(sorted(told[sites[0]])))
    asked = table or SecureAggregation()
    how = encoding(clip, asked.ring_bits)
    context = Context(
        run="attack", round=1, attempt=1, cohort=sites, threshold=threshold_of(asked, len(sites)), least_cohort=3,
        roster_sha256=roster.sha256, model_sha256=NOWHERE, schema_sha256=layout.sha256, policy_sha256=NOWHERE,
        whole=len(sites), clip=how.clip, scale=how.scale, ring_bits=asked.ring_bits,
    )  # fmt: skip
    members = {site: Member(site, keys[site], roster) for site in sites}
    held, server = Held(NOWHERE, layout.sha256, NOWHERE), SecureSum(context, roster, layout)
    heard: list[bytes] = []
    begun = {site: secagg.advertise(member, context, held) for site, member in members.items()}
    for _, advert in begun.values():
        heard.append(write(advert))
        server.take_advert(advert)
    adverts = server.close_adverts()
    shared = {site: secagg.share(begun[site][0], members[site], adverts) for site in sites}
    for _, sealed in shared.values():
        heard.append(write(sealed))
        server.take_sealed(sealed)
    inboxes, vectors, masks = server.close_sealed(), dict[str, NDArray[np.uint8]](), dict[str, secagg.Masked]()
    for site in sites:
        masks[site], keystreams = secagg.mask(shared[site][0], members[site], inboxes[site])
        blocks = masked(InMemory(deltas[site]), 1, told[site], layout, context, keystreams)
        vectors[site] = np.concatenate([block.copy() for block in blocks])
        server.take_vector(site, bytes_of(layout, context.ring_bits), [vectors[site]])
    survivors = server.close_vectors()
    confirmed = {site: secagg.confirm(masks[site], members[site], survivors) for site in sites}
    for _, confirmation in confirmed.values():
        heard.append(write(confirmation))
        server.take_confirmation(confirmation)
    confirmations, revealed = server.close_confirmations(), list[Revealed]()
    for site in sites:
        revealed.append(secagg.unmask(confirmed[site][0], members[site], confirmations))
        heard.append(write(revealed[-1]))
        server.take_revealed(revealed[-1])
    return Transcript(context, layout, vectors, heard, revealed, server.finish())


def mean_of(transcript: Transcript) -> dict[str, NDArray[np.float64]]:
    """What the coordinator is meant to learn: the mean delta."""
    return {name: transcript.total.take_mean(name) for name in transcript.layout.schema}
