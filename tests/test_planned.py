"""A run whose plan comes from its sites' counts: asked once, kept, carried by every order and update, and doubted."""

import hashlib
import json
import shutil
import ssl
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from fedclient.fingerprint import site_fingerprint
from fedclient.parcels import _fetched, answered
from fedclient.site import Site, open_site
from fedclient.training.worklist import received
from fedclient.work import carry_out as carry_out_at_site
from fedserver.app import proof
from fedserver.checkpoint import RunFolder, State, create_run, read_plan, read_state, trained_study
from fedserver.cohort import Presence
from fedserver.courier import Inline
from fedserver.enrol import Federation, init_federation
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from shared_models import nets
from shared_models.envelope import signed
from shared_models.errors import (
    ExplanationFailed,
    OrderRefused,
    RoundPaused,
    StateInvalid,
    StudyInvalid,
    SumAborted,
    UpdateRejected,
)
from shared_models.files import canonical_json, read_lines
from shared_models.identity import stated
from shared_models.parse import parse, parse_json, plain
from shared_models.plan import Plan, derive, total
from shared_models.plan import sha256 as plan_sha256
from shared_models.planned import PURPOSE, constraints, planned, statement
from shared_models.preprocess import preprocess
from shared_models.protect.counted_plan import plan_counts
from shared_models.study import Evaluate, Model, Planning, Preprocess, Rounds, Strategy, Study, Train, canonical, sha256
from shared_models.transfer import Blobs
from shared_models.update import Expected, Update, admit
from shared_models.weights import NO_WEIGHTS, InMemory, load, save_arrays, schema_of
from shared_models.wire import BlobRef, Order, Proof, Reply, read_order, read_reply, write_order, write_reply
from simulations.engine import NodeConfig, identify, run_local
from tests.edge import joined_site, running_edge
from tests.order_path import SECURE
from tests.toys import WEIGHTS, Clock, ScriptedGrid, ToyLearner, toy_app

STUDY = Study(
    name="toy",
    plan="federated",
    planning=Planning(memory_gib=0.1, batch_most=4),
    train=Train(local_steps=2, deterministic=True, precision="float32"),
    rounds=Rounds(count=2, quorum=2, deadline_s=100, pause_s=50, gather_s=0),
)
SITES = {"east": (4, 0.7), "north": (6, 0.7), "south": (3, 0.9)}  # cases, voxel size


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites' CTs of 24 x 28 voxels and 4 to 6 planes, in each a bright block that is labelled."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(3)
    for name, (count, mm) in SITES.items():
        (folder / name).mkdir()
        rows = ["patient_id,image,mask,split"]
        for n in range(count + 2):
            labels = np.zeros((24, 28, int(rng.integers(4, 7))), np.uint8)
            at = rng.integers(4, 10)
            labels[at : at + 9, at : at + 11] = 1
            voxels = np.where(labels, rng.normal(60, 30, labels.shape), rng.normal(-800, 60, labels.shape))
            for kind, content in (("image", voxels.astype(np.int16)), ("mask", labels)):
                affine = np.diag([mm, mm, 2.5, 1.0])
                image: Any = nibabel.Nifti1Image(content, affine)
                image.set_sform(affine, code="scanner")
                nibabel.save(image, folder / name / f"{kind}{n}.nii")
            split = "train" if n < count else "test"
            rows.append(f"p{n},image{n}.nii,mask{n}.nii,{split}")
        (folder / name / "manifest.csv").write_text("\n".join(rows))
    return folder


def here(data: Path, name: str = "east") -> Site:
    return open_site({"site": name, "data": str(data / name), "work": str(data)})


@pytest.fixture(scope="module")
def plan(data: Path) -> Plan:
    """What the three sites' plan has to be."""
    return derive(total(site_fingerprint(here(data, name), STUDY) for name in SITES), constraints(STUDY))


