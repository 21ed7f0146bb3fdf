"""What secure sums are made of, against published vectors and by properties; the protocol against pinned bytes."""

import hashlib
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_models.errors import StudyInvalid, WeightsInvalid
from shared_models.parse import parse_json
from shared_models.protect.context import least_threshold
from shared_models.protect.masking import (
    agree,
    channel_key,
    commitment,
    is_weak,
    pair_mask_key,
    public_key,
    seal,
    unseal,
)
from shared_models.protect.messages import Inbox, write
from shared_models.protect.prg import CHUNK, Masks, derive, framed, hkdf, keystream
from shared_models.protect.ring import Layout, bytes_of, encode, encoding, mean_of, packed, read_tail, unpacked
from shared_models.protect.shamir import PRIME, combine, split
from shared_models.weights import InMemory, schema_of
from tests.sums import federation, fixed_bytes

# Published vectors

ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")


def test_x25519_agrees_as_in_rfc_7748_section_6_1():
    assert public_key(ALICE).hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert public_key(BOB).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert agree(ALICE, public_key(BOB)).hex() == agree(BOB, public_key(ALICE)).hex() == shared


def test_a_public_key_of_small_order_is_refused():
    assert is_weak(bytes(32))
    assert not is_weak(public_key(BOB))
    with pytest.raises(ValueError):
        agree(ALICE, bytes(32))


@pytest.mark.parametrize(
    ("secret", "salt", "info", "length", "wanted"),
    [
        ("0b" * 22, "000102030405060708090a0b0c", "f0f1f2f3f4f5f6f7f8f9", 42,
         "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"),
        ("0b" * 22, "", "", 42, "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"),
    ],
)  # fmt: skip
def test_hkdf_is_that_of_rfc_5869_appendix_a_1_and_a_3(secret, salt, info, length, wanted):
    assert hkdf(bytes.fromhex(secret), bytes.fromhex(info), bytes.fromhex(salt) or None, length).hex() == wanted


def test_the_keystream_is_that_of_nist_sp_800_38a_f_5_5():
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    wanted = (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    assert keystream(key, bytes(range(0xF0, 0x100))).update(plain).hex() == wanted


def test_sealing_is_aes_gcm_as_in_test_case_16_of_its_specification():
    key = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
    nonce, about = bytes.fromhex("cafebabefacedbaddecaf888"), bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    plain = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    wanted = (
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        "76fc6ece0f4e1768cddf8853bb2d551b"
    )
    sealed = seal(key, plain, about, lambda size: nonce[:size])
    assert sealed.hex() == nonce.hex() + wanted
    assert unseal(key, sealed, about) == plain


def test_the_field_of_shamir_is_of_a_prime_with_room_for_every_secret():
    assert PRIME > 2**256
    odd, halvings = PRIME - 1, 0
    while odd % 2 == 0:
        odd, halvings = odd // 2, halvings + 1
    for base in range(2, 40):  # Miller and Rabin: a composite passes with probability below 4**-38
        powers = [pow(base, odd << i, PRIME) for i in range(halvings)]
        assert powers[0] == 1 or PRIME - 1 in powers


# Shamir, framing, sealing


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(2, 12), st.data())
def test_any_threshold_of_shares_gives_the_secret_and_one_fewer_does_not(secret, sites, data):
    threshold = data.draw(st.integers(2, sites))
    shares = split(secret, threshold, range(1, sites + 1), fixed_bytes(secret, sites))
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert combine({place: shares[place] for place in chosen}) == secret
    with suppress(ValueError):  # a value above 2**256 is no secret at all
        assert combine({place: shares[place] for place in chosen[1:]}) != secret


def test_shares_by_hand_lie_on_the_polynomial():
    coefficient = (5).to_bytes(48, "big")
    shares = split((7).to_bytes(32, "big"), 2, [1, 2, 9], lambda size: coefficient)
    assert {place: int.from_bytes(share, "big") for place, share in shares.items()} == {1: 12, 2: 17, 9: 52}


@pytest.mark.parametrize(
    ("secret", "threshold", "places"),
    [(b"short", 2, [1, 2]), (bytes(32), 3, [1, 2]), (bytes(32), 2, [0, 1]), (bytes(32), 2, [1, 1])],
)
def test_what_cannot_be_shared_is_refused(secret, threshold, places):
    with pytest.raises(ValueError):
        split(secret, threshold, places, lambda size: bytes(size))


def test_parts_that_are_cut_elsewhere_are_framed_differently():
    assert framed(b"ab", b"c") != framed(b"a", b"bc") != framed(b"abc")
    assert derive(b"s", b"one") != derive(b"s", b"other")


def test_sealed_shares_do_not_open_with_another_key_about_something_else_or_changed():
    sealed = seal(bytes(32), b"content", b"about", lambda size: bytes(size))
    changed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    right = bytes(32)
    for key, box, about in [(b"\1" * 32, sealed, b"about"), (right, sealed, b"other"), (right, changed, b"about"),
                            (right, b"", b"about")]:  # fmt: skip
        with pytest.raises(ValueError, match="does not open"):
            unseal(key, box, about)


