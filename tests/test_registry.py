"""From a run to a release that a hospital verifies, who must approve it, and what becomes of it when a site leaves."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fedclient.cli import app as fedclient
from fedclient.policy import Policy
from fedserver import holding, registry, rounds
from fedserver.app import presence
from fedserver.checkpoint import RunFolder, excluded, read_state
from fedserver.cli import app as fedserver
from fedserver.cohort import Presence
from fedserver.enrol import Federation, authority_of, open_federation, open_log, signer
from fedserver.publish.card import Words
from fedserver.publish.proofs import audit_extract, newest_roster
from fedserver.records import Records
from fedserver.setting import note_closed
from fedserver.signed import check_signed, counted_answers, signed_lines
from fedserver.state import Run, add_run, find_run, find_site
from fedserver.submit import submit
from fedserver.withdrawal import begin_from, copy_until, retrain, withdraw
from shared_models.audit import LINE, AuditLog
from shared_models.audit_files import LOG, earlier_logs, first_line
from shared_models.errors import ReleaseInvalid, StateInvalid
from shared_models.files import canonical_json, file_sha256, locked, read_json, read_lines, write_atomic, write_json
from shared_models.identity import (
    identity_public_key,
    issue_signer,
    new_site_keys,
    save_credential,
    save_secret,
    sign,
)
from shared_models.merkle import Tree, holds
from shared_models.nets import initial_weights
from shared_models.parse import parse_json, plain
from shared_models.plan import Plan
from shared_models.plan import sha256 as plan_sha256
from shared_models.protect.privacy import Protect
from shared_models.protect.secure import SecureAggregation
from shared_models.provenance import (
    ANSWERS,
    AUDIT,
    ENVIRONMENT,
    ROSTER,
    ROSTERS,
    Extract,
    Leaf,
    _check_answers,
    _check_audit,
    against_kept,
    against_roster,
    check_provenance,
    wanted,
)
from shared_models.release import MANIFEST, Manifest, Trust, open_release, read_approvals, seal
from shared_models.roster import sign_roster
from shared_models.standing import read_standings
from shared_models.study import Model, Study, Transfer, canonical, sha256
from simulations.release import research_release
from simulations.run_folder import run_at
from tests.edge import running_edge
from tests.hospitals import Hospitals
from tests.releases import tiny_study

STUDY = tiny_study(rounds={"count": 3, "quorum": 2, "deadline_s": 300, "gather_s": 0, "pause_s": 300})
INSIDE = Policy(approval="inside-policy")


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """Two sites from round 1 on, a third from round 3: real rounds over a real gateway; the learner is a toy."""
    folder = tmp_path_factory.mktemp("registry")
    with running_edge(folder / "federation") as edge:
        made = Hospitals(edge, folder / "sites")
        for name in ("east", "north", "south"):
            made.join(name, INSIDE)
        queued(made, "lung", STUDY)
        made.run(STUDY, "lung", weights=initial_weights(STUDY), presence=lambda: joining(made))
        yield made


def queued(made: Hospitals, run: str, study: Study) -> None:
    federation = made.edge.federation
    add_run(federation.state, Run(run, study.name, sha256(study), "finished", None, 1.0, 1.0, ""))


def joining(made: Hospitals) -> Presence:
    """East is there once round 2 is finished."""
    finished = read_state(RunFolder(made.edge.federation.runs / "lung")).round
    numbered = dict(enumerate(sorted(made.sites), start=1))
    return Presence({name: number for number, name in numbered.items() if name != "east" or finished >= 2})


@pytest.fixture(scope="module")
def entry(hospitals: Hospitals) -> registry.Entry:
    return registry.register(hospitals.edge.federation, RunFolder(hospitals.edge.federation.runs / "lung"))


@pytest.fixture
def trust(hospitals: Hospitals) -> Trust:
    return registry.trust_of(hospitals.edge.federation)


@pytest.fixture
def copy(hospitals: Hospitals, entry: registry.Entry, tmp_path: Path) -> Path:
    """The release, outside the registry, for a test to spoil."""
    return registry.export_release(hospitals.edge.federation, entry, tmp_path / "out", single_file=False)


def typed(app: Any, *words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, done.output
    return done.output


def test_a_run_becomes_a_release_that_a_hospital_verifies_by_what_it_pinned_at_join(hospitals, entry, tmp_path):
    folder, site = str(hospitals.edge.federation.folder), str(hospitals.sites["north"])
    typed(
        fedserver, "release", "lung", "--version", "1", "--out", str(tmp_path), "--single-file", "--federation", folder
    )
    path = tmp_path / "tiny-lung-1.fedrelease"
    told = json.loads(typed(fedclient, "verify", str(path), "--site", site, "--run", "--json"))
    assert told["digest"] == entry.digest
    assert told["sites"] == {"east": 1, "north": 3, "south": 3}
    assert max(form["probability"] for form in told["parity"].values()) < 1e-4
    assert any("3 rounds closed" in words for words in told["shown"])
    assert any("of which this site keeps" in words for words in told["shown"])


def test_a_changed_file_makes_verify_fail_and_name_it(hospitals, copy):
    content = (copy / "card.html").read_bytes()
    (copy / "card.html").write_bytes(content.replace(b"Not for diagnosis", b"Fit for diagnosis"))
    said = typed(fedclient, "verify", str(copy), "--site", str(hospitals.sites["north"]), code=1)
    assert "card.html" in said
    assert "changed" in said


def test_verify_asks_for_an_authority_where_none_is_pinned(copy, tmp_path):
    said = typed(fedclient, "verify", str(copy), "--site", str(tmp_path / "nowhere"), code=1)
    assert "--authority" in said


def test_the_lines_of_the_log_are_about_the_run_and_prove_their_place(hospitals, copy, trust):
    extract = json.loads((copy / AUDIT).read_bytes())
    lines = [json.loads(leaf["line"]) for leaf in extract["leaves"]]
    assert {line["facts"]["run"] for line in lines} == {"lung"}
    assert [line["event"] for line in lines] == ["run-opened", *["round-closed"] * 3, "run-finished"]
    shown = check_provenance(open_release(copy, trust), trust.authorities)
    counted = sum(len(line["facts"]["counted"]) for line in lines if line["event"] == "round-closed")
    assert f"{counted} updates that were counted are signed by their hospitals, each for its round of its run" in shown


def test_what_a_hospital_has_not_signed_counts_for_nothing_in_the_evidence(copy, hospitals, tmp_path):
    def edit(facts: Any) -> None:
        facts["answers"][0]["envelope"] = facts["answers"][0]["envelope"].replace('"round":1', '"round":2')

    def swap(facts: Any) -> None:
        one, other = facts["answers"][:2]
        one["signature"], other["signature"] = other["signature"], one["signature"]

    def cut(facts: Any) -> None:
        del facts["answers"][0]

    for n, (change, words) in enumerate([(edit, "lacks what"), (swap, "signed it"), (cut, "lacks what")]):
        found = spoilt(Path(shutil.copytree(copy, tmp_path / str(n))), hospitals, ANSWERS, change)
        assert found.file == ANSWERS
        assert words in str(found)


def test_a_signature_under_a_key_that_its_maker_made_up_proves_nothing_and_verify_says_so(copy, hospitals, trust):
    site = str(hospitals.sites["north"])
    assert not json.loads(typed(fedclient, "verify", str(copy), "--site", site, "--json"))["warnings"]
    mine = new_site_keys().identity

    def forge(facts: Any) -> None:
        for answer in facts["answers"]:
            if answer["site"] == "north":
                answer["signature"] = sign(mine, "answer", answer["envelope"].encode()).hex()
                answer["key"] = identity_public_key(mine).hex()

    resealed(copy, hospitals, ANSWERS, forge)
    shown = check_provenance(open_release(copy, trust), trust.authorities)
    assert any("; 3 of them under keys that no roster here has" in words for words in shown)
    said = " ".join(typed(fedclient, "verify", str(copy), "--site", site, code=1).split())
    assert "3 of 7 signatures of hospitals (north) are under keys that no roster in the release has" in said
    assert "prove nothing about who signed" in said
    told = json.loads(typed(fedclient, "verify", str(copy), "--site", site, "--json", code=1))
    assert "prove nothing" in told["warnings"][0]


def test_another_roster_than_the_site_has_seen_of_that_epoch_is_told(copy, hospitals, trust):
    opened, federation = open_release(copy, trust), hospitals.edge.federation
    seen = newest_roster(federation)[1]
    (words,) = against_roster(opened, trust.authorities, seen)
    assert words == f"the roster of epoch {seen.roster.epoch} is the one that this site has seen"
    assert against_roster(opened, trust.authorities, None) == []
    other = sign_roster(signer(federation), replace(seen.roster, sites={"north": "0" * 64}))
    with pytest.raises(ReleaseInvalid, match="two histories are told"):
        against_roster(opened, trust.authorities, other)
    assert against_roster(opened, trust.authorities, replace(other, signature="0" * 128)) == []  # of nobody it trusts


def test_what_was_counted_and_no_hospital_signed_is_told(copy, trust):
    release = open_release(copy, trust)
    lines = [{"run": "lung", "round": 1, "counted": ["north", "ghost"], "signed": {}, "weights": "x"}]
    assert _check_answers(release, lines) == ["2 updates were counted, and none of them is signed by its hospital"]
    assert _check_answers(release, [{**lines[0], "counted": []}]) == []


def resealed(copy: Path, hospitals: Hospitals, name: str, change: Any, **origin: Any) -> bytes:
    """A coordinator signs evidence that it has changed; the certificate of its authority."""
    federation = hospitals.edge.federation
    authority = federation.ca_certificate.read_bytes()
    if name:
        facts = json.loads((copy / name).read_bytes())
        change(facts)
        (copy / name).write_text(json.dumps(facts, sort_keys=True, separators=(",", ":")))
    manifest = parse_json(Manifest, (copy / MANIFEST).read_bytes(), MANIFEST)
    seal(copy, replace(manifest, origin=replace(manifest.origin, **origin)), signer(federation), authority)
    return authority


def spoilt(copy: Path, hospitals: Hospitals, name: str, change: Any, **origin: Any) -> ReleaseInvalid:
    """A coordinator that signs evidence which is not so."""
    authority = resealed(copy, hospitals, name, change, **origin)
    with pytest.raises(ReleaseInvalid) as found:
        check_provenance(open_release(copy, Trust((authority,))), (authority,))
    return found.value


def contradiction(copy: Path, hospitals: Hospitals, **origin: Any) -> ReleaseInvalid:
    return spoilt(copy, hospitals, "", None, **origin)


def test_a_line_that_was_edited_moved_or_cut_from_the_tree_is_found(copy, hospitals, tmp_path):
    def edit(facts: Any) -> None:
        line = json.loads(facts["leaves"][1]["line"])
        line["facts"]["counted"] = ["north"]
        facts["leaves"][1]["line"] = json.dumps(line, sort_keys=True, separators=(",", ":"))

    def move(facts: Any) -> None:
        facts["leaves"][1]["index"] += 1

    def regrow(facts: Any) -> None:
        facts["size"] -= 1

    for n, (change, words) in enumerate([(edit, "not as it was signed"), (move, "not in the tree"), (regrow, "head")]):
        fresh = Path(shutil.copytree(copy, tmp_path / str(n)))
        found = spoilt(fresh, hospitals, AUDIT, change)
        assert found.file == AUDIT
        assert words in str(found)


def test_a_log_that_is_another_than_the_site_has_seen_is_told(copy, trust):
    opened, extract = open_release(copy, trust), json.loads((copy / AUDIT).read_bytes())
    seen = {"log": extract["log"], "size": extract["size"], "root": extract["root"]}
    assert against_kept(opened, [seen]) == ["the log is the one of which this site keeps 1 heads"]
    assert against_kept(opened, [seen | {"log": "0" * 64}]) == []
    with pytest.raises(ReleaseInvalid, match="two histories"):
        against_kept(opened, [seen | {"root": "0" * 64}])


def test_a_manifest_that_says_otherwise_than_the_log_is_refused(copy, hospitals):
    assert "more often" in str(contradiction(copy, hospitals, sites={"north": 3, "south": 3}))
    assert "model.safetensors" in str(contradiction(copy, hospitals, weights_sha256="a" * 64))


def test_another_roster_or_environment_than_the_manifest_names_is_refused(copy, hospitals):
    assert contradiction(copy, hospitals, roster_epoch=1).file == ROSTER
    assert contradiction(copy, hospitals, environment_sha256="a" * 64).file == ENVIRONMENT


def test_nothing_is_released_on_a_log_that_is_not_whole(hospitals, tmp_path):
    federation = replace(hospitals.edge.federation, folder=tmp_path / "federation")
    shutil.copytree(hospitals.edge.federation.folder, federation.folder)
    lines = (federation.folder / LOG).read_bytes().split(b"\n")
    (federation.folder / LOG).write_bytes(b"\n".join([*lines[:3], *lines[4:]]))
    with pytest.raises(StateInvalid, match=r"line 4 .*Nothing is released"):
        registry.register(federation, RunFolder(federation.runs / "lung"))


@pytest.fixture(scope="module")
def renewed(hospitals: Hospitals, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A copy of the federation whose key for statements was renewed twice since the run was finished."""
    folder = tmp_path_factory.mktemp("renewed") / "federation"
    federation = replace(hospitals.edge.federation, folder=folder)
    shutil.copytree(hospitals.edge.federation.folder, folder)
    for number in range(2):
        save_credential(federation.signer, issue_signer(authority_of(federation)))
        open_log(federation).add("authority", list=number)
    return federation