def play(
    folder: Path,
    data: Path,
    study: Study = STUDY,
    delays: Mapping[str, float] | None = None,
    learner: ToyLearner | None = None,
    sign: Callable[[str, bytes], Proof] | None = None,
) -> tuple[State, RunFolder, ScriptedGrid]:
    """One run, or the rest of it, with real counts and toy training."""
    clock = Clock()
    configs: dict[int, NodeConfig] = {
        i: {"site": s, "data": str(data / s), "work": str(data)} for i, s in enumerate(SITES, start=1)
    }
    run = RunFolder(folder / "toy") if (folder / "toy").exists() else create_run(folder, "toy", study, None)
    presence = Presence({s: i for i, s in enumerate(SITES, start=1)})
    grid = ScriptedGrid(toy_app(learner), configs, clock, delays)
    setting = Setting(
        grid, run, lambda: presence, Inline(), clock, clock.sleep, 0.5, reask_s=1000.0, first_weights=lambda _: WEIGHTS,
        sign=sign,
    )  # fmt: skip
    return carry_out(setting), run, grid


def plan_of(run: RunFolder, state: State) -> Plan:
    text = read_plan(run, state)
    assert text is not None
    return parse_json(Plan, text, "plan.json")


def orders(grid: ScriptedGrid) -> list[Order]:
    return [read_order(message) for _, _, message in grid.sent.values()]


# The run


def test_the_plan_is_the_one_of_the_sum_and_its_digest_is_that_of_its_file(tmp_path, data, plan):
    state, run, _ = play(tmp_path, data)
    assert plan_of(run, state) == plan
    assert state.plan_sha256 == hashlib.sha256((run.path / "plan.json").read_bytes()).hexdigest() == plan_sha256(plan)
    counted = (run.path / "fingerprint.json").read_bytes()
    assert hashlib.sha256(counted).hexdigest() == plan.fingerprint_sha256
    assert json.loads(counted)["cases"] == plan.cases == 13
    assert trained_study(run) == planned(STUDY, plan)
    assert state.round == 2


def test_statistics_come_before_weights_and_every_later_order_carries_the_plan(tmp_path, data, plan):
    state, _, grid = play(tmp_path, data)
    first, later = orders(grid)[:3], orders(grid)[3:]
    assert {(o.kind, o.round, o.base_sha256, o.plan) for o in first} == {("statistics", 0, NO_WEIGHTS, None)}
    assert {o.kind for o in later} == {"train", "evaluate"}
    assert {o.plan_sha256 for o in later} == {state.plan_sha256}
    assert {o.plan for o in later} == {canonical_json(plain(plan)).decode()}
    assert {o.study_sha256 for o in orders(grid)} == {sha256(STUDY)}


def test_fednova_counts_the_steps_of_the_batches_that_the_plan_sets(tmp_path, data, plan):
    assert (STUDY.train.batch_size, plan.batch_size) == (16, 3)
    learner = ToyLearner(examples=dict.fromkeys(SITES, 9))  # tells 3 steps
    study = replace(STUDY, train=Train(optimizer="sgd"), strategy=Strategy(normalise_steps=True))
    state, run, _ = play(tmp_path, data, study, learner=learner)
    assert state.round == 2
    assert [set(line["sites"]) for line in read_lines(run.metrics)[:2]] == [set(SITES)] * 2


def test_a_run_that_was_killed_goes_on_with_the_plan_that_it_has(tmp_path, data, plan):
    with pytest.raises(RoundPaused):
        play(tmp_path, data, replace(STUDY, rounds=replace(STUDY.rounds, quorum=3)), delays={"north": 1e6})
    assert read_state(RunFolder(tmp_path / "toy")).plan_sha256 is None  # a quorum of statistics was missing
    assert not (tmp_path / "toy" / "plan.json").exists()
    state, run, grid = play(tmp_path, data)
    assert "statistics" in {o.kind for o in orders(grid)}
    _, _, again = play(tmp_path, data)
    assert {o.kind for o in orders(again)} <= {"evaluate"}
    assert plan_of(run, state) == plan