def test_a_pair_has_one_key_for_each_purpose_and_context_whoever_derives_it():
    one = pair_mask_key(ALICE, public_key(BOB), b"k", "alice", "bob")
    assert one == pair_mask_key(BOB, public_key(ALICE), b"k", "bob", "alice")
    others = [pair_mask_key(ALICE, public_key(BOB), b"l", "alice", "bob"),
              pair_mask_key(ALICE, public_key(BOB), b"k", "alice", "carol"),
              channel_key(ALICE, public_key(BOB), b"k", "alice", "bob")]  # fmt: skip
    assert len({one, *others}) == 4


# Masks and the ring


def test_a_mask_is_the_keystream_as_little_endian_words_wherever_blocks_are_cut():
    key, vector = b"\7" * 32, np.zeros(CHUNK + 1001, np.uint32)
    masks = Masks([(key, +1)])
    for part in (vector[:3], vector[3 : CHUNK + 9], vector[CHUNK + 9 :]):
        masks.apply(part)
    cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    assert vector.tobytes() == cipher.update(bytes(4 * vector.size))
    Masks([(key, -1)]).apply(vector)
    assert not vector.any()


deltas = st.lists(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4), min_size=1, max_size=50)


@settings(deadline=None)
@given(deltas, st.sampled_from([24, 32]), st.sampled_from([0.5, 1.0, 4.0]), st.data())
def test_sums_never_leave_the_ring_and_their_mean_is_off_by_half_a_unit_a_site_at_most(rows, bits, clip, data):
    weights = data.draw(st.lists(st.integers(1, 10**6), min_size=len(rows), max_size=len(rows)))
    layout, how = Layout(schema_of({"w": np.zeros((2, 2), np.float32)})), encoding(clip, bits)
    total, vector = sum(weights), np.zeros(layout.elements, np.uint32)
    for row, weight in zip(rows, weights, strict=True):
        delta = InMemory({"w": np.array(row, np.float32).reshape(2, 2)})
        blocks = [b.copy() for b in encode(delta, weight / total, weight, {}, layout, how, canary=7)]
        vector += unpacked(packed(np.concatenate(blocks), bits), bits)
    wanted = sum(np.clip(np.array(r), -clip, clip) * w for r, w in zip(rows, weights, strict=True)) / total
    bound = (len(rows) / 2 + 1) / how.scale
    np.testing.assert_allclose(mean_of(vector, layout, how, "w", 1.0).reshape(-1), wanted, atol=bound, rtol=1e-9)
    counted = read_tail(vector, layout, bits, canary=7)
    assert counted.sites == len(rows)
    over = sum(int((np.abs(np.array(r, np.float32)) > clip).sum()) for r in rows)
    assert counted.counts == {"clipped": over, "weight": total}


def test_the_largest_delta_of_all_sites_at_once_fills_the_ring_and_no_more():
    for bits in (24, 32):
        how = encoding(1.0, bits)
        assert how.problem is None
        assert how.scale > 0.999 * 2 ** (bits - 1)
        assert "beyond a ring" in str(replace(how, scale=how.scale * 1.001).problem)
    assert "16 bits" in str(replace(encoding(1.0), bits=16).problem)
    assert "above 0" in str(replace(encoding(1.0), clip=float("nan")).problem)


def test_counts_of_many_sites_add_up_in_limbs():
    layout = Layout({}, ("cases",))
    vector = np.zeros(layout.elements, np.uint32)
    for i in range(128):
        vector += next(iter(encode(InMemory({}), 1.0, 2**40 + i, {"cases": 2**47 + 1}, layout, encoding(1.0), 0xFFFF)))
    counted = read_tail(vector, layout, 24, 0xFFFF)
    assert counted.sites == 128
    assert counted.counts == {"cases": 128 * (2**47 + 1), "clipped": 0, "weight": 128 * 2**40 + 127 * 64}


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_a_delta_that_is_not_finite_is_not_encoded(spoilt):
    layout = Layout(schema_of({"w": np.zeros(3, np.float32)}))
    delta = InMemory({"w": np.array([0, spoilt, 0], np.float32)})
    with pytest.raises(WeightsInvalid, match="NaN or infinity"):
        list(encode(delta, 1.0, 1, {}, layout, encoding(1.0), 0))


def test_integer_tensors_other_networks_and_counts_out_of_range_are_refused():
    with pytest.raises(WeightsInvalid, match="float tensors only"):
        Layout(schema_of({"steps": np.zeros(1, np.int64)}))
    layout = Layout(schema_of({"w": np.zeros(3, np.float32)}), ("cases",))
    with pytest.raises(WeightsInvalid, match="not of the model"):
        list(encode(InMemory({}), 1.0, 1, {"cases": 1}, layout, encoding(1.0), 0))
    delta = InMemory({"w": np.zeros(3, np.float32)})
    for counts in ({}, {"cases": -1}, {"cases": 2**48}, {"cases": 1, "more": 1}):
        with pytest.raises(ValueError, match="expected"):
            list(encode(delta, 1.0, 1, counts, layout, encoding(1.0), 0))
    with pytest.raises(ValueError, match="share"):
        list(encode(delta, 1.1, 1, {"cases": 1}, layout, encoding(1.0), 0))


