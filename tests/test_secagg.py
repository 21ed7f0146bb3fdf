"""Secure sums: exact whatever sites are lost, nothing below the threshold, and every lie ends in its own refusal."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclient import secagg
from fedclient.secagg import Advertised, Masked
from shared_models.errors import OrderRefused, SumAborted, UpdateRejected
from shared_models.protect.context import least_threshold
from shared_models.protect.masking import commitment, public_key
from shared_models.protect.messages import Advert, Adverts, Confirmations, Survivors, write
from shared_models.protect.ring import encode, packed, unpacked
from shared_models.protect.shamir import combine
from shared_models.weights import InMemory
from tests.sums import Federation, federation, names, plain_mean


@st.composite
def losses(draw, beyond=False):
    """How many sites, and at which step which of them is lost: up to the limit, or one more."""
    sites = draw(st.integers(3, 12))
    most = sites - least_threshold(sites)
    lost = draw(st.permutations(names(sites)))[: most + 1 if beyond else draw(st.integers(0, most))]
    steps = st.sampled_from([1, 2, 3, 3.5, 4, 5])
    return sites, {site: draw(steps) for site in lost}


def in_the_sum(made: Federation) -> list[str]:
    return [site for site in made.parties if made.lost_at.get(site, 99) > 3.5]


@settings(max_examples=25, deadline=None)
@given(losses(), st.sampled_from([24, 32]))
def test_the_sum_is_exact_in_the_ring_and_the_mean_is_the_plain_one_whoever_is_lost(drawn, bits):
    sites, lost_at = drawn
    made = federation(sites, bits)
    made.lost_at = lost_at
    total = made.run()
    there = in_the_sum(made)
    assert list(total.sites) == there
    wanted = np.zeros(made.layout.elements, np.uint32)
    for site in there:
        p = made.parties[site]
        share = p.weight / made.context.whole
        rows = encode(InMemory(p.delta), share, p.weight, p.counts, made.layout, made.context.encoding,
                      made.context.canary)  # fmt: skip
        wanted += np.concatenate([block.copy() for block in rows])
    ring = np.uint32(2**bits - 1)
    np.testing.assert_array_equal(total.vector & ring, wanted & ring)
    for name, mean in plain_mean(made, there).items():
        np.testing.assert_allclose(total.take_mean(name), mean, atol=1e-6 if bits == 32 else 3e-6, rtol=0)
    weight = sum(made.parties[s].weight for s in there)
    assert total.counts == {
        "clipped": 0,
        "weight": weight,
        "cases": sum(made.parties[s].counts["cases"] for s in there),
    }


@settings(max_examples=12, deadline=None)
@given(losses(beyond=True))
def test_beyond_the_limit_the_sum_is_given_up_and_no_secret_was_revealed(drawn):
    sites, lost_at = drawn
    made = federation(sites)
    made.lost_at = lost_at
    with pytest.raises(SumAborted, match="Nothing was revealed") as aborted:
        made.run()
    assert aborted.value.code == "SUM_BELOW_THRESHOLD"
    assert len(made.server._revealed) < made.context.threshold


def test_a_masked_vector_looks_like_chance_to_whoever_does_not_know_the_masks():
    model = {"w": np.zeros(500_000, np.float32)}
    made = federation(3, model=model)
    made.run()
    vector = made.vectors["site-00"]
    ones = int(np.unpackbits(vector).sum())
    assert abs(ones - vector.size * 4) < 5 * np.sqrt(vector.size * 8) / 2  # five standard deviations
    found = np.bincount(vector, minlength=256)
    chi2 = float(((found - vector.size / 256) ** 2 / (vector.size / 256)).sum())
    assert 150 < chi2 < 400  # 255 degrees of freedom: mean 255, deviation 23
    nothing = InMemory({"w": made.parties["site-00"].delta["w"]})
    plain = np.concatenate([b.copy() for b in encode(nothing, 10 / 33, 10, {"cases": 100}, made.layout,
                                                     made.context.encoding, 0)]).view(np.uint8)  # fmt: skip
    assert np.unpackbits(plain).mean() < 0.499 or np.bincount(plain, minlength=256).max() > 2 * vector.size / 256


def test_no_byte_that_the_coordinator_gets_tells_a_sites_numbers():
    """Its keys, boxes and shares are JSON, its vector is masked: neither holds the vector, a count or the weight."""
    made = federation(4, model={"w": np.zeros(64, np.float32)})
    made.parties["site-02"].counts = {"cases": 0x7A3B}
    made.run()
    server, party = made.server, made.parties["site-02"]
    got = [write(m) for step in (server._adverts, server._sealed, server._revealed) for m in step.values()]
    stored = b"".join([*got, *(made.vectors[site].tobytes() for site in made.parties)])
    share = party.weight / made.context.whole
    plain = [block.copy() for block in encode(
        InMemory(party.delta), share, party.weight, party.counts, made.layout, made.context.encoding, 0
    )]  # fmt: skip
    for secret in (plain[0][:8].tobytes(), plain[1][:6].tobytes(), party.delta["w"][:4].tobytes()):
        assert secret not in stored
    assert not re.search(rb"(?<![0-9a-f])31291(?![0-9a-f])", stored)  # a key in hexadecimal may hold it by chance


def test_counts_weights_and_clipped_elements_are_known_of_the_sum_alone():
    made = federation(4, clip=0.05)
    total = made.run()
    over = [int((np.abs(d) > 0.05).sum()) for p in made.parties.values() for d in p.delta.values()]
    assert total.counts["clipped"] == sum(over) > 0
    for name, mean in plain_mean(made, made.parties).items():
        np.testing.assert_allclose(total.take_mean(name), mean, atol=1e-6, rtol=0)


def test_fifty_sites_with_sixteen_lost_give_the_plain_mean():
    made = federation(50)
    made.lost_at = {site: 3.5 for site in names(50)[5:21]}
    total = made.run()
    for name, mean in plain_mean(made, total.sites).items():
        np.testing.assert_allclose(total.take_mean(name), mean, atol=1e-6, rtol=0)


# What a coordinator tries


def refusal_of(made: Federation) -> str:
    with pytest.raises((OrderRefused, SumAborted, UpdateRejected)) as refused:
        made.run()
    return str(vars(refused.value)["code"])


def test_swapped_keys_are_refused_because_their_site_has_not_signed_them():
    def swap(site, adverts):
        own = public_key(bytes(range(32))).hex()
        changed = [replace(a, mask=own) if a.site == "site-02" else a for a in adverts.adverts]
        return Adverts(adverts.context, tuple(changed))

    made = federation()
    made.tamper["adverts"] = swap
    assert refusal_of(made) == "KEYS_FORGED"


def test_a_site_whose_keys_give_every_other_site_the_same_secret_is_left_out_and_refused():
    made = federation()
    member = made.parties["site-02"].member
    weak = secagg._signed(member, Advert("site-02", made.context.id, "0" * 64, "0" * 64, "0" * 64))
    with pytest.raises(UpdateRejected, match="its keys are weak"):
        made.server.take_advert(weak)
    made.tamper["adverts"] = lambda site, told: Adverts(
        told.context, tuple(weak if a.site == "site-02" else a for a in told.adverts)
    )
    assert refusal_of(made) == "KEYS_WEAK"


def test_keys_of_another_sum_are_refused():
    earlier = federation(attempt=1)
    earlier.run()
    old = {a.site: a for a in earlier.server._adverts.values()}

    def replay(site, adverts):
        return Adverts(adverts.context, tuple(old[a.site] if a.site == "site-02" else a for a in adverts.adverts))

    made = federation(attempt=2)
    made.tamper["adverts"] = replay
    assert refusal_of(made) == "CONTEXT_SPLIT"


def test_a_site_whose_keys_are_passed_on_twice_is_refused():
    made = federation()
    made.tamper["adverts"] = lambda site, a: Adverts(a.context, (*a.adverts, a.adverts[0]))
    assert refusal_of(made) == "KEYS_DOUBLED"


def test_a_site_that_the_cohort_does_not_have_is_refused():
    other = federation(6)
    stranger = secagg.advertise(
        other.parties["site-05"].member, other.context, secagg.Held("a" * 64, other.layout.sha256, "b" * 64)
    )[1]
    made = federation(5)
    made.tamper["adverts"] = lambda site, a: Adverts(a.context, (*a.adverts, stranger))
    assert refusal_of(made) == "NOT_ON_ROSTER"


def test_a_cohort_with_a_site_that_is_not_on_the_roster_is_refused():
    made = federation(5)
    made.context = replace(made.context, cohort=(*made.context.cohort, "stranger"), threshold=5)
    assert refusal_of(made) == "NOT_ON_ROSTER"


def test_forged_shares_are_refused():
    def forge(site, inbox):
        boxes = dict(inbox.boxes)
        first = min(boxes)
        boxes[first] = ("0" if boxes[first][60] != "0" else "1").join([boxes[first][:60], boxes[first][61:]])
        return replace(inbox, boxes=boxes)

    made = federation()
    made.tamper["inbox"] = forge
    assert refusal_of(made) == "SHARE_FORGED"


def test_shares_meant_for_another_site_are_refused():
    made = federation()

    def misdirect(site, sealed):
        boxes = dict(sealed.boxes)
        one, other = sorted(boxes)[:2]
        boxes[one], boxes[other] = boxes[other], boxes[one]
        return replace(sealed, boxes=boxes)

    made.tamper["sealed"] = misdirect
    assert refusal_of(made) == "SHARE_FORGED"


@pytest.mark.parametrize(
    "change", [{"model_sha256": "c" * 64}, {"attempt": 2}, {"clip": 0.5}, {"least_cohort": 4}, {"whole": 10**6}]
)
def test_a_site_that_was_told_another_context_than_the_others_is_found_out(change):
    made = federation()
    made.tamper["context"] = lambda site, context: replace(context, **change) if site == "site-03" else context
    assert refusal_of(made) == "CONTEXT_SPLIT"


def test_sites_that_were_told_different_cohorts_are_found_out():
    made = federation(6)
    part = tuple(names(5))
    made.tamper["context"] = lambda s, c: replace(c, cohort=part, threshold=4) if s == "site-00" else c
    assert refusal_of(made) == "CONTEXT_SPLIT"


def test_survivors_that_differ_between_sites_are_found_out_before_a_share_is_given():
    made = federation(7)
    fewer = tuple(names(7)[:6])
    made.tamper["survivors"] = lambda s, m: Survivors(m.context, fewer) if s in fewer[:3] else m
    assert refusal_of(made) == "SURVIVORS_SPLIT"
    assert not made.server._revealed


@pytest.mark.parametrize("chosen", [names(5)[1:], [*names(4), "stranger"], [*names(5), "site-00"]])
def test_survivors_without_the_site_itself_with_a_stranger_or_twice_the_same_are_refused(chosen):
    made = federation()
    made.tamper["survivors"] = lambda site, told: Survivors(told.context, tuple(chosen))
    assert refusal_of(made) == "SURVIVORS_INVALID"


def test_too_few_survivors_are_refused_by_the_site_itself():
    made = federation()
    made.tamper["survivors"] = lambda s, m: Survivors(m.context, tuple(names(3)))
    assert refusal_of(made) == "SURVIVORS_FEW"


def test_too_few_confirmations_are_refused_by_the_site_itself():
    made = federation()
    made.tamper["confirmations"] = lambda s, m: Confirmations(m.context, dict(list(m.signatures.items())[:3]))
    assert refusal_of(made) == "CONFIRMATIONS_FEW"


def test_a_confirmation_of_somebody_who_is_lost_is_refused():
    made = federation(7)
    made.lost_at = {"site-06": 3.5}
    made.tamper["confirmations"] = lambda s, m: Confirmations(m.context, {**m.signatures, "site-06": "0" * 128})
    assert refusal_of(made) == "CONFIRMATION_FORGED"


def test_of_no_site_both_shares_are_given():
    made = federation(7)
    made.lost_at = {"site-06": 3.5}
    made.run()
    for revealed in made.server._revealed.values():
        assert not revealed.own_masks.keys() & revealed.pair_keys.keys()
        assert revealed.pair_keys.keys() == {"site-06"}


@pytest.mark.parametrize(("sites", "threshold"), [(3, 2), (6, 4), (9, 6), (10, 6), (5, 6)])
def test_a_threshold_of_two_thirds_or_less_or_above_all_is_refused(sites, threshold):
    assert refusal_of(federation(sites, threshold=threshold)) == "THRESHOLD_SMALL"


def test_fewer_than_three_sites_or_than_the_site_wants_are_refused():
    assert refusal_of(federation(2, threshold=2)) == "COHORT_SMALL"
    assert refusal_of(federation(5, least_cohort=2)) == "COHORT_SMALL"
    made = federation(5)
    made.parties["site-00"].member = replace(made.parties["site-00"].member, least_cohort=4)
    assert refusal_of(made) == "COHORT_SMALL"


def with_partners(sites: int, *partners: str, **changes: Any) -> Federation:
    """A federation in which site-00 alone names with whom it sums."""
    made = federation(sites, **changes)
    made.parties["site-00"].member = replace(made.parties["site-00"].member, partners=frozenset(partners))
    return made


def test_sites_that_a_coordinator_has_made_up_fill_no_cohort():
    assert refusal_of(with_partners(9, "site-01", "elsewhere", threshold=8)) == "PARTNERS_FEW"
    assert with_partners(9, "site-01", "site-02", threshold=8).run().sites == tuple(names(9))


def test_of_partners_none_of_whom_counts_any_more_none_does():
    made = federation(5)
    made.parties["site-00"].member = replace(made.parties["site-00"].member, partners=frozenset())
    assert refusal_of(made) == "PARTNERS_FEW"


def opened_by(made: Federation, strangers: list[str]) -> bool:
    """Whether these sites alone can put together the secret of site-00's own mask, from what it has dealt them."""
    places = {made.context.place(s): s for s in strangers}
    states = {place: made.parties[site].state for place, site in places.items()}
    shares = {
        place: bytes.fromhex(state.shares["site-00"].own_mask)
        for place, state in states.items()
        if isinstance(state, Masked)
    }
    known = made.server._adverts["site-00"].commitment
    return commitment(combine(shares), made.context.digest, "site-00").hex() == known


