"""What a site remembers of its secure sums: nothing is done twice, whatever dies in between, and secrets are wiped."""

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from fedclient import secagg
from fedclient.secagg import Held, Masked
from fedclient.sums import Sums, masked, open_sums
from fedserver.secagg import SecureSum
from shared_models.errors import OrderRefused, StateInvalid
from shared_models.protect.messages import Survivors
from shared_models.protect.ring import bytes_of
from shared_models.weights import InMemory
from tests.crash import WRITES, left_by_kills
from tests.sums import Federation, federation, plain_mean


def held(made: Federation) -> Held:
    return Held(made.context.model_sha256, made.layout.sha256, made.context.policy_sha256)


def open_all(made: Federation, folder) -> dict[str, Sums]:
    return {site: open_sums(p.member, folder / site) for site, p in made.parties.items()}


def masked_vector(made: Federation, sums: Sums, inbox) -> np.ndarray:
    party = made.parties[sums.member.name]
    blocks = sums.mask(inbox, InMemory(party.delta), party.weight, party.counts, made.layout)
    return np.concatenate([block.copy() for block in blocks])


def until_vectors(made: Federation, sums: dict[str, Sums]) -> SecureSum:
    """A sum up to the vectors, every step of every site by its file."""
    server = SecureSum(made.context, made.roster, made.layout)
    for each in sums.values():
        server.take_advert(each.advertise(made.context, held(made)))
    adverts = server.close_adverts()
    for each in sums.values():
        server.take_sealed(each.share(adverts))
    inboxes = server.close_sealed()
    for site, each in sums.items():
        size = bytes_of(made.layout, made.context.ring_bits)
        server.take_vector(site, size, [masked_vector(made, each, inboxes[site])])
    return server


def test_a_sum_goes_on_when_every_step_of_every_site_is_a_process_of_its_own(tmp_path):
    made = federation(3)
    server = until_vectors(made, open_all(made, tmp_path))
    survivors = server.close_vectors()
    for each in open_all(made, tmp_path).values():
        server.take_confirmation(each.confirm(survivors))
    confirmations = server.close_confirmations()
    for each in open_all(made, tmp_path).values():
        server.take_revealed(each.unmask(confirmations))
    total = server.finish()
    for name, mean in plain_mean(made, made.parties).items():
        np.testing.assert_allclose(total.take_mean(name), mean, atol=1e-6, rtol=0)


def code_of(act) -> str:
    with pytest.raises(OrderRefused) as refused:
        act()
    return refused.value.code


def test_no_context_has_keys_twice_also_after_a_restart(tmp_path):
    made = federation(3)
    open_all(made, tmp_path)["site-00"].advertise(made.context, held(made))
    again = open_all(made, tmp_path)["site-00"]
    assert code_of(lambda: again.advertise(made.context, held(made))) == "CONTEXT_USED"
    again.advertise(replace(made.context, attempt=2), held(made))


def test_a_second_request_for_shares_is_refused_also_after_a_restart(tmp_path):
    made = federation(3)
    sums = open_all(made, tmp_path)
    server = until_vectors(made, sums)
    survivors = server.close_vectors()
    for each in sums.values():
        server.take_confirmation(each.confirm(survivors))
    confirmations = server.close_confirmations()
    sums["site-00"].unmask(confirmations)
    again = open_all(made, tmp_path)["site-00"]
    assert code_of(lambda: again.unmask(confirmations)) == "STEP_REPEATED"


def test_one_set_of_survivors_is_confirmed_and_no_other(tmp_path):
    made = federation(4)
    sums = open_all(made, tmp_path)
    survivors = until_vectors(made, sums).close_vectors()
    sums["site-00"].confirm(survivors)
    fewer = Survivors(survivors.context, survivors.sites[:3])
    again = open_all(made, tmp_path)["site-00"]
    assert code_of(lambda: again.confirm(fewer)) == "STEP_REPEATED"


def test_an_update_that_was_confirmed_is_never_masked_for_another_sum(tmp_path):
    made = federation(3)
    sums = open_all(made, tmp_path)
    sums["site-00"].confirm(until_vectors(made, sums).close_vectors())
    again: list[dict[str, Any]] = [
        {"attempt": 2}, {"attempt": 2, "model_sha256": "e" * 64}, {"round": 2}, {"run": "same-study-anew"},
    ]  # fmt: skip
    for change in again:
        other = replace(made.context, **change)
        told = Held(other.model_sha256, made.layout.sha256, other.policy_sha256)
        assert code_of(lambda other=other, told=told: sums["site-00"].advertise(other, told)) == "ROUND_CONFIRMED"
    for change in ({"round": 2, "model_sha256": "e" * 64}, {"run": "another-study", "policy_sha256": "e" * 64}):
        other = replace(made.context, **change)
        sums["site-00"].advertise(other, Held(other.model_sha256, made.layout.sha256, other.policy_sha256))