def test_a_late_site_has_no_part_in_the_plan_and_trains_by_it(tmp_path, data, plan):
    state, run, grid = play(tmp_path, data, delays={"south": 150.0})
    assert plan_of(run, state).cases == 10
    assert {o.kind for o in orders(grid)} == {"statistics", "train", "evaluate"}


def test_counts_that_cannot_be_are_left_out_and_the_others_decide(tmp_path, data, monkeypatch):
    def boasting(site: Site, study: Study) -> Any:
        true = site_fingerprint(site, study)
        return replace(true, present=(1, 1, *true.present[2:])) if site.name == "north" else true

    monkeypatch.setattr("fedclient.fingerprint.site_fingerprint", boasting)
    state, run, _ = play(tmp_path, data)
    assert plan_of(run, state).cases == 7


def secretly(folder: Path, data: Path, **change: Any) -> RunFolder:
    """The same run with its histograms and updates in secure sums."""
    rounds = replace(STUDY.rounds, quorum=3, deadline_s=1000)
    run = create_run(folder, "toy", replace(STUDY, rounds=rounds, protect=SECURE, **change), None)
    configs: dict[str, NodeConfig] = {s: {"site": s, "data": str(data / s), "work": str(folder)} for s in SITES}
    run_local(run.path, configs, toy_app())
    return run


def test_under_secure_sums_the_plan_is_the_same_and_no_sites_histograms_are_known(tmp_path, data, plan):
    run = secretly(tmp_path, data)
    state = read_state(run)
    assert (plan_of(run, state), state.round) == (plan, 2)
    counted = (run.path / "fingerprint.json").read_bytes()
    assert hashlib.sha256(counted).hexdigest() == plan.fingerprint_sha256
    lines = [line for line in read_lines(run.metrics) if not line.get("final")]
    assert [line["together"]["sites"] for line in lines] == [sorted(SITES)] * 2
    stored = b"".join(p.read_bytes() for p in run.path.rglob("*") if p.is_file() and "members" not in p.parts)
    for name in SITES:
        alone = canonical_json(plain(site_fingerprint(here(data, name), STUDY)))
        assert alone not in stored
        assert alone[alone.index(b'"intensity"') : alone.index(b'"labelled"')] not in stored
    assert not (run.path / "sum").exists()


def test_a_site_that_lies_in_the_sum_of_histograms_ends_the_run_before_there_is_a_plan(tmp_path, data, monkeypatch):
    def lying(fingerprint: Any) -> dict[str, int]:
        return {**plan_counts(fingerprint), "plan/cases": 1000}

    monkeypatch.setattr("fedclient.summing.plan_counts", lying)
    with pytest.raises(SumAborted, match=r"histograms in the sum cannot be.*another seed"):
        secretly(tmp_path, data)
    assert read_state(RunFolder(tmp_path / "toy")).plan_sha256 is None


def test_a_plan_that_was_changed_on_disk_is_refused(tmp_path, data):
    _, run, _ = play(tmp_path, data)
    changed = json.loads(run.plan.read_bytes()) | {"batch_size": 1}
    run.plan.write_bytes(canonical_json(changed))
    with pytest.raises(StateInvalid, match="was changed after the run began"):
        play(tmp_path, data)
    run.plan.unlink()
    with pytest.raises(StateInvalid, match="is missing"):
        play(tmp_path, data)


def test_an_update_by_another_plan_is_not_counted():
    update = Update("north", "toy", 1, "a" * 64, "b" * 64, InMemory(WEIGHTS), 10, "c" * 64)
    expected = Expected("toy", 1, "a" * 64, "b" * 64, schema_of(WEIGHTS), plan_sha256="c" * 64)
    assert admit(update, expected) is update
    for other in (replace(update, plan_sha256=None), replace(update, plan_sha256="d" * 64)):
        with pytest.raises(UpdateRejected) as rejected:
            admit(other, expected)
        assert rejected.value.code == "OTHER_PLAN"


# A site


def order(kind: str, study: Study = STUDY, plan: Plan | None = None, **change: Any) -> Order:
    made = Order(kind, "toy", 1, 1, canonical(study).decode(), sha256(study), "b" * 64)  # type: ignore[arg-type]
    if plan is not None:
        made = replace(made, plan=canonical_json(plain(plan)).decode(), plan_sha256=plan_sha256(plan))
    return replace(made, **change)