def test_seven_made_up_sites_of_ten_open_no_update_of_a_site_that_names_its_partners():
    made_up = names(10)[3:]
    trusting = federation(10)  # a threshold of seven
    trusting.lost_at = dict.fromkeys(names(10), 4)
    with pytest.raises(SumAborted):
        trusting.run()
    assert opened_by(trusting, made_up)
    made = with_partners(10, "site-01", "site-02")
    assert refusal_of(made) == "STRANGERS_MANY"
    assert made.parties["site-00"].state is None  # refused before it had made a key


def test_no_secret_is_shared_out_once_partners_are_named_after_the_keys_were_made():
    made = federation(10)
    made.lost_at = dict.fromkeys(names(10), 2)
    with pytest.raises(SumAborted):
        made.run()
    chosen = with_partners(10, "site-01", "site-02").parties["site-00"].member
    adverts = Adverts(made.context.id, tuple(made.server._adverts.values()))
    state = made.parties["site-00"].state
    assert isinstance(state, Advertised)
    with pytest.raises(OrderRefused, match="7 of its 10 sites are no partners") as refused:
        secagg.share(state, chosen, adverts)
    assert refused.value.code == "STRANGERS_MANY"


@pytest.mark.parametrize(("partners", "threshold", "code"), [
    (9, 7, None),  # one stranger and two dishonest partners are three, which seven of ten bear
    (8, 7, "STRANGERS_MANY"),  # two and two are four
    (8, 8, None),
    (4, 8, "STRANGERS_MANY"),  # six and one
    (4, 9, None),
    (3, 9, None),
])  # fmt: skip
def test_a_threshold_bears_all_strangers_and_a_third_of_the_partners(partners, threshold, code):
    made = with_partners(10, *names(10)[1:partners], threshold=threshold)
    assert code is None or refusal_of(made) == code
    assert code is not None or made.run().sites == tuple(names(10))