def test_of_two_sums_of_one_study_that_runs_begin_side_by_side_a_site_confirms_one(tmp_path):
    made, smaller = federation(4), federation(4, run="side-by-side", cohort=("site-00", "site-01", "site-02"))
    del smaller.parties["site-03"]
    sums = open_all(made, tmp_path)
    first = until_vectors(made, sums).close_vectors()
    second = until_vectors(smaller, open_all(smaller, tmp_path)).close_vectors()
    sums["site-00"].confirm(first)
    assert code_of(lambda: sums["site-00"].confirm(second)) == "ROUND_CONFIRMED"


def test_a_site_that_dies_after_it_has_signed_the_survivors_signs_the_same_again(tmp_path):
    made = federation(3)
    sums = open_all(made, tmp_path)
    survivors = until_vectors(made, sums).close_vectors()
    signed = sums["site-00"].confirm(survivors)
    assert open_all(made, tmp_path)["site-00"].confirm(survivors) == signed


def test_another_attempt_ends_the_one_before_it(tmp_path):
    made = federation(3)
    sums = open_all(made, tmp_path)
    survivors = until_vectors(made, sums).close_vectors()
    sums["site-00"].advertise(replace(made.context, attempt=2), held(made))
    assert code_of(lambda: sums["site-00"].confirm(survivors)) == "STEP_REPEATED"


def test_steps_out_of_order_and_of_sums_never_heard_of_are_refused(tmp_path):
    made = federation(3)
    sums = open_all(made, tmp_path)
    unknown = Survivors("f" * 64, tuple(made.parties))
    assert code_of(lambda: sums["site-00"].confirm(unknown)) == "CONTEXT_SPLIT"
    sums["site-00"].advertise(made.context, held(made))
    early = Survivors(made.context.id, tuple(made.parties))
    assert code_of(lambda: sums["site-00"].confirm(early)) == "STEP_REPEATED"


@pytest.mark.parametrize("weight", [0, 16])
def test_a_weight_that_is_none_or_above_the_cohorts_is_refused_before_the_masks_are_made(weight, tmp_path):
    made = federation(3, whole=15)
    sums = open_all(made, tmp_path)
    server = SecureSum(made.context, made.roster, made.layout)
    for each in sums.values():
        server.take_advert(each.advertise(made.context, held(made)))
    adverts = server.close_adverts()
    for each in sums.values():
        server.take_sealed(each.share(adverts))
    inbox = server.close_sealed()["site-00"]
    party = made.parties["site-00"]
    with pytest.raises(OrderRefused, match=f"weight {weight} is not from 1 to the cohort's 15") as refused:
        sums["site-00"].mask(inbox, InMemory(party.delta), weight, party.counts, made.layout)
    assert refused.value.code == "WEIGHT_RANGE"


def test_secrets_are_sealed_on_disk_and_gone_when_the_sum_has_ended(tmp_path):
    made = federation(3)
    sums = open_all(made, tmp_path)
    server = until_vectors(made, sums)
    state = sums["site-00"]._state(made.context.id, Masked)
    secrets = [share.own_mask for share in state.shares.values()]
    files = lambda: b"".join(p.read_bytes() for p in (tmp_path / "site-00").rglob("*") if p.is_file())  # noqa: E731
    assert not any(s.encode() in files() or bytes.fromhex(s) in files() for s in secrets)
    survivors = server.close_vectors()
    for each in sums.values():
        server.take_confirmation(each.confirm(survivors))
    sums["site-00"].unmask(server.close_confirmations())
    with sqlite3.connect(tmp_path / "site-00" / "sums.db") as db:
        assert db.execute("SELECT step, state FROM sums").fetchall() == [("Revealed", None)]


def test_a_state_that_was_moved_to_another_sum_does_not_open(tmp_path):
    made = federation(3)
    sums = open_all(made, tmp_path)["site-00"]
    sums.advertise(made.context, held(made))
    with sqlite3.connect(sums.path) as db:
        db.execute("UPDATE sums SET step = 'Masked'")
    db.close()
    with pytest.raises(ValueError, match="does not open"):
        sums.confirm(Survivors(made.context.id, tuple(made.parties)))


