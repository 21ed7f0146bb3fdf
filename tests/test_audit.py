"""Audit logs: the tree against published roots, and every way to falsify a log named by its first bad line."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models.audit import HEAD, LINE, UNSEEN, AuditLog, Head, Seen
from shared_models.audit_check import Verdict, compare, verify_log
from shared_models.audit_files import earlier_logs, every_event
from shared_models.errors import StateInvalid
from shared_models.evidence import against, earlier_verdicts, verdict_of
from shared_models.files import canonical_json
from shared_models.identity import identity_public_key, new_site_keys, sign, verify
from shared_models.merkle import EMPTY, Tree, grew, leaf_hash, node_hash

OURS, THEIRS, STRANGER = (new_site_keys().identity for _ in range(3))
PUBLIC = identity_public_key(OURS)

# The tree

LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = [  # of Certificate Transparency's own tests (google/certificate-transparency, merkle_tree_test)
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def tree_of(lines: list[bytes]) -> Tree:
    tree = Tree()
    for line in lines:
        tree.append(line)
    return tree


def by_definition(lines: list[bytes]) -> bytes:
    """MTH as RFC 6962 section 2.1 writes it."""
    if len(lines) < 2:
        return leaf_hash(lines[0]) if lines else EMPTY
    split = max(2**k for k in range(20) if 2**k < len(lines))
    return node_hash(by_definition(lines[:split]), by_definition(lines[split:]))


def test_the_roots_are_those_of_certificate_transparency():
    tree = tree_of([bytes.fromhex(leaf) for leaf in LEAVES])
    assert [tree.root(n).hex() for n in range(1, 9)] == ROOTS
    assert tree.root(0).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(st.integers(0, 70), st.data())
def test_a_list_that_grew_proves_it_and_any_other_does_not(size, data):
    lines = [str(n).encode() for n in range(size)]
    older = data.draw(st.integers(0, size))
    tree, before = tree_of(lines), by_definition(lines[:older])
    root, proof = by_definition(lines), tree.consistency(older, size)
    assert tree.root(size) == root
    assert tree.root(older) == before
    assert grew(older, before, size, root, proof)
    if 0 < older < size:
        at = data.draw(st.integers(0, len(proof) - 1))
        assert not grew(older, before, size, root, [*proof[:at], bytes(32), *proof[at + 1 :]])
        assert not grew(older, before, size, root, proof[:-1])
        assert not grew(older, before, size, root, [*proof, bytes(32)])
        assert not grew(older, bytes(32), size, root, proof)
        assert not grew(older, before, size, bytes(32), proof)
        assert not grew(size, root, older, before, proof)


# The log


class Ticks:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        self.now += 1
        return self.now


def new_log(folder: Path, key: bytes = OURS, party: str = "site north", at: float = 1000.0) -> AuditLog:
    return AuditLog(folder / "audit.jsonl", party, key, clock=Ticks(at))


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    made = new_log(tmp_path)
    for number in range(5):
        made.add("order", round=number)
    return made


def lines_of(log: AuditLog) -> list[bytes]:
    return log.path.read_bytes().split(b"\n")[:-1]


def found(log: AuditLog, content: bytes | None = None) -> tuple[int, str]:
    head = log.path.with_suffix(".head.json").read_bytes()
    verdict = verify_log(log.path.read_bytes() if content is None else content, PUBLIC, head)
    assert verdict.bad is not None
    return verdict.bad


def joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def test_a_sound_log_is_verified_whole(log):
    verdict = verify_log(log.path.read_bytes(), PUBLIC, log.path.with_suffix(".head.json").read_bytes())
    assert (verdict.lines, verdict.bad, verdict.party) == (6, None, "site north")
    assert log.path.stat().st_mode & 0o777 == 0o600
    first = json.loads(lines_of(log)[0])
    assert (first["seq"], first["event"], first["prev"]) == (0, "opened", "0" * 64)


@pytest.mark.parametrize("spoiled", [b"", b"\0" * 700, b'{"log":"'])
def test_a_head_that_a_power_cut_spoiled_is_told_with_what_to_do_and_the_next_line_makes_it_anew(log, spoiled):
    log.path.with_suffix(".head.json").write_bytes(spoiled)
    number, words = found(log)
    assert number == 6, "all lines before it are whole"
    assert "as a power cut may leave it: the next line that is written makes it anew" in words
    assert found(log, joined(lines_of(log)[:3] + lines_of(log)[4:]))[0] == 4, "a line that is bad comes first"
    log.add("order")
    head = log.path.with_suffix(".head.json").read_bytes()
    assert verify_log(log.path.read_bytes(), PUBLIC, head).bad is None


def test_a_line_is_what_its_signature_says_to_whoever_reads_it_by_the_book(log):
    line = json.loads(lines_of(log)[3])
    signature = bytes.fromhex(line.pop("sign"))
    assert verify(PUBLIC, signature, "audit-line", canonical_json(line))


def test_an_edited_line_is_named(log):
    lines = lines_of(log)
    lines[2] = lines[2].replace(b'"round":1', b'"round":7')
    assert found(log, joined(lines)) == (
        3, "is not signed by the key of this log: it was edited, or written with another key",
    )  # fmt: skip


def test_a_deleted_line_is_named(log):
    lines = lines_of(log)
    del lines[2]
    assert found(log, joined(lines)) == (3, "has number 4: lines before it were deleted, added or changed places")


def test_lines_that_changed_places_are_named(log):
    lines = lines_of(log)
    lines[2], lines[3] = lines[3], lines[2]
    assert found(log, joined(lines))[0] == 3


def test_lines_that_were_cut_off_are_named_by_the_head_that_was_signed_over_them(log):
    number, what = found(log, joined(lines_of(log)[:4]))
    assert number == 5
    assert "signed over 6 lines, the end was cut off" in what


def test_a_log_written_anew_by_the_holder_of_the_key_is_named_by_the_head(log, tmp_path):
    other = new_log(tmp_path / "other", at=5000.0)
    for number in range(5):
        other.add("order", round=number + 100)
    assert found(log, other.path.read_bytes()) == (1, f"begins another log than the head of {WHEN} was signed for")


WHEN = "1970-01-01 00:16:52 UTC"  # the twelfth tick: six lines and six heads


def test_a_log_that_was_forked_after_its_first_lines_is_named(log, tmp_path):
    (tmp_path / "fork").mkdir()
    (tmp_path / "fork" / "audit.jsonl").write_bytes(joined(lines_of(log)[:4]))
    fork = new_log(tmp_path / "fork", at=2000.0)
    for _ in range(4):
        fork.add("order", round=9)
    assert found(log, fork.path.read_bytes())[1].startswith("or one up to 6 was written anew: a head of ")
    spliced = joined([*lines_of(log)[:5], lines_of(fork)[5]])
    assert found(log, spliced) == (6, "does not follow from the line before: the log was forked here")


def test_a_line_by_another_key_is_named(log):
    body = json.loads(lines_of(log)[5])
    del body["sign"]
    forged = {**body, "sign": sign(STRANGER, LINE, canonical_json(body)).hex()}
    assert found(log, joined([*lines_of(log)[:5], canonical_json(forged)]))[0] == 6


def test_a_clock_that_was_set_back_is_named_where_a_log_was_forged_and_told_where_it_was_not(log):
    log.clock = Ticks(500.0)
    log.add("order", round=9)
    last = json.loads(lines_of(log)[-1])
    assert last["time"] == json.loads(lines_of(log)[-2])["time"]
    assert last["facts"]["clock_back_s"] > 400
    body = {k: v for k, v in last.items() if k != "sign"} | {"time": 3.0}
    forged = {**body, "sign": sign(OURS, LINE, canonical_json(body)).hex()}
    number, what = found(log, joined([*lines_of(log)[:6], canonical_json(forged)]))
    assert (number, what.split(": ")[1]) == (7, "the clock was set back while it was made")


@pytest.mark.parametrize("kept", [1, 40, 200])
def test_a_line_torn_by_a_crash_is_named_and_cut_off_by_the_next(log, kept, tmp_path):
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + lines_of(log)[-1][:kept])
    assert found(log)[0] == 7
    assert "its writer died in the middle of it" in found(log)[1]
    again = new_log(tmp_path, at=3000.0)
    again.add("order", round=9)
    assert verify_log(log.path.read_bytes(), PUBLIC).bad is None
    assert lines_of(log)[:6] == whole.split(b"\n")[:-1]


def test_a_log_that_grows_while_it_is_verified_is_not_said_to_be_cut(log, monkeypatch):
    whole = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        content = whole(path)
        if path == log.path:
            log.add("order", round=5)  # by a run under way
        return content

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    verdict = verdict_of(log.path.parent, PUBLIC)
    assert (verdict.lines, verdict.bad) == (6, None)


@given(st.binary(max_size=80))
def test_bytes_that_are_no_log_are_named_and_raise_nothing(content):
    assert verify_log(content + b"\n", PUBLIC).bad is not None


@pytest.mark.parametrize("line", [b"[]", b"null", b"{}", b'{"seq":0}', b"\xff", b"[" * 5000])
def test_lines_of_other_forms_are_named(log, line):
    assert found(log, joined([*lines_of(log), line]))[0] == 7


def add_ten(log: AuditLog) -> None:
    for number in range(10):
        log.add("order", round=number)


def test_several_processes_add_to_one_log(tmp_path):
    logs = [new_log(tmp_path) for _ in range(4)]
    threads = [threading.Thread(target=add_ten, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdict = verify_log((tmp_path / "audit.jsonl").read_bytes(), PUBLIC)
    assert (verdict.lines, verdict.bad) == (41, None)


def test_a_renewed_key_begins_a_new_log_that_names_the_old_one(log, tmp_path):
    before = log.log
    renewed = new_log(tmp_path, THEIRS)
    renewed.add("order", round=1)
    first = json.loads(renewed.path.read_bytes().split(b"\n")[0])
    assert first["facts"]["before"] == before
    assert verify_log((tmp_path / f"audit-{before[:8]}.jsonl").read_bytes(), PUBLIC).bad is None
    assert verify_log(renewed.path.read_bytes(), identity_public_key(THEIRS)).bad is None


def test_a_process_that_lives_on_while_the_key_is_renewed_goes_on_in_the_new_log(tmp_path):
    now = [(OURS, "")]
    running = replace(new_log(tmp_path), renewed=lambda: now[0])
    running.add("order", round=1)
    before, now[0] = running.log, (THEIRS, "certificate")
    new_log(tmp_path, THEIRS, at=2000.0).add("authority")
    assert running.add("order", round=2) == 2
    assert running.head().certificate == "certificate"
    new_log(tmp_path, THEIRS, at=3000.0).add("order", round=3)
    assert events(running) == ["opened", "authority", "order", "order"]
    assert verdict_of(tmp_path, identity_public_key(THEIRS)).bad is None
    assert verify_log((tmp_path / f"audit-{before[:8]}.jsonl").read_bytes(), PUBLIC).lines == 2


def test_a_process_that_knows_no_other_key_writes_nothing_into_the_log_of_one(tmp_path):
    running = new_log(tmp_path)
    running.add("order", round=1)
    new_log(tmp_path, THEIRS, at=2000.0).add("authority")
    for _ in range(2):
        with pytest.raises(StateInvalid, match="another log was begun, with another key"):
            running.add("order", round=2)
    assert events(running) == ["opened", "authority"]
    assert verdict_of(tmp_path, identity_public_key(THEIRS)).bad is None


def test_a_process_that_was_opened_with_a_key_renewed_since_does_not_put_the_new_log_away(tmp_path):
    late = replace(new_log(tmp_path), renewed=lambda: (THEIRS, ""))
    new_log(tmp_path, THEIRS).add("authority")
    late.add("order", round=1)
    assert events(late) == ["opened", "authority", "order"]
    assert sorted(tmp_path.glob("audit-*")) == []


def test_a_log_that_was_put_back_from_a_backup_under_a_process_is_read_anew(log):
    whole = log.path.read_bytes()
    log.path.write_bytes(joined(lines_of(log)[:3]))
    assert log.add("order", round=9) == 3
    assert verify_log(log.path.read_bytes(), PUBLIC).bad is None
    log.path.unlink()
    with pytest.raises(StateInvalid, match="has gone while in use"):
        log.add("order", round=10)
    log.path.write_bytes(whole)
    assert log.add("order", round=10) == 6


def test_a_renewed_key_forgets_no_head_of_another_log(pair):
    site, fed = pair
    exchange(site, fed, 3)
    renewed = new_log(fed.path.parent, identity_of_another(), "coordinator")
    renewed.add("order")
    assert (renewed.kept["north"].log, renewed.kept["north"].size) == (site.log, 4)
    site.path.write_bytes(joined(lines_of(site)[:2]))
    assert exchange(new_log(site.path.parent, at=9000.0), renewed) == ["LOG_FORKED"], "though our key changed meanwhile"
    assert verify_log(renewed.path.read_bytes(), identity_public_key(renewed.key)).bad is None


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_log_that_was_begun_by_a_process_killed_in_between_still_follows_from_the_one_before(pair, done, monkeypatch):
    site, fed = pair
    exchange(site, fed, 3)
    before, folder, moved = fed.log, fed.path.parent, list[Path]()
    rename = Path.rename

    def dies(path: Path, target: Path) -> Path:
        if len(moved) == done:
            raise KeyboardInterrupt
        moved.append(path)
        return rename(path, target)

    def dies_at_last(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", dies)
    monkeypatch.setattr(Path, "replace", dies_at_last)
    with pytest.raises(KeyboardInterrupt):
        new_log(folder, OURS, "coordinator").add("order")
    monkeypatch.undo()
    again = new_log(folder, OURS, "coordinator")
    again.add("order")
    assert json.loads(lines_of(again)[0])["facts"]["before"] == before
    assert (again.kept["north"].log, again.kept["north"].size) == (site.log, 4)
    away = folder / f"audit-{before[:8]}"
    assert verify_log(away.with_suffix(".jsonl").read_bytes(), identity_public_key(THEIRS)).bad is None
    assert json.loads(away.with_suffix(".head.json").read_bytes())["log"] == before
    assert verdict_of(folder, PUBLIC).bad is None


def test_a_new_log_seals_the_one_before_as_it_ended(log, tmp_path):
    root = by_definition(lines_of(log)).hex()
    renewed = new_log(tmp_path, THEIRS)
    renewed.add("order")
    facts = json.loads(lines_of(renewed)[0])["facts"]
    assert (facts["before"], facts["before_size"], facts["before_root"]) == (log.log, 6, root)


def identity_of_another() -> bytes:
    return new_site_keys().identity


def test_a_damaged_log_is_not_written_on(log, tmp_path):
    log.path.write_bytes(log.path.read_bytes().replace(b'{"event"', b'{"evnt"', 1))
    with pytest.raises(StateInvalid, match="line 1 is damaged"):
        new_log(tmp_path).add("order")


# What the other side keeps


@pytest.fixture
def pair(tmp_path: Path) -> tuple[AuditLog, AuditLog]:
    """A site's log and a coordinator's."""
    return new_log(tmp_path / "site"), new_log(tmp_path / "fed", THEIRS, "coordinator")


def seen_by(fed: AuditLog) -> Seen:
    """What the coordinator's next order says of the site's log."""
    return fed.head(about="north").seen


def exchange(site: AuditLog, fed: AuditLog, times: int = 1) -> list[str | None]:
    """Replies of the site, each with the head proven from the one that the coordinator keeps."""
    told: list[str | None] = []
    for _ in range(times):
        site.add("order")
        head = site.head(seen_by(fed), about="coordinator")
        assert verify(PUBLIC, bytes.fromhex(head.signature), HEAD, head.statement)
        told.append(fed.witness("north", head, PUBLIC.hex()))
    return told


def test_heads_of_a_log_that_grows_are_kept(pair):
    site, fed = pair
    assert exchange(site, fed, 12) == [None] * 12
    assert fed.kept["north"].size == site.tree.size == 13
    assert [e for e in events(fed) if e != "opened"] == ["witnessed"] * 12


def events(log: AuditLog) -> list[str]:
    return [json.loads(line)["event"] for line in lines_of(log)]


def rewritten(site: AuditLog, keep: int) -> AuditLog:
    """The site's log cut to `keep` lines by the holder of its key, who then writes on."""
    site.path.write_bytes(joined(lines_of(site)[:keep]))
    return new_log(site.path.parent, at=9000.0)


