"""The site's book of privacy: what is reserved is spent, whatever dies; what is cut or put back is noticed."""

import shutil
import sqlite3

import pytest

from fedclient.chain import Head
from fedclient.ledger import Ledger, Reservation, open_ledger
from shared_models.database import writing
from shared_models.errors import OrderRefused, StateInvalid, StudyInvalid
from shared_models.parse import parse_json
from shared_models.protect.accounting import Spend, epsilon
from tests.crash import WRITES, left_by_kills

STUDY = "a" * 64
WORK = Spend(8.0, 0.1, 100)


def booked(folder, most_epsilon: float = 50.0) -> Ledger:
    ledger = open_ledger(folder)
    ledger.set_budget("all", most_epsilon, 1e-5)
    return ledger


def code_of(act) -> str:
    with pytest.raises(OrderRefused) as refused:
        act()
    return refused.value.code


def test_what_is_reserved_is_spent_and_what_is_settled_is_given_back(tmp_path):
    ledger = booked(tmp_path)
    number = ledger.reserve(Reservation("all", "run-1", STUDY, 500, WORK))
    assert open_ledger(tmp_path).accounts()[0].spent == epsilon([WORK], 1e-5)
    ledger.settle(number, 40)
    account = open_ledger(tmp_path).accounts()[0]
    assert account.spends == (Spend(8.0, 0.1, 40),)
    assert (account.runs, account.open) == (("run-1",), 0)


def test_work_is_added_up_over_studies_and_years_until_the_budget_is_spent(tmp_path):
    ledger = booked(tmp_path, 1.5 * epsilon([WORK], 1e-5))
    ledger.reserve(Reservation("all", "run-1", STUDY, 500, WORK))
    ledger.reserve(Reservation("all", "run-2", "b" * 64, 500, Spend(8.0, 0.1, 50)))
    with pytest.raises(OrderRefused) as refused:
        ledger.reserve(Reservation("all", "run-3", "c" * 64, 500, WORK))
    assert refused.value.code == "DP_BUDGET_EXHAUSTED"
    found = epsilon([Spend(8.0, 0.1, 250)], 1e-5)
    assert f"which would make it {found:.3g}" in str(refused.value)
    assert "is left. Asked are 100 steps with noise 8 and sample rate 0.1" in str(refused.value)
    assert [account.runs for account in ledger.accounts()] == [("run-1", "run-2")]


def test_each_data_set_has_its_own_budget_and_the_last_one_counts(tmp_path):
    ledger = booked(tmp_path)
    ledger.set_budget("chest", 100.0, 1e-6)
    ledger.set_budget("all", 1e-3, 1e-5)
    ledger.reserve(Reservation("chest", "run-1", STUDY, 500, WORK))
    assert code_of(lambda: ledger.reserve(Reservation("all", "run-1", STUDY, 500, WORK))) == "DP_BUDGET_EXHAUSTED"
    assert code_of(lambda: ledger.reserve(Reservation("brain", "run-1", STUDY, 500, WORK))) == "DP_BUDGET_MISSING"
    assert [(a.data_set, len(a.spends)) for a in ledger.accounts()] == [("all", 0), ("chest", 1)]


def test_a_delta_that_could_give_a_whole_patient_away_is_refused(tmp_path):
    ledger = booked(tmp_path)
    assert code_of(lambda: ledger.reserve(Reservation("all", "run-1", STUDY, 100_000, WORK))) == "DP_DELTA_LARGE"
    with pytest.raises(StudyInvalid, match="delta"):
        ledger.set_budget("all", 3.0, 0.1)


def test_a_reservation_is_settled_once_and_never_for_more_than_it_was(tmp_path):
    ledger = booked(tmp_path)
    number = ledger.reserve(Reservation("all", "run-1", STUDY, 500, WORK))
    for wrong in ((number, 101), (number, -1), (1, 5), (9, 5)):
        with pytest.raises(ValueError, match="there is none"):
            ledger.settle(*wrong)
    ledger.settle(number, 0)
    assert ledger.accounts()[0].spent == 0.0
    with pytest.raises(ValueError, match="settled before"):
        ledger.settle(number, 0)


def test_a_book_that_was_put_back_from_a_backup_is_refused(tmp_path):
    ledger = booked(tmp_path)
    kept = tmp_path / "backup.db"
    with sqlite3.connect(tmp_path / "ledger.db") as db, sqlite3.connect(kept) as copy:
        db.backup(copy)
    db.close()
    copy.close()
    receipt = ledger.head()
    ledger.reserve(Reservation("all", "run-1", STUDY, 500, WORK))
    for path in tmp_path.glob("ledger.db*"):
        path.unlink()
    shutil.copy(kept, tmp_path / "ledger.db")
    (tmp_path / "ledger.db").chmod(0o600)
    assert code_of(lambda: open_ledger(tmp_path)) == "LEDGER_ROLLBACK"
    assert code_of(lambda: ledger.reserve(Reservation("all", "run-1", STUDY, 500, WORK))) == "LEDGER_ROLLBACK"
    assert receipt.entries == 1


