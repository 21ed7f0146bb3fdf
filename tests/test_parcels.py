"""Work answered over a real gateway: done once, told again for the asking, and never for other weights than named."""

import hashlib
import shutil
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedclient.kept as kept_work
import fedclient.parcels as parcels
from fedclient.kept import kept_path
from fedclient.ledger import open_ledger
from fedclient.memory import memory_folder, recall, remember
from fedclient.parcels import answered
from fedclient.site import PrivacyPolicy, Site
from fedclient.work import Learned
from shared_models.errors import OrderRefused, TransferFailed, WeightsInvalid
from shared_models.files import file_sha256, read_json
from shared_models.metrics import counts
from shared_models.protect.privacy import Privacy, Protect
from shared_models.protect.secure import SecureAggregation
from shared_models.scores import Score
from shared_models.study import Evaluate, Rounds, Strategy, Study, Train, canonical, sha256
from shared_models.transfer import Blobs, site_context
from shared_models.weights import Arrays, load, save_arrays
from shared_models.wire import BlobRef, Order, Split
from tests.edge import Edge, joined_site, running_edge
from tests.toys import WEIGHTS, ToyLearner

STUDY = Study(name="toy")


@dataclass(frozen=True)
class Counting(ToyLearner):
    """Counts what it is asked to do."""

    did: list[str] = field(default_factory=list)

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        self.did.append(f"learn {round_number}")
        return ToyLearner.learn(self, site, study, round_number, weights)

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        self.did.append(f"score {split}")
        return ToyLearner.score(self, site, study, weights, split)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge") / "federation") as running:
        yield running