def test_a_run_that_was_begun_under_an_earlier_key_is_released_and_its_evidence_proves_every_log(
    renewed, hospitals, tmp_path
):
    made = registry.register(renewed, RunFolder(renewed.runs / "lung"), "renewed")
    copy = registry.export_release(renewed, made, tmp_path / "out", single_file=False)
    trust = registry.trust_of(renewed)
    shown = check_provenance(open_release(copy, trust), trust.authorities)
    said = [words for words in shown if "3 rounds closed" in words]
    assert "they go back to 2 logs of keys before, each sealed by the next" in said[0]
    assert len(json.loads((copy / ANSWERS).read_bytes())["answers"]) == sum(made.sites.values())
    extract = json.loads((copy / AUDIT).read_bytes())
    assert [len(leaves) for leaves in (extract["leaves"], *extract["earlier"])] == [1, 1, 6]

    def swear(facts: Any, key: bytes) -> None:
        """The holder of the first key signs another line."""
        line = json.loads(facts["earlier"][1][2]["line"])
        line["facts"]["counted"] = ["north"]
        body = {name: value for name, value in line.items() if name != "sign"}
        line["sign"] = sign(key, LINE, canonical_json(body)).hex()
        facts["earlier"][1][2]["line"] = canonical_json(line).decode()

    stolen, other = signer(hospitals.edge.federation).key, new_site_keys().identity
    changes: list[tuple[Any, str]] = [
        (lambda facts: facts["leaves"].pop(0), "lacks the line that says how the log before ended"),
        (lambda facts: facts["earlier"][0].pop(0), "lacks the first line of a log before"),
        (lambda facts: facts["earlier"][1].pop(0), "lacks the first line of a log before"),
        (lambda facts: facts["earlier"].pop(0), "lacks the first line of a log before"),
        (lambda facts: facts["earlier"].pop(), "knows the run by another study"),
        (lambda facts: swear(facts, stolen), "not in the tree"),
        (lambda facts: swear(facts, other), "not as it was signed"),
    ]
    of: Any = SimpleNamespace(edge=SimpleNamespace(federation=renewed))
    for number, (change, words) in enumerate(changes):
        found = spoilt(Path(shutil.copytree(copy, tmp_path / str(number))), of, AUDIT, change)
        assert (found.file, words in str(found)) == (AUDIT, True), str(found)
    opened, (first, *_) = open_release(copy, trust), extract["earlier"][1]
    log, sealing = hashlib.sha256(first["line"].encode()).hexdigest(), json.loads(extract["earlier"][0][0]["line"])
    seen = {"log": log, "size": sealing["facts"]["before_size"], "root": sealing["facts"]["before_root"]}
    assert against_kept(opened, [seen]) == ["the log is the one of which this site keeps 1 heads"]
    for more in ({"root": "0" * 64}, {"size": seen["size"] + 1}):
        with pytest.raises(ReleaseInvalid, match="two histories"):
            against_kept(opened, [seen | more])