@pytest.mark.parametrize("step", [1, 2, 3, 3.5])
def test_partners_that_are_lost_before_the_survivors_are_told_end_the_sum_though_others_are_left(step):
    made = with_partners(9, "site-01", "site-02", threshold=8)  # three of the eight are these
    made.lost_at = {"site-02": step}
    assert refusal_of(made) == "PARTNERS_FEW"
    made = with_partners(9, "site-01", "site-02", "site-03", threshold=8)  # of these four, three
    made.lost_at = {"site-02": step}
    assert "site-02" not in made.run().sites


def test_no_share_is_given_out_before_two_thirds_of_the_partners_mean_the_same_sum():
    """A made-up site signs whatever is wanted, and so helps to tell two halves of the others two sums."""
    made = with_partners(10, *names(9)[1:])
    made.lost_at = dict.fromkeys(names(4)[1:], 4)  # seven confirm, six of the nine partners among them
    assert refusal_of(made) == "PARTNERS_FEW"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"roster_sha256": "d" * 64}, "ROSTER_MISMATCH"),
        ({"schema_sha256": "d" * 64}, "SCHEMA_MISMATCH"),
        ({"policy_sha256": "d" * 64}, "POLICY_MISMATCH"),
        ({"scale": 2.0**32}, "ENCODING_UNSAFE"),
        ({"cohort": tuple(reversed(names(5)))}, "COHORT_INVALID"),
        ({"cohort": ("site-01", "site-02", "site-03"), "threshold": 3}, "COHORT_INVALID"),
    ],
)
def test_a_context_that_is_not_about_what_the_site_holds_is_refused(change, code):
    assert refusal_of(federation(**change)) == code