@pytest.mark.parametrize(
    ("keep", "more", "code"),
    [(6, 0, "LOG_CUT"), (6, 20, "LOG_FORKED"), (8, 0, "LOG_FORKED"), (9, 0, "LOG_CUT"), (15, 0, "LOG_FORKED")],
)
def test_a_site_that_cut_or_rewrote_its_log_is_found_by_the_next_reply(pair, keep, more, code):
    site, fed = pair
    for _ in range(5):  # heads of 3, 6, 9, 12 and 15 lines are kept
        site.add("order")
        site.add("order")
        exchange(site, fed)
    site.path.write_bytes(joined(lines_of(site)[:15]))
    again = rewritten(site, keep)
    for _ in range(more):
        again.add("order", other=True)
    assert exchange(again, fed) == [code]
    assert all(exchange(again, fed, 2))
    refusals = [json.loads(line)["facts"] for line in lines_of(fed) if b"witness-refused" in line]
    assert refusals[0]["problem"] == code
    assert refusals[0]["head"]["signature"]  # the evidence
    assert len(refusals) == len({facts["problem"] for facts in refusals})  # each problem is written down once


def test_a_site_that_begins_a_new_log_with_the_same_key_is_found(pair):
    site, fed = pair
    exchange(site, fed, 3)
    site.path.unlink()
    again = new_log(site.path.parent, at=7000.0)
    assert exchange(again, fed) == ["LOG_REPLACED"]