def test_statistics_and_their_answer_come_back_from_the_wire_as_they_went(data):
    identify()
    sent = write_order(order("statistics", base_sha256=NO_WEIGHTS), 1)
    assert sent.metadata.message_type == "query"
    reply = carry_out_at_site(read_order(sent), {}, here(data), ToyLearner()).reply
    assert read_reply(write_reply(signed(reply, read_order(sent), None), sent), "east") == reply
    assert reply.fingerprint == site_fingerprint(here(data), STUDY)
    assert isinstance(reply, Reply)


def test_a_site_trains_by_no_other_plan_than_the_one_that_is_named(data, plan):
    def refused(of: Order) -> str:
        with pytest.raises(OrderRefused) as found:
            carry_out_at_site(of, WEIGHTS, here(data), ToyLearner())
        return found.value.code

    given = replace(STUDY, plan="given")
    good = order("train", plan=plan)
    assert carry_out_at_site(good, WEIGHTS, here(data), ToyLearner()).reply.plan_sha256 == plan_sha256(plan)
    assert refused(replace(good, plan_sha256="c" * 64)) == "PLAN_MISMATCH"
    assert refused(replace(good, plan=order("train", plan=replace(plan, batch_size=2)).plan)) == "PLAN_MISMATCH"
    assert refused(order("train")) == "PLAN_MISMATCH"
    assert refused(order("train", given, plan)) == "PLAN_MISMATCH"
    assert refused(order("statistics", given)) == "PLAN_GIVEN"