def test_what_was_counted_under_an_earlier_key_is_missed_when_it_is_cut(renewed, hospitals, tmp_path):
    federation = replace(renewed, folder=tmp_path / "federation")
    shutil.copytree(renewed.folder, federation.folder)
    assert counted_answers(federation) == counted_answers(hospitals.edge.federation) != {}
    assert Records(open_log(federation), federation.state, lambda: federation.authority).closed("lung", 3)
    told = json.loads(typed(fedserver, "audit", "verify", "--json", "--federation", str(federation.folder)))
    assert [found["wrong"] for found in told.values()] == [None] * 3
    kept = RunFolder(federation.runs / "lung").signed
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:-4]))  # three scores, one update
    with pytest.raises(StateInvalid, match="lacks 1 answers that the audit log says were counted"):
        check_signed(federation)
    with pytest.raises(StateInvalid, match="lacks 1 answers that were counted"):
        registry.register(federation, RunFolder(federation.runs / "lung"), "cut")


def test_nothing_is_released_on_an_earlier_log_that_was_cut(renewed, tmp_path):
    federation = replace(renewed, folder=tmp_path / "federation")
    shutil.copytree(renewed.folder, federation.folder)
    oldest = earlier_logs(federation.folder)[0]
    oldest.write_bytes(b"".join(oldest.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(StateInvalid, match=f"the coordinator's log before, {oldest.name}: .* the end was cut off"):
        audit_extract(federation, {"lung": None})
    typed(fedserver, "audit", "verify", "--federation", str(federation.folder), code=1)


def test_a_run_under_way_goes_on_in_the_log_of_the_key_that_was_renewed_meanwhile(renewed, tmp_path):
    federation = replace(renewed, folder=tmp_path / "federation")
    shutil.copytree(renewed.folder, federation.folder)
    running = Records(open_log(federation), federation.state, lambda: federation.authority)
    running.add("run-opened", run="later", round=0, study="0" * 64)
    save_credential(federation.signer, issue_signer(authority_of(federation)))
    open_log(federation).add("authority", list=3)
    running.add("round-closed", run="later", round=1)
    assert running.log.head().certificate == signer(federation).certificate.decode()
    assert running.closed("later", 1)
    told = json.loads(typed(fedserver, "audit", "verify", "--json", "--federation", str(federation.folder)))
    assert [found["wrong"] for found in told.values()] == [None] * 4
    events = [line["event"] for line in read_lines(federation.audit)]
    assert events == ["opened", *["witnessed"] * 3, "authority", "round-closed"]


def test_a_log_that_the_next_one_does_not_seal_proves_nothing_and_stops_no_release_of_later_runs(
    renewed, tmp_path, monkeypatch
):
    federation = replace(renewed, folder=tmp_path / "federation")
    shutil.copytree(renewed.folder, federation.folder)
    save_credential(federation.signer, issue_signer(authority_of(federation)))
    before = hashlib.sha256(first_line(federation.audit)).hexdigest()
    monkeypatch.setattr("shared_models.audit._ended", lambda folder: ({"before": before}, []))  # as logs once began
    open_log(federation).add("run-opened", run="later", round=0, study="0" * 64)
    assert [leaf["index"] for leaf in json.loads(audit_extract(federation, {"later": None}))["leaves"]] == [1]
    with pytest.raises(StateInvalid, match=r"audit\.jsonl: was begun before logs were sealed"):
        audit_extract(federation, {"lung": None})


def test_an_update_that_is_counted_late_belongs_to_the_releases_from_the_round_on_that_counts_it(tmp_path):
    key = new_site_keys().identity
    log = AuditLog(tmp_path / LOG, "coordinator", key)
    log.add("run-opened", run="late", round=0, study="a" * 64)
    log.add("round-closed", run="late", round=1, counted=["north"], signed={}, weights="1" * 64)
    log.add("reply-counted", run="late", round=1, site="south", why="late")
    signed = {"south (round 1)": "b" * 64}
    log.add("round-closed", run="late", round=2, counted=["north"], signed=signed, weights="2" * 64)
    head, texts = log.head(), log.path.read_bytes().split(b"\n")[:-1]

    def shown(number: int, sites: dict[str, int]) -> list[str]:
        kept = [n for n, text in enumerate(texts) if wanted(json.loads(text), {"late": number})]
        leaves = [Leaf(n, texts[n].decode(), tuple(p.hex() for p in log.tree.inclusion(n))) for n in kept]
        extract = plain(Extract(head.log, head.size, head.root, head.time, head.signature, tuple(leaves)))
        origin = SimpleNamespace(
            run="late", round=number, study_sha256="a" * 64, plan_sha256=None, sites=sites,
            weights_sha256=str(number) * 64,
        )  # fmt: skip
        manifest = SimpleNamespace(origin=origin, files={AUDIT: SimpleNamespace(bytes=1)})
        release: Any = SimpleNamespace(manifest=manifest, content=lambda name: canonical_json(extract))
        return _check_audit(release, identity_public_key(key))

    assert "1 rounds closed" in shown(1, {"north": 1})[0]
    with pytest.raises(ReleaseInvalid, match="counts 'south' more often"):
        shown(2, {"north": 2})


def test_a_version_is_taken_once_and_an_earlier_round_is_released_as_not_tested(hospitals, entry):
    federation = hospitals.edge.federation
    run = RunFolder(federation.runs / "lung")
    with pytest.raises(StateInvalid, match="is there already"):
        registry.register(federation, run, version="1")
    second = registry.register(federation, run, round_number=2)
    assert (second.version, second.round, second.sites) == ("2", 2, {"north": 2, "south": 2})
    card = json.loads((registry.folder_of(federation, second.digest) / "release/card.json").read_text())
    assert "It was not scored on test patients." in card["limits"]


def test_a_run_whose_sites_keep_layers_has_no_model_to_release(hospitals):
    federation = hospitals.edge.federation
    study = replace(STUDY, name="kept", personal=replace(STUDY.personal, keep=("norm",)))
    like_lung(hospitals, federation.runs / "kept", study)
    with pytest.raises(StateInvalid, match="keep their norm layers"):
        registry.register(federation, RunFolder(federation.runs / "kept"))


def test_a_version_or_an_approver_that_none_can_be_called_is_refused_and_the_registry_stays_readable(hospitals, entry):
    federation = hospitals.edge.federation
    run, known = RunFolder(federation.runs / "lung"), registry.list_releases(federation)
    key = new_site_keys().identity
    asking = replace(federation, approvals=1, approvers={"ada": identity_public_key(key).hex()})
    said = typed(fedserver, "release", "lung", "--version", "V 1", "--federation", str(federation.folder), code=1)
    assert "version 'V 1': allowed are 1 to 32 of a-z" in " ".join(said.split())
    for version in ("V 1", "x" * 33, "", ".1"):
        with pytest.raises(ReleaseInvalid, match="Choose another --version"):
            registry.register(asking, run, version)
    assert registry.list_releases(federation) == known
    for name, its in (("x" * 65, None), ("ada", None), ("ada", key)):
        with pytest.raises(StateInvalid, match=r"needs 0 of no approvers.* or neither"):
            registry.approve_release(federation, entry.label, name, its)
    assert registry.list_releases(federation) == known


def test_stages_go_from_candidate_over_approved_to_retired_and_stand_in_the_log(hospitals, entry):
    federation = hospitals.edge.federation
    folder = str(federation.folder)
    assert entry.stage == "candidate"
    typed(fedserver, "release-approve", "tiny-lung-1", "--federation", folder)
    assert registry.find_release(federation, "tiny-lung-1").stage == "approved"
    typed(fedserver, "release-retire", entry.digest[:8], "--reason", "a better one is there", "--federation", folder)
    rows = json.loads(typed(fedserver, "releases", "--json", "--federation", folder))
    assert next(row for row in rows if row["digest"] == entry.digest)["stage"] == "retired"
    again = ["release", "lung", "--version", "1", "--out", folder, "--federation", folder]
    refused = CliRunner().invoke(fedserver, again)
    assert refused.exit_code == 1
    assert "is retired (a better one is there)" in " ".join(refused.output.split())
    assert not (federation.folder / "tiny-lung-1").exists()
    events = [
        line["event"] for line in read_lines(federation.folder / LOG) if line["facts"].get("digest") == entry.digest
    ]
    assert events == ["release-made", "release-approved", "release-retired"]


def test_the_list_of_releases_reaches_a_hospital_which_then_refuses_what_is_retired(hospitals, tmp_path):
    federation, site = hospitals.edge.federation, str(hospitals.sites["south"])
    made = registry.register(federation, RunFolder(federation.runs / "lung"), "listed")
    path = str(registry.export_release(federation, made, tmp_path, single_file=False))
    assert "no list of the federation's releases was handed in" in typed(fedclient, "verify", path, "--site", site)

    def listed(name: str) -> list[str]:
        typed(fedserver, "release-status", str(tmp_path / name), "--federation", str(federation.folder))
        return ["--status", str(tmp_path / name)]

    first = json.loads(typed(fedclient, "verify", path, "--site", site, *listed("first"), "--json"))
    assert any("candidate by the list of" in words for words in first["shown"])
    assert any("candidate" in words for words in first["warnings"])
    registry.retire_release(federation, made.label, "a fault was found")
    assert "a fault was found" in typed(fedclient, "verify", path, "--site", site, *listed("second"), code=1)
    assert "a fault was found" in typed(fedclient, "verify", path, "--site", site, code=1)  # kept
    assert [line["facts"]["days"] for line in read_lines(federation.folder / LOG)
            if line["event"] == "release-status"] == [30.0, 30.0]  # fmt: skip


def test_an_approval_that_waits_for_a_retirement_does_not_undo_it(hospitals):
    federation = hospitals.edge.federation
    made = registry.register(federation, RunFolder(federation.runs / "lung"), version="twice")
    with ThreadPoolExecutor(1) as other, locked(federation.folder / "registry" / ".lock"):
        waiting = other.submit(registry.approve_release, federation, made.label)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        registry._said(federation, made, "retired", "coordinator", "release-retired", "a fault was found")
    with pytest.raises(StateInvalid, match="is retired"):
        waiting.result(timeout=20)
    assert registry.find_release(federation, made.label).stage == "retired"


def test_a_release_that_needs_approvers_opens_after_the_last_of_them(hospitals, tmp_path):
    federation = hospitals.edge.federation
    keys = {name: tmp_path / name for name in ("ada", "bob")}
    for path in keys.values():
        save_secret(path, new_site_keys().identity)
    public = {name: identity_public_key(path.read_bytes()).hex() for name, path in keys.items()}
    asking = replace(federation, approvals=2, approvers=public)
    made = registry.register(asking, RunFolder(federation.runs / "lung"), version="asked")
    with pytest.raises(StateInvalid, match="none of them"):
        registry.approve_release(asking, made.label)
    with pytest.raises(StateInvalid, match="none of them"):
        registry.approve_release(asking, made.label, "ada", keys["bob"].read_bytes())
    assert registry.approve_release(asking, made.label, "ada", keys["ada"].read_bytes()).stage == "candidate"
    with pytest.raises(ReleaseInvalid, match="1 of 2"):
        open_release(registry.folder_of(asking, made.digest) / "release", registry.trust_of(asking))
    assert registry.approve_release(asking, made.label, "bob", keys["bob"].read_bytes()).stage == "approved"
    path = registry.export_release(asking, made, tmp_path / "out", single_file=False)
    assert open_release(path, registry.trust_of(asking)).version == "asked"


def test_an_approver_who_is_not_needed_approves_with_a_key_all_the_same(hospitals):
    federation, key = hospitals.edge.federation, new_site_keys().identity
    free = replace(federation, approvers={"ada": identity_public_key(key).hex()})
    made = registry.register(free, RunFolder(federation.runs / "lung"), version="free")
    with pytest.raises(StateInvalid, match="needs 0 of ada"):
        registry.approve_release(free, made.label, "ada")
    done = registry.approve_release(free, made.label, "ada", key)
    assert (done.stage, done.history[-1].by) == ("approved", "ada")
    folder = registry.folder_of(free, made.digest) / "release"
    assert list(read_approvals(folder)) == ["ada"]


def test_what_could_not_be_read_again_is_not_written(hospitals, entry):
    federation = hospitals.edge.federation
    before = (registry.folder_of(federation, entry.digest) / "entry.json").read_bytes()
    lines = (federation.folder / LOG).read_bytes()
    with pytest.raises(StateInvalid, match="entry of release tiny-lung-1"):
        registry._said(federation, entry, "retired", "x" * 65, "release-retired")
    assert (registry.folder_of(federation, entry.digest) / "entry.json").read_bytes() == before
    assert (federation.folder / LOG).read_bytes() == lines


def test_the_rules_of_approval_stand_in_federation_toml_and_are_doubted(hospitals, tmp_path):
    folder = Path(shutil.copytree(hospitals.edge.federation.folder, tmp_path / "federation"))
    before = (folder / "federation.toml").read_text()
    (folder / "federation.toml").write_text(
        f'{before}[release]\napprovals = 1\n[release.approvers]\nada = "{"a" * 64}"\n'
    )
    assert open_federation(folder).approvers == {"ada": "a" * 64}
    for wrong in (
        "[release]\napprovals = 1\n",
        '[release]\napprovals = 1\n[release.approvers]\nada = "short"\n',
        f'[release]\napprovals = 2\n[release.approvers]\nada = "{"a" * 64}"\nbob = "{"a" * 64}"\n',
        "[release]\nmore = 1\n",
    ):
        (folder / "federation.toml").write_text(before + wrong)
        with pytest.raises(StateInvalid, match="release"):
            open_federation(folder)


# Withdrawal


def test_training_again_goes_on_from_the_round_before_a_site_was_first_counted(hospitals):
    run = RunFolder(hospitals.edge.federation.runs / "lung")
    assert begin_from(run, ["east"], {}) == (2, "east was first counted in round 3, so it goes on from round 2")
    assert begin_from(run, ["north"], {})[0] == 0
    assert begin_from(run, ["east", "north"], {})[0] == 0
    with pytest.raises(StateInvalid, match="never counted"):
        begin_from(run, ["west"], {})


def like_lung(hospitals: Hospitals, to: Path, study: Study, plan: Plan | None = None) -> RunFolder:
    """The run's folder as that of another study would be, with or without a plan."""
    shutil.copytree(hospitals.edge.federation.runs / "lung", to)
    write_atomic(to / "study.json", canonical(study))
    changed: dict[str, Any] = {"run": to.name, "study_sha256": sha256(study)}
    if plan is not None:
        write_atomic(to / "plan.json", canonical_json(plain(plan)))
        changed |= {"plan_sha256": plan_sha256(plan)}
    write_json(to / "state.json", read_json(to / "state.json") | changed)
    return RunFolder(to)


@pytest.mark.parametrize(
    "change",
    [{"train": replace(STUDY.train, moon_mu=1.0)}, {"protect": Protect(compression="int8")}],
    ids=["another model", "what compression left over"],
)
def test_a_run_whose_sites_remember_it_begins_from_the_start(hospitals, tmp_path, change):
    study = replace(STUDY, **change)
    number, why = begin_from(like_lung(hospitals, tmp_path / "run", study), ["east"], {})
    assert number == 0
    assert "remember" in why


def test_rounds_that_were_summed_securely_are_not_done_again_without_a_site(hospitals, tmp_path):
    secure = Protect(secure_aggregation=SecureAggregation(step_s=5.0))
    study = replace(STUDY, protect=secure, rounds=replace(STUDY.rounds, quorum=3))
    with pytest.raises(StateInvalid, match=r"second sum of the same round.*another seed"):
        begin_from(like_lung(hospitals, tmp_path / "run", study), ["east"], {})


def test_a_plan_that_holds_counts_of_the_site_is_made_anew_from_the_start(hospitals, tmp_path):
    study = replace(STUDY, plan="federated", model=Model())
    plan = Plan("0" * 64, 9, 2, None, (32, 32, 1), (32, 32), ((1, 1), (2, 2), (2, 2)), ((3, 3),) * 3, (8, 16, 32), 4,
                (-1000.0, 400.0), 0.0, 1.0, False)  # fmt: skip
    run = like_lung(hospitals, tmp_path / "run", study, plan)
    assert begin_from(run, ["east"], {"run": ["north", "south"]})[0] == 2
    known: dict[str, list[str]] = {"run": ["east", "north"]}
    for planned_by in (known, {}):  # it was counted, or nobody knows who was
        number, why = begin_from(run, ["east"], planned_by)
        assert (number, "new plan" in why) == (0, True)
    anew = copy_until(run, 0, tmp_path / "anew", ["east"])
    assert read_state(anew).plan_sha256 is None
    assert not anew.plan.exists()


def test_a_run_of_a_simulation_becomes_a_research_release(hospitals, tmp_path):
    shutil.copytree(hospitals.edge.federation.runs / "lung", tmp_path / "out" / "seed-0" / "federated")
    path, manifest = research_release(run_at(tmp_path / "out"), tmp_path, "1", Words(), single_file=True)
    assert path == tmp_path / "tiny-lung-1.fedrelease"
    told = json.loads(typed(fedclient, "verify", str(path), "--research", "--site", str(tmp_path), "--json"))
    assert (told["kind"], told["digest"]) == ("simulation", manifest.digest)
    said = typed(fedclient, "verify", str(path), "--site", str(hospitals.sites["north"]), code=1)
    assert "--research" in said
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_site_leaves_its_releases_are_named_and_the_run_is_trained_again_without_it(hospitals, entry):
    federation = hospitals.edge.federation
    kept = registry.register(federation, RunFolder(federation.runs / "lung"), "kept")
    gone = withdraw(federation, "east", "its board has decided so", retire=False)
    assert {e.version: e.sites.get("east") for e in gone.releases} | {"1": 1} == {
        e.version: 1 for e in registry.list_releases(federation) if e.round == 3
    }
    assert gone.runs == {"lung": 3}
    listed = holding.status_list(federation, 30)
    said = read_standings(listed, (federation.ca_certificate.read_bytes(),), "list").releases
    assert (said[kept.digest].stage, said[kept.digest].words) == ("candidate", holding.SITE_LEFT)
    withdraw(federation, "east", "its board has decided so", retire=True)
    retired = read_standings(holding.status_list(federation, 30), (federation.ca_certificate.read_bytes(),), "list")
    told = retired.releases[kept.digest]
    assert (told.stage, told.words) == ("retired", holding.SITE_LEFT)
    assert b"board" not in listed
    assert "board" not in str(retired)
    found = find_site(federation.state, "east")
    assert found is not None
    assert found.state == "revoked"

    made = retrain(federation, "lung", ["east"])
    assert (made.id, made.round) == ("lung-without", 2)
    queued_run = find_run(federation.state, made.id)
    assert queued_run is not None
    assert queued_run.state == "queued"
    assert excluded(made.folder) == ("east",)
    del hospitals.sites["east"]
    state, run = hospitals.run(STUDY, made.id)
    assert (state.round, state.cohort) == (3, ("north", "south"))
    assert state.counted == {"north": 3, "south": 3}

    again = registry.register(federation, run)
    assert again.sites == {"north": 3, "south": 3}
    opened = open_release(registry.folder_of(federation, again.digest) / "release", registry.trust_of(federation))
    assert [(parent.kind, parent.name) for parent in opened.manifest.origin.parents] == [("run", "lung")]
    shown = check_provenance(opened, registry.trust_of(federation).authorities)
    assert any("3 rounds closed" in words for words in shown)
    assert holding.contents(federation, [again])[again.digest].sites == {"north", "south"}


def test_a_release_that_is_made_after_a_site_has_left_says_so_and_the_list_too(hospitals, tmp_path):
    """As the test before has left it: east is gone, and the run still has it in round 3."""
    federation, folder = hospitals.edge.federation, str(hospitals.edge.federation.folder)
    words = ["release", "lung", "--version", "late", "--out", str(tmp_path), "--federation", folder]
    said = " ".join(typed(fedserver, *words).split())
    assert "It holds what was sent by east, who withdrew." in said
    assert "`fedserver retrain lung --without east`" in said
    early = ["--version", "early", "--round", "2"]
    told = json.loads(typed(fedserver, *words[:2], *early, *words[4:], "--json"))
    assert told["left"] == []
    authorities = (federation.ca_certificate.read_bytes(),)
    listed = read_standings(holding.status_list(federation, 30), authorities, "list").releases
    words_of = {standing.label: standing.words for standing in listed.values()}
    assert (words_of["tiny-lung-late"], words_of["tiny-lung-early"]) == (holding.SITE_LEFT, "")

    made, site = tmp_path / "tiny-lung-late", str(hospitals.sites["north"])
    assert json.loads(typed(fedclient, "verify", str(made), "--site", site, "--json"))["warnings"] == []
    assert not (tmp_path / "tiny-lung-early" / ROSTERS).exists()

    def swap(facts: Any) -> None:
        facts["rosters"][-1]["sites"]["east"] = "0" * 64

    assert "is not what the next one names" in str(spoilt(made, hospitals, ROSTERS, swap))
    (made / ROSTERS).unlink()  # as releases were made before
    resealed(made, hospitals, "", None)
    said = " ".join(typed(fedclient, "verify", str(made), "--site", site, code=1).split())
    assert "1 of 7 signatures of hospitals (east) are under keys that no roster" in said


def test_a_site_that_is_left_out_of_a_run_is_not_asked_in_it(hospitals):
    class Grid:
        def get_nodes(self) -> list[Any]:
            return []

    federation = hospitals.edge.federation
    assert "north" in presence(Grid(), federation).sites  # type: ignore[arg-type]
    assert "north" not in presence(Grid(), federation, ("north",)).sites  # type: ignore[arg-type]


def test_a_release_that_began_with_weights_of_another_run_holds_what_was_sent_in_that(hospitals):
    """East was counted in round 3 of the run whose weights another study begins with, and in none of its own."""
    federation = hospitals.edge.federation
    weights = RunFolder(federation.runs / "lung").weights(3)
    transfer = Transfer(file_sha256(weights))
    study = replace(STUDY, name="next", transfer=transfer, rounds=replace(STUDY.rounds, count=1))
    submitted = submit(federation, study, None, False, weights)
    assert "round 3 of run lung, which was not differentially private" in submitted.told[-1]
    numbers = dict(enumerate(sorted(hospitals.sites), start=1))
    there = Presence({name: number for number, name in numbers.items() if name != "east"})
    hospitals.run(study, submitted.id, presence=lambda: there)
    made = registry.register(federation, submitted.folder)
    assert made.sites == {"north": 1, "south": 1}
    assert holding.contents(federation, [made])[made.digest].sites == {"east", "north", "south"}
    opened = open_release(registry.folder_of(federation, made.digest) / "release", registry.trust_of(federation))
    parents = [(parent.kind, parent.name, parent.sha256) for parent in opened.manifest.origin.parents]
    assert parents[-2:] == [("weights", "next", transfer.sha256), ("run", "lung", transfer.sha256)]
    check_provenance(opened, registry.trust_of(federation).authorities)


def test_a_damaged_checkpoint_is_not_trained_on(hospitals, tmp_path):
    federation = hospitals.edge.federation
    path = RunFolder(federation.runs / "lung").weights(2)
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(StateInvalid, match="not as it was written"):
            retrain(federation, "lung", ["east"], "damaged")
    finally:
        path.write_bytes(content)
    assert not (federation.runs / "damaged").exists()


def test_a_run_whose_folder_was_restored_from_a_backup_is_released_once_its_last_rounds_are_done_again(
    hospitals, tmp_path, monkeypatch
):
    federation, study = hospitals.edge.federation, replace(STUDY, name="again", rounds=replace(STUDY.rounds, count=2))
    submitted = submit(federation, study, None, False)
    run = submitted.folder
    numbers = dict(enumerate(sorted(hospitals.sites), start=1))
    there = Presence({name: number for number, name in numbers.items() if name != "east"})

    def backed_up(*facts: Any) -> None:
        note_closed(*facts)
        if not (tmp_path / "backup").exists():
            shutil.copytree(run.path, tmp_path / "backup")

    def killed(*facts: Any) -> None:
        raise KeyboardInterrupt

    for noted in (backed_up, killed, note_closed):  # the second time a kill keeps round 2 out of the log
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(rounds, "note_closed", noted)
            hospitals.run(study, submitted.id, presence=lambda: there)
        if noted is backed_up:
            shutil.rmtree(run.path)
            shutil.copytree(tmp_path / "backup", run.path)
    lines = [line["facts"] for line in read_lines(federation.audit) if line["event"] == "round-closed"]
    assert [facts["round"] for facts in lines if facts["run"] == submitted.id] == [1, 2, 2]
    assert counted_answers(federation)[submitted.id].keys() <= {told.sha256 for told, _ in signed_lines(run)}
    made = registry.register(federation, run)
    assert made.sites == {"north": 2, "south": 2}
    opened = open_release(registry.folder_of(federation, made.digest) / "release", registry.trust_of(federation))
    shown = " ".join(check_provenance(opened, registry.trust_of(federation).authorities))
    assert "2 rounds closed (in 3 lines, for some were done again)" in shown
    assert "4 updates that were counted are signed by their hospitals" in shown


@pytest.mark.parametrize("size", range(1, 18))
def test_each_line_of_a_list_is_proved_to_be_in_it_at_its_place_and_no_other(size):
    tree, lines = Tree(), [f"line {n}".encode() for n in range(size)]
    for line in lines:
        tree.append(line)
    for index, line in enumerate(lines):
        path = tree.inclusion(index)
        assert holds(line, index, size, tree.root(), path)
        assert not holds(line + b"!", index, size, tree.root(), path)
        assert not any(holds(line, other, size, tree.root(), path) for other in range(size) if other != index)