def test_a_book_that_is_gone_or_has_lost_its_witness_is_not_begun_anew(tmp_path):
    booked(tmp_path / "one")
    for path in (tmp_path / "one").glob("ledger.db*"):
        path.unlink()
    assert code_of(lambda: open_ledger(tmp_path / "one")) == "LEDGER_ROLLBACK"
    booked(tmp_path / "two")
    (tmp_path / "two" / "secrets" / "ledger.head").unlink()
    assert code_of(lambda: open_ledger(tmp_path / "two")) == "LEDGER_ROLLBACK"


def test_an_entry_that_was_changed_behind_our_back_is_found(tmp_path):
    ledger = booked(tmp_path)
    ledger.reserve(Reservation("all", "run-1", STUDY, 500, WORK))
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        with pytest.raises(sqlite3.IntegrityError, match="never changed"):
            db.execute("UPDATE entries SET content = replace(content, '100', '1')")
        with pytest.raises(sqlite3.IntegrityError, match="never removed"):
            db.execute("DELETE FROM entries")
        db.execute("DROP TRIGGER kept_as_written")
        db.execute("UPDATE entries SET content = replace(content, '100', '1')")
    db.close()
    assert code_of(ledger.accounts) == "LEDGER_ROLLBACK"


def test_a_receipt_that_somebody_else_keeps_shows_when_both_files_were_put_back(tmp_path):
    ledger = booked(tmp_path)
    receipt = ledger.head()
    ledger.check_receipt(receipt)
    ledger.reserve(Reservation("all", "run-1", STUDY, 500, WORK))
    later = ledger.head()
    ledger.check_receipt(receipt)
    ledger.check_receipt(later)
    assert (receipt.entries, later.entries) == (1, 2)
    assert code_of(lambda: ledger.check_receipt(Head(3, later.sha256))) == "LEDGER_ROLLBACK"
    assert code_of(lambda: ledger.check_receipt(Head(2, receipt.sha256))) == "LEDGER_ROLLBACK"


def test_the_book_is_its_owners_alone(tmp_path):
    booked(tmp_path)
    for name in ("ledger.db", "secrets/ledger.head"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    (tmp_path / "ledger.db").chmod(0o640)
    with pytest.raises(StateInvalid, match="ours alone"):
        open_ledger(tmp_path)


def test_another_process_that_was_first_is_counted_too(tmp_path):
    ledger = booked(tmp_path)
    stale = ledger.head()
    ledger.reserve(Reservation("all", "run-1", STUDY, 500, WORK))
    entry = ledger._read()[0][1]
    assert ledger._append(entry, stale) is False
    assert ledger.head().entries == 2


def test_the_slower_of_two_that_wrote_side_by_side_does_not_put_the_witness_back(tmp_path):
    ledger = booked(tmp_path)
    chain, heads = ledger._chain, []
    for words in ("one", "other"):  # both commit before either tells the witness
        with writing(chain.path) as db:
            heads.append(chain.add(db, words))
    chain.seen(heads[1])
    chain.seen(heads[0])
    assert parse_json(Head, chain.witness.read_bytes(), "witness", StateInvalid) == heads[1]


def test_killed_at_any_line_the_book_never_counts_less_than_was_trained(quick_folder):
    """Over two trainings, at every line of the book and of its chain."""
    epsilon([WORK], 1e-5), epsilon([WORK, WORK], 1e-5)  # the forked process finds it in memory
    here, seen = quick_folder / "book", set()
    here.mkdir()

    def act(tell):
        ledger = booked(here, 100.0)
        first = ledger.reserve(Reservation("all", "run-1", STUDY, 500, WORK))
        tell("trained 100")
        ledger.settle(first, 100)
        second = ledger.reserve(Reservation("all", "run-2", STUDY, 500, WORK))
        tell("trained 60")
        ledger.settle(second, 60)
        tell("settled")

    for left in left_by_kills(here, act, ("fedclient/ledger.py", "fedclient/chain.py", *WRITES), quick_folder / "kept"):
        trained = sum(int(word.split()[1]) for word in left.words if word.startswith("trained"))
        accounts = open_ledger(left.folder).accounts()
        counted = sum(spend.steps for account in accounts for spend in account.spends)
        assert counted >= trained
        assert counted == 160 or "settled" not in left.words
        seen.add((trained, counted))
    assert left.ended
    assert seen == {(0, 0), (0, 100), (100, 100), (100, 200), (160, 200), (160, 160)}
