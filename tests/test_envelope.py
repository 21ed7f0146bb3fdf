"""The envelope of a reply: what is signed, and that nothing but the answer to this very order gets past."""

import hashlib
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models.envelope import CODES, Asked, Envelope, asked_of, opened, read_envelope, signed
from shared_models.errors import AnswerForged, UpdateRejected
from shared_models.files import canonical_json
from shared_models.identity import identity_public_key, new_identity_key, sign
from shared_models.parse import plain
from shared_models.study import Study, canonical, sha256
from shared_models.wire import BlobRef, MessageInvalid, Order, Reply, SignedReply

STUDY = Study(name="toy")
NONCE = "0123456789abcdef" * 2
ORDER = Order("train", "toy-1", 3, 2, canonical(STUDY).decode(), sha256(STUDY), "b" * 64, nonce=NONCE)
BLOB = BlobRef("c" * 64, 124_000_000)
REPLY = Reply("update", "north", "toy-1", 3, 2, sha256(STUDY), "b" * 64, examples=10, blob=BLOB)
ASKED = asked_of(ORDER, "north")
KEY, OTHER_KEY = new_identity_key(), new_identity_key()
PUBLIC = identity_public_key(KEY)


def code(told: SignedReply, asked: Asked = ASKED, key: bytes | None = PUBLIC) -> str:
    with pytest.raises(AnswerForged) as refused:
        opened(told, asked, key, "site 'north'")
    return refused.value.code


def test_the_answer_to_this_order_is_opened_and_is_what_the_site_said():
    assert opened(signed(REPLY, ORDER, KEY), ASKED, PUBLIC, "x") == REPLY


def test_what_is_signed_names_study_run_round_attempt_kind_site_nonce_and_both_contents():
    told = signed(REPLY, ORDER, KEY)
    envelope = read_envelope(told.envelope, "x")
    assert envelope == Envelope(
        Asked("train", "north", "toy-1", sha256(STUDY), "b" * 64, 3, 2, NONCE), envelope.facts, BLOB
    )
    assert envelope.facts.size_bytes == len(told.facts)


def test_a_reply_that_another_key_has_signed_is_a_forgery():
    assert code(signed(REPLY, ORDER, OTHER_KEY)) == "BAD_SIGNATURE"


def test_no_signature_is_a_forgery_where_the_site_has_a_key_and_all_there_is_where_nobody_has():
    unsigned = signed(REPLY, ORDER, None)
    assert code(unsigned) == "BAD_SIGNATURE"
    assert opened(unsigned, ASKED, None, "x") == REPLY


def test_a_signature_where_nobody_has_a_key_is_none():
    assert code(signed(REPLY, ORDER, KEY), key=None) == "BAD_SIGNATURE"


def test_a_signature_of_the_same_bytes_for_another_purpose_does_not_pass():
    told = signed(REPLY, ORDER, KEY)
    for purpose in ("audit-line", "audit-head", "survivors", "renewal"):
        assert code(replace(told, signature=sign(KEY, purpose, told.envelope))) == "BAD_SIGNATURE"


def test_the_reply_of_another_site_is_named_as_such_though_that_site_has_signed_it():
    assert code(signed(replace(REPLY, site="south"), ORDER, OTHER_KEY)) == "OTHER_SITE"


@pytest.mark.parametrize(
    ("change", "due"),
    [
        ({"study_sha256": "0" * 64}, "OTHER_STUDY"),
        ({"run": "toy-2"}, "OTHER_RUN"),
        ({"round": 2}, "STALE_ROUND"),
        ({"base_sha256": "0" * 64}, "OTHER_WEIGHTS"),
        ({"kind": "evaluate"}, "OTHER_KIND"),
        ({"attempt": 1}, "OTHER_ATTEMPT"),
        ({"nonce": "f" * 32}, "REPLAYED"),
    ],
)
def test_an_honest_answer_to_another_order_is_refused_by_what_is_other(change, due):
    assert code(signed(REPLY, replace(ORDER, **change), KEY)) == due


def test_every_fact_of_an_order_but_its_site_has_a_code_of_its_own():
    assert set(CODES) == {f.name for f in fields(Asked)} - {"site"}


def test_facts_that_were_changed_after_they_were_signed_are_refused_before_they_are_parsed():
    told = signed(REPLY, ORDER, KEY)
    assert code(replace(told, facts=told.facts.replace(b'"examples":10', b'"examples":99'))) == "CONTENT_CHANGED"
    assert code(replace(told, facts=b"no JSON at all")) == "CONTENT_CHANGED"


def test_tensors_that_the_facts_name_and_the_signature_does_not_are_refused():
    envelope = canonical_json(plain(replace(read_envelope(signed(REPLY, ORDER, KEY).envelope, "x"), tensors=None)))
    told = replace(signed(REPLY, ORDER, KEY), envelope=envelope, signature=sign(KEY, "answer", envelope))
    with pytest.raises(UpdateRejected) as refused:
        opened(told, ASKED, PUBLIC, "x")
    assert refused.value.code == "CONTENT_CHANGED"
    assert not isinstance(refused.value, AnswerForged)  # the site itself has said so


def test_facts_that_are_signed_and_no_reply_are_the_sites_own_fault():
    facts = b'{"kind":"update"}'
    real = read_envelope(signed(REPLY, ORDER, KEY).envelope, "x")
    about = BlobRef(hashlib.sha256(facts).hexdigest(), len(facts))
    envelope = canonical_json(plain(replace(real, facts=about)))
    with pytest.raises(MessageInvalid):
        opened(SignedReply(facts, envelope, sign(KEY, "answer", envelope)), ASKED, PUBLIC, "x")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"asked":{},"facts":{}}'])
def test_an_envelope_that_is_none_is_refused(content):
    assert code(replace(signed(REPLY, ORDER, KEY), envelope=content)) == "ENVELOPE_INVALID"


@given(st.data())
def test_any_one_changed_byte_of_envelope_signature_or_facts_is_refused(data):
    told = signed(REPLY, ORDER, KEY)
    part = data.draw(st.sampled_from(["facts", "envelope", "signature"]))
    content = bytearray(getattr(told, part))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    assert code(replace(told, **{part: bytes(content)})) in {
        "ENVELOPE_INVALID", "OTHER_SITE", "BAD_SIGNATURE", "CONTENT_CHANGED",
    }  # fmt: skip


@given(st.data())
def test_any_byte_less_or_more_is_refused(data):
    told = signed(REPLY, ORDER, KEY)
    part = data.draw(st.sampled_from(["facts", "envelope", "signature"]))
    content, at = getattr(told, part), data.draw(st.integers(0, 64))
    cut = content[:at] + content[at + 1 :] if at < len(content) else content + b"0"
    assert code(replace(told, **{part: cut})) in {"ENVELOPE_INVALID", "OTHER_SITE", "BAD_SIGNATURE", "CONTENT_CHANGED"}


def test_no_key_shows_in_what_travels():
    told = signed(REPLY, ORDER, KEY)
    secret = KEY.split(b"\n")[1]
    assert secret not in told.facts + told.envelope + repr(told).encode()
