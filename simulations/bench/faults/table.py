"""The fault table: what may go wrong, what has to come of it, and which tests try it; scenarios stand beside it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """A row.

    Attributes:
        tests: node ids of pytest, relative to the repository's root; all parameters of each.
    """

    id: str
    what: str
    required: str
    tests: tuple[str, ...]


def _of(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{module}.py::test_{name}" for name in names)


_PROCESSES = "processes/test_flower_processes"

FAULTS: tuple[Fault, ...] = (
    Fault(
        "F1",
        "SIGKILL to a site's executor while it trains",
        "the round goes on with the rest or with the site asked again; its privacy stays spent",
        (
            *_of(_PROCESSES, "a_killed_executor_is_replaced_and_its_order_given_again"),
            *_of("test_spending", "work_that_died_stays_spent_and_is_paid_for_again"),
            *_of("test_rounds", "a_node_that_dies_is_asked_again_and_counted_once"),
        ),
    ),
    Fault(
        "F2",
        "SIGKILL to a site's node while it trains",
        "back without Flower's lock-out of 60 s; its work counted once or asked for again",
        (
            *_of(_PROCESSES, "a_killed_node_is_back_without_the_lock_out_and_its_order_given_again"),
            *_of("test_node", "the_session_of_a_dead_process_is_carried_on"),
            *_of("test_parcels", "an_order_that_comes_again_is_answered_without_training"),
        ),
    ),
    Fault(
        "F2b",
        "a site is killed and started while its line to the coordinator is cut",
        "its supervisor tries on until it is let in; nothing is counted twice",
        _of("test_supervise", "a_child_that_cannot_live_is_tried_again_and_again_with_longer_pauses"),
    ),
    Fault(
        "F3",
        "SIGKILL to all of the coordinator's processes in the middle of a round, then `fedserver serve`",
        "the run goes on from its last finished round by itself",
        (
            *_of(_PROCESSES, "a_killed_supervisor_leaves_nothing_behind_and_serve_goes_on"),
            *_of("test_supervise", "no_child_outlives_a_killed_supervisor"),
        ),
    ),
    Fault(
        "F4",
        "SIGKILL to the SuperLink in the middle of a round",
        "the run survives; a lost reply is asked for again and counted once",
        (
            *_of(_PROCESSES, "a_killed_superlink_costs_seconds_and_no_round"),
            *_of("test_rounds", "a_second_answer_after_the_round_is_taken_away_and_never_counted"),
        ),
    ),
    Fault(
        "F5",
        "SIGKILL to the run's process in every round; and, in a unit test, at every line between reply and checkpoint",
        "goes on from the last checkpoint to bit-equal weights",
        (
            *_of(_PROCESSES, "a_killed_server_app_goes_on_after_its_last_round"),
            *_of(
                "test_checkpoint",
                "killed_at_any_point_of_a_round_the_run_ends_with_the_same_bytes",
                "the_state_never_names_what_is_not_there",
            ),
            *_of("processes/test_kills", "a_run_survives_the_death_of_each_process_with_the_same_weights"),
        ),
    ),
    Fault(
        "F6",
        "SIGKILL to the dispatcher, which starts the runs' processes",
        "started again and told; queued and running runs go on",
        (
            *_of(_PROCESSES, "a_killed_dispatcher_takes_its_processes_along_and_takes_over_again"),
            *_of("test_supervise", "a_child_that_is_killed_is_told_with_its_signal_and_one_that_lives_is_no_trouble"),
        ),
    ),
    Fault(
        "F7",
        "the SuperLink is restarted: would its nodes be lost?",
        "no start without a database file; nodes go on as they were",
        _of("test_link", "a_superlink_that_would_keep_its_state_in_memory_is_refused"),
    ),
    Fault(
        "F8",
        "a site's line falls silent for 12 s, then another for 75 s",
        "short: no effect; long: the rounds close without it, and it is back by itself",
        (
            *_of("test_rounds", "a_site_whose_node_goes_away_each_time_is_left_out_before_the_deadline"),
            *_of("test_secure_round", "a_site_that_is_lost_at_any_step_costs_its_update_or_nothing"),
            *_of("test_transfer", "a_broken_upload_goes_on_where_it_broke"),
        ),
    ),
    Fault(
        "F9",
        "a site that takes longer than the round's deadline",
        "the round closes at its deadline and names it; a late update is dropped or counted once as stale",
        _of(
            "test_rounds",
            "a_slow_site_ends_at_the_deadline_and_is_named_late",
            "a_late_update_is_dropped_or_counted_at_its_staleness_weight",
        ),
    ),
    Fault(
        "F10",
        "the coordinator's disk is full in the middle of a round",
        "the run stops or waits cleanly, the last checkpoint is intact, and with room it goes on",
        (
            *_of("test_supervise", "a_full_disk_ends_no_process_that_lives"),
            *_of("test_gateway", "a_disk_that_is_nearly_full_takes_nothing"),
            *_of("test_files", "a_disk_that_fills_up_leaves_the_old_file"),
        ),
    ),
    Fault(
        "F11",
        "a site's disk is full",
        "DISK_FULL at the coordinator, rounds go on without it, and with room it takes part again",
        (
            *_of("test_files", "a_disk_that_takes_half_a_line_is_told_and_leaves_the_lines_before"),
            *_of("test_executor", "a_code_is_one_word_without_the_text_of_the_exception"),
        ),
    ),
    Fault(
        "F12",
        "databases of Flower and of ours, overwritten, cut, or no database at all",
        "refused at start with the file and the way back; a copy put back, all goes on",
        (
            *_of("test_link", "a_damaged_database_is_refused_with_what_was_in_it"),
            *_of(
                "test_state",
                "a_missing_exposed_foreign_or_damaged_file_is_named",
                "a_page_that_was_overwritten_is_found",
            ),
            *_of(
                "test_backup", "a_run_goes_on_from_a_restored_backup_to_the_weights_of_one_that_was_never_interrupted"
            ),
        ),
    ),
    Fault(
        "F13",
        "an update holds NaN or infinity",
        "UPDATE_NONFINITE, or TRAINING_DIVERGED by the site itself; the round goes on",
        (
            *_of("test_update", "each_kind_of_bad_update_is_refused_in_its_own_words"),
            *_of("test_work", "training_that_left_no_finite_numbers_is_not_sent"),
            *_of("test_secagg", "a_vector_that_was_not_masked_as_agreed_leaves_a_residue_and_the_sum_is_thrown_away"),
        ),
    ),
    Fault(
        "F14",
        "wrong shape or dtype, a tensor missing, one too many, a blob that is no tensors",
        "UPDATE_SCHEMA with tensor, expected and got; that site alone is left out",
        _of("test_update", "each_kind_of_bad_update_is_refused_in_its_own_words"),
    ),
    Fault(
        "F15",
        "a negative, zero or huge number of examples; a weight that moved too far",
        "EXAMPLES_RANGE, UPDATE_RANGE; that site alone is left out",
        _of(
            "test_update",
            "each_kind_of_bad_update_is_refused_in_its_own_words",
            "the_sum_of_weights_is_bounded_so_that_it_cannot_overflow",
        ),
    ),
    Fault(
        "F16",
        "a body of 400 MB, 400 idle connections, tensors inside a message (Flower's chunk bomb)",
        "413, 429 or cut off; memory of gateway and SuperLink below 1.5 times; rounds go on",
        _of(
            "test_gateway",
            "a_large_body_is_refused_and_the_client_hears_why",
            "a_body_without_a_length_is_refused",
            "a_reply_holds_few_objects_and_none_of_tensors",
            "a_request_head_without_end_is_cut",
            "a_request_head_that_does_not_come_is_not_waited_for",
            "strangers_do_not_crowd_out_the_sites",
            "too_many_calls_of_one_site_are_a_503",
        ),
    ),
    Fault(
        "F17",
        "a reply that another key signed, replayed, given twice, or about other weights, studies, sites",
        "counted exactly once by site and round; each lie named",
        (
            *_of(
                "test_gateway",
                "a_node_answers_for_itself_alone",
                "the_node_key_of_another_site_or_none_is_refused",
                "a_site_cannot_read_what_another_has_sent",
            ),
            *_of(
                "test_rounds",
                "a_second_answer_after_the_round_is_taken_away_and_never_counted",
                "a_reply_that_flower_cannot_read_leaves_out_its_site_alone",
            ),
            *_of(
                "test_answers",
                "what_is_no_answer_is_written_down_and_the_site_is_counted_with_the_honest_one_after_it",
                "a_site_in_whose_name_others_answer_each_time_is_left_out_by_that_name_and_the_round_goes_on",
                "the_answer_to_an_order_that_was_given_before_is_a_replay",
                "the_answer_to_the_same_attempt_of_a_process_that_was_killed_is_a_replay_by_its_nonce",
                "of_two_answers_to_two_orders_one_is_counted_and_the_other_noted_as_a_duplicate",
            ),
        ),
    ),
    Fault(
        "F18",
        "a site's clock is ten minutes ahead, ten minutes behind, then right",
        "told with its size and its remedy, no crash loop; logs go by sequence, not by time",
        (
            *_of(
                "test_clock",
                "a_clock_that_is_off_is_told_with_its_difference_and_how_to_mend_it",
                "a_node_whose_clock_is_off_waits_until_it_is_right",
            ),
            *_of("test_audit", "a_clock_that_was_set_back_is_named_where_a_log_was_forged_and_told_where_it_was_not"),
        ),
    ),
    Fault(
        "F19",
        "a site is revoked while it works; certificates that have expired",
        "out within 30 s, named, the round goes on for the others; a new invite lets it back",
        (
            *_of(
                "test_lifecycle",
                "an_expired_site_is_told_before_it_connects_and_comes_back_with_an_invite",
                "a_revoked_site_hears_it_waits_and_comes_back_under_new_keys_only",
            ),
            *_of(
                "test_gateway",
                "a_revoked_site_is_out_within_seconds_in_the_middle_of_an_upload_and_hears_why",
                "a_certificate_of_a_foreign_ca_ends_the_connection",
            ),
            *_of(
                "processes/test_identities", "a_site_joins_another_renews_and_a_third_is_revoked_in_the_middle_of_a_run"
            ),
        ),
    ),
    Fault(
        "F20",
        "the coordinator becomes another release in the middle of a run, and is put back",
        "no round across releases: refused by name, paused; put back, the run goes on",
        (
            *_of("test_dispatch", "another_archive_is_not_run"),
            *_of("test_flower_names", "this_is_the_flower_that_the_names_were_read_in"),
            *_of(
                "test_backup", "a_run_goes_on_from_a_restored_backup_to_the_weights_of_one_that_was_never_interrupted"
            ),
        ),
    ),
    Fault(
        "F21",
        "an app that a site has not installed",
        "APP_NOT_APPROVED before anything is trained; the others go on",
        _of("test_executor", "another_archive_is_refused_with_its_digest_and_no_app_is_called"),
    ),
    Fault(
        "F22",
        "a study that a site's policy does not allow",
        "refused with the names of the keys; the others go on and are not told",
        _of(
            "test_consent",
            "a_study_outside_the_policy_is_refused_with_the_names_of_the_keys_and_not_what_they_say",
            "one_sites_refusal_neither_stops_the_others_nor_is_told_to_them",
        ),
    ),
    Fault(
        "F23",
        "fewer sites are alive than a round needs",
        "paused, never a round of fewer, and goes on by itself",
        _of(
            "test_rounds",
            "without_a_quorum_the_run_pauses_says_for_whom_and_goes_on_later",
            "fewer_sites_than_the_quorum_never_make_a_round_and_one_that_joins_meanwhile_does",
        ),
    ),
    Fault(
        "F24",
        "SIGKILL at each step of a secure sum, to a site and to the coordinator",
        "an exact sum or none; no mask twice; secrets wiped",
        (
            *_of(
                "test_sums",
                "killed_at_any_line_a_site_never_does_a_step_twice_and_never_hangs",
                "secrets_are_sealed_on_disk_and_gone_when_the_sum_has_ended",
            ),
            *_of("test_secure_round", "a_coordinator_that_is_killed_at_any_step_goes_on_to_the_same_weights"),
            *_of(
                "processes/test_secure_sum",
                "five_hospitals_one_killed_after_masking_and_the_coordinator_holds_no_byte_of_one",
            ),
        ),
    ),
    Fault(
        "F25",
        "training hangs for good, is too slow, or finds no memory",
        "TRAIN_TIMEOUT, never counted, privacy stays spent, the site takes the next order",
        (
            *_of(
                "test_overdue",
                "work_goes_on_until_its_time_is_over_and_is_then_refused_with_the_key_to_mend",
                "private_work_that_ran_out_of_time_stays_spent_and_gives_no_update",
                "the_executor_of_an_order_whose_time_and_grace_are_over_is_to_be_killed",
            ),
            *_of("test_supervise", "a_child_that_hangs_and_holds_its_interpreter_is_killed_with_all_that_it_started"),
            *_of(
                "processes/test_faults",
                "training_that_hangs_is_ended_from_outside_named_and_its_site_takes_the_next_order",
            ),
            *_of("test_micro", "a_single_example_that_does_not_fit_is_refused_with_the_keys_to_raise"),
        ),
    ),
    Fault(
        "F26",
        "a privacy ledger that was put back from a backup; a budget that is spent",
        "LEDGER_ROLLBACK with an alarm, DP_BUDGET_EXHAUSTED, before an image is opened",
        (
            *_of(
                "test_ledger",
                "a_book_that_was_put_back_from_a_backup_is_refused",
                "a_book_that_is_gone_or_has_lost_its_witness_is_not_begun_anew",
                "killed_at_any_line_the_book_never_counts_less_than_was_trained",
            ),
            *_of("test_spending", "killed_at_any_line_of_a_round_no_training_is_missing_from_the_book"),
        ),
    ),
)
