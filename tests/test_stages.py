"""What is done to updates on their way out and undone on their way in: bounds, sizes, and what goes together."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedserver.checkpoint import RunFolder
from shared_models.errors import UpdateRejected
from shared_models.files import read_lines
from shared_models.protect.privacy import Privacy, Protect
from shared_models.protect.secure import SecureAggregation
from shared_models.protect.stages import (
    PLACES,
    SCALE,
    VALUES,
    clipped,
    incoming,
    on_the_wire,
    outgoing,
    towards_zero,
)
from shared_models.study import Evaluate, Rounds, Strategy, Study, Train
from shared_models.weights import InMemory, load, one, schema_of, size_bytes
from simulations.engine import run_local
from tests.toys import WEIGHTS, ToyLearner, new_run, nodes, toy_app

FLOATS = st.floats(-4, 4, width=32, allow_nan=False)
DELTAS = st.fixed_dictionaries(
    {"w": arrays(np.float32, (3, 5), elements=FLOATS), "b": arrays(np.float32, 7, elements=FLOATS)}
)
PRIVATELY = Train(local_steps=3, precision="float32")
COMPRESSED = [Protect(compression="fp16"), Protect(compression="int8"), Protect(compression="top_k", top_k=0.4)]


def dense_of(protect, sent, schema):
    """All of an update that `outgoing` gave, as the coordinator reads it."""
    tensors = incoming(protect, InMemory(sent), schema, "update")
    return {name: one(tensors, name) for name in schema}


def length(delta) -> float:
    return float(np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in delta.values())))


@given(DELTAS, st.floats(0.01, 20))
def test_a_clipped_update_is_no_longer_than_the_norm_and_points_where_it_pointed(delta, norm):
    short = clipped(delta, norm)
    assert length(short) <= norm or length(delta) <= norm
    factor = min(1.0, norm / max(length(delta), 1e-30))
    for name, array in delta.items():
        np.testing.assert_allclose(short[name], array * factor, rtol=1e-5, atol=1e-30)


@given(DELTAS, st.sampled_from(COMPRESSED), st.floats(0.01, 20))
def test_no_compression_lengthens_an_update_and_what_it_cuts_off_is_remembered_to_the_last_bit(delta, protect, norm):
    sent, left = outgoing(replace(protect, clip_norm=norm), delta, {})
    dense = dense_of(protect, sent, schema_of(delta))
    assert length(dense) <= norm * (1 + 1e-6)
    for name, array in clipped(delta, norm).items():
        np.testing.assert_array_equal(left[f"residual/{name}"], array - dense[name])
    assert schema_of(sent) == on_the_wire(protect, schema_of(delta))


@pytest.mark.parametrize(("protect", "bound"), [(COMPRESSED[0], 2.0**-10), (COMPRESSED[1], 1 / 127)])
def test_the_error_of_an_element_is_below_one_step_of_its_tensor(protect, bound):
    delta = {"w": np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.float32(1e-7)}
    sent, _ = outgoing(protect, delta, {})
    dense = dense_of(protect, sent, schema_of(delta))["w"]
    largest = np.abs(delta["w"]).max()
    assert np.abs(dense - delta["w"]).max() <= bound * largest
    assert np.abs(dense).max() >= 0.98 * largest  # also where float16 alone would give 0


@pytest.mark.parametrize("protect", COMPRESSED[:2])
@pytest.mark.parametrize("largest", [1.0 - 2.0**-20, 65519.0, 2.0**-126, 1e-45])
def test_numbers_at_the_ends_of_what_float16_and_float32_hold_stay_finite_and_lose_nothing(protect, largest):
    delta = {"w": np.array([largest, -largest, 0.0], np.float32)}
    sent, left = outgoing(protect, delta, {})
    dense = dense_of(protect, sent, schema_of(delta))["w"]
    assert np.isfinite(dense).all()
    assert (np.abs(dense) <= np.abs(delta["w"])).all()
    np.testing.assert_array_equal(dense + left["residual/w"], delta["w"])


def test_top_k_sends_the_largest_changes_of_each_tensor():
    delta = {"w": np.array([[0.1, -3.0, 0.0], [2.0, -0.2, 0.3]], np.float32), "b": np.array([0.001], np.float32)}
    sent, left = outgoing(Protect(compression="top_k", top_k=0.3), delta, {})
    assert sent[PLACES + "w"].tolist() == [1, 3]
    assert sent[VALUES + "w"].tolist() == [-3.0, 2.0]
    assert sent[VALUES + "b"].tolist() == [np.float32(0.001)]  # at least one
    np.testing.assert_array_equal(left["residual/w"], np.array([[0.1, 0, 0], [0, -0.2, 0.3]], np.float32))


@pytest.mark.parametrize("protect", COMPRESSED)
def test_what_was_cut_off_comes_with_the_next_updates_so_that_nothing_is_lost(protect):
    draw, left = np.random.default_rng(1), dict[str, np.ndarray]()
    asked, came = np.zeros(50), np.zeros(50)
    for _ in range(60):
        delta = {"w": (draw.standard_normal(50) * 0.01 + 0.002).astype(np.float32)}
        sent, left = outgoing(protect, delta, left)
        asked += delta["w"]
        came += dense_of(protect, sent, schema_of(delta))["w"]
    np.testing.assert_allclose(came + left["residual/w"], asked, atol=1e-5)
    assert np.abs(left["residual/w"]).max() < 0.1 < np.abs(asked).max()


def test_whole_numbers_travel_as_they_are():
    delta = {"steps": np.array([7], np.int64)}
    sent, left = outgoing(Protect(compression="int8", clip_norm=1.0), delta, {})
    assert (sent[VALUES + "steps"].tolist(), left) == ([7], {})
    assert dense_of(Protect(compression="int8"), sent, schema_of(delta))["steps"].tolist() == [7]


@given(arrays(np.float32, 9, elements=st.floats(-60000, 60000, width=32)))
def test_float16_is_rounded_towards_zero(numbers):
    halves = towards_zero(numbers)
    assert (np.abs(halves.astype(np.float64)) <= np.abs(numbers)).all()
    up = np.nextafter(np.abs(halves), np.float16(np.inf)).astype(np.float64)
    assert (up > np.abs(numbers)).all()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({VALUES + "w": np.zeros(5, np.float32)}, "UPDATE_SCHEMA"),
        ({PLACES + "w": np.array([0, 0], np.int32)}, "UPDATE_RANGE"),
        ({PLACES + "w": np.array([1, 0], np.int32)}, "UPDATE_RANGE"),
        ({PLACES + "w": np.array([-1, 0], np.int32)}, "UPDATE_RANGE"),
        ({PLACES + "w": np.array([0, 6], np.int32)}, "UPDATE_RANGE"),
    ],
)
def test_a_sparse_update_that_is_none_is_rejected(change, code):
    protect, delta = Protect(compression="top_k", top_k=0.3), {"w": np.ones((2, 3), np.float32)}
    sent = {**outgoing(protect, delta, {})[0], **change}
    with pytest.raises(UpdateRejected) as rejected:
        list(incoming(protect, InMemory(sent), schema_of(delta), "here").blocks("w"))
    assert rejected.value.code == code


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 0.0])
def test_a_scale_that_is_none_is_rejected(scale):
    protect, delta = Protect(compression="int8"), {"w": np.ones((2, 3), np.float32)}
    sent = {**outgoing(protect, delta, {})[0], SCALE + "w": np.array([scale], np.float32)}
    with pytest.raises(UpdateRejected, match="the scale of 'w'"):
        list(incoming(protect, InMemory(sent), schema_of(delta), "here").blocks("w"))


def test_a_tensor_of_several_blocks_is_made_dense_piece_by_piece(monkeypatch):
    monkeypatch.setattr("shared_models.protect.stages.BLOCK", 4)
    delta = {"w": np.arange(10, dtype=np.float32)}
    sent, _ = outgoing(Protect(compression="top_k", top_k=0.5), delta, {})
    tensors = incoming(Protect(compression="top_k", top_k=0.5), InMemory(sent), schema_of(delta), "here")
    assert [b.tolist() for b in tensors.blocks("w")] == [[0, 0, 0, 0], [0, 5, 6, 7], [8, 9]]


# Together


def study(**protect: object) -> Study:
    return Study(name="toy", rounds=Rounds(quorum=3), protect=Protect(**protect))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"protect": Protect(compression="top_k", secure_aggregation=SecureAggregation())}, "shows no zeros"),
        ({"protect": Protect(compression="int8", secure_aggregation=SecureAggregation())}, "ring_bits = 24 sends less"),
        ({"protect": Protect(compression="int8"), "rounds": Rounds(late="next")}, "would count twice"),
        ({"protect": Protect(top_k=0.1)}, 'top_k is for compression = "top_k"'),
        ({"protect": Protect(compression="top_k"), "strategy": Strategy(weighting="uniform", robust="median")},
         "take for their word"),
        ({"protect": Protect(compression="int8"), "train": Train(optimizer="sgd", momentum=0.0, scaffold=True),
          "strategy": Strategy(weighting="uniform")}, "corrected for twice"),
        ({"protect": Protect(clip_norm=1.0), "train": Train(optimizer="sgd", momentum=0.0, scaffold=True),
          "strategy": Strategy(weighting="uniform")}, "one length bounds both"),
        ({"protect": Protect(clip_norm=1.0, privacy=Privacy(1.0, 0.5)), "train": PRIVATELY,
          "strategy": Strategy(weighting="uniform"), "evaluate": Evaluate(every=0)}, "would only bias it"),
    ],
)  # fmt: skip
def test_stages_that_are_not_sound_together_are_refused_with_the_reason(tables, words):
    with pytest.raises(ValueError, match=words):
        replace(study(), **tables)


def test_a_clip_goes_before_masks_and_compression_after_noise():
    study(clip_norm=1.0, secure_aggregation=SecureAggregation())
    replace(
        study(compression="int8", privacy=None), protect=Protect(compression="int8", privacy=Privacy(1.0, 0.5)),
        train=PRIVATELY, strategy=Strategy(weighting="uniform"), evaluate=Evaluate(every=0),
    )  # fmt: skip


# Rounds

LEARNER = ToyLearner({"a": 1.0, "b": 2.0, "c": -1.5}, {"a": 10, "b": 10, "c": 10})


def ran(folder, protect: Protect, rounds: int = 4) -> RunFolder:
    made = Study(name="toy", rounds=Rounds(count=rounds, quorum=3), protect=protect, evaluate=Evaluate(every=0))
    run = new_run(folder, made, WEIGHTS)
    run_local(run.path, nodes(("a", "b", "c"), folder), toy_app(LEARNER))
    return run


@pytest.mark.parametrize("protect", [Protect(compression="fp16"), Protect(compression="int8")])
def test_a_compressed_run_ends_near_the_plain_one_and_sends_less(quick_folder, protect):
    plain, small = ran(quick_folder / "plain", Protect()), ran(quick_folder / "small", protect)
    for name, expected in load(plain.weights(4)).items():
        np.testing.assert_allclose(load(small.weights(4))[name], expected, atol=0.02)
    sent = [read_lines(run.metrics)[0]["bytes_up"] for run in (plain, small)]
    assert sent[0] == 3 * size_bytes(schema_of(WEIGHTS))
    assert sent[1] == 3 * size_bytes(on_the_wire(protect, schema_of(WEIGHTS))) < sent[0]


def test_a_sparse_run_catches_up_with_what_the_sites_remember(quick_folder):
    run = ran(quick_folder, Protect(compression="top_k", top_k=0.25), rounds=8)
    moved = load(run.weights(8))["body.weight"]  # each site's twelve elements move alike: three travel a round
    np.testing.assert_allclose(moved.mean(), 8 * 0.5, atol=0.5 * 4)
    assert (moved > 0).all()
    kept = sorted(quick_folder.glob("states/*/a/round-*.safetensors"))
    assert any(np.abs(load(path)["residual/body.weight"]).max() > 0 for path in kept)


def test_a_bounded_update_moves_the_model_no_further_than_its_norm(quick_folder):
    run = ran(quick_folder, Protect(clip_norm=0.5), rounds=1)
    before, after = load(run.weights(0)), load(run.weights(1))
    moved = {n: after[n].astype(np.float64) - before[n] for n in before if before[n].dtype.kind == "f"}
    assert length(moved) == pytest.approx(0.5 / 3, rel=1e-5)  # one of three pulls the other way