@pytest.fixture(scope="module")
def keys(edge: Edge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joined_site(edge, tmp_path_factory.mktemp("sites"), "north").keys


@pytest.fixture
def north(edge: Edge, keys: Path, tmp_path: Path) -> Iterator[Site]:
    """A site that has joined and done nothing yet."""
    shutil.copytree(keys, tmp_path / "site" / "keys")
    yield Site("north", tmp_path / "site", tmp_path, (), "cpu", 1, 11, "salt", deployed=True, coordinator=edge.address)
    shutil.rmtree(edge.blobs / "in" / "north", ignore_errors=True)


@pytest.fixture
def learner() -> Counting:
    return Counting()


def publish(edge: Edge, weights: Arrays = WEIGHTS) -> BlobRef:
    """Puts weights where the gateway gives them out, as a round does."""
    part = edge.blobs / "out" / "part"
    digest = save_arrays(part, weights)
    part.replace(edge.blobs / "out" / digest)
    return BlobRef(digest, (edge.blobs / "out" / digest).stat().st_size)


def order(blob: BlobRef | None, kind: Any = "train", round_number: int = 1, **change: Any) -> Order:
    base = blob.sha256 if blob else "b" * 64
    made = Order(kind, "toy-1", round_number, 1, canonical(STUDY).decode(), sha256(STUDY), base, blob=blob)
    return replace(made, **change)


def final(blob: BlobRef | None) -> Order:
    return order(blob, "evaluate", STUDY.rounds.count, evaluate="test")


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def arrived(edge: Edge) -> list[str]:
    return files(edge.blobs / "in" / "north")


# Done once


def test_the_delta_arrives_under_the_digest_that_the_reply_names(edge, north, learner):
    reply = answered(order(publish(edge)), north, learner)
    assert reply.kind == "update"
    assert reply.blob is not None
    assert arrived(edge) == [reply.blob.sha256]
    upload = edge.blobs / "in" / "north" / reply.blob.sha256
    assert file_sha256(upload) == reply.blob.sha256
    assert upload.stat().st_size == reply.blob.size_bytes
    delta = load(upload)
    assert delta.keys() == WEIGHTS.keys()
    assert (delta["body.bias"] == 1.0).all()
    assert delta["steps"].tolist() == [2]


def test_an_order_that_comes_again_is_answered_without_training(edge, north, learner):
    asked = order(publish(edge), round_number=2, evaluate="val")
    first = answered(asked, north, learner)
    again = answered(replace(asked, attempt=2), north, learner)
    assert again == replace(first, attempt=2)
    assert learner.did == ["score val", "learn 2"]


def test_a_delta_that_the_coordinator_has_let_go_of_is_sent_again(edge, north, learner):
    asked = order(publish(edge))
    first = answered(asked, north, learner)
    shutil.rmtree(edge.blobs / "in" / "north")
    assert answered(asked, north, learner) == first
    assert first.blob is not None
    assert arrived(edge) == [first.blob.sha256]
    assert learner.did == ["learn 1"]


def test_a_hospital_that_has_come_to_require_privacy_sends_no_kept_update_without_noise(edge, north, learner):
    asked = order(publish(edge))
    answered(asked, north, learner)
    shutil.rmtree(edge.blobs / "in" / "north")
    with pytest.raises(OrderRefused) as refused:
        answered(replace(asked, attempt=2), replace(north, privacy=PrivacyPolicy(required=True)), learner)
    assert refused.value.code == "DP_REQUIRED"
    assert arrived(edge) == []


def test_a_private_round_that_is_asked_for_again_is_spent_once_and_trained_anew_it_is_spent_again(edge, north, learner):
    privacy = Privacy(noise_multiplier=2.0, sample_rate=0.25)
    study = Study(
        name="toy", train=Train(local_steps=10, precision="float32"), rounds=Rounds(count=2),
        strategy=Strategy(weighting="uniform"), evaluate=Evaluate(every=0), protect=Protect(privacy),
    )  # fmt: skip
    asked = order(publish(edge), study=canonical(study).decode(), study_sha256=sha256(study))
    open_ledger(north.folder).set_budget("all", 50.0, 1e-5)
    first = answered(asked, north, learner)
    assert answered(replace(asked, attempt=2), north, learner) == replace(first, attempt=2)
    assert [s.steps for s in open_ledger(north.folder).accounts()[0].spends] == [10]
    (gone,) = (north.folder / "runs").rglob("*.json")
    gone.unlink()
    answered(asked, north, learner)
    assert [s.steps for s in open_ledger(north.folder).accounts()[0].spends] == [10, 10]
    open_ledger(north.folder).set_budget("all", 0.1, 1e-5)
    with pytest.raises(OrderRefused) as refused:
        answered(replace(asked, round=2), north, learner)
    assert refused.value.code == "DP_BUDGET_EXHAUSTED"
    assert learner.did == ["learn 1", "learn 1"]


@pytest.mark.parametrize("lost", [".json", ".safetensors"])
def test_if_the_reply_or_the_delta_alone_is_lost_the_work_is_done_again_with_the_same_digest(
    edge, north, learner, lost
):
    asked = order(publish(edge))
    first = answered(asked, north, learner)
    (gone,) = (north.folder / "runs").rglob(f"*{lost}")
    gone.unlink()
    again = answered(asked, north, learner)
    assert again.blob == first.blob
    assert learner.did == ["learn 1", "learn 1"]
    assert answered(asked, north, learner).blob == first.blob
    assert len(learner.did) == 2


def test_a_delta_that_was_spoilt_on_this_disk_is_made_again(edge, north, learner):
    asked = order(publish(edge))
    first = answered(asked, north, learner)
    shutil.rmtree(edge.blobs / "in" / "north")
    (delta,) = (north.folder / "runs").rglob("*.safetensors")
    delta.write_bytes(delta.read_bytes()[:-1] + b"\xff")
    assert answered(asked, north, learner).blob == first.blob
    assert first.blob is not None
    assert file_sha256(edge.blobs / "in" / "north" / first.blob.sha256) == first.blob.sha256
    assert learner.did == ["learn 1", "learn 1"]


def test_a_process_that_dies_between_delta_and_reply_starts_anew_and_one_that_dies_after_does_not(
    edge, north, learner, monkeypatch
):
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    asked = order(publish(edge))
    with monkeypatch.context() as patched:
        patched.setattr(kept_work, "write_atomic", die)
        with pytest.raises(KeyboardInterrupt):
            answered(asked, north, learner)
    assert arrived(edge) == []
    with monkeypatch.context() as patched:
        patched.setattr(Blobs, "send", die)
        with pytest.raises(KeyboardInterrupt):
            answered(asked, north, learner)
    assert learner.did == ["learn 1", "learn 1"]
    reply = answered(asked, north, learner)
    assert learner.did == ["learn 1", "learn 1"]
    assert reply.blob is not None
    assert arrived(edge) == [reply.blob.sha256]


def test_a_delta_is_kept_when_it_could_not_be_sent(edge, north, learner, monkeypatch):
    def away(*_: object) -> None:
        raise TransferFailed("the coordinator is away")

    asked = order(publish(edge))
    with monkeypatch.context() as patched:
        patched.setattr(Blobs, "send", away)
        with pytest.raises(TransferFailed):
            answered(asked, north, learner)
    assert answered(asked, north, learner).blob is not None
    assert learner.did == ["learn 1"]


def test_finished_work_is_no_answer_to_another_order(edge, north, learner):
    blob = publish(edge)
    answered(order(blob), north, learner)
    other = replace(STUDY, seed=1)
    answered(order(blob, study=canonical(other).decode(), study_sha256=sha256(other)), north, learner)
    answered(order(publish(edge, {n: a + 1 for n, a in WEIGHTS.items()})), north, learner)
    answered(order(blob, run="toy-2"), north, learner)
    assert learner.did == ["learn 1"] * 4


def test_work_that_an_older_version_has_finished_is_not_done_again(edge, north, learner):
    asked = order(publish(edge))
    answered(asked, north, learner)
    kept = kept_path(asked, north.folder)
    for suffix in (".json", ".safetensors"):
        kept.with_suffix(suffix).rename(
            kept.with_name(f"round-0001-{asked.base_sha256[:16]}-{asked.study_sha256[:16]}{suffix}")
        )
    answered(asked, north, learner)
    assert learner.did == ["learn 1"]


def test_work_of_a_secure_study_never_leaves_bare_under_a_study_whose_digest_begins_alike(edge, north, learner):
    blob = publish(edge)
    secure = replace(
        STUDY, rounds=Rounds(quorum=3, deadline_s=900.0), protect=Protect(secure_aggregation=SecureAggregation())
    )
    summed = order(blob, study=canonical(secure).decode(), study_sha256=sha256(secure))
    alike = replace(summed, study_sha256=summed.study_sha256[:16] + "0" * 48)  # a coordinator finds one in 2^32 tries
    assert kept_path(alike, north.folder) != kept_path(summed, north.folder)
    assert memory_folder(north, "toy-1", alike.study_sha256) != memory_folder(north, "toy-1", summed.study_sha256)
    assert answered(summed, north, learner).kind == "ready"
    kept, bare = kept_path(summed, north.folder), kept_path(order(blob), north.folder)
    digest = file_sha256(kept.with_suffix(".safetensors"))
    for suffix in (".json", ".safetensors"):  # whatever finds them under the other's name
        kept.with_suffix(suffix).rename(bare.with_suffix(suffix))
    reply = answered(order(blob), north, replace(learner, moves={"north": 2.0}))
    assert reply.study_sha256 == sha256(STUDY)
    assert learner.did == ["learn 1", "learn 1"]
    assert reply.blob is not None
    assert arrived(edge) == [reply.blob.sha256] != [digest]


def test_no_delta_leaves_whose_reply_may_not(edge, north, learner):
    class Telling(Counting):
        def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
            return {"lung": counts([0.5] * 20, site.smallest_count)}

    asked, telling = order(publish(edge), round_number=2, evaluate="val"), Telling()
    answered(asked, north, telling)
    shutil.rmtree(edge.blobs / "in" / "north")
    stricter = replace(north, smallest_count=100)  # the hospital has changed its mind since
    with pytest.raises(OrderRefused, match="a distribution of fewer than 100 cases"):
        answered(asked, stricter, telling)
    assert telling.did == ["learn 2"]
    assert arrived(edge) == []


def test_what_a_run_that_an_older_version_began_has_left_is_gone_on_with(north):
    old = north.folder / "states" / f"toy-1-{sha256(STUDY)[:16]}" / "north"
    remember(old, 3, 2, WEIGHTS)
    assert recall(memory_folder(north, "toy-1", sha256(STUDY)), 3).keys() == WEIGHTS.keys()
    assert not old.exists()


def test_work_of_earlier_rounds_and_their_weights_are_removed(edge, north, learner):
    blobs = [publish(edge, {n: a + r for n, a in WEIGHTS.items()}) for r in range(3)]
    for number, blob in enumerate(blobs, start=1):
        answered(order(blob, round_number=number), north, learner)
        assert len(files(north.folder / "runs")) == 2
        assert all(name.startswith(f"round-{number:04d}-") for name in files(north.folder / "runs"))
        assert files(north.folder / "blobs") == [blob.sha256]
        noted = memory_folder(north, "toy-1", sha256(STUDY)) / "sent.json"
        assert read_json(noted) == {
            "round": number, "sha256": blob.sha256, "study": canonical(STUDY).decode()
        }  # fmt: skip
    (north.folder / "blobs" / ".left.part").write_bytes(b"of a broken transfer")
    answered(order(blobs[0], round_number=4), north, learner)
    assert files(north.folder / "blobs") == [blobs[0].sha256]


def test_everything_that_is_kept_is_the_sites_alone(edge, north, learner):
    answered(order(publish(edge)), north, learner)
    made = [p for name in ("runs", "blobs") for p in [north.folder / name, *(north.folder / name).rglob("*")]]
    assert {p.stat().st_mode & 0o777 for p in made if p.is_file()} == {0o600}
    assert {p.stat().st_mode & 0o777 for p in made if p.is_dir()} == {0o700}


def test_an_evaluation_keeps_and_sends_nothing_and_leaves_finished_work(edge, north, learner):
    blob = publish(edge)
    answered(order(blob), north, learner)
    kept = files(north.folder / "runs")
    for _ in range(2):
        reply = answered(final(blob), north, learner)
        assert (reply.kind, reply.blob) == ("evaluation", None)
    assert files(north.folder / "runs") == kept
    assert learner.did == ["learn 1", "score test", "score test"]
    assert len(arrived(edge)) == 1


def test_hello_needs_no_weights(edge, north, learner):
    reply = answered(order(None, "hello"), north, learner)
    assert (reply.kind, reply.train_cases) == ("hello", 8)
    assert not (north.folder / "blobs").exists()


# Doubted


def test_an_order_whose_blob_is_not_the_weights_that_it_names_is_refused(edge, north, learner):
    blob = publish(edge)
    for wrong in (order(None), order(blob, base_sha256="c" * 64), final(None), replace(final(blob), blob=None)):
        with pytest.raises(OrderRefused, match="not the weights it names") as refused:
            answered(wrong, north, learner)
        assert refused.value.code == "WEIGHTS_MISMATCH"
    assert learner.did == []


def test_weights_that_are_not_those_of_their_digest_are_refused_and_not_kept(edge, north, learner):
    blob = publish(edge)
    served = edge.blobs / "out" / blob.sha256
    content = bytearray(served.read_bytes())
    content[-1] ^= 1
    served.write_bytes(content)
    try:
        with pytest.raises(TransferFailed, match="another digest"):
            answered(order(blob), north, learner)
    finally:
        served.unlink()
    assert learner.did == []
    assert files(north.folder / "blobs") == []


@pytest.mark.parametrize("more", [-1, 1])
def test_weights_of_another_size_than_the_order_says_are_refused(edge, north, learner, more):
    blob = publish(edge)
    with pytest.raises(TransferFailed, match="the order says"):
        answered(order(replace(blob, size_bytes=blob.size_bytes + more)), north, learner)
    assert learner.did == []


def test_weights_that_are_not_published_are_missed(edge, north, learner):
    with pytest.raises(TransferFailed, match="is not published here"):
        answered(order(BlobRef("e" * 64, 100)), north, learner)


def test_a_blob_that_is_no_tensors_is_refused(edge, north, learner):
    content = b"\x80\x04K\x01." * 10
    digest = hashlib.sha256(content).hexdigest()
    (edge.blobs / "out" / digest).write_bytes(content)
    with pytest.raises(WeightsInvalid, match="round 1: not a sound safetensors file"):
        answered(order(BlobRef(digest, len(content))), north, learner)
    assert learner.did == []


def test_weights_that_were_spoilt_on_this_disk_are_fetched_again(edge, north, learner):
    blob = publish(edge)
    answered(order(blob), north, learner)
    fetched = north.folder / "blobs" / blob.sha256
    fetched.write_bytes(fetched.read_bytes()[:-1] + b"\xff")
    reply = answered(final(blob), north, learner)
    assert reply.kind == "evaluation"
    assert file_sha256(fetched) == blob.sha256


def test_refused_work_is_not_kept(edge, north):
    def spoil(trained: dict[str, np.ndarray]) -> None:
        trained["body.bias"] = np.full(4, np.nan, np.float32)

    asked = order(publish(edge))
    with pytest.raises(OrderRefused) as refused:
        answered(asked, north, Counting(spoil={"north": spoil}))
    assert refused.value.code == "TRAINING_DIVERGED"
    assert not (north.folder / "runs").exists()
    assert arrived(edge) == []
    assert answered(asked, north, Counting()).kind == "update"


def test_renewed_keys_are_used_from_the_next_order_on(edge, north, learner, tmp_path, monkeypatch):
    made: list[Path] = []

    def noted(keys: Path) -> ssl.SSLContext:
        made.append(keys)
        return site_context(keys)

    monkeypatch.setattr(parcels, "site_context", noted)
    east = replace(north, name="east", folder=tmp_path / "east")
    joined_site(edge, tmp_path, "east")
    asked = order(publish(edge))
    answered(asked, east, learner)
    answered(asked, east, learner)
    assert len(made) == 1
    renewed = joined_site(edge, tmp_path / "renewed", "east").keys  # the certificate before is refused from now on
    for path in renewed.iterdir():
        shutil.copy(path, east.folder / "keys" / path.name)
    assert answered(asked, east, learner).kind == "update"
    assert len(made) == 2
