"""What leaves a hospital: only what is on the list, written down before it goes, no identifier in any byte of it."""

import hashlib
import http.client
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import fedclient.cli
import fedserver.cli
from fedclient.client import client_app
from fedclient.egress import check_tensors, release, release_code, sent
from fedclient.policy import Policy
from fedclient.site import Site
from fedclient.work import refusal
from fedserver.enrol import open_log
from fedserver.records import Records
from shared_models.audit_check import verify_log
from shared_models.class_counts import class_counts
from shared_models.errors import OrderRefused
from shared_models.files import read_lines
from shared_models.identity import identity_public_key
from shared_models.metrics import DiceCounts, counts
from shared_models.nets import initial_weights
from shared_models.plan import fingerprint_of
from shared_models.study import Evaluate, Model, Preprocess, Rounds, Study, Train, canonical, sha256
from shared_models.transfer import Blobs
from shared_models.wire import BlobRef, Order, Reply, dump
from simulations.phantoms import PhantomPlan, phantom
from tests.edge import Edge, running_edge
from tests.hospitals import Hospitals
from tests.toys import WEIGHTS

STUDY = Study(name="toy", rounds=Rounds(count=2, quorum=2, deadline_s=300, gather_s=0))
INSIDE = Policy(approval="inside-policy")
ORDER = Order("train", "toy", 1, 1, canonical(STUDY).decode(), sha256(STUDY), "b" * 64)
UPDATE = Reply("update", "north", "toy", 1, 1, sha256(STUDY), "b" * 64, examples=3, steps=2)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge") / "federation") as running:
        yield running


@pytest.fixture
def hospitals(edge: Edge, tmp_path: Path) -> Hospitals:
    made = Hospitals(edge, tmp_path / "sites")
    for name in ("north", "south"):
        made.join(name, INSIDE)
    return made


@pytest.fixture
def north(hospitals: Hospitals) -> Site:
    return hospitals.site("north")


# The list


@pytest.mark.parametrize(
    "change",
    [
        {"train_cases": 3},
        {"refusal": "NO_CASES"},
        {"refusal_keys": ("tasks",)},
        {"site": "south"},
        {"run": "other"},
        {"round": 2},
        {"base_sha256": "c" * 64},
        {"scores": {"Jane Doe": DiceCounts()}},
        {"own_scores": {"Jane Doe": DiceCounts()}},
        {"scores": {"lung": counts([0.5] * 10)}},
        {"own_scores": {"lung": counts([0.5] * 10)}},
        {"scores": {"lung": class_counts(np.full(20, 0.5), np.arange(20) < 1, np.zeros(20, bool))}},
    ],
)
def test_what_is_not_on_the_list_stays(north, change):
    with pytest.raises(OrderRefused, match="the reply stays here") as refused:
        release(replace(UPDATE, **change), ORDER, north)
    assert refused.value.code == "EGRESS"
    assert sent(north.folder) == []