def test_a_vector_travels_in_four_or_three_bytes_an_element():
    layout = Layout(schema_of({"w": np.zeros(1000, np.float32)}), ("cases",))
    elements = 1000 + 3 * 3 + 2
    assert (bytes_of(layout, 32), bytes_of(layout, 24)) == (4 * elements, 3 * elements)


# Contexts, rosters, messages


def test_every_field_of_a_context_changes_its_digest():
    context = federation(4).context
    others = [replace(context, **change) for change in (
        {"run": "other"}, {"round": 2}, {"attempt": 2}, {"cohort": ("a", "b", "c")}, {"threshold": 4},
        {"least_cohort": 4}, {"roster_sha256": "0" * 64}, {"model_sha256": "0" * 64}, {"schema_sha256": "0" * 64},
        {"policy_sha256": "0" * 64}, {"whole": 1}, {"clip": 2.0}, {"scale": 2.0}, {"ring_bits": 24},
    )]  # fmt: skip
    assert len({context.id, *(other.id for other in others)}) == len(others) + 1


def test_thresholds_are_those_of_security_md():
    assert [least_threshold(n) for n in (3, 5, 10, 50)] == [3, 4, 7, 34]


def test_messages_come_back_as_they_went_and_others_are_refused():
    inbox = Inbox("a" * 64, {"north": "0" * 188})
    assert parse_json(Inbox, write(inbox), "inbox") == inbox
    for spoilt in (b"{}", b"no", write(inbox).replace(b"north", b"No rth"), write(inbox).replace(b"0000", b"00")):
        with pytest.raises(StudyInvalid, match="inbox"):
            parse_json(Inbox, spoilt, "inbox")


# The whole protocol


def test_with_fixed_seeds_every_byte_of_the_protocol_is_the_pinned_one():
    made = federation(4, fixed=True)
    made.lost_at = {"site-03": 3.5}
    total = made.run()
    steps = (made.server._adverts, made.server._sealed, made.server._revealed)
    said = b"".join(write(message) for step in steps for message in step.values())
    assert made.context.id == "76eb6335f68d4c8605ded06a9ea641322dc3233eb2477d5a784046737e07070d"
    assert sha256(made.vectors["site-00"].tobytes()) == (
        "678d43f67cddbed8c181bc3e2633d2cf04d443e4652eb3eabcb3f9ff13690106"
    )
    assert sha256(said) == "13bba59c033f071862c05fdc7ac1e3565a33a30b2c67f826b73b1110565ffdee"
    assert sha256(total.vector.tobytes()) == "4632031363123b25c7f2b34d753debe0be3c68217929328d392c359c8f99a7b3"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_masked_vector_is_the_one_that_another_reading_of_the_protocol_gives():
    made = federation(3, fixed=True)
    made.run()
    k = made.context.digest
    drawn = {site: fixed_bytes(0, site) for site in made.parties}
    secrets = {site: (draw(32), draw(32), draw(32)) for site, draw in drawn.items()}  # channel, mask, own
    parts = lambda *p: b"".join(len(x).to_bytes(8, "big") + x for x in p)  # noqa: E731

    def key(secret: bytes, *words: bytes) -> bytes:
        return HKDF(hashes.SHA256(), 32, None, parts(*words)).derive(secret)

    def stream(seed: bytes) -> np.ndarray:
        octets = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(4 * made.layout.elements))
        return np.frombuffer(octets, "<u4")

    party, me = made.parties["site-01"], "site-01"
    numbers = [party.delta[n].reshape(-1).astype(np.float64) for n in sorted(party.delta)]
    whole = np.rint(np.concatenate(numbers) * (11 / 33 * made.context.scale)).astype(np.int64).astype(np.uint32)
    mark = int.from_bytes(key(k, b"sfl-secagg/1 canary")[:2], "big")
    wanted = np.concatenate([whole, np.array([0, 0, 0, 11, 0, 0, 101, 0, 0, 1, mark], np.uint32)])
    wanted += stream(key(secrets[me][2], b"sfl-secagg/1 self mask", k, me.encode()))
    for other in ("site-00", "site-02"):
        theirs = X25519PrivateKey.from_private_bytes(secrets[other][1]).public_key().public_bytes_raw()
        agreed = X25519PrivateKey.from_private_bytes(secrets[me][1]).exchange(X25519PublicKey.from_public_bytes(theirs))
        pair = sorted((me.encode(), other.encode()))
        mask = stream(key(agreed, b"sfl-secagg/1 pair mask", k, *pair))
        wanted = wanted + mask if me < other else wanted - mask
    np.testing.assert_array_equal(made.vectors[me].view("<u4"), wanted)


def test_a_commitment_is_to_one_secret_of_one_site_in_one_sum():
    said = [commitment(b"a" * 32, b"k", "x"), commitment(b"b" * 32, b"k", "x"), commitment(b"a" * 32, b"l", "x"),
            commitment(b"a" * 32, b"k", "y")]  # fmt: skip
    assert len(set(said)) == 4
