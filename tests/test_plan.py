"""A plan from sums of counts: what pooled data would give, nnU-Net's published figures, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclient.fingerprint import site_fingerprint
from fedclient.site import Once, Site, open_site
from shared_models.errors import ImageUnreadable, OrderRefused, StudyInvalid, UpdateRejected
from shared_models.files import canonical_json
from shared_models.parse import parse_json, plain
from shared_models.plan import (
    LENGTH,
    NO_CASES,
    PER_CASE,
    SPACING_UM,
    Constraints,
    Fingerprint,
    Plan,
    derive,
    divisors,
    doubted,
    fingerprint_of,
    fitted,
    merge,
    moments,
    nth,
    percentile,
    released,
    sha256,
    target_spacing,
    topology,
    total,
)
from shared_models.study import Study, Task
from simulations.bench.plan import Pooled, compared, naive

GIB = 1 << 30
Case = tuple[np.ndarray, np.ndarray, tuple[float, float, float]]


def case(
    rng: np.random.Generator, mean: float, spread: float, spacing: float, size: int, dense: float = 0.0, planes: int = 6
) -> Case:
    """A cube of air with a labelled slab of tissue, whole HU; a share `dense` of the slab is as dense as bone."""
    voxels = np.full((size, size, planes), -1000, np.float32)
    labels = np.zeros(voxels.shape, np.uint8)
    labels[4 : size // 2, 4:-4] = 1
    tissue = rng.normal(mean, spread, voxels.shape)
    tissue[rng.uniform(size=voxels.shape) < dense] = rng.normal(320, 40)
    voxels[labels == 1] = np.rint(tissue[labels == 1])
    return voxels, labels, (spacing, spacing, rng.choice([1.25, 2.5, 5.0]))


def skewed() -> dict[str, list[Case]]:
    """Four sites as unlike as hospitals are: many thin, aerated lungs; few dense, contrasted ones."""
    rng = np.random.default_rng(7)
    return {
        "a": [case(rng, -870, 40, 0.703125, 20) for _ in range(24)],
        "b": [case(rng, -800, 90, 0.9765625, 28) for _ in range(9)],
        "c": [case(rng, -620, 160, 0.625, 36, dense=0.02) for _ in range(6)],
        "d": [case(rng, 30, 60, 0.78125, 44, dense=0.15) for _ in range(4)],
    }


def counted(each: Case, ct: bool = True) -> Fingerprint:
    voxels, labels, spacing_mm = each
    return fingerprint_of(voxels, labels, spacing_mm, ct, 1)


def summed(cases: Sequence[Case]) -> Fingerprint:
    return total(counted(each) for each in cases)


def raw(cases: Sequence[Case]) -> Pooled:
    """The same cases as voxels."""
    found = [voxels[labels == 1].astype(np.float64) for voxels, labels, _ in cases]
    hu, weights = np.concatenate(found), np.concatenate([np.full(len(f), 1 / len(f)) for f in found])
    order = np.argsort(hu, kind="stable")
    shapes = np.array([voxels.shape for voxels, _, _ in cases], np.float64)
    return Pooled(hu[order], weights[order], np.array([mm for _, _, mm in cases]), shapes)


@pytest.fixture(scope="module")
def sites() -> dict[str, list[Case]]:
    return skewed()


@pytest.fixture(scope="module")
def one(sites: dict[str, list[Case]]) -> Fingerprint:
    return counted(sites["c"][0])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_four_skewed_sites_plan_as_if_their_images_were_in_one_place(sites, spatial_dims):
    parts = {name: summed(cases) for name, cases in sites.items()}
    pooled = raw([each for cases in sites.values() for each in cases])
    for row in compared(parts, pooled, Constraints(8 * GIB, spatial_dims, "ct")):
        assert row.holds, row
        assert row.name[0] != "p" or row.error < 0.002, "4-HU bins give far more than the target"


def test_the_mean_of_the_sites_own_percentiles_is_far_off_where_the_sum_is_not(sites):
    parts = {name: summed(cases) for name, cases in sites.items()}
    pooled = raw([each for cases in sites.values() for each in cases])
    true, width = pooled.percentile(99.5), pooled.percentile(99.5) - pooled.percentile(0.5)
    assert true > 200
    assert naive(parts, 99.5) < -300  # measured in the field's own way: 237 HU became -317
    assert abs(percentile(total(parts.values()).intensity, 99.5) - true) < 0.01 * width
    own = [moments(part.intensity)[1] for part in parts.values()]
    mean_deviation = float(np.average(own, weights=[part.cases for part in parts.values()]))
    assert mean_deviation < 0.7 * pooled.moments()[1]


def test_the_plan_does_not_know_which_site_had_which_case(sites):
    constraints = Constraints(8 * GIB, 3, "ct")
    everything = [each for cases in sites.values() for each in cases]
    federated = derive(total(summed(cases) for cases in sites.values()), constraints)
    assert derive(summed(everything[::-1]), constraints) == federated
    assert sha256(derive(summed(everything), constraints)) == sha256(federated)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(0.3, 13), min_size=1, max_size=9), min_size=1, max_size=5), st.sampled_from([10, 50])
)
def test_a_spacing_of_the_federation_is_the_pooled_one_rounded_to_the_grid(spacings, q):
    voxels, labels = np.ones((2, 2, 2), np.float32), np.ones((2, 2, 2), np.uint8)
    parts = [total(fingerprint_of(voxels, labels, (1, 1, mm), ct=True) for mm in site) for site in spacings]
    exact = np.percentile([mm for site in spacings for mm in site], q, method="inverted_cdf")
    (nearest,) = np.flatnonzero(fingerprint_of(voxels, labels, (1, 1, exact), ct=True).spacing[2])
    assert nth(total(parts).spacing[2], SPACING_UM, q) == SPACING_UM[nearest]


def small_case(seed: int, mm: float, size: int, ct: bool) -> Fingerprint:
    rng = np.random.default_rng(seed)
    voxels = rng.normal(-300, 400, (size, size, 3)).astype(np.float32)
    labels = rng.integers(0, rng.integers(1, 5), voxels.shape, np.uint8)  # now and then nothing is labelled
    return fingerprint_of(voxels, labels, (mm, mm, 2 * mm), ct, 3)


def small_cases(ct: bool) -> st.SearchStrategy[Fingerprint]:
    return st.builds(small_case, st.integers(0, 99), st.floats(0.1, 10), st.integers(1, 9), st.just(ct))


@settings(max_examples=30, deadline=None)
@given(st.booleans().flatmap(lambda ct: st.tuples(small_cases(ct), small_cases(ct), small_cases(ct))))
def test_merging_is_associative_and_commutative_and_has_a_zero(three):
    a, b, c = three
    assert merge(merge(a, b), c) == merge(a, merge(b, c)) == merge(merge(c, b), a)
    assert merge(a, NO_CASES) == merge(NO_CASES, a) == a


def test_every_case_weighs_the_same_and_thin_tails_are_kept():
    rng = np.random.default_rng(0)
    spread = np.rint(rng.uniform(-1000, 3000, (100, 100, 20))).astype(np.float32)
    many = rng.uniform(size=spread.shape) < 0.97
    spread[many] = rng.integers(40, 44, int(many.sum()))
    found = fingerprint_of(spread, np.ones(spread.shape, np.uint8), (1, 1, 1), ct=True)
    assert sum(found.intensity) == PER_CASE
    assert sum(found.intensity[300:]) == pytest.approx(PER_CASE * (spread >= 176).mean(), abs=1)  # 8 voxels a bin
    four = np.array([-700, -699, -698, -697], np.float32).reshape(2, 2, 1)
    few = fingerprint_of(four, np.ones((2, 2, 1), np.uint8), (1, 1, 1), ct=True)
    assert moments(merge(found, few).intensity)[0] == pytest.approx((spread.mean() - 698.5) / 2, abs=0.1)


def test_padding_of_the_circle_and_metal_fall_into_the_outermost_bins():
    voxels = np.array([-3024, -1024, 3071, 9000], np.float32).reshape(2, 2, 1)
    found = fingerprint_of(voxels, np.ones((2, 2, 1), np.uint8), (1, 1, 1), ct=True)
    assert (found.intensity[0], found.intensity[-1]) == (PER_CASE // 2, PER_CASE // 2)


def test_percentiles_lie_inside_a_bin_and_nothing_has_none():
    counts = [0] * 1024
    counts[256], counts[300] = 30, 10
    assert percentile(counts, 0) == -1024.5 + 4 * 256
    assert percentile(counts, 37.5) == -1024.5 + 4 * 256.5
    assert percentile(counts, 100) == -1024.5 + 4 * 301
    assert np.isnan(percentile([0] * 1024, 50))
    assert np.isnan(moments([0] * 1024)).all()


def test_what_is_not_labelled_or_marked_to_be_ignored_does_not_count():
    voxels = np.arange(8, dtype=np.float32).reshape(2, 2, 2) * 100 + 4
    labels = np.array([0, 1, 2, 127, 0, 0, 0, 3], np.uint8).reshape(2, 2, 2)
    found = fingerprint_of(voxels, labels, (1, 1, 1), ct=True, label_count=2)
    assert np.count_nonzero(found.intensity) == 2
    assert found.present[:4] == (1, 1, 0, 0)
    empty = fingerprint_of(voxels, np.zeros_like(labels), (1, 1, 1), ct=True, label_count=2)
    assert (empty.cases, empty.labelled, sum(empty.intensity)) == (1, 0, 0)


def test_shapes_are_those_after_cropping_to_what_is_not_zero():
    voxels = np.zeros((60, 40, 10), np.float32)
    voxels[10:50, 5:35, 2:4] = 7
    labels = (voxels > 0).astype(np.uint8)
    found = fingerprint_of(voxels, labels, (1, 1, 3.0), ct=False)
    assert [nth(c, LENGTH) for c in found.shape] == [40, 30, 2]
    assert [nth(c, LENGTH) for c in found.extent] == [40, 30, 6]
    assert found.crop.index(1) == 2  # 2400 of 24000: the bin from 10 to 15 %
    assert (found.sum_milli, found.square_milli) == (7000, 49000)


def test_a_fingerprint_and_a_plan_come_back_from_json_as_they_went(one):
    assert parse_json(Fingerprint, canonical_json(plain(one)), "site") == one
    plan = derive(one, Constraints(8 * GIB, 3, "ct"))
    back = parse_json(Plan, canonical_json(plain(plan)), "plan")
    assert back == plan
    assert sha256(back) == sha256(plan)
    assert sha256(replace(plan, batch_size=plan.batch_size + 1)) != sha256(plan)


def first(change: int) -> Any:
    return lambda axes: [[axes[0][0] + change, *axes[0][1:]], *axes[1:]]


@pytest.mark.parametrize(
    ("field", "change", "says"),
    [
        ("intensity", lambda c: c[:-1], "1023 numbers, 1024 are agreed on"),
        ("intensity", lambda c: [-1, *c[1:]], "below 0"),
        ("intensity", lambda c: [c[0] + 1, *c[1:]], "1 labelled cases cannot have 10001 intensities"),
        ("intensity", lambda c: [0.5, *c[1:]], "valid integer"),
        ("intensity", lambda c: [True, *c[1:]], "valid integer"),
        ("spacing", first(1), "does not count each of 1 cases once"),
        ("shape", first(-1), "below 0"),
        ("extent", lambda axes: axes[:2], "extent"),
        ("crop", lambda c: [1] * 20, "does not count each"),
        ("present", lambda c: [2, *c[1:]], "2 of 1 labelled cases"),
        ("present", lambda c: c * 2, "64 numbers"),
        ("labelled", lambda n: 2, "2 of 1 cases cannot be labelled"),
        ("cases", lambda n: -1, "cannot be labelled"),
        ("square_milli", lambda n: -1, "cannot have the sums"),
        ("square_milli", lambda n: 10**14, "cannot have the sums"),
        ("sum_milli", lambda n: 5000, "cannot have the sums 5000 and 0"),
        ("names", lambda n: ["patient"], "not a key here"),
    ],
)
def test_counts_that_no_cases_can_have_are_refused_on_arrival(one, field, change, says):
    sent = plain(one)
    sent[field] = change(sent.get(field))
    with pytest.raises(StudyInvalid, match=says):
        parse_json(Fingerprint, canonical_json(sent), "site 'north'")


def test_a_site_cannot_claim_a_million_cases_or_another_modality_or_no_label(one, sites):
    def claims(other: Fingerprint, code: str, ct: bool = True, label_count: int = 1) -> None:
        with pytest.raises(UpdateRejected) as found:
            doubted(other, "north", ct, label_count)
        assert found.value.code == code

    assert doubted(one, "north", True, 1) is one
    many = 2**20 + 1
    scaled = {f: np.multiply(getattr(one, f), many).tolist() for f in ("spacing", "shape", "extent", "crop", "present")}
    big = {"cases": many, "labelled": many, "intensity": np.multiply(one.intensity, many).tolist(), **scaled}
    claims(parse_json(Fingerprint, canonical_json({**plain(one), **big}), "north"), "FINGERPRINT_RANGE")
    claims(NO_CASES, "FINGERPRINT_RANGE")
    claims(one, "FINGERPRINT_KIND", ct=False)
    grey = counted(sites["a"][0], ct=False)
    claims(grey, "FINGERPRINT_KIND")
    assert doubted(grey, "north", False, 1) is grey
    claims(
        fingerprint_of(sites["a"][0][0], sites["a"][0][1] * 2, (1, 1, 1), ct=True, label_count=2), "FINGERPRINT_KIND"
    )


def test_a_site_with_few_cases_keeps_its_counts(one):
    with pytest.raises(OrderRefused, match=r"1 cases for training, .*; counts of fewer than 11 do not leave") as found:
        released(one, 11)
    assert found.value.code == "FEW_CASES"
    assert released(one, 1) is one
    none = replace(one, labelled=0, intensity=(0,) * len(one.intensity), present=(0,) * len(one.present))
    with pytest.raises(OrderRefused, match="100 cases for training, something is marked in 1;"):
        released(total([one, *[none] * 99]), 11)  # the grey levels of its lesions are those of one patient


# --- the planner


def test_a_plane_of_256_pixels_is_halved_six_times():
    found = topology((1.0, 1.0), (256, 256))
    assert found.strides == ((1, 1),) + ((2, 2),) * 6
    assert found.patch == (256, 256)


def test_an_anisotropic_patch_stops_halving_its_short_axis_first():
    found = topology((1.25, 0.75, 0.75), (80, 192, 160))
    assert found.strides[1:] == ((2, 2, 2),) * 4 + ((1, 2, 2),)
    assert divisors(found.strides) == (16, 32, 32)
    assert found.patch == (80, 192, 160)


def test_thick_slices_are_neither_halved_nor_convolved_across_before_planes_are_as_coarse():
    found = topology((3.6, 0.625, 0.625), (20, 320, 256))
    assert found.strides[1:] == ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
    assert found.kernels[:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3))


@pytest.mark.parametrize(
    ("spacing_mm", "median_shape", "cases", "patch", "batch_size"),
    [
        # printed in the issues of MIC-DKFZ/nnUNet, by number; 8 GB
        ((1.0, 1.0, 1.0), (36, 50, 35), 260, (40, 56, 40), 9),  # 148: hippocampus
        ((1.545, 0.80669916, 0.80669916), (139, 497, 497), 100, (56, 224, 192), 2),  # 1768
        ((2.3565655, 1.8410668, 1.8410668), (177, 217, 217), 489, (128, 128, 128), 2),  # 2227: kidneys
        ((0.78125, 0.78125), (512, 512, 104), 489, (512, 512), 12),  # 2227, in planes
        ((1.0, 1.0), (2848, 4288, 1), 100, (1024, 1536), 2),  # 2251: retinal photographs
    ],
)
def test_patch_and_batch_are_those_that_nnu_net_prints(spacing_mm, median_shape, cases, patch, batch_size):
    modest = Constraints(8 * GIB, 3 if len(spacing_mm) == 3 else 2, "mr", 2, edge_most=2048)
    chosen, batch = fitted(spacing_mm, median_shape, cases, modest)
    assert (chosen.patch, batch) == (patch, batch_size)


def test_less_memory_gives_a_smaller_patch_and_too_little_is_refused():
    def patch(gib: float) -> tuple[int, ...]:
        return fitted((1.0, 1.0, 1.0), (200, 200, 200), 50, Constraints(int(gib * GIB), 3, "ct"))[0].patch

    volumes = [int(np.prod(patch(gib))) for gib in (0.5, 2, 8, 24)]
    assert volumes == sorted(set(volumes))
    with pytest.raises(StudyInvalid, match="memory for training: 16384 bytes do not hold 2 patches"):
        patch(2**-16)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.2, 8), min_size=3, max_size=3),
    st.tuples(*[st.integers(1, 600)] * 3),
    st.sampled_from([2, 3]),
    st.floats(0.2, 24),
)
def test_every_plan_can_be_built_and_fits(spacing_mm, shape, dims, gib):
    constraints = Constraints(int(gib * GIB), dims, "ct")
    try:
        chosen, batch = fitted(tuple(spacing_mm[:dims]), shape, 20, constraints)
    except StudyInvalid:
        return
    assert all(n % d == 0 for n, d in zip(chosen.patch, divisors(chosen.strides), strict=True))
    assert len(chosen.strides) == len(chosen.kernels) >= 3
    assert 2 <= batch <= 256


def with_spacings(spacings: Sequence[float], size: tuple[int, int, int]) -> Fingerprint:
    voxels = np.ones(size, np.float32)
    labels = np.zeros(size, np.uint8)
    labels[0, 0, 0] = 1
    return total(fingerprint_of(voxels, labels, (1.0, 1.0, mm), ct=True) for mm in spacings)


def test_of_thick_and_few_slices_the_thin_ones_set_the_spacing():
    thick = [5.0] * 8 + [3.75, 2.5]
    assert target_spacing(with_spacings(thick, (64, 64, 10))) == (1.0, 1.0, 2.5)
    assert target_spacing(with_spacings(thick, (64, 64, 40))) == (1.0, 1.0, 5.0)  # as many voxels: the median
    assert target_spacing(with_spacings([3.0] * 10, (64, 64, 10))) == (1.0, 1.0, 3.0)
    assert target_spacing(with_spacings([5.0] * 8 + [0.5] * 2, (64, 64, 10))) == (1.0, 1.0, 1.0)


def test_ct_is_clipped_and_scaled_by_the_federation_and_mr_by_itself(one, sites):
    ct = derive(one, Constraints(8 * GIB, 2, "ct"))
    assert ct.clip_hu is not None
    assert ct.mean is not None
    assert ct.clip_hu[0] < ct.mean < ct.clip_hu[1]
    assert ct.nonzero is False
    grey = counted(sites["a"][0], ct=False)
    mr = derive(grey, Constraints(8 * GIB, 2, "mr"))
    assert (mr.clip_hu, mr.mean, mr.deviation, mr.nonzero) == (None, None, None, False)
    skull_stripped = np.zeros((40, 40, 40), np.float32)
    skull_stripped[5:35, 5:35, 5:35] = 300
    brain = fingerprint_of(skull_stripped, (skull_stripped > 0).astype(np.uint8), (1, 1, 1), ct=False)
    assert derive(brain, Constraints(8 * GIB, 3, "mr")).nonzero is True
    with pytest.raises(StudyInvalid, match="needs labelled ct cases"):
        derive(grey, Constraints(8 * GIB, 2, "ct"))


def test_pictures_state_no_voxel_size_and_are_not_resampled_to_one():
    picture, mask = np.full((300, 200, 1), 90, np.float32), np.ones((300, 200, 1), np.uint8)
    plan = derive(fingerprint_of(picture, mask, (1, 1, 1), ct=False), Constraints(2 * GIB, 2, "xray"))
    assert plan.spacing_mm is None
    assert plan.patch == (320, 224)


def test_channels_double_at_each_level_up_to_nnu_nets_caps():
    def features(size: tuple[int, int, int], constraints: Constraints) -> tuple[int, ...]:
        voxels, labels = np.ones(size, np.float32), np.ones(size, np.uint8)
        return derive(fingerprint_of(voxels, labels, (1, 1, 1), ct=True), constraints).features

    assert features((512, 512, 1), Constraints(8 * GIB, 2, "ct")) == (32, 64, 128, 256, 512, 512, 512, 512)
    assert features((128, 128, 128), Constraints(8 * GIB, 3, "ct")) == (32, 64, 128, 256, 320, 320)


# --- a site's side


STUDY = Study(name="t", task=Task(labels=("lung",)))


def site(folder: Path, cases: Sequence[Case], splits: Sequence[str], value: int = 1) -> Site:
    rows = ["patient_id,image,mask,split"]
    for n, ((voxels, labels, mm), split) in enumerate(zip(cases, splits, strict=True)):
        for name, content in (("i", voxels.astype(np.int16)), ("m", labels * np.uint8(value))):
            image: Any = nibabel.Nifti1Image(content, np.diag([*mm, 1.0]))
            image.set_sform(np.diag([*mm, 1.0]), code="scanner")
            nibabel.save(image, folder / f"p{n}-{name}.nii")
        rows.append(f"p{n},p{n}-i.nii,p{n}-m.nii,{split}")
    (folder / "manifest.csv").write_text("\n".join(rows))
    return open_site({"site": "north", "data": str(folder), "work": str(folder)})


def test_a_site_counts_its_training_cases_alone_and_says_how_far_it_is(sites, tmp_path):
    heard: list[tuple[int, int]] = []
    cases = sites["c"][:4]
    here = site(tmp_path, cases, ["train", "val", "test", "train"])
    found = site_fingerprint(here, STUDY, lambda done, of: heard.append((done, of)))
    assert found == summed([cases[0], cases[3]])
    assert heard == [(1, 2), (2, 2)]
    with pytest.raises(OrderRefused, match="fewer than 3"):
        site_fingerprint(replace(here, smallest_count=3), STUDY)
    rows = (tmp_path / "manifest.csv").read_text().replace("p3,", "p0,")
    (tmp_path / "manifest.csv").write_text(rows)
    with pytest.raises(OrderRefused, match="in 2; counts of fewer than 3"):  # of one patient
        site_fingerprint(replace(here, smallest_count=2, once=Once()), STUDY)


def test_counting_for_a_plan_ends_between_two_cases_once_it_may_not_go_on(sites, tmp_path):
    def go_on() -> None:
        raise OrderRefused("STUDY_WITHDRAWN", "withdrawn meanwhile")

    here = replace(site(tmp_path, sites["c"][:2], ["train", "train"]), go_on=go_on)
    heard: list[int] = []
    with pytest.raises(OrderRefused, match="withdrawn meanwhile"):
        site_fingerprint(here, STUDY, lambda done, of: heard.append(done))
    assert heard == []


def test_a_site_without_training_cases_says_so(sites, tmp_path):
    with pytest.raises(OrderRefused, match="no case with a label for training") as found:
        site_fingerprint(site(tmp_path, sites["c"][:1], ["test"]), STUDY)
    assert found.value.code == "NO_CASES"


def test_a_mask_of_another_study_is_named_by_its_row(sites, tmp_path):
    with pytest.raises(ImageUnreadable, match=r"2 of 2 cases .*\nrow \d \(case .*values \[2\]"):
        site_fingerprint(site(tmp_path, sites["c"][:2], ["train", "train"], value=2), STUDY)


def test_channels_of_ct_count_alike_and_make_one_histogram():
    labels = np.zeros((8, 8, 4), np.uint8)
    labels[2:4, 2:4, 1] = 1
    plain, contrast = np.full((2, 8, 8, 4), 0, np.float32)
    plain[labels == 1], contrast[labels == 1] = 40, 240
    found = fingerprint_of(np.stack([plain, contrast]), labels, (1, 1, 1), True, 1)
    assert {n: count for n, count in enumerate(found.intensity) if count} == {266: 5000, 316: 5000}  # (HU + 1024) / 4
    assert moments(found.intensity)[0] == pytest.approx(141.5)  # bins of whole numbers: 40 to 43, 240 to 243
    alone = fingerprint_of(plain, labels, (1, 1, 1), True, 1)
    assert alone == fingerprint_of(plain[None], labels, (1, 1, 1), True, 1)
    assert alone.intensity[266] == 10_000


def test_a_case_is_cropped_to_what_any_of_its_channels_shows(monkeypatch):
    labels = np.ones((40, 20, 10), np.uint8)
    first, second = np.zeros((2, 40, 20, 10), np.float32)
    first[3:7, 5:8, 2:4], second[12:30, 6, 9] = 100, 300
    for voxels in (1, 2**22):  # in pieces and whole
        monkeypatch.setattr("shared_models.plan.BLOCK_VOXELS", voxels)
        found = fingerprint_of(np.stack([first, second]), labels, (1, 1, 1), False, 1)
        assert [nth(counts, LENGTH) for counts in found.shape] == [27, 3, 8]
        assert found.crop[int(20 * 27 * 3 * 8 / 8000)] == 1
        assert found.sum_milli == round(1000 * (24 * 100 + 18 * 300) / 16_000)