def test_a_site_without_its_memory_of_sums_says_so_instead_of_beginning_anew(tmp_path):
    made = federation(3)
    member = made.parties["site-00"].member
    sums = open_sums(member, tmp_path)
    sums.advertise(made.context, held(made))
    assert sums.path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "secrets" / "sums.key").rename(tmp_path / "key")
    with pytest.raises(StateInvalid, match=r"sums\.key: is missing"):
        open_sums(member, tmp_path)
    (tmp_path / "key").rename(tmp_path / "secrets" / "sums.key")
    for path in tmp_path.glob("sums.db*"):
        path.unlink()
    with pytest.raises(StateInvalid, match=r"sums\.db: is missing.*backup"):
        open_sums(member, tmp_path)


def test_a_memory_of_sums_that_was_put_back_from_a_backup_is_noticed(tmp_path):
    made = federation(3)
    sums = open_all(made, tmp_path)
    backup = tmp_path / "backup.db"
    server = SecureSum(made.context, made.roster, made.layout)
    for each in sums.values():
        server.take_advert(each.advertise(made.context, held(made)))
    with closing(sqlite3.connect(sums["site-00"].path)) as db, closing(sqlite3.connect(backup)) as copy:
        db.backup(copy)
    sums["site-00"].share(server.close_adverts())
    for path in (tmp_path / "site-00").glob("sums.db*"):
        path.unlink()
    shutil.copy(backup, sums["site-00"].path)
    sums["site-00"].path.chmod(0o600)
    with pytest.raises(OrderRefused, match=r"had 2 entries and has others now, 1 in number.*no secure sum") as refused:
        open_sums(made.parties["site-00"].member, tmp_path / "site-00")
    assert refused.value.code == "SUMS_ROLLBACK"


def test_a_memory_of_sums_without_its_witness_is_not_begun_anew(tmp_path):
    made = federation(3)
    open_all(made, tmp_path)["site-00"].advertise(made.context, held(made))
    (tmp_path / "site-00" / "secrets" / "sums.head").unlink()
    assert code_of(lambda: open_sums(made.parties["site-00"].member, tmp_path / "site-00")) == "SUMS_ROLLBACK"


def test_killed_at_any_line_a_site_never_does_a_step_twice_and_never_hangs(quick_folder):
    """At every line of the steps and of the chain that each of them is an entry of."""
    made, here, seen = federation(3), quick_folder / "site", set()
    here.mkdir()
    watched = ("fedclient/sums.py", "fedclient/chain.py", *WRITES)
    for left in left_by_kills(here, partial(take_part, made, here), watched, quick_folder / "kept"):
        again = open_sums(made.parties["site-00"].member, left.folder)
        anew = replace(made.context, attempt=2)
        if "advert" in left.words:
            assert code_of(partial(again.advertise, made.context, held(made))) == "CONTEXT_USED"
        if "confirmed" in left.words:
            assert code_of(partial(again.advertise, anew, held(made))) == "ROUND_CONFIRMED"
        elif "vector" not in left.words:
            again.advertise(anew, held(made))
        seen.add(left.words)
    assert left.ended
    assert seen == {(), ("advert",), ("advert", "vector"), ("advert", "vector", "confirmed")}


def take_part(made: Federation, folder, tell) -> None:
    """One sum in which site-00 remembers its steps and the others hold theirs in memory."""
    sums, server = open_sums(made.parties["site-00"].member, folder), SecureSum(made.context, made.roster, made.layout)
    server.take_advert(sums.advertise(made.context, held(made)))
    tell("advert")
    others = [made.parties["site-01"], made.parties["site-02"]]
    for party in others:
        party.state, advert = secagg.advertise(party.member, made.context, held(made))
        server.take_advert(advert)
    adverts = server.close_adverts()
    server.take_sealed(sums.share(adverts))
    for party in others:
        assert isinstance(party.state, secagg.Advertised)
        party.state, sealed = secagg.share(party.state, party.member, adverts)
        server.take_sealed(sealed)
    inboxes, size = server.close_sealed(), bytes_of(made.layout, 32)
    server.take_vector("site-00", size, [masked_vector(made, sums, inboxes["site-00"])])
    tell("vector")
    for party in others:
        assert isinstance(party.state, secagg.Shared)
        party.state, masks = secagg.mask(party.state, party.member, inboxes[party.member.name])
        blocks = masked(InMemory(party.delta), party.weight, party.counts, made.layout, made.context, masks)
        server.take_vector(party.member.name, size, [block.copy() for block in blocks])
    sums.confirm(server.close_vectors())
    tell("confirmed")