def test_heads_that_overtake_each_other_are_no_fraud(pair):
    site, fed = pair
    exchange(site, fed)
    kept = fed.kept["north"]
    first, second = (_later(site, kept.log, kept.size) for _ in range(2))
    assert fed.witness("north", second, PUBLIC.hex()) is None
    assert fed.witness("north", first, PUBLIC.hex()) is None
    assert fed.kept["north"].size == second.size
    assert "witness-refused" not in events(fed)


def _later(site: AuditLog, log: str, size: int) -> Head:
    site.add("order")
    return site.head(Seen(log, size))


def test_a_log_that_its_owner_finds_shorter_than_others_keep_says_so_itself(pair):
    site, fed = pair
    exchange(site, fed, 5)
    again = rewritten(site, 3)
    again.head(seen_by(fed), about="coordinator")
    assert json.loads(lines_of(again)[-1])["facts"]["problem"] == "OWN_LOG_CUT"


@pytest.mark.parametrize("more", [0, 2, 3, 4, 100])  # it had six lines; three are as long as before
def test_a_log_that_was_cut_says_so_itself_however_long_it_has_grown_since(pair, more):
    site, fed = pair
    exchange(site, fed, 5)
    assert seen_by(fed) == (site.log, 6, site.tree.root().hex())
    again = rewritten(site, 3)
    for _ in range(more):
        again.add("order", other=True)
    assert again.was_cut(seen_by(fed), "coordinator")
    assert again.was_cut(seen_by(fed), "coordinator")
    assert events(again).count("witness-refused") == 1
    assert again.was_cut(UNSEEN, "coordinator"), "what was found once holds though it is not told again"
    assert new_log(again.path.parent).was_cut(UNSEEN, "coordinator"), "and in the next process"