def test_a_context_about_other_weights_than_the_site_was_sent_is_refused():
    made = federation()
    member, held = made.parties["site-00"].member, secagg.Held("f" * 64, made.layout.sha256, "b" * 64)
    with pytest.raises(OrderRefused) as refused:
        secagg.advertise(member, made.context, held)
    assert refused.value.code == "MODEL_MISMATCH"


# What a site tries


def test_keys_that_a_site_has_not_signed_are_left_out_by_the_coordinator():
    made = federation()
    made.tamper["advert"] = lambda site, advert: replace(advert, mask="0" * 64)
    assert refusal_of(made) == "KEYS_FORGED"


def test_one_forged_share_is_got_round_where_more_sites_answer_than_are_needed():
    def forge(site, revealed):
        if site != "site-00":
            return revealed
        return replace(revealed, own_masks={s: "0" * 66 for s in revealed.own_masks})

    made = federation(5)  # four are needed, five answer
    made.tamper["revealed"] = forge
    total = made.run()
    np.testing.assert_allclose(total.take_mean("conv.bias"), plain_mean(made, made.parties)["conv.bias"], atol=1e-6)


def aborted(made: Federation) -> SumAborted:
    with pytest.raises(SumAborted) as found:
        made.run()
    return found.value


def test_too_many_forged_shares_end_the_sum_and_who_forged_them_is_named():
    made = federation(5)  # four are needed
    liars = ("site-01", "site-03")
    made.tamper["revealed"] = lambda s, r: replace(r, own_masks={n: "0" * 66 for n in r.own_masks}) if s in liars else r
    found = aborted(made)
    assert (found.code, found.culprits) == ("SHARE_FORGED", liars)
    assert "'site-01' and 'site-03' gave out other shares of 'site-00' than they had been dealt" in str(found)


