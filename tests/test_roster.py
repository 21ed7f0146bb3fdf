"""Rosters are followed by signature and epoch; a rollback or second history is refused."""

from dataclasses import replace

import pytest

from shared_models.errors import StateInvalid
from shared_models.identity import issue_signer, new_authority
from shared_models.roster import (
    FIRST,
    History,
    Roster,
    SignedRoster,
    checked,
    follow,
    read_signed,
    sign_roster,
    write_signed,
)

AUTHORITY = new_authority("Test")
SIGNER = issue_signer(AUTHORITY)
KEYS = {"north": "ab" * 32, "south": "cd" * 32}


def chain(length: int) -> list[SignedRoster]:
    signed: list[SignedRoster] = []
    for epoch in range(1, length + 1):
        previous = signed[-1].roster.sha256 if signed else FIRST
        sites = dict(list(KEYS.items())[: 1 + epoch % 2])
        signed.append(sign_roster(SIGNER, Roster("Test", epoch, sites, previous)))
    return signed


EPOCHS = chain(6)


def test_a_roster_counts_by_the_signature_of_its_authority() -> None:
    signed = EPOCHS[3]
    assert read_signed(write_signed(signed), "roster") == signed
    assert checked(signed, AUTHORITY.certificate) == signed.roster
    stranger = new_authority("Test")
    forged = [
        (signed, stranger.certificate),
        (replace(signed, roster=replace(signed.roster, epoch=9)), AUTHORITY.certificate),
        (sign_roster(issue_signer(stranger), signed.roster), AUTHORITY.certificate),
    ]
    for bad, authority in forged:
        with pytest.raises(StateInvalid, match="not signed by the federation's authority"):
            checked(bad, authority)


def test_a_site_follows_the_epochs_from_the_one_that_it_knows() -> None:
    newest = follow(EPOCHS[1], History(5, tuple(EPOCHS[1:5])), AUTHORITY.certificate)
    assert newest.roster.epoch == 5
    assert follow(newest, History(5, tuple(EPOCHS[4:5])), AUTHORITY.certificate) == newest
    assert follow(None, History(6, tuple(EPOCHS[5:])), AUTHORITY.certificate).roster.epoch == 6


def test_a_coordinator_that_was_rolled_back_is_refused() -> None:
    with pytest.raises(StateInvalid, match="at epoch 3, this site has seen 5"):
        follow(EPOCHS[4], History(3, ()), AUTHORITY.certificate)


def test_a_second_history_is_refused_wherever_it_parts_from_the_first() -> None:
    other = sign_roster(SIGNER, Roster("Test", 3, {"east": "ef" * 32}, EPOCHS[1].roster.sha256))
    after = sign_roster(SIGNER, Roster("Test", 4, {}, other.roster.sha256))
    for known, told in [
        (EPOCHS[2], (other, after)),  # another epoch under the number that is known
        (EPOCHS[2], (EPOCHS[2], after)),  # a step that does not hang on the one before
        (EPOCHS[2], (EPOCHS[2], EPOCHS[4])),  # a step left out
        (EPOCHS[2], (EPOCHS[3],)),  # a beginning that cannot be compared
    ]:
        with pytest.raises(StateInvalid, match="two histories"):
            follow(known, History(4, told), AUTHORITY.certificate)
    with pytest.raises(StateInvalid, match="sent none"):
        follow(EPOCHS[2], History(4, ()), AUTHORITY.certificate)