def test_that_a_log_was_cut_is_not_forgotten_over_what_is_found_wrong_with_the_other_one(pair):
    site, fed = pair
    for _ in range(5):
        exchange(site, fed)
        theirs = fed.head(site.head(about="coordinator").seen, about="north")
        assert site.witness("coordinator", theirs, THEIRS_PUBLIC.hex()) is None
    backup = joined(lines_of(fed)[:2])
    again = rewritten(site, 5)
    assert again.was_cut(seen_by(fed), "coordinator")
    fed.path.write_bytes(backup)  # both were put back, and the older coordinator knows no more than the older site
    older = new_log(fed.path.parent, THEIRS, "coordinator", at=9000.0)
    older.add("order", other=True)
    assert again.witness("coordinator", older.head(about="north"), THEIRS_PUBLIC.hex()) == "LOG_FORKED"
    assert again.was_cut(seen_by(older), "coordinator")


def test_a_log_that_only_grew_was_not_cut_whatever_older_head_is_kept_of_it(pair):
    site, fed = pair
    heads = [UNSEEN, seen_by(fed)]
    for _ in range(7):
        exchange(site, fed)
        heads.append(seen_by(fed))  # each may be what a coordinator that was put back from a backup still knows
    assert len(set(heads)) == 8
    assert not any(site.was_cut(seen, "coordinator") for seen in heads)
    renewed = new_log(site.path.parent, new_site_keys().identity)  # as after `fedclient rejoin`
    assert not renewed.was_cut(heads[-1], "coordinator")
    assert "witness-refused" not in events(site) + events(renewed)


def test_two_logs_side_by_side_name_the_line_from_which_one_was_cut(pair):
    site, fed = pair
    exchange(site, fed, 5)
    theirs = verify_log(fed.path.read_bytes(), identity_public_key(THEIRS))
    assert compare(verify_log(site.path.read_bytes(), PUBLIC), theirs) is None
    cut = verify_log(joined(lines_of(site)[:4]), PUBLIC)  # with its own head thrown away, it is sound by itself
    assert cut.bad is None
    wrong = compare(cut, theirs)
    assert wrong is not None
    assert wrong[0] == 5


def test_a_head_that_was_made_up_is_the_fault_of_who_keeps_it(pair):
    site, fed = pair
    exchange(site, fed, 2)
    ours, named = verify_log(site.path.read_bytes(), PUBLIC), THEIRS_PUBLIC.hex()
    fed._write("witnessed", {"peer": "north", "key": PUBLIC.hex(), **_facts(replace(site.head(), root="0" * 64))})
    files = {"audit.jsonl": fed.path.read_bytes(), "key.txt": named.encode()}
    mine, theirs = against(ours, files, THEIRS_PUBLIC)
    assert (mine.bad, mine.lines) == (None, 3)
    assert theirs.bad == (
        4, "keeps a head of the other log that the key of that log has not signed: it was made up",
    )  # fmt: skip