@pytest.mark.parametrize("lost", [False, True])
def test_a_site_that_deals_shares_of_another_secret_is_named_and_no_other(lost):
    made = federation(5)
    made.lost_at = {"site-02": 3} if lost else {}  # then it is its pair keys that are asked for
    liar = made.parties["site-02"]
    share = secagg.share

    def lying(state, member, message, random_bytes):
        false = replace(state, secret="11" * 32, mask="22" * 32) if member.name == "site-02" else state
        return share(false, member, message, random_bytes)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(secagg, "share", lying)
        found = aborted(made)
    assert (found.code, found.culprits) == ("DEAL_FORGED", (liar.member.name,))


def test_shares_that_are_not_as_their_site_says_are_refused_before_anything_is_masked_and_the_site_is_accused():
    def other(site, sealed):
        return replace(sealed, dealt={s: "0" * 128 for s in sealed.dealt}) if site == "site-01" else sealed

    made = federation(4)
    made.tamper["sealed"] = other
    with pytest.raises(OrderRefused, match="not those that it says it has dealt") as refused:
        made.run()
    assert (refused.value.code, refused.value.accused) == ("SHARE_FORGED", "site-01")
    assert made.vectors == {}


def test_a_site_that_says_of_fewer_sites_what_it_has_dealt_is_left_out():
    made = federation(4)
    made.tamper["sealed"] = lambda site, sealed: replace(sealed, dealt={})
    assert refusal_of(made) == "SHARES_MISSING"