@pytest.mark.parametrize(
    "change",
    [
        {"blob": BlobRef("d" * 64, 100), "losses": (0.5,), "device": "cuda:0", "seconds": 2.5, "variance": 0.5},
        {"scores": {"lung": counts([0.5] * 11)}, "scored": "val", "own_scores": {"lung": counts([0.5] * 3, 11)}},
        {"kind": "refusal", "examples": 0, "steps": 0, "refusal": "OUTSIDE_POLICY", "refusal_keys": ("tasks",)},
        {"kind": "hello", "examples": 0, "steps": 0, "train_cases": 3, "test_cases": 1},
    ],
)
def test_what_is_on_the_list_leaves_with_a_line_that_says_so(north, change):
    leaving = release(replace(UPDATE, **change), ORDER, north)
    (line,) = sent(north.folder)
    content = dump(leaving)
    assert (line["bytes"], line["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (line["run"], line["round"], line["study"]) == ("toy", 1, sha256(STUDY))


def test_counts_of_fewer_cases_than_the_policy_wants_by_now_stay(north):
    ones = np.ones((2, 2, 1), np.float32)
    told = Reply("statistics", "north", "toy", 1, 1, sha256(STUDY), "b" * 64)
    told = replace(told, fingerprint=fingerprint_of(ones[None], ones.astype(np.uint8), (1, 1, 1), ct=True))
    with pytest.raises(OrderRefused) as refused:
        release(told, ORDER, north)
    assert refused.value.code == "FEW_CASES"
    assert release(told, ORDER, replace(north, smallest_count=1)).fingerprint


@pytest.mark.parametrize(
    "delta",
    [
        {**WEIGHTS, "patients": np.zeros(3, np.float32)},
        {name: a for name, a in WEIGHTS.items() if name != "steps"},
        {**WEIGHTS, "body.bias": np.zeros(5, np.float32)},
        {**WEIGHTS, "body.bias": np.zeros(4, np.float64)},
    ],
)
def test_tensors_of_another_name_shape_or_type_than_the_weights_stay(delta):
    check_tensors(WEIGHTS, WEIGHTS, Study(name="s"))
    with pytest.raises(OrderRefused, match="stays here") as refused:
        check_tensors(delta, WEIGHTS, Study(name="s"))
    assert refused.value.code == "EGRESS"


def test_a_bare_error_code_is_written_down_too_and_a_site_without_keys_writes_nothing(north, tmp_path):
    release_code(north.folder, "OUT_OF_MEMORY")
    (line,) = sent(north.folder)
    assert (line["kind"], line["code"], line["bytes"]) == ("code", "OUT_OF_MEMORY", 13)
    release_code(tmp_path / "nowhere", "OUT_OF_MEMORY")
    assert not (tmp_path / "nowhere").exists()


def test_a_refusal_names_its_code_in_the_log(north):
    release(refusal(ORDER, north, "NO_CASES"), ORDER, north)
    assert sent(north.folder)[0]["code"] == "NO_CASES"


# A run


def test_what_the_coordinator_got_is_what_the_sites_log_says_in_order_and_before_it_left(hospitals, monkeypatch):
    written_before: list[bool] = []
    real = Blobs.send

    def send(self: Blobs, path: Path, digest: str, timeout_s: float, go_on: Callable[[], None]) -> None:
        logs = [sent(folder) for folder in hospitals.sites.values()]
        written_before.append(any(line["sha256"] == digest for log in logs for line in log))
        real(self, path, digest, timeout_s, go_on)

    monkeypatch.setattr(Blobs, "send", send)
    hospitals.run(STUDY, "watched")
    assert written_before == [True] * 4  # two rounds of two sites
    kinds = [(line["kind"], line["round"]) for line in sent(hospitals.sites["north"])]
    assert kinds == [("tensors", 1), ("facts", 1), ("tensors", 2), ("facts", 2), ("scores", 2)]


def test_both_ends_keep_the_heads_of_the_other_and_agree(hospitals):
    hospitals.run(STUDY, "agreed")
    fed = hospitals.edge.federation
    events = [line["event"] for line in read_lines(fed.folder / "audit.jsonl")]
    assert {"founded", "invited", "enrolled", "run-opened", "order", "reply-counted", "witnessed", "round-closed",
            "run-finished"} <= set(events)  # fmt: skip
    assert "witness-refused" not in events
    for folder in hospitals.sites.values():
        key = identity_public_key((folder / "keys" / "identity.key").read_bytes())
        found = verify_log((folder / "audit.jsonl").read_bytes(), key, (folder / "audit.head.json").read_bytes())
        assert found.bad is None
        sizes = [head.size for head in found.heads]
        assert sizes == sorted(sizes)
        assert len(sizes) == 3  # two rounds and the last evaluation
        assert found.refused == ()
        assert [head.since > 0 for head in found.heads] == [False, True, True]  # proven from the one before


def test_a_coordinator_that_cuts_its_log_between_two_orders_is_noted_at_every_site(hospitals):
    hospitals.run(STUDY, "before-the-cut")
    fed = hospitals.edge.federation
    path = fed.folder / "audit.jsonl"
    kept = path.read_bytes()
    path.write_bytes(b"".join(kept.splitlines(keepends=True)[:-9]))
    log = open_log(fed)
    try:
        hospitals.run(STUDY, "after-the-cut", records=Records(log, fed.state, lambda: fed.authority))
        for folder in hospitals.sites.values():
            noted = [line["facts"]["problem"] for line in read_lines(folder / "audit.jsonl")
                     if line["event"] == "witness-refused"]  # fmt: skip
            assert noted
            assert set(noted) <= {"LOG_CUT", "LOG_FORKED"}
    finally:
        path.write_bytes(kept)


def call(*words: object) -> tuple[int, str]:
    app = {"fedclient": fedclient.cli.app, "fedserver": fedserver.cli.app}[str(words[0])]
    done = CliRunner().invoke(app, [str(word) for word in words[1:]], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_a_person_reads_decides_and_verifies_by_commands(edge, tmp_path):
    hospitals = Hospitals(edge, tmp_path / "sites")
    data = phantom(tmp_path / "images", PhantomPlan(sites=1, train=2, val=1, test=1, slices=1, size=32))
    north = hospitals.join("north", Policy(hours=("00:00-00:00",)), data)
    hospitals.join("south", INSIDE)
    study = replace(STUDY, rounds=replace(STUDY.rounds, count=1, quorum=2, pause_s=10, deadline_s=20))
    at, fed = ("--site", north), ("--federation", edge.federation.folder)
    assert "No study has come yet" in call("fedclient", "studies", *at)[1]
    with pytest.raises(Exception, match="north: awaits approval at the site"):
        hospitals.run(study, "commands")
    assert "pending" in call("fedclient", "studies", *at)[1]
    assert "waiting for a decision here: 1 study" in call("fedclient", "status", *at)[1]
    code, told = call("fedclient", "show", "toy", *at)
    assert code == 0
    for words in ("segmentation of lung by a unet", "2 labelled cases for training", "MiB", "nothing is measured",
                  "without noise", "No other study has been approved", "keeps to [policy]"):  # fmt: skip
        assert words in told, told
    assert "inside" not in call("fedclient", "policy", *at)[1]
    assert json.loads(call("fedclient", "policy", "--json", *at)[1])["hours"] == ["00:00-00:00"]
    assert "is approved until" in call("fedclient", "approve", "toy", "--days", 9, "--reason", "vote 3", *at)[1]
    hospitals.run(study, "commands")
    listed = json.loads(call("fedclient", "studies", "--json", *at)[1])
    assert [(s["state"], s["decision"]["reason"]) for s in listed] == [("approved", "vote 3")]
    assert "from 0 s of the last one here" in call("fedclient", "show", "toy", *at)[1]
    assert "tensors" in call("fedclient", "sent", *at)[1]
    assert [line["kind"] for line in json.loads(call("fedclient", "sent", "--json", "--last", 2, *at)[1])] == [
        "facts",
        "scores",
    ]
    assert call("fedclient", "audit", "export", "--out", tmp_path / "north.zip", *at)[0] == 0
    assert call("fedserver", "audit", "export", "--out", tmp_path / "fed.zip", *fed)[0] == 0
    assert "lines are whole" in call("fedclient", "audit", "verify", "--pack", tmp_path / "fed.zip", *at)[1]
    code, told = call("fedserver", "audit", "verify", "--pack", tmp_path / "north.zip", "--json", *fed)
    assert (code, [v["bad_line"] for v in json.loads(told).values()]) == (0, [None, None])
    with zipfile.ZipFile(tmp_path / "north.zip") as pack:
        assert set(pack.namelist()) == {"README.txt", "key.txt", "audit.jsonl", "audit.head.json", "ca.pem", "tls.pem"}
    assert "is withdrawn" in call("fedclient", "withdraw", "toy", *at)[1]
    whole = (north / "audit.jsonl").read_bytes()
    (north / "audit.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    code, told = call("fedclient", "audit", "verify", *at)
    assert code == 1
    assert f"line {len(whole.splitlines())} is missing: a head of" in told


# Canaries

CANARIES = ("Zyxmann", "QX774411", "Krankenakte", "19470813")


def test_no_byte_that_leaves_during_a_run_holds_an_identifier(edge, tmp_path, monkeypatch):
    """All plaintext of every TLS connection of the site, every reply, and every line that others could be shown."""
    hospitals = Hospitals(edge, tmp_path / "sites")
    for name in ("north", "south"):
        images = phantom(tmp_path / name, PhantomPlan(sites=1, train=2, val=1, test=2, slices=1, size=32, seed=3))
        hospitals.join(name, Policy(approval="inside-policy", smallest_count=1), planted(images, tmp_path / name))
    left: list[bytes] = []
    real = http.client.HTTPConnection.send

    def send(self: http.client.HTTPConnection, data: Any) -> None:
        left.append(data if isinstance(data, bytes) else bytes(memoryview(data)) if not hasattr(data, "read") else b"")
        real(self, data)

    monkeypatch.setattr(http.client.HTTPConnection, "send", send)
    from fedclient.training.learner import ImageLearner  # torch

    study = Study(
        name="canary", rounds=Rounds(count=2, quorum=2, gather_s=0), evaluate=Evaluate(every=1),
        model=Model(features=(4, 4, 4, 4, 4, 4), groups=2), preprocess=Preprocess(size=(32, 32)),
        train=Train(local_steps=2, batch_size=2),
    )  # fmt: skip
    replies: list[Reply] = []
    monkeypatch.setattr(Records, "heard", lambda self, site, reply, key: replies.append(reply))
    hospitals.run(study, "canary", client_app(ImageLearner()), initial_weights(study))
    incoming = edge.federation.folder
    everything = left + [dump(reply) for reply in replies]
    everything += [p.read_bytes() for p in incoming.rglob("*") if p.is_file()]
    everything += [(folder / "audit.jsonl").read_bytes() for folder in hospitals.sites.values()]
    assert len(replies) == 6
    assert sum(map(len, left)) > 4 * 10_000  # the deltas are among them
    for folder in hospitals.sites.values():  # they were there to be found
        assert all(canary in "".join(map(str, (folder.parents[1]).rglob("*Zyxmann*/*"))) for canary in CANARIES[:3])
    for canary in CANARIES:
        for content in everything:
            assert canary.lower().encode() not in content.lower()
            assert canary.lower().encode("utf-16-le") not in content.lower()


def planted(images: Path, root: Path) -> Path:
    """A copy of a phantom whose folder, files and patient column are full of identifiers."""
    import csv

    folder = root / "Krankenakte_Zyxmann"
    folder.mkdir()
    with (images / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row["patient_id"] = f"Zyxmann QX774411 19470813 {number}"
        for column in ("image", "mask"):
            ending = "".join(Path(row[column]).suffixes)
            named = f"Zyxmann_QX774411_{number}_{column}{ending}"
            (folder / named).write_bytes((images / row[column]).read_bytes())
            row[column] = named
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder
