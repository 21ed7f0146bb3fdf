"""The list of attacks that are tried, and where: each is refused, and each stands in an audit log by a name.

Replies that are replayed or forged by an enrolled site are tried here; the rest is tried where the table says.
"""

import ast
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedclient.policy import Policy
from fedserver.conversation import MOST_ATTEMPTS
from shared_models.envelope import signed
from shared_models.files import read_lines
from shared_models.identity import load_secret
from shared_models.study import Rounds, Study
from shared_models.wire import read_order, read_reply, write_reply
from tests.edge import running_edge
from tests.hospitals import Hospitals
from tests.toys import ToyLearner, toy_app

HERE = Path(__file__).parent
DEPLOYED = "processes/test_attacks_deployed.py::"
ATTACKS = {
    "no certificate": (
        DEPLOYED + "test_no_certificate_a_foreign_one_and_an_expired_one",
        "test_gateway.py::test_a_stranger_sees_the_ca_and_nothing_else",
    ),
    "wrong CA": (
        DEPLOYED + "test_no_certificate_a_foreign_one_and_an_expired_one",
        "test_gateway.py::test_the_servers_own_certificate_is_no_clients",
    ),
    "a revoked site": (
        "processes/test_identities.py::test_a_site_joins_another_renews_and_a_third_is_revoked_in_the_middle_of_a_run",
        "test_gateway.py::test_a_revoked_site_is_out_within_seconds_in_the_middle_of_an_upload_and_hears_why",
    ),
    "a stolen issuing key": (
        "test_offline_ca.py::test_an_issuing_key_makes_no_other_authority",
        "test_offline_ca.py::test_whoever_stole_the_issuing_key_cannot_pose_as_a_site_by_its_number",
        "test_offline_ca.py::test_a_stolen_issuing_key_is_refused_once_a_site_has_heard_and_the_site_finds_its_way_back",
    ),
    "other site's node key": (
        DEPLOYED + "test_another_sites_key_a_replayed_call_and_a_forged_source",
        "test_gateway.py::test_two_node_keys_in_one_call_are_refused",
    ),
    "forged source": (
        DEPLOYED + "test_another_sites_key_a_replayed_call_and_a_forged_source",
        "test_attack_list.py::test_a_reply_of_another_round_site_or_run_is_left_out_and_written_down",
    ),
    "replay": (
        DEPLOYED + "test_another_sites_key_a_replayed_call_and_a_forged_source",
        "test_attack_list.py::test_a_reply_of_another_round_site_or_run_is_left_out_and_written_down",
    ),
    "forged update": (
        "test_answers.py::test_what_is_no_answer_is_written_down_and_the_site_is_counted_with_the_honest_one_after_it",
        "test_answers.py::test_a_site_in_whose_name_others_answer_each_time_is_left_out_by_that_name_and_the_round_goes_on",
        "test_envelope.py::test_any_one_changed_byte_of_envelope_signature_or_facts_is_refused",
    ),
    "replayed or repeated update": (
        "test_answers.py::test_the_answer_to_an_order_that_was_given_before_is_a_replay",
        "test_answers.py::test_the_answer_to_the_same_attempt_of_a_process_that_was_killed_is_a_replay_by_its_nonce",
        "test_answers.py::test_of_two_answers_to_two_orders_one_is_counted_and_the_other_noted_as_a_duplicate",
        "test_envelope.py::test_an_honest_answer_to_another_order_is_refused_by_what_is_other",
    ),
    "an audit log kept back": (
        "test_answers.py::test_a_site_that_keeps_its_log_from_us_is_left_out_and_raises_an_alarm",
    ),
    "control, runtime and register calls from outside": (
        DEPLOYED + "test_control_runtime_and_register_calls_from_outside",
        "test_gateway.py::test_what_is_not_offered_is_not_found",
    ),
    "400 MB body": (DEPLOYED + "test_a_body_of_400_mb_and_a_chunk_that_is_named_a_thousand_times",),
    "chunk bomb": (
        DEPLOYED + "test_a_body_of_400_mb_and_a_chunk_that_is_named_a_thousand_times",
        "test_gateway.py::test_a_reply_holds_few_objects_and_none_of_tensors",
    ),
    "400 idle connections": (
        DEPLOYED + "test_400_idle_connections",
        "test_gateway.py::test_one_site_does_not_crowd_out_another",
    ),
    "local user on the site's runtime port": (
        DEPLOYED + "test_another_user_of_the_hospitals_machine_at_the_port_of_its_node",
    ),
    "changed app": (
        "test_executor.py::test_another_archive_is_refused_with_its_digest_and_no_app_is_called",
        "test_executor.py::test_another_archive_is_written_down_at_the_site",
    ),
    "changed study": (
        "test_consent.py::test_any_change_of_a_study_asks_anew",
        "test_consent.py::test_a_study_that_is_refused_is_written_down_at_the_site",
        "test_consent.py::test_a_study_that_the_coordinator_did_not_sign_for_this_run_is_not_looked_at",
        "test_work.py::test_a_study_that_is_not_the_one_named_is_refused_also_after_the_right_one_was_seen",
    ),
    "edited audit log": ("test_audit.py::test_an_edited_line_is_named",),
    "cut audit log": (
        "test_audit.py::test_lines_that_were_cut_off_are_named_by_the_head_that_was_signed_over_them",
        "test_egress.py::test_a_coordinator_that_cuts_its_log_between_two_orders_is_noted_at_every_site",
        "test_audit.py::test_a_site_that_cut_or_rewrote_its_log_is_found_by_the_next_reply",
        "test_audit.py::test_a_log_that_was_cut_says_so_itself_however_long_it_has_grown_since",
    ),
    "reordered audit log": ("test_audit.py::test_lines_that_changed_places_are_named",),
    "expired revocation list": ("test_offline_ca.py::test_a_list_that_has_ended_is_named_by_both_sides",),
    "stale revocation list": (
        "test_offline_ca.py::test_a_coordinator_that_was_rolled_back_is_refused_and_written_down",
        "test_offline_ca.py::test_an_invite_of_today_is_not_answered_by_a_list_of_yesterday",
        "test_lifecycle.py::test_each_change_makes_an_epoch_that_sites_follow_and_a_rollback_is_refused",
    ),
    "clock off by 10 minutes": (
        DEPLOYED + "test_a_clock_that_is_ten_minutes_off",
        "test_clock.py::test_a_clock_that_is_off_is_told_with_its_difference_and_how_to_mend_it",
    ),
    "identifiers in what leaves": (
        "processes/test_secure_sum.py::test_five_hospitals_one_killed_after_masking_and_the_coordinator_holds_no_byte_of_one",
        "test_egress.py::test_no_byte_that_leaves_during_a_run_holds_an_identifier",
    ),
}


def names_in(file: str) -> set[str]:
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_of_the_list_is_tried_by_a_test_that_is_there(attack: str) -> None:
    for where in ATTACKS[attack]:
        file, _, name = where.partition("::")
        assert name in names_in(file), f"{attack}: {where} is gone"


# What an enrolled site may try with its replies

STUDY = Study(name="toy", rounds=Rounds(count=2, quorum=2, gather_s=0))


FORGED: dict[str, tuple[dict[str, object], str]] = {
    "again": ({}, "STALE_ROUND"),  # its reply to round 1
    "other-name": ({"site": "south"}, "OTHER_SITE"),
    "other-run": ({"run": "other"}, "OTHER_RUN"),
    "other-study": ({"study_sha256": "0" * 64}, "OTHER_STUDY"),
    "other-weights": ({"base_sha256": "0" * 64}, "OTHER_WEIGHTS"),
}


def forging(sites: Mapping[str, Path]) -> ClientApp:
    """Sites of these names answer round 2 with that change of their honest reply, which they sign; the others do not.

    What is changed in the facts is changed in the order that is signed for too, so that it is told by its envelope.
    """
    honest, app, first = toy_app(ToyLearner()), ClientApp(), dict[str, Message]()

    def answer(message: Message, context: Context) -> Message:
        order, reply, site = read_order(message), honest(message, context), str(context.node_config["site"])
        if order.kind != "train" or site not in FORGED:
            return reply
        if order.round == 1:
            first[site] = reply
            return reply
        if not (change := FORGED[site][0]):
            return Message(first[site].content, reply_to=message)
        told, key = replace(read_reply(reply, site), **change), load_secret(sites[site] / "keys/identity.key")  # type: ignore[arg-type]
        about = {name: value for name, value in change.items() if name != "site"}
        return write_reply(signed(told, replace(order, **about), key), message)  # type: ignore[arg-type]

    app.train()(answer)
    app.evaluate()(answer)
    app.query()(answer)
    return app


def test_a_reply_of_another_round_site_or_run_is_left_out_and_written_down(tmp_path: Path) -> None:
    with running_edge(tmp_path / "federation") as edge:
        hospitals = Hospitals(edge, tmp_path / "sites")
        for name in ("north", "south", *FORGED):
            hospitals.join(name, Policy(approval="inside-policy"))
        state, run = hospitals.run(STUDY, "forged", forging(hospitals.sites))
    assert state.round == 2
    lines = [line for line in read_lines(run.metrics) if not line.get("final")]
    assert [sorted(line["sites"]) for line in lines] == [sorted(["north", "south", *FORGED]), ["north", "south"]]
    told = [line["facts"] for line in read_lines(edge.federation.audit) if line["event"] == "reply-rejected"]
    assert {facts["site"]: facts["why"].partition(":")[0] for facts in told} == {
        s: code for s, (_, code) in FORGED.items()
    }
    assert {facts["round"] for facts in told} == {2}
    each = [line["facts"]["site"] for line in read_lines(edge.federation.audit) if line["event"] == "answer-forged"]
    assert Counter(each) == dict.fromkeys(FORGED, MOST_ATTEMPTS)  # each is asked again, as often as one that was lost