def test_a_site_that_keeps_its_masks_back_ends_the_sum():
    def unmask_less(site, revealed):
        return replace(revealed, own_masks={s: v for s, v in revealed.own_masks.items() if s != "site-01"})

    made = federation(3)
    made.tamper["revealed"] = unmask_less
    assert refusal_of(made) == "SHARES_MISSING"


def test_a_vector_that_was_not_masked_as_agreed_leaves_a_residue_and_the_sum_is_thrown_away():
    made = federation(3)
    made.tamper["vector"] = lambda site, vector: vector + np.uint8(1) if site == "site-01" else vector
    assert refusal_of(made) == "SUM_MASK_RESIDUE"


def test_whatever_weight_a_lying_site_makes_of_the_sum_no_weight_moves_by_more_than_the_clip():
    total = federation(3).run()
    lied = replace(total, counts={**total.counts, "weight": 1})  # of 33: what a site tells may make it so
    honest, found = (each.take_mean("conv.weight") for each in (total, lied))
    np.testing.assert_allclose(found, np.clip(33 * honest, -1, 1), rtol=1e-9)
    assert np.abs(found).max() == 1.0


def test_a_vector_of_another_length_is_left_out_and_one_that_breaks_off_ends_the_sum():
    made = federation(4)
    made.lost_at = dict.fromkeys(names(4), 3.5)
    with pytest.raises(SumAborted):
        made.run()
    made.server.step = "vectors"
    size = made.vectors["site-00"].size
    with pytest.raises(UpdateRejected, match=f"has {size - 4} bytes"):
        made.server.take_vector("site-00", size - 4, [made.vectors["site-00"]])
    with pytest.raises(SumAborted, match="broke off"):
        made.server.take_vector("site-00", size, [made.vectors["site-00"][:-4]])


def test_a_site_counts_once_in_each_step():
    made = federation(3)
    made.run()
    made.server.step = "vectors"
    with pytest.raises(UpdateRejected, match="has answered 'vectors' already"):
        made.server.take_vector("site-00", made.vectors["site-00"].size, [made.vectors["site-00"]])
    made.server.step = "done"
    with pytest.raises(UpdateRejected, match="answers 'vectors' while 'done' is asked"):
        made.server.take_vector("site-00", made.vectors["site-00"].size, [made.vectors["site-00"]])


def test_bytes_of_a_vector_come_back_however_they_are_cut():
    block = np.array([0, 1, 2**24 - 1, 0x123456], np.uint32)
    assert packed(block, 24).tobytes() == bytes.fromhex("000000010000ffffff563412")
    for bits in (24, 32):
        assert unpacked(packed(block, bits), bits).tolist() == block.tolist()