def proven(made: Order, federation: Federation, **change: str) -> Order:
    named = {"run": made.run, "study_sha256": made.study_sha256, "plan_sha256": made.plan_sha256, **change}
    return replace(made, plan_proof=proof(federation, PURPOSE, statement(**named)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def federations(tmp_path_factory: pytest.TempPathFactory) -> list[Federation]:
    folder = tmp_path_factory.mktemp("federations")
    return [init_federation(folder / name, name, "localhost:1") for name in ("ours", "theirs")]


@pytest.fixture
def hospital(tmp_path, data, federations) -> Site:
    """A deployed site that pinned the first federation's authority when it joined."""
    (tmp_path / "keys").mkdir()
    shutil.copyfile(federations[0].ca_certificate, tmp_path / "keys" / "ca.pem")
    return replace(here(data), folder=tmp_path, deployed=True)


def test_a_hospital_trains_by_a_plan_that_its_coordinator_signed_for_this_very_run(hospital, plan, federations):
    good = proven(order("train", plan=plan), federations[0])
    assert carry_out_at_site(good, WEIGHTS, hospital, ToyLearner()).reply.plan_sha256 == plan_sha256(plan)
    score = replace(good, kind="evaluate", round=2, evaluate="test")
    assert carry_out_at_site(score, WEIGHTS, hospital, ToyLearner()).reply.kind == "evaluation"


def never(of: Order, site: Site, study: Study) -> None:
    raise AssertionError("the data were looked at")


def test_a_hospital_trains_by_no_plan_that_is_unsigned_or_signed_by_others_or_for_another_run(
    hospital, plan, federations
):
    ours, theirs = federations

    def refused(of: Order) -> str:
        with pytest.raises(OrderRefused) as found:
            carry_out_at_site(of, WEIGHTS, hospital, ToyLearner())
        return found.value.code

    made = order("train", plan=plan)
    assert refused(made) == "PLAN_UNSIGNED"
    with pytest.raises(OrderRefused, match="has not signed"):  # before the data are looked at
        carry_out_at_site(made, WEIGHTS, hospital, ToyLearner(), never)
    assert refused(replace(made, kind="evaluate", round=2, evaluate="test")) == "PLAN_UNSIGNED"
    assert refused(proven(made, theirs)) == "PLAN_SIGNATURE"
    for change in ({"run": "other"}, {"study_sha256": "c" * 64}, {"plan_sha256": "c" * 64}):
        assert refused(proven(made, ours, **change)) == "PLAN_SIGNATURE"
    other = replace(plan, batch_size=2)
    signed = proven(made, ours).plan_proof
    assert refused(replace(order("train", plan=other), plan_proof=signed)) == "PLAN_SIGNATURE"
    assert refused(replace(proven(made, ours), plan=order("train", plan=other).plan)) == "PLAN_MISMATCH"


def test_a_hospital_knows_the_network_of_the_weights_that_it_was_sent_by_their_signed_plan(hospital, plan, federations):
    study, blobs = planned(STUDY, plan), hospital.folder / "blobs"
    blobs.mkdir()
    digest = save_arrays(hospital.folder / "part", nets.initial_weights(study))
    weights = (hospital.folder / "part").rename(blobs / digest)
    made = order("train", plan=plan, base_sha256=digest, blob=BlobRef(digest, weights.stat().st_size))
    link = Blobs("localhost:1", ssl.create_default_context())
    with pytest.raises(OrderRefused, match="has not signed"):
        _fetched(made, hospital, link, 1.0)
    with pytest.raises(ExplanationFailed, match="are here: none have come yet"):
        received(hospital, STUDY, sha256(STUDY))
    _fetched(proven(made, federations[0]), hospital, link, 1.0)
    found = received(hospital, STUDY, sha256(STUDY))
    assert found.model.study == study
    assert found.words.startswith("sent for round 1 of run toy on 20")
    assert nets.schema(next(found.model.nets())) == schema_of(load(weights))


def test_a_deployed_run_signs_its_plan_and_keeps_the_signature(tmp_path, data, plan, federations):
    _, run, grid = play(tmp_path, data, sign=lambda purpose, content: proof(federations[0], purpose, content))
    later = [o for o in orders(grid) if o.kind != "statistics"]
    kept = json.loads((run.path / "plan-proof.json").read_bytes())
    assert {plain(o.plan_proof)["signature"] for o in later} == {kept["signature"]}
    content = statement("toy", sha256(STUDY), plan_sha256(plan))
    authority = federations[0].ca_certificate.read_bytes()
    given = kept["certificate"].encode(), bytes.fromhex(kept["signature"])
    assert stated(authority, *given, PURPOSE, content)
    assert all(o.plan_proof is None for o in orders(grid) if o.kind == "statistics")


def test_a_hospital_with_few_cases_refuses_to_be_counted(data):
    with pytest.raises(OrderRefused, match="do not leave this site") as refused:
        carry_out_at_site(order("statistics"), {}, replace(here(data), smallest_count=11), ToyLearner())
    assert refused.value.code == "FEW_CASES"


def test_a_deployed_site_reads_its_images_once_however_often_it_is_asked_for_statistics(tmp_path, data, monkeypatch):
    with running_edge(tmp_path / "federation") as edge:
        keys = joined_site(edge, tmp_path / "sites", "east").keys
        shutil.copytree(keys, tmp_path / "site" / "keys")
        site = replace(here(data), folder=tmp_path / "site", deployed=True, coordinator=edge.address)
        asked = order("statistics", base_sha256=NO_WEIGHTS, round=0)
        first = answered(asked, site, ToyLearner())
        monkeypatch.delattr("fedclient.fingerprint.site_fingerprint")
        assert answered(replace(asked, attempt=2), site, ToyLearner()) == replace(first, attempt=2)
        assert first.fingerprint is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strides": ((1, 1), (7, 2), (2, 2))}, "stride.0` is 7"),
        ({"strides": ((2, 2), (2, 2), (2, 2))}, "the first of levels is at full size"),
        ({"kernels": ((3, 3), (3, 3), (3, 31))}, "kernel.1` is 31"),
        ({"patch": (10**6, 32)}, "size.0` is 1000000"),
        ({"patch": (33, 32)}, "must be multiples of"),
        ({"features": (32, 64, 10**6)}, "features` is 1000000"),
        ({"batch_size": 0}, "batch_size` is 0"),
        ({"deviation": 0.0}, "deviation` is 0.0"),
        ({"clip_hu": (5.0, 5.0)}, "window_hu must rise"),
        ({"spacing_mm": (0.0, 1.0)}, "spacing_mm.0` is 0.0"),
        ({"patch": (32, 32, 8), "spacing_mm": (1.0, 1.0, 1.0)}, "model.spatial_dims is 2"),
        ({"strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2))}, "levels need 2 strides"),
    ],
)
def test_a_plan_that_nobody_could_train_by_is_refused(plan, change, says):
    with pytest.raises(StudyInvalid, match=says):
        planned(STUDY, replace(plan, **change))


# What a plan becomes


def test_a_planned_study_has_the_plans_preprocessing_network_and_batch(plan):
    study = planned(STUDY, plan)
    assert study.plan == "given"
    assert study.preprocess == Preprocess(
        size=plan.patch, fit="patches", intensity="zscore", window_hu=plan.clip_hu or (0, 0),
        spacing_mm=plan.spacing_mm, mean=plan.mean, deviation=plan.deviation,
    )  # fmt: skip
    assert [(level.stride, level.kernel) for level in study.model.levels] == [
        *zip(plan.strides, plan.kernels, strict=True)
    ]
    assert (study.model.name, study.model.norm, study.train.batch_size) == ("dynunet", "instance", plan.batch_size)
    assert (study.seed, study.rounds, study.task) == (STUDY.seed, STUDY.rounds, STUDY.task)


@pytest.mark.parametrize(
    "written",
    [
        Model(features=(16, 16, 32, 64, 128, 16)),
        Model(name="resnet18", width=32, norm="instance"),
        Model(name="vgg16", norm="none", head="full"),
    ],
    ids=lambda model: model.name,
)
def test_what_the_file_says_of_another_network_is_not_used(plan, written):
    assert planned(replace(STUDY, model=written), plan) == planned(STUDY, plan)


def test_a_plan_of_few_levels_has_no_more_of_them_supervised_than_it_can(plan):
    made = planned(STUDY, plan).model
    assert len(made.levels) == 3
    five = (*made.levels, made.levels[-1], made.levels[-1])
    for supervised, found in ((3, 1), (1, 1), (0, 0)):
        written = Model("dynunet", levels=five, supervised=supervised)
        assert planned(replace(STUDY, model=written), plan).model.supervised == found


@pytest.mark.parametrize("modality", ["xray", "photo"])
def test_what_is_for_patches_is_refused_before_anybody_has_counted_where_a_plan_makes_none(modality):
    for told in ({"train": {"foreground": 0.5}}, {"evaluate": {"overlap": 0.25}}):
        with pytest.raises(StudyInvalid, match="a plan makes none of pictures without spacing"):
            parse(Study, {"name": "s", "plan": "federated", "modality": modality, **told}, "study.toml")
        assert parse(Study, {"name": "s", "plan": "federated", **told}, "study.toml").plan == "federated"


def test_the_network_of_a_plan_maps_its_patch_to_a_logit_for_each_label_and_lists_each_tensor_once(plan):
    flat = planned(STUDY, plan)
    deep = planned(
        replace(STUDY, model=Model(spatial_dims=3)),
        replace(
            plan, spatial_dims=3, patch=(24, 32, 6), spacing_mm=(0.7, 0.7, 2.5), features=(8, 16, 32),
            strides=((1, 1, 1), (2, 2, 1), (2, 2, 2)), kernels=((3, 3, 1), (3, 3, 3), (3, 3, 3)),
        ),
    )  # fmt: skip
    for study in (flat, deep):
        net = nets.network(study).eval()
        size = study.preprocess.size
        assert net(torch.zeros(2, 1, *size)).shape == (2, 1, *size)
        arrays = nets.arrays_of(net)
        assert sum(a.size for a in arrays.values()) == sum(p.numel() for p in net.parameters())
        other = nets.network(replace(study, seed=1)).eval()
        nets.load_arrays(other, arrays)
        assert torch.equal(other(torch.ones(1, 1, *size)), net(torch.ones(1, 1, *size)))


def test_ct_is_clipped_and_scaled_by_numbers_that_all_sites_share():
    plan = Preprocess(
        size=(16, 16), fit="crop_pad", intensity="zscore", window_hu=(-900.0, 300.0), mean=-200.0, deviation=400.0
    )
    voxels = np.full((1, 8, 8, 1), 0.0, np.float32)
    voxels[0, 0, 0, 0], voxels[0, 0, 1, 0] = -2000, 2000
    found = preprocess(voxels, (1, 1, 1), plan).images[0, 0]
    assert (found[4, 4], found[4, 5], found[6, 6]) == (-1.75, 1.25, 0.5)
    assert (found[:4] == -1.75).all()  # outside the image is air


def test_other_images_are_scaled_each_by_itself_and_a_zero_background_stays_zero():
    voxels = np.zeros((1, 16, 16, 2), np.float32)
    voxels[0, 4:12, 4:12] = np.random.default_rng(0).normal(500, 50, (8, 8, 2))
    plan = Preprocess(size=(16, 16), fit="crop_pad", intensity="zscore", nonzero=True)
    found = preprocess(voxels, (1, 1, 1), plan).images[:, 0]
    brain = found[:, 4:12, 4:12]
    assert abs(brain.mean()) < 1e-4
    assert brain.std() == pytest.approx(1, abs=1e-4)
    assert (found[:, :4] == 0).all()
    whole = preprocess(voxels, (1, 1, 1), replace(plan, nonzero=False)).images
    assert (abs(whole.mean()) < 1e-4, whole.std() == pytest.approx(1, abs=1e-4)) == (True, True)
    flat = preprocess(np.zeros_like(voxels), (1, 1, 1), plan).images
    assert (flat == 0).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean": 1.0}, "mean and deviation come together"),
        ({"mean": 1.0, "deviation": 2.0}, "only with intensity"),
        ({"nonzero": True}, 'nonzero is for intensity = "zscore"'),
        ({"intensity": "zscore", "mean": 1.0, "deviation": 2.0, "nonzero": True}, "without mean and deviation"),
    ],
)
def test_a_normalisation_that_is_half_said_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        Preprocess(**change)