THEIRS_PUBLIC = identity_public_key(THEIRS)


def _facts(head: Head) -> dict[str, object]:
    return {"log": head.log, "size": head.size, "root": head.root, "time": head.time, "signature": head.signature}


def line_of(kind: str, facts: dict[str, object], **change: object) -> bytes:
    """The only line of a log, signed by the holder of its key, whatever it says."""
    body = {"seq": 0, "event": kind, "facts": facts, "prev": "0" * 64, "time": 1.0, **change}
    return canonical_json({**body, "sign": sign(THEIRS, LINE, canonical_json(body)).hex()}) + b"\n"


GOOD_FACTS: dict[str, object] = {
    "peer": "c", "key": "ab" * 32, "log": "0" * 64, "size": 1, "root": "0" * 64, "time": 1.0, "signature": "0" * 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("event", "facts"),
    [
        *(
            ("witnessed", {**GOOD_FACTS, **wrong})
            for wrong in (
                {"signature": "zz"}, {"time": 1e300}, {"size": -3}, {"root": None}, {"key": "00"}, {"peer": 3},
                {"log": ["0"]}, {"size": True},
            )
        ),
        ("witnessed", {}),
        ("witness-refused", {"peer": "c"}),
        ("witness-refused", {"peer": ["c"], "problem": "LOG_CUT"}),
        ("opened", {"key": THEIRS_PUBLIC.hex(), "before": "no digest"}),
        ("opened", {"key": THEIRS_PUBLIC.hex(), "before": "0" * 64, "before_size": -1}),
    ],
)  # fmt: skip
def test_a_signed_line_that_says_what_none_can_is_named_and_raises_nothing(event, facts):
    found = verify_log(line_of(event, facts), THEIRS_PUBLIC)
    assert found.bad is not None
    assert (found.bad[0], "says what no line of its kind" in found.bad[1]) == (1, True)
    assert verify_log(line_of("witnessed", GOOD_FACTS), THEIRS_PUBLIC).bad is None


