"""What a coordinator may try with the orders of a secure sum, each at a real site: every lie has its own refusal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclient import egress
from fedclient.egress import release
from fedclient.site import open_site
from fedclient.sums import Sums
from shared_models.errors import OrderRefused
from shared_models.protect.messages import Confirmations, Survivors
from shared_models.protect.privacy import Protect
from shared_models.protect.secure import SecureAggregation
from shared_models.study import Study, canonical, sha256
from shared_models.wire import Reply, dump, read_reply
from tests.order_path import FLOATS, SECURE, STUDY, Coordinator
from tests.toys import ToyLearner


@pytest.fixture
def said(quick_folder):
    return Coordinator(quick_folder)


def test_honest_orders_give_the_mean_of_the_sites_updates(quick_folder):
    moves, examples = {"a": 1.0, "b": 2.0, "c": -3.0, "d": 0.5, "e": 0.0}, {"a": 10, "b": 20, "c": 5, "d": 1, "e": 64}
    made = Coordinator(quick_folder, learner=ToyLearner(moves, examples))
    made.upto("end")
    total = made.sum.finish()
    mean = (10 * 1 + 20 * 2 - 5 * 3 + 1 * 0.5) / 100
    np.testing.assert_allclose(total.take_mean("body.bias"), mean, atol=1e-6)
    assert total.counts["weight"] == 100
    assert total.counts["loss_micro"] == 5 * 750_000
    assert total.counts["loss_sites"] == 5


def test_of_a_trained_update_a_site_says_that_it_is_ready_and_nothing_else(said):
    reply = said.ask("a", "train")
    assert reply == replace(reply, kind="ready", examples=0, steps=0, seconds=0.0, losses=(), blob=None, device="")
    assert "tensors" not in said.message("a", said.order("train")).content


def test_a_site_tells_no_number_of_cases_in_such_a_study(said):
    reply = said.ask("a", "hello")
    assert (reply.train_cases, reply.test_cases) == (0, 0)


# The context


def advertised(made: Coordinator, **change: Any) -> str | None:
    made.train()
    return made.code("a", "advertise", context=made.context(**change))


def test_scores_that_the_study_does_not_ask_for_are_not_even_summed(said):
    assert said.code("a", "train", evaluate="val") == "SCORES_NOT_IN_STUDY"
    assert said.code("a", "train", evaluate="test") == "SCORES_NOT_IN_STUDY"


def test_a_cohort_of_two_is_refused(said):
    assert advertised(said, cohort=("a", "b"), threshold=2, whole=128) == "COHORT_SMALL"
    assert said.code("a", "advertise", context=said.context(least_cohort=2)) == "COHORT_SMALL"


def test_a_cohort_smaller_than_the_study_allows_is_refused_though_three_would_be_safe(quick_folder):
    study = replace(STUDY, rounds=replace(STUDY.rounds, quorum=4))
    made = Coordinator(quick_folder, study)
    assert advertised(made, least_cohort=3) == "COHORT_MISMATCH"
    assert made.code("a", "advertise", context=made.context()) is None


def test_a_threshold_of_two_thirds_or_below_the_studys_is_refused(quick_folder):
    protect = Protect(secure_aggregation=replace(SECURE.secure_aggregation or SecureAggregation(), threshold=1.0))
    made = Coordinator(quick_folder, replace(STUDY, protect=protect))
    assert advertised(made, threshold=3) == "THRESHOLD_SMALL"
    assert made.code("a", "advertise", context=made.context(threshold=4)) == "THRESHOLD_MISMATCH"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"whole": 2**40}, "WEIGHTING_MISMATCH"),  # every update would round to nothing, or one alone would not
        ({"clip": 1e-6}, "ENCODING_MISMATCH"),
        ({"scale": 1.0}, "ENCODING_MISMATCH"),
        ({"scale": 2.0**33}, "ENCODING_UNSAFE"),
        ({"ring_bits": 24, "scale": 1.0}, "ENCODING_MISMATCH"),
        ({"round": 2}, "ROUND_MISMATCH"),
        ({"run": "another"}, "ROUND_MISMATCH"),
        ({"model_sha256": "b" * 64}, "MODEL_MISMATCH"),
        ({"schema_sha256": "b" * 64}, "SCHEMA_MISMATCH"),
        ({"policy_sha256": "b" * 64}, "POLICY_MISMATCH"),
        ({"roster_sha256": "b" * 64}, "ROSTER_MISMATCH"),
        ({"cohort": ("b", "c", "d", "e"), "threshold": 3, "whole": 256}, "COHORT_INVALID"),
        ({"cohort": ("a", "b", "c", "d", "x")}, "NOT_ON_ROSTER"),
    ],
)
def test_a_context_of_which_one_number_is_another_is_refused(said, change, code):
    assert advertised(said, **change) == code


def test_a_roster_that_was_swapped_for_one_with_other_keys_is_refused(said):
    said.train()
    swapped = replace(said.roster, sites={**said.roster.sites, "b": "0" * 64}, epoch=2)
    assert said.code("a", "advertise", context=said.context(roster_sha256=swapped.sha256)) == "ROSTER_MISMATCH"


def test_a_sum_over_an_update_that_was_never_made_is_refused(said):
    assert said.code("a", "advertise", context=said.context()) == "NO_UPDATE"


# Attempts


def test_the_same_context_gets_the_same_keys_again_and_a_site_that_lost_its_answer_makes_none(said):
    told = said.upto("advertise")["a"]
    first = said.ask("a", "advertise", **told).advert
    assert said.ask("a", "advertise", **told).advert == first
    for kept in Path(str(said.configs["a"]["sums"])).rglob("sum-*-advertise-*.json"):
        kept.unlink()
    assert said.code("a", "advertise", **told) == "CONTEXT_USED"


def test_once_it_has_confirmed_a_site_takes_part_in_no_other_attempt_run_or_smaller_cohort(said):
    told = said.upto("confirm")["a"]
    assert said.code("a", "confirm", **told) is None
    assert said.code("a", "advertise", context=said.context(attempt=2)) == "ROUND_CONFIRMED"
    assert said.code("a", "advertise", context=said.context(said.sites[:4], attempt=3)) == "ROUND_CONFIRMED"
    said.run = "again"  # the same study from the same weights gives the same update
    assert said.ask("a", "train").kind == "ready"
    assert said.code("a", "advertise", context=said.context()) == "ROUND_CONFIRMED"


def test_from_almost_the_same_weights_a_round_of_a_study_is_summed_once_whatever_the_run(said):
    told = said.upto("confirm")["a"]
    assert said.code("a", "confirm", **told) is None
    said.run, said.base = "nearly", "b" * 64
    assert said.ask("a", "train").kind == "ready"
    assert said.code("a", "advertise", context=said.context(said.sites[:4])) == "ROUND_CONFIRMED"
    said.round = 2  # and the study has one
    assert said.code("a", "train") == said.code("a", "advertise", context=said.context()) == "ROUND_RANGE"


def test_a_new_attempt_ends_the_one_before_it_so_that_not_both_can_be_unmasked(said):
    told = said.upto("confirm")
    assert said.code("a", "advertise", context=said.context(said.sites[:4], attempt=2)) is None
    assert said.code("a", "confirm", **told["a"]) == "STEP_REPEATED"


# Messages


def test_sites_that_were_told_different_cohorts_find_out_before_they_mask(said):
    said.train()
    smaller = said.context(said.sites[:4])
    own = said.ask("a", "advertise", context=smaller).advert
    others = [said.ask(s, "advertise", context=said.sum.context).advert for s in said.sites[1:]]
    for advert in others:
        said.sum.take_advert(advert)
    split = replace(said.sum.close_adverts(), adverts=(own, *others[:3]))
    assert said.code("a", "share", adverts=replace(split, context=smaller.id)) == "CONTEXT_SPLIT"
    assert said.code("b", "share", adverts=split) == "CONTEXT_SPLIT"


def test_keys_that_the_coordinator_made_itself_are_refused(said):
    told = said.upto("share")["a"]["adverts"]
    forged = [replace(x, mask="0" * 63 + "9") if x.site == "b" else x for x in told.adverts]
    assert said.code("a", "share", adverts=replace(told, adverts=tuple(forged))) == "KEYS_FORGED"


def test_shares_that_were_changed_on_their_way_are_refused_and_the_vector_stays(said):
    inbox = said.upto("mask")["a"]["inbox"]
    boxes = {**inbox.boxes, "b": inbox.boxes["c"]}
    assert said.code("a", "mask", inbox=replace(inbox, boxes=boxes)) == "SHARE_FORGED"


def test_sites_that_the_coordinator_drops_on_purpose_leave_too_few_and_nothing_is_masked_or_told(said):
    inbox = said.upto("mask")["a"]["inbox"]
    few = {site: inbox.boxes[site] for site in ("b", "c")}
    assert said.code("a", "mask", inbox=replace(inbox, boxes=few)) == "COHORT_SMALL"


def test_survivors_that_are_too_few_or_without_the_site_are_not_confirmed(said):
    context_id = said.upto("confirm")["a"]["survivors"].context
    assert said.code("a", "confirm", survivors=Survivors(context_id, ("a", "b", "c"))) == "SURVIVORS_FEW"
    assert said.code("a", "confirm", survivors=Survivors(context_id, ("b", "c", "d", "e"))) == "SURVIVORS_INVALID"


def test_different_survivors_for_different_sites_end_before_a_share_is_given(said):
    told = said.upto("confirm")["a"]["survivors"]
    fewer = Survivors(told.context, ("a", "b", "c", "d"))
    signed = {s: said.ask(s, "confirm", survivors=fewer if s == "a" else told).confirmation for s in said.sites}
    confirmations = Confirmations(told.context, {s: c.signature for s, c in signed.items() if s in fewer.sites})
    assert said.code("a", "unmask", confirmations=confirmations) == "SURVIVORS_SPLIT"
    assert said.code("b", "unmask", confirmations=confirmations) == "SURVIVORS_SPLIT"


def test_both_shares_of_a_site_are_never_given_whatever_is_asked_second(said):
    told = said.upto("unmask")["a"]["confirmations"]
    fewer = Survivors(told.context, ("a", "b", "c", "d"))
    assert said.code("a", "confirm", survivors=fewer) == "STEP_REPEATED"  # before its shares
    first = said.ask("a", "unmask", confirmations=told).revealed
    assert (first.own_masks.keys(), first.pair_keys.keys()) == (set(said.sites), set())
    assert said.code("a", "confirm", survivors=fewer) == "STEP_REPEATED"  # and after
    other = Confirmations(told.context, dict(list(told.signatures.items())[:4]))
    assert said.code("a", "unmask", confirmations=other) == "STEP_REPEATED"
    assert said.ask("a", "unmask", confirmations=told).revealed == first


def test_a_site_that_dies_as_it_gives_its_shares_gives_the_same_when_it_is_asked_again(said, monkeypatch):
    told = said.upto("unmask")["a"]["confirmations"]

    def die(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Sums, "_advance", die)
        assert said.message("a", said.order("unmask", confirmations=told)).has_error()
    assert said.ask("a", "unmask", confirmations=told).revealed.own_masks.keys() == set(said.sites)


def test_too_few_confirmations_or_one_of_a_stranger_free_nothing(said):
    told = said.upto("unmask")["a"]["confirmations"]
    few = dict(list(told.signatures.items())[:3])
    assert said.code("a", "unmask", confirmations=Confirmations(told.context, few)) == "CONFIRMATIONS_FEW"
    strange = {**told.signatures, "x": told.signatures["b"]}
    assert said.code("a", "unmask", confirmations=Confirmations(told.context, strange)) == "CONFIRMATION_FORGED"


def test_a_vector_is_masked_once_sent_again_as_it_was_and_never_anew_when_it_is_lost(said):
    told = said.upto("mask")["a"]
    first = said.message("a", said.order("mask", **told)).content["tensors"]
    assert said.message("a", said.order("mask", **told)).content["tensors"] == first
    home = Path(str(said.configs["a"]["sums"]))
    (vector,) = home.rglob("sum-*-mask-*.vector")
    content = vector.read_bytes()
    vector.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert said.code("a", "mask", **told) == "STEP_REPEATED"
    vector.with_suffix(".json").unlink()
    assert said.code("a", "mask", **told) == "STEP_REPEATED"


# Orders around the steps


def test_a_step_under_the_header_of_another_study_run_or_model_is_refused(said):
    told = said.upto("share")["a"]
    other = replace(STUDY, seed=9)
    order = replace(said.order("share", **told), study=canonical(other).decode(), study_sha256=sha256(other))
    assert refusal(said, order) == "CONTEXT_SPLIT"
    assert refusal(said, replace(said.order("share", **told), run="another")) == "CONTEXT_SPLIT"
    assert refusal(said, replace(said.order("share", **told), base_sha256="b" * 64)) == "CONTEXT_SPLIT"


def test_a_step_of_a_sum_in_a_study_without_sums_is_refused(said):
    plain = Study(name="plain")
    order = replace(said.order("advertise", context=said.context()), study=canonical(plain).decode(),
                    study_sha256=sha256(plain))  # fmt: skip
    assert refusal(said, order) == "SUM_NOT_IN_STUDY"


@pytest.mark.parametrize("kind", ["advertise", "share", "mask", "confirm", "unmask"])
def test_a_step_without_its_message_is_refused(said, kind):
    assert said.code("a", kind) == "STEP_EMPTY"


def refusal(made: Coordinator, order) -> str | None:
    return read_reply(made.message("a", order), "a").refusal


def test_the_door_lets_no_reply_of_one_site_out_in_such_a_study(said, monkeypatch):
    monkeypatch.setattr(egress, "hear", lambda *_: None)
    site, order = open_site(said.configs["a"]), said.order("train")
    digests = (order.study_sha256, order.base_sha256)
    for kind, told in (("update", {"examples": 7}), ("update", {"losses": (0.5,)}), ("hello", {"train_cases": 3})):
        reply = Reply(kind, "a", order.run, 1, 1, *digests, **told)  # type: ignore[arg-type]
        with pytest.raises(OrderRefused, match="would tell of this site alone") as refused:
            release(reply, order, site)
        assert refused.value.code == "EGRESS"


def test_no_byte_of_the_replies_holds_a_sites_number_of_examples_or_loss(quick_folder):
    learner = ToyLearner({"a": 0.123}, {"a": 41})
    made, heard = Coordinator(quick_folder, learner=learner), list[bytes]()
    ask = made.ask

    def listening(site, kind, **message):
        reply = ask(site, kind, **message)
        if site == "a":
            heard.append(dump(replace(reply, head=None)))
        return reply

    made.ask = listening  # type: ignore[method-assign]
    made.upto("end")
    stored = b"".join(heard)
    delta = np.float32(0.123) + FLOATS["body.weight"] - FLOATS["body.weight"]
    assert len(heard) == 5  # ready, keys, shares, signature, shares; the vector is beside them
    for secret in (b'"examples":41', b"750000", b"0.75", delta.astype(np.float32).tobytes()[:4]):
        assert secret not in stored
    plain = dump(replace(ask("b", "hello"), examples=41, losses=(0.75,)))  # what the search would have found
    assert b'"examples":41' in plain
    assert b"0.75" in plain