# All together


def in_one_place(data: Path) -> None:
    """A manifest over the three sites' files, so that one site can hold all of them."""
    rows = ["patient_id,image,mask,split"]
    for name in SITES:
        for row in (data / name / "manifest.csv").read_text().splitlines()[1:]:
            patient, image, mask, split = row.split(",")
            rows.append(f"{name}-{patient},{name}/{image},{name}/{mask},{split}")
    (data / "manifest.csv").write_text("\n".join(rows))


def test_a_federation_plans_trains_and_tests_its_network_and_the_same_data_in_one_place_plan_alike(tmp_path, data):
    study = replace(STUDY, model=Model(spatial_dims=3))
    configs: dict[str, NodeConfig] = {
        s: {"site": s, "data": str(data / s), "work": str(tmp_path), "device": "cpu", "threads": 1} for s in SITES
    }
    run = create_run(tmp_path, "federated", study, None)
    state = run_local(run.path, configs)
    first, second, final = read_lines(run.metrics)
    losses = [np.mean([line["sites"][s]["losses"] for s in SITES]) for line in (first, second)]
    assert losses[1] < losses[0]
    assert final["federation"]["lung"]["cases"] == 6
    assert load(run.weights(2)).keys() == nets.initial_weights(trained_study(run)).keys()
    assert run_local(run.path, configs) == state  # finished: nothing is asked again
    in_one_place(data)
    alone = replace(study, rounds=replace(study.rounds, quorum=1, count=1), evaluate=Evaluate(every=0))
    pooled = create_run(tmp_path, "pooled", alone, None)
    run_local(pooled.path, {"pooled": {**configs["east"], "site": "pooled", "data": str(data)}})
    assert pooled.plan.read_bytes() == run.plan.read_bytes()