@pytest.mark.parametrize(
    "change", [{"seq": "0"}, {"time": 1e300}, {"time": -1.0}, {"time": 10**400}, {"prev": 0}, {"event": []}]
)
def test_a_signed_line_whose_own_fields_are_of_other_kinds_is_named_and_raises_nothing(change):
    assert verify_log(line_of("order", {}, **change), THEIRS_PUBLIC).bad is not None
    assert verify_log(line_of("opened", {"key": "no key"}, **change), None).bad is not None


# Logs of earlier keys


@pytest.fixture
def renewed(log: AuditLog, tmp_path: Path) -> AuditLog:
    """The log that was begun after `log` of six lines, with another key."""
    made = new_log(tmp_path, THEIRS, at=2000.0)
    made.add("order")
    return made


def earlier(renewed: AuditLog) -> Verdict:
    newest = verify_log(renewed.path.read_bytes(), THEIRS_PUBLIC)
    assert newest.bad is None
    (found,) = earlier_verdicts(renewed.path.parent, newest).values()
    return found


def kept_away(log: AuditLog) -> Path:
    return log.path.with_name(f"audit-{log.log[:8]}.jsonl")


def test_the_log_of_the_key_before_is_verified_too(log, renewed):
    found = earlier(renewed)
    assert (found.lines, found.bad, found.key, found.before) == (6, None, PUBLIC.hex(), None)
    third = new_log(log.path.parent, STRANGER, at=3000.0)
    third.add("order")
    newest = verify_log(third.path.read_bytes(), identity_public_key(STRANGER))
    told = earlier_verdicts(log.path.parent, newest)
    assert {name: (each.lines, each.bad) for name, each in told.items()} == {
        f"audit-{renewed.log[:8]}.jsonl": (2, None),
        f"audit-{log.log[:8]}.jsonl": (6, None),
    }


def test_logs_come_in_the_order_in_which_they_name_each_other_whatever_the_clock_said(log, renewed, tmp_path):
    third = new_log(tmp_path, STRANGER, at=500.0)  # the clock was set back
    third.add("order")
    new_log(tmp_path, identity_of_another(), at=400.0).add("order")
    assert earlier_logs(tmp_path) == [kept_away(each) for each in (log, renewed, third)]
    assert [line["facts"]["round"] for line in every_event(tmp_path, ("order",)) if line["facts"]] == [0, 1, 2, 3, 4]


def test_whoever_took_the_key_before_can_neither_cut_nor_add_to_its_log_nor_write_it_anew(log, renewed):
    path = kept_away(log)
    whole, head = path.read_bytes(), path.with_suffix(".head.json")
    head.unlink()
    path.write_bytes(joined(whole.split(b"\n")[:4]))
    assert earlier(renewed).bad == (
        5, "is missing: it had 6 lines when the next log was begun, the end was cut off",
    )  # fmt: skip
    forging = AuditLog(path, "site north", OURS, clock=Ticks(1500.0))
    for number in range(2):
        forging.add("order", round=number + 70)
    head.unlink()
    assert earlier(renewed).bad == (1, "or one up to 6 was written anew after the next log was begun")
    path.write_bytes(whole)
    AuditLog(path, "site north", OURS, clock=Ticks(1500.0)).add("order")
    assert earlier(renewed).bad == (7, "was added after the next log was begun")
    path.unlink()
    assert earlier(renewed).bad == (1, "and all others are missing: the log is gone")
